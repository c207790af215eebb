"""Where the tissue is: :func:`find_tissue` and the :class:`TissueMask` that it gives.

Tissue is defined at 8 µm/px, on pixels that are area means of level 0, so that every pyramid of the same slide gives
the same mask. What counts as tissue stands in :mod:`wsiengine.tissue_rules`.
"""

import json
import math
import os
import zlib
from collections.abc import Callable
from concurrent.futures import CancelledError, ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import cv2
import numpy as np

from wsiengine import tissue_rules
from wsiengine.errors import OutputError
from wsiengine.geometry import Box, Lattice, Mpp, Size
from wsiengine.scratch import IN_MEMORY, Scratch
from wsiengine.slides.base import Level, Slide, SlideInfo
from wsiengine.slides.reading import best_level, require_mpp

if TYPE_CHECKING:
    import shapely

TISSUE_UM = 8.0  # µm per pixel of the mask: a few cells wide, and a level that most pyramids come near
_MAGIC = b"wsiengine tissue 1\n"
_PIECE_PX = 1 << 22  # source pixels read at once by one thread: 13 MB
_CHEAP_PX = 32_000_000  # of a finer level: half a second by the slowest reader
_STRIP_BYTES = 8 << 20
_PACKED_PX = 1 << 20  # pixels packed or unpacked at a time: a multiple of 8


def tissue_lattice(size_l0: Size, slide_mpp: Mpp) -> Lattice:
    """The pixels of a tissue mask: 8 µm square from the slide's origin, or the slide's own where those are coarser."""
    mpp = Mpp(max(TISSUE_UM, slide_mpp.y), max(TISSUE_UM, slide_mpp.x))
    return Lattice(size_l0, slide_mpp, mpp, cell_px=1)


