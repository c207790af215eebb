"""``wsiengine doctor``: what this installation can do, and what is wrong with it."""

import argparse
import json
import platform
from dataclasses import asdict
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from wsiengine.models.comparing import Comparison
    from wsiengine.models.pacing import Pace

_PACKAGES = [
    "numpy",
    "numba",
    "scipy",
    "dask",
    "zarr",
    "openslide-python",
    "openslide-bin",
    "tiffslide",
    "tifffile",
    "imagecodecs",
    "opencv-python-headless",
    "shapely",
    "geojson",
    "distributed",
    "MNN",
    "torch",
]
_EXTRAS = ("torch", "distributed", "MNN")  # nothing is missing without them


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--check", metavar="MODEL", help="compare all devices and number formats on this model")
    parser.add_argument("--speed", metavar="MODEL", help="how many tiles/s each of them runs of this model")
    parser.add_argument("--json", action="store_true", help="print as JSON")


def run(args: argparse.Namespace) -> int:
    if args.check:
        return _check(args.check, as_json=args.json)
    if args.speed:
        return _speed(args.speed, as_json=args.json)
    facts = examine()
    if args.json:
        print(json.dumps(facts, indent=2, ensure_ascii=False))
    else:
        for label, text in _lines(facts):
            print(f"{label:<12}{text}")
    return 1 if facts["problems"] else 0


def _check(model: str, *, as_json: bool) -> int:
    """Every way of running a model against the reference → 1 where any differs by more than it may."""
    from wsiengine.models.comparing import Comparison, compare
    from wsiengine.models.registry import load_model

    found: list[Comparison] = []
    card = load_model(model)
    for one in compare(card):
        found.append(one)
        if not as_json:
            print(f"{one.way:<22}{_verdict(one)}", flush=True)
    if as_json:
        ways = [{**asdict(one), "faulty": one.faulty} for one in found]
        print(json.dumps({"model": card.name, "version": card.version, "ways": ways}, indent=2, ensure_ascii=False))
    return 1 if any(one.faulty for one in found) else 0


def _verdict(one: "Comparison") -> str:
    if one.difference is None:
        return one.chosen
    allowed = f", allowed {one.tolerance:g}" if one.tolerance else ", must be none"
    word = "DIFFERS" if one.faulty else "agrees"
    return f"{word}: largest difference {one.difference:.2g}{allowed} · {one.chosen}"


def _speed(model: str, *, as_json: bool) -> int:
    """Tiles/s of the model alone in every way that this machine has."""
    from wsiengine.machine import usable_cores
    from wsiengine.models.pacing import Pace, fastest, paces
    from wsiengine.models.registry import load_model

    card, threads = load_model(model), usable_cores()
    found: list[Pace] = []
    if not as_json:
        side = f"{card.input.size_px} px"
        print(f"{card.name} {card.version}: the model alone, drawn tiles of {side}, {threads} threads, 2 s each")
    for one in paces(card, threads=threads):
        known = any(one.chosen == other.chosen for other in found if other.tiles_per_s is None)
        found.append(one)
        if not as_json and not known:  # a device that is missing, in its other formats
            print(f"{f'{one.device}, {one.precision}':<16}{_pace(one, found[0])}", flush=True)
    best = fastest(found)
    if as_json:
        facts = {"model": card.name, "version": card.version, "threads": threads}
        print(json.dumps(facts | {"ways": [asdict(one) for one in found]}, indent=2, ensure_ascii=False))
    elif best:
        print(f"{'fastest':<16}--device {best.device} --precision {best.precision}")
    return 0


def _pace(one: "Pace", first: "Pace") -> str:
    if one.tiles_per_s is None:
        return one.chosen
    times = f"{one.tiles_per_s / (first.tiles_per_s or one.tiles_per_s):.2f}×"
    doubt = "" if one.faithful else " · answers differ more than --precision auto allows"
    return f"{one.tiles_per_s:8,.1f} tiles/s  {times:>6}  {one.chosen}{doubt}"


def examine() -> dict[str, Any]:
    """Versions, devices, threads, caches and problems as JSON."""
    from wsiengine import __version__
    from wsiengine.machine import usable_cores
    from wsiengine.models.ort import providers
    from wsiengine.models.registry import config_dir, list_models

    runtime = providers()
    problems = [runtime["problem"]] if runtime["problem"] else []
    models = list_models()
    problems += [f"model {entry.name}: {entry.problem}" for entry in models if entry.problem]
    return {
        "wsiengine": __version__,
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}",
        "threads": usable_cores(),
        "onnxruntime": runtime["version"],
        "providers": runtime["providers"],
        "device": _device(problems),
        "packages": {name: _version(name) for name in _PACKAGES},
        "models": [entry.name for entry in models],
        "kernel_cache": _kernel_cache(),
        "config": str(config_dir()),
        "problems": problems,
    }


def _device(problems: list[str]) -> str | None:
    """What ``--device auto`` gets on this machine: told by a session, not by a list of names."""
    from wsiengine.errors import WsiError
    from wsiengine.models.registry import load_model
    from wsiengine.models.runtime import Runtime

    try:
        return Runtime(load_model("planted"), device="auto").chosen
    except WsiError as error:
        problems.append(error.message)
        return None


def _kernel_cache() -> str:
    from wsikernels._jit import cache_folder

    folder = cache_folder()
    return str(folder) if folder else "nowhere: no folder can be written, kernels are compiled anew each time"


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def _lines(facts: dict[str, Any]) -> list[tuple[str, str]]:
    packages = " · ".join(f"{name} {found}" for name, found in facts["packages"].items() if found)
    missing = [name for name, found in facts["packages"].items() if not found and name not in _EXTRAS]
    lines = [
        ("wsiengine", f"{facts['wsiengine']} · Python {facts['python']} · {facts['system']}"),
        ("device", facts["device"] or "none"),
        ("providers", ", ".join(facts["providers"]) or "none"),
        ("threads", str(facts["threads"])),
        ("models", ", ".join(facts["models"])),
        ("packages", packages),
        ("kernels", f"{facts['kernel_cache']}"),
        ("config", facts["config"]),
    ]
    lines += [("missing", name) for name in missing]
    lines += [("problem", text) for text in facts["problems"]] or [("problem", "none")]
    return lines
