"""Threads that share pieces: each is done once, whoever does it, and what fails belongs to whose work it is."""

import threading
import time

import pytest

from wsiengine.models.team import Team


def test_every_item_is_done_once_by_whoever_is_there() -> None:
    team, done, doers = Team(), [], set()
    begun = threading.Event()

    def helper() -> None:
        with team.working():
            begun.wait(5)  # its own last block

    def do(item: int) -> None:
        begun.set()
        time.sleep(0.005)
        doers.add(threading.get_ident())
        done.append(item)

    threads = [threading.Thread(target=helper) for _ in range(3)]
    for thread in threads:
        thread.start()
    with team.busy():
        team.each(do, range(40))
        assert sorted(done) == list(range(40))
        team.each(do, range(40, 80))  # helpers have stayed
    for thread in threads:
        thread.join(5)
        assert not thread.is_alive()
    assert sorted(done) == list(range(80))
    assert len(doers) == 4


def test_nobody_stays_where_no_work_is_under_way() -> None:
    team = Team()
    with team.working():
        pass
    team.each(lambda item: None, [])


def test_a_failure_is_raised_where_the_work_is_from_and_ends_it() -> None:
    team, begun, helped = Team(), threading.Event(), []

    def helper() -> None:
        with team.working():
            begun.wait(5)
        helped.append(True)

    def do(item: int) -> None:
        begun.set()
        time.sleep(0.005)
        if item == 3:
            raise ValueError("piece 3")
        done.append(item)

    done: list[int] = []
    thread = threading.Thread(target=helper)
    thread.start()
    with pytest.raises(ValueError, match="piece 3"), team.busy():
        team.each(do, range(1000))
    thread.join(5)
    assert helped == [True]
    assert len(done) < 10
