"""Where a run's time went: spans laid back from their end, numbers that add up, a picture with a bar per thread."""

import json
import threading
import time
from pathlib import Path

import cv2
import numpy as np
import pytest

from tests import planted_slides as planted
from wsiengine.events import Event, Span, Stopwatch
from wsiengine.geometry import Box, Size
from wsiengine.inference import infer
from wsiengine.profile import DEVICE, RUN, Profile, _lanes, busy_curve, draw_profile


class Made(Stopwatch):
    """A stopwatch whose spans are given."""

    def __init__(self, spans: list[Span]) -> None:
        super().__init__()
        self._spans = list(spans)
        for span in spans:
            self._seconds[span.stage] += span.stop_s - span.start_s

    @property
    def wall_s(self) -> float:
        return 10.0


TWO_THREADS = [
    Span("MainThread", "open", 0.0, 1.0),
    Span("a", "read", 2.0, 3.0),
    Span("a", "model", 3.0, 7.0),
    Span("a", "journal", 7.0, 7.5),
    Span("b", "model", 4.0, 6.0),
    Span("MainThread", RUN, 2.0, 8.0),
    Span("MainThread", "overlay", 8.0, 10.0),
]


def test_stages_of_a_block_are_laid_back_from_its_end() -> None:
    watch = Stopwatch()
    time.sleep(0.01)
    watch.add({"read": 0.002, "model": 0.005})
    read, model = sorted(watch.spans, key=lambda span: span.start_s)
    assert (read.stage, model.stage) == ("read", "model")
    assert read.stop_s == pytest.approx(model.start_s)
    assert model.stop_s - model.start_s == pytest.approx(0.005)
    assert model.stop_s <= watch.wall_s + 1e-3
    assert {span.lane for span in watch.spans} == {threading.current_thread().name}


def test_numbers_of_a_run() -> None:
    profile = Profile.of(Made(TWO_THREADS))
    assert profile.workers == 2
    assert profile.first_tile_s == 3.0
    assert profile.model_busy == pytest.approx((4 + 2) / (6 * 2))
    assert profile.depth == pytest.approx((1 + 4 + 0.5 + 2) / 6)
    assert "first tile after 3.00 s · the model idle 50.0 %" in profile.lines()[-1]
    assert json.loads(json.dumps(profile.facts()))["stages_s"]["model"] == 6.0


def test_a_gpu_is_busy_while_a_batch_is_under_way(tmp_path: Path) -> None:
    """Threads that wait for each other inside the model say nothing of it; slides before and after share it."""
    watch = Made(TWO_THREADS)
    begun = watch._started
    periods = [(begun - 3, begun - 2), (begun + 1, begun + 3), (begun + 4, begun + 6.5), (begun + 7.5, begun + 9)]
    watch.lay("device 0", DEVICE, periods)
    profile = Profile.of(watch)
    assert profile.device_busy == pytest.approx((1 + 2.5 + 0.5) / 6)
    assert profile.facts()["device_busy"] == pytest.approx(0.6667)
    assert "first tile after 3.00 s · the device idle 33.3 %" in profile.lines()[-1]
    watch.lay("device 1", DEVICE, [])
    watch.lay("device 1", DEVICE, [(begun + 2, begun + 8)])
    assert Profile.of(watch).device_busy == pytest.approx((4 + 6) / 12)
    assert list(_lanes(watch.spans).values()) == ["main", "thread 1", "thread 2", "device 0", "device 1"]
    curve = busy_curve(watch.spans, 10.0, 2, DEVICE)
    at = (np.arange(len(curve)) + 0.5) * 10 / len(curve)
    np.testing.assert_allclose(curve[(at > 4) & (at < 6)], 1)
    np.testing.assert_allclose(curve[(at > 3.1) & (at < 3.9)], 0.5)
    draw_profile(watch, tmp_path / "profile.png")
    assert "device_busy" not in Profile.of(Made(TWO_THREADS)).facts()


def test_a_run_without_blocks_has_a_profile() -> None:
    profile = Profile.of(Made([Span("MainThread", "open", 0.0, 1.0)]))
    assert profile.first_tile_s is None
    assert profile.model_busy == 0
    assert "first tile" not in profile.lines()[-1]


def test_the_curve_is_the_share_of_threads_in_the_model() -> None:
    curve = busy_curve(TWO_THREADS, 10.0, 2)
    at = (np.arange(len(curve)) + 0.5) * 10 / len(curve)
    np.testing.assert_allclose(curve[(at > 4) & (at < 6)], 1)
    np.testing.assert_allclose(curve[(at > 3) & (at < 4)], 0.5)
    assert not curve[(at < 3) | (at > 7)].any()


def test_the_picture_shows_each_stage_where_it_was(tmp_path: Path) -> None:
    draw_profile(Made(TWO_THREADS), tmp_path / "profile.png")
    rgb = cv2.imread(str(tmp_path / "profile.png"))[..., ::-1]

    def bar(lane: int, second: float) -> tuple[int, ...]:
        return tuple(rgb[70 + 34 * lane + 17, 150 + int(second * 120) + 2].tolist())

    green, orange, white = (0, 158, 115), (230, 159, 0), (255, 255, 255)
    assert bar(1, 2.5) == orange
    assert bar(1, 5.0) == green
    assert bar(2, 3.5) == white
    assert bar(2, 5.0) == green


def test_the_legend_of_many_stages_stays_on_the_page(tmp_path: Path) -> None:
    stages = ["open", "tissue", "stain fit", "read", "normalise", "model", "journal", "merge", "map", "annotations"]
    stages += ["overlay", "import dask", "picture (wait)"]
    spans = [Span("MainThread", stage, 0.7 * k, 0.7 * k + 0.6) for k, stage in enumerate(stages)]
    draw_profile(Made(spans), tmp_path / "profile.png")
    rgb = cv2.imread(str(tmp_path / "profile.png"))[..., ::-1]
    colours = {tuple(rgb[87, 150 + int(84 * k) + 20].tolist()) for k in range(len(stages))}
    assert len(colours) == len(stages)
    below = rgb[70 + 34 + 110 + 40 :]
    for colour in colours:
        assert (below == colour).all(axis=2).sum() >= 200  # a square of 15 x 15 px, whole
    assert (rgb[:, -20:] == 255).all()


def test_a_run_keeps_its_profile(tmp_path: Path) -> None:
    slide = planted.write(tmp_path / "s.svs", planted.paint(Size(701, 911), [(planted.A, Box(100, 100, 400, 500))]))
    events: list[Event] = []
    result = infer(slide, "planted", tmp_path / "out", tissue="none", profile=True, listener=events.append)
    timing = result.run["timing"]
    assert 0 < timing["first_tile_s"] < timing["wall_s"]
    assert 0 < timing["model_busy"] <= 1
    assert {"open", "tissue", "read", "model", "journal", "merge", "map", "overlay"} <= set(timing["stages_s"])
    assert (tmp_path / "out" / "profile.png").exists()
    assert "profile.png" in result.run["files"]
    [told] = [event for event in events if event.kind == "profile"]
    assert any(line.startswith("model") for line in told.data["lines"])
    infer(slide, "planted", tmp_path / "plain", tissue="none")
    assert not (tmp_path / "plain" / "profile.png").exists()
