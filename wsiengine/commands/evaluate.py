"""``wsiengine evaluate``: a model against labelled images or annotated slides, by tile, image, slide and case."""

import argparse
import json
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

from wsiengine.commands.arguments import fraction, positive, whole
from wsiengine.models.precision import ASKED

if TYPE_CHECKING:
    from wsiengine.evaluating_slides import Uncounted
    from wsiengine.labelled_sets import Chosen, LabelledSet
    from wsiengine.models.card import Card

_MANY = "of a classifier on labelled images"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("-m", "--model", default="crc5", help="model name or folder (default: %(default)s)")
    parser.add_argument(
        "--data",
        type=Path,
        action="append",
        required=True,
        metavar="DIR",
        help="labels.csv, its folder, a folder per class, or slides with annotations; several sets: again",
    )
    parser.add_argument(
        "--sets",
        metavar="FILE|own",
        help="the sets inside --data, each with its µm/px and labels; own: those of the model's card",
    )
    parser.add_argument(
        "--map", action="append", default=[], metavar="LABEL=CLASS", help="this label of the data means this class"
    )
    parser.add_argument(
        "--apart", action="append", default=[], metavar="LABEL", help="tell what this label is called, in no figure"
    )
    parser.add_argument(
        "--where", action="append", default=[], metavar="COLUMN=VALUE", help="these rows of labels.csv only"
    )
    parser.add_argument("--folds", metavar="0,1", help="evaluate these folds only")
    parser.add_argument(
        "--rule",
        default="weighted",
        help="how tiles join: weighted, sum, vote, average, exist, exist-3 (default: %(default)s)",
    )
    parser.add_argument(
        "--min-drawn",
        type=fraction,
        metavar="F",
        help="leave out tiles with less of them under the image's mask (default: 0.2 of a model with a gate, else 0)",
    )
    parser.add_argument(
        "--source-mpp", type=_scale, metavar="UM|X,Y", help="µm/px of the images, instead of what the table says"
    )
    parser.add_argument("--precision", choices=ASKED, default="fp32", help="number format of the model (default: fp32)")
    parser.add_argument("--device", default="auto", metavar="auto|cpu|cuda[:i]|mnn")
    parser.add_argument("--threads", type=whole, default=0, metavar="N", help="default: all cores")
    parser.add_argument("-o", "--output", type=Path, metavar="DIR", help="also write report.json and report.png here")
    parser.add_argument("--json", action="store_true", help="print as JSON")


def _scale(text: str) -> tuple[float, float]:
    """µm/px as (y, x): ``1.0``, or ``1.21,0.96`` (across, down)."""
    parts = [positive(part) for part in text.split(",")]
    if len(parts) not in (1, 2):
        raise argparse.ArgumentTypeError(f"{text!r} is no µm/px: write 0.5, or 1.21,0.96 (across, down)")
    return parts[-1], parts[0]


def run(args: argparse.Namespace) -> int:
    from wsiengine.models.registry import load_model
    from wsiengine.training.slides import has_slides

    card = load_model(args.model)
    if card.task == "classify" and not has_slides(args.data[0]):
        return _images(args, card)
    data = _only(args, card.task)
    if card.task == "segment":
        from wsiengine.commands import evaluate_objects

        return evaluate_objects.run(args, data, card)
    if card.task == "detect":
        from wsiengine.commands import evaluate_detector

        return evaluate_detector.run(args, data, card, pairs(args.map, "--map"), folds_of(args.folds))
    return _slides(args, data, card)


def _only(args: argparse.Namespace, task: str) -> Path:
    """The one folder that segmenters, detectors and slides are evaluated on.

    Raises:
        WsiError: Several were given, or something that is for labelled images alone.
    """
    from wsiengine.errors import WsiError

    what = "slides with annotations" if task == "classify" else f"a {task} model"
    wrong = {
        "--sets": args.sets,
        "--data twice": len(args.data) > 1,
        "--apart": args.apart and task != "classify",
        "--min-drawn": args.min_drawn is not None,
        "--where": args.where and task != "segment",
    }
    if given := [name for name, value in wrong.items() if value]:
        raise WsiError(f"{given[0]} is {_MANY}, not of {what}", hint=f"leave out {given[0].split()[0]}")
    return Path(args.data[0])


