"""The fitted steps of a normaliser: numbers from the fit, pixels from the kernels.

Every :class:`Step` is a function of a pixel, or of its neighbourhood on a grid fixed to the slide: a pixel has the same
value in whichever block it is computed. A :data:`TileStep` is a function of one whole tile. Kernels are imported where
they are first used: loading them takes longer than all else here, and most runs need none.
"""

from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, ClassVar, Protocol

import numpy as np

from wsiengine.geometry import Box

if TYPE_CHECKING:
    from wsikernels.stain import DensityTables

Numbers = tuple[float, ...]


class Step(Protocol):
    """One fitted step. ``pixels`` reach ``halo_px`` beyond ``box``; the result is ``box``."""

    kind: ClassVar[str]

    @property
    def halo_px(self) -> int: ...

    def apply(self, pixels: np.ndarray, box: Box) -> np.ndarray: ...


@dataclass(frozen=True, slots=True)
class DensityStep:
    """A matrix on optical densities, row by row."""

    matrix: Numbers
    kind: ClassVar[str] = "density"
    halo_px: ClassVar[int] = 0

    def apply(self, pixels: np.ndarray, box: Box) -> np.ndarray:
        from wsikernels.stain import apply_density

        return apply_density(pixels, _tables(self.matrix))


@lru_cache(maxsize=8)
def _tables(matrix: Numbers) -> "DensityTables":
    from wsikernels.stain import DensityTables

    return DensityTables(np.reshape(matrix, (3, 3)))


@dataclass(frozen=True, slots=True)
class ReinhardStep:
    """Colour transfer in Lab."""

    terms: Numbers
    kind: ClassVar[str] = "reinhard"
    halo_px: ClassVar[int] = 0

    def apply(self, pixels: np.ndarray, box: Box) -> np.ndarray:
        from wsikernels.reinhard import apply_reinhard

        return apply_reinhard(pixels, np.array(self.terms, np.float32))


@dataclass(frozen=True, slots=True)
class LinearStep:
    """pixel @ matrix + offset: grey, demean, whiten."""

    matrix: Numbers
    offset: Numbers
    kind: ClassVar[str] = "linear"
    halo_px: ClassVar[int] = 0

    def apply(self, pixels: np.ndarray, box: Box) -> np.ndarray:
        from wsikernels.published import apply_linear

        return apply_linear(pixels, np.reshape(self.matrix, (3, 3)), np.array(self.offset))


@dataclass(frozen=True, slots=True)
class BackgroundStep:
    """Minus the Gaussian mean of the neighbourhood."""

    sigma_px: float
    kind: ClassVar[str] = "background"

    @property
    def halo_px(self) -> int:
        from wsikernels.published import background_margin_px

        return background_margin_px(self.sigma_px)

    def apply(self, pixels: np.ndarray, box: Box) -> np.ndarray:
        from wsikernels.published import subtract_background

        return subtract_background(pixels, self.sigma_px)


@dataclass(frozen=True, slots=True)
class ClaheStep:
    """CLAHE on L, or, with the slide's stain vectors (six numbers), on haematoxylin."""

    region_px: int
    clip: float
    glass: int
    vectors: Numbers = ()
    kind: ClassVar[str] = "clahe"

    @property
    def halo_px(self) -> int:
        from wsikernels.clahe import margin_px

        return margin_px(self.region_px)

    def apply(self, pixels: np.ndarray, box: Box) -> np.ndarray:
        corner = (box.y0 - self.halo_px, box.x0 - self.halo_px)
        inner = (box.y0, box.x0, box.y1, box.x1)
        if not self.vectors:
            from wsikernels.clahe import clahe_lab

            return clahe_lab(pixels, corner, self.region_px, self.clip, self.glass, inner)
        from wsikernels.clahe_stain import clahe_haematoxylin

        vectors = np.reshape(self.vectors, (2, 3))
        return clahe_haematoxylin(pixels, corner, self.region_px, self.clip, self.glass, inner, vectors)


@dataclass(frozen=True, slots=True)
class TileClaheStep:
    """CLAHE of a tile by itself on L of Lab, as OpenCV's ``createCLAHE(clip, (grid, grid))`` on L defines it."""

    clip: float
    grid: int
    kind: ClassVar[str] = "tile_clahe"

    def apply(self, tile: np.ndarray) -> np.ndarray:
        from wsikernels.clahe_plain import clahe_image_lab

        return clahe_image_lab(tile, self.clip, (self.grid, self.grid))


@dataclass(frozen=True, slots=True)
class TileWhitenStep:
    """Whitening of a tile by its own mean and spread."""

    pca: bool
    kind: ClassVar[str] = "tile_whiten"

    def apply(self, tile: np.ndarray) -> np.ndarray:
        from wsikernels.published import whiten_tile

        return whiten_tile(tile, self.pca)


TileStep = TileClaheStep | TileWhitenStep

KINDS: dict[str, type] = {
    step.kind: step
    for step in (DensityStep, ReinhardStep, LinearStep, BackgroundStep, ClaheStep, TileClaheStep, TileWhitenStep)
}
