"""Hostile slides: seeded mutants of real and drawn slides through every reader, each in a child that may die.

``python benchmarks/fuzz.py [--mutants 2000] [--seed 0] [--keep DIR] [--out table.md] [--quick]``

Looked for: crashes of the interpreter, hangs (15 s of the processor), memory (1.5 GiB above what is loaded), errors
that are not said in words, wrong geometry, and pixels that differ outside the file tiles whose bytes were touched. JPEG
has no checksum: inside touched tiles pixels may differ, which is counted. ``--keep`` saves what fails.
"""

import argparse
import os
import sys
import tempfile
from collections import Counter, defaultdict
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tests.faults.hostile import Verdict
    from tests.faults.mutants import Mutant

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "kernels")]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mutants", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", help="files whose name holds this")
    parser.add_argument("--keep", type=Path, help="folder for mutants that fail")
    parser.add_argument("--out", type=Path, help="also write the table to this file")
    parser.add_argument("--quick", action="store_true", help="20 mutants of drawn slides")
    args = parser.parse_args()
    shared = None if args.quick else os.environ.get("WSIENGINE_DATA")
    with tempfile.TemporaryDirectory() as folder:
        table, failures = campaign(args, Path(folder), Path(shared) if shared else None)
    print(table)
    if args.out:
        args.out.write_text(table + "\n", encoding="utf-8")
    return 1 if failures else 0


def campaign(args: argparse.Namespace, folder: Path, shared: Path | None) -> tuple[str, int]:
    """All mutants, file by file → table, number of failures."""
    from tests.faults.hostile import READERS, examine, sound, warm_up
    from tests.faults.mutants import Original, mutate, originals

    paths = [path for path in originals(folder, shared) if not args.only or args.only in path.name]
    warm_up(folder / "jpeg-svs.svs")
    total = 20 if args.quick else args.mutants
    tally = Tally(args.keep)
    try:
        for number, path in enumerate(paths):
            original = Original.load(path)
            known = {reader: sound(path, original, reader) for reader in READERS if reader != "run"}
            place = folder / f"mutant{path.suffix}"
            for seed in range(args.seed, args.seed + total // len(paths) + (number < total % len(paths))):
                mutant = mutate(original, seed)
                place.write_bytes(mutant.data)
                tally.add(path, seed, mutant, examine(place, original, mutant, known))
            print(f"{path.name}: {tally.done:,} of {total:,} done, {tally.failures} failures", flush=True)
    except KeyboardInterrupt:
        print("interrupted: what was done so far", flush=True)
    return _table(tally), tally.failures


class Tally:
    """Outcomes by reader, and kinds of mutants."""

    def __init__(self, keep: Path | None) -> None:
        self.counts: dict[str, Counter[str]] = defaultdict(Counter)
        self.kinds: Counter[str] = Counter()
        self.failures = 0
        self._keep = keep

    @property
    def done(self) -> int:
        return sum(self.kinds.values())

    def add(self, path: Path, seed: int, mutant: "Mutant", verdict: "Verdict") -> None:
        from tests.faults.hostile import NAMES, READERS

        self.kinds[mutant.kind] += 1
        for reader, outcome in zip(READERS, verdict.outcomes, strict=True):
            self.counts[reader or "chosen"][NAMES[outcome]] += 1
        if verdict.good:
            return
        self.failures += 1
        print(f"FAILED {path.name} seed {seed} ({mutant.kind}): {verdict}", flush=True)
        if self._keep:
            self._keep.mkdir(parents=True, exist_ok=True)
            (self._keep / f"{path.stem}-{seed}{path.suffix}").write_bytes(mutant.data)


def _table(tally: Tally) -> str:
    from tests.faults.hostile import NAMES

    counts, kinds = tally.counts, tally.kinds
    seen = [name for name in NAMES if any(name in count for count in counts.values())]
    lines = [f"{tally.done:,} mutants, {tally.failures} failures", ""]
    lines += ["| outcome | " + " | ".join(counts) + " |", "|---|" + "--:|" * len(counts)]
    lines += [f"| {name} | " + " | ".join(f"{count[name]:,}" for count in counts.values()) + " |" for name in seen]
    return "\n".join([*lines, "", "Mutations: " + ", ".join(f"{kind} {n:,}" for kind, n in kinds.most_common()) + "."])


if __name__ == "__main__":
    sys.exit(main())
