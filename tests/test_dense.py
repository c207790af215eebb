"""Dense windows: one run per block, the same score for a window wherever and however it is computed."""

import json
import threading
import time
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import wsiengine
from tests import planted_slides as planted
from tests.fakes import ArraySlide, position_pixels
from tests.models.tiny import Tiny, card_json, tiny, write_card
from wsiengine import dense, viewing
from wsiengine.errors import CardError, PlanError, ScoreError
from wsiengine.geometry import Box, Lattice, Mpp, Size
from wsiengine.graph import run_blocks
from wsiengine.grid import Axis, TileGrid, blocks_of
from wsiengine.inference import infer
from wsiengine.job import BlockScores
from wsiengine.journal import Recovered
from wsiengine.models.card import Card, load_card
from wsiengine.models.contract import check_maps
from wsiengine.models.integrity import file_sha256
from wsiengine.models.registry import load_model
from wsiengine.models.runtime import Runtime
from wsiengine.planning import Plan
from wsiengine.slides.pyramid import PyramidLayout, write_pyramid
from wsiengine.tasks.base import Gathered
from wsiengine.truth import Truth


def grid_of(rows: int, cols: int, tile: int, stride: int) -> TileGrid:
    """Windows of ``tile`` cells that fit into ``rows`` × ``cols`` cells."""
    return TileGrid(
        Lattice(Size(rows, cols), Mpp.square(1), Mpp.square(1), 1), Axis(rows, tile, stride), Axis(cols, tile, stride)
    )


