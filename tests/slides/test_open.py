"""Opening: which reader takes which file, and what is said of the files that none takes."""

import builtins
from collections.abc import Callable
from pathlib import Path

import imagecodecs
import numpy as np
import pytest
import tifffile

from tests.data import slide_path
from tests.fakes import crop, position_pixels
from tests.mosaics import position_slide
from wsiengine import Box, Mpp, Size, errors, open_slide
from wsiengine.slides import flat
from wsiengine.slides.base import Slide
from wsiengine.slides.kept import KeptTiles
from wsiengine.slides.pyramid import PyramidLayout, write_pyramid

SIZE = Size(203, 311)


@pytest.mark.parametrize(
    ("name", "reader", "format_", "mpp"),
    [
        ("CMU-1-Small-Region.svs", "direct", "Aperio SVS, JPEG", 0.499),
        ("tcga-cr-7395-01a-01-ts1.svs", "direct", "Aperio SVS, JPEG 2000", None),
        ("luna_1065626.svs", "direct", "Aperio SVS, JPEG 2000", 0.5026),
        ("pathml_small_vectra.qptiff", "tiffslide", "QPTIFF, fluorescence", 0.4965),
        ("adversarial/ospy_boxes.tiff", "direct", "tiled TIFF, deflate", None),
        ("adversarial/ospy_small.svs", "direct", "Aperio SVS, JPEG", 0.499),
        ("adversarial/ospy_unreadable.svs", "direct", "Aperio SVS, JPEG", 0.499),
        ("adversarial/highdicom_sm_image.dcm", "openslide", "DICOM WSI", 0.499),
        ("adversarial/highdicom_sm_image_dots.dcm", "openslide", "DICOM WSI", 0.499),
        ("adversarial/ospy_boxes_dcm/boxes_0.dcm", "openslide", "DICOM WSI", 0.499),
    ],
)
def test_shared_files_that_open(name: str, reader: str, format_: str, mpp: float | None) -> None:
    with open_slide(slide_path(name)) as slide:
        assert isinstance(slide, Slide)
        assert (slide.info.reader, slide.info.format) == (reader, format_)
        assert (round(slide.info.mpp.mean, 4) if slide.info.mpp else None) == mpp
        assert "label" not in slide.info.associated or name.startswith("CMU")


@pytest.mark.parametrize(
    ("name", "error", "words"),
    [
        (
            "multi-channel-z-series.ome.tif",
            errors.UnsupportedSlide,
            "3 channels, 5 focal planes, 8-bit signed integers",
        ),
        ("pathml_small_dicom.dcm", errors.UnsupportedSlide, "Couldn't get image flavor"),
        ("adversarial/highdicom_sm_image_jpegls.dcm", errors.UnsupportedSlide, "Unsupported transfer syntax"),
        ("adversarial/histolab_broken.svs", errors.UnsupportedSlide, "is a text file, not a slide"),
        ("adversarial/ospy_unopenable.tiff", errors.UnsupportedSlide, "Unsupported TIFF compression"),
        ("adversarial", errors.SlideNotFound, "is a folder, not a slide"),
    ],
)
def test_shared_files_that_are_refused(name: str, error: type[errors.SlideError], words: str) -> None:
    with pytest.raises(error, match=words) as caught:
        open_slide(slide_path(name))
    assert caught.value.hint


def test_a_tile_that_cannot_be_decoded_is_named() -> None:
    path = slide_path("adversarial/ospy_unreadable.svs")
    with open_slide(path) as slide, pytest.raises(errors.UnreadableSlide, match=r"at x 0, y 0 .level-0 pixels"):
        slide.read_level(0, Box(0, 0, 8, 8))
    with open_slide(path, reader="openslide") as slide:
        for _ in range(2):  # OpenSlide's handle is dead after the first
            with pytest.raises(errors.UnreadableSlide, match=r"near x 0, y 0 .level-0 pixels"):
                slide.read_level(0, Box(0, 0, 8, 8))


def test_the_fluorescence_slide_names_its_dyes() -> None:
    with open_slide(slide_path("pathml_small_vectra.qptiff")) as slide:
        assert slide.info.channels == ("DAPI", "FITC", "Cy3")
        assert slide.read_level(0, Box(700, 900, 720, 950)).shape == (20, 50, 3)


