"""Reads the ImageNet MobileNetV2 weights out of their TensorFlow Lite file, without TensorFlow.

A ``.tflite`` file is a flatbuffer: tables of offsets around raw arrays. Only what a chain of quantised convolutions
needs is read here (field numbers from the TensorFlow Lite schema, version 3).
"""

import struct
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from wsiengine.errors import IntegrityError

_CONV, _DEPTHWISE = 3, 4
_NUMPY_TYPES = {0: "<f4", 2: "<i4", 9: "<i1"}


@dataclass(frozen=True)
class ConvWeights:
    """One convolution with its batch normalisation folded in.

    Attributes:
        name: Name of the layer in the file.
        weight: float32 (out, in, rows, cols); depthwise kernels have in = 1.
        bias: float32 (out,).
        depthwise: Whether each channel is filtered on its own.
    """

    name: str
    weight: np.ndarray
    bias: np.ndarray
    depthwise: bool


def read_convolutions(path: Path) -> list[ConvWeights]:
    """The convolutions of a quantised TensorFlow Lite network in the order in which it runs them, dequantised.

    Raises:
        IntegrityError: The file is no TensorFlow Lite model of convolutions.
    """
    data = Path(path).read_bytes()
    if data[4:8] != b"TFL3":
        raise IntegrityError(
            f"{path} is not a TensorFlow Lite file", hint="use the MobileNetV2 file of the data folder"
        )
    try:
        return _convolutions(_Buffer(data))
    except (struct.error, IndexError, KeyError) as broken:
        raise IntegrityError(f"{path} is damaged: {broken}", hint="copy the file again") from broken


class _Buffer:
    """Offsets, vectors and tables of a flatbuffer."""

    def __init__(self, data: bytes) -> None:
        self.data = data

    def number(self, kind: str, at: int) -> int:
        return struct.unpack_from("<" + kind, self.data, at)[0]

    def follow(self, at: int) -> int:
        return at + self.number("I", at)

    def field(self, table: int, index: int) -> int:
        """Position of a table's field, 0 where it is absent (its default)."""
        vtable = table - self.number("i", table)
        slot = 4 + 2 * index
        offset = self.number("H", vtable + slot) if slot < self.number("H", vtable) else 0
        return table + offset if offset else 0

    def vector(self, at: int) -> tuple[int, int]:
        start = self.follow(at)
        return start + 4, self.number("I", start)

    def array(self, at: int, dtype: str) -> np.ndarray:
        start, count = self.vector(at)
        return np.frombuffer(self.data, dtype, count, start)

    def tables(self, at: int) -> list[int]:
        start, count = self.vector(at)
        return [self.follow(start + 4 * i) for i in range(count)]


def _convolutions(buffer: _Buffer) -> list[ConvWeights]:
    model = buffer.follow(0)
    codes = [_operator(buffer, code) for code in buffer.tables(buffer.field(model, 1))]
    graph = buffer.tables(buffer.field(model, 2))[0]
    tensors = buffer.tables(buffer.field(graph, 0))
    arrays = buffer.tables(buffer.field(model, 4))
    found = []
    for operator in buffer.tables(buffer.field(graph, 3)):
        at = buffer.field(operator, 0)
        code = codes[buffer.number("I", at) if at else 0]
        if code not in (_CONV, _DEPTHWISE):
            continue
        _, kernel, bias = buffer.array(buffer.field(operator, 1), "<i4")
        weight = _dequantised(buffer, tensors[kernel], arrays)
        axes = (3, 0, 1, 2) if code == _DEPTHWISE else (0, 3, 1, 2)
        start, length = buffer.vector(buffer.field(tensors[kernel], 3))
        found.append(
            ConvWeights(
                name=buffer.data[start : start + length].decode().split(";")[0],
                weight=np.ascontiguousarray(weight.transpose(axes)),
                bias=_dequantised(buffer, tensors[bias], arrays),
                depthwise=code == _DEPTHWISE,
            )
        )
    return found


def _operator(buffer: _Buffer, code: int) -> int:
    at = buffer.field(code, 3)  # the wide field of newer files; older ones have a byte
    if at:
        return buffer.number("i", at)
    at = buffer.field(code, 0)
    return buffer.number("b", at) if at else 0


def _dequantised(buffer: _Buffer, tensor: int, arrays: list[int]) -> np.ndarray:
    shape = buffer.array(buffer.field(tensor, 0), "<i4")
    kind = buffer.number("b", buffer.field(tensor, 1)) if buffer.field(tensor, 1) else 0
    raw = buffer.array(buffer.field(arrays[buffer.number("I", buffer.field(tensor, 2))], 0), "u1")
    values = raw.view(_NUMPY_TYPES[kind]).reshape(shape).astype(np.float32)
    if kind == 0:
        return values
    quantisation = buffer.follow(buffer.field(tensor, 4))
    scale = buffer.array(buffer.field(quantisation, 2), "<f4")
    at = buffer.field(quantisation, 6)
    axis = buffer.number("i", at) if at else 0
    along = [1] * values.ndim
    along[axis] = -1
    return values * scale.reshape(along)  # symmetric per channel: zero points of weights and biases are 0
