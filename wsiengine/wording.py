"""How a run speaks to a person: numbers with units, a plan in four lines, a result in one. Pure."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from wsiengine.geometry import Size

if TYPE_CHECKING:
    from wsiengine.planning import Plan
    from wsiengine.slides.base import SlideInfo


def bytes_words(count: int) -> str:
    """
    >>> bytes_words(734003200)
    '0.7 GiB'
    >>> bytes_words(41943040)
    '40 MiB'
    """
    gib = count / 2**30
    return f"{gib:.1f} GiB" if gib >= 0.5 else f"{count / 2**20:.0f} MiB"


def area_words(mm2: float) -> str:
    """
    >>> area_words(21.34), area_words(0.01234), area_words(123.4)
    ('21.3 mm²', '0.0123 mm²', '123 mm²')
    """
    if mm2 >= 100:
        return f"{mm2:,.0f} mm²"
    return f"{mm2:.1f} mm²" if mm2 >= 10 else f"{mm2:.3g} mm²"


def clock(seconds: float) -> str:
    """
    >>> clock(14.2), clock(3725)
    ('0:00:14', '1:02:05')
    """
    whole = round(seconds)
    return f"{whole // 3600}:{whole // 60 % 60:02d}:{whole % 60:02d}"


def percent(part: float) -> str:
    """
    >>> percent(0.2857), percent(0.3), percent(1), percent(0.0004)
    ('28.6 %', '30 %', '100 %', '0.04 %')
    """
    value = 100 * part
    return f"{value:.1f}".removesuffix(".0") + " %" if value >= 0.1 or value == 0 else f"{value:.2g} %"


def slide_words(path: str, info: "SlideInfo") -> str:
    """One line about a slide."""
    levels = f"{len(info.levels)} level{'s' if len(info.levels) > 1 else ''}"
    mpp = str(info.mpp) if info.mpp else "µm/px unknown"
    return " · ".join((Path(path).name, info.format, f"{info.size_l0} px", mpp, levels))


def _library_words(provider: str) -> str:
    """
    >>> _library_words("CPUExecutionProvider"), _library_words("MNN 3.6.1")
    ('ONNX Runtime CPU', 'MNN 3.6.1')
    """
    kind = provider.removesuffix("ExecutionProvider")
    return provider if kind == provider else f"ONNX Runtime {kind}"


def plan_lines(plan: "Plan") -> list[tuple[str, str]]:
    """(name, text) lines: slide, model, tissue, plan."""
    card, grid = plan.card, plan.grid
    threads = plan.options.all_threads
    runtime = _library_words(plan.job.runtime.provider) if plan.job else "no session"
    known = plan.options.calibrated  # else a pixel counts as a µm
    tissue_mm2 = plan.tissue_um2 / 1e6
    size = area_words(tissue_mm2) if known else f"{tissue_mm2:.3g} Mpx"
    tiles, blocks = _counted(plan.tile_count, "tile"), _counted(plan.block_count, "block")
    whole = plan.lattice.slide_l0.area * plan.lattice.slide_mpp.pixel_um2
    return [
        ("slide", slide_words(plan.path, plan.info if known else replace(plan.info, mpp=None))),
        (
            "model",
            f"{card.name} {card.version} · {card.input.size_px} px at {card.input.resolution} · {runtime}, "
            f"{threads} thread{'s' if threads > 1 else ''} · weights: {card.licence}",
        ),
        (
            "tissue",
            f"{percent(plan.tissue_um2 / whole)} of the slide · {size} · "
            f"{tiles}, overlap {percent(plan.options.overlap)} → stride {grid.stride_px} px "
            f"({percent(grid.overlap)})" + (", dense windows" if plan.options.mode == "dense" else ""),
        ),
        (
            "plan",
            f"{blocks} · {bytes_words(plan.read_bytes)} of pixels to read · peak memory {bytes_words(plan.peak_bytes)}"
            + (f" · scratch files {bytes_words(plan.scratch_bytes)}" if plan.scratch_bytes else ""),
        ),
    ]


def plan_facts(plan: "Plan") -> dict[str, Any]:
    """The plan as JSON."""
    return {
        "slide": {"format": plan.info.format, "reader": plan.info.reader, "size_l0": size_facts(plan.info.size_l0)},
        "model": {"name": plan.card.name, "version": plan.card.version, "sha256": plan.card.sha256},
        "tissue_mm2": plan.tissue_um2 / 1e6,
        "tiles": plan.tile_count,
        "tile_px": plan.grid.tile_px,
        "stride_px": plan.grid.stride_px,
        "overlap_used": plan.grid.overlap,
        "blocks": plan.block_count,
        "peak_bytes": plan.peak_bytes,
        "scratch_bytes": plan.scratch_bytes,
        "read_px": plan.read_px,
        "read_bytes": plan.read_bytes,
    }


def size_facts(size: Size) -> dict[str, int]:
    return {"width": size.width, "height": size.height}


def summary_words(summary: Mapping[str, Any]) -> str:
    """Areas of the classes found, or numbers of objects, in the order of the model's classes."""
    if "density_per_mm2" in summary or "density_per_mpx" in summary:
        return _objects_words(summary)
    areas = summary["area_mm2"]
    counts = summary.get("objects", {})
    words = [
        f"{_in_a_sentence(name)} {area_words(mm2)}" + (f" ({counts[name]:,})" if name in counts else "")
        for name, mm2 in areas.items()
    ] or ["nothing found"]
    return " · ".join(words + ([unreadable_words(summary)] if summary.get("unreadable_tiles") else []))


