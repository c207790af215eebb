"""Small runs to be disturbed: a slide, its undisturbed results, and children that run it and can be killed."""

import json
import mmap
import os
import shutil
import signal
import sys
import threading
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np

from tests import planted_slides as planted
from wsiengine.events import Event
from wsiengine.geometry import Box, Size

SIZE = Size(803, 1211)
MARKS = [
    (planted.A, Box(100, 150, 350, 450)),
    (planted.B, Box(450, 600, 803, 1211)),
    (planted.C, Box(50, 625, 400, 975)),
]
TILES = 117  # of the whole run
STAGES = ("start", "open", "tissue", "blocks", "journal", "map", "annotations", "overlay", "run.json", "publish", "end")


def write_slide(path: Path) -> Path:
    return planted.write(path, planted.paint(SIZE, MARKS))


def run(slide: Path, out: Path, **options: Any) -> Any:
    """The run that is disturbed: 20 blocks of at most 9 tiles.

    Each is recorded by itself: how many are finished together hangs on chance, and the changes of the disk are counted.
    """
    from wsiengine import workers
    from wsiengine.inference import infer

    with mock.patch.object(workers, "TOGETHER", 1):
        return infer(slide, "planted", out, **{"block_tiles": 3, "threads": 2, **options})


def contents(folder: Path) -> dict[str, bytes]:
    """Every output byte, but for the two parts of run.json that may differ between equal runs."""
    found = {p.relative_to(folder).as_posix(): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}
    facts = json.loads(found["run.json"])
    found["run.json"] = json.dumps({k: v for k, v in facts.items() if k not in ("timing", "host")}).encode()
    return found


def visible(folder: Path) -> list[str]:
    """What a user sees in an output folder."""
    return sorted(p.name for p in folder.iterdir() if p.name != ".work") if folder.exists() else []


@dataclass(frozen=True)
class Resumed:
    """How the run after a fault went: tiles that it found done, and whether it ended with the bytes wanted."""

    tiles: int
    equal: bool


def resume(slide: Path, out: Path, wanted: dict[str, bytes]) -> Resumed:
    """Run again with the same arguments, in this process."""
    found = [0]

    def listener(event: Event) -> None:
        if event.kind == "resume":
            found.append(event.data["done"])
        elif event.kind == "note":
            found.append(TILES)  # already finished

    run(slide, out, listener=listener)
    return Resumed(found[-1], contents(out) == wanted)


class StageBoard:
    """Memory shared with a forked child, which writes there what it is doing and how many tiles are safe."""

    def __init__(self) -> None:
        self._memory = mmap.mmap(-1, 8)
        self._lock = threading.Lock()

    @property
    def stage(self) -> str:
        return STAGES[self._memory[0]]

    def enter(self, stage: str) -> None:
        self._memory[0] = STAGES.index(stage)

    @property
    def safe_tiles(self) -> int:
        """Tiles that the child was told are on the disk."""
        return int.from_bytes(self._memory[4:8], "little")

    def watch(self) -> None:
        """Wrap the functions of the run in this process, so that each notes its stage."""
        from wsiengine import finishing, inference, journal, output, report, store

        self._wrap(inference, "identify", "open")
        self._wrap(inference, "prepare", "tissue")
        self._wrap(inference, "_score", "blocks")
        self._wrap(journal.Journal, "_append", "journal", after="blocks")
        self._count_tiles(journal.Journal)
        self._wrap(store, "write_store", "map")
        self._wrap(finishing, "write_annotations", "annotations")
        self._wrap(report, "draw_overlay", "overlay")
        self._wrap(inference, "run_facts", "run.json")
        self._wrap(output.Workspace, "publish", "publish", after="end")

    def _count_tiles(self, journal: Any) -> None:
        original = journal.add_tiles

        def counted(journal: Any, tiles: Box, scores: np.ndarray) -> None:
            original(journal, tiles, scores)
            with self._lock:
                count = self.safe_tiles + int(np.count_nonzero(~np.isnan(scores[..., 0])))
                self._memory[4:8] = count.to_bytes(4, "little")

        journal.add_tiles = counted

    def _wrap(self, owner: Any, name: str, stage: str, after: str | None = None) -> None:
        original = getattr(owner, name)

        def noted(*args: Any, **kwargs: Any) -> Any:
            self.enter(stage)
            try:
                return original(*args, **kwargs)
            finally:
                if after is not None:
                    self.enter(after)

        setattr(owner, name, noted)


def fork(work: Callable[[], None]) -> int:
    """Start a child that does ``work`` and ends, without a word → its process id.

    Forked, as importing everything takes ten times as long as the run. The child holds the interpreter alone: it must
    be forked while this process has no threads at work.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # later Pythons warn of any thread, idle ones too
        pid = os.fork()
    if pid:
        return pid
    code = 1
    try:
        silence = os.open(os.devnull, os.O_WRONLY)
        os.dup2(silence, 1)
        os.dup2(silence, 2)
        work()
        code = 0
    finally:
        os._exit(code)


def wait(pid: int) -> int:
    """Exit code of a child, negative for a signal."""
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def kill(pid: int) -> int:
    os.kill(pid, signal.SIGKILL)
    return wait(pid)


def copy_tree(source: Path, target: Path) -> Path:
    shutil.rmtree(target, ignore_errors=True)
    return Path(shutil.copytree(source, target)) if source.exists() else target


def environment(**more: str) -> dict[str, str]:
    """Of a child interpreter that finds the sources."""
    root = Path(__file__).parents[2]
    return {**os.environ, "PYTHONPATH": f"{root}{os.pathsep}{root / 'kernels'}", **more}


COMMAND = (sys.executable, "-m", "wsiengine", "infer", "--model", "planted", "--tissue", "auto")
