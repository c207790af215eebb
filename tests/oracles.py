"""Slow, obvious float64 twins of the kernels: each says what its kernel must compute, and nothing about how."""

import math

import numpy as np


def resample_area(
    src: np.ndarray, corner: tuple[int, int], ratio: tuple[float, float], out_corner: tuple[int, int], shape
) -> np.ndarray:
    """Mean of the source area under each output pixel, float64, not yet rounded."""
    out = np.empty((*shape, src.shape[2]))
    for i in range(shape[0]):
        for j in range(shape[1]):
            wy = _overlap(out_corner[0] + i, ratio[0], corner[0], src.shape[0])
            wx = _overlap(out_corner[1] + j, ratio[1], corner[1], src.shape[1])
            out[i, j] = np.einsum("y,x,yxc->c", wy, wx, src.astype(np.float64)) / (wy.sum() * wx.sum())
    return out


def _overlap(index: int, ratio: float, src0: int, count: int) -> np.ndarray:
    begin, end = index * ratio, (index + 1) * ratio
    at = src0 + np.arange(count)
    return np.clip(np.minimum(at + 1, end) - np.maximum(at, begin), 0, None)


def pack(
    block: np.ndarray, origins: np.ndarray, scale: np.ndarray, bias: np.ndarray, side: tuple[int, int]
) -> np.ndarray:
    """Tiles of a block as float64 (n, 3, rows, cols): x · scale + bias."""
    tiles = [block[y : y + side[0], x : x + side[1]] for y, x in origins]
    return (np.stack(tiles).astype(np.float64) * scale + bias).transpose(0, 3, 1, 2)


def round_half_up(values: np.ndarray) -> np.ndarray:
    return np.floor(values + 0.5)


# sRGB and CIE Lab, as their standards write them (ITU-R BT.709 primaries, D65)

RGB_TO_XYZ = np.array([[0.412453, 0.357580, 0.180423], [0.212671, 0.715160, 0.072169], [0.019334, 0.119193, 0.950227]])


def lab(rgb: np.ndarray) -> np.ndarray:
    x = rgb / 255.0
    linear = np.where(x > 0.04045, ((x + 0.055) / 1.055) ** 2.4, x / 12.92)
    t = linear @ RGB_TO_XYZ.T / RGB_TO_XYZ.sum(axis=1)
    f = np.where(t > (6 / 29) ** 3, np.cbrt(t), t / (3 * (6 / 29) ** 2) + 4 / 29)
    return np.stack([116 * f[..., 1] - 16, 500 * (f[..., 0] - f[..., 1]), 200 * (f[..., 1] - f[..., 2])], axis=-1)


def rgb(lab: np.ndarray) -> np.ndarray:
    """0–255, not yet rounded."""
    fy = (lab[..., 0] + 16) / 116
    f = np.stack([fy + lab[..., 1] / 500, fy, fy - lab[..., 2] / 200], axis=-1)
    t = np.where(f > 6 / 29, f**3, 3 * (6 / 29) ** 2 * (f - 4 / 29)) * RGB_TO_XYZ.sum(axis=1)
    linear = np.clip(t @ np.linalg.inv(RGB_TO_XYZ).T, 0, 1)
    return 255 * np.where(linear > 0.0031308, 1.055 * linear ** (1 / 2.4) - 0.055, 12.92 * linear)


def lightness_level(rgb: np.ndarray) -> np.ndarray:
    return np.floor(2.55 * lab(rgb)[..., 0] + 0.5).astype(int)


def clahe_shift(levels: np.ndarray, clip: float, glass: int) -> np.ndarray:
    """What one contextual region does to each of the 256 levels."""
    counts = np.bincount(levels.ravel(), minlength=256).astype(float)
    even = levels.size / glass
    known = counts[:glass] + counts[glass:].sum() / glass
    clipped = np.minimum(known, clip * even)
    clipped += (known - clipped).sum() / glass
    ranks = np.cumsum(clipped) - clipped / 2
    shift = np.zeros(256)
    shift[:glass] = ranks / even - 0.5 - np.arange(glass)
    return shift


