"""Resampling by area: each output pixel is the mean of the source area under it, rounded half up.

Coordinates are absolute (counted from the slide's origin), so that the same output pixel has the same bits however the
picture is cut. Output row Y covers the source rows [Y·ratio, (Y+1)·ratio).
"""

import numpy as np
from numba import float64, int64, types, uint8

from wsikernels._jit import given, jit, made
from wsikernels._views import flat_rows

_SNAP = 1e-6  # an edge this near to a pixel boundary is that boundary: 0.5/0.125 µm/px need not be exactly 4


def source_span(out0: int, out1: int, ratio: float) -> tuple[int, int]:
    """Source pixels [first, last) under the output pixels [out0, out1) of one axis."""
    edges = _edges(np.array([out0, out1]), ratio)
    return int(np.floor(edges[0])), int(np.ceil(edges[1]))


def resample_area(
    src: np.ndarray,
    src_y0: int,
    src_x0: int,
    ratio_y: float,
    ratio_x: float,
    out_y0: int,
    out_x0: int,
    out: np.ndarray,
) -> np.ndarray:
    """Area means of ``src`` into ``out``.

    Args:
        src: (h, w, c) uint8, row-contiguous for speed; its corner is the absolute source pixel (src_y0, src_x0).
        ratio_y: Source pixels per output pixel, vertically; below 1 enlarges.
        ratio_x: The same, horizontally.
        out: (rows, cols, c) uint8, C-contiguous; its corner is the absolute output pixel (out_y0, out_x0).

    Returns:
        ``out``.

    Raises:
        ValueError: A wrong type or shape, a ratio that is not positive, or a source that does not cover the output
            (see :func:`source_span`).
    """
    _check(src, ratio_y, ratio_x, out)
    rows, row_weights = _axis(out_y0, out.shape[0], ratio_y, src_y0, src.shape[0], "rows")
    cols, col_weights = _axis(out_x0, out.shape[1], ratio_x, src_x0, src.shape[1], "columns")
    if out.size == 0:
        return out
    flat, pitch = flat_rows(src)
    whole_y, whole_x = _whole(row_weights), _whole(col_weights)
    if whole_y and whole_x and whole_y * whole_x <= _MOST_WHOLE and whole_y <= _TALLEST:
        height, width, channels = out.shape
        at = rows[0, 0] * pitch + cols[0, 0] * channels
        target = out.reshape(-1), (0, width * channels)
        _mean_whole(flat, (at, pitch), (whole_y, whole_x), *target, (height, width, channels))
    else:
        _mean_general(flat, pitch, rows, row_weights, cols, col_weights, out)
    return out


def shrink_into(
    src: np.ndarray,
    src_yx: tuple[int, int],
    ratio: tuple[int, int],
    out: np.ndarray,
    out_yx: tuple[int, int],
    shape: tuple[int, int],
) -> None:
    """As :func:`resample_area` by whole ratios, from a part of one picture into a part of another.

    Args:
        src: (h, w, c) uint8, C-contiguous.
        src_yx: Where in ``src`` the area of the first output pixel begins.
        ratio: Source pixels per output pixel: vertically, horizontally.
        out: (rows, cols, c) uint8, C-contiguous; only the part is written.
        out_yx: The first output pixel in ``out``.
        shape: Output pixels: rows, columns.

    Raises:
        ValueError: A wrong type or layout, a ratio beyond 1 to 256, or a part that leaves its picture.
    """
    (y, x), (to_y, to_x), (ratio_y, ratio_x), (height, width) = src_yx, out_yx, ratio, shape
    for image in (src, out):
        if image.dtype != np.uint8 or image.ndim != 3 or not image.flags.c_contiguous:
            raise ValueError(f"a C-contiguous uint8 picture is needed, not {image.dtype} of shape {image.shape}")
    channels = src.shape[2]
    if channels != out.shape[2] or not (1 <= ratio_y <= _TALLEST and 1 <= ratio_x <= _TALLEST):
        raise ValueError(f"ratios {ratio} of {channels} channels into {out.shape[2]}")
    if (
        min(y, x, to_y, to_x, height, width) < 0
        or y + height * ratio_y > src.shape[0]
        or x + width * ratio_x > src.shape[1]
        or to_y + height > out.shape[0]
        or to_x + width > out.shape[1]
    ):
        raise ValueError(f"{shape} pixels at {src_yx} by {ratio}, to {out_yx}: beyond {src.shape} or {out.shape}")
    if height and width:
        pitch, out_pitch = src.shape[1] * channels, out.shape[1] * channels
        at, to = y * pitch + x * channels, to_y * out_pitch + to_x * channels
        target = out.reshape(-1), (to, out_pitch)
        _mean_whole(src.reshape(-1), (at, pitch), (ratio_y, ratio_x), *target, (height, width, channels))


