"""Ctrl-C and SIGTERM stop a run within two seconds, with a word on how to go on; what was finished stays."""

import os
import signal
import subprocess
import time
from pathlib import Path

import pytest

from tests.faults.crashes import plant, planted_environment
from tests.faults.kills import journalled_tiles
from tests.faults.runs import COMMAND, TILES, resume

# Two ways to be busy for long: worker threads in a block that takes a minute, and the main thread in one call that
# never comes back to the interpreter to look for signals.
SLOW_BLOCKS = """
import time, wsiengine.graph as graph
original, count = graph.score_block, []
def slow(job, block):
    count.append(block)
    if len(count) > 4:
        time.sleep(60)
    return original(job, block)
graph.score_block = slow
"""
STUCK_FINISH = """
import hashlib, wsiengine.store as store
def stuck(*args):
    print("in one long call", flush=True)
    hashlib.pbkdf2_hmac("sha256", b"", b"", 10**9)
store.write_store = stuck
"""


def _start(slow: str, slide: Path, out: Path) -> "subprocess.Popen[str]":
    return subprocess.Popen(
        [*COMMAND, str(slide), "-o", str(out), "--threads", "2"],
        env=planted_environment(plant(out.with_name("site"), slow)),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def _limit_s() -> float:
    """Two seconds, but on a machine that is overloaded already."""
    return 2.0 if os.getloadavg()[0] < 2 * (os.cpu_count() or 1) else 10.0


def _await_tiles(out: Path, tiles: int) -> None:
    until = time.monotonic() + 60
    while journalled_tiles(out) < tiles:
        assert time.monotonic() < until
        time.sleep(0.05)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_stopped_run_ends_within_two_seconds(
    slide: Path, wanted: dict[str, bytes], tmp_path: Path, number: signal.Signals
) -> None:
    out = tmp_path / "out"
    process = _start(SLOW_BLOCKS, slide, out)
    _await_tiles(out, 4)
    process.send_signal(number)
    asked = time.monotonic()
    _, errors = process.communicate(timeout=20)
    assert time.monotonic() - asked < _limit_s()
    assert process.returncode == 130
    assert errors == "\nstopped  finished blocks are kept: run the same command again to go on.\n"
    kept = journalled_tiles(out)
    assert 4 <= kept < TILES
    resumed = resume(slide, out, wanted)
    assert resumed.equal
    assert resumed.tiles == kept


def test_a_main_thread_that_never_looks_up_is_stopped_too(
    slide: Path, wanted: dict[str, bytes], tmp_path: Path
) -> None:
    process = _start(STUCK_FINISH, slide, tmp_path / "out")
    assert process.stdout is not None
    while process.stdout.readline() != "in one long call\n":
        assert process.poll() is None
    process.send_signal(signal.SIGINT)
    asked = time.monotonic()
    _, errors = process.communicate(timeout=20)
    assert time.monotonic() - asked < _limit_s()
    assert process.returncode == 130
    assert "run the same command again to go on" in errors
    assert resume(slide, tmp_path / "out", wanted).equal


def test_signals_are_as_before_when_a_command_is_over() -> None:
    from wsiengine.cli import main

    before = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)
    assert main(["models"]) == 0
    assert (signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)) == before
