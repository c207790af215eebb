"""The task ``segment``: whole glands however tiles and blocks lie, the same bytes however a run is cut."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import shapely

import wsiengine
from tests.fakes import ArraySlide, position_pixels
from tests.models import segmenters
from tests.models.segmenters import GLAND, RIM, SIDE_PX, STRIDE_PX
from wsiengine.errors import CardError, ScoreError
from wsiengine.geometry import Box, Lattice, Mpp, Size
from wsiengine.grid import TileGrid
from wsiengine.inference import infer
from wsiengine.models.card import Card
from wsiengine.result import Result
from wsiengine.tasks.segment import Rule, SegmentLayout, Window, add_tiles, blended, find_objects
from wsiengine.tasks.segmentation import Segmentation
from wsiengine.wording import summary_words

SIZE = Size(310, 437)  # no multiples of tile, cell or block


@pytest.fixture(scope="module")
def planted(tmp_path_factory: pytest.TempPathFactory) -> Card:
    return segmenters.planted(tmp_path_factory.mktemp("planted"))


@pytest.fixture(scope="module")
def blurred(tmp_path_factory: pytest.TempPathFactory) -> Card:
    return segmenters.blurred(tmp_path_factory.mktemp("blurred"))


def _discs(places: list[tuple[int, int, int]], size: Size = SIZE) -> np.ndarray:
    """Drawn glands (y, x, radius): a rim of 8 px around; where they overlap, the rim stays between."""
    y, x = np.mgrid[: size.height, : size.width]
    depth = np.stack([r - np.hypot(y + 0.5 - cy, x + 0.5 - cx) for cy, cx, r in places])
    pixels = np.full((*size.shape, 3), 205, np.uint8)
    inside = depth.max(axis=0)
    second = np.sort(depth, axis=0)[-2] if len(places) > 1 else np.full(size.shape, -1e9)
    pixels[inside > 0] = RIM
    pixels[(inside > 8) & (second < 8)] = GLAND
    return pixels


def _run(slide: Any, card: Card, folder: Path, **options: Any) -> Result:
    return infer(slide, str(card.folder), folder, **{"tissue": "none", "threads": 2, "overlap": 0.3, **options})


# Tiles start every 44 px; a block of 3 tiles answers for 132 px: discs lie on those borders, in corners, on edges.
DISCS = [(40, 60, 25), (64, 132, 30), (150, 137, 22), (132, 264, 40), (15, 15, 14), (300, 425, 18), (230, 60, 60)]


@pytest.mark.parametrize("block_tiles", [1, 3, 50])
def test_each_drawn_gland_is_one_object_of_its_size(planted: Card, tmp_path: Path, block_tiles: int) -> None:
    result = _run(ArraySlide(_discs(DISCS), 1.0), planted, tmp_path / "out", block_tiles=block_tiles)
    found = result.annotations
    assert len(found) == len(DISCS)
    assert result.summary["objects"] == {"Gland": len(DISCS)}
    assert summary_words(result.summary).startswith("gland 0.0")
    assert f" mm² ({len(DISCS)})" in summary_words(result.summary)
    for y, x, radius in DISCS:
        disc = shapely.intersection(shapely.Point(x, y).buffer(radius, 64), shapely.box(0, 0, *SIZE.shape[::-1]))
        overlaps = [shapely.intersection(a.geometry, disc).area / a.geometry.union(disc).area for a in found]
        assert max(overlaps) > 0.85


def test_measurements_are_those_of_a_disc(planted: Card, tmp_path: Path) -> None:
    pixels = _discs([(150, 200, 60)])
    y, x = np.mgrid[: SIZE.height, : SIZE.width]
    pixels[np.hypot(y + 0.5 - 150, x + 0.5 - 200) < 20] = 250  # lumen: a ninth of the area
    [gland] = _run(ArraySlide(pixels, 0.5), planted, tmp_path / "out").annotations
    measured = gland.measurements
    assert measured["Area µm^2"] == pytest.approx(np.pi * 30**2, rel=0.03)
    assert measured["Perimeter µm"] == pytest.approx(2 * np.pi * 30, rel=0.08)
    assert measured["Solidity"] > 0.95
    assert measured["Lumen fraction"] == pytest.approx(1 / 9, abs=0.015)
    assert not list(gland.geometry.interiors)
    assert 0.8 < measured["Mean probability Gland"] <= 1


def test_a_bent_gland_is_less_solid(planted: Card, tmp_path: Path) -> None:
    pixels = np.full((*SIZE.shape, 3), 205, np.uint8)
    pixels[60:220, 80:120] = pixels[180:220, 80:240] = GLAND  # an L of arms 40 wide, 160 long
    [gland] = _run(ArraySlide(pixels, 1.0), planted, tmp_path / "out").annotations
    hull = 160 * 160 - 120 * 120 / 2
    assert gland.measurements["Solidity"] == pytest.approx((2 * 160 * 40 - 40 * 40) / hull, abs=0.01)


def test_touching_glands_stay_apart_and_share_their_border(planted: Card, tmp_path: Path) -> None:
    slide = ArraySlide(_discs([(150, 150, 50), (150, 240, 50)]), 1.0)
    first, second = (a.geometry for a in _run(slide, planted, tmp_path / "out").annotations)
    assert shapely.intersection(first, second).area == 0
    assert shapely.intersection(first, second).length > 20
    assert first.area + second.area > 0.97 * shapely.union(*(shapely.Point(x, 150).buffer(50) for x in (150, 240))).area


def test_without_contours_touching_glands_are_one(tmp_path: Path) -> None:
    card = segmenters.planted(tmp_path / "model", segmentation={"channels": ["Gland", "contour"], "contour_above": 1.0})
    slide = ArraySlide(_discs([(150, 150, 50), (150, 240, 50)]), 1.0)
    assert len(_run(slide, card, tmp_path / "out").annotations) == 1


# --- what always holds ---------------------------------------------------------------------------


def _bytes(folder: Path) -> dict[str, bytes]:
    found = {p.relative_to(folder).as_posix(): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}
    facts = json.loads(found["run.json"])
    found["run.json"] = json.dumps({k: v for k, v in facts.items() if k not in ("timing", "host")}).encode()
    return found


@pytest.fixture(scope="module")
def reference(blurred: Card, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    folder = tmp_path_factory.mktemp("reference") / "out"
    _run(_position_slide(), blurred, folder, block_tiles=500, threads=1)
    return _bytes(folder)


def _position_slide() -> ArraySlide:
    return ArraySlide(position_pixels(*SIZE.shape), 0.7)


def test_the_reference_can_tell_places_apart(reference: dict[str, bytes]) -> None:
    assert len(json.loads(reference["annotations.geojson"])["features"]) > 5


@pytest.mark.parametrize(
    "options",
    [
        {"block_tiles": 1, "threads": 3},
        {"block_tiles": 2, "threads": 2, "batch_size": 5},
        {"block_tiles": 5, "threads": 1},
        {},
    ],
)
def test_blocks_batches_and_threads_do_not_show(
    blurred: Card, reference: dict[str, bytes], tmp_path: Path, options: dict[str, Any]
) -> None:
    _run(_position_slide(), blurred, tmp_path / "out", **options)
    assert _bytes(tmp_path / "out") == reference


@pytest.mark.parametrize("after", [1, 4])
def test_an_interruption_does_not_show(
    blurred: Card, reference: dict[str, bytes], tmp_path: Path, after: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Broken off after some blocks, and gone on with in blocks of another size."""
    original, done = Segmentation.record, []

    def broken(self: Segmentation, journal: Any, result: Any) -> None:
        if len(done) == after:
            raise KeyboardInterrupt
        done.append(int(result.ran.sum()))
        original(self, journal, result)

    with monkeypatch.context() as patch:
        patch.setattr(Segmentation, "record", broken)
        with pytest.raises(KeyboardInterrupt):
            _run(_position_slide(), blurred, tmp_path / "out", block_tiles=2, threads=1)
    progress: list[int] = []
    listener = lambda event: event.kind == "resume" and progress.append(event.data["done"])  # noqa: E731
    _run(_position_slide(), blurred, tmp_path / "out", block_tiles=3, listener=listener)
    assert progress == [sum(done)]
    assert _bytes(tmp_path / "out") == reference


