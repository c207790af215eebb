"""Which annotated images are for training and which for test: whole cases, always the same."""

from collections.abc import Sequence
from dataclasses import replace
from hashlib import sha256

import numpy as np

from wsiengine.datasets.rows import NO_FOLD, DetectionSet
from wsiengine.errors import WsiError

FOLDS = 5


def with_folds(found: DetectionSet, folds: int = FOLDS) -> DetectionSet:
    """The same set with folds, if it has none: whole cases, in the order of a hash of their names.

    Raises:
        WsiError: Some images have a fold and some have none, or one case lies in two folds.
    """
    without = [row for row in found.images if row.fold == NO_FOLD]
    if not without:
        of_case: dict[str, set[int]] = {}
        for row in found.images:
            of_case.setdefault(row.case, set()).add(row.fold)
        if torn := sorted(case for case, in_folds in of_case.items() if len(in_folds) > 1):
            raise WsiError(f"{len(torn)} cases lie in several folds: {', '.join(torn[:5])}", hint="split by case")
        return found
    if len(without) < len(found.images):
        raise WsiError(f"{len(without)} of {len(found.images)} images have no fold", hint="give every image one")
    cases = sorted({row.case for row in found.images}, key=lambda case: sha256(case.encode()).digest())
    place = {case: number % folds for number, case in enumerate(cases)}
    return replace(found, images=tuple(replace(row, fold=place[row.case]) for row in found.images))


def of_classes(found: DetectionSet, classes: Sequence[str]) -> DetectionSet:
    """The set with these classes only, in their order; empty: all of them.

    Raises:
        WsiError: A class that is not in the set.
    """
    if not classes:
        return found
    if unknown := sorted(set(classes) - set(found.classes)):
        raise WsiError(f"nothing is annotated as {', '.join(unknown)}", hint=f"classes are {', '.join(found.classes)}")
    number = np.array([classes.index(name) if name in classes else -1 for name in found.classes])
    rows = []
    for row in found.images:
        kept = np.flatnonzero(number[row.objects.labels] >= 0)
        objects = replace(
            row.objects,
            boxes_xyxy=row.objects.boxes_xyxy[kept],
            labels=number[row.objects.labels[kept]],
            ignored=row.objects.ignored[kept],
            rings=tuple(row.objects.rings[k] for k in kept),
            types=row.objects.types[kept],
        )
        rows.append(replace(row, objects=objects))
    return replace(found, classes=tuple(classes), images=tuple(rows))


def split(found: DetectionSet, test_fold: int) -> tuple[DetectionSet, DetectionSet]:
    """Training and test images.

    Raises:
        WsiError: One of them is empty, or nothing is annotated to train on.
    """
    folds = {row.fold for row in found.images}
    if test_fold not in folds or len(folds) < 2:
        what = "is all there is" if test_fold in folds else "is empty"
        raise WsiError(
            f"fold {test_fold} {what}: training and test need images",
            hint="add images of other cases, or choose another test_fold",
        )
    trained, tested = found.chosen(folds - {test_fold}), found.chosen((test_fold,))
    if not trained.objects:
        raise WsiError(
            "no object is annotated in the training images", hint="annotate some, or choose another test_fold"
        )
    return trained, tested
