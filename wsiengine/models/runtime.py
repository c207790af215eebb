"""The one ONNX Runtime session of a process: tiles in, scores out.

On the CPU a tile's scores depend on its pixels alone: not on its neighbours in a batch, on threads or on other callers.
That takes one tile at a time, on one thread inside the session, in aligned memory: ONNX Runtime's mean over an
activation map sums in an order that follows the address, so that a tile's place in a batch shows in the last bit; its
convolutions split their sums by thread count where a batch has one image; and dynamic quantisation scales by the whole
batch. It costs nothing: measured on one core, ms per 224 px tile at batch 1, 8 and 16, ResNet-18 took 17.1, 16.5 and
16.2, MobileNetV2 4.1, 4.9 and 5.4. Threads work on different tiles instead.

MNN, the other library for the CPU, takes four tiles of a block at once: see :mod:`wsiengine.models.mnn`.

On a GPU every batch has one fixed, padded shape, which is part of a run's identity; batches are filled across blocks,
and more than one is under way (:mod:`wsiengine.models.feeding`). The provider is a parameter: ``batched`` runs the very
same code on the CPU.
"""

import threading
from collections import OrderedDict
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import TYPE_CHECKING, Any

import numpy as np

from wsiengine.errors import CardError, ModelError
from wsiengine.models import mnn
from wsiengine.models.bound import BoundSlot
from wsiengine.models.card import Card
from wsiengine.models.contract import check_maps, check_outputs, check_scores, check_signature, disagrees
from wsiengine.models.feeding import AHEAD, Feeder
from wsiengine.models.integrity import check_files
from wsiengine.models.ort import CPU, first_line, open_other, open_pieces, open_sessions, ort_errors, signature
from wsiengine.models.packing import as_one, checked_origins, pack, room_for
from wsiengine.models.pinned import pin

if TYPE_CHECKING:
    from wsiengine.models.pieces import Pieces

CUDA_BATCH = 64


