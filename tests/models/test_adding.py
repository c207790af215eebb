"""Others' models: from folders, files, archives and addresses; converted only when trusted; hostile ones refused."""

import io
import json
import subprocess
import sys
import warnings
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import numpy as np
import onnx
import pytest

from tests.models.test_archive import zipped
from tests.models.tiny import Tiny, card_json, graph, tiny, write_card
from tests.models.web import Site, serving
from wsiengine.errors import CardError, DownloadError, IntegrityError, UnknownModel
from wsiengine.models import adding, child
from wsiengine.models.adding import Asked, add
from wsiengine.models.integrity import file_sha256
from wsiengine.models.registry import list_models, load_model


@pytest.fixture(autouse=True)
def config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "config"
    monkeypatch.setenv("WSIENGINE_CONFIG", str(folder))
    monkeypatch.setenv("NO_PROXY", "127.0.0.1,localhost")
    return folder


@pytest.fixture
def site(tmp_path: Path) -> Iterator[Site]:
    (tmp_path / "site").mkdir()
    with serving(tmp_path / "site") as site:
        yield site


def archived(folder: Path, path: Path) -> Path:
    files = {p.relative_to(folder.parent).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()}
    return zipped(path, files)


def left(config: Path) -> list[str]:
    return sorted(p.name for p in (config / "models").iterdir())


def test_a_folder_stays_where_it_is(tmp_path: Path, config: Path) -> None:
    card = add(str(tiny(tmp_path / "m").folder))
    assert load_model("tiny").folder == card.folder == tmp_path / "m"
    assert left(config) == []


def test_a_file_is_copied_with_its_card_under_another_name(tmp_path: Path, config: Path) -> None:
    tiny(tmp_path / "m")
    (tmp_path / "m" / "card.json").rename(tmp_path / "m" / "tiny.json")
    (tmp_path / "m" / "notes.txt").write_text("not of the model")
    add(str(tmp_path / "m" / "tiny.onnx"), Asked(name="mine"))
    card = load_model("mine")
    assert sorted(p.name for p in card.folder.iterdir()) == ["card.json", "tiny.onnx"]
    assert left(config) == ["mine"]
    tiny(tmp_path / "m", classes=4)
    add(str(tmp_path / "m"), Asked(name="mine"))  # another of that name replaces it
    assert len(load_model("mine").classes) == 4
    assert left(config) == ["mine"]


def test_an_archive_and_its_address(tmp_path: Path, config: Path, site: Site) -> None:
    path = archived(tiny(tmp_path / "m").folder, tmp_path / "site" / "tiny.zip")
    add(str(path))
    assert load_model("tiny").folder == config / "models" / "tiny"
    add(f"{site.address}/tiny.zip", Asked(sha256=file_sha256(path)))
    assert [e.problem for e in list_models() if e.name == "tiny"] == [None]
    with pytest.raises(IntegrityError, match="needed 00000"):
        add(f"{site.address}/tiny.zip", Asked(sha256="0" * 64))


def test_the_address_of_a_card_fetches_its_files(tmp_path: Path, config: Path, site: Site) -> None:
    tiny(tmp_path / "site" / "m")
    assert add(f"{site.address}/m/card.json").folder == config / "models" / "tiny"
    assert [path for path, _ in site.asked] == ["/m/card.json", "/m/tiny.onnx"]
    with (tmp_path / "site" / "m" / "tiny.onnx").open("ab") as file:
        file.write(b"x")
    (config / "downloads").rename(config / "elsewhere")
    with pytest.raises(IntegrityError, match=r"tiny\.onnx has sha256"):
        add(f"{site.address}/m/card.json")
    assert load_model("tiny").name == "tiny"  # the older one is still there


@pytest.mark.parametrize("name", ["", "m.onnx", "model.pt"])
def test_addresses_of_other_things(name: str, site: Site) -> None:
    with pytest.raises(CardError, match="neither an archive nor a card"):
        add(f"{site.address}/x/{name}")
    assert site.asked == []
    with pytest.raises(IntegrityError, match="needed https://"):
        add("file:///etc/hostname")


def test_names_and_paths_that_do_not_do(tmp_path: Path) -> None:
    with pytest.raises(UnknownModel, match="no file or folder"):
        add(str(tmp_path / "nothing"))
    with pytest.raises(CardError, match="belongs to a bundled model"):
        add(str(tiny(tmp_path / "m").folder), Asked(name="planted"))
    with pytest.raises(CardError, match="name is text"):
        add(str(tmp_path / "m"), Asked(name="../evil"))
    with pytest.raises(DownloadError, match="no connection"):
        add("http://127.0.0.1:9/card/card.json")


