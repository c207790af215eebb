"""TorchScript to ONNX: run in a process of its own, and only where the user trusts the file, which holds pickles.

``python -m wsiengine.training.torchscript WEIGHTS FOLDER``: FOLDER holds the ``card.json`` that tells the input; the
ONNX file and ``reference.npz`` (tiles and the original's probabilities) are written beside it.
"""

import json
import sys
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import torch

from wsiengine.errors import CardError
from wsiengine.models.child import answer
from wsiengine.models.probe import drawn_tiles

_OPSET = 17


def convert(weights: Path, folder: Path) -> dict[str, Any]:
    """Write ``model.onnx`` and ``reference.npz`` into ``folder``.

    Raises:
        CardError: The file is no TorchScript, or its answers are not one row of numbers per tile and class.
    """
    card = json.loads((folder / "card.json").read_bytes())
    tiles = drawn_tiles(card["input"]["size_px"])
    batch = as_tensor(tiles, card["input"]["mean"], card["input"]["std"])
    try:
        network = torch.jit.load(str(weights), map_location="cpu").eval()
    except (RuntimeError, ValueError) as error:
        raise CardError(f"{weights.name} is no TorchScript: {_last_line(error)}", hint="fetch it again.") from error
    with torch.inference_mode():
        scores = network(batch)
    classes = len(card["classes"])
    if not isinstance(scores, torch.Tensor) or scores.shape != (len(tiles), classes):
        got = tuple(scores.shape) if isinstance(scores, torch.Tensor) else type(scores).__name__
        raise CardError(f"{weights.name} gives {got} for {len(tiles)} tiles; config.json promises {classes} classes")
    chances = scores.softmax(1) if card["activation"] == "softmax" else scores.sigmoid()
    np.savez(folder / "reference.npz", tiles=tiles, probabilities=chances.numpy())
    _export(network, batch, folder / "model.onnx")
    return {"written": True}


def as_tensor(tiles: np.ndarray, mean: list[float] | None, std: list[float] | None) -> torch.Tensor:
    """What ToTensor and Normalize make of (N, h, w, 3) uint8: (N, 3, h, w) float32."""
    values = torch.from_numpy(tiles).permute(0, 3, 1, 2).float() / 255
    if mean is not None:
        values = values - torch.tensor(mean).view(1, 3, 1, 1)
    return values / torch.tensor(std).view(1, 3, 1, 1) if std is not None else values


def _export(network: torch.jit.ScriptModule, batch: torch.Tensor, path: Path) -> None:
    axes = {"tiles": {0: "n"}, "logits": {0: "n"}}
    names: dict[str, Any] = {"input_names": ["tiles"], "output_names": ["logits"], "dynamic_axes": axes}
    try:
        with warnings.catch_warnings():
            warnings.simplefilter(
                "ignore"
            )  # torch warns that another exporter is newer; that one takes no ScriptModule
            torch.onnx.export(network, (batch[:2],), str(path), opset_version=_OPSET, dynamo=False, **names)
    except (RuntimeError, torch.onnx.errors.OnnxExporterError) as error:
        raise CardError(
            f"the model cannot be expressed in ONNX: {_last_line(error)}", hint="ask its makers for an ONNX file."
        ) from error


def _last_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or ["no reason given"])[-1][:300]


if __name__ == "__main__":
    torch.set_num_threads(1)
    answer(lambda: convert(Path(sys.argv[1]), Path(sys.argv[2])))
