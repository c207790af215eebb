"""Does memory grow with the slide? Peak of anonymous memory beside the plan's, from 0.1 to 50 Gpx, and cost per tile.

    python benchmarks/memory.py [--gpx 0.1,1,10,50] [--model crc5] [--mode tiles|dense] [--share 0.05]

The slides are sparse: of any size, in a few megabytes of file, ``--share`` of them tissue. Each run is a process of its
own.
"""

import argparse
import json
import math
import os
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "kernels")]
from tests.sparse_slides import Sparse, write_sparse  # noqa: E402
from wsiengine.geometry import Size  # noqa: E402


def make(path: Path, gpx: float, share: float) -> Path:
    height = math.isqrt(round(gpx * 1e9 * 3 / 4))
    return write_sparse(path, Sparse(Size(height, round(gpx * 1e9 / height)), share=share))


def measure(slide: Path, options: argparse.Namespace) -> dict[str, float]:
    command = [sys.executable, str(ROOT / "benchmarks" / "engine.py"), "--part", "engine", "--slide", str(slide)]
    command += ["--model", options.model, "--threads", str(options.threads), "--mode", options.mode]
    command += ["--memory-limit", str(options.memory_limit)] if options.memory_limit else []
    done = subprocess.run(command, stdout=subprocess.PIPE, check=True, text=True)
    return dict(json.loads(done.stdout.splitlines()[-1]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--gpx", default="0.1,1,10,50", help="sizes of level 0, in 10⁹ pixels")
    parser.add_argument("--model", default="crc5")
    parser.add_argument("--mode", default="tiles", choices=["tiles", "dense"])
    parser.add_argument("--share", type=float, default=0.05, help="of the slide that is tissue")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--memory-limit", type=int, help="MiB")
    options = parser.parse_args()
    print("    Gpx    tiles   peak MiB  planned  peak/planned   ms/tile, CPU   start s  scratch files, MiB")
    with tempfile.TemporaryDirectory() as folder:
        for gpx in map(float, options.gpx.split(",")):
            row = measure(make(Path(folder) / f"{gpx:g}.tiff", gpx, options.share), options)
            peak, planned = row["anonymous_mib"], row["planned_mib"]
            running = row["stages_s"]["model"] + row["stages_s"]["read"]  # type: ignore[index]
            start = row["wall_s"] - row["stages_s"]["run (wall)"]  # type: ignore[index]
            print(
                f"{gpx:7g} {row['tiles']:8,} {peak:10,} {planned:8,} {peak / planned:13.2f} "
                f"{1000 * running / row['tiles']:14.2f} {start:9.2f} {row['scratch_mib']:12,}",
                flush=True,
            )


if __name__ == "__main__":
    main()
