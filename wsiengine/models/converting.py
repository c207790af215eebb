"""A model's ONNX file in MNN's format, made and compared with ONNX Runtime's answers in a process of its own.

``python -m wsiengine.models.converting CARD FOLDER [OUTPUT ...]``, the card pickled; with outputs, the parts that give
these maps. See :mod:`wsiengine.models.child`. The converter reads what others wrote: only a file whose sha256 the card
states, in a child whose crash is an error in words.
"""

import pickle
import sys
from collections.abc import Sequence
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np

from wsiengine.errors import CardError
from wsiengine.models import ort
from wsiengine.models.card import Card
from wsiengine.models.child import answer
from wsiengine.models.comparing import difference
from wsiengine.models.integrity import file_sha256
from wsiengine.models.mnn import BATCH, Session, convert, whole_digest
from wsiengine.models.packing import as_one, pack, room_for
from wsiengine.models.pieces import Pieces, cut_card
from wsiengine.models.probe import column, drawn_tiles
from wsiengine.models.runtime import Runtime

TOLERANCE = 1e-3  # of an output's largest value: an operator that MNN reads otherwise is far off, rounding is not
_Made = dict[str, dict[str, Any]]


def converted(card: Card, folder: Path) -> _Made:
    """Convert the model of ``card`` to a file in ``folder``.

    Returns:
        By the digest that names the file: its ``sha256``, ``inputs`` and ``outputs`` as ONNX Runtime describes them,
        and the ``usual`` shapes of inputs.

    Raises:
        ModelError: The model is not what its card says, MNN cannot read it, or gives other outputs.
    """
    reference = Runtime(card, device="cpu")  # compares files with the card
    facts = reference.signature()
    ((name, _, shape),) = facts["inputs"]
    count = shape[0] if isinstance(shape[0], int) else BATCH
    usual = {name: room_for(count, card.input).shape}
    digest = whole_digest(card)
    session, vouched = _made(card.model_path, folder / f"{digest}.mnn", facts | {"usual": usual})
    tiles = drawn_tiles(card.input.size_px)
    names = list(card.outputs.names)
    wanted = [np.concatenate(rows) for rows in zip(*reference.outputs(*column(tiles), names), strict=True)]
    _compare(wanted, _by_mnn(session, tiles, card, names))
    return {digest: vouched}


def converted_parts(card: Card, folder: Path, outputs: Sequence[str]) -> _Made:
    """As :func:`converted`, for the parts that give the maps ``outputs`` of a large image."""
    whole = cut_card(card, list(outputs))
    reference = ort.open_pieces(card, list(outputs))
    if whole is None or reference is None:
        raise CardError("its network cannot be cut")
    made: _Made = {}
    both = zip(whole.parts, reference.sessions, strict=True)

    def opened(encoded: bytes) -> Session:
        digest, (part, session) = sha256(encoded).hexdigest(), next(both)
        onnx = folder / f"{digest}.onnx"
        onnx.write_bytes(encoded)
        facts = ort.signature(session)
        usual = whole.usual_shapes(part, facts["inputs"])
        in_mnn, made[digest] = _made(onnx, folder / f"{digest}.mnn", facts | {"usual": usual})
        return in_mnn

    in_mnn = Pieces(whole, opened)
    batch = as_one(column(drawn_tiles(card.input.size_px)[:2])[0], card)
    _compare(reference.run(batch, outputs), in_mnn.run(batch, outputs))
    return made


def _made(onnx: Path, file: Path, facts: dict[str, Any]) -> tuple[Session, dict[str, Any]]:
    convert(onnx, file)
    if not file.exists():
        raise CardError("MNN's converter does not take it (operators that it lacks?)")
    facts = facts | {"sha256": file_sha256(file)}
    return Session(file, facts), facts


def _compare(wanted: list[np.ndarray], found: list[np.ndarray]) -> None:
    gap = difference(wanted, found)
    if not gap <= TOLERANCE:
        raise CardError(
            f"it gives other outputs than ONNX Runtime for drawn tiles: up to {gap:.2g}, allowed {TOLERANCE:g}"
        )


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


def _work(card: Card, folder: Path, outputs: Sequence[str]) -> _Made:
    return converted_parts(card, folder, outputs) if outputs else converted(card, folder)


if __name__ == "__main__":
    _card = pickle.loads(Path(sys.argv[1]).read_bytes())  # the parent's, in a folder of its own
    _most_bytes = 16 * _card.model_path.stat().st_size
    answer(lambda: _work(_card, Path(sys.argv[2]), sys.argv[3:]), memory_bytes=_most_bytes)
