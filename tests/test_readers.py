"""Processes that read for the threads of a run: the same pixels, whatever becomes of them."""

import errno
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import numpy as np
import pytest

import wsiengine
from tests import planted_slides as planted
from tests.fakes import ArraySlide, position_pixels
from wsiengine import readers as module
from wsiengine.errors import PlanError, UnreadableSlide
from wsiengine.events import Event
from wsiengine.geometry import Box, Size
from wsiengine.grid import Block
from wsiengine.inference import infer
from wsiengine.planning import Plan
from wsiengine.readers import Readers, reading
from wsiengine.truth import Truth
from wsiengine.viewing import Viewer

pytestmark = pytest.mark.skipif(not hasattr(os, "memfd_create"), reason="this system has no memory files to share")


@pytest.fixture(scope="module")
def slide(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("slides") / "s.svs"
    return planted.write(path, planted.paint(Size(1203, 1607), [(planted.A, Box(200, 300, 900, 1300))]))


@pytest.fixture(scope="module")
def readers() -> Iterator[Readers]:
    with Readers(2) as started:
        yield started


def _plan(slide: Path, **options: object) -> Plan:
    return wsiengine.plan(slide, "planted", **{"tissue": "none", "threads": 2, "block_tiles": 3, **options})


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"overlap": 0.5, "normalise": "macenko+clahe"},
        {"normalise": "tile_clahe:clip=3,grid=4"},
        {"mode": "dense"},
        {"on_bad_tile": "skip"},
    ],
)
def test_blocks_look_as_they_do_to_a_thread(slide: Path, readers: Readers, options: dict[str, object]) -> None:
    plan = _plan(slide, **options)
    assert plan.job
    viewer = plan.job.viewer
    for block in plan.blocks():
        here, _ = viewer.view(block)
        there, seconds = readers.view(viewer, block)
        np.testing.assert_array_equal(there.pixels, here.pixels)
        np.testing.assert_array_equal(there.corners_px, here.corners_px)
        assert (there.bad is None) == (here.bad is None)
        assert set(seconds) == {"read", "normalise"}


def test_a_run_with_readers_gives_the_same_results(slide: Path, tmp_path: Path) -> None:
    found = []
    for count in (0, 2):
        folder = tmp_path / str(count)
        made = infer(slide, "planted", folder, tissue="none", threads=3, block_tiles=2, readers=count)
        found.append((Truth.load(folder / "probability.zarr").scores, made.run["identity"]))
    np.testing.assert_array_equal(found[0][0], found[1][0])
    assert found[0][1] == found[1][1]