_TALLEST = 256  # rows of 255 that a sum of 16 bits holds
_MOST_WHOLE = 1 << 22  # 255 × area × 2 stays in int32


def _check(src: np.ndarray, ratio_y: float, ratio_x: float, out: np.ndarray) -> None:
    for name, image in (("src", src), ("out", out)):
        if image.dtype != np.uint8 or image.ndim != 3:
            raise ValueError(f"{name} must be uint8 (rows, cols, channels), not {image.dtype} of shape {image.shape}")
    if src.shape[2] != out.shape[2]:
        raise ValueError(f"src has {src.shape[2]} channels, out {out.shape[2]}")
    if not out.flags.c_contiguous:
        raise ValueError("out must be C-contiguous")
    for name, ratio in (("ratio_y", ratio_y), ("ratio_x", ratio_x)):
        if not (np.isfinite(ratio) and ratio > 0):
            raise ValueError(f"{name} must be a positive number, not {ratio}")


def _edges(indices: np.ndarray, ratio: float) -> np.ndarray:
    edges = indices.astype(np.float64) * float(ratio)
    nearest = np.rint(edges)
    return np.where(np.abs(edges - nearest) < _SNAP, nearest, edges)


def _axis(out0: int, count: int, ratio: float, src0: int, available: int, what: str) -> tuple[np.ndarray, np.ndarray]:
    """Per output pixel: (first source pixel, how many) int64, and (first, last weight, length) float64.

    Everything is computed from absolute edges; only the first index is then counted from the source's corner.
    """
    edges = _edges(np.arange(out0, out0 + count + 1), ratio)
    begin, end = edges[:-1], edges[1:]
    first, past = np.floor(begin), np.ceil(end)
    index = np.stack([first - src0, past - first], axis=1).astype(np.int64)
    weights = np.stack([np.minimum(first + 1, end) - begin, end - (past - 1), end - begin], axis=1)
    if count and (index[0, 0] < 0 or index[-1].sum() > available):
        raise ValueError(
            f"the source holds the {what} {src0} to {src0 + available}, "
            f"but the output needs {int(first[0])} to {int(past[-1])}"
        )
    return index, weights


def _whole(weights: np.ndarray) -> int:
    """The ratio, if every output pixel covers that many whole source pixels; else 0."""
    ratio = int(weights[0, 2])
    return ratio if np.all(weights == (1.0, 1.0, ratio)) else 0


@jit(inline=True)
def _round(value):
    return np.uint8(np.int32(value + 0.5))


@jit(inline=True)
def _weighted_rows(flat, at, pitch, count, weights, column):
    span = len(column)
    line = flat[at : at + span]
    first = weights[0]
    for k in range(span):
        column[k] = first * line[k]
    for r in range(1, count):
        weight = weights[1] if r == count - 1 else 1.0
        line = flat[at + r * pitch : at + r * pitch + span]
        for k in range(span):
            column[k] += weight * line[k]


