"""What a child does in place of running slides: begins all of them, and never ends where ``bad`` is among them."""

import time
from collections.abc import Sequence
from typing import Any

from wsiengine.isolation import Reporter


def hold(what: Any, slides: Sequence[str], reporter: Reporter) -> None:
    for slide in slides:
        reporter.begun(slide)
    if "bad" in slides:
        time.sleep(600)
    for slide in slides:
        reporter.ended(slide, [True, "fine"])
