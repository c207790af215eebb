"""Whether a model's files are what the card says, and are safe to open: sha256, no pickles, nothing outside the folder.

The ONNX file is looked at through a few fields of its protobuf encoding (field numbers from onnx.proto3), so that a
hostile file is refused before ONNX Runtime sees it, and without the onnx package.
"""

import mmap
from collections.abc import Iterator
from hashlib import sha256
from pathlib import Path

from wsiengine.errors import CardError, IntegrityError
from wsiengine.models.card import Card

PICKLE_SUFFIXES = (".pt", ".pth", ".pkl", ".pickle", ".joblib", ".ckpt", ".torchscript")
# What ONNX Runtime itself implements; any other domain means somebody's own library.
KNOWN_DOMAINS = frozenset({"", "ai.onnx", "ai.onnx.ml", "com.microsoft", "com.ms.internal.nhwc"})
_EXPORT_HINT = "export the model to ONNX in its own environment and write a card for it (docs/cards.md)"


def refuse_pickle(path: Path) -> None:
    """Raise where ``path`` is a pickle, a PyTorch archive or TorchScript, by its suffix or its first bytes.

    Raises:
        IntegrityError: Always in words; loading such a file would run code from inside it.
    """
    suffix = path.suffix.lower()
    try:
        with path.open("rb") as file:
            head = file.read(4)
    except OSError:
        head = b""
    by_bytes = head[:1] == b"\x80" and head[1:2] in b"\x02\x03\x04\x05" and len(head) > 1
    if suffix in PICKLE_SUFFIXES or by_bytes or head == b"PK\x03\x04":
        raise IntegrityError(
            f"{path.name} is a pickle or a PyTorch archive: opening it would run code inside it; needed an ONNX file",
            hint=_EXPORT_HINT,
        )


def check_files(card: Card) -> None:
    """Compare every file of the card with its sha256, and look through the ONNX file.

    Raises:
        CardError: A file is missing, or the ONNX file is none.
        IntegrityError: Wrong sha256, a pickle, a link or external data leading outside the folder, custom operators.
    """
    folder = card.folder.resolve()
    for resource in card.resources:
        path = folder / resource.file
        if not path.is_file():
            raise CardError(
                f"model {card.name}: the card names {resource.file}, but {folder} has no such file",
                hint="put the file beside its card",
            )
        if not path.resolve().is_relative_to(folder):
            raise IntegrityError(
                f"model {card.name}: {resource.file} is a link to {path.resolve()}, outside the model's folder",
                hint="copy the file itself into the folder",
            )
        refuse_pickle(path)
        found = file_sha256(path)
        if found != resource.sha256:
            raise IntegrityError(
                f"model {card.name}: {resource.file} has sha256 {found}, but the card says {resource.sha256}",
                hint="fetch the model again; if you changed the file yourself, write its new sha256 on the card",
            )
    check_onnx(card.model_path, {resource.file for resource in card.resources})


def file_sha256(path: Path) -> str:
    digest = sha256()
    with path.open("rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


def check_onnx(path: Path, listed: set[str]) -> None:
    """Refuse an ONNX file that points outside ``listed`` files of its folder, or uses operators of other libraries.

    Raises:
        CardError: Not an ONNX file.
        IntegrityError: External data that the card does not list, or custom operators.
    """
    if path.stat().st_size == 0:
        raise _no_onnx(path)
    with path.open("rb") as file:
        view = memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))  # unmapped with its last view
    try:
        domains, external = _look_through(view)
    except (ValueError, IndexError):
        raise _no_onnx(path) from None
    if foreign := sorted(domains - KNOWN_DOMAINS):
        raise IntegrityError(
            f"{path.name} uses custom operators ({', '.join(foreign)}), which only a foreign library could run",
            hint="export it with standard ONNX operators",
        )
    if outside := sorted(external - listed):
        raise IntegrityError(
            f"{path.name} keeps weights in {', '.join(outside)}, which is not among the card's resources",
            hint="save the model as one file, or list the weight file, inside the folder, on the card",
        )


def _no_onnx(path: Path) -> CardError:
    return CardError(f"{path.name} is damaged or no ONNX file", hint="fetch or export the model again")


# Messages of onnx.proto3 that can hold an operator or a tensor: {message: {field number: message inside}}.
_INSIDE = {
    "model": {7: "graph", 8: "opset", 20: "training", 25: "function"},
    "training": {1: "graph", 2: "graph"},
    "graph": {1: "node", 5: "tensor", 15: "sparse"},
    "function": {7: "node", 9: "opset"},
    "node": {5: "attribute"},
    "attribute": {5: "tensor", 6: "graph", 10: "tensor", 11: "graph", 22: "sparse", 23: "sparse"},
    "sparse": {1: "tensor", 2: "tensor"},
    "tensor": {13: "entry"},
}
_DOMAIN_FIELD = {"opset": 1, "node": 7}


def _look_through(view: memoryview) -> tuple[set[str], set[str]]:
    """(operator domains in use, external data locations) of an encoded ModelProto; ValueError where it is none."""
    used: set[str] = set()
    own: set[str] = set()  # domains whose operators the file itself defines, as functions
    external: set[str] = set()
    todo = [("model", view)]
    graphs = 0
    while todo:
        kind, message = todo.pop()
        graphs += kind == "graph"
        entry: dict[int, str] = {}
        for number, value in _fields(message):
            inside = _INSIDE.get(kind, {}).get(number)
            if inside is not None:
                todo.append((inside, _bytes(value)))
            elif kind == "node" and number == _DOMAIN_FIELD["node"]:
                used.add(bytes(_bytes(value)).decode())
            elif kind == "function" and number == 10:
                own.add(bytes(_bytes(value)).decode())
            elif kind == "entry":
                entry[number] = bytes(_bytes(value)).decode()
        if kind == "entry" and entry.get(1) == "location":
            external.add(entry.get(2, ""))
    if not graphs:
        raise ValueError("no graph")
    return used - own, external


def _bytes(value: memoryview | int) -> memoryview:
    if isinstance(value, int):
        raise ValueError("a number where a message was needed")
    return value


def _fields(message: memoryview) -> Iterator[tuple[int, memoryview | int]]:
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
