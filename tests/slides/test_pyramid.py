"""Writing pyramids: what is written is what was given, in bounded memory, and OpenSlide takes it for Aperio's."""

import tracemalloc
from pathlib import Path

import numpy as np
import openslide
import pytest
import tifffile

from tests.fakes import position_pixels, resample_area
from wsiengine import Box, Mpp, Size, open_slide
from wsiengine.slides.pyramid import PyramidLayout, write_pyramid

SIZE = Size(517, 683)


@pytest.mark.parametrize("downsamples", [(1,), (1, 4, 16), (1, 2, 6, 24)], ids=str)
@pytest.mark.parametrize("whole", [True, False], ids=["array", "rows"])
def test_levels_are_area_means(tmp_path: Path, downsamples: tuple[int, ...], whole: bool) -> None:
    path = tmp_path / "slide.svs"
    pixels = position_pixels(*SIZE.shape)
    layout = PyramidLayout(tile_px=64, compression="deflate", downsamples=downsamples)
    write_pyramid(path, pixels if whole else lambda y0, y1: pixels[y0:y1], SIZE, 0.5, layout)
    with open_slide(path) as slide:
        assert [level.downsample for level in slide.info.levels] == [(d, d) for d in downsamples]
        np.testing.assert_array_equal(slide.read_level(0, Box.of(SIZE)), pixels)
        for index, level in enumerate(slide.info.levels[1:], 1):
            got = slide.read_level(index, Box.of(level.size))
            want = resample_area(pixels, (downsamples[index],) * 2, Box.of(level.size))
            assert np.abs(got.astype(int) - want).max() <= 2  # each level rounds once more
    assert list(tmp_path.iterdir()) == [path]


def test_openslide_takes_it_for_aperio(tmp_path: Path) -> None:
    path = tmp_path / "slide.svs"
    write_pyramid(path, position_pixels(*SIZE.shape), SIZE, 0.2527, PyramidLayout(tile_px=128))
    with openslide.OpenSlide(path) as slide:
        assert slide.properties["openslide.vendor"] == "aperio"
        assert float(slide.properties["openslide.mpp-x"]) == float(slide.properties["openslide.mpp-y"]) == 0.2527
        assert float(slide.properties["openslide.objective-power"]) == pytest.approx(10 / 0.2527, rel=1e-4)
        assert slide.level_dimensions == ((683, 517), (170, 129), (42, 32))
        assert slide.properties["openslide.level[0].tile-width"] == "128"
        thumbnail = np.asarray(slide.associated_images["thumbnail"].convert("RGB"))
    want = resample_area(position_pixels(*SIZE.shape), (16, 16), Box(0, 0, 32, 42))
    assert np.abs(thumbnail.astype(int) - want)[..., :2].mean() < 6


def test_tifffile_finds_the_levels(tmp_path: Path) -> None:
    path = tmp_path / "slide.svs"
    write_pyramid(path, position_pixels(*SIZE.shape), SIZE, 0.5, PyramidLayout(tile_px=64))
    with tifffile.TiffFile(path) as tiff:
        assert [series.name for series in tiff.series] == ["Baseline", "Thumbnail"]
        assert [level.shape for level in tiff.series[0].levels] == [(517, 683, 3), (129, 170, 3), (32, 42, 3)]


@pytest.mark.parametrize("size", [Size(1, 1), Size(3, 700), Size(64, 64), Size(65, 63)], ids=str)
def test_slides_smaller_than_a_tile(tmp_path: Path, size: Size) -> None:
    path = tmp_path / "slide.svs"
    pixels = position_pixels(*size.shape)
    write_pyramid(path, pixels, size, 0.5, PyramidLayout(tile_px=64, compression="deflate", downsamples=(1, 4)))
    with open_slide(path) as slide:
        np.testing.assert_array_equal(slide.read_level(0, Box.of(size)), pixels)
        assert len(slide.info.levels) == (2 if min(size.shape) >= 4 else 1)


def test_overhanging_tiles_do_not_ring_into_the_slide(tmp_path: Path) -> None:
    """What overhangs is the last pixel again: a jump to black there would be seen inside, through JPEG."""
    path = tmp_path / "slide.svs"
    pixels = position_pixels(*SIZE.shape)
    pixels[..., 2] = pixels[..., 1]
    write_pyramid(path, pixels, SIZE, 0.5, PyramidLayout(tile_px=64, downsamples=(1,)))
    with open_slide(path) as slide:
        off = np.abs(slide.read_level(0, Box.of(SIZE)).astype(int) - pixels).max(axis=2)
    assert max(off[:, -1].max(), off[-1].max()) <= off[:-8, :-8].max() + 3


def test_memory_does_not_grow_with_the_height(tmp_path: Path) -> None:
    peaks = []
    band = position_pixels(64, 800)
    for height in (640, 6400):
        tracemalloc.start()
        layout = PyramidLayout(tile_px=64, downsamples=(1, 4, 16))
        write_pyramid(tmp_path / "slide.svs", lambda y0, y1: band[: y1 - y0], Size(height, 800), 0.5, layout)
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[1] < peaks[0] * 1.25 + 200_000  # tile tables grow, pixels do not


def test_large_files_become_bigtiff() -> None:
    from wsiengine.slides.pyramid import _needs_bigtiff

    assert not _needs_bigtiff(Size(30_000, 40_000), PyramidLayout())
    assert _needs_bigtiff(Size(100_000, 100_000), PyramidLayout())


def test_nothing_is_left_of_a_failed_write(tmp_path: Path) -> None:
    def rows(y0: int, y1: int) -> np.ndarray:
        if y0:
            raise RuntimeError("the source failed")
        return position_pixels(y1 - y0, 100)

    with pytest.raises(RuntimeError, match="the source failed"):
        write_pyramid(tmp_path / "slide.svs", rows, Size(200, 100), 0.5, PyramidLayout(tile_px=64, downsamples=(1,)))
    with pytest.raises(ValueError, match=r"rows must be uint8 \(rows, 90, 3\)"):
        write_pyramid(tmp_path / "slide.svs", position_pixels(64, 100), Size(64, 90), 0.5)
    assert list(tmp_path.iterdir()) == []


def test_layouts_that_cannot_be() -> None:
    with pytest.raises(ValueError, match="multiple of 16"):
        PyramidLayout(tile_px=100)
    with pytest.raises(ValueError, match="compression is one of jpeg, jpeg2000, deflate, not webp"):
        PyramidLayout(compression="webp")
    for wrong in ((), (2, 4), (1, 4, 6), (1, 1)):
        with pytest.raises(ValueError, match="downsamples begin with 1"):
            PyramidLayout(downsamples=wrong)
    with pytest.raises(ValueError, match="states one µm/px for both axes"):
        write_pyramid("never.svs", position_pixels(4, 4), Size(4, 4), Mpp(0.5, 0.6))
