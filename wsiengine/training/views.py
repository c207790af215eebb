"""Views: random tiles kept as what the network's frozen steps make of them, so that many trainings share the work::

    python -m wsiengine.training.views --data DIR --to views.npz --count 18000 --seed 0

Drawing a tile and running the frozen steps costs several times what training the other steps on it does. A
cross-validation draws its views once, from all fields; each of its trainings uses those whose own field, and whose
field of stain, belong to its training side.
"""

import argparse
import json
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np
import torch
from torch import Tensor

from wsiengine.errors import WsiError
from wsiengine.training.backbone import halved
from wsiengine.training.backbones import load_weights
from wsiengine.training.cells import STRIDE_PX, CellNet
from wsiengine.training.crc5 import BACKBONE, RECIPE
from wsiengine.training.data import Field, load, read_fields
from wsiengine.training.loop import Trainer, claim, load_trained, print_rows, run
from wsiengine.training.sampling import UNREADABLE, Batch, Sampler
from wsiengine.training.schedule import Recipe
from wsiengine.training.scoring import image_name

STEPS = 14
"""Frozen steps whose outcome is kept, unless told otherwise: MobileNetV2 up to its stride of 16 px."""
SIDE_PX = 160
DRAWN = "views.json"
"""In the folder of a training: how its views were drawn."""
_NEGATIVE, _SPOILT = 0.12, 0.055
"""Part of a batch without a class to learn, and of unreadable tiles: as they come about among views."""
_OTHER_SHARE = 0.3
_AT_ONCE = 50


@dataclass(frozen=True)
class Views:
    """One row per view.

    Attributes:
        maps: bfloat16 as int16, (N, rows, cols, channels).
        labels: int64 (N,): as :class:`~wsiengine.training.sampling.Batch` has them.
        epithelium: float32 (N, cells, cells).
        field: Name of the field it was cut from, (N,).
        like: Name of the field whose stain it took on, (N,); empty: none.
        steps: Frozen steps that the maps come from.
        drawn: (count, seed) of every drawing that they come from.
    """

    maps: np.ndarray
    labels: np.ndarray
    epithelium: np.ndarray
    field: np.ndarray
    like: np.ndarray
    steps: int = STEPS
    drawn: tuple[tuple[int, int], ...] = ()

    @classmethod
    def read(cls, files: list[Path]) -> "Views":
        """The views of one or more files.

        Raises:
            WsiError: They were made by different numbers of steps.
        """
        parts = [np.load(file) for file in files]
        steps = sorted({int(part["steps"]) for part in parts})
        if len(steps) > 1:
            raise WsiError(f"views of {steps[0]} and of {steps[-1]} steps do not go together", hint="draw them alike")
        maps, labels, epithelium, field, like = (
            np.concatenate([p[k] for p in parts]) for k in ("maps", "labels", "epithelium", "field", "like")
        )
        drawn = tuple((int(count), int(seed)) for part in parts for count, seed in part["drawn"])
        return cls(maps, labels, epithelium, field, like, steps[0], drawn)

    def save(self, file: Path) -> None:
        """Write as ``.npz``."""
        np.savez(file, **self.__dict__)


def make_views(
    network: CellNet, sampler: Sampler, names: list[str], count: int, seed: int, steps: int = STEPS
) -> Views:
    """Draw views.

    Args:
        network: Its frozen steps are run.
        sampler: Over all fields.
        names: Of the sampler's fields, in its order.
        count: How many.
        seed: View i depends on seed and i alone.
        steps: How many of the network's steps are run.
    """
    drawn, maps = [], []
    for start in range(0, count, _AT_ONCE):
        rows = [
            sampler.draw(np.random.default_rng((seed, i)), SIDE_PX) for i in range(start, min(count, start + _AT_ONCE))
        ]
        maps.append(_lower(network, np.stack([row.tile for row in rows]), steps))
        drawn += [
            (row.label, row.epithelium, names[row.index], "" if row.like is None else names[row.like]) for row in rows
        ]
    labels, epithelium, field, like = zip(*drawn, strict=True)
    columns = (np.concatenate(maps), np.array(labels), np.stack(epithelium), np.array(field), np.array(like))
    return Views(*columns, steps=steps, drawn=((count, seed),))


def _lower(network: CellNet, tiles: np.ndarray, steps: int) -> np.ndarray:
    with torch.inference_mode(), halved():
        x = network.backbone.prepare(torch.from_numpy(tiles).permute(0, 3, 1, 2))
        for step in network.backbone.steps[:steps]:
            x = step(x)
        return x.bfloat16().permute(0, 2, 3, 1).contiguous().view(torch.int16).numpy()


class UpperNet(CellNet):
    """The same network, which takes the maps of views (N, channels, rows, cols) instead of pixels.

    Args:
        classes: As for :class:`CellNet`.
        steps: Those that the views have behind them.
    """

    def __init__(self, classes: int, steps: int = STEPS) -> None:
        super().__init__(classes)
        self.steps = steps

    def forward(self, pixels: Tensor, frozen: int = 0) -> tuple[Tensor, Tensor]:
        """As :meth:`CellNet.forward`."""
        x = pixels
        for step in self.backbone.steps[self.steps :]:
            x = step(x)
        features = self.dropout(x)
        gate = self.gate(features)
        return self.head(features) * gate.sigmoid().detach(), gate[:, 0]


