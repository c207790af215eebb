"""Detectors written by hand: ONNX graphs that find drawn rectangles, or dots, exactly, in any of a card's conventions.

A pixel belongs to a mark of class k where red and green are that class' ``COLOURS``; blue is the mark's score, of 255.
Marks of one class must not touch, those of different classes may.

The graph: a pixel of the class whose upper and left neighbours are not begins a mark; how far it goes on to the right
and down is the distance to the next pixel that is not of the class, found by a maximum over the rest of the row.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from wsiengine.geometry import Box, Size
from wsiengine.models.card import Card, load_card
from wsiengine.models.integrity import file_sha256

COLOURS = {"One": (200, 30), "Two": (120, 90)}  # red, green
TISSUE = (214, 160, 196)


@dataclass(frozen=True)
class Planted:
    """Of what the detector is made.

    ``order`` and ``coordinates`` are the card's; ``masks`` is None, roi or full; ``background`` shifts the labels.
    ``deep``: grey of 16 bits, as uint16, or as float32 in the values themselves.
    ``wrong`` breaks it: nan, outside, reversed, score, label, mask.
    """

    side: int = 64
    stride: int = 8
    largest_px: float = 20.0
    mpp: float | None = 1.0
    order: str = "xyxy"
    coordinates: str = "pixels"
    background: str = "none"
    matrix: bool = False
    columns: bool = False
    masks: str | None = None
    grey: bool = False
    deep: str | None = None
    pad: int | None = None
    wrong: str | None = None
    batched: bool = False


def paint(size: Size, marks: list[tuple[str, Box, int]]) -> np.ndarray:
    """Mottled tissue with rectangles: class, place, score of 255."""
    random = np.random.default_rng(3)
    pixels = np.clip(np.array(TISSUE) + random.integers(-14, 15, (*size.shape, 1)), 0, 255).astype(np.uint8)
    for name, box, score in marks:
        pixels[box.slices] = (*COLOURS[name], score)
    return pixels


class _Graph:
    """Nodes and constants as they are added; every method returns the name of a tensor."""

    def __init__(self) -> None:
        self.nodes: list[Any] = []
        self.constants: list[Any] = []

    def __call__(self, kind: str, *inputs: Any, outputs: int = 1, name: str | None = None, **facts: Any) -> Any:
        names = [i if isinstance(i, str) else self.constant(i) for i in inputs]
        made = [name or f"t{len(self.nodes)}_{k}" for k in range(outputs)]
        self.nodes.append(helper.make_node(kind, names, made, **facts))
        return made[0] if outputs == 1 else made

    def constant(self, value: Any) -> str:
        name = f"c{len(self.constants)}"
        self.constants.append(numpy_helper.from_array(np.asarray(value), name))
        return name


def build(folder: Path, what: Planted = Planted(), **card: Any) -> Card:
    """Write detector and card into ``folder``; ``card`` replaces entries of the card's ``detection`` or, with
    ``top_…``, of the card."""
    folder.mkdir(parents=True, exist_ok=True)
    proto = _rectangles(what)
    path = folder / "planted.onnx"
    path.write_bytes(proto.SerializeToString(deterministic=True))
    outputs = {"boxes": "boxes", "scores": "scores"}
    outputs |= {} if what.matrix else {"labels": "labels"}
    outputs |= {"masks": "masks"} if what.masks else {}
    detection = {
        "largest_px": what.largest_px,
        "boxes": what.order,
        "coordinates": what.coordinates,
        "background": what.background,
        "columns": what.columns,
        "masks": what.masks,
    }
    top = {k.removeprefix("top_"): v for k, v in card.items() if k.startswith("top_")}
    detection |= {k: v for k, v in card.items() if not k.startswith("top_")}
    return _write_card(folder, what, outputs, detection, top)


def _write_card(folder: Path, what: Planted, outputs: dict, detection: dict, top: dict) -> Card:
    resources = [{"file": p.name, "sha256": file_sha256(p)} for p in sorted(folder.glob("*.onnx"))]
    data = {
        "schema_version": 1,
        "name": folder.name,
        "version": "1",
        "task": "detect",
        "classes": [{"name": n, "colour": [*rg, 128]} for n, rg in COLOURS.items()],
        "input": {
            "size_px": what.side,
            "mpp": what.mpp,
            "layout": "NHWC",
            "dtype": what.deep or "uint8",
            **({"channels": 1} if what.grey or what.deep else {}),
            **({"depth": 16} if what.deep else {}),
            **({"pad": what.pad} if what.pad is not None else {}),
        },
        "outputs": outputs,
        "activation": "identity",
        "output_stride_px": what.stride,
        "detection": detection,
        "resources": resources,
        "licence": "Apache-2.0",
    } | top
    path = folder / "card.json"
    path.write_text(json.dumps(data), encoding="utf-8")
    return load_card(path)


def _rectangles(what: Planted) -> onnx.ModelProto:
    g, side = _Graph(), what.side
    x = g("Cast", g("Transpose", "tiles", perm=[0, 3, 1, 2]), to=TensorProto.FLOAT)
    if what.grey or what.deep:
        x = g("Concat", x, x, x, axis=1)
    red, green, blue = (g("Slice", x, [k], [k + 1], [1]) for k in range(3))
    colours = np.array(list(COLOURS.values()), np.float32)
    is_red = g("Equal", red, colours[None, :, 0, None, None])
    is_green = g("Equal", green, colours[None, :, 1, None, None])
    inside = g("Cast", g("And", is_red, is_green), to=TensorProto.FLOAT)  # (1, classes, side, side)
    outside = g("Sub", np.float32(1), inside)
    above = g("Slice", g("Pad", inside, [0, 0, 1, 0, 0, 0, 0, 0]), [0], [side], [2])
    before = g("Slice", g("Pad", inside, [0, 0, 0, 1, 0, 0, 0, 0]), [0], [side], [3])
    begins = g("Mul", inside, g("Sub", np.float32(1), g("Max", above, before)))
    where = g("NonZero", begins)  # (4, n)
    label, y0, x0 = (g("Reshape", g("Slice", where, [k], [k + 1], [0]), [-1]) for k in (1, 2, 3))
    at = g("Transpose", where, perm=[1, 0])
    right = g("GatherND", _next(g, outside, side, axis=3), at)
    down = g("GatherND", _next(g, outside, side, axis=2), at)
    left, top = g("Cast", x0, to=TensorProto.FLOAT), g("Cast", y0, to=TensorProto.FLOAT)
    at_blue = g("Mul", at, np.array([1, 0, 1, 1], np.int64))
    score = g("Div", g("GatherND", blue, at_blue), np.float32(65535 if what.deep else 255))
    _outputs(what, g, (left, top, right, down), score, label)
    names = {"boxes": 1, "scores": 1, **({} if what.matrix else {"labels": 7}), **({"masks": 1} if what.masks else {})}
    out = [helper.make_tensor_value_info(n, kind, None) for n, kind in names.items()]
    kind = {"uint16": TensorProto.UINT16, "float32": TensorProto.FLOAT}.get(what.deep or "", TensorProto.UINT8)
    tiles = helper.make_tensor_value_info("tiles", kind, [1, side, side, 1 if what.grey or what.deep else 3])
    graph = helper.make_graph(g.nodes, "planted", [tiles], out, g.constants)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


def _next(g: _Graph, outside: str, side: int, axis: int) -> str:
    """For each pixel the next place to the right (or below) that is outside, the tile's end at the latest."""
    shape = [1, 1, 1, 1]
    shape[axis] = side
    nearness = (side - np.arange(side, dtype=np.float32)).reshape(shape)
    kernel = [1, side] if axis == 3 else [side, 1]
    pads = [0, 0, 0, side - 1] if axis == 3 else [0, 0, side - 1, 0]
    nearest = g("MaxPool", g("Mul", outside, nearness), kernel_shape=kernel, pads=pads, strides=[1, 1])
    return g("Sub", np.float32(side), g("Max", nearest, np.float32(0)))


