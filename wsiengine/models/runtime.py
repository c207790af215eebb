"""The one ONNX Runtime session of a process: tiles in, scores out; the only importer of onnxruntime.

On the CPU the result of a tile does not depend on the batch it came in, on the threads, or on other callers. On CUDA
every batch has one fixed, padded shape, which is part of a run's identity.
"""

import threading
from dataclasses import dataclass
from functools import lru_cache
from importlib import metadata
from typing import Any

import numpy as np

from wsiengine.errors import CardError, DependencyError, ModelError, ProviderError, ScoreError
from wsiengine.models.card import Card
from wsiengine.models.integrity import check_files
from wsikernels.pack import pack_tiles, pack_tiles_nhwc

BUILDS = ("onnxruntime", "onnxruntime-gpu")
CPU_BATCH, CUDA_BATCH = 8, 64
_GATE_SLACK = 1e-3  # a fraction summed in float32 may leave [0, 1] by a few bits
_NUMPY = {"uint8": np.uint8, "float32": np.float32, "float16": np.float16}
_ONNX = {"uint8": "tensor(uint8)", "float32": "tensor(float)", "float16": "tensor(float16)"}


def installed_builds() -> dict[str, str]:
    """The ONNX Runtime packages that are installed, with their versions."""
    found = {}
    for name in BUILDS:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def import_onnxruntime() -> Any:
    """The onnxruntime module.

    Raises:
        DependencyError: No build is installed, or both (they own the same folder and overwrite each other).
    """
    builds = installed_builds()
    if len(builds) > 1:
        raise DependencyError(
            f"both {' and '.join(builds)} are installed: they overwrite each other's files; needed exactly one",
            hint='pip uninstall -y onnxruntime onnxruntime-gpu, then pip install "wsiengine[cpu]" or "wsiengine[gpu]"',
        )
    try:
        import onnxruntime
    except ImportError as error:
        raise DependencyError(
            f"ONNX Runtime, which runs the models, cannot be imported: {error}",
            hint='pip install "wsiengine[cpu]", or "wsiengine[gpu]" on a machine with an NVIDIA GPU',
        ) from error
    return onnxruntime


def providers() -> dict[str, Any]:
    """Facts for ``wsiengine doctor``: installed builds, version, and the providers the build names.

    A named provider need not work on this machine; only a session tells (:attr:`Runtime.chosen`).
    """
    facts: dict[str, Any] = {"builds": installed_builds(), "version": None, "providers": [], "problem": None}
    try:
        ort = import_onnxruntime()
    except DependencyError as error:
        return facts | {"problem": str(error)}
    return facts | {"version": ort.__version__, "providers": ort.get_available_providers()}


