"""Strided pictures as flat memory: numba vectorises loops over contiguous memory only, and a tile is a view."""

import numpy as np


def flat_rows(image: np.ndarray) -> tuple[np.ndarray, int]:
    """The memory under a picture (rows, cols[, ch]) with contiguous rows, and the distance of rows in elements.

    Pixel (y, x, c) is ``flat[y * pitch + x * channels + c]``. A view into a larger picture costs no copy; any other
    layout (mirrored, transposed, every second column) is copied once.
    """
    if image.size == 0:
        return np.empty(0, image.dtype), 0
    pitch = image.strides[0]
    inner = image[0]
    if not inner.flags.c_contiguous or pitch < inner.nbytes or pitch % image.itemsize:
        if image.shape[0] > 1 or not inner.flags.c_contiguous:
            image = np.ascontiguousarray(image)
            inner = image[0]
        pitch = inner.nbytes
    step = pitch // image.itemsize
    length = (image.shape[0] - 1) * step + inner.size
    flat = np.lib.stride_tricks.as_strided(image, (length,), (image.itemsize,), writeable=image.flags.writeable)
    return flat, step


def require_rgb(image: np.ndarray, name: str = "image") -> None:
    """The contract of the colour kernels: (rows, cols, 3) uint8."""
    if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3:
        raise ValueError(f"{name} must be uint8 of shape (rows, cols, 3), not {image.dtype} of shape {image.shape}")
