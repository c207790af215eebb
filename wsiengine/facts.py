"""What a run says of itself: in the attributes of its map, and in ``run.json``."""

import json
import platform
from collections.abc import Mapping
from typing import Any

from wsiengine import __version__
from wsiengine.events import Stopwatch
from wsiengine.finish import Finish
from wsiengine.identifying import Subject
from wsiengine.models.card import Card
from wsiengine.preparing import Prepared
from wsiengine.profile import Profile
from wsiengine.truth import Truth

NOTICE = "Research use only: not a medical device."


def cam_offset(card: Card) -> float | None:
    """Of the class-activation map, in pixels of the model."""
    return card.dense.offset_px if card.dense else None


def store_facts(truth: Truth, subject: Subject, finish: Finish) -> dict[str, Any]:
    """For the attributes of ``probability.zarr``."""
    card = subject.card
    return {
        **truth.attributes(),
        "version": __version__,
        "model": {"name": card.name, "version": card.version, "sha256": card.sha256},
        "parameters": dict(subject.identity["parameters"]),
        "threshold": finish.threshold,
        **({"cam_offset_px": cam_offset(card)} if card.outputs.cam else {}),
        "notice": NOTICE,
    }


def run_facts(
    who: tuple[Subject, Prepared], finish: Finish, results: Mapping[str, Any], watch: Stopwatch
) -> dict[str, Any]:
    """Everything needed to repeat the run: never the slide's path or name. Only ``timing`` and ``host`` may differ."""
    subject, prepared = who
    batches = subject.batches
    plan, card, info = prepared.plan, subject.card, subject.slide.info
    return {
        "wsiengine": __version__,
        "notice": NOTICE,
        "identity": dict(subject.identity),
        "slide": {
            "fingerprint": subject.fingerprint,
            "format": info.format,
            "reader": info.reader,
            "size_l0": {"height": info.size_l0.height, "width": info.size_l0.width},
            "levels": len(info.levels),
            "mpp": {"y": plan.lattice.slide_mpp.y, "x": plan.lattice.slide_mpp.x} if subject.calibrated else None,
        },
        "model": {
            "name": card.name,
            "version": card.version,
            "sha256": card.sha256,
            "licence": card.licence,
            "classes": [c.name for c in card.classes],
            "map_classes": list(plan.layout.names),
        },
        "plan": {
            "tiles": plan.tile_count,
            "tile_px": plan.grid.tile_px,
            "stride_px": plan.grid.stride_px,
            "overlap_asked": subject.request.overlap_asked,
            "overlap_used": round(plan.grid.overlap, 6),
            "working_mpp": {"y": plan.lattice.mpp.y, "x": plan.lattice.mpp.x},
            "cell_px": plan.lattice.cell_px,
        },
        "finish": finish.facts,
        "normalisation": {
            "recipe": str(subject.recipe),
            "fitted": prepared.normaliser.to_json(),
            "notes": list(prepared.normaliser.notes),
        },
        "warnings": list(subject.warnings),
        **results,
        "timing": {**Profile.of(watch).facts(), **({"batches": batches} if batches else {})},
        "host": {
            "python": platform.python_version(),
            "machine": platform.machine(),
            "threads": plan.options.all_threads,
            "blocks": plan.block_count,
            "block_tiles": plan.block_tiles,
            "peak_bytes_planned": plan.peak_bytes,
            "scratch_bytes_planned": plan.scratch_bytes,
            "runtime": subject.runtime.chosen,
        },
    }


def as_json(facts: Mapping[str, Any]) -> str:
    """As ``run.json`` has it."""
    return json.dumps(facts, indent=2, ensure_ascii=False) + "\n"