class Runtime:
    """A model, ready to score tiles. Thread-safe; pickles as its arguments, and a process keeps one session for each.

    Args:
        card: The model.
        device: ``cpu``, ``cuda``, ``cuda:1`` …, or ``auto``: CUDA where a session can have it, else the CPU.
        threads: Threads that one call of :meth:`scores` may use inside the model (CPU).
        batch_size: Tiles handed over at once; by default 8 on the CPU (more gains nothing there), 64 on CUDA.

    Attributes:
        chosen: In words, what runs the model and why.
        provider: ``CPUExecutionProvider`` or ``CUDAExecutionProvider``.
        batch_size: Tiles handed over at once.

    Raises:
        DependencyError: ONNX Runtime is missing, or installed twice.
        CardError: The ONNX file is not what the card says.
        IntegrityError: A file of the model is not what the card says.
        ProviderError: CUDA was asked for and the session did not get it.
    """

    def __init__(self, card: Card, *, device: str = "auto", threads: int = 1, batch_size: int | None = None) -> None:
        if threads < 1 or (batch_size is not None and batch_size < 1):
            raise ValueError(f"threads and batch size are whole numbers above 0, not {threads} and {batch_size}")
        self._arguments = (card, device, threads, batch_size)
        self.card = card
        check_files(card)
        opened = _open(card, device, threads)
        self._session, self.provider, self.chosen = opened.session, opened.provider, opened.chosen
        on_cuda = self.provider == "CUDAExecutionProvider"
        signature = _check_signature(self._session, card)
        self.batch_size = signature.batch or batch_size or (CUDA_BATCH if on_cuda else CPU_BATCH)
        self._padded = on_cuda or signature.batch is not None
        self._lock = threading.Lock() if on_cuda else None
        self._names = [name for name in (card.outputs.scores, card.outputs.gate) if name is not None]
        self._input = signature.input
        self._probe()

    def __reduce__(self) -> tuple:
        return _shared, self._arguments

    def scores(self, pixels: np.ndarray, origins_px: np.ndarray) -> np.ndarray:
        """Score the tiles of a block.

        Args:
            pixels: (rows, cols, 3) uint8 RGB, the block at the model's µm/px, normalised by the card's recipe.
            origins_px: (N, 2) integers, y and x of each tile's corner in ``pixels``; every tile lies inside.

        Returns:
            (N, card.score_channels) float32: raw scores of each class as the model gives them, then the gate fraction.

        Raises:
            ScoreError: NaN, infinity, or a gate outside [0, 1]; names the tile.
            ModelError: ONNX Runtime failed on this input.
        """
        origins = _checked_origins(pixels, origins_px, self.card.input.size_px)
        scores = np.empty((len(origins), self.card.score_channels), np.float32)
        batch = self._empty_batch(min(self.batch_size, len(origins)) if not self._padded else self.batch_size)
        for first in range(0, len(origins), self.batch_size):
            part = origins[first : first + self.batch_size]
            _pack(pixels, part, self.card, batch[: len(part)])
            outputs = self._run(batch if self._padded else batch[: len(part)])
            scores[first : first + len(part)] = self._rows(outputs, len(part))
        _check_scores(scores, origins, self.card)
        return scores

    def _empty_batch(self, count: int) -> np.ndarray:
        spec = self.card.input
        side = spec.size_px
        shape = (count, side, side, 3) if spec.layout == "NHWC" else (count, 3, side, side)
        return np.zeros(shape, _NUMPY[spec.dtype])

    def _rows(self, outputs: list[np.ndarray], count: int) -> np.ndarray:
        """Class scores and gate of the first ``count`` tiles, side by side."""
        columns = [np.asarray(out, np.float32).reshape(len(out), -1)[:count] for out in outputs]
        return np.concatenate(columns, axis=1)

    def _run(self, batch: np.ndarray) -> list[np.ndarray]:
        try:
            if self._lock is None:
                return self._session.run(self._names, {self._input: batch})
            with self._lock:
                return self._session.run(self._names, {self._input: batch})
        except _ort_errors() as error:
            raise ModelError(
                f"model {self.card.name}: ONNX Runtime failed on tiles of shape {batch.shape}: {_first_line(error)}",
                hint="try a smaller --batch-size or --device cpu; if it stays, the ONNX file does not fit its card",
            ) from error

    def _probe(self) -> None:
        """Run one white tile and compare the shapes that really come out with the card."""
        count = self.batch_size if self._padded else 1
        white = np.full((self.card.input.size_px,) * 2 + (3,), 255, np.uint8)
        batch = self._empty_batch(count)
        _pack(white, np.zeros((1, 2), np.int64), self.card, batch[:1])
        try:
            outputs = self._run(batch)
        except ModelError as error:
            raise CardError(f"{error.message}", hint="compare the card's input with the ONNX file") from error
        wanted = [(count, len(self.card.classes)), (count,)]
        for name, out, shape in zip(self._names, outputs, wanted, strict=False):
            if out.shape != shape and out.shape != (*shape, 1):
                raise _disagrees(self.card, f"output {name!r} has shape {out.shape} for {count} tiles", f"{shape}")


@lru_cache(maxsize=8)
def _shared(card: Card, device: str, threads: int, batch_size: int | None) -> Runtime:
    """The one Runtime that all unpickled copies in a process share."""
    return Runtime(card, device=device, threads=threads, batch_size=batch_size)


@dataclass(frozen=True, slots=True)
class _Opened:
    session: Any
    provider: str
    chosen: str


@dataclass(frozen=True, slots=True)
class _Signature:
    """What the ONNX file states: the name of its input, and its batch size where that is fixed."""

    input: str
    batch: int | None