class ViewSampler:
    """Batches from views: class, then set, then case, then view; each batch from its own random stream.

    Args:
        views: All views.
        fields: The training side; views of other fields, or with their stain, are left out.
        recipe: Classes, shares, seed.

    Raises:
        WsiError: Not a single view of a class.
    """

    def __init__(self, views: Views, fields: list[Field], recipe: Recipe) -> None:
        self._views, self._recipe = views, recipe
        known = {image_name(f): f for f in fields}
        usable = np.isin(views.field, list(known)) & np.isin(views.like, [*known, ""])
        self._others: dict[int, np.ndarray] = {}
        self._tree: dict[int, dict[str, dict[str, list[int]]]] = defaultdict(
            lambda: defaultdict(lambda: defaultdict(list))
        )
        for label in (UNREADABLE, -1):
            self._others[label] = np.flatnonzero(usable & (views.labels == label))
        self._labels = views.labels.copy()
        for row in np.flatnonzero(usable & (views.labels >= 0)):
            field = known[str(views.field[row])]
            branch = field.label if field.label in recipe.joins else field.source
            label = recipe.classes.index(recipe.joins.get(field.label, field.label))  # views know more classes, maybe
            self._labels[row] = label
            self._tree[label][branch][field.case].append(int(row))
        if missing := [name for c, name in enumerate(recipe.classes) if c not in self._tree]:
            raise WsiError(f"no view shows {', '.join(missing)}", hint="draw more views, or train on more fields")

    def batch(self, iteration: int, size: int, side_px: int) -> Batch:
        """The batch of an iteration: always the same one. All views have one size; ``side_px`` is not asked."""
        rng = np.random.default_rng((self._recipe.seed, iteration))
        rows = np.array([self._row(rng) for _ in range(size)])
        maps = torch.from_numpy(self._views.maps[rows]).view(torch.bfloat16).float().numpy()
        return Batch(maps, self._labels[rows], self._views.epithelium[rows])

    def _row(self, rng: np.random.Generator) -> int:
        kind = rng.random()
        for label, low, high in ((-1, 0.0, _NEGATIVE), (UNREADABLE, 1 - _SPOILT, 1.0)):
            if low <= kind < high and len(self._others[label]):
                return int(rng.choice(self._others[label]))
        label = int(rng.integers(len(self._recipe.classes)))
        branch = self._tree[label]
        sources = sorted(branch)
        shares = self._recipe.shares.get(self._recipe.classes[label], {})
        share = np.array([shares.get(name, _OTHER_SHARE) for name in sources])
        cases = branch[sources[rng.choice(len(sources), p=share / share.sum())]]
        rows = cases[sorted(cases)[rng.integers(len(cases))]]
        return rows[rng.integers(len(rows))]


def train_on_views(fields: list[Field], recipe: Recipe, views: Views, *, backbone: Path, out: Path) -> CellNet:
    """As :func:`wsiengine.training.loop.train`, on views; the folder it leaves is the same.

    Args:
        fields: All labelled fields; the recipe chooses.
        recipe: What to do; as many frozen steps as the views have behind them.
        views: Drawn from those fields.
        backbone: The ImageNet weights with which the views were made.
        out: Folder of the training.

    Raises:
        WsiError: The recipe freezes more or fewer steps.
    """
    if recipe.frozen_blocks != views.steps:
        raise WsiError(
            f"views of {views.steps} steps, and a recipe that freezes {recipe.frozen_blocks}", hint="draw others"
        )
    claim(out, recipe)
    (out / DRAWN).write_text(json.dumps({"steps": views.steps, "drawn": views.drawn}) + "\n", encoding="utf-8")
    torch.set_num_threads(recipe.threads)
    torch.manual_seed(recipe.seed)
    sampler = ViewSampler(views, recipe.chosen(fields), recipe)
    network = UpperNet(len(recipe.classes), views.steps)
    load_weights(network.backbone, backbone)
    network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # torch's own stub lacks it
    average = UpperNet(len(recipe.classes), views.steps)
    average.load_state_dict(network.state_dict())
    run(Trainer(recipe, network, average, out), sampler, print_rows)
    return load_trained(out)


def _names(fields: list[Field]) -> Iterator[str]:
    return (image_name(f) for f in fields)


def main(arguments: list[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m wsiengine.training.views", description="Draw views.")
    parser.add_argument("--data", type=Path, required=True, help="folder that holds crc/ and weights/")
    parser.add_argument("--to", type=Path, required=True, help="file (.npz)")
    parser.add_argument("--count", type=int, default=18_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--steps", type=int, default=STEPS, help="frozen steps of the network that are run (default 14)"
    )
    parser.add_argument("--threads", type=int, default=2)
    asked = parser.parse_args(arguments)
    torch.set_num_threads(asked.threads)
    cv2.setNumThreads(1)
    fields = [f for f in read_fields(asked.data) if RECIPE.joins.get(f.label, f.label) in RECIPE.classes]
    network = CellNet(len(RECIPE.classes))
    load_weights(network.backbone, asked.data / BACKBONE)
    network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # torch's own stub lacks it
    pixels = [load(f, RECIPE.mpp) for f in fields]
    sampler = Sampler(pixels, RECIPE.classes, RECIPE.joins, RECIPE.shares, cell_px=STRIDE_PX, seed=asked.seed)
    make_views(network, sampler, list(_names(fields)), asked.count, asked.seed, asked.steps).save(asked.to)


if __name__ == "__main__":
    main()