@pytest.mark.parametrize(
    ("name", "content", "error", "words"),
    [
        ("notes.svs", b"this is no slide at all\n" * 30, errors.UnsupportedSlide, "is a text file"),
        ("noise.svs", bytes(range(256)) * 8, errors.UnsupportedSlide, "in no format known here"),
        ("empty.svs", b"", errors.UnreadableSlide, "is empty"),
        ("one.tif", b"I", errors.UnsupportedSlide, "is a text file"),
        ("head.tif", b"II*\0", errors.UnreadableSlide, "table of contents"),
        ("lost.tif", b"II*\0\xff\xff\0\0" + bytes(100), errors.UnreadableSlide, "table of contents"),
        ("cut.jpg", b"\xff\xd8\xff\xe0" + bytes(100), errors.UnreadableSlide, "truncated"),
        ("cut.png", b"\x89PNG\r\n\x1a\n" + bytes(100), errors.UnreadableSlide, "cannot be decoded"),
    ],
)
def test_wrong_files(
    tmp_path: Path, name: str, content: bytes, error: type[errors.SlideError], words: str, capfd: pytest.CaptureFixture
) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(error, match=words) as caught:
        open_slide(path)
    assert str(path) in caught.value.message
    assert caught.value.hint
    assert capfd.readouterr() == ("", "")  # no library speaks beside us


def test_no_such_file_and_folders(tmp_path: Path) -> None:
    with pytest.raises(errors.SlideNotFound, match="there is no file") as caught:
        open_slide(tmp_path / "nothing.svs")
    assert isinstance(caught.value, builtins.FileNotFoundError)
    with pytest.raises(errors.SlideNotFound, match="is a folder"):
        open_slide(tmp_path)
    with pytest.raises(ValueError, match="reader is one of"):
        open_slide(__file__, reader="magic")
    with pytest.raises(errors.DependencyError, match="nosuch://"):
        open_slide("nosuch://bucket/slide.svs")


@pytest.mark.parametrize("part", [0.2, 0.6, 0.95, 0.998])
def test_truncated_slides_are_refused_at_once(tmp_path: Path, part: float) -> None:
    whole = slide_path("CMU-1-Small-Region.svs").read_bytes()
    path = tmp_path / "cut.svs"
    path.write_bytes(whole[: int(len(whole) * part)])
    with pytest.raises(errors.UnreadableSlide, match=r"truncated|table of contents|damaged"):
        open_slide(path)


@pytest.mark.parametrize("part", [0.3, 0.9, 0.999])
def test_truncated_slides_whose_directory_comes_first(tmp_path: Path, part: float) -> None:
    path = tmp_path / "cut.svs"
    write_pyramid(path, position_pixels(600, 700), Size(600, 700), 0.5, PyramidLayout(downsamples=(1,)))
    whole = path.read_bytes()
    path.write_bytes(whole[: int(len(whole) * part)])
    with pytest.raises(
        errors.UnreadableSlide, match=r"is truncated: its (pixels reach to|table of contents goes on at) byte"
    ):
        open_slide(path)


def test_openslide_reads_on_after_a_damaged_tile(tmp_path: Path) -> None:
    """Its handle answers everything with the first error: a new one is opened."""
    path = tmp_path / "slide.svs"
    pixels = position_slide(path, SIZE, 0.5, PyramidLayout(tile_px=64, compression="deflate", downsamples=(1,)))
    with tifffile.TiffFile(path) as tiff:
        offset = tiff.pages.first.dataoffsets[7]
    content = bytearray(path.read_bytes())
    content[offset : offset + 100] = bytes(100)
    path.write_bytes(content)
    with open_slide(path, reader="openslide") as slide:
        with pytest.raises(errors.UnreadableSlide, match=r"near x 150, y 70 .level-0 pixels"):
            slide.read_level(0, Box(70, 150, 90, 160))
        np.testing.assert_array_equal(slide.read_level(0, Box(0, 0, 60, 60)), pixels[:60, :60])


