"""``wsiengine evaluate`` of a segmenter: its objects against drawn ones."""

import argparse
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from wsiengine.models.card import Card


def run(args: argparse.Namespace, data: Path, card: Card) -> int:
    """Score the model on the images of ``data``; print a table, or JSON."""
    from wsiengine.commands.evaluate import counter, pairs, write_report
    from wsiengine.evaluating_objects import read_drawn, score_segmenter

    images, unmasked = read_drawn(data, where=pairs(args.where, "--where"), mpp_yx=args.source_mpp)
    options = {"device": args.device, "threads": args.threads, "precision": args.precision}
    found = score_segmenter(images, args.model, progress=counter("images"), **options) | {"without_mask": unmasked}
    write_report(args.output, found)
    if args.json:
        print(json.dumps(found, ensure_ascii=False))
        return 0
    print(f"model  {card.name} {card.version} · {len(images):,} images · object measures of the GlaS challenge (2017)")
    print(
        f"{'':<37}{'images':>7}{'drawn':>7}{'found':>7}{'F1':>8}{'prec.':>8}{'recall':>8}{'Dice':>8}{'Hausd. px':>11}"
    )
    print(_line("all", found["all"], found["images"]))
    mean = found["mean_of_images"]
    print(f"{'mean of images':<58}{mean['f1']:>8.3f}{'':>16}{mean['dice']:>8.3f}{mean['hausdorff_px']:>11.1f}")
    for name, group in found["groups"].items():
        print(_line(name, group, group["images"]))
    if unmasked:
        print(f"{unmasked:,} image{'s have' if unmasked > 1 else ' has'} no mask in the table: left out")
    return 0


def _line(name: str, scores: Mapping[str, Any], images: int) -> str:
    shares = "".join(f"{scores[key]:>8.3f}" for key in ("f1", "precision", "recall", "dice"))
    return f"{name:<37}{images:>7,}{scores['drawn']:>7,}{scores['found']:>7,}{shares}{scores['hausdorff_px']:>11.1f}"
