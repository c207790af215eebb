"""The whole path: planted marks come back in place, whatever the run went through."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import shapely

import wsiengine
from tests import planted_slides as planted
from tests.fakes import ArraySlide
from tests.qupath_rules import check
from wsiengine import inference, preparing
from wsiengine.annotations import read_geojson
from wsiengine.errors import (
    MemoryLimitError,
    NothingToAnalyse,
    OutputConflict,
    OutputError,
    OutputInUse,
    RegionError,
    UnreadableSlide,
)
from wsiengine.events import Event
from wsiengine.geometry import Box, Size
from wsiengine.inference import Outputs, infer
from wsiengine.models.registry import load_model

SIZE = Size(1403, 2011)
MARKS = [
    (planted.A, Box(200, 300, 700, 900)),
    (planted.B, Box(900, 1200, 1403, 2011)),
    (planted.C, Box(100, 1250, 800, 1950)),
]
RESULTS = {"annotations.geojson", "probability.zarr", "overlay.png", "run.json"}


@pytest.fixture(scope="module")
def slide(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("slide")
    return planted.write(folder / "marks.svs", planted.paint(SIZE, MARKS))


def _bytes(folder: Path) -> dict[str, bytes]:
    """Every output byte, but for the two parts of run.json that may differ."""
    found = {p.relative_to(folder).as_posix(): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}
    run = json.loads(found["run.json"])
    found["run.json"] = json.dumps({k: v for k, v in run.items() if k not in ("timing", "host")}).encode()
    return found


def test_planted_marks_come_back_in_place(slide: Path, tmp_path: Path) -> None:
    result = infer(slide, "planted", tmp_path / "out", tissue="none")
    assert {p.name for p in (tmp_path / "out").iterdir()} == RESULTS
    for name, box in MARKS:
        assert planted.iou(result.annotations, name, box) > 0.9, name
    whole = shapely.union_all([a.geometry for a in result.annotations])
    assert whole.area == pytest.approx(SIZE.area, rel=1e-6)  # no gap at the slide's edge, nothing beyond it
    assert sum(a.geometry.area for a in result.annotations) == pytest.approx(whole.area, rel=1e-6)  # no overlap
    assert check(tmp_path / "out" / "annotations.geojson") == []
    assert result.summary["area_mm2"][planted.A] == pytest.approx(0.075, rel=0.05)
    assert result.probability.shape[2] == 4
    assert (result.probability.compute() > 0).all()


def test_a_slide_with_bounds_gives_qupath_its_corner_and_python_the_slide(tmp_path: Path) -> None:
    """The file counts from the corner of the bounds, as QuPath does; ``Result.annotations`` from the slide's."""
    name, mark = MARKS[0]
    slide = ArraySlide(planted.paint(SIZE, MARKS[:1]), 0.5, bounds_l0=Box(100, 260, 1300, 1900))
    result = infer(slide, "planted", tmp_path / "out", tissue="none")
    assert planted.iou(result.annotations, name, mark) > 0.9
    in_qupath = Box(mark.y0 - 100, mark.x0 - 260, mark.y1 - 100, mark.x1 - 260)
    assert planted.iou(read_geojson(tmp_path / "out" / "annotations.geojson"), name, in_qupath) > 0.9


def test_the_overlay_shows_the_slide_with_these_regions(slide: Path, tmp_path: Path) -> None:
    from wsiengine.report import draw_overlay

    result = infer(slide, "planted", tmp_path / "out", tissue="none")
    draw_overlay(wsiengine.open_slide(slide), result.annotations, tmp_path / "again.png", title="planted 1.0")
    assert (tmp_path / "again.png").read_bytes() == (tmp_path / "out" / "overlay.png").read_bytes()


