"""Tissue of another stain than haematoxylin and eosin loses its say, by a rule inside the network's own file.

Haematoxylin and eosin both take most from green light. Diaminobenzidine (the brown of immunohistochemistry) takes
blue, and without eosin nothing is pink: what red and blue lose, over what green loses, tells the two apart. The ratio
is taken of mean optical densities over five by five cells. Above ``low``, the evidence for every class fades; at
``high`` none is left, every class is as likely as another, and the engine's rule for uncertain tiles takes over.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import onnx
from onnx import helper, numpy_helper

_POOL_PX = 8
"""Light is averaged over so many pixels before its logarithm is taken: noise counts less, and it is cheap."""
_AROUND_CELLS = 5
_FAINT_OD = 0.05
"""Added to both sides of the ratio: glass and faint tissue have no stain to speak of."""


@dataclass(frozen=True)
class StainRule:
    """Ratio from which the evidence fades and at which nothing is left of it."""

    low: float
    high: float


def stain_ratio(tile: np.ndarray, cell_px: int = 32) -> np.ndarray:
    """(OD of red + OD of blue) / OD of green, round every cell.

    Args:
        tile: uint8 RGB (rows, cols, 3), sides multiples of ``cell_px``.
        cell_px: Side of a cell.

    Returns:
        float32 (rows / cell_px, cols / cell_px).
    """
    rows, cols = tile.shape[:2]
    light = tile.reshape(rows // _POOL_PX, _POOL_PX, cols // _POOL_PX, _POOL_PX, 3).mean(axis=(1, 3), dtype=np.float32)
    density = -np.log((light + 1) / 256)
    per_cell = cell_px // _POOL_PX
    cells = density.reshape(rows // cell_px, per_cell, cols // cell_px, per_cell, 3).mean(axis=(1, 3))
    window = (_AROUND_CELLS, _AROUND_CELLS)
    total = cv2.boxFilter(cells, -1, window, normalize=False, borderType=cv2.BORDER_CONSTANT)
    inside = cv2.boxFilter(np.ones_like(cells), -1, window, normalize=False, borderType=cv2.BORDER_CONSTANT)
    red, green, blue = np.moveaxis(total / inside, -1, 0)
    return (red + blue + _FAINT_OD) / (green + _FAINT_OD)


def remaining_say(tile: np.ndarray, rule: StainRule) -> np.ndarray:
    """What part of its evidence every cell keeps: 1 for haematoxylin and eosin, 0 for another stain."""
    return np.clip((rule.high - stain_ratio(tile)) / (rule.high - rule.low), 0, 1)


def silence_other_stains(path: Path, rule: StainRule, *, cell_px: int = 32) -> None:
    """Put the rule into a file of :func:`wsiengine.training.export.export_onnx`, in place.

    Args:
        path: The ONNX file.
        rule: Where evidence fades.
        cell_px: Side of a cell.
    """
    model = onnx.load(path)
    nodes = list(model.graph.node)
    at = next(i for i, node in enumerate(nodes) if node.output[0] == "cam")
    for name, value in _constants(rule).items():
        model.graph.initializer.append(numpy_helper.from_array(np.asarray(value), name))
    evidence = next(name for name in nodes[at].input if name == "spoken")
    added = [*_nodes(cell_px // _POOL_PX), helper.make_node("Mul", [evidence, "stain.say"], ["stain.spoken"])]
    kept = ["stain.spoken" if name == evidence else name for name in nodes[at].input]
    nodes[at] = helper.make_node("Add", kept, ["cam"], name="cam")
    del model.graph.node[:]
    model.graph.node.extend([*nodes[:at], *added, *nodes[at:]])
    onnx.checker.check_model(model, full_check=True)
    onnx.save(model, path)


def _constants(rule: StainRule) -> dict[str, np.ndarray | np.generic]:
    return {
        "stain.one": np.float32(1),
        "stain.256": np.float32(256),
        "stain.other": np.array([-1, 0, -1], np.float32).reshape(1, 3, 1, 1),
        "stain.green": np.array([0, -1, 0], np.float32).reshape(1, 3, 1, 1),
        "stain.faint": np.float32(_FAINT_OD),
        "stain.high": np.float32(rule.high),
        "stain.slope": np.float32(1 / (rule.high - rule.low)),
        "stain.none": np.float32(0),
    }


def _nodes(per_cell: int) -> list[onnx.NodeProto]:
    around = _AROUND_CELLS // 2

    def pool(source: str, target: str, side: int, step: int, pad: int = 0) -> onnx.NodeProto:
        sizes: dict[str, Any] = {"kernel_shape": [side, side], "strides": [step, step], "pads": [pad] * 4}
        return helper.make_node("AveragePool", [source], [target], count_include_pad=0, **sizes)

    def node(kind: str, inputs: list[str], target: str) -> onnx.NodeProto:
        return helper.make_node(kind, [f"stain.{name}" for name in inputs], [f"stain.{target}"])

    return [
        helper.make_node("Cast", ["planar"], ["stain.light"], to=onnx.TensorProto.FLOAT),
        pool("stain.light", "stain.mean", _POOL_PX, _POOL_PX),
        node("Add", ["mean", "one"], "lit"),
        node("Div", ["lit", "256"], "part"),
        node("Log", ["part"], "log"),
        pool("stain.log", "stain.cells", per_cell, per_cell),
        pool("stain.cells", "stain.around", _AROUND_CELLS, 1, around),
        node("Conv", ["around", "other"], "red_blue"),
        node("Conv", ["around", "green"], "only_green"),
        node("Add", ["red_blue", "faint"], "above"),
        node("Add", ["only_green", "faint"], "below"),
        node("Div", ["above", "below"], "ratio"),
        node("Sub", ["high", "ratio"], "left"),
        node("Mul", ["left", "slope"], "share"),
        node("Clip", ["share", "none", "one"], "say"),
    ]
