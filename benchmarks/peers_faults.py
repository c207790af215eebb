"""What other tools do where something goes wrong, beside what is done here: the table of docs/reliability.md.

    python benchmarks/peers_faults.py --wsinfer-python ~/wsinfer/bin/python [--tiatoolbox-python ~/tia/bin/python]

Nothing is installed (``peer_tools.py`` says what the other tools need). Each tool runs ResNet-18 over a small mosaic;
something happens to it or to the slide, and then the same command runs again with nothing in its way. Told are the
exit codes of both, the tiles in the results after both (``–``: the tool wrote none), and the last line that it printed.
``--case`` takes one case, ``--tool`` one tool.
"""

import argparse
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "kernels")]
from benchmarks.engine import make_slide  # noqa: E402
from benchmarks.networks import make  # noqa: E402
from benchmarks.peer_tools import MPP, Peer, environment, tiles_in  # noqa: E402

_GPX = 0.02
_FILE_BYTES = 2048  # where files may not grow further


@dataclass(frozen=True)
class Ran:
    """A command that has ended: its exit code, the last line that it printed, and the tiles in its results."""

    code: int
    last: str
    tiles: int

    def __str__(self) -> str:
        return f"exit {self.code}, {self.tiles or '–'} tiles"


@dataclass(frozen=True)
class Tool:
    """``wsiengine`` or a peer, ready to run over the slides of a folder."""

    name: str
    model: Path
    home: Path
    peer: Peer | None

    def start(
        self, slides: Sequence[Path], out: Path, overlap: float = 0.0, **how: object
    ) -> "subprocess.Popen[bytes]":
        if self.peer is not None:
            command, own = self.peer.command(self.model, slides, out, overlap, 1), environment(self.home)
        else:
            command = [sys.executable, "-m", "wsiengine", "infer", *map(str, slides), "-m", str(self.model)]
            command += ["-o", str(out), "--overlap", str(overlap)]
            own = {**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'kernels'}"}
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
        return subprocess.Popen(command, env=own, **pipes, **how)  # type: ignore[call-overload,no-any-return]

    def run(self, slides: Sequence[Path], out: Path, overlap: float = 0.0, **how: object) -> Ran:
        return self.ended(self.start(slides, out, overlap, **how), out)

    def ended(self, process: "subprocess.Popen[bytes]", out: Path) -> Ran:
        said = process.communicate()[0].decode(errors="replace").replace("\r", "\n")
        lines = [line for line in said.splitlines() if line.strip()]
        return Ran(process.returncode, lines[-1].strip() if lines else "", self.tiles(out))

    def tiles(self, out: Path) -> int:
        """Tiles in results that the tool takes for finished."""
        if self.peer is not None:
            return tiles_in(out)
        return sum(int(json.loads(p.read_text())["summary"]["tiles"]) for p in out.rglob("run.json"))


@dataclass(frozen=True)
class Ground:
    """A sound slide in a folder of its own, and room for a case."""

    slide: Path
    folder: Path

    def slides(self, **changed: Callable[[bytes], bytes]) -> list[Path]:
        """Copies by name, in a fresh folder, each with its change."""
        place = self.folder / "in"
        shutil.rmtree(place, ignore_errors=True)
        shutil.rmtree(self.folder / "out", ignore_errors=True)
        place.mkdir()
        data = self.slide.read_bytes()
        for name, change in changed.items():
            (place / f"{name}.svs").write_bytes(change(data))
        return sorted(place.iterdir())

    @property
    def out(self) -> Path:
        return self.folder / "out"


def _same(data: bytes) -> bytes:
    return data


def _hole(data: bytes) -> bytes:
    """Bytes of a JPEG tile in the middle of level 0 overwritten."""
    import io

    import tifffile

    with tifffile.TiffFile(io.BytesIO(data)) as tiff:
        page = tiff.pages[0]
        middle = len(page.dataoffsets) // 2  # type: ignore[union-attr]
        at, size = page.dataoffsets[middle], page.databytecounts[middle]  # type: ignore[union-attr]
    return data[:at] + bytes(size) + data[at + size :]


def _nameless(data: bytes) -> bytes:
    """The same slide without its µm/px and its magnification; its resolution is of no unit."""
    import io

    import tifffile

    file = io.BytesIO(data.replace(b"MPP =", b"XXX =").replace(b"AppMag =", b"XxxXxx ="))
    with tifffile.TiffFile(file, mode="r+") as tiff:
        for page in tiff.pages:
            if unit := page.tags.get("ResolutionUnit"):  # type: ignore[union-attr]
                unit.overwrite(1)
    return file.getvalue()


