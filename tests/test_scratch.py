"""Arrays that grow with a slide: in files without a name from a size on, and never seen in a result."""

import errno
import gc
import mmap
import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests import planted_slides
from tests.faults.runs import contents
from tests.models import segmenters
from wsiengine import scratch, tissue
from wsiengine.contours import trace
from wsiengine.errors import OutputError
from wsiengine.geometry import Box, Lattice, Mpp, Size
from wsiengine.grid import TileGrid
from wsiengine.inference import Outputs, infer
from wsiengine.output import Workspace
from wsiengine.scratch import IN_MEMORY, LARGE_BYTES, Scratch
from wsiengine.tasks.classify import MapLayout, label, overview, smoothed
from wsiengine.tissue import TissueMask, find_tissue

SIZE = Size(803, 1211)
MARKS = [(planted_slides.A, Box(100, 150, 350, 450)), (planted_slides.B, Box(450, 600, 803, 1211))]


def _in_a_file(array: np.ndarray) -> bool:
    base: Any = array
    while isinstance(base, np.ndarray):
        base = base.base
    return isinstance(getattr(base, "obj", base), mmap.mmap)


def _open_files() -> int:
    return len(list(Path("/proc/self/fd").iterdir()))


def test_large_arrays_lie_in_files_that_have_no_name(tmp_path: Path) -> None:
    make = Scratch(tmp_path)
    small, large = make.zeros((LARGE_BYTES - 1,), np.uint8), make.zeros((LARGE_BYTES // 8, 2), np.float32)
    assert not _in_a_file(small)
    assert _in_a_file(large)
    assert not any(tmp_path.iterdir())
    assert not large.any()
    assert large.flags.c_contiguous
    large[:] = 7
    assert make.full(large.shape, 7, np.float32).tolist() == large.tolist()
    assert not _in_a_file(IN_MEMORY.zeros(large.shape, np.float32))
    assert Scratch(tmp_path, 0).zeros((0, 5), bool).shape == (0, 5)  # no file can be empty and mapped


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="open files are counted in /proc")
def test_an_array_that_is_dropped_gives_its_file_back(tmp_path: Path) -> None:
    before = _open_files()
    free = shutil.disk_usage(tmp_path).free
    array = Scratch(tmp_path).zeros((64 << 20,), np.uint8)
    assert _open_files() == before + 1
    assert shutil.disk_usage(tmp_path).free < free - (32 << 20)  # reserved, though nothing was written
    del array
    gc.collect()
    assert _open_files() == before


def test_what_lies_where_is_foretold(tmp_path: Path) -> None:
    sizes = (5, LARGE_BYTES - 1, LARGE_BYTES, 3 * LARGE_BYTES)
    assert Scratch(tmp_path).split(sizes) == (LARGE_BYTES + 4, 4 * LARGE_BYTES)
    assert IN_MEMORY.split(sizes) == (sum(sizes), 0)


def test_no_room_is_refused_beforehand(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make = Scratch(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(9, 6, 3 << 20))  # type: ignore[attr-defined]
    make.require(3 << 20)
    IN_MEMORY.require(1 << 60)
    with pytest.raises(OutputError, match=r"Cannot write .* 5 MiB are needed .* 3 MiB are free") as refused:
        make.require(5 << 20)
    assert "free some space" in str(refused.value.hint)


def test_a_share_that_cannot_map_leaves_it_to_the_systems_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    share, places = tmp_path / "share", []

    def mapping(folder: Path, size: int) -> mmap.mmap:
        places.append(folder)
        if folder == share:
            raise OSError(errno.ENODEV, os.strerror(errno.ENODEV))
        return mmap.mmap(-1, size)

    monkeypatch.setattr(scratch, "_map", mapping)
    assert not Scratch(share, 0).zeros((3,), np.uint8).any()
    assert places == [share, Path(scratch.tempfile.gettempdir())]


# --- whole == strips -----------------------------------------------------------------------------


@pytest.fixture
def narrow(monkeypatch: pytest.MonkeyPatch) -> None:
    """Strips of 16 rows, the least there are."""
    monkeypatch.setattr(scratch, "STRIP", 1)


LAYOUT = MapLayout(("A", "B"), ((9, 9, 9), (5, 5, 5)), ((0,), (1,)), "softmax", uncertain_below=0.4)


def _map() -> np.ndarray:
    random = np.random.default_rng(3)
    coded = random.integers(1, 256, (123, 57, 2), np.uint8)
    coded[random.random((123, 57)) < 0.3] = 0
    return coded


@pytest.mark.parametrize("sigma", [0.0, 1.7])
def test_labels_and_overviews_are_the_same_in_strips(tmp_path: Path, monkeypatch: Any, sigma: float) -> None:
    coded = _map()
    labels, halved = label(coded, LAYOUT, 0.4, sigma), overview(coded)
    traced = trace(labels, smooth=True)
    monkeypatch.setattr(scratch, "STRIP", 1)
    make = Scratch(tmp_path, 0)
    in_strips = label(coded, LAYOUT, 0.4, sigma, make)
    assert _in_a_file(in_strips)
    assert len(set(np.unique(labels))) == 4
    np.testing.assert_array_equal(in_strips, labels)
    np.testing.assert_array_equal(overview(coded, make), halved)
    again = trace(in_strips, smooth=True, scratch=make)
    np.testing.assert_array_equal(again.components, traced.components)
    assert [p.wkb for p in again.polygons] == [p.wkb for p in traced.polygons]


def test_smoothing_ends_where_it_is_said_to(narrow: None) -> None:
    """The twin of strips: the whole map at once."""
    coded = _map()
    values = smoothed(coded, coded[..., 0] > 0, 1.7)
    expected = 1 + values.argmax(axis=-1)
    expected[values.max(axis=-1) < 0.1 * 254] = 3
    expected[coded[..., 0] == 0] = 0
    np.testing.assert_array_equal(label(coded, LAYOUT, 0.1, 1.7), expected)


def test_covered_cells_and_their_area_are_the_same_in_strips(tmp_path: Path, narrow: None) -> None:
    grid = TileGrid.cover(Lattice(Size(2003, 1407), Mpp(1, 1), Mpp(1, 1), 8), 56, 0.4)
    wanted = np.random.default_rng(5).random(grid.shape) < 0.05
    covered = grid.covered_by(wanted, Scratch(tmp_path, 0))
    twin = np.zeros_like(covered)
    for i, j in np.argwhere(wanted).tolist():
        y, x = i * grid.rows.stride, j * grid.cols.stride
        twin[y : y + grid.rows.tile, x : x + grid.cols.tile] = True
    np.testing.assert_array_equal(covered, twin)
    assert 0.1 < covered.mean() < 0.9


def test_a_stored_tissue_mask_comes_back_from_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tissue, "_PACKED_PX", 1 << 10)  # piece by piece, the last one shorter
    mask = np.random.default_rng(1).random((321, 77)) < 0.4
    stored = TissueMask(mask, Size(321, 77), Mpp(8, 8)).to_bytes()
    found = TissueMask.from_bytes(stored, Scratch(tmp_path, 0))
    assert _in_a_file(found.mask)
    np.testing.assert_array_equal(found.mask, mask)
    with pytest.raises(ValueError, match="damaged"):
        TissueMask.from_bytes(stored[:-9], Scratch(tmp_path, 0))


# --- runs ----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def slide(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return planted_slides.write(tmp_path_factory.mktemp("slide") / "s.svs", planted_slides.paint(SIZE, MARKS))


def _threshold(monkeypatch: pytest.MonkeyPatch, large_bytes: int) -> list[int]:
    """Runs put arrays from this size on into files → sizes of those made, filled while a run goes on."""
    made: list[int] = []
    mapping = scratch._map
    monkeypatch.setattr(Workspace, "scratch", lambda self: Scratch(self.work, large_bytes))
    monkeypatch.setattr(scratch, "_map", lambda folder, size: (made.append(size), mapping(folder, size))[1])
    return made


@pytest.mark.parametrize("model", ["planted", "dense", "segmenter"])
def test_files_memory_and_strips_do_not_show(
    slide: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, model: str
) -> None:
    card = str(segmenters.blurred(tmp_path / "card").folder) if model == "segmenter" else "planted"
    options = {"mode": "dense"} if model == "dense" else {}
    outputs = Outputs(smoothing_um=3.0)

    def run(name: str) -> dict[str, bytes]:
        infer(slide, card, tmp_path / name, threads=2, outputs=outputs, **options)
        return contents(tmp_path / name)

    made = _threshold(monkeypatch, 1 << 60)
    expected = run("in memory")
    assert not made
    made = _threshold(monkeypatch, 0)
    monkeypatch.setattr(scratch, "STRIP", 1)
    assert run("in files") == expected
    assert len(made) > 15
    assert not (tmp_path / "in files" / ".work").exists()


@pytest.mark.parametrize("share", [0.0, 0.3, 0.6, 0.9])
def test_a_disk_that_fills_up_is_said_in_words_and_the_run_goes_on(
    slide: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, share: float
) -> None:
    made = _threshold(monkeypatch, 0)
    infer(slide, "planted", tmp_path / "whole", threads=2)
    left, reserve = [int(share * len(made))], scratch._reserve

    def full(descriptor: int, size: int) -> None:
        left[0] -= 1
        if left[0] < 0:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        reserve(descriptor, size)

    with monkeypatch.context() as patched:
        patched.setattr(scratch, "_reserve", full)
        with pytest.raises(OutputError, match=r"Cannot write .*No space left on device.*Finished blocks are kept"):
            infer(slide, "planted", tmp_path / "out", threads=2)
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == [".work"]
    infer(slide, "planted", tmp_path / "out", threads=2)
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


def test_a_plan_tells_of_scratch_files_in_a_line_of_their_own(
    slide: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plans = []
    for large_bytes in (0, LARGE_BYTES):
        made = _threshold(monkeypatch, large_bytes)
        listen = lambda event: plans.append(event.data["plan"]) if event.kind == "plan" else None  # noqa: E731
        infer(slide, "planted", tmp_path / f"out{large_bytes}", threads=2, listener=listen)
        assert bool(made) == (large_bytes == 0)
    in_files, in_memory = plans
    assert "scratch files 1 MiB" in str(in_files) or "scratch files 0 MiB" in str(in_files)
    assert "scratch" not in str(in_memory)
    assert in_files.scratch_bytes > 0 == in_memory.scratch_bytes
    assert in_files.peak_bytes < in_memory.peak_bytes


def test_finding_tissue_without_a_run_stays_in_memory(slide: Path) -> None:
    from wsiengine.slides import open_slide

    mask = find_tissue(open_slide(slide)).mask
    assert not _in_a_file(mask)
