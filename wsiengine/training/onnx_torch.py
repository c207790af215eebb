"""An ONNX graph as a torch module, so that it can be trained on, whoever made it.

:func:`simplified` lets ONNX Runtime fold what is constant first. Convolutions keep their weights as parameters; a *tap*
may look at, or change, every value on its way.
"""

import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from onnx import helper, numpy_helper
from torch import Tensor, nn
from torch.nn import functional

from wsiengine.errors import ModelError
from wsiengine.models.ort import CPU, import_onnxruntime

Tap = Callable[[str, Tensor], Tensor]
_TYPES = {1: torch.float32, 7: torch.int64, 10: torch.float16, 11: torch.float64}


def simplified(path: Path) -> onnx.ModelProto:
    """The graph of a file with its constants folded and batch normalisation joined to convolutions."""
    ort = import_onnxruntime()
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_BASIC
    options.log_severity_level = 4
    with tempfile.TemporaryDirectory() as folder:
        options.optimized_model_filepath = str(Path(folder) / "simple.onnx")
        ort.InferenceSession(str(path), options, providers=[CPU])
        return onnx.load(options.optimized_model_filepath)


def attributes(node: onnx.NodeProto) -> dict[str, Any]:
    """A node's settings as Python values."""
    return {a.name: helper.get_attribute_value(a) for a in node.attribute}


class OnnxModule(nn.Module):
    """Runs the nodes of a graph in order.

    Attributes:
        parameters of convolutions: ``weight_<i>`` and ``bias_<i>`` for node i.
    """

    def __init__(self, model: onnx.ModelProto) -> None:
        super().__init__()
        self.graph = model.graph
        self.constants = {w.name: numpy_helper.to_array(w) for w in model.graph.initializer}
        self._fixed = {name: torch.from_numpy(np.array(value)) for name, value in self.constants.items()}
        self._convolutions: dict[int, tuple[str, str]] = {}
        for index, node in enumerate(model.graph.node):
            if node.op_type == "Conv" and node.input[1] in self.constants:
                weight = self._fixed[node.input[1]].clone()
                bias = self._fixed[node.input[2]].clone() if len(node.input) > 2 else torch.zeros(len(weight))
                self.register_parameter(f"weight_{index}", nn.Parameter(weight))
                self.register_parameter(f"bias_{index}", nn.Parameter(bias))
                self._convolutions[index] = (f"weight_{index}", f"bias_{index}")

    def convolution(self, index: int) -> tuple[nn.Parameter, nn.Parameter]:
        """Weight and bias of node ``index``."""
        weight, bias = self._convolutions[index]
        return getattr(self, weight), getattr(self, bias)

    def forward(self, tiles: Tensor, tap: Tap = lambda name, value: value) -> dict[str, Tensor]:
        """All outputs by name.

        Args:
            tiles: As the ONNX file takes them.
            tap: Called with the name and value of each input, weight (``node index`` as name) and result; what it
                returns is used.

        Raises:
            ModelError: An operator that has no translation here.
        """
        values: dict[str, Tensor] = {self.graph.input[0].name: tap(self.graph.input[0].name, tiles)}
        for index, node in enumerate(self.graph.node):
            inputs = [values[n] if n in values else self._fixed[n] for n in node.input if n]
            if index in self._convolutions:
                weight, bias = self.convolution(index)
                result = _conv(inputs[0], tap(f"weight_{index}", weight), bias, attributes(node))
            else:
                result = _run(node, inputs)
            values[node.output[0]] = tap(node.output[0], result)
        return {out.name: values[out.name] for out in self.graph.output}


def _run(node: onnx.NodeProto, inputs: list[Tensor]) -> Tensor:
    run = _OPERATORS.get(node.op_type)
    if run is None:
        known = ", ".join(sorted(_OPERATORS))
        raise ModelError(f"the operator {node.op_type} cannot be trained here", hint=f"operators known are {known}")
    return run(inputs, attributes(node))


