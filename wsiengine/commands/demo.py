"""``wsiengine demo``: draw a slide with planted marks, find them, check their place; then run crc5 on it."""

import argparse
from pathlib import Path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "-o", "--output", type=Path, default=Path("wsiengine-demo"), metavar="DIR", help="default: %(default)s"
    )
    parser.add_argument("--quiet", action="store_true", help="print errors only")


def run(args: argparse.Namespace) -> int:
    from wsiengine.demo import LEAST_IOU, check, draw_slide
    from wsiengine.inference import infer
    from wsiengine.output import make_folder
    from wsiengine.terminal import make_display

    display = make_display(quiet=args.quiet)
    make_folder(args.output)
    slide = args.output / "demo-slide.svs"
    marks = draw_slide(slide)
    display.line("demo", f"drew {slide}: shapes on glass with {len(marks)} planted marks (no tissue)")
    found = infer(slide, "planted", args.output / "planted", overwrite=True, listener=display)
    display.close()
    results = check(marks, found.annotations)
    for result in results:
        verdict = "in place" if result.passed else f"MISPLACED, needs {LEAST_IOU:g}"
        display.line("check", f"{result.name}: overlap with its planted place (IoU) {result.iou:.3f}: {verdict}")
    display.line("", "")
    display.line("demo", "now crc5 on the same drawing, to show the path; what it finds in a drawing means nothing")
    infer(slide, "crc5", args.output / "crc5", overwrite=True, listener=display)
    display.close()
    return 0 if all(result.passed for result in results) else 1
