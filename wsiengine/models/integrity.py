"""Whether a model's files are what the card says, and are safe to open: sha256, no pickles, nothing outside the folder.

The ONNX file is looked through (:mod:`wsiengine.models.onnx_file`), so that a hostile one is refused before ONNX
Runtime sees it.
"""

import mmap
from hashlib import sha256
from pathlib import Path, PurePosixPath

from wsiengine.errors import CardError, IntegrityError
from wsiengine.models.card import Card
from wsiengine.models.onnx_file import look_through

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
    home = PurePosixPath(card.model_resource.file).parent  # what an ONNX file names lies beside it
    listed = [PurePosixPath(resource.file) for resource in card.resources]
    beside = {str(name.relative_to(home)) for name in listed if name.is_relative_to(home)}
    for number_format in ("fp32", *card.variants):
        check_onnx(card.at(number_format).model_path, beside)


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
        IntegrityError: External data that the card does not list, custom operators, or tensors that announce numbers
            which are not there.
    """
    if path.stat().st_size == 0:
        raise _no_onnx(path)
    with path.open("rb") as file:
        view = memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))  # unmapped with its last view
    try:
        found = look_through(view)
    except (ValueError, IndexError):
        raise _no_onnx(path) from None
    if foreign := sorted(found.domains - KNOWN_DOMAINS):
        raise IntegrityError(
            f"{path.name} uses custom operators ({', '.join(foreign)}), which only a foreign library could run",
            hint="export it with standard ONNX operators",
        )
    if outside := sorted(set(found.external) - listed):
        raise IntegrityError(
            f"{path.name} keeps weights in {', '.join(outside)}, which is not among the card's resources",
            hint="save the model as one file, or list the weight file, inside the folder, on the card",
        )
    for name, needed in found.external.items():
        there = (path.parent / name).stat().st_size
        if there < needed:
            found.lies.append(f"{name} must have {needed:,} bytes and has {there:,}")
    if found.lies:
        raise IntegrityError(
            f"{path.name} contradicts itself: {found.lies[0]}",
            hint="fetch or export the model again; if it came from others, do not trust it",
        )


def _no_onnx(path: Path) -> CardError:
    return CardError(f"{path.name} is damaged or no ONNX file", hint="fetch or export the model again")
