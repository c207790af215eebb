"""Slides and probability maps as lazy Dask arrays: ``python examples/lazy_map.py SLIDE [MODEL]``.

Nothing is read or scored before ``.compute()``, and then only the blocks that the asked part touches.
"""

import sys

import wsiengine


def main(slide_path: str, model: str) -> None:
    slide = wsiengine.open_slide(slide_path)
    pixels = slide.to_dask(mpp=8.0)  # (rows, cols, 3) uint8, resampled by area from the best level
    print(f"pixels at 8 µm/px: {pixels.shape}, mean colour {pixels.mean(axis=(0, 1)).compute().round(1)}")

    plan = wsiengine.plan(slide, model)
    heat = plan.to_dask()  # (rows, cols, channels) uint8 at one cell's pitch; 0 = not analysed, else (v - 1) / 254
    print(f"map: {heat.shape} cells of {plan.card.output_stride_px} px, channels {plan.layout.channels}")

    corner = heat[: heat.shape[0] // 2, : heat.shape[1] // 2].compute()
    analysed = corner[..., 0] > 0
    print(f"upper left quarter: {analysed.mean():.0%} analysed")
    for channel, name in enumerate(plan.layout.channels):
        values = corner[..., channel][analysed]
        if values.size:
            print(f"  {name}: mean {(values.mean() - 1) / 254:.2f}")


if __name__ == "__main__":
    main(*[*sys.argv[1:], "crc5"][:2])
