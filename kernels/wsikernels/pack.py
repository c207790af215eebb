"""Tiles of a block → a model's input, in one pass from strided memory: uint8 colours to normalised floats.

``value = float32(float32(x) · scale + bias)`` per channel, each operation rounded to float32, then (for float16) once
more, to nearest even.
"""

import numpy as np
from numba import float32, int64, uint8, uint16

from wsikernels._float import half_bits
from wsikernels._jit import given, jit, made
from wsikernels._views import flat_rows, require_rgb


def pack_tiles(
    block: np.ndarray, origins: np.ndarray, scale: np.ndarray, bias: np.ndarray, out: np.ndarray
) -> np.ndarray:
    """Tiles as planes (NCHW): ``out[n, c, i, j] = block[y_n + i, x_n + j, c] · scale[c] + bias[c]``.

    Args:
        block: (rows, cols, 3) uint8; a view costs no copy if its rows are contiguous.
        origins: (n, 2) int64, the tiles' corners y, x inside the block.
        scale: 3 × float32.
        bias: 3 × float32.
        out: (n, 3, h, w) float32 or float16, C-contiguous.

    Returns:
        ``out``.

    Raises:
        ValueError: A wrong type or shape, or a tile that leaves the block.
    """
    flat, pitch, origins, scale, bias = _prepare(block, origins, scale, bias, out, (1, 2, 3))
    if out.size and out.dtype == np.float16:
        _pack_planes_half(flat, pitch, origins, scale, bias, out.view(np.uint16))
    elif out.size:
        _pack_planes(flat, pitch, origins, scale, bias, out)
    return out


def pack_tiles_nhwc(
    block: np.ndarray, origins: np.ndarray, scale: np.ndarray, bias: np.ndarray, out: np.ndarray
) -> np.ndarray:
    """Tiles as pixels (NHWC): as :func:`pack_tiles`, into ``out`` (n, h, w, 3) float32."""
    flat, pitch, origins, scale, bias = _prepare(block, origins, scale, bias, out, (3, 1, 2))
    if out.dtype != np.float32:
        raise ValueError(f"out must be float32, not {out.dtype}")
    if out.size:
        _pack_pixels(flat, pitch, origins, np.tile(scale, out.shape[2]), np.tile(bias, out.shape[2]), out)
    return out


def copy_tiles(block: np.ndarray, origins: np.ndarray, out: np.ndarray) -> np.ndarray:
    """Tiles as they are: ``out[n, i, j] = block[y_n + i, x_n + j]``.

    numpy copies as fast, but takes the interpreter's lock once more for every tile, for which many threads wait.

    Args:
        block: (rows, cols, 3) uint8; a view costs no copy if its rows are contiguous.
        origins: (n, 2) int64, the tiles' corners y, x inside the block.
        out: (n, h, w, 3) uint8, C-contiguous.

    Returns:
        ``out``.

    Raises:
        ValueError: A wrong type or shape, or a tile that leaves the block.
    """
    origins = _checked(block, origins, out, (np.uint8,), (3, 1, 2))
    if out.size:
        _copy_pixels(*flat_rows(block), origins, out)
    return out


def _prepare(
    block: np.ndarray,
    origins: np.ndarray,
    scale: np.ndarray,
    bias: np.ndarray,
    out: np.ndarray,
    axes: tuple[int, int, int],
) -> tuple[np.ndarray, int, np.ndarray, np.ndarray, np.ndarray]:
    """The contract, checked; ``axes`` says where ``out`` has its channels, rows and columns."""
    origins = _checked(block, origins, out, (np.float32, np.float16), axes)
    scale, bias = (np.ascontiguousarray(np.broadcast_to(v, 3), np.float32) for v in (scale, bias))
    if not (np.isfinite(scale).all() and np.isfinite(bias).all()):
        raise ValueError(f"scale and bias must be finite, not {scale} and {bias}")
    return *flat_rows(block), origins, scale, bias


