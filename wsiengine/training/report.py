"""What a training leaves for people to read: ``report.md`` with its tables, and ``curves.png``."""

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from wsiengine.training.data import Field
from wsiengine.training.own import OwnRecipe

if TYPE_CHECKING:
    from PIL.ImageDraw import ImageDraw

_WIDTH, _HEIGHT = 860, 430
_LEFT, _RIGHT, _TOP, _BOTTOM = 70, 190, 40, 50
_ORANGE, _BLUE, _GREEN, _PINK = (213, 94, 0), (0, 114, 178), (0, 158, 115), (204, 121, 167)
Curve = tuple[str, tuple[int, int, int], Callable[[Mapping[str, Any]], float | None]]
"""A curve's name, its colour, and its value in a row of the log."""
_LINES: tuple[Curve, ...] = (
    ("class loss", _ORANGE, lambda row: row.get("class_loss")),
    ("gate loss", _BLUE, lambda row: row.get("gate_loss") or None),
    ("accuracy in training", _GREEN, lambda row: row.get("accuracy")),
    ("validation", _PINK, lambda row: row.get("validation", {}).get("balanced_accuracy")),
)


def write_report(out: Path, own: OwnRecipe, sides: Mapping[str, Sequence[Field]], figures: Mapping[str, Any]) -> None:
    """Write ``report.md`` and ``curves.png``.

    Args:
        out: The model's folder, with ``training/log.jsonl`` in it.
        own: The recipe.
        sides: Fields by what they served for: ``train``, ``stop`` and ``test``.
        figures: Of the held-out fold, as ``wsiengine evaluate`` gives them.
    """
    log = (out / "training" / "log.jsonl").read_text(encoding="utf-8")
    rows = [json.loads(line) for line in log.splitlines()]
    draw_curves(rows, out / "curves.png")
    text = "\n".join(
        [f"# {own.name}", "", *_about(own, rows), *_data(sides), *_results(figures, own.test_fold), *_doubts()]
    )
    (out / "report.md").write_text(text + "\n", encoding="utf-8")


def _about(own: OwnRecipe, rows: Sequence[Mapping[str, Any]]) -> list[str]:
    last = max(row["iteration"] for row in rows)
    ended = f"{last} of {own.iterations} iterations"
    if last < own.iterations:
        ended += ", stopped early: validation had not improved; the best network was taken"
    return [
        f"{own.backbone}, tiles of {own.tile_px} px at {own.mpp:g} µm/px; {ended}; seed {own.seed}.",
        "",
        "![losses and accuracy over iterations](curves.png)",
        "",
    ]


def _data(sides: Mapping[str, Sequence[Field]]) -> list[str]:
    used = {name: fields for name, fields in sides.items() if fields}
    words = {"train": "trained on", "stop": "decided when to stop", "test": "held out"}
    classes = sorted({f.label for fields in used.values() for f in fields})
    lines = ["## Data", "", "| images (cases) | " + " | ".join(words[n] for n in used) + " |"]
    lines.append("|---" * (len(used) + 1) + "|")
    for name in classes:
        cells = [[f for f in fields if f.label == name] for fields in used.values()]
        lines.append(f"| {name} | " + " | ".join(f"{len(c)} ({len({f.case for f in c})})" for c in cells) + " |")
    return [*lines, "", "No case is on two sides.", ""]


