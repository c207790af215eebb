"""Threads that share pieces: each is done once, whoever does it, and what fails belongs to whose work it is."""

import threading
import time

import pytest

from wsiengine.models.team import Team


def test_every_item_is_done_once_by_whoever_is_free() -> None:
    team, done, doers = Team(), [], set()

    def do(item: int) -> None:
        time.sleep(0.003)
        doers.add(threading.get_ident())
        done.append(item)

    with team.helped(4), team.busy():
        for first in (0, 40):
            team.each(do, range(first, first + 40))
            assert sorted(done) == list(range(first + 40))
    assert len(doers) == 4
    doers.clear()
    with team.busy():
        team.each(do, range(4))
    assert doers == {threading.get_ident()}


def test_no_more_are_at_work_than_were_allowed() -> None:
    """Two threads with work of their own and three allowed: one helper."""
    team, lock = Team(), threading.Lock()
    now, most = 0, 0

    def do(item: int) -> None:
        nonlocal now, most
        with lock:
            now += 1
            most = max(most, now)
        time.sleep(0.002)
        with lock:
            now -= 1

    both = threading.Barrier(2)

    def own() -> None:
        with team.busy():
            both.wait(5)
            team.each(do, range(30))

    with team.helped(3):
        threads = [threading.Thread(target=own) for _ in range(2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(5)
    assert most == 3


def test_helpers_end_with_the_last_run_that_wanted_them() -> None:
    team, before = Team(), threading.active_count()
    with team.helped(2):
        with team.helped(3):
            assert threading.active_count() == before + 2
        assert threading.active_count() == before + 2
    assert threading.active_count() == before


def test_a_failure_is_raised_where_the_work_is_from_and_ends_it() -> None:
    team, done = Team(), []

    def do(item: int) -> None:
        time.sleep(0.002)
        if item == 3:
            raise ValueError("piece 3")
        done.append(item)

    with team.helped(2), team.busy():
        with pytest.raises(ValueError, match="piece 3"):
            team.each(do, range(1000))
        assert len(done) < 10
        team.each(do, range(10, 20))
        assert sorted(done)[-10:] == list(range(10, 20))
