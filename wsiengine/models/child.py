"""Work on a model that may crash, hang or eat all memory, done in a child process: here it is an error in words.

A child is ``python -m MODULE ARGUMENTS`` and answers with one JSON object on its last line of output: what it found, or
``{"error": …, "hint": …}``. :func:`answer` is the child's side, :func:`ask` the parent's.
"""

import json
import signal
import subprocess
from collections.abc import Callable
from contextlib import suppress
from typing import Any

from wsiengine.errors import CardError, WsiError
from wsiengine.interpreter import same_python

_ROOM_BYTES = 2 << 30  # libraries and activations of any sane model


def ask(module: str, arguments: list[str], *, doing: str, timeout_s: float) -> dict[str, Any]:
    """What the child found.

    Args:
        module: With :func:`answer` in its ``__main__``.
        arguments: For it.
        doing: For messages: "loading tiny.onnx".
        timeout_s: The child is ended after that.

    Raises:
        CardError: The child said what is wrong, or crashed, or took too long.
    """
    command, environment = same_python(module, *arguments)
    try:
        done = subprocess.run(
            command, env=environment, capture_output=True, text=True, errors="replace", timeout=timeout_s, check=False
        )
    except subprocess.TimeoutExpired:
        raise CardError(
            f"{doing} did not end within {timeout_s:,.0f} s, and was given up", hint="the model file may be hostile"
        ) from None
    found = _last_object(done.stdout)
    if done.returncode < 0:
        raise CardError(f"{doing} crashed ({signal_name(-done.returncode)})", hint="the model file may be hostile")
    if found is None:
        said = done.stderr.strip().splitlines()
        raise CardError(f"{doing} failed: {said[-1][:300] if said else f'exit code {done.returncode}'}")
    if "error" in found:
        raise CardError(found["error"], hint=found.get("hint"))
    return found


def answer(work: Callable[[], dict[str, Any]], *, memory_bytes: int = 0) -> None:
    """Do ``work`` and print what it found, or in words why it failed.

    Args:
        work: What to do.
        memory_bytes: Most memory of its own that it may take beyond libraries; 0: no limit.
    """
    if memory_bytes:
        _limit_memory(memory_bytes + _ROOM_BYTES)
    try:
        found = work()
    except WsiError as error:
        found = {"error": error.message, "hint": error.hint}
    except MemoryError:
        found = {"error": "the model asks for more memory than it can need", "hint": "the model file may be hostile"}
    print(json.dumps(found), flush=True)


def signal_name(number: int) -> str:
    """
    >>> signal_name(11)
    'signal 11, SIGSEGV'
    """
    with suppress(ValueError):
        return f"signal {number}, {signal.Signals(number).name}"
    return f"signal {number}"


def _limit_memory(most_bytes: int) -> None:
    """Anonymous memory, where the system can limit it (Linux)."""
    with suppress(ImportError, ValueError, OSError):
        import resource

        resource.setrlimit(resource.RLIMIT_DATA, (most_bytes, most_bytes))


def _last_object(text: str) -> dict[str, Any] | None:
    lines = text.strip().splitlines()
    with suppress(ValueError, IndexError):
        found = json.loads(lines[-1])
        return found if isinstance(found, dict) else None
    return None
