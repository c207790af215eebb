"""Whether the ONNX file keeps what its card promises: names, types and shapes before a run, finite scores within it."""

from contextlib import suppress
from typing import Any

import numpy as np

from wsiengine.errors import CardError, ScoreError
from wsiengine.models.card import Card

_GATE_SLACK = 1e-3  # a fraction summed in float32 may leave [0, 1] by a few bits
_OVERFLOW_HINT = "the ONNX file overflows on this input: try one exported as float32"
_GATE_HINT = "the gate is the part of the tile that may be diagnosed: put a sigmoid or a mean into the ONNX file"
_ONNX_TYPES = {
    "uint8": "tensor(uint8)",
    "uint16": "tensor(uint16)",
    "float32": "tensor(float)",
    "float16": "tensor(float16)",
}
_FLOATS = ("tensor(float)", "tensor(float16)", "tensor(double)")


def check_signature(inputs: list[Any], outputs: list[Any], card: Card) -> int | None:
    """Compare what an ONNX file states with its card, so far as it states it.

    Args:
        inputs, outputs: Described by ``name``, ``type`` and ``shape`` (a size, or a name or None where it is free).

    Returns:
        The batch size, where the file fixes it.

    Raises:
        CardError: They disagree; says in what.
    """
    if len(inputs) != 1:
        raise disagrees(card, f"{len(inputs)} inputs ({', '.join(i.name for i in inputs)})", "one, the tiles")
    tiles, spec = inputs[0], card.input
    if tiles.type != _ONNX_TYPES[spec.dtype]:
        raise disagrees(card, f"an input of type {tiles.type}", f"{_ONNX_TYPES[spec.dtype]}")
    side, channels = spec.size_px, spec.channels
    shape = (side, side, channels) if spec.layout == "NHWC" else (channels, side, side)
    if len(tiles.shape) != 4 or not _fits(tiles.shape[1:], shape):
        raise disagrees(card, f"an input of shape {_shape(tiles.shape)}", f"{_shape(['N', *shape])} ({spec.layout})")
    stated = {out.name: out for out in outputs}
    for name in card.outputs.names:
        if name not in stated:
            raise disagrees(card, f"the outputs {', '.join(stated)}", f"one called {name!r}")
        if stated[name].type not in _FLOATS and name not in (
            card.outputs.labels,
            card.outputs.masks,
            card.outputs.count,
        ):
            raise disagrees(card, f"an output {name!r} of type {stated[name].type}", "floating-point numbers")
    scores, classes = stated[card.outputs.scores].shape, len(card.classes)
    if card.task == "classify" and scores and (len(scores) != 2 or not _fits(scores[1:], (classes,))):
        raise disagrees(card, f"scores of shape {_shape(scores)}", f"[N, {classes}], one for each class")
    batch = tiles.shape[0]
    return batch if isinstance(batch, int) and batch > 0 else None


def check_outputs(outputs: list[np.ndarray], count: int, card: Card) -> None:
    """Compare the shapes that really came out for ``count`` tiles, in the order of ``card.outputs.names``.

    Raises:
        CardError: Of a classifier: they are not (count, classes) and, with a gate, (count,) or (count, 1). Of a
            segmenter: not (count, channels, rows, cols), one value per cell.
    """
    scores = outputs[0]
    if card.segmentation is not None:
        cells = card.input.size_px // card.output_stride_px
        if scores.shape != (count, len(card.segmentation.channels), cells, cells):
            wanted = f"[{count}, {len(card.segmentation.channels)}, {cells}, {cells}]: channels, rows and columns"
            raise disagrees(card, f"a map of shape {_shape(scores.shape)} for {count} tiles", wanted)
    if card.task == "detect":
        _check_detector(outputs, card)
    if card.task != "classify":
        return
    if scores.shape != (count, len(card.classes)):
        raise disagrees(card, f"scores of shape {_shape(scores.shape)} for {count} tiles", f"{len(card.classes)} each")
    if card.gate and outputs[1].shape not in ((count,), (count, 1)):
        raise disagrees(card, f"a gate of shape {_shape(outputs[1].shape)} for {count} tiles", "one number each")


def _check_detector(outputs: list[np.ndarray], card: Card) -> None:
    """Read the outputs of one tile as a run would; what the model says about a black one does not matter."""
    from wsiengine.decoding import decode

    with suppress(ScoreError):
        decode(dict(zip(card.outputs.roles, outputs, strict=True)), card)


