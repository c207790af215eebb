"""Fitting a slide's stains to sampled tissue pixels: Macenko, Vahadane and Reinhard, and when not to believe them.

Deterministic: no random numbers, sums in a fixed order, signs fixed, float64. A fit that cannot be trusted is refused
(:class:`Unfit`) with a reason in words; what to do instead is the caller's decision.
"""

from dataclasses import dataclass

import numpy as np

from wsikernels._jit import jit
from wsikernels.stain import HAEMATOXYLIN_DAB, HAEMATOXYLIN_EOSIN, concentrations, optical_density, unit_rows

FAINT_OD = 0.15  # Macenko's β: below, a direction is noise
FEWEST_PIXELS = 1000  # fewer stained pixels than this do not make a percentile
_STRENGTH_PERCENTILE = 99.0
_NARROWEST_DEG = 8.0  # two stains nearer than this cannot be told apart
_FARTHEST_DEG = 35.0  # a fitted stain further from every measured one is something else
_SPARSITY = 0.1  # Vahadane's λ
_ROUNDS = 60
_MOST_FACTORISED = 50_000
_MOST_YELLOW = 0.25  # more than bleeding makes: another stain
_SATURATED = 5  # a channel at its floor says nothing of a direction any more

STANDARD = {"he": HAEMATOXYLIN_EOSIN, "hdab": HAEMATOXYLIN_DAB}


class Unfit(ValueError):
    """The pixels do not determine two stains; the message says why, for a person to read.

    Attributes:
        other_stain: They are well stained, but with something else: the measured vectors do not apply either.
    """

    def __init__(self, message: str, other_stain: bool = False) -> None:
        super().__init__(message)
        self.other_stain = other_stain


@dataclass(frozen=True, slots=True)
class StainFit:
    """Two stains: unit densities (2, 3), haematoxylin first, and their strong amounts (99th percentile)."""

    vectors: tuple[tuple[float, float, float], tuple[float, float, float]]
    strengths: tuple[float, float]

    @property
    def matrix(self) -> np.ndarray:
        return np.array(self.vectors)


def stained(pixels: np.ndarray, stains: str = "he") -> np.ndarray:
    """Which pixels (n, 3) uint8 can be of these stains → (n,) bool: dense enough, and not pen, blood or black.

    Haematoxylin, eosin and DAB absorb green well; blue and green ink absorb red most, red cells and yellow ink blue,
    and black (ink, folds, dirt) absorbs everything.
    """
    red, green, blue = optical_density(pixels).T
    least, most = np.minimum(np.minimum(red, green), blue), np.maximum(np.maximum(red, green), blue)
    black = (least > 0.7 * most) & (green > 0.7)
    ink = red > 1.25 * green
    foreign = black | ink
    if stains == "he":
        foreign |= ((red > green) & (blue < 0.35 * red)) | _yellow(green, blue)
    return _dense_enough(pixels) & ~foreign


def _dense_enough(pixels: np.ndarray) -> np.ndarray:
    density = optical_density(pixels)
    return (density.min(axis=1) > FAINT_OD / 3) & (density.mean(axis=1) > FAINT_OD) & (pixels.min(axis=1) > _SATURATED)


def _yellow(green: np.ndarray, blue: np.ndarray) -> np.ndarray:
    """Absorbs blue light more than green: DAB, pigment, red cells; never haematoxylin and eosin."""
    return blue > 1.1 * green


