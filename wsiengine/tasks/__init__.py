"""What a model does with a slide: the tasks, by the name that a card gives. Their contract is in :mod:`.base`."""

from functools import cache

from wsiengine.tasks.base import Task


@cache
def task_of(name: str, *, dense: bool = False, cam: tuple[int, ...] = ()) -> Task:
    """The task of that name; ``dense``: over dense windows (:mod:`wsiengine.dense`), which classifiers alone have.

    ``cam``: of a classifier over tiles, channels of the class whose activation map is kept.

    Raises:
        ValueError: There is none (cards are checked for it when they are read).
    """
    if name == "classify" and dense:
        from wsiengine.tasks.windows import DenseClassification

        return DenseClassification()
    if name == "classify" and cam:
        from wsiengine.tasks.attributed import AttributedClassification

        return AttributedClassification(cam)
    if name == "classify":
        from wsiengine.tasks.classification import Classification

        return Classification()
    if name == "segment":
        from wsiengine.tasks.segmentation import Segmentation

        return Segmentation()
    if name == "detect":
        from wsiengine.tasks.detection import Detection

        return Detection()
    raise ValueError(f"no task is called {name!r}")
