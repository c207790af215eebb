"""ONNX Runtime's sessions: how it is imported, and what runs a model on which device; its only importer."""

import os
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

from wsiengine.errors import CardError, DependencyError, ProviderError
from wsiengine.models.card import Card
from wsiengine.models.integrity import check_onnx
from wsiengine.models.waiting import wait_asleep

if TYPE_CHECKING:
    from wsiengine.models.cutting import Part
    from wsiengine.models.pieces import Pieces

BUILDS = ("onnxruntime", "onnxruntime-gpu")
CPU, CUDA = "CPUExecutionProvider", "CUDAExecutionProvider"
TENSORRT = "TensorrtExecutionProvider"
_SILENT = 4  # of ONNX Runtime's levels of logging: what matters comes back as an exception
_AS_ASKED = 1  # ONNX Runtime's kSameAsRequested: memory grows by what is wanted, not to twice of what is there
_KINDS = {"cuda": CUDA, "tensorrt": TENSORRT}


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
    """The onnxruntime module, kept from telling anybody about the run.

    Raises:
        DependencyError: No build is installed, or both (they own the same folder and overwrite each other).
    """
    # Some builds collect facts about machine and process in the user's cache folder, to send them to their maker. Only
    # this variable keeps them from it, before the import: `disable_telemetry_events()` comes too late (seen with 1.31).
    os.environ["ORT_DISABLE_TELEMETRY"] = "1"
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


def open_sessions(card: Card, device: str) -> tuple[list[Any], str]:
    """The sessions, one per device, and in words why those."""
    ort = import_onnxruntime()
    kind, indices = _parse_device(device)
    version = f"ONNX Runtime {ort.__version__}"
    if kind == "cpu":
        return [_cpu_session(ort, card)], f"{version}, CPU (asked for)"
    wanted = "cuda" if kind == "auto" else kind
    which = f"device{'s' if len(indices) > 1 else ''} {', '.join(map(str, indices))}"
    try:
        sessions = [_gpu_session(ort, card, wanted, index) for index in indices]
        return sessions, f"{version}, {'CUDA' if wanted == 'cuda' else 'TensorRT'} {which}"
    except ProviderError as error:
        if kind != "auto":
            raise
        return [_cpu_session(ort, card)], f"{version}, CPU ({error.message})"


def _cpu_session(ort: Any, card: Card) -> Any:
    session = _session(ort, card, [CPU])
    if session.get_providers() != [CPU]:
        raise ProviderError(f"asked for {CPU}, got {', '.join(session.get_providers())}")
    return session


def _gpu_session(ort: Any, card: Card, kind: str, index: int) -> Any:
    provider, name = _KINDS[kind], "CUDA" if kind == "cuda" else "TensorRT"
    if provider not in ort.get_available_providers():
        raise _no_gpu(kind, f"the installed ONNX Runtime build has no {name}")
    # cuDNN's trials of plans that it has not are told as errors, to the logger of the process: no session's level keeps
    # them out. A host's own sessions are silenced with it, but only here: the CPU has nothing to tell.
    ort.set_default_logger_severity(_SILENT)
    if hasattr(ort, "preload_dlls"):
        ort.preload_dlls()  # finds the CUDA libraries that pip installed
    wait_asleep(index)
    # Exhaustive search picks algorithms by stopwatch, and TF32 drops 13 bits: neither gives the same scores twice.
    # Half precision is faster with the channels last (ResNet-50 on an H200: by a quarter), single precision is not.
    layout = {"prefer_nhwc": str(int(_half(card)))}
    cuda = (CUDA, {"device_id": str(index), "cudnn_conv_algo_search": "HEURISTIC", "use_tf32": "0", **layout})
    wanted = [cuda, CPU] if kind == "cuda" else [(TENSORRT, _tensorrt_options(card, index)), cuda, CPU]
    try:
        session = _session(ort, card, wanted)
    except CardError as error:  # a missing driver and a bad model look the same from here; the CPU tells them apart
        _cpu_session(ort, card)
        raise _no_gpu(kind, f"{name} device {index} refused the session: {error.message}") from error
    if session.get_providers()[:1] != [provider]:  # a build lists CUDA even where no session can have it
        raise _no_gpu(kind, f"asked for {provider}, but the session got {', '.join(session.get_providers())}")
    return session


def _half(card: Card) -> bool:
    from wsiengine.models.onnx_graph import read_graph

    return read_graph(memoryview(card.model_path.read_bytes())).half


def _tensorrt_options(card: Card, index: int) -> dict[str, str]:
    """Engines take minutes to build: they are kept, per model, in the user's cache folder."""
    root = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    folder = root / "wsiengine" / "tensorrt" / card.sha256[:16]
    options = {"device_id": str(index)}
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError:  # a home that cannot be written: engines are built anew each time
        return options
    kept = {"trt_engine_cache_enable": "1", "trt_engine_cache_path": str(folder), "trt_timing_cache_enable": "1"}
    return options | kept


