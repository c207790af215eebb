"""MNN beside ONNX Runtime: the same answers but for rounding, whole runs, and words where it cannot."""

import json
import os
import pickle
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

from benchmarks.networks import make
from tests import planted_slides as planted
from tests.models.tiny import FORMS, Tiny, block, card_json, graph, lattice, tiny, write_card
from wsiengine.errors import CardError, DependencyError, OutputError, ProviderError, ScoreError
from wsiengine.geometry import Box, Size
from wsiengine.inference import infer
from wsiengine.models import mnn
from wsiengine.models.card import Card, load_card
from wsiengine.models.integrity import file_sha256
from wsiengine.models.registry import load_model
from wsiengine.models.runtime import Runtime
from wsiengine.models.session import open_runtime
from wsiengine.truth import Truth
from wsikernels._jit import cache_folder

needed = pytest.mark.skipif(find_spec("MNN") is None, reason="MNN is not installed (the extra mnn)")
_IN_MNN = ("uint8", "uint8 NCHW", "gate", "float32 NCHW", "float32 NHWC", "odd side", "batch of one")
GOOD = {name: FORMS[name] for name in _IN_MNN}


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The user's cache folder; kernels stay where they are."""
    monkeypatch.setenv("NUMBA_CACHE_DIR", str(cache_folder()))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "wsiengine" / "mnn"