def clahe_shifts(levels: np.ndarray, corner, side: int, clip: float, glass: int, box) -> np.ndarray:
    """The shift of every pixel of ``box``, one by one; ``corner`` is the absolute position of ``levels``."""
    tables: dict[tuple[int, int], np.ndarray] = {}

    def table(i: int, j: int) -> np.ndarray:
        if (i, j) not in tables:
            y, x = i * side - corner[0], j * side - corner[1]
            region = levels[y : y + side, x : x + side]
            assert min(y, x) >= 0, "the margin is too small"
            assert region.shape == (side, side), "the margin is too small"
            tables[i, j] = clahe_shift(region, clip, glass)
        return tables[i, j]

    out = np.empty((box[2] - box[0], box[3] - box[1]))
    for y in range(box[0], box[2]):
        for x in range(box[1], box[3]):
            v, u = (y + 0.5) / side - 0.5, (x + 0.5) / side - 0.5
            i, j = math.floor(v), math.floor(u)
            k = levels[y - corner[0], x - corner[1]]
            upper = table(i, j)[k] * (1 - u + j) + table(i, j + 1)[k] * (u - j)
            lower = table(i + 1, j)[k] * (1 - u + j) + table(i + 1, j + 1)[k] * (u - j)
            out[y - box[0], x - box[1]] = upper * (1 - v + i) + lower * (v - i)
    return out


def clahe_lab(src: np.ndarray, corner, side: int, clip: float, glass: int, box) -> np.ndarray:
    """0–255, not yet rounded."""
    shifts = clahe_shifts(lightness_level(src), corner, side, clip, glass, box)
    inner = lab(src)[box[0] - corner[0] : box[2] - corner[0], box[1] - corner[1] : box[3] - corner[1]]
    inner[..., 0] += shifts / 2.55
    return rgb(inner)


# Stains: densities are −ln(value / 255), a value of 0 counting as 0.4


def density(pixels: np.ndarray) -> np.ndarray:
    return -np.log(np.maximum(pixels, 0.4) / 255)


def mixed(pixels: np.ndarray, matrix: np.ndarray) -> np.ndarray:
    """0–255, not yet rounded."""
    return np.minimum(255 * np.exp(-(density(pixels) @ matrix)), 255)


def restained(pixels, source, target, ratios, keep_residual=True) -> np.ndarray:
    """Unmix into two stains and the rest, scale, mix again: 0–255, not yet rounded."""
    basis = [np.array([*rows, np.cross(*rows)]) for rows in (source, target)]
    basis = [rows / np.linalg.norm(rows, axis=1, keepdims=True) for rows in basis]
    amounts = np.linalg.solve(basis[0].T, density(pixels).reshape(-1, 3).T)
    amounts *= np.array([[ratios[0]], [ratios[1]], [float(keep_residual)]])
    return np.minimum(255 * np.exp(-(basis[1].T @ amounts).T), 255).reshape(pixels.shape)


def macenko(densities: np.ndarray, percentile: float = 1.0, strong: float = 99.0) -> tuple[np.ndarray, np.ndarray]:
    """Stain vectors (2, 3), the redder absorber first, and their strong amounts, of densities (n, 3) of stained pixels.

    The plane of the two widest directions; in it the directions that all but ``percentile`` % of pixels lie between.
    """
    plane = np.linalg.svd(densities - densities.mean(axis=0), full_matrices=False)[2][:2]
    flat = densities @ plane.T
    ahead = flat.mean(axis=0) / np.linalg.norm(flat.mean(axis=0))
    aside = np.array([-ahead[1], ahead[0]])
    turns = np.percentile(np.arctan2(flat @ aside, flat @ ahead), [percentile, 100 - percentile])
    vectors = np.array([(np.cos(a) * ahead + np.sin(a) * aside) @ plane for a in turns])
    vectors = vectors[np.argsort(-vectors[:, 0])]
    return vectors, np.percentile(np.linalg.lstsq(vectors.T, densities.T, rcond=None)[0], strong, axis=1)


def sparse_amounts(densities: np.ndarray, vectors: np.ndarray, sparsity: float) -> np.ndarray:
    """(n, 2) amounts ≥ 0 that minimise ½|od − c·W|² + λ(c₁ + c₂): the best of the four sets of non-zero amounts."""
    along = densities @ vectors.T - sparsity
    both = np.linalg.solve(vectors @ vectors.T, along.T).T
    none = np.zeros_like(along)
    choices = np.stack([both, along * (1, 0), along * (0, 1), none])
    cost = 0.5 * ((densities - choices @ vectors) ** 2).sum(axis=-1) + sparsity * choices.sum(axis=-1)
    cost[(choices < 0).any(axis=-1)] = np.inf
    return np.take_along_axis(choices, cost.argmin(axis=0)[None, :, None], axis=0)[0]