def _images(args: argparse.Namespace, card: "Card") -> int:
    from wsiengine.evaluating import score_empty_windows, score_images
    from wsiengine.evaluation_report import Account, report
    from wsiengine.labelled_sets import gather
    from wsiengine.machine import usable_cores
    from wsiengine.models.session import open_runtime

    how = Account.of(card, args.rule, args.min_drawn)
    chosen = gather(_sets(args, card), [c.name for c in card.map_classes], folds_of(args.folds))
    runtime = open_runtime(card, args.precision, device=args.device, threads=args.threads or usable_cores())
    rows = score_images(card, chosen.fields, runtime, progress=counter("images"))
    counted = [f for f in chosen.fields if f.label in rows.classes]
    empty = score_empty_windows(card, counted, runtime) if card.gate else None
    found = report(rows, how, empty=empty) | {"left_out": dict(chosen.left_out)}
    return _tell(args, card, found, _about_images(card, chosen, found))


def _about_images(card: "Card", chosen: "Chosen", found: dict[str, Any]) -> list[str]:
    images = found["image"]["n"]
    return [
        f"{images:,} of {chosen.total:,} labelled images",
        *_left_out(chosen.left_out, "images", card),
        *(
            [
                f"left out  {found['little_drawn']:,} tiles with less than {found['min_drawn']:.0%} of them under the "
                "mask: they have no class to be right about (--min-drawn 0 counts them)"
            ]
            if found["little_drawn"]
            else []
        ),
    ]


def _left_out(labels: Any, unit: str, card: "Card") -> list[str]:
    if not labels:
        return []
    named = ", ".join(f"{name} ({count:,})" for name, count in labels.items())
    return [
        f"left out  {sum(labels.values()):,} {unit} whose label is no class of {card.name}: {named} (--map LABEL=CLASS "
        "counts a label, --apart LABEL tells what it is called)"
    ]


def _sets(args: argparse.Namespace, card: "Card") -> "list[LabelledSet]":
    """What is evaluated on: the sets of a file, or each ``--data`` with the same words.

    Raises:
        WsiError: The file cannot be used, or something is said twice.
    """
    from wsiengine.errors import WsiError
    from wsiengine.labelled_sets import FILE, OWN, LabelledSet, read_sets
    from wsiengine.training.slides import has_slides

    if args.sets:
        said = {"--map": args.map, "--apart": args.apart, "--where": args.where, "--source-mpp": args.source_mpp}
        if given := [name for name, value in said.items() if value]:
            raise WsiError(f"{given[0]} and --sets say the same thing twice", hint="write it into the file of sets")
        file = card.folder / FILE if args.sets == OWN else Path(args.sets)
        if args.sets == OWN and not file.is_file():
            raise WsiError(f"{card.name} names no sets of its own", hint="give a file: --sets sites.json")
        return [one for data in args.data for one in read_sets(file, data)]
    if slides := [data for data in args.data if has_slides(data)]:
        raise WsiError(f"{slides[0]} holds annotated slides, {args.data[0]} images", hint="evaluate one kind at a time")
    folders = [data.parent if data.is_file() else data for data in args.data]
    names = [folder.name for folder in folders]
    if len(set(names)) < len(names):
        names = [str(folder) for folder in folders]
    words = (args.source_mpp, pairs(args.map, "--map"), tuple(args.apart), pairs(args.where, "--where"))
    return [LabelledSet(name, folder, *words) for name, folder in zip(names, folders, strict=True)]


