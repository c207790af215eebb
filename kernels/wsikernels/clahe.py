"""Contrast-limited adaptive histogram equalisation (Zuiderveld 1994), anchored to the slide and blind to glass.

Contextual regions are squares of ``region_px`` on a grid that starts at the slide's origin. A pixel's level is moved
by its level's shift in the four nearest regions, weighted bilinearly between the regions' centres. Everything follows
from absolute coordinates and whole regions, so however a slide is cut, a pixel has the same value; the price is a
margin of :func:`margin_px` pixels. One region's shifts:

1. Histogram of 256 levels over the whole region. Levels from ``glass`` upwards (bare glass, and the white outside the
   slide) are not counted; their pixels are spread evenly over the levels below, as if nothing were known of them.
2. Counts above ``clip`` times the even count are cut off and the excess is spread evenly.
3. A level moves to its mid-rank: shift(k) = glass · (Σ_{j<k} h_j + h_k / 2) / n − ½ − k. An even histogram shifts
   nothing, so contrast fades out where tissue does; levels from ``glass`` upwards never move.
"""

import numpy as np
from numba import float32, float64, int32, int64, uint8

from wsikernels._jit import given, jit, made
from wsikernels._views import flat_rows, require_rgb
from wsikernels.lab import lightness_levels, move_lightness

LEVELS = 256
_PER_LEVEL = np.float32(1 / 2.55 / 116)  # one level of L, in Lab's f
_UNITS, _PER_UNIT, _BIAS = np.float32(64), np.float32(1 / 64), np.float32(256)  # shifts as 16-bit fixed point
_OFFSET = np.float32(256 * 64 + 0.5)
_HALF_BITS, _HALF_MASK = np.int32(16), np.int32(0xFFFF)


def margin_px(region_px: int) -> int:
    """Pixels needed round a box: from a pixel to the far side of the farthest region that it takes part in."""
    return (3 * region_px + 1) // 2


def clahe_lab(
    src: np.ndarray, corner: tuple[int, int], region_px: int, clip: float, glass: int, box: tuple[int, int, int, int]
) -> np.ndarray:
    """CLAHE on L of Lab; a and b are kept.

    Args:
        src: (rows, cols, 3) uint8 RGB.
        corner: Absolute (y, x) of its first pixel.
        region_px: Side of a contextual region.
        clip: Largest count of a level, in multiples of the even count; at most so steep does contrast become.
        glass: Level of L (0–255) from which a pixel is bare glass; 256 for no guard.
        box: The pixels wanted, absolute half-open (y0, x0, y1, x1); ``src`` must reach :func:`margin_px` further.

    Returns:
        (y1 − y0, x1 − x0, 3) uint8.

    Raises:
        ValueError: A wrong type or shape, a clip limit that is not positive, or too small a margin.
    """
    require_rgb(src, "src")
    grid = _Grid(src.shape[:2], corner, region_px, clip, glass, box)
    flat, pitch = flat_rows(src)
    levels = np.empty(grid.levels_shape, np.uint8)
    out = np.empty((*grid.out_shape, 3), np.uint8)
    if out.size:
        lightness_levels(flat, pitch, *grid.levels_at, levels)
        inner = flat[grid.out_at[0] * pitch + 3 * grid.out_at[1] :]
        _apply_lab(inner, pitch, levels, grid.tables(levels), grid.steps, out.reshape(len(out), -1))
    return out


def clahe_grey(
    src: np.ndarray, corner: tuple[int, int], region_px: int, clip: float, glass: int, box: tuple[int, int, int, int]
) -> np.ndarray:
    """CLAHE on a grey picture: as :func:`clahe_lab`, with (rows, cols) uint8 in and out, rounded half up."""
    if src.dtype != np.uint8 or src.ndim != 2:
        raise ValueError(f"src must be uint8 of shape (rows, cols), not {src.dtype} of shape {src.shape}")
    grid = _Grid(src.shape, corner, region_px, clip, glass, box)
    out = np.empty(grid.out_shape, np.uint8)
    if out.size:
        (y, x), (height, width) = grid.levels_at, grid.levels_shape
        levels = np.ascontiguousarray(src[y : y + height, x : x + width])
        _apply_grey(levels, grid.tables(levels), grid.steps, out)
    return out


