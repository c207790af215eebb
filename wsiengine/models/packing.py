"""Tiles of a block as a model takes them: cut out, in its layout, type and range."""

import math

import numpy as np

from wsiengine.models.card import Card
from wsiengine.models.parts import InputSpec

NUMPY = {"uint8": np.uint8, "uint16": np.uint16, "float32": np.float32, "float16": np.float16}
ALIGN_BYTES = 64  # what ONNX Runtime's own tensors have, and a cache line


def aligned(shape: tuple[int, ...], dtype: np.dtype, *, zeroed: bool = True) -> np.ndarray:
    """Memory that starts at a multiple of ``ALIGN_BYTES``: zeros, or whatever was there."""
    n_bytes = math.prod(shape) * dtype.itemsize
    memory = (np.zeros if zeroed else np.empty)(n_bytes + ALIGN_BYTES, np.uint8)
    start = -memory.ctypes.data % ALIGN_BYTES
    return memory[start : start + n_bytes].view(dtype).reshape(shape)


def room_for(count: int, spec: InputSpec) -> np.ndarray:
    """A zeroed, aligned batch of ``count`` tiles in the model's layout and type."""
    side, channels = spec.size_px, spec.channels
    shape = (side, side, channels) if spec.layout == "NHWC" else (channels, side, side)
    return aligned((count, *shape), np.dtype(NUMPY[spec.dtype]))


def as_one(block: np.ndarray, card: Card) -> np.ndarray:
    """A whole ``block`` (rows, cols, channels) as a batch of one, as large as it is."""
    spec = card.input
    rows, cols, channels = block.shape
    shape = (1, rows, cols, channels) if spec.layout == "NHWC" else (1, channels, rows, cols)
    batch = aligned(shape, np.dtype(NUMPY[spec.dtype]))
    pack(block, np.zeros((1, 2), np.int64), card, batch)
    return batch


def checked_origins(pixels: np.ndarray, origins_px: np.ndarray, spec: InputSpec) -> np.ndarray:
    dtype, channels = (np.uint16, 1) if spec.deep else (np.uint8, 3)
    if pixels.dtype != dtype or pixels.ndim != 3 or pixels.shape[2] != channels:
        needed = f"{np.dtype(dtype)} (rows, cols, {channels})"
        raise ValueError(f"pixels are {pixels.dtype} {pixels.shape}, needed {needed}")
    side = spec.size_px
    origins = np.asarray(origins_px, np.int64).reshape(-1, 2)
    room = np.array(pixels.shape[:2]) - side
    if len(origins) and (origins.min() < 0 or (origins > room).any()):
        raise ValueError(f"a tile of {side} px leaves the block of {pixels.shape[:2]} px")
    return origins


def pack(pixels: np.ndarray, origins: np.ndarray, card: Card, out: np.ndarray) -> None:
    """Cut the tiles at ``origins`` out of ``pixels`` into ``out``, in the layout, type and range of the card."""
    spec = card.input
    if spec.channels == 1:
        _pack_grey(pixels, origins, spec, out)
        return
    if spec.dtype != "uint8":
        from wsikernels.pack import pack_tiles, pack_tiles_nhwc  # Numba, paid for by models that need it

        by_layout = pack_tiles if spec.layout == "NCHW" else pack_tiles_nhwc
        by_layout(pixels, origins, spec.scale, spec.bias, out)
        return
    if spec.layout == "NHWC" and len(out) > 1:  # a batch
        from wsikernels.pack import copy_tiles

        copy_tiles(pixels, origins, out)
        return
    height, width = out.shape[1:3] if spec.layout == "NHWC" else out.shape[2:4]
    for tile, (y, x) in zip(out, origins.tolist(), strict=True):
        view = pixels[y : y + height, x : x + width]
        tile[...] = view if spec.layout == "NHWC" else view.transpose(2, 0, 1)


def _pack_grey(pixels: np.ndarray, origins: np.ndarray, spec: InputSpec, out: np.ndarray) -> None:
    """As :func:`pack`, for a model of one channel; the three of grey pixels are the same."""
    for tile, (y, x) in zip(out, origins.tolist(), strict=True):
        view = pixels[y : y + spec.size_px, x : x + spec.size_px, 0]
        plane = tile[..., 0] if spec.layout == "NHWC" else tile[0]
        plane[...] = view if spec.dtype.startswith("uint") else view * spec.scale[0] + spec.bias[0]
