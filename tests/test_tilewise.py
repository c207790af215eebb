"""Tiles shrunk one by one: as by the original's own transform, whatever the block; whole runs of a converted model."""

import warnings
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.data import data_dir
from tests.fakes import ArraySlide, position_pixels
from tests.models.test_adding import torchscript
from wsiengine.errors import CardError, PlanError
from wsiengine.geometry import Lattice, Mpp, Size
from wsiengine.inference import infer
from wsiengine.models.adding import Asked, add
from wsiengine.models.card import Card
from wsiengine.models.registry import load_model
from wsiengine.store import open_store
from wsiengine.tilewise import shrunk_tiles


@pytest.fixture(scope="module")
def converted(tmp_path_factory: pytest.TempPathFactory) -> tuple[Card, Path]:
    """A model of the zoo, converted: patches of 96 px at 0.5 µm/px, shrunk to 64 px."""
    root = tmp_path_factory.mktemp("zoo")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("WSIENGINE_CONFIG", str(root / "config"))
        return add(str(torchscript(root / "model")), Asked(trust=True)), root / "model"


def original(folder: Path, patches: list[np.ndarray]) -> np.ndarray:
    """What the original makes of level-0 patches, by its own transform: probabilities (N, classes)."""
    torch = pytest.importorskip("torch")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch would rather have us use something else
        network = torch.jit.load(str(folder / "torchscript_model.pt")).eval()
    rows = []
    for patch in patches:
        tile = np.asarray(Image.fromarray(patch).resize((64, 64), Image.Resampling.BILINEAR))
        values = torch.from_numpy(tile.copy()).permute(2, 0, 1).float() / 255
        values = (values - torch.tensor([0.7, 0.6, 0.7])[:, None, None]) / torch.tensor([0.2, 0.25, 0.2])[:, None, None]
        with torch.inference_mode():
            rows.append(network(values[None]).softmax(1)[0].numpy())
    return np.stack(rows)


def fields(count: int) -> list[np.ndarray]:
    """Real stained tissue."""
    paths = sorted((data_dir() / "crc" / "glas" / "images").glob("*.*"))
    images = [np.asarray(Image.open(p).convert("RGB")) for p in paths[:count]]
    if len(images) < count:
        pytest.skip("no GlaS images in WSIENGINE_DATA")
    return images


def scores_of(out: Path) -> np.ndarray:
    return np.asarray(open_store(out / "probability.zarr").scores[...])


@pytest.mark.parametrize("mpp", [0.25, 0.31, 0.5])
def test_a_run_gives_the_originals_probabilities_on_tissue(mpp: float, converted, tmp_path: Path) -> None:
    card, folder = converted
    pixels = np.concatenate([image[:400, :700] for image in fields(2)])
    slide = ArraySlide(pixels, mpp, downsamples=(1, 2))
    infer(slide, str(card.folder), tmp_path / "out", tissue="none", overlap=0.0, block_tiles=2, threads=1)
    scores = scores_of(tmp_path / "out").astype(np.float64)
    found = np.exp(scores) / np.exp(scores).sum(axis=-1, keepdims=True)
    side = round(96 * 0.5 / mpp)
    places = [
        (row, col)
        for row, col in np.ndindex(scores.shape[:2])
        if (row + 1) * side < pixels.shape[0] - 2 and (col + 1) * side < pixels.shape[1] - 2
    ]
    assert len(places) >= 6
    step = 64 * 0.75 / mpp
    corners = [(round(row * step), round(col * step)) for row, col in places]
    wanted = original(folder, [pixels[y : y + side, x : x + side] for y, x in corners])
    assert np.abs(np.array([found[place] for place in places]) - wanted).max() < 1e-3
    assert np.ptp(wanted[:, 0]) > 0.02  # tiles differ: a constant would agree too


def test_blocks_threads_and_overlap_change_no_tile(converted, tmp_path: Path) -> None:
    card, _ = converted
    slide = ArraySlide(position_pixels(701, 523), 0.43)
    runs = []
    for k, options in enumerate(({"block_tiles": 1}, {"block_tiles": 4, "threads": 2})):
        infer(slide, str(card.folder), tmp_path / str(k), tissue="none", overlap=0.5, **options)
        runs.append(scores_of(tmp_path / str(k)))
    assert np.array_equal(*runs)


def test_the_places_of_tiles() -> None:
    """A tile covers round(size · f) pixels of level 0 from round(origin · f), for y and x by themselves."""
    pixels = position_pixels(300, 400)
    slide = ArraySlide(pixels, Mpp(0.3, 0.25))
    lattice = Lattice(Size(300, 400), Mpp(0.3, 0.25), Mpp.square(0.5), 16)
    origins = np.array([[16, 32], [48, 0]])
    column, corners, touched = shrunk_tiles(slide, lattice, origins, 32)  # type: ignore[arg-type]
    assert touched is None
    assert corners.tolist() == [[0, 0], [32, 0]]
    for k, (y, x) in enumerate([(27, 64), (80, 0)]):
        patch = pixels[y : y + 53, x : x + 64]
        wanted = np.asarray(Image.fromarray(patch).resize((32, 32), Image.Resampling.BILINEAR))
        assert np.array_equal(column[k * 32 : (k + 1) * 32], wanted)


def test_recipes_and_other_tasks_are_refused(converted, tmp_path: Path) -> None:
    card, _ = converted
    slide = ArraySlide(position_pixels(300, 400), 0.5)
    with pytest.raises(PlanError, match="shrinks each tile by itself, and the recipe macenko"):
        infer(slide, str(card.folder), tmp_path / "out", normalise="macenko", tissue="none")
    with pytest.raises(CardError, match="no `dense` block"):
        infer(slide, str(card.folder), tmp_path / "out", mode="dense", tissue="none")
    assert load_model(card.folder).dense is None