def _results(figures: Mapping[str, Any], fold: int) -> list[str]:
    lines = ["## Held-out fold", "", f"As `wsiengine evaluate --folds {fold}` gives it for this folder.", ""]
    for level in ("image", "tile"):
        found = figures[level]
        classes = found["per_class"]
        strict, likeliest = (_span(found, key) for key in ("balanced_accuracy", "balanced_accuracy_likeliest"))
        few = "; too few cases for an interval" if found["cases"] < 3 else ""
        lines += [
            f"By {level}: balanced accuracy {strict} where no answer is wrong, {likeliest} with the likeliest class "
            f"({found['n']} {level}s, cases: {found['cases']}{few}), "
            f"mAP {_word(found['mean_average_precision'])}, calibration error {_word(found['calibration_error'])}.",
            "",
            f"| {level}s | recall | precision | specificity | F1 | AUROC |",
            "|---|---|---|---|---|---|",
        ]
        for name, one in classes.items():
            values = (one[k] for k in ("recall", "precision", "specificity", "f1", "auroc"))
            lines.append(f"| {name} ({one['n']}) | " + " | ".join(map(_word, values)) + " |")
        lines += ["", "| truth \\ answer | " + " | ".join([*classes, "no answer"]) + " |"]
        lines.append("|---" * (len(classes) + 2) + "|")
        for name, counts in zip(classes, found["confusion"], strict=True):
            lines.append(f"| {name} | " + " | ".join(map(str, counts)) + " |")
        lines.append("")
    return lines


def _doubts() -> list[str]:
    return [
        "## What this does not show",
        "",
        "The held-out fold comes from the same laboratories, stains and scanners as the rest. Measure the model on "
        "tissue from elsewhere before you believe it: `wsiengine evaluate --model DIR --data OTHER`.",
    ]


def _span(found: Mapping[str, Any], key: str) -> str:
    """Lower bound first; the figure alone where cases are too few for one."""
    low, value, high = (_word(found[key][k]) for k in ("low", "value", "high"))
    return f"**{value}**" if found["cases"] < 3 else f"from **{low}**: {value} (to {high})"


def _word(value: float | None) -> str:
    return "–" if value is None else f"{value:.3f}"


def draw_curves(rows: Sequence[Mapping[str, Any]], path: Path, curves: Sequence[Curve] = _LINES) -> None:
    """A picture of what was logged, over iterations."""
    from PIL import Image, ImageDraw, ImageFont

    picture = Image.new("RGB", (_WIDTH, _HEIGHT), "white")
    pen = ImageDraw.Draw(picture)
    font = ImageFont.load_default(14)
    lines = {name: [(r["iteration"], v) for r in rows if (v := get(r)) is not None] for name, _, get in curves}
    last = max(row["iteration"] for row in rows)
    top = max([1.0, *(v for points in lines.values() for _, v in points)])

    def place(iteration: float, value: float) -> tuple[float, float]:
        x = _LEFT + (_WIDTH - _LEFT - _RIGHT) * iteration / last
        return x, _HEIGHT - _BOTTOM - (_HEIGHT - _TOP - _BOTTOM) * value / top

    _axes(pen, font, last, top, place)
    y = _TOP
    for name, colour, _ in curves:
        points = [place(*point) for point in lines[name]]
        if not points:
            continue
        if len(points) > 1:
            pen.line(points, colour, 3, joint="curve")
        for px, py in points:
            pen.ellipse((px - 4, py - 4, px + 4, py + 4), colour)
        pen.rectangle((_WIDTH - _RIGHT + 20, y + 3, _WIDTH - _RIGHT + 34, y + 13), colour)
        pen.text((_WIDTH - _RIGHT + 42, y), name, "black", font)
        y += 24
    picture.save(path)


def _axes(pen: "ImageDraw", font: Any, last: int, top: float, place: Any) -> None:
    for k in range(5):
        value = top * k / 4
        x, y = place(0, value)
        pen.line((x, y, _WIDTH - _RIGHT, y), (225, 225, 225))
        pen.text((x - 10, y), f"{value:.2f}", "black", font, anchor="rm")
    for k in range(5):
        x, y = place(last * k / 4, 0)
        pen.line((x, y, x, y + 5), "black")
        pen.text((x, y + 10), f"{last * k // 4}", "black", font, anchor="mt")
    pen.text(((_LEFT + _WIDTH - _RIGHT) / 2, _HEIGHT - 16), "iterations", "black", font, anchor="mm")
    pen.line((*place(0, top), *place(0, 0), *place(last, 0)), "black")
