"""Several slides in one call: the same bytes as one by one, no gap between two, each its own errors."""

import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import CancelledError
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import wsiengine
from tests import planted_slides as planted
from tests.fakes import ArraySlide, position_pixels
from tests.faults.holding import hold
from tests.faults.runs import contents
from tests.models.tiny import tiny
from wsiengine import graph, inference
from wsiengine.errors import MemoryLimitError, PlanError, SlideNotFound
from wsiengine.events import Event, InTurn
from wsiengine.footprint import finding_bytes, held_bytes
from wsiengine.geometry import Box, Mpp, Size
from wsiengine.identifying import Request, identify
from wsiengine.inference import infer
from wsiengine.isolation import Task, run_isolated
from wsiengine.job import score_block
from wsiengine.models.runtime import Runtime
from wsiengine.place import Place
from wsiengine.planning import make_plan
from wsiengine.preparing import prepare
from wsiengine.series import infer_many
from wsiengine.workers import BETWEEN, Scoring, Workers, nothing_told

PATIENCE_S = 60.0


@pytest.fixture(scope="module")
def slides(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Three of different size and content."""
    folder = tmp_path_factory.mktemp("slides")
    sizes = (Size(701, 911), Size(530, 420), Size(640, 1300))
    return [
        planted.write(folder / f"s{k}.svs", planted.paint(size, [(planted.A, Box(90, 90 + 9 * k, 300, 400))], seed=k))
        for k, size in enumerate(sizes)
    ]


class Heard:
    """A listener that remembers, and that others can wait for."""

    def __init__(self) -> None:
        self.events: list[tuple[int, str]] = []
        self._changed = threading.Condition()

    def __call__(self, number: int, event: Event) -> None:
        kind = "scored" if event.kind == "progress" and event.data["done"] else event.kind
        with self._changed:
            self.events.append((number, kind))
            self._changed.notify_all()

    def wait_for(self, number: int, kind: str) -> None:
        with self._changed:
            assert self._changed.wait_for(lambda: (number, kind) in self.events, PATIENCE_S), f"no {kind} of {number}"

    def index(self, number: int, kind: str) -> int:
        return self.events.index((number, kind))


def _many(slides: list[Path], folder: Path, **how: Any) -> list[Any]:
    folders = [folder / f"out{k}" for k in range(len(slides))]
    return list(infer_many(slides, "planted", folders, threads=2, tissue="none", block_tiles=2, **how))


def test_together_they_give_the_bytes_of_each_alone(slides: list[Path], tmp_path: Path) -> None:
    results = _many(slides, tmp_path)
    for k, slide in enumerate(slides):
        alone = infer(slide, "planted", tmp_path / f"alone{k}", threads=1, tissue="none")
        assert contents(tmp_path / f"out{k}") == contents(alone.folder)
        assert results[k].folder == tmp_path / f"out{k}"
    again = _many(slides, tmp_path)
    assert [found.summary for found in again] == [found.summary for found in results]


def test_workers_go_on_while_a_slide_is_finished(
    slides: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first slide's map waits for the second one's first block: alone it would wait for ever."""
    heard = Heard()
    finish = inference._finish

    def late(who: Any, *rest: Any) -> None:
        if who[0].slide.path == str(slides[0]):
            heard.wait_for(1, "scored")
        finish(who, *rest)

    monkeypatch.setattr(inference, "_finish", late)
    results = _many(slides, tmp_path, listener=heard)
    assert heard.index(1, "scored") < heard.index(0, "result")
    assert heard.index(0, "result") < heard.index(2, "start")  # at most two at once
    assert results[1].run["timing"]["stages_s"][BETWEEN] >= 0
    assert BETWEEN not in results[0].run["timing"]["stages_s"]


def test_the_next_slide_is_planned_while_one_is_scored(
    slides: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    heard, score, count = Heard(), graph.score_block, []

    def held(job: Any, block: Any) -> Any:
        if job.slide.path == str(slides[0]):
            count.append(block)
            if len(count) > 2:
                heard.wait_for(1, "plan")
        return score(job, block)

    monkeypatch.setattr(graph, "score_block", held)
    assert not any(isinstance(found, Exception) for found in _many(slides[:2], tmp_path, listener=heard))
    assert len(count) > 3
    last = max(k for k, event in enumerate(heard.events) if event == (0, "scored"))
    assert heard.index(0, "scored") < heard.index(1, "plan") < last


def test_a_client_is_refused_and_none_is_none(slides: list[Path], tmp_path: Path) -> None:
    with pytest.raises(PlanError, match="one slide at a time"):
        list(infer_many(slides, "planted", [tmp_path / slide.stem for slide in slides], client=object()))
    (result, *_) = infer_many(slides[:1], "planted", [tmp_path / "one"], client=None)
    assert isinstance(result, wsiengine.Result)


def test_an_error_belongs_to_its_slide(slides: list[Path], tmp_path: Path) -> None:
    missing = tmp_path / "nothing.svs"
    found = _many([slides[0], missing, slides[1]], tmp_path)
    assert isinstance(found[1], SlideNotFound)
    assert [type(one).__name__ for one in found] == ["Result", "SlideNotFound", "Result"]
    first = _many([missing, slides[1]], tmp_path / "b")
    assert isinstance(first[0], SlideNotFound)
    assert contents(tmp_path / "b" / "out1") == contents(tmp_path / "out2")


def test_whoever_does_not_listen_any_more_stops_all(slides: list[Path], tmp_path: Path) -> None:
    def gone(number: int, event: Event) -> None:
        if number == 1 and event.kind == "plan":
            raise BrokenPipeError

    with pytest.raises(BrokenPipeError):
        _many(slides, tmp_path, listener=gone)
    assert not (tmp_path / "out2" / "run.json").exists()
    resumed = _many(slides, tmp_path)
    assert all(isinstance(found, wsiengine.Result) for found in resumed)


def test_results_that_nobody_takes_end_the_call(slides: list[Path], tmp_path: Path) -> None:
    before = threading.active_count()
    results = infer_many(slides, "planted", [tmp_path / f"o{k}" for k in range(3)], tissue="none", threads=2)
    next(results)
    results.close()
    assert threading.active_count() <= before
    assert not (tmp_path / "o2").exists()
    with pytest.raises(ValueError, match="3 slides need as many folders, not 1"):
        next(infer_many(slides, "planted", [tmp_path]))


# --- telling -------------------------------------------------------------------------------------


def test_events_come_as_if_slides_ran_one_after_the_other() -> None:
    seen: list[str] = []
    shown = InTurn(lambda event: seen.append(str(event.data["text"])))

    def hear(number: int, kind: str, text: str) -> None:
        shown(number, Event(kind, {"text": text}))

    hear(0, "start", "0 start")
    hear(1, "start", "1 start")
    hear(1, "progress", "1 at 10")
    hear(0, "progress", "0 at 10")
    hear(1, "warning", "1 warning")
    hear(1, "progress", "1 at 20")
    hear(0, "progress", "0 at 20")
    shown.next()
    hear(1, "progress", "1 at 30")
    hear(2, "start", "2 start")
    shown.next()
    first = ["0 start", "0 at 10", "0 at 20"]
    assert seen == [*first, "1 start", "1 warning", "1 at 20", "1 at 30", "2 start"]


def test_of_two_slides_in_a_hanging_process_the_innocent_one_is_finished() -> None:
    notes: list[str] = []
    found = run_isolated(
        ["good", "bad"],
        Task(hold, None, patience_s=5.0),
        lambda slide, error: [False, error.message],
        lambda slide, text: notes.append(slide),
    )
    assert found == [[True, "fine"], [False, "There was no progress for 5 s: the slide was given up."]]
    assert notes[:2] == ["good", "bad"]


# --- memory --------------------------------------------------------------------------------------


def test_a_plan_counts_the_slide_before(slides: list[Path]) -> None:
    request = Request(slides[0], "planted", tissue="none", threads=2)
    alone = prepare(identify(request)).plan
    beside = prepare(identify(replace(request, beside_bytes=5 << 20))).plan
    assert beside.peak_bytes == alone.peak_bytes + (5 << 20)
    assert held_bytes(alone) < alone.peak_bytes
    with pytest.raises(MemoryLimitError):
        make_plan(replace(beside, options=replace(beside.options, memory_limit_bytes=alone.peak_bytes)))


@pytest.mark.parametrize("refusing", ["finding the tissue", "the plan"])
def test_what_does_not_fit_beside_a_slide_comes_after_it(slides: list[Path], refusing: str) -> None:
    subject = identify(Request(slides[1], "planted", tissue="none"))
    before = Place()
    plan = prepare(identify(Request(slides[0], "planted", tissue="none"))).plan
    finding = finding_bytes(subject.grid.lattice, plan.scratch)
    limit = plan.peak_bytes + finding - (refusing == "finding the tissue")
    before.plan = replace(plan, options=replace(plan.options, memory_limit_bytes=limit))
    asked: list[int] = []

    def make(subject: Any) -> Any:
        asked.append(subject.request.beside_bytes)
        if subject.request.beside_bytes:
            raise MemoryLimitError("too much")
        assert before.ended.is_set()
        return prepare(subject)

    threading.Timer(0.3, before.end).start()
    Place(None, before).prepare(subject, make)
    assert asked == ([0] if refusing == "finding the tissue" else [held_bytes(plan), 0])


def test_beside_a_slide_no_reader_is_given_up(slides: list[Path]) -> None:
    """The two share their readers: the second has as many as the first, or comes after it."""
    first = prepare(identify(Request(slides[0], "planted", tissue="none", readers=2))).plan
    before = Place()
    before.plan = replace(first, options=replace(first.options, memory_limit_bytes=1 << 40))
    request = Request(slides[1], "planted", tissue="none", readers=4)
    assert Place(None, before).prepare(identify(request), prepare).plan.options.readers == 2
    needed = prepare(identify(replace(request, readers=1))).plan.peak_bytes
    with pytest.raises(MemoryLimitError):
        prepare(identify(replace(request, memory_limit_bytes=needed + 1, beside_bytes=1)))
    threading.Timer(0.3, before.end).start()
    alone = Place(None, before).prepare(identify(replace(request, memory_limit_bytes=needed)), prepare)
    assert before.ended.is_set()
    assert alone.plan.options.readers == 1


# --- workers -------------------------------------------------------------------------------------


class _Done:
    seconds: dict[str, float] = {}  # noqa: RUF012

    def __init__(self, block: int) -> None:
        self.block = block


def _scoring(score: Callable[[Any], Any], blocks: int, **how: Any) -> Scoring:
    from contextlib import nullcontext

    return Scoring(score, iter(range(blocks)), nullcontext, nothing_told, **how)  # type: ignore[arg-type]


def test_blocks_that_went_well_come_before_the_error() -> None:
    going = threading.Barrier(2)

    def score(block: int) -> _Done:
        if block < 2:
            going.wait(PATIENCE_S)
        if block == 0:
            raise RuntimeError("block 0")
        return _Done(block)

    seen: list[int] = []
    with Workers(2) as workers, pytest.raises(RuntimeError, match="block 0"):
        workers.run(_scoring(score, 100), lambda results: seen.extend(result.block for result in results))
    assert 1 in seen
    assert len(seen) < 100


def test_what_ends_the_run_lets_blocks_under_way_be_kept() -> None:
    going, seen = threading.Barrier(2), []

    def score(block: int) -> _Done:
        if block < 2:
            going.wait(PATIENCE_S)
        return _Done(block)

    def done(results: Sequence[_Done]) -> None:
        first = not seen
        seen.extend(result.block for result in results)
        if first:
            raise KeyboardInterrupt

    with Workers(2) as workers:
        with pytest.raises(KeyboardInterrupt):
            workers.run(_scoring(score, 100), done)
        assert {0, 1} <= set(seen)
        assert len(seen) < 10
        again = _scoring(_Done, 3)  # the threads are still there
        workers.run(again, lambda results: seen.extend(-result.block for result in results))
    assert -2 in seen


def test_stopped_workers_do_not_look_finished() -> None:
    workers, release = Workers(1), threading.Event()

    def score(block: int) -> _Done:
        release.set()
        return _Done(block)

    with workers:
        threading.Thread(target=lambda: release.wait(PATIENCE_S) and workers.__exit__(None, None, None)).start()
        with pytest.raises(CancelledError):
            workers.run(_scoring(score, 10**9), lambda results: None)


def test_stopped_workers_do_not_grow() -> None:
    with Workers(1) as workers:
        pass
    workers.grow(2)
    with pytest.raises(CancelledError):
        workers.run(_scoring(_Done, 3), lambda results: None)


def test_who_records_slowly_is_not_run_away_from() -> None:
    begun: list[int] = []

    def score(block: int) -> _Done:
        begun.append(block)
        return _Done(block)

    ahead: list[int] = []
    recorded = 0

    def record(results: Sequence[_Done]) -> None:
        nonlocal recorded
        time.sleep(0.01)
        ahead.append(len(begun) - recorded)
        recorded += len(results)

    with Workers(2) as workers:
        workers.run(_scoring(score, 50), record)
    assert recorded == 50
    assert sorted(begun) == list(range(50))
    assert max(ahead) <= 2 * 2 + 1


def test_batches_are_filled_across_slides(tmp_path: Path) -> None:
    """Two slides of one block each, as on a GPU: their tiles share a batch, and get the scores that they get alone."""
    card = tiny(tmp_path / "tiny", gate=True)
    both = threading.Barrier(2)

    class Together(ArraySlide):
        def read(self, box_px: Box, mpp: Mpp) -> np.ndarray:
            if threading.current_thread().name.startswith("wsiengine"):
                both.wait(PATIENCE_S)
            return super().read(box_px, mpp)

    sizes = ((300, 200), (260, 330))
    plans = [
        wsiengine.plan(Together(position_pixels(*s), 0.7), str(card.folder), tissue="none", block_tiles=64)
        for s in sizes
    ]
    total = sum(plan.tile_count for plan in plans)
    runtime = Runtime(card, device="cpu", batch_size=total, batched=True)
    found: list[np.ndarray] = []

    def run(plan: Any, workers: Workers) -> None:
        assert plan.job
        job = replace(plan.job, runtime=runtime)
        graph.run_blocks(
            job,
            plan.blocks(),
            lambda blocks: found.extend(b.scores for b in blocks),
            threads=2,
            workers=workers,
            spent=nothing_told,
        )

    with Workers(2) as workers:
        threads = [threading.Thread(target=run, args=(plan, workers)) for plan in plans]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(PATIENCE_S)
    batches = runtime.batches()
    assert batches is not None
    assert (batches["batches"], batches["tiles"]) == (1, total)
    for size in sizes:
        alone = wsiengine.plan(ArraySlide(position_pixels(*size), 0.7), str(card.folder), tissue="none", block_tiles=64)
        assert alone.job
        block = score_block(replace(alone.job, runtime=runtime), next(alone.blocks()))
        [scores] = [scores for scores in found if scores.shape == block.scores.shape]
        np.testing.assert_array_equal(scores, block.scores)