def killed(tool: Tool, ground: Ground, usual_s: float) -> list[Ran]:
    """``kill -9`` after half of the usual time; the processes that it started with it."""
    slides = ground.slides(a=_same)
    process = tool.start(slides, ground.out, start_new_session=True)
    time.sleep(usual_s / 2)
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    return [tool.ended(process, ground.out), tool.run(slides, ground.out)]


def half_written(tool: Tool, ground: Ground, usual_s: float) -> list[Ran]:
    """The largest file of the results lost its second half, as after a power cut."""
    slides = ground.slides(a=_same)
    first = tool.run(slides, ground.out)
    largest = max(
        (p for p in ground.out.rglob("*") if p.is_file()), key=lambda p: ("csv" in p.suffix, p.stat().st_size)
    )
    os.truncate(largest, largest.stat().st_size // 2)
    return [first, tool.run(slides, ground.out)]


def damaged_tile(tool: Tool, ground: Ground, usual_s: float) -> list[Ran]:
    """Of two slides the first has a JPEG tile that cannot be decoded."""
    slides = ground.slides(a=_hole, b=_same)
    return [tool.run(slides, ground.out), tool.run(slides, ground.out)]


def two_of_three_bad(tool: Tool, ground: Ground, usual_s: float) -> list[Ran]:
    """A slide that is cut short, one that is no slide, a sound one."""
    slides = ground.slides(a=lambda data: data[:3000], b=lambda _: b"no slide", c=_same)
    return [tool.run(slides, ground.out), tool.run(slides, ground.out)]


def no_mpp(tool: Tool, ground: Ground, usual_s: float) -> list[Ran]:
    """A slide that does not say how large its pixels are."""
    return [tool.run(ground.slides(a=_nameless), ground.out)]


def other_overlap(tool: Tool, ground: Ground, usual_s: float) -> list[Ran]:
    """Without overlap, then with 50 % into the same folder."""
    slides = ground.slides(a=_same)
    return [tool.run(slides, ground.out), tool.run(slides, ground.out, 0.5)]


def disk_full(tool: Tool, ground: Ground, usual_s: float) -> list[Ran]:
    """No file may grow beyond 2 KiB, as on a full disk; then they may."""

    def small() -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (_FILE_BYTES, _FILE_BYTES))

    slides = ground.slides(a=_same)
    return [tool.run(slides, ground.out, preexec_fn=small), tool.run(slides, ground.out)]


CASES = {
    "killed half-way": killed,
    "half-written result": half_written,
    "damaged JPEG tile in one of two": damaged_tile,
    "two of three slides bad": two_of_three_bad,
    "no µm/px": no_mpp,
    "another overlap, same folder": other_overlap,
    "disk full": disk_full,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--wsinfer-python", help="Python of the environment that holds WSInfer")
    parser.add_argument("--tiatoolbox-python", help="Python of the environment that holds TIAToolbox")
    parser.add_argument("--case", action="append", choices=CASES, help="default: all")
    parser.add_argument("--tool", action="append", help="wsiengine, WSInfer, TIAToolbox; default: all that there are")
    parser.add_argument("--gpx", type=float, default=_GPX, help="pixels of the mosaic, in 10⁹")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        (folder / "sound").mkdir()
        make_slide(folder / "sound" / "a.svs", options.gpx)
        ground, model = Ground(folder / "sound" / "a.svs", folder), make("resnet18", folder / "resnet18", mpp=MPP)
        pythons = {"WSInfer": options.wsinfer_python, "TIAToolbox": options.tiatoolbox_python}
        found: list[Peer | None] = [None, *(Peer(name, python) for name, python in pythons.items() if python)]
        tools = [Tool(peer.name if peer else "wsiengine", model, folder, peer) for peer in found]
        print("| case | tool | disturbed | the same command again | last words |\n|---|---|---|---|---|")
        for tool in [tool for tool in tools if tool.name in (options.tool or [t.name for t in tools])]:
            if tool.peer is not None:
                tool.peer.prepare(model)
            _cases(tool, ground, options.case or list(CASES))


def _cases(tool: Tool, ground: Ground, names: Sequence[str]) -> None:
    started = time.perf_counter()
    usual = tool.run(ground.slides(a=_same), ground.out)
    usual_s = time.perf_counter() - started
    print(f"| undisturbed | {tool.name} | {usual} | {usual_s:.0f} s | {_cell(usual.last)} |", flush=True)
    for name in names:
        first, *again = CASES[name](tool, ground, usual_s)
        print(f"| {name} | {tool.name} | {first} | {again[0] if again else '–'} | {_cell(first.last)} |", flush=True)


def _cell(words: str) -> str:
    return words.replace("|", "/")[:160]


if __name__ == "__main__":
    main()