def test_a_shift_by_one_cell_would_be_seen(slide: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from wsiengine.slides.whole import WholeSlide

    original = WholeSlide.read
    monkeypatch.setattr(WholeSlide, "read", lambda self, box, mpp: original(self, box.shift(16, 0), mpp))
    result = infer(slide, "planted", tmp_path / "out", tissue="none")
    assert min(planted.iou(result.annotations, name, box) for name, box in MARKS) < 0.9


@pytest.mark.parametrize("options", [{"block_tiles": 3}, {"threads": 1, "block_tiles": 7}, {"batch_size": 5}])
def test_equal_runs_give_equal_bytes(slide: Path, tmp_path: Path, options: dict) -> None:
    infer(slide, "planted", tmp_path / "first")
    infer(slide, "planted", tmp_path / "second", **options)
    assert _bytes(tmp_path / "first") == _bytes(tmp_path / "second")


class _Stop(Exception):
    pass


def _interrupt_after(tiles: int):
    def listener(event: Event) -> None:
        if event.kind == "progress" and event.data["done"] >= tiles:
            raise _Stop

    return listener


@pytest.mark.parametrize("tiles", [1, 200, 310])
def test_an_interrupted_run_resumes_to_the_same_bytes(
    slide: Path, tmp_path: Path, tiles: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    infer(slide, "planted", tmp_path / "whole", tissue="none")
    with pytest.raises(_Stop):
        infer(slide, "planted", tmp_path / "out", tissue="none", block_tiles=4, listener=_interrupt_after(tiles))
    assert {p.name for p in (tmp_path / "out").iterdir()} == {".work"}
    resumed: list[dict] = []

    def listener(event: Event) -> None:
        if event.kind == "resume":
            resumed.append(dict(event.data))

    # Another block size and another tissue finder: what is journalled counts, not what would be found now.
    monkeypatch.setattr("wsiengine.preparing.find_tissue", None)
    infer(slide, "planted", tmp_path / "out", tissue="none", block_tiles=5, listener=listener)
    assert resumed[0]["done"] >= tiles
    assert _bytes(tmp_path / "whole") == _bytes(tmp_path / "out")


def test_a_finished_run_is_not_run_again(slide: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    infer(slide, "planted", tmp_path / "out")
    before = _bytes(tmp_path / "out")
    monkeypatch.setattr(inference, "prepare", None)  # would be called by any work
    notes: list[str] = []
    infer(slide, "planted", tmp_path / "out", listener=lambda e: notes.append(str(e.data)))
    assert "Already finished" in notes[0]
    assert _bytes(tmp_path / "out") == before


@pytest.mark.parametrize("gone", ["annotations.geojson", "probability.zarr"])
def test_a_finished_run_that_lost_a_file_is_not_called_finished(slide: Path, tmp_path: Path, gone: str) -> None:
    result = infer(slide, "planted", tmp_path / "out", overlap=0.0)
    (tmp_path / "out" / gone).rename(tmp_path / gone)
    with pytest.raises(OutputError, match=f"no longer its {gone}"):
        infer(slide, "planted", tmp_path / "out", overlap=0.0)
    with pytest.raises(OutputError, match=gone):
        _ = result.annotations


def test_another_runs_folder_is_refused_with_the_difference(slide: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    infer(slide, "planted", out)
    with pytest.raises(OutputConflict, match=r"the overlap differs \(0.25 there, 0.5 now\)"):
        infer(slide, "planted", out, overlap=0.5)
    other = planted.write(tmp_path / "other.svs", planted.paint(SIZE, MARKS[:1], seed=1))
    with pytest.raises(OutputConflict, match="the slide differs"):
        infer(other, "planted", out)
    with pytest.raises(OutputConflict, match="the tissue mask differs"):
        infer(slide, "planted", out, tissue="none")
    infer(slide, "planted", out, overlap=0.5, overwrite=True)
    assert json.loads((out / "run.json").read_text())["plan"]["overlap_used"] == 0.5


def test_an_unfinished_run_of_other_parameters_is_refused_too(slide: Path, tmp_path: Path) -> None:
    with pytest.raises(_Stop):
        infer(slide, "planted", tmp_path / "out", listener=_interrupt_after(10))
    with pytest.raises(OutputConflict, match="unfinished run"):
        infer(slide, "planted", tmp_path / "out", overlap=0.0)


def test_a_run_that_ended_before_its_first_block_is_in_nobodys_way(
    slide: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(preparing, "find_tissue", _raise(UnreadableSlide("the overview is damaged")))
        with pytest.raises(UnreadableSlide):
            infer(slide, "planted", tmp_path / "out")
    assert (tmp_path / "out" / ".work" / "journal").exists()
    assert infer(slide, "planted", tmp_path / "out", tissue="none").summary["tiles"]


def test_the_same_weights_under_another_card_are_another_run(slide: Path, tmp_path: Path) -> None:
    model = tmp_path / "model"
    shutil.copytree(load_model("planted").folder, model)
    facts = json.loads((model / "card.json").read_text())
    infer(slide, str(model), tmp_path / "out", overlap=0.0)
    facts["description"] = "in other words"
    (model / "card.json").write_text(json.dumps(facts))
    infer(slide, str(model), tmp_path / "out", overlap=0.0)
    facts["input"]["mpp"] *= 1.1
    (model / "card.json").write_text(json.dumps(facts))
    with pytest.raises(OutputConflict, match="the model's card differs"):
        infer(slide, str(model), tmp_path / "out", overlap=0.0)


def test_an_overview_that_cannot_be_read_is_not_called_a_folder_that_cannot_be_written(
    slide: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr("wsiengine.report.draw_overlay", _raise(UnreadableSlide("the overview is damaged")))
        with pytest.raises(UnreadableSlide, match=r"^the overview is damaged$"):
            infer(slide, "planted", tmp_path / "out", overlap=0.0)
    assert infer(slide, "planted", tmp_path / "out", overlap=0.0).summary["tiles"]


def _raise(error: Exception) -> Callable[..., Any]:
    def fail(*_: Any, **__: Any) -> Any:
        raise error

    return fail


def test_strange_files_in_the_folder_are_not_overwritten(slide: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "annotations.geojson").write_text("somebody's work")
    (out / "notes.txt").write_text("mine")
    with pytest.raises(OutputConflict, match=r"already holds annotations\.geojson"):
        infer(slide, "planted", out)
    assert not (out / ".work").exists()
    infer(slide, "planted", out, overwrite=True)
    assert (out / "notes.txt").read_text() == "mine"


def test_one_run_at_a_time(slide: Path, tmp_path: Path) -> None:
    from wsiengine.journal import FolderLock

    (tmp_path / "out" / ".work").mkdir(parents=True)
    with FolderLock(tmp_path / "out" / ".work" / "lock"), pytest.raises(OutputInUse):
        infer(slide, "planted", tmp_path / "out")


def _region(path: Path, box: Box) -> Path:
    ring = [[box.x0, box.y0], [box.x1, box.y0], [box.x1, box.y1], [box.x0, box.y1], [box.x0, box.y0]]
    feature = {"type": "Feature", "properties": {}, "geometry": {"type": "Polygon", "coordinates": [ring]}}
    path.write_text(json.dumps({"type": "FeatureCollection", "features": [feature]}))
    return path


def test_a_region_limits_the_run_and_clips_the_output(slide: Path, tmp_path: Path) -> None:
    box = Box(350, 411, 1111, 1503)
    region = _region(tmp_path / "roi.geojson", box)
    result = infer(slide, "planted", tmp_path / "out", tissue="none", region=region)
    whole = shapely.union_all([a.geometry for a in result.annotations])
    limit = shapely.box(box.x0, box.y0, box.x1, box.y1)
    assert whole.difference(limit.buffer(0.02)).area == 0
    assert whole.area / limit.area > 0.9  # what no tile with its centre inside covers is left out
    plan = wsiengine.plan(slide, "planted", tissue="none", region=region)
    y, x = plan.grid.centres_l0()
    inside = (y[:, None] > box.y0) & (y[:, None] < box.y1) & (x > box.x0) & (x < box.x1)
    np.testing.assert_array_equal(plan.wanted, inside)
    off_grid = _region(tmp_path / "grid.geojson", Box(411, 395, 1003, 1571))  # no edge on an edge of a cell
    filled = infer(slide, "planted", tmp_path / "filled", tissue="none", region=off_grid, overlap=0.75)
    area = shapely.union_all([a.geometry for a in filled.annotations]).area
    assert area == pytest.approx((1003 - 411) * (1571 - 395), rel=1e-4)  # not half a cell less along the boundary
    with pytest.raises(RegionError, match="outside"):
        infer(slide, "planted", tmp_path / "far", region=_region(tmp_path / "far.geojson", Box(9000, 9000, 9500, 9500)))


def test_tissue_limits_the_run(tmp_path: Path) -> None:
    tissue = Box(256, 512, 1100, 1600)
    slide = planted.write(tmp_path / "s.svs", planted.paint(SIZE, [], tissue=tissue))
    result = infer(slide, "planted", tmp_path / "out")
    true = shapely.box(tissue.x0, tissue.y0, tissue.x1, tissue.y1)
    whole = shapely.union_all([a.geometry for a in result.annotations])
    assert whole.intersection(true).area / whole.union(true).area > 0.88
    empty = planted.write(tmp_path / "empty.svs", planted.paint(SIZE, [], tissue=Box(0, 0, 0, 0)))
    with pytest.raises(NothingToAnalyse, match="no tissue"):
        infer(empty, "planted", tmp_path / "none")


def test_tile_objects_and_smoothing(slide: Path, tmp_path: Path) -> None:
    result = infer(slide, "planted", tmp_path / "out", tissue="none", outputs=Outputs(tiles=True, min_area_um2=3000))
    assert check(tmp_path / "out" / "tiles.geojson") == []
    tiles = json.loads((tmp_path / "out" / "tiles.geojson").read_text())["features"]
    assert len(tiles) == result.summary["tiles"]
    assert {t["properties"]["objectType"] for t in tiles} == {"tile"}
    assert sum(a.measurements["Tiles"] for a in result.annotations) <= len(tiles)


def test_another_threshold_needs_no_slide_and_no_model(slide: Path, tmp_path: Path) -> None:
    copy = shutil.copy(slide, tmp_path / "copy.svs")
    result = infer(copy, "planted", tmp_path / "out", tissue="none", threshold=0.0)
    Path(copy).unlink()
    path = result.to_geojson(tmp_path / "again.geojson")
    assert path.read_bytes() == (tmp_path / "out" / "annotations.geojson").read_bytes()
    strict = result.to_geojson(tmp_path / "strict.geojson.gz", threshold=0.999999)
    assert check(strict) == []


def test_memory_limits_are_kept_or_refused_with_both_numbers(slide: Path) -> None:
    with pytest.raises(MemoryLimitError, match=r"needs about [\d,]+ MiB, the limit is 100 MiB"):
        wsiengine.plan(slide, "planted", memory_limit_bytes=100 << 20)


def test_a_slide_smaller_than_a_tile(tmp_path: Path) -> None:
    pixels = planted.paint(Size(40, 55), [(planted.C, Box(0, 0, 40, 55))])
    result = infer(planted.write(tmp_path / "small.svs", pixels), "planted", tmp_path / "out", tissue="none")
    assert {a.class_name for a in result.annotations} <= {planted.C, "No mark"}
    assert sum(a.geometry.area for a in result.annotations) == pytest.approx(40 * 55)


def test_no_path_or_name_of_the_slide_is_written(tmp_path: Path) -> None:
    slide = planted.write(tmp_path / "DOE_JANE_1957.svs", planted.paint(Size(500, 700), MARKS[:0]))
    infer(slide, "planted", tmp_path / "out", tissue="none")
    for path in (tmp_path / "out").rglob("*"):
        if path.is_file():
            content = path.read_bytes()
            assert b"DOE_JANE" not in content, path.name
            assert str(tmp_path).encode() not in content, path.name
