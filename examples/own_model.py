"""A model of your own: an ONNX file and a card. ``python examples/own_model.py SLIDE`` (needs the package ``onnx``).

The network is the smallest that tells anything: mean colour of the tile, one linear layer, two classes. Yours comes
from ``torch.onnx.export`` or the like; what the engine must know about it stands on its card (docs/cards.md).
"""

import hashlib
import json
import sys
from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

import wsiengine

TILE_PX = 64
LIMIT = 160  # mean grey level below which a tile counts as dark


def export(path: Path) -> None:
    """Write a network: uint8 tiles (N, 64, 64, 3) → logits (N, 2) for dark and pale."""
    slope = np.array([-0.1, 0.1], np.float32)
    constants = {
        "axes": np.array([1, 2]),
        "weights": np.tile(slope / 3, (3, 1)),
        "bias": -slope * LIMIT,
    }
    nodes = [
        helper.make_node("Cast", ["tiles"], ["pixels"], to=TensorProto.FLOAT),
        helper.make_node("ReduceMean", ["pixels", "axes"], ["colour"], keepdims=0),
        helper.make_node("Gemm", ["colour", "weights", "bias"], ["logits"]),
    ]
    graph = helper.make_graph(
        nodes,
        "brightness",
        [helper.make_tensor_value_info("tiles", TensorProto.UINT8, ["n", TILE_PX, TILE_PX, 3])],
        [helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["n", 2])],
        [numpy_helper.from_array(value, name) for name, value in constants.items()],
    )
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10), path)


def write_card(folder: Path, network: Path) -> None:
    """Write the card that goes with the network."""
    card = {
        "schema_version": 1,
        "name": "brightness",
        "version": "1.0",
        "task": "classify",
        "classes": [{"name": "Dark", "colour": [90, 40, 120]}, {"name": "Pale", "colour": [240, 180, 200]}],
        "input": {"size_px": TILE_PX, "mpp": 1.0, "layout": "NHWC", "dtype": "uint8"},
        "outputs": {"scores": "logits"},
        "activation": "softmax",
        "output_stride_px": 16,
        "resources": [{"file": network.name, "sha256": hashlib.sha256(network.read_bytes()).hexdigest()}],
        "licence": "Apache-2.0",
    }
    (folder / "card.json").write_text(json.dumps(card, indent=2))


def main(slide: str) -> None:
    folder = Path("brightness")
    folder.mkdir(exist_ok=True)
    export(folder / "brightness.onnx")
    write_card(folder, folder / "brightness.onnx")
    result = wsiengine.infer(slide, "./brightness", output="out")
    print(result.summary["area_mm2"])


if __name__ == "__main__":
    main(sys.argv[1])