def fit_macenko(pixels: np.ndarray, stains: str = "he", percentile: float = 1.0) -> StainFit:
    """The extreme directions in the plane of densities (Macenko et al. 2009).

    Args:
        pixels: (n, 3) uint8, sampled from tissue.
        stains: ``he`` or ``hdab``.
        percentile: Share (%) of directions taken for outliers on each side.

    Raises:
        Unfit: Too few stained pixels, or two directions that are no such stains.
    """
    density = _dense(pixels, stains)
    centred = density - density.mean(axis=0)
    _, axes = np.linalg.eigh(centred.T @ centred)
    plane = axes[:, :0:-1]  # the two widest
    plane = plane * np.where(plane.sum(axis=0) < 0, -1.0, 1.0)
    flat = density @ plane
    angles = np.arctan2(flat[:, 1], flat[:, 0])
    extremes = np.percentile(angles, [percentile, 100 - percentile])
    vectors = np.stack([np.cos(extremes), np.sin(extremes)], axis=1) @ plane.T
    return _judged(vectors, density, stains)


def fit_vahadane(pixels: np.ndarray, stains: str = "he") -> StainFit:
    """Sparse non-negative factorisation of densities (Vahadane et al. 2016), started from the measured stains.

    Args and raises as :func:`fit_macenko`. Amounts are solved exactly for their two unknowns, vectors by one
    non-negative least-squares step per round; at most 50,000 evenly spaced densities are used.
    """
    density = _dense(pixels, stains)
    some = np.ascontiguousarray(density[:: len(density) // _MOST_FACTORISED + 1])
    vectors = _factorise(some, unit_rows(STANDARD[stains]), _SPARSITY, _ROUNDS)
    return _judged(vectors, density, stains)


def standard_fit(pixels: np.ndarray, stains: str = "he") -> StainFit:
    """The measured vectors of Ruifrok & Johnston, with strengths from the pixels (1.0 where there are too few)."""
    vectors = unit_rows(STANDARD[stains])
    density = optical_density(pixels[stained(pixels, stains)]) if len(pixels) else np.empty((0, 3))
    if len(density) < FEWEST_PIXELS:
        return _stain_fit(vectors, np.ones(2))
    return _stain_fit(vectors, _strengths(density, vectors))


def _dense(pixels: np.ndarray, stains: str) -> np.ndarray:
    if stains not in STANDARD:
        raise ValueError(f"stains must be one of {', '.join(STANDARD)}, not {stains!r}")
    if pixels.dtype != np.uint8 or pixels.ndim != 2 or pixels.shape[1] != 3:
        raise ValueError(f"pixels must be uint8 of shape (n, 3), not {pixels.dtype} of shape {pixels.shape}")
    chosen = pixels[stained(pixels, stains)]
    if len(chosen) < FEWEST_PIXELS:
        raise Unfit(
            f"only {len(chosen):,} of {len(pixels):,} sampled pixels are stained ({FEWEST_PIXELS:,} are needed)"
        )
    if stains == "he":
        _, green, blue = optical_density(pixels[_dense_enough(pixels)]).T
        share = float(_yellow(green, blue).mean())
        if share > _MOST_YELLOW:
            raise Unfit(
                f"{share:.0%} of the stained pixels are brown or yellow, which haematoxylin and eosin are not", True
            )
    return optical_density(chosen)


def _judged(vectors: np.ndarray, density: np.ndarray, stains: str) -> StainFit:
    """Haematoxylin first; believed only if the two differ, absorb light, and resemble the measured stains."""
    vectors = unit_rows(np.where(vectors.sum(axis=1, keepdims=True) < 0, -vectors, vectors))
    if vectors.min() < -0.15:
        raise Unfit(f"a fitted stain would emit light: {_words(vectors)}")
    vectors = unit_rows(np.maximum(vectors, 0))
    standard = unit_rows(STANDARD[stains])
    angles = np.degrees(np.arccos(np.clip(vectors @ standard.T, -1, 1)))  # [fitted, measured]
    if angles[0, 0] + angles[1, 1] > angles[0, 1] + angles[1, 0]:
        vectors, angles = vectors[::-1], angles[::-1]
    between = float(np.degrees(np.arccos(np.clip(vectors[0] @ vectors[1], -1, 1))))
    if between < _NARROWEST_DEG:
        raise Unfit(f"only one stain is seen (the two fitted vectors are {between:.0f}° apart)")
    if max(angles[0, 0], angles[1, 1]) > _FARTHEST_DEG:
        raise Unfit(
            f"the fitted vectors are {angles[0, 0]:.0f}° and {angles[1, 1]:.0f}° from the measured stains: "
            f"{_words(vectors)}",
            other_stain=True,
        )
    strengths = _strengths(density, vectors)
    if strengths.min() < 0.05:
        raise Unfit("one of the two stains is hardly present")
    return _stain_fit(vectors, strengths)


def _strengths(density: np.ndarray, vectors: np.ndarray) -> np.ndarray:
    return np.percentile(concentrations(density, vectors)[:, :2], _STRENGTH_PERCENTILE, axis=0)


def _stain_fit(vectors: np.ndarray, strengths: np.ndarray) -> StainFit:
    first, second = (tuple(float(x) for x in row) for row in vectors)
    return StainFit((first, second), (float(strengths[0]), float(strengths[1])))  # type: ignore[arg-type]


def _words(vectors: np.ndarray) -> str:
    return " and ".join("(" + ", ".join(f"{x:.2f}" for x in row) + ")" for row in vectors)


@jit()
def _amounts(a, b, overlap):
    """The two amounts ≥ 0 that minimise ½|od − c₁w₁ − c₂w₂|² + λ(c₁ + c₂); a, b = od · w − λ, overlap = w₁ · w₂."""
    one = (a - overlap * b) / (1 - overlap * overlap)
    two = (b - overlap * a) / (1 - overlap * overlap)
    if one >= 0 and two >= 0:
        return one, two
    if a >= b:  # the optimum lies on an axis: the better of the two
        return max(a, 0.0), 0.0
    return 0.0, max(b, 0.0)


@jit()
def _factorise(density, vectors, sparsity, rounds):
    vectors = vectors.copy()
    for _ in range(rounds):
        gram, cross = np.zeros((2, 2)), np.zeros((2, 3))
        overlap = np.dot(vectors[0], vectors[1])
        for i in range(len(density)):
            r, g, b = density[i]
            along_one = r * vectors[0, 0] + g * vectors[0, 1] + b * vectors[0, 2] - sparsity
            along_two = r * vectors[1, 0] + g * vectors[1, 1] + b * vectors[1, 2] - sparsity
            one, two = _amounts(along_one, along_two, overlap)
            gram[0, 0] += one * one
            gram[0, 1] += one * two
            gram[1, 1] += two * two
            for c in range(3):
                cross[0, c] += one * density[i, c]
                cross[1, c] += two * density[i, c]
        gram[1, 0] = gram[0, 1]
        for k in range(2):
            length = 0.0
            if gram[k, k] > 0:
                moved = np.maximum((cross[k] - gram[k, 1 - k] * vectors[1 - k]) / gram[k, k], 0.0)
                length = np.sqrt(np.dot(moved, moved))
            if length > 0:
                vectors[k] = moved / length
        if np.dot(vectors[0], vectors[1]) > 0.9999:
            break
    return vectors


@dataclass(frozen=True, slots=True)
class LabStatistics:
    """Mean and standard deviation of L, a, b over tissue (Reinhard et al. 2001, in CIE Lab)."""

    mean: tuple[float, float, float]
    deviation: tuple[float, float, float]


def fit_reinhard(lab: np.ndarray) -> LabStatistics:
    """Statistics of Lab colours (n, 3) float64 of tissue.

    Raises:
        Unfit: Too few pixels.
    """
    if len(lab) < FEWEST_PIXELS:
        raise Unfit(f"only {len(lab):,} sampled pixels are tissue ({FEWEST_PIXELS:,} are needed)")
    mean, deviation = lab.mean(axis=0), lab.std(axis=0)
    return LabStatistics(tuple(map(float, mean)), tuple(map(float, deviation)))  # type: ignore[arg-type]
