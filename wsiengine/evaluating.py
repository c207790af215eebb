"""A model against labelled images: tiles scored by the engine's own runtime, joined to images and cases, in figures.

The formulas are in :mod:`wsiengine.evaluate`; this module brings images, model and formulas together.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from wsiengine.errors import WsiError
from wsiengine.evaluate import (
    aggregate,
    auroc,
    average_precision,
    balanced_accuracy,
    case_bootstrap,
    class_figures,
    confusion,
    reliability,
)
from wsiengine.geometry import Box, Lattice, Mpp
from wsiengine.models.card import Card
from wsiengine.models.runtime import Runtime
from wsiengine.normalise import fit_normaliser, parse_recipe
from wsiengine.slides import open_slide
from wsiengine.slides.base import Slide
from wsiengine.tasks.classify import MapLayout, tile_probabilities
from wsiengine.tissue import TissueMask
from wsiengine.training.data import Field

LEVELS = ("tile", "image", "case")


@dataclass(frozen=True, slots=True, eq=False)
class Rows:
    """One row per tile (or, joined, per image or case).

    Attributes:
        probability: (N, classes) float64.
        judged: (N,) bool: the gate found enough to judge.
        true: (N,) class index.
        image: (N,) name.
        case: (N,) name.
    """

    probability: np.ndarray
    judged: np.ndarray
    true: np.ndarray
    image: np.ndarray
    case: np.ndarray


def choose(fields: Sequence[Field], classes: Sequence[str], folds: Sequence[int] | None = None) -> list[Field]:
    """The fields whose label the model knows, of the given folds.

    Raises:
        WsiError: No label is one of the model's classes, or no image is left.
    """
    labels = sorted({f.label for f in fields})
    if not set(labels) & set(classes):
        raise WsiError(
            f"no label of the data ({', '.join(labels)}) is a class of the model ({', '.join(classes)})",
            hint=f'say which is which: --map "{labels[0]}={classes[0]}"',
        )
    chosen = [f for f in fields if f.label in classes and (folds is None or f.fold in folds)]
    if not chosen:
        raise WsiError("no labelled image is left to evaluate", hint="check --folds and --map")
    return chosen


def score_images(
    card: Card, fields: Sequence[Field], runtime: Runtime, *, progress: Callable[[int, int], None] = lambda a, b: None
) -> Rows:
    """Score every image, cut into tiles that lie inside it as far as it is large enough.

    Args:
        card: The model.
        fields: Images of classes that the model knows.
        runtime: Its session.
        progress: Called with images done and images in all.
    """
    layout = MapLayout.of(card)
    parts = []
    for index, field in enumerate(fields):
        scores = runtime.scores(*field_tiles(card, field))
        p = tile_probabilities(scores, layout).astype(np.float64)
        minimum = layout.gate_minimum
        judged = np.ones(len(p), bool) if minimum is None else p[:, -1] >= minimum
        parts.append((p[:, : len(layout.names)], judged, np.full(len(p), layout.names.index(field.label)), field))
        progress(index + 1, len(fields))
    counts = [len(p) for p, *_ in parts]
    return Rows(
        np.concatenate([p for p, *_ in parts]),
        np.concatenate([judged for _, judged, _, _ in parts]),
        np.concatenate([true for _, _, true, _ in parts]),
        np.repeat([str(f.image) for *_, f in parts], counts),
        np.repeat([f.case for *_, f in parts], counts),
    )


def field_tiles(card: Card, field: Field) -> tuple[np.ndarray, np.ndarray]:
    """A labelled image as the model sees it: at its µm/px, normalised by its recipe.

    Returns:
        Pixels (rows, cols, 3) uint8, and (N, 2) corners y, x of the fewest tiles that cover them.
    """
    slide = open_slide(field.image, mpp=Mpp(*field.mpp_yx), window=parse_recipe(card.recipe).window)
    try:
        lattice = Lattice(slide.info.size_l0, Mpp(*field.mpp_yx), card.input.fixed_mpp, card.output_stride_px)
        side = card.input.size_px
        pixels = _at_least(_normalised(card, slide, Box.of(lattice.extent_px), lattice), side)
        origins = [(y, x) for y in _starts(pixels.shape[0], side) for x in _starts(pixels.shape[1], side)]
        return pixels, np.array(origins, np.int64)
    finally:
        slide.close()


def _normalised(card: Card, slide: Slide, box: Box, lattice: Lattice) -> np.ndarray:
    tissue = TissueMask.everywhere(slide.info.size_l0, lattice.slide_mpp)
    normaliser = fit_normaliser(parse_recipe(card.recipe), slide, tissue, lattice.mpp)
    return normaliser.apply(slide.read(box.grow(normaliser.halo_px), lattice.mpp), box)


def _at_least(pixels: np.ndarray, side: int) -> np.ndarray:
    """A crop smaller than a tile is mirrored: it was cut out of tissue, and white around it would say otherwise."""
    missing = [max(0, side - n) for n in pixels.shape[:2]]
    return np.pad(pixels, [*((m // 2, m - m // 2) for m in missing), (0, 0)], mode="symmetric")


def _starts(extent: int, side: int) -> list[int]:
    """As few tiles as cover the extent, evenly spread, the first and the last at its edges."""
    count = -(-extent // side)
    return [round(i * (extent - side) / max(1, count - 1)) for i in range(count)]


def join(rows: Rows, by: str, rule: str) -> Rows:
    """One row per image or case, from the tiles that were judged (all of them where none was)."""
    group = rows.image if by == "image" else rows.case
    # A case with images of several classes is several rows: each is right or wrong about its own label.
    key = np.char.add(np.char.add(group.astype(str), "\0"), rows.true.astype(str))
    any_judged = np.isin(key, np.unique(key[rows.judged]))
    used = rows.judged | ~any_judged
    names, score = aggregate(rows.probability[used], key[used], rule)
    first = np.array([np.flatnonzero(key == name)[0] for name in names])
    judged = any_judged[first]
    total = score.sum(axis=1, keepdims=True)
    return Rows(score / np.where(total > 0, total, 1), judged, rows.true[first], rows.image[first], rows.case[first])


def report(rows: Rows, classes: Sequence[str], rule: str = "average", below: float = 0.0) -> dict[str, Any]:
    """Figures by tile, image and case, as JSON.

    Where the model gives no answer (uncertain, no epithelium) it is wrong; ``balanced_accuracy_likeliest`` is what it
    would be if its likeliest class were taken there too.

    Args:
        rows: Tiles.
        classes: The model's asserted classes.
        rule: How tiles are joined (:data:`wsiengine.evaluate.RULES`).
        below: A best class below this counts as no answer.
    """
    levels = {"tile": rows, "image": join(rows, "image", rule), "case": join(rows, "case", rule)}
    return {"classes": list(classes), "rule": rule} | {
        name: _figures(part, classes, below) for name, part in levels.items()
    }


def _figures(rows: Rows, classes: Sequence[str], below: float) -> dict[str, Any]:
    best = rows.probability.argmax(axis=1)
    answered = rows.judged & (rows.probability.max(axis=1) >= below)
    predicted = np.where(answered, best, len(classes))
    counts = confusion(rows.true, predicted, len(classes))

    def figure(picked: np.ndarray) -> float:
        return balanced_accuracy(confusion(rows.true[picked], predicted[picked], len(classes)))

    interval = case_bootstrap(figure, rows.case, rows.true)
    per_class = class_figures(counts)
    positive = [rows.true == k for k in range(len(classes))]
    ranking = [
        (auroc(p, rows.probability[:, k]), average_precision(p, rows.probability[:, k])) for k, p in enumerate(positive)
    ]
    calibration = reliability(rows.true, rows.probability)
    return {
        "n": len(rows.true),
        "cases": interval.cases,
        "balanced_accuracy": {
            "low": _number(interval.low),
            "value": _number(interval.value),
            "high": _number(interval.high),
        },
        "accuracy": _number(float((predicted == rows.true).mean())),
        "balanced_accuracy_likeliest": _number(balanced_accuracy(confusion(rows.true, best, len(classes)))),
        "no_answer": _number(float((predicted == len(classes)).mean())),
        "confusion": counts.tolist(),
        "per_class": {
            name: {
                "n": int(positive[k].sum()),
                **{
                    f: _number(float(getattr(per_class, f)[k]))
                    for f in ("precision", "recall", "specificity", "npv", "f1")
                },
                "auroc": _number(ranking[k][0]),
                "average_precision": _number(ranking[k][1]),
            }
            for k, name in enumerate(classes)
        },
        "macro_auroc": _number(_mean([a for a, _ in ranking])),
        "mean_average_precision": _number(_mean([ap for _, ap in ranking])),
        "calibration_error": _number(calibration.error),
        "reliability": {
            "claimed": [_number(v) for v in calibration.claimed.tolist()],
            "found": [_number(v) for v in calibration.found.tolist()],
            "count": calibration.count.tolist(),
        },
    }


def _mean(values: Sequence[float]) -> float:
    finite = [v for v in values if np.isfinite(v)]
    return float(np.mean(finite)) if finite else float("nan")


def _number(value: float) -> float | None:
    """Rounded; None (JSON has no NaN) where undefined."""
    return round(value, 4) if np.isfinite(value) else None


def table_lines(found: Mapping[str, Any]) -> list[str]:
    """The report as lines of text."""
    lines = []
    for level in LEVELS:
        part = found[level]
        balanced = part["balanced_accuracy"]
        rows = "labels" if level == "case" else f"{level}s"  # a case with images of two classes has two
        lines.append(
            f"{level:<6} balanced accuracy {_words(balanced['value'])} (95 % from {_words(balanced['low'])} to "
            f"{_words(balanced['high'])}) · {part['n']:,} {rows} of {part['cases']:,} cases · "
            f"no answer {100 * part['no_answer']:.1f} %, counted as wrong (with the likeliest class instead: "
            f"{_words(part['balanced_accuracy_likeliest'])}) · ECE {_words(part['calibration_error'])} · "
            f"mAP {_words(part['mean_average_precision'])}"
        )
        lines.append(f"       {'class':<24}{'n':>6}  recall  precision  specificity  NPV    F1     AUROC  AP")
        for name, figures in part["per_class"].items():
            lines.append(
                f"       {name:<24}{figures['n']:>6}  {_words(figures['recall']):<8}{_words(figures['precision']):<11}"
                f"{_words(figures['specificity']):<13}{_words(figures['npv']):<7}{_words(figures['f1']):<7}"
                f"{_words(figures['auroc']):<7}{_words(figures['average_precision'])}"
            )
    return lines


def _words(value: float | None) -> str:
    return "–" if value is None else f"{value:.3f}"


def draw(found: Mapping[str, Any], path: Path, level: str = "image") -> None:
    """A picture: confusion matrix (rows: truth) and reliability of one level."""
    from PIL import Image, ImageDraw, ImageFont

    part, classes = found[level], found["classes"]
    font, small = ImageFont.load_default(18), ImageFont.load_default(14)
    side, left, top = 96, 230, 110
    columns = [*classes, "no answer"]
    plot = 360
    width = left + side * len(columns) + 90 + plot + 40
    height = max(top + side * len(classes) + 60, top + plot + 60)
    picture = Image.new("RGB", (width, height), "white")
    pen = ImageDraw.Draw(picture)
    pen.text((20, 16), f"By {level}: rows are the truth, columns the answer", "black", font)
    for k, name in enumerate(columns):
        pen.text((left + side * k + 4, top - 40 + 18 * (k % 2)), name[:18], "black", small)
    for y, counts in enumerate(part["confusion"]):
        pen.text((20, top + side * y + side // 2 - 10), classes[y][:24], "black", small)
        for x, count in enumerate(counts):
            share = count / max(1, sum(counts))
            shade = tuple(round(255 - share * (255 - c)) for c in (0, 114, 178))
            box = (left + side * x, top + side * y, left + side * (x + 1) - 3, top + side * (y + 1) - 3)
            pen.rectangle(box, shade)
            pen.text((box[0] + 10, box[1] + 28), f"{count}", "white" if share > 0.5 else "black", font)
            pen.text((box[0] + 10, box[1] + 54), f"{100 * share:.0f} %", "white" if share > 0.5 else "black", small)
    x0 = left + side * len(columns) + 70
    pen.text((x0, 16), "Reliability: claimed (across) against found (up)", "black", small)
    pen.rectangle((x0, top, x0 + plot, top + plot), outline="black")
    pen.line((x0, top + plot, x0 + plot, top), "grey")
    bins = part["reliability"]
    most = max(1, *bins["count"])
    for claimed, found_share, count in zip(bins["claimed"], bins["found"], bins["count"], strict=True):
        if count:
            radius = 4 + round(10 * (count / most) ** 0.5)
            x, y = x0 + claimed * plot, top + plot - found_share * plot
            pen.ellipse((x - radius, y - radius, x + radius, y + radius), (0, 114, 178))
    pen.text((x0, top + plot + 10), f"calibration error {_words(part['calibration_error'])}", "black", small)
    picture.save(path)