def test_a_cluster_does_not_show(blurred: Card, reference: dict[str, bytes], tmp_path: Path) -> None:
    from distributed import Client, LocalCluster

    with (
        LocalCluster(n_workers=1, threads_per_worker=2, processes=False, dashboard_address=":0") as cluster,
        Client(cluster) as client,
    ):
        _run(_position_slide(), blurred, tmp_path / "out", client=client, block_tiles=2)
    assert _bytes(tmp_path / "out") == reference


def test_the_map_is_the_blend_of_all_tiles(blurred: Card, tmp_path: Path) -> None:
    """Against a plain loop over all tiles, and against the lazy array."""
    slide = _position_slide()
    result = _run(slide, blurred, tmp_path / "out")
    plan = wsiengine.plan(slide, str(blurred.folder), tissue="none", overlap=0.3, block_tiles=2, threads=2)
    assert plan.job
    grid, side = plan.grid, SIDE_PX // STRIDE_PX
    total = np.zeros((*(n + side for n in plan.analysed.shape), 2))
    weight = np.zeros(total.shape[:2])
    win = Window.of(grid, 0)
    for i, j in np.ndindex(grid.shape):
        pixels = slide.read(grid.tile_box_px(i, j), plan.lattice.mpp)
        [[maps]] = plan.job.runtime.outputs(pixels, np.zeros((1, 2), np.int64))
        y, x = i * grid.rows.stride, j * grid.cols.stride
        w = np.outer(win.rows[i].astype(float), win.cols[j])
        total[y : y + side, x : x + side] += w[..., None] / (
            1 + np.exp(-np.moveaxis(maps[0].astype(np.float64), 0, -1))
        )
        weight[y : y + side, x : x + side] += w
    rows, cols = plan.analysed.shape
    expected = 1 + np.floor((total / weight[..., None].clip(1e-9))[:rows, :cols] * 254 + 0.5)
    stored = result.probability.compute()
    np.testing.assert_allclose(stored[..., :2], expected, atol=1)
    assert (stored[..., :2] == expected).mean() > 0.9  # tiles are rounded once more
    np.testing.assert_array_equal(plan.to_dask().compute(), stored)


