"""The card's parts for ``task: detect``: what a detector's ONNX outputs mean, and what may follow it.

Which roles ``outputs`` names decides the form (every output may carry a leading axis of tiles, of size 1)::

    boxes        boxes (K, 4) · scores (K,) with labels (K,) integers, or scores (K, C) one column per class
                 masks, if any: roi   (K, h, w), (K, 1, h, w) or (K, C, h, w), each stretched over its box
                                full  (K, H, W) or (K, 1, H, W), H × W the tile
                 count, if any: how many of the K rows count (a fixed K is padded)
    heat map     scores (C, h, w), a peak at each object's centre; h, w = tile / output_stride_px
                 sizes (2, h, w) and offsets (2, h, w), if any, read at the peak

C is the number of classes, one more where the card says ``background``. With ``columns: true`` the last two axes of
boxes and of the score matrix are swapped: (4, K) and (C, K). Coordinates are those of the tile, from its corner.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from wsiengine.errors import CardError
from wsiengine.models.fields import Fields
from wsiengine.models.parts import ClassInfo, InputSpec, Outputs, read_class, read_input

BOXES = ("xyxy", "yxyx", "xywh", "cxcywh")
COORDINATES = ("pixels", "normalised", "cells")
BACKGROUNDS = ("none", "first", "last")
MASKS = ("roi", "full")
MERGES = ("nms", "soft_nms", "union")
OVERLAPS = ("iou", "ios")


@dataclass(frozen=True, slots=True)
class Merge:
    """How several views of one object become one.

    Attributes:
        method: ``nms`` keeps the best; ``soft_nms`` lets it lower the scores of its neighbours in the same tile (Bodla
            et al. 2017, Gaussian) and drops those of other tiles; ``union`` unites the views' masks.
        overlap: ``iou`` (shared part of both) or ``ios`` (shared part of the smaller).
        above: More overlap than this is one object.
        sigma: Of the Gaussian of ``soft_nms``.
        across_classes: Objects of different classes are compared, too.
        within_tile: Objects of one tile are compared, too; False where the model has done that itself and means what it
            left.
    """

    method: str = "nms"
    overlap: str = "iou"
    above: float = 0.5
    sigma: float = 0.5
    across_classes: bool = False
    within_tile: bool = True


@dataclass(frozen=True, slots=True, kw_only=True)
class Detection:
    """What the numbers of a detector mean; lengths in pixels of the tile.

    Attributes:
        largest_px: The longest side of an object that the model was made for: tiles overlap by as much.
        boxes: ``xyxy``, ``yxyx``, ``xywh`` (corner and size) or ``cxcywh`` (centre and size).
        coordinates: ``pixels`` of the tile, ``normalised`` to its side, or ``cells`` of the heat map. Of boxes, or of
            a heat map's sizes and offsets.
        columns: Boxes are (4, K) and scores (C, K).
        background: Which channel, or label, means that nothing is there: ``none``, the ``first`` or the ``last``.
        minimum_score: Candidates below are not kept at all.
        show_score: Objects below are not shown, unless the user asks for another score.
        per_tile: At most so many candidates of a tile, the best.
        border_px: A box that ends within so many pixels of its tile's border counts as cut by it.
        masks: ``roi`` or ``full``; None without masks.
        mask_activation: ``sigmoid`` or ``identity``.
        mask_threshold: A pixel is the object's where its activated mask is at least this.
        axis_order: Of a heat map's sizes and offsets: ``xy`` (width before height) or ``yx``.
        peak_cells: A peak is the highest within so many cells around.
        point_px: Side of the box around a peak, where the model gives no sizes.
        merge: How views become objects.
    """

    largest_px: float
    boxes: str = "xyxy"
    coordinates: str = "pixels"
    columns: bool = False
    background: str = "none"
    minimum_score: float = 0.05
    show_score: float = 0.5
    per_tile: int = 1000
    border_px: float = 1.0
    masks: str | None = None
    mask_activation: str = "identity"
    mask_threshold: float = 0.5
    axis_order: str = "xy"
    peak_cells: int = 1
    point_px: float = 0.0
    merge: Merge = Merge()

    @property
    def overlap_px(self) -> float:
        """Tiles that overlap by this show every object of ``largest_px`` whole, clear of the border, at least once."""
        return self.largest_px + 2 * self.border_px


@dataclass(frozen=True, slots=True)
class Crop:
    """The square cut out around an object's centre: ``side_px``, or ``around`` times its longer side, if given."""

    side_px: float | None = None
    around: float | None = None


