"""Readers that end or hold up their process, planted in children: what a fault in a C library would do."""

import json
import shutil
import subprocess
from pathlib import Path

from tests.faults.runs import COMMAND, contents, environment

# Planted in the children: reading level 0 of a slide ends or holds up the process, as a fault in a C library would.
FAULTS = """
import ctypes, importlib.util, os, signal, sys, time
seen = []
original = None
class Planting:  # once the module is loaded: the command itself never loads it
    def find_spec(self, name, path, target=None):
        if name != "wsiengine.slides.direct":
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        load = spec.loader.exec_module
        def exec_module(module):
            global original
            load(module)
            original, module.DirectReader.tiles = module.DirectReader.tiles, tiles
        spec.loader.exec_module = exec_module
        return spec
sys.meta_path.insert(0, Planting())
def tiles(self, level, box, parts=None):
    name = os.path.basename(self._source.path)
    if name.startswith("crash") and box.x0 > 600:
        ctypes.string_at(0)
    if name.startswith("once") and not os.path.exists(self._source.path + ".tried"):
        open(self._source.path + ".tried", "w").close()
        os.kill(os.getpid(), signal.SIGKILL)
    if name.startswith("after"):
        left = int(name[5:8]) - len(seen)
        seen.append(name)
        if left <= 0:
            ctypes.string_at(0)
    if name.startswith("hang"):
        time.sleep(600)
    if name.startswith("hold"):  # and the interpreter with it
        ctypes.PyDLL(None).sleep(600)
    return original(self, level, box, parts)
"""


def plant(folder: Path, faults: str = FAULTS) -> Path:
    """A folder that, on the path of a child, plants the faults there."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "sitecustomize.py").write_text(faults)
    return folder


def planted_environment(folder: Path) -> dict[str, str]:
    """Of a command whose child, too, finds what :func:`plant` wrote there."""
    return environment(PYTHONPATH=f"{folder}:{environment()['PYTHONPATH']}")


def crash_among_others(slide: Path, folder: Path, reads: int, wanted: dict[str, bytes]) -> tuple[bool, bool]:
    """Three slides, of which the second ends its process after that many reads, whenever it is tried.

    Where the second try gets to the end from the journal of the first, that slide too must be as if undisturbed.

    Returns:
        Whether the two others were finished, and the exit code told of the third; and whether every slide that was
        finished has the bytes of an undisturbed run.
    """
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    names = ["a", f"after{reads:03d}", "z"]
    for name in names:
        shutil.copyfile(slide, folder / f"{name}.svs")
    slides = [str(folder / f"{name}.svs") for name in names]
    done = subprocess.run(
        [*COMMAND, *slides, "-o", str(folder / "out"), "--json", "--threads", "1"],
        env=planted_environment(plant(folder / "site")),
        capture_output=True,
        text=True,
        check=False,
    )
    last = json.loads(done.stdout.splitlines()[-1])
    good = [slide["ok"] for slide in last["slides"]]
    told = good[0] and good[2] and done.returncode == (0 if all(good) else 1)
    finished = [name for name, ok in zip(names, good, strict=True) if ok]
    return told, all(contents(folder / "out" / name) == wanted for name in finished)
