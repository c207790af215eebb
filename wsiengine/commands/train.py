"""``wsiengine train``: a model from your own labels, ready for ``--model``."""

import argparse
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from wsiengine.training.loop import Progress

STOPPED = "\nstopped  what was trained so far is kept: run the same command again to go on."


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("recipe", metavar="RECIPE", help="a JSON file, or `default`")
    parser.add_argument(
        "--data",
        type=Path,
        required=True,
        metavar="DIR",
        help="labels.csv, a folder per class, or slides with QuPath annotations",
    )
    parser.add_argument("-o", "--output", type=Path, required=True, metavar="DIR", help="the model's folder")


def run(args: argparse.Namespace) -> int:
    from wsiengine.training import run as train

    steps = Steps()
    try:
        folder = train(args.recipe, args.data, args.output, tell=steps)
    finally:
        steps.close()
    print(f"files  {folder / 'report.md'} · {folder / 'curves.png'} · {folder / 'card.json'}")
    print(f"model  {folder}: `wsiengine infer SLIDE --model {folder}`")
    return 0


class Steps:
    """Shows a training's progress: a bar in a terminal, a plain line for every logged one elsewhere."""

    def __init__(self) -> None:
        self._bar: Any = None
        self._task: Any = None
        self._words = ""
        self._started = time.monotonic()

    def __call__(self, progress: "Progress") -> None:
        if progress.row is not None:
            self._words = _words(progress.row)
        if not sys.stdout.isatty():
            if progress.row is not None:
                done = f"{progress.iteration:,}/{progress.iterations:,}"
                print(f"train  {done} · {self._words} · {time.monotonic() - self._started:.0f} s", flush=True)
            return
        if self._bar is None:
            from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

            columns = (
                TextColumn("train  "),
                BarColumn(),
                TextColumn("{task.percentage:3.0f} %  {task.fields[words]}"),
                TimeRemainingColumn(),
            )
            self._bar = Progress(*columns, refresh_per_second=4)
            self._task = self._bar.add_task("train", total=progress.iterations, words="")
            self._bar.start()
        self._bar.update(self._task, completed=progress.iteration, words=self._words)
        if progress.iteration == progress.iterations:
            self.close()

    def close(self) -> None:
        """The training is over, well or not."""
        if self._bar is not None:
            self._bar.stop()
            self._bar = None


def _words(row: Any) -> str:
    parts = []
    if "class_loss" in row:
        parts += [f"loss {row['class_loss']:.3f}", f"right {row['accuracy']:.0%}"]
    elif "loss" in row:
        parts.append(f"loss {row['loss']:.3f}")
    if "validation" in row:
        parts.append(f"validation {row['validation']['balanced_accuracy']:.3f}")
    return " · ".join(parts)
