"""MNN, which runs 3 × 3 convolutions faster than ONNX Runtime where a processor has AVX2 alone; its only importer.

Asked for by ``--device mnn``, never chosen: its scores differ from ONNX Runtime's in the last digits (Winograd's
convolutions sum in another order). It takes batches, in which the place of a tile, not its neighbours, shows in
the last bits; the last of a block is a short one. :mod:`wsiengine.models.converting` turns the ONNX file into its
format.
"""

import ctypes
import json
import os
import pickle
import sys
import tempfile
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext, suppress
from hashlib import sha256
from importlib import metadata
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, NoReturn

import numpy as np

from wsiengine import __version__
from wsiengine.errors import CardError, DependencyError, ProviderError
from wsiengine.models.card import Card
from wsiengine.models.child import ask
from wsiengine.models.integrity import file_sha256
from wsiengine.models.precision import REFERENCE

if TYPE_CHECKING:
    from wsiengine.models.pieces import Pieces

DEVICE = "mnn"
BATCH = 4  # one core, ResNet-18, ms per tile at 1, 2, 4 and 8: 32.4, 29.9, 27.8, 27.6
_COPIES = 6  # of the file, per session: itself, and the weights of Winograd's convolutions, four times as large
_SECONDS = 600.0
_importing = threading.Lock()  # two threads that put standard output away would each keep what the other put there


def import_mnn() -> Any:
    """The MNN module.

    Raises:
        DependencyError: It is not installed.
    """
    try:
        with _importing, nullcontext() if "MNN" in sys.modules else _silent():  # it tells of ARM's instructions
            import MNN
    except ImportError as error:
        raise DependencyError(
            f"MNN, which --device {DEVICE} needs, cannot be imported: {error}",
            hint='pip install "wsiengine[cpu,mnn]", or --device cpu',
        ) from error
    return MNN


def convert(onnx: Path, made: Path) -> None:
    """Write ``onnx`` in MNN's format; nothing is written, and the reason is printed, where it cannot.

    Not by MNN's own scripts (``mnnconvert``, MNN.tools): they install a package and send the machine's id to their
    maker. Takes a hostile file for granted: call it in a process of its own.
    """
    import_mnn()
    import _tools

    _tools.mnnconvert(["", "-f", "ONNX", "--modelFile", str(onnx), "--MNNModel", str(made), "--bizCode", "wsiengine"])


def open_session(card: Card) -> tuple[list["Session"], str]:
    """The session, one for all threads, and in words what runs the model.

    Raises:
        DependencyError: MNN is not installed.
        ProviderError: It does not run such models, or not this one, or gives other scores than ONNX Runtime; or the
            user's cache cannot be written.
    """
    import_mnn()
    if card.task != "classify" or card.number_format != REFERENCE or card.input.dtype not in ("uint8", "float32"):
        kind = f"task {card.task}, {card.number_format}, {card.input.dtype} pixels"
        raise ProviderError(
            f"--device {DEVICE} runs classifiers in fp32 on uint8 or float32 pixels; {card.name}: {kind}",
            hint="use --device cpu",
        )
    session = _kept(whole_digest(card))
    if session is None:
        _convert(card)
        session = _kept(whole_digest(card)) or _lost(card)
    return [session], f"{_version()}, CPU (asked for)"


def open_pieces(card: Card, outputs: list[str]) -> "Pieces | None":
    """The network of ``card`` in parts that run over large images piece by piece; None where none fit.

    Raises:
        IntegrityError: The file is no longer the one of the card.
        ProviderError: As for :func:`open_session`.
    """
    from wsiengine.models.pieces import Pieces, cut_card

    whole = cut_card(card, outputs)
    if whole is None:
        return None

    def opened(part: bytes) -> Session:
        digest = sha256(part).hexdigest()
        session = _kept(digest)
        if session is None:
            _convert(card, *outputs)  # all parts at once
            session = _kept(digest) or _lost(card)
        return session

    return Pieces(whole, opened, apart=True)


def whole_digest(card: Card) -> str:
    """Of the network's files, as weights may lie beside the ONNX file, and of the size for which MNN prepares it."""
    files = [(r.file, r.sha256) for r in card.resources]
    return sha256(repr([files, card.input.size_px]).encode()).hexdigest()


def _version() -> str:
    return f"MNN {metadata.version('MNN')}"


def _cache(digest: str) -> Path:
    """What vouches, as JSON, for MNN's form of a network or part of one. That lies beside it.

    It is named after its own sha256: no two conversions give the same bytes, and two may go on at once.
    """
    root = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "wsiengine" / DEVICE
    return root / f"{sha256(f'{__version__} {_version()} {digest}'.encode()).hexdigest()[:32]}.json"


def _form(vouching: Path, facts: Mapping[str, Any]) -> Path:
    return vouching.with_name(f"{facts['sha256'][:32]}.mnn")


