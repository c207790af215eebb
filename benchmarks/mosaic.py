"""Make a mosaic slide of real labelled fields.

``python benchmarks/mosaic.py OUT.svs --gpx 1 --source ebhi --mpp 0.25``

Beside OUT.svs stands OUT.npz, the truth (see ``tests.mosaics.Truth``). The fields come from the folder named by
WSIENGINE_DATA.
"""

import argparse
import math
import os
import sys
import time
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parents[1]), str(Path(__file__).parents[1] / "kernels")]

from tests.mosaics import MosaicPlan, mosaic_slide  # noqa: E402
from wsiengine.geometry import Size  # noqa: E402
from wsiengine.slides.pyramid import PyramidLayout  # noqa: E402


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path)
    parser.add_argument("--gpx", type=float, default=1.0, help="pixels of level 0, in 10⁹ (default 1)")
    parser.add_argument("--source", default="ebhi", choices=["ebhi", "glas", "lc25000"])
    parser.add_argument("--mpp", type=float, default=0.25, help="µm per level-0 pixel")
    parser.add_argument("--fold", type=int, default=0)
    parser.add_argument("--zone-um", type=float, default=8 * 224.0, help="least side of a zone")
    parser.add_argument("--compression", default="jpeg", choices=["jpeg", "jpeg2000", "deflate"])
    options = parser.parse_args()
    data = os.environ.get("WSIENGINE_DATA")
    if not data:
        parser.error("WSIENGINE_DATA does not name the folder of the labelled fields")

    height = math.isqrt(round(options.gpx * 1e9 * 3 / 4))  # 4:3
    size = Size(height, round(options.gpx * 1e9 / height))
    plan = MosaicPlan(options.source, options.mpp, options.fold, options.zone_um)
    start = time.perf_counter()
    truth = mosaic_slide(options.out, size, plan, Path(data), PyramidLayout(compression=options.compression))
    truth.save(options.out.with_suffix(".npz"))
    seconds = time.perf_counter() - start
    print(
        f"{options.out} · {size} px at {options.mpp} µm/px · {len(truth.zones)} zones · "
        f"{options.out.stat().st_size / 2**20:,.0f} MiB · {seconds:.1f} s"
    )


if __name__ == "__main__":
    main()