class _Grid:
    """Which regions a box needs, and where they lie in the source: pure arithmetic on absolute coordinates."""

    def __init__(
        self,
        shape: tuple[int, ...],
        corner: tuple[int, int],
        region_px: int,
        clip: float,
        glass: int,
        box: tuple[int, int, int, int],
    ) -> None:
        if not (np.isfinite(clip) and clip > 0):
            raise ValueError(f"the clip limit must be a positive number, not {clip}")
        if region_px < 1 or not 1 <= glass <= LEVELS:
            raise ValueError(f"region_px must be at least 1 and glass 1 to {LEVELS}, not {region_px} and {glass}")
        y0, x0, y1, x1 = box
        if y1 < y0 or x1 < x0:
            raise ValueError(f"the box ends before it starts: {box}")
        self.region_px, self.clip, self.glass = region_px, float(clip), glass
        self.out_shape, self.out_at = (y1 - y0, x1 - x0), (y0 - corner[0], x0 - corner[1])
        rows, cols = (_regions(a, max(b, a + 1), region_px) for a, b in ((y0, y1), (x0, x1)))
        self.levels_shape = (rows[1] - rows[0]) * region_px, (cols[1] - cols[0]) * region_px
        self.levels_at = rows[0] * region_px - corner[0], cols[0] * region_px - corner[1]
        past = [at + size for at, size in zip(self.levels_at, self.levels_shape, strict=True)]
        if 0 not in self.out_shape and (min(self.levels_at) < 0 or past[0] > shape[0] or past[1] > shape[1]):
            raise ValueError(
                f"the source of {shape[0]} × {shape[1]} px is too small: "
                f"the box needs a margin of {margin_px(region_px)} px"
            )
        # (distance of the box from the first region, region side, first glass level) for the kernels
        self.steps = np.array([y0 - rows[0] * region_px, x0 - cols[0] * region_px, region_px, glass], np.int64)

    def tables(self, levels: np.ndarray) -> np.ndarray:
        """The shifts of every region: (region rows, region cols, 256) float32."""
        shape = levels.shape[0] // self.region_px, levels.shape[1] // self.region_px, LEVELS
        return _shifts(levels, self.region_px, self.clip, self.glass, np.zeros(shape, np.float32))


def _regions(first: int, past: int, region_px: int) -> tuple[int, int]:
    """Regions [i, k) whose centres enclose the pixel centres [first, past)."""
    return (2 * first + 1 - region_px) // (2 * region_px), (2 * past - 1 - region_px) // (2 * region_px) + 2


@jit()
def shift_table(counts, clip, glass, table):
    """One region's shifts (module docstring) from its histogram: (256,) int64 → (256,) float32."""
    total = np.float64(counts.sum())
    even = total / glass
    unknown = np.float64(counts[glass:].sum()) / glass
    limit = clip * even
    excess = 0.0
    for k in range(glass):
        excess += max(counts[k] + unknown - limit, 0.0)
    spread = excess / glass
    below = 0.0
    for k in range(glass):
        height = min(counts[k] + unknown, limit) + spread
        table[k] = np.float32((below + 0.5 * height) / even - 0.5 - k)
        below += height
    table[glass:] = np.float32(0)


