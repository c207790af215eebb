"""Direct reading gives OpenSlide's pixels, on every shared slide that OpenSlide opens and on made ones."""

from pathlib import Path

import numpy as np
import openslide
import pytest

from tests.data import data_dir
from tests.fakes import position_pixels
from wsiengine import Box, Size, open_slide
from wsiengine.slides.pyramid import PyramidLayout, write_pyramid

# (file, largest difference): JPEG and lossless are equal; JPEG 2000 with subsampled colour rounds differently
SHARED = {
    "wsi/CMU-1-Small-Region.svs": 0,
    "wsi/tcga-cr-7395-01a-01-ts1.svs": 0,
    "wsi/luna_1065626.svs": 1,
    "wsi/adversarial/ospy_small.svs": 0,
    "wsi/adversarial/ospy_boxes.tiff": 0,
}


def _openslide_level(path: Path, level: int, rows: int) -> np.ndarray:
    """The upper rows of a level, from (0, 0): elsewhere OpenSlide may interpolate. (h, w, 3) uint8."""
    with openslide.OpenSlide(path) as slide:
        width, height = slide.level_dimensions[level]
        rgba = np.asarray(slide.read_region((0, 0), level, (width, min(height, rows))))
    assert (rgba[..., 3] == 255).all()
    return rgba[..., :3]


@pytest.mark.parametrize(("name", "bound"), SHARED.items(), ids=[Path(name).stem for name in SHARED])
def test_shared_slides(name: str, bound: int) -> None:
    path = data_dir() / name
    with open_slide(path) as slide:
        assert slide.info.reader == "direct"
        for index, level in enumerate(slide.info.levels):
            want = _openslide_level(path, index, rows=3000)
            got = slide.read_level(index, Box.of(Size(want.shape[0], level.size.width)))
            assert np.abs(got.astype(np.int16) - want).max() <= bound


@pytest.mark.parametrize("name", SHARED, ids=[Path(name).stem for name in SHARED])
def test_facts_agree(name: str) -> None:
    path = data_dir() / name
    with open_slide(path) as direct, open_slide(path, reader="openslide") as other:
        assert direct.fingerprint() == other.fingerprint()
        for fact in ("size_l0", "levels", "mpp", "objective", "associated", "bounds_l0"):
            assert getattr(direct.info, fact) == getattr(other.info, fact), fact
        if direct.info.stated_mpp:
            assert other.info.stated_mpp
            np.testing.assert_allclose(direct.info.stated_mpp.mean, other.info.stated_mpp.mean, rtol=1e-9)


@pytest.mark.parametrize("compression", ["jpeg", "jpeg2000", "deflate"])
@pytest.mark.parametrize("svs", [True, False], ids=["svs", "tiff"])
def test_written_slides(tmp_path: Path, compression: str, svs: bool) -> None:
    if compression == "jpeg2000" and not svs:
        pytest.skip("OpenSlide reads JPEG 2000 in Aperio files only")
    path = tmp_path / "slide.svs"
    pixels = position_pixels(333, 487)
    layout = PyramidLayout(tile_px=112, compression=compression, svs=svs, downsamples=(1, 2, 6), quality=40)
    write_pyramid(path, pixels, Size(333, 487), 0.5, layout)
    with open_slide(path) as slide:
        assert slide.info.reader == "direct"
        assert slide.info.mpp is not None
        assert len(slide.info.levels) == 3
        for index, level in enumerate(slide.info.levels):
            np.testing.assert_array_equal(
                slide.read_level(index, Box.of(level.size)), _openslide_level(path, index, 999)
            )


def _tiff(path: Path, tiles: list[bytes], **tags: object) -> None:
    """A 96 × 64 px tiled TIFF of ready packed 32 px tiles, described as Aperio's."""
    import tifffile

    description = "Aperio test\r\n96x64 [0,0 96x64] (32x32)|AppMag = 20|MPP = 0.5"
    with tifffile.TiffWriter(path) as tiff:
        tiff.write(
            iter(tiles),
            shape=(64, 96, 3),
            dtype=np.uint8,
            tile=(32, 32),
            description=description,
            metadata=None,
            **tags,
        )


