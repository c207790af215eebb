"""Training that is killed and started again, that stops early, or goes in stages: always the same weights."""

import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from tests.training.fields import write_sets
from wsiengine.training import cells, loop
from wsiengine.training.crc5 import RECIPE
from wsiengine.training.data import read_fields
from wsiengine.training.schedule import ALL_STEPS, Recipe

ROOT = Path(__file__).parents[2]
SHORT = replace(
    RECIPE, folds=(1,), iterations=8, batches=(4, 2), sides_px=(64, 96), frozen_blocks=1, threads=1, small_until=0.5
)
PROGRAM = """
import sys
from pathlib import Path
from wsiengine.training import cells, loop
from wsiengine.training.data import read_fields
from tests.training.test_resume import SHORT, narrow
loop.CellNet = narrow()
loop.CHECKPOINT_EVERY = 2
loop.train(read_fields(Path(sys.argv[1])), SHORT, backbone=None, out=Path(sys.argv[2]))
"""


def narrow():
    class Narrow(cells.CellNet):
        def __init__(self, classes, width=0.25, **kind):
            super().__init__(classes, width, **kind)

    return Narrow


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_sets(tmp_path_factory.mktemp("data"))


def weights(folder):
    return torch.load(folder / "model.pt", weights_only=True)


def same(one, other):
    return all(torch.equal(one[key], other[key]) for key in one)


def start(data, out):
    env = os.environ | {"PYTHONPATH": f"{ROOT}:{ROOT / 'kernels'}"}
    command = [sys.executable, "-c", PROGRAM, str(data), str(out)]
    return subprocess.Popen(command, env=env, cwd=ROOT, stdout=subprocess.DEVNULL)


def test_killed_at_once_and_started_again(data, tmp_path):
    assert start(data, tmp_path / "whole").wait(120) == 0
    torn = start(data, tmp_path / "torn")
    for _ in range(1200):
        if (tmp_path / "torn" / "checkpoint.pt").exists():
            break
        time.sleep(0.05)
    torn.send_signal(signal.SIGKILL)
    assert torn.wait(60) == -signal.SIGKILL
    assert not (tmp_path / "torn" / "model.pt").exists()
    assert start(data, tmp_path / "torn").wait(120) == 0
    assert same(weights(tmp_path / "whole"), weights(tmp_path / "torn"))
    logs = [(tmp_path / name / "log.jsonl").read_text().count("\n") for name in ("whole", "torn")]
    assert logs[0] == logs[1]  # nothing is logged twice


@pytest.fixture
def small(monkeypatch):
    monkeypatch.setattr(loop, "CellNet", narrow())


def fields_of(data):
    return read_fields(data)


def test_validation_stops_it_and_the_best_is_kept(data, small, tmp_path, monkeypatch):
    recipe = replace(SHORT, iterations=40, validation_folds=(0,), validate_every=2, patience=3)
    scores = iter([0.5, 0.7, 0.9, 0.8, 0.8, 0.6, 0.99])
    kept = []

    def validate(network):
        kept.append({k: v.clone() for k, v in network.state_dict().items()})
        return {"score": next(scores), "balanced_accuracy": 0.5, "loss": 1.0}

    told = []
    loop.train(fields_of(data), recipe, backbone=None, out=tmp_path, tell=told.append, validate=validate)
    assert told[-1].iteration == 12  # six validations, the last three no better than the third
    assert same(kept[2], weights(tmp_path))
    assert not same(kept[5], weights(tmp_path))


def test_stages_freeze_and_thaw(data, small, tmp_path):
    recipe = replace(SHORT, iterations=4, stages=((0.5, ALL_STEPS), (1.0, 10)), ema=0.0)
    assert [recipe.frozen_at(i) for i in range(4)] == [ALL_STEPS, ALL_STEPS, 10, 10]
    states = []

    def look(progress):
        states.append({k: v.clone() for k, v in networks[0].state_dict().items()})

    networks = []
    original = loop.Trainer.__init__

    def remember(self, recipe, network, average, out):
        original(self, recipe, network, average, out)
        networks.append(network)

    loop.Trainer.__init__ = remember
    try:
        loop.train(fields_of(data), recipe, backbone=None, out=tmp_path, tell=look)
    finally:
        loop.Trainer.__init__ = original
    moved = [{k for k in states[0] if not torch.equal(states[i][k], states[i + 1][k])} for i in range(3)]
    assert not {k for k in moved[0] if k.startswith("backbone")}
    thawed = {int(k.split(".")[2]) for k in moved[1] | moved[2] if k.startswith("backbone.blocks")}
    assert thawed == set(range(10, 19))


def test_rates_follow_the_schedule():
    def rates(schedule):
        return [replace(SHORT, iterations=100, schedule=schedule).rate_at(i) for i in (0, 5, 50, 70, 90, 99)]

    assert rates("constant") == [0, 1, 1, 1, 1, 1]
    assert rates("steps") == pytest.approx([0, 1, 1, 0.1, 0.01, 0.01])
    cosine = rates("cosine")
    assert cosine[1] == 1
    assert cosine == sorted(cosine[1:], reverse=True) or cosine[1:] == sorted(cosine[1:], reverse=True)
    assert cosine[-1] < 0.01


def test_class_weights_count(data, small, tmp_path):
    plain = loop.train(fields_of(data), SHORT, backbone=None, out=tmp_path / "a", tell=lambda p: None)
    heavy = replace(SHORT, class_weights={"Normal": 10.0})
    weighed = loop.train(fields_of(data), heavy, backbone=None, out=tmp_path / "b", tell=lambda p: None)
    with torch.inference_mode():
        tiles = torch.full((1, 3, 64, 64), 150, dtype=torch.uint8)
        shares = [n(tiles)[0].mean((2, 3)).softmax(1)[0, 0].item() for n in (plain, weighed)]
    assert shares[1] > shares[0]


def test_recipes_go_to_a_file_and_back(tmp_path):
    recipe = replace(SHORT, stages=((0.5, ALL_STEPS), (1.0, 3)), class_weights={"Normal": 2.0})
    loop.claim(tmp_path, recipe)
    assert Recipe.read(tmp_path / "recipe.json") == recipe
