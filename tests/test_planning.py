"""What a plan decides before anything is read, and the requests that it refuses."""

from dataclasses import replace

import pytest

import wsiengine
from tests.fakes import ArraySlide, position_pixels
from tests.models.tiny import tiny
from wsiengine import identifying
from wsiengine.errors import MemoryLimitError, PlanError
from wsiengine.finishing import Finish
from wsiengine.footprint import memory_parts
from wsiengine.geometry import Size
from wsiengine.models.card import Card
from wsiengine.planning import Plan, make_plan
from wsiengine.preparing import prepare


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
        facts = {"batch_size": batch, "on_cpu": False, "weights_bytes": lambda *_, **__: 1 << 20}
        runtime = type("OnGpu", (), facts)()
        on_gpu = replace(plan, job=replace(plan.job, runtime=runtime))
        assert make_plan(on_gpu).block_tiles == side


def test_a_cluster_counts_by_its_own_threads(plan: Plan) -> None:
    """Blocks keep all of them busy; memory is that of one process, whatever the caller's machine has."""
    alone = make_plan(replace(plan, options=replace(plan.options, threads=1)))
    for cluster, blocks_like, memory_like in (((1,) * 16, 16, 1), ((4, 4), 8, 4)):
        spread = make_plan(replace(plan, options=replace(plan.options, threads=1, cluster=cluster)))
        same = make_plan(replace(plan, options=replace(plan.options, threads=blocks_like)))
        assert spread.block_tiles == same.block_tiles < alone.block_tiles
        held = replace(same, options=replace(plan.options, threads=memory_like))
        assert spread.peak_bytes == held.peak_bytes


def test_what_does_not_fit_the_machine_is_refused_unless_the_user_says_otherwise(
    card: Card, monkeypatch: pytest.MonkeyPatch
) -> None:
    slide = ArraySlide(position_pixels(300, 400), 0.7)
    assert 1 << 28 < identifying.usable_memory_bytes() < 1 << 50
    monkeypatch.setattr(identifying, "usable_memory_bytes", lambda: 100 << 20)
    with pytest.raises(MemoryLimitError, match="the limit is 100 MiB"):
        wsiengine.plan(slide, str(card.folder), tissue="none")
    assert wsiengine.plan(slide, str(card.folder), tissue="none", memory_limit_bytes=4 << 30).tile_count


def test_processes_that_read_are_as_many_as_memory_has_room_for(card: Card) -> None:
    slide = ArraySlide(position_pixels(300, 400), 0.7)
    how = {"tissue": "none", "threads": 1, "block_tiles": 1}

    def planned(readers: int, limit: int = 1 << 40) -> Plan:
        return wsiengine.plan(slide, str(card.folder), readers=readers, memory_limit_bytes=limit, **how)

    needed = [planned(readers).peak_bytes for readers in range(5)]
    assert planned(4, needed[4]).options.readers == 4
    assert planned(4, needed[4] - 1).options.readers == 3
    assert planned(4, needed[2]).options.readers == 2
    fewest = planned(4, needed[0])
    assert (fewest.options.readers, fewest.peak_bytes) == (0, needed[0])
    with pytest.raises(MemoryLimitError, match="the limit is"):
        planned(4, needed[0] - 1)


def test_threads_that_wait_for_a_gpu_are_as_many_as_readers_need(card: Card, monkeypatch: pytest.MonkeyPatch) -> None:
    slide = ArraySlide(position_pixels(300, 400), 0.7)
    subject = identifying.identify(identifying.Request(slide, str(card.folder), tissue="none", readers=8))
    monkeypatch.setattr(subject.runtime, "on_cpu", False)
    alone = subject.threads_beside(0)
    assert (subject.threads, subject.threads_beside(4)) == (alone + 4, alone + 2)
    limit = prepare(replace(subject, request=replace(subject.request, readers=2))).plan.peak_bytes
    plan = prepare(replace(subject, request=replace(subject.request, memory_limit_bytes=limit))).plan
    assert (plan.options.readers, plan.options.threads) == (2, alone + 1)


def test_tables_of_tiles_count_where_they_are_held(plan: Plan) -> None:
    """A reader of ours leaves those of a local file where they are, whatever the size of the slide."""
    large = replace(plan.info, size_l0=Size(200_000, 250_000))
    known = {}
    for reader, path in (("direct", "s.svs"), ("direct", "https://there/s.svs"), ("openslide", "s.svs")):
        of = replace(plan, path=path, info=replace(large, reader=reader))
        known[reader, path] = memory_parts(of, 1)["the slide's tables of tiles"]
    assert known.pop(("direct", "s.svs")) == 0
    assert all(12 << 20 < held < 15 << 20 for held in known.values())


@pytest.mark.parametrize(
    ("option", "value", "words"),
    [
        ("threads", -2, "threads must be at least 0, not -2"),
        ("batch_size", 0, "batch_size must be at least 1"),
        ("readers", 1.5, "readers must be a whole number, not 1.5"),
        ("readers", 1_000_000, "readers must be at most 1,024, not 1,000,000"),
        ("block_tiles", 0, "block_tiles must be at least 1"),
        ("memory_limit_bytes", -1, "memory_limit_bytes must be at least 1"),
        ("threshold", 70.0, "between 0 and 1, not 70"),
        ("threshold", float("nan"), "between 0 and 1, not nan"),
        ("overlap", float("nan"), "below 1, not nan"),
        ("mpp", 0.3, "open already"),
    ],
)
def test_numbers_that_cannot_be_are_refused_in_python_too(card: Card, option: str, value: float, words: str) -> None:
    slide = ArraySlide(position_pixels(300, 400), 0.7)
    with pytest.raises(PlanError, match=words):
        wsiengine.plan(slide, str(card.folder), tissue="none", **{option: value})


def test_enlarging_the_slide_is_told(card: Card) -> None:
    for mpp, told in ((1.05, False), (1.3, True)):
        slide = ArraySlide(position_pixels(300, 400), mpp)
        subject = identifying.identify(identifying.Request(slide=slide, model=str(card.folder)))
        assert any("enlarged" in text for text in subject.warnings) == told


@pytest.mark.parametrize("name", ["smoothing_um", "tolerance_um", "min_area_um2"])
def test_regions_are_drawn_with_real_lengths(name: str) -> None:
    for value in (-1.0, float("nan"), float("inf")):
        with pytest.raises(PlanError, match=name):
            Finish(0.5, **{name: value})
    assert Finish(0.5, **{name: 0.0})
