"""Sets of labelled images to evaluate on: one folder or several, each with its own µm/px and words for the classes.

A file of sets is a JSON object, a set for each entry::

    {"hospital A": {"folder": "a", "mpp": 0.5, "map": {"DCIS": "Malignant"}, "apart": ["Atypia"]},
     "hospital B": {"folder": "b", "mpp": [1.21, 0.96], "where": {"scanner": "second"}}}

``folder`` is relative to ``--data`` and may be left out where it has the set's name; ``mpp`` is µm/px, one number or
across and down, instead of what its labels.csv says. ``map`` gives labels the names of the model's classes. Labels
``apart`` are scored, too, and what they are called is told, but they are outside every figure.
"""

import json
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from wsiengine.datasets.images import picture_size
from wsiengine.errors import CardError, WsiError
from wsiengine.models.fields import Fields
from wsiengine.training.data import Field
from wsiengine.training.tables import read_labels

OWN = "own"
FILE = "sets.json"
_NAMED = 5


@dataclass(frozen=True, slots=True)
class LabelledSet:
    """A folder of labelled images, and what its table does not say.

    Attributes:
        name: Of the set.
        folder: With labels.csv, or with a folder per class.
        mpp_yx: µm per pixel down and across, instead of what the table says.
        merge: Label → class.
        apart: Labels that are scored outside the figures.
        where: Column → value that a row of labels.csv must have.
    """

    name: str
    folder: Path
    mpp_yx: tuple[float, float] | None = None
    merge: Mapping[str, str] = field(default_factory=dict)
    apart: tuple[str, ...] = ()
    where: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Chosen:
    """What is evaluated, and what is not.

    Attributes:
        fields: Images whose label is a class of the model, or is told apart.
        left_out: Images by label of those that are neither.
        total: Images in the chosen folds.
    """

    fields: tuple[Field, ...]
    left_out: Mapping[str, int]
    total: int


def read_sets(file: Path, root: Path) -> list[LabelledSet]:
    """The sets of a file; ``root`` is the folder that theirs are relative to.

    Raises:
        WsiError: No such file, no JSON, or an entry that is wrong.
    """
    try:
        said = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise WsiError(f"the sets {file} cannot be read: {error}", hint="docs/usage.md shows a file of sets") from error
    if not isinstance(said, dict) or not said:
        raise WsiError(f"the sets {file} have no entries", hint="docs/usage.md shows a file of sets")
    try:
        return [_set(name, Fields(entry, f"{file}: {name}"), root) for name, entry in said.items()]
    except CardError as error:
        raise WsiError(error.message, hint="entries are folder, mpp, map, apart and where (docs/usage.md)") from error


def _set(name: str, entry: Fields, root: Path) -> LabelledSet:
    mpp = entry.take("mpp", None)
    apart = entry.take("apart", ())
    maps = {key: entry.take(key, {}) for key in ("map", "where")}
    for key, value in maps.items():
        if not isinstance(value, dict) or not all(isinstance(v, str) for v in value.values()):
            raise CardError(f"{entry.where}: {key} is {value!r:.60}, needed an object of texts")
    if not isinstance(apart, list | tuple) or not all(isinstance(v, str) for v in apart):
        raise CardError(f"{entry.where}: apart is {apart!r:.60}, needed a list of labels")
    found = LabelledSet(
        name, root / entry.text("folder", name), _scale(mpp, entry.where), maps["map"], tuple(apart), maps["where"]
    )
    entry.finish()
    return found


def _scale(said: Any, where: str) -> tuple[float, float] | None:
    """(y, x) of a number, or of [across, down]."""
    if said is None:
        return None
    parts = said if isinstance(said, list) else [said]
    numbers = [v for v in parts if isinstance(v, int | float) and not isinstance(v, bool) and 0.05 <= v <= 20]
    if len(numbers) != len(parts) or len(parts) not in (1, 2):
        raise CardError(f"{where}: mpp is {said!r:.60}, needed µm/px from 0.05 to 20, or [across, down]")
    return float(numbers[-1]), float(numbers[0])


