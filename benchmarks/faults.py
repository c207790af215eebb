"""Faults injected into runs, and whether everything finished survived them: the campaigns of docs/reliability.md.

``python benchmarks/faults.py [--campaign NAME …] [--scale 1.0] [--part 1/1] [--add FILE] [--out table.md] [--quick]``

Each line tells: faults injected, survived, outputs equal byte for byte to an undisturbed run's, and how long the next
run took to finish the work. The runs are small (117 tiles in 20 blocks, a map, annotations, an overlay), so that they
are hit everywhere. ``--scale`` takes a share of each campaign, ``--quick`` a few faults of each, ``--part 2/8`` every
eighth from the second on; with ``--add FILE`` parts that are run one by one end in one table.
"""

import argparse
import json
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "kernels")]
_QUICK = 0.02


@dataclass
class Tally:
    """One line of the table."""

    name: str
    injected: int = 0
    survived: int = 0
    equal: int = 0
    seconds: list[float] = field(default_factory=list)
    where: Counter[str] = field(default_factory=Counter)
    lost: list[str] = field(default_factory=list)

    def add(self, words: str, survived: bool, equal: bool, seconds: float | None = None, where: str = "") -> None:
        self.injected += 1
        self.survived += survived
        self.equal += equal
        if seconds is not None:
            self.seconds.append(seconds)
        if where:
            self.where[where] += 1
        if not (survived and equal):
            self.lost.append(words)

    def join(self, other: "Tally") -> None:
        """Take in another part of the same campaign."""
        self.injected, self.survived = self.injected + other.injected, self.survived + other.survived
        self.equal += other.equal
        self.seconds, self.lost = self.seconds + other.seconds, self.lost + other.lost
        self.where.update(other.where)

    def row(self) -> str:
        resumed = f"{statistics.median(self.seconds):.2f} s" if self.seconds else "–"
        equal = f"{self.equal:,}" if self.seconds else "–"
        return f"| {self.name} | {self.injected:,} | {self.survived:,} | {equal} | {resumed} |"


@dataclass(frozen=True)
class Ground:
    """What the campaigns need: a folder, the slide, the undisturbed bytes, and what share or part to run."""

    folder: Path
    slide: Path
    wanted: dict[str, bytes]
    scale: float
    part: slice

    def some(self, items: list, least: int = 3) -> list:
        """A fixed share of ``items``, in order."""
        count = min(len(items), max(least, round(len(items) * self.scale)))
        return [items[i] for i in sorted(random.Random(7).sample(range(len(items)), count))[self.part]]


def kills_at_changes(ground: Ground) -> Iterator[Tally]:
    from tests.faults.kills import changes, killed_at_change

    tally = Tally("kill before each change of the file system")
    out = ground.folder / "out"
    whole = changes(ground.slide, out)
    for number in ground.some(list(range(len(whole)))):
        got = killed_at_change(ground.slide, out, number, ground.wanted)
        tally.add(f"{whole[number]}: {got}", got.survived, got.resumed.equal, got.seconds, got.stage)
    yield tally


def kills_at_moments(ground: Ground) -> Iterator[Tally]:
    from tests.faults.kills import killed_after

    tally = Tally("`kill -9` at random moments, forked run")
    longest = _time_of_run(ground)
    for seed in ground.some(list(range(200))):
        moment = random.Random(seed).uniform(0.0, longest)
        got = killed_after(ground.slide, ground.folder / "out", moment, ground.wanted)
        tally.add(f"seed {seed}: {got}", got.survived, got.resumed.equal, got.seconds, got.stage)
    yield tally


def _time_of_run(ground: Ground) -> float:
    from tests.faults.runs import run

    times = []
    for k in range(3):
        started = time.perf_counter()
        run(ground.slide, ground.folder / f"timed{k}")
        times.append(time.perf_counter() - started)
    return min(times) * 1.1


