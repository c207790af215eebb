"""A segmenter against images whose objects are drawn: through the very run that a slide gets, then the measures.

The measures are in :mod:`wsiengine.object_scores`; found objects are the outlines that a user gets, filled in.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import shapely
from scipy import ndimage

from wsiengine.datasets.sheets import read_sheet
from wsiengine.errors import WsiError
from wsiengine.finishing import Finish, make_annotations
from wsiengine.geometry import Mpp, Size
from wsiengine.identifying import Request, identify
from wsiengine.job import score_block
from wsiengine.journal import Recovered
from wsiengine.object_scores import ImageScores, join, score_image
from wsiengine.preparing import prepare
from wsiengine.slides import open_slide
from wsiengine.truth import Truth

_SPECK_PX = 10


@dataclass(frozen=True, slots=True)
class DrawnImage:
    """An image with its objects.

    Attributes:
        image: File.
        mask: File of the same size: a number per object, or one value (then connected parts are the objects).
        mpp_yx: µm per pixel down and across.
        group: What it is counted with, besides all (a grade, say).
    """

    image: Path
    mask: Path
    mpp_yx: tuple[float, float]
    group: str = ""


def find_in_image(image: Path, mpp_yx: tuple[float, float], model: str, **options: Any) -> np.ndarray:
    """The objects that a run finds in an image.

    Args:
        image: File.
        mpp_yx: µm per pixel down and across.
        model: Name or folder of a segmenter.
        **options: Fields of :class:`wsiengine.identifying.Request`.

    Returns:
        int32 (rows, cols): 0 = none, 1 … n.

    Raises:
        WsiError: Image or model cannot be used.
    """
    slide = open_slide(image, mpp=Mpp(*mpp_yx))
    try:
        subject = identify(Request(slide=slide, model=model, **{"tissue": "none", **options}))
        plan = prepare(subject).plan
        if plan.job is None:
            raise ValueError("a plan without a job")
        gathered = plan.task.gather(plan, Recovered({}, {}, ()))
        for block in plan.blocks():
            gathered.add(score_block(plan.job, block))
        truth = Truth.of(plan, gathered.arrays(), None)
        annotations = make_annotations(truth, truth.map(), Finish(plan.threshold))
        return filled([annotation.geometry for annotation in annotations], slide.info.size_l0)
    finally:
        slide.close()


def filled(polygons: Sequence[Any], size: Size) -> np.ndarray:
    """Polygons in pixels; a pixel gets the number (from 1) of the one that holds its centre → int32 (rows, cols)."""
    labels = np.zeros(size.shape, np.int32)
    for number, polygon in enumerate(polygons, start=1):
        x0, y0, x1, y1 = (int(v) for v in np.floor(polygon.bounds))
        rows, cols = np.mgrid[max(0, y0) : min(y1 + 1, size.height), max(0, x0) : min(x1 + 1, size.width)]
        shapely.prepare(polygon)
        inside = shapely.contains_xy(polygon, cols + 0.5, rows + 0.5)
        labels[rows[inside], cols[inside]] = number
    return labels


def drawn_objects(mask: Path, shape: tuple[int, ...]) -> np.ndarray:
    """The objects of a mask: its numbers, or the connected parts (through edges) of a mask of one value.

    Parts of fewer than 10 pixels are slips of the pen, not objects (GlaS' masks have some).

    Raises:
        WsiError: The mask cannot be read, or has another size than its image.
    """
    values = cv2.imread(str(mask), cv2.IMREAD_UNCHANGED)
    if values is None or values.shape[:2] != shape[:2]:
        got = "cannot be read" if values is None else f"is {values.shape[1]} × {values.shape[0]} px"
        raise WsiError(
            f"the mask {mask} {got}; its image is {shape[1]} × {shape[0]} px", hint="a mask has the size of its image"
        )
    values = values if values.ndim == 2 else values[..., 0]
    if len(np.unique(values[values > 0])) > 1:
        return values.astype(np.int32)
    labels: np.ndarray = ndimage.label(values > 0)[0].astype(np.int32)
    labels[np.bincount(labels.ravel())[labels] < _SPECK_PX] = 0
    return labels


def score_segmenter(
    images: Sequence[DrawnImage],
    model: str,
    *,
    progress: Callable[[int, int], None] = lambda done, total: None,
    **options: Any,
) -> dict[str, Any]:
    """The measures over images, in all and by group.

    Args:
        images: What is compared.
        model: Name or folder of a segmenter.
        progress: Called with images done and images in all.
        **options: Fields of :class:`wsiengine.identifying.Request`.

    Returns:
        ``images``, ``all`` (:class:`~wsiengine.object_scores.ObjectScores` as a dict), ``mean_of_images`` (f1, dice,
        hausdorff_px) and ``groups``.
    """
    scores: list[ImageScores] = []
    for index, drawn in enumerate(images):
        found = find_in_image(drawn.image, drawn.mpp_yx, model, **options)
        scores.append(score_image(drawn_objects(drawn.mask, found.shape), found))
        progress(index + 1, len(images))
    single = [join([score]) for score in scores]
    groups = sorted({drawn.group for drawn in images} - {""})
    return {
        "images": len(images),
        "all": asdict(join(scores)),
        "mean_of_images": {
            name: float(np.mean([getattr(s, name) for s in single])) for name in ("f1", "dice", "hausdorff_px")
        },
        "groups": {
            group: {
                "images": sum(drawn.group == group for drawn in images),
                **asdict(join([s for s, drawn in zip(scores, images, strict=True) if drawn.group == group])),
            }
            for group in groups
        },
    }


def read_drawn(
    data: Path, *, where: Mapping[str, str] | None = None, mpp_yx: tuple[float, float] | None = None
) -> tuple[list[DrawnImage], int]:
    """Images with drawn objects, from a ``labels.csv`` with the columns ``file`` and ``mask``.

    ``mpp`` (µm per pixel) and ``class`` or ``grade`` (what images are grouped by) are used where they are there; rows
    without a mask are left out.

    Args:
        data: The table, or its folder.
        where: Column → value that a row must have.
        mpp_yx: µm per pixel down and across, instead of what the table says.

    Returns:
        The images, and how many rows were left out.

    Raises:
        WsiError: No table, a column or file missing, µm/px unknown, or no row left.
    """
    table = data if data.is_file() else data / "labels.csv"
    if not table.is_file():
        raise WsiError(f"{table} is missing", hint="give the folder of a labels.csv with the columns file and mask")
    names, rows = read_sheet(table)
    missing = {"file", "mask", *(where or {})} - set(names)
    if missing:
        raise WsiError(
            f"{table} has no column {' and '.join(sorted(missing))}",
            hint=f"it has {', '.join(names) or 'none'}",
        )
    wanted = [row for row in rows if all(row[k] == v for k, v in (where or {}).items())]
    chosen = [row for row in wanted if row["mask"]]
    if not chosen:
        raise WsiError(f"no row of {table} is left to evaluate", hint="check --where, and that masks are named")
    return [_drawn(table, row, mpp_yx) for row in chosen], len(wanted) - len(chosen)


def _drawn(table: Path, row: Mapping[str, str], mpp_yx: tuple[float, float] | None) -> DrawnImage:
    image, mask = table.parent / row["file"], table.parent / row["mask"]
    for file in (image, mask):
        if not file.is_file():
            raise WsiError(f"{table} names {file.name}, which is not there", hint="correct the row")
    try:
        said = float(row.get("mpp") or "nan")
    except ValueError:
        raise WsiError(f"{table}: µm/px of {row['file']} is {row['mpp']!r}", hint="mpp is a number") from None
    own = mpp_yx or (said, said)
    if not 0.05 <= min(own) <= max(own) <= 20:
        raise WsiError(
            f"{table}: µm/px of {row['file']} is missing or absurd: needed 0.05 to 20",
            hint="add a column mpp, or give --source-mpp",
        )
    return DrawnImage(image, mask, own, row.get("class") or row.get("grade") or "")
