"""Runs that are killed: before the n-th change of the file system, or at a moment in time."""

import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from tests.faults.runs import Resumed, StageBoard, fork, kill, resume, run, visible, wait
from tests.faults.syscalls import FaultAt, crash, nothing
from wsiengine.journal import _read


@dataclass(frozen=True)
class Outcome:
    """What a kill did, and how the run went on.

    Attributes:
        stage: What was going on.
        kept: Tiles that the run had been told are on the disk.
        shown: Results that stood in the output folder.
        resumed: How the next run went.
        seconds: That run's wall time.
    """

    stage: str
    kept: int
    shown: list[str]
    resumed: Resumed
    seconds: float

    @property
    def survived(self) -> bool:
        """Nothing that was finished was done again, and the bytes are those of an undisturbed run."""
        return self.resumed.equal and self.resumed.tiles >= self.kept


def changes(slide: Path, out: Path) -> list[str]:
    """The changes of the file system that a whole run makes, in order."""
    shutil.rmtree(out, ignore_errors=True)
    with FaultAt(out, -1, nothing) as faults:
        run(slide, out)
    return faults.seen


def killed_at_change(slide: Path, out: Path, number: int, wanted: dict[str, bytes]) -> Outcome:
    """Crash just before the ``number``-th change."""

    def work() -> None:
        with FaultAt(out, number, crash):
            run(slide, out)

    return _go_on(slide, out, wanted, lambda board: wait(fork(lambda: _watched(board, work))))


def killed_after(slide: Path, out: Path, seconds: float, wanted: dict[str, bytes]) -> Outcome:
    """``kill -9`` some time after the run began."""

    def end(board: StageBoard) -> int:
        pid = fork(lambda: _watched(board, lambda: run(slide, out)))
        time.sleep(seconds)
        return kill(pid)

    return _go_on(slide, out, wanted, end)


def _watched(board: StageBoard, work: Callable[[], None]) -> None:
    board.watch()
    work()
    board.enter("end")


def _go_on(slide: Path, out: Path, wanted: dict[str, bytes], disturb: Callable[[StageBoard], int]) -> Outcome:
    shutil.rmtree(out, ignore_errors=True)
    board = StageBoard()
    disturb(board)
    stage, kept, shown = board.stage, board.safe_tiles, visible(out)
    started = time.perf_counter()
    resumed = resume(slide, out, wanted)
    return Outcome(stage, kept, shown, resumed, time.perf_counter() - started)


def journalled_tiles(out: Path) -> int:
    """Tiles that the journal of an unfinished run holds."""
    path = out / ".work" / "journal"
    if not path.exists():
        return 0
    found, _ = _read(path)  # not Journal.resume, which cuts off what a living run is just writing
    return sum(int(np.count_nonzero(~np.isnan(scores[..., 0]))) for _, scores in found.tiles)
