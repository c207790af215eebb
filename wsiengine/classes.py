"""The fixed colours of classes, so that the same finding looks the same in every picture, map and GeoJSON."""

from hashlib import sha256

Colour = tuple[int, int, int]  # red, green, blue, 0–255

COLOURS: dict[str, Colour] = {
    "Normal": (0, 158, 115),
    "Adenoma": (240, 228, 66),
    "Adenocarcinoma": (213, 94, 0),
    "Adenocarcinoma well": (230, 159, 0),
    "Adenocarcinoma moderate": (204, 121, 167),
    "Adenocarcinoma poor": (153, 0, 51),
    "No epithelium": (170, 170, 170),
    "Uncertain": (86, 180, 233),
}


def colour_of(name: str, default: Colour | None = None) -> Colour:
    """The fixed colour of ``name``; else ``default``; else one derived from the name, the same on every machine."""
    if name in COLOURS:
        return COLOURS[name]
    if default is not None:
        return default
    red, green, blue = sha256(name.encode()).digest()[:3]
    return 40 + red * 3 // 4, 40 + green * 3 // 4, 40 + blue * 3 // 4  # neither black nor white
