"""A slide in, annotations out: ``python examples/infer_slide.py SLIDE [MODEL]``."""

import sys

import wsiengine

slide, model = [*sys.argv[1:], "crc5"][:2]
print(wsiengine.plan(slide, model))  # what would be read and run, and its memory; nothing has run yet
result = wsiengine.infer(slide, model, output="out")  # the same call after an interruption goes on where it stopped
for name, mm2 in result.summary["area_mm2"].items():
    print(f"{name}: {mm2:.3f} mm²")
print("drag into QuPath:", result.to_geojson("out/strict.geojson", threshold=0.8))
