"""A model in further number formats: made, measured on held-out tissue, and written on its card.

For the bundled models::

    python -m wsiengine.training.precisions --model wsiengine/models/zoo/crc5 --data DIR --precision int8
"""

import argparse
import json
import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch

from wsiengine.errors import CardError, WsiError
from wsiengine.evaluating import field_tiles, score_images
from wsiengine.evaluation_report import Account, predicted, report
from wsiengine.models.card import Card, load_card, parse_card
from wsiengine.models.integrity import file_sha256
from wsiengine.models.parts import InputSpec
from wsiengine.models.precision import PRECISIONS, REFERENCE
from wsiengine.models.runtime import Runtime
from wsiengine.training.data import Field, check_leak, read_fields
from wsiengine.training.int8 import write_fp16, write_int8
from wsiengine.training.onnx_torch import simplified
from wsiengine.training.rounding import Rounded, Training

_TILES = 1600  # of the training side, in memory at once
_SPEED_TILES = 40


def add_precisions(
    folder: Path,
    wanted: Sequence[str],
    trained: Sequence[Field],
    held_out: Sequence[Field],
    *,
    how: Training | None = None,
    keep: bool = True,
    say: Callable[[str], None] = print,
) -> dict[str, dict[str, Any]]:
    """Make files of a model's network in other number formats, measure them, and name them on the card.

    Args:
        folder: The model's; its card is rewritten.
        wanted: ``int8``, ``fp16`` or both.
        trained: Fields whose tissue the int8 network is trained on (their labels are not used).
        held_out: Fields, of other cases, on which every format is compared with float32.
        how: How int8 is trained.
        keep: Whether the files stay; else the card has what was measured, under ``measured``, and no file.
        say: Told in a line what happens.

    Returns:
        By format, what the card says of it.

    Raises:
        WsiError: The model is no classifier, a case is on both sides, or there is nothing to measure on.
    """
    card = load_card(folder / "card.json")
    if card.task != "classify":
        raise WsiError(f"{card.name} is no classifier (its task is {card.task})", hint="quantise classifiers only")
    if unknown := sorted(set(wanted) - set(PRECISIONS[1:])):
        raise WsiError(f"there is no precision {unknown[0]}", hint=f"use {' or '.join(PRECISIONS[1:])}")
    check_leak(trained, held_out)
    if not trained or not held_out:
        raise WsiError(
            f"there are {len(trained)} images to train on and {len(held_out)} to measure on: needed both",
            hint="choose another --test-fold, or add cases",
        )
    tested = [f for f in held_out if f.label in {c.name for c in card.map_classes}]
    if not tested:
        raise WsiError("no held-out image is labelled as a class of the model", hint="rename labels with --map")
    facts = {}
    for kind in wanted:
        file = folder / f"{card.at(REFERENCE).model_path.stem}.{kind}.onnx"
        network = simplified(card.model_path)
        say(f"{kind}: {file.name}")
        made = write_fp16(network) if kind == "fp16" else _int8(network, card, trained, how or Training(), say)
        onnx.save(made, file)
        facts[kind] = _name_on_card(folder, kind, file, tested, keep=keep)
        card = load_card(folder / "card.json")
        found = facts[kind]
        say(
            f"{kind}: same answer on {found['agreement']:.1%} of {found['tiles']} held-out tiles, "
            f"{found['loss_points']:+.1f} points lost, {found['speed']:.1f} × as fast, {found['bytes']:,} bytes"
        )
    return facts


def _int8(
    network: onnx.ModelProto, card: Card, trained: Sequence[Field], how: Training, say: Callable[[str], None]
) -> onnx.ModelProto:
    torch.set_num_threads(how.threads)
    torch.manual_seed(how.seed)
    tiles = training_tiles(card, trained, how.seed)
    order = np.random.default_rng(how.seed).permutation(len(tiles))
    spec = card.input

    def take(rows: np.ndarray, turn: np.random.Generator | None = None) -> torch.Tensor:
        picked = tiles[rows]
        if turn is not None:
            picked = np.rot90(picked, int(turn.integers(4)), (1, 2))
            picked = picked[:, ::-1] if turn.integers(2) else picked
        return torch.from_numpy(as_input(picked, spec))

    def batch(iteration: int) -> torch.Tensor:
        rng = np.random.default_rng((how.seed, iteration))
        return take(rng.choice(len(tiles), how.batch, replace=len(tiles) < how.batch), rng)

    rounded = Rounded(network)
    rounded.calibrate([take(order[k :: how.calibration][: how.batch]) for k in range(how.calibration)])
    spared = rounded.spare(take(order[: how.batch]))
    say(f"int8: {len(rounded.layout.convolutions)} convolutions, {len(spared)} more stay float32")
    rounded.train(batch, how, say)
    return write_int8(rounded)


def training_tiles(card: Card, fields: Sequence[Field], seed: int) -> np.ndarray:
    """Tiles of labelled images as the model sees them, drawn set by set and case by case: uint8 (N, side, side, 3)."""
    rng = np.random.default_rng(seed)
    by_source: dict[str, list[Field]] = {}
    for k in rng.permutation(len(fields)):
        by_source.setdefault(fields[k].source, []).append(fields[k])
    side, parts = card.input.size_px, []
    most = _TILES // len(by_source)
    for chosen in by_source.values():
        count = 0
        for field in chosen:
            if count >= most:
                break
            pixels, corners = field_tiles(card, field)
            parts += [pixels[y : y + side, x : x + side] for y, x in corners.tolist()]
            count += len(corners)
    return np.stack(parts)