def test_threads_do_not_see_each_others_pixels(slide: Path, readers: Readers) -> None:
    plan = _plan(slide, block_tiles=1)
    assert plan.job
    viewer, blocks = plan.job.viewer, list(plan.blocks())
    expected = [viewer.view(block)[0].pixels for block in blocks]
    wrong = []

    def look(first: int) -> None:
        for k in [*range(first, len(blocks)), *range(first)]:
            pixels = readers.view(viewer, blocks[k])[0].pixels
            time.sleep(0.001)  # for another thread to overwrite them
            if not np.array_equal(pixels, expected[k]):
                wrong.append(k)

    threads = [threading.Thread(target=look, args=(7 * k,)) for k in range(5)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def _processes(readers: Readers) -> list[int]:
    """Of the first of them, its children."""
    found = Path(f"/proc/{readers._first.pid}/task/{readers._first.pid}/children")
    deadline = time.monotonic() + 90
    while time.monotonic() < deadline:
        children = [int(word) for word in found.read_text().split()]
        if len(children) == 2:
            return children
        time.sleep(0.05)
    raise AssertionError("the readers did not start")


@pytest.mark.parametrize("which", ["one", "all", "the first"])
def test_what_a_killed_reader_was_to_read_is_read_all_the_same(slide: Path, which: str) -> None:
    plan = _plan(slide)
    assert plan.job
    viewer, blocks = plan.job.viewer, list(plan.blocks())
    with Readers(2) as readers:
        children = _processes(readers)
        readers.view(viewer, blocks[0])
        victims = {"one": children[:1], "all": children, "the first": [readers._first.pid]}[which]
        for victim in victims:
            os.kill(victim, signal.SIGKILL)
        for block in blocks:
            np.testing.assert_array_equal(readers.view(viewer, block)[0].pixels, viewer.view(block)[0].pixels)


def test_an_unreadable_place_is_told_as_by_a_thread(slide: Path, tmp_path: Path, readers: Readers) -> None:
    plan = _plan(slide)
    assert plan.job
    broken = tmp_path / "broken.svs"
    data = bytearray(slide.read_bytes())
    viewer = plan.job.viewer
    offset, length = viewer.slide._reader._levels[0].places(1, range(1, 2))[0]  # type: ignore[attr-defined]
    data[offset : offset + length] = b"\0" * length
    broken.write_bytes(data)
    damaged = _plan(broken)
    assert damaged.job
    there_too = partial(readers.view, damaged.job.viewer)
    with pytest.raises(UnreadableSlide) as here:
        list(map(damaged.job.viewer.view, damaged.blocks()))
    with pytest.raises(UnreadableSlide) as there:
        list(map(there_too, damaged.blocks()))
    assert str(here.value) == str(there.value)
    view, _ = readers.view(viewer, next(plan.blocks()))  # the reader goes on
    assert view.pixels.any()


def _running(process: int) -> bool:
    """Whether it has not ended; one that nobody has asked for its exit code has."""
    return Path(f"/proc/{process}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"


def test_those_that_memory_has_no_room_for_end(slide: Path) -> None:
    plan = _plan(slide)
    assert plan.job
    viewer, blocks = plan.job.viewer, list(plan.blocks())
    with Readers(2) as readers:
        children = _processes(readers)
        assert readers.keep(5) is readers
        assert readers.keep(1) is readers
        deadline = time.monotonic() + 30
        while sum(map(_running, children)) > 1 and time.monotonic() < deadline:
            time.sleep(0.05)
        assert sum(map(_running, children)) == 1
        for block in blocks:
            np.testing.assert_array_equal(readers.view(viewer, block)[0].pixels, viewer.view(block)[0].pixels)
        assert readers.keep(0) is None
        assert readers.keep(2) is None  # another slide's plan brings none back


@pytest.mark.parametrize("left", [0, 1])
def test_a_run_has_fewer_readers_rather_than_none_of_its_results(
    slide: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, left: int
) -> None:
    used: list[int] = []
    real = Readers.view

    def view(self: Readers, viewer: Viewer, block: Block) -> object:
        used.append(len(self._all))
        return real(self, viewer, block)

    monkeypatch.setattr(Readers, "view", view)
    limit = _plan(slide, readers=left).peak_bytes
    told: list[str] = []

    def listener(event: Event) -> None:
        if event.kind == "note":
            told.append(event.data["text"])

    how = {"tissue": "none", "threads": 2, "block_tiles": 3}
    made = infer(slide, "planted", tmp_path / "short", readers=3, memory_limit_bytes=limit, listener=listener, **how)
    plain = infer(slide, "planted", tmp_path / "plain", listener=listener, **how)
    scores = [Truth.load(result.folder / "probability.zarr").scores for result in (made, plain)]
    np.testing.assert_array_equal(*scores)
    [note] = told
    assert note.startswith(("None of 3 processes reads:", "1 of 3 processes read:")[left])
    assert note.endswith("of memory. It costs pace only.")
    assert set(used) == ({1} if left else set())


def test_one_that_has_ended_takes_no_block_from_the_others(slide: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plan = _plan(slide)
    assert plan.job
    viewer, (block, *_) = plan.job.viewer, list(plan.blocks())
    reading_here, here = threading.Event(), []

    def view(own: Viewer, block: object) -> str:
        here.append(threading.current_thread())
        reading_here.set()
        release.wait(30)
        return "read here"

    with Readers(2) as readers:
        victim = _processes(readers)[1]
        os.kill(victim, signal.SIGKILL)
        release = threading.Event()
        monkeypatch.setattr(Viewer, "view", view)
        first = threading.Thread(target=readers.view, args=(viewer, block))
        first.start()
        assert reading_here.wait(30)
        view_there = readers.view(viewer, block)[0]
        release.set()
        first.join()
    assert here == [first]
    assert view_there.pixels.any()  # type: ignore[attr-defined]


def test_what_a_reader_cannot_open_is_read_by_the_thread(
    slide: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    copy = tmp_path / "copy.svs"
    copy.write_bytes(slide.read_bytes())
    plan = _plan(copy)
    assert plan.job
    viewer = plan.job.viewer
    with Readers(1) as alone:
        copy.rename(tmp_path / "elsewhere.svs")
        for block in plan.blocks():
            np.testing.assert_array_equal(alone.view(viewer, block)[0].pixels, viewer.view(block)[0].pixels)
        assert alone._free.get().alive
    assert capfd.readouterr() == ("", "")  # no traceback with a path


@pytest.mark.parametrize("call", ["memfd_create", "socketpair", "Popen"])
def test_what_the_system_refuses_costs_pace_only(slide: Path, monkeypatch: pytest.MonkeyPatch, call: str) -> None:
    def refused(*arguments: object, **how: object) -> None:
        raise OSError(errno.EMFILE, "Too many open files")

    plan = _plan(slide)
    assert plan.job
    viewer, blocks = plan.job.viewer, list(plan.blocks())
    where = {"memfd_create": module.os, "socketpair": module.socket, "Popen": module.subprocess}[call]
    monkeypatch.setattr(where, call, refused)
    with reading(viewer.slide, 2) as readers:
        assert (readers is not None) == (call == "memfd_create")
        for block in blocks if readers else ():
            np.testing.assert_array_equal(readers.view(viewer, block)[0].pixels, viewer.view(block)[0].pixels)
    assert not module._users


def test_a_fork_of_the_run_does_not_keep_them(slide: Path) -> None:
    """What a data loader of the caller's does meanwhile: its processes have our channels open as well."""
    code = (
        "import os, time; from wsiengine.readers import Readers\n"
        "readers = Readers(2)\n"
        "other = os.fork() or time.sleep(60)\n"
        "readers.close()\n"
        "os.kill(other, 9)"
    )
    subprocess.run([sys.executable, "-c", code], timeout=30, check=True)


def test_a_users_file_is_not_taken_for_pythons(slide: Path, tmp_path: Path) -> None:
    (tmp_path / "queue.py").write_text("raise SystemExit('not for you')")
    code = "import sys; from wsiengine.cli import main; sys.exit(main(sys.argv[1:]))"
    command = [sys.executable, "-P", "-c", code, "infer", str(slide), "-m", "planted", "--tissue", "none"]
    command += ["--readers", "1", "-o", str(tmp_path / "out")]
    found = ":".join(filter(None, sys.path))
    environment = {**os.environ, "PYTHONPATH": found}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert (done.returncode, "not for you" in done.stderr) == (0, False), done.stderr


def test_an_interrupted_exchange_is_not_taken_up_again(
    slide: Path, readers: Readers, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = _plan(slide)
    assert plan.job
    viewer, blocks = plan.job.viewer, list(plan.blocks())
    with Readers(1) as alone:
        alone.view(viewer, blocks[0])
        with monkeypatch.context() as patch:
            patch.setattr(module, "_receive", _interrupt)
            with pytest.raises(KeyboardInterrupt):
                alone.view(viewer, blocks[1])
        for block in blocks:
            np.testing.assert_array_equal(alone.view(viewer, block)[0].pixels, viewer.view(block)[0].pixels)


def _interrupt(channel: object) -> None:
    raise KeyboardInterrupt


def test_a_cluster_has_readers_of_its_own(slide: Path, tmp_path: Path) -> None:
    class Client:
        def nthreads(self) -> dict[str, int]:
            return {"tcp://there": 2}

    with pytest.raises(PlanError, match="readers=2 was given with a client"):
        infer(slide, "planted", tmp_path / "out", client=Client(), readers=2)  # type: ignore[arg-type]
    assert not (tmp_path / "out").exists()


def test_readers_end_with_the_run(slide: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    started: list[Readers] = []

    class Watched(Readers):
        def __init__(self, count: int) -> None:
            super().__init__(count)
            started.append(self)

    monkeypatch.setattr(module, "Readers", Watched)
    infer(slide, "planted", tmp_path / "out", tissue="none", threads=2, readers=2)
    assert len(started) == 1
    assert started[0]._first.poll() == 0


def test_readers_end_with_a_killed_process(slide: Path, tmp_path: Path) -> None:
    code = (
        "import sys, time; from wsiengine.readers import Readers; r = Readers(2); print(r._first.pid); time.sleep(60)"
    )
    command = [sys.executable, "-c", code]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=tmp_path) as process:
        assert process.stdout is not None
        first = int(process.stdout.readline())
        process.kill()
    deadline = time.monotonic() + 30
    while Path(f"/proc/{first}").exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not Path(f"/proc/{first}").exists()


def test_slides_in_memory_are_read_by_threads(tmp_path: Path) -> None:
    large = ArraySlide(position_pixels(900, 1200), 0.7)
    with reading(large, 2) as readers:
        assert readers is None
    with reading(large, 0) as readers:
        assert readers is None


def test_slides_of_one_call_share_them(slide: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[int] = []

    class Fake:
        def __init__(self, count: int) -> None:
            made.append(count)

        def close(self) -> None:
            made.append(-1)

    monkeypatch.setattr(module, "Readers", Fake)

    opened = wsiengine.open_slide(slide)
    with reading(opened, 3) as one, reading(opened, 3) as other:
        assert one is other
    assert made == [3, -1]
    with reading(opened, 3):
        assert made == [3, -1, 3]


def test_a_viewer_travels_light(slide: Path) -> None:
    plan = _plan(slide)
    assert plan.job
    assert isinstance(plan.job.viewer, Viewer)
    assert plan.job.viewer.wanted is None


def test_larger_blocks_get_more_memory_from_the_same_reader(slide: Path) -> None:
    small, large = _plan(slide, block_tiles=1), _plan(slide, block_tiles=4)
    assert small.job
    viewer = small.job.viewer
    with Readers(1) as alone:
        for block in [next(small.blocks()), *large.blocks(), *small.blocks()]:
            np.testing.assert_array_equal(alone.view(viewer, block)[0].pixels, viewer.view(block)[0].pixels)
            assert [reader.alive for reader in alone._free.queue] == [True]