def _outputs(what: Planted, g: _Graph, edges: tuple, score: str, label: str) -> None:
    """Boxes, scores, labels and masks in the conventions asked for."""
    classes = len(COLOURS)
    left, top, right, down = edges
    if what.wrong == "outside":
        left, right = g("Add", left, np.float32(5000)), g("Add", right, np.float32(5000))
    if what.wrong == "reversed":
        left, right = right, left
    if what.wrong == "nan":
        score = g("Div", g("Sub", score, score), g("Sub", score, score))
    if what.wrong == "score":
        score = g("Mul", score, np.float32(40))
    wide, high = g("Sub", right, left), g("Sub", down, top)
    half_wide, half_high = g("Div", wide, np.float32(2)), g("Div", high, np.float32(2))
    parts = {
        "xyxy": (left, top, right, down),
        "yxyx": (top, left, down, right),
        "xywh": (left, top, wide, high),
        "cxcywh": (g("Add", left, half_wide), g("Add", top, half_high), wide, high),
    }[what.order]
    columns = [g("Unsqueeze", p, [1]) for p in parts]
    boxes = g("Concat", *columns, axis=1)
    if what.coordinates == "normalised":
        boxes = g("Div", boxes, np.float32(what.side))
    shift = {"first": 1}.get(what.background, 0) + (9 if what.wrong == "label" else 0)
    shifted = g("Add", label, np.int64(shift))
    if what.matrix:
        one_hot = g("OneHot", shifted, np.int64(classes + (what.background != "none")), np.float32([0, 1]), axis=-1)
        scores = g("Mul", one_hot, g("Unsqueeze", score, [1]))
    else:
        scores = score
    if what.columns:
        boxes = g("Transpose", boxes, perm=[1, 0])
        scores = g("Transpose", scores, perm=[1, 0]) if what.matrix else scores
    ends = {"boxes": boxes, "scores": scores}
    if not what.matrix:
        ends["labels"] = shifted
    if what.masks:
        ends["masks"] = _masks(what, g, edges)
    for name, tensor in ends.items():
        if what.batched:
            g("Unsqueeze", tensor, [0], name=name)
        else:
            g("Identity", tensor, name=name)