def vahadane(densities: np.ndarray, start: np.ndarray, sparsity: float = 0.1, rounds: int = 60) -> np.ndarray:
    """Stain vectors (2, 3) by turns: amounts as above, then each vector to its least squares, cut at 0, unit length."""
    vectors = start.copy()
    for _ in range(rounds):
        amounts = sparse_amounts(densities, vectors, sparsity)
        for k in range(2):
            rest = densities - np.outer(amounts[:, 1 - k], vectors[1 - k])
            moved = np.maximum(amounts[:, k] @ rest / (amounts[:, k] @ amounts[:, k]), 0)
            vectors[k] = moved / np.linalg.norm(moved)
    return vectors


def reinhard(pixels, mean, deviation, target_mean, target_deviation, glass_l) -> np.ndarray:
    """0–255, not yet rounded."""
    colours = lab(pixels)
    weight = np.clip((glass_l - colours[..., :1]) / 20, 0, 1)
    moved = (colours - mean) * (np.asarray(target_deviation) / deviation) + target_mean
    return rgb(colours + weight * (moved - colours))


# Maps and objects


def blended(tiles: np.ndarray, origins, shape) -> np.ndarray:
    """Weighted mean of overlapping tiles, weight 1, 2, …, 2, 1 along each axis; NaN where there is none."""
    sums, weights = np.zeros((*shape, tiles.shape[3])), np.zeros((*shape, 1))
    for tile, (y, x) in zip(tiles, origins, strict=True):
        for i, j in np.ndindex(tile.shape[:2]):
            if 0 <= y + i < shape[0] and 0 <= x + j < shape[1]:
                weight = min(i + 1, tile.shape[0] - i) * min(j + 1, tile.shape[1] - j)
                sums[y + i, x + j] += weight * tile[i, j].astype(np.float64)
                weights[y + i, x + j] += weight
    with np.errstate(invalid="ignore"):
        return sums / weights


def box_iou(one, two) -> float:
    common = max(min(one[2], two[2]) - max(one[0], two[0]), 0) * max(min(one[3], two[3]) - max(one[1], two[1]), 0)
    union = (one[2] - one[0]) * (one[3] - one[1]) + (two[2] - two[0]) * (two[3] - two[1]) - common
    return common / union if union > 0 else 0.0


def mask_iou(one, mask_one, two, mask_two) -> float:
    canvas = np.zeros((2, max(one[2], two[2]), max(one[3], two[3])), bool)
    canvas[0, one[0] : one[2], one[1] : one[3]] = mask_one
    canvas[1, two[0] : two[2], two[1] : two[3]] = mask_two
    union = canvas.any(axis=0).sum()
    return canvas.all(axis=0).sum() / union if union else 0.0


def greedy(order, overlap, limit: float) -> list[int]:
    """Keep, best first, whatever overlaps nothing kept by more than ``limit``."""
    kept: list[int] = []
    for n in order:
        if all(overlap(n, k) <= limit for k in kept):
            kept.append(int(n))
    return kept


def otsu(counts: np.ndarray) -> int:
    """The last level of the lower class that maximises the variance between the two; the lowest of equal ones."""
    best, at = -1.0, 0
    levels = np.arange(len(counts))
    for k in range(len(counts) - 1):
        low, high = counts[: k + 1].sum(), counts[k + 1 :].sum()
        if low and high:
            gap = (levels[: k + 1] @ counts[: k + 1]) / low - (levels[k + 1 :] @ counts[k + 1 :]) / high
            if low * high * gap**2 > best * (1 + 1e-12):
                best, at = low * high * gap**2, k
    return at


def dilated(mask: np.ndarray, radius: float) -> np.ndarray:
    """Pixels whose centre lies within ``radius`` of the centre of a pixel of the mask."""
    places = np.argwhere(mask)
    out = np.zeros_like(mask)
    for y, x in np.ndindex(mask.shape):
        out[y, x] = len(places) > 0 and ((places - (y, x)) ** 2).sum(axis=1).min() <= radius**2 + 1e-9
    return out


def laplacian_variance(grey: np.ndarray, cell: int) -> np.ndarray:
    """Variance of the 4-neighbour Laplacian in each cell; ``grey`` has a margin of one pixel."""
    g = grey.astype(np.float64)
    sharp = g[:-2, 1:-1] + g[2:, 1:-1] + g[1:-1, :-2] + g[1:-1, 2:] - 4 * g[1:-1, 1:-1]
    rows, cols = sharp.shape[0] // cell, sharp.shape[1] // cell
    return sharp[: rows * cell, : cols * cell].reshape(rows, cell, cols, cell).var(axis=(1, 3))
