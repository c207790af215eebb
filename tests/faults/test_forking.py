"""A forked process begins as a new program would, and tells how it ended."""

import subprocess
import sys

import pytest

from tests.faults.runs import environment

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="elsewhere a new interpreter is started")
BEGIN = """
import os, signal, subprocess, sys, time
from wsiengine.forking import Forked, can_fork
from wsiengine.stopping import stopping_soon
kept_reader, kept = os.pipe()
def start(work):
    with stopping_soon(""):  # as the command does
        assert can_fork()
        return Forked(work, without=(kept_reader,))
def told(process):
    os.close(kept)
    said = os.read(kept_reader, 100).decode()
    return said, process.wait()
def tell(*words):
    os.write(kept, " ".join(map(str, words)).encode())
    return 7
"""


def run(code: str) -> str:
    """What ``code`` prints, in an interpreter of its own: this one has libraries and threads."""
    buffered = environment(PYTHONUNBUFFERED="")
    command = [sys.executable, "-c", BEGIN + code]
    done = subprocess.run(command, env=buffered, capture_output=True, text=True, check=False, timeout=60)
    assert (done.returncode, done.stderr) == (0, "")
    return done.stdout


def test_it_begins_as_a_new_program_would() -> None:
    code = """
other = os.open("/dev/null", os.O_RDONLY)  # of a tool that looks on, say
def work():
    descriptors = [number for number in range(100) if os.path.exists(f"/proc/self/fd/{number}")]
    ends = {os.readlink(f"/proc/self/fd/{number}") for number in descriptors[1:]}
    clean = signal.getsignal(signal.SIGTERM) == signal.SIG_DFL and signal.set_wakeup_fd(-1) == -1
    handed = {0, 1, 2, kept, other} <= set(descriptors), os.readlink("/proc/self/fd/0") not in ends
    return tell(*handed, clean, os.getsid(0) == os.getpid(), signal.pthread_sigmask(0, ()))
print(told(start(work)))
print(signal.pthread_sigmask(0, ()))
"""
    assert run(code) == "('True True True True set()', 7)\nset()\n"


def test_what_was_printed_before_is_printed_once() -> None:
    assert run("print('once'); print(told(start(lambda: print('twice') or 3)))") == "once\ntwice\n('', 3)\n"


def test_it_never_comes_back_and_an_error_is_told() -> None:
    done = subprocess.run(
        [sys.executable, "-c", BEGIN + "print(told(start(lambda: 1 / 0)))"],
        env=environment(),
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.stdout == "('', 1)\n"
    assert done.stderr.endswith("ZeroDivisionError: division by zero\n")


def test_it_ends_by_signals_and_with_its_standard_input() -> None:
    code = """
process = start(lambda: time.sleep(60) or 0)
try:
    process.wait(0.05)
except subprocess.TimeoutExpired:
    print("late")
process.terminate()
print(process.wait(10), process.wait())
process.kill()  # too late, and no error
process = start(lambda: tell(os.read(0, 5), os.read(0, 5)))
process.stdin.write(b"hello")
process.stdin.close()
print(told(process))
"""
    assert run(code) == "late\n-15 -15\n(\"b'hello' b''\", 7)\n"


def test_where_the_system_keeps_no_exit_codes() -> None:
    assert run("signal.signal(signal.SIGCHLD, signal.SIG_IGN); print(told(start(lambda: 3)))") == "('', 0)\n"


@pytest.mark.parametrize(
    "loaded", ["import numpy", "import threading; threading.Thread(target=time.sleep, args=(1,)).start()"]
)
def test_not_where_something_may_not_survive_it(loaded: str) -> None:
    assert run(f"print(can_fork()); {loaded}; print(can_fork())") == "True\nFalse\n"
