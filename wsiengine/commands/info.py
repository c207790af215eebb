"""``wsiengine info``: what a slide is, without reading its label."""

import argparse
import json
from typing import Any

from wsiengine.commands.arguments import add_mpp


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("slide", metavar="SLIDE")
    add_mpp(parser)
    parser.add_argument("--json", action="store_true", help="print as JSON")


def run(args: argparse.Namespace) -> int:
    from wsiengine.slides import open_slide

    slide = open_slide(args.slide, mpp=args.mpp)
    try:
        facts = slide_facts(slide.info)
    finally:
        slide.close()
    if args.json:
        print(json.dumps(facts, indent=2, ensure_ascii=False))
    else:
        _print(args.slide, facts)
    return 0


def slide_facts(info: Any) -> dict[str, Any]:
    """Facts about a slide as JSON."""
    from wsiengine.wording import size_facts

    box = info.bounds_l0
    return {
        "format": info.format,
        "reader": info.reader,
        "size_l0": size_facts(info.size_l0),
        "levels": [{**size_facts(lv.size), "downsample": round(lv.downsample[0], 4)} for lv in info.levels],
        "mpp": {"x": info.mpp.x, "y": info.mpp.y} if info.mpp else None,
        "stated_mpp": {"x": info.stated_mpp.x, "y": info.stated_mpp.y} if info.stated_mpp else None,
        "objective": info.objective,
        "bounds_l0": {"x": box.x0, "y": box.y0, "width": box.width, "height": box.height} if box else None,
        "associated_images": list(info.associated),
        "channels": list(info.channels),
    }


def _print(name: str, facts: dict[str, Any]) -> None:
    size, mpp, stated = facts["size_l0"], facts["mpp"], facts["stated_mpp"]
    lines = [
        ("slide", name),
        ("format", facts["format"]),
        ("reader", facts["reader"]),
        ("size", f"{size['width']:,} × {size['height']:,} px"),
    ]
    if mpp:
        physical = f"{size['width'] * mpp['x'] / 1000:.1f} × {size['height'] * mpp['y'] / 1000:.1f} mm"
        lines.append(("µm/px", f"{mpp['x']:.4g} × {mpp['y']:.4g} (x × y) · the slide shows {physical}"))
    elif stated:
        lines.append(
            ("µm/px", f"the file says {stated['x']:g} × {stated['y']:g}: implausible, give --mpp to analyse it")
        )
    else:
        lines.append(("µm/px", "not stated: give --mpp to analyse it"))
    lines.append(("objective", f"{facts['objective']:g}×" if facts["objective"] else "not stated"))
    for index, level in enumerate(facts["levels"]):
        lines.append((f"level {index}", f"{level['width']:,} × {level['height']:,} px · 1/{level['downsample']:g}"))
    if facts["channels"]:
        lines.append(("channels", ", ".join(facts["channels"])))
    if facts["bounds_l0"]:
        box = facts["bounds_l0"]
        lines.append(("bounds", f"{box['width']:,} × {box['height']:,} px at x {box['x']:,}, y {box['y']:,}"))
    lines.append(("images", ", ".join(facts["associated_images"]) or "none besides the slide"))
    for label, text in lines:
        print(f"{label:<11}{text}")
