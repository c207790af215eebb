"""The other files of a slide that consists of several."""

from pathlib import Path

from wsiengine.slides.dicom import files_of_series

_INDEXES = (".vms", ".vmu")  # Hamamatsu: a text file that names the images
_MOST_INDEX_BYTES = 1 << 20


def files_of(path: Path) -> list[Path]:
    """All files that hold the slide's pixels and tables, the named one among them, in a fixed order.

    MIRAX keeps them in a folder of the slide's name, Hamamatsu's VMS lists them, a DICOM slide is a series; anything
    else is one file.
    """
    suffix = path.suffix.lower()
    if suffix == ".mrxs":
        folder = path.with_suffix("")
        return [path, *sorted(p for p in folder.iterdir() if p.is_file())] if folder.is_dir() else [path]
    if suffix in _INDEXES and path.stat().st_size <= _MOST_INDEX_BYTES:
        lines = path.read_bytes().decode("latin-1").splitlines()
        named = {path.parent / line.split("=", 1)[1].strip() for line in lines if "=" in line}
        return [path, *sorted(p for p in named if p.is_file() and p != path)]
    return files_of_series(path) or [path]