def kills_of_the_command(ground: Ground) -> Iterator[Tally]:
    import shutil

    from tests.faults.kills import journalled_tiles
    from tests.faults.runs import COMMAND, contents, environment

    tally = Tally("`kill -9` of `wsiengine infer` at random moments")
    out = ground.folder / "out"
    command = [*COMMAND, str(ground.slide), "-o", str(out)]
    started = time.perf_counter()
    subprocess.run(command, env=environment(), check=True, capture_output=True)
    longest = time.perf_counter() - started
    for seed in ground.some(list(range(40)), 2):
        shutil.rmtree(out, ignore_errors=True)
        process = subprocess.Popen(command, env=environment(), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        time.sleep(random.Random(seed).uniform(0.3, 1.0) * longest)
        process.kill()
        process.wait()
        kept, began = journalled_tiles(out), time.perf_counter()
        done = subprocess.run(command, env=environment(), capture_output=True, text=True, check=False)
        went_on = not kept or f"{kept} of 117 tiles" in done.stdout
        equal = done.returncode == 0 and contents(out) == ground.wanted
        tally.add(f"seed {seed}: {done}", went_on and equal, equal, time.perf_counter() - began)
    yield tally


def power_cuts(ground: Ground) -> Iterator[Tally]:
    from tests.faults.cuts import cuts, record

    tally = Tally("power cut, all un-synced suffixes dropped")
    for cut in ground.some(list(cuts(record(ground.slide, ground.folder / "recorded")))):
        started = time.perf_counter()
        survived = cut.survived(ground.slide, ground.folder / "out", ground.wanted)
        tally.add(cut.words, survived, survived, time.perf_counter() - started)
    yield tally


def failing_disks(ground: Ground) -> Iterator[Tally]:
    from tests.faults.disks import FINISHED, IN_WORDS, failing_disk
    from tests.faults.kills import changes
    from tests.faults.runs import resume
    from tests.faults.syscalls import disk_full, read_only, share_gone

    out = ground.folder / "out"
    whole = changes(ground.slide, out)
    faults = {"disk full": disk_full, "disk read-only": read_only, "network share gone": share_gone}
    for name, fault in faults.items():
        tally = Tally(f"{name} from each change on, then mended")
        for number in ground.some(list(range(len(whole)))):
            code = failing_disk(ground.slide, out, number, fault)
            started = time.perf_counter()
            resumed = resume(ground.slide, out, ground.wanted)
            in_words = code in (IN_WORDS, FINISHED)
            tally.add(f"{whole[number]}: {code} {resumed}", in_words, resumed.equal, time.perf_counter() - started)
        yield tally


def exports(ground: Ground) -> Iterator[Tally]:
    """20,000 nasty shapes and 400 maps; an export survives where the rules of QuPath object to nothing."""
    from tests.faults.shapes import export_map, export_shapes

    tally, batch = Tally("nasty shapes exported"), 50
    for first in ground.some(list(range(0, 20_000, batch))):
        shapes, problems = export_shapes(range(first, first + batch), ground.folder)
        for _ in range(shapes):
            tally.add(f"from {first}: {problems[:3]}", not problems, not problems)
    yield tally
    tally = Tally("random maps exported")
    for seed in ground.some(list(range(400))):
        _, problems = export_map(seed, ground.folder)
        tally.add(f"seed {seed}: {problems[:3]}", not problems, not problems)
    yield tally


def crashing_readers(ground: Ground) -> Iterator[Tally]:
    """Of three slides the second ends its process at the n-th read, each time; the others must be finished."""
    from tests.faults.crashes import crash_among_others

    tally = Tally("reader crashes at the n-th read of one of three slides")
    for reads in ground.some(list(range(0, 30)), 1):
        started = time.perf_counter()
        survived, equal = crash_among_others(ground.slide, ground.folder / "crash", reads, ground.wanted)
        tally.add(f"after {reads} reads", survived, equal, time.perf_counter() - started)
    yield tally


CAMPAIGNS: dict[str, Callable[[Ground], Iterator[Tally]]] = {
    "changes": kills_at_changes,
    "moments": kills_at_moments,
    "command": kills_of_the_command,
    "power": power_cuts,
    "disk": failing_disks,
    "exports": exports,
    "readers": crashing_readers,
}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--campaign", action="append", choices=CAMPAIGNS, help="default: all")
    parser.add_argument("--scale", type=float, default=1.0, help="share of each campaign")
    parser.add_argument("--quick", action="store_true", help="a few faults of each")
    parser.add_argument("--part", default="1/1", help="K/N: of each campaign every N-th fault, from the K-th on")
    parser.add_argument("--add", type=Path, help="count what was found to what this file (JSON) holds of other parts")
    parser.add_argument("--out", type=Path, help="also write the table to this file")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as place:
        tallies = list(_run(args, Path(place)))
    if args.add:
        tallies = _added(args.add, tallies)
    lines = ["| fault | injected | survived | bytes equal | next run (median) |", "|---|--:|--:|--:|--:|"]
    lines += [tally.row() for tally in tallies]
    print("\n".join(lines))
    if args.out:
        args.out.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return 1 if any(tally.lost for tally in tallies) else 0


def _added(path: Path, tallies: list[Tally]) -> list[Tally]:
    """All that the file holds, with these counted in; it is written anew."""
    kept = [Tally(**part) for part in json.loads(path.read_text(encoding="utf-8"))] if path.exists() else []
    for tally in kept:
        tally.where = Counter(tally.where)
    for tally in tallies:
        same = next((one for one in kept if one.name == tally.name), None)
        kept.append(tally) if same is None else same.join(tally)
    path.write_text(json.dumps([vars(tally) for tally in kept]), encoding="utf-8")
    return kept


def _run(args: argparse.Namespace, folder: Path) -> Iterator[Tally]:
    from tests.faults.runs import contents, run, write_slide

    slide = write_slide(folder / "slide.svs")
    run(slide, folder / "undisturbed")
    first, of = map(int, args.part.split("/"))
    scale = _QUICK if args.quick else args.scale
    ground = Ground(folder, slide, contents(folder / "undisturbed"), scale, slice(first - 1, None, of))
    for name in args.campaign or CAMPAIGNS:
        for tally in CAMPAIGNS[name](ground):
            print(tally.row(), *(f"{stage} {count}" for stage, count in tally.where.most_common()), flush=True)
            for words in tally.lost[:5]:
                print("  LOST", words, flush=True)
            yield tally


if __name__ == "__main__":
    sys.exit(main())