@pytest.mark.parametrize("damage", ["cut", "marker", "zeros"])
@pytest.mark.parametrize("compression", ["jpeg", "jpeg2000", "deflate"])
def test_a_damaged_tile_is_found_and_its_place_named(tmp_path: Path, compression: str, damage: str) -> None:
    path = tmp_path / "slide.svs"
    layout = PyramidLayout(tile_px=64, compression=compression, downsamples=(1,))
    write_pyramid(path, position_pixels(*SIZE.shape), SIZE, 0.5, layout)
    with tifffile.TiffFile(path) as tiff:
        offset, length = (table[7] for table in (tiff.pages.first.dataoffsets, tiff.pages.first.databytecounts))
    content = bytearray(path.read_bytes())
    at, end = offset + length * 2 // 3, offset + length
    content[at:end] = {
        "cut": content[at : end - 9] + bytes(9),
        "marker": b"\xff\xc5" + content[at + 2 : end],
        "zeros": bytes(end - at),
    }[damage]
    path.write_bytes(content)
    if compression == "jpeg2000" and damage == "marker":
        pytest.skip("two changed bytes are noise to JPEG 2000, which carries no check")
    with open_slide(path) as slide:
        with pytest.raises(errors.UnreadableSlide, match=r"at x 128, y 64 .level-0 pixels; a tile of 64 × 64"):
            slide.read_level(0, Box(60, 100, 70, 150))
        assert slide.read_level(0, Box(0, 0, 60, 300)).any()  # the others are still read


def _png(pixels: np.ndarray) -> bytes:
    return imagecodecs.png_encode(pixels)


@pytest.mark.parametrize("mode", ["rgb", "grey", "rgba", "grey alpha"])
def test_flat_images(tmp_path: Path, mode: str) -> None:
    pixels = position_pixels(*SIZE.shape)
    want = pixels.copy()
    alpha = np.full((*SIZE.shape, 1), 255, np.uint8)
    alpha[:50] = 0
    if "grey" in mode:
        want = np.repeat(pixels[..., 2:], 3, axis=2)
    if mode in ("rgba", "grey alpha"):
        want[:50] = 255
    stored = {
        "rgb": pixels,
        "grey": pixels[..., 2],
        "rgba": np.concatenate([pixels, alpha], axis=2),
        "grey alpha": np.concatenate([pixels[..., 2:], alpha], axis=2),
    }[mode]
    path = tmp_path / "field.png"
    path.write_bytes(_png(np.ascontiguousarray(stored)))
    with open_slide(path, mpp=0.25) as slide:
        assert (slide.info.reader, slide.info.format, slide.info.mpp) == ("flat", "PNG", Mpp.square(0.25))
        box = Box(-5, -7, 210, 320)
        np.testing.assert_array_equal(slide.read_level(0, box), crop(want, box))
    with open_slide(path) as slide, pytest.raises(errors.ResolutionError, match="does not state its µm/px"):
        slide.read(Box(0, 0, 4, 4), Mpp.square(0.5))


def test_flat_jpeg_and_plain_tiff(tmp_path: Path) -> None:
    pixels = position_pixels(*SIZE.shape)
    (tmp_path / "a.jpg").write_bytes(imagecodecs.jpeg8_encode(pixels, level=95))
    tifffile.imwrite(tmp_path / "a.tif", pixels, photometric="rgb", resolution=(2e4, 2e4), resolutionunit="CENTIMETER")
    with open_slide(tmp_path / "a.jpg", mpp=1) as slide:
        assert slide.info.format == "JPEG"
        assert np.abs(slide.read_level(0, Box.of(SIZE))[..., :2].astype(int) - pixels[..., :2]).mean() < 6
    with open_slide(tmp_path / "a.tif") as slide:
        assert (slide.info.format, slide.info.reader) == ("TIFF", "flat")
        assert slide.info.mpp == Mpp.square(0.5)
        np.testing.assert_array_equal(slide.read_level(0, Box.of(SIZE)), pixels)


def _deep(path: Path) -> None:
    path.write_bytes(_png(position_pixels(20, 30).astype(np.uint16) * 257))


def _deep_tiff(path: Path) -> None:
    tifffile.imwrite(path, position_pixels(64, 80).astype(np.uint16), tile=(32, 32), photometric="rgb")


def _stack(path: Path) -> None:
    tifffile.imwrite(path, np.stack([position_pixels(64, 80)[..., 2]] * 5), metadata={"axes": "ZYX"}, ome=True)


def _five_channels(path: Path) -> None:
    tifffile.imwrite(path, np.stack([position_pixels(64, 80)[..., 2]] * 5), metadata={"axes": "CYX"}, ome=True)


@pytest.mark.parametrize(
    ("name", "make", "words"),
    [
        ("deep.png", _deep, "16 bits per channel; 8 are needed"),
        ("deep.tif", _deep_tiff, "16-bit unsigned integers|16 bits"),
        ("stack.ome.tif", _stack, "5 focal planes"),
        ("five.ome.tif", _five_channels, "5 channels.*fluorescence"),
    ],
)
def test_what_is_not_8_bit_colour_is_refused(
    tmp_path: Path, name: str, make: Callable[[Path], None], words: str
) -> None:
    make(tmp_path / name)
    with pytest.raises(errors.UnsupportedSlide, match=words):
        open_slide(tmp_path / name)


