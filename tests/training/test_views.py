"""Views: drawn once, used by the trainings whose side they belong to; the network above them is the whole one's."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch

from tests.training.fields import write_sets
from wsiengine.errors import OutputConflict, WsiError
from wsiengine.training import views
from wsiengine.training.cells import STRIDE_PX, CellNet
from wsiengine.training.crc5 import VIEW_RECIPE
from wsiengine.training.data import load, read_fields
from wsiengine.training.loop import load_trained
from wsiengine.training.release import command
from wsiengine.training.sampling import UNREADABLE, Sampler
from wsiengine.training.scoring import image_name

RECIPE = replace(VIEW_RECIPE, folds=(1,), iterations=3, batches=(6, 6))


@pytest.fixture(scope="module")
def fields(tmp_path_factory):
    return read_fields(write_sets(tmp_path_factory.mktemp("data")))


@pytest.fixture(scope="module")
def network():
    torch.manual_seed(0)
    return CellNet(3).eval()


@pytest.fixture(scope="module")
def drawn(fields, network):
    pixels = [load(f, 1.0) for f in fields]
    sampler = Sampler(pixels, RECIPE.classes, RECIPE.joins, RECIPE.shares, cell_px=STRIDE_PX, seed=0)
    return views.make_views(network, sampler, [image_name(f) for f in fields], 120, seed=3)


@pytest.fixture
def from_chance(monkeypatch):
    monkeypatch.setattr(views, "load_weights", lambda backbone, file: None)


def test_views_are_what_the_frozen_steps_make_of_tiles(fields, network, drawn, monkeypatch):
    """The rest of the network, on views, says what the whole network says of the tiles."""
    pixels = [load(f, 1.0) for f in fields]
    sampler = Sampler(pixels, RECIPE.classes, RECIPE.joins, RECIPE.shares, cell_px=STRIDE_PX, seed=0)
    tiles = np.stack([sampler.draw(np.random.default_rng((3, i)), views.SIDE_PX).tile for i in (0, 60)])
    upper = views.UpperNet(3).eval()
    upper.load_state_dict(network.state_dict())
    maps = torch.from_numpy(drawn.maps[[0, 60]]).view(torch.bfloat16).float().permute(0, 3, 1, 2)
    with torch.inference_mode():
        whole, gate = network(torch.from_numpy(tiles).permute(0, 3, 1, 2), views.STEPS)
        part, part_gate = upper(maps)
    np.testing.assert_allclose(part, whole, atol=2e-3)
    np.testing.assert_allclose(part_gate, gate, atol=2e-3)
    assert drawn.maps.shape[1:3] == (10, 10)
    assert drawn.epithelium.shape == (120, 5, 5)


def test_views_come_back_from_files(drawn, tmp_path):
    drawn.save(tmp_path / "a.npz")
    both = views.Views.read([tmp_path / "a.npz", tmp_path / "a.npz"])
    np.testing.assert_array_equal(both.maps[120:], drawn.maps)
    assert both.field.tolist() == drawn.field.tolist() * 2
    assert both.drawn == ((120, 3), (120, 3))


def test_views_of_other_steps_do_not_go_together(fields, network, drawn, from_chance, tmp_path):
    pixels = [load(f, 1.0) for f in fields]
    sampler = Sampler(pixels, RECIPE.classes, RECIPE.joins, RECIPE.shares, cell_px=STRIDE_PX, seed=0)
    earlier = views.make_views(network, sampler, [image_name(f) for f in fields], 3, seed=3, steps=8)
    assert (drawn.maps.shape[3], earlier.maps.shape[3]) == (96, 64)
    earlier.save(tmp_path / "earlier.npz")
    drawn.save(tmp_path / "drawn.npz")
    assert views.Views.read([tmp_path / "earlier.npz"]).steps == 8
    with pytest.raises(WsiError, match="views of 8 and of 14 steps do not go together"):
        views.Views.read([tmp_path / "earlier.npz", tmp_path / "drawn.npz"])
    with pytest.raises(WsiError, match="views of 8 steps, and a recipe that freezes 14"):
        views.train_on_views(fields, RECIPE, earlier, backbone=None, out=tmp_path / "run")
    with torch.inference_mode():
        upper = views.UpperNet(3, 8).eval()
        upper.load_state_dict(network.state_dict())
        part, _ = upper(torch.from_numpy(earlier.maps).view(torch.bfloat16).float().permute(0, 3, 1, 2))
        tiles = np.stack([sampler.draw(np.random.default_rng((3, i)), views.SIDE_PX).tile for i in range(3)])
        whole, _ = network(torch.from_numpy(tiles).permute(0, 3, 1, 2), 8)
    np.testing.assert_allclose(part, whole, atol=2e-3)


def test_neither_a_tested_field_nor_its_stain_is_trained_on(fields, drawn):
    train = RECIPE.chosen(fields)
    names = {image_name(f) for f in train}
    marked = replace(drawn, epithelium=np.arange(120, dtype=np.float32)[:, None, None] * np.ones((1, 5, 5), np.float32))
    sampler = views.ViewSampler(marked, train, RECIPE)
    seen = np.unique(np.concatenate([sampler.batch(i, 40, 160).epithelium[:, 0, 0] for i in range(20)])).astype(int)
    assert len(seen) > 20
    assert set(drawn.field[seen]) <= names
    assert set(drawn.like[seen]) <= names | {""}
    foreign = [i for i in range(120) if drawn.field[i] in names and drawn.like[i] not in names | {""}]
    assert foreign  # there were views to be left out because of their stain alone


def test_a_batch_depends_on_seed_and_iteration_alone(fields, drawn):
    one, two = (views.ViewSampler(drawn, RECIPE.chosen(fields), RECIPE) for _ in range(2))
    one.batch(0, 9, 160)
    first, same, other = one.batch(4, 9, 160), two.batch(4, 9, 160), one.batch(5, 9, 160)
    np.testing.assert_array_equal(first.tiles, same.tiles)
    assert (first.tiles != other.tiles).any()


def test_classes_come_up_alike(fields, drawn):
    sampler = views.ViewSampler(drawn, fields, RECIPE)
    labels = np.concatenate([sampler.batch(i, 100, 160).labels for i in range(6)])
    share = np.array([(labels == c).mean() for c in range(3)])
    assert abs(share - share.mean()).max() < 0.08
    assert 0.02 < (labels == UNREADABLE).mean() < 0.1


def test_views_serve_a_training_of_fewer_classes(fields, drawn):
    recipe = replace(RECIPE, classes=("Normal", "Adenocarcinoma"), sources=("lc25000",), folds=(0, 1))
    drawn = replace(drawn, like=np.full(len(drawn.like), ""))
    labels = views.ViewSampler(drawn, recipe.chosen(fields), recipe).batch(0, 200, 160).labels
    assert (labels == 0).sum() > 50
    assert (labels == 1).sum() > 50
    assert labels.max() == 1


def test_a_class_without_views_gets_words(fields, drawn):
    with pytest.raises(WsiError, match="no view shows Adenoma"):
        views.ViewSampler(drawn, [f for f in fields if f.label != "Adenoma"], RECIPE)


def test_training_on_views_leaves_a_trainings_folder(fields, drawn, from_chance, tmp_path):
    network = views.train_on_views(fields, RECIPE, drawn, backbone=None, out=tmp_path / "run")
    again = load_trained(tmp_path / "run")
    assert type(again) is type(network) is CellNet  # it takes pixels
    said = json.loads((tmp_path / "run" / views.DRAWN).read_text())
    assert command(RECIPE, said) == (
        "python -m wsiengine.training.views --data DIR --to views3.npz --count 120 --seed 3 --steps 14 --threads 1 && "
        "python -m wsiengine.training.crc5 --data DIR --out RUN --views views3.npz --folds 1 --iterations 3 --seed 0 "
        "--threads 1"
    )
    assert all(torch.equal(v, again.state_dict()[k]) for k, v in network.state_dict().items())
    with pytest.raises(OutputConflict, match="another recipe"):
        views.train_on_views(fields, replace(RECIPE, seed=1), drawn, backbone=None, out=tmp_path / "run")
