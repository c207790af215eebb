"""Card v1: good cards round-trip, and every wrong entry is named in words."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.models.tiny import Tiny, card_json, write_card
from wsiengine.classes import COLOURS, colour_of
from wsiengine.commands.models import _dense_words
from wsiengine.errors import CardError, IntegrityError
from wsiengine.geometry import Mpp
from wsiengine.identifying import _card_digest
from wsiengine.models.card import load_card, parse_card

DELETE = object()


def changed(path: str, value: Any, base: dict | None = None) -> dict:
    """The good card with one entry replaced or deleted; ``path`` as in ``input.size_px`` or ``classes.0.name``."""
    data = json.loads(json.dumps(base or full()))
    at: Any = data
    *steps, last = path.split(".")
    for step in steps:
        at = at[int(step) if step.isdigit() else step]
    if value is DELETE:
        del at[last]
    else:
        at[int(last) if last.isdigit() else last] = value
    return data


def full() -> dict:
    """A card that uses every entry."""
    data = card_json(Tiny(gate=True, classes=4))
    for entry, name in zip(
        data["classes"], ["Normal", "Carcinoma well", "Odd: no".replace(": ", " "), "Carcinoma poor"], strict=True
    ):
        entry |= {"name": name, "evidence": {"cases_trained": 3, "cases_tested": 2, "note": "n"}}
    data["outputs"]["gate_map"] = "gate_map"
    data["classes"][1]["asserted_as"] = data["classes"][3]["asserted_as"] = "Adenocarcinoma"
    return data | {
        "description": "d",
        "recipe": [{"step": "macenko", "target": "builtin:he"}],
        "halo_px": 8,
        "dense": {"block_px": 64, "halo_px": 16, "offset_px": 3.5},
        "uncertain": {"below": 0.5, "name": "Uncertain"},
        "precision": {"fp32": "reference"},
        "terms": "LICENSES/tiny.txt",
        "intended_use": "tests",
        "training_command": "none",
    }


def test_card_holds_what_the_json_says(tmp_path: Path) -> None:
    card = load_card(write_card(tmp_path, full()))
    assert (card.name, card.version, card.task, card.activation) == ("tiny", "1.0", "classify", "softmax")
    assert card.input.mpp == Mpp.square(1.0)
    assert card.output_stride_px == 8
    assert card.halo_px == 8
    assert card.dense is not None
    assert (card.dense.block_px, card.dense.halo_px, card.dense.offset_px) == (64, 16, 3.5)
    assert card.gate is not None
    assert (card.gate.minimum, card.gate.otherwise) == (0.2, "Nothing")
    assert card.uncertain is not None
    assert (card.uncertain.below, card.uncertain.name) == (0.5, "Uncertain")
    assert card.outputs.names == ("logits", "gate", "cam", "gate_map")
    assert card.score_channels == 5
    assert card.model_path == tmp_path / "tiny.onnx"
    assert card.sha256 == "0" * 64
    assert card.recipe == ({"step": "macenko", "target": "builtin:he"},)
    assert card.classes[1].evidence["cases_trained"] == 3
    assert "Apache-2.0" in card.notice
    assert "LICENSES/tiny.txt" in card.notice


def test_map_classes_sum_what_is_asserted_together(tmp_path: Path) -> None:
    maps = load_card(write_card(tmp_path, full())).map_classes
    assert [(m.name, m.channels) for m in maps] == [("Normal", (0,)), ("Adenocarcinoma", (1, 3)), ("Odd no", (2,))]
    assert maps[1].colour == COLOURS["Adenocarcinoma"]  # not that of its first part
    assert maps[2].colour == (2, 4, 253)


def test_round_trip(tmp_path: Path) -> None:
    card = load_card(write_card(tmp_path, full()))
    again = parse_card(json.loads(json.dumps(card.to_json())), tmp_path)
    assert again == card
    assert again.to_json() == card.to_json()
    assert hash(again) == hash(card)


def test_what_dense_windows_change_is_kept_and_shown(tmp_path: Path) -> None:
    found = {"agreement": 0.91, "right_dense": 0.79, "right_tiles": 0.82, "tiles": 290}
    card = parse_card(changed("dense.against_tiles", found), tmp_path)
    assert card.to_json()["dense"]["against_tiles"] == found
    assert card.dense is not None
    assert card.dense.against_tiles is not None
    said = _dense_words(card.dense.against_tiles)
    assert "91.0 % of 290 labelled tiles; 79.0 % right, as isolated tiles 82.0 %" in said
    with pytest.raises(CardError, match="agreement"):
        parse_card(changed("dense.against_tiles", found | {"agreement": 91}), tmp_path)


def test_a_measurement_of_dense_windows_does_not_make_another_run(tmp_path: Path) -> None:
    found = {"agreement": 0.91, "right_dense": 0.79, "right_tiles": 0.82, "tiles": 290}
    digests = {_card_digest(parse_card(data, tmp_path)) for data in (full(), changed("dense.against_tiles", found))}
    assert len(digests) == 1
    assert _card_digest(parse_card(changed("dense.halo_px", 8), tmp_path)) not in digests


def test_optional_entries_may_be_left_out(tmp_path: Path) -> None:
    card = load_card(write_card(tmp_path, card_json()))
    assert (card.gate, card.dense, card.uncertain, card.recipe, card.halo_px) == (None, None, None, (), 0)
    assert card.input.resample == "area"
    assert card.score_channels == 3


def test_anisotropic_resolution_is_y_x(tmp_path: Path) -> None:
    card = parse_card(changed("input.mpp", [0.5, 0.25]), tmp_path)
    assert (card.input.mpp.y, card.input.mpp.x) == (0.5, 0.25)
    assert card.to_json()["input"]["mpp"] == [0.5, 0.25]


def test_scale_and_bias_are_the_stated_formula(tmp_path: Path) -> None:
    spec = parse_card(card_json(Tiny(dtype="float32")), tmp_path).input
    x = np.arange(256)[:, None]
    lo, hi = spec.range
    expected = ((lo + x / 255 * (hi - lo)) - np.array(spec.mean)) / np.array(spec.std)
    np.testing.assert_allclose(x * spec.scale + spec.bias, expected, atol=1e-5)
    assert spec.scale.dtype == spec.bias.dtype == np.float32


def test_colour_of_an_unknown_class_is_its_own_and_stable() -> None:
    assert colour_of("Adenoma") == (240, 228, 66)
    assert colour_of("Gizzard") == colour_of("Gizzard") != colour_of("Lizard")
    assert colour_of("Gizzard", (1, 2, 3)) == (1, 2, 3)


BAD = [
    ("schema_version", 2, "schema_version is 2, this release reads 1"),
    ("schema_version", DELETE, "schema_version is missing"),
    ("schema_version", True, "schema_version is True"),
    ("licence", DELETE, "licence is missing"),
    ("name", "a b", "name is text ('a b'), needed letters"),
    ("name", "../x", "needed letters"),
    ("name", 7, "name is a number (7), needed text"),
    ("version", "", "version is text ('')"),
    ("task", "guess", "needed classify"),
    ("surprise", 1, "unknown entry 'surprise'"),
    ("classes", [], "needed a list of at least 1 objects"),
    ("classes", {}, "needed a list"),
    ("classes.0", "Normal", "classes[0] is text"),
    ("classes.0.name", "Tumour: bad", "without ':'"),
    ("classes.0.name", "Two\nlines", "one printable line"),
    ("classes.0.name", " edge", "one printable line"),
    ("classes.0.name", "Odd no", "class name used twice: Odd no"),
    ("classes.0.colour", [0, 0, 256], "whole numbers from 0 to 255"),
    ("classes.0.colour", [0, 0.5, 2], "whole numbers from 0 to 255"),
    ("classes.0.colour", [0, 0], "3 numbers in a list"),
    ("classes.0.colour", "red", "3 numbers in a list"),
    ("classes.0.evidence", "some", "needed an object"),
    ("classes.0.asserted_as", "a:b", "without ':'"),
    ("input.size_px", 0, "at least 1"),
    ("input.size_px", 32.0, "whole number"),
    ("input.size_px", True, "size_px is true/false (True)"),
    ("input.size_px", 36, "input.size_px is 36, needed a whole number of output strides (8 px)"),
    ("input.mpp", 0, "a number above 0"),
    ("input.mpp", float("nan"), "a number above 0"),
    ("input.mpp", [1, 2, 3], "a number above 0"),
    ("input.layout", "HWC", "needed NHWC or NCHW"),
    ("input.dtype", "int8", "needed uint8 or uint16 or float32 or float16"),
    ("input.dtype", "float16", "dtype float16 needs layout NCHW"),
    ("input.range", [1, 0], "needed [low, high] with low < high"),
    ("input.range", [0, 1], "dtype uint8 takes pixels as they are"),
    ("input.mean", [1, 2, 3], "dtype uint8 takes pixels as they are"),
    ("input.std", [1, 0, 3], "needed three numbers above 0"),
    ("input.resample", "nearest", "needed area or"),
    ("outputs", DELETE, "outputs is missing"),
    ("outputs.scores", None, "scores is null, needed text"),
    ("outputs.gate", "logits", "two roles name the same ONNX output"),
    ("outputs.cams", "x", "unknown entry 'cams'"),
    ("activation", "relu", "needed softmax or sigmoid or identity"),
    ("activation", "sigmoid", "asserted_as sums classes, which needs activation softmax"),
    ("output_stride_px", 0, "at least 1"),
    ("halo_px", 3, "halo_px is 3, needed a whole number of output strides"),
    ("dense.block_px", 65, "dense.block_px is 65"),
    ("dense.offset_px", "x", "needed a number"),
    ("outputs.cam", None, "dense needs a class-activation map"),
    ("outputs.gate_map", None, "dense with a gate needs the gate's map"),
    ("gate", None, "gate and outputs.gate go together"),
    ("gate.minimum", 1.5, "needed a number from 0 to 1"),
    ("gate.otherwise", "Normal", "must differ from every class: Normal"),
    ("gate.otherwise", "Uncertain", "must differ from every class: Uncertain"),
    ("uncertain.name", "Adenocarcinoma", "must differ from every class: Adenocarcinoma"),
    ("uncertain.below", -0.1, "needed a number from 0 to 1"),
    ("resources", [], "at least 1"),
    ("resources.0.sha256", "abc", "needed 64 hexadecimal digits"),
    ("resources.0.file", "weights.bin", "exactly one .onnx"),
    ("precision", [1], "needed an object"),
    ("terms", 3, "terms is a number"),
    ("recipe", ["macenko"], "recipe[0] is text"),
]


@pytest.mark.parametrize(("path", "value", "words"), BAD, ids=[f"{path}={value!r:.20}" for path, value, _ in BAD])
def test_a_wrong_entry_is_named(path: str, value: Any, words: str, tmp_path: Path) -> None:
    with pytest.raises(CardError) as caught:
        parse_card(changed(path, value), tmp_path, where="mine.json")
    assert words in caught.value.message
    assert caught.value.message.startswith("mine.json")


@pytest.mark.parametrize(
    "file", ["/etc/passwd", "../x.onnx", "a/../../x.onnx", "C:\\x.onnx", "..\\x.onnx", "~/x.onnx", "\\x"]
)
def test_a_file_outside_the_folder_is_refused(file: str, tmp_path: Path) -> None:
    with pytest.raises(IntegrityError, match="only name files inside its own folder"):
        parse_card(changed("resources.0.file", file), tmp_path)


def test_near_misses_are_offered(tmp_path: Path) -> None:
    with pytest.raises(CardError, match="did you mean 'licence'"):
        parse_card({**full(), "lisence": "x"}, tmp_path)
    data = full()
    data["license"] = data.pop("licence")
    with pytest.raises(CardError, match="the card has 'license': is it that"):
        parse_card(data, tmp_path)


def test_newer_schema_asks_for_an_upgrade(tmp_path: Path) -> None:
    with pytest.raises(CardError, match="upgrade wsiengine"):
        parse_card({"schema_version": 9}, tmp_path)


@pytest.mark.parametrize(
    "content", [b"", b"{", b"\xff\xfe\x00", b"[" * 100_000], ids=["empty", "cut", "binary", "deep"]
)
def test_a_file_that_is_no_json(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "card.json"
    path.write_bytes(content)
    with pytest.raises(CardError, match="is not valid JSON"):
        load_card(path)


def test_a_missing_card(tmp_path: Path) -> None:
    with pytest.raises(CardError, match="cannot be read"):
        load_card(tmp_path / "card.json")


@pytest.mark.parametrize("data", [None, 3, "text", []])
def test_json_that_is_no_object(data: Any, tmp_path: Path) -> None:
    with pytest.raises(CardError, match="needed an object"):
        load_card(write_card(tmp_path, data))


def test_the_card_in_the_documentation_is_valid(tmp_path: Path) -> None:
    text = (Path(__file__).parents[2] / "docs" / "cards.md").read_text(encoding="utf-8")
    example = text.split("```json\n")[1].split("```")[0]
    card = parse_card(json.loads(example), tmp_path)
    assert [m.name for m in card.map_classes] == ["Normal", "Adenocarcinoma"]
    for entry in json.loads(example):
        assert f"`{entry}`" in text, f"{entry} is not explained"
