"""``wsiengine evaluate``: a model against labelled images, by tile, image and case."""

import argparse
import json
from pathlib import Path

from wsiengine.commands.arguments import positive, whole
from wsiengine.machine import usable_cores
from wsiengine.models.precision import ASKED


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("-m", "--model", default="crc5", help="model name or folder (default: %(default)s)")
    parser.add_argument(
        "--data", type=Path, required=True, metavar="DIR", help="labels.csv, its folder, or a folder per class"
    )
    parser.add_argument(
        "--map", action="append", default=[], metavar="LABEL=CLASS", help="this label of the data means this class"
    )
    parser.add_argument(
        "--where",
        action="append",
        default=[],
        metavar="COLUMN=VALUE",
        help="of a segmenter: these rows of labels.csv only",
    )
    parser.add_argument("--folds", metavar="0,1", help="evaluate these folds only")
    parser.add_argument("--rule", default="average", help="how tiles join: sum, vote, average, exist, exist-3")
    parser.add_argument(
        "--source-mpp", type=_scale, metavar="UM|X,Y", help="µm/px of the images, where the table does not say"
    )
    parser.add_argument("--precision", choices=ASKED, default="fp32", help="number format of the model (default: fp32)")
    parser.add_argument("--device", default="auto", metavar="auto|cpu|cuda[:i]")
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
    from dataclasses import replace

    from wsiengine.errors import WsiError
    from wsiengine.evaluating import choose, draw, report, score_images, table_lines
    from wsiengine.models.registry import load_model
    from wsiengine.models.session import open_runtime
    from wsiengine.output import make_folder
    from wsiengine.training.tables import read_labels

    card = load_model(args.model)
    if card.task == "segment":
        from wsiengine.commands import evaluate_objects

        return evaluate_objects.run(args, card)
    if card.task == "detect":
        from wsiengine.commands import evaluate_detector

        return evaluate_detector.run(args, card, merge_pairs(args.map), _folds(args.folds))
    if args.where:
        raise WsiError(f"--where chooses rows for a segmenter; {card.name} is a {card.task} model", hint="use --folds")
    folder = args.data.parent if args.data.is_file() else args.data
    fields = read_labels(folder, merge=merge_pairs(args.map), mpp=args.source_mpp[0] if args.source_mpp else None)
    if args.source_mpp:
        fields = [replace(field, mpp_yx=args.source_mpp) for field in fields]
    classes = [c.name for c in card.map_classes]
    chosen = choose(fields, classes, _folds(args.folds))
    threads = args.threads or usable_cores()
    rows = score_images(card, chosen, open_runtime(card, args.precision, device=args.device, threads=threads))
    found = report(rows, classes, args.rule, card.uncertain.below if card.uncertain else 0.0)
    if args.output:
        make_folder(args.output)
        (args.output / "report.json").write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")
        draw(found, args.output / "report.png")
    if args.json:
        print(json.dumps(found, ensure_ascii=False))
        return 0
    print(f"model  {card.name} {card.version} · {len(chosen):,} of {len(fields):,} labelled images · rule {args.rule}")
    for line in table_lines(found):
        print(line)
    if args.output:
        print(f"files  {args.output / 'report.json'} · {args.output / 'report.png'}")
    return 0


def merge_pairs(pairs: list[str]) -> dict[str, str]:
    from wsiengine.errors import WsiError

    merge = {}
    for pair in pairs:
        label, equals, name = pair.partition("=")
        if not (label and equals and name):
            raise WsiError(f"--map {pair} says nothing", hint='write --map "Low-grade IN=Adenoma"')
        merge[label] = name
    return merge


def _folds(text: str | None) -> list[int] | None:
    from wsiengine.errors import WsiError

    if text is None:
        return None
    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise WsiError(f"--folds {text} is no list of numbers", hint="write --folds 0 or --folds 0,3") from None
