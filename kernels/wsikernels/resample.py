"""Resampling by area: each output pixel is the mean of the source area under it, rounded half up.

Coordinates are absolute (counted from the slide's origin), so that the same output pixel has the same bits however the
picture is cut. Output row Y covers the source rows [Y·ratio, (Y+1)·ratio).
"""

import numpy as np
from numba import float64, int64, uint8

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
    if whole_y and whole_x and whole_y * whole_x <= _MOST_WHOLE and whole_y <= 256:
        _mean_whole(flat, pitch, rows[0, 0], cols[0, 0], whole_y, whole_x, out)
    else:
        _mean_general(flat, pitch, rows, row_weights, cols, col_weights, out)
    return out


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


@jit((given(uint8, 1), int64, int64, int64, int64, int64, made(uint8, 3)))
def _mean_whole(flat, pitch, y0, x0, ratio_y, ratio_x, out):
    """Exact integer sums: rows first (a loop over contiguous memory), then groups of columns."""
    height, width, channels = out.shape
    span = width * ratio_x * channels
    column = np.empty(span, np.uint16)  # 256 rows × 255 fit
    half = np.float64(ratio_y * ratio_x) + 0.5
    scale = 0.5 / np.float64(ratio_y * ratio_x)
    for i in range(height):
        at = (y0 + i * ratio_y) * pitch + x0 * channels
        line = flat[at : at + span]
        for k in range(span):
            column[k] = line[k]
        for r in range(1, ratio_y):
            line = flat[at + r * pitch : at + r * pitch + span]
            for k in range(span):
                column[k] += line[k]
        if ratio_x == 2 and channels == 3:
            for j in range(width):
                k = 6 * j
                # floor((2·total + area) / (2·area)), exactly: the extra half keeps the product off every whole number
                out[i, j, 0] = np.uint8((2 * (np.int32(column[k]) + np.int32(column[k + 3])) + half) * scale)
                out[i, j, 1] = np.uint8((2 * (np.int32(column[k + 1]) + np.int32(column[k + 4])) + half) * scale)
                out[i, j, 2] = np.uint8((2 * (np.int32(column[k + 2]) + np.int32(column[k + 5])) + half) * scale)
            continue
        for j in range(width):
            base = j * ratio_x * channels
            for c in range(channels):
                total = np.int32(0)
                for k in range(ratio_x):
                    total += np.int32(column[base + k * channels + c])
                out[i, j, c] = np.uint8((2 * total + half) * scale)


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
