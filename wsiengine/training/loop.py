"""Training of a cell network: batches in, running average out, resumable, the same every time on one machine type."""

import json
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

import cv2
import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits, cross_entropy

from wsiengine.errors import OutputConflict
from wsiengine.training import checkpoint
from wsiengine.training.backbones import load_weights
from wsiengine.training.cells import STRIDE_PX, CellNet
from wsiengine.training.data import Field, load
from wsiengine.training.sampling import UNREADABLE, Batch, Sampler
from wsiengine.training.schedule import Recipe
from wsiengine.training.scoring import Predict

CHECKPOINT_EVERY = 100
LOG_EVERY = 50  # iterations at most; short trainings are logged twenty times


@dataclass(frozen=True)
class Progress:
    """Told after every iteration; ``row`` is what was logged, where something was."""

    iteration: int
    iterations: int
    row: Mapping[str, Any] | None = None


def print_rows(progress: Progress) -> None:
    """Prints what is logged."""
    if progress.row is not None:
        print(json.dumps(progress.row), flush=True)


Validate = Callable[[CellNet], dict[str, float]]
"""Figures of a network on the validation fields; ``score`` among them, the larger the better."""


def train(
    fields: list[Field],
    recipe: Recipe,
    *,
    backbone: Path | None,
    out: Path,
    tell: Callable[[Progress], None] = print_rows,
    validate: Validate | None = None,
) -> CellNet:
    """Train on the fields of the recipe's folds and sources; returns the averaged network.

    Started again on the same folder it goes on from the last checkpoint, and ends with the weights that it would have
    had without the interruption, however it ended: a checkpoint is replaced as a whole.

    Args:
        fields: All labelled fields; the recipe chooses.
        recipe: What to do.
        backbone: Its weights; None starts from chance.
        out: Folder of ``recipe.json``, ``log.jsonl``, ``checkpoint.pt`` and, at the end, ``model.pt``.
        tell: Told of every iteration.
        validate: Scores the averaged network every ``recipe.validate_every`` iterations, where the recipe has
            validation folds.

    Raises:
        OutputConflict: ``out`` holds the training of another recipe.
    """
    claim(out, recipe)
    torch.set_num_threads(recipe.threads)
    torch.manual_seed(recipe.seed)
    cv2.setNumThreads(1)
    pixels = [load(f, recipe.mpp) for f in recipe.chosen(fields)]
    sampler = Sampler(pixels, recipe.classes, recipe.joins, recipe.shares, cell_px=STRIDE_PX, seed=recipe.seed)
    network = CellNet(len(recipe.classes), backbone=recipe.backbone)
    if backbone is not None:
        load_weights(network.backbone, backbone)
    network.backbone.statistics = backbone is None
    network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # torch's own stub lacks it
    average = CellNet(len(recipe.classes), backbone=recipe.backbone)
    average.load_state_dict(network.state_dict())
    trainer = Trainer(recipe, network, average, out)
    trainer.validate = validate if recipe.validation_folds else None
    return run(trainer, sampler, tell)


class Source(Protocol):
    """Where batches come from: :class:`~wsiengine.training.sampling.Sampler`, or views drawn beforehand."""

    def batch(self, iteration: int, size: int, side_px: int) -> Batch:
        """The batch of an iteration."""


def run(trainer: "Trainer", sampler: Source, tell: Callable[[Progress], None]) -> CellNet:
    """Every batch that is left; writes and returns the averaged network."""
    recipe, average = trainer.recipe, trainer.average
    trainer.resume()
    for iteration, batch in _batches(sampler, recipe, trainer.iteration):
        if trainer.stopped:
            break
        row = trainer.step(iteration, batch)
        tell(Progress(trainer.iteration, recipe.iterations, row))
    trainer.take_best()
    torch.save(average.state_dict(), trainer.out / "model.pt")
    return average.eval()


def load_trained(out: Path) -> CellNet:
    """The network that :func:`train` left in ``out``, ready for use."""
    state = torch.load(out / "model.pt", weights_only=True)
    network = CellNet(len(state["head.bias"]), backbone=Recipe.read(out / "recipe.json").backbone)
    network.load_state_dict(state)
    return network.eval()


