"""File tiles shrunk while they are in the cache, or left out: the same pixels wherever anybody looks."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import imagecodecs
import numpy as np
import pytest

import wsiengine
from tests.mosaics import position_slide
from wsiengine import Box, Mpp, Size, open_slide
from wsiengine.grid import Block
from wsiengine.slides import WholeSlide
from wsiengine.slides.base import TileReader
from wsiengine.slides.pyramid import PyramidLayout
from wsikernels.resample import resample_area

SIZE = Size(389, 523)
TILE_PX = 48
MPPS = [Mpp.square(1.0), Mpp(2.0, 1.5), Mpp(1.5, 2.0)]  # 2 × 2 pixels, 4 × 3, 3 × 4: all divide a file tile
BOXES = [Box(0, 0, 97, 120), Box(3, 5, 90, 61), Box(30, 30, 31, 31), Box(24, 48, 48, 72)]


@pytest.fixture(scope="module", params=["jpeg", "jpeg2000", "deflate"])
def path(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("slides") / "s.svs"
    position_slide(path, SIZE, 0.5, PyramidLayout(tile_px=TILE_PX, compression=request.param, downsamples=(1,)))
    return path


@pytest.fixture
def slide(path: Path) -> Iterator[WholeSlide]:
    with open_slide(path) as slide:
        assert isinstance(slide._reader, TileReader)
        yield slide


def _in_one_piece(slide: WholeSlide, box: Box, mpp: Mpp) -> np.ndarray:
    """The level first, then all of it resampled."""
    ratio = mpp.y / 0.5, mpp.x / 0.5
    source = Box(*(round(n * ratio[axis % 2]) for axis, n in enumerate((box.y0, box.x0, box.y1, box.x1))))
    pixels, out = slide.read_level(0, source), np.empty((*box.shape, 3), np.uint8)
    return resample_area(pixels, source.y0, source.x0, *ratio, box.y0, box.x0, out)


@pytest.mark.parametrize("mpp", MPPS, ids=str)
@pytest.mark.parametrize("box", BOXES, ids=str)
def test_shrunk_tile_by_tile_as_in_one_piece(slide: WholeSlide, box: Box, mpp: Mpp) -> None:
    ratio = round(mpp.y / 0.5), round(mpp.x / 0.5)
    assert slide.read_shrunk(0, box, ratio, None) is not None
    np.testing.assert_array_equal(slide.read(box, mpp), _in_one_piece(slide, box, mpp))


@pytest.mark.parametrize("mpp", [Mpp.square(0.5), *MPPS, Mpp.square(0.77), Mpp.square(2.5)], ids=str)
def test_parts_are_right_and_no_other_file_tile_is_decoded(
    slide: WholeSlide, mpp: Mpp, monkeypatch: pytest.MonkeyPatch
) -> None:
    """2.5 µm/px: five pixels, which do not divide a file tile; the box reaches beyond the slide at some."""
    factor = mpp.mean / 0.5
    box = Box(0, 0, round(400 / factor), round(540 / factor))
    side = max(1, round(60 / factor))
    parts = [Box.of(Size(side, side), y, x) for y, x in ((2, 3), (2, 3 + side), (box.y1 - side, box.x1 - side))]
    whole = slide.read(box, mpp)
    decoded: list[tuple[int, int, int]] = []
    plain = slide._reader._pixels

    def counted(tile: tuple[int, int, int], *rest: Any) -> np.ndarray:
        decoded.append(tile)
        return plain(tile, *rest)

    monkeypatch.setattr(slide._reader, "_pixels", counted)
    seen = slide.read_parts(box, mpp, parts)
    for part in parts:
        np.testing.assert_array_equal(seen[part.slices], whole[part.slices])
    rows, cols = -(-SIZE.height // TILE_PX), -(-SIZE.width // TILE_PX)
    assert len(decoded) == len(set(decoded)) < rows * cols / 2
    assert (seen[box.height // 2 : box.height // 2 + 2, 2:5] == 255).all()  # nobody looks there
    assert (whole[box.height // 2 : box.height // 2 + 2, 2:5] != 255).any()


def test_a_slide_that_cannot_be_shrunk_tile_by_tile_is_read_as_before(slide: WholeSlide) -> None:
    assert slide.read_shrunk(0, Box(0, 0, 20, 20), (5, 5), None) is None  # 48 is no multiple of 5
    assert slide.read_shrunk(0, Box(0, 0, 200, 20), (2, 2), None) is None  # beyond the slide
    with open_slide(slide.path, reader="openslide") as other:
        assert other.read_shrunk(0, Box(0, 0, 20, 20), (2, 2), None) is None
        np.testing.assert_array_equal(
            other.read_parts(Box(0, 0, 90, 90), Mpp.square(1.0), [Box(1, 1, 9, 9)]),
            other.read(Box(0, 0, 90, 90), Mpp.square(1.0)),
        )


def test_a_block_reads_no_file_tile_between_its_tiles(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    position_slide(
        tmp_path / "s.svs", Size(1024, 1024), 0.5, PyramidLayout(tile_px=64, compression="jpeg", downsamples=(1,))
    )
    plan = wsiengine.plan(tmp_path / "s.svs", "planted", tissue="none", overlap=0.0, block_tiles=8)
    assert plan.job
    viewer = plan.job.viewer
    [tiles, *_] = [block.tiles for block in plan.blocks()]
    every, corners = (Block(tiles, np.zeros(tiles.shape, bool)) for _ in range(2))
    every.wanted[:] = True
    corners.wanted[0, 0] = corners.wanted[-1, -1] = True
    whole, _ = viewer.view(every)
    calls = []
    plain = imagecodecs.jpeg8_decode
    monkeypatch.setattr(imagecodecs, "jpeg8_decode", lambda *args, **how: calls.append(1) or plain(*args, **how))
    some, _ = viewer.view(corners)
    side = plan.grid.tile_px
    assert len(calls) < 2 * (side * plan.lattice.l0_per_px[0] / 64 + 2) ** 2 < 256
    for pixels, (y, x) in ((whole.pixels, whole.corners_px[k]) for k in (0, -1)):
        tile = pixels[y : y + side, x : x + side]
        y, x = some.corners_px[0 if not y else 1]
        np.testing.assert_array_equal(some.pixels[y : y + side, x : x + side], tile)