def _conv(x: Tensor, weight: Tensor, bias: Tensor, how: Mapping[str, Any]) -> Tensor:
    top, left, bottom, right = how.get("pads", [0, 0, 0, 0])
    padding: Any = (top, left)
    if (top, left) != (bottom, right):
        x, padding = functional.pad(x, (left, right, top, bottom)), 0
    return functional.conv2d(
        x, weight, bias, how.get("strides", 1), padding, how.get("dilations", 1), how.get("group", 1)
    )


def _pool(x: Tensor, how: Mapping[str, Any], *, largest: bool) -> Tensor:
    kernel, strides = how["kernel_shape"], how.get("strides", how["kernel_shape"])
    top, left, bottom, right = how.get("pads", [0, 0, 0, 0])
    if (top, left) != (bottom, right):
        raise ModelError("a pooling with an uneven border cannot be trained here")
    if largest:
        return functional.max_pool2d(x, kernel, strides, (top, left))
    return functional.avg_pool2d(x, kernel, strides, (top, left), count_include_pad=bool(how.get("count_include_pad")))


def _axes(inputs: list[Tensor], how: Mapping[str, Any]) -> list[int]:
    return inputs[1].tolist() if len(inputs) > 1 else list(how["axes"])


def _squeeze(inputs: list[Tensor], how: Mapping[str, Any]) -> Tensor:
    for axis in sorted(_axes(inputs, how), reverse=True):
        inputs[0] = inputs[0].squeeze(axis)
    return inputs[0]


def _clip(inputs: list[Tensor], how: Mapping[str, Any]) -> Tensor:
    low, high = (float(v) for v in inputs[1:3]) if len(inputs) > 2 else (how["min"], how["max"])
    return inputs[0].clamp(low, high)


def _resize(inputs: list[Tensor], how: Mapping[str, Any]) -> Tensor:
    factor = float(inputs[-1][-1])
    mode = "nearest" if how.get("mode", b"nearest") == b"nearest" else "bilinear"
    return functional.interpolate(inputs[0], scale_factor=factor, mode=mode)


def _gemm(inputs: list[Tensor], how: Mapping[str, Any]) -> Tensor:
    weight = inputs[1].T if how.get("transB") else inputs[1]
    product = inputs[0] @ weight * how.get("alpha", 1.0)
    return product + inputs[2] * how.get("beta", 1.0) if len(inputs) > 2 else product


_OPERATORS: dict[str, Callable[[list[Tensor], Mapping[str, Any]], Tensor]] = {
    "Transpose": lambda x, how: x[0].permute(*how["perm"]),
    "Cast": lambda x, how: x[0].to(_TYPES[how["to"]]),
    "Identity": lambda x, how: x[0],
    "Add": lambda x, how: x[0] + x[1],
    "Sub": lambda x, how: x[0] - x[1],
    "Mul": lambda x, how: x[0] * x[1],
    "Div": lambda x, how: x[0] / x[1],
    "Relu": lambda x, how: x[0].relu(),
    "Clip": _clip,
    "Log": lambda x, how: x[0].log(),
    "Exp": lambda x, how: x[0].exp(),
    "Sigmoid": lambda x, how: x[0].sigmoid(),
    "Concat": lambda x, how: torch.cat(x, how["axis"]),
    "MaxPool": lambda x, how: _pool(x[0], how, largest=True),
    "AveragePool": lambda x, how: _pool(x[0], how, largest=False),
    "GlobalAveragePool": lambda x, how: x[0].mean((2, 3), keepdim=True),
    "ReduceMean": lambda x, how: x[0].mean(_axes(x, how), keepdim=bool(how.get("keepdims", 1))),
    "ReduceSum": lambda x, how: x[0].sum(_axes(x, how), keepdim=bool(how.get("keepdims", 1))),
    "ReduceMax": lambda x, how: x[0].amax(_axes(x, how), keepdim=bool(how.get("keepdims", 1))),
    "ReduceLogSumExp": lambda x, how: x[0].logsumexp(_axes(x, how), keepdim=bool(how.get("keepdims", 1))),
    "Softmax": lambda x, how: x[0].softmax(how.get("axis", -1)),
    "Squeeze": _squeeze,
    "Flatten": lambda x, how: x[0].flatten(how.get("axis", 1)),
    "Gemm": _gemm,
    "MatMul": lambda x, how: x[0] @ x[1],
    "Resize": _resize,
}