def _checked(
    block: np.ndarray, origins: np.ndarray, out: np.ndarray, kinds: tuple[type, ...], axes: tuple[int, int, int]
) -> np.ndarray:
    """The origins, once everything fits together."""
    require_rgb(block, "block")
    origins = np.ascontiguousarray(origins, np.int64)
    if origins.ndim != 2 or origins.shape[1] != 2:
        raise ValueError(f"origins must have the shape (n, 2), not {origins.shape}")
    if out.ndim != 4 or out.dtype not in kinds or not out.flags.c_contiguous:
        wanted = " or ".join(np.dtype(kind).name for kind in kinds)
        raise ValueError(f"out must be a C-contiguous {wanted} array of four axes, not {out.dtype} {out.shape}")
    channels, height, width = (out.shape[a] for a in axes)
    if channels != 3 or len(out) != len(origins):
        raise ValueError(f"out has the shape {out.shape}: it needs 3 channels and {len(origins)} tiles")
    room = np.array(block.shape[:2]) - (height, width)
    if len(origins) and (origins.min() < 0 or np.any(origins.max(axis=0) > room)):
        raise ValueError(f"a tile of {height} × {width} px leaves the block of {block.shape[0]} × {block.shape[1]} px")
    return origins


@jit((given(uint8, 1), int64, given(int64, 2), given(float32, 1), given(float32, 1), made(float32, 4)))
def _pack_planes(flat, pitch, origins, scale, bias, out):
    many, _, height, width = out.shape
    for n in range(many):
        for i in range(height):
            at = (origins[n, 0] + i) * pitch + origins[n, 1] * 3
            line = flat[at : at + 3 * width]
            red, green, blue = out[n, 0, i], out[n, 1, i], out[n, 2, i]
            for j in range(width):
                red[j] = np.float32(line[3 * j]) * scale[0] + bias[0]
                green[j] = np.float32(line[3 * j + 1]) * scale[1] + bias[1]
                blue[j] = np.float32(line[3 * j + 2]) * scale[2] + bias[2]


@jit((given(uint8, 1), int64, given(int64, 2), given(float32, 1), given(float32, 1), made(uint16, 4)))
def _pack_planes_half(flat, pitch, origins, scale, bias, out):
    many, _, height, width = out.shape
    for n in range(many):
        for i in range(height):
            at = (origins[n, 0] + i) * pitch + origins[n, 1] * 3
            line = flat[at : at + 3 * width]
            red, green, blue = out[n, 0, i], out[n, 1, i], out[n, 2, i]
            for j in range(width):
                red[j] = half_bits(np.float32(np.float32(line[3 * j]) * scale[0] + bias[0]))
                green[j] = half_bits(np.float32(np.float32(line[3 * j + 1]) * scale[1] + bias[1]))
                blue[j] = half_bits(np.float32(np.float32(line[3 * j + 2]) * scale[2] + bias[2]))


@jit((given(uint8, 1), int64, given(int64, 2), given(float32, 1), given(float32, 1), made(float32, 4)))
def _pack_pixels(flat, pitch, origins, scales, biases, out):
    """``scales`` and ``biases`` repeat per pixel of a row, so that the loop runs over contiguous memory."""
    many, height, width, _ = out.shape
    pixels = out.reshape(many, height, width * 3)
    for n in range(many):
        for i in range(height):
            at = (origins[n, 0] + i) * pitch + origins[n, 1] * 3
            line, target = flat[at : at + 3 * width], pixels[n, i]
            for k in range(3 * width):
                target[k] = np.float32(line[k]) * scales[k] + biases[k]


@jit((given(uint8, 1), int64, given(int64, 2), made(uint8, 4)))
def _copy_pixels(flat, pitch, origins, out):
    many, height, width, _ = out.shape
    span = width * 3
    pixels = out.reshape(many * height, span)
    for n in range(many):
        for i in range(height):
            at = (origins[n, 0] + i) * pitch + origins[n, 1] * 3
            line, row = flat[at : at + span], pixels[n * height + i]
            for k in range(span):  # an assignment of slices takes five times as long
                row[k] = line[k]