def test_a_flat_image_that_would_not_fit_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(flat, "MOST_PX", 1000)
    path = tmp_path / "large.png"
    path.write_bytes(_png(position_pixels(40, 30)))
    with pytest.raises(errors.UnsupportedSlide, match=r"30 × 40 px in one piece; at most 1,000"):
        open_slide(path)


@pytest.mark.parametrize("planar", [False, True], ids=["chunky", "planar"])
def test_ome_tiff_with_inner_levels(tmp_path: Path, planar: bool) -> None:
    pixels = position_pixels(*SIZE.shape)
    path = tmp_path / "slide.ome.tif"
    stored = pixels.transpose(2, 0, 1) if planar else pixels
    options = {"photometric": "minisblack" if planar else "rgb", "tile": (64, 64), "compression": "adobe_deflate"}
    metadata = {"axes": "CYX" if planar else "YXS", "PhysicalSizeX": 500, "PhysicalSizeXUnit": "nm"}
    metadata |= {"PhysicalSizeY": 0.4, "PhysicalSizeYUnit": "µm"}
    with tifffile.TiffWriter(path, ome=True) as tiff:
        tiff.write(stored, subifds=1, metadata=metadata, **options)
        tiff.write(stored[..., ::2, ::2] if planar else stored[::2, ::2], subfiletype=1, **options)
    with open_slide(path) as slide:
        assert slide.info.reader == ("tiffslide" if planar else "direct")
        assert slide.info.format.startswith("OME-TIFF")
        assert slide.info.mpp == Mpp(y=0.4, x=0.5)
        assert [level.downsample for level in slide.info.levels] == [(1, 1), (2, 2)]
        box = Box(11, 63, 190, 250)
        np.testing.assert_array_equal(slide.read_level(0, box), pixels[box.slices])
        box = Box(9, 60, 101, 155)
        np.testing.assert_array_equal(slide.read_level(1, box), pixels[::2, ::2][box.slices])


def test_levels_of_different_tiles(tmp_path: Path) -> None:
    pixels = position_pixels(*SIZE.shape)
    path = tmp_path / "slide.tif"
    packed = {"photometric": "ycbcr", "subsampling": (1, 1), "compression": "jpeg", "metadata": None}
    with tifffile.TiffWriter(path) as tiff:
        for side, step in ((64, 1), (32, 2)):
            level = pixels[::step, ::step]
            tiles = (np.pad(level, ((0, side), (0, side), (0, 0)))[box.slices] for box in _tiles(level, side))
            jpegs = (imagecodecs.jpeg8_encode(np.ascontiguousarray(t), 95, subsampling="444") for t in tiles)
            tiff.write(jpegs, shape=level.shape, dtype=np.uint8, tile=(side, side), subfiletype=step - 1, **packed)
    with open_slide(path, mpp=0.5) as slide:
        assert slide.info.reader == "direct"
        for level, step in ((0, 1), (1, 2), (0, 1)):
            want = pixels[::step, ::step][..., :2].astype(int)
            assert np.abs(slide.read_level(level, Box(0, 0, *want.shape[:2]))[..., :2] - want).mean() < 4