def test_a_finished_run_is_drawn_again_without_the_model(blurred: Card, tmp_path: Path) -> None:
    result = _run(_position_slide(), blurred, tmp_path / "out")
    again = result.to_geojson(tmp_path / "again.geojson")
    assert again.read_bytes() == (tmp_path / "out" / "annotations.geojson").read_bytes()
    stricter = json.loads(result.to_geojson(tmp_path / "less.geojson", threshold=0.8).read_text())
    area = lambda features: sum(f["properties"]["measurements"]["Area µm^2"] for f in features)  # noqa: E731
    assert area(stricter["features"]) < area(json.loads(again.read_text())["features"])


def test_every_tile_is_run_once(blurred: Card, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from wsiengine.models.runtime import Runtime

    run: list[int] = []
    original = Runtime.outputs

    def counted(self: Runtime, pixels: np.ndarray, origins: np.ndarray) -> Any:
        run.append(len(origins))
        return original(self, pixels, origins)

    monkeypatch.setattr(Runtime, "outputs", counted)
    result = _run(_position_slide(), blurred, tmp_path / "out", block_tiles=2)
    assert sum(run) == result.summary["tiles"] == 35


# --- the pieces ----------------------------------------------------------------------------------


@pytest.mark.parametrize(("overlap", "halo"), [(0.0, 0), (0.3, 0), (0.3, 2), (0.8, 3)])
def test_a_blend_is_the_weighted_mean_however_it_is_cut(overlap: float, halo: int) -> None:
    grid = TileGrid.cover(Lattice(Size(150, 219), Mpp.square(1), Mpp.square(1), 4), 64, overlap)
    rng = np.random.default_rng(3)
    tiles = {(i, j): rng.random((16, 16, 2), np.float32) for i, j in np.ndindex(grid.shape)}
    win = Window.of(grid, halo)
    ran = np.ones(grid.shape, bool)
    extent = Box.of(grid.lattice.extent_cells)
    total, weight = np.zeros((*(n + 16 for n in extent.shape), 2)), np.zeros([n + 16 for n in extent.shape])
    for (i, j), values in tiles.items():
        y, x = i * grid.rows.stride, j * grid.cols.stride
        place = np.s_[y : y + 16, x : x + 16]
        w = np.outer(win.rows[i].astype(float), win.cols[j])
        total[place] += w[..., None] * np.rint(values * 254)
        weight[place] += w
    inside = weight[extent.slices]
    assert inside.min() > 0  # nothing is left out, not even along the slide's edge
    assert (total.max(axis=2)[extent.slices] <= 65535).all()
    expected = 1 + np.floor(total[extent.slices] / inside[..., None] + 0.5)
    whole = blended(add_tiles(tiles.items(), win, grid, extent, 2), ran, win, grid, extent)
    np.testing.assert_allclose(whole, expected, atol=1)
    assert (whole == expected).mean() > 0.99
    box = Box(5, 11, 31, 40)
    part = blended(add_tiles(reversed(tiles.items()), win, grid, box, 2), ran, win, grid, box)
    np.testing.assert_array_equal(part, whole[box.slices])


def test_what_is_within_the_halo_does_not_count() -> None:
    grid = TileGrid.cover(Lattice(Size(64, 108), Mpp.square(1), Mpp.square(1), 4), 64, 0.45)
    right, wrong = np.full((16, 16, 1), 0.25, np.float32), np.full((16, 16, 1), 0.25, np.float32)
    wrong[:, :3] = 1  # the second tile's halo
    extent, win = Box.of(grid.lattice.extent_cells), Window.of(grid, 3)
    tiles = [((0, 0), right), *(((0, j), wrong) for j in range(1, grid.cols.count))]
    coded = blended(add_tiles(tiles, win, grid, extent, 1), np.ones(grid.shape, bool), win, grid, extent)
    assert (coded == coded[0, 0]).all()
    assert coded[0, 0] == 1 + 64


def test_a_tile_that_did_not_run_leaves_its_part_to_its_neighbours() -> None:
    grid = TileGrid.cover(Lattice(Size(64, 150), Mpp.square(1), Mpp.square(1), 4), 64, 0.5)
    extent, win, ran = Box.of(grid.lattice.extent_cells), Window.of(grid, 0), np.ones(grid.shape, bool)
    ran[0, 1] = False
    tiles = [((0, j), np.full((16, 16, 1), 0.5, np.float32)) for j in np.flatnonzero(ran[0]).tolist()]
    coded = blended(add_tiles(tiles, win, grid, extent, 1), ran, win, grid, extent)
    assert (coded == 128).all()
    ran[0, 0] = False
    coded = blended(add_tiles(tiles[1:], win, grid, extent, 1), ran, win, grid, extent)
    assert (coded[:, :16] == 0).all()
    assert (coded[:, 16:] == 128).all()


LAYOUT = SegmentLayout(("Gland",), ((1, 2, 3),), ((0,),), "sigmoid", contour=1, model_channels=2)


def _coded(gland: list[str], border: str = "b") -> np.ndarray:
    """A map drawn in letters: g gland, b border within gland, . nothing, blank not analysed."""
    cells = np.array([list(row) for row in gland])
    coded = np.ones((*cells.shape, 2), np.uint8)
    coded[np.isin(cells, ["g", border]), 0] = 255
    coded[cells == border, 1] = 255
    coded[cells == " "] = 0
    return coded


def test_a_border_parts_and_is_given_back() -> None:
    objects, kinds = find_objects(_coded(["ggbbgg", "ggbbgg", "......", "bbbbbb"]), LAYOUT, Rule(0.5, steps=3))
    np.testing.assert_array_equal(objects, [[1, 1, 1, 2, 2, 2], [1, 1, 1, 2, 2, 2], [0] * 6, [3] * 6])
    np.testing.assert_array_equal(kinds, [1, 1, 1])


def test_small_objects_go_and_holes_are_filled() -> None:
    drawn = ["ggggg..g", "g. gg...", "ggggg.gg", "ggggg.gg"]
    objects, _ = find_objects(_coded(drawn), LAYOUT, Rule(0.5, least=4, holes=2))
    np.testing.assert_array_equal(objects[:, :5], np.ones((4, 5)))
    assert objects.max() == 2
    assert objects[0, 7] == 0
    kept, _ = find_objects(_coded(drawn), LAYOUT, Rule(0.5, least=4, holes=1))
    assert kept[1, 1] == kept[1, 2] == 0


def test_tiles_overlap_by_twice_the_halo(tmp_path: Path) -> None:
    card = segmenters.blurred(tmp_path / "model", halo_px=16)
    plan = wsiengine.plan(_position_slide(), str(card.folder), tissue="none", overlap=0.2)
    assert plan.grid.stride_px == 32
    events: list[Any] = []
    _run(_position_slide(), card, tmp_path / "out", overlap=0.2, listener=events.append)
    assert any("needs 16 px of context" in e.data["text"] for e in events if e.kind == "warning")
    assert wsiengine.plan(_position_slide(), str(card.folder), tissue="none", overlap=0.5).grid.stride_px == 32


def test_batches_give_each_tile_its_own_output(blurred: Card) -> None:
    """Batches belong to GPUs; here the CPU is handed some."""
    from wsiengine.models.runtime import Runtime

    pixels, corners = position_pixels(200, 240), np.array([(0, 0), (7, 90), (130, 3), (136, 176), (60, 60)])
    one = Runtime(blurred, device="cpu")
    single = [array[0].copy() for [array] in one.outputs(pixels, corners)]
    one.batch_size = 2
    several = [array.copy() for [array] in one.outputs(pixels, corners)]
    assert len(several) == 5
    for alone, array in zip(single, several, strict=True):
        assert array.shape[0] == 1
        np.testing.assert_allclose(array[0], alone, atol=1e-5)


def test_damage_leaves_a_gap_and_is_told(blurred: Card, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A tile that saw bad pixels is left out of the blend; its neighbours fill in what they cover."""
    original = Segmentation.score

    def damaged(self: Segmentation, job: Any, block: Any, view: Any) -> Any:
        places = np.argwhere(block.wanted) + (block.tiles.y0, block.tiles.x0)
        return original(self, job, block, replace(view, bad=(places == (2, 3)).all(axis=1)))

    before = _run(_position_slide(), blurred, tmp_path / "whole")
    whole = before.probability.compute()
    monkeypatch.setattr(Segmentation, "score", damaged)
    result = _run(_position_slide(), blurred, tmp_path / "out", block_tiles=2)
    assert result.summary["unreadable_tiles"] == 1
    assert result.summary["tiles"] == 34
    found = result.probability.compute()
    gap = np.zeros(found.shape[:2], bool)
    gap[22 + 5 : 22 + 11, 33 + 5 : 33 + 11] = True  # what no other tile covers: tiles of 16 cells every 11
    np.testing.assert_array_equal(found[..., 0] == 0, gap)
    share = gap.sum() / (whole[..., 0] > 0).sum()
    assert result.summary["analysed_mm2"] == pytest.approx(before.summary["analysed_mm2"] * (1 - share), rel=0.01)
    assert result.summary["analysed_mm2"] < before.summary["analysed_mm2"]
    far = np.s_[:20]
    np.testing.assert_array_equal(found[far], whole[far])


# --- words ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"segmentation": None}, "segmentation and task segment go together"),
        ({"segmentation": {"channels": ["Gland", "edge"]}}, "names edge, which is no class"),
        ({"segmentation": {"channels": ["contour"]}}, "lacks Gland"),
        ({"segmentation": {"channels": []}}, "needed a list of names"),
        ({"activation": "softmax"}, "softmax"),
        ({"segmentation": {"channels": ["Gland", "contour"], "threshold": 2}}, "threshold"),
    ],
)
def test_a_card_that_contradicts_itself_is_refused(tmp_path: Path, changes: dict[str, Any], words: str) -> None:
    with pytest.raises(CardError, match=words):
        segmenters.planted(tmp_path, **changes)


def test_a_map_of_another_size_is_refused(tmp_path: Path) -> None:
    card = segmenters.planted(tmp_path, output_stride_px=8)
    with pytest.raises(CardError, match=r"a map of shape \[1, 2, 16, 16\].*needs \[1, 2, 8, 8\]"):
        wsiengine.plan(_position_slide(), str(card.folder), tissue="none")


def test_nan_is_refused_with_its_place(blurred: Card, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from wsiengine.models.runtime import Runtime

    def poisoned(self: Runtime, pixels: np.ndarray, origins: np.ndarray) -> Any:
        return ([np.full((1, 2, 16, 16), np.nan, np.float32)] for _ in origins)

    monkeypatch.setattr(Runtime, "outputs", poisoned)
    with pytest.raises(ScoreError, match="level-0 pixels"):
        _run(_position_slide(), blurred, tmp_path / "out")


def test_nan_is_left_out_where_that_is_asked_for(
    blurred: Card, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from wsiengine.models.runtime import Runtime
    from wsiengine.slides.tolerant import TolerantSlide

    original = Runtime.outputs

    def poisoned(self: Runtime, pixels: np.ndarray, origins: np.ndarray) -> Any:
        for k, arrays in enumerate(original(self, pixels, origins)):
            yield [np.full_like(a, np.nan) for a in arrays] if k == 2 else arrays

    monkeypatch.setattr(Runtime, "outputs", poisoned)
    slide = TolerantSlide(_position_slide())
    result = _run(slide, blurred, tmp_path / "out", block_tiles=3, threads=1)
    plan = wsiengine.plan(slide, str(blurred.folder), tissue="none", block_tiles=3)
    poisoned_tiles = sum(block.wanted.sum() >= 3 for block in plan.blocks())
    assert result.summary["unreadable_tiles"] == poisoned_tiles
    assert np.isfinite(result.summary["analysed_mm2"])


def test_objects_are_chosen_by_class(planted: Card, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from wsiengine.cli import main

    result = _run(ArraySlide(_discs(DISCS), Mpp.square(1.0)), planted, tmp_path / "out")
    count = len(result.annotations)
    assert count == len(DISCS)
    out = str(tmp_path / "out")
    assert main(["export", out, "--classes", "Gland", "--overwrite", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["summary"]["objects"] == {"Gland": count}
    assert main(["export", out, "--classes", "contour", "--overwrite"]) == 1
    assert "knows no class contour" in capsys.readouterr().err


def test_unanalysed_cells_stay_unanalysed(planted: Card, tmp_path: Path) -> None:
    """A region limits the map, and what is drawn is cut to it."""
    region = tmp_path / "region.geojson"
    shape = shapely.box(60, 40, 260, 250)
    region.write_text(
        json.dumps({"type": "Feature", "geometry": json.loads(shapely.to_geojson(shape)), "properties": {}})
    )
    result = _run(ArraySlide(_discs(DISCS), 1.0), planted, tmp_path / "out", region=region)
    stored = result.probability.compute()
    plan = wsiengine.plan(ArraySlide(_discs(DISCS), 1.0), str(planted.folder), tissue="none", region=region)
    assert 0 < plan.analysed.sum() < plan.analysed.size
    np.testing.assert_array_equal(stored[..., 0] > 0, plan.analysed)
    np.testing.assert_array_equal(plan.to_dask().compute(), stored)
    assert all(shape.buffer(0.02).covers(a.geometry) for a in result.annotations)
