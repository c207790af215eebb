"""Slides in a process of their own: a reader that crashes or hangs costs the one slide that it was reading.

Libraries that decode slides are written in C, and some file will end one of them. The command then lives on to say so:
it has only looked on while a child process ran slide after slide, and starts another child for the rest. Blocks that
were finished are in the slide's journal as after any other kill. A child costs little: the command itself has loaded
none of the libraries, and so can be forked (:mod:`wsiengine.forking`); elsewhere a child is a new interpreter.

A slide is blamed for the end of its process only when that happens again in a process where it is alone: the one
before may have been reading ahead, or the machine may have been short of memory.
"""

import json
import os
import pickle
import selectors
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

from wsiengine.errors import UnreadableSlide, WsiError
from wsiengine.forking import Forked, can_fork
from wsiengine.interpreter import same_python
from wsiengine.stopping import EXIT_CODE, leave, stopping_soon

_LISTENER_GONE = 141  # of the child: its standard output was closed
_BLAME_AFTER = 2  # processes that a slide may end
_PR_SET_PDEATHSIG = 1


@dataclass(frozen=True, slots=True)
class Task:
    """What the child does.

    Attributes:
        run: Picklable; called with the slides and a :class:`Reporter`. Must report each slide.
        what: Its first argument.
        patience_s: Without any sign of life for so long, the child is taken to hang.
    """

    run: Callable[[Any, Sequence[Any], "Reporter"], None]
    what: Any
    patience_s: float


class Reporter(Protocol):
    """How the one who runs slides tells of them."""

    def begun(self, slide: Any) -> None: ...

    def alive(self) -> None: ...

    def ended(self, slide: Any, outcome: Any) -> None: ...


def run_isolated(
    slides: Sequence[Any], task: Task, failed: Callable[[Any, WsiError], Any], note: Callable[[Any, str], None]
) -> list[Any]:
    """Run all slides, one process after the other as far as needed → their outcomes, in order.

    Args:
        slides: Anything that pickles.
        task: What to do with them. An outcome must be JSON.
        failed: Gives the outcome of a slide whose process ended, and tells the user.
        note: Tells of a slide that is tried again.

    Raises:
        KeyboardInterrupt: Ctrl-C or SIGTERM; the child has been stopped.
        BrokenPipeError: Nobody reads the output any more.
    """
    outcomes: dict[int, Any] = {}
    ends: dict[int, int] = {}
    left = list(range(len(slides)))
    alone: list[int] = []
    while left:
        now = [alone[0]] if alone else left
        child = _Child([(k, slides[k]) for k in now], task)
        outcomes.update(child.watch())
        if child.code == _LISTENER_GONE:
            raise BrokenPipeError
        suspects = [k for k in child.begun if k not in outcomes] or [k for k in now if k not in outcomes][:1]
        for k in suspects if child.reason else []:
            ends[k] = ends.get(k, 0) + 1
            if (child.hung and len(suspects) == 1) or ends[k] >= _BLAME_AFTER:
                outcomes[k] = failed(slides[k], UnreadableSlide(child.reason, hint=child.hint))
            else:
                note(slides[k], f"{child.reason} It is tried again.")
        left = [k for k in left if k not in outcomes]
        alone = [k for k in left if ends.get(k)]
    return [outcomes[k] for k in range(len(slides))]


