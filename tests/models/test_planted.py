"""The planted-mark model finds drawn marks exactly, and the shipped files are what the recipe builds."""

import io

import numpy as np
import pytest
from PIL import Image

from tests.fakes import ArraySlide
from wsiengine.geometry import Mpp
from wsiengine.models import planted
from wsiengine.models.activation import activate
from wsiengine.models.registry import load_model
from wsiengine.models.runtime import Runtime
from wsiengine.tissue import find_tissue

TILE, CELL = planted.TILE_PX, planted.CELL_PX


@pytest.fixture(scope="module")
def runtime() -> Runtime:
    return Runtime(load_model("planted"), device="cpu")


def cover(pixels: np.ndarray) -> np.ndarray:
    """The definition, pixel by pixel: (marks, rows, cols) of 0 and 1."""
    colours = np.array(list(planted.MARKS.values()))
    far = ((pixels[None].astype(int) - colours[:, None, None]) ** 2).sum(axis=-1)
    return (far <= planted.RADIUS**2).astype(np.float64)


def scene(height: int = 203, width: int = 331) -> np.ndarray:
    """Pale pink of many shades with marks of all colours, one over another."""
    y, x = np.mgrid[:height, :width]
    pixels = np.stack([225 + (x + y) % 20, 180 + (3 * x + y) % 30, 205 + (x * y) % 20], axis=-1).astype(np.uint8)
    for (y0, x0, y1, x1), colour in zip(
        [(5, 9, 120, 101), (33, 150, 160, 290), (90, 60, 200, 180)], planted.MARKS.values(), strict=True
    ):
        pixels[y0:y1, x0:x1] = colour
    return pixels


def tiles(shape: tuple[int, ...], step: int = CELL) -> np.ndarray:
    return np.array([(y, x) for y in range(0, shape[0] - TILE + 1, step) for x in range(0, shape[1] - TILE + 1, step)])


def test_scores_are_the_definition_bit_for_bit(runtime: Runtime) -> None:
    pixels = scene()
    origins = tiles(pixels.shape, 7)
    found = runtime.scores(pixels, origins)
    near = cover(pixels)
    share = np.array([near[:, y : y + TILE, x : x + TILE].mean(axis=(1, 2)) for y, x in origins])
    assert np.array_equal(found[:, :3], (planted.GAIN * share).astype(np.float32))
    assert np.array_equal(found[:, 3], share.sum(axis=1).astype(np.float32))
    assert {int(row.argmax()) for row in found if row[3] >= planted.MINIMUM} == {0, 1, 2}


def test_a_covered_tile_is_certain(runtime: Runtime) -> None:
    for channel, colour in enumerate(planted.MARKS.values()):
        row = runtime.scores(np.full((TILE, TILE, 3), colour, np.uint8), np.array([(0, 0)]))[0]
        assert row[3] == 1.0
        assert activate(row[:3], "softmax")[channel] > 0.999999


@pytest.mark.parametrize(
    "colour",
    [(255, 255, 255), (0, 0, 0), (225, 180, 205), (100, 60, 130), (220, 120, 180), (120, 80, 40), (180, 130, 80)],
)
def test_glass_and_stains_are_no_marks(colour: tuple[int, int, int], runtime: Runtime) -> None:
    assert not runtime.scores(np.full((TILE, TILE, 3), colour, np.uint8), np.array([(0, 0)])).any()


def test_no_pixel_belongs_to_two_marks() -> None:
    colours = np.array(list(planted.MARKS.values()), float)
    apart = np.sqrt(((colours[:, None] - colours[None]) ** 2).sum(axis=-1))
    assert apart[~np.eye(len(colours), dtype=bool)].min() > 2 * planted.RADIUS


def test_jpeg_and_area_resampling_move_it_little(runtime: Runtime) -> None:
    sharp = scene()
    doubled = sharp.repeat(2, axis=0).repeat(2, axis=1)
    file = io.BytesIO()
    Image.fromarray(doubled).save(file, "JPEG", quality=80, subsampling=2)
    decoded = np.asarray(Image.open(file)).astype(np.float64)
    halved = decoded.reshape(sharp.shape[0], 2, sharp.shape[1], 2, 3).mean(axis=(1, 3)).round().astype(np.uint8)
    origins = tiles(sharp.shape)
    before, after = runtime.scores(sharp, origins), runtime.scores(halved, origins)
    assert np.abs(before[:, 3] - after[:, 3]).max() < 0.03
    sure = before[:, 3] >= planted.MINIMUM
    assert np.array_equal(before[sure, :3].argmax(axis=1), after[sure, :3].argmax(axis=1))


def test_dense_map_means_equal_tiles(runtime: Runtime) -> None:
    pixels = scene(208, 336)
    (cam,) = runtime._session.run(["cam"], {"tiles": pixels[None]})
    assert cam.shape == (1, 3, 208 // CELL, 336 // CELL)
    side = TILE // CELL
    for (y, x), row in zip(tiles(pixels.shape), runtime.scores(pixels, tiles(pixels.shape)), strict=True):
        window = cam[0, :, y // CELL : y // CELL + side, x // CELL : x // CELL + side]
        assert np.array_equal(window.mean(axis=(1, 2)), row[:3])


def test_the_card_tells_the_marks() -> None:
    card = load_model("planted")
    assert {info.name: info.colour for info in card.classes} == dict(planted.MARKS)
    assert (card.input.size_px, card.output_stride_px, card.input.mpp.mean) == (TILE, CELL, planted.UM_PER_PX)
    assert card.gate is not None
    assert (card.gate.minimum, card.gate.otherwise) == (planted.MINIMUM, planted.OTHERWISE)
    assert card.dense is not None
    assert (card.dense.halo_px, card.dense.offset_px) == (0, (CELL - 1) / 2)


def test_the_recipe_builds_what_is_shipped(tmp_path) -> None:
    from wsiengine.training.planted import write

    shipped, built = load_model("planted"), write(tmp_path)
    assert built.to_json() == shipped.to_json()
    assert built.model_path.read_bytes() == shipped.model_path.read_bytes()
    assert load_model(tmp_path) == shipped


def test_the_tissue_mask_keeps_the_marks() -> None:
    """They must not look like pen: a ruler that is masked away measures nothing."""
    y, x = np.mgrid[:900, :1300]
    pixels = np.full((900, 1300, 3), 243, np.uint8)
    pixels[100:800, 100:1200] = np.stack([222 + y % 17, 170 + x % 23, 200 + (x + y) % 13], axis=-1)[100:800, 100:1200]
    for number, colour in enumerate(planted.MARKS.values()):
        pixels[200:600, 150 + 350 * number : 450 + 350 * number] = colour
    mask = find_tissue(ArraySlide(pixels, Mpp.square(1.0))).mask
    for number in range(3):
        assert mask[26:74, (160 + 350 * number) // 8 : (440 + 350 * number) // 8].all(), list(planted.MARKS)[number]
