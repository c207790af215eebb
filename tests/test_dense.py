"""Dense windows: one run per block, the same score for a window wherever and however it is computed."""

import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import wsiengine
from tests import planted_slides as planted
from tests.fakes import ArraySlide, position_pixels
from tests.models.tiny import Tiny, card_json, tiny, write_card
from wsiengine import dense
from wsiengine.errors import CardError, PlanError
from wsiengine.geometry import Box, Lattice, Mpp, Size
from wsiengine.graph import run_blocks
from wsiengine.grid import TileGrid
from wsiengine.inference import infer
from wsiengine.job import BlockScores
from wsiengine.models.card import Card, load_card
from wsiengine.models.integrity import file_sha256
from wsiengine.planning import Plan


@given(st.integers(0, 2**32 - 1), st.integers(1, 7), st.booleans())
def test_a_window_is_the_mean_of_its_cells_without_the_ring(seed: int, tile: int, gated: bool) -> None:
    random = np.random.default_rng(seed)
    maps = random.normal(size=(19, 23, 3)).astype(np.float32)
    corners = np.stack([random.integers(0, 19 - tile + 1, 30), random.integers(0, 23 - tile + 1, 30)], axis=1)
    found = dense.window_means(maps, corners, tile, gated=gated)
    ring = 1 if tile > 2 else 0
    for (y, x), scores in zip(corners, found, strict=True):
        window = maps[y : y + tile, x : x + tile].astype(np.float64)
        expected = window[ring : tile - ring, ring : tile - ring].mean(axis=(0, 1))
        if gated:
            expected[-1] = window[..., -1].mean()
        np.testing.assert_allclose(scores, expected, rtol=1e-6, atol=1e-7)


def _scores(plan: Plan) -> np.ndarray:
    scores = np.full((*plan.wanted.shape, plan.card.score_channels), np.nan, np.float32)

    def done(block: BlockScores) -> None:
        ran = ~np.isnan(block.scores[..., 0])
        scores[block.tiles.slices][ran] = block.scores[ran]

    assert plan.job
    run_blocks(plan.job, plan.blocks(), done, threads=2)
    return scores


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
    grid = plan.grid
    whole = dense.block_box_px(Box(0, 0, *grid.shape), grid).grow(8)
    assert plan.job
    maps = plan.job.runtime.maps(slide.read(whole, Mpp.square(1.0)))[1:-1, 1:-1]
    corners = np.argwhere(np.ones(grid.shape, bool)) * grid.rows.stride
    expected = dense.window_means(maps, corners, grid.rows.tile, gated=False).reshape(*grid.shape, -1)
    np.testing.assert_allclose(_scores(plan), expected, rtol=1e-4, atol=1e-5)


def test_a_window_does_not_depend_on_which_others_are_wanted(card: Card) -> None:
    from dataclasses import replace

    slide = ArraySlide(position_pixels(403, 517), 1.0)
    plan = wsiengine.plan(slide, str(card.folder), tissue="none", mode="dense")
    every = _scores(plan)
    few = np.random.default_rng(3).random(plan.wanted.shape) < 0.1
    some = _scores(replace(plan, wanted=few))
    np.testing.assert_array_equal(some[few], every[few])
    assert np.isnan(some[~few]).all()


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


def test_a_dense_block_covers_its_tiles() -> None:
    grid = TileGrid.cover(Lattice(Size(5000, 7000), Mpp.square(1), Mpp.square(1), 32), 224, 0.3)
    assert dense.block_box_px(Box(0, 0, 6, 6), grid) == Box(0, 0, 5 * 160 + 224, 5 * 160 + 224)
