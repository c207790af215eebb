"""Training of a cell network: batches in, running average out, resumable, the same every time on one machine type."""

import json
import time
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits, cross_entropy

from wsiengine.errors import OutputConflict, WsiError
from wsiengine.training.backbones import load_weights
from wsiengine.training.cells import STRIDE_PX, CellNet
from wsiengine.training.data import Field, load
from wsiengine.training.sampling import UNREADABLE, Batch, Sampler
from wsiengine.training.scoring import Predict

CHECKPOINT_EVERY = 200


@dataclass(frozen=True)
class Recipe:
    """Everything that decides the weights, apart from the data and the version of torch.

    Attributes:
        classes: Names, in the order of the outputs.
        mpp: µm/px of a tile.
        folds: Which folds to train on.
        sources: Which sets to train on; empty: all.
        joins: Labels that are no class of their own, and the class whose output they train.
        shares: For a class, how often it is drawn from each set (or joined label); a set that is not named gets 0.3,
            one that is absent leaves its share to the others.
        small_until: Part of the training that uses the first, smaller of ``sides_px``.
    """

    classes: tuple[str, ...] = ()
    mpp: float = 1.0
    folds: tuple[int, ...] = (1, 2, 3, 4)
    sources: tuple[str, ...] = ()
    joins: Mapping[str, str] = field(default_factory=dict)
    shares: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    seed: int = 0
    iterations: int = 700
    small_until: float = 0.75
    sides_px: tuple[int, int] = (160, 224)
    batches: tuple[int, int] = (32, 24)
    rate: float = 3e-4
    head_rate: float = 1e-3
    weight_decay: float = 0.02
    frozen_blocks: int = 5
    label_smoothing: float = 0.1
    gate_weight: float = 0.7
    ema: float = 0.995
    threads: int = 2

    @classmethod
    def read(cls, file: Path) -> "Recipe":
        """The recipe of a training, from the ``recipe.json`` in its folder."""
        said: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
        values: dict[str, Any] = {name: tuple(v) if isinstance(v, list) else v for name, v in said.items()}
        return replace(cls(), **values)

    def chosen(self, fields: list[Field]) -> list[Field]:
        """The fields to train on.

        Raises:
            WsiError: A class has none.
        """
        found = [f for f in fields if f.fold in self.folds and (not self.sources or f.source in self.sources)]
        found = [f for f in found if self.joins.get(f.label, f.label) in self.classes]
        have = {self.joins.get(f.label, f.label) for f in found}
        if missing := [name for name in self.classes if name not in have]:
            raise WsiError(
                f"there is nothing to train {', '.join(missing)} on in folds {', '.join(map(str, self.folds))}",
                hint="add images of that class, or leave the class out",
            )
        return found

    def step(self, iteration: int) -> tuple[int, int]:
        """Batch size and tile side of an iteration: cheap small tiles first, the model's own size at the end."""
        late = iteration >= self.small_until * self.iterations
        return self.batches[late], self.sides_px[late]

    def rate_at(self, iteration: int) -> float:
        """Factor on the learning rates: linear warm-up over 5 %, then a cosine down to 0."""
        done = iteration / self.iterations
        return done / 0.05 if done < 0.05 else 0.5 * (1 + float(np.cos(np.pi * (done - 0.05) / 0.95)))


def train(fields: list[Field], recipe: Recipe, *, backbone: Path, out: Path) -> CellNet:
    """Train on the fields of the recipe's folds and sources; returns the averaged network.

    Args:
        fields: All labelled fields; the recipe chooses.
        recipe: What to do.
        backbone: The ImageNet weights.
        out: Folder of ``recipe.json``, ``log.jsonl``, ``checkpoint.pt`` and, at the end, ``model.pt``.

    Raises:
        OutputConflict: ``out`` holds the training of another recipe.
    """
    _claim(out, recipe)
    torch.set_num_threads(recipe.threads)
    torch.manual_seed(recipe.seed)
    cv2.setNumThreads(1)
    pixels = [load(f, recipe.mpp) for f in recipe.chosen(fields)]
    sampler = Sampler(pixels, recipe.classes, recipe.joins, recipe.shares, cell_px=STRIDE_PX, seed=recipe.seed)
    network = CellNet(len(recipe.classes))
    load_weights(network.backbone, backbone)
    network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # torch's own stub lacks it
    average = CellNet(len(recipe.classes))
    average.load_state_dict(network.state_dict())
    trainer = _Trainer(recipe, network, average, out)
    trainer.resume()
    for iteration, batch in _batches(sampler, recipe, trainer.iteration):
        trainer.step(iteration, batch)
    torch.save(average.state_dict(), out / "model.pt")
    return average.eval()


def load_trained(out: Path) -> CellNet:
    """The network that :func:`train` left in ``out``, ready for use."""
    state = torch.load(out / "model.pt", weights_only=True)
    network = CellNet(len(state["head.bias"]))
    network.load_state_dict(state)
    return network.eval()


