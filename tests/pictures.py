"""Synthetic pictures for tests: every pixel says where it is."""

import numpy as np


def position_coded(height: int, width: int, channels: int = 3, seed: int = 0) -> np.ndarray:
    """Noise over a ramp, (height, width, channels) uint8: no two neighbourhoods are alike."""
    rng = np.random.default_rng(seed)
    ramp = np.add.outer(np.arange(height) * 3, np.arange(width) * 2)[..., None] + 40 * np.arange(channels)
    return ((ramp + rng.integers(0, 60, (height, width, channels))) % 256).astype(np.uint8)


def tissue_like(height: int, width: int, seed: int = 0) -> np.ndarray:
    """Two stains in smoothly varying amounts over glass: optical density of H&E, (height, width, 3) uint8."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[:height, :width]
    haematoxylin = 0.6 * (1 + np.sin(x / 5.3 + 0.3 * seed) * np.cos(y / 7.1)) * rng.uniform(0.6, 1, (height, width))
    eosin = 0.4 * (1 + np.cos(x / 11.0) * np.sin(y / 8.3 + seed)) * rng.uniform(0.6, 1, (height, width))
    tissue = (x + 2 * y) % 97 < 80  # a band of glass, slanted
    density = np.einsum("yx,c->yxc", haematoxylin * tissue, [0.65, 0.70, 0.29])
    density += np.einsum("yx,c->yxc", eosin * tissue, [0.07, 0.99, 0.11])
    noise = rng.normal(0, 1.5, (height, width, 3))
    return np.clip(np.rint(245 * np.exp(-density) + noise), 0, 255).astype(np.uint8)