# --- hostile models ---------------------------------------------------------------------------------------------------


def resaved(folder: Path, model: onnx.ModelProto, **changes: object) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "tiny.onnx"
    path.write_bytes(model.SerializeToString())
    write_card(folder, {**card_json(sha256=file_sha256(path)), **changes})
    return folder


def test_a_model_that_asks_for_terabytes_is_refused_and_harms_nobody(tmp_path: Path) -> None:
    """No initialiser is large: the size is made while the graph runs, so that only a run can show it."""
    model = graph(Tiny())
    shape = onnx.numpy_helper.from_array(np.array([1 << 19, 1 << 19], np.int64), "shape")
    model.graph.initializer.append(shape)
    model.graph.node.extend(
        [
            onnx.helper.make_node("ConstantOfShape", ["shape"], ["huge"]),
            onnx.helper.make_node("ReduceMean", ["huge"], ["tiny_mean"], axes=[0, 1], keepdims=0),
            onnx.helper.make_node("Add", ["gate", "tiny_mean"], ["gate2"]),
        ]
    )
    model.graph.output.append(onnx.helper.make_tensor_value_info("gate2", 1, ["n"]))
    with pytest.raises(CardError, match=r"ONNX Runtime failed on tiles|asks for more memory"):
        add(str(resaved(tmp_path / "m", model)))
    assert "tiny" not in [entry.name for entry in list_models()]


def test_a_model_that_crashes_the_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "crash").mkdir()
    (tmp_path / "crash" / "crashing.py").write_text("import ctypes\nctypes.string_at(0)\n")
    monkeypatch.syspath_prepend(tmp_path / "crash")
    with pytest.raises(CardError, match=r"loading x\.onnx crashed \(signal 11, SIGSEGV\)"):
        child.ask("crashing", [], doing="loading x.onnx", timeout_s=60)


def test_a_model_that_hangs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "hang").mkdir()
    (tmp_path / "hang" / "hanging.py").write_text("import time\ntime.sleep(60)\n")
    monkeypatch.syspath_prepend(tmp_path / "hang")
    with pytest.raises(CardError, match="did not end within 1 s"):
        child.ask("hanging", [], doing="loading x.onnx", timeout_s=1)


def test_an_initialiser_that_announces_what_is_not_there(tmp_path: Path) -> None:
    model = graph(Tiny())
    tensor = model.graph.initializer[0]
    tensor.dims[0] = 1 << 40
    with pytest.raises(IntegrityError, match=r"contradicts itself: w1 announces [\d,]+ bytes and holds 1,728"):
        add(str(resaved(tmp_path / "m", model)))
    tensor.ClearField("raw_data")
    tensor.float_data.extend([1.0, 2.0])
    with pytest.raises(IntegrityError, match=r"w1 announces [\d,]+ numbers and holds at most 8"):
        add(str(resaved(tmp_path / "m", model)))
    tensor.dims[0] = -3
    with pytest.raises(IntegrityError, match="w1 has a side of -3"):
        add(str(resaved(tmp_path / "m", model)))


def test_external_data_shorter_than_its_tensor(tmp_path: Path) -> None:
    folder = tmp_path / "m"
    folder.mkdir()
    onnx.save(graph(Tiny()), folder / "tiny.onnx", save_as_external_data=True, location="w.bin", size_threshold=0)
    (folder / "w.bin").write_bytes((folder / "w.bin").read_bytes()[:-40])
    files = [{"file": name, "sha256": file_sha256(folder / name)} for name in ("tiny.onnx", "w.bin")]
    write_card(folder, {**card_json(), "resources": files})
    with pytest.raises(IntegrityError, match=r"w\.bin must have [\d,]+ bytes and has"):
        add(str(folder))


