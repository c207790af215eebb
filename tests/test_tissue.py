"""The tissue mask: what counts as tissue (drawn and real), and the geometry of the mask."""

import math
import time
from pathlib import Path

import cv2
import numpy as np
import pytest
import shapely
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.data import slide_path
from tests.fakes import ArraySlide
from wsiengine import scratch, tissue_rules
from wsiengine import tissue as tissue_module
from wsiengine.errors import OutputError, ResolutionError
from wsiengine.geometry import Box, Lattice, Mpp, Size
from wsiengine.slides import open_slide
from wsiengine.slides.pyramid import PyramidLayout, write_pyramid
from wsiengine.tissue import TissueMask, find_tissue, read_whole, tissue_cost, tissue_picture
from wsiengine.tissue_rules import find_glass, segment, stain

GLASS = (243, 242, 245)
STAINS = {  # colours that a section shows at 8 µm/px: pairs between which its texture varies
    "H&E": ((226, 160, 190), (120, 70, 140)),
    "eosin": ((235, 170, 195), (200, 90, 140)),
    "IHC, blue": ((222, 226, 236), (140, 146, 180)),
    "IHC, brown": ((205, 180, 150), (120, 75, 45)),
}
INKS = {
    "blue": (30, 50, 180),
    "pure blue": (0, 0, 200),
    "navy": (20, 40, 120),
    "pale blue": (90, 120, 220),
    "cyan": (0, 160, 200),
    "green": (0, 120, 60),
    "pale green": (60, 180, 90),
    "red": (220, 30, 40),
    "dark red": (190, 10, 30),
    "black": (20, 20, 22),
    "grey black": (60, 60, 66),
    "yellow": (240, 220, 40),
}


def glass(rows: int, cols: int, colour: tuple[int, int, int] = GLASS, seed: int = 0) -> np.ndarray:
    """Bare glass, float32, with sensor noise and a lamp brighter on one side."""
    rng = np.random.default_rng(seed)
    lamp = np.linspace(-2, 2, cols)[None, :, None]
    return (np.array(colour) + rng.normal(0, 1, (rows, cols, 3)) + lamp).astype(np.float32)


