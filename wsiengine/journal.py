"""The truth of a run on disk: one append-only file of checksummed records, synced record by record.

File: the 8 bytes ``WSIJRNL1``, then records. A record is a 20-byte head (kind, CRC-32 of the payload, CRC-32 of the
head so far, payload length) and the payload. Data and record are the same write, so a record that reads back whole
is finished and nothing else is; a torn tail is cut off on the next opening.

Kinds: a JSON header (the run's identity), named blobs (tissue mask, fitted stain), scored tiles
(their box in the tile grid and float32 scores), and, for tasks that yield no table of scores, blocks
(their box, which of its tiles are finished, and bytes of the task's own).
"""

import contextlib
import errno
import fcntl
import json
import os
import shutil
import struct
import threading
import zlib
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np

from wsiengine.errors import OutputError, OutputInUse, WsiError
from wsiengine.geometry import Box
from wsiengine.heartbeat import Heartbeat, now_s

_NO_LOCKS = (errno.ENOLCK, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS)
_SLEPT_S = 10.0  # between two looks: file servers give a machine's locks away after 30 s and more without a word of it
_MAGIC = b"WSIJRNL1"
_HEAD = struct.Struct("<4sIIQ")  # kind, CRC of payload, CRC of kind + length, length
_TILES = struct.Struct("<5q")  # y0, x0, y1, x1 in tile units, channels
_BLOCK = struct.Struct("<4q")  # y0, x0, y1, x1 in tile units


@dataclass(frozen=True, slots=True)
class Recovered:
    """What an existing journal holds: ``tiles`` and ``blocks`` as they were added."""

    header: Mapping[str, Any]
    blobs: Mapping[str, bytes]
    tiles: tuple[tuple[Box, np.ndarray], ...]
    blocks: Collection[tuple[Box, np.ndarray, bytes]] = ()

    @property
    def begun(self) -> bool:
        """Whether any block was finished."""
        return bool(self.tiles or self.blocks)


@dataclass(frozen=True, slots=True)
class StoredBlocks(Collection[tuple[Box, np.ndarray, bytes]]):
    """Blocks of a journal, each read when it is its turn: together they may be as large as a map.

    ``places``: where each payload begins in the file, and its length.
    """

    path: Path
    places: tuple[tuple[int, int], ...]

    def __len__(self) -> int:
        return len(self.places)

    def __iter__(self) -> Iterator[tuple[Box, np.ndarray, bytes]]:
        with in_words(self.path), self.path.open("rb") as file:
            for start, length in self.places:
                file.seek(start)
                yield _block(file.read(length))

    def __contains__(self, block: object) -> bool:
        return any(block is own for own in self)


