"""Glass: what is outside a slide, or was never scanned, is white."""

import numpy as np

WHITE = 255


def over_white(rgba: np.ndarray) -> np.ndarray:
    """(h, w, 4) uint8 with alpha → (h, w, 3) uint8 on white."""
    rgb, alpha = rgba[..., :3], rgba[..., 3:]
    if alpha.min(initial=WHITE) == WHITE:
        return rgb
    weight = alpha.astype(np.uint16)
    return ((rgb * weight + WHITE * (WHITE - weight) + 127) // 255).astype(np.uint8)
