"""Batches of random tiles: class first, then source, then case, then field, so that no large case drowns the others.

Each batch is drawn from its own random stream (seed, iteration): a resumed training sees the batches that an
uninterrupted one would have seen.
"""

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import cv2
import numpy as np

from wsiengine.training.augment import cut, degrade, measure_stain, random_view, restain, spoil, stain_change
from wsiengine.training.data import Pixels

NEGATIVE_SHARE = 0.12
"""Part of a batch that is cut where there is least epithelium: it trains the gate alone."""
SPOILT_SHARE = 0.06
"""Part of a batch that cannot be diagnosed any more: it teaches that no class is likelier than another."""
UNREADABLE = -2
_OTHER_SHARE = 0.3
_TRIES = 6
_ENOUGH_EPITHELIUM = 0.15
_NOT_A_CLASS = -1
_ZOOM = (0.72, 1.4)
_OWN_COLOUR = 0.1
"""Part of the tiles that keeps the colours of its laboratory."""


@dataclass(frozen=True)
class Batch:
    """Tiles for one step.

    Attributes:
        tiles: uint8 (N, rows, cols, 3).
        labels: int64 (N,): class index; −1 where the tile has no class to learn, −2 where it is unreadable.
        epithelium: float32 (N, rows / 32, cols / 32): covered fraction of each cell; NaN where nobody drew a mask.
    """

    tiles: np.ndarray
    labels: np.ndarray
    epithelium: np.ndarray


@dataclass(frozen=True)
class Drawn:
    """One random tile: as a row of :class:`Batch`, with the index of its field and of the field whose stain it took."""

    tile: np.ndarray
    label: int
    epithelium: np.ndarray
    index: int
    like: int | None


class Sampler:
    """Draws batches from fields in memory.

    Args:
        pixels: The training fields.
        classes: Names, in the order of their labels.
        joins: Labels that are no class of their own, and the class whose tiles they add to.
        shares: For a class, how often it is drawn from each set or joined label.
        cell_px: Side of a cell.
        seed: Start of every random stream.
    """

    def __init__(
        self,
        pixels: Iterable[Pixels],
        classes: Sequence[str],
        joins: Mapping[str, str],
        shares: Mapping[str, Mapping[str, float]],
        *,
        cell_px: int,
        seed: int,
    ) -> None:
        self._classes, self._shares = tuple(classes), shares
        self._pixels = list(pixels)
        self._stains = [measure_stain(p.image) for p in self._pixels]
        self._cell_px = cell_px
        self._seed = seed
        self._tree: dict[str, dict[str, dict[str, list[int]]]] = defaultdict(
            lambda: defaultdict(lambda: defaultdict(list))
        )
        for i, p in enumerate(self._pixels):
            label = p.field.label
            branch = self._tree[joins.get(label, label)]
            branch[label if label in joins else p.field.source][p.field.case].append(i)
        sources = [p.field.source for p in self._pixels]
        self._of_source = [[i for i, s in enumerate(sources) if s == name] for name in sorted(set(sources))]
        bare = [0 if p.mask is None else int((p.mask == 0).sum()) for p in self._pixels]
        self._bare = np.cumsum(np.array(bare))

    def batch(self, iteration: int, size: int, side_px: int) -> Batch:
        """The batch of an iteration: always the same one."""
        rng = np.random.default_rng((self._seed, iteration))
        rows = [self.draw(rng, side_px) for _ in range(size)]
        labels = np.array([row.label for row in rows])
        return Batch(np.stack([row.tile for row in rows]), labels, np.stack([row.epithelium for row in rows]))

    def draw(self, rng: np.random.Generator, side_px: int) -> Drawn:
        """One random tile, of a random class or (rarely) where there is least epithelium."""
        negative = rng.random() < NEGATIVE_SHARE and self._bare[-1] > 0
        if negative:  # a field comes up as often as it has pixels without epithelium
            index, label = int(np.searchsorted(self._bare, rng.random() * self._bare[-1], "right")), _NOT_A_CLASS
        else:
            label = int(rng.integers(len(self._classes)))
            index = self._draw(rng, self._classes[label])
        pixels = self._pixels[index]
        tile, mask = self._cut(rng, pixels, side_px, negative=negative)
        like = self._stain_like(rng)
        if rng.random() >= _OWN_COLOUR:
            want = None if like is None else self._stains[like]
            tile = restain(tile, *stain_change(rng, self._stains[index], want))
        tile = degrade(rng, tile)
        if not negative and rng.random() < SPOILT_SHARE:
            tile, label, mask = spoil(rng, tile), UNREADABLE, None
        cells = side_px // self._cell_px
        if mask is None:
            return Drawn(tile, label, np.full((cells, cells), np.nan, np.float32), index, like)
        covered = cv2.resize(mask, (cells, cells), interpolation=cv2.INTER_AREA).astype(np.float32) / 255
        return Drawn(tile, label if covered.mean() >= _ENOUGH_EPITHELIUM else _NOT_A_CLASS, covered, index, like)

    def _stain_like(self, rng: np.random.Generator) -> int | None:
        """Half of the time a field whose stain is moved towards: a set first, then a field of it."""
        if rng.random() < 0.5:
            return None
        fields = self._of_source[int(rng.integers(len(self._of_source)))]
        return fields[int(rng.integers(len(fields)))]

    def _draw(self, rng: np.random.Generator, label: str) -> int:
        branch = self._tree[label]
        sources = sorted(branch)
        share = np.array([self._shares.get(label, {}).get(s, _OTHER_SHARE) for s in sources])
        cases = branch[sources[rng.choice(len(sources), p=share / share.sum())]]
        of_case = cases[sorted(cases)[rng.integers(len(cases))]]
        return of_case[rng.integers(len(of_case))]

    def _cut(
        self, rng: np.random.Generator, pixels: Pixels, side_px: int, *, negative: bool
    ) -> tuple[np.ndarray, np.ndarray | None]:
        """A tile with epithelium, or with as little as a few tries find."""
        best: tuple[np.ndarray, np.ndarray | None] | None = None
        least = 256.0
        for _ in range(_TRIES):
            tile, mask = cut(pixels, random_view(rng, pixels.image.shape, side_px, _ZOOM), side_px)
            if mask is None:
                return tile, None
            covered = float(mask.mean())
            if not negative and covered >= 255 * _ENOUGH_EPITHELIUM:
                return tile, mask
            if covered < least:
                best, least = (tile, mask), covered
        assert best is not None
        return best
