"""Small ONNX segmenters with their cards: ``planted`` finds drawn glands exactly, ``blurred`` feels every pixel around.

A drawn gland is a disc or any shape of the colour :data:`GLAND` with a rim of :data:`RIM`; where two touch, rims do.
"""

from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from tests.models.tiny import write_card
from wsiengine.models.card import Card, load_card
from wsiengine.models.integrity import file_sha256

GLAND, RIM = (200, 60, 160), (60, 40, 150)
SIDE_PX, STRIDE_PX = 64, 4


def planted(folder: Path, **changes: Any) -> Card:
    """A pixel is gland within 40 levels of either colour (in each channel), border within 40 of the rim's."""
    nodes, weights = [], {"within": np.float32(40), "half": np.float32(0.5), "gain": np.float32(16)}
    for name, colour in (("gland", GLAND), ("rim", RIM)):
        weights[name] = np.array(colour, np.float32).reshape(1, 3, 1, 1)
        nodes += [
            helper.make_node("Sub", ["x", name], [f"{name}.d"]),
            helper.make_node("Abs", [f"{name}.d"], [f"{name}.a"]),
            helper.make_node("ReduceMax", [f"{name}.a"], [f"{name}.far"], axes=[1], keepdims=1),
            helper.make_node("Less", [f"{name}.far", "within"], [f"{name}.near"]),
            helper.make_node("Cast", [f"{name}.near"], [f"{name}.is"], to=TensorProto.FLOAT),
        ]
    nodes += [
        helper.make_node("Add", ["gland.is", "rim.is"], ["both"]),
        helper.make_node("Concat", ["both", "rim.is"], ["fine"], axis=1),
        helper.make_node("AveragePool", ["fine"], ["part"], kernel_shape=[STRIDE_PX] * 2, strides=[STRIDE_PX] * 2),
        helper.make_node("Sub", ["part", "half"], ["centred"]),
        helper.make_node("Mul", ["centred", "gain"], ["maps"]),
    ]
    return _write(folder, nodes, weights, changes)


def blurred(folder: Path, **changes: Any) -> Card:
    """Two convolutions that see far beyond a cell, and zeros beyond the tile: borders of tiles are wrong on purpose."""
    number = np.arange(4 * 3 * 81, dtype=np.float64)
    wide = np.sin(number * number * 0.37 + 1).reshape(4, 3, 9, 9) / 900
    number = np.arange(2 * 4 * 16, dtype=np.float64)
    weights = {
        "wide": wide.astype(np.float32),
        "narrow": (np.sin(number * number * 0.61 + 2).reshape(2, 4, 4, 4) / 4).astype(np.float32),
    }
    nodes = [
        helper.make_node("Conv", ["x", "wide"], ["far"], pads=[4] * 4, kernel_shape=[9, 9]),
        helper.make_node("Relu", ["far"], ["positive"]),
        helper.make_node("Conv", ["positive", "narrow"], ["maps"], kernel_shape=[4, 4], strides=[4, 4]),
    ]
    return _write(folder, nodes, weights, changes)


def card_json(sha256: str = "0" * 64, **changes: Any) -> dict[str, Any]:
    """A whole card as JSON types."""
    return {
        "schema_version": 1,
        "name": "rings",
        "version": "1.0",
        "task": "segment",
        "classes": [{"name": "Gland", "colour": [0, 114, 178]}],
        "input": {"size_px": SIDE_PX, "mpp": 1.0, "layout": "NHWC", "dtype": "uint8"},
        "outputs": {"scores": "maps"},
        "activation": "sigmoid",
        "output_stride_px": STRIDE_PX,
        "segmentation": {"channels": ["Gland", "contour"], "holes_um2": 2000, "min_area_um2": 300, "bright_above": 220},
        "resources": [{"file": "rings.onnx", "sha256": sha256}],
        "licence": "Apache-2.0",
        **changes,
    }


def _write(folder: Path, nodes: list[Any], weights: dict[str, Any], changes: dict[str, Any]) -> Card:
    folder.mkdir(parents=True, exist_ok=True)
    first = [
        helper.make_node("Cast", ["tiles"], ["floats"], to=TensorProto.FLOAT),
        helper.make_node("Transpose", ["floats"], ["x"], perm=[0, 3, 1, 2]),
    ]
    graph = helper.make_graph(
        [*first, *nodes],
        "rings",
        [helper.make_tensor_value_info("tiles", TensorProto.UINT8, ["n", "h", "w", 3])],
        [helper.make_tensor_value_info("maps", TensorProto.FLOAT, ["n", 2, "r", "s"])],
        [numpy_helper.from_array(np.asarray(value), name) for name, value in weights.items()],
    )
    onnx.save(
        helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), folder / "rings.onnx"
    )
    return load_card(write_card(folder, card_json(file_sha256(folder / "rings.onnx"), **changes)))
