"""What becomes of file tiles, one by one, while each is still in the processor's cache."""

from collections.abc import Iterable, Sequence

import numpy as np

from wsiengine.geometry import Box, Size
from wsiengine.slides.base import FileTile
from wsiengine.slides.white import WHITE

MOST_SHRUNK = 256  # pixels of a level in one, each way: what the kernel takes


def touched(parts: Sequence[Box], tile: Size) -> set[tuple[int, int]]:
    """Row and column of the file tiles that ``parts``, in pixels of the level, touch."""
    height, width = tile.shape
    return {
        (row, col)
        for part in parts
        for row in range(part.y0 // height, -(-part.y1 // height))
        for col in range(part.x0 // width, -(-part.x1 // width))
    }


def place(tiles: Iterable[FileTile], tile: Size, box: Box, out: np.ndarray) -> None:
    """Copy what lies in ``box`` to ``out`` (h, w, 3) uint8, whose rows may be strided; what was left out is white."""
    height, width = tile.shape
    for one in tiles:  # plain numbers: per tile, a dozen boxes would cost a twentieth of decoding
        y0, y1 = max(one.y, box.y0), min(one.y + height, box.y1)
        x0, x1 = max(one.x, box.x0), min(one.x + width, box.x1)
        pixels = WHITE if one.pixels is None else one.pixels[y0 - one.y : y1 - one.y, x0 - one.x : x1 - one.x]
        out[y0 - box.y0 : y1 - box.y0, x0 - box.x0 : x1 - box.x0] = pixels


def shrink(tiles: Iterable[FileTile], tile: Size, ratio: tuple[int, int], box_px: Box) -> np.ndarray:
    """The pixels of ``box_px``, means of ``ratio`` pixels of the level each: (h, w, 3) uint8.

    No such pixel may lie in two file tiles: ``ratio`` divides the sides of ``tile``. What was left out is white.
    """
    from wsikernels.resample import shrink_into  # Numba: paid for by the first resampled read

    out = np.empty((*box_px.shape, 3), np.uint8)
    height, width = tile.height // ratio[0], tile.width // ratio[1]
    for one in tiles:
        tile_y, tile_x = one.y // ratio[0], one.x // ratio[1]
        y0, y1 = max(tile_y, box_px.y0), min(tile_y + height, box_px.y1)
        x0, x1 = max(tile_x, box_px.x0), min(tile_x + width, box_px.x1)
        to = y0 - box_px.y0, x0 - box_px.x0
        if one.pixels is None:
            out[to[0] : y1 - box_px.y0, to[1] : x1 - box_px.x0] = WHITE
        else:
            corner = (y0 - tile_y) * ratio[0], (x0 - tile_x) * ratio[1]
            shrink_into(one.pixels, corner, ratio, out, to, (y1 - y0, x1 - x0))
    return out
