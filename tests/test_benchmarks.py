"""Benchmarks run: the GPU's on a CPU, the memory's on a small slide, the peers' with one that is made up."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.sparse_slides import Sparse, write_sparse
from wsiengine.geometry import Box, Mpp, Size
from wsiengine.slides import open_slide

ROOT = Path(__file__).parents[1]


def bench(name: str, *arguments: str) -> str:
    command = [sys.executable, str(ROOT / "benchmarks" / f"{name}.py"), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240, cwd=ROOT)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


def test_the_gpu_benchmark_runs_on_a_cpu(tmp_path: Path) -> None:
    small = ("--device", "cpu", "--quick", "--gpx", "0.004", "--models", "mobilenetv2")
    said = bench("gpu", *small, "--json", str(tmp_path / "n.json"))
    assert "ratio" in said
    [(name, numbers)] = json.loads((tmp_path / "n.json").read_text()).items()
    assert name == "mobilenetv2"
    assert numbers["tiles"] > 0
    assert numbers["bare_tiles_per_s"] > 0
    assert numbers["stages_s"]["model"] > 0


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="memory is read from /proc, which Linux has")
def test_peak_memory_is_that_of_the_plan() -> None:
    """On a slide of 2 Gpx, within 1.2 times of what the plan says, and the plan not far above."""
    said = bench("memory", "--gpx", "2", "--share", "0.01", "--model", "planted", "--threads", "2")
    fields = said.splitlines()[-1].replace(",", "").split()
    peak, planned = int(fields[2]), int(fields[3])
    assert peak <= 1.2 * planned
    assert peak >= 0.5 * planned


def test_a_sparse_slide_is_a_slide(tmp_path: Path) -> None:
    """Its levels show the same: tissue where it is drawn, by the area."""
    what = Sparse(Size(9_003, 20_017), share=0.2)
    slide = open_slide(write_sparse(tmp_path / "s.tiff", what))
    assert slide.info.size_l0 == what.size_l0
    assert (tmp_path / "s.tiff").stat().st_size < 3_000_000
    for mpp in (4.0, 16.0):
        whole = Box(0, 0, int(9_003 * 0.25 / mpp), int(20_017 * 0.25 / mpp))
        stained = slide.read(whole, Mpp.square(mpp))[..., 1] < 220
        assert 0.15 < stained.mean() < 0.25
