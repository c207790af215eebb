"""Bytes of a slide, from a local file or a URL: ranges without a shared position, so that threads need no lock."""

import logging
import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, Protocol

import tifffile

from wsiengine.errors import DependencyError, SlideNotFound, UnreadableSlide, WsiError

# tifffile logs what is odd in a file; unheard by any handler it would print beside the words of our own errors
logging.getLogger("tifffile").addHandler(logging.NullHandler())


class Source(Protocol):
    """Ranges of bytes; thread-safe."""

    path: str
    length_bytes: int

    def read(self, offset: int, length: int) -> bytes:
        """Exactly ``length`` bytes from ``offset``.

        Raises:
            UnreadableSlide: The file ends before them, or they cannot be had.
        """
        ...

    def read_many(self, ranges: Sequence[tuple[int, int]]) -> Iterable[bytes]:
        """The bytes of each (offset, length), in order."""
        ...

    def close(self) -> None: ...

    def __enter__(self) -> "Source": ...

    def __exit__(self, *exc: object) -> None: ...


class LocalSource:
    """A file of this machine, read with ``pread``."""

    def __init__(self, path: str) -> None:
        self.path, self._descriptor = path, -1
        try:
            self._descriptor = os.open(path, os.O_RDONLY)
        except FileNotFoundError:
            raise SlideNotFound(f"there is no file {path}.", hint="check the path.") from None
        except OSError as error:
            raise UnreadableSlide(
                f"{path} cannot be opened: {error.strerror}.", hint="check its permissions."
            ) from None
        self.length_bytes = os.fstat(self._descriptor).st_size

    def read(self, offset: int, length: int) -> bytes:
        if offset + length > self.length_bytes:  # a table may say anything once the file is changed
            raise _ends_too_early(self.path, offset, length, max(0, self.length_bytes - offset))
        try:
            data = os.pread(self._descriptor, length, offset)
        except OSError as error:
            raise UnreadableSlide(f"{self.path} cannot be read at byte {offset:,}: {error.strerror}.") from error
        return _whole(data, self.path, offset, length)

    def read_many(self, ranges: Sequence[tuple[int, int]]) -> Iterable[bytes]:
        return (self.read(offset, length) for offset, length in ranges)

    def close(self) -> None:
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1

    def __enter__(self) -> "LocalSource":
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def __del__(self) -> None:
        self.close()


class RemoteSource:
    """A file behind a URL, read in ranges with fsspec."""

    def __init__(self, url: str) -> None:
        self.path = url
        self._files, self._name = _filesystem(url)
        try:
            self.length_bytes = int(self._files.info(self._name)["size"])
        except FileNotFoundError:
            raise SlideNotFound(f"there is nothing at {url}.", hint="check the address.") from None

    def read(self, offset: int, length: int) -> bytes:
        try:
            data = self._files.cat_file(self._name, start=offset, end=offset + length)
        except OSError as error:
            raise UnreadableSlide(f"{self.path} cannot be read at byte {offset:,}: {error}.") from error
        return _whole(data, self.path, offset, length)

    def read_many(self, ranges: Sequence[tuple[int, int]]) -> Iterable[bytes]:
        """All at once: a remote file answers many requests in the time of one."""
        try:
            many = self._files.cat_ranges(
                [self._name] * len(ranges), [start for start, _ in ranges], [start + length for start, length in ranges]
            )
        except OSError as error:
            raise UnreadableSlide(f"{self.path} cannot be read: {error}.") from error
        return [_whole(data, self.path, *place) for data, place in zip(many, ranges, strict=True)]

    def close(self) -> None:
        pass

    def __enter__(self) -> "RemoteSource":
        return self

    def __exit__(self, *exc: object) -> None:
        pass


def is_url(path: str) -> bool:
    return "://" in path


def open_source(path: str) -> Source:
    """The bytes of a file or URL."""
    return RemoteSource(path) if is_url(path) else LocalSource(path)


@contextmanager
def open_tiff(path: str) -> Iterator[tifffile.TiffFile]:
    """The file's TIFF structure, closed and forgotten afterwards.

    Raises:
        tifffile.TiffFileError: It is no TIFF, or its structure is broken.
    """
    with ExitStack() as stack:
        try:
            if is_url(path):
                files, name = _filesystem(path)
                handle = stack.enter_context(files.open(name, "rb"))
                tiff = tifffile.TiffFile(handle, name=Path(name).name)
            else:
                tiff = tifffile.TiffFile(path)
            # file and pages refer to each other: 60 MB of a large slide's numbers would wait for the collector
            stack.callback(vars(tiff).clear)
            stack.enter_context(tiff)
            yield tiff
        except (WsiError, tifffile.TiffFileError):
            raise
        except Exception as error:  # tifffile meets damage with anything from AttributeError to ZeroDivisionError
            raise tifffile.TiffFileError(f"{type(error).__name__}: {error}") from error


def _filesystem(url: str) -> tuple[Any, str]:
    import fsspec

    try:
        return fsspec.core.url_to_fs(url)
    except (ImportError, ValueError) as error:
        scheme = url.split("://")[0]
        raise DependencyError(
            f"addresses that begin with {scheme}:// cannot be read here: {error}.",
            hint="install the fsspec package for it (for s3:// that is s3fs), or copy the slide to this machine.",
        ) from None


def _whole(data: bytes, path: str, offset: int, length: int) -> bytes:
    if len(data) != length:
        raise _ends_too_early(path, offset, length, len(data))
    return data


def _ends_too_early(path: str, offset: int, length: int, there: int) -> UnreadableSlide:
    return UnreadableSlide(
        f"{path} ends too early: {length:,} bytes were needed at byte {offset:,}, {there:,} are there.",
        hint="the file looks truncated: copy it again from its origin.",
    )
