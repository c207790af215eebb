"""Small ONNX models with their cards, written on the fly: quick, deterministic, sensitive to position and colour.

``tiny(folder)`` gives a good model; keywords change one thing at a time, to good variants and to bad ones.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from wsiengine.models.card import Card, load_card
from wsiengine.models.integrity import file_sha256

FORMS: dict[str, dict[str, Any]] = {
    "uint8": {},
    "uint8 NCHW": {"layout": "NCHW"},
    "gate": {"gate": True},
    "float32 NCHW": {"dtype": "float32", "layout": "NCHW", "gate": True},
    "float32 NHWC": {"dtype": "float32"},
    "float16": {"dtype": "float16", "layout": "NCHW"},
    "long sums": {"size_px": 112, "stride_px": 16, "classes": 5},
    "odd side": {"size_px": 45, "stride_px": 9, "layout": "NCHW"},
    "batch of one": {"batch": 1},
    "fixed side": {"side": 32},
}  # changes that give good models
_TYPES = {"uint8": TensorProto.UINT8, "float32": TensorProto.FLOAT, "float16": TensorProto.FLOAT16}


@dataclass(frozen=True)
class Tiny:
    """What to build. ``poison``: the graph gives NaN (0/0) for a tile whose first pixel is pure red (255, 0, 0)."""

    size_px: int = 32
    stride_px: int = 8
    classes: int = 3
    dtype: str = "uint8"
    layout: str = "NHWC"
    gate: bool = False
    poison: bool = False
    batch: int | str = "n"
    side: int | str = "h"
    score_name: str = "logits"
    score_count: int | None = None  # other than the card's
    gate_scale: float = 1.0
    domain: str = ""


def tiny(folder: Path, **changes: Any) -> Card:
    """Write model and card into ``folder`` and load the card; ``changes`` are fields of :class:`Tiny`."""
    what = Tiny(**changes)
    folder.mkdir(parents=True, exist_ok=True)
    onnx.save(graph(what), folder / "tiny.onnx")
    return load_card(write_card(folder, card_json(what, file_sha256(folder / "tiny.onnx"))))


def write_card(folder: Path, data: Any, name: str = "card.json") -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / name
    path.write_text(json.dumps(data), encoding="utf-8")
    return path


def card_json(what: Tiny | None = None, sha256: str = "0" * 64) -> dict[str, Any]:
    """A whole card as JSON types."""
    what = what or Tiny()
    scaling = {} if what.dtype == "uint8" else {"range": [-1, 1], "mean": [0.5, 0.4, 0.3], "std": [0.2, 0.25, 0.5]}
    return {
        "schema_version": 1,
        "name": "tiny",
        "version": "1.0",
        "task": "classify",
        "classes": [{"name": f"Class {k}", "colour": [k, 2 * k, 255 - k]} for k in range(what.classes)],
        "input": {"size_px": what.size_px, "mpp": 1.0, "layout": what.layout, "dtype": what.dtype, **scaling},
        "outputs": {"scores": "logits", "cam": "cam", **({"gate": "gate"} if what.gate else {})},
        "activation": "softmax",
        "output_stride_px": what.stride_px,
        "gate": {"minimum": 0.2, "otherwise": "Nothing"} if what.gate else None,
        "resources": [{"file": "tiny.onnx", "sha256": sha256}],
        "licence": "Apache-2.0",
    }


def graph(what: Tiny) -> onnx.ModelProto:
    """Two convolutions, a class-activation map and its mean, with weights from fixed formulas."""
    count = what.score_count or what.classes
    wide = 16
    constants = {
        "w1": _weights(wide, 3, 3),
        "w2": _weights(count, wide, what.stride_px),
        "ramp": np.arange(1, 1 + count, dtype=np.float32).reshape(1, count, 1, 1) / 7,
        "scale": np.float32(1 / 64 if what.dtype == "uint8" else 1),
        "gate_scale": np.float32(what.gate_scale),
        "axes": np.array([1], np.int64),
        "red": np.array([[[[255]], [[0]], [[0]]]], np.float32),
        "hw": np.array([2, 3], np.int64),
        "ones2": np.ones(2, np.int64),
        "zeros2": np.zeros(2, np.int64),
    }
    nodes = [
        helper.make_node("Cast", ["tiles"], ["floats"], to=TensorProto.FLOAT),
        helper.make_node("Transpose", ["floats"], ["x"], perm=[0, 3, 1, 2] if what.layout == "NHWC" else [0, 1, 2, 3]),
        helper.make_node("Mul", ["x", "scale"], ["scaled"]),
        helper.make_node("Conv", ["scaled", "w1"], ["h1"], pads=[1, 1, 1, 1], kernel_shape=[3, 3]),
        helper.make_node("Relu", ["h1"], ["a1"]),
        helper.make_node("Conv", ["a1", "w2"], ["h2"], kernel_shape=[what.stride_px] * 2, strides=[what.stride_px] * 2),
        helper.make_node("Add", ["h2", "ramp"], ["cam"]),
        helper.make_node("ReduceMean", ["cam"], ["pooled"], axes=[2, 3], keepdims=0),
        *_poison(what),
        helper.make_node("Sigmoid", ["pooled"], ["fractions"]),
        helper.make_node("ReduceMean", ["fractions"], ["fraction"], axes=[1], keepdims=0),
        helper.make_node("Mul", ["fraction", "gate_scale"], ["gate"]),
    ]
    if what.domain:
        nodes.append(helper.make_node("Odd", ["gate"], ["odd"], domain=what.domain))
    sides = [what.side, what.side if isinstance(what.side, int) else "w"]
    shape = [what.batch, *sides, 3] if what.layout == "NHWC" else [what.batch, 3, *sides]
    named = {what.score_name: ["n", count], "gate": ["n"], "cam": ["n", count, "r", "s"]}
    proto = helper.make_graph(
        nodes,
        "tiny",
        [helper.make_tensor_value_info("tiles", _TYPES[what.dtype], shape)],
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, dims) for name, dims in named.items()],
        [numpy_helper.from_array(np.asarray(value), name) for name, value in constants.items()],
    )
    opsets = [helper.make_opsetid("", 17), *([helper.make_opsetid(what.domain, 1)] if what.domain else [])]
    return helper.make_model(proto, opset_imports=opsets, ir_version=8)


def _weights(outs: int, ins: int, side: int) -> np.ndarray:
    """Irregular numbers of both signs, scaled so that activations stay near 1."""
    number = np.arange(outs * ins * side * side, dtype=np.float64)
    return (
        (np.sin(number * number * 0.37 + 1.0) / (side * np.sqrt(ins))).astype(np.float32).reshape(outs, ins, side, side)
    )


def _poison(what: Tiny) -> list[onnx.NodeProto]:
    """Nodes from ``pooled`` to the scores; where ``poison`` is set, 0/0 for tiles that begin with a red pixel."""
    if not what.poison:
        return [helper.make_node("Identity", ["pooled"], [what.score_name])]
    return [
        helper.make_node("Slice", ["x", "zeros2", "ones2", "hw"], ["corner"]),
        helper.make_node("Sub", ["corner", "red"], ["difference"]),
        helper.make_node("Abs", ["difference"], ["distance"]),
        helper.make_node("ReduceMax", ["distance"], ["far"], axes=[1, 2, 3], keepdims=0),
        helper.make_node("Unsqueeze", ["far", "axes"], ["far1"]),
        helper.make_node("Div", ["far1", "far1"], ["one_or_nan"]),
        helper.make_node("Mul", ["pooled", "one_or_nan"], [what.score_name]),
    ]


def block(height: int, width: int) -> np.ndarray:
    """(height, width, 3) uint8 whose every pixel tells its position."""
    y, x = np.mgrid[:height, :width]
    return np.stack([(7 * y + 3 * x) % 251, (5 * x + y * x // 9) % 253, (11 * y + x) % 241], axis=-1).astype(np.uint8)


def lattice(height: int, width: int, side: int, step: int) -> np.ndarray:
    """(N, 2) corners y, x of every tile inside the block, row-major."""
    return np.array([(y, x) for y in range(0, height - side + 1, step) for x in range(0, width - side + 1, step)])
