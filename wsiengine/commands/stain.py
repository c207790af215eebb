"""``wsiengine stain``: the stain of a slide and what normalisation makes of it."""

import argparse
import json
from pathlib import Path

from wsiengine.commands.arguments import add_mpp


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("slide", metavar="SLIDE")
    parser.add_argument(
        "--normalise", default="macenko", metavar="RECIPE", help="macenko, vahadane, reinhard, macenko+clahe, …"
    )
    parser.add_argument("-o", "--output", type=Path, metavar="DIR", help="where to write (default: <slide name>.stain)")
    add_mpp(parser)
    parser.add_argument("--json", action="store_true", help="print as JSON")


def run(args: argparse.Namespace) -> int:
    from wsiengine.output import make_folder
    from wsiengine.recipe import parse_recipe
    from wsiengine.slides import open_slide
    from wsiengine.stain_report import stain_report
    from wsiengine.wording import slide_words

    recipe = parse_recipe(args.normalise)
    slide = open_slide(args.slide, mpp=args.mpp, window=recipe.window)
    folder = args.output or Path(f"{Path(args.slide).stem}.stain")
    make_folder(folder)
    report = stain_report(slide, recipe, folder)
    if args.json:
        print(json.dumps(report, indent=2, ensure_ascii=False))
        return 0
    print(f"{'slide':<9}{slide_words(args.slide, slide.info)}")
    for name, text in report["lines"]:
        print(f"{name:<9}{text}")
    print(f"{'files':<9}{' · '.join(report['files'])}")
    return 0
