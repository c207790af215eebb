"""What an ONNX file says of itself, read from its protobuf encoding before ONNX Runtime sees it.

Only a few fields are looked at (numbers from onnx.proto3): domains of operators, where tensors keep their numbers, and
whether those numbers are as many as the tensor says. Nothing here needs the onnx package, and nothing is allocated by
what the file claims.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass, field

_MOST_SPARSE_BYTES = 1 << 30  # ONNX Runtime unpacks sparse tensors on loading
_BITS = {1: 32, 2: 8, 3: 8, 4: 16, 5: 16, 6: 32, 7: 64, 9: 8, 10: 16, 11: 64, 12: 32, 13: 64, 14: 64, 15: 128, 16: 16}
_BITS |= {17: 8, 18: 8, 19: 8, 20: 8, 21: 4, 22: 4, 23: 4}  # types of TensorProto; 8 is text, of any length
_RAW, _NAME, _DIMS, _TYPE, _EXTERNAL = 9, 8, 1, 2, 13
_LISTS = (4, 5, 6, 7, 10, 11)  # float_data, int32_data, string_data, int64_data, double_data, uint64_data

# Messages that can hold an operator or a tensor: {message: {field number: message inside}}.
_INSIDE = {
    "model": {7: "graph", 8: "opset", 20: "training", 25: "function"},
    "training": {1: "graph", 2: "graph"},
    "graph": {1: "node", 5: "tensor", 15: "sparse"},
    "function": {7: "node", 9: "opset"},
    "node": {5: "attribute"},
    "attribute": {5: "tensor", 6: "graph", 10: "tensor", 11: "graph", 22: "sparse", 23: "sparse"},
    "sparse": {1: "tensor", 2: "tensor"},
}
_NODE_DOMAIN, _FUNCTION_DOMAIN, _SPARSE_DIMS = 7, 10, 3


@dataclass
class Contents:
    """Attributes:
    domains: Of operators that are used and not defined in the file itself.
    external: Files that hold numbers, and how many bytes each must have.
    lies: Tensors that announce more (or other) numbers than there are, in words.
    """

    domains: set[str] = field(default_factory=set)
    external: dict[str, int] = field(default_factory=dict)
    lies: list[str] = field(default_factory=list)


def look_through(view: memoryview) -> Contents:
    """The contents of an encoded ModelProto.

    Raises:
        ValueError, IndexError: It is none.
    """
    found = Contents()
    own: set[str] = set()
    todo = [("model", view)]
    graphs = 0
    while todo:
        kind, message = todo.pop()
        graphs += kind == "graph"
        if kind == "tensor":
            _look_at_tensor(message, found)
            continue
        for number, value in fields(message):
            inside = _INSIDE.get(kind, {}).get(number)
            if inside is not None:
                todo.append((inside, as_bytes(value)))
            elif kind == "node" and number == _NODE_DOMAIN:
                found.domains.add(text(value))
            elif kind == "function" and number == _FUNCTION_DOMAIN:
                own.add(text(value))
        if kind == "sparse":
            _look_at_sparse(message, found)
    if not graphs:
        raise ValueError("no graph")
    found.domains -= own
    return found


def _look_at_tensor(message: memoryview, found: Contents) -> None:
    dims: list[int] = []
    name, kind, raw, listed = "", 0, None, 0
    entries: dict[str, str] = {}
    for number, value in fields(message):
        if number == _DIMS:
            dims += numbers(value)
        elif number == _TYPE and isinstance(value, int):
            kind = value
        elif number == _NAME:
            name = text(value)
        elif number == _RAW:
            raw = len(as_bytes(value))
        elif number in _LISTS:
            listed += 1 if isinstance(value, int) else max(1, len(value))
        elif number == _EXTERNAL:
            pair = {n: text(v) for n, v in fields(as_bytes(value))}
            entries[pair.get(1, "")] = pair.get(2, "")
    count = math.prod(dims)
    bits = _BITS.get(kind)
    size = None if bits is None else -(-count * bits // 8)
    if min(dims, default=0) < 0:
        found.lies.append(f"{name or 'a tensor'} has a side of {min(dims)}")
    elif "location" in entries:
        _add_external(entries, size or 0, found)
    elif raw is not None:
        if size is not None and raw != size:
            found.lies.append(f"{name or 'a tensor'} announces {size:,} bytes and holds {raw:,}")
    elif count > listed:  # a packed number has one byte at least
        found.lies.append(f"{name or 'a tensor'} announces {count:,} numbers and holds at most {listed:,}")


def _add_external(entries: dict[str, str], size: int, found: Contents) -> None:
    offset, length = int(entries.get("offset") or 0), int(entries.get("length") or size)
    if offset < 0 or length < 0:
        raise ValueError("external data before its file's beginning")
    if length < size:
        found.lies.append(f"a tensor announces {size:,} bytes and takes {length:,} of {entries['location']}")
    place = entries["location"]
    found.external[place] = max(found.external.get(place, 0), offset + length)


def _look_at_sparse(message: memoryview, found: Contents) -> None:
    dims = [n for number, value in fields(message) if number == _SPARSE_DIMS for n in numbers(value)]
    if math.prod(dims) * 8 > _MOST_SPARSE_BYTES:
        found.lies.append(f"a sparse tensor of {math.prod(dims):,} numbers would be unpacked")


def numbers(value: memoryview | int) -> list[int]:
    """A repeated int64, packed or one by one."""
    if isinstance(value, int):
        return [_signed(value)]
    at, out = 0, []
    while at < len(value):
        number, at = _varint(value, at)
        out.append(_signed(number))
    return out


def _signed(value: int) -> int:
    return value - (1 << 64) if value >= 1 << 63 else value


def text(value: memoryview | int) -> str:
    return bytes(as_bytes(value)).decode()


def as_bytes(value: memoryview | int) -> memoryview:
    if isinstance(value, int):
        raise ValueError("a number where a message was needed")
    return value


def fields(message: memoryview) -> Iterator[tuple[int, memoryview | int]]:
    """(field number, value) pairs of one protobuf message."""
    at, end = 0, len(message)
    while at < end:
        key, at = _varint(message, at)
        number, wire = key >> 3, key & 7
        if number == 0:
            raise ValueError("field number 0")
        if wire == 0:
            value, at = _varint(message, at)
            yield number, value
            continue
        if wire == 2:
            length, at = _varint(message, at)
        elif wire in (1, 5):
            length = 8 if wire == 1 else 4
        else:
            raise ValueError(f"wire type {wire}")
        if at + length > end:
            raise ValueError("a field longer than its message")
        yield number, message[at : at + length]
        at += length


def _varint(message: memoryview, at: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = message[at]
        at += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, at
        shift += 7
        if shift > 63:
            raise ValueError("a number of more than ten bytes")
