"""Where results go when nobody says."""

from pathlib import Path


def default_folder(slide: str) -> Path:
    """``<slide name>.wsiengine`` in the working directory."""
    return Path(f"{Path(slide).stem or 'slide'}.wsiengine")
