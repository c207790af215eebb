"""Finding models by name and path, remembering them, and refusing what is unknown or unsafe."""

import json
import os
import pickle
import stat
import zipfile
from pathlib import Path

import onnx
import pytest

from tests.models.tiny import Tiny, card_json, graph, tiny, write_card
from wsiengine.errors import CardError, IntegrityError, OutputError, UnknownModel
from wsiengine.models import registry
from wsiengine.models.integrity import check_onnx, file_sha256
from wsiengine.models.registry import first_use, list_models, load_model, register


@pytest.fixture(autouse=True)
def config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A configuration folder of its own, which does not exist yet."""
    folder = tmp_path / "config"
    monkeypatch.setenv("WSIENGINE_CONFIG", str(folder))
    return folder


def test_every_bundled_model_loads() -> None:
    entries = list_models()
    assert "planted" in [entry.name for entry in entries]
    assert [entry.problem for entry in entries] == [None] * len(entries)
    for entry in entries:
        assert load_model(entry.name) == entry.card
        assert entry.source == "bundled"


def test_by_folder_card_and_onnx(tmp_path: Path) -> None:
    card = tiny(tmp_path / "m")
    assert load_model(tmp_path / "m") == card
    assert load_model(str(tmp_path / "m" / "card.json")) == card
    assert load_model(tmp_path / "m" / "tiny.onnx") == card
    (tmp_path / "m" / "card.json").rename(tmp_path / "m" / "tiny.json")
    assert load_model(tmp_path / "m" / "tiny.onnx") == card


def test_a_name_means_the_known_model_even_beside_a_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tiny(tmp_path / "planted")
    monkeypatch.chdir(tmp_path)
    assert load_model("planted").name == "planted"
    assert load_model("./planted").name == "tiny"
    assert load_model(Path("planted")).name == "tiny"


def test_register_lists_and_loads(tmp_path: Path, config: Path) -> None:
    card = tiny(tmp_path / "m")
    assert register(tmp_path / "m") == card
    assert load_model("tiny") == card
    assert [(e.name, e.source) for e in list_models() if e.source == "registered"] == [("tiny", "registered")]
    assert [p.name for p in config.iterdir()] == ["models.json"]  # no temporary file stays behind
    tiny(tmp_path / "m2", classes=4)
    register(str(tmp_path / "m2"))
    assert len(load_model("tiny").classes) == 4


def test_a_registered_model_that_broke_is_listed_with_its_problem(tmp_path: Path) -> None:
    tiny(tmp_path / "m")
    register(tmp_path / "m")
    (tmp_path / "m" / "tiny.onnx").unlink()
    entry = next(e for e in list_models() if e.name == "tiny")
    assert entry.card is None
    assert "no such file" in (entry.problem or "")


def test_bundled_names_cannot_be_taken(tmp_path: Path) -> None:
    tiny(tmp_path / "m")
    data = json.loads((tmp_path / "m" / "card.json").read_text())
    write_card(tmp_path / "m", {**data, "name": "planted"})
    with pytest.raises(CardError, match="belongs to a bundled model"):
        register(tmp_path / "m")


def test_register_wants_the_folder(tmp_path: Path) -> None:
    tiny(tmp_path / "m")
    with pytest.raises(CardError, match="not a folder"):
        register(tmp_path / "m" / "card.json")


def test_unknown_names_the_known_and_the_near(tmp_path: Path) -> None:
    with pytest.raises(UnknownModel, match="no model 'plantet'") as caught:
        load_model("plantet")
    assert "planted" in caught.value.message
    assert caught.value.hint == "did you mean planted?"
    with pytest.raises(UnknownModel, match="no such file or folder"):
        load_model(tmp_path / "nowhere")


def test_first_use_is_once_for_each_version(tmp_path: Path) -> None:
    card = tiny(tmp_path / "m")
    other = tiny(tmp_path / "m2", classes=5)
    assert [first_use(card), first_use(card), first_use(other), first_use(card)] == [True, False, True, False]


def test_a_config_folder_that_cannot_be_made_harms_only_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("WSIENGINE_CONFIG", str(tmp_path / "file" / "config"))
    card = tiny(tmp_path / "m")
    assert load_model("planted").name == "planted"
    assert [first_use(card), first_use(card)] == [True, True]
    with pytest.raises(OutputError, match="cannot be written") as caught:
        register(tmp_path / "m")
    assert "WSIENGINE_CONFIG" in (caught.value.hint or "")


@pytest.mark.parametrize("text", ["{", "[]", '{"folders": 3}', '{"folders": {"a": 1}}', '{"noticed": {}}'])
def test_a_broken_memory_is_said(text: str, config: Path) -> None:
    config.mkdir()
    (config / "models.json").write_text(text)
    with pytest.raises(CardError, match=r"the list of models .*models\.json"):
        load_model("planted")


def test_config_dir_follows_the_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("WSIENGINE_CONFIG")
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))
    assert registry.config_dir() == tmp_path / "wsiengine"
    monkeypatch.delenv("XDG_CONFIG_HOME")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert registry.config_dir() == tmp_path / "home" / ".config" / "wsiengine"


def test_a_user_without_any_home(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """As in a container that runs under a number which no account has."""
    for name in ("HOME", "WSIENGINE_CONFIG", "XDG_CONFIG_HOME", "XDG_DATA_HOME"):
        monkeypatch.delenv(name, raising=False)

    def nobody(number: int) -> None:
        raise KeyError(number)

    monkeypatch.setattr("pwd.getpwuid", nobody)
    with pytest.raises(RuntimeError):
        Path.home()
    assert load_model("planted").name == "planted"
    assert not registry.config_dir().exists()
    assert not registry.data_dir().exists()


def test_wrong_sha256_says_both(tmp_path: Path) -> None:
    card = tiny(tmp_path / "m")
    with card.model_path.open("r+b") as file:  # one bit
        file.seek(100)
        byte = file.read(1)[0]
        file.seek(100)
        file.write(bytes([byte ^ 1]))
    with pytest.raises(IntegrityError) as caught:
        load_model(tmp_path / "m")
    assert card.sha256 in caught.value.message
    assert file_sha256(card.model_path) in caught.value.message


def test_a_missing_file(tmp_path: Path) -> None:
    write_card(tmp_path, card_json())
    with pytest.raises(CardError, match=r"names tiny\.onnx, but .* has no such file"):
        load_model(tmp_path)


def test_an_onnx_without_card(tmp_path: Path) -> None:
    onnx.save(graph(Tiny()), tmp_path / "bare.onnx")
    with pytest.raises(CardError, match=r"needed bare\.json or card\.json beside it"):
        load_model(tmp_path / "bare.onnx")


def test_a_card_of_another_onnx(tmp_path: Path) -> None:
    card = tiny(tmp_path)
    onnx.save(graph(Tiny()), tmp_path / "bare.onnx")
    with pytest.raises(CardError, match=r"describes tiny\.onnx, not bare\.onnx"):
        load_model(tmp_path / "bare.onnx")
    assert card.model_path.is_file()


def test_an_empty_folder_and_another_kind_of_file(tmp_path: Path) -> None:
    with pytest.raises(CardError, match=r"card\.json cannot be read"):
        load_model(tmp_path)
    (tmp_path / "notes.txt").write_text("hello")
    with pytest.raises(CardError, match="neither a card"):
        load_model(tmp_path / "notes.txt")


def test_a_link_out_of_the_folder(tmp_path: Path) -> None:
    card = tiny(tmp_path / "m")
    card.model_path.rename(tmp_path / "elsewhere.onnx")
    card.model_path.symlink_to(tmp_path / "elsewhere.onnx")
    with pytest.raises(IntegrityError, match="outside the model's folder"):
        load_model(tmp_path / "m")


@pytest.mark.parametrize("name", ["m.pt", "m.pth", "m.pkl", "m.joblib", "m.bin", "m.onnx"])
@pytest.mark.parametrize("kind", ["pickle", "zip"])
def test_pickles_are_refused_by_name_and_by_bytes(name: str, kind: str, tmp_path: Path) -> None:
    path = tmp_path / name
    if kind == "pickle":
        path.write_bytes(pickle.dumps({"weights": 1}))
    else:
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("data.pkl", b"")
    if name.endswith(".onnx"):
        write_card(tmp_path, {**card_json(), "resources": [{"file": name, "sha256": file_sha256(path)}]})
    with pytest.raises(IntegrityError, match="would run code inside it"):
        load_model(path)


def resaved(tmp_path: Path, model: onnx.ModelProto) -> Path:
    """The model under a card with its right sha256."""
    path = tmp_path / "tiny.onnx"
    path.write_bytes(model.SerializeToString())
    write_card(tmp_path, card_json(sha256=file_sha256(path)))
    return tmp_path


@pytest.mark.parametrize("location", ["../../secret.bin", "/etc/hostname", "beside.bin"])
def test_external_data_that_the_card_does_not_list(location: str, tmp_path: Path) -> None:
    model = graph(Tiny())
    tensor = model.graph.initializer[0]
    tensor.ClearField("raw_data")
    tensor.data_location = onnx.TensorProto.EXTERNAL
    tensor.external_data.add(key="location", value=location)
    with pytest.raises(IntegrityError, match="not among the card's resources") as caught:
        load_model(resaved(tmp_path, model))
    assert location in caught.value.message


def test_external_data_inside_an_attribute_is_found(tmp_path: Path) -> None:
    model = graph(Tiny())
    hidden = onnx.TensorProto(dims=[1], data_type=1, data_location=onnx.TensorProto.EXTERNAL)
    hidden.external_data.add(key="location", value="../hidden.bin")
    inner = onnx.helper.make_graph([onnx.helper.make_node("Constant", [], ["c"], value=hidden)], "inner", [], [])
    model.graph.node.append(onnx.helper.make_node("If", ["n"], ["o"], then_branch=inner, else_branch=inner))
    with pytest.raises(IntegrityError, match=r"hidden\.bin"):
        load_model(resaved(tmp_path, model))


def test_listed_external_data_is_accepted(tmp_path: Path) -> None:
    onnx.save(graph(Tiny()), tmp_path / "tiny.onnx", save_as_external_data=True, location="w.bin", size_threshold=0)
    files = [{"file": name, "sha256": file_sha256(tmp_path / name)} for name in ("tiny.onnx", "w.bin")]
    write_card(tmp_path, {**card_json(), "resources": files})
    assert len(load_model(tmp_path).resources) == 2


def test_custom_operators_are_refused(tmp_path: Path) -> None:
    with pytest.raises(IntegrityError, match=r"custom operators \(evil\.ops\)"):
        load_model(resaved(tmp_path, graph(Tiny(domain="evil.ops"))))


def test_functions_inside_the_file_are_no_custom_operators(tmp_path: Path) -> None:
    model = graph(Tiny(domain="mine"))
    node = onnx.helper.make_node("Identity", ["a"], ["b"])
    opset = [onnx.helper.make_opsetid("", 17)]
    model.functions.append(onnx.helper.make_function("mine", "Odd", ["a"], ["b"], [node], opset))
    assert load_model(resaved(tmp_path, model)).name == "tiny"


@pytest.mark.parametrize("content", [b"", b"hello, this is no model", b"\x00" * 64, b"\xff" * 64, b"\x08\x08"])
def test_a_file_that_is_no_onnx(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "x.onnx"
    path.write_bytes(content)
    with pytest.raises(CardError, match="damaged or no ONNX file"):
        check_onnx(path, set())


def test_a_truncated_onnx_at_any_length(tmp_path: Path) -> None:
    whole = graph(Tiny()).SerializeToString()
    path = tmp_path / "x.onnx"
    for length in range(0, len(whole), 97):
        path.write_bytes(whole[:length])
        with pytest.raises(CardError, match="damaged or no ONNX file"):
            check_onnx(path, set())


@pytest.mark.skipif(os.name == "nt" or os.geteuid() == 0, reason="needs a user whom permissions bind")
def test_a_read_only_home(tmp_path: Path, config: Path) -> None:
    config.mkdir()
    config.chmod(stat.S_IRUSR | stat.S_IXUSR)
    try:
        assert first_use(tiny(tmp_path / "m"))
        assert load_model("planted").name == "planted"
    finally:
        config.chmod(stat.S_IRWXU)
