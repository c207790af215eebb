"""Training needs torch (extra ``train``): without it these tests skip, and say so."""

from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

import pytest


class WithoutTorch(pytest.Module):
    """A module of tests that is not even imported."""

    def collect(self) -> Iterator[pytest.Item]:
        pytest.skip("training needs torch: pip install -c constraints.txt -e '.[train]'", allow_module_level=True)


def pytest_pycollect_makemodule(module_path: Path, parent: pytest.Collector) -> pytest.Module | None:
    return WithoutTorch.from_parent(parent, path=module_path) if find_spec("torch") is None else None
