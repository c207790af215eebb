"""Batches filled across callers: every tile gets its own scores, batches are full, errors reach their own callers."""

import threading
import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from wsiengine.models.feeding import AHEAD, UNDER_WAY, Feeder


class FakeSlot:
    """Scores that tell which tile they are of; notes how many rows were new."""

    def __init__(self, size: int, log: list[np.ndarray], delay_s: float = 0.0, fail: int | None = None) -> None:
        self.batch = np.full((size, 2), -1, np.int64)
        self._log, self._delay_s, self._fail = log, delay_s, fail

    def run(self) -> np.ndarray:
        self._log.append(self.batch.copy())
        time.sleep(self._delay_s)
        if self._fail is not None and (self.batch[:, 0] == self._fail).any():
            raise ValueError("poisoned")
        return (self.batch * (1, 3)).astype(np.float32)


def feeder(size: int, sessions: int = 1, **how: object) -> tuple[Feeder, list[np.ndarray]]:
    log: list[np.ndarray] = []
    slots = [[FakeSlot(size, log, **how) for _ in range(AHEAD)] for _ in range(sessions)]  # type: ignore[arg-type]

    def pack(pixels: np.ndarray, origins: np.ndarray, rows: np.ndarray) -> None:
        rows[:] = origins + pixels[0]

    return Feeder(slots, pack, 2), log


def run(made: Feeder, calls: list[list[int]]) -> list[list[np.ndarray]]:
    """Each list of block sizes on a thread of its own; tiles are numbered by thread and place."""
    found: list[list[np.ndarray]] = [[] for _ in calls]

    def work(index: int) -> None:
        with made.worker():
            for k, tiles in enumerate(calls[index]):
                origins = np.stack([np.arange(tiles), np.full(tiles, k)], axis=1)
                scores = made.scores(np.array([[1000 * index, 0]]), origins)
                np.testing.assert_array_equal(scores, (origins + (1000 * index, 0)) * (1, 3))
                found[index].append(scores)

    threads = [threading.Thread(target=work, args=(index,), daemon=True) for index in range(len(calls))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
        assert not thread.is_alive(), "a caller waits for ever"
    return found


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 9), st.integers(1, 3), st.lists(st.lists(st.integers(0, 25), max_size=5), min_size=1, max_size=4))
def test_every_caller_gets_its_own_scores(size: int, sessions: int, calls: list[list[int]]) -> None:
    made, log = feeder(size, sessions)
    found = run(made, calls)
    assert [[len(scores) for scores in own] for own in found] == calls
    facts = made.facts()
    assert facts["tiles"] == sum(map(sum, calls))
    assert facts["batches"] == len(log)
    assert facts["rows"] == size * len(log)


def test_batches_are_filled_across_callers() -> None:
    """Blocks of 10 tiles into batches of 8: cut by block, half of the rows would be empty."""
    made, _ = feeder(8, delay_s=0.002)
    run(made, [[10] * 20] * 4)
    facts = made.facts()
    assert facts["tiles"] == 800
    assert facts["tiles"] / facts["rows"] > 0.85


def test_a_lone_caller_does_not_wait_for_others() -> None:
    made, log = feeder(64)
    assert made.scores(np.array([[0, 0]]), np.array([[3, 4]])).tolist() == [[3, 12]]
    assert len(log) == 1


def test_two_sessions_share_the_work() -> None:
    made, log = feeder(4, 2, delay_s=0.01)
    started = time.perf_counter()
    run(made, [[40], [40], [40], [40]])
    assert len(log) == 40
    assert time.perf_counter() - started < 0.01 * 40 * 0.8  # one after the other would take all of it


def test_an_error_reaches_those_whose_tiles_were_in_the_batch_and_no_others() -> None:
    made, _ = feeder(4, fail=2)
    with pytest.raises(ValueError, match="poisoned"):
        made.scores(np.array([[0, 0]]), np.stack([np.arange(3), np.zeros(3, int)], axis=1))
    assert made.scores(np.array([[100, 0]]), np.zeros((4, 2), int)).tolist() == [[100, 0]] * 4


def test_tiles_that_cannot_be_packed_keep_nobody_else_waiting() -> None:
    log: list[np.ndarray] = []

    def pack(pixels: np.ndarray, origins: np.ndarray, rows: np.ndarray) -> None:
        if pixels[0, 0] < 0:
            raise ValueError("leaves the block")
        rows[:] = origins + pixels[0]

    made = Feeder([[FakeSlot(4, log) for _ in range(AHEAD)]], pack, 2)
    found: list[list[list[float]]] = []

    def work() -> None:
        with made.worker():
            found.append(made.scores(np.array([[100, 0]]), np.zeros((1, 2), int)).tolist())

    first = threading.Thread(target=work, daemon=True)
    with made.worker():  # so that it waits for our tiles
        first.start()
        while not made._tickets:
            time.sleep(0.001)
        with pytest.raises(ValueError, match="leaves the block"):
            made.scores(np.array([[-1, 0]]), np.zeros((2, 2), int))
    first.join(20)
    assert not first.is_alive(), "a caller waits for ever"
    assert found == [[[100, 0]]]


def test_no_more_batches_are_under_way_than_the_device_has_memory_for() -> None:
    going, most, lock = 0, 0, threading.Lock()

    class Counted(FakeSlot):
        def run(self) -> np.ndarray:
            nonlocal going, most
            with lock:
                going += 1
                most = max(most, going)
            scores = super().run()
            with lock:
                going -= 1
            return scores

    log: list[np.ndarray] = []

    def pack(pixels: np.ndarray, origins: np.ndarray, rows: np.ndarray) -> None:
        rows[:] = origins + pixels[0]

    made = Feeder([[Counted(4, log, 0.005) for _ in range(AHEAD)]], pack, 2)
    run(made, [[9] * 12] * 8)
    assert 2 <= most <= UNDER_WAY


def test_a_session_is_at_work_no_longer_than_the_clock_runs() -> None:
    made, log = feeder(4, delay_s=0.01)
    started = time.perf_counter()
    run(made, [[8] * 4] * 6)
    spent = time.perf_counter() - started
    assert len(log) * 0.01 / UNDER_WAY <= made.facts()["busy_s"] <= spent