@given(st.integers(0, 2**32 - 1), st.integers(1, 7), st.integers(1, 7), st.booleans())
def test_a_window_is_the_mean_of_its_cells_without_the_ring(seed: int, tile: int, stride: int, gated: bool) -> None:
    stride = min(stride, tile)
    maps = np.random.default_rng(seed).normal(size=(19, 23, 3)).astype(np.float32)
    maps[7, 11] = np.nan
    found = dense.window_means(maps, grid_of(19, 23, tile, stride), gated=gated)
    assert found.shape == ((19 - tile) // stride + 1, (23 - tile) // stride + 1, 3)
    ring = 1 if tile > 2 else 0
    for i, j in np.ndindex(found.shape[:2]):
        y, x = i * stride, j * stride
        window = maps[y : y + tile, x : x + tile].astype(np.float64)
        expected = window[ring : tile - ring, ring : tile - ring].mean(axis=(0, 1))
        if gated:
            expected[-1] = window[..., -1].mean()
            expected[:] = expected if np.isfinite(expected).all() else np.nan  # all of its scores or none
        np.testing.assert_allclose(found[i, j], expected, rtol=1e-6, atol=1e-7)


def test_windows_in_strips_are_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    maps = np.random.default_rng(3).normal(size=(41, 23, 3)).astype(np.float32)
    whole = dense.window_means(maps, grid_of(41, 23, 5, 2), gated=True)
    monkeypatch.setattr(dense, "_STRIP", 80)
    np.testing.assert_array_equal(dense.window_means(maps, grid_of(41, 23, 5, 2), gated=True), whole)


@given(st.data())
def test_every_cell_that_a_window_needs_is_run_once(data: st.DataObject) -> None:
    tile = data.draw(st.integers(1, 7))
    stride, block = data.draw(st.integers(1, tile)), data.draw(st.integers(1, 30))
    rows, cols = data.draw(st.integers(1, 60)), data.draw(st.integers(1, 60))
    grid = grid_of(rows, cols, tile, stride)
    wanted = np.random.default_rng(data.draw(st.integers(0, 99))).random(grid.shape) < 0.2
    cells, needed = dense.work(grid, wanted)
    assert cells.shape == needed.shape
    expected = np.zeros(needed.shape, bool)
    for i, j in np.argwhere(wanted):
        expected[i * stride : i * stride + tile, j * stride : j * stride + tile] = True
    np.testing.assert_array_equal(needed, expected)
    runs = np.zeros(needed.shape, np.int64)
    for part in blocks_of(needed, block):
        box = dense.run_box(part.tiles, needed)
        assert part.tiles.contains(box)
        runs[box.slices] += 1
    assert runs.max(initial=0) <= 1
    assert (runs[needed] == 1).all()


def _cells(plan: Plan, left: np.ndarray) -> np.ndarray:
    """Cells of the blocks that hold any of ``left``."""
    cells = np.full((*left.shape, plan.card.score_channels), np.nan, np.float32)

    def done(blocks: Sequence[BlockScores]) -> None:
        for block in blocks:
            cells[block.tiles.slices][block.ran] = block.scores[block.ran]

    assert plan.job
    run_blocks(plan.job, blocks_of(left, plan.block_tiles), done, threads=2)
    return cells


def _add_all(gathered: Gathered, blocks: Sequence[BlockScores]) -> None:
    for block in blocks:
        gathered.add(block)


def _scores(plan: Plan) -> np.ndarray:
    nothing = Recovered({}, {}, ())
    gathered = plan.task.gather(plan, nothing)
    assert plan.job
    run_blocks(plan.job, plan.blocks(), partial(_add_all, gathered), threads=1)
    return gathered.arrays()["scores"]


@pytest.fixture(scope="module")
def card(tmp_path_factory: pytest.TempPathFactory) -> Card:
    """A model that looks one pixel beyond a cell, in tiles too small for a ring: a missing halo shows."""
    folder = tmp_path_factory.mktemp("dense")
    what = {"size_px": 16, "stride_px": 8}
    tiny(folder, **what)
    data = card_json(Tiny(**what), file_sha256(folder / "tiny.onnx")) | {
        "dense": {"block_px": 96, "halo_px": 8, "offset_px": 3.5}
    }
    return load_card(write_card(folder, data))


@pytest.mark.parametrize("overlap", [0.0, 0.5, 0.75])
def test_blocked_windows_are_those_of_the_unblocked_map(card: Card, overlap: float) -> None:
    slide = ArraySlide(position_pixels(403, 517), 1.0)
    plan = wsiengine.plan(slide, str(card.folder), tissue="none", mode="dense", overlap=overlap)
    assert plan.block_count > 4
    whole = Box.of(Size(*plan.work[1].shape)).scale(8).grow(8)
    assert plan.job
    cells = plan.job.runtime.maps(slide.read(whole, Mpp.square(1.0)))[1:-1, 1:-1]
    expected = dense.window_means(cells, plan.grid, gated=False)
    np.testing.assert_allclose(_scores(plan), expected, rtol=1e-4, atol=1e-5)


def test_a_window_does_not_depend_on_which_others_are_wanted(card: Card) -> None:
    slide = ArraySlide(position_pixels(403, 517), 1.0)
    plan = wsiengine.plan(slide, str(card.folder), tissue="none", mode="dense")
    every = _scores(plan)
    few = np.random.default_rng(3).random(plan.wanted.shape) < 0.1
    assert plan.job
    some = _scores(replace(plan, wanted=few, job=replace(plan.job, wanted=dense.work(plan.grid, few)[1])))
    np.testing.assert_allclose(some[few], every[few], rtol=1e-4, atol=1e-5)
    assert np.isnan(some[~few]).all()


def test_what_is_left_of_a_run_is_computed_as_in_the_whole(card: Card) -> None:
    """To the last bit: a block that is resumed runs the same pixels, whatever is left of it."""
    slide = ArraySlide(position_pixels(403, 517), 1.0)
    wanted = np.random.default_rng(4).random(wsiengine.plan(slide, str(card.folder)).wanted.shape) < 0.2
    plan = wsiengine.plan(slide, str(card.folder), tissue="none", mode="dense")
    assert plan.job
    needed = dense.work(plan.grid, wanted)[1]
    plan = replace(plan, wanted=wanted, job=replace(plan.job, wanted=needed))
    every = _cells(plan, needed)
    read = {(at.level, at.box) for at in slide.reads}
    slide.reads.clear()
    left = needed & (np.random.default_rng(5).random(needed.shape) < 0.02)
    np.testing.assert_array_equal(_cells(plan, left)[left], every[left])
    assert slide.reads
    assert {(at.level, at.box) for at in slide.reads} <= read


def test_the_lazy_map_is_the_finished_map(card: Card) -> None:
    slide = ArraySlide(position_pixels(403, 517), 1.0)
    plan = wsiengine.plan(slide, str(card.folder), tissue="none", mode="dense", overlap=0.5)
    keep = np.random.default_rng(6).random(plan.wanted.shape) < 0.4
    assert plan.job
    plan = replace(
        plan,
        wanted=keep,
        analysed=plan.grid.covered_by(keep),
        job=replace(plan.job, wanted=dense.work(plan.grid, keep)[1]),
    )
    whole = Truth.of(plan, {"scores": _scores(plan)}, None).map()
    assert 0.2 < (whole > 0).mean() < 0.95
    lazy = plan.to_dask()
    np.testing.assert_array_equal(lazy.compute(), whole)
    np.testing.assert_array_equal(lazy[3:20, 11:30].compute(), whole[3:20, 11:30])


def test_cells_that_the_run_does_not_want_may_hold_anything(card: Card, monkeypatch: pytest.MonkeyPatch) -> None:
    slide = ArraySlide(position_pixels(403, 517), 1.0)
    plan = wsiengine.plan(slide, str(card.folder), tissue="none", mode="dense", overlap=0.5)
    wanted = np.random.default_rng(8).random(plan.wanted.shape) < 0.1
    assert plan.job
    plan = replace(plan, wanted=wanted, job=replace(plan.job, wanted=dense.work(plan.grid, wanted)[1]))
    expected, shares = _scores(plan), []
    real = Runtime.maps

    def spoilt(self: Runtime, pixels: np.ndarray, *, wanted: np.ndarray, tolerant: bool) -> np.ndarray:
        found = real(self, pixels, wanted=wanted, tolerant=tolerant)
        found[~wanted] = 1e6
        shares.append(wanted[1:-1, 1:-1].mean())
        return found

    monkeypatch.setattr(Runtime, "maps", spoilt)
    np.testing.assert_array_equal(_scores(plan), expected)
    assert 0.1 < np.mean(shares) < 0.9


def test_blocks_read_in_strips_are_those_read_at_once(card: Card, monkeypatch: pytest.MonkeyPatch) -> None:
    slide = ArraySlide(position_pixels(403, 517), 1.0)
    plan = wsiengine.plan(slide, str(card.folder), tissue="none", mode="dense")
    at_once = _scores(plan)
    reads = len(slide.reads)
    slide.reads.clear()
    monkeypatch.setattr(viewing, "STRIP_PX", 40)
    np.testing.assert_array_equal(_scores(plan), at_once)
    assert len(slide.reads) > reads
    assert plan.job
    viewer = plan.job.viewer
    for block in plan.blocks():
        whole = slide.read(viewer.box_px(block), plan.lattice.mpp)
        np.testing.assert_array_equal(viewer.view(block)[0].pixels, whole)


def test_few_blocks_under_way_at_once_give_the_same_cells(card: Card, monkeypatch: pytest.MonkeyPatch) -> None:
    slide = ArraySlide(position_pixels(403, 517), 1.0)
    plan = wsiengine.plan(slide, str(card.folder), tissue="none", mode="dense")
    expected, lock, under_way, most = _scores(plan), threading.Lock(), 0, 0
    real = Runtime.maps

    def counted(self: Runtime, *given: Any, **how: Any) -> np.ndarray:
        nonlocal under_way, most
        with lock:
            under_way += 1
            most = max(most, under_way)
        time.sleep(0.01)
        found = real(self, *given, **how)
        with lock:
            under_way -= 1
        return found

    monkeypatch.setattr(Runtime, "maps", counted)
    for at_once in (1, 2, None):
        most = 0
        gathered = plan.task.gather(plan, Recovered({}, {}, ()))
        assert plan.job
        run_blocks(plan.job, plan.blocks(), partial(_add_all, gathered), threads=4, at_once=at_once)
        np.testing.assert_array_equal(gathered.arrays()["scores"], expected)
        assert most <= (at_once or 4)
        assert (most > 2) == (at_once is None)


def test_where_memory_is_short_fewer_blocks_are_under_way() -> None:
    """Their cells are the same: a dense run is refused only where a single block does not fit."""
    pixels = np.full((1200, 1300, 3), (200, 120, 170), np.uint8)
    how: dict[str, Any] = {"tissue": "none", "mode": "dense", "threads": 6}
    free = wsiengine.plan(ArraySlide(pixels, 1.0), "crc5", memory_limit_bytes=1 << 36, **how)
    assert free.blocks_at_once == 3
    least = replace(free, options=replace(free.options, memory_limit_bytes=1)).peak_bytes
    assert least < free.peak_bytes
    for limit, at_once in ((free.peak_bytes, 3), (free.peak_bytes - 1, 2), (least, 1), (least - 1, 1)):
        plan = replace(free, options=replace(free.options, memory_limit_bytes=limit))
        assert plan.blocks_at_once == at_once
        assert (plan.peak_bytes <= limit) == (limit >= least)


def test_marks_come_back_through_the_whole_path(tmp_path: Path) -> None:
    box = Box(200, 300, 900, 1300)
    slide = planted.write(tmp_path / "s.svs", planted.paint(Size(1201, 1611), [(planted.A, box)]))
    first = infer(slide, "planted", tmp_path / "a", tissue="none", mode="dense", overlap=0.75)
    assert planted.iou(first.annotations, planted.A, box) > 0.9
    infer(slide, "planted", tmp_path / "b", tissue="none", mode="dense", overlap=0.75, threads=1, block_tiles=2)
    for name in ("annotations.geojson", "overlay.png"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()
    assert json.loads((tmp_path / "a" / "run.json").read_text())["identity"]["parameters"]["mode"] == "dense"


def test_auto_takes_dense_windows_where_they_are_cheaper(card: Card, tmp_path: Path) -> None:
    slide = ArraySlide(position_pixels(803, 917), 1.0)
    chosen = [
        wsiengine.plan(slide, str(card.folder), tissue="none", mode="auto", overlap=o).options.mode for o in (0.0, 0.75)
    ]
    assert chosen == ["tiles", "dense"]
    plain = tiny(tmp_path / "plain")
    assert wsiengine.plan(slide, str(plain.folder), tissue="none", mode="auto", overlap=0.75).options.mode == "tiles"
    with pytest.raises(CardError, match="cannot be run over dense windows"):
        wsiengine.plan(slide, str(plain.folder), tissue="none", mode="dense")
    with pytest.raises(PlanError, match="no mode 'fast'"):
        wsiengine.plan(slide, str(card.folder), tissue="none", mode="fast")


def _blind_to_red(monkeypatch: pytest.MonkeyPatch) -> None:
    """The tiny model gives NaN for a cell that holds a pixel of pure red."""
    run = Runtime._run

    def poisoned(self: Runtime, batch: np.ndarray, outputs: list[str] | None = None) -> list[np.ndarray]:
        cam, *others = run(self, batch, outputs)
        if outputs == ["cam"]:
            red = (batch[0] == (255, 0, 0)).all(axis=-1)
            cells = red.reshape(red.shape[0] // 8, 8, red.shape[1] // 8, 8).any(axis=(1, 3))
            cam = np.where(cells, np.float32(np.nan), cam)
        return [cam, *others]

    monkeypatch.setattr(Runtime, "_run", poisoned)


def test_cells_without_a_number_end_the_run_or_are_left_out(
    card: Card, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As tiles are: by ``on_bad_tile``, whatever the overlap, and told."""
    pixels = position_pixels(403, 517)
    pixels[203, 301] = (255, 0, 0)  # in cell (25, 37), which four windows hold
    slide = tmp_path / "slide.tif"
    write_pyramid(slide, pixels, Size(403, 517), 1.0, PyramidLayout(64, 0, (1,), "deflate", svs=False))
    how: dict[str, Any] = {"tissue": "none", "mode": "dense", "overlap": 0.5}
    sound = infer(slide, str(card.folder), tmp_path / "sound", on_bad_tile="skip", **how)
    assert "unreadable_tiles" not in sound.summary

    _blind_to_red(monkeypatch)
    place = r"gave NaN for the cell at y 16, x 16 px of its block .* The block starts at x 280, y 184 \(level-0"
    with pytest.raises(ScoreError, match=place):
        infer(slide, str(card.folder), tmp_path / "out", threads=1, **how)
    found = infer(slide, str(card.folder), tmp_path / "skip", on_bad_tile="skip", **how)
    assert found.summary["unreadable_tiles"] == 4
    here, there = found.probability.compute(), sound.probability.compute()
    missing = (here == 0).all(axis=-1) & (there > 0).any(axis=-1)
    assert missing[25, 37]
    assert missing.sum() == 1  # the cells around it have other windows
    scores = [Truth.load(result.folder / "probability.zarr").scores for result in (found, sound)]
    ran = ~np.isnan(scores[0][..., 0])
    np.testing.assert_array_equal(np.argwhere(~ran), [[24, 36], [24, 37], [25, 36], [25, 37]])
    np.testing.assert_array_equal(scores[0][ran], scores[1][ran])


def test_a_gate_that_is_no_fraction_is_refused_in_a_map_too() -> None:
    card = load_model("crc5")
    maps = np.zeros((2, 3, card.score_channels), np.float32)
    maps[0, 1, -1], maps[1, 2, -1] = 1 + 1e-5, -1e-5  # rounding is clipped
    check_maps(maps, card)
    assert (maps[0, 1, -1], maps[1, 2, -1]) == (1, 0)
    maps[1, 0, -1] = 1.7
    with pytest.raises(ScoreError, match=r"the gate 1.7 for the cell at y 32, x 0 px .*needed 0 to 1"):
        check_maps(maps, card)
    check_maps(maps, card, tolerant=True)
    assert np.isnan(maps).all(axis=-1).tolist() == [[False, False, False], [True, False, False]]