@jit((given(uint8, 2), int64, float64, int64, made(float32, 3)))
def _shifts(levels, region_px, clip, glass, tables):
    rows, cols, _ = tables.shape
    one, two, three, four = np.empty((4, 256), np.int32)  # equal neighbours need not wait for each other's count
    for i in range(rows):
        for j in range(cols):
            one[:], two[:], three[:], four[:] = 0, 0, 0, 0
            for y in range(i * region_px, (i + 1) * region_px):
                line = levels[y, j * region_px : (j + 1) * region_px]
                for x in range(region_px // 4):
                    one[line[4 * x]] += 1
                    two[line[4 * x + 1]] += 1
                    three[line[4 * x + 2]] += 1
                    four[line[4 * x + 3]] += 1
                for x in range(region_px - region_px % 4, region_px):
                    one[line[x]] += 1
            shift_table(one + two + three + four, clip, glass, tables[i, j])
    return tables


@jit((given(float32, 3), int64, int64, made(int32, 2)))
def _blend_rows(tables, y, region_px, pairs):
    """The tables of one pixel row, between the two rows of regions whose centres enclose it, as neighbouring pairs.

    ``pairs[j, k]`` holds level k's shifts in columns j (high half) and j + 1 (low half), in 64ths of a level: with one
    look-up per pixel, all else is vector code.
    """
    above = (2 * y + 1 - region_px) // (2 * region_px)
    weight = np.float32((2 * y + 1 - region_px - 2 * region_px * above) / (2 * region_px))
    rest = np.float32(1) - weight
    for j in range(pairs.shape[0]):
        upper, lower, pair = tables[above, j], tables[above + 1, j], pairs[j]
        upper_right, lower_right = tables[above, j + 1], tables[above + 1, j + 1]
        for k in range(256):
            left = np.int32((upper[k] * rest + lower[k] * weight) * _UNITS + _OFFSET)
            right = np.int32((upper_right[k] * rest + lower_right[k] * weight) * _UNITS + _OFFSET)
            pair[k] = (left << _HALF_BITS) | right


@jit((given(uint8, 1), given(int32, 1), int64, int64, made(int32, 1), made(float32, 1)))
def _segment_shifts(line, pair, offset, region_px, found, shifts):
    """Shifts of the pixels between two centres; pixel x weighs the right one by (2 x + offset) / (2 region_px)."""
    for x in range(len(line)):
        found[x] = pair[line[x]]
    per = np.float32(1 / (2 * region_px))
    for x in range(len(line)):
        weight = np.float32(np.int32(2 * x + offset)) * per
        one, two = np.float32(found[x] >> _HALF_BITS), np.float32(found[x] & _HALF_MASK)
        shifts[x] = (one + (two - one) * weight) * _PER_UNIT - _BIAS


@jit((given(uint8, 1), int64, int64, given(int32, 2), made(float32, 1)))
def _row_shifts(line, first, region_px, pairs, shifts):
    """Shift of each pixel of a row that starts ``first`` pixels right of the first region."""
    width = len(shifts)
    found = np.empty(2 * region_px, np.int32)
    begin = 0
    for left in range(pairs.shape[0]):
        # pixel x lies between the centres of `left` and `left + 1` while 2 (first + x) + 1 - r < 2 r (left + 1)
        end = min((2 * region_px * (left + 1) + region_px) // 2 - first, width)
        if end > begin:
            offset = 2 * (first + begin) + 1 - region_px - 2 * region_px * left
            _segment_shifts(line[begin:end], pairs[left], offset, region_px, found, shifts[begin:end])
            begin = end


@jit((given(uint8, 1), int64, given(uint8, 2), given(float32, 3), given(int64, 1), made(uint8, 2)))
def _apply_lab(flat, pitch, levels, tables, steps, out):
    height, width = out.shape[0], out.shape[1] // 3
    pairs = np.empty((tables.shape[1] - 1, 256), np.int32)
    shifts = np.empty(width, np.float32)
    for i in range(height):
        _blend_rows(tables, i + steps[0], steps[2], pairs)
        line = levels[i + steps[0], steps[1] : steps[1] + width]
        _row_shifts(line, steps[1], steps[2], pairs, shifts)
        for x in range(width):
            shifts[x] *= _PER_LEVEL
        move_lightness(flat[i * pitch : i * pitch + 3 * width], shifts, out[i])


@jit((given(uint8, 2), given(float32, 3), given(int64, 1), made(uint8, 2)))
def _apply_grey(levels, tables, steps, out):
    height, width = out.shape
    pairs = np.empty((tables.shape[1] - 1, 256), np.int32)
    shifts = np.empty(width, np.float32)
    for i in range(height):
        line = levels[i + steps[0], steps[1] : steps[1] + width]
        _blend_rows(tables, i + steps[0], steps[2], pairs)
        _row_shifts(line, steps[1], steps[2], pairs, shifts)
        for x in range(width):
            value = np.float32(line[x]) + shifts[x] + np.float32(0.5)
            out[i, x] = np.uint8(np.int32(min(max(value, np.float32(0)), np.float32(255))))
