"""From logits to probabilities: in float64, channel by channel, so that no memory layout changes a bit."""

import numpy as np


def activate(logits: np.ndarray, activation: str) -> np.ndarray:
    """Probabilities of the logits in the last axis.

    Args:
        logits: (…, classes), any float type.
        activation: ``softmax`` (classes exclude each other), ``sigmoid`` (each for itself) or ``identity`` (the model
            gives probabilities already).

    Returns:
        float32, the same shape. NaN stays NaN (a tile that was not analysed).
    """
    values = np.asarray(logits, np.float64)
    if activation == "identity":
        return values.astype(np.float32)
    if activation == "sigmoid":
        decay = np.exp(-np.abs(values))  # never overflows
        return (np.where(values >= 0, 1.0, decay) / (1.0 + decay)).astype(np.float32)
    if activation != "softmax":
        raise ValueError(f"activation is {activation!r}, needed softmax, sigmoid or identity")
    powers = np.exp(values - values.max(axis=-1, keepdims=True))
    total = np.zeros(values.shape[:-1])
    for channel in range(values.shape[-1]):  # numpy's own sum may pair terms differently by stride
        total += powers[..., channel]
    return (powers / total[..., np.newaxis]).astype(np.float32)
