"""Benchmarks run: the GPU's on a CPU, the memory's on a small slide, the peers' with one that is made up."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from benchmarks import detect_pace
from tests.models.detectors import paint
from tests.planted_slides import write
from tests.sparse_slides import Sparse, write_sparse
from tests.test_detect_pictures import MARKS, two_stages
from wsiengine.geometry import Box, Mpp, Size
from wsiengine.slides import open_slide

ROOT = Path(__file__).parents[1]


def bench(name: str, *arguments: str) -> str:
    command = [sys.executable, str(ROOT / "benchmarks" / f"{name}.py"), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240, cwd=ROOT)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


def test_the_gpu_benchmark_runs_on_a_cpu(tmp_path: Path) -> None:
    small = ("--device", "cpu", "--quick", "--gpx", "0.004", "--models", "mobilenetv2", "--readers", "1")
    said = bench("gpu", *small, "--json", str(tmp_path / "n.json"))
    assert "ratio" in said
    [(name, numbers)] = json.loads((tmp_path / "n.json").read_text()).items()
    assert name == "mobilenetv2"
    assert numbers["tiles"] > 0
    assert numbers["bare_tiles_per_s"] > 0
    assert numbers["stages_s"]["model"] > 0
    assert 0 < numbers["blocks_cpu_s"] < numbers["cpu_s"]
    assert numbers["readers_cpu_s"] > 0


def test_a_detector_is_compared_with_both_of_its_stages(tmp_path: Path) -> None:
    """The floor asks the sessions for what the run asked: each tile, and each crop's types and boosting."""
    slide = write(tmp_path / "s.tiff", paint(Size(181, 243), MARKS), 1.0)
    two_stages(tmp_path / "m")
    run = detect_pace.engine(str(slide), str(tmp_path / "m"), 2)
    asked = detect_pace.recorded(str(slide), str(tmp_path / "m"))
    crops = [calls for one in asked for calls in one.crops]
    assert len(asked) == run["tiles"] > 4
    assert len(crops) == run["crops"] >= len(MARKS)
    assert {tuple(np.shape(call()[0]) for call in calls) for calls in crops} == {((1, 3), (1, 2))}
    boxes = [np.shape(one.first()[0])[0] for one in asked]
    assert boxes.count(0) < len(boxes)  # the tiles' own pixels
    counts = (run["tiles"], run["crops"])
    assert detect_pace.floor(str(slide), str(tmp_path / "m"), 2, counts)["crop_ms"] > 0
    pairs = detect_pace.paired(str(slide), str(tmp_path / "m"))
    assert 0 < pairs["ratio_blocks_cpu"] < 1.2
    alone = tmp_path / "alone"
    alone.mkdir()
    detect_pace.without_second(str(tmp_path / "m"), alone)
    assert detect_pace.engine(str(slide), str(alone), 1)["crops"] == 0


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="memory is read from /proc, which Linux has")
def test_peak_memory_is_that_of_the_plan() -> None:
    """On a slide of 2 Gpx, within 1.2 times of what the plan says, and the plan not far above."""
    said = bench("memory", "--gpx", "2", "--share", "0.01", "--model", "planted", "--threads", "2")
    fields = said.splitlines()[-1].replace(",", "").split()
    peak, planned = int(fields[2]), int(fields[3])
    assert peak <= 1.2 * planned
    assert peak >= 0.5 * planned


def test_a_sparse_slide_is_a_slide(tmp_path: Path) -> None:
    """Its levels show the same: tissue where it is drawn, by the area."""
    what = Sparse(Size(9_003, 20_017), share=0.2)
    slide = open_slide(write_sparse(tmp_path / "s.tiff", what))
    assert slide.info.size_l0 == what.size_l0
    assert (tmp_path / "s.tiff").stat().st_size < 3_000_000
    for mpp in (4.0, 16.0):
        whole = Box(0, 0, int(9_003 * 0.25 / mpp), int(20_017 * 0.25 / mpp))
        stained = slide.read(whole, Mpp.square(mpp))[..., 1] < 220
        assert 0.15 < stained.mean() < 0.25