@dataclass(frozen=True, slots=True)
class Head:
    """A classifier of feature rows, (N, F) float32 → (N, classes): gradient boosting, say, as ONNX's TreeEnsemble.

    Its rows are the second stage's ``features``, or its probabilities where it names none. ``scores`` is the output
    with one probability per class. With ``assigns`` the best class becomes the object's.
    """

    file: str
    scores: str
    classes: tuple[ClassInfo, ...]
    assigns: bool = False
    threshold: float = 0.5


@dataclass(frozen=True, slots=True)
class Second:
    """A classifier of crops around the objects.

    Attributes:
        file: Its ONNX file; input (N, …) as ``input`` says, scores (N, classes), features (N, F).
        crop: What is cut out; it is brought to ``input.size_px``.
        input: As of the detector, without µm/px: a crop has the detector's pixels.
        scores, features: Names of the outputs.
        classes: Its classes; with ``assigns`` the best becomes the object's class, else each adds a measurement.
        activation: ``softmax``, ``sigmoid`` (several labels may hold at once) or ``identity``.
        threshold: A label holds from this probability on.
        head: What follows.
    """

    file: str
    crop: Crop
    input: InputSpec
    scores: str
    classes: tuple[ClassInfo, ...]
    activation: str
    assigns: bool = False
    threshold: float = 0.5
    features: str | None = None
    head: Head | None = None

    @property
    def files(self) -> tuple[str, ...]:
        return (self.file, self.head.file) if self.head else (self.file,)


def read_detection(entry: Fields) -> Detection:
    """The card's ``detection``.

    Raises:
        CardError: An entry is missing, unknown or wrong.
    """
    merge = entry.object_or_none("merge")
    found = Detection(
        largest_px=_above_zero(entry, "largest_px"),
        boxes=entry.choice("boxes", BOXES, default="xyxy"),
        coordinates=entry.choice("coordinates", COORDINATES, default="pixels"),
        columns=entry.flag("columns", default=False),
        background=entry.choice("background", BACKGROUNDS, default="none"),
        minimum_score=entry.number("minimum_score", low=0, high=1, default=0.05),
        show_score=entry.number("show_score", low=0, high=1, default=0.5),
        per_tile=entry.integer("per_tile", at_least=1, default=1000),
        border_px=entry.number("border_px", low=0, high=64, default=1.0),
        masks=entry.choice("masks", MASKS) if entry.has("masks") else entry.take("masks", None),
        mask_activation=entry.choice("mask_activation", ("identity", "sigmoid"), default="identity"),
        mask_threshold=entry.number("mask_threshold", low=0, high=1, default=0.5),
        axis_order=entry.choice("axis_order", ("xy", "yx"), default="xy"),
        peak_cells=entry.integer("peak_cells", at_least=1, default=1),
        point_px=entry.number("point_px", low=0, high=1e6, default=0.0),
        merge=_read_merge(merge) if merge else Merge(),
    )
    entry.finish()
    return found


def _read_merge(entry: Fields) -> Merge:
    merge = Merge(
        method=entry.choice("method", MERGES, default="nms"),
        overlap=entry.choice("overlap", OVERLAPS, default="iou"),
        above=entry.number("above", low=0, high=1, default=0.5),
        sigma=entry.number("sigma", low=1e-3, high=1e3, default=0.5),
        across_classes=entry.flag("across_classes", default=False),
        within_tile=entry.flag("within_tile", default=True),
    )
    entry.finish()
    return merge