def _open(card: Card, device: str, threads: int) -> _Opened:
    ort = import_onnxruntime()
    kind, index = _parse_device(device)
    version = f"ONNX Runtime {ort.__version__}"
    if kind == "cpu":
        return _cpu(ort, card, threads, f"{version}, CPU: asked for")
    named = "CUDAExecutionProvider" in ort.get_available_providers()
    if kind == "auto" and not named:
        return _cpu(ort, card, threads, f"{version}, CPU: the installed build has no CUDA")
    problem = "the installed ONNX Runtime build has no CUDA"
    if named:
        if hasattr(ort, "preload_dlls"):
            ort.preload_dlls()  # finds the CUDA libraries that pip installed
        try:
            session = _session(ort, card, threads, [("CUDAExecutionProvider", _cuda_options(index)), *_CPU])
            got = session.get_providers()
            if got[:1] == ["CUDAExecutionProvider"]:
                return _Opened(session, got[0], f"{version}, CUDA device {index}")
            problem = f"the session got {', '.join(got)}"
        except ProviderError as error:
            problem = error.message
    if kind == "auto":
        return _cpu(ort, card, threads, f"{version}, CPU: CUDA is not usable here ({problem})")
    raise ProviderError(
        f"asked for {device}, needed CUDAExecutionProvider, but {problem}",
        hint='pip install "wsiengine[gpu]" (and not onnxruntime beside it), check the driver with nvidia-smi, '
        "or use --device cpu",
    )


_CPU = ["CPUExecutionProvider"]


def _cpu(ort: Any, card: Card, threads: int, chosen: str) -> _Opened:
    session = _session(ort, card, threads, _CPU)
    if session.get_providers() != _CPU:
        raise ProviderError(f"asked for the CPU provider, got {', '.join(session.get_providers())}")
    return _Opened(session, _CPU[0], chosen)


def _cuda_options(index: int) -> dict[str, str]:
    # Exhaustive search picks algorithms by stopwatch, and TF32 drops 13 bits: neither gives the same scores twice.
    return {"device_id": str(index), "cudnn_conv_algo_search": "HEURISTIC", "use_tf32": "0"}


def _session(ort: Any, card: Card, threads: int, wanted: list) -> Any:
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.execution_mode = ort.ExecutionMode.ORT_SEQUENTIAL
    options.log_severity_level = 4  # what matters comes back as an exception
    options.use_deterministic_compute = True
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")  # leave the core to decoding
    try:
        return ort.InferenceSession(str(card.model_path), options, providers=wanted)
    except _ort_errors() as error:
        if wanted != _CPU and "CUDA" in str(error):
            raise ProviderError(_first_line(error)) from error
        raise CardError(
            f"{card.model_path.name} cannot be loaded by ONNX Runtime {ort.__version__}: {_first_line(error)}",
            hint="fetch or export the model again, with standard ONNX operators",
        ) from error


def _parse_device(device: str) -> tuple[str, int]:
    kind, _, index = device.partition(":")
    if kind not in ("auto", "cpu", "cuda") or (index and (kind != "cuda" or not index.isdecimal())):
        raise ProviderError(f"device is {device!r}, needed auto, cpu, cuda or cuda:1", hint="try --device auto")
    return kind, int(index or 0)


def _check_signature(session: Any, card: Card) -> _Signature:
    """Compare the names, types and static sizes that the ONNX file states with the card."""
    inputs = session.get_inputs()
    if len(inputs) != 1:
        raise _disagrees(card, f"{len(inputs)} inputs ({', '.join(i.name for i in inputs)})", "one input, the tiles")
    spec, tiles = card.input, inputs[0]
    if tiles.type != _ONNX[spec.dtype]:
        raise _disagrees(card, f"an input of type {tiles.type}", f"{_ONNX[spec.dtype]} ({spec.dtype})")
    side = spec.size_px
    wanted = (side, side, 3) if spec.layout == "NHWC" else (3, side, side)
    if len(tiles.shape) != 4 or not _fits(tiles.shape[1:], wanted):
        raise _disagrees(card, f"an input of shape {tiles.shape}", f"{spec.layout} tiles: (N, {wanted})")
    shapes = {out.name: (out.shape, out.type) for out in session.get_outputs()}
    for name in card.outputs.names:
        if name not in shapes:
            raise _disagrees(card, f"the outputs {', '.join(shapes)}", f"an output {name!r}")
    classes = len(card.classes)
    for shape, kind in [shapes[card.outputs.scores]]:
        if len(shape) not in (0, 2) or not _fits(shape[1:], (classes,)[: len(shape[1:])]):
            raise _disagrees(card, f"scores of shape {shape}", f"(N, {classes}), one for each class")
        if kind not in ("tensor(float)", "tensor(float16)", "tensor(double)"):
            raise _disagrees(card, f"scores of type {kind}", "floating-point scores")
    batch = tiles.shape[0]
    return _Signature(tiles.name, batch if isinstance(batch, int) and batch > 0 else None)