def _slides(args: argparse.Namespace, data: Path, card: "Card") -> int:
    from wsiengine.evaluating_slides import Words, choose_slides, score_slides
    from wsiengine.evaluation_report import Account, report
    from wsiengine.output import make_folder
    from wsiengine.training.slides import find_slides

    how = Account.of(card, args.rule)
    slides = choose_slides(find_slides(data), folds_of(args.folds))
    said = Words(pairs(args.map, "--map"), tuple(args.apart))
    options = {"device": args.device, "threads": args.threads, "precision": args.precision}
    if args.source_mpp:
        options["mpp"] = args.source_mpp[0]
    with ExitStack() as stack:
        if args.output:
            make_folder(args.output)
            runs = args.output / "runs"
        else:
            runs = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="wsiengine-")))
        rows, uncounted = score_slides(slides, card, args.model, said, runs, progress=counter("slides"), **options)
    found = report(rows, how, base="cell") | {
        "slides": len(slides),
        "annotated_cells": uncounted.annotated,
        "no_tissue_cells": uncounted.no_tissue,
        "several_classes_cells": uncounted.several,
        "left_out": dict(sorted(uncounted.labels.items())),
    }
    return _tell(args, card, found, _about_slides(card, len(slides), found, uncounted))


def _about_slides(card: "Card", slides: int, found: dict[str, Any], uncounted: "Uncounted") -> list[str]:
    side = card.output_stride_px * card.input.fixed_mpp.mean
    return [
        f"{slides:,} slides · {found['cell']['n']:,} of {uncounted.annotated:,} annotated cells of {side:g} µm",
        *_left_out(found["left_out"], "cells", card),
        *([f"left out  {uncounted.no_tissue:,} cells in which the run saw no tissue"] if uncounted.no_tissue else []),
        *([f"left out  {uncounted.several:,} cells under annotations of two classes"] if uncounted.several else []),
    ]


def _tell(args: argparse.Namespace, card: "Card", found: dict[str, Any], about: Sequence[str]) -> int:
    """Write and print a report; ``about`` is what was counted, and what was left out."""
    from wsiengine.evaluation_picture import draw
    from wsiengine.evaluation_report import Account
    from wsiengine.evaluation_tables import table_lines

    found = {"model": card.name, "version": card.version, "precision": args.precision} | found
    write_report(args.output, found)
    if args.output:
        draw(found, args.output / "report.png")
    if args.json:
        print(json.dumps(found, ensure_ascii=False))
        return 0
    print(f"model     {card.name} {card.version} · {about[0]} · tiles join by rule {args.rule}")
    names = Account.of(card).no_answer
    no_answer = [name for name, may in zip(names, (card.gate, card.uncertain), strict=True) if may]
    for line in [*about[1:], "", *table_lines(found, no_answer)]:
        print(line)
    if args.output:
        print(f"\nfiles     {args.output / 'report.json'} · {args.output / 'report.png'}")
    return 0


def write_report(folder: Path | None, report: Mapping[str, Any]) -> None:
    """``report.json`` in the folder that was asked for, if any."""
    from wsiengine.output import make_folder

    if folder is not None:
        make_folder(folder)
        (folder / "report.json").write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")


def counter(unit: str) -> Callable[[int, int], None]:
    """Counts on a terminal; elsewhere it is silent."""

    def tell(done: int, total: int) -> None:
        if sys.stderr.isatty():
            end = "\n" if done == total else ""
            print(f"\r{done:,} of {total:,} {unit}", end=end, file=sys.stderr, flush=True)

    return tell


def pairs(said: Sequence[str], option: str) -> dict[str, str]:
    """``A=B`` of an option that may be given several times.

    Raises:
        WsiError: One has no ``=``, or nothing on one of its sides.
    """
    from wsiengine.errors import WsiError

    found = {}
    for pair in said:
        name, equals, value = pair.partition("=")
        if not (name and equals and value):
            example = '--map "Low-grade IN=Adenoma"' if option == "--map" else "--where split=testA"
            raise WsiError(f"{option} {pair} says nothing", hint=f"write {example}")
        found[name] = value
    return found


def folds_of(text: str | None) -> list[int] | None:
    """The numbers of ``0,3``; None of None."""
    from wsiengine.errors import WsiError

    if text is None:
        return None
    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise WsiError(f"--folds {text} is no list of numbers", hint="write --folds 0 or --folds 0,3") from None
