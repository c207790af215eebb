"""The one JIT flavour of all kernels: no GIL, cached, no threads of its own, IEEE arithmetic as written.

``fastmath`` stays off: reassociated sums would make a pixel's value depend on where a block was cut.

Compiled code is kept in one folder per state of these sources (numba looks at a kernel's own file only, so a
changed helper in another file would go unnoticed): under ``NUMBA_CACHE_DIR`` if set, else the user's cache folder,
else a private folder among the temporary files; where nothing can be written, kernels are compiled anew in each
process. Numba itself keeps the code for different CPUs apart.
"""

import hashlib
import logging
import os
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path
from typing import Any

import numba
from numba import types
from numba.core import config as _config
from numba.core.runtime import rtsys

config: Any = _config  # its members are made at run time
JIT_OFF = bool(config.DISABLE_JIT)
_log = logging.getLogger("wsikernels")


def given(dtype: types.Type, ndim: int) -> types.Array:
    """The type of a contiguous array that a kernel only reads: takes read-only and writable arrays alike."""
    return types.Array(dtype, ndim, "C", readonly=True)


def made(dtype: types.Type, ndim: int) -> types.Array:
    """The type of a contiguous array that a kernel writes."""
    return types.Array(dtype, ndim, "C")


def jit(signature: tuple | None = None, *, inline: bool = False) -> Callable[[Callable], Any]:
    """Compile a kernel: with a ``signature`` when its module is imported, without one on the first call.

    Args:
        signature: Types of the arguments, for the kernels that every run needs.
        inline: Let LLVM take the function into its callers (small helpers inside hot loops).
    """

    def decorate(function: Callable) -> Any:
        if JIT_OFF:
            return function
        folder = cache_folder()
        if signature is not None:
            _announce_compilation()
        with _numba_cache(folder):
            kernel: Any = numba.njit(nogil=True, cache=folder is not None, forceinline=inline)(function)
        kernel._cache = _Forgiving(kernel._cache)
        if signature is not None:
            kernel.compile(signature)
            kernel.disable_compile()
        return kernel

    return decorate


class _Forgiving:
    """Numba's cache of one kernel, on a disk that may be full, or may have lost power while the cache was written.

    What cannot be kept, or cannot be read back, is compiled again: compiled code is worth 20 s, never an error. What is
    read back is all that is loaded: numba by itself would first import whatever it could compile with, scipy's linear
    algebra included (0.4 s of each process). It still does so where there is anything to compile.
    """

    def __init__(self, cache: Any) -> None:
        self._cache = cache

    def __getattr__(self, name: str) -> Any:
        return getattr(self._cache, name)

    def load_overload(self, signature: Any, target_context: Any) -> Any:
        load = getattr(self._cache, "_load_overload", None)
        try:
            if load is None:  # of another Numba
                return self._cache.load_overload(signature, target_context)
            rtsys.initialize(target_context)  # what compiled code calls to allocate
            with self._cache._guard_against_spurious_io_errors():
                return load(signature, target_context)
        except Exception:  # damaged pickles raise anything
            self._forget()
            return None

    def save_overload(self, signature: Any, compiled: Any) -> None:
        with suppress(OSError):
            self._cache.save_overload(signature, compiled)

    def _forget(self) -> None:
        with suppress(OSError):
            self._cache.flush()


@cache
def cache_folder() -> Path | None:
    """The folder of compiled code, made if need be; None where no folder can be written."""
    digest = hashlib.sha256()
    for source in sorted(Path(__file__).parent.glob("*.py")):
        digest.update(source.read_bytes())
    name = f"wsikernels-{digest.hexdigest()[:16]}"
    return next((folder for parent in _parents() if (folder := _make_private(parent / name))), None)


def _parents() -> Iterator[Path]:
    if config.CACHE_DIR:
        yield Path(config.CACHE_DIR)
    home = os.environ.get("LOCALAPPDATA") or os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")  # noqa: PTH111
    yield Path(home) / "wsiengine"
    yield Path(tempfile.gettempdir()) / f"wsiengine-{os.getuid() if hasattr(os, 'getuid') else 'cache'}"


def _make_private(folder: Path) -> Path | None:
    """``folder``, if it is ours alone and writable: numba's cache holds pickles, so nobody else may write there."""
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        for place in (folder, folder.parent):
            if hasattr(os, "getuid") and place.stat().st_uid not in (os.getuid(), 0):
                return None
        with tempfile.TemporaryFile(dir=folder):
            return folder
    except OSError:
        return None


@contextmanager
def _numba_cache(folder: Path | None) -> Iterator[None]:
    """Point numba's cache at ``folder`` while a function is decorated, and leave other packages' settings alone."""
    before = config.CACHE_DIR
    config.CACHE_DIR = str(folder or "")
    try:
        yield
    finally:
        config.CACHE_DIR = before


@cache
def _announce_compilation() -> None:
    folder = cache_folder()
    if folder is None:
        _log.warning("No folder for compiled code can be written: the pixel kernels are compiled anew (about 20 s).")
    elif not any(folder.glob("**/*.nbi")):
        _log.warning("Compiling the pixel kernels, once for this machine (about 20 s).")
