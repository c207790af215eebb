"""Random views of a field: where it is cut, how it lies, how the laboratory stained, scanned and compressed it.

Stains act on optical density (Beer–Lambert), where a stain is a direction and its amount a length; so every change of
stain is one 3 × 3 matrix: the jitter of haematoxylin, eosin and residual (Ruifrok and Johnston 2001; Tellez et al.
2019) and the exchange of one laboratory's stain vectors for another's (Macenko et al. 2009).
"""

from dataclasses import dataclass

import cv2
import numpy as np

from wsiengine.training.data import Pixels

_OD = -np.log((np.arange(256, dtype=np.float32) + 1.0) / 256.0)
_HED = np.array([[0.650, 0.704, 0.286], [0.072, 0.990, 0.105], [0.268, 0.570, 0.776]])
"""Haematoxylin, eosin and DAB in optical density (Ruifrok and Johnston 2001, table 2), one per row."""
_TISSUE_OD = 0.15


@dataclass(frozen=True)
class Stain:
    """How one field is stained.

    Attributes:
        vectors: Unit optical densities of haematoxylin, eosin and what is left, one per row, (3, 3).
        strength: 99th percentile of the first two amounts.
        glass: Optical density of its background (3,), 1st percentile of all pixels.
    """

    vectors: np.ndarray
    strength: np.ndarray
    glass: np.ndarray


def measure_stain(image: np.ndarray) -> Stain:
    """The stain of an RGB uint8 field (Macenko et al. 2009); the textbook's vectors where it has hardly any tissue."""
    density = _OD[image[::2, ::2].reshape(-1, 3)]
    glass = np.percentile(density, 1, axis=0)
    tissue = density[density.mean(axis=1) > _TISSUE_OD]
    if len(tissue) < 200:
        vectors = _HED / np.linalg.norm(_HED, axis=1, keepdims=True)
        return Stain(vectors, np.array([1.0, 1.0]), glass)
    _, plane = np.linalg.eigh(np.cov(tissue.T))
    plane = plane[:, 1:] * np.sign(plane[:, 1:].sum(axis=0))
    angles = np.arctan2(*(tissue @ plane).T)
    ends = [plane @ (np.sin(a), np.cos(a)) for a in np.percentile(angles, [1, 99])]
    haematoxylin, eosin = sorted(ends, key=lambda v: -v[0])  # haematoxylin absorbs more red than eosin does
    rest = np.cross(haematoxylin, eosin)
    vectors = np.stack([haematoxylin, eosin, rest / np.linalg.norm(rest)])
    amounts = tissue @ np.linalg.pinv(vectors)
    return Stain(vectors, np.maximum(np.percentile(amounts[:, :2], 99, axis=0), 0.1), glass)


def stain_change(rng: np.random.Generator, have: Stain, want: Stain | None) -> tuple[np.ndarray, np.ndarray]:
    """A random change of stain: matrix (3, 3) and offset (3,) for ``density @ matrix + offset``.

    Args:
        rng: Where chance comes from.
        have: The field's own stain.
        want: Another field's, to move part of the way towards it; None keeps the laboratory.
    """
    matrix = np.eye(3)
    if want is not None:
        part = rng.uniform(0.3, 1.0)
        vectors = have.vectors + part * (want.vectors - have.vectors)
        ratio = np.clip(want.strength / have.strength, 0.6, 1.7) ** part
        matrix = np.linalg.pinv(have.vectors) @ np.diag([*ratio, 1.0]) @ vectors
    jitter = np.exp(rng.normal(0.0, 0.22, 3))
    matrix = matrix @ np.linalg.inv(_HED) @ np.diag(jitter) @ _HED
    matrix = matrix * np.exp(rng.normal(0.0, 0.12)) + rng.normal(0.0, 0.02, (3, 3))
    tint = rng.uniform(0.0, 0.15) * rng.random() + rng.uniform(0.0, 0.08, 3)
    return matrix, tint * (rng.random() < 0.5) - (have.glass * rng.random()) @ matrix


def restain(image: np.ndarray, matrix: np.ndarray, offset: np.ndarray) -> np.ndarray:
    """Apply a change of stain to RGB uint8 pixels."""
    density = cv2.transform(_OD[image], np.c_[matrix.T, offset].astype(np.float32))
    return np.clip(256.0 * np.exp(-np.maximum(density, 0.0)) - 1.0, 0, 255).astype(np.uint8)