def gather(sets: Sequence[LabelledSet], classes: Sequence[str], folds: Sequence[int] | None = None) -> Chosen:
    """The images of all sets whose label the model knows, or that are told apart.

    Raises:
        WsiError: A folder cannot be read, a label that is mapped or apart does not occur, no label is one of the
            model's classes, no image is left, or a mask is missing or has another size than its image.
    """
    fields = [f for one in sets for f in _fields(one)]
    merge, apart = {label for one in sets for label in one.merge}, {label for one in sets for label in one.apart}
    check_words(merge, apart, {f.finding for f in fields}, classes, "image")
    labels = sorted({f.label for f in fields} - apart)
    if not set(labels) & set(classes):
        raise WsiError(
            f"no label of the data ({', '.join(labels)}) is a class of the model ({', '.join(classes)})",
            hint=f'say which is which: --map "{labels[0] if labels else "LABEL"}={classes[0]}"',
        )
    inside = [f for f in fields if folds is None or f.fold in folds]
    kept = [f for f in inside if f.label in classes or f.label in apart]
    if not any(f.label in classes for f in kept):
        raise WsiError("no labelled image is left to evaluate", hint="check --folds, --where and --map")
    check_masks(kept)
    left_out = Counter(f.label for f in inside if f.label not in classes and f.label not in apart)
    return Chosen(tuple(kept), dict(sorted(left_out.items())), len(inside))


def _fields(one: LabelledSet) -> list[Field]:
    mpp = one.mpp_yx
    found = read_labels(one.folder, merge=one.merge, mpp=mpp[0] if mpp else None, where=one.where)
    return [replace(f, source=one.name, mpp_yx=mpp or f.mpp_yx) for f in found]


def check_words(merge: Iterable[str], apart: Iterable[str], said: set[str], classes: Sequence[str], what: str) -> None:
    """Refuse labels that nobody uses: a slip of the pen, by which others would be left out or counted.

    Args:
        merge: Labels that are mapped to classes.
        apart: Labels that are scored outside the figures.
        said: Labels that there are.
        classes: Of the model.
        what: Has labels: an image, or an annotation.

    Raises:
        WsiError: A label does not occur, or is to be told apart and counted.
    """
    for words, option in ((set(merge), "--map"), (set(apart), "--apart")):
        if unknown := sorted(words - said):
            raise WsiError(
                f"{option} names {', '.join(unknown)}: no {what} has that label",
                hint=f"labels are {', '.join(sorted(said))}",
            )
    if counted := sorted(set(apart) & {*classes, *merge}):
        raise WsiError(
            f"{', '.join(counted)} is to be told apart and counted as a class: needed one or the other",
            hint="leave it out of --apart, or out of --map",
        )


def check_masks(fields: Sequence[Field]) -> None:
    """Refuse masks that are missing, are no images, or have another size than their image, before anything is scored.

    Raises:
        WsiError: Naming up to five.
    """
    wrong = [words for f in fields if f.mask is not None and (words := _mask_problem(f.image, f.mask))]
    if wrong:
        rest = f", and {len(wrong) - _NAMED} more" if len(wrong) > _NAMED else ""
        raise WsiError(
            f"{len(wrong)} mask{'s do' if len(wrong) > 1 else ' does'} not fit: {'; '.join(wrong[:_NAMED])}{rest}",
            hint="a mask is an image of the size of its image; leave the cell empty where there is none",
        )


def _mask_problem(image: Path, mask: Path) -> str:
    if not mask.is_file():
        return f"{mask.name} is not there"
    sizes = [picture_size(file) for file in (image, mask)]
    if sizes[1] is None:
        return f"{mask.name} is no image"
    if sizes[0] is None or sizes[0] == sizes[1]:
        return ""  # an image that only the engine reads is judged when it is read
    (width, height), (cols, rows) = sizes[0], sizes[1]
    return f"{mask.name} is {cols} × {rows} px, its image {width} × {height} px"
