"""Power cuts: which states a disk may be in, given what a run wrote, renamed and synced.

The model is the strictest that POSIX allows, but that changes of one folder stay in order:

- The bytes of a file are on the disk as they were at its last sync; of what was written later, any beginning may be.
- A name (made, renamed, removed) is on the disk once the folder that holds it has been synced since; of the changes
  after that, any beginning may be, in the order in which they were made.

:class:`Recorder` watches a run; :meth:`Recorder.states` tells, for every moment, the least that must be there (all
un-synced suffixes dropped), and for the journal also torn writes.
"""

import os
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Step:
    """One change or sync. ``inode`` tells files apart whatever they are called."""

    kind: str  # make, rename, remove (of names); content (synced bytes); torn (bytes on their way); sync (a folder)
    path: str
    target: str = ""
    inode: int = 0
    data: bytes = b""
    safe_tiles: int = 0


class Recorder:
    """Records the changes below ``root`` that this process makes while it is on."""

    def __init__(self, root: Path) -> None:
        self.steps: list[Step] = []
        self.safe_tiles = 0
        self._root = os.fspath(root)
        self._on = False
        sys.addaudithook(self._audit)

    def __enter__(self) -> "Recorder":
        self._originals = {name: getattr(os, name) for name in ("write", "fsync", "fdatasync")}
        os.write = self._write  # type: ignore[assignment]
        for name in ("fsync", "fdatasync"):
            setattr(os, name, self._synced(self._originals[name]))
        self._on = True
        return self

    def __exit__(self, *exc: object) -> None:
        self._on = False
        for name, original in self._originals.items():
            setattr(os, name, original)

    def _add(self, step: Step) -> None:
        if step.path.startswith(self._root) or self._root.startswith(step.path):
            self.steps.append(replace(step, safe_tiles=self.safe_tiles))

    def _write(self, fd: int, data: Any) -> int:
        path = _path_of(fd)
        if path.startswith(self._root):
            before = Path(path).read_bytes()[: os.lseek(fd, 0, os.SEEK_CUR)]
            self._add(Step("torn", path, inode=os.fstat(fd).st_ino, data=before + bytes(data)))
        return int(self._originals["write"](fd, data))

    def _synced(self, original: Callable[[int], None]) -> Callable[[int], None]:
        def call(fd: int) -> None:
            original(fd)
            path = Path(_path_of(fd))
            if path.is_dir():
                self._add(Step("sync", str(path)))
            elif str(path).startswith(self._root):
                self._add(Step("content", str(path), inode=os.fstat(fd).st_ino, data=path.read_bytes()))

        return call

    def _audit(self, event: str, args: tuple[Any, ...]) -> None:
        """Names; noted before they change, which a model that drops what is not synced cannot tell from after."""
        if not self._on:
            return
        if event == "open" and isinstance(args[0], str) and (args[2] or 0) & os.O_CREAT:
            self._add(Step("make", args[0]))
        elif event == "os.mkdir":
            self._add(Step("make", os.fspath(args[0]) + "/"))
        elif event == "os.rename":
            self._add(Step("rename", os.fspath(args[0]), os.fspath(args[1])))
        elif event in ("os.remove", "os.rmdir") and args[1] == -1:
            self._add(Step("remove", os.fspath(args[0])))

    def states(self) -> Iterator["State"]:
        """What may be on the disk after each step: at least this."""
        for count in range(len(self.steps) + 1):
            yield State(self._root, tuple(self.steps[:count]))


def _path_of(fd: int) -> str:
    return str(Path(f"/proc/self/fd/{fd}").readlink())


@dataclass(frozen=True)
class State:
    """A disk after a power cut."""

    root: str
    steps: tuple[Step, ...]

    @property
    def safe_tiles(self) -> int:
        """Tiles that the run had been told are safe."""
        return self.steps[-1].safe_tiles if self.steps else 0

    @property
    def words(self) -> str:
        return f"after {self.steps[-1].kind} {self.steps[-1].path[len(self.root) :]}" if self.steps else "at the start"

    def disk(self, *, torn: float = 0.0, names_arrived: bool = False) -> dict[str, bytes | None]:
        """What the disk shows: bytes by path below the folder, None for folders, which end with a slash.

        Args:
            torn: How much of a write under way arrived, 0 to 1.
            names_arrived: Names reached the disk although nobody synced them; the bytes did not.
        """
        names, bodies = self._names(names_arrived), self._bodies(torn)
        folders = {path for path in names if path.endswith("/")}
        return {
            path[len(self.root) :]: None if path.endswith("/") else bodies.get(source, b"")
            for path, source in names.items()
            if path.endswith("/") or str(Path(path).parent) + "/" in folders
        }

    def _names(self, all_arrived: bool) -> dict[str, str]:
        """Names on the disk → the name under which their bytes were made."""
        names: dict[str, str] = {}
        for at, step in enumerate(self.steps):
            if step.kind in ("make", "rename", "remove") and (all_arrived or self._name_is_safe(at, step)):
                _change(names, step)
        return names

    def _name_is_safe(self, at: int, step: Step) -> bool:
        folder = str(Path(step.target or step.path).parent)
        return any(later.kind == "sync" and later.path == folder for later in self.steps[at + 1 :])

    def _bodies(self, torn: float) -> dict[str, bytes]:
        """Synced bytes by the name under which the file was made."""
        first: dict[str, str] = {}  # present name → first name
        bodies: dict[str, bytes] = {}
        for step in self.steps:
            if step.kind == "rename":
                _move(first, step.path, step.target)
            elif step.kind == "make" and not step.path.endswith("/"):
                first[step.path] = step.path
                bodies[step.path] = b""
            elif step.kind == "content":
                bodies[first.get(step.path, step.path)] = step.data
        last = self.steps[-1] if self.steps else None
        if last is not None and last.kind == "torn" and torn:
            name = first.get(last.path, last.path)
            old = bodies.get(name, b"")
            bodies[name] = last.data[: len(old) + round(torn * (len(last.data) - len(old)))]
        return bodies


def build(out: Path, disk: dict[str, bytes | None]) -> None:
    """Make the folder as the disk shows it."""
    for path, data in sorted(disk.items()):
        place = Path(str(out) + path)
        if data is None:
            place.mkdir(parents=True, exist_ok=True)
        else:
            place.write_bytes(data)


def _change(names: dict[str, str], step: Step) -> None:
    if step.kind == "make":
        names.setdefault(step.path, step.path)
    elif step.kind == "rename":
        _move(names, step.path, step.target)
    else:
        names.pop(step.path, None)
        names.pop(step.path + "/", None)


def _move(names: dict[str, str], source: str, target: str) -> None:
    """Rename a file, or a folder with all below it."""
    for name in [n for n in names if n == source or n.startswith(source + "/")]:
        names[target + name[len(source) :]] = names.pop(name)