def test_a_sparse_tensor_that_would_be_unpacked(tmp_path: Path) -> None:
    model = graph(Tiny())
    sparse = model.graph.sparse_initializer.add()
    sparse.dims.extend([1 << 20, 1 << 20])
    with pytest.raises(IntegrityError, match="a sparse tensor of"):
        add(str(resaved(tmp_path / "m", model)))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"output_stride_px": 5}, "needed a whole number of output strides"),
        ({"classes": [{"name": "A"}, {"name": "B"}]}, "card and ONNX file disagree"),
        ({"outputs": {"scores": "nothing"}}, "one called 'nothing'"),
        ({"outputs": {"scores": "cam"}}, r"scores of shape"),
        ({"input": {"size_px": 32, "mpp": 1.0, "layout": "NCHW", "dtype": "uint8"}}, r"needed|needs \[N, 3, 32, 32\]"),
        ({"input": {"size_px": 32, "mpp": 1.0, "layout": "NHWC", "dtype": "float32"}}, "type tensor"),
        (
            {
                "input": {
                    "size_px": 32,
                    "mpp": 1,
                    "layout": "NHWC",
                    "dtype": "float32",
                    "mean": [0.5, 0.5, 0.5],
                    "std": [0.2, 0.2, 0.2],
                }
            },
            "std is",
        ),
    ],
)
def test_cards_that_lie(changes: dict, words: str, tmp_path: Path) -> None:
    with pytest.raises(CardError, match=words):
        add(str(resaved(tmp_path / "m", graph(Tiny()), **changes)))


def test_a_mean_of_another_range(tmp_path: Path) -> None:
    """ImageNet's mean in levels, with a range of 0 to 1: the commonest slip."""
    spec = {"size_px": 32, "mpp": 1, "layout": "NHWC", "dtype": "float32", "range": [0, 1]}
    wrong = {**spec, "mean": [123.7, 116.3, 103.5], "std": [0.229, 0.224, 0.225]}
    with pytest.raises(CardError, match=r"mean is \[123\.7, 116\.3, 103\.5\], needed numbers within the range 0 to 1"):
        load_model(resaved(tmp_path / "m", graph(Tiny(dtype="float32")), input=wrong))


def test_nan_at_first_sight(tmp_path: Path) -> None:
    model = graph(Tiny())
    next(t for t in model.graph.initializer if t.name == "ramp").raw_data = np.full(3, np.nan, np.float32).tobytes()
    with pytest.raises(CardError, match="gave NaN"):
        add(str(resaved(tmp_path / "m", model)))


# --- the WSInfer zoo --------------------------------------------------------------------------------------------------

CONFIG = {
    "spec_version": "1.0",
    "architecture": "tiny",
    "num_classes": 2,
    "class_names": ["notumor", "tumor"],
    "patch_size_pixels": 96,
    "spacing_um_px": 0.5,
    "transform": [
        {"name": "Resize", "arguments": {"size": 64}},
        {"name": "ToTensor"},
        {"name": "Normalize", "arguments": {"mean": [0.7, 0.6, 0.7], "std": [0.2, 0.25, 0.2]}},
    ],
}


def torchscript(folder: Path, *, classes: int = 2, config: dict | None = None) -> Path:
    """A folder of the zoo: a small convolutional network of fixed random weights."""
    folder.mkdir(parents=True)
    (folder / "torchscript_model.pt").write_bytes(_torchscript(classes))
    (folder / "config.json").write_text(json.dumps({**CONFIG, **(config or {})}))
    return folder


@cache
def _torchscript(classes: int) -> bytes:
    torch = pytest.importorskip("torch")
    torch.manual_seed(3)
    network = torch.nn.Sequential(
        torch.nn.Conv2d(3, 8, 5, 2),
        torch.nn.BatchNorm2d(8),
        torch.nn.ReLU(),
        torch.nn.Conv2d(8, 12, 3, 2),
        torch.nn.ReLU(),
        torch.nn.AdaptiveAvgPool2d(1),
        torch.nn.Flatten(),
        torch.nn.Linear(12, classes),
    ).eval()
    with torch.no_grad():
        network[-1].weight.mul_(6)  # so that probabilities differ between tiles
    file = io.BytesIO()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch would rather have us use something else
        torch.jit.save(torch.jit.script(network), file)
    return file.getvalue()