def predictor(network: CellNet) -> Predict:
    """A trained network as it stands, for :mod:`wsiengine.training.scoring`."""

    def predict(tiles: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        with torch.inference_mode():
            cam, gate = network(torch.from_numpy(tiles).permute(0, 3, 1, 2))
            return cam.mean(dim=(2, 3)).numpy(), gate.sigmoid().mean(dim=(1, 2)).numpy()

    return predict


def _claim(out: Path, recipe: Recipe) -> None:
    out.mkdir(parents=True, exist_ok=True)
    said = json.dumps(asdict(recipe), indent=1)
    file = out / "recipe.json"
    if file.exists() and file.read_text() != said:
        raise OutputConflict(f"{out} holds the training of another recipe", hint="choose another --out, or delete it")
    file.write_text(said)


def _batches(sampler: Sampler, recipe: Recipe, start: int) -> Iterator[tuple[int, Batch]]:
    """Batches in order, drawn two ahead on another thread."""
    with ThreadPoolExecutor(1) as pool:
        ahead = [
            pool.submit(sampler.batch, i, *recipe.step(i)) for i in range(start, min(start + 2, recipe.iterations))
        ]
        for iteration in range(start, recipe.iterations):
            batch = ahead.pop(0).result()
            if iteration + 2 < recipe.iterations:
                ahead.append(pool.submit(sampler.batch, iteration + 2, *recipe.step(iteration + 2)))
            yield iteration, batch


class _Trainer:
    """The network, its running average, the optimiser, and their checkpoint."""

    def __init__(self, recipe: Recipe, network: CellNet, average: CellNet, out: Path) -> None:
        self.recipe, self.network, self.average = recipe, network, average
        self.iteration = 0
        self._out, self._started = out, time.monotonic()
        self._losses: list[tuple[float, float, float]] = []
        network.backbone.freeze(recipe.frozen_blocks)
        body = [p for p in network.backbone.parameters() if p.requires_grad]
        heads = [*network.head.parameters(), *network.gate.parameters()]
        groups = [{"params": body, "lr": recipe.rate}, {"params": heads, "lr": recipe.head_rate}]
        self._optimiser = torch.optim.AdamW(groups, weight_decay=recipe.weight_decay)
        self._rates = (recipe.rate, recipe.head_rate)

    def step(self, iteration: int, batch: Batch) -> None:
        """One batch: forward, backward, average, log."""
        torch.manual_seed(self.recipe.seed * 1_000_003 + iteration)  # dropout, also after a resume
        for group, rate in zip(self._optimiser.param_groups, self._rates, strict=True):
            group["lr"] = rate * self.recipe.rate_at(iteration)
        self.network.train()
        loss, parts = self._loss(batch)
        self._optimiser.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(self.network.parameters(), 5.0)
        self._optimiser.step()
        keep = min(self.recipe.ema, (iteration + 1) / (iteration + 10))
        with torch.no_grad():
            for mean, now in zip(self.average.parameters(), self.network.parameters(), strict=True):
                mean.lerp_(now, 1 - keep)
        self._losses.append(parts)
        self.iteration = iteration + 1
        if self.iteration % 50 == 0 or self.iteration == self.recipe.iterations:
            self._log()
        if self.iteration % CHECKPOINT_EVERY == 0:
            self._save()

    def _loss(self, batch: Batch) -> tuple[Tensor, tuple[float, float, float]]:
        pixels = torch.from_numpy(batch.tiles).permute(0, 3, 1, 2)  # channels last in memory
        cam, gate = self.network(pixels, self.recipe.frozen_blocks)
        labels = torch.from_numpy(batch.labels)
        graded = labels >= 0
        logits = cam.mean(dim=(2, 3))[graded]
        by_class = cross_entropy(logits, labels[graded], label_smoothing=self.recipe.label_smoothing)
        if (unreadable := labels == UNREADABLE).any():
            alike = -cam.mean(dim=(2, 3))[unreadable].log_softmax(dim=1).mean(dim=1)
            by_class = (by_class * graded.sum() + alike.sum()) / (graded | unreadable).sum()
        covered = torch.from_numpy(batch.epithelium)
        drawn = ~torch.isnan(covered)
        by_gate = binary_cross_entropy_with_logits(gate[drawn], covered[drawn]) if drawn.any() else gate.sum() * 0
        right = (logits.argmax(1) == labels[graded]).float().mean()
        return by_class + self.recipe.gate_weight * by_gate, (by_class.item(), by_gate.item(), right.item())

    def _log(self) -> None:
        means = np.mean(self._losses, axis=0).round(4).tolist()
        self._losses.clear()
        row = dict(zip(("class_loss", "gate_loss", "accuracy"), means, strict=True))
        line = json.dumps({"iteration": self.iteration, **row, "seconds": round(time.monotonic() - self._started, 1)})
        with (self._out / "log.jsonl").open("a", encoding="utf-8") as log:
            log.write(line + "\n")
        print(line, flush=True)

    def _save(self) -> None:
        state = {
            "iteration": self.iteration,
            "network": self.network.state_dict(),
            "average": self.average.state_dict(),
            "optimiser": self._optimiser.state_dict(),
        }
        torch.save(state, self._out / "checkpoint.new")
        (self._out / "checkpoint.new").replace(self._out / "checkpoint.pt")

    def resume(self) -> None:
        """Go on from the checkpoint, if there is one."""
        file = self._out / "checkpoint.pt"
        if not file.exists():
            return
        state = torch.load(file, weights_only=True)
        self.network.load_state_dict(state["network"])
        self.average.load_state_dict(state["average"])
        self._optimiser.load_state_dict(state["optimiser"])
        self.iteration = state["iteration"]