_FAKE_PEER = """#!{python}
import sys
from pathlib import Path
if sys.argv[2] == "run":  # WSInfer's command line
    given = dict(zip(sys.argv[3:-1], sys.argv[4:]))
    assert Path(given["--model-path"]).exists() and Path(given["--config"]).exists()
    assert len(list(Path(given["--wsi-dir"]).iterdir())) == 1
    out = Path(given["--results-dir"], "model-outputs-csv")
    out.mkdir(parents=True)
    (out / "slide.csv").write_text("minx,miny\\n" + "1,1\\n" * 7)
else:  # makes the TorchScript
    sys.path[0:0] = {path!r}
    sys.argv = sys.argv[1:]
    exec(compile(Path(sys.argv[0]).read_text(), "builder", "exec"))
"""


def test_peers_are_told_apart_by_tiles_and_time(tmp_path: Path) -> None:
    """A peer that is made up: it makes the TorchScript with the torch that is here, then claims seven tiles."""
    pytest.importorskip("torch", reason="torch (extra `train`) is not installed: the peers' weights are written by it")
    fake = tmp_path / "python"
    fake.write_text(_FAKE_PEER.format(python=sys.executable, path=sys.path))
    fake.chmod(0o755)
    (tmp_path / "slides").mkdir()
    slide = write_sparse(tmp_path / "slides" / "s.tiff", Sparse(Size(3_000, 4_000), share=0.3, piece_px=4096))
    few = ("--repeats", "1", "--overlaps", "0", "--precisions", "fp32")
    said = bench("peers", "--wsinfer-python", str(fake), "--slide", str(slide), *few)
    rows = {line[:22].strip(): line[22:].split() for line in said.splitlines()[1:]}
    assert set(rows) == {"wsiengine tiles fp32", "WSInfer", "WSInfer --speedup"}
    assert rows["WSInfer"][3] == "7"
    assert int(rows["wsiengine tiles fp32"][3]) > 7
    assert rows["wsiengine tiles fp32"][-3:] == ["1.00", "1.00", "1.00"]
    ours, theirs = float(rows["wsiengine tiles fp32"][0]), float(rows["WSInfer"][0])
    assert float(rows["WSInfer"][-1]) == pytest.approx(theirs / ours, abs=0.05 / ours + 0.006)  # the slide as a whole


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # torch.jit, which WSInfer needs
def test_a_peer_gets_the_same_network(tmp_path: Path) -> None:
    """TorchScript made of the exported weights answers as the ONNX file does."""
    torch = pytest.importorskip("torch")
    import numpy as np
    import onnxruntime

    from benchmarks import peer_tools
    from benchmarks.networks import make

    model = make("resnet18", tmp_path / "m")
    peer_tools.export_weights(model)
    peer_tools.build_torchscript(sys.executable, model, model / "network.pt")
    pixels = np.random.default_rng(0).integers(0, 256, (2, 224, 224, 3), np.uint8)
    expected = onnxruntime.InferenceSession(str(model / "resnet18.onnx")).run(["logits"], {"tiles": pixels})[0]
    planes = torch.from_numpy(pixels.transpose(0, 3, 1, 2).astype(np.float32) / 255)
    mean, deviation = (
        torch.tensor(values).view(1, 3, 1, 1)
        for values in peer_tools.wsinfer_config()["transform"][2]["arguments"].values()
    )
    with torch.inference_mode():
        found = torch.jit.load(model / "network.pt")((planes - mean) / deviation)
    np.testing.assert_allclose(found.numpy(), expected, rtol=1e-3, atol=1e-3)


def test_int8_for_the_benchmarks_keeps_most_answers(tmp_path: Path) -> None:
    """Beside a network whose own weights are called w0, w1, …, as are those of the integers."""
    pytest.importorskip("torch")
    import numpy as np

    from benchmarks.networks import add_int8, make
    from wsiengine.models.card import load_card

    model = make("resnet18", tmp_path / "m")
    add_int8(model, np.random.default_rng(0).integers(0, 256, (16, 64, 64, 3), np.uint8))
    variant = load_card(model / "card.json").variants["int8"]
    assert variant.agreement >= 0.75
    assert (model / variant.file).stat().st_size < 0.3 * (model / "resnet18.onnx").stat().st_size
