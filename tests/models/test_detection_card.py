"""The card's parts for detectors: what they say, and what is refused in words."""

from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest

from wsiengine.errors import CardError
from wsiengine.models.card import parse_card

SHA = "0" * 64
DETECTOR: dict[str, Any] = {
    "schema_version": 1,
    "name": "cells",
    "version": "1",
    "task": "detect",
    "classes": [{"name": "Cell"}],
    "input": {"size_px": 128, "mpp": None, "layout": "NHWC", "dtype": "uint8", "channels": 1, "pad": 0},
    "outputs": {"boxes": "b", "scores": "s", "labels": "l", "masks": "m"},
    "activation": "identity",
    "output_stride_px": 16,
    "detection": {"largest_px": 48, "masks": "roi", "merge": {"method": "union", "above": 0.4}},
    "second": {
        "file": "types.onnx",
        "crop": {"around": 1.2},
        "input": {"size_px": 32, "mpp": None, "layout": "NCHW", "dtype": "float32"},
        "outputs": {"scores": "logits", "features": "f"},
        "classes": [{"name": "Target"}, {"name": "Burr"}],
        "activation": "sigmoid",
        "head": {"file": "boost.onnx", "scores": "p", "classes": [{"name": "Normal"}], "assigns": True},
    },
    "resources": [{"file": f, "sha256": SHA} for f in ("types.onnx", "boost.onnx", "cells.onnx")],
    "licence": "MIT",
}


def changed(**entries: Any) -> dict[str, Any]:
    """The card with entries set by a dotted path (``__`` for dots); None as a value stays None, ``...`` takes away."""
    data = deepcopy(DETECTOR)
    for path, value in entries.items():
        *folders, last = path.split("__")
        place = data
        for name in folders:
            place = place[name]
        if value is ...:
            del place[last]
        else:
            place[last] = value
    return data


def test_a_detector_with_two_stages_is_read_and_written_back() -> None:
    card = parse_card(DETECTOR, Path())
    assert card.detection is not None
    assert card.second is not None
    assert card.second.head is not None
    assert card.detection.overlap_px == 50
    assert card.detection.merge.method == "union"
    assert card.second.crop.around == 1.2
    assert card.model_resource.file == "cells.onnx"  # though the others stand first
    assert card.input.resolution == "pixels as they are"
    assert parse_card(card.to_json(), Path()) == card


WRONG = {
    "needs its entry": (
        {"detection": ..., "second": ..., "resources": [{"file": "cells.onnx", "sha256": SHA}]},
        "detection and task detect go together",
    ),
    "classify has none": ({"task": "classify"}, "go together"),
    "too large an object": ({"detection__largest_px": 120}, "needed at most 112"),
    "no size": ({"detection__largest_px": 0}, "needed a number above 0"),
    "a typo": ({"detection": {"largest_px": 9, "border": 2, "masks": "roi"}}, "unknown entry 'border'"),
    "masks without outputs": ({"outputs": {"boxes": "b", "scores": "s"}}, "masks go together"),
    "labels without boxes": ({"outputs": {"scores": "s", "labels": "l"}}, "go with outputs.boxes"),
    "cells of boxes": ({"detection__coordinates": "cells"}, "belong to a heat map"),
    "two forms": ({"outputs": {"boxes": "b", "scores": "s", "sizes": "z"}}, "needed one form"),
    "points without a size": ({"outputs": {"scores": "s"}, "detection": {"largest_px": 9}}, "point_px"),
    "an unlisted file": ({"resources": [{"file": "cells.onnx", "sha256": SHA}]}, "resources do not list"),
    "two crops": ({"second__crop": {"around": 1.0, "side_px": 9}}, "either side_px or around"),
    "a crop's µm/px": ({"second__input__mpp": 0.5}, "needed null"),
    "five channels": ({"input__channels": 5}, "needed 3 (colour) or 1 (grey)"),
    "two scales": ({"input__whole": True, "input__mpp": 1.0}, "needed one of them"),
    "a light pad": ({"input__pad": 300}, "from 0 to 255"),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_entries_are_refused_in_words(case: str) -> None:
    entries, words = WRONG[case]
    with pytest.raises(CardError) as caught:
        parse_card(changed(**entries), Path())
    assert words in str(caught.value)


def test_only_detectors_take_pixels_as_they_are() -> None:
    plain = {k: v for k, v in DETECTOR.items() if k not in ("detection", "second")}
    plain |= {"task": "classify", "outputs": {"scores": "s"}, "resources": DETECTOR["resources"][2:]}
    with pytest.raises(CardError, match=r"input\.mpp is missing"):
        parse_card(plain, Path())
