"""Heavy libraries are imported in one place each, and the command line starts without them."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
ENGINE = sorted((ROOT / "wsiengine").rglob("*.py"))
KERNELS = sorted((ROOT / "kernels" / "wsikernels").rglob("*.py"))

# Library → the only places (relative to wsiengine/) that may import it.
HOMES = {
    "dask": ("graph.py",),
    "distributed": ("graph.py",),
    "zarr": ("store.py",),
    "onnxruntime": ("models/ort.py",),
    "MNN": ("models/mnn.py",),
    "_tools": ("models/mnn.py",),
    "torch": ("training/",),
    "onnx": ("training/",),
    "sklearn": ("training/",),
    "openslide": ("slides/",),
    "tiffslide": ("slides/",),
    "tifffile": ("slides/",),
    "imagecodecs": ("slides/", "datasets/ddsm.py"),
    "pydicom": ("datasets/dicom.py",),
    "geojson": ("annotations.py", "regions.py", "commands/train.py"),
    "requests": ("models/download.py",),
    "numba": (),
}


def _imports(path: Path, *, typing_too: bool = False) -> set[str]:
    """Top-level packages that a module imports anywhere, but for type checking."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    if not typing_too:
        for node in ast.walk(tree):
            if isinstance(node, ast.If) and getattr(node.test, "id", "") == "TYPE_CHECKING":
                node.body = []
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            found.add(node.module.split(".")[0])
    return found


@pytest.mark.parametrize("library", HOMES)
def test_a_heavy_library_has_one_home(library: str) -> None:
    strangers = []
    for path in ENGINE:
        name = path.relative_to(ROOT / "wsiengine").as_posix()
        if library in _imports(path) and not any(name == home or name.startswith(home) for home in HOMES[library]):
            strangers.append(name)
    # da.Array in an annotation is fine; an import at run time is not.
    assert not strangers, f"{library} is imported by {strangers}"


def test_kernels_know_nothing_of_the_engine() -> None:
    allowed = {"numpy", "numba", "llvmlite", "wsikernels", *sys.stdlib_module_names}
    for path in KERNELS:
        assert _imports(path) <= allowed, path.name


def test_the_command_line_starts_without_heavy_libraries() -> None:
    heavy = {"numpy", "numba", "dask", "zarr", "torch", "cv2", "shapely", "scipy", "onnxruntime", "openslide", "rich"}
    code = f"import sys, wsiengine.cli; wsiengine.cli._parser(None); print(sorted({heavy!r} & set(sys.modules)))"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT).stdout
    assert out.strip() == "[]"


def test_a_run_starts_without_what_only_its_end_needs() -> None:
    """Each of these would keep the first tile waiting."""
    late = {"numba", "scipy", "shapely", "geojson", "dask", "zarr", "onnxruntime"}
    code = f"import sys, wsiengine.models.session, wsiengine.series; print(sorted({late!r} & set(sys.modules)))"
    paths = f"{ROOT}:{ROOT / 'kernels'}"
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, capture_output=True, text=True, check=True, env={"PYTHONPATH": paths})
    assert done.stdout.strip() == "[]"


def test_running_a_model_never_imports_torch() -> None:
    code = "import sys, wsiengine.inference, wsiengine.report; print('torch' in sys.modules)"
    paths = f"{ROOT}:{ROOT / 'kernels'}"
    out = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        check=True,
        env={"PYTHONPATH": paths, "HOME": "/tmp"},
    ).stdout
    assert out.strip() == "False"


def test_public_names_are_few_and_all_there() -> None:
    import wsiengine

    assert len(wsiengine.__all__) <= 16
    for name in wsiengine.__all__:
        assert getattr(wsiengine, name) is not None
