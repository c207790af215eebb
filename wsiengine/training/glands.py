"""The training of ``glands``, from labelled fields to weights::

    python -m wsiengine.training.glands --data DIR --out FOLDER

Fields are GlaS' own training half and EBHI's masks. A network gives two maps: gland, and the band along a gland's
border that keeps neighbours apart (after Chen et al. 2017, DCAN). Stops after ``--seconds``; the same command goes on.
"""

import argparse
import csv
import json
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import cv2
import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import avg_pool2d, binary_cross_entropy_with_logits

from wsiengine.errors import OutputConflict
from wsiengine.models.integrity import file_sha256
from wsiengine.training import checkpoint
from wsiengine.training.augment import Stain, View, degrade, measure_stain, random_view, restain, stain_change
from wsiengine.training.backbone import halved
from wsiengine.training.backbones import load_weights
from wsiengine.training.data import Field, read_fields, read_image, read_mask, resample
from wsiengine.training.mobilenet import MobileNetV2
from wsiengine.training.unet import STRIDE_PX, UNet

CHANNELS = ("Gland", "contour")
WEIGHTS = "weights/mobilenet_v2_1.0_224_int8_ptq.tflite"
_BAND_UM = 3.0  # the contour's band reaches as far to either side of a gland's border
_CHECKPOINT_EVERY = 100
_ZOOM = (0.7, 1.4)
_WHITE_SHARE = 0.3
"""Part of the tiles that end in white, as a slide does, where the field ends; the others go on mirrored."""


@dataclass(frozen=True)
class Recipe:
    """All that decides the weights, but for data and library versions.

    ``glas_share``: how often a tile is GlaS'. ``folds``: those of EBHI. ``start_sha256``: of the ``model.pt`` of an
    earlier training that this one goes on from; empty: ImageNet's weights.
    """

    mpp: float = 1.2
    side_px: int = 224
    batch: int = 8
    iterations: int = 2000
    rate: float = 4e-4
    head_rate: float = 2e-3
    weight_decay: float = 0.02
    frozen_steps: int = 4
    ema: float = 0.995
    glas_share: float = 0.65
    folds: tuple[int, ...] = (0, 1, 2, 3, 4)
    seed: int = 0
    start_sha256: str = ""

    def rate_at(self, iteration: int) -> float:
        """Factor on the learning rates: linear warm-up over 4 %, then a cosine down to 0."""
        done = iteration / self.iterations
        return done / 0.04 if done < 0.04 else 0.5 * (1 + float(np.cos(np.pi * (done - 0.04) / 0.96)))


@dataclass(frozen=True)
class Drawn:
    """A field at the working resolution: image uint8 (rows, cols, 3); gland and contour uint8 (rows, cols, 2)."""

    image: np.ndarray
    truth: np.ndarray
    stain: Stain


def training_fields(data: Path, recipe: Recipe) -> tuple[list[Field], list[Field]]:
    """GlaS' training half, and EBHI's fields that have a mask."""
    with (data / "crc/glas/labels.csv").open(newline="", encoding="utf-8") as lines:
        train = {row["file"] for row in csv.DictReader(lines) if row["split"] == "train"}
    glas = [f for f in read_fields(data, ["glas"]) if f.image.relative_to(data / "crc/glas").as_posix() in train]
    ebhi = [f for f in read_fields(data, ["ebhi"]) if f.mask is not None and f.fold in recipe.folds]
    return glas, ebhi


def draw(field: Field, mpp: float) -> Drawn:
    """Read a field; its contour is drawn at the field's own resolution, where narrow gaps are still open."""
    image = read_image(field.image)
    assert field.mask is not None
    gland = read_mask(field.mask, image.shape)
    reach = [max(1, round(_BAND_UM / um)) for um in field.mpp_yx]
    kernel = cv2.getStructuringElement(cv2.MORPH_ELLIPSE, (2 * reach[1] + 1, 2 * reach[0] + 1))
    contour = cv2.dilate(gland, kernel) - cv2.erode(gland, kernel)
    truth = np.stack([resample(m, field.mpp_yx, mpp) for m in (gland, contour)], axis=-1)
    image = resample(image, field.mpp_yx, mpp)
    return Drawn(image, truth, measure_stain(image))


