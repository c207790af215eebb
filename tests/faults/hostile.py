"""One hostile file through each reader, in a child with little memory and little time.

The child answers with one byte per reader; what it does not answer (a crash of the interpreter, a time-out, memory
above the limit) is told by how it ended.
"""

import gc
import mmap
import os
import resource
import signal
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from tests.faults.mutants import Mutant, Original, touches_geometry
from tests.faults.runs import fork
from wsiengine.errors import SlideError, WsiError
from wsiengine.geometry import Box, Size
from wsiengine.slides import open_slide

READERS = (None, "direct", "openslide", "flat", "tiffslide", "run")
MEMORY_BYTES = 1_500 << 20  # beside what is loaded
CPU_S = 15  # of the processor's time
WAIT_S = 60  # on a machine that others use too
_SAMPLE = 6  # file tiles compared, besides those touched
_WORDS = 4096

# what became of a file, per reader
UNTRIED, BUSY, REFUSED, READ, UNREADABLE, DIFFERENT, WRONG_SIZE, WRONG_PIXELS, NOT_IN_WORDS, MEMORY = range(10)
NAMES = (
    "untried",
    "crashed or hung",
    "refused in words",
    "read",
    "region refused in words",
    "other pixels in a touched tile",
    "WRONG GEOMETRY",
    "WRONG PIXELS",
    "ERROR NOT IN WORDS",
    "MEMORY",
)
BAD = {BUSY, WRONG_SIZE, WRONG_PIXELS, NOT_IN_WORDS, MEMORY}


@dataclass(frozen=True)
class Verdict:
    """What became of one mutant: an outcome per reader, how the child ended, and its last words."""

    outcomes: tuple[int, ...]
    ended: str
    words: str

    @property
    def good(self) -> bool:
        return self.ended == "well" and not BAD & set(self.outcomes)

    def __str__(self) -> str:
        told = ", ".join(f"{name}: {NAMES[o]}" for name, o in zip(READERS, self.outcomes, strict=True) if o != UNTRIED)
        return f"{told}; ended {self.ended}; {self.words}"


@dataclass(frozen=True)
class Sound:
    """What a reader says of the original: its size, and pixels of some file tiles. None where it refuses it."""

    size: Size
    tiles: dict[tuple[int, int], np.ndarray]


