"""Number formats: which file runs, what ``auto`` may take, and what is refused."""

import json
from pathlib import Path

import numpy as np
import onnx
import pytest

from tests import planted_slides as planted
from tests.models.tiny import Tiny, block, card_json, graph, write_card
from wsiengine import infer
from wsiengine.errors import CardError, IntegrityError, OutputConflict, PlanError
from wsiengine.geometry import Box, Size
from wsiengine.models.card import Card, load_card
from wsiengine.models.integrity import check_files, file_sha256
from wsiengine.models.precision import Variant, choose_precision
from wsiengine.models.session import open_runtime


def two_files(folder: Path, **cost: float) -> Card:
    """A model with a second file that says something else, called int8."""
    folder.mkdir(exist_ok=True)
    onnx.save(graph(Tiny()), folder / "tiny.onnx")
    other = graph(Tiny())
    for weight in other.graph.initializer:
        if weight.name == "ramp":
            weight.CopyFrom(onnx.numpy_helper.from_array(-onnx.numpy_helper.to_array(weight), "ramp"))
    onnx.save(other, folder / "tiny.int8.onnx")
    data = card_json(Tiny(), file_sha256(folder / "tiny.onnx"))
    data["resources"].append({"file": "tiny.int8.onnx", "sha256": file_sha256(folder / "tiny.int8.onnx")})
    said = {"file": "tiny.int8.onnx", "agreement": 0.99, "loss_points": 0.4, "tiles": 812} | cost
    data["precision"] = {"arithmetic": "float32", "int8": said}
    return load_card(write_card(folder, data))


def test_a_card_has_a_file_for_each_format(tmp_path: Path) -> None:
    card = two_files(tmp_path)
    check_files(card)
    assert card.variants["int8"].facts == {"tiles": 812}
    assert card.model_path.name == "tiny.onnx"
    assert card.at("int8").model_path.name == "tiny.int8.onnx"
    assert card.at("int8").sha256 != card.sha256
    pixels, corner = block(32, 32), np.array([[0, 0]])
    whole, other = (open_runtime(card, p, device="cpu") for p in ("fp32", "int8"))
    assert (whole.card.number_format, other.card.number_format) == ("fp32", "int8")
    assert not np.array_equal(whole.scores(pixels, corner), other.scores(pixels, corner))
    assert open_runtime(card, "auto", device="cpu").card.number_format == "int8"


@pytest.mark.parametrize("cost", [{"agreement": 0.979}, {"loss_points": 1.1}, {"tiles": 99}])
def test_auto_never_takes_what_costs_too_much(tmp_path: Path, cost: dict) -> None:
    card = two_files(tmp_path, **cost)
    assert open_runtime(card, "auto", device="cpu").card.number_format == "fp32"
    assert open_runtime(card, "int8", device="cpu").card.number_format == "int8"  # asked for by name


def test_what_a_device_gets() -> None:
    both = {name: Variant(f"{name}.onnx", 0.99, 0.0, {"tiles": 200}) for name in ("fp16", "int8")}
    assert choose_precision("auto", both, "m", gpu=True) == "fp16"
    assert choose_precision("auto", both, "m", gpu=False) == "int8"
    assert choose_precision("auto", {}, "m", gpu=True) == "fp32"
    assert choose_precision("fp16", both, "m", gpu=True) == "fp16"
    with pytest.raises(PlanError, match="fp16 on a CPU would be a cast"):
        choose_precision("fp16", both, "m", gpu=False)
    with pytest.raises(PlanError, match="does not come in int8; it has fp32, fp16"):
        choose_precision("int8", {"fp16": both["fp16"]}, "m", gpu=False)
    with pytest.raises(PlanError, match="no precision 'int4'"):
        choose_precision("int4", both, "m", gpu=False)


def test_wrong_entries_get_words(tmp_path: Path) -> None:
    two_files(tmp_path)
    data = json.loads((tmp_path / "card.json").read_text())
    for change, words in (
        ({"agreement": 1.2}, "agreement"),
        ({"loss_points": None}, "loss_points"),
        ({"file": "gone.onnx"}, "precision names gone.onnx, which resources do not list"),
    ):
        changed = data | {"precision": {"int8": data["precision"]["int8"] | change}}
        with pytest.raises(CardError, match=words):
            load_card(write_card(tmp_path, changed))
    (tmp_path / "tiny.int8.onnx").write_bytes(b"no model")
    data["resources"][1]["sha256"] = file_sha256(tmp_path / "tiny.int8.onnx")
    with pytest.raises(CardError, match=r"tiny\.int8\.onnx is damaged or no ONNX file"):
        check_files(load_card(write_card(tmp_path, data)))
    onnx.save(graph(Tiny(domain="com.odd")), tmp_path / "tiny.int8.onnx")
    data["resources"][1]["sha256"] = file_sha256(tmp_path / "tiny.int8.onnx")
    with pytest.raises(IntegrityError, match="custom operators"):
        check_files(load_card(write_card(tmp_path, data)))


def test_the_format_is_part_of_a_runs_identity(tmp_path: Path) -> None:
    two_files(tmp_path / "model")
    slide = planted.write(tmp_path / "s.svs", planted.paint(Size(403, 611), [], tissue=Box(50, 60, 350, 550)))
    model, out = str(tmp_path / "model"), tmp_path / "out"
    whole = infer(slide, model, out, device="cpu")
    facts = json.loads((out / "run.json").read_text())
    assert "precision" not in facts["identity"]["parameters"]  # runs of before stay what they were
    with pytest.raises(OutputConflict, match="precision"):
        infer(slide, model, out, device="cpu", precision="int8")
    auto = infer(slide, model, tmp_path / "auto", device="cpu", precision="auto")
    facts = json.loads((tmp_path / "auto" / "run.json").read_text())
    assert facts["identity"]["parameters"]["precision"] == "int8"
    assert facts["model"]["sha256"] == file_sha256(tmp_path / "model" / "tiny.int8.onnx")
    assert auto.summary["area_mm2"] != whole.summary["area_mm2"]
    with pytest.raises(PlanError, match="fp16 on a CPU would be a cast"):
        infer(slide, model, tmp_path / "half", device="cpu", precision="fp16")
