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
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from hashlib import sha256
from importlib import metadata
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np

from wsiengine.errors import CardError, DependencyError, ProviderError
from wsiengine.models.card import Card
from wsiengine.models.child import ask
from wsiengine.models.integrity import file_sha256
from wsiengine.models.precision import REFERENCE

DEVICE = "mnn"
BATCH = 4  # one core, ResNet-18, ms per tile at 1, 2, 4 and 8: 32.4, 29.9, 27.8, 27.6
_COPIES = 6  # of the file, per session: itself, and the weights of Winograd's convolutions, four times as large
_SECONDS = 600.0


def import_mnn() -> Any:
    """The MNN module.

    Raises:
        DependencyError: It is not installed.
    """
    try:
        with _silent():  # it tells of ARM's instructions, on any machine
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
    version = metadata.version("MNN")
    key = sha256(repr([version, [(r.file, r.sha256) for r in card.resources]]).encode()).hexdigest()[:32]
    root = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "wsiengine" / DEVICE
    session = _kept(root, key, version) or _converted(card, root, key, version)
    return [session], f"MNN {version}, CPU (asked for)"


def _kept(root: Path, key: str, version: str) -> "Session | None":
    """What an earlier run converted, if it is whole."""
    try:
        facts = json.loads((root / f"{key}.json").read_text(encoding="utf-8"))
        path = root / f"{key}.mnn"
        return Session(path, facts, version) if file_sha256(path) == facts["sha256"] else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _converted(card: Card, root: Path, key: str, version: str) -> "Session":
    """Converted and compared with ONNX Runtime by a child, and kept: each thread's session reads the file."""
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
        made, described, vouching = (Path(name) / file for file in ("model.mnn", "card", "facts"))
        described.write_bytes(pickle.dumps(card))
        try:
            facts = ask("wsiengine.models.converting", [str(described), str(made)], doing=doing, timeout_s=_SECONDS)
        except CardError as error:
            raise ProviderError(f"MNN cannot run {card.name}: {error.message}", hint="use --device cpu") from error
        made.replace(root / f"{key}.mnn")
        vouching.write_text(json.dumps(facts), encoding="utf-8")
        vouching.replace(root / f"{key}.json")  # last: it vouches for the other
    return Session(root / f"{key}.mnn", facts, version)


class Session:
    """A network in MNN, with those methods of ONNX Runtime's sessions that :class:`Runtime` calls. Thread-safe.

    Each call has one of MNN's own sessions to itself, made when no other is idle: as many as there are threads.

    Attributes:
        bytes_per_thread: Memory that a thread's session takes for weights.

    Args:
        path: In MNN's format.
        facts: Of the ONNX file it was made of: ``inputs`` and ``outputs``, each a list of (name, type, shape).
        version: MNN's.
    """

    def __init__(self, path: Path, facts: dict[str, Any], version: str) -> None:
        self._path, self._facts, self._version = path, facts, version
        self.bytes_per_thread = _COPIES * path.stat().st_size
        self._idle = [_One(path)]

    def get_inputs(self) -> list[Any]:
        return [SimpleNamespace(name=n, type=kind, shape=shape) for n, kind, shape in self._facts["inputs"]]

    def get_outputs(self) -> list[Any]:
        return [SimpleNamespace(name=n, type=kind, shape=shape) for n, kind, shape in self._facts["outputs"]]

    def get_providers(self) -> list[str]:
        return [f"MNN {self._version}"]

    def run(self, names: list[str], given: dict[str, np.ndarray]) -> list[np.ndarray]:
        """The outputs ``names``, float32.

        Raises:
            RuntimeError: MNN failed.
        """
        (batch,) = given.values()
        try:
            one = self._idle.pop()  # both ends are atomic
        except IndexError:
            one = _One(self._path)
        try:
            return one.run(names, batch)
        finally:
            self._idle.append(one)


class _One:
    """One of MNN's sessions, for one thread at a time. Those of one interpreter would wait for each other."""

    def __init__(self, path: Path) -> None:
        self._mnn = import_mnn()
        try:
            self._network = self._mnn.Interpreter(str(path))
            # "normal" is float32 on any processor; "high" is the same and prints a line
            self._session = self._network.createSession({"backend": "CPU", "numThread": 1, "precision": "normal"})
        except Exception as error:  # MNN knows no other kind
            raise RuntimeError(f"MNN cannot load the model: {error}") from error
        self._input = self._network.getSessionInput(self._session)
        self._outputs = self._network.getSessionOutputAll(self._session)
        self._shape: tuple[int, ...] | None = None

    def run(self, names: list[str], batch: np.ndarray) -> list[np.ndarray]:
        if batch.shape != self._shape:
            self._shape = None
            self._network.resizeTensor(self._input, batch.shape)
            self._network.resizeSession(self._session)
            self._shape = batch.shape
        mnn = self._mnn
        kind = mnn.Halide_Type_Uint8 if batch.dtype == np.uint8 else mnn.Halide_Type_Float
        order = mnn.Tensor_DimensionType_Caffe  # plain C order, whatever the layout
        self._input.copyFrom(mnn.Tensor(batch.shape, kind, np.ascontiguousarray(batch), order))
        code = self._network.runSession(self._session)
        if code:
            raise RuntimeError(f"error {code} of MNN's")
        found = []
        for name in names:
            shape = tuple(self._outputs[name].getShape())
            host = mnn.Tensor(shape, mnn.Halide_Type_Float, np.zeros(shape, np.float32), order)
            if not self._outputs[name].copyToHostTensor(host):
                raise RuntimeError(f"MNN gives no output {name}")
            found.append(np.array(host.getNumpyData(), np.float32).reshape(shape))
        return found


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
