"""The picture of the README: the demo's overlay, made small.

``wsiengine demo && python docs/images/draw.py wsiengine-demo``
"""

import sys
from pathlib import Path

from PIL import Image

WIDTH_PX, COLOURS = 960, 256


def main(demo: Path) -> None:
    """Shrink the overlay of the planted marks and write ``demo.png`` beside this file."""
    overlay = Image.open(demo / "planted" / "overlay.png").convert("RGB")
    height_px = round(overlay.height * WIDTH_PX / overlay.width)
    small = overlay.resize((WIDTH_PX, height_px), Image.Resampling.LANCZOS)
    small.quantize(COLOURS, kmeans=1, dither=Image.Dither.NONE).save(
        Path(__file__).with_name("demo.png"), optimize=True
    )


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else "wsiengine-demo"))
