"""How long the tissue mask takes: reading and rules apart, per slide.

    python benchmarks/tissue.py [SLIDE …]        (--mpp for slides that state none)

Without a slide: the rules alone on a drawn slide of 5 cm² and of a whole glass slide (25 × 75 mm).
"""

import argparse
import resource
import time
from collections.abc import Callable
from typing import Any

import numpy as np

from wsiengine.geometry import Lattice, Mpp, Size
from wsiengine.slides import open_slide
from wsiengine.tissue import TissueMask, find_tissue, read_whole, tissue_cost
from wsiengine.tissue_rules import segment


def fastest(work: Callable[[], Any], repeats: int = 3) -> tuple[float, Any]:
    """(seconds of the quickest, its result)."""
    best, result = float("inf"), None
    for _ in range(repeats):
        started = time.perf_counter()
        result = work()
        best = min(best, time.perf_counter() - started)
    return best, result


def peak_mib() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def drawn(rows: int, cols: int) -> np.ndarray:
    """Pixels of a section at 8 µm/px: islands of stained tissue on glass, with noise; a fifth of it tissue."""
    rng = np.random.default_rng(0)
    pixels = rng.normal((243, 242, 245), 1.0, (256, 256, 3))
    y, x = np.mgrid[:256, :256]
    island = ((y - 120) / 80) ** 2 + ((x - 130) / 55) ** 2 <= 1
    stain = rng.random((256, 256, 1)) * (120, 70, 140) + (1 - rng.random((256, 256, 1))) * (90, 80, 60)
    pixels[island] = stain[island]
    tile = np.clip(pixels, 0, 255).astype(np.uint8)
    return np.tile(tile, (-(-rows // 256), -(-cols // 256), 1))[:rows, :cols]


def measure_rules() -> None:
    for name, size in (("5 cm²", Size(2_800, 2_790)), ("25 × 75 mm", Size(3_125, 9_375))):
        pixels = drawn(*size.shape)
        before = peak_mib()
        seconds, mask = fastest(lambda pixels=pixels: segment(pixels, 8.0))  # type: ignore[misc]
        print(
            f"{name}: {size.area / 1e6:.1f} Mpx at 8 µm/px · rules {seconds:.2f} s, "
            f"{seconds / size.area * 1e9:.0f} ns/px · {peak_mib() - before:.0f} MiB beside the pixels' "
            f"{pixels.nbytes / 2**20:.0f} · tissue {mask.mean():.1%}"
        )
        whole = TissueMask(mask, Size(size.height * 32, size.width * 32), Mpp.square(0.25))
        lattice = Lattice(whole.size_l0, whole.slide_mpp, Mpp.square(0.5), 32)
        seconds, cells = fastest(lambda whole=whole, lattice=lattice: whole.cell_fraction(lattice))  # type: ignore[misc]
        print(f"    share of tissue in {cells.size / 1e6:.1f} M cells: {seconds:.2f} s", end=" · ")
        seconds, polygons = fastest(whole.polygons_l0, 1)
        print(f"{len(polygons)} polygons: {seconds:.2f} s · stored in {len(whole.to_bytes()) / 1024:.0f} KiB")


def measure_slide(path: str, mpp: float | None) -> None:
    slide = open_slide(path, mpp=mpp)
    read, pixels = fastest(lambda: read_whole(slide, Mpp.square(8.0)))
    rules, _ = fastest(lambda: segment(pixels, 8.0))
    total, mask = fastest(lambda: find_tissue(slide))
    cost = tissue_cost(slide.info)
    print(
        f"{path}: {slide.info.size_l0} px · tissue {mask.fraction:.1%}, {mask.area_mm2:.2f} mm² · {total:.2f} s "
        f"(read {cost:.1f} Mpx {read:.2f} s, {read / cost * 1e3:.1f} ns/px; rules {rules:.2f} s)"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("slides", nargs="*")
    parser.add_argument("--mpp", type=float)
    options = parser.parse_args()
    for path in options.slides:
        measure_slide(path, options.mpp)
    if not options.slides:
        measure_rules()


if __name__ == "__main__":
    main()