def _masks(what: Planted, g: _Graph, edges: tuple) -> str:
    left, top, right, down = (g("Reshape", e, [-1, 1, 1]) for e in edges)
    side = what.side // 2 if what.wrong == "mask" else what.side
    rows = (np.arange(side, dtype=np.float32) + 0.5)[None, :, None]
    cols = rows.transpose(0, 2, 1)
    in_rows = g("And", g("Greater", rows, top), g("Less", rows, down))
    in_cols = g("And", g("Greater", cols, left), g("Less", cols, right))
    full = g("Cast", g("And", in_rows, in_cols), to=TensorProto.FLOAT)
    if what.masks == "full":
        return full
    ones = g("Mul", g("Add", g("Mul", left, np.float32(0)), np.float32(1)), np.ones((1, 28, 28), np.float32))
    return g("Unsqueeze", ones, [1])


def build_dots(folder: Path, *, side: int = 64, stride: int = 8, offsets: bool = True, **detection: Any) -> Card:
    """A heat-map model: single pixels of the class' red and green are objects, blue their score."""
    folder.mkdir(parents=True, exist_ok=True)
    g = _Graph()
    x = g("Cast", g("Transpose", "tiles", perm=[0, 3, 1, 2]), to=TensorProto.FLOAT)
    red, green, blue = (g("Slice", x, [k], [k + 1], [1]) for k in range(3))
    colours = np.array(list(COLOURS.values()), np.float32)
    is_red = g("Equal", red, colours[None, :, 0, None, None])
    is_green = g("Equal", green, colours[None, :, 1, None, None])
    inside = g("Cast", g("And", is_red, is_green), to=TensorProto.FLOAT)
    pool = {"kernel_shape": [stride, stride], "strides": [stride, stride]}
    g("Div", g("MaxPool", g("Mul", inside, blue), **pool), np.float32(255), name="heat")
    names = ["heat"]
    if offsets:
        anywhere = g("ReduceMax", inside, axes=[1], keepdims=1)
        place = np.arange(side, dtype=np.float32) % stride + 0.5
        across, down = place[None, None, None, :], place[None, None, :, None]
        found = [g("MaxPool", g("Mul", anywhere, p), **pool) for p in (across, down)]
        g("Concat", *found, axis=1, name="offsets")
        names.append("offsets")
    out = [helper.make_tensor_value_info(n, TensorProto.FLOAT, None) for n in names]
    tiles = helper.make_tensor_value_info("tiles", TensorProto.UINT8, ["n", side, side, 3])
    graph = helper.make_graph(g.nodes, "dots", [tiles], out, g.constants)
    proto = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    (folder / "dots.onnx").write_bytes(proto.SerializeToString(deterministic=True))
    outputs = {"scores": "heat", **({"offsets": "offsets"} if offsets else {})}
    facts = {"largest_px": 12.0, "point_px": 6.0} | detection
    return _write_card(folder, Planted(side, stride), outputs, facts, {})
