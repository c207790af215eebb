"""A classifier against whole slides with QuPath annotations: every cell of the map that lies under an annotation.

The slides go through the engine's own run, as for ``wsiengine infer``: the map that is judged is the one a user gets.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from wsiengine.errors import WsiError
from wsiengine.evaluating import Progress, Rows, no_progress
from wsiengine.geometry import Box, Size
from wsiengine.inference import infer
from wsiengine.labelled_sets import check_words
from wsiengine.models.card import Card
from wsiengine.regions import load_classified, rasterise
from wsiengine.slides import open_slide
from wsiengine.tasks.classify import decode
from wsiengine.training.data import Field
from wsiengine.training.slides import SlideLabels
from wsiengine.training.tables import NO_FOLD
from wsiengine.truth import Truth


@dataclass(frozen=True, slots=True)
class Words:
    """What annotations mean: label → class, and the labels that are scored outside the figures."""

    merge: Mapping[str, str] = field(default_factory=dict)
    apart: tuple[str, ...] = ()


@dataclass(slots=True)
class Uncounted:
    """Annotated cells that are no rows.

    Attributes:
        annotated: Cells under annotations of a class.
        no_tissue: Of them those that the run did not analyse.
        several: Of them those under annotations of two classes.
        labels: Cells by label of annotations whose label is no class of the model.
    """

    annotated: int = 0
    no_tissue: int = 0
    several: int = 0
    labels: Counter[str] = field(default_factory=Counter)


def choose_slides(slides: Sequence[SlideLabels], folds: Sequence[int] | None) -> list[SlideLabels]:
    """The slides of these folds.

    Raises:
        WsiError: There are none, or slides have no fold.
    """
    if folds is None:
        return list(slides)
    if any(row.fold == NO_FOLD for row in slides):
        raise WsiError("the slides have no folds", hint="write a slides.csv with a column fold, or leave out --folds")
    chosen = [row for row in slides if row.fold in folds]
    if not chosen:
        raise WsiError(f"no slide is in folds {', '.join(map(str, folds))}", hint="check --folds")
    return chosen


def check_annotations(slides: Sequence[SlideLabels], card: Card, said: Words) -> None:
    """Refuse annotations that cannot be used, before anything is run.

    Raises:
        WsiError: A slide or its annotations cannot be read, a label that is mapped or apart does not occur, or no
            annotation is of a class of the model.
    """
    labels: set[str] = set()
    for row in slides:
        slide = open_slide(row.slide, mpp=row.mpp)
        try:
            labels |= _areas(row, slide.info.size_l0, slide.info.bounds_l0).keys()
        finally:
            slide.close()
    names = [m.name for m in card.map_classes]
    check_words(said.merge, said.apart, labels, names, "annotation")
    if not {said.merge.get(label, label) for label in labels} & set(names):
        raise WsiError(
            f"no annotation is of a class of the model ({', '.join(names)}): theirs are {', '.join(sorted(labels))}",
            hint='set the classes in QuPath, or say which is which: --map "Tumour=Adenocarcinoma"',
        )


def _areas(row: SlideLabels, size_l0: Size, bounds_l0: Box | None) -> dict[str, Any]:
    """Geometry by label; QuPath itself leaves out what has no class, and classes whose names end with an asterisk."""
    found = load_classified(row.annotations, size_l0=size_l0, bounds_l0=bounds_l0, name="annotations")
    return {name: area for name, area in found.items() if name is not None and not name.endswith("*")}


def score_slides(
    slides: Sequence[SlideLabels],
    card: Card,
    model: str,
    said: Words,
    runs: Path,
    *,
    progress: Progress = no_progress,
    **options: Any,
) -> tuple[Rows, Uncounted]:
    """Run every slide and collect the cells under its annotations.

    Args:
        slides: With their annotations.
        card: The model's card.
        model: Its name or folder.
        said: What labels mean.
        runs: Folder for the runs, one inside it for each slide; a finished one is taken as it is.
        progress: Called with slides done and slides in all.
        **options: Fields of :class:`wsiengine.identifying.Request`.

    Raises:
        WsiError: As :func:`check_annotations`; or a run failed.
    """
    check_annotations(slides, card, said)
    names = tuple(m.name for m in card.map_classes)
    uncounted, fields, parts = Uncounted(), [], []
    for number, row in enumerate(slides):
        folder = runs / f"{number:03d}-{row.slide.stem}"
        given: dict[str, Any] = {"mpp": row.mpp, **options}
        infer(row.slide, model, folder, **given)
        for label, cells in _cells(row, Truth.load(folder / "probability.zarr"), said, uncounted):
            if label not in (*names, *said.apart):
                uncounted.labels[label] += len(cells)
                continue
            fields.append(_field(row, label))
            parts.append(cells)
        progress(number + 1, len(slides))
    return _rows(card, names, fields, parts), uncounted


def _cells(row: SlideLabels, truth: Truth, said: Words, uncounted: Uncounted) -> list[tuple[str, np.ndarray]]:
    """By label, the map's values in each cell under its annotations: uint8 (cells, channels)."""
    lattice = truth.grid.lattice
    masks: dict[str, np.ndarray] = {}
    for name, area in _areas(row, lattice.slide_l0, truth.bounds_l0).items():
        label = said.merge.get(name, name)
        inside = rasterise(area, lattice)
        masks[label] = masks[label] | inside if label in masks else inside
    coded = truth.map()
    claims = np.sum(list(masks.values()), axis=0) if masks else np.zeros(coded.shape[:2], int)
    analysed = coded[..., 0] > 0
    uncounted.annotated += int((claims > 0).sum())
    uncounted.several += int((claims > 1).sum())
    uncounted.no_tissue += int(((claims == 1) & ~analysed).sum())
    return [(label, coded[inside & (claims == 1) & analysed]) for label, inside in masks.items()]


def _field(row: SlideLabels, label: str) -> Field:
    return Field(row.slide, None, "slides", label, label, row.case, row.fold, (np.nan, np.nan), slide=str(row.slide))


def _rows(card: Card, names: tuple[str, ...], fields: Sequence[Field], parts: Sequence[np.ndarray]) -> Rows:
    values = decode(np.concatenate(parts)[None])[0].astype(np.float64)
    gate = values[:, -1] if card.gate else np.ones(len(values))
    judged = gate >= card.gate.minimum if card.gate else np.ones(len(values), bool)
    of_field = np.repeat(np.arange(len(fields)), [len(part) for part in parts])
    return Rows(names, tuple(fields), of_field, values[:, : len(names)], gate, judged, np.full(len(values), np.nan))
