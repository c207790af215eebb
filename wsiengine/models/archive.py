"""Unpacking a model that came as an archive: plain files only, none outside the folder, and no more than fits."""

import lzma
import tarfile
import zipfile
import zlib
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import IO

from wsiengine.errors import IntegrityError

SUFFIXES = (".zip", ".tar", ".tar.gz", ".tgz", ".tar.xz", ".tar.bz2")
_MOST_FILES = 1000
_MOST_BYTES = 8 << 30
_PIECE_BYTES = 1 << 20
_DAMAGE = (
    zipfile.BadZipFile,
    tarfile.TarError,
    zlib.error,
    lzma.LZMAError,
    EOFError,
    RuntimeError,  # encrypted
    NotImplementedError,  # packed by a method that Python does not know
    ValueError,
)


def is_archive(name: str) -> bool:
    """By its name: TorchScript is a ZIP file too, but is no archive to be unpacked."""
    return name.lower().endswith(SUFFIXES)


def unpack(path: Path, folder: Path) -> Path:
    """Unpack into ``folder`` → the folder of the model: ``folder`` itself, or the only folder inside it.

    Raises:
        IntegrityError: No archive, damaged, a name that leads outside, a link, or more than 1,000 files or 8 GiB.
    """
    members = _zip(path) if path.name.lower().endswith(".zip") else _tar(path)
    files, left = 0, _MOST_BYTES
    try:
        for name, source in members:
            target = folder / _inside(name, path)
            files += 1
            if files > _MOST_FILES:
                raise IntegrityError(f"{path.name} holds more than {_MOST_FILES:,} files.", hint="it is no model.")
            target.parent.mkdir(parents=True, exist_ok=True)
            with source, target.open("xb") as out:
                left -= _copy(source, out, left, path)
    except IntegrityError:
        raise
    except (FileExistsError, NotADirectoryError, IsADirectoryError):
        raise IntegrityError(
            f"{path.name} holds two files of one name.", hint="it is damaged: fetch it again."
        ) from None
    except _DAMAGE as error:
        raise IntegrityError(f"{path.name} is damaged, or no archive: {error}.", hint="fetch it again.") from error
    inside = list(folder.iterdir())
    return inside[0] if len(inside) == 1 and inside[0].is_dir() else folder


def _zip(path: Path) -> Iterator[tuple[str, IO[bytes]]]:
    with zipfile.ZipFile(path) as archive:
        for info in archive.infolist():
            mode = info.external_attr >> 16
            if mode & 0o170000 not in (0, 0o100000, 0o040000):
                raise _no_plain_file(info.filename, path)
            if not info.is_dir():
                yield info.filename, archive.open(info)


def _tar(path: Path) -> Iterator[tuple[str, IO[bytes]]]:
    with tarfile.open(path) as archive:
        for info in archive:
            if info.isdir():
                continue
            source = archive.extractfile(info) if info.isfile() else None
            if source is None:
                raise _no_plain_file(info.name, path)
            yield info.name, source


def _no_plain_file(name: str, path: Path) -> IntegrityError:
    return IntegrityError(f"{path.name}: {name} is a link or a device, needed plain files.", hint="do not trust it.")


def _inside(name: str, path: Path) -> PurePosixPath:
    """A member's name as a path below the folder.

    Raises:
        IntegrityError: It leads elsewhere.
    """
    parts = PurePosixPath(name.replace("\\", "/"))
    if parts.is_absolute() or ".." in parts.parts or ":" in name or "\0" in name or not parts.parts:
        raise IntegrityError(
            f"{path.name}: {name!r} would be written outside the model's folder.", hint="do not trust this archive."
        )
    return parts


def _copy(source: IO[bytes], out: IO[bytes], most: int, path: Path) -> int:
    """Bytes copied; what an archive says of its sizes is not relied on."""
    count = 0
    while piece := source.read(_PIECE_BYTES):
        count += len(piece)
        if count > most:
            raise IntegrityError(f"{path.name} unpacks to more than {_MOST_BYTES >> 30} GiB.", hint="it is no model.")
        out.write(piece)
    return count
