"""What a user asks of a run's results: how regions are drawn, and what may be asked of which model.

Apart from :mod:`wsiengine.finishing`, which does it: a run knows what is asked before it loads what draws.
"""

from dataclasses import asdict, dataclass
from typing import Any

from wsiengine.errors import PlanError
from wsiengine.tasks.classify import MapLayout


@dataclass(frozen=True, slots=True)
class Finish:
    """How labels and polygons are made from the probabilities.

    Attributes:
        threshold: Least probability of the best class; below it a cell is uncertain.
        smoothing_um: Standard deviation of a Gaussian over the map before labels are drawn; 0 for none.
        tolerance_um: How far a simplified boundary may lie from the cells' edges; None = half a cell.
        min_area_um2: Regions smaller than this are left out.
        tiles: Also write each tile as a QuPath ``tile`` object.
        classes: Of a detector's or segmenter's objects only these; None for all.
    """

    threshold: float
    smoothing_um: float = 0.0
    tolerance_um: float | None = None
    min_area_um2: float = 0.0
    tiles: bool = False
    classes: tuple[str, ...] | None = None

    @property
    def facts(self) -> dict[str, Any]:
        """As JSON has it, for ``run.json``; a choice of classes only where there is one."""
        chosen = {"classes": list(self.classes)} if self.classes else {}
        return {name: value for name, value in asdict(self).items() if name != "classes"} | chosen

    def __post_init__(self) -> None:
        if not 0 <= self.threshold <= 1:
            raise PlanError(f"The threshold must be between 0 and 1, not {self.threshold:g}.", hint="0.5, say.")
        for name in ("smoothing_um", "tolerance_um", "min_area_um2"):
            value = getattr(self, name)
            if value is not None and not 0 <= value < float("inf"):
                raise PlanError(f"{name} must be 0 or more, not {value:g}.", hint="0 switches it off.")


def refuse_unfit(finish: Finish, task: str, layout: MapLayout) -> None:
    """Whether a model of that task can give what is asked; before a run, so that none is in vain.

    Raises:
        PlanError: It cannot; says why.
    """
    if finish.tiles and task != "classify":
        raise PlanError(
            "Only classifiers have tile objects: this model's results are no tiles.", hint="leave --tiles out."
        )
    if finish.smoothing_um and task == "detect":
        raise PlanError(
            "Smoothing is for maps: a detector's objects are not drawn from one.", hint="leave --smoothing out."
        )
    if not finish.classes:
        return
    names = [name for name, _ in getattr(layout, "object_classes", ())]
    if not names:
        raise PlanError("Only a detector's or segmenter's objects can be chosen by class.", hint="leave --classes out.")
    unknown = [name for name in finish.classes if name not in names]
    if unknown:
        raise PlanError(f"The model knows no class {', '.join(unknown)}.", hint=f"its classes are {', '.join(names)}.")
