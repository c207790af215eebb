"""From trained detectors to ONNX files: what torch traces, with half of the bytes and nothing of the machine.

Steps that torch has no operator for are written as ONNX's own nodes (RoiAlign, NonMaxSuppression) by the modules that
need them; see :mod:`wsiengine.training.rcnn`.
"""

import warnings
from collections.abc import Mapping, Sequence
from copy import deepcopy
from pathlib import Path

import numpy as np
import onnx
import torch
from onnx import TensorProto, helper, numpy_helper
from torch import Tensor, nn

_OPSET, _IR = 17, 8
_WORTH_HALVING = 256


def export_network(
    network: nn.Module,
    example: Tensor,
    path: Path,
    *,
    outputs: Sequence[str],
    axes: Mapping[str, Mapping[int, str]],
    name: str = "tiles",
    half: bool = True,
) -> None:
    """Write a network.

    Args:
        network: In evaluation.
        example: An input of it.
        path: Where to.
        outputs: Names of the outputs, in order.
        axes: Free axes by name of input and output.
        name: Of the input.
        half: Large weights are stored as float16 and widened when the file is loaded.
    """
    with warnings.catch_warnings(), torch.no_grad():
        # torch announces its newer exporter, and warns of sizes that it takes for fixed: those are, or are axes here.
        warnings.simplefilter("ignore")
        torch.onnx.export(
            network.eval(),
            (example,),
            str(path),
            dynamo=False,
            opset_version=_OPSET,
            input_names=[name],
            output_names=list(outputs),
            dynamic_axes={key: dict(value) for key, value in axes.items()},
        )
    model = onnx.load(path)
    with_bare_pads(model)
    if half:
        halved(model)
    model.ir_version, model.producer_name, model.producer_version = _IR, "wsiengine", ""
    for node in model.graph.node:
        node.doc_string = ""
    onnx.checker.check_model(model)
    onnx.save(model, path)


def with_bare_pads(model: onnx.ModelProto) -> None:
    """Leave unsaid that borders are zero, which is what a Pad without a value means.

    ONNX Runtime 1.31 makes only such a Pad part of the convolution behind it; any other costs a copy of the map, there
    and back through the layout that convolutions like: of rbc's detector a sixth of the time, of mass's a quarter.
    """
    values = {weight.name: weight for weight in model.graph.initializer}
    values |= {node.output[0]: node.attribute[0].t for node in model.graph.node if node.op_type == "Constant"}
    for node in model.graph.node:
        if node.op_type == "Pad" and len(node.input) == 3:
            name = node.input[2]
            if not name or (name in values and not numpy_helper.to_array(values[name]).any()):
                del node.input[2]
    used = {name for node in model.graph.node for name in node.input}
    kept = [node for node in model.graph.node if node.op_type != "Constant" or node.output[0] in used]
    del model.graph.node[:]
    model.graph.node.extend(kept)


def halved(model: onnx.ModelProto) -> None:
    """Store the large float32 weights of a model as float16, each with a node that widens it."""
    casts = []
    for weight in model.graph.initializer:
        values = numpy_helper.to_array(weight)
        if values.dtype != np.float32 or values.ndim < 2 or values.size < _WORTH_HALVING:
            continue
        name = weight.name
        weight.CopyFrom(numpy_helper.from_array(values.astype(np.float16), f"{name}.half"))
        casts.append(helper.make_node("Cast", [f"{name}.half"], [name], to=TensorProto.FLOAT))
    nodes = [*casts, *model.graph.node]
    del model.graph.node[:]
    model.graph.node.extend(nodes)


def through_half(network: nn.Module) -> nn.Module:
    """A copy whose large weights went through float16, as a file's do: what its answers must equal."""
    copy = deepcopy(network)
    with torch.no_grad():
        for parameter in copy.parameters():
            if parameter.ndim >= 2 and parameter.numel() >= _WORTH_HALVING:
                parameter.copy_(parameter.half().float())
    return copy.eval()