def predictor(network: CellNet) -> Predict:
    """A trained network as it stands, for :mod:`wsiengine.training.scoring`."""

    def predict(tiles: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        with torch.inference_mode():
            cam, gate = network(torch.from_numpy(tiles).permute(0, 3, 1, 2))
            return cam.mean(dim=(2, 3)).numpy(), gate.sigmoid().mean(dim=(1, 2)).numpy()

    return predict


def claim(out: Path, recipe: Recipe) -> None:
    """Make the folder of a training, or find it to be the same recipe's."""
    out.mkdir(parents=True, exist_ok=True)
    said = json.dumps(asdict(recipe), indent=1)
    file = out / "recipe.json"
    if file.exists() and Recipe.read(file) != recipe:
        raise OutputConflict(f"{out} holds the training of another recipe", hint="choose another folder, or delete it")
    file.write_text(said)


def _batches(sampler: Source, recipe: Recipe, start: int) -> Iterator[tuple[int, Batch]]:
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


class Trainer:
    """The network, its running average, the optimiser, and their checkpoint."""

    def __init__(self, recipe: Recipe, network: CellNet, average: CellNet, out: Path) -> None:
        self.recipe, self.network, self.average = recipe, network, average
        self.iteration = 0
        self.validate: Validate | None = None
        self.out, self._started = out, time.monotonic()
        self._losses: list[tuple[float, float, float]] = []
        self._best: dict[str, Any] = {"score": -np.inf, "stale": 0, "state": None}
        weights = [recipe.class_weights.get(name, 1.0) for name in recipe.classes]
        self._class_weights = torch.tensor(weights) if recipe.class_weights else None
        heads = [*network.head.parameters(), *network.gate.parameters()]
        groups = [
            {"params": list(network.backbone.parameters()), "lr": recipe.rate},
            {"params": heads, "lr": recipe.head_rate},
        ]
        self._optimiser = torch.optim.AdamW(groups, weight_decay=recipe.weight_decay)
        self._rates = (recipe.rate, recipe.head_rate)

    @property
    def stopped(self) -> bool:
        """Whether validation has not improved for as long as the recipe waits."""
        return bool(self.recipe.patience) and self._best["stale"] >= self.recipe.patience

    def step(self, iteration: int, batch: Batch) -> dict[str, Any] | None:
        """One batch: forward, backward, average; log, validate and save when it is time. Returns what was logged."""
        torch.manual_seed(self.recipe.seed * 1_000_003 + iteration)  # dropout, also after a resume
        for group, rate in zip(self._optimiser.param_groups, self._rates, strict=True):
            group["lr"] = rate * self.recipe.rate_at(iteration)
        self.network.backbone.freeze(self.recipe.frozen_at(iteration))
        self.network.train()
        loss, parts = self._loss(batch)
        self._optimiser.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(self.network.parameters(), 5.0)
        self._optimiser.step()
        self._follow(min(self.recipe.ema, (iteration + 1) / (iteration + 10)))
        self._losses.append(parts)
        self.iteration = iteration + 1
        ends = self.iteration == self.recipe.iterations
        every = min(LOG_EVERY, max(1, self.recipe.iterations // 20))
        row = self._log() if self.iteration % every == 0 or ends else None
        if self.validate is not None and (self.iteration % self.recipe.validate_every == 0 or ends):
            row = (row or {"iteration": self.iteration}) | {"validation": self._try_out(self.validate)}
        if row is not None:
            with (self.out / "log.jsonl").open("a", encoding="utf-8") as log:
                log.write(json.dumps(row) + "\n")
        if self.iteration % CHECKPOINT_EVERY == 0 or ends:
            self._save()
        return row

    def _follow(self, keep: float) -> None:
        """The running average moves towards the network; statistics of batches are the network's."""
        with torch.no_grad():
            for mean, now in zip(self.average.parameters(), self.network.parameters(), strict=True):
                mean.lerp_(now, 1 - keep)
            for kept, new in zip(self.average.buffers(), self.network.buffers(), strict=True):
                kept.copy_(new)

    def _loss(self, batch: Batch) -> tuple[Tensor, tuple[float, float, float]]:
        pixels = torch.from_numpy(batch.tiles).permute(0, 3, 1, 2)  # channels last in memory
        cam, gate = self.network(pixels, self.recipe.frozen_at(self.iteration))
        labels = torch.from_numpy(batch.labels)
        graded = labels >= 0
        logits = cam.mean(dim=(2, 3))[graded]
        smoothing = self.recipe.label_smoothing
        by_class = cross_entropy(logits, labels[graded], self._class_weights, label_smoothing=smoothing)
        if (unreadable := labels == UNREADABLE).any():
            alike = -cam.mean(dim=(2, 3))[unreadable].log_softmax(dim=1).mean(dim=1)
            by_class = (by_class * graded.sum() + alike.sum()) / (graded | unreadable).sum()
        covered = torch.from_numpy(batch.epithelium)
        drawn = ~torch.isnan(covered)
        by_gate = binary_cross_entropy_with_logits(gate[drawn], covered[drawn]) if drawn.any() else gate.sum() * 0
        right = (logits.argmax(1) == labels[graded]).float().mean()
        return by_class + self.recipe.gate_weight * by_gate, (by_class.item(), by_gate.item(), right.item())

    def _log(self) -> dict[str, Any]:
        means = np.mean(self._losses, axis=0).round(4).tolist()
        self._losses.clear()
        row = dict(zip(("class_loss", "gate_loss", "accuracy"), means, strict=True))
        return {"iteration": self.iteration, **row, "seconds": round(time.monotonic() - self._started, 1)}

    def _try_out(self, validate: Validate) -> dict[str, float]:
        """Figures of the average on the validation fields; the best network so far is kept."""
        figures = validate(self.average.eval())
        if figures["score"] > self._best["score"]:
            state = {name: value.clone() for name, value in self.average.state_dict().items()}
            self._best = {"score": figures["score"], "stale": 0, "state": state}
        else:
            self._best["stale"] += 1
        return figures

    def take_best(self) -> None:
        """The average becomes the best network that validation saw, where there was one and training could stop."""
        if self.recipe.patience and self._best["state"] is not None:
            self.average.load_state_dict(self._best["state"])

    @property
    def _kept(self) -> checkpoint.Parts:
        return {"network": self.network, "average": self.average, "optimiser": self._optimiser}

    def _save(self) -> None:
        checkpoint.write(self.out, self._kept, iteration=self.iteration, best=self._best)

    def resume(self) -> None:
        """Go on from the checkpoint, if there is one; what was logged after it will be logged again."""
        log = self.out / "log.jsonl"
        state = checkpoint.read(self.out, self._kept)
        self.iteration, self._best = state.get("iteration", self.iteration), state.get("best", self._best)
        if log.exists():
            lines = [line for line in log.read_text(encoding="utf-8").splitlines() if line.endswith("}")]
            kept = [line for line in lines if json.loads(line)["iteration"] <= self.iteration]
            log.write_text("".join(f"{line}\n" for line in kept), encoding="utf-8")
