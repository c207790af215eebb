"""The rule for the class in the middle: what a network says about adenoma counts less, what lies between counts more.

Normal, adenoma and carcinoma are steps of one way. Trained as three free classes, a network finds signs of adenoma that
hold in its own laboratories alone: on tissue of another one it still puts fields in the right order, from normal to
carcinoma, but hardly ever says adenoma (docs/crc5.md has the figures). The rule keeps the difference between the outer
classes, shrinks the evidence for the middle one to a share, and lifts it by a constant wherever there is epithelium::

    outer = (z2 − z0) / 2        middle = share · (z1 − (z0 + z2) / 2) + lift · epithelium
    z = (−outer, middle, outer)

With share 1 and lift 0 nothing changes; with share 0 the network is an ordinal one. All of it is linear per cell, so
that it goes into the weights of the class head.
"""

from collections.abc import Iterable
from copy import deepcopy
from dataclasses import dataclass, replace

import numpy as np
import torch

from wsiengine.evaluate import balanced_accuracy, class_figures, confusion
from wsiengine.training.cells import CellNet
from wsiengine.training.figures import asserted, diagnosed
from wsiengine.training.scoring import Scores

SHARES = (0.0, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.7, 1.0)
MOST_LOST = 0.01
"""What a rule may cost at home."""
LIFTS = tuple(round(0.25 * i, 2) for i in range(9))


@dataclass(frozen=True)
class MiddleRule:
    """See the module. The three classes are in rising order."""

    share: float = 1.0
    lift: float = 0.0

    @property
    def matrix(self) -> np.ndarray:
        """(3, 3): new logits from old ones, without the lift."""
        return np.array([[0.5, 0, -0.5], [-self.share / 2, self.share, -self.share / 2], [-0.5, 0, 0.5]], np.float32)

    def applied(self, scores: Scores) -> Scores:
        """Scores of a network as they would be with the rule in its head."""
        lifted = np.outer(scores.epithelium, [0.0, self.lift, 0.0])
        return replace(scores, logits=(scores.logits @ self.matrix.T + lifted).astype(np.float32))

    def built_in(self, network: CellNet) -> CellNet:
        """A copy of the network that says what the rule makes of its scores."""
        copy = deepcopy(network)
        matrix = torch.from_numpy(self.matrix)
        with torch.no_grad():
            assert copy.head.bias is not None
            copy.head.weight.copy_(torch.einsum("ij,jchw->ichw", matrix, copy.head.weight))
            copy.head.bias.copy_(matrix @ copy.head.bias + torch.tensor([0.0, self.lift, 0.0]))
        return copy.eval()


@dataclass(frozen=True)
class Worth:
    """Balanced accuracy by image of a set, and the lowest recall among its classes."""

    balanced: float
    worst: float


def image_worth(scores: Scores) -> dict[str, Worth]:
    """How every set that the scores hold is told apart, by image."""
    images = diagnosed(scores).by_field()
    sources = images.column("source")
    found = {}
    for source in np.unique(sources):
        part = images.where(sources == source)
        counts = confusion(part.labels, asserted(part), len(part.classes))
        recall = class_figures(counts).recall
        found[str(source)] = Worth(balanced_accuracy(counts), float(np.nanmin(recall)))
    return found


def fit_rule(home: Scores, away: Iterable[Scores]) -> MiddleRule:
    """The rule that is worth most on sets that were not seen, of those that cost a point at most on sets that were.

    A set's worth is the mean of its balanced accuracy and of its worst class's recall: a class that is never found is
    no use, however well the others do.

    Args:
        home: Scores of fields that their network has not seen, of sets that it has seen.
        away: Scores of sets that their network has not seen.
    """
    known, unknown = [diagnosed(home)], [diagnosed(part) for part in away]

    def worth(parts: list[Scores], rule: MiddleRule) -> float:
        found = [w for part in parts for w in image_worth(rule.applied(part)).values()]
        return float(np.mean([(w.balanced + w.worst) / 2 for w in found]))

    needed = worth(known, MiddleRule()) - MOST_LOST
    rules = [MiddleRule(share, lift) for share in SHARES for lift in LIFTS]
    return max((rule for rule in rules if worth(known, rule) >= needed), key=lambda rule: worth(unknown, rule))
