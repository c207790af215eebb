"""Shares without file locks: a heartbeat decides who may write."""

import errno
import fcntl
import json
import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest

from tests.faults.runs import contents, fork, kill, run, wait
from wsiengine import heartbeat, output
from wsiengine.errors import OutputError, OutputInUse
from wsiengine.events import Event
from wsiengine.geometry import Box
from wsiengine.heartbeat import Heartbeat
from wsiengine.journal import FolderLock, in_words, read_journal
from wsiengine.output import Workspace

BEAT_S = 0.25  # four of them are more than a loaded machine keeps a thread waiting


@pytest.fixture(autouse=True)
def _a_share_without_locks(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", refuse)
    monkeypatch.setattr(heartbeat, "BEAT_S", BEAT_S)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    (tmp_path / "out" / ".work").mkdir(parents=True)
    return tmp_path / "out" / ".work" / "heartbeat"


@pytest.fixture
def held(path: Path) -> Iterator[Heartbeat]:
    lock = Heartbeat(path)
    yield lock
    lock.release()


def test_a_run_is_as_ever_and_leaves_nothing(slide: Path, wanted: dict[str, bytes], tmp_path: Path) -> None:
    run(slide, tmp_path / "out")
    assert contents(tmp_path / "out") == wanted
    assert not (tmp_path / "out" / ".work").exists()


def test_who_lives_is_not_disturbed(held: Heartbeat, path: Path) -> None:
    started = time.monotonic()
    with pytest.raises(OutputInUse, match="Another run is writing to"):
        Heartbeat(path)
    assert time.monotonic() - started < 4 * BEAT_S  # a beat tells at once
    held.check()


def test_who_let_go_need_not_be_waited_for(path: Path) -> None:
    Heartbeat(path).release()
    assert list(path.parent.iterdir()) == []
    started = time.monotonic()
    Heartbeat(path).release()
    assert time.monotonic() - started < 2 * BEAT_S


def test_a_dead_run_is_taken_over_after_its_beats_were_missed(
    slide: Path, wanted: dict[str, bytes], tmp_path: Path
) -> None:
    out, ready = tmp_path / "out", tmp_path / "ready"

    def first() -> None:
        def listener(event: Event) -> None:
            if event.kind == "progress" and event.data["done"] > 30:
                ready.touch()
                time.sleep(60)

        run(slide, out, listener=listener)

    pid = fork(first)
    until = time.monotonic() + 30
    while not ready.exists():
        assert time.monotonic() < until
        time.sleep(0.01)
    with pytest.raises(OutputInUse):
        run(slide, out)
    kill(pid)
    started = time.monotonic()
    run(slide, out)
    assert time.monotonic() - started > 4 * BEAT_S
    assert contents(out) == wanted
    assert not (out / ".work").exists()


def test_a_run_that_slept_finds_its_place_taken(slide: Path, wanted: dict[str, bytes], tmp_path: Path) -> None:
    """Stopped for longer than the beats that decide; when it wakes it must not write beside the other."""
    out, ready = tmp_path / "out", tmp_path / "ready"

    def first() -> None:
        def listener(event: Event) -> None:
            if event.kind == "progress" and event.data["done"] > 30:
                ready.touch()
                time.sleep(0.05)

        try:
            run(slide, out, listener=listener, threads=1)
        except OutputInUse as error:
            os._exit(7 if "was taken over by another run" in error.message else 8)

    pid = fork(first)
    until = time.monotonic() + 30
    while not ready.exists():
        assert time.monotonic() < until
        time.sleep(0.01)
    os.kill(pid, signal.SIGSTOP)
    woken = []

    def wake(event: Event) -> None:
        if event.kind == "progress" and event.data["done"] > 90 and not woken:
            woken.append(True)
            os.kill(pid, signal.SIGCONT)
            time.sleep(2 * BEAT_S)

    run(slide, out, listener=wake)
    assert woken
    assert wait(pid) == 7
    assert contents(out) == wanted


def test_of_many_that_find_a_dead_one_only_one_goes_on(path: Path) -> None:
    path.write_text("somebody 5\n")

    def work() -> None:
        try:
            lock = Heartbeat(path)
        except OutputInUse:
            os._exit(7)
        time.sleep(8 * BEAT_S)
        lock.check()

    codes = [wait(pid) for pid in [fork(work) for _ in range(6)]]
    assert sorted(codes) == [0, 7, 7, 7, 7, 7]


def test_two_that_saw_it_dead_at_the_same_moment(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both replace the file; who was the first to do so finds the other's."""
    path.write_text("somebody 5\n")
    both = threading.Barrier(2)

    def dead(_: Heartbeat) -> bool:
        both.wait()
        return True

    monkeypatch.setattr(Heartbeat, "_watch", dead)
    locks: list[Heartbeat] = []
    refused: list[OutputInUse] = []

    def take() -> None:
        try:
            locks.append(Heartbeat(path))
        except OutputInUse as error:
            refused.append(error)

    threads = [threading.Thread(target=take) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert (len(locks), len(refused)) == (1, 1)
    locks[0].check()
    locks[0].release()


def test_no_clock_is_asked_for_the_time_of_day(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Set back, set forward, or different on each machine: nothing here may look."""

    def forbidden() -> float:
        raise AssertionError("the time of day was asked for")

    monkeypatch.setattr(time, "time", forbidden)
    path.write_text("somebody 5\n")
    os.utime(path, (2**31, 2**31))  # in the future
    lock = Heartbeat(path)
    lock.check()
    lock.release()


def test_a_share_that_is_gone_for_a_while(held: Heartbeat, path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    held.check()
    original, opening = Path.read_text, os.open
    gone = threading.Event()

    def read_text(self: Path) -> str:
        if gone.is_set():
            raise OSError(errno.EIO, "gone")
        return original(self)

    def opened(name: object, *how: object) -> int:
        if gone.is_set() and name == path:
            raise OSError(errno.EIO, "gone")
        return opening(name, *how)  # type: ignore[arg-type]

    monkeypatch.setattr(Path, "read_text", read_text)
    monkeypatch.setattr(os, "open", opened)
    gone.set()
    time.sleep(6 * BEAT_S)
    gone.clear()
    held.check()  # back before anything was to be written, and still ours
    gone.set()
    time.sleep(6 * BEAT_S)
    with pytest.raises(OutputInUse, match="was taken over by another run"):
        held.check()  # nobody can say whether it was: it must not write


def test_a_beat_that_hung_takes_nothing_back(held: Heartbeat, path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A share that hangs does so in a beat: it is carried out when the share is back, and another has the lock."""
    hung, back, writing = threading.Event(), threading.Event(), os.pwrite

    def pwrite(*arguments: object) -> int:
        if threading.current_thread() is held._thread:
            hung.set()
            assert back.wait(30)
        return writing(*arguments)  # type: ignore[arg-type]

    replacing = Heartbeat._replace

    def replace(self: Heartbeat) -> None:
        if threading.current_thread() is held._thread:
            hung.set()
            assert back.wait(30)
        replacing(self)

    monkeypatch.setattr(os, "pwrite", pwrite)
    monkeypatch.setattr(Heartbeat, "_replace", replace)
    assert hung.wait(30)
    other = Heartbeat(path)
    assert other.took_over
    back.set()
    for _ in range(8):
        time.sleep(BEAT_S / 2)
        other.check()
        with pytest.raises(OutputInUse):
            held.check()
    assert path.read_text().startswith(other.owner)
    other.release()
    assert not path.exists()


# --- the folder of a run that slept --------------------------------------------------------------

IDENTITY = {"slide": "abc", "parameters": {"overlap": 0.3}}
NAMES = ("annotations.geojson", "tiles.geojson", "run.json")
FOUND = np.ones((1, 2, 1), np.float32)


def _asleep(out: Path) -> Workspace:
    """A run that has the folder, and stops giving signs of life."""
    space = Workspace(out, IDENTITY)
    space.__enter__()
    assert space._lock
    assert space._lock._heartbeat
    space._lock._heartbeat._over.set()
    return space


def _drafted(space: Workspace, text: str) -> None:
    folder = space.draft()
    for name in NAMES:
        (folder / name).write_text(json.dumps({"identity": IDENTITY, "of": text}))


def _texts(out: Path) -> dict[str, str]:
    return {path.name: json.loads(path.read_text())["of"] for path in out.glob("*.*json")}


def test_what_a_sleeping_run_had_begun_to_record_does_no_harm(tmp_path: Path) -> None:
    """Its write was past every check: it must not come to lie over what the other has recorded since."""
    slept = _asleep(tmp_path)
    journal, _ = slept.journal()
    journal.add_tiles(Box(0, 0, 1, 2), FOUND)
    with Workspace(tmp_path, IDENTITY) as woke, (after := woke.journal())[0] as other:
        assert len(after[1].tiles) == 1
        other.add_tiles(Box(1, 0, 2, 2), 2 * FOUND)
        journal.guard = lambda: None
        journal.add_tiles(Box(2, 0, 3, 2), 3 * FOUND)
        other.add_tiles(Box(3, 0, 4, 2), 4 * FOUND)
        assert [values[0, 0, 0] for _, values in read_journal(woke.work / "journal").tiles] == [1, 2, 4]
    journal.close()
    slept.__exit__(None, None, None)


def test_who_let_go_leaves_its_journal_in_place(tmp_path: Path) -> None:
    """A copy is made only where somebody may still write."""
    inodes = set()
    for k in range(2):
        with Workspace(tmp_path, IDENTITY) as space, space.journal()[0] as journal:
            inodes.add((space.work / "journal").stat().st_ino)
            journal.add_tiles(Box(k, 0, k + 1, 2), FOUND)
    assert len(inodes) == 1


@pytest.mark.parametrize("what", ["draft", "publish", "forget", "leave"])
def test_a_run_that_slept_changes_nothing_of_the_others(tmp_path: Path, what: str) -> None:
    slept = _asleep(tmp_path)
    slept.journal()[0].close()
    _drafted(slept, "slept")
    with Workspace(tmp_path, IDENTITY) as woke:
        journal = woke.journal()[0]
        _drafted(woke, "woke")
        if what != "leave":
            with pytest.raises(OutputInUse):
                getattr(slept, what)()
        else:
            (woke.work / "journal").unlink()  # as while it publishes
        slept.__exit__(None, None, None)
        assert _texts(woke.results) == dict.fromkeys(NAMES, "woke")
        assert _texts(tmp_path) == {}
        journal.close()
        if what != "leave":
            woke.publish()
            assert set(_texts(tmp_path).values()) == {"woke"}
            assert not woke.work.exists()


@pytest.mark.parametrize(
    ("hanging", "moved"),
    [
        ("sync_tree", []),
        ("_remove", ["annotations.geojson"]),
        ("sync_folder", ["annotations.geojson", "tiles.geojson"]),
    ],
)
def test_a_run_that_slept_while_it_published(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, hanging: str, moved: list[str]
) -> None:
    """In a call of the system, which is where a share hangs: what comes after it is not done."""
    slept = _asleep(tmp_path)
    slept.journal()[0].close()
    _drafted(slept, "slept")
    woke = Workspace(tmp_path, IDENTITY)
    original = getattr(output, hanging)

    def hang(path: Path) -> None:
        monkeypatch.setattr(output, hanging, original)
        original(path)
        woke.__enter__()
        woke.journal()[0].close()
        (tmp_path / "profile.png").touch()

    monkeypatch.setattr(output, hanging, hang)
    with pytest.raises(OutputInUse):
        slept.publish()
    assert sorted(_texts(tmp_path)) == moved
    assert (tmp_path / "profile.png").exists()
    slept.__exit__(None, None, None)
    _drafted(woke, "woke")
    woke.publish()
    woke.__exit__(None, None, None)
    assert _texts(tmp_path) == dict.fromkeys(NAMES, "woke")


def test_drafts_that_a_run_takes_away_as_it_wakes_keep_nobody_from_starting_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    slept = _asleep(tmp_path)
    slept.journal()[0].close()
    _drafted(slept, "slept")
    removing, drafts = output.shutil.rmtree, slept.results

    def rmtree(path: Path, ignore_errors: bool = False) -> None:
        if path == drafts:
            (drafts / "run.json").unlink(missing_ok=True)
            removing(drafts, ignore_errors=True)
        removing(path, ignore_errors=ignore_errors)

    monkeypatch.setattr(output.shutil, "rmtree", rmtree)
    with Workspace(tmp_path, IDENTITY, overwrite=True) as woke:
        assert not drafts.exists()
        assert not (woke.work / "journal").exists()
    slept.__exit__(None, None, None)


def test_who_begins_before_another_has_let_go_keeps_the_folder(tmp_path: Path) -> None:
    with Workspace(tmp_path, IDENTITY) as first:
        first.journal()[0].close()
        _drafted(first, "first")
        first.publish()
        second = Workspace(tmp_path, IDENTITY, overwrite=True)
        second.__enter__()
    assert (second.work / "lock").exists()
    second._check()
    second.__exit__(None, None, None)
    assert not second.work.exists()


def test_what_fails_as_another_has_the_folder_says_so(tmp_path: Path) -> None:
    slept = _asleep(tmp_path)
    slept.journal()[0].close()
    folder = slept.draft()
    with Workspace(tmp_path, IDENTITY) as woke:
        woke.journal()[0].close()
        woke.draft()
        with pytest.raises(OutputInUse, match="was taken over"), slept_again(slept), in_words(tmp_path):
            (folder / "run.json").write_text("{}")


@contextmanager
def slept_again(space: Workspace) -> Iterator[None]:
    """The rest of a run that has entered its workspace already."""
    try:
        yield
    except BaseException as error:
        space.__exit__(type(error), error, None)
        raise


@pytest.mark.parametrize("number", [errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS])
def test_other_words_for_no_locks(path: Path, monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    def refuse(*_: object) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "flock", refuse)
    with FolderLock(path.with_name("lock")) as lock:
        assert path.exists()
        lock.check()
    assert not path.exists()


def test_other_faults_of_the_lock_are_errors(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise OSError(errno.EIO, "broken")

    monkeypatch.setattr(fcntl, "flock", refuse)
    (tmp_path / "out").mkdir()
    with pytest.raises(OutputError, match="broken"):
        FolderLock(tmp_path / "out" / "lock")
