"""How fast each way of running a model is: counted tiles over time, and words where a way is missing."""

import json
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.models.tiny import tiny
from wsiengine.cli import main
from wsiengine.errors import CardError
from wsiengine.models import pacing
from wsiengine.models.pacing import Pace, fastest, paces
from wsiengine.models.registry import load_model
from wsiengine.models.runtime import Runtime

PER_CALL_S = 0.05


class Slow(Runtime):
    """Each call takes so long, whatever the number of its tiles."""

    def scores(self, pixels: np.ndarray, origins_px: np.ndarray, **rest: Any) -> np.ndarray:
        time.sleep(PER_CALL_S)
        return super().scores(pixels, origins_px, **rest)


def test_threads_add_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pacing, "Runtime", Slow)
    card = tiny(tmp_path)
    found = [next(paces(card, seconds=0.3, threads=count)).tiles_per_s for count in (1, 4)]
    assert found[0] is not None
    assert found[1] is not None
    assert 0.4 * 8 / PER_CALL_S < found[0] <= 8 / PER_CALL_S
    assert 2 * found[0] < found[1] <= 4 * 8 / PER_CALL_S


def test_what_is_missing_says_why(tmp_path: Path) -> None:
    found = list(paces(tiny(tmp_path), seconds=0.01, threads=2))
    assert [(one.device, one.precision) for one in found][:2] == [("cpu", "fp32"), ("cuda", "fp32")]
    assert found[0].tiles_per_s
    assert all(one.tiles_per_s or one.chosen.startswith("missing: ") for one in found)


@pytest.mark.parametrize("name", ["glands", "mass"])
def test_models_that_are_no_classifiers_have_a_pace(name: str) -> None:
    assert next(paces(load_model(name), seconds=0.01, threads=1)).tiles_per_s


def test_the_fastest_keeps_the_answers() -> None:
    slow, loose, best = (
        Pace("cpu", "fp32", "", 3.0, True),
        Pace("cpu", "int8", "", 9.0, False),
        Pace("mnn", "fp32", "", 5.0, True),
    )
    assert fastest([slow, loose, best, Pace("cuda", "fp32", "missing: none", None, True)]) is best
    assert fastest([loose]) is None


def test_a_model_that_does_not_run_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: Any, **__: Any) -> None:
        raise CardError("its file is not what the card says")

    monkeypatch.setattr(pacing, "Runtime", broken)
    with pytest.raises(CardError):
        list(paces(tiny(tmp_path)))


def test_on_the_command_line(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    original = pacing.paces
    monkeypatch.setattr(pacing, "paces", lambda card, *, threads: original(card, seconds=0.01, threads=threads))
    assert main(["doctor", "--speed", "planted"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("planted ")
    assert "tiles/s   1.00×  ONNX Runtime" in lines[1]
    assert lines[-1].startswith("fastest         --device ")
    assert main(["doctor", "--speed", "planted", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["model"] == "planted"
    assert told["ways"][0]["tiles_per_s"] > 0