def read_second(entry: Fields) -> Second:
    """The card's ``second``.

    Raises:
        CardError: An entry is missing, unknown or wrong.
    """
    outputs = entry.object("outputs")
    head = entry.object_or_none("head")
    second = Second(
        file=entry.text("file"),
        crop=_read_crop(entry.object("crop")),
        input=read_input(entry.object("input")),
        scores=outputs.text("scores"),
        features=outputs.text_or_none("features"),
        classes=tuple(read_class(c) for c in entry.objects("classes", at_least=1)),
        activation=entry.choice("activation", ("softmax", "sigmoid", "identity")),
        assigns=entry.flag("assigns", default=False),
        threshold=entry.number("threshold", low=0, high=1, default=0.5),
        head=_read_head(head) if head else None,
    )
    outputs.finish()
    entry.finish()
    if second.input.mpp is not None:
        raise CardError(f"{entry.where}: input.mpp is given, but a crop has the detector's pixels: needed null")
    return second


def _read_crop(entry: Fields) -> Crop:
    crop = Crop(*(_above_zero(entry, key) if entry.has(key) else entry.take(key, None) for key in Crop.__slots__))
    entry.finish()
    if (crop.side_px is None) == (crop.around is None):
        raise CardError(f"{entry.where}: needed either side_px or around", hint="see docs/cards.md")
    return crop


def _read_head(entry: Fields) -> Head:
    head = Head(
        file=entry.text("file"),
        scores=entry.text("scores"),
        classes=tuple(read_class(c) for c in entry.objects("classes", at_least=1)),
        assigns=entry.flag("assigns", default=False),
        threshold=entry.number("threshold", low=0, high=1, default=0.5),
    )
    entry.finish()
    return head


def _above_zero(entry: Fields, key: str) -> float:
    value = entry.number(key)
    if value <= 0:
        raise CardError(f"{entry.where}: {key} is {value:g}, needed a number above 0")
    return value


def check_detection(found: Detection, outputs: Outputs, spec: InputSpec, where: str, stride_px: int) -> None:
    """Refuse entries that contradict each other.

    Raises:
        CardError: Says which.
    """
    boxes = outputs.boxes is not None
    wrong = None
    if boxes and (outputs.sizes or outputs.offsets):
        wrong = "outputs.sizes and outputs.offsets belong to a heat map, outputs.boxes to boxes: needed one form"
    elif not boxes and (outputs.labels or outputs.masks or outputs.count):
        wrong = "outputs.labels, masks and count go with outputs.boxes, which is not given"
    elif bool(outputs.masks) != (found.masks is not None):
        wrong = "outputs.masks and detection.masks go together: needed both or neither"
    elif found.merge.method == "union" and not outputs.masks:
        wrong = "detection.merge.method union unites masks, but outputs.masks is not given"
    elif boxes and found.coordinates == "cells":
        wrong = "detection.coordinates cells belong to a heat map: needed pixels or normalised"
    elif not boxes and not outputs.sizes and found.point_px <= 0:
        wrong = "a heat map without outputs.sizes needs detection.point_px, the side of an object"
    elif not spec.whole and found.overlap_px > spec.size_px - stride_px:
        wrong = (
            f"detection.largest_px is {found.largest_px:g}, with the border {found.overlap_px:g} px, "
            f"needed at most {spec.size_px - stride_px}: the tile less one output stride"
        )
    if wrong:
        raise CardError(f"{where}: {wrong}", hint="see docs/cards.md")


def detection_json(found: Detection | None) -> dict[str, Any] | None:
    """As :func:`read_detection` reads it."""
    return asdict(found) if found is not None else None


def second_json(second: Second | None) -> dict[str, Any] | None:
    """As :func:`read_second` reads it."""
    if second is None:
        return None
    facts: dict[str, Any] = {
        "file": second.file,
        "crop": asdict(second.crop),
        "input": second.input.to_json(),
        "outputs": {"scores": second.scores, "features": second.features},
        "classes": [c.to_json() for c in second.classes],
        "activation": second.activation,
        "assigns": second.assigns,
        "threshold": second.threshold,
    }
    if second.head is None:
        return facts
    head: Mapping[str, Any] = {
        "file": second.head.file,
        "scores": second.head.scores,
        "classes": [c.to_json() for c in second.head.classes],
        "assigns": second.head.assigns,
        "threshold": second.head.threshold,
    }
    return facts | {"head": head}
