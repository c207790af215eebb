"""What a plan decides before anything is read, and the requests that it refuses."""

from dataclasses import replace
from pathlib import Path

import pytest

import wsiengine
from tests.fakes import ArraySlide, position_pixels
from tests.models.tiny import tiny
from wsiengine.models.card import Card
from wsiengine.planning import Plan, make_plan


@pytest.fixture(scope="module")
def card(tmp_path_factory: pytest.TempPathFactory) -> Card:
    return tiny(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def plan(card: Card) -> Plan:
    slide = ArraySlide(position_pixels(700, 900), 0.7)
    return wsiengine.plan(slide, str(card.folder), tissue="none", threads=16)


def test_threads_of_a_cpu_get_small_blocks_and_a_gpu_gets_whole_batches(plan: Plan) -> None:
    """A GPU pads every call to one shape: blocks of one tile would waste 63 places of 64."""
    assert plan.job
    assert plan.tile_count > 64
    assert plan.block_tiles == 2
    for batch, side in ((64, 8), (40, 6), (1, 2)):
        runtime = type("OnGpu", (), {"batch_size": batch, "provider": "CUDAExecutionProvider"})()
        on_gpu = replace(plan, job=replace(plan.job, runtime=runtime))
        assert make_plan(on_gpu).block_tiles == side
