"""Sizes, boxes, resolutions and the lattice: frozen, integer, half-open. No I/O, no arrays.

Frames
    ``_l0``  level-0 pixels of the slide, origin at the top left, y down.
    ``_px``  working pixels: the slide resampled to the model's µm/px, same origin.
    cells    the model's output stride in working pixels, same origin.

All three share the slide's origin (0, 0); a coordinate goes from one to another by one multiplication,
rounded (where it must be) once, at the end.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass


@dataclass(frozen=True, slots=True, order=True)
class Size:
    """Extent in rows and columns (height first, as arrays are)."""

    height: int
    width: int

    def __post_init__(self) -> None:
        if self.height < 0 or self.width < 0:
            raise ValueError(f"a size cannot be negative: {self.height} × {self.width}")

    @property
    def area(self) -> int:
        return self.height * self.width

    @property
    def shape(self) -> tuple[int, int]:
        """(rows, cols), for numpy."""
        return self.height, self.width

    def __str__(self) -> str:
        return f"{self.width:,} × {self.height:,}"  # width first: how people write image sizes


@dataclass(frozen=True, slots=True, order=True)
class Box:
    """A half-open rectangle [y0, y1) × [x0, x1); its unit is that of the variable's suffix."""

    y0: int
    x0: int
    y1: int
    x1: int

    def __post_init__(self) -> None:
        if self.y1 < self.y0 or self.x1 < self.x0:
            raise ValueError(f"a box ends before it starts: {self}")

    @classmethod
    def of(cls, size: Size, y: int = 0, x: int = 0) -> "Box":
        return cls(y, x, y + size.height, x + size.width)

    @property
    def height(self) -> int:
        return self.y1 - self.y0

    @property
    def width(self) -> int:
        return self.x1 - self.x0

    @property
    def size(self) -> Size:
        return Size(self.height, self.width)

    @property
    def shape(self) -> tuple[int, int]:
        return self.height, self.width

    @property
    def area(self) -> int:
        return self.height * self.width

    @property
    def slices(self) -> tuple[slice, slice]:
        """numpy slices (rows, cols) of an array whose origin is this frame's origin."""
        return slice(self.y0, self.y1), slice(self.x0, self.x1)

    def __bool__(self) -> bool:
        return self.area > 0

    def shift(self, dy: int, dx: int) -> "Box":
        return Box(self.y0 + dy, self.x0 + dx, self.y1 + dy, self.x1 + dx)

    def relative_to(self, other: "Box") -> "Box":
        """This box in a frame whose origin is the corner of ``other``."""
        return self.shift(-other.y0, -other.x0)

    def grow(self, margin: int) -> "Box":
        return Box(self.y0 - margin, self.x0 - margin, self.y1 + margin, self.x1 + margin)

    def scale(self, factor: int) -> "Box":
        return Box(self.y0 * factor, self.x0 * factor, self.y1 * factor, self.x1 * factor)

    def intersect(self, other: "Box") -> "Box":
        """The common part; an empty box (at this box's near corner) where there is none."""
        y0, x0 = max(self.y0, other.y0), max(self.x0, other.x0)
        y1, x1 = min(self.y1, other.y1), min(self.x1, other.x1)
        if y1 <= y0 or x1 <= x0:
            return Box(self.y0, self.x0, self.y0, self.x0)
        return Box(y0, x0, y1, x1)

    def union(self, other: "Box") -> "Box":
        return Box(min(self.y0, other.y0), min(self.x0, other.x0), max(self.y1, other.y1), max(self.x1, other.x1))

    def contains(self, other: "Box") -> bool:
        return self.y0 <= other.y0 and self.x0 <= other.x0 and self.y1 >= other.y1 and self.x1 >= other.x1

    def pieces(self, height: int, width: int) -> Iterator["Box"]:
        """This box cut row-major into pieces of at most ``height`` × ``width``."""
        for y in range(self.y0, self.y1, height):
            for x in range(self.x0, self.x1, width):
                yield Box(y, x, min(y + height, self.y1), min(x + width, self.x1))


@dataclass(frozen=True, slots=True)
class Mpp:
    """Physical size of a pixel, µm, per axis (most slides: both the same)."""

    y: float
    x: float

    def __post_init__(self) -> None:
        if not (math.isfinite(self.y) and math.isfinite(self.x) and self.y > 0 and self.x > 0):
            raise ValueError(f"µm/px must be positive numbers, not y {self.y}, x {self.x}")

    @classmethod
    def square(cls, um: float) -> "Mpp":
        return cls(float(um), float(um))

    @property
    def mean(self) -> float:
        """Geometric mean: the side of a square pixel of the same area."""
        return math.sqrt(self.y * self.x)

    @property
    def pixel_um2(self) -> float:
        return self.y * self.x

    def __str__(self) -> str:
        if math.isclose(self.y, self.x, rel_tol=1e-3):
            text = f"{self.mean:.4g}"
            return f"{text}.0 µm/px" if text.isdigit() else f"{text} µm/px"
        return f"{self.x:.4g} × {self.y:.4g} µm/px (x × y)"


@dataclass(frozen=True, slots=True)
class Lattice:
    """The slide-anchored raster of a run: working pixels at ``mpp``, grouped into cells of ``cell_px``.

    Args:
        slide_l0: Size of the slide at level 0.
        slide_mpp: µm per level-0 pixel.
        mpp: µm per working pixel (the model's).
        cell_px: Side of a cell in working pixels (the model's output stride).
    """

    slide_l0: Size
    slide_mpp: Mpp
    mpp: Mpp
    cell_px: int

    @property
    def l0_per_px(self) -> tuple[float, float]:
        """Level-0 pixels per working pixel, (y, x)."""
        return self.mpp.y / self.slide_mpp.y, self.mpp.x / self.slide_mpp.x

    @property
    def l0_per_cell(self) -> tuple[float, float]:
        """Level-0 pixels per cell, (y, x)."""
        fy, fx = self.l0_per_px
        return fy * self.cell_px, fx * self.cell_px

    @property
    def extent_px(self) -> Size:
        """The slide in working pixels, rounded up."""
        fy, fx = self.l0_per_px
        return Size(_ceil(self.slide_l0.height / fy), _ceil(self.slide_l0.width / fx))

    @property
    def extent_cells(self) -> Size:
        """The slide in cells, rounded up: the last row and column may overhang."""
        px = self.extent_px
        return Size(-(-px.height // self.cell_px), -(-px.width // self.cell_px))

    @property
    def cell_um2(self) -> float:
        """Area of a whole cell."""
        return self.mpp.pixel_um2 * self.cell_px**2

    def inside(self) -> tuple[list[float], list[float]]:
        """The part of each row and of each column of cells that lies on the slide: 1 but for the last, in (0, 1]."""
        rows, cols = (
            [min(1.0, size / step - index) for index in range(count)]
            for size, step, count in zip(self.slide_l0.shape, self.l0_per_cell, self.extent_cells.shape, strict=True)
        )
        return rows, cols


def _ceil(value: float) -> int:
    """Ceiling that forgives the last bits of a division (1000.0000000001 is 1000)."""
    nearest = round(value)
    return nearest if math.isclose(value, nearest, rel_tol=1e-9, abs_tol=1e-9) else math.ceil(value)
