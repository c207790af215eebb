"""A detector's run beside its sessions alone: tiles/s, their ratio, and what either was spent on.

``python benchmarks/detect.py pace SLIDE --model M`` (see :mod:`benchmarks.detect`). The floor is what the run asks of
ONNX Runtime and nothing else: the detector on each tile and, of a model with two stages, the classifier and its head
on as many crops as the run classified. Its inputs are the run's own, cut out of tiles spread over the slide by the
run's own code and in memory beforehand; they go through the sessions call by call, as in a run, in as many threads.
Floor and engine take turns, each in a fresh process. The engine's ratio is told for the blocks alone and for all of
``infer``, from opening the slide to the last file; and once more for some blocks and their own calls in turns.
"""

import json
import math
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.engine import in_turns

_RECORDED_TILES = 60  # spread over the slide; their crops are the floor's, taken in turns
_PAIRED_TILES = 36
_OPTIONS: dict[str, Any] = {"device": "cpu", "tissue": "none"}

Call = Callable[[], Any]


@dataclass(frozen=True, slots=True)
class Asked:
    """What one tile asked of the sessions: a call of the detector, and one list of calls for each crop."""

    first: Call
    crops: list[list[Call]]


def pace(slide: str, model: str, threads: int, *, repeats: int = 3, first_stage: bool = False) -> dict[str, Any]:
    """Floor and engine in turns → rates, ratios, and the middle run's stages."""
    with tempfile.TemporaryDirectory() as scratch:
        model = str(without_second(model, Path(scratch))) if first_stage else model
        first = _alone("engine", slide, model, threads)  # compiles, fills the page cache; not counted
        counts = (first["tiles"], first["crops"])
        floors, runs = [_alone("floor", slide, model, threads, counts)], []
        for _ in range(repeats):
            runs.append(_alone("engine", slide, model, threads))
            floors.append(_alone("floor", slide, model, threads, counts))
        pairs = _alone("paired", slide, model, threads)
    return _report(counts, runs, floors) | pairs


