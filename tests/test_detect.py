"""The task ``detect`` as a user runs it: one object per mark, whatever blocks, threads, tiles and interruptions."""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zarr

import wsiengine
from tests.models.detectors import Planted, build, build_dots, paint
from tests.planted_slides import write
from tests.qupath_rules import check
from wsiengine.cli import main
from wsiengine.errors import PlanError, WsiError
from wsiengine.geometry import Box, Size
from wsiengine.inference import Outputs, infer
from wsiengine.tasks.detection import Detection

SIZE = Size(347, 421)  # not multiples of the tile, of its stride, or of a block
STRIDE = 40  # of tiles of 64 px that overlap by 24: 20 px of the largest mark, its border, a cell


def border_marks() -> list[tuple[str, Box, int]]:
    """Marks in corners, across the borders of tiles and blocks, and touching."""
    marks = [
        ("One", Box(0, 0, 12, 15), 240),
        ("Two", Box(0, 15, 12, 30), 235),  # touches it
        ("One", Box(335, 403, 347, 421), 220),
        ("Two", Box(337, 0, 347, 9), 215),
        ("One", Box(0, 409, 20, 421), 210),
    ]
    for k, (y, x) in enumerate((y, x) for y in range(STRIDE, 300, STRIDE) for x in range(STRIDE, 380, STRIDE)):
        size = (4 + 4 * (k % 5), 20 - 3 * (k % 6))
        box = Box(y - size[0] // 2, x - size[1] // 2, y + size[0] - size[0] // 2, x + size[1] - size[1] // 2)
        marks.append((("One", "Two")[k % 2], box, 140 + k % 100))
    return marks


def found(result: Any) -> list[tuple]:
    """Class and place of each object of a result, sorted."""
    objects = [(a.class_name, *(round(v, 2) for v in a.geometry.bounds)) for a in result.annotations]
    return sorted(objects)


def drawn(marks: list[tuple[str, Box, int]], least: int = 128) -> list[tuple]:
    return sorted((name, *map(float, (b.x0, b.y0, b.x1, b.y1))) for name, b, score in marks if score >= least)


@pytest.fixture(scope="module")
def slide(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("detect")
    return write(folder / "slide.tiff", paint(SIZE, border_marks()), 1.0)


def run(slide: Path, model: Path, out: Path, **options: Any) -> Any:
    shutil.rmtree(out, ignore_errors=True)
    return infer(slide, str(model), out, tissue="none", device="cpu", **({"threads": 2} | options))


FORMS = {
    "xyxy, labels": Planted(),
    "yxyx, labels from 1": Planted(order="yxyx", background="first"),
    "xywh, normalised": Planted(order="xywh", coordinates="normalised"),
    "cxcywh, scores per class": Planted(order="cxcywh", matrix=True),
    "with background": Planted(matrix=True, background="first"),
    "background last": Planted(matrix=True, background="last"),
    "columns": Planted(matrix=True, columns=True),
    "a leading axis": Planted(batched=True),
    "full masks": Planted(masks="full"),
    "28 px masks": Planted(masks="roi", background="first"),
    "masks with a leading axis": Planted(masks="roi", batched=True),
}


@pytest.mark.parametrize("form", FORMS)
def test_every_mark_comes_back_once_in_every_convention(slide: Path, tmp_path: Path, form: str) -> None:
    build(tmp_path / "m", FORMS[form])
    result = run(slide, tmp_path / "m", tmp_path / "out")
    assert found(result) == drawn(border_marks())
    assert check(tmp_path / "out" / "annotations.geojson") == []
    assert {a.object_type for a in result.annotations} == {"detection"}
    assert result.summary["objects"] == {
        name: sum(m[0] == name and m[2] >= 128 for m in border_marks()) for name in ("One", "Two")
    }


@pytest.mark.parametrize("masks", [None, "full"])
@pytest.mark.parametrize(("side", "overlap"), [(64, 0.3), (96, 0.5), (128, 0.3), (128, 0.6)])
def test_the_tile_grid_does_not_matter(slide: Path, tmp_path: Path, masks: str, side: int, overlap: float) -> None:
    build(tmp_path / "m", Planted(side=side, masks=masks))
    assert found(run(slide, tmp_path / "m", tmp_path / "out", overlap=overlap)) == drawn(border_marks())


def bytes_of(folder: Path) -> dict[str, bytes]:
    """All files of a result but for what may differ: timing and host."""
    files = {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}
    facts = json.loads(files["run.json"])
    files["run.json"] = json.dumps({k: v for k, v in facts.items() if k not in ("timing", "host")}).encode()
    return files


@pytest.mark.parametrize("masks", [None, "full"])
def test_blocks_threads_and_batches_leave_no_trace(slide: Path, tmp_path: Path, masks: str | None) -> None:
    model = tmp_path / "m"
    build(model, Planted(masks=masks))
    run(slide, model, tmp_path / "one", block_tiles=1, threads=1)
    expected = bytes_of(tmp_path / "one")
    for options in ({"block_tiles": 3, "threads": 3}, {"block_tiles": 16, "threads": 2, "batch_size": 5}):
        run(slide, model, tmp_path / "other", **options)
        assert bytes_of(tmp_path / "other") == expected


def test_an_interrupted_run_goes_on_and_ends_the_same(slide: Path, tmp_path: Path) -> None:
    model, out = tmp_path / "m", tmp_path / "out"
    build(model, Planted())
    expected = found(run(slide, model, tmp_path / "whole", block_tiles=2))

    class Enough(Exception):
        """The test's own interruption."""

    def stop(event: Any) -> None:
        if event.kind == "progress" and event.data["done"] > 20:
            raise Enough

    with pytest.raises(Enough):
        run(slide, model, out, block_tiles=2, threads=1, listener=stop)
    resumed: list[Any] = []
    result = infer(
        slide, str(model), out, tissue="none", device="cpu", threads=2, block_tiles=3, listener=resumed.append
    )
    [kept] = [e.data for e in resumed if e.kind == "resume"]  # blocks that were under way are finished and kept, too
    assert 24 <= kept["done"] < kept["total"]
    assert found(result) == expected
    whole, again = bytes_of(tmp_path / "whole"), bytes_of(out)
    assert whole == again


def test_what_could_not_be_read_is_no_tissue_without_objects(
    slide: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Cells under no tile that ran: 0 in the map, NaN in the density, and not in the area."""
    build(tmp_path / "m", Planted())
    whole = run(slide, tmp_path / "m", tmp_path / "whole").summary
    original = Detection.score

    def damaged(self: Detection, job: Any, block: Any, view: Any) -> Any:
        places = np.argwhere(block.wanted) + (block.tiles.y0, block.tiles.x0)
        return original(self, job, block, replace(view, bad=(places[:, 0] < 5) & (places[:, 1] < 6)))

    monkeypatch.setattr(Detection, "score", damaged)
    result = run(slide, tmp_path / "m", tmp_path / "out", block_tiles=2)
    assert result.summary["unreadable_tiles"] == 30
    coded = result.probability.compute()
    zero = (coded == 0).all(axis=2)
    plan = wsiengine.plan(slide, str(tmp_path / "m"), tissue="none", device="cpu", block_tiles=3)
    stride, cell = plan.grid.stride_px, plan.lattice.cell_px
    gap = np.zeros(zero.shape, bool)
    gap[: 5 * stride // cell, : 6 * stride // cell] = True  # what no other tile covers
    np.testing.assert_array_equal(zero, gap)
    lost = whole["analysed_mm2"] - result.summary["analysed_mm2"]
    assert lost == pytest.approx(30 * stride**2 / 1e6, rel=0.01)
    density = zarr.open_group(str(tmp_path / "out" / "objects.zarr"), mode="r")["density"][...]
    assert np.isnan(density[:, 0, 0]).all()
    assert not np.isnan(density[:, -1, -1]).any()
    np.testing.assert_array_equal(plan.to_dask().compute(), coded)


def test_the_lazy_map_is_the_map(slide: Path, tmp_path: Path) -> None:
    build(tmp_path / "m", Planted())
    result = run(slide, tmp_path / "m", tmp_path / "out")
    plan = wsiengine.plan(slide, str(tmp_path / "m"), tissue="none", device="cpu", block_tiles=3)
    stored = result.probability.compute()
    assert np.array_equal(plan.to_dask().compute(), stored)
    assert np.count_nonzero(stored.max(axis=-1) > 1) > 100  # cells that marks cover
    assert stored[0, 0].tolist() == [1 + round(240 / 255 * 254), 1]  # the mark in the corner; nothing of the other


@pytest.mark.parametrize("masks", [None, "full", "roi"])
def test_a_mark_larger_than_the_overlap(tmp_path: Path, masks: str | None) -> None:
    marks = [
        ("One", Box(30, 50, 60, 390), 250),
        ("Two", Box(61, 100, 330, 130), 240),
        ("One", Box(100, 5, 110, 20), 230),
    ]
    slide = write(tmp_path / "s.tiff", paint(SIZE, marks), 1.0)
    build(tmp_path / "m", Planted(masks=masks))
    result = run(slide, tmp_path / "m", tmp_path / "out")
    assert found(result) == drawn(marks)
    cut = {a.geometry.bounds[0]: "Cut by a tile" in a.measurements for a in result.annotations}
    assert cut == ({50: False, 100: False, 5: False} if masks else {50: True, 100: True, 5: False})
    assert result.summary.get("cut", 0) == (0 if masks else 2)


def test_dots_of_a_heat_map(tmp_path: Path) -> None:
    dots = [(3, 5), (63, 64), (64, 83), (120, 200), (121, 217), (346, 420), (0, 420), (40, 39)]
    marks = [("One", Box(y, x, y + 1, x + 1), 200) for y, x in dots]
    slide = write(tmp_path / "s.tiff", paint(SIZE, marks), 1.0)
    build_dots(tmp_path / "m")
    result = run(slide, tmp_path / "m", tmp_path / "out")
    limit = (SIZE.width, SIZE.height)
    boxes = [(x - 2.5, y - 2.5, x + 3.5, y + 3.5) for y, x in dots]
    clipped = sorted((max(0.0, a), max(0.0, b), min(limit[0], c), min(limit[1], d)) for a, b, c, d in boxes)
    assert sorted(a.geometry.bounds for a in result.annotations) == clipped


def test_filters_need_no_inference(slide: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from wsiengine.cli import main

    model, out = tmp_path / "m", tmp_path / "out"
    build(model, Planted())
    chosen = run(slide, model, out, threshold=0.8, outputs=Outputs(min_area_um2=100, classes=("Two",)))
    wanted = [m for m in border_marks() if m[0] == "Two" and m[2] / 255 >= 0.8 and m[1].area >= 100]
    assert found(chosen) == drawn(wanted)
    shutil.rmtree(model)
    assert main(["export", str(out), "--min-score", "0.6", "--min-area", "0", "--classes", "One,Two"]) == 0
    everything = wsiengine.annotations.read_geojson(out / "export.geojson")
    assert len(everything) == sum(m[2] / 255 >= 0.6 for m in border_marks())
    assert main(["export", str(out), "--format", "csv"]) == 0
    rows = (out / "export.csv").read_text().splitlines()
    assert len(rows) == 1 + len(wanted)
    assert all(len(cell.partition(".")[2]) <= 6 for row in rows[1:] for cell in row.split(",")[3:])
    assert main(["export", str(out), "--format", "zarr", "--min-score", "0.6"]) == 0
    capsys.readouterr()
    assert main(["export", str(out), "-o", str(tmp_path / "x.geojson"), "--classes", "Three"]) == 1
    assert "its classes are One, Two" in capsys.readouterr().err


def test_the_table_has_a_row_for_every_object(slide: Path, tmp_path: Path) -> None:
    build(tmp_path / "m", Planted())
    result = run(slide, tmp_path / "m", tmp_path / "out")
    group = zarr.open_group(str(tmp_path / "out" / "objects.zarr"), mode="r")
    table = {name: array[...] for name, array in group["table"].arrays()}
    facts = dict(group.attrs)["wsiengine"]
    rows = [
        (facts["classes"][k], x0, y0, x1, y1)
        for k, x0, y0, x1, y1 in zip(*(table[n] for n in ("class", "x0_l0", "y0_l0", "x1_l0", "y1_l0")), strict=True)
    ]
    assert [(a.class_name, *a.geometry.bounds) for a in result.annotations] == rows  # in the same order
    assert [a.id.replace("-", "") for a in result.annotations] == [bytes(i).hex() for i in table["id"]]
    scores = [a.measurements["Score"] for a in result.annotations]
    assert np.allclose(table["score"], scores, atol=1e-6)
    assert np.allclose(table["area_um2"], [a.geometry.area for a in result.annotations])
    density = group["density"][...]
    pitch = facts["density"]["pitch"]["y"] * facts["density"]["pitch"]["x"] / 1e6
    assert density.shape[0] == 2
    assert facts["density"]["pitch"] == {"unit": "µm", "y": 96.0, "x": 96.0}  # of cells of 8 µm
    assert density.shape == (2, 4, 5)
    inside = [a.geometry.centroid.y < 288 and a.geometry.centroid.x < 384 for a in result.annotations]
    assert round(float(density[:, :3, :4].sum() * pitch)) == sum(inside) > 40  # squares that lie on the slide


def test_objects_are_counted_in_each_drawn_area(slide: Path, tmp_path: Path) -> None:
    def area(name: str, x0: int, y0: int, x1: int, y1: int) -> dict:
        ring = [[x0, y0], [x1, y0], [x1, y1], [x0, y1], [x0, y0]]
        return {
            "type": "Feature",
            "geometry": {"type": "Polygon", "coordinates": [ring]},
            "properties": {"objectType": "annotation", **({"name": name} if name else {})},
        }

    areas = {"Left": (13, 11, 171, 333), "": (201, 21, 317, 113)}
    features = [area(name, *box) for name, box in areas.items()]
    path = tmp_path / "roi.geojson"
    path.write_text(json.dumps({"type": "FeatureCollection", "features": features}))
    build(tmp_path / "m", Planted())
    result = run(slide, tmp_path / "m", tmp_path / "out", region=path)

    def inside(mark: tuple[str, Box, int], box: tuple[int, int, int, int]) -> bool:
        y, x = (mark[1].y0 + mark[1].y1) / 2, (mark[1].x0 + mark[1].x1) / 2
        return box[0] < x < box[2] and box[1] < y < box[3] and mark[2] >= 128

    expected = [m for m in border_marks() if any(inside(m, box) for box in areas.values())]
    assert found(result) == drawn(expected)  # whole, though they reach out of the region
    coded = result.probability.compute()
    assert coded[-1].max() == 0 < coded[20].max()  # below the areas nothing was analysed, though tiles reach there
    rows = result.summary["areas"]
    assert [row["name"] for row in rows] == ["Left", "Area 2"]
    for row, box in zip(rows, areas.values(), strict=True):
        mm2 = (box[2] - box[0]) * (box[3] - box[1]) / 1e6
        assert row["analysed_mm2"] == pytest.approx(mm2, rel=1e-3)
        for name in ("One", "Two"):
            count = sum(m[0] == name and inside(m, box) for m in border_marks())
            assert row["objects"].get(name, 0) == count
            assert row["density_per_mm2"].get(name, 0) == pytest.approx(count / mm2, rel=1e-3)
    assert result.summary["analysed_mm2"] == pytest.approx(sum(r["analysed_mm2"] for r in rows), rel=1e-3)


def test_slides_of_other_resolution_are_measured_at_level_0(tmp_path: Path) -> None:
    marks = [("One", Box(40, 60, 64, 100), 250), ("Two", Box(200, 300, 230, 316), 240)]
    slide = write(tmp_path / "s.tiff", paint(Size(512, 640), marks), 0.5)
    build(tmp_path / "m", Planted())
    result = run(slide, tmp_path / "m", tmp_path / "out")
    assert found(result) == drawn(marks)
    assert [a.measurements["Area µm^2"] for a in result.annotations] == [24 * 40 / 4, 30 * 16 / 4]


def test_the_overlap_is_raised_and_told(slide: Path, tmp_path: Path) -> None:
    build(tmp_path / "m", Planted())
    events: list[Any] = []
    result = run(slide, tmp_path / "m", tmp_path / "out", overlap=0.1, listener=events.append)
    assert result.run["plan"]["overlap_used"] == 0.5
    [text] = [e.data["text"] for e in events if e.kind == "warning"]
    assert "raised from 10 % to 50 % (32 px)" in text
    assert "objects of up to 20 px" in text
    events.clear()
    usual = run(slide, tmp_path / "m", tmp_path / "out", listener=events.append)  # nobody asked for less
    assert usual.run["plan"]["overlap_used"] == 0.5
    assert not [e for e in events if e.kind == "warning"]


def test_tiles_and_unknown_classes_are_refused_before_the_run(slide: Path, tmp_path: Path) -> None:
    build(tmp_path / "m", Planted())
    with pytest.raises(PlanError, match="knows no class Three"):
        run(slide, tmp_path / "m", tmp_path / "out", outputs=Outputs(classes=("Three",)))
    with pytest.raises(PlanError, match="no tiles"):
        run(slide, tmp_path / "m", tmp_path / "out", outputs=Outputs(tiles=True))
    with pytest.raises(PlanError, match="Only a detector's or segmenter's objects"):
        run(slide, Path("planted"), tmp_path / "out", outputs=Outputs(classes=("Mark A",)))
    assert not (tmp_path / "out").exists()


WRONG = {
    "nan": "gave NaN as a score",
    "outside": "lies outside its tile of 64 px",
    "reversed": "ends before it starts",
    "score": "needed 0 to 1",
    "label": "gave the label",
}


@pytest.mark.parametrize("wrong", WRONG)
def test_nonsense_of_a_model_is_told_with_its_place_and_nothing_is_lost(tmp_path: Path, wrong: str) -> None:
    marks = [("One", Box(300, 300, 312, 312), 250)]  # late: finished blocks stand before it
    slide = write(tmp_path / "s.tiff", paint(SIZE, marks), 1.0)
    build(tmp_path / "m", Planted(wrong=wrong))
    with pytest.raises(WsiError) as caught:
        run(slide, tmp_path / "m", tmp_path / "out", block_tiles=2, threads=1)
    assert WRONG[wrong] in caught.value.message
    assert "level-0 pixels" in caught.value.message
    assert (tmp_path / "out" / ".work" / "journal").stat().st_size > 2000


@pytest.mark.parametrize("wrong", WRONG)
def test_nonsense_is_left_out_where_that_is_asked_for(tmp_path: Path, wrong: str) -> None:
    """Only the tiles that say it: the mark lies in four, and the others are analysed."""
    slide = write(tmp_path / "s.tiff", paint(SIZE, [("One", Box(300, 300, 312, 312), 250)]), 1.0)
    build(tmp_path / "m", Planted(wrong=wrong))
    result = run(slide, tmp_path / "m", tmp_path / "out", on_bad_tile="skip", block_tiles=3)
    assert result.summary["unreadable_tiles"] == 4
    assert not len(result.annotations)
    coded = result.probability.compute()
    assert not coded[306 // 8, 306 // 8].any()  # not analysed
    assert coded[2, 2].any()
    again = run(slide, tmp_path / "m", tmp_path / "o2", on_bad_tile="skip", block_tiles=1, threads=1)
    assert np.array_equal(again.probability.compute(), coded)


def test_who_asks_for_scores_that_were_not_kept_is_told(
    slide: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from wsiengine.cli import main

    build(tmp_path / "m", Planted(), minimum_score=0.3)
    events: list[Any] = []
    run(slide, tmp_path / "m", tmp_path / "out", threshold=0.1, listener=events.append)
    assert any("No object below a score of 0.3 is kept" in str(e.data) for e in events if e.kind == "warning")
    for score, said in (("0.1", True), ("0.3", False)):
        assert main(["export", str(tmp_path / "out"), "--min-score", score, "--overwrite"]) == 0
        assert ("No object below a score of 0.3 is kept" in capsys.readouterr().out) is said
    assert main(["export", str(tmp_path / "out"), "--min-score", "0.1", "--overwrite", "--json"]) == 0
    assert '"note": "No object below' in capsys.readouterr().out


def test_cards_that_do_not_fit_are_refused_before_the_run(slide: Path, tmp_path: Path) -> None:
    build(tmp_path / "a", Planted(), top_outputs={"boxes": "boxen", "scores": "scores", "labels": "labels"})
    with pytest.raises(WsiError, match="one called 'boxen'"):
        run(slide, tmp_path / "a", tmp_path / "out")
    build(tmp_path / "b", Planted(masks="full", wrong="mask"))
    with pytest.raises(WsiError, match="64 × 64"):
        run(slide, tmp_path / "b", tmp_path / "out")
    build(tmp_path / "c", Planted(matrix=True), background="first")  # the graph has no such channel
    build(tmp_path / "c", Planted(matrix=True), top_classes=[{"name": n} for n in ("One", "Two", "Three")])
    with pytest.raises(WsiError, match="3 scores for each box"):
        run(slide, tmp_path / "c", tmp_path / "out")
    assert not (tmp_path / "out" / "run.json").exists()


def test_more_than_a_tile_may_have(slide: Path, tmp_path: Path) -> None:
    build(tmp_path / "m", Planted(side=128), per_tile=2)
    events: list[Any] = []
    result = run(slide, tmp_path / "m", tmp_path / "out", listener=events.append)
    assert result.summary["left_out"] > 0
    assert any("candidates were left out" in e.data["text"] for e in events if e.kind == "warning")


def test_more_than_a_slide_may_have(slide: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("wsiengine.tasks.detection.MOST_OBJECTS", 10)
    build(tmp_path / "m", Planted())
    with pytest.raises(WsiError, match="more than 10 candidates"):
        run(slide, tmp_path / "m", tmp_path / "out", threads=1, block_tiles=1)
    assert (tmp_path / "out" / ".work" / "journal").exists()


def test_memory_is_planned_for_as_many_objects_as_the_card_allows(slide: Path, tmp_path: Path) -> None:
    planned = []
    for per_tile in (50, 400, 2000):
        build(tmp_path / f"m{per_tile}", Planted(), per_tile=per_tile)
        plan = wsiengine.plan(slide, str(tmp_path / f"m{per_tile}"), tissue="none", device="cpu")
        planned.append(plan.task.memory(plan))
    tiles = int(plan.wanted.sum())
    assert planned[1] - planned[0] == tiles * 50 * 400
    assert planned[2] - planned[1] == tiles * 400 * 400


def test_smoothing_is_refused(slide: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    build(tmp_path / "m", Planted())
    with pytest.raises(PlanError, match="Smoothing is for maps"):
        run(slide, tmp_path / "m", tmp_path / "out", outputs=Outputs(smoothing_um=5.0))
    run(slide, tmp_path / "m", tmp_path / "out")
    assert main(["export", str(tmp_path / "out"), "--smoothing", "5", "-o", str(tmp_path / "a.csv")])
    assert main(["export", str(tmp_path / "out"), "-o", str(tmp_path / "b.csv"), "--format", "csv"]) == 0
    assert "smoothing 0" not in capsys.readouterr().out
