"""Training: recipes in, model folders out. Needs the ``train`` extra; nothing here is needed to run a model."""

from pathlib import Path
from typing import Any

from wsiengine.errors import DependencyError


def run(recipe: Path | str, data: Path | str, out: Path | str, **options: Any) -> Path:
    """Train a model on your own labels: see :func:`wsiengine.training.recipe.run`.

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
    from wsiengine.training.recipe import run as train

    return train(recipe, Path(data), Path(out), **options)
