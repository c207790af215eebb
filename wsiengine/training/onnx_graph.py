"""Writes networks as ONNX, node by node, so that a file holds exactly what is needed and nothing else.

:meth:`Graph.module` follows a torch module's own ``forward`` (torch.fx) and writes one node for each layer, with batch
normalisation folded into the convolution before it and explicit borders turned into the convolution's own padding.
"""

import operator
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import onnx
import torch
from onnx import TensorProto, helper, numpy_helper
from torch import Tensor, fx, nn
from torch.nn import functional

OPSET, IR = 17, 8


class Graph:
    """Nodes and weights, in the order in which they are added."""

    def __init__(self) -> None:
        self.nodes: list[onnx.NodeProto] = []
        self.weights: list[onnx.TensorProto] = []

    def constant(self, name: str, value: np.ndarray | np.generic) -> str:
        """A weight, as it is."""
        self.weights.append(numpy_helper.from_array(np.asarray(value), name))
        return name

    def half(self, name: str, value: np.ndarray) -> str:
        """A float16 value, widened to float32 when the file is loaded."""
        stored = self.constant(f"{name}.half", value.astype(np.float16))
        return self.node("Cast", [stored], name, to=TensorProto.FLOAT)

    def node(self, kind: str, inputs: list[str], output: str, **attributes: Any) -> str:
        """A node with one output; returns its name."""
        self.nodes.append(helper.make_node(kind, inputs, [output], name=output, **attributes))
        return output

    def convolution(self, name: str, value: str, weight: np.ndarray, bias: np.ndarray, **attributes: Any) -> str:
        """Weights as they are given; the bias is float32: it is small and its error would be systematic."""
        store = self.half if weight.dtype == np.float16 else self.constant
        inputs = [value, store(f"{name}.weight", weight), self.constant(f"{name}.bias", bias.astype(np.float32))]
        return self.node("Conv", inputs, name, **attributes)

    def module(self, name: str, run: Callable[..., Any], root: nn.Module, value: str, *, half: bool) -> list[str]:
        """What ``run(x)``, which calls layers below ``root``, computes from ``value``.

        Args:
            name: Prefix of all names.
            run: From one tensor to a tensor, or to a list of them.
            root: Holds the layers.
            value: Name of the input.
            half: Whether weights of convolutions are stored as float16.

        Returns:
            The names of the outputs.

        Raises:
            TypeError: A layer that has no translation here.
        """
        return _Writer(self, name, half).write(_trace(run, root), value)

    def model(self, inputs: Sequence[onnx.ValueInfoProto], outputs: Sequence[onnx.ValueInfoProto]) -> onnx.ModelProto:
        """The whole, checked."""
        made = helper.make_graph(self.nodes, "wsiengine", list(inputs), list(outputs), self.weights)
        opset = [helper.make_opsetid("", OPSET)]
        model = helper.make_model(made, opset_imports=opset, ir_version=IR, producer_name="wsiengine")
        onnx.checker.check_model(model, full_check=True)
        return model


def tensor(name: str, shape: Sequence[str | int], kind: int = TensorProto.FLOAT) -> onnx.ValueInfoProto:
    """Describes an input or output."""
    return helper.make_tensor_value_info(name, kind, list(shape))


