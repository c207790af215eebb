"""Compiled code: one private folder per state of the sources, and no trouble where nothing can be written."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from wsikernels import _jit
from wsikernels._jit import JIT_OFF, cache_folder

ROOT = Path(__file__).parents[2]
USE = "import numpy as np; from wsikernels.components import label_components as f; print(f(np.eye(3, dtype=bool))[1])"


def run(code: str, **environment: str) -> subprocess.CompletedProcess:
    """``code`` in a new interpreter that knows no home but what ``environment`` says."""
    kept = {k: v for k, v in os.environ.items() if k not in ("NUMBA_CACHE_DIR", "XDG_CACHE_HOME", "LOCALAPPDATA")}
    env = kept | {"PYTHONPATH": str(ROOT / "kernels")} | environment
    return subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=True)


@pytest.mark.skipif(JIT_OFF, reason="nothing is compiled")
def test_without_a_usable_home_code_is_kept_among_temporary_files(tmp_path):
    first = run(USE, HOME="/dev/null", TMPDIR=str(tmp_path))
    assert first.stdout.strip() == "1"
    (folder,) = tmp_path.glob("wsiengine-*/wsikernels-*")
    assert any(folder.glob("**/*.nbi"))
    assert folder.stat().st_mode & 0o077 == 0  # the cache holds pickles: nobody else may write there


@pytest.mark.skipif(JIT_OFF, reason="nothing is compiled")
def test_what_was_compiled_before_is_loaded_without_the_compiler(tmp_path):
    """Which imports hundreds of modules; where it is needed after all, both kinds of kernel work together."""
    script = tmp_path / "sums.py"
    script.write_text(
        "import sys, numpy as np; from wsikernels._jit import jit; from wsikernels.stain import _apply\n"
        "from wsikernels.components import label_components\n"
        "count = label_components(np.eye(3, dtype=bool))[1]\n"
        "print(count, 'numba.np.arraymath' in sys.modules, _apply.stats.cache_hits)\n"
        "@jit()\n"
        "def total(values): return values.sum()\n"
        "if len(sys.argv) > 1: print(total(np.arange(4.0)), len(total.signatures))\n"
    )
    runs = [f"import runpy, sys; sys.argv += {more}; runpy.run_path({str(script)!r})" for more in ([], [], [1], [1])]
    first, second, compiled, kept = (run(code, NUMBA_CACHE_DIR=str(tmp_path)).stdout.split() for code in runs)
    assert first[:2] == ["1", "True"]
    assert second[:2] == ["1", "False"]
    assert compiled == ["1", "False", *second[2:], "6.0", "1"] == kept


@pytest.mark.skipif(JIT_OFF, reason="nothing is compiled")
def test_where_nothing_can_be_written_kernels_still_work(tmp_path):
    code = f"import wsikernels._jit as j; j._parents = lambda: iter(()); {USE}; print(j.cache_folder())"
    assert run(code, HOME="/dev/null", TMPDIR=str(tmp_path)).stdout.split() == ["1", "None"]
    assert not any(tmp_path.iterdir())


@pytest.mark.skipif(JIT_OFF, reason="nothing is compiled")
def test_a_cpu_without_half_floats_gives_the_same_bits(tmp_path):
    code = (
        "import numpy as np; from wsikernels._float import half_bits; from wsikernels._jit import jit\n"
        "@jit()\n"
        "def halves(given, made):\n"
        "    for k in range(len(given)): made[k] = half_bits(given[k])\n"
        "at = np.arange(0, 0x7F800000, 4096, dtype=np.uint32)\n"
        "values = np.concatenate([at, at + 1, at + 4095, at | 0x80000000]).view(np.float32)\n"
        "values = values[~np.isnan(values)]; made = np.empty(len(values), np.uint16); halves(values, made)\n"
        "with np.errstate(over='ignore'): print(np.array_equal(made, values.astype(np.float16).view(np.uint16)))\n"
    )
    script = tmp_path / "halves.py"
    script.write_text(code)
    run_it = f"import runpy; runpy.run_path({str(script)!r})"
    for cpu in ({}, {"NUMBA_CPU_NAME": "generic", "NUMBA_CPU_FEATURES": ""}):
        assert run(run_it, NUMBA_CACHE_DIR=str(tmp_path), **cpu).stdout.strip() == "True"


def test_a_folder_of_another_user_is_not_used(tmp_path, monkeypatch):
    folder = tmp_path / "cache"
    folder.mkdir()
    assert _jit._make_private(folder) == folder
    if os.getuid() == 0:
        os.chown(folder, 12_345, -1)  # root may: the folder is a stranger's now
    else:
        monkeypatch.setattr(os, "getuid", lambda: 4_000_000)
    assert _jit._make_private(folder) is None


def test_a_file_in_the_way_is_not_a_folder(tmp_path):
    (tmp_path / "cache").write_text("")
    assert _jit._make_private(tmp_path / "cache" / "x") is None


@pytest.mark.skipif(JIT_OFF, reason="nothing is compiled")
def test_other_packages_keep_their_own_cache_setting():
    before = _jit.config.CACHE_DIR
    with _jit._numba_cache(Path("/nowhere")):
        assert _jit.config.CACHE_DIR == "/nowhere"
    assert before == _jit.config.CACHE_DIR


def test_the_folder_follows_the_sources():
    folder = cache_folder()
    assert folder is None or folder.name.startswith("wsikernels-")


@pytest.mark.skipif(JIT_OFF, reason="nothing is compiled")
def test_kernels_that_every_run_needs_are_compiled_when_imported():
    from wsikernels import clahe, lab, pack, resample, stain

    for kernel in (
        resample._mean_whole, resample._mean_general, pack._pack_planes, pack._pack_planes_half, pack._pack_pixels,
        lab._levels, lab.move_lightness, clahe._shifts, clahe._apply_lab, stain._apply,
    ):  # fmt: skip
        assert len(kernel.signatures) == 1


@pytest.mark.skipif(JIT_OFF, reason="nothing is compiled")
def test_read_only_pixels_are_taken():
    from wsikernels.stain import DensityTables, apply_density

    frozen = np.full((4, 5, 3), 200, np.uint8)
    frozen.flags.writeable = False
    assert np.array_equal(apply_density(frozen, DensityTables(np.eye(3))), frozen)


@pytest.mark.skipif(JIT_OFF, reason="nothing is compiled")
def test_kernels_let_go_of_the_interpreter():
    from wsikernels import clahe, lab, pack, resample, stain

    for module in (clahe, lab, pack, resample, stain):
        for kernel in vars(module).values():
            if hasattr(kernel, "targetoptions"):
                assert kernel.targetoptions["nogil"], kernel
                assert not kernel.targetoptions.get("parallel"), kernel
                assert not kernel.targetoptions.get("fastmath"), kernel  # sums as written: the same bits for every cut
