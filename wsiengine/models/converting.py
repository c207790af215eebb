"""A model's ONNX file in MNN's format, made and compared with ONNX Runtime's answers in a process of its own.

``python -m wsiengine.models.converting CARD MADE``, the card pickled; see :mod:`wsiengine.models.child`. The converter
reads what others wrote: only a file whose sha256 the card states, in a child whose crash is an error in words.
"""

import pickle
import sys
from pathlib import Path
from typing import Any

import numpy as np

from wsiengine.errors import CardError
from wsiengine.models.card import Card
from wsiengine.models.child import answer
from wsiengine.models.comparing import difference
from wsiengine.models.integrity import file_sha256
from wsiengine.models.mnn import BATCH, Session, convert
from wsiengine.models.packing import pack, room_for
from wsiengine.models.probe import column, drawn_tiles
from wsiengine.models.runtime import Runtime

TOLERANCE = 1e-3  # of an output's largest value: an operator that MNN reads otherwise is far off, rounding is not


def converted(card: Card, made: Path) -> dict[str, Any]:
    """Convert the model of ``card`` to ``made``.

    Returns:
        ``sha256`` of what was made, ``difference`` from ONNX Runtime, ``inputs`` and ``outputs`` as it names them.

    Raises:
        ModelError: The model is not what its card says, MNN cannot read it, or gives other outputs.
    """
    reference = Runtime(card, device="cpu")  # compares files with the card
    convert(card.model_path, made)
    if not made.exists():
        raise CardError("MNN's converter does not take it (operators that it lacks?)")
    facts = reference.signature()
    tiles = drawn_tiles(card.input.size_px)
    names = list(card.outputs.names)
    wanted = [np.concatenate(rows) for rows in zip(*reference.outputs(*column(tiles), names), strict=True)]
    gap = difference(wanted, _by_mnn(Session(made, facts, ""), tiles, card, names))
    if not gap <= TOLERANCE:
        raise CardError(
            f"it gives other outputs than ONNX Runtime for drawn tiles: up to {gap:.2g}, allowed {TOLERANCE:g}"
        )
    return facts | {"sha256": file_sha256(made), "difference": gap}


def _by_mnn(session: Session, tiles: np.ndarray, card: Card, names: list[str]) -> list[np.ndarray]:
    """The outputs ``names`` for ``tiles`` (N, side, side, 3), in batches as in a run."""
    pixels, corners = column(tiles)
    tiles_in = session.get_inputs()[0]
    count = tiles_in.shape[0] if isinstance(tiles_in.shape[0], int) else BATCH
    parts = []
    for first in range(0, len(tiles), count):
        batch = room_for(count, card.input)
        part = corners[first : first + count]
        pack(pixels, part, card, batch[: len(part)])
        parts.append([out[: len(part)] for out in session.run(names, {tiles_in.name: batch})])
    return [np.concatenate(part) for part in zip(*parts, strict=True)]


if __name__ == "__main__":
    _card = pickle.loads(Path(sys.argv[1]).read_bytes())  # the parent's, in a folder of its own
    answer(lambda: converted(_card, Path(sys.argv[2])), memory_bytes=16 * _card.model_path.stat().st_size)