def _fits(shape: list, wanted: tuple[int, ...]) -> bool:
    """Whether the static sizes of ``shape`` (others are names or None) are those wanted."""
    return len(shape) == len(wanted) and all(
        got == need or not isinstance(got, int) or got < 1 for got, need in zip(shape, wanted, strict=True)
    )


def _disagrees(card: Card, got: str, needed: str) -> CardError:
    return CardError(
        f"card and ONNX file disagree: {card.model_path.name} has {got}; the card of {card.name} needs {needed}",
        hint="correct the card, or export the model again",
    )


def _checked_origins(pixels: np.ndarray, origins_px: np.ndarray, side: int) -> np.ndarray:
    if pixels.dtype != np.uint8 or pixels.ndim != 3 or pixels.shape[2] != 3:
        raise ValueError(f"pixels are {pixels.dtype} {pixels.shape}, needed uint8 (rows, cols, 3)")
    origins = np.asarray(origins_px, np.int64).reshape(-1, 2)
    room = np.array(pixels.shape[:2]) - side
    if len(origins) and (origins.min() < 0 or (origins > room).any()):
        raise ValueError(f"a tile of {side} px leaves the block of {pixels.shape[:2]} px")
    return origins


def _pack(pixels: np.ndarray, origins: np.ndarray, card: Card, out: np.ndarray) -> None:
    """Cut the tiles at ``origins`` out of ``pixels`` into ``out``, in the layout, type and range of the card."""
    spec = card.input
    if spec.dtype != "uint8":
        pack = pack_tiles if spec.layout == "NCHW" else pack_tiles_nhwc
        pack(pixels, origins, spec.scale, spec.bias, out)
        return
    side = spec.size_px
    for tile, (y, x) in zip(out, origins.tolist(), strict=True):
        view = pixels[y : y + side, x : x + side]
        tile[...] = view if spec.layout == "NHWC" else view.transpose(2, 0, 1)


def _check_scores(scores: np.ndarray, origins: np.ndarray, card: Card) -> None:
    bad = ~np.isfinite(scores).all(axis=1)
    if bad.any():
        tile = int(np.argmax(bad))
        y, x = origins[tile]
        raise ScoreError(
            f"model {card.name} gave {_words(scores[tile])} for the tile at y {y}, x {x} of its block"
            f" ({int(bad.sum())} of {len(scores)} tiles); needed finite numbers",
            hint="the ONNX file overflows on this input: try a float32 export",
        )
    if card.gate is None or not len(scores):
        return
    gate = scores[:, -1]
    outside = (gate < -_GATE_SLACK) | (gate > 1 + _GATE_SLACK)
    if outside.any():
        tile = int(np.argmax(outside))
        y, x = origins[tile]
        raise ScoreError(f"model {card.name} gave the gate {gate[tile]:g} for the tile at y {y}, x {x}, needed 0 to 1")
    np.clip(gate, 0, 1, out=gate)


def _words(row: np.ndarray) -> str:
    return "NaN" if np.isnan(row).any() else "infinity"


def _first_line(error: Exception) -> str:
    return str(error).strip().split("\n", 1)[0][:300]


def _ort_errors() -> tuple[type[Exception], ...]:
    """ONNX Runtime's exceptions, which share no base class of their own."""
    from onnxruntime.capi import onnxruntime_pybind11_state as state

    kinds = (getattr(state, name) for name in dir(state))
    own = tuple(kind for kind in kinds if isinstance(kind, type) and issubclass(kind, Exception))
    return (*own, ValueError, RuntimeError)
