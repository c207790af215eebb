"""What is installed: the wheel is whole, dependencies are declared, versions are pinned."""

import ast
import re
import sys
import tomllib
import zipfile
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import wsiengine

ROOT = Path(__file__).parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
EXTRAS = PROJECT["optional-dependencies"]
PINNED = ("cpu", "mnn", "distributed", "train", "test", "dev")
LOCAL = {"wsiengine", "wsikernels", "tests", "benchmarks"}
HOMES = {"_tools": ["MNN"], **packages_distributions()}  # import name → names of packages


def _requirements(texts: list[str]) -> dict[str, Requirement]:
    found = [Requirement(text) for text in texts]
    return {canonicalize_name(r.name): r for r in found if canonicalize_name(r.name) != "wsiengine"}


CORE = _requirements(PROJECT["dependencies"])


def _pins() -> dict[str, str]:
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    return dict(line.split("==") for line in lines if line and not line.startswith("#"))


def test_constraints_are_exact_names_and_versions() -> None:
    lines = [line for line in (ROOT / "constraints.txt").read_text("utf-8").splitlines() if not line.startswith("#")]
    assert [line for line in lines if not re.fullmatch(r"[\w.-]+==[\w.]+", line)] == []
    assert lines == sorted(lines, key=str.lower)
    assert _pins()["torch"] == "2.13.0"


def test_every_requirement_is_pinned_within_its_range() -> None:
    pins = {canonicalize_name(name): version for name, version in _pins().items()}
    wanted = [*PROJECT["dependencies"], *(text for extra in PINNED for text in EXTRAS[extra])]
    for name, requirement in _requirements(wanted).items():
        assert name in pins, f"{name} is not in constraints.txt"
        assert requirement.specifier.contains(pins[name]), f"{requirement} but {pins[name]}"


def test_the_core_is_light() -> None:
    assert not {"torch", "onnxruntime", "onnxruntime-gpu", "distributed", "onnx", "opencv-python"} & set(CORE)
    assert {"onnxruntime"} == set(_requirements(EXTRAS["cpu"]))
    assert {"onnxruntime-gpu"} == set(_requirements(EXTRAS["gpu"]))


@pytest.mark.parametrize(
    "path", sorted((ROOT / "wsiengine").rglob("*.py")), ids=lambda p: p.relative_to(ROOT).as_posix()
)
def test_what_is_imported_is_declared(path: Path) -> None:
    extras = ("cpu", "gpu", "mnn", "distributed", "dicom")
    allowed = set(CORE) | {name for extra in extras for name in _requirements(EXTRAS[extra])}
    if "training" in path.parts:
        allowed |= set(_requirements(EXTRAS["train"]))
    for module in _imported(path) - LOCAL - set(sys.stdlib_module_names):
        names = {canonicalize_name(name) for name in HOMES.get(module, [module])}
        assert names & allowed, f"{module} ({', '.join(names)}) is not a declared dependency"


def _imported(path: Path) -> set[str]:
    """Top-level packages that a module imports anywhere."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            found.add(node.module.split(".")[0])
    return found


def test_the_wheel_is_whole(tmp_path: Path) -> None:
    wheel = pytest.importorskip("hatchling.builders.wheel", reason="building the wheel needs hatchling (extra `dev`)")
    [built] = wheel.WheelBuilder(str(ROOT)).build(directory=str(tmp_path), versions=["standard"])
    names = set(zipfile.ZipFile(built).namelist())
    sources = [*(ROOT / "wsiengine").rglob("*.py"), *(ROOT / "wsiengine/models/zoo").rglob("*.*")]
    expected = {path.relative_to(ROOT).as_posix() for path in sources}
    expected |= {path.relative_to(ROOT / "kernels").as_posix() for path in (ROOT / "kernels").rglob("*.py")}
    expected = {name for name in expected if "__pycache__" not in name}
    assert expected - names == set()
    strangers = {name.split("/")[0] for name in names} - {"wsiengine", "wsikernels"}
    [metadata] = strangers
    assert metadata == f"wsiengine-{wsiengine.__version__}.dist-info"
    terms = {path.name for path in (ROOT / "LICENSES").iterdir()} | {"LICENSE"}
    assert terms <= {Path(name).name for name in names if "licenses" in name}


def test_the_changelog_knows_this_version() -> None:
    text = (ROOT / "CHANGELOG.md").read_text("utf-8")
    assert re.search(rf"^## {re.escape(wsiengine.__version__)}\b", text, re.MULTILINE)


def test_every_licence_named_on_a_card_is_shipped() -> None:
    from wsiengine.models.registry import list_models

    for entry in list_models():
        assert entry.problem is None
        assert entry.card is not None
        if entry.card.terms:
            assert (ROOT / entry.card.terms).is_file(), entry.card.terms