class Journal:
    """Appends records; every append is on the disk when it returns. Thread-safe.

    Use :meth:`create` or :meth:`resume`; as a context manager it closes itself. ``guard`` is called before each append:
    it raises where the folder is no longer ours.
    """

    def __init__(self, file_descriptor: int, path: Path) -> None:
        self._fd = file_descriptor
        self._path = path
        self._lock = threading.RLock()
        self._together = False
        self.guard: Callable[[], None] = _unguarded

    @classmethod
    def create(cls, path: Path, header: Mapping[str, Any]) -> "Journal":
        """A new journal with its header record.

        Written under another name and renamed: a journal that exists has a whole header.

        Raises:
            OutputError: The file cannot be written.
        """
        with in_words(path):
            draft = _new_draft(path)
            fd = os.open(draft, os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o666)
            _write_all(fd, _MAGIC)
        journal = cls(fd, path)
        journal._append(b"HEAD", json.dumps(header, sort_keys=True).encode())
        with in_words(path):
            draft.rename(path)
            sync_folder(path.parent)
        return journal

    @classmethod
    def resume(cls, path: Path, *, apart: bool = False) -> tuple["Journal", Recovered]:
        """Open an existing journal for appending, cut off a torn tail, and return what it holds.

        ``apart``: in a copy that takes its place, as whoever wrote it may not be dead: what it had begun to write would
        come to lie over our records.

        Raises:
            OutputError: The file is not a journal or cannot be opened.
        """
        with in_words(path):
            if apart:
                draft = _new_draft(path)
                shutil.copyfile(path, draft)
                sync_tree(draft)
                draft.replace(path)
                sync_folder(path.parent)
            fd = os.open(path, os.O_RDWR | os.O_CLOEXEC)
        try:
            recovered, end = _read(path)
            with in_words(path):
                os.ftruncate(fd, end)
                os.lseek(fd, end, os.SEEK_SET)
        except BaseException:  # whatever stopped the reading: the file is closed, the error goes on
            os.close(fd)
            raise
        return cls(fd, path), recovered

    def add_blob(self, name: str, payload: bytes) -> None:
        """Store a named piece of the run (the tissue mask, say); the last of a name counts."""
        encoded = name.encode()
        self._append(b"BLOB", struct.pack("<H", len(encoded)) + encoded + payload)

    def add_tiles(self, tiles: Box, scores: np.ndarray) -> None:
        """Store the scores of a block.

        Args:
            tiles: The block's box in tile units.
            scores: (tiles.height, tiles.width, channels) float32; NaN where a tile was not run.
        """
        data = np.ascontiguousarray(scores, "<f4")
        head = _TILES.pack(tiles.y0, tiles.x0, tiles.y1, tiles.x1, data.shape[2])
        self._append(b"TILE", head + data.tobytes())

    def add_block(self, tiles: Box, ran: np.ndarray, payload: bytes) -> None:
        """Store what a block yielded.

        Args:
            tiles: The block's box in tile units.
            ran: (tiles.height, tiles.width) bool: tiles that are finished with this.
            payload: Bytes that the task reads again.
        """
        head = _BLOCK.pack(tiles.y0, tiles.x0, tiles.y1, tiles.x1)
        self._append(b"BLCK", head + np.packbits(ran).tobytes() + payload)

    @contextlib.contextmanager
    def together(self) -> Iterator[None]:
        """What is appended meanwhile is on the disk when it ends, at the price of one sync. No other thread appends.

        Raises:
            OutputError: The disk is full, say; what it took before is kept.
        """
        with self._lock:
            with in_words(self._path):
                start = self._end()
            self._together = True
            try:
                yield
            finally:
                self._together = False
                if self._fd >= 0:
                    with in_words(self._path):
                        self._sync(start)

    def close(self) -> None:
        with self._lock:
            if self._fd >= 0:
                os.close(self._fd)
                self._fd = -1

    def __enter__(self) -> "Journal":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.close()

    def _append(self, kind: bytes, payload: bytes) -> None:
        length_crc = zlib.crc32(kind + len(payload).to_bytes(8, "little"))
        record = _HEAD.pack(kind, zlib.crc32(payload), length_crc, len(payload)) + payload
        self.guard()
        with self._lock, in_words(self._path):
            start = self._end()
            try:
                _write_all(self._fd, record)
            except BaseException:  # Ctrl-C as well: other blocks are handed over after it
                self._take_back(start)
                raise
            if not self._together:
                self._sync(start)

    def _end(self) -> int:
        return os.lseek(self._fd, 0, os.SEEK_CUR)

    def _sync(self, start: int) -> None:
        """Bring what stands from ``start`` on to the disk, or take it back."""
        try:
            os.fdatasync(self._fd)
        except OSError:
            self._take_back(start)
            raise

    def _take_back(self, start: int) -> None:
        """Remove what is on the disk of a record that was broken off, so that a later append starts clean.

        Where even that fails nothing more is appended: it would stand behind a torn record, and be lost with it.
        """
        try:
            os.ftruncate(self._fd, start)
            os.lseek(self._fd, start, os.SEEK_SET)
        except OSError:
            os.close(self._fd)
            self._fd = -1


def _new_draft(path: Path) -> Path:
    """Where a journal is made. A file that is there is let go: a run that slept may still write to it."""
    draft = path.with_name(path.name + ".new")
    draft.unlink(missing_ok=True)
    return draft


def _unguarded() -> None:
    """Nobody else can write."""


def read_journal(path: Path) -> Recovered:
    """What a journal holds, without touching the file."""
    return _read(path)[0]


def _read(path: Path) -> tuple[Recovered, int]:
    header: Mapping[str, Any] | None = None
    blobs: dict[str, bytes] = {}
    tiles: list[tuple[Box, np.ndarray]] = []
    blocks: list[tuple[int, int]] = []
    end = len(_MAGIC)
    for kind, payload, end in _records(path):
        if kind == b"HEAD":
            header = json.loads(payload)
        elif kind == b"BLOB":
            size = struct.unpack_from("<H", payload)[0]
            blobs[payload[2 : 2 + size].decode()] = payload[2 + size :]
        elif kind == b"TILE":
            y0, x0, y1, x1, channels = _TILES.unpack_from(payload)
            values = np.frombuffer(payload, "<f4", offset=_TILES.size).reshape(y1 - y0, x1 - x0, channels)
            tiles.append((Box(y0, x0, y1, x1), values))
        elif kind == b"BLCK":
            blocks.append((end - len(payload), len(payload)))
    if header is None:
        raise OutputError(
            f"{path} is not a journal of an unfinished run, or its beginning is damaged.",
            hint="--overwrite starts the run anew.",
        )
    return Recovered(header, blobs, tuple(tiles), StoredBlocks(path, tuple(blocks))), end


