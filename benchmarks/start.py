"""From starting the command to the model's first tile, and to its end.

``python benchmarks/start.py SLIDE [--model crc5] [--repeats 3]``. Each run is ``wsiengine infer SLIDE --json`` in a
fresh process, once uncounted to fill the caches. The first tile's time is that of the command's first event, by the
clock of the process that started it, and of the seconds that ``run.json`` states from there on.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path


def run(slide: str, model: str) -> tuple[float, float, float]:
    """Seconds to the first event, to the first tile, and to the command's end."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "out"
        command = [sys.executable, "-m", "wsiengine", "infer", slide, "--model", model, "-o", str(out), "--json"]
        started = time.perf_counter()
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
            assert process.stdout is not None
            process.stdout.readline()
            event = time.perf_counter() - started
            process.stdout.read()
        if process.returncode:
            raise SystemExit(f"the command ended with code {process.returncode}")
        end = time.perf_counter() - started
        timing = json.loads((out / "run.json").read_text(encoding="utf-8"))["timing"]
    return event, event + timing["first_tile_s"], end


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("slide")
    parser.add_argument("--model", default="crc5")
    parser.add_argument("--repeats", type=int, default=3)
    options = parser.parse_args()
    run(options.slide, options.model)
    print("first event   first tile   end, s")
    rows = []
    for _ in range(options.repeats):
        rows.append(run(options.slide, options.model))
        print("{:11.2f} {:12.2f} {:8.2f}".format(*rows[-1]), flush=True)
    print("{:11.2f} {:12.2f} {:8.2f}   medians".format(*map(statistics.median, zip(*rows, strict=True))))


if __name__ == "__main__":
    main()