class Runtime:
    """A model, ready to score tiles. Thread-safe; pickles as its arguments, and a process keeps one session for each.

    Args:
        card: The model.
        device: ``cpu``, ``cuda``, ``cuda:1``, ``cuda:0,1`` (several, which share the work), ``tensorrt`` likewise,
            ``mnn`` (the CPU, in MNN), or ``auto``: CUDA where a session can have it, else the CPU in ONNX Runtime.
        threads: Tiles that one call of :meth:`scores` works on at once (CPU). Leave it at 1 where several threads call.
        batch_size: Tiles handed to a GPU at once, 64 by default, or to MNN, 4 by default; ONNX Runtime on the CPU takes
            one at a time, whatever is given.
        batched: Treat the CPU as a GPU is: for tests and comparisons.

    Attributes:
        provider: ``CPUExecutionProvider``, ``CUDAExecutionProvider``, ``TensorrtExecutionProvider`` or MNN with its
            version: what a run's scores hang on.
        on_cpu: No GPU is needed.
        chosen: In words, what runs the model, and why.
        batch_size: Tiles handed over at once.

    Raises:
        DependencyError: ONNX Runtime is missing, or installed twice; MNN was asked for and is missing.
        CardError: The ONNX file is not what the card says.
        IntegrityError: A file of the model has another sha256 than the card says, or is unsafe.
        ProviderError: CUDA was asked for and the session did not get it; MNN was, and does not run this model.
    """

    def __init__(
        self,
        card: Card,
        *,
        device: str = "auto",
        threads: int = 1,
        batch_size: int | None = None,
        batched: bool = False,
    ) -> None:
        if threads < 1 or (batch_size is not None and batch_size < 1):
            raise ValueError(f"threads and batch size are whole numbers above 0, not {threads} and {batch_size}")
        self.card = card
        self._arguments = (card, device, threads, batch_size, batched)
        check_files(card)
        sessions, self.chosen = mnn.open_session(card) if device == mnn.DEVICE else open_sessions(card, device)
        self._session = sessions[0]
        self.provider: str = self._session.get_providers()[0]
        in_mnn = device == mnn.DEVICE
        self._library = "MNN" if in_mnn else "ONNX Runtime"
        self.on_cpu = in_mnn or self.provider == CPU
        self.batched = not self.on_cpu or (batched and not in_mnn)
        fixed = check_signature(self._session.get_inputs(), self._session.get_outputs(), card)
        usual = 1 if card.outputs.boxes else CUDA_BATCH  # most detectors put the boxes of all tiles into one list
        usual = mnn.BATCH if in_mnn else usual
        self.batch_size = fixed or batch_size or usual if self.batched or in_mnn else 1
        self._padded = fixed is not None or not in_mnn
        if fixed not in (None, self.batch_size):
            raise disagrees(card, f"a fixed batch of {fixed}", f"a free batch axis, or {self.batch_size}, on the CPU")
        self._input: str = self._session.get_inputs()[0].name
        rows = (card.outputs.scores, card.outputs.gate)  # of a classifier; its maps are run over dense blocks alone
        wanted = rows if card.task == "classify" else card.outputs.names
        self._outputs = [name for name in wanted if name is not None]
        others = card.second.files if card.second else ()
        self._others = {file: open_other(card, file, self._session) for file in others}
        self._one_at_a_time = None if self.on_cpu else threading.Lock()
        self._cutting = threading.Lock()
        self._pieces: Pieces | None = None
        self._cut = False  # once a block was asked for
        self._pool = ThreadPoolExecutor(threads, "wsiengine-model") if threads > 1 and not self.batched else None
        self._probe()
        self._feeder = self._fed(sessions) if self.batched and card.task == "classify" else None

    def __reduce__(self) -> tuple:
        return _shared, self._arguments

    def scores(self, pixels: np.ndarray, origins_px: np.ndarray, *, tolerant: bool = False) -> np.ndarray:
        """Score the tiles of a block.

        Args:
            pixels: (rows, cols, 3) uint8 RGB, the block at the model's µm/px, normalised by the card's recipe;
                (rows, cols, 1) uint16 for a card of depth 16.
            origins_px: (N, 2) integers, y and x of each tile's corner in ``pixels``; every tile lies inside.
            tolerant: A tile for which the model gives NaN, infinity or no gate gets NaN instead of an error.

        Returns:
            (N, card.score_channels) float32: raw scores of each class as the model gives them, then the gate fraction.

        Raises:
            ScoreError: NaN, infinity, or a gate outside [0, 1]; names the tile.
            ModelError: ONNX Runtime (or MNN) failed on this input.
        """
        origins = checked_origins(pixels, origins_px, self.card.input)
        if self._feeder is not None:
            scores = self._feeder.scores(pixels, origins)
            check_scores(scores, origins, self.card, tolerant=tolerant)
            return scores
        scores = np.empty((len(origins), self.card.score_channels), np.float32)
        if self._pool is None or len(origins) < 2:
            self._fill(pixels, origins, scores)
        else:
            parts = np.array_split(np.arange(len(origins)), self._arguments[2])
            bounds = [(part[0], part[-1] + 1) for part in parts if len(part)]
            list(self._pool.map(lambda b: self._fill(pixels, origins[b[0] : b[1]], scores[b[0] : b[1]]), bounds))
        check_scores(scores, origins, self.card, tolerant=tolerant)
        return scores

    def working(self) -> AbstractContextManager[None]:
        """For a thread that will ask for scores again and again, while it does: batches then wait for its tiles."""
        return nullcontext() if self._feeder is None else self._feeder.worker()

    def helped(self, threads: int) -> AbstractContextManager[None]:
        """While blocks are run by up to ``threads`` threads: those that no block keeps busy take pieces of others."""
        pieces = self._in_pieces()
        return nullcontext() if pieces is None else pieces.team.helped(threads)

    def signature(self) -> dict[str, list[tuple]]:
        """What the ONNX file states of its ``inputs`` and ``outputs``: name, type and shape of each."""
        return signature(self._session)

    def weights_bytes(self, threads: int, *, pieces: bool = False) -> int:
        """Memory for the network's weights, where ``threads`` call: ONNX Runtime keeps them once, three times over.

        ``pieces``: it runs in parts, whose sessions have the weights once more; MNN's whole network rests then.
        """
        if isinstance(self._session, mnn.Session):
            return threads * self._session.bytes_per_thread
        return (1 + pieces) * 3 * self.card.model_path.stat().st_size

    def batches(self) -> dict[str, float] | None:
        """On a GPU: batches run, tiles and rows in them, and seconds that sessions were at work."""
        return None if self._feeder is None else self._feeder.facts()

    def at_work(self) -> list[list[tuple[float, float]]]:
        """On a GPU: when each session had batches under way, by ``time.perf_counter``, for all slides; else empty."""
        return [] if self._feeder is None else self._feeder.periods()

    def _fed(self, sessions: list[Any]) -> Feeder:
        errors = ort_errors()
        slots = [[BoundSlot(s, self._pinned_batch(), self._outputs, errors) for _ in range(AHEAD)] for s in sessions]
        return Feeder(slots, lambda pixels, at, rows: pack(pixels, at, self.card, rows), self.card.score_channels)

    def outputs(
        self, pixels: np.ndarray, origins_px: np.ndarray, names: list[str] | None = None
    ) -> Iterator[list[np.ndarray]]:
        """What the model gives for each tile of a block, unchecked: for tasks that are no row of scores.

        Args:
            pixels, origins_px: As for :meth:`scores`.
            names: Of the outputs wanted; by default those of ``card.outputs.names``.

        Yields:
            For each tile, in order, these outputs, with a leading axis of size 1. The
            arrays are good until the next tile is asked for.

        Raises:
            ModelError: ONNX Runtime (or MNN) failed on this input.
        """
        origins = checked_origins(pixels, origins_px, self.card.input)
        batch = self._batch()
        for first in range(0, len(origins), self.batch_size):
            part = origins[first : first + self.batch_size]
            pack(pixels, part, self.card, batch[: len(part)])
            found = self._run(batch, names)
            if self.batch_size == 1:
                yield found
            else:
                yield from ([array[k : k + 1] for array in found] for k in range(len(part)))

    def maps(self, pixels: np.ndarray, *, wanted: np.ndarray | None = None, tolerant: bool = False) -> np.ndarray:
        """The network run once over a whole block: its map of scores, one per cell.

        Args:
            pixels: (rows, cols, 3) uint8 RGB, whole numbers of cells; normalised by the card's recipe.
            wanted: (rows / stride, cols / stride) bool: cells that are wanted; others may hold anything finite.
            tolerant: Cells of NaN or infinity are not scored (NaN), and no error.

        Returns:
            (rows / stride, cols / stride, card.score_channels) float32: the class-activation map, then the gate's map.

        Raises:
            CardError: The card names no maps, or they are not one value per cell.
            ScoreError: NaN or infinity; names the place.
            ModelError: ONNX Runtime (or MNN) failed on this input.
        """
        names = self._map_names
        pieces = self._in_pieces()
        as_it_is = pieces and self.card.input.layout == "NHWC" and self.card.input.dtype == "uint8"
        batch = pixels[np.newaxis] if as_it_is else as_one(pixels, self.card)  # pieces are copied out of it
        if pieces is None:
            cam, *gate = self._run(batch, names)
        else:
            with self._told(batch.shape):
                cam, *gate = pieces.run(batch, names, wanted)
        parts = [np.moveaxis(cam[0], 0, -1), *(np.asarray(g)[0].reshape(*cam.shape[2:], 1) for g in gate)]
        found = np.concatenate(parts, axis=-1, dtype=np.float32)
        needed = (*(n // self.card.output_stride_px for n in pixels.shape[:2]), self.card.score_channels)
        if found.shape != needed:
            raise disagrees(self.card, f"maps of shape {found.shape}", f"{needed}: one value per cell and channel")
        check_maps(found, self.card, tolerant=tolerant)
        return found

    def map_bytes(self, block_px: int) -> tuple[int, int] | None:
        """Memory that :meth:`maps` takes for each block under way, and in each thread; None where the whole network
        runs at once.
        """
        pieces = self._in_pieces()
        return None if pieces is None else pieces.memory_bytes(block_px)

    @property
    def _map_names(self) -> list[str]:
        return [name for name in (self.card.outputs.cam, self.card.outputs.gate_map) if name is not None]

    def _in_pieces(self) -> "Pieces | None":
        """What runs the network over a block piece by piece, on the CPU; None: it cannot be cut."""
        with self._cutting:
            if not self._cut:
                self._pieces = self._opened_pieces() if self.on_cpu else None
                self._cut = True
            return self._pieces

    def _opened_pieces(self) -> "Pieces | None":
        if not isinstance(self._session, mnn.Session):
            return open_pieces(self.card, self._map_names)
        pieces = mnn.open_pieces(self.card, self._map_names)
        if pieces:
            self._session.rest()
        return pieces

    def run_other(self, file: str, batch: np.ndarray, outputs: list[str]) -> list[np.ndarray]:
        """A file of the card's second stage, on the provider of the first: ``outputs`` for one row of input.

        Raises:
            ModelError: ONNX Runtime failed on this input, or the file has no such outputs.
        """
        session = self._others[file]
        try:
            with self._one_at_a_time or nullcontext():
                return session.run(outputs, {session.get_inputs()[0].name: batch})
        except ort_errors() as error:
            raise ModelError(
                f"model {self.card.name}: {file} failed on input of shape {batch.shape}: {first_line(error)}",
                hint="compare the card's second with the ONNX file",
            ) from error

    def _fill(self, pixels: np.ndarray, origins: np.ndarray, scores: np.ndarray) -> None:
        """Scores of the tiles at ``origins`` into the rows of ``scores``; the last batch is padded, but in MNN."""
        batch = self._batch()
        for first in range(0, len(origins), self.batch_size):
            part = origins[first : first + self.batch_size]
            pack(pixels, part, self.card, batch[: len(part)])
            rows = scores[first : first + len(part)]
            classes, *gate = self._run(batch if self._padded else batch[: len(part)])
            rows[:, : classes.shape[1]] = classes[: len(part)]
            if gate:
                rows[:, -1] = gate[0].reshape(-1)[: len(part)]

    def _batch(self) -> np.ndarray:
        """A zeroed, aligned batch in the model's layout and type."""
        return room_for(self.batch_size, self.card.input)

    def _pinned_batch(self) -> np.ndarray:
        batch = self._batch()
        if not self.on_cpu:
            pin(batch)
        return batch

    def _run(self, batch: np.ndarray, outputs: list[str] | None = None) -> list[np.ndarray]:
        with self._told(batch.shape), self._one_at_a_time or nullcontext():
            return self._session.run(outputs or self._outputs, {self._input: batch})

    @contextmanager
    def _told(self, shape: tuple[int, ...]) -> Iterator[None]:
        """ONNX Runtime's errors as ours."""
        try:
            yield
        except ort_errors() as error:
            raise ModelError(
                f"model {self.card.name}: {self._library} failed on tiles of shape {shape}: {first_line(error)}",
                hint="try --device cpu, or a smaller --batch-size; if it stays, card and ONNX file do not fit",
            ) from error

    def _probe(self) -> None:
        """Run a black batch: free axes show their sizes only then."""
        try:
            outputs = self._run(self._batch())
        except ModelError as error:
            raise CardError(error.message, hint="compare the card's input with the ONNX file") from error
        check_outputs(outputs, self.batch_size, self.card)
        if self.card.second:
            from wsiengine.crops import second_stage  # needs a runtime itself

            deep = self.card.input.deep
            tile = np.zeros((8, 8, 1 if deep else 3), np.uint16 if deep else np.uint8)
            second_stage(self, tile, np.array([[2.0, 2.0, 6.0, 6.0]]))


_KEPT = 2  # sessions kept for the next slide: a model, and its other number format
_shared_runtimes: OrderedDict[tuple, Runtime] = OrderedDict()
_sharing = threading.Lock()


def shared_runtime(
    card: Card, *, device: str = "auto", threads: int = 1, batch_size: int | None = None, batched: bool = False
) -> Runtime:
    """As :class:`Runtime`, but one for all slides of this process; the model's files are checked each time."""
    return _shared(card, device, threads, batch_size, batched)


def _shared(*arguments: Any) -> Runtime:
    """The one Runtime that all unpickled copies in a process share, and all of its slides."""
    card, device, threads, size, batched = arguments
    key = (card.folder, *arguments)  # equal cards may lie in two folders, and one of them may go
    with _sharing:
        if key in _shared_runtimes:
            check_files(card)
            _shared_runtimes.move_to_end(key)
            return _shared_runtimes[key]
        made = Runtime(card, device=device, threads=threads, batch_size=size, batched=batched)
        _shared_runtimes[key] = made
        while len(_shared_runtimes) > _KEPT:
            _shared_runtimes.popitem(last=False)
        return made