def _block(payload: bytes) -> tuple[Box, np.ndarray, bytes]:
    box = Box(*_BLOCK.unpack_from(payload))
    start = _BLOCK.size + -(-box.area // 8)
    bits = np.frombuffer(payload[_BLOCK.size : start], np.uint8)
    return box, np.unpackbits(bits, count=box.area).astype(bool).reshape(box.shape), payload[start:]


def _records(path: Path) -> Iterator[tuple[bytes, bytes, int]]:
    """Whole records in order, each with the offset at which it ends; stops at the first that is not whole."""
    with in_words(path), path.open("rb") as file:
        size, position = os.fstat(file.fileno()).st_size, len(_MAGIC)
        if file.read(position) != _MAGIC:
            return
        while position + _HEAD.size <= size:
            kind, payload_crc, length_crc, length = _HEAD.unpack(file.read(_HEAD.size))
            position += _HEAD.size + length
            if zlib.crc32(kind + length.to_bytes(8, "little")) != length_crc or position > size:
                return
            payload = file.read(length)
            if zlib.crc32(payload) != payload_crc:
                return
            yield kind, payload, position


class FolderLock:
    """One run at a time per output folder: an advisory lock that dies with its process.

    On a share that cannot lock files, a heartbeat (:mod:`wsiengine.heartbeat`) takes its place. On one that can, the
    server forgets the locks of a machine that slept: the lock is asked for again after any gap.
    """

    def __init__(self, path: Path) -> None:
        """Take the lock.

        Raises:
            OutputInUse: Another run holds it, or has just ended and taken the lock file with it.
            OutputError: The lock file cannot be made.
        """
        self._path = path
        self._heartbeat: Heartbeat | None = None
        self._seen_s = now_s()
        with in_words(path):
            self._fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
            try:
                alone = self._alone()
            except BaseException:  # whatever it was: the file is closed, the error goes on
                self.release()
                raise
        if not alone:
            self.release()
            raise OutputInUse(
                f"Another run is writing to {path.parent.parent}.",
                hint="wait for it to finish, or give another folder with -o.",
            )

    def _alone(self) -> bool:
        try:
            return self._locked()
        except OSError as error:
            if error.errno not in _NO_LOCKS:
                raise
        self._heartbeat = Heartbeat(self._path.with_name("heartbeat"))
        return True

    def _locked(self) -> bool:
        """Whether the lock is ours, on the file that still has this name: a run that ends takes its file away."""
        try:
            fcntl.flock(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return os.path.samestat(os.fstat(self._fd), self._path.stat())
        except (BlockingIOError, FileNotFoundError):
            return False

    @property
    def owner(self) -> str:
        """A word that no other run has, where the lock can be lost; else empty."""
        return "" if self._heartbeat is None else self._heartbeat.owner

    @property
    def took_over(self) -> bool:
        """Whether the run before may still write what it had begun."""
        return self._heartbeat is not None and self._heartbeat.took_over

    def check(self) -> None:
        """To be called before anything is written.

        Raises:
            OutputInUse: Another run took the lock meanwhile.
        """
        if self._heartbeat is not None:
            self._heartbeat.check()
        elif now_s() - self._seen_s > _SLEPT_S:
            with in_words(self._path):
                locked = self._locked()
            if not locked:
                raise OutputInUse(
                    f"{self._path.parent.parent} was taken over by another run while this one, or its machine, slept.",
                    hint="wait for the other to finish; what this one had finished is not lost.",
                )
            self._seen_s = now_s()

    def release(self) -> None:
        if self._heartbeat is not None:
            self._heartbeat.release()
            self._heartbeat = None
            with contextlib.suppress(OSError):  # emptied during a beat: shares keep open files under other names
                self._path.parent.rmdir()
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def __enter__(self) -> "FolderLock":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.release()


def sync_folder(folder: Path) -> None:
    """Make renames inside ``folder`` durable, where its file system can: some network shares refuse to sync folders."""
    fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):
            raise
    finally:
        os.close(fd)


def sync_tree(root: Path) -> None:
    """Make a finished file, or a folder with all it holds, durable."""
    if root.is_file():
        with root.open("rb") as file:
            os.fsync(file.fileno())
        return
    for folder, _, names in os.walk(root):
        for name in names:
            sync_tree(Path(folder) / name)
        sync_folder(Path(folder))


def _write_all(fd: int, data: bytes) -> None:
    view = memoryview(data)
    while view:
        view = view[os.write(fd, view) :]


class in_words:  # noqa: N801  (a context manager, read as words)
    """Operating-system errors become an :class:`OutputError` in words."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        if isinstance(error, OSError) and not isinstance(error, WsiError | BrokenPipeError):  # those tell of no file
            reason = error.strerror or str(error)
            raise OutputError(
                f"Cannot write {self._path}: {reason}. Finished blocks are kept.",
                hint="free some space or give a writable folder with -o, then run the same command again to resume.",
            ) from error