class _Child:
    """One process, watched until it ends.

    Attributes:
        begun: Slides that it took up, in order.
        code: Its exit code, once it has ended.
        hung: It was ended for its silence.
    """

    def __init__(self, slides: Sequence[tuple[int, Any]], task: Task) -> None:
        self.begun: list[int] = []
        self.hung = False
        self.code = 0
        self._patience_s = task.patience_s
        self._paused = False
        self._reports, report = os.pipe()
        # Its own session: Ctrl-C and Ctrl-Z come to the command, which hands them on. Standard input is its life-line.
        start = _fork if can_fork() else _spawn
        self._process = start(slides, task, (self._reports, report))
        os.close(report)

    @property
    def reason(self) -> str:
        """Why it ended, in words; empty where all went well."""
        if self.hung:
            return f"There was no progress for {self._patience_s:,.0f} s: the slide was given up."
        if self.code < 0:
            name = signal.Signals(-self.code).name if -self.code in set(signal.Signals) else str(-self.code)
            return f"The process that read the slide ended by {name}."
        return f"The process that read the slide ended with code {self.code}." if self.code else ""

    @property
    def hint(self) -> str:
        """What to try, where it ended so again."""
        if self.hung:
            return "look whether the slide's disk answers, wait longer with --patience, or leave the slide out."
        if self.code == -signal.SIGKILL:
            return "systems end a process so where memory runs out: set --memory-limit, or close other programs."
        return "the file is damaged in a way that its reader does not survive: convert it anew, or leave it out."

    def watch(self) -> dict[int, Any]:
        """Outcomes of the slides that it finished."""
        outcomes: dict[int, Any] = {}
        try:
            with self._pausing():
                for report in self._read():
                    if "begun" in report:
                        self.begun.append(report["begun"])
                    elif "ended" in report:
                        outcomes[report["ended"]] = report["outcome"]
                self.code = self._process.wait()
        except BaseException:  # Ctrl-C: the child stops in order, as the command would
            self._stop()
            raise
        finally:
            os.close(self._reports)
            with suppress(BrokenPipeError):
                assert self._process.stdin is not None
                self._process.stdin.close()
        return outcomes

    def _read(self) -> Iterator[dict[str, Any]]:
        """Its reports, until it closes its end; ends a child that is silent for too long."""
        kept = b""
        with selectors.DefaultSelector() as ready:
            ready.register(self._reports, selectors.EVENT_READ)
            while True:
                if not ready.select(self._patience_s):
                    if self._paused:  # both of us were
                        self._paused = False
                        continue
                    self.hung = True
                    self._process.kill()
                    return
                data = os.read(self._reports, 1 << 16)
                if not data:
                    return
                *lines, kept = (kept + data).split(b"\n")
                yield from map(json.loads, lines)

    @contextmanager
    def _pausing(self) -> Iterator[None]:
        """While it lasts, Ctrl-Z stops the child, then the command; going on, both go on."""

        def pause(signum: int, frame: Any) -> None:
            self._paused = True
            self._process.send_signal(signal.SIGSTOP)
            os.kill(os.getpid(), signal.SIGSTOP)  # comes back when the shell lets the command go on
            self._process.send_signal(signal.SIGCONT)

        if signal.getsignal(signal.SIGTSTP) != signal.SIG_DFL:
            yield
            return
        signal.signal(signal.SIGTSTP, pause)
        try:
            yield
        finally:
            signal.signal(signal.SIGTSTP, signal.SIG_DFL)

    def _stop(self) -> None:
        with suppress(ProcessLookupError):  # SIGTERM: while it is still starting, SIGINT would be a traceback
            self._process.terminate()
        try:
            self._process.wait(1.2)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()


def _fork(slides: Sequence[tuple[int, Any]], task: Task, reports: tuple[int, int]) -> Forked:
    return Forked(partial(_run, reports[1], slides, task), without=reports[:1])


def _spawn(slides: Sequence[tuple[int, Any]], task: Task, reports: tuple[int, int]) -> "subprocess.Popen[bytes]":
    report = reports[1]
    command, environment = same_python("wsiengine.isolation", str(report))
    process = subprocess.Popen(
        command, stdin=subprocess.PIPE, pass_fds=[report], env=environment, start_new_session=True
    )
    with suppress(BrokenPipeError):  # it ended at once: its exit code tells
        assert process.stdin is not None
        process.stdin.write(pickle.dumps((slides, task)))
        process.stdin.flush()
    return process


class _Reports:
    """The child's side of the pipe."""

    _QUIET_S = 0.5  # signs of life are not told more often

    def __init__(self, descriptor: int, slides: Sequence[tuple[int, Any]]) -> None:
        self._descriptor = descriptor
        self._numbers = [(slide, number) for number, slide in slides]
        self._told = 0.0

    def begun(self, slide: Any) -> None:
        self._put({"begun": self._number(slide)})

    def alive(self) -> None:
        if time.monotonic() - self._told > self._QUIET_S:
            self._put({})

    def ended(self, slide: Any, outcome: Any) -> None:
        self._put({"ended": self._number(slide), "outcome": outcome})

    def _number(self, slide: Any) -> int:
        return next(number for known, number in self._numbers if known == slide)

    def _put(self, report: dict[str, Any]) -> None:
        self._told = time.monotonic()
        os.write(self._descriptor, json.dumps(report).encode() + b"\n")


def _main(descriptor: int) -> int:
    """Of a new interpreter, which is told by its standard input what to do."""
    _end_with_the_command()
    slides, task = pickle.load(sys.stdin.buffer)
    return _run(descriptor, slides, task)


def _run(descriptor: int, slides: Sequence[tuple[int, Any]], task: Task) -> int:
    """The child's work → its exit code."""
    _end_with_the_command()
    threading.Thread(target=_live_with_the_command, daemon=True).start()
    try:
        with stopping_soon(""):
            task.run(task.what, [slide for _, slide in slides], _Reports(descriptor, slides))
    except KeyboardInterrupt:
        return EXIT_CODE
    except BrokenPipeError:
        sys.stderr.close()
        return _LISTENER_GONE
    return 0


def _end_with_the_command() -> None:
    """Have the system end this process with the one that started it, even while a library holds the interpreter."""
    if sys.platform == "linux":
        import ctypes

        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


def _live_with_the_command() -> None:
    """The same on any system, where the interpreter is free to look."""
    while os.read(0, 1):
        pass
    os._exit(EXIT_CODE)


if __name__ == "__main__":
    leave(_main(int(sys.argv[1])))