class _Tracer(fx.Tracer):
    """Sequences are followed whoever holds them."""

    def call_module(self, m: nn.Module, forward: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        if isinstance(m, nn.Sequential):
            return forward(*args, **kwargs)
        return super().call_module(m, forward, args, kwargs)


def _trace(run: Callable[..., Any], root: nn.Module) -> fx.GraphModule:
    class Root(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.root = root

        def forward(self, x: Tensor) -> Any:
            return run(x)

    holder = Root()
    return fx.GraphModule(holder, _Tracer().trace(holder))


class _Writer:
    """Translates one traced graph."""

    def __init__(self, graph: Graph, name: str, half: bool) -> None:
        self._graph, self._prefix, self._half = graph, name, half
        self._names: dict[fx.Node, str] = {}
        self._borders: dict[
            fx.Node, list[int]
        ] = {}  # of zeros, waiting for their convolution: left, right, top, bottom

    def write(self, traced: fx.GraphModule, value: str) -> list[str]:
        self._traced = traced
        outputs: list[str] = []
        for node in traced.graph.nodes:
            if node.op == "placeholder":
                self._names[node] = value
            elif node.op == "output":
                given = node.args[0]
                outputs = [self._names[n] for n in (given if isinstance(given, list | tuple) else [given])]
            elif node not in self._names:
                self._names[node] = self._translate(node)
        return outputs

    def _translate(self, node: fx.Node) -> str:
        name = f"{self._prefix}.{node.name}"
        if node.op == "call_module":
            layer = self._traced.get_submodule(str(node.target))
            return self._layer(name, node, layer)
        if node.op == "get_attr":
            return self._graph.constant(name, _numpy(_attribute(self._traced, str(node.target))))
        return self._function(name, node)

    def _input(self, node: fx.Node, index: int = 0) -> str:
        given: Any = node.args[index]
        if isinstance(given, fx.Node):
            return self._names[given]
        return self._graph.constant(f"{self._prefix}.{node.name}.{index}", np.float32(given))

    def _layer(self, name: str, node: fx.Node, layer: nn.Module) -> str:
        graph = self._graph
        value = self._input(node)
        match layer:
            case nn.Conv2d():
                return self._conv(name, node, layer)
            case nn.BatchNorm2d():
                scale, shift = _affine(layer)
                shape = (1, -1, 1, 1)
                wide = graph.node(
                    "Mul", [value, graph.constant(f"{name}.scale", scale.reshape(shape))], f"{name}.scaled"
                )
                return graph.node("Add", [wide, graph.constant(f"{name}.shift", shift.reshape(shape))], name)
            case nn.ReLU():
                return graph.node("Relu", [value], name)
            case nn.Sigmoid():
                return graph.node("Sigmoid", [value], name)
            case nn.MaxPool2d():
                return self._pool("MaxPool", name, value, (layer.kernel_size, layer.stride, layer.padding))
            case nn.AvgPool2d():
                return self._pool("AveragePool", name, value, (layer.kernel_size, layer.stride, layer.padding))
            case nn.Dropout() | nn.Identity():
                return value
        raise TypeError(f"no translation to ONNX for the layer {type(layer).__name__}")

    def _conv(self, name: str, node: fx.Node, conv: nn.Conv2d) -> str:
        weight = _numpy(conv.weight)
        bias = np.zeros(conv.out_channels, np.float32) if conv.bias is None else _numpy(conv.bias)
        follower = next(iter(node.users))
        if len(node.users) == 1 and follower.op == "call_module":
            norm = self._traced.get_submodule(str(follower.target))
            if isinstance(norm, nn.BatchNorm2d):
                scale, shift = _affine(norm)
                weight, bias = weight * scale.reshape(-1, 1, 1, 1), bias * scale + shift
                name = f"{self._prefix}.{follower.name}"
                self._names[follower] = name
        source = node.args[0]
        assert isinstance(source, fx.Node)
        left, right, top, bottom = self._borders.get(source, [0, 0, 0, 0])
        (high, wide) = (int(p) for p in conv.padding)
        return self._graph.convolution(
            name,
            self._names[source],
            weight.astype(np.float16 if self._half else np.float32),
            bias,
            pads=[top + high, left + wide, bottom + high, right + wide],
            strides=list(conv.stride),
            dilations=list(conv.dilation),
            kernel_shape=list(conv.kernel_size),
            group=conv.groups,
        )

    def _pool(self, kind: str, name: str, value: str, sizes: tuple[Any, Any, Any]) -> str:
        kernel, stride, padding = ([v, v] if isinstance(v, int) else list(v) for v in sizes)
        extra = {"count_include_pad": 1} if kind == "AveragePool" else {}
        return self._graph.node(
            kind, [value], name, kernel_shape=kernel, strides=stride, pads=[*padding, *padding], **extra
        )

    def _function(self, name: str, node: fx.Node) -> str:
        graph, target = self._graph, node.target
        if target is functional.pad:
            source, border = _args(node)[:2]
            if len(border) != 4 or any(user.op != "call_module" for user in node.users):
                raise TypeError("a border is translated to ONNX before convolutions only")
            self._borders[node] = [int(b) for b in border]
            return self._names[source]
        if target in (torch.cat, torch.concat):
            axis = _args(node)[1] if len(node.args) > 1 else _kwargs(node).get("dim", 0)
            return graph.node("Concat", [self._names[n] for n in _args(node)[0]], name, axis=axis)
        if target in (operator.add, torch.add, operator.iadd):
            return graph.node("Add", [self._input(node), self._input(node, 1)], name)
        if target in (operator.sub, torch.sub):
            return graph.node("Sub", [self._input(node), self._input(node, 1)], name)
        if target in (operator.mul, torch.mul):
            return graph.node("Mul", [self._input(node), self._input(node, 1)], name)
        if target in (torch.relu, functional.relu, "relu"):
            return graph.node("Relu", [self._input(node)], name)
        if target in (torch.sigmoid, "sigmoid"):
            return graph.node("Sigmoid", [self._input(node)], name)
        if target in (torch.clamp, "clamp"):
            bounds = [self._input(node, 1), self._input(node, 2)]
            return graph.node("Clip", [self._input(node), *bounds], name)
        if target == "float":
            return graph.node("Cast", [self._input(node)], name, to=TensorProto.FLOAT)
        if target in (functional.max_pool2d, functional.avg_pool2d):
            kind = "MaxPool" if target is functional.max_pool2d else "AveragePool"
            return self._pool(kind, name, self._input(node), _pool_sizes(node))
        if target is functional.interpolate:
            return self._resize(name, node)
        raise TypeError(f"no translation to ONNX for {target}")

    def _resize(self, name: str, node: fx.Node) -> str:
        """A whole-number enlargement, nearest or bilinear, as torch does it."""
        factor, mode = float(_kwargs(node)["scale_factor"]), node.kwargs.get("mode", "nearest")
        scales = self._graph.constant(f"{name}.scales", np.array([1, 1, factor, factor], np.float32))
        how = {"nearest": ("nearest", "asymmetric"), "bilinear": ("linear", "half_pixel")}[str(mode)]
        if node.kwargs.get("align_corners"):
            raise TypeError("no translation to ONNX for align_corners")
        return self._graph.node(
            "Resize",
            [self._input(node), "", scales],
            name,
            mode=how[0],
            coordinate_transformation_mode=how[1],
            nearest_mode="floor",
        )


def _args(node: fx.Node) -> tuple[Any, ...]:
    """Untyped: what a call was given is known by the call."""
    return node.args


def _kwargs(node: fx.Node) -> dict[str, Any]:
    return node.kwargs


def _pool_sizes(node: fx.Node) -> tuple[Any, Any, Any]:
    names = ("kernel_size", "stride", "padding")
    values = [node.args[i] if len(node.args) > i else node.kwargs.get(name) for i, name in enumerate(names, start=1)]
    kernel, stride, padding = values
    return kernel, kernel if stride is None else stride, padding or 0


def _affine(norm: nn.BatchNorm2d) -> tuple[np.ndarray, np.ndarray]:
    """Scale and shift (channels,) float32 of a batch normalisation with its stored statistics."""
    mean, variance = _numpy(norm.running_mean), _numpy(norm.running_var)
    scale = _numpy(norm.weight) / np.sqrt(variance + norm.eps)
    return scale.astype(np.float32), (_numpy(norm.bias) - mean * scale).astype(np.float32)


def _attribute(module: nn.Module, path: str) -> Tensor:
    value: Any = module
    for part in path.split("."):
        value = getattr(value, part)
    return value


def _numpy(value: Tensor | None) -> np.ndarray:
    assert value is not None
    return value.detach().numpy()
