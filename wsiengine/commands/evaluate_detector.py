"""``wsiengine evaluate`` of a detector: its objects against annotated ones."""

import argparse
import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from wsiengine.evaluation_tables import words
from wsiengine.models.card import Card

if TYPE_CHECKING:
    from wsiengine.datasets.rows import DetectionSet


def run(args: argparse.Namespace, data: Path, card: Card, merge: dict[str, str], folds: Sequence[int] | None) -> int:
    """Score the model on the annotated images of ``data``; print a table, or JSON."""
    from wsiengine.commands.evaluate import counter, write_report
    from wsiengine.datasets.reading import read_detections
    from wsiengine.evaluating_detection import score_detector

    found = renamed(read_detections(data), merge).chosen(folds)
    if args.source_mpp:
        found = replace(found, images=tuple(replace(row, mpp_yx=args.source_mpp) for row in found.images))
    report = score_detector(
        found, card, args.model, progress=counter("images"), device=args.device, threads=args.threads
    )
    report["left_out"] = left_out = unknown_classes(found, [c.asserted_as or c.name for c in card.classes])
    write_report(args.output, report)
    if args.json:
        print(json.dumps(report, ensure_ascii=False))
        return 0
    print(f"model  {card.name} {card.version} · {len(found.images):,} images · {found.objects:,} annotated objects")
    if left_out:
        named = ", ".join(f"{name} ({count:,})" for name, count in left_out.items())
        print(f"left out  objects whose class is no class of {card.name}: {named} (--map LABEL=CLASS counts them)")
    for line in table_lines(report):
        print(line)
    return 0


def unknown_classes(found: "DetectionSet", known: Sequence[str]) -> dict[str, int]:
    """Objects by class of those that the model does not know; one class here and one there are the same."""
    if len(found.classes) == len(known) == 1:
        return {}
    counts = {
        name: sum(int((row.objects.labels == k).sum()) for row in found.images)
        for k, name in enumerate(found.classes)
        if name not in known
    }
    return {name: count for name, count in counts.items() if count}


def renamed(found: "DetectionSet", merge: dict[str, str]) -> "DetectionSet":
    """The set with its classes renamed; classes of one name become one."""
    import numpy as np

    if not merge:
        return found
    names = [merge.get(name, name) for name in found.classes]
    classes = tuple(dict.fromkeys(names))
    number = np.array([classes.index(name) for name in names])
    images = tuple(
        replace(row, objects=replace(row.objects, labels=number[row.objects.labels])) for row in found.images
    )
    return replace(found, classes=classes, images=images)


def table_lines(report: Mapping[str, Any]) -> list[str]:
    """The report as lines of text."""
    lines = []
    for name, of in report["classes"].items():
        shown = {key: words(value) for key, value in of["at_shown_score"].items()}
        lines += [
            f"{name}: {of['annotated']:,} annotated",
            f"  AP at IoU 0.5 {_span(of['ap50'])} (VOC {words(of['ap50_voc'])})"
            f" · mean AP at 0.5–0.95 {words(of['ap'])}",
            "  sensitivity at false positives per image: "
            + " · ".join(f"{fppi}: {_span(value)}" for fppi, value in of["sensitivity_at_fppi"].items()),
            f"  shown from score {report['shown_from']:g}: {of['found']:,} found · precision {shown['precision']} · "
            f"recall {shown['recall']} · {shown['fppi']} false per image",
            f"  mean IoU {shown['iou']} · overlapping ratio {shown['overlapping_ratio']} · count off by "
            f"{shown['counting_error']} per image",
        ]
    if "types" in report:
        lines.append(f"types of {report['matched']:,} matched objects: how many have it, AUC (95 % by images)")
        for name, of in report["types"].items():
            span = f"{words(of['auc'])} ({words(of['low'])}–{words(of['high'])})"
            lines.append(f"  {name:<20}{of['patches']:>7,}   {span}")
        exact = report["exact_match"]
        lines.append(
            f"exactly the right types: {words(exact['value'])} of {exact['patches']:,} wholly annotated objects"
        )
    if "abnormal" in report:
        of = report["abnormal"]
        lines.append(
            f"abnormal or normal: accuracy {_span(of['accuracy'])} · AUC {words(of['auc'])} · sensitivity "
            f"{words(of['sensitivity'])} · specificity {words(of['specificity'])} · {of['abnormal']:,} of "
            f"{of['patches']:,} abnormal"
        )
    return lines


def _span(figure: Mapping[str, float | None]) -> str:
    return f"{words(figure['value'])} ({words(figure['low'])}–{words(figure['high'])})"
