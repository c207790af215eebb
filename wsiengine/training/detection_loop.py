"""Training of detectors and of what follows them: batches in, running average out, resumable, repeatable.

The networks differ, the loop does not: a :class:`Lesson` says what a batch is and what is wrong with the answer to it.
"""

import json
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from copy import deepcopy
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from wsiengine.errors import OutputConflict
from wsiengine.training import checkpoint
from wsiengine.training.loop import Progress

CHECKPOINT_EVERY = 100
Batch = tuple[Any, ...]


@dataclass(frozen=True)
class Schedule:
    """How long and how fast is learnt.

    Attributes:
        iterations: Batches in all.
        rate, head_rate: Greatest learning rates of the backbone and of the rest.
        ema: Weight of the past in the running average that is kept.
        seed: Of everything that is drawn.
        threads: Of the arithmetic.
    """

    iterations: int
    rate: float = 3e-4
    head_rate: float = 1e-3
    weight_decay: float = 0.02
    ema: float = 0.995
    seed: int = 0
    threads: int = 2

    def factor(self, iteration: int) -> float:
        """On the rates: linear warm-up over 5 %, then a cosine down to 0."""
        done = iteration / self.iterations
        return done / 0.05 if done < 0.05 else 0.5 * (1 + float(np.cos(np.pi * (done - 0.05) / 0.95)))


@dataclass(frozen=True)
class Lesson:
    """What is to be learnt.

    Attributes:
        network: Has a ``backbone``.
        batch: Iteration's random numbers → a batch; called on another thread.
        loss: Network and batch → the loss, and its parts by name.
        facts: What decides the weights besides the schedule, as JSON; a folder keeps to one training.
    """

    network: nn.Module
    batch: Callable[[np.random.Generator], Batch]
    loss: Callable[[nn.Module, Batch], tuple[Tensor, dict[str, Tensor]]]
    facts: Mapping[str, Any]


def fit(
    lesson: Lesson, schedule: Schedule, out: Path, tell: Callable[[Progress], None] = lambda progress: None
) -> nn.Module:
    """Train; returns the averaged network, ready for use.

    Args:
        lesson: What.
        schedule: How.
        out: Folder of ``recipe.json``, ``log.jsonl``, ``checkpoint.pt`` and, at the end, ``model.pt``.
        tell: Told of every iteration.

    Raises:
        OutputConflict: ``out`` holds another training.
    """
    _claim(out, {"schedule": asdict(schedule), **lesson.facts})
    torch.set_num_threads(schedule.threads)
    trainer = _Trainer(lesson, schedule, out)
    trainer.resume()
    for iteration, batch in _batches(lesson, schedule, trainer.iteration):
        row = trainer.step(iteration, batch)
        tell(Progress(trainer.iteration, schedule.iterations, row))
    torch.save(trainer.average.state_dict(), out / "model.pt")
    return trainer.average.eval()


def restore(network: nn.Module, out: Path) -> nn.Module:
    """The network with the weights that :func:`fit` left in ``out``."""
    network.load_state_dict(torch.load(out / "model.pt", weights_only=True))
    return network.eval()


def _claim(out: Path, facts: Mapping[str, Any]) -> None:
    out.mkdir(parents=True, exist_ok=True)
    said, file = json.dumps(facts, indent=1, sort_keys=True), out / "recipe.json"
    if file.exists() and file.read_text(encoding="utf-8") != said:
        raise OutputConflict(f"{out} holds another training", hint="choose another folder, or delete it")
    file.write_text(said, encoding="utf-8")


def _batches(lesson: Lesson, schedule: Schedule, start: int) -> Iterator[tuple[int, Batch]]:
    """Batches in order, each from its own random numbers, drawn two ahead on another thread."""

    def drawn(iteration: int) -> Batch:
        return lesson.batch(np.random.default_rng((schedule.seed, iteration)))

    with ThreadPoolExecutor(1) as pool:
        ahead = [pool.submit(drawn, i) for i in range(start, min(start + 2, schedule.iterations))]
        for iteration in range(start, schedule.iterations):
            batch = ahead.pop(0).result()
            if iteration + 2 < schedule.iterations:
                ahead.append(pool.submit(drawn, iteration + 2))
            yield iteration, batch


class _Trainer:
    """The network, its running average, the optimiser, and their checkpoint."""

    def __init__(self, lesson: Lesson, schedule: Schedule, out: Path) -> None:
        self.lesson, self.schedule, self.out = lesson, schedule, out
        self.network, self.average = lesson.network, deepcopy(lesson.network)
        self.iteration = 0
        self._started, self._parts = time.monotonic(), []  # type: ignore[var-annotated]
        backbone = lesson.network.get_submodule("backbone")
        body = [p for p in backbone.parameters() if p.requires_grad]
        own = {id(p) for p in backbone.parameters()}
        heads = [p for p in lesson.network.parameters() if id(p) not in own]
        self._rates = (schedule.rate, schedule.head_rate)
        groups = [{"params": p, "lr": r} for p, r in zip((body, heads), self._rates, strict=True)]
        self._optimiser = torch.optim.AdamW(groups, weight_decay=schedule.weight_decay)

    def step(self, iteration: int, batch: Batch) -> dict[str, Any] | None:
        """One batch: forward, backward, average; returns what is logged, where something is."""
        torch.manual_seed(self.schedule.seed * 1_000_003 + iteration)  # dropout and samplers, also after a resume
        for group, rate in zip(self._optimiser.param_groups, self._rates, strict=True):
            group["lr"] = rate * self.schedule.factor(iteration)
        self.network.train()
        loss, parts = self.lesson.loss(self.network, batch)
        self._optimiser.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(self.network.parameters(), 5.0)
        self._optimiser.step()
        keep = min(self.schedule.ema, (iteration + 1) / (iteration + 10))
        with torch.no_grad():
            for mean, now in zip(self.average.parameters(), self.network.parameters(), strict=True):
                mean.lerp_(now, 1 - keep)
            for kept, at in zip(self.average.buffers(), self.network.buffers(), strict=True):
                kept.copy_(at)  # statistics of batch normalisation are averages already
        self._parts.append({"loss": loss.item()} | {name: value.item() for name, value in parts.items()})
        self.iteration = iteration + 1
        logged = self.iteration % 20 == 0 or self.iteration == self.schedule.iterations
        row = self._log() if logged else None
        if self.iteration % CHECKPOINT_EVERY == 0 or self.iteration == self.schedule.iterations:
            self._save()
        return row

    def _log(self) -> dict[str, Any]:
        means = {name: round(float(np.mean([p[name] for p in self._parts])), 4) for name in self._parts[0]}
        self._parts.clear()
        row = {"iteration": self.iteration, **means, "seconds": round(time.monotonic() - self._started, 1)}
        with (self.out / "log.jsonl").open("a", encoding="utf-8") as log:
            log.write(json.dumps(row) + "\n")
        return row

    @property
    def _kept(self) -> checkpoint.Parts:
        return {"network": self.network, "average": self.average, "optimiser": self._optimiser}

    def _save(self) -> None:
        checkpoint.write(self.out, self._kept, iteration=self.iteration)

    def resume(self) -> None:
        """Go on from the checkpoint, if there is one."""
        self.iteration = checkpoint.read(self.out, self._kept).get("iteration", self.iteration)