def stained(rows: int, cols: int, stain: str = "H&E", strength: float = 1.0, seed: int = 1) -> np.ndarray:
    """Transmittance of tissue (multiply glass by it): cells of two pixels, light and dark."""
    light, dark = (np.array(colour, np.float32) for colour in STAINS[stain])
    cells = np.random.default_rng(seed).random((-(-rows // 2), -(-cols // 2), 1), np.float32)
    cells = cells.repeat(2, axis=0).repeat(2, axis=1)[:rows, :cols]
    return ((light * (1 - cells) + dark * cells) / np.array(GLASS, np.float32)) ** np.float32(strength)


def ellipse(rows: int, cols: int, box: Box) -> np.ndarray:
    y, x = np.mgrid[:rows, :cols]
    centre_y, centre_x = (box.y0 + box.y1) / 2, (box.x0 + box.x1) / 2
    return ((y - centre_y) / (box.height / 2)) ** 2 + ((x - centre_x) / (box.width / 2)) ** 2 <= 1


def stroke(canvas: np.ndarray, points: list[tuple[int, int]], colour: tuple[int, int, int], width: int) -> np.ndarray:
    """Draw a marker's stroke with soft edges into ``canvas``; returns where it is."""
    fine = np.zeros((canvas.shape[0] * 4, canvas.shape[1] * 4), np.uint8)
    cv2.polylines(fine, [np.int32(points) * 4], False, 255, width * 4)
    cover = cv2.resize(fine, canvas.shape[1::-1], interpolation=cv2.INTER_AREA)[..., None] / np.float32(255)
    noise = np.random.default_rng(7).normal(0, 5, canvas.shape).astype(np.float32)
    canvas[:] = canvas * (1 - cover) + (np.array(colour, np.float32) + noise) * cover
    return cover[..., 0] > 0.02


def as_pixels(canvas: np.ndarray) -> np.ndarray:
    return np.clip(np.rint(canvas), 0, 255).astype(np.uint8)


def through_jpeg(pixels: np.ndarray) -> np.ndarray:
    """As a pyramid level is stored: quality 80, colour at half resolution."""
    return cv2.imdecode(cv2.imencode(".jpg", pixels[..., ::-1], [cv2.IMWRITE_JPEG_QUALITY, 80])[1], 1)[..., ::-1]


def section(rows: int = 150, cols: int = 210, **how: object) -> tuple[np.ndarray, np.ndarray]:
    """Glass with one oval piece of tissue → (canvas float32, truth bool)."""
    truth = ellipse(rows, cols, Box(30, 20, 110, 130))
    canvas = glass(rows, cols)
    canvas[truth] *= stained(rows, cols, **how)[truth]
    return canvas, truth


def iou(a: np.ndarray, b: np.ndarray) -> float:
    return float((a & b).sum() / max((a | b).sum(), 1))


# --- what is tissue ------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", STAINS)
@pytest.mark.parametrize("strength", [1.0, 0.35])
def test_tissue_is_found_pale_or_strong(kind: str, strength: float) -> None:
    canvas, truth = section(stain=kind, strength=strength)
    assert iou(segment(as_pixels(canvas), 8.0), truth) > 0.93


def test_very_pale_tissue_is_in() -> None:
    canvas, truth = section(stain="H&E", strength=0.09)
    assert canvas[truth].mean() > 230
    assert iou(segment(as_pixels(canvas), 8.0), truth) > 0.9


@pytest.mark.parametrize(
    "colour", [(230, 228, 240), (215, 215, 205), (250, 245, 225), (200, 200, 200), (252, 252, 252)]
)
def test_glass_of_any_lamp_is_out(colour: tuple[int, int, int]) -> None:
    canvas = glass(150, 210, colour)
    assert not segment(as_pixels(canvas), 8.0).any()
    truth = ellipse(150, 210, Box(30, 20, 110, 130))
    canvas[truth] *= stained(150, 210)[truth]
    assert iou(segment(as_pixels(canvas), 8.0), truth) > 0.93


def test_slides_of_one_colour() -> None:
    for value in (0, 8, 240, 255):
        assert not segment(np.full((41, 67, 3), value, np.uint8), 8.0).any()
    assert segment(np.empty((0, 5, 3), np.uint8), 8.0).shape == (0, 5)


@pytest.mark.parametrize("kind", STAINS)
def test_a_slide_without_glass_is_tissue_from_edge_to_edge(kind: str) -> None:
    """A threshold from the histogram would cut it in half."""
    pixels = as_pixels(np.array(GLASS, np.float32) * stained(90, 130, kind))
    assert segment(pixels, 8.0).mean() > 0.99


def test_glass_beside_filled_in_white() -> None:
    """Scanners fill what they did not scan with white: glass is then not the brightest colour."""
    canvas, truth = section()
    canvas[:, 170:] = 255
    canvas[135:] = 255
    found = find_glass(as_pixels(canvas))
    np.testing.assert_allclose(found.colour, GLASS, atol=2)
    assert iou(segment(as_pixels(canvas), 8.0), truth) > 0.93


def test_half_the_pitch_is_reduced_by_rounded_means() -> None:
    pixels = np.random.default_rng(5).integers(0, 256, (146, 62, 3), np.uint8)
    sums = pixels.reshape(73, 2, 31, 2, 3).sum(axis=(1, 3))
    np.testing.assert_array_equal(tissue_module._reduce(pixels, 2), (sums + 2) // 4)
    assert tissue_module._reduce(pixels, 1) is pixels


def test_glass_of_many_colours_and_little_of_each() -> None:
    """Twenty flat spots, no two alike, in noise."""
    canvas = np.random.default_rng(3).integers(0, 256, (400, 400, 3), np.uint8)
    for k in range(20):
        canvas[20 * k : 20 * k + 9, :9] = 190 + 3 * k
    assert 190 <= min(find_glass(canvas).colour) <= max(find_glass(canvas).colour) <= 250


@pytest.mark.parametrize("ink", INKS)
def test_pen_is_out_and_tissue_beside_it_stays(ink: str) -> None:
    canvas, truth = section()
    stroke(canvas, [(150, 15), (190, 70), (155, 125), (200, 140)], INKS[ink], 9)
    for pixels in (as_pixels(canvas), through_jpeg(as_pixels(canvas))):
        mask = segment(pixels, 8.0)
        assert not mask[:, 135:].any()
        assert iou(mask, truth) > 0.85  # JPEG's coarse colour blurs the outline of tissue, too


@pytest.mark.parametrize("ink", ["blue", "green", "black", "red"])
def test_pen_across_tissue_is_out(ink: str) -> None:
    canvas, truth = section()
    pen = stroke(canvas, [(5, 120), (75, 70), (160, 20)], INKS[ink], 9)
    mask = segment(as_pixels(canvas), 8.0)
    assert (mask & pen).sum() < 0.02 * pen.sum()
    assert (mask & truth & ~pen).sum() > 0.85 * (truth & ~pen).sum()


def test_black_borders_are_out() -> None:
    canvas, truth = section()
    canvas[:14], canvas[:, -25:] = 6, (12, 11, 14)
    mask = segment(as_pixels(canvas), 8.0)
    assert not mask[:14].any()
    assert not mask[:, -25:].any()
    assert iou(mask, truth) > 0.93


def test_pigment_and_blood_inside_tissue_stay() -> None:
    for colour in ((40, 32, 34), (205, 25, 40)):
        canvas, _ = section()
        spot = ellipse(150, 210, Box(50, 50, 85, 90))
        canvas[spot] = colour
        assert segment(as_pixels(canvas), 8.0)[spot].all()


def test_dust_hair_and_bubbles_are_out() -> None:
    canvas, truth = section()
    rng = np.random.default_rng(3)
    for y, x in zip(rng.integers(5, 145, 40), rng.integers(140, 205, 40), strict=True):
        cv2.circle(canvas, (int(x), int(y)), int(rng.integers(0, 3)), (70, 72, 71), -1)
    stroke(canvas, [(150, 10), (190, 60), (160, 140)], (110, 108, 112), 2)
    stroke(canvas, [(10, 130), (120, 140)], (60, 70, 170), 2)  # a blue thread
    cv2.circle(canvas, (175, 70), 25, (190, 191, 193), 3)
    mask = segment(as_pixels(canvas), 8.0)
    assert iou(mask, truth) > 0.93
    assert not mask[:, 140:].any()


@pytest.mark.parametrize("pixel_um", [4.0, 8.0, 10.0])
def test_specks_and_holes_are_judged_by_um2(pixel_um: float) -> None:
    def disc(area_um2: float, y: int, x: int) -> np.ndarray:
        side = 2 * round(math.sqrt(area_um2 / math.pi) / pixel_um)
        return ellipse(200, 260, Box(y, x, y + side, x + side))

    tissue = np.array(GLASS, np.float32) * stained(200, 260)
    big = ellipse(200, 260, Box(10, 10, 190, 190))
    speck, piece = disc(4_000, 20, 200), disc(16_000, 120, 200)
    small_hole, large_hole = disc(12_000, 60, 60), disc(45_000, 110, 100)
    canvas = glass(200, 260)
    canvas[big | speck | piece] = tissue[big | speck | piece]
    canvas[small_hole | large_hole] = glass(200, 260)[small_hole | large_hole]
    mask = segment(as_pixels(canvas), pixel_um)
    assert not mask[speck].any()
    assert mask[piece].mean() > 0.95
    assert mask[small_hole].all()
    assert mask[large_hole].mean() < 0.4


def test_strips_do_not_show(monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither in the density nor in the mask, with everything on the slide that is judged by its surroundings."""
    canvas, _ = section(220, 210)
    stroke(canvas, [(10, 180), (200, 190)], (20, 20, 22), 9)
    stroke(canvas, [(200, 20), (120, 60)], (40, 120, 60), 8)
    canvas[60:75, 80:110] = (30, 28, 30)
    pixels = as_pixels(canvas)
    whole, mask = stain(pixels, GLASS, 8.0), segment(pixels, 8.0)
    assert 0.05 < mask.mean() < 0.9
    monkeypatch.setattr(tissue_rules, "_STRIP_PX", 16 * 210)
    monkeypatch.setattr(scratch, "STRIP", 16 * 210)
    strips = [stain(pixels, GLASS, 8.0, rows) for rows in tissue_rules._strips(pixels.shape)]
    np.testing.assert_array_equal(np.concatenate(strips), whole)
    np.testing.assert_array_equal(segment(pixels, 8.0), mask)


# --- finding it on a slide -----------------------------------------------------------------------


def fine_section() -> np.ndarray:
    """The section at 2 µm/px, with finer texture; neither side a multiple of anything."""
    canvas, _ = section(61, 87, stain="H&E")
    fine = cv2.resize(canvas, None, fx=4, fy=4, interpolation=cv2.INTER_CUBIC)[:-1, :-3]
    fine[150:200, 60:200] *= stained(50, 140, "IHC, brown", 0.5)
    return as_pixels(fine + np.random.default_rng(5).normal(0, 6, fine.shape))


def test_masks_from_different_pyramids_agree() -> None:
    pixels = fine_section()
    plain = find_tissue(ArraySlide(pixels, 2.0))
    assert 0.1 < plain.fraction < 0.6
    for downsamples in [(1, 2), (1, 4), (1, 3), (1, 2, 8)]:
        other = find_tissue(ArraySlide(pixels, 2.0, downsamples=downsamples))
        assert iou(plain.mask, other.mask) >= 0.99
        assert plain.mask.shape == other.mask.shape


def test_the_mask_does_not_depend_on_how_the_slide_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    slide = ArraySlide(fine_section(), Mpp(2.0, 1.9))
    whole = find_tissue(slide)
    monkeypatch.setattr(tissue_module, "_PIECE_PX", 3_000)
    reads = len(slide.reads)
    np.testing.assert_array_equal(find_tissue(slide).mask, whole.mask)
    assert len(slide.reads) - reads > 10
    assert max(read.box.area for read in slide.reads[reads:]) <= 3_000


@pytest.mark.parametrize("cheap_px", [0, 10_000, 10**9])
def test_cost_is_what_is_read(monkeypatch: pytest.MonkeyPatch, cheap_px: int) -> None:
    monkeypatch.setattr(tissue_module, "_CHEAP_PX", cheap_px)
    costs = []
    for downsamples in [(1,), (1, 4), (1, 2, 4)]:
        slide = ArraySlide(fine_section(), 2.0, downsamples=downsamples)
        costs.append(tissue_cost(slide.info))
        find_tissue(slide)
        assert costs[-1] == pytest.approx(sum(r.box.area for r in slide.reads) / 1e6, rel=0.05)
    pixels = [84_000, 84_000, 21_000] if cheap_px == 10**9 else [84_000, 5_300, 5_300]
    np.testing.assert_allclose(np.array(costs) * 1e6, pixels, rtol=0.02)


def test_a_slide_without_mpp_is_refused() -> None:
    slide = ArraySlide(fine_section(), None)
    with pytest.raises(ResolutionError):
        find_tissue(slide)
    with pytest.raises(ResolutionError):
        tissue_cost(slide.info)


def test_tiny_slides() -> None:
    tissue = as_pixels(np.array(GLASS, np.float32) * stained(16, 16))
    assert find_tissue(ArraySlide(tissue, 0.5)).mask.tolist() == [[True]]
    assert find_tissue(ArraySlide(as_pixels(glass(16, 16)), 0.5)).mask.tolist() == [[False]]
    assert find_tissue(ArraySlide(tissue[:1, :1], 0.25)).mask.shape == (1, 1)


def test_an_image_coarser_than_the_mask_is_not_enlarged() -> None:
    canvas, truth = section()
    mask = find_tissue(ArraySlide(as_pixels(canvas), 20.0))
    assert mask.mpp == Mpp.square(20.0)
    assert iou(mask.mask, truth) > 0.9


# --- the mask's geometry -------------------------------------------------------------------------


def random_mask(size_l0: Size, mpp: Mpp, seed: int = 0) -> TissueMask:
    shape = TissueMask.everywhere(size_l0, mpp).mask.shape
    return TissueMask(np.random.default_rng(seed).random(shape) < 0.4, size_l0, mpp)


def cover_of(size: int, px: float, cell: float, cells: int, pixels: int) -> np.ndarray:
    """Overlap (cells, pixels) in level-0 px along one axis, one by one: the obvious twin."""
    out = np.zeros((cells, pixels))
    for i in range(cells):
        for j in range(pixels):
            low, high = max(i * cell, j * px), min((i + 1) * cell, (j + 1) * px, size)
            out[i, j] = max(0.0, high - low)
    return out


@settings(max_examples=60, deadline=None)
@given(
    st.integers(1, 700),
    st.integers(1, 900),
    st.tuples(st.floats(0.2, 3), st.floats(0.2, 3)),
    st.floats(0.3, 4),
    st.sampled_from([1, 8, 32]),
)
def test_cell_fraction_is_exact(height: int, width: int, mpp: tuple[float, float], model_um: float, cell: int) -> None:
    size, slide_mpp = Size(height, width), Mpp(*mpp)
    mask = random_mask(size, slide_mpp, seed=height)
    lattice = Lattice(size, slide_mpp, Mpp.square(model_um), cell)
    if lattice.extent_cells.area > 20_000:
        return
    got = mask.cell_fraction(lattice)
    (px_y, px_x), (cell_y, cell_x) = mask.lattice.l0_per_cell, lattice.l0_per_cell
    rows, cols = lattice.extent_cells.shape
    cover_y = cover_of(height, px_y, cell_y, rows, mask.mask.shape[0])
    cover_x = cover_of(width, px_x, cell_x, cols, mask.mask.shape[1])
    inside = cover_y.sum(axis=1)[:, None] * cover_x.sum(axis=1)[None]
    want = cover_y @ mask.mask @ cover_x.T / np.maximum(inside, 1e-12)
    assert got.shape == (rows, cols)
    assert got.dtype == np.float32
    np.testing.assert_allclose(got[inside > 1e-3], want[inside > 1e-3], atol=2e-5)


def test_cell_fraction_is_the_same_in_strips(monkeypatch: pytest.MonkeyPatch) -> None:
    mask = random_mask(Size(2_345, 1_789), Mpp(0.5, 0.51))
    lattice = Lattice(mask.size_l0, mask.slide_mpp, Mpp.square(0.97), 32)
    whole = mask.cell_fraction(lattice)
    monkeypatch.setattr(tissue_module, "_STRIP_BYTES", 4_000)
    np.testing.assert_array_equal(mask.cell_fraction(lattice), whole)


@pytest.mark.parametrize("mpp", [Mpp.square(0.499), Mpp(0.25, 0.31), Mpp.square(200.0)])
def test_everywhere_is_one_in_every_cell_and_has_the_area_of_the_slide(mpp: Mpp) -> None:
    size = Size(1_003, 777)
    mask = TissueMask.everywhere(size, mpp)
    model = Mpp.square(mpp.mean * 1.7)
    assert (mask.cell_fraction(Lattice(size, mpp, model, 32)) == 1).all()
    assert mask.area_mm2 == pytest.approx(size.area * mpp.pixel_um2 / 1e6, rel=1e-12)
    assert mask.fraction == pytest.approx(1)


def test_a_mask_of_another_slide_is_refused() -> None:
    mask = random_mask(Size(500, 700), Mpp.square(0.5))
    with pytest.raises(ValueError, match="700"):
        mask.cell_fraction(Lattice(Size(500, 701), Mpp.square(0.5), Mpp.square(1), 32))
    with pytest.raises(ValueError, match="bool"):
        TissueMask(mask.mask[:-1], mask.size_l0, mask.slide_mpp)


def test_bytes_come_back() -> None:
    mask = random_mask(Size(1_003, 777), Mpp(0.25, 0.31))
    data = mask.to_bytes()
    copy = TissueMask.from_bytes(data)
    np.testing.assert_array_equal(copy.mask, mask.mask)
    assert (copy.size_l0, copy.slide_mpp, copy.to_bytes()) == (mask.size_l0, mask.slide_mpp, data)
    for damaged in (b"", b"PNG", data[:-5], data[:40], data.replace(b'"width"', b'"breit"')):
        with pytest.raises(ValueError, match=r"not a stored|damaged"):
            TissueMask.from_bytes(damaged)


def test_polygons_have_the_area_of_the_mask_and_stay_inside_the_slide() -> None:
    mask = random_mask(Size(1_003, 777), Mpp(0.5, 0.6))
    polygons = mask.polygons_l0()
    assert all(polygon.is_valid for polygon in polygons)
    assert sum(p.area for p in polygons) * mask.slide_mpp.pixel_um2 / 1e6 == pytest.approx(mask.area_mm2, rel=1e-9)
    assert shapely.box(0, 0, 777, 1_003).covers(shapely.union_all(polygons))
    again = TissueMask.from_polygons(shapely.union_all(polygons), mask.size_l0, mask.slide_mpp)
    np.testing.assert_array_equal(again.mask, mask.mask)


def test_mask_of_polygons() -> None:
    size, mpp = Size(1_600, 3_200), Mpp.square(0.5)  # 16 level-0 px per mask pixel
    mask = TissueMask.from_polygons(shapely.box(32, 160, 160, 480), size, mpp)
    assert mask.mask[10:30, 2:10].all()
    assert mask.mask.sum() == 20 * 8
    assert mask.area_mm2 == pytest.approx(128 * 320 * 0.25 / 1e6)


# --- the picture ---------------------------------------------------------------------------------


def test_picture_outlines_the_tissue(tmp_path: Path) -> None:
    slide = ArraySlide(fine_section(), 2.0)
    mask = find_tissue(slide)
    tissue_picture(slide, mask, tmp_path / "a.png")
    tissue_picture(slide, mask, tmp_path / "b.png")
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()
    picture = cv2.imread(str(tmp_path / "a.png"))[..., ::-1].astype(int)
    enlarged = picture.shape[0] // mask.mask.shape[0]
    assert picture.shape[:2] == tuple(side * enlarged for side in mask.mask.shape)
    line = np.abs(picture - (0, 158, 115)).sum(axis=-1) < 60
    padded = np.pad(mask.mask.astype(np.uint8), 1)
    border = cv2.morphologyEx(padded, cv2.MORPH_GRADIENT, np.ones((3, 3), np.uint8))[1:-1, 1:-1]
    near = cv2.resize(border, line.shape[::-1], interpolation=cv2.INTER_NEAREST) > 0
    assert line.sum() > 200
    assert line[~near].sum() == 0
    with pytest.raises(OutputError):
        tissue_picture(slide, mask, tmp_path / "missing" / "c.png")


def test_picture_of_a_large_mask_is_reduced(tmp_path: Path) -> None:
    slide = ArraySlide(fine_section(), 8.0)
    tissue_picture(slide, find_tissue(slide), tmp_path / "a.png", max_side_px=100)
    assert max(cv2.imread(str(tmp_path / "a.png")).shape) == 800  # 100 px, enlarged again for the eye


# --- real slides ---------------------------------------------------------------------------------

# Judged by eye, in level-0 pixels (y, x): points that a pathologist calls tissue, and points that are none.
REAL = {
    "CMU-1-Small-Region.svs": (
        None,
        [(400, 1000), (1060, 520), (1500, 1250), (2300, 1000), (2600, 1700), (2900, 700)],
        [(100, 100), (600, 2080), (2000, 300), (1700, 2100), (90, 15), (2700, 2000)],
        (0.40, 0.46),
    ),
    "tcga-cr-7395-01a-01-ts1.svs": (
        0.25,
        [(1200, 700), (1000, 2000), (3000, 2200), (200, 3250), (2400, 4000), (1800, 1500)],
        [(200, 500), (3300, 400), (1000, 4350), (3450, 1000), (700, 2600 - 2000)],
        (0.64, 0.70),
    ),
    "luna_1065626.svs": (
        None,
        [(6380, 4950), (6550, 5360), (7200, 7300), (7300, 8250), (6900, 4350), (1750, 2900)],
        [(3000, 3000), (550, 11300), (5000, 9000), (9500, 6000), (7500, 750), (7450, 4300)],
        (0.008, 0.013),
    ),
}


@pytest.mark.parametrize("name", REAL)
def test_real_slides(name: str) -> None:
    mpp, tissue_points, other_points, (low, high) = REAL[name]
    slide = open_slide(slide_path(name), mpp=mpp)
    mask = find_tissue(slide)
    assert low < mask.fraction < high
    scale_y, scale_x = mask.lattice.l0_per_cell

    def at(points: list[tuple[int, int]]) -> list[bool]:
        return [bool(mask.mask[int(y / scale_y), int(x / scale_x)]) for y, x in points]

    assert at(tissue_points) == [True] * len(tissue_points)
    assert at(other_points) == [False] * len(other_points)


def test_real_pixels_agree_over_pyramids() -> None:
    slide = open_slide(slide_path("CMU-1-Small-Region.svs"))
    size = slide.info.size_l0
    pixels = slide.read_level(0, Box.of(size))
    copy = ArraySlide(pixels, slide.info.mpp, downsamples=(1, 4, 16))
    assert iou(find_tissue(slide).mask, find_tissue(copy).mask) >= 0.99


@pytest.mark.parametrize("downsamples", [(1, 4), (1, 4, 16)])
def test_real_pixels_agree_over_pyramids_of_jpeg(tmp_path: Path, downsamples: tuple[int, ...]) -> None:
    slide = open_slide(slide_path("CMU-1-Small-Region.svs"))
    size, mpp = slide.info.size_l0, slide.info.mpp
    pixels = slide.read_level(0, Box.of(size))
    write_pyramid(tmp_path / "a.svs", pixels, size, mpp, PyramidLayout(downsamples=downsamples, quality=80))
    other = open_slide(tmp_path / "a.svs")
    assert tissue_cost(other.info) < 0.1 * tissue_cost(slide.info)
    assert iou(find_tissue(slide).mask, find_tissue(other).mask) >= 0.99


def test_a_level_near_8_um_is_quick() -> None:
    """A slide of 5 cm²: 7.8 Mpx at 8 µm/px, the rules alone."""
    canvas, _ = section(280, 280)
    pixels = np.tile(as_pixels(canvas), (10, 10, 1))
    started = time.process_time()
    mask = segment(pixels, 8.0)
    assert time.process_time() - started < 4  # 1 s on a quiet core; CPU time, for other work on the machine
    assert 0.05 < mask.mean() < 0.2
    assert read_whole(ArraySlide(pixels[:9, :7], 8.0), Mpp.square(8)).shape == (9, 7, 3)
