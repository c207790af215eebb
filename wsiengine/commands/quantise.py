"""``wsiengine quantise``: a classifier in int8 or float16, measured on your own labelled tissue."""

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from wsiengine.commands.arguments import positive, whole
from wsiengine.models.precision import PRECISIONS

if TYPE_CHECKING:
    from wsiengine.models.card import Card
    from wsiengine.training.data import Field


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", metavar="MODEL", help="model name or folder")
    parser.add_argument(
        "--data",
        type=Path,
        required=True,
        metavar="DIR",
        help="labels.csv's folder, a folder per class, or annotated slides",
    )
    parser.add_argument(
        "--precision", action="append", choices=PRECISIONS[1:], help="what to make; may be repeated (default: int8)"
    )
    parser.add_argument(
        "-o", "--output", type=Path, metavar="DIR", help="a copy of the model (default: its own folder)"
    )
    parser.add_argument(
        "--map", action="append", default=[], metavar="LABEL=CLASS", help="this label of the data means this class"
    )
    parser.add_argument("--test-fold", type=int, choices=range(5), default=0, help="measured on (default: 0)")
    parser.add_argument("--source-mpp", type=positive, metavar="UM", help="µm/px, where the table does not say")
    parser.add_argument("--iterations", type=whole, default=300, metavar="N", help="of training int8 (default: 300)")
    parser.add_argument("--threads", type=whole, default=1, metavar="N", help="(default: 1)")


def run(args: argparse.Namespace) -> int:
    from wsiengine.commands.evaluate import pairs
    from wsiengine.errors import OutputConflict
    from wsiengine.models.registry import ZOO, load_model
    from wsiengine.training import quantise
    from wsiengine.training.slides import has_slides
    from wsiengine.training.tables import read_labels

    card = load_model(args.model)
    if args.output is None and card.folder.resolve().is_relative_to(ZOO.resolve()):
        raise OutputConflict(f"{card.name} is a bundled model, which is not changed", hint="give -o DIR for a copy")
    merge = pairs(args.map, "--map")
    if has_slides(args.data):
        fields = _tiles_of_slides(args.data, card, merge, args.output or card.folder)
    else:
        fields = read_labels(args.data, merge=merge, mpp=args.source_mpp)
    sides = [[f for f in fields if (f.fold == args.test_fold) == held] for held in (False, True)]
    folder = quantise(
        card,
        *sides,
        output=args.output,
        precision=tuple(args.precision or ["int8"]),
        iterations=args.iterations,
        threads=args.threads,
    )
    print(f"model  {folder}: `wsiengine infer SLIDE --model {folder} --precision auto`")
    return 0


def _tiles_of_slides(data: Path, card: "Card", merge: dict[str, str], folder: Path) -> list["Field"]:
    """Tiles of annotated slides, as the model's own training would cut them."""
    from wsiengine.training.slides import Cutting, cut_slides, find_slides
    from wsiengine.training.tables import Labels

    how = Cutting(card.input.fixed_mpp.mean, card.input.size_px)
    return cut_slides(find_slides(data), Labels(merge=merge), how, folder / "training" / "tiles-to-measure")