def _tiles(level: np.ndarray, side: int) -> list[Box]:
    rows, cols = -(-level.shape[0] // side), -(-level.shape[1] // side)
    return list(Box(0, 0, rows * side, cols * side).pieces(side, side))


def test_slides_behind_urls(tmp_path: Path) -> None:
    """Through the memory filesystem: ranges, as from an object store."""
    import fsspec

    path = tmp_path / "slide.svs"
    pixels = position_slide(path, SIZE, 0.5, PyramidLayout(tile_px=64, compression="deflate", downsamples=(1, 4)))
    store = fsspec.filesystem("memory")
    store.pipe_file("/slides/slide.svs", path.read_bytes())
    url = "memory://slides/slide.svs"
    with open_slide(path) as local:
        for reader in (None, "tiffslide"):
            with open_slide(url, reader=reader) as remote:
                assert remote.info.reader == (reader or "direct")
                assert remote.info.mpp == Mpp.square(0.5)
                assert remote.fingerprint() == local.fingerprint()
                np.testing.assert_array_equal(remote.read_level(0, Box(3, 5, 200, 300)), pixels[3:200, 5:300])
    with pytest.raises(errors.SlideNotFound, match="there is nothing at memory://slides/other"):
        open_slide("memory://slides/other.svs")


def test_bounds_and_transparency_of_openslide(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """MIRAX states the scanned part and leaves the rest transparent; no such file is at hand: OpenSlide is played."""
    from wsiengine.slides import openslide as reading

    class Played:
        properties = {  # noqa: RUF012
            "openslide.vendor": "mirax",
            "openslide.mpp-x": "0.25",
            "openslide.mpp-y": "0.26",
            "openslide.bounds-x": "30",
            "openslide.bounds-y": "20",
            "openslide.bounds-width": "200",
            "openslide.bounds-height": "100",
        }
        level_dimensions = ((311, 203), (77, 50))
        level_downsamples = (1.0, 4.0)
        associated_images = {"macro": None}  # noqa: RUF012

        def __init__(self, path: str) -> None: ...

        def close(self) -> None: ...

        def read_region(self, place: tuple[int, int], level: int, size: tuple[int, int]) -> np.ndarray:
            rgba = np.zeros((size[1], size[0], 4), np.uint8)
            ys, xs = np.mgrid[: size[1], : size[0]]
            inside = (xs * 4**level + place[0] >= 30) & (ys * 4**level + place[1] >= 20)
            rgba[inside] = (9, 8, 7, 255)
            return rgba

    monkeypatch.setattr(reading.openslide, "OpenSlide", Played)
    reader = reading.OpenSlideReader("played.mrxs")
    assert reader.info.bounds_l0 == Box(20, 30, 120, 230)
    assert reader.info.format == "MIRAX"
    assert reader.info.stated_mpp == Mpp(y=0.26, x=0.25)
    out = np.empty((30, 40, 3), np.uint8)
    reader.read_into(0, Box(0, 0, 30, 40), out)
    assert (out[:20] == 255).all()
    assert (out[:, :30] == 255).all()
    assert (out[20:, 30:] == (9, 8, 7)).all()
    reader.read_into(1, Box(5, 7, 35, 47), out)
    assert (out[1:, 1:] == (9, 8, 7)).all()
    assert (out[:, 0] == 255).all()


def test_each_file_tile_is_decoded_once_per_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from wsiengine.slides import direct

    path = tmp_path / "slide.svs"
    position_slide(path, SIZE, 0.5, PyramidLayout(tile_px=64, downsamples=(1,)))
    seen: list[bytes] = []
    plain = direct._DECODERS["jpeg"]
    monkeypatch.setitem(direct._DECODERS, "jpeg", lambda packed, *rest: seen.append(packed) or plain(packed, *rest))
    with open_slide(path) as slide:
        slide.read(Box(0, 0, 96, 128), Mpp.square(1.0))  # level-0 rows 0–192, columns 0–256: 3 × 4 tiles
    assert len(seen) == len(set(seen)) == 12


def test_a_dear_tile_is_decoded_once_for_all_blocks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """JPEG 2000: blocks that share file tiles decode them once, and see the same pixels as one read of all."""
    from wsiengine.slides import direct

    path = tmp_path / "slide.svs"
    layout = PyramidLayout(tile_px=64, downsamples=(1,), compression="jpeg2000", quality=0)
    position_slide(path, SIZE, 0.5, layout)
    seen: list[bytes] = []
    plain = direct._DECODERS["jpeg2000"]
    monkeypatch.setitem(direct._DECODERS, "jpeg2000", lambda packed, *rest: seen.append(packed) or plain(packed, *rest))
    with open_slide(path) as slide:
        parts = [slide.read(Box(y, x, y + 80, x + 80), Mpp.square(0.5)) for y in (0, 50) for x in (0, 50)]
    assert len(seen) == 9
    with open_slide(path) as slide:
        whole = slide.read(Box(0, 0, 130, 130), Mpp.square(0.5))
    for part, (y, x) in zip(parts, ((0, 0), (0, 50), (50, 0), (50, 50)), strict=True):
        np.testing.assert_array_equal(part, whole[y : y + 80, x : x + 80])


def test_kept_tiles_stay_within_their_bytes() -> None:
    kept = KeptTiles(most_bytes=5 * 48)
    for col in range(7):
        kept.keep((0, 0, col), np.full((4, 4, 3), col, np.uint8))
        assert kept.get((0, 0, 1)) is not None or col < 1  # in use, so it stays
    assert [col for col in range(7) if kept.get((0, 0, col)) is not None] == [1, 3, 4, 5, 6]
    assert kept._bytes == 5 * 48
