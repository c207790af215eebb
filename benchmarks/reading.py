"""What a pixel of a tiled-JPEG slide costs, by way of reading, against the bare decoder.

``python benchmarks/reading.py [SLIDE] [--mpx 100] [--repeats 5] [--quick]``

Without SLIDE a mosaic of real fields is made (WSIENGINE_DATA), or a position-coded slide where there are none. All ways
take turns, CPU time, best of the repeats: trust the ratios.
"""

import argparse
import math
import os
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parents[1]), str(Path(__file__).parents[1] / "kernels")]

import imagecodecs  # noqa: E402
import numpy as np  # noqa: E402

from tests.mosaics import MosaicPlan, mosaic_slide, position_slide  # noqa: E402
from wsiengine import Box, Size, open_slide  # noqa: E402
from wsiengine.slides.direct import tile_canvas  # noqa: E402
from wsiengine.slides.pyramid import PyramidLayout  # noqa: E402
from wsiengine.slides.sources import LocalSource  # noqa: E402
from wsiengine.slides.tiff import parse_tiled  # noqa: E402
from wsiengine.slides.whole import WholeSlide  # noqa: E402

BLOCKS_PX = (512, 1024, 2048)


class Floor:
    """The packed tiles under a region, in memory, and nothing but their decoding into one buffer."""

    def __init__(self, path: Path, region: Box) -> None:
        with LocalSource(str(path)) as source:
            tiff = parse_tiled(source)
            if tiff is None or tiff.levels[0].codec != "jpeg":
                raise SystemExit(f"{path} is not a tiled-JPEG slide")
            table = self._table = tiff.levels[0]
            rows, cols = -(-region.y1 // table.tile.height), -(-region.x1 // table.tile.width)
            self.packed = [source.read(*place) for row in range(rows) for place in table.places(row, range(cols))]

    def run(self, packed: list[bytes] | None = None) -> None:
        out = tile_canvas(self._table.tile)
        space = "YCBCR" if self._table.ycbcr else "RGB"
        tables = self._table.jpeg_tables
        for tile in self.packed if packed is None else packed:
            imagecodecs.jpeg8_decode(tile, tables=tables, colorspace=space, outcolorspace="RGB", out=out)

    def run_plain(self) -> None:
        """As most would call it: every tile into fresh memory."""
        space = "YCBCR" if self._table.ycbcr else "RGB"
        for tile in self.packed:
            imagecodecs.jpeg8_decode(tile, tables=self._table.jpeg_tables, colorspace=space, outcolorspace="RGB")

    def run_threaded(self) -> None:
        with ThreadPoolExecutor(2) as pool:
            list(pool.map(self.run, (self.packed[0::2], self.packed[1::2])))


def read_blocks(slide: WholeSlide, region: Box, side_px: int, threads: int = 1) -> None:
    """Block by block, each thread into a buffer of its own."""
    own = threading.local()

    def read(piece: Box) -> None:
        if not hasattr(own, "buffer"):
            own.buffer = np.empty(side_px * side_px * 3, np.uint8)
        slide.read_level(0, piece, out=own.buffer[: piece.area * 3].reshape(*piece.shape, 3))

    pieces = region.pieces(side_px, side_px)
    if threads == 1:
        for piece in pieces:
            read(piece)
    else:
        with ThreadPoolExecutor(threads) as pool:
            list(pool.map(read, pieces))


def best_times(ways: dict[str, Callable[[], None]], repeats: int) -> dict[str, tuple[float, float]]:
    """(CPU seconds, wall seconds) of each way, each the least of the repeats; the ways take turns."""
    best = dict.fromkeys(ways, (math.inf, math.inf))
    for _ in range(repeats):
        for name, way in ways.items():
            cpu, wall = time.process_time(), time.perf_counter()
            way()
            seconds = time.process_time() - cpu, time.perf_counter() - wall
            best[name] = (min(best[name][0], seconds[0]), min(best[name][1], seconds[1]))
    return best


def make_slide(folder: Path, mpx: float) -> Path:
    """A slide of about ``mpx`` million pixels in 256 px tiles, of tissue where there is any."""
    path = folder / "slide.svs"
    height = round(math.sqrt(mpx * 1e6 * 3 / 4) / 256) * 256
    size = Size(height, round(mpx * 1e6 / height / 256) * 256)
    data = os.environ.get("WSIENGINE_DATA")
    layout = PyramidLayout(downsamples=(1,))
    if data:
        zone_um = min(size.shape) * 0.25 * 0.9
        mosaic_slide(path, size, MosaicPlan("ebhi", mpp=0.25, zone_um=zone_um, margin_um=0), Path(data), layout)
    else:
        position_slide(path, size, 0.25, layout)
    return path


def measure(path: Path, mpx: float, repeats: int) -> None:
    with (
        open_slide(path, reader="direct") as direct,
        open_slide(path, reader="tiffslide") as tiffslide,
        open_slide(path, reader="openslide") as openslide,
    ):
        size = direct.info.size_l0
        rows = min(size.height, max(2048, round(mpx * 1e6 / size.width) // 2048 * 2048))
        region = Box(0, 0, rows, size.width)
        floor = Floor(path, region)
        ways: dict[str, Callable[[], None]] = {"bare decoder": floor.run, "bare decoder, as it comes": floor.run_plain}
        for side in BLOCKS_PX:
            ways[f"direct, {side} px blocks"] = lambda side=side: read_blocks(direct, region, side)
        ways["tiffslide, 2048 px blocks"] = lambda: read_blocks(tiffslide, region, 2048)
        ways["OpenSlide, 2048 px blocks"] = lambda: read_blocks(openslide, region, 2048)
        singles = best_times(ways, repeats)
        threaded = best_times(
            {
                "bare decoder": floor.run_threaded,
                "direct, 2048 px": lambda: read_blocks(direct, region, 2048, threads=2),
            },
            repeats,
        )

    lowest = singles["bare decoder"][0]
    print(
        f"{path.name} · {region.width:,} × {region.height:,} px · {len(floor.packed):,} tiles of {direct.info.format}"
    )
    print(f"{'one thread, CPU time':32}{'ns/px':>8}{'× floor':>9}")
    for name, (cpu, _) in singles.items():
        print(f"{name:32}{cpu / region.area * 1e9:8.2f}{cpu / lowest:9.2f}")
    print(f"{'two threads, wall time':32}{'ns/px':>8}{'faster':>9}")
    for (name, (_, wall)), one in zip(threaded.items(), ("bare decoder", "direct, 2048 px blocks"), strict=True):
        print(f"{name:32}{wall / region.area * 1e9:8.2f}{singles[one][1] / wall:8.2f}×")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("slide", type=Path, nargs="?")
    parser.add_argument("--mpx", type=float, default=100.0, help="how many million pixels are read")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--quick", action="store_true", help="seconds, for a smoke test")
    options = parser.parse_args()
    mpx, repeats = (8.0, 2) if options.quick else (options.mpx, options.repeats)
    with tempfile.TemporaryDirectory() as folder:
        measure(options.slide or make_slide(Path(folder), mpx), mpx, repeats)


if __name__ == "__main__":
    main()
