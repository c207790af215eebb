"""Steps of published studies that look at each tile by itself, chained on a recipe."""

from collections.abc import Sequence
from pathlib import Path

import cv2
import numpy as np
import pytest

import wsiengine
from tests.fakes import ArraySlide, position_pixels
from tests.models.tiny import tiny
from wsiengine.errors import CardError, PlanError
from wsiengine.geometry import Mpp
from wsiengine.graph import run_blocks
from wsiengine.job import BlockScores
from wsiengine.normalise import Normaliser, fit_normaliser
from wsiengine.planning import Plan
from wsiengine.recipe import parse_recipe
from wsiengine.tissue import TissueMask


def _scores(plan: Plan) -> np.ndarray:
    scores = np.full((*plan.wanted.shape, plan.card.score_channels), np.nan, np.float32)

    def done(blocks: Sequence[BlockScores]) -> None:
        for block in blocks:
            scores[block.tiles.slices] = block.scores

    assert plan.job
    run_blocks(plan.job, plan.blocks(), done, threads=2)
    return scores


@pytest.mark.parametrize("recipe", ["tile_whiten", "tile_clahe:clip=3,grid=4", "grey+tile_clahe+tile_whiten:mode=pca"])
def test_each_tile_is_changed_by_itself_whatever_the_block(tmp_path: Path, recipe: str) -> None:
    card = tiny(tmp_path / "tiny")
    slide = ArraySlide(position_pixels(231, 317), 1.0)
    plan = wsiengine.plan(slide, str(card.folder), tissue="none", normalise=recipe, block_tiles=3)
    scores = _scores(plan)
    again = wsiengine.plan(slide, str(card.folder), tissue="none", normalise=recipe, block_tiles=5)
    np.testing.assert_array_equal(scores, _scores(again))
    assert plan.job
    normaliser = plan.job.normaliser
    for i, j in ((0, 0), (2, 3), (plan.grid.shape[0] - 1, plan.grid.shape[1] - 1)):
        box = plan.grid.tile_box_px(i, j)
        tile = normaliser.apply(slide.read(box.grow(normaliser.halo_px), Mpp.square(1.0)), box)
        expected = plan.job.runtime.scores(normaliser.apply_to_tile(tile), np.zeros((1, 2), np.int64))[0]
        np.testing.assert_array_equal(scores[i, j], expected)
    without = wsiengine.plan(slide, str(card.folder), tissue="none", block_tiles=3)
    assert not np.array_equal(scores, _scores(without))


def _normaliser(text: str) -> Normaliser:
    slide = ArraySlide(position_pixels(300, 300), 1.0)
    everywhere = TissueMask.everywhere(slide.info.size_l0, Mpp.square(1.0))
    return fit_normaliser(parse_recipe(text), slide, everywhere, Mpp.square(1.0))


def test_clahe_of_a_grey_tile_is_opencvs_on_lightness() -> None:
    ramp = np.clip(np.add.outer(np.arange(64), np.arange(64)) + 60, 0, 255).astype(np.uint8)
    tile = np.repeat(ramp[..., None], 3, axis=2)
    ours = _normaliser("tile_clahe:clip=2,grid=4").apply_to_tile(tile)
    lab = cv2.cvtColor(tile, cv2.COLOR_RGB2LAB)
    lab[..., 0] = cv2.createCLAHE(2.0, (4, 4)).apply(lab[..., 0])
    theirs = cv2.cvtColor(lab, cv2.COLOR_LAB2RGB)
    assert np.abs(ours.astype(int) - theirs).max() <= 3
    assert np.abs(ours.astype(int) - tile).max() > 5


def test_whitening_gives_every_tile_the_same_mean_and_spread() -> None:
    normaliser = _normaliser("tile_whiten")
    random = np.random.default_rng(0)
    for level, spread in ((90, 6), (180, 15)):
        tile = np.clip(random.normal(level, spread, (64, 64, 3)), 0, 255).astype(np.uint8)
        white = normaliser.apply_to_tile(tile).astype(float)
        assert np.abs(white.mean(axis=(0, 1)) - 128).max() < 2
        assert np.abs(white.std(axis=(0, 1)) - 48).max() < 3


def test_a_stored_normaliser_does_the_same() -> None:
    normaliser = _normaliser("grey+tile_clahe:clip=4+tile_whiten")
    again = Normaliser.from_json(normaliser.to_json())
    assert again.to_json() == normaliser.to_json()
    assert again.tile_steps == normaliser.tile_steps
    assert len(again.tile_steps) == 2


def test_deep_pictures_are_windowed_while_they_are_read(tmp_path: Path) -> None:
    import pickle

    from wsiengine.errors import UnsupportedSlide
    from wsiengine.geometry import Box

    deep = (np.add.outer(np.arange(150) * 20, np.arange(190) * 5)).astype(np.uint16)
    cv2.imwrite(str(tmp_path / "deep.png"), deep)
    with pytest.raises(UnsupportedSlide, match="16 bits") as refused:
        wsiengine.open_slide(tmp_path / "deep.png", mpp=1.0)
    assert "window:low=0,high=4095" in (refused.value.hint or "")
    slide = wsiengine.open_slide(tmp_path / "deep.png", mpp=1.0, window=(500, 3000))
    expected = np.floor(np.clip((deep.astype(float) - 500) * 255 / 2500, 0, 255) + 0.5)
    box = Box(0, 0, 150, 190)
    np.testing.assert_array_equal(slide.read(box, Mpp.square(1.0))[..., 1], expected)
    np.testing.assert_array_equal(pickle.loads(pickle.dumps(slide)).read(box, Mpp.square(1.0))[..., 0], expected)
    plan = wsiengine.plan(
        tmp_path / "deep.png", "planted", mpp=1.0, tissue="none", normalise="window:low=500,high=3000+grey+tile_clahe"
    )
    assert plan.job
    np.testing.assert_array_equal(plan.job.slide.read(box, Mpp.square(1.0))[..., 2], expected)
    for wrong in ("window:low=5,high=5", "window:low=x", "grey+window"):
        with pytest.raises(PlanError):
            parse_recipe(wrong)


def test_tile_steps_come_last_have_sane_settings_and_no_dense_windows(tmp_path: Path) -> None:
    for wrong in ("tile_clahe+grey", "tile_clahe:grid=0", "tile_clahe:clip=0", "tile_whiten:mode=none"):
        with pytest.raises(PlanError):
            parse_recipe(wrong)
    with pytest.raises(CardError, match="grid"):
        parse_recipe([{"step": "tile_clahe", "grid": True}])
    slide = ArraySlide(position_pixels(300, 300), 1.0)
    with pytest.raises(PlanError, match="dense windows have no tiles"):
        wsiengine.plan(slide, "planted", tissue="none", mode="dense", normalise="tile_whiten")
    plan = wsiengine.plan(slide, "planted", tissue="none", mode="auto", overlap=0.75, normalise="tile_whiten")
    assert plan.options.mode == "tiles"
