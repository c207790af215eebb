"""Devices and number formats compared: what differs too much is a fault, what is missing says why."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.models.tiny import tiny
from wsiengine.cli import main
from wsiengine.models import comparing
from wsiengine.models.comparing import compare, difference
from wsiengine.models.probe import drawn_tiles
from wsiengine.models.runtime import Runtime


def test_threads_give_the_same_bits_and_what_is_missing_says_why(tmp_path: Path) -> None:
    ways = {one.way: one for one in compare(tiny(tmp_path))}
    assert ways["cpu, fp32"].difference == 0
    assert (ways["cpu, fp32, 2 threads"].difference, ways["cpu, fp32, 2 threads"].tolerance) == (0, 0)
    if ways["cuda, fp32"].difference is None:
        assert ways["cuda, fp32"].chosen.startswith("missing: ")
    assert not any(one.faulty for one in ways.values())


def test_a_device_that_answers_otherwise_is_a_fault(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    original = Runtime

    class Other(original):  # type: ignore[misc, valid-type]
        """A device that is off by ``off`` in its raw scores."""

        def __init__(self, card: Any, *, device: str = "auto", **rest: Any) -> None:
            super().__init__(card, device="cpu", **rest)
            self.off = np.float32(0.5 if device == "cuda" else 0)
            self.provider = "CUDAExecutionProvider" if device == "cuda" else self.provider

        def scores(self, *args: Any, **rest: Any) -> np.ndarray:
            found = super().scores(*args, **rest)
            found[:, 0] += self.off
            return found

    monkeypatch.setattr(comparing, "Runtime", Other)
    card = tiny(tmp_path)
    assert main(["doctor", "--check", str(card.folder)]) == 1
    out = capsys.readouterr().out
    assert "cuda, fp32            DIFFERS: largest difference 0.1" in out
    assert "allowed 0.001" in out
    assert main(["doctor", "--check", str(card.folder), "--json"]) == 1
    ways = json.loads(capsys.readouterr().out)["ways"]
    assert [way["faulty"] for way in ways] == [False, False, True, False, False]


def test_differences() -> None:
    one = [np.array([0.5, -400.0]), np.zeros((0, 4))]
    assert difference(one, one) == 0
    assert difference(one, [np.array([0.5, -396.0]), np.zeros((0, 4))]) == 0.01
    assert difference(one, [np.array([0.5, np.nan]), np.zeros((0, 4))]) == float("inf")
    assert difference(one, [np.array([0.5, -400.0]), np.zeros((1, 4))]) == float("inf")


def test_drawn_tiles_never_change() -> None:
    tiles = drawn_tiles(64)
    assert tiles.shape == (8, 64, 64, 3)
    assert tiles.std(axis=(1, 2, 3)).min() > 10
    assert len({tile.tobytes() for tile in tiles}) == 8
    assert np.array_equal(tiles, drawn_tiles(64))


@pytest.mark.parametrize("model", ["planted", "crc5"])
def test_bundled_models(model: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", "--check", model]) == 0
    assert "cpu, fp32, 2 threads  agrees: largest difference 0, must be none" in capsys.readouterr().out