def given(card: Card, **options: Any) -> tuple[Runtime, np.ndarray, np.ndarray]:
    """The runtime, and a block with the corners of overlapping tiles: no whole number of batches."""
    side = card.input.size_px
    pixels = block(2 * side + 5, 3 * side + 3)
    origins = lattice(*pixels.shape[:2], side, side // 2 + 1)[:-1]
    return Runtime(card, device="mnn", **options), pixels, origins


@needed
@pytest.mark.parametrize("changes", GOOD.values(), ids=GOOD)
def test_scores_are_those_of_onnx_runtime(changes: dict, tmp_path: Path) -> None:
    card = tiny(tmp_path / "model", **changes)
    runtime, pixels, origins = given(card)
    assert runtime.batch_size == changes.get("batch", mnn.BATCH)
    assert len(origins) % mnn.BATCH
    assert runtime.on_cpu
    assert runtime.weights_bytes(3) == 3 * runtime.weights_bytes(1) > 3 * 5 * card.model_path.stat().st_size
    expected = Runtime(card, device="cpu").scores(pixels, origins)
    np.testing.assert_allclose(runtime.scores(pixels, origins), expected, atol=2e-5)
    assert np.ptp(expected[:, 0]) > 1e-3


@needed
def test_scores_repeat_to_the_bit_beside_others_and_in_another_process(tmp_path: Path) -> None:
    card = tiny(tmp_path / "model", gate=True, size_px=64)
    runtime, pixels, origins = given(card)
    whole = runtime.scores(pixels, origins)
    with ThreadPoolExecutor(4) as pool:
        for found in pool.map(lambda _: runtime.scores(pixels, origins), range(12)):
            assert np.array_equal(found, whole)
    code = (
        "import pickle, sys, numpy as np; runtime = pickle.load(open(sys.argv[1], 'rb'));"
        "np.save(sys.argv[3], runtime.scores(*np.load(sys.argv[2]).values()))"
    )
    paths = [str(tmp_path / name) for name in ("runtime", "tiles.npz", "scores.npy")]
    Path(paths[0]).write_bytes(pickle.dumps(runtime))
    np.savez(paths[1], pixels, origins)
    surroundings = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    subprocess.run([sys.executable, "-c", code, *paths], env=surroundings, check=True)
    assert np.array_equal(np.load(paths[2]), whole)


@needed
def test_a_tile_does_not_see_its_neighbours_in_a_batch(tmp_path: Path) -> None:
    runtime, pixels, origins = given(tiny(tmp_path / "model", size_px=64))
    scores = runtime.scores(pixels, origins[:4])
    assert np.array_equal(runtime.scores(pixels, origins[[0, 5, 6, 7]])[0], scores[0])
    np.testing.assert_allclose(runtime.scores(pixels, origins[:1])[0], scores[0], atol=2e-5)


@needed
def test_blocks_of_any_size_have_the_same_maps_as_with_onnx_runtime(tmp_path: Path) -> None:
    card = tiny(tmp_path / "model", gate=False)
    runtime, reference = Runtime(card, device="mnn"), Runtime(card, device="cpu")
    tiles = block(32, 32), np.zeros((1, 2), int)
    first = runtime.scores(*tiles)
    for rows, cols in [(64, 96), (96, 64), (64, 96)]:
        pixels = block(rows, cols)
        np.testing.assert_allclose(runtime.maps(pixels), reference.maps(pixels), atol=2e-5)
    assert np.array_equal(runtime.scores(*tiles), first)


@pytest.fixture(scope="module")
def residual(tmp_path_factory: pytest.TempPathFactory) -> Card:
    """A network that runs in parts, and whose convolutions MNN computes in one way or another."""
    return load_card(make("resnet18", tmp_path_factory.mktemp("resnet18")) / "card.json")


@needed
def test_large_blocks_run_in_parts(residual: Card, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    runtime, pixels = Runtime(residual, device="mnn"), block(448, 672)
    found = runtime.maps(pixels)
    wanted = Runtime(residual, device="cpu").maps(pixels)
    np.testing.assert_allclose(found, wanted, atol=1e-3 * np.abs(wanted).max())
    assert np.ptp(wanted[..., 0]) > 0.1 * np.abs(wanted).max()
    assert runtime.map_bytes(pixels.size // 3) is not None
    kept = sorted(cache.glob("*.mnn"), key=lambda path: path.stat().st_size)
    assert len(kept) == 1 + len(runtime._pieces.sessions) > 2
    assert np.isfinite(runtime.scores(pixels, np.zeros((1, 2), int))).all()  # the whole network is there again
    with monkeypatch.context() as patched:
        patched.setattr(mnn, "ask", None)  # no child is asked
        assert np.array_equal(Runtime(residual, device="mnn").maps(pixels), found)
    kept[0].write_bytes(kept[0].read_bytes()[:-1] + b"?")
    assert np.array_equal(Runtime(residual, device="mnn").maps(pixels), found)


@needed
def test_scores_and_maps_are_the_same_whatever_ran_before(residual: Card) -> None:
    """MNN chooses how it computes a convolution by the first sizes that it sees."""
    pixels = block(480, 704)
    found = []
    for blocks in ([(64, 64), (480, 704)], [(480, 704), (64, 64)]):
        runtime = Runtime(residual, device="mnn")
        maps = {(rows, cols): runtime.maps(pixels[:rows, :cols]) for rows, cols in blocks}
        found.append([maps[64, 64], maps[480, 704]])
    for tiles in ([1, 6], [6, 1]):
        runtime = Runtime(residual, device="mnn")
        origins = lattice(*pixels.shape[:2], 224, 128)
        scores = {count: runtime.scores(pixels, origins[:count]) for count in tiles}
        found.append([scores[1], scores[6]])
    for first, second in (found[:2], found[2:]):
        for one, other in zip(first, second, strict=True):
            assert np.array_equal(one, other)


@needed
def test_the_converted_file_is_kept_and_made_anew_where_it_is_damaged(
    tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    card = tiny(tmp_path / "model")
    runtime, pixels, origins = given(card)
    whole = runtime.scores(pixels, origins)
    (kept,) = cache.glob("*.mnn")
    assert sorted(path.suffix for path in cache.iterdir()) == [".json", ".mnn"]
    assert sorted(path.name for path in card.folder.iterdir()) == ["card.json", "tiny.onnx"]
    with monkeypatch.context() as patched:
        patched.setattr(mnn, "ask", None)  # no child is asked
        assert np.array_equal(given(card)[0].scores(pixels, origins), whole)
    kept.write_bytes(kept.read_bytes()[:-1] + b"?")
    assert np.array_equal(given(card)[0].scores(pixels, origins), whole)
    (vouching,) = cache.glob("*.json")
    (remade,) = set(cache.glob("*.mnn")) - {kept}
    assert file_sha256(remade) == json.loads(vouching.read_text())["sha256"]


@needed
def test_two_may_convert_a_model_at_once(tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No two conversions give the same bytes, and each vouches for its own."""
    card, writing, others = tiny(tmp_path / "model"), Path.write_text, []

    def write_text(self: Path, *what: str, **how: str) -> int:
        if self.name == "facts" and not others:
            others.append(True)
            mnn._convert(card)
        return writing(self, *what, **how)

    monkeypatch.setattr(Path, "write_text", write_text)
    runtime, pixels, origins = given(card)
    assert len({file_sha256(path) for path in cache.glob("*.mnn")}) == 2
    assert np.isfinite(runtime.scores(pixels, origins)).all()


@needed
def test_a_network_is_prepared_for_the_tiles_of_its_card(tmp_path: Path) -> None:
    """Whatever card of the same file came first: MNN's way of computing hangs on the sizes that it sees first."""
    card = tiny(tmp_path / "model")
    for side in (card.input.size_px, 2 * card.input.size_px):
        session = Runtime(replace(card, input=replace(card.input, size_px=side)), device="mnn")._session
        assert [shape[1] for shape in session._facts["usual"].values()] == [side]


@needed
def test_threads_that_open_sessions_leave_standard_output_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two that put it away at once would each keep what the other put there."""
    mnn.import_mnn()
    monkeypatch.setattr(mnn, "_silent", None)
    assert mnn.import_mnn().__name__ == "MNN"


@needed
def test_a_cache_that_cannot_be_written_is_told(tmp_path: Path, cache: Path) -> None:
    cache.parent.mkdir(parents=True)
    cache.write_text("a file where the folder would be")
    with pytest.raises(ProviderError, match=r"mnn cannot be written .*, where MNN's form of tiny") as caught:
        Runtime(tiny(tmp_path / "model"), device="mnn")
    assert "XDG_CACHE_HOME" in str(caught.value.hint)


@needed
def test_nothing_is_printed_and_nothing_but_mnn_itself_is_imported(tmp_path: Path) -> None:
    card = tiny(tmp_path / "model")
    code = (
        "import sys; from wsiengine.models.card import load_card; from wsiengine.models.runtime import Runtime;"
        "from pathlib import Path; Runtime(load_card(Path(sys.argv[1])), device='mnn');"
        "print([name for name in sys.modules if name.startswith('MNN.tools')])"
    )
    surroundings = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    command = [sys.executable, "-c", code, str(card.folder / "card.json")]
    done = subprocess.run(command, env=surroundings, capture_output=True, text=True, check=True)
    assert (done.stdout, done.stderr) == ("[]\n", "")


@needed
def test_a_model_that_mnn_reads_otherwise_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An operator whose meaning hangs on an attribute that MNN does not know would be such a one."""
    card = tiny(tmp_path / "model")
    faulty = "import numpy as np; import wsiengine.models.mnn as m; run = m.Session.run\n"
    faulty += "m.Session.run = lambda s, n, g: [np.float32(1.01) * out for out in run(s, n, g)]\n"
    folder = tmp_path / "first"
    folder.mkdir()
    (folder / "sitecustomize.py").write_text(faulty)
    monkeypatch.syspath_prepend(str(folder))
    with pytest.raises(ProviderError, match=r"MNN cannot run tiny: it gives other outputs .* up to 0\.01, allowed"):
        Runtime(card, device="mnn")


@needed
def test_an_operator_that_mnn_lacks_is_told(tmp_path: Path) -> None:
    model = graph(Tiny())
    node = next(node for node in model.graph.node if list(node.output) == ["logits"])
    node.op_type = "Hardmax"
    (tmp_path / "tiny.onnx").write_bytes(model.SerializeToString())
    card = load_card(write_card(tmp_path, card_json(sha256=file_sha256(tmp_path / "tiny.onnx"))))
    with pytest.raises(ProviderError, match="MNN cannot run tiny: ") as caught:
        Runtime(card, device="mnn")
    assert caught.value.hint == "use --device cpu"


@needed
def test_nan_is_refused_as_elsewhere(tmp_path: Path) -> None:
    card = tiny(tmp_path / "model", poison=True)
    pixels = block(32, 64)
    pixels[0, 32] = (255, 0, 0)
    runtime = Runtime(card, device="mnn")
    origins = np.array([[0, 0], [0, 32]])
    with pytest.raises(ScoreError, match="NaN for the tile at"):
        runtime.scores(pixels, origins)
    assert np.isnan(runtime.scores(pixels, origins, tolerant=True)).all(axis=1).tolist() == [False, True]


@needed
def test_a_card_that_lies_about_the_file_is_refused(tmp_path: Path) -> None:
    onnx.save(graph(Tiny(dtype="float32")), tmp_path / "tiny.onnx")
    card = load_card(write_card(tmp_path, card_json(sha256=file_sha256(tmp_path / "tiny.onnx"))))
    with pytest.raises((CardError, ProviderError), match="type"):
        Runtime(card, device="mnn")


@needed
@pytest.mark.parametrize(
    ("name", "told"), [("glands", "task segment, fp32"), ("mass", "task detect"), ("half", "float16 pixels")]
)
def test_what_it_does_not_run_is_said_beforehand(name: str, told: str, tmp_path: Path) -> None:
    card = tiny(tmp_path, dtype="float16", layout="NCHW") if name == "half" else load_model(name)
    with pytest.raises(
        ProviderError, match=f"runs classifiers in fp32 on uint8 or float32 pixels; {card.name}: .*{told}"
    ):
        Runtime(card, device="mnn")


@needed
def test_precision_is_fp32() -> None:
    card = load_model("crc5")
    assert card.variants["int8"].faithful
    assert open_runtime(card, "auto", device="mnn").card.number_format == "fp32"
    with pytest.raises(ProviderError, match=r"crc5: task classify, int8"):
        open_runtime(card, "int8", device="mnn")


@needed
def test_a_run_says_what_ran_it_and_is_not_gone_on_with_by_another(tmp_path: Path) -> None:
    boxes = [(planted.A, Box(200, 300, 900, 1300))]
    slide = planted.write(tmp_path / "s.svs", planted.paint(Size(1203, 1607), boxes))
    run = partial(infer, slide, "planted", tissue="none", threads=2)
    by_mnn = run(tmp_path / "mnn", device="mnn").run
    run(tmp_path / "cpu", device="cpu")
    parameters = by_mnn["identity"]["parameters"]
    assert (parameters["provider"], parameters["batch_size"]) == (f"MNN {version()}", 4)
    scores = [Truth.load(tmp_path / kind / "probability.zarr").scores for kind in ("mnn", "cpu")]
    np.testing.assert_allclose(*scores, atol=1e-4)
    with pytest.raises(OutputError, match="the device"):
        run(tmp_path / "mnn", device="cpu")


def version() -> str:
    from importlib import metadata

    return metadata.version("MNN")


def test_without_mnn_the_extra_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "MNN", None)
    with pytest.raises(DependencyError, match="MNN, which --device mnn needs") as caught:
        Runtime(tiny(tmp_path), device="mnn")
    assert "wsiengine[cpu,mnn]" in str(caught.value.hint)