def _no_gpu(kind: str, message: str) -> ProviderError:
    library = "" if kind == "cuda" else "pip install tensorrt-cu12 (libnvinfer), "
    return ProviderError(
        message,
        hint=f'{library}pip install "wsiengine[gpu]" without onnxruntime beside it, see that nvidia-smi lists the GPU, '
        "or use --device cpu",
    )


def open_other(card: Card, file: str, first: Any) -> Any:
    """A session of a file of the second stage, on the device of the first; the CPU does what that cannot (trees).

    Raises:
        ProviderError: The session did not get the provider.
    """
    path = card.folder / file
    check_onnx(path, {resource.file for resource in card.resources})
    options = first.get_provider_options()
    wanted = [(provider, options.get(provider, {})) for provider in first.get_providers()]
    session = _session(import_onnxruntime(), card, wanted, path)
    if session.get_providers()[0] != wanted[0][0]:
        raise ProviderError(f"asked for {wanted[0][0]}, but {file} got {', '.join(session.get_providers())}")
    return session


def open_pieces(card: Card, outputs: list[str]) -> "Pieces | None":
    """The network of ``card`` in parts that run over large images piece by piece, on the CPU; None where none fit.

    Raises:
        IntegrityError: The file is no longer the one of the card.
    """
    from wsiengine.models.cutting import PIECE_BYTES
    from wsiengine.models.pieces import Pieces, cut_card

    def large(part: "Part") -> bool:
        """Whether its maps are of a size that the C library takes from the system each time, page by page."""
        return not part.side_px or 4 * part.width * part.side_px**2 > PIECE_BYTES

    whole = cut_card(card, outputs)
    if whole is None:
        return None
    ort = import_onnxruntime()
    shared = any(map(large, whole.parts))
    if shared:  # raised once per process; a second time changes nothing
        ort.create_and_register_allocator(
            ort.OrtMemoryInfo("Cpu", ort.OrtAllocatorType.ORT_ARENA_ALLOCATOR, 0, ort.OrtMemType.DEFAULT),
            ort.OrtArenaCfg(0, _AS_ASKED, -1, -1),
        )
    return Pieces(whole, lambda part: _session(ort, card, [CPU], part, shared=shared))


def signature(session: Any) -> dict[str, list[tuple]]:
    """What a session states of its ``inputs`` and ``outputs``: name, type and shape of each."""
    sides = {"inputs": session.get_inputs(), "outputs": session.get_outputs()}
    return {side: [(one.name, one.type, one.shape) for one in found] for side, found in sides.items()}


def _session(ort: Any, card: Card, wanted: list, model: Path | bytes | None = None, *, shared: bool = False) -> Any:
    """``shared``: its memory is that of all sessions of the process that share it."""
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1  # see :mod:`wsiengine.models.runtime`
    options.inter_op_num_threads = 1
    options.execution_mode = ort.ExecutionMode.ORT_SEQUENTIAL
    options.use_deterministic_compute = True
    options.log_severity_level = _SILENT
    if isinstance(model, bytes):  # a part of a network: each would keep memory of its own for pieces of every shape
        options.enable_cpu_mem_arena, options.enable_mem_pattern = shared, False
        options.add_session_config_entry("session.use_env_allocators", str(int(shared)))
        name = f"a part of {card.model_path.name}"
    else:
        model = model or card.model_path
        name = model.name
    try:
        return ort.InferenceSession(model if isinstance(model, bytes) else str(model), options, providers=wanted)
    except ort_errors() as error:
        raise CardError(
            f"{name} cannot be loaded by ONNX Runtime {ort.__version__}: {first_line(error)}",
            hint="export the model again, with standard ONNX operators",
        ) from error


def _parse_device(device: str) -> tuple[str, tuple[int, ...]]:
    kind, colon, listed = device.partition(":")
    indices = listed.split(",") if colon else ["0"]
    known = kind in _KINDS or (kind in ("auto", "cpu") and not colon)
    if not known or not all(index.isdecimal() for index in indices) or len(set(indices)) < len(indices):
        raise ProviderError(
            f"device is {device!r}, needed auto, cpu, cuda, cuda:1, cuda:0,1, tensorrt or mnn", hint="try --device auto"
        )
    return kind, tuple(map(int, indices))


def first_line(error: Exception) -> str:
    return str(error).strip().split("\n", 1)[0][:300]


def ort_errors() -> tuple[type[Exception], ...]:
    """ONNX Runtime's exceptions, which share no base class of their own."""
    from onnxruntime.capi import onnxruntime_pybind11_state as state

    kinds = (getattr(state, name) for name in dir(state))
    own = tuple(kind for kind in kinds if isinstance(kind, type) and issubclass(kind, Exception))
    return (*own, ValueError, RuntimeError)
