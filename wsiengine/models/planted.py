"""The planted marks: three flat colours that the bundled model ``planted`` finds exactly.

It is no diagnosis but a ruler: whoever draws marks of known place (the demo, the tests) can compare what comes out of a
whole run with what went in. The colours lie among those of stained tissue, so that no tissue mask takes them for ink,
yet far from haematoxylin, eosin and DAB. A pixel belongs to the mark within ``RADIUS`` of its colour (Euclidean, in
RGB levels); the colours are more than twice that apart, so it never belongs to two.
"""

from types import MappingProxyType

MARKS = MappingProxyType({"Mark A": (210, 20, 150), "Mark B": (192, 108, 34), "Mark C": (130, 30, 210)})
RADIUS = 48  # JPEG shifts flat saturated colours by a few levels; at a mark's rim the half-way pixels stay out
OTHERWISE = "No mark"
MINIMUM = 0.5  # of a tile: what is mostly mark counts as mark, so that outlines are not biased in or out
TILE_PX, CELL_PX, UM_PER_PX = 64, 16, 1.0
GAIN = 16.0  # logit of a fully covered tile; a power of two, so that float32 logits are exact
