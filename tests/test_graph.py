"""The one execution path: lazy, the same blocks everywhere, the same result however it is cut and run."""

from collections.abc import Sequence
from pathlib import Path

import dask
import numpy as np
import pytest

import wsiengine
from tests.fakes import ArraySlide, position_pixels
from tests.models.tiny import tiny
from wsiengine import graph
from wsiengine.geometry import Box, Mpp
from wsiengine.job import BlockScores, score_block
from wsiengine.models.card import Card
from wsiengine.planning import Plan
from wsiengine.tasks.classify import tile_probabilities

HEIGHT, WIDTH = 531, 797  # no multiples of tile, cell or block


@pytest.fixture(scope="module")
def card(tmp_path_factory: pytest.TempPathFactory) -> Card:
    return tiny(tmp_path_factory.mktemp("tiny"), gate=True)


@pytest.fixture(scope="module")
def slide() -> ArraySlide:
    return ArraySlide(position_pixels(HEIGHT, WIDTH), 0.7)


def _plan(slide: ArraySlide, card: Card, **options: object) -> Plan:
    return wsiengine.plan(slide, str(card.folder), **{"tissue": "none", "threads": 2, **options})


def _run(plan: Plan, **how: object) -> np.ndarray:
    scores = np.full((*plan.wanted.shape, plan.card.score_channels), np.nan, np.float32)

    def done(blocks: Sequence[BlockScores]) -> None:
        for block in blocks:
            scores[block.tiles.slices] = block.scores

    assert plan.job
    graph.run_blocks(plan.job, plan.blocks(), done, **{"threads": 2, **how})  # type: ignore[arg-type]
    return scores


@pytest.fixture(scope="module")
def reference(slide: ArraySlide, card: Card) -> np.ndarray:
    """Scores of each tile, read and run on its own."""
    plan = _plan(slide, card)
    assert plan.job
    scores = np.empty((*plan.wanted.shape, card.score_channels), np.float32)
    for i, j in np.ndindex(plan.wanted.shape):
        pixels = slide.read(plan.grid.tile_box_px(i, j), plan.lattice.mpp)
        scores[i, j] = plan.job.runtime.scores(pixels, np.zeros((1, 2), np.int64))[0]
    assert len(np.unique(scores[..., 0])) > scores.shape[0]  # the pixels tell their place
    return scores


@pytest.mark.parametrize("block_tiles", [1, 3, 5, 64])
@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("batch_size", [1, 7, 33])
def test_scores_do_not_depend_on_block_threads_or_batch(
    slide: ArraySlide, card: Card, reference: np.ndarray, block_tiles: int, threads: int, batch_size: int
) -> None:
    plan = _plan(slide, card, block_tiles=block_tiles, threads=threads, batch_size=batch_size)
    np.testing.assert_array_equal(_run(plan, threads=threads), reference)


@pytest.mark.parametrize("block_tiles", [2, 7])
@pytest.mark.parametrize("overlap", [0.0, 0.3, 0.75])
def test_the_lazy_map_is_the_finished_map(slide: ArraySlide, card: Card, block_tiles: int, overlap: float) -> None:
    from wsiengine.truth import Truth

    plan = _plan(slide, card, block_tiles=block_tiles, overlap=overlap)
    lazy = plan.to_dask()
    assert isinstance(lazy, dask.array.Array)
    assert lazy.dtype == np.uint8
    whole = Truth.of(plan, {"scores": _run(plan)}, None).map()
    np.testing.assert_array_equal(lazy.compute(), whole)
    part = np.s_[3:40, 11:60]
    np.testing.assert_array_equal(lazy[part].compute(), whole[part])
    assert (whole > 0).all()


def test_infer_and_the_lazy_map_are_made_of_the_same_block_function(
    slide: ArraySlide, card: Card, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[Box] = []

    def spy(job: object, block: object) -> BlockScores:
        seen.append(block.tiles)  # type: ignore[attr-defined]
        return score_block(job, block)  # type: ignore[arg-type]

    monkeypatch.setattr(graph, "score_block", spy)
    plan = _plan(slide, card, block_tiles=4)
    blocks = [block.tiles for block in plan.blocks()]
    plan.to_dask().compute(scheduler="sync")
    assert sorted(seen) == blocks
    seen.clear()
    _run(plan, threads=1)
    assert seen == blocks  # row-major


def test_nothing_is_read_before_it_is_computed(card: Card) -> None:
    slide = ArraySlide(position_pixels(HEIGHT, WIDTH), 0.7)
    plan = _plan(slide, card, block_tiles=2)
    before = len(slide.reads)
    lazy = plan.to_dask()
    assert len(slide.reads) == before
    lazy[:4, :4].compute()
    assert 0 < len(slide.reads) - before < plan.block_count


def test_a_cluster_gives_the_same_scores(card: Card, tmp_path: Path) -> None:
    from distributed import Client, LocalCluster

    from tests.mosaics import position_slide
    from wsiengine.geometry import Size

    position_slide(tmp_path / "slide.tiff", Size(HEIGHT, WIDTH), 0.7)
    with (
        LocalCluster(n_workers=2, threads_per_worker=1, processes=True, dashboard_address=":0") as cluster,
        Client(cluster) as client,
    ):
        plan = wsiengine.plan(tmp_path / "slide.tiff", str(card.folder), tissue="none", block_tiles=3)
        scores = _run(plan, client=client)
        np.testing.assert_array_equal(scores, _run(plan))
        assert not np.isnan(scores).any()
        lazy = plan.to_dask()
        np.testing.assert_array_equal(client.compute(lazy).result(), lazy.compute(scheduler="threads"))


def test_a_failing_block_stops_the_run_with_its_own_error(slide: ArraySlide, card: Card) -> None:
    from wsiengine.errors import UnreadableSlide

    class Broken(ArraySlide):
        def read(self, box_px: Box, mpp: Mpp) -> np.ndarray:
            raise UnreadableSlide("tile 7 is damaged")

    plan = _plan(Broken(position_pixels(300, 300), 1.0), card)
    with pytest.raises(UnreadableSlide, match="tile 7"):
        _run(plan)


def test_pixels_of_a_slide_as_a_lazy_array(slide: ArraySlide) -> None:
    lazy = graph.pixel_array(slide, 1.3, chunk_px=100)
    size = lazy.shape
    assert size == (int(np.ceil(HEIGHT * 0.7 / 1.3)), int(np.ceil(WIDTH * 0.7 / 1.3)), 3)
    np.testing.assert_array_equal(lazy.compute(), slide.read(Box(0, 0, *size[:2]), Mpp.square(1.3)))


def test_grades_and_gate_reach_the_map(slide: ArraySlide, card: Card, reference: np.ndarray) -> None:
    plan = _plan(slide, card)
    probabilities = tile_probabilities(reference, plan.layout)
    assert probabilities.shape[-1] == len(plan.layout.channels) == 4
    np.testing.assert_allclose(probabilities[..., :3].sum(axis=-1), 1, rtol=1e-5)


def test_pixels_of_one_file_at_two_resolutions_are_two_arrays() -> None:
    """Dask holds arrays of one name to be equal: a wrong µm/px, corrected, must not get the old pixels back."""
    pixels = position_pixels(HEIGHT, WIDTH)
    coarse, fine = (graph.pixel_array(ArraySlide(pixels, mpp), 1.4) for mpp in (0.7, 0.35))
    assert coarse.name != fine.name
    assert graph.pixel_array(ArraySlide(pixels, 0.7), 1.4).name == coarse.name
