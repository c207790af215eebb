"""Training: recipes in, model folders out. Needs the ``train`` extra; nothing here is needed to run a model."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from wsiengine.errors import DependencyError

if TYPE_CHECKING:
    from wsiengine.models.card import Card
    from wsiengine.training.data import Field


def run(recipe: Path | str, data: Path | str, out: Path | str, **options: Any) -> Path:
    """Train a model on your own labels: see :func:`wsiengine.training.recipe.run`.

    A recipe with ``"task": "detect"`` trains a detector: see :mod:`wsiengine.training.detection_recipe`.

    Raises:
        DependencyError: torch or onnx is not installed.
    """
    _need_torch()
    if _task(recipe) == "detect":
        from wsiengine.training.detection_recipe import run as train_detector

        options.pop("tell", None)  # its log is its progress
        return train_detector(Path(recipe), Path(data), Path(out), **options)
    from wsiengine.training.recipe import run as train

    return train(recipe, Path(data), Path(out), **options)


def quantise(
    model: "Card",
    trained: Sequence["Field"],
    held_out: Sequence["Field"],
    *,
    output: Path | None = None,
    precision: Sequence[str] = ("int8",),
    iterations: int = 300,
    threads: int = 1,
) -> Path:
    """A classifier in int8 or float16: see :func:`wsiengine.training.precisions.add_precisions`.

    Args:
        model: The model.
        trained: Tissue that int8 is trained on; labels are not used.
        held_out: Labelled tissue of other cases, on which it is measured.
        output: Folder for a copy of the model; None: the model's own.
        precision: ``int8``, ``fp16`` or both.
        iterations: Batches that int8 is trained with.
        threads: For that training.

    Returns:
        The model's folder.

    Raises:
        DependencyError: torch or onnx is not installed.
        WsiError: The model is no classifier, or the labels cannot be used.
    """
    _need_torch()
    from wsiengine.training.precisions import add_precisions, copy_model
    from wsiengine.training.rounding import Training

    if output is not None:
        copy_model(model, output)
    folder = output or model.folder
    how = Training(iterations=iterations, threads=threads)
    add_precisions(folder, precision, trained, held_out, how=how)
    return folder


def _need_torch() -> None:
    try:
        import onnx  # noqa: F401
        import torch  # noqa: F401
    except ImportError as missing:
        raise DependencyError(
            f"training needs {missing.name}, which is not installed", hint='pip install "wsiengine[train]"'
        ) from missing


def _task(recipe: Path | str) -> str:
    """What the recipe is for; a file that cannot be read is refused by the one who reads it whole."""
    try:
        said = json.loads(Path(recipe).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return "classify"
    return str(said.get("task", "classify")) if isinstance(said, dict) else "classify"
