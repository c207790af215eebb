"""Power cuts at every moment of a run, each resumed from the least that the disk must show."""

import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from tests.faults.power import Recorder, build
from tests.faults.runs import resume, run
from wsiengine.errors import OutputError
from wsiengine.events import Event


@dataclass(frozen=True)
class Cut:
    """A disk after a power cut, and the tiles that must be on it."""

    words: str
    disk: dict[str, bytes | None]
    safe_tiles: int

    def survived(self, slide: Path, out: Path, wanted: dict[str, bytes]) -> bool:
        shutil.rmtree(out, ignore_errors=True)
        build(out, self.disk)
        try:
            resumed = resume(slide, out, wanted)
        except OutputError:
            return False
        return resumed.equal and resumed.tiles >= self.safe_tiles and not (out / ".work").exists()


def record(slide: Path, out: Path) -> Recorder:
    """Record one whole run."""
    shutil.rmtree(out, ignore_errors=True)
    recorder = Recorder(out)

    def listener(event: Event) -> None:
        if event.kind == "progress":
            recorder.safe_tiles = event.data["done"]

    with recorder:
        run(slide, out, threads=1, listener=listener)
    return recorder


def cuts(recorder: Recorder) -> Iterator[Cut]:
    """All cuts, but for those whose disk was seen before with as many tiles to keep."""
    seen = set()
    for state in recorder.states():
        torn_parts = (0.0, 0.3, 0.999, 1.0) if state.steps and state.steps[-1].kind == "torn" else (0.0,)
        for torn in torn_parts:
            for names_arrived in (False, True):
                disk = state.disk(torn=torn, names_arrived=names_arrived)
                key = (hash(frozenset(disk.items())), state.safe_tiles)
                if key not in seen:
                    seen.add(key)
                    yield Cut(f"{state.words}, torn {torn}, names {names_arrived}", disk, state.safe_tiles)