@pytest.mark.parametrize("subsampling", ["420", "422", "444"])
@pytest.mark.parametrize("space", ["YCBCR", "RGB"])
def test_colour_spaces_and_subsampling_of_jpeg(tmp_path: Path, space: str, subsampling: str) -> None:
    """The TIFF tag says how the colours are packed, not the JPEG stream (Aperio packs plain RGB)."""
    import imagecodecs

    if space == "RGB" and subsampling != "444":
        pytest.skip("subsampled RGB is tested on the CMU slide; the encoder here refuses it")
    pixels = position_pixels(64, 96)
    tiles = [
        imagecodecs.jpeg8_encode(
            np.ascontiguousarray(pixels[box.slices]),
            level=80,
            colorspace="RGB",
            outcolorspace=space,
            subsampling=subsampling,
        )
        for box in Box(0, 0, 64, 96).pieces(32, 32)
    ]
    factors = {"420": (2, 2), "422": (2, 1), "444": (1, 1)}[subsampling]
    path = tmp_path / "slide.svs"
    tags = {"photometric": "ycbcr", "subsampling": factors} if space == "YCBCR" else {"photometric": "rgb"}
    if space == "RGB":
        _tiff(path, tiles, compression="jpeg", compressionargs={"outcolorspace": "rgb"}, **tags)
    else:
        _tiff(path, tiles, compression="jpeg", **tags)
    with open_slide(path) as slide:
        assert slide.info.reader == "direct"
        got = slide.read_level(0, Box(0, 0, 64, 96))
    np.testing.assert_array_equal(got, _openslide_level(path, 0, 64))
    assert np.abs(got.astype(int) - pixels).mean() < 12


def test_jpeg2000_packed_as_full_ycbcr(tmp_path: Path) -> None:
    import cv2
    import imagecodecs

    pixels = position_pixels(64, 96, hash_levels=3)
    ycbcr = cv2.cvtColor(pixels, cv2.COLOR_RGB2YCrCb)[..., [0, 2, 1]]
    tiles = [
        imagecodecs.jpeg2k_encode(np.ascontiguousarray(ycbcr[box.slices]), level=0, codecformat="J2K", mct=False)
        for box in Box(0, 0, 64, 96).pieces(32, 32)
    ]
    path = tmp_path / "slide.svs"
    _tiff(path, tiles, compression="aperio_jp2000_ycbc", photometric="rgb")
    with open_slide(path) as slide:
        assert slide.info.reader == "direct"
        got = slide.read_level(0, Box(0, 0, 64, 96))
    assert np.abs(got.astype(int) - _openslide_level(path, 0, 64)).max() <= 1
    assert np.abs(got.astype(int) - pixels).max() <= 3


@pytest.mark.parametrize("compression", [None, "lzw", "adobe_deflate", "zstd"])
@pytest.mark.parametrize("differences", [False, True], ids=["plain", "differences"])
def test_lossless_packing(tmp_path: Path, compression: str | None, differences: bool) -> None:
    import tifffile

    if differences and compression is None:
        pytest.skip("differences come with a compression only")
    pixels = position_pixels(70, 101)
    path = tmp_path / "slide.tif"
    tifffile.imwrite(
        path, pixels, tile=(32, 48), photometric="rgb", compression=compression, predictor=2 if differences else None
    )
    with open_slide(path) as slide:
        assert slide.info.reader == "direct"
        np.testing.assert_array_equal(slide.read_level(0, Box(0, 0, 70, 101)), pixels)


def test_progressive_jpeg_is_not_taken_for_damage(tmp_path: Path) -> None:
    """Its scans have tables between them."""
    import cv2

    pixels = position_pixels(64, 96)
    tiles = [
        cv2.imencode(".jpg", pixels[box.slices][..., ::-1], [cv2.IMWRITE_JPEG_PROGRESSIVE, 1])[1].tobytes()
        for box in Box(0, 0, 64, 96).pieces(32, 32)
    ]
    path = tmp_path / "slide.svs"
    _tiff(path, tiles, compression="jpeg", photometric="ycbcr", subsampling=(2, 2))
    with open_slide(path) as slide:
        assert slide.info.reader == "direct"
        np.testing.assert_array_equal(slide.read_level(0, Box(0, 0, 64, 96)), _openslide_level(path, 0, 64))


def test_slides_with_missing_tiles_are_left_to_openslide(tmp_path: Path) -> None:
    """It fills a hole of a coarser level from the finer one; in the finest a hole is glass."""
    import tifffile

    path = tmp_path / "slide.svs"
    pixels = position_pixels(203, 311)
    write_pyramid(path, pixels, Size(203, 311), 0.5, PyramidLayout(tile_px=64, downsamples=(1, 2), quality=95))
    with tifffile.TiffFile(path, mode="r+b") as tiff:
        for page, hole in ((0, 7), (2, 0)):  # between them the thumbnail
            tag = tiff.pages[page].tags["TileByteCounts"]
            tag.overwrite([0 if index == hole else length for index, length in enumerate(tag.value)])
    with open_slide(path) as slide:
        assert slide.info.reader == "openslide"
        assert (slide.read_level(0, Box(64, 128, 128, 192)) == 255).all()
        filled = slide.read_level(1, Box(0, 0, 64, 64))[..., :2]
        assert np.abs(filled.astype(int) - pixels[:128:2, :128:2, :2]).mean() < 3