@dataclass(frozen=True, eq=False)
class TissueMask:
    """Tissue of one slide.

    Attributes:
        mask: (rows, cols) bool on ``lattice``: the last row and column may overhang the slide; what overhangs counts
            in no area.
        size_l0: Size of the slide at level 0.
        slide_mpp: µm per level-0 pixel.
    """

    mask: np.ndarray
    size_l0: Size
    slide_mpp: Mpp

    def __post_init__(self) -> None:
        expected = self.lattice.extent_px.shape
        if self.mask.shape != expected or self.mask.dtype != bool:
            raise ValueError(f"a tissue mask of this slide is bool {expected}, not {self.mask.dtype} {self.mask.shape}")
        self.mask.flags.writeable = False

    @classmethod
    def everywhere(cls, size_l0: Size, slide_mpp: Mpp, scratch: Scratch = IN_MEMORY) -> "TissueMask":
        """The whole slide."""
        return cls(scratch.full(tissue_lattice(size_l0, slide_mpp).extent_px.shape, True, bool), size_l0, slide_mpp)

    @classmethod
    def from_polygons(
        cls, geometry_l0: Any, size_l0: Size, slide_mpp: Mpp, scratch: Scratch = IN_MEMORY
    ) -> "TissueMask":
        """The pixels whose centre lies inside a shapely geometry in level-0 pixels."""
        from wsiengine.regions import rasterise

        return cls(rasterise(geometry_l0, tissue_lattice(size_l0, slide_mpp), scratch), size_l0, slide_mpp)

    @cached_property
    def lattice(self) -> Lattice:
        """The raster of ``mask``; its cells are the mask's pixels."""
        return tissue_lattice(self.size_l0, self.slide_mpp)

    @property
    def mpp(self) -> Mpp:
        """µm per pixel of the mask."""
        return self.lattice.mpp

    @cached_property
    def area_mm2(self) -> float:
        """Area of the tissue within the slide, mm²."""
        heights, widths = (np.diff(edges) for edges in self._edges_l0())
        return float(heights @ (self.mask @ widths)) * self.slide_mpp.pixel_um2 / 1e6

    @property
    def fraction(self) -> float:
        """Share of the slide that is tissue, 0…1; 0 for a slide without pixels."""
        slide_mm2 = self.size_l0.area * self.slide_mpp.pixel_um2 / 1e6
        return self.area_mm2 / slide_mm2 if slide_mm2 else 0.0

    def cell_fraction(self, lattice: Lattice, scratch: Scratch = IN_MEMORY) -> np.ndarray:
        """Share of tissue in each cell of ``lattice``: float32, ``lattice.extent_cells``, 0…1.

        Exact areas. Of a cell that overhangs the slide the part inside counts, so that ``everywhere`` is 1 in every
        cell. ``scratch`` makes the array.
        """
        if lattice.slide_l0 != self.size_l0:
            raise ValueError(f"the lattice is of a slide of {lattice.slide_l0} px, the mask of {self.size_l0} px")
        rows, cols = lattice.extent_cells.shape
        px_y, px_x = self.lattice.l0_per_cell
        cell_y, cell_x = lattice.l0_per_cell
        edges_y = np.minimum(np.arange(rows + 1) * cell_y, self.size_l0.height) / px_y
        edges_x = np.minimum(np.arange(cols + 1) * cell_x, self.size_l0.width) / px_x
        out = scratch.zeros((rows, cols), np.float32)
        strip = max(1, int(_STRIP_BYTES / 8 / max(self.mask.shape[1] * max(1.0, cell_y / px_y), cols, 1)))
        for start in range(0, rows, strip):
            stop = min(start + strip, rows)
            by_rows = _interval_means(self.mask, edges_y[start : stop + 1])
            out[start:stop] = _interval_means(by_rows.T, edges_x).T
        return np.clip(out, 0, 1, out=out)

    def polygons_l0(self) -> "list[shapely.Polygon]":
        """One polygon per connected piece, holes kept, along pixel edges, in level-0 pixels (x, y), clipped to the
        slide."""
        import shapely

        from wsiengine.contours import trace

        scale = np.array(self.lattice.l0_per_cell[::-1])
        limit = np.array([self.size_l0.width, self.size_l0.height], float)
        polygons = trace(self.mask.view(np.uint8)).polygons
        return list(shapely.transform(polygons, lambda xy: np.minimum(xy * scale, limit)))

    def to_bytes(self) -> bytes:
        """The mask as bytes, the same for the same mask; read back with :meth:`from_bytes`."""
        size, mpp = self.size_l0, self.slide_mpp
        facts = {"height": size.height, "width": size.width, "mpp_y": mpp.y, "mpp_x": mpp.x}
        header = json.dumps(facts, sort_keys=True).encode() + b"\n"
        packer, pixels = zlib.compressobj(6), self.mask.reshape(-1)
        parts = [
            packer.compress(np.packbits(pixels[at : at + _PACKED_PX]).data) for at in range(0, len(pixels), _PACKED_PX)
        ]
        return b"".join([_MAGIC, header, *parts, packer.flush()])

    @classmethod
    def from_bytes(cls, data: bytes, scratch: Scratch = IN_MEMORY) -> "TissueMask":
        """The mask that :meth:`to_bytes` wrote, in an array from ``scratch``.

        Raises:
            ValueError: These are not the bytes of a tissue mask, or they are damaged.
        """
        if not data.startswith(_MAGIC):
            raise ValueError("not a stored tissue mask")
        try:
            header, packed = data[len(_MAGIC) :].split(b"\n", 1)
            facts = json.loads(header)
            size, mpp = Size(facts["height"], facts["width"]), Mpp(facts["mpp_y"], facts["mpp_x"])
            shape = tissue_lattice(size, mpp).extent_px.shape
            bits, mask = np.frombuffer(zlib.decompress(packed), np.uint8), scratch.zeros(shape, bool)
            if len(bits) != -(-mask.size // 8):
                raise ValueError(f"{len(bits):,} bytes for {mask.size:,} pixels")
            pixels = mask.reshape(-1).view(np.uint8)
            for at in range(0, len(pixels), _PACKED_PX):
                part = pixels[at : at + _PACKED_PX]
                part[:] = np.unpackbits(bits[at // 8 :], count=len(part))
            return cls(mask, size, mpp)
        except (ValueError, KeyError, TypeError, zlib.error) as error:
            raise ValueError(f"the stored tissue mask is damaged: {error}") from error

    def _edges_l0(self) -> tuple[np.ndarray, np.ndarray]:
        """Edges of the mask's rows and columns in level-0 pixels, clipped to the slide."""
        scale_y, scale_x = self.lattice.l0_per_cell
        rows, cols = self.mask.shape
        return (
            np.minimum(np.arange(rows + 1) * scale_y, self.size_l0.height),
            np.minimum(np.arange(cols + 1) * scale_x, self.size_l0.width),
        )


def _interval_means(values: np.ndarray, edges: np.ndarray) -> np.ndarray:
    """Means of ``values`` (rows, cols), taken as constant over each row, between consecutive ``edges`` (n + 1,).

    Returns (n, cols) float64; 0 where an interval is empty.
    """
    first, last = int(edges[0]), min(math.ceil(edges[-1]), len(values))
    total = np.zeros((last - first + 1, values.shape[1]))
    np.cumsum(values[first:last], axis=0, dtype=np.float64, out=total[1:])
    whole = np.minimum(edges.astype(np.int64), last - 1)
    upto = total[whole - first] + (edges - whole)[:, None] * values[whole]
    widths = np.diff(edges)[:, None]
    return np.divide(np.diff(upto, axis=0), widths, out=np.zeros((len(widths), values.shape[1])), where=widths > 1e-9)


# --- finding -------------------------------------------------------------------------------------


def find_tissue(slide: Slide, scratch: Scratch = IN_MEMORY) -> TissueMask:
    """Tissue of an H&E or IHC slide; glass, dust, pen, black borders and fills left out.

    Reads the whole slide once, from a coarse level where there is one (:func:`tissue_cost`). ``scratch`` makes the
    arrays that grow with the slide (:func:`tissue_bytes`).

    Raises:
        ResolutionError: The slide states no µm/px.
        UnreadableSlide: A part of it cannot be decoded.
        OutputError: The disk has no room for scratch files.
    """
    lattice = tissue_lattice(slide.info.size_l0, require_mpp(slide.info))
    rgb = read_whole(slide, lattice.mpp, _steps(slide.info, lattice), scratch=scratch)
    return TissueMask(tissue_rules.segment(rgb, lattice.mpp.mean, scratch), lattice.slide_l0, lattice.slide_mpp)


def tissue_bytes(lattice: Lattice) -> tuple[int, ...]:
    """Sizes of the arrays that :func:`find_tissue` holds at once, on the lattice of the mask: pixels, and five maps."""
    px = lattice.extent_px.area
    return 3 * px, *([px] * 5)


def tissue_cost(info: SlideInfo) -> float:
    """Megapixels that :func:`find_tissue` reads: few where the file has a level near 8 µm/px, else its finest level.

    Raises:
        ResolutionError: The slide states no µm/px.
    """
    lattice = tissue_lattice(info.size_l0, require_mpp(info))
    return _level(info, lattice, _steps(info, lattice)).size.area / 1e6


def read_whole(
    slide: Slide,
    mpp: Mpp,
    steps: int = 1,
    *,
    over: Callable[[], bool] = lambda: False,
    scratch: Scratch = IN_MEMORY,
) -> np.ndarray:
    """The whole slide at ``mpp`` → (rows, cols, 3) uint8 from ``scratch``, read in pieces by a few threads.

    ``steps`` 2 reads at half the pitch and averages 2 × 2 pixels: from a finer level, where there is one.
    It is given up (``CancelledError``) once ``over`` says so.
    """
    lattice = Lattice(slide.info.size_l0, require_mpp(slide.info), mpp, cell_px=1)
    source_per_px = math.prod(lattice.l0_per_px) / math.prod(_level(slide.info, lattice, steps).downsample)
    out = scratch.zeros((*lattice.extent_px.shape, 3), np.uint8)

    def read(piece: Box) -> None:
        if over():
            raise CancelledError
        pixels = slide.read(piece.scale(steps), Mpp(mpp.y / steps, mpp.x / steps))
        out[piece.slices] = _reduce(pixels, steps)

    # Squares share fewer file tiles with their neighbours than strips do.
    side = max(1, int(math.sqrt(_PIECE_PX / source_per_px)))
    with ThreadPoolExecutor(min(4, os.cpu_count() or 1)) as pool:
        for _ in pool.map(read, Box.of(lattice.extent_px).pieces(side, side)):
            pass
    return out


def _steps(info: SlideInfo, lattice: Lattice) -> int:
    """2 where reading at 4 µm/px costs little, else 1.

    JPEG at 8 µm/px blurs what it stores over 64 to 128 µm: on sparse tissue masks then agree to 0.97 only.
    """
    return 2 if min(lattice.l0_per_px) >= 2 and _level(info, lattice, 2).size.area <= _CHEAP_PX else 1


def _level(info: SlideInfo, lattice: Lattice, steps: int) -> Level:
    """The level that is read for ``steps`` pixels to a side of the lattice's."""
    y, x = lattice.l0_per_px
    return info.levels[best_level(info.levels, (y / steps, x / steps))]


def _reduce(pixels: np.ndarray, steps: int) -> np.ndarray:
    """Means of ``steps`` × ``steps`` pixels (1 or 2), rounded half up."""
    if steps == 1:
        return pixels
    rows, cols = pixels.shape[0] // steps, pixels.shape[1] // steps
    return cv2.resize(pixels, (cols, rows), interpolation=cv2.INTER_AREA)  # of 2 × 2 pixels in whole numbers


# --- showing -------------------------------------------------------------------------------------


def tissue_picture(slide: Slide, mask: TissueMask, path: str | os.PathLike[str], *, max_side_px: int = 1600) -> None:
    """Write a PNG of the slide with the tissue outlined and the rest dimmed.

    Raises:
        OutputError: The file cannot be written.
    """
    extent = mask.lattice.extent_px
    shrink = max(1.0, max(extent.shape) / max_side_px)
    rgb = read_whole(slide, Mpp(mask.mpp.y * shrink, mask.mpp.x * shrink))
    enlarge = math.ceil(800 / max(rgb.shape[:2]))
    picture = cv2.resize(rgb, None, fx=enlarge, fy=enlarge, interpolation=cv2.INTER_NEAREST)
    px_per_l0 = enlarge / (shrink * mask.lattice.l0_per_px[1]), enlarge / (shrink * mask.lattice.l0_per_px[0])
    rings = [
        np.rint(np.asarray(ring.coords) * px_per_l0 * 16).astype(np.int32)
        for polygon in mask.polygons_l0()
        for ring in (polygon.exterior, *polygon.interiors)
    ]
    inside = np.zeros(picture.shape[:2], np.uint8)
    cv2.fillPoly(inside, rings, 255, shift=4)
    picture = np.where(inside[..., None] > 0, picture, (picture * np.float32(0.7)).astype(np.uint8))
    cv2.polylines(picture, rings, True, (0, 158, 115), 2, cv2.LINE_AA, shift=4)
    data = cv2.imencode(".png", picture[..., ::-1])[1].tobytes()
    try:
        Path(path).write_bytes(data)
    except OSError as error:
        raise OutputError(f"The picture of the tissue cannot be written: {error}", hint="another path.") from error