@jit(inline=True)
def _mean_quads(flat, at, pitch, out, to, out_pitch, height, width):
    """2 × 2 pixels of three channels: means at every value, of which every second pixel's are taken."""
    span = width * 6 - 3
    means = np.empty(span, np.uint8)
    for i in range(height):
        first = at + 2 * i * pitch
        upper, lower = flat[first : first + span + 3], flat[first + pitch : first + pitch + span + 3]
        for k in range(span):
            total = np.uint16(upper[k]) + np.uint16(lower[k]) + np.uint16(upper[k + 3]) + np.uint16(lower[k + 3])
            means[k] = np.uint8((total + np.uint16(2)) >> np.uint16(2))
        target = out[to + i * out_pitch : to + i * out_pitch + 3 * width]
        for j in range(width):
            target[3 * j] = means[6 * j]
            target[3 * j + 1] = means[6 * j + 1]
            target[3 * j + 2] = means[6 * j + 2]


_Pair = types.UniTuple(int64, 2)


@jit((given(uint8, 1), _Pair, _Pair, made(uint8, 1), _Pair, types.UniTuple(int64, 3)))
def _mean_whole(flat, source, ratio, out, target, shape):
    """Exact integer sums. All loops but the last run over contiguous memory.

    ``source`` and ``target``: where the first pixel is, and from one row to the next; ``shape``: rows, columns,
    channels of what is made.
    """
    (at, pitch), (ratio_y, ratio_x), (to, out_pitch), (height, width, channels) = source, ratio, target, shape
    if ratio_y == 2 and ratio_x == 2 and channels == 3:
        _mean_quads(flat, at, pitch, out, to, out_pitch, height, width)
        return
    span = width * ratio_x * channels
    kept = span - (ratio_x - 1) * channels
    column, total = np.empty(span, np.uint16), np.empty(kept, np.uint32)  # 256 rows × 255 fit
    half = np.float64(ratio_y * ratio_x) + 0.5
    scale = 0.5 / np.float64(ratio_y * ratio_x)
    for i in range(height):
        first = at + i * ratio_y * pitch
        line = flat[first : first + span]
        for k in range(span):
            column[k] = line[k]
        for r in range(1, ratio_y):
            line = flat[first + r * pitch : first + r * pitch + span]
            for k in range(span):
                column[k] += line[k]
        for k in range(kept):
            total[k] = column[k]
        for r in range(1, ratio_x):
            beside = column[r * channels : r * channels + kept]
            for k in range(kept):
                total[k] += beside[k]
        made_line = out[to + i * out_pitch : to + i * out_pitch + width * channels]
        for j in range(width):
            for c in range(channels):
                # floor((2·total + area) / (2·area)), exactly: the extra half keeps the product off every whole number
                made_line[j * channels + c] = np.uint8((2 * np.int32(total[j * ratio_x * channels + c]) + half) * scale)


@jit((given(uint8, 1), int64, given(int64, 2), given(float64, 2), given(int64, 2), given(float64, 2), made(uint8, 3)))
def _mean_general(flat, pitch, rows, row_weights, cols, col_weights, out):
    """Weighted sums in float64, always added in the order of the source pixels."""
    height, width, channels = out.shape
    x0 = cols[0, 0]
    span = (cols[width - 1, 0] + cols[width - 1, 1] - x0) * channels
    column = np.empty(span, np.float64)
    for i in range(height):
        _weighted_rows(flat, rows[i, 0] * pitch + x0 * channels, pitch, rows[i, 1], row_weights[i], column)
        line = out[i]
        for j in range(width):
            base, many = (cols[j, 0] - x0) * channels, cols[j, 1]
            area = row_weights[i, 2] * col_weights[j, 2]
            near, far = col_weights[j, 0], col_weights[j, 1]
            if channels == 3:
                a, b, c = near * column[base], near * column[base + 1], near * column[base + 2]
                for k in range(1, many - 1):
                    a += column[base + 3 * k]
                    b += column[base + 3 * k + 1]
                    c += column[base + 3 * k + 2]
                if many > 1:
                    k = base + 3 * many - 3
                    a += far * column[k]
                    b += far * column[k + 1]
                    c += far * column[k + 2]
                line[j, 0] = _round(a / area)
                line[j, 1] = _round(b / area)
                line[j, 2] = _round(c / area)
                continue
            for c in range(channels):
                total = near * column[base + c]
                for k in range(1, many - 1):
                    total += column[base + k * channels + c]
                if many > 1:
                    total += far * column[base + (many - 1) * channels + c]
                line[j, c] = _round(total / area)