def as_input(tiles: np.ndarray, spec: InputSpec) -> np.ndarray:
    """Tiles uint8 (N, side, side, 3) in the layout, type and range that a model takes."""
    ordered = tiles if spec.layout == "NHWC" else tiles.transpose(0, 3, 1, 2)
    if spec.dtype == "uint8":
        return np.ascontiguousarray(ordered)
    shape = (1, 1, 1, 3) if spec.layout == "NHWC" else (1, 3, 1, 1)
    scaled = ordered.astype(np.float32) * spec.scale.reshape(shape) + spec.bias.reshape(shape)
    return np.ascontiguousarray(scaled.astype(spec.dtype))


def _name_on_card(folder: Path, kind: str, file: Path, tested: Sequence[Field], *, keep: bool) -> dict[str, Any]:
    """Measure the file and write it on the card; returns its entry."""
    data = json.loads((folder / "card.json").read_text(encoding="utf-8"))
    named = dict(data.get("precision") or {})
    others = [r for r in data["resources"] if r["file"] != file.name]
    with_file = [*others, {"file": file.name, "sha256": file_sha256(file)}]
    unmeasured = {kind: {"file": file.name, "agreement": 0, "loss_points": 0}}
    card = parse_card(data | {"resources": with_file, "precision": named | unmeasured}, folder)
    found = measure(card, kind, tested) | {"bytes": file.stat().st_size}
    if keep:
        data |= {"resources": with_file, "precision": named | {kind: {"file": file.name, **found}}}
    else:
        file.unlink()
        named.pop(kind, None)
        measured = dict(named.get("measured") or {}) | {kind: found}
        data |= {"resources": others, "precision": named | {"measured": measured}}
    new = folder / "card.json.new"
    new.write_text(json.dumps(data, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    new.replace(folder / "card.json")
    return found


def measure(card: Card, kind: str, fields: Sequence[Field]) -> dict[str, Any]:
    """What a number format costs against float32, on labelled tissue.

    ``agreement``: part of tiles with the same answer (class, no epithelium or uncertain); ``class_agreement``: with the
    same likeliest class. ``loss_points``: balanced accuracy lost, by tile or by image, whichever is more. ``speed``: of
    one tile on one thread of this machine, times float32.
    """
    runtimes = [Runtime(card.at(k), device="cpu") for k in (REFERENCE, kind)]
    whole, other = (score_images(card, fields, runtime) for runtime in runtimes)
    how = Account.of(card)
    reports = [report(rows, how) for rows in (whole, other)]
    lost = {}
    for level in ("tile", "image"):
        before, after = (found[level]["balanced_accuracy"]["value"] for found in reports)
        lost[level] = round(100 * (before - after), 2)
    same = predicted(whole, how.below) == predicted(other, how.below)
    alike = whole.probability.argmax(1) == other.probability.argmax(1)
    return {
        "agreement": round(float(same.mean()), 4),
        "class_agreement": round(float(alike.mean()), 4),
        "loss_points": max(lost.values()),
        "loss_points_by_tile": lost["tile"],
        "loss_points_by_image": lost["image"],
        "tiles": len(whole.true),
        "images": len(fields),
        "cases": len({f.case for f in fields}),
        "speed": round(_speed(runtimes, card, fields[0]), 2),
    }


def _speed(runtimes: Sequence[Runtime], card: Card, field: Field) -> float:
    """Time of the first over time of the second, each the least of several, in turns."""
    pixels, corners = field_tiles(card, field)
    least = [np.inf, np.inf]
    for _ in range(_SPEED_TILES):
        for k, runtime in enumerate(runtimes):
            started = time.perf_counter()
            runtime.scores(pixels, corners[:1])
            least[k] = min(least[k], time.perf_counter() - started)
    return least[0] / least[1]


def copy_model(card: Card, folder: Path) -> None:
    """A model's files and card into a new folder.

    Raises:
        CardError: The folder holds another model.
    """
    target = folder / "card.json"
    if target.exists() and load_card(target).at(REFERENCE).sha256 != card.at(REFERENCE).sha256:
        raise CardError(f"{folder} holds another model", hint="choose another folder")
    folder.mkdir(parents=True, exist_ok=True)
    for resource in card.resources:
        (folder / resource.file).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(card.folder / resource.file, folder / resource.file)
    target.write_text(json.dumps(card.to_json(), indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def main(arguments: list[str] | None = None) -> None:
    """For models trained on the colorectal sets: fold 0 measures, the other folds train."""
    parser = argparse.ArgumentParser(
        prog="python -m wsiengine.training.precisions", description="Other number formats."
    )
    parser.add_argument("--model", type=Path, required=True, help="the model's folder")
    parser.add_argument("--data", type=Path, required=True, help="folder that holds crc/")
    parser.add_argument("--precision", default="int8", help="int8, fp16 or int8,fp16")
    parser.add_argument("--sources", default="ebhi,glas,lc25000", help="sets to train and measure on")
    parser.add_argument("--iterations", type=int, default=Training.iterations)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--measure-only", action="store_true", help="write the figures on the card, keep no file")
    asked = parser.parse_args(arguments)
    fields = read_fields(asked.data, asked.sources.split(","))
    how = replace(Training(), iterations=asked.iterations, threads=asked.threads)
    sides = ([f for f in fields if f.fold != 0], [f for f in fields if f.fold == 0])
    add_precisions(asked.model, asked.precision.split(","), *sides, how=how, keep=not asked.measure_only)


if __name__ == "__main__":
    main()