def sound(path: Path, original: Original, reader: str | None) -> Sound | None:
    """The original through one reader."""
    try:
        with open_slide(path, reader=reader) as slide:
            keys = sorted(original.tiles)[:: max(1, len(original.tiles) // 60)] or [(0, 0)]
            tiles = {key: slide.read_level(0, _tile_box(original, key, slide.info.size_l0)) for key in keys}
            return Sound(slide.info.size_l0, tiles)
    except SlideError:
        return None


def _tile_box(original: Original, key: tuple[int, int], size: Size) -> Box:
    if not original.tiles:
        return Box(0, 0, min(size.height, 512), min(size.width, 512))
    height, width = original.tile_px
    return Box.of(Size(height, width), key[0] * height, key[1] * width).intersect(Box.of(size))


def warm_up(path: Path) -> None:
    """Import and compile in this process what every child would else wait for."""
    _plan(path)


def examine(path: Path, original: Original, mutant: Mutant, known: dict[str | None, Sound | None]) -> Verdict:
    """Read the mutant (written at ``path``) with every reader, in a child of its own."""
    board = mmap.mmap(-1, len(READERS) + _WORDS)
    gc.disable()
    pid = fork(lambda: _child(path, original, mutant, known, board))
    gc.enable()
    ended = _await(pid)
    words = bytes(board[len(READERS) :]).split(b"\0")[0].decode(errors="replace")
    return Verdict(tuple(board[: len(READERS)]), ended, words)


def _await(pid: int) -> str:
    """How the child ended; it is ended where it uses no processor for so long. Time in which we were stopped, or did
    not get the processor ourselves, does not count."""
    waited, used, last = 0.0, 0, time.monotonic()
    while True:
        done, status = os.waitpid(pid, os.WNOHANG)
        if done:
            code = os.waitstatus_to_exitcode(status)
            return "well" if code == 0 else f"by signal {-code}" if code < 0 else f"with {code}"
        time.sleep(0.002)
        waited, last = waited + min(time.monotonic() - last, 0.02), time.monotonic()
        if waited > WAIT_S:
            if (now := _ticks(pid)) == used:
                break
            waited, used = 0.0, now  # slow on a crowded machine: CPU_S ends the busy
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    return f"by force after {WAIT_S} s"


def _ticks(pid: int) -> int:
    """Time of the processor that a process has used."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return int(fields[11]) + int(fields[12])


def _child(
    path: Path, original: Original, mutant: Mutant, known: dict[str | None, Sound | None], board: mmap.mmap
) -> None:
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    limit = pages * resource.getpagesize() + MEMORY_BYTES
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    resource.setrlimit(resource.RLIMIT_CPU, (CPU_S, CPU_S))  # a signal ends whoever needs more
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    for index, reader in enumerate(READERS):
        board[index] = BUSY
        try:
            board[index] = _look(path, original, mutant, reader, known)
        except WsiError as error:
            board[index] = REFUSED if isinstance(error, WsiError) and len(error.message) < 2000 else NOT_IN_WORDS
        except MemoryError as error:
            board[index] = MEMORY
            _tell(board, f"{reader}: {error!r}")
        except Exception as error:  # whatever is not said in words is what we look for
            board[index] = NOT_IN_WORDS
            _tell(board, f"{reader}: {error!r} in {_place(error)}")


def _look(
    path: Path, original: Original, mutant: Mutant, reader: str | None, known: dict[str | None, Sound | None]
) -> int:
    if reader == "run":
        return _plan(path)
    return _compare(path, original, mutant, reader, known[reader])


def _place(error: BaseException) -> str:
    trace, place = error.__traceback__, ""
    while trace is not None:
        name = trace.tb_frame.f_code.co_filename
        if "wsiengine/" in name:
            place = f"{name.rsplit('/', 1)[1]}:{trace.tb_lineno}"
        trace = trace.tb_next
    return place


def _tell(board: mmap.mmap, words: str) -> None:
    data = words.encode()[: _WORDS - 1]
    board[len(READERS) :] = data.ljust(_WORDS, b"\0")


def _plan(path: Path) -> int:
    """As far as a run goes before the first block: open, tissue, plan."""
    import wsiengine

    plan = wsiengine.plan(path, "planted", tissue="auto", mpp=0.5)
    return READ if plan.block_count else REFUSED


def _compare(path: Path, original: Original, mutant: Mutant, reader: str | None, sound: Sound | None) -> int:
    with open_slide(path, reader=reader) as slide:
        size = slide.info.size_l0
        slide.fingerprint()
        if any(level.size.area < 1 or min(level.downsample) < 1 for level in slide.info.levels):
            return WRONG_SIZE
        if sound is None or touches_geometry(original, mutant):
            return _read_some(slide, size)
        if size != sound.size:
            return WRONG_SIZE
        return max(_compare_tile(slide, original, mutant, key, sound) for key in _sample(original, mutant, sound))


def _read_some(slide, size: Size) -> int:  # type: ignore[no-untyped-def]
    """Any pixels, first and last, of a slide whose truth is not known."""
    for y, x in ((0, 0), (size.height - 300, size.width - 300), (size.height // 2, size.width // 2)):
        slide.read_level(0, Box(y, x, y + 300, x + 300))
    last = len(slide.info.levels) - 1
    slide.read_level(last, Box(0, 0, 300, 300))
    return READ


def _sample(original: Original, mutant: Mutant, sound: Sound) -> list[tuple[int, int]]:
    touched = [key for key in sound.tiles if key in original.tiles and mutant.touches(*original.tiles[key])]
    others = [key for key in sound.tiles if key not in touched]
    return touched[:_SAMPLE] + others[:: max(1, len(others) // _SAMPLE)]


def _compare_tile(slide, original: Original, mutant: Mutant, key: tuple[int, int], sound: Sound) -> int:  # type: ignore[no-untyped-def]
    touched = not original.tiles or mutant.structure or mutant.touches(*original.tiles[key])
    try:
        pixels = slide.read_level(0, _tile_box(original, key, sound.size))
    except SlideError:
        return UNREADABLE if touched else NOT_IN_WORDS
    if np.array_equal(pixels, sound.tiles[key]):
        return READ
    return DIFFERENT if touched else WRONG_PIXELS
