"""Examples in docstrings run."""

import doctest
import importlib
import importlib.util
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


def _modules() -> list[str]:
    """Modules with examples."""
    found = []
    for base, package in ((ROOT, "wsiengine"), (ROOT / "kernels", "wsikernels")):
        for path in sorted((base / package).rglob("*.py")):
            if ">>> " in path.read_text(encoding="utf-8"):
                found.append(".".join(path.relative_to(base).with_suffix("").parts).removesuffix(".__init__"))
    return found


def test_there_are_examples() -> None:
    assert {"wsiengine.grid", "wsiengine.wording", "wsiengine.commands.arguments"} <= set(_modules())


@pytest.mark.parametrize("name", _modules())
def test_examples_of_a_module(name: str) -> None:
    if name.startswith("wsiengine.training."):
        pytest.importorskip("torch", reason="training needs the extra `train`")
    result = doctest.testmod(importlib.import_module(name))
    assert result.attempted
    assert not result.failed
