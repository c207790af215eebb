"""The cache of compiled kernels on a full disk, or damaged by a power cut: compiled again, never an error."""

import resource
import subprocess
import sys
from pathlib import Path

from tests.faults.runs import environment

USE = """
import sys, numpy as np
from wsikernels.resample import resample_area
out = np.empty((2, 2, 3), np.uint8)
resample_area(np.arange(48, dtype=np.uint8).reshape(4, 4, 3), 0, 0, 2.0, 2.0, 0, 0, out)
print(out.ravel().tolist())
"""
RIGHT = "[8, 9, 10, 14, 15, 16, 32, 33, 34, 38, 39, 40]"


def _use(cache: Path, largest_file_bytes: int | None = None) -> str:
    def limit() -> None:
        if largest_file_bytes is not None:
            resource.setrlimit(resource.RLIMIT_FSIZE, (largest_file_bytes, largest_file_bytes))

    done = subprocess.run(
        [sys.executable, "-c", USE],
        env=environment(NUMBA_CACHE_DIR=str(cache)),
        capture_output=True,
        text=True,
        check=False,
        preexec_fn=limit,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_a_cache_that_cannot_be_written_or_read_back(tmp_path: Path) -> None:
    assert _use(tmp_path, 300) == RIGHT  # no room for compiled code
    assert _use(tmp_path) == RIGHT
    kept = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert any(path.suffix == ".nbc" for path in kept)
    for suffix, damage in ((".nbi", b""), (".nbc", b"")):
        for path in kept:
            if path.suffix == suffix:
                path.write_bytes(damage)
        assert _use(tmp_path) == RIGHT
        assert all(path.stat().st_size for path in tmp_path.rglob("*.nb?"))  # made anew, for the next process