class Sampler:
    """Batches, each from its own random stream, so that a resumed training sees what an uninterrupted one would."""

    def __init__(self, glas: list[Drawn], ebhi: list[Drawn], recipe: Recipe) -> None:
        self._sets, self._recipe = (glas, ebhi), recipe
        self._stains = [d.stain for d in (*glas, *ebhi)]

    def batch(self, iteration: int) -> tuple[np.ndarray, np.ndarray]:
        """Tiles uint8 (N, side, side, 3) and truth uint8 (N, side, side, 2)."""
        rng = np.random.default_rng((self._recipe.seed, iteration))
        pairs = [self._tile(rng) for _ in range(self._recipe.batch)]
        return np.stack([tile for tile, _ in pairs]), np.stack([truth for _, truth in pairs])

    def _tile(self, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
        fields = self._sets[not (rng.random() < self._recipe.glas_share or not self._sets[1])]
        drawn = fields[int(rng.integers(len(fields)))]
        side = self._recipe.side_px
        view, white = random_view(rng, drawn.image.shape, side, _ZOOM), rng.random() < _WHITE_SHARE
        if white:  # centred anywhere, so that up to three quarters lie beyond the field
            rows, cols = drawn.image.shape[:2]
            view = replace(view, centre_y=rng.uniform(0, rows), centre_x=rng.uniform(0, cols))
        tile, truth = _cut(drawn, view, side, white=white)
        return degrade(rng, self._restained(rng, tile, drawn.stain)), truth

    def _restained(self, rng: np.random.Generator, tile: np.ndarray, have: Stain) -> np.ndarray:
        """The tile in another stain, most of the time: half of them part of the way to another field's."""
        if rng.random() < 0.1:
            return tile
        want = self._stains[int(rng.integers(len(self._stains)))] if rng.random() < 0.5 else None
        return restain(tile, *stain_change(rng, have, want))


def _cut(drawn: Drawn, view: View, side: int, *, white: bool) -> tuple[np.ndarray, np.ndarray]:
    border = cv2.BORDER_CONSTANT if white else cv2.BORDER_REFLECT_101
    matrix, size = view.matrix(side), (side, side)
    tile = cv2.warpAffine(drawn.image, matrix, size, borderMode=border, borderValue=(244, 243, 245))
    return tile, cv2.warpAffine(drawn.truth, matrix, size, borderMode=border, borderValue=0)


def loss_of(logits: Tensor, truth: Tensor) -> Tensor:
    """Cross-entropy of both maps, heavier along borders, and what is missing to a Dice overlap of 1 of the glands.

    Args:
        logits: (N, 2, h, w): gland, contour.
        truth: The same shape, 0 to 1.
    """
    gland, contour = truth[:, 0], truth[:, 1]
    by_gland = (binary_cross_entropy_with_logits(logits[:, 0], gland, reduction="none") * (1 + 2 * contour)).mean()
    by_contour = binary_cross_entropy_with_logits(logits[:, 1], contour, pos_weight=torch.tensor(2.0))
    p = logits[:, 0].sigmoid()
    dice = (2 * (p * gland).sum() + 1) / (p.sum() + gland.sum() + 1)
    return by_gland + by_contour + (1 - dice)


class Trainer:
    """Network, running average, optimiser, and their checkpoint."""

    def __init__(self, recipe: Recipe, weights: Path, out: Path) -> None:
        """``weights``: the start's, where the recipe has one, else ImageNet's."""
        torch.manual_seed(recipe.seed)
        self.recipe, self.out, self.iteration = recipe, out, 0
        self.network, self.average = UNet(len(CHANNELS)), UNet(len(CHANNELS))
        if recipe.start_sha256:
            self.network.load_state_dict(torch.load(weights, weights_only=True))
        else:
            imagenet = MobileNetV2()
            load_weights(imagenet, weights)
            self.network.take(imagenet)
        self.average.load_state_dict(self.network.state_dict())
        self.network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # torch's own stub lacks it
        body = [p for step in self.network.encoder[recipe.frozen_steps :] for p in step.parameters()]
        heads = [*self.network.joins.parameters(), *self.network.head.parameters()]
        groups = [{"params": body, "lr": recipe.rate}, {"params": heads, "lr": recipe.head_rate}]
        self.optimiser = torch.optim.AdamW(groups, weight_decay=recipe.weight_decay)
        self._rates = (recipe.rate, recipe.head_rate)
        self._losses: list[float] = []

    def step(self, tiles: np.ndarray, truth: np.ndarray) -> None:
        """One batch."""
        for group, rate in zip(self.optimiser.param_groups, self._rates, strict=True):
            group["lr"] = rate * self.recipe.rate_at(self.iteration)
        pixels = torch.from_numpy(tiles).permute(0, 3, 1, 2)
        wanted = avg_pool2d(torch.from_numpy(truth).permute(0, 3, 1, 2).float() / 255, STRIDE_PX)
        with halved():
            logits = self.network(pixels, self.recipe.frozen_steps)
        loss = loss_of(logits.float(), wanted)
        self.optimiser.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        nn.utils.clip_grad_norm_(self.network.parameters(), 5.0)
        self.optimiser.step()
        keep = min(self.recipe.ema, (self.iteration + 1) / (self.iteration + 10))
        with torch.no_grad():
            for mean, now in zip(self.average.parameters(), self.network.parameters(), strict=True):
                mean.lerp_(now, 1 - keep)
        self.iteration += 1
        self._losses.append(loss.item())
        if self.iteration % 50 == 0:
            print(json.dumps({"iteration": self.iteration, "loss": round(float(np.mean(self._losses)), 4)}), flush=True)
            self._losses.clear()

    @property
    def _kept(self) -> checkpoint.Parts:
        return {"network": self.network, "average": self.average, "optimiser": self.optimiser}

    def save(self) -> None:
        checkpoint.write(self.out, self._kept, iteration=self.iteration)

    def resume(self) -> None:
        """Go on from the checkpoint, if there is one."""
        self.iteration = checkpoint.read(self.out, self._kept).get("iteration", self.iteration)


def train(
    data: Path, out: Path, recipe: Recipe, *, start: Path | None = None, seconds: float = float("inf"), threads: int = 1
) -> bool:
    """Train, or go on training, for about ``seconds``; ``out/model.pt`` is the averaged network → whether it is done.

    ``start`` is the file that the recipe's ``start_sha256`` is of.

    Raises:
        OutputConflict: ``out`` holds the training of another recipe.
        WsiError: The data cannot be read.
    """
    started = time.monotonic()
    _claim(out, recipe)
    torch.set_num_threads(threads)
    cv2.setNumThreads(1)
    glas, ebhi = ([draw(f, recipe.mpp) for f in fields] for fields in training_fields(data, recipe))
    sampler, trainer = Sampler(glas, ebhi, recipe), Trainer(recipe, start or data / WEIGHTS, out)
    trainer.resume()
    for tiles, truth in _ahead(sampler, trainer.iteration, recipe.iterations):
        trainer.step(tiles, truth)
        late = time.monotonic() - started > seconds
        if late or trainer.iteration % _CHECKPOINT_EVERY == 0:
            trainer.save()
        if late:
            break
    trainer.save()
    torch.save(trainer.average.state_dict(), out / "model.pt")
    return trainer.iteration >= recipe.iterations


def _ahead(sampler: Sampler, start: int, stop: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Batches in order, the next one drawn meanwhile."""
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(sampler.batch, start) if start < stop else None
        for iteration in range(start, stop):
            assert waiting is not None
            batch = waiting.result()
            waiting = pool.submit(sampler.batch, iteration + 1)
            yield batch


def _claim(out: Path, recipe: Recipe) -> None:
    out.mkdir(parents=True, exist_ok=True)
    said, file = json.dumps(asdict(recipe), indent=1), out / "recipe.json"
    if file.exists() and file.read_text(encoding="utf-8") != said:
        raise OutputConflict(f"{out} holds the training of another recipe", hint="choose another --out, or delete it")
    file.write_text(said, encoding="utf-8")


def load_trained(out: Path) -> UNet:
    """The network that :func:`train` left in ``out``."""
    network = UNet(len(CHANNELS))
    network.load_state_dict(torch.load(out / "model.pt", weights_only=True))
    return network.eval()


def main(arguments: list[str] | None = None) -> None:
    """Train from the command line."""
    parser = argparse.ArgumentParser(prog="python -m wsiengine.training.glands", description="Train a gland model.")
    parser.add_argument("--data", type=Path, required=True, help="folder that holds crc/ and weights/")
    parser.add_argument("--out", type=Path, required=True, help="folder of checkpoints and model.pt")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="stop after as long; call again to go on")
    parser.add_argument("--threads", type=int, default=1)
    for name in ("iterations", "side_px", "seed", "batch"):
        parser.add_argument(f"--{name.replace('_', '-')}", type=int, default=getattr(Recipe, name))
    parser.add_argument("--start", type=Path, help="model.pt of an earlier training to go on from")
    for name in ("mpp", "glas_share", "rate", "head_rate"):
        parser.add_argument(f"--{name.replace('_', '-')}", type=float, default=getattr(Recipe, name))
    args = parser.parse_args(arguments)
    names = ("mpp", "side_px", "batch", "iterations", "rate", "head_rate", "glas_share", "seed")
    digest = file_sha256(args.start) if args.start else ""
    recipe = Recipe(**{name: getattr(args, name) for name in names}, start_sha256=digest)
    done = train(args.data, args.out, recipe, start=args.start, seconds=args.seconds, threads=args.threads)
    print("done" if done else "stopped; the same command goes on")


if __name__ == "__main__":
    main()