def _objects_words(summary: Mapping[str, Any]) -> str:
    """Of a detector: how many objects, and how dense, if they are: a mass in a mammogram is not."""
    physical = "density_per_mm2" in summary
    density = summary["density_per_mm2" if physical else "density_per_mpx"]
    per = "mm²" if physical else "Mpx"
    words = [
        f"{count:,} {name}" + (f" ({density[name]:,.1f} per {per})" if density.get(name, 0) >= 0.05 else "")
        for name, count in summary["objects"].items()
    ]
    if summary.get("cut"):
        words.append(f"{summary['cut']:,} cut by a tile's border")
    if summary.get("unreadable_tiles"):
        words.append(unreadable_words(summary))
    return " · ".join(words or ["no objects found"])


def area_lines(summary: Mapping[str, Any]) -> list[str]:
    """Of a detector: objects in each annotation of the region."""
    return [f"{area['name']}: {_objects_words(area)}" for area in summary.get("areas", [])]


def fewer_readers_words(plan: "Plan", asked: int) -> str:
    """That memory has no room for all processes that were to read."""
    left, limit = plan.options.readers, plan.options.memory_limit_bytes or 0
    who = f"{left} of {asked} processes read" if left else f"None of {asked} processes reads"
    return f"{who}: the others do not fit into {bytes_words(limit)} of memory. It costs pace only."


def left_out_words(summary: Mapping[str, Any]) -> str:
    """How many candidates the card's limit per tile left out."""
    return (
        f"{summary['left_out']:,} candidates were left out: a tile had more than the card's detection.per_tile allows. "
        "The best were kept."
    )


def unreadable_words(summary: Mapping[str, Any]) -> str:
    """How much of the tissue a damaged slide kept to itself."""
    return f"{_counted(summary['unreadable_tiles'], 'tile')} could not be read or scored"


def _counted(count: int, what: str) -> str:
    """
    >>> _counted(1, "tile"), _counted(1200, "block")
    ('1 tile', '1,200 blocks')
    """
    return f"{count:,} {what}{'' if count == 1 else 's'}"


def _in_a_sentence(name: str) -> str:
    """``No epithelium`` → ``no epithelium``; ``Mark A`` and ``MSI`` stay as they are."""
    return name.lower() if name[1:].islower() else name
