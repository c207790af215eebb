"""Runs whose disk fails from some change on."""

import os
import shutil
from collections.abc import Callable
from pathlib import Path

from tests.faults.runs import fork, run, wait
from tests.faults.syscalls import FaultAt
from wsiengine.errors import OutputError

IN_WORDS, OTHERWISE, FINISHED = 3, 4, 5


def failing_disk(slide: Path, out: Path, number: int, fault: Callable[[str], None]) -> int:
    """Run while the disk fails from the ``number``-th change on → how it ended."""
    shutil.rmtree(out, ignore_errors=True)

    def work() -> None:
        code = FINISHED
        try:
            with FaultAt(out, number, fault, lasting=True):
                run(slide, out)
        except OutputError as error:
            code = IN_WORDS if error.hint and error.message.startswith(("Cannot", "Could not")) else OTHERWISE
        os._exit(code)

    return wait(fork(work))
