"""A first run of somebody else's model, in a process of its own: does it load, keep its card's word, stay finite?

``python -m wsiengine.models.probe FOLDER [REFERENCE]``; see :mod:`wsiengine.models.child`. The reference is an ``.npz``
of tiles and the probabilities that the original gives for them.
"""

import sys
from pathlib import Path
from typing import Any

import numpy as np

from wsiengine.errors import CardError, ScoreError
from wsiengine.models.activation import activate
from wsiengine.models.card import Card, load_card
from wsiengine.models.child import answer
from wsiengine.models.runtime import Runtime

TOLERANCE = 1e-3  # of a probability, against the original


def drawn_tiles(side_px: int) -> np.ndarray:
    """Tiles of drawn tissue that never change: (N, side, side, 3) uint8, sensitive to place, colour and texture.

    Eight, or two where they are large.
    """
    y, x = np.mgrid[:side_px, :side_px] / side_px
    random = np.random.default_rng(20261120)
    stain = np.array([[0.65, 0.70, 0.29], [0.07, 0.99, 0.11]])  # haematoxylin, eosin (Ruifrok & Johnston 2001)
    tiles = []
    for k in range(8 if side_px <= 512 else 2):
        waves = np.sin((3 + k) * x * 6.3 + 5 * y * y) * np.cos((2 + k) * y * 6.3 - k)
        nuclei = (waves > 0.35 + 0.05 * k) * (0.6 + 0.4 * random.random((side_px, side_px)))
        density = nuclei[..., None] * stain[0] + (0.15 + 0.1 * k * x)[..., None] * stain[1]
        tiles.append(np.clip(np.rint(245 * 10**-density), 0, 255))
    return np.stack(tiles).astype(np.uint8)


def probabilities(runtime: Runtime, card: Card, tiles: np.ndarray) -> np.ndarray:
    """Of the card's classes for ``tiles`` (N, side, side, 3) uint8 → (N, classes) float32."""
    return activate(runtime.scores(*column(tiles))[:, : len(card.classes)], card.activation)


def answers(runtime: Runtime, card: Card) -> list[np.ndarray]:
    """What the model gives for drawn tiles: probabilities of a classifier, of others every output of every tile.

    Raises:
        ScoreError: NaN or infinity.
    """
    tiles = drawn_tiles(card.input.size_px)
    if card.task == "classify":
        return [probabilities(runtime, card, tiles)]
    found = [np.array(array) for arrays in runtime.outputs(*column(tiles)) for array in arrays]
    if not all(np.isfinite(array).all() for array in found):
        raise ScoreError(f"model {card.name} gave NaN or infinity for drawn tissue; needed finite numbers")
    return found


def column(tiles: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Tiles one below the other, and the corner of each."""
    side = tiles.shape[1]
    corners = np.stack([np.arange(len(tiles)) * side, np.zeros(len(tiles), int)], axis=1)
    return np.ascontiguousarray(tiles.reshape(-1, side, 3)), corners


def probe(folder: Path, reference: Path | None = None) -> dict[str, Any]:
    """Load the model of ``folder`` on the CPU and run it on drawn tiles; compare with the original where given.

    Raises:
        ModelError: In words, what is wrong with it.
    """
    card = load_card(folder / "card.json")
    runtime = Runtime(card, device="cpu")
    answers(runtime, card)
    if reference is None:
        return {"name": card.name}
    with np.load(reference) as file:
        tiles, wanted = file["tiles"], file["probabilities"]
    found = probabilities(runtime, card, tiles)
    difference = float(np.abs(found - wanted).max())
    if not difference <= TOLERANCE:
        raise CardError(
            f"the converted model gives other probabilities than the original: up to {difference:.2g}, "
            f"allowed {TOLERANCE:g}",
            hint="its TorchScript cannot be expressed in ONNX faithfully: ask its makers for an ONNX file.",
        )
    return {"name": card.name, "difference": difference}


if __name__ == "__main__":
    _folder, *_reference = (Path(argument) for argument in sys.argv[1:])
    _weights = sum(path.stat().st_size for path in _folder.iterdir() if path.is_file())
    answer(lambda: probe(_folder, *_reference), memory_bytes=4 * _weights)