def check_scores(scores: np.ndarray, origins_px: np.ndarray, card: Card, *, tolerant: bool = False) -> None:
    """Refuse NaN, infinity and a gate that is no fraction; clip the gate's last bits to [0, 1], in place.

    Args:
        scores: (N, card.score_channels) float32.
        origins_px: (N, 2), y and x of each tile in its block, for the message.
        tolerant: Such rows become NaN instead: not scored.

    Raises:
        ScoreError: Names the first such tile.
    """
    if tolerant:
        _drop_bad(scores, card)
        return
    bad = ~np.isfinite(scores).all(axis=1)
    if bad.any():
        tile = int(np.argmax(bad))
        what = "NaN" if np.isnan(scores[tile]).any() else "infinity"
        raise ScoreError(
            f"model {card.name} gave {what} for {_place(origins_px[tile])}"
            f" ({int(bad.sum())} of {len(scores)} tiles there); needed finite numbers.",
            hint=_OVERFLOW_HINT,
        )
    if card.gate is None:
        return
    gate = scores[:, -1]
    outside = (gate < -_GATE_SLACK) | (gate > 1 + _GATE_SLACK)
    if outside.any():
        tile = int(np.argmax(outside))
        raise ScoreError(
            f"model {card.name} gave the gate {gate[tile]:g} for {_place(origins_px[tile])}, needed 0 to 1.",
            hint=_GATE_HINT,
        )
    np.clip(gate, 0, 1, out=gate)


def check_maps(maps: np.ndarray, card: Card, *, tolerant: bool = False) -> None:
    """Refuse NaN, infinity and a gate that is no fraction in the maps of a block; clip the gate's rounding.

    Args:
        maps: (rows, cols, card.score_channels) float32, one value per cell; changed in place.
        tolerant: Such cells become NaN instead: not scored.

    Raises:
        ScoreError: Names the first such cell.
    """
    bad = ~np.isfinite(maps).all(axis=-1)
    if card.gate is not None:
        gate = maps[..., -1]
        bad |= (gate < -_GATE_SLACK) | (gate > 1 + _GATE_SLACK)
    if tolerant:
        maps[bad] = np.nan
    elif bad.any():
        row, col = np.argwhere(bad)[0].tolist()
        what, needed, hint = _fault(maps[row, col])
        y, x = row * card.output_stride_px, col * card.output_stride_px
        raise ScoreError(
            f"model {card.name} gave {what} for the cell at y {y}, x {x} px of its block"
            f" ({int(bad.sum())} of {bad.size} cells there); needed {needed}.",
            hint=hint,
        )
    if card.gate is not None:
        np.clip(gate, 0, 1, out=gate)


def _fault(cell: np.ndarray) -> tuple[str, str, str]:
    """What is wrong with a cell, what was needed, what to try."""
    if np.isfinite(cell).all():
        return f"the gate {cell[-1]:g}", "0 to 1", _GATE_HINT
    return "NaN" if np.isnan(cell).any() else "infinity", "finite numbers", _OVERFLOW_HINT


def _drop_bad(scores: np.ndarray, card: Card) -> None:
    bad = ~np.isfinite(scores).all(axis=1)
    if card.gate is not None:
        gate = scores[:, -1]
        bad |= (gate < -_GATE_SLACK) | (gate > 1 + _GATE_SLACK)
        np.clip(gate, 0, 1, out=gate)
    scores[bad] = np.nan


def disagrees(card: Card, got: str, needed: str) -> CardError:
    return CardError(
        f"card and ONNX file disagree: {card.model_path.name} has {got}; the card of {card.name} needs {needed}",
        hint="correct the card, or export the model again",
    )


def _fits(stated: list[Any], wanted: tuple[int, ...]) -> bool:
    """Whether every size that is stated (not free) is the wanted one."""
    return len(stated) == len(wanted) and all(
        got == need or not isinstance(got, int) or got < 1 for got, need in zip(stated, wanted, strict=True)
    )


def _shape(sizes: Any) -> str:
    return "[" + ", ".join("?" if size is None else str(size) for size in sizes) + "]"


def _place(origin_px: np.ndarray) -> str:
    return f"the tile at y {int(origin_px[0])}, x {int(origin_px[1])} px of its block"
