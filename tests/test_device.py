"""Runs on a device whose provider is a parameter: batches across blocks, a full device, a kept batch size."""

import json
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import wsiengine
from tests import planted_slides as planted
from wsiengine import identifying
from wsiengine.errors import DeviceMemoryError, MemoryLimitError
from wsiengine.events import Event
from wsiengine.geometry import Box, Size
from wsiengine.identifying import Request
from wsiengine.inference import infer
from wsiengine.models import session
from wsiengine.models.bound import BoundSlot
from wsiengine.models.runtime import Runtime
from wsiengine.result import Result
from wsiengine.truth import Truth


class Device(Runtime):
    """The CPU, run and named as a GPU is."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **{**options, "batched": True})
        self.provider, self.on_cpu = "FakeExecutionProvider", False


@pytest.fixture
def slide(tmp_path: Path) -> Path:
    return planted.write(tmp_path / "s.svs", planted.paint(Size(1203, 1607), [(planted.A, Box(200, 300, 900, 1300))]))


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(session, "shared_runtime", Device)


run = partial(infer, model="planted", tissue="none", threads=3, block_tiles=3)


def scores(result: Result, folder: Path) -> np.ndarray:
    assert result.run["summary"]["tiles"] > 0
    return Truth.load(folder / "probability.zarr").scores


def test_a_device_gives_what_the_cpu_gives(slide: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cpu = scores(run(slide, output=tmp_path / "cpu"), tmp_path / "cpu")
    monkeypatch.setattr(session, "shared_runtime", Device)
    made = run(slide, output=tmp_path / "device", batch_size=16)
    np.testing.assert_allclose(scores(made, tmp_path / "device"), cpu, atol=1e-4)
    assert made.run["identity"]["parameters"]["batch_size"] == 16
    batches = made.run["timing"]["batches"]
    assert batches["tiles"] == made.run["summary"]["tiles"]
    alone = 16 * made.run["host"]["blocks"]  # rows, were each block of nine tiles a batch
    assert batches["rows"] < 0.85 * alone


@pytest.mark.usefixtures("device")
def test_a_full_device_restarts_the_slide_with_smaller_batches(
    slide: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    undisturbed = run(slide, output=tmp_path / "a", batch_size=8)
    events: list[Event] = []
    calls = 0
    real = BoundSlot.run

    def full(self: BoundSlot) -> np.ndarray:
        nonlocal calls
        calls += 1
        if len(self.batch) > 8 and calls > 3:
            raise DeviceMemoryError(f"The device has no room for batches of {len(self.batch)} tiles.")
        return real(self)

    monkeypatch.setattr(BoundSlot, "run", full)
    result = run(slide, output=tmp_path / "b", batch_size=32, listener=events.append)
    told = [event.data["text"] for event in events if event.kind == "warning"]
    assert [text.split("tiles. ")[1] for text in told] == [
        "The slide starts again with 16.",
        "The slide starts again with 8.",
    ]
    assert result.run["identity"] == undisturbed.run["identity"]
    same = (tmp_path / name / "annotations.geojson" for name in "ab")
    assert len({path.read_bytes() for path in same}) == 1


@pytest.mark.usefixtures("device")
def test_the_batch_size_of_a_run_is_kept_when_it_is_resumed(slide: Path, tmp_path: Path) -> None:
    class Stop(Exception):
        pass

    def stop(event: Event) -> None:
        if event.kind == "progress" and event.data["done"] > 0:
            raise Stop

    with pytest.raises(Stop):
        run(slide, output=tmp_path / "out", batch_size=5, listener=stop)
    events: list[Event] = []
    result = run(slide, output=tmp_path / "out", listener=events.append)
    assert "resume" in [event.kind for event in events]
    assert result.run["identity"]["parameters"]["batch_size"] == 5
    events.clear()
    run(slide, output=tmp_path / "out", listener=events.append)
    assert any("Already finished" in event.data.get("text", "") for event in events)
    facts = json.loads((tmp_path / "out" / "run.json").read_text())
    assert facts["identity"]["parameters"]["provider"] == "FakeExecutionProvider"


@pytest.mark.usefixtures("device")
def test_a_device_without_room_for_one_tile_says_so(
    slide: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(self: BoundSlot) -> np.ndarray:
        raise DeviceMemoryError(f"The device has no room for batches of {len(self.batch)} tiles.")

    monkeypatch.setattr(BoundSlot, "run", full)
    with pytest.raises(DeviceMemoryError, match="batches of 1 tiles"):
        run(slide, output=tmp_path / "out", batch_size=4)


def test_processes_read_for_a_device_and_more_threads_wait_for_it(
    slide: Path, device: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(identifying, "usable_cores", lambda: 8)
    chosen = []
    for options in ({}, {"threads": 4}, {"threads": 2}, {"readers": 3}, {"readers": 0}, {"threads": 20}):
        subject = identifying.identify(Request(slide, "planted", **options))  # type: ignore[arg-type]
        chosen.append((subject.readers, subject.threads))
    assert chosen == [(8, 12), (4, 4), (0, 2), (3, 9), (0, 8), (8, 20)]


def test_readers_nobody_asked_for_leave_memory_to_the_run(
    slide: Path, device: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(identifying, "usable_cores", lambda: 8)
    chosen = []
    for limit in (8 << 30, 3 << 30, 1 << 30):
        request = Request(slide, "planted", tissue="none", memory_limit_bytes=limit)
        chosen.append(identifying.identify(request).readers)
        wsiengine.plan(slide, "planted", tissue="none", memory_limit_bytes=limit)  # is not refused
    assert chosen == [8, 6, 0]
    asked = wsiengine.plan(slide, "planted", tissue="none", memory_limit_bytes=1 << 30, readers=16)
    assert 0 < asked.options.readers < 16  # some are left out, and the run says so
    with pytest.raises(MemoryLimitError):
        wsiengine.plan(slide, "planted", tissue="none", memory_limit_bytes=100 << 20, readers=16)


def test_threads_read_for_a_cpu(slide: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(identifying, "usable_cores", lambda: 8)
    for asked, chosen in ((None, (0, 8)), (5, (5, 8))):
        subject = identifying.identify(Request(slide, "planted", device="cpu", readers=asked))
        assert (subject.readers, subject.threads) == chosen


def test_memory_of_readers_is_planned(slide: Path) -> None:
    peaks = [
        wsiengine.plan(slide, "planted", tissue="none", device="cpu", threads=2, readers=count).peak_bytes
        for count in (0, 1, 3)
    ]
    assert peaks[2] - peaks[0] == 3 * (peaks[1] - peaks[0]) > 3 * 50 * 2**20


def test_batches_are_told_slide_by_slide(slide: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kept: dict[tuple, Device] = {}

    def shared(card: Any, **options: Any) -> Device:
        return kept.setdefault((card.folder, *options.items()), Device(card, **options))

    monkeypatch.setattr(session, "shared_runtime", shared)
    for number in range(2):
        made = run(slide, output=tmp_path / str(number), batch_size=16)
        assert made.run["timing"]["batches"]["tiles"] == made.run["summary"]["tiles"]
    assert len(kept) == 1
