"""``wsiengine tissue``: where tissue or breast is, as a picture and as GeoJSON that ``--tissue`` takes back."""

import argparse
import json
from pathlib import Path

from wsiengine.commands.arguments import add_mpp


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("slide", metavar="SLIDE")
    parser.add_argument(
        "-o", "--output", type=Path, metavar="DIR", help="where to write (default: <slide name>.tissue)"
    )
    parser.add_argument(
        "--find", choices=("slide", "breast"), default="slide", help="tissue on a slide, or the breast in a mammogram"
    )
    add_mpp(parser)
    parser.add_argument("--json", action="store_true", help="print as JSON")


def run(args: argparse.Namespace) -> int:
    from wsiengine.annotations import region_annotations, write_geojson
    from wsiengine.breast import breast_mask
    from wsiengine.output import make_folder
    from wsiengine.slides import open_slide
    from wsiengine.tissue import find_tissue, tissue_picture
    from wsiengine.wording import area_words, percent, slide_words

    slide = open_slide(args.slide, mpp=args.mpp)
    name, find = ("Breast", breast_mask) if args.find == "breast" else ("Tissue", find_tissue)
    mask = find(slide)
    folder = args.output or Path(f"{Path(args.slide).stem}.tissue")
    make_folder(folder)
    bounds = slide.info.bounds_l0
    regions = region_annotations(mask.polygons_l0(), name, (0, 114, 178), slide.fingerprint())
    write_geojson(regions, folder / "tissue.geojson", offset_l0=(bounds.y0, bounds.x0) if bounds else (0, 0))
    tissue_picture(slide, mask, folder / "tissue.png")
    files = [str(folder / "tissue.geojson"), str(folder / "tissue.png")]
    if args.json:
        facts = {"area_mm2": mask.area_mm2, "fraction": mask.fraction, "regions": len(regions), "files": files}
        print(json.dumps(facts, ensure_ascii=False))
        return 0
    counted = "1 region" if len(regions) == 1 else f"{len(regions)} regions"
    print(f"{'slide':<9}{slide_words(args.slide, slide.info)}")
    print(f"{name.lower():<9}{percent(mask.fraction)} of the slide · {area_words(mask.area_mm2)} · {counted}")
    print(f"{'files':<9}{' · '.join(files)}")
    return 0
