"""Events on the screen: a bar in a terminal, plain lines when piped, JSON lines for programs, or nothing."""

import json
import sys
import threading
import time
from collections.abc import Mapping
from typing import Any

from wsiengine.errors import WsiError
from wsiengine.events import Event
from wsiengine.wording import area_lines, clock, plan_facts, plan_lines, summary_words

_STEP = 0.1  # plain lines tell of every tenth of a run


def make_display(*, quiet: bool = False, as_json: bool = False) -> "Display":
    """The display that fits the flags and where standard output goes."""
    if as_json:
        return JsonDisplay()
    if quiet:
        return Display()
    return Bar() if sys.stdout.isatty() else Lines()


def _in_words(error: Exception) -> tuple[str, str | None]:
    """What went wrong, and what to try."""
    if isinstance(error, WsiError):
        return error.message, error.hint
    if isinstance(error, ModuleNotFoundError) and error.name:
        hint = 'install wsiengine again: pip install "wsiengine[cpu]" (or [gpu]); `wsiengine doctor` lists its parts.'
        return f"the Python package {error.name} is missing or broken: {error}.", hint
    if isinstance(error, MemoryError):
        hint = "close other programs, set --memory-limit, or check that the slide is sound."
        return f"the machine has not enough memory: {error or 'it could not be had'}.", hint
    hint = "run it again with --debug and report what it prints: this is a fault of wsiengine."
    return f"unexpected {type(error).__name__}: {error}", hint


class Display:
    """Says nothing but errors."""

    def __call__(self, event: Event) -> None:
        """Take an event (from any thread)."""

    def error(self, error: Exception, *, slide: str | None = None) -> None:
        """Tell of a failure, on standard error, in words."""
        name = f"{slide}: " if slide else ""
        message, hint = _in_words(error)
        print(f"error    {name}{message}", file=sys.stderr)
        if hint:
            print(f"try      {hint}", file=sys.stderr)

    def line(self, name: str, text: str) -> None:
        """A line of its own, where lines are shown."""

    def close(self) -> None:
        """The run is over, well or not."""


class Lines(Display):
    """Plain lines."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._started = self._last = 0.0
        self._first = 0

    def line(self, name: str, text: str) -> None:
        print(f"{name:<9}{text}", flush=True)

    def __call__(self, event: Event) -> None:
        data = event.data
        with self._lock:
            match event.kind:
                case "plan":
                    for name, text in plan_lines(data["plan"]):
                        self.line(name, text)
                    for note in data["notes"]:
                        self.line("note", note)
                case "warning" | "note" | "terms":
                    self.line(event.kind, data["text"])
                case "resume":
                    self.line("resume", f"{data['done']:,} of {data['total']:,} tiles were done before")
                case "progress":
                    self.progress(data["done"], data["total"])
                case "stage":
                    self.stage(data["name"])
                case "profile":
                    for text in data["lines"]:
                        self.line("profile", text)
                case "result":
                    self.close()
                    self.line("result", summary_words(data["summary"]))
                    for area in area_lines(data["summary"]):
                        self.line("area", area)
                    self.line("files", " · ".join(data["files"]))

    def progress(self, done: int, total: int) -> None:
        now = time.perf_counter()
        if not self._started:
            self._started, self._first, self._last = now, done, done / total
            return
        part = done / total
        if part - self._last >= _STEP or done == total:
            self._last = part
            rate = (done - self._first) / max(now - self._started, 1e-9)
            took = clock(now - self._started)
            self.line("run", f"{100 * part:3.0f} %  {done:,}/{total:,} tiles · {rate:,.0f} tiles/s · {took}")

    def stage(self, name: str) -> None:
        """What goes on after the tiles; too short to mention when piped."""

    def close(self) -> None:
        self._started = 0.0


class Bar(Lines):
    """A progress bar in place."""

    def __init__(self) -> None:
        super().__init__()
        self._bar: Any = None
        self._task: Any = None

    def progress(self, done: int, total: int) -> None:
        from rich.progress import BarColumn, Progress, TextColumn

        now = time.perf_counter()
        if self._bar is None:
            self._started, self._first = now, done
            columns = (
                TextColumn("run     "),
                BarColumn(),
                TextColumn("{task.percentage:3.0f} %  {task.fields[words]}"),
            )
            self._bar = Progress(*columns, refresh_per_second=8)
            self._task = self._bar.add_task("run", total=total, completed=done, words=f"{done:,}/{total:,} tiles")
            self._bar.start()
            return
        rate = (done - self._first) / max(now - self._started, 1e-9)
        words = f"{done:,}/{total:,} tiles · {rate:,.0f} tiles/s · {clock(now - self._started)}"
        self._bar.update(self._task, completed=done, words=words)

    def stage(self, name: str) -> None:
        if self._bar is not None:
            self._bar.refresh()

    def close(self) -> None:
        super().close()
        if self._bar is not None:
            self._bar.stop()
            self._bar = None


class JsonDisplay(Display):
    """One JSON object per line on standard output, errors included."""

    def __init__(self) -> None:
        self._lock = threading.Lock()

    def __call__(self, event: Event) -> None:
        data: Mapping[str, Any] = event.data
        if event.kind == "plan":
            data = {**plan_facts(data["plan"]), "notes": data["notes"]}
        self._put({"event": event.kind, **data})

    def error(self, error: Exception, *, slide: str | None = None) -> None:
        message, hint = _in_words(error)
        self._put({"event": "error", "kind": type(error).__name__, "slide": slide, "message": message, "try": hint})

    def _put(self, record: Mapping[str, Any]) -> None:
        with self._lock:
            print(json.dumps(record, ensure_ascii=False), flush=True)