@dataclass(frozen=True)
class View:
    """Which part of a field becomes a tile: centre in its pixels, scale of the tile's pixels, quarter turns, …"""

    centre_y: float
    centre_x: float
    scale: float
    angle_deg: float
    mirrored: bool

    def matrix(self, side_px: int) -> np.ndarray:
        """The affine map (2, 3) from (x, y) of the field to (x, y) of a tile."""
        turn = np.deg2rad(self.angle_deg)
        rotation = self.scale * np.array([[np.cos(turn), -np.sin(turn)], [np.sin(turn), np.cos(turn)]])
        if self.mirrored:
            rotation[:, 0] *= -1
        middle = (side_px - 1) / 2
        shift = middle - rotation @ (self.centre_x, self.centre_y)
        return np.c_[rotation, shift]


def random_view(rng: np.random.Generator, shape: tuple[int, ...], side_px: int, zoom: tuple[float, float]) -> View:
    """A view that stays inside the field where the field is large enough."""
    scale = float(np.exp(rng.uniform(np.log(zoom[0]), np.log(zoom[1]))))
    half = side_px / scale / 2
    centres = [rng.uniform(min(half, n / 2), max(n - half, n / 2)) for n in shape[:2]]
    angle = 90.0 * rng.integers(4) + rng.uniform(-12, 12)
    return View(centres[0], centres[1], scale, angle, bool(rng.integers(2)))


def cut(pixels: Pixels, view: View, side_px: int) -> tuple[np.ndarray, np.ndarray | None]:
    """The tile of a view and its mask; beyond the field's border it continues mirrored."""
    matrix = view.matrix(side_px)
    tile = cv2.warpAffine(pixels.image, matrix, (side_px, side_px), borderMode=cv2.BORDER_REFLECT_101)
    if pixels.mask is None:
        return tile, None
    return tile, cv2.warpAffine(pixels.mask, matrix, (side_px, side_px), borderMode=cv2.BORDER_REFLECT_101)


def degrade(rng: np.random.Generator, tile: np.ndarray) -> np.ndarray:
    """Focus, sampling, noise, exposure and compression of some other scanner."""
    if rng.random() < 0.4:
        tile = cv2.GaussianBlur(tile, (0, 0), rng.uniform(0.3, 1.4))
    if rng.random() < 0.35:  # sampled more coarsely, by other factors down and across: one set is
        down, across = rng.uniform(0.55, 1.0, 2)
        small = cv2.resize(tile, None, fx=across, fy=down, interpolation=cv2.INTER_AREA)
        tile = cv2.resize(small, tile.shape[1::-1], interpolation=cv2.INTER_LINEAR)
    if rng.random() < 0.25:
        amount = rng.uniform(0.2, 1.0)
        tile = cv2.addWeighted(tile, 1 + amount, cv2.GaussianBlur(tile, (0, 0), 1.0), -amount, 0)
    if rng.random() < 0.4:
        levels = 255 * (np.arange(256) / 255) ** np.exp(rng.normal(0, 0.2)) * rng.uniform(0.85, 1.08)
        tile = cv2.LUT(tile, np.clip(levels + rng.uniform(-10, 10), 0, 255).astype(np.uint8))
    if rng.random() < 0.2:
        noise = rng.normal(0, rng.uniform(2, 8), tile.shape).astype(np.float32)
        tile = np.clip(tile + noise, 0, 255).astype(np.uint8)
    if rng.random() < 0.08:
        tile = np.repeat(tile.mean(axis=2, keepdims=True).astype(np.uint8), 3, axis=2)
    if rng.random() < 0.5:
        quality = [cv2.IMWRITE_JPEG_QUALITY, int(rng.integers(35, 96))]
        coded = cv2.imencode(".jpg", tile, quality)[1]
        tile = np.asarray(cv2.imdecode(coded, cv2.IMREAD_COLOR))
    return tile


def spoil(rng: np.random.Generator, tile: np.ndarray) -> np.ndarray:
    """The tile as nobody should diagnose it: far out of focus, or under ink."""
    if rng.random() < 0.6:
        return cv2.GaussianBlur(tile, (0, 0), rng.uniform(3.5, 9.0))
    ink = rng.uniform(0.05, 0.9, 3)
    ink[rng.integers(3)] = rng.uniform(0.0, 0.2)
    return (tile * ink).astype(np.uint8)
