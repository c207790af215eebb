"""Training: recipes in, model folders out. Needs the ``train`` extra; nothing here is needed to run a model."""

import json
from pathlib import Path
from typing import Any

from wsiengine.errors import DependencyError


def run(recipe: Path | str, data: Path | str, out: Path | str, **options: Any) -> Path:
    """Train a model on your own labels: see :func:`wsiengine.training.recipe.run`.

    A recipe with ``"task": "detect"`` trains a detector: see :mod:`wsiengine.training.detection_recipe`.

    Raises:
        DependencyError: torch or onnx is not installed.
    """
    try:
        import onnx  # noqa: F401
        import torch  # noqa: F401
    except ImportError as missing:
        raise DependencyError(
            f"training needs {missing.name}, which is not installed", hint='pip install "wsiengine[train]"'
        ) from missing
    if _task(recipe) == "detect":
        from wsiengine.training.detection_recipe import run as train_detector

        options.pop("tell", None)  # its log is its progress
        return train_detector(Path(recipe), Path(data), Path(out), **options)
    from wsiengine.training.recipe import run as train

    return train(recipe, Path(data), Path(out), **options)


def _task(recipe: Path | str) -> str:
    """What the recipe is for; a file that cannot be read is refused by the one who reads it whole."""
    try:
        said = json.loads(Path(recipe).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return "classify"
    return str(said.get("task", "classify")) if isinstance(said, dict) else "classify"
