"""One tile's arrays → candidates: what borders cut, what is too much, which mask belongs to a box, where peaks are."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from wsiengine.decoding import Found, candidates, decode
from wsiengine.errors import CardError, ScoreError
from wsiengine.models.card import Card, parse_card
from wsiengine.objects import BOTTOM, LEFT, RIGHT, TOP, TileView

ALL = TOP | LEFT | BOTTOM | RIGHT


def card(outputs: str = "boxes scores labels", *, activation: str = "identity", **detection: Any) -> Card:
    data = {
        "schema_version": 1,
        "name": "drawn",
        "version": "1",
        "task": "detect",
        "classes": [{"name": "One"}, {"name": "Two"}],
        "input": {"size_px": 64, "mpp": 1.0, "layout": "NHWC", "dtype": "uint8"},
        "outputs": {name: name for name in outputs.split()},
        "activation": activation,
        "output_stride_px": 8,
        "detection": {"largest_px": 20, **detection},
        "resources": [{"file": "drawn.onnx", "sha256": "0" * 64}],
        "licence": "MIT",
    }
    return parse_card(data, Path())


def view(*, beside: int = ALL, opened: int = ALL) -> TileView:
    """A tile of 64 px at y 400, x 800 of a large slide; it shares 24 px with the tiles around."""
    return TileView(7, 400, 800, 64, (10_000.0, 10_000.0), 24, opened, beside)


def placed(box: list[float], tile: TileView) -> Any:
    found = Found(np.array([box], float), np.array([0.9], np.float32), np.zeros(1, np.int64))
    return candidates(found, tile, card())


def test_a_piece_that_the_next_tile_sees_better_is_left_to_it() -> None:
    piece = [20.0, 50.0, 30.0, 64.0]  # runs over the right border; the next tile begins at x = 40
    assert len(placed(piece, view())) == 0
    alone = placed(piece, view(beside=ALL - RIGHT))  # nobody runs that tile
    assert alone.boxes.tolist() == [[420, 850, 430, 864]]
    assert alone.cut.tolist() == [RIGHT]
    edge = placed(piece, view(beside=ALL - RIGHT, opened=ALL - RIGHT))  # the slide ends there
    assert edge.cut.tolist() == [0]
    longer = placed([20.0, 35.0, 30.0, 64.0], view())  # the next tile does not see where it begins
    assert longer.cut.tolist() == [RIGHT]
    corner = placed([0.0, 0.0, 64.0, 40.0], view())
    assert corner.cut.tolist() == [TOP | LEFT | BOTTOM]


def test_boxes_are_clipped_to_tile_and_slide() -> None:
    tile = TileView(0, 40, 40, 64, (100.0, 90.5), 24, TOP | LEFT, 0)
    assert placed([50.0, 30.0, 70.0, 80.0], tile).boxes.tolist() == [[90, 70, 100, 90.5]]
    assert len(placed([61.0, 5.0, 63.0, 9.0], tile)) == 0  # of the padding


def outputs_of(boxes: list, scores: list, labels: list | None = None, **more: Any) -> dict[str, np.ndarray]:
    found = {"boxes": np.array(boxes, np.float32), "scores": np.array(scores, np.float32)}
    return found | ({"labels": np.array(labels)} if labels is not None else {}) | more


def test_activation_limit_and_order() -> None:
    boxes = [[0, 0, 9, 9], [20, 0, 29, 9], [40, 0, 49, 9]]
    found = decode(outputs_of(boxes, [-4.0, 0.0, 2.0], [0, 1, 1]), card(activation="sigmoid", per_tile=1))
    assert found.scores.tolist() == pytest.approx([1 / (1 + np.exp(-2.0))])
    assert found.boxes.tolist() == [[0, 40, 9, 49]]
    assert found.left_out == 1  # the first is below the card's least score, the second is beyond the limit


def test_the_count_tells_padded_rows() -> None:
    boxes = [[0, 0, 9, 9], [99, 99, 9, 9]]
    found = decode(outputs_of(boxes, [0.5, 0.9], [0, 77], count=np.array([1])), card("boxes scores labels count"))
    assert found.labels.tolist() == [0]
    with pytest.raises(CardError, match="at most 2 boxes"):
        decode(outputs_of(boxes, [0.5, 0.9], [0, 1], count=np.array([3])), card("boxes scores labels count"))


@pytest.mark.parametrize(("background", "channels"), [("none", 2), ("first", 3), ("first", 2), ("first", 1)])
def test_each_box_has_the_mask_of_its_class(background: str, channels: int) -> None:
    boxes, labels = [[0, 0, 9, 9], [20, 0, 29, 9], [40, 0, 49, 9]], np.array([0, 1, 0])
    masks = np.arange(3 * channels, dtype=np.float32).reshape(3, channels, 1, 1) * np.ones((1, 1, 4, 4), np.float32)
    model = card("boxes scores labels masks", background=background, masks="roi")
    told = outputs_of(boxes, [0.9, 0.8, 0.7], (labels + (background == "first")).tolist(), masks=masks[None])
    first = {1: np.zeros(3, int), 2: labels, 3: labels + 1}[channels]
    assert decode(told, model).masks[:, 0, 0].tolist() == (np.arange(3) * channels + first).tolist()  # type: ignore[index]


def test_of_a_plateau_one_peak_is_left() -> None:
    heat = np.zeros((2, 8, 8), np.float32)
    heat[0, 2, 2:4] = heat[0, 3, 3] = 0.5
    heat[1, 2, 2] = 0.6  # of another class: not compared
    heat[0, 7, 7] = 0.4
    found = decode({"scores": heat}, card("scores", point_px=6, coordinates="cells"))
    assert sorted(zip(found.labels.tolist(), *((found.boxes[:, :2] + 3) / 8).T.tolist(), strict=True)) == [
        (0, 2.5, 2.5),
        (0, 7.5, 7.5),
        (1, 2.5, 2.5),
    ]
    sizes = np.stack([np.full((8, 8), 2.0), np.full((8, 8), 1.0)]).astype(np.float32)  # width, height
    sized = decode({"scores": heat, "sizes": sizes}, card("scores sizes", coordinates="cells"))
    assert set(map(tuple, (sized.boxes[:, 2:] - sized.boxes[:, :2]).tolist())) == {(8.0, 16.0)}


def test_a_network_without_suppression_is_thinned() -> None:
    boxes = [[0, 0, 20, 20], [1, 0, 21, 20], [2, 0, 22, 20], [40, 0, 60, 20]]
    assert decode(outputs_of(boxes, [0.7, 0.9, 0.8, 0.6], [0, 0, 0, 0]), card()).scores.tolist() == pytest.approx(
        [0.9, 0.6]
    )
    meant = card(merge={"within_tile": False})
    assert len(decode(outputs_of(boxes, [0.7, 0.9, 0.8, 0.6], [0, 0, 0, 0]), meant).scores) == 4


@pytest.mark.parametrize(
    ("arrays", "words"),
    [
        (outputs_of([[0, 0, 9, 9]], [[0.5, 0.5]], [0]), "shape"),
        (outputs_of([[0, 0, 9]], [0.5], [0]), "4 numbers"),
        (outputs_of([[0, 0, 9, 9]], [0.5], [0, 1]), "one for each of 1 scores"),
        (outputs_of([[0, 0, 9, 9], [0, 0, 9, 9]], [0.5], [0]), "one row for each of 2 boxes"),
        (outputs_of([[0, 0, 9, np.inf]], [0.5], [0]), "infinity as a box"),
        (outputs_of([[0, 0, 9, 9]], [np.nan], [0]), "NaN as a score"),
        (outputs_of([[0, 0, 9, 9]], [0.5], [2]), "the label 2"),
        (outputs_of([[70, 0, 79, 9]], [0.5], [0]), "outside its tile"),
        (outputs_of([[9, 0, 2, 9]], [0.5], [0]), "ends before it starts"),
    ],
)
def test_nonsense_is_refused_in_words(arrays: dict[str, np.ndarray], words: str) -> None:
    with pytest.raises((CardError, ScoreError)) as caught:
        decode(arrays, card())
    assert words in str(caught.value)