def test_torchscript_is_opened_only_when_trusted(tmp_path: Path, config: Path) -> None:
    folder = torchscript(tmp_path / "zoo-model")
    with pytest.raises(IntegrityError, match="can run code inside it") as caught:
        add(str(folder))
    assert "--trust" in (caught.value.hint or "")
    with pytest.raises(IntegrityError, match="would run code inside it"):
        add(str(folder / "torchscript_model.pt"), Asked(trust=True))  # without its config.json nobody can know
    card = add(str(folder), Asked(trust=True))
    assert card.name == "zoo-model"
    assert [c.name for c in card.classes] == ["notumor", "tumor"]
    assert (card.input.size_px, card.input.mpp.x, card.input.resample) == (64, 0.75, "pil_bilinear_per_tile")
    assert sorted(p.name for p in card.folder.iterdir()) == ["card.json", "model.onnx"]
    assert left(config) == ["zoo-model"]


def test_one_class_is_a_sigmoid(tmp_path: Path) -> None:
    facts = {"num_classes": 1, "class_names": ["lymphocytes"]}
    card = add(str(torchscript(tmp_path / "til", classes=1, config=facts)), Asked(trust=True))
    assert card.activation == "sigmoid"
    assert card.uncertain is not None
    assert card.uncertain.name == "Not lymphocytes"


def test_a_zoo_model_by_its_address(tmp_path: Path, site: Site) -> None:
    folder = torchscript(tmp_path / "site" / "breast")
    weights = file_sha256(folder / "torchscript_model.pt")
    card = add(f"{site.address}/breast/config.json", Asked(trust=True, sha256=weights))
    assert card.name == "breast"
    assert card.precision["source_sha256"] == weights


def test_the_main_process_never_imports_torch(tmp_path: Path) -> None:
    folder = torchscript(tmp_path / "m")
    code = (
        "import sys; from wsiengine.models.adding import add, Asked; add(sys.argv[1], Asked(trust=True));"
        "print('torch' in sys.modules)"
    )
    paths = ":".join(path for path in sys.path if path)
    environment = {"PYTHONPATH": paths, "WSIENGINE_CONFIG": str(tmp_path / "c"), "PATH": "/usr/bin:/bin"}
    command = [sys.executable, "-c", code, str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert done.stdout.strip() == "False", done.stderr


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"spec_version": "2.0"}, "spec_version is text .*needed 1.0"),
        ({"num_classes": 3}, "needed 3 names"),
        ({"class_names": ["a:b", "c"]}, "without ':'"),
        ({"transform": [{"name": "ToTensor"}]}, "needed Resize → ToTensor → Normalize"),
        (
            {"transform": [{"name": "Resize", "arguments": {"size": [64, 32]}}, {"name": "ToTensor"}]},
            "tiles are squares",
        ),
        (
            {
                "transform": [
                    {"name": "Resize", "arguments": {"size": 64, "interpolation": "bicubic"}},
                    {"name": "ToTensor"},
                ]
            },
            "needed bilinear",
        ),
        ({"spacing_um_px": -1}, "spacing_um_px is a number"),
        ({"patch_size_pixels": None}, "patch_size_pixels is null"),
    ],
)
def test_a_config_that_cannot_be_followed(change: dict, words: str, tmp_path: Path) -> None:
    with pytest.raises(CardError, match=words):
        add(str(torchscript(tmp_path / "m", config=change)), Asked(trust=True))


def test_weights_that_are_none_and_weights_of_other_classes(tmp_path: Path, config: Path) -> None:
    folder = torchscript(tmp_path / "m", classes=5)
    with pytest.raises(CardError, match=r"gives \(8, 5\) for 8 tiles; config.json promises 2 classes"):
        add(str(folder), Asked(trust=True))
    (folder / "torchscript_model.pt").write_bytes(b"no model")
    with pytest.raises(CardError, match="is no TorchScript"):
        add(str(folder), Asked(trust=True))
    (folder / "torchscript_model.pt").unlink()
    with pytest.raises(CardError, match=r"but no torchscript_model\.pt"):
        add(str(folder), Asked(trust=True))
    assert left(config) == []


def test_a_conversion_that_changes_the_answers_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    original = adding.ask

    def spoilt(module: str, arguments: list[str], **rest: object) -> dict:
        found = original(module, arguments, **rest)  # type: ignore[arg-type]
        if module.endswith("torchscript"):
            path = Path(arguments[1]) / "reference.npz"
            with np.load(path) as file:
                tiles, wanted = file["tiles"], file["probabilities"]
            np.savez(path, tiles=tiles, probabilities=wanted[:, ::-1])
        return found

    monkeypatch.setattr(adding, "ask", spoilt)
    with pytest.raises(CardError, match="gives other probabilities than the original"):
        add(str(torchscript(tmp_path / "m")), Asked(trust=True))
