"""Every example runs, as a user would start it, and does what it says."""

import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import shapely

from tests import planted_slides as planted
from tests.data import data_dir
from wsiengine.geometry import Box, Size
from wsiengine.result import Result

EXAMPLES = Path(__file__).parent.parent / "examples"
SIZE = Size(1003, 1411)


@pytest.fixture(scope="module")
def slide(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pixels = planted.paint(SIZE, [(planted.A, Box(300, 400, 700, 900))], tissue=Box(150, 200, 850, 1200))
    return planted.write(tmp_path_factory.mktemp("slide") / "slide.svs", pixels)


def run(name: str, *arguments: object, cwd: Path) -> str:
    """Start an example in its own process → what it prints."""
    command = [sys.executable, "-W", "error", EXAMPLES / name, *map(str, arguments)]
    done = subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_each_example_is_tested() -> None:
    source = Path(__file__).read_text(encoding="utf-8")
    names = sorted(path.name for path in EXAMPLES.glob("*.py"))
    assert names, "no examples"
    assert [name for name in names if f'run("{name}"' not in source] == []


def test_a_slide_in_annotations_out(slide: Path, tmp_path: Path) -> None:
    told = run("infer_slide.py", slide, "planted", cwd=tmp_path)
    assert "Mark A: 0.05" in told  # 400 × 500 px at 0.5 µm/px = 0.05 mm²
    assert planted.iou(Result(tmp_path / "out").annotations, planted.A, Box(300, 400, 700, 900)) > 0.85
    assert (tmp_path / "out" / "strict.geojson").exists()
    source = (EXAMPLES / "infer_slide.py").read_text(encoding="utf-8").split('"""')[2]
    assert len([line for line in source.splitlines() if line.strip()]) <= 8  # the promise of the README


def test_lazy_arrays(slide: Path, tmp_path: Path) -> None:
    told = run("lazy_map.py", slide, "planted", cwd=tmp_path)
    assert "pixels at 8 µm/px: (63, 89, 3)" in told
    assert "map: (32, 45, 4) cells of 16 px" in told
    assert list(tmp_path.iterdir()) == []  # nothing is written


def test_a_cluster_gives_the_same_files(slide: Path, tmp_path: Path) -> None:
    (tmp_path / "threads").mkdir()
    (tmp_path / "cluster").mkdir()
    run("infer_slide.py", slide, "planted", cwd=tmp_path / "threads")
    run("cluster.py", slide, "planted", cwd=tmp_path / "cluster")
    for name in ("annotations.geojson", "overlay.png"):
        threads, cluster = ((tmp_path / way / "out" / name).read_bytes() for way in ("threads", "cluster"))
        assert threads == cluster, name


def test_a_model_of_ones_own(slide: Path, tmp_path: Path) -> None:
    run("own_model.py", slide, cwd=tmp_path)
    areas = Result(tmp_path / "out").summary["area_mm2"]
    assert set(areas) == {"Dark", "Pale"}
    assert areas["Dark"] == pytest.approx(0.05, rel=0.25)  # the mark is the only dark thing


@pytest.mark.skipif(find_spec("torch") is None, reason="training needs torch")
def test_from_annotations_to_a_model_to_annotations(tmp_path: Path) -> None:
    told = run("train_your_own.py", data_dir(), 24, cwd=tmp_path)
    assert "train 360 images, test 120; classes Benign, Carcinoma" in told
    result = Result(tmp_path / "out")
    zones = {"Benign": shapely.box(160, 160, 1710, 1726), "Carcinoma": shapely.box(1870, 160, 3420, 1726)}
    for name, zone in zones.items():
        found = shapely.union_all([a.geometry for a in result.annotations if a.class_name == name])
        assert found.intersection(zone).area > 0.5 * zone.area, name
    assert "Held-out fold" in (tmp_path / "mymodel" / "report.md").read_text(encoding="utf-8")