def _report(counts: tuple[int, int], runs: list[dict[str, Any]], floors: list[dict[str, Any]]) -> dict[str, Any]:
    """Each run is compared with the floors before and after it; medians."""
    tiles, crops = counts

    def ratio(of_run: str, of_floor: str) -> float:
        around = zip(runs, floors, floors[1:], strict=False)  # one floor more than runs
        return round(statistics.median((a[of_floor] + b[of_floor]) / 2 / r[of_run] for r, a, b in around), 3)

    middle = sorted(runs, key=lambda run: run["wall_s"])[len(runs) // 2]
    floor_s = statistics.median(floor["wall_s"] for floor in floors)
    return {
        "tiles": tiles,
        "crops": crops,
        "objects": middle["objects"],
        "model_alone_tiles_per_s": round(tiles / floor_s, 2),
        "model_alone_ms": {name: floors[0][name] for name in ("tile_ms", "crop_ms")},
        "blocks_tiles_per_s": round(tiles / middle["blocks_s"], 2),
        "whole_run_tiles_per_s": round(tiles / middle["wall_s"], 2),
        "ratio_blocks": ratio("blocks_s", "wall_s"),
        "ratio_whole_run": ratio("wall_s", "wall_s"),
        "ratio_whole_run_cpu": ratio("cpu_s", "cpu_s"),
        "stages_s": {name: round(seconds, 2) for name, seconds in middle["stages_s"].items()},
    }


def engine(slide: str, model: str, threads: int) -> dict[str, Any]:
    """One whole run, with the crops that it classified counted."""
    import wsiengine.tasks.detection as detection
    from wsiengine import infer

    crops: list[int] = []
    original = detection.second_stage

    def counted(runtime: Any, tile: np.ndarray, boxes: np.ndarray) -> np.ndarray:
        crops.append(len(boxes))
        return original(runtime, tile, boxes)

    detection.second_stage = counted
    try:
        with tempfile.TemporaryDirectory() as folder:
            wall, cpu = time.perf_counter(), time.process_time()
            result = infer(slide, model, Path(folder) / "out", threads=threads, **_OPTIONS)
            wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
    finally:
        detection.second_stage = original
    stages = result.run["timing"]["stages_s"]
    return {
        "tiles": result.summary["tiles"],
        "crops": sum(crops),
        "objects": result.summary["objects"],
        "wall_s": wall,
        "cpu_s": cpu,
        "blocks_s": stages["run (wall)"],
        "stages_s": stages,
    }


def floor(slide: str, model: str, threads: int, counts: tuple[int, int]) -> dict[str, Any]:
    """The sessions alone: as many tiles, then as many crops."""
    asked = recorded(slide, model)
    firsts = [[one.first] for one in asked]
    crops = [calls for one in asked for calls in one.crops]
    in_turns([*firsts[:2], *crops[:2]], 4, threads)  # warm
    cpu = time.process_time()
    first_s, _ = in_turns(firsts, counts[0], threads)
    crops_s, _ = in_turns(crops, counts[1], threads) if counts[1] else (0.0, 0.0)
    return {
        "wall_s": first_s + crops_s,
        "cpu_s": time.process_time() - cpu,
        "tile_ms": round(1e3 * first_s / counts[0], 2),
        "crop_ms": round(1e3 * crops_s / counts[1], 3) if counts[1] else None,
    }


def recorded(slide: str, model: str) -> list[Asked]:
    """What tiles spread over the slide ask of the sessions."""
    from wsiengine.geometry import Box
    from wsiengine.grid import Block

    plan = _planned(slide, model)
    wanted = np.argwhere(plan.wanted)
    chosen = wanted[:: math.ceil(len(wanted) / _RECORDED_TILES)].tolist()
    blocks = [Block(Box(row, col, row + 1, col + 1), np.ones((1, 1), bool)) for row, col in chosen]
    return [one for block in blocks for one in _noted(plan, block)]


def paired(slide: str, model: str) -> dict[str, Any]:
    """Neighbouring blocks of the run, each followed by its own session calls, in one thread → CPU ms a tile of both.

    What else a machine does slows both alike, so that this ratio hardly depends on it.
    """
    from wsiengine.job import score_block

    plan = _planned(slide, model)
    every = list(plan.blocks())
    first, across = len(every) // 3, math.ceil(plan.grid.cols.count / plan.block_tiles)
    blocks = every[first : first + max(2, _PAIRED_TILES // max(1, every[first].tile_count))]
    asked = [_noted(plan, block) for block in blocks]
    fresh = _planned(slide, model)  # no file tile of these blocks is decoded yet, only those of the blocks before
    for block in every[max(0, first - across) : first]:
        fresh.job.slide.read(block.box_px(fresh.grid), fresh.lattice.mpp)
    engine_s = sessions_s = 0.0
    for block, tiles in zip(blocks, asked, strict=True):
        started = time.process_time()
        score_block(fresh.job, block)
        scored = time.process_time()
        for call in (call for one in tiles for call in (one.first, *(c for crop in one.crops for c in crop))):
            call()
        engine_s, sessions_s = engine_s + scored - started, sessions_s + time.process_time() - scored
    count = sum(map(len, asked))
    return {
        "paired_tiles": count,
        "engine_cpu_ms_per_tile": round(1e3 * engine_s / count, 2),
        "sessions_cpu_ms_per_tile": round(1e3 * sessions_s / count, 2),
        "ratio_blocks_cpu": round(sessions_s / engine_s, 3),
    }


def _planned(slide: str, model: str) -> Any:
    import wsiengine

    plan = wsiengine.plan(slide, model, threads=1, **_OPTIONS)
    if plan.job is None:
        raise SystemExit("no job")
    return plan


def _noted(plan: Any, block: Any) -> list[Asked]:
    """What each tile of a block asks of the sessions, noted while the engine's own code scores it."""
    from wsiengine.job import score_block

    runtime, second = plan.job.runtime, plan.card.second
    run, run_other = runtime._run, runtime.run_other
    asked: list[Asked] = []

    def note_first(batch: np.ndarray, names: list[str] | None = None) -> list[np.ndarray]:
        kept = _copied(batch)
        asked.append(Asked(lambda: run(kept, names), []))
        return run(batch, names)

    def note_other(file: str, batch: np.ndarray, names: list[str]) -> list[np.ndarray]:
        kept = _copied(batch)
        if second is not None and file == second.file:
            asked[-1].crops.append([])
        asked[-1].crops[-1].append(lambda: run_other(file, kept, names))
        return run_other(file, batch, names)

    runtime._run, runtime.run_other = note_first, note_other
    try:
        score_block(plan.job, block)
    finally:
        del runtime._run, runtime.run_other  # the class's own again
    return asked


def _copied(batch: np.ndarray) -> np.ndarray:
    from wsiengine.models.packing import aligned

    kept = aligned(batch.shape, batch.dtype)
    kept[...] = batch
    return kept


def without_second(model: str, folder: Path) -> Path:
    """A copy of a model in ``folder`` that is its detector alone."""
    from wsiengine.models.registry import load_model

    card = load_model(model)
    facts = json.loads((card.folder / "card.json").read_text(encoding="utf-8"))
    facts.pop("second", None)
    (folder / card.model_path.name).write_bytes(card.model_path.read_bytes())
    facts["resources"] = [entry for entry in facts["resources"] if entry["file"] == card.model_path.name]
    facts["name"] += "-first-stage"
    (folder / "card.json").write_text(json.dumps(facts), encoding="utf-8")
    return folder


def _alone(part: str, slide: str, model: str, threads: int, counts: tuple[int, int] = (0, 0)) -> dict[str, Any]:
    """One measurement in a fresh process."""
    command = [sys.executable, __file__, part, slide, model, str(threads), *map(str, counts)]
    done = subprocess.run(command, stdout=subprocess.PIPE, check=True, text=True)
    return dict(json.loads(done.stdout.splitlines()[-1]))


def _part() -> None:
    """The child of :func:`_alone`."""
    part, slide, model, *numbers = sys.argv[1:]
    threads, tiles, crops = map(int, numbers)
    if part == "paired":
        facts = paired(slide, model)
    else:
        facts = engine(slide, model, threads) if part == "engine" else floor(slide, model, threads, (tiles, crops))
    print(json.dumps(facts))


if __name__ == "__main__":
    _part()
