"""Build the bundled model ``planted``: an ONNX graph, written by hand, that finds the planted marks exactly.

``python -m wsiengine.training.planted FOLDER`` writes ``planted.onnx`` and ``card.json`` (needs the onnx package).

The graph, for uint8 tiles (N, h, w, 3) with h and w multiples of the cell::

    near_k (pixel)  = 1 where |pixel − colour_k|² ≤ RADIUS², else 0
    cover_k (cell)  = mean of near_k over the 16 × 16 px cell
    cam_k (cell)    = GAIN · cover_k
    logits_k (tile) = mean of cam_k over cells
    gate (tile)     = mean over cells of cover_A + cover_B + cover_C: the part of the tile that is any mark

Distances are sums of whole numbers below 2²⁴, covers are multiples of 1/256: float32 holds them exactly, so every
machine, provider and order of summation gives the same bits, and a dense window equals the tile it covers.
"""

import json
import sys
from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, checker, helper, numpy_helper

from wsiengine.geometry import Mpp
from wsiengine.models import planted
from wsiengine.models.card import Card
from wsiengine.models.integrity import file_sha256
from wsiengine.models.parts import ClassInfo, Dense, Gate, InputSpec, Outputs, Resource

_OPSET, _IR = 17, 8


def build_graph() -> onnx.ModelProto:
    """The checked ONNX model."""
    colours = np.array(list(planted.MARKS.values()), np.float32)  # (marks, 3)
    constants = {
        "minus_two_colours": -2 * colours[:, :, None, None],
        "squared_colours": (colours**2).sum(axis=1),
        "squared_radius": np.float32(planted.RADIUS**2),
        "gain": np.float32(planted.GAIN),
        "channel_axis": np.array([1], np.int64),
    }
    cell = [planted.CELL_PX, planted.CELL_PX]
    # |x − c|² = x·x − 2 c·x + c·c: two reductions over the colour channels instead of one pass for each mark.
    nodes = [
        helper.make_node("Transpose", ["tiles"], ["planes"], perm=[0, 3, 1, 2]),
        helper.make_node("Cast", ["planes"], ["x"], to=TensorProto.FLOAT),
        helper.make_node("Mul", ["x", "x"], ["squares"]),
        helper.make_node("ReduceSum", ["squares", "channel_axis"], ["x_x"], keepdims=1),
        helper.make_node("Conv", ["x", "minus_two_colours", "squared_colours"], ["rest"], kernel_shape=[1, 1]),
        helper.make_node("Add", ["x_x", "rest"], ["distance"]),
        helper.make_node("LessOrEqual", ["distance", "squared_radius"], ["is_near"]),
        helper.make_node("Cast", ["is_near"], ["near"], to=TensorProto.FLOAT),
        helper.make_node("AveragePool", ["near"], ["cover"], kernel_shape=cell, strides=cell),
        helper.make_node("Mul", ["cover", "gain"], ["cam"]),
        helper.make_node("ReduceMean", ["cam"], ["logits"], axes=[2, 3], keepdims=0),
        helper.make_node("ReduceMean", ["cover"], ["covers"], axes=[2, 3], keepdims=0),
        helper.make_node("ReduceSum", ["covers", "channel_axis"], ["gate"], keepdims=0),
        helper.make_node("ReduceSum", ["cover", "channel_axis"], ["gate_map"], keepdims=0),
    ]
    marks = len(planted.MARKS)
    graph = helper.make_graph(
        nodes,
        "planted",
        [helper.make_tensor_value_info("tiles", TensorProto.UINT8, ["n", "h", "w", 3])],
        [
            helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["n", marks]),
            helper.make_tensor_value_info("gate", TensorProto.FLOAT, ["n"]),
            helper.make_tensor_value_info("cam", TensorProto.FLOAT, ["n", marks, "rows", "cols"]),
            helper.make_tensor_value_info("gate_map", TensorProto.FLOAT, ["n", "rows", "cols"]),
        ],
        [numpy_helper.from_array(np.asarray(value), name) for name, value in constants.items()],
    )
    model = helper.make_model(
        graph, producer_name="wsiengine", opset_imports=[helper.make_opsetid("", _OPSET)], ir_version=_IR
    )
    checker.check_model(model, full_check=True)
    return model


def build_card(folder: Path, sha256: str) -> Card:
    evidence = {"cases_trained": 0, "cases_tested": 0, "note": "written by hand, not trained"}
    return Card(
        name="planted",
        version="1.0",
        task="classify",
        description=(
            "Finds drawn marks of three flat colours, to check the geometry of a run. "
            f"A pixel belongs to the mark whose colour (the class colour) is within {planted.RADIUS} RGB levels; "
            f"the score of a class is {planted.GAIN:g} times the part of the tile that its mark covers; "
            "the gate is the part covered by any mark."
        ),
        classes=tuple(ClassInfo(name, colour, None, evidence) for name, colour in planted.MARKS.items()),
        input=InputSpec(planted.TILE_PX, Mpp.square(planted.UM_PER_PX), "NHWC", "uint8"),
        outputs=Outputs("logits", "gate", "cam", "gate_map"),
        activation="softmax",
        output_stride_px=planted.CELL_PX,
        dense=Dense(block_px=1024, halo_px=0, offset_px=(planted.CELL_PX - 1) / 2),
        gate=Gate(planted.MINIMUM, planted.OTHERWISE),
        resources=(Resource("planted.onnx", sha256),),
        precision={"float32": "exact"},
        licence="Apache-2.0",
        intended_use="Demonstration and tests; it says nothing about tissue.",
        training_command="python -m wsiengine.training.planted FOLDER",
        folder=folder,
    )


def write(folder: Path) -> Card:
    """Write ``planted.onnx`` and ``card.json`` into ``folder`` (made if missing)."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "planted.onnx"
    path.write_bytes(build_graph().SerializeToString(deterministic=True))
    card = build_card(folder, file_sha256(path))
    text = json.dumps(card.to_json(), indent=2, ensure_ascii=False)
    (folder / "card.json").write_text(text + "\n", encoding="utf-8")
    return card


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("usage: python -m wsiengine.training.planted FOLDER")
    write(Path(sys.argv[1]))