def _kept(digest: str) -> "Session | None":
    """What an earlier run converted, if it is whole."""
    vouching = _cache(digest)
    try:
        facts = json.loads(vouching.read_text(encoding="utf-8"))
        path = _form(vouching, facts)
        return Session(path, facts) if file_sha256(path) == facts["sha256"] else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _convert(card: Card, *outputs: str) -> None:
    """Have a child convert the network, or its parts for these ``outputs``, and compare it with ONNX Runtime; keep it.

    Each thread's session reads the file that is kept.
    """
    root = _cache("").parent
    try:
        root.mkdir(parents=True, exist_ok=True)
        folder = tempfile.TemporaryDirectory(dir=root)
    except OSError as error:
        raise ProviderError(
            f"{root} cannot be written ({error.strerror}), where MNN's form of {card.name} would be kept",
            hint="set XDG_CACHE_HOME to a folder that can be written, or use --device cpu",
        ) from error
    doing = f"converting {card.name} for MNN"
    with folder as name:
        described = Path(name) / "card"
        described.write_bytes(pickle.dumps(card))
        arguments = [str(described), name, *outputs]
        try:
            made = ask("wsiengine.models.converting", arguments, doing=doing, timeout_s=_SECONDS)
        except CardError as error:
            raise ProviderError(f"MNN cannot run {card.name}: {error.message}", hint="use --device cpu") from error
        for digest, facts in made.items():
            kept, vouching = _cache(digest), Path(name) / "facts"
            (Path(name) / f"{digest}.mnn").replace(_form(kept, facts))
            vouching.write_text(json.dumps(facts), encoding="utf-8")
            vouching.replace(kept)  # last: it vouches for the other


def _lost(card: Card) -> NoReturn:
    raise ProviderError(f"MNN's form of {card.name} was changed as soon as it was kept", hint="use --device cpu")


class Session:
    """A network in MNN, with those methods of ONNX Runtime's sessions that :class:`Runtime` calls. Thread-safe.

    Each call has one of MNN's own sessions to itself, made when no other is idle: as many as there are threads.

    Attributes:
        bytes_per_thread: Memory that a thread's session takes for weights.

    Args:
        path: In MNN's format.
        facts: Of the ONNX file it was made of: ``inputs`` and ``outputs``, each a list of (name, type, shape);
            ``usual``, the shapes of inputs that its ways of computing are chosen for.
    """

    def __init__(self, path: Path, facts: dict[str, Any]) -> None:
        self._path, self._facts = path, facts
        self.bytes_per_thread = _COPIES * path.stat().st_size
        self._idle = [_One(path, facts["usual"])]

    def rest(self) -> None:
        """Give back the memory that no call is using: the next one opens MNN's session anew."""
        self._idle.clear()

    def get_inputs(self) -> list[Any]:
        return [SimpleNamespace(name=n, type=kind, shape=shape) for n, kind, shape in self._facts["inputs"]]

    def get_outputs(self) -> list[Any]:
        return [SimpleNamespace(name=n, type=kind, shape=shape) for n, kind, shape in self._facts["outputs"]]

    def get_providers(self) -> list[str]:
        return [_version()]

    def run(self, names: Sequence[str], given: Mapping[str, np.ndarray]) -> list[np.ndarray]:
        """The outputs ``names``, float32.

        Raises:
            RuntimeError: MNN failed.
        """
        try:
            one = self._idle.pop()  # both ends are atomic
        except IndexError:
            one = _One(self._path, self._facts["usual"])
        try:
            return one.run(names, given)
        finally:
            self._idle.append(one)


class _One:
    """One of MNN's sessions, for one thread at a time. Those of one interpreter would wait for each other.

    MNN chooses for each convolution how it is computed when it first sees the sizes of the inputs, and stays with it,
    whatever follows: all are shown the ``usual`` sizes first, so that a score does not depend on which came before.
    """

    def __init__(self, path: Path, usual: Mapping[str, Sequence[int]]) -> None:
        self._mnn = import_mnn()
        try:
            self._network = self._mnn.Interpreter(str(path))
            # "normal" is float32 on any processor; "high" is the same and prints a line
            self._session = self._network.createSession({"backend": "CPU", "numThread": 1, "precision": "normal"})
        except Exception as error:  # MNN knows no other kind
            raise RuntimeError(f"MNN cannot load the model: {error}") from error
        self._inputs = self._network.getSessionInputAll(self._session)
        self._outputs = self._network.getSessionOutputAll(self._session)
        self._shapes: dict[str, tuple[int, ...]] = {}
        self._resize({name: tuple(shape) for name, shape in usual.items()})

    def run(self, names: Sequence[str], given: Mapping[str, np.ndarray]) -> list[np.ndarray]:
        mnn, order = self._mnn, self._mnn.Tensor_DimensionType_Caffe  # plain C order, whatever MNN's own layout
        self._resize({name: array.shape for name, array in given.items()})
        for name, array in given.items():
            kind = mnn.Halide_Type_Uint8 if array.dtype == np.uint8 else mnn.Halide_Type_Float
            self._inputs[name].copyFrom(mnn.Tensor(array.shape, kind, np.ascontiguousarray(array), order))
        code = self._network.runSession(self._session)
        if code:
            raise RuntimeError(f"error {code} of MNN's")
        found = []
        for name in names:
            host = mnn.Tensor(self._outputs[name], order)
            if not self._outputs[name].copyToHostTensor(host):
                raise RuntimeError(f"MNN gives no output {name}")
            found.append(np.array(host.getNumpyData(), np.float32).reshape(host.getShape()))
        return found

    def _resize(self, shapes: dict[str, tuple[int, ...]]) -> None:
        if shapes == self._shapes:
            return
        self._shapes = {}
        for name, shape in shapes.items():
            self._network.resizeTensor(self._inputs[name], shape)
        self._network.resizeSession(self._session)
        self._shapes = shapes


@contextmanager
def _silent() -> Iterator[None]:
    """Standard output away, for C++ too: it holds what the user asked for, and nothing else."""
    sys.stdout.flush()
    kept, nowhere = os.dup(1), os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(nowhere, 1)
        yield
        with suppress(OSError, AttributeError, TypeError):
            ctypes.CDLL(None).fflush(None)
    finally:
        os.dup2(kept, 1)
        os.close(kept)
        os.close(nowhere)
