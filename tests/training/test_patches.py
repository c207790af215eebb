"""The second stage: several types at once, unknown ones left alone, and boosting that ONNX computes alike."""

from pathlib import Path

import cv2
import numpy as np
import onnxruntime
import pytest
import torch
from sklearn.ensemble import GradientBoostingClassifier

from wsiengine.datasets.rows import NO, UNKNOWN, YES, Annotated, Objects
from wsiengine.training.backbones import build
from wsiengine.training.boosting import export_boosting
from wsiengine.training.detection_data import Augment, Sample, about, draw, warped
from wsiengine.training.detection_export import export_network, through_half
from wsiengine.training.detection_loop import Lesson, Schedule, fit
from wsiengine.training.patches import PatchNet, PatchSampler, abnormal, known_patches, patch_loss

SIDE = 64


def fields(count: int = 4) -> tuple[list[Sample], tuple[Annotated, ...]]:
    """Pictures with red discs (type 0), blue ones (type 1) and red-and-blue pairs (both); type 2 is never stated."""
    samples, rows = [], []
    for k in range(count):
        random = np.random.default_rng(k)
        pixels = np.full((140, 200, 3), 230, np.uint8)
        boxes, types = [], []
        for i in range(6):
            x, y = 34 + 66 * (i % 3), 36 + 68 * (i // 3)
            kinds = [(0,), (1,), (0, 1)][int(random.integers(3))]
            for shift, kind in zip((-9, 9) if len(kinds) == 2 else (0,), kinds, strict=True):
                cv2.circle(pixels, (x + shift, y), 12, ((200, 40, 60), (40, 60, 200))[kind], -1)
            boxes.append((x - 21, y - 12, x + 21, y + 12))
            types.append([YES if kind in kinds else NO for kind in (0, 1)] + [UNKNOWN])
        objects = Objects.of(boxes, [0] * 6, types=types)
        samples.append(Sample(pixels, objects))
        rows.append(Annotated(Path(f"{k}.png"), objects, str(k)))
    return samples, tuple(rows)


def test_types_are_learnt_and_the_unknown_teaches_nothing(tmp_path: Path) -> None:
    samples, rows = fields()
    known = known_patches(rows)
    torch.manual_seed(0)
    backbone = build("resnet18", 0.125)
    backbone.statistics = True
    network = PatchNet(backbone, 3, steps=4)
    sampler = PatchSampler(samples, known, Augment(SIDE, scales=(0.95, 1.05)), 12)
    before = network.head.bias[2].item()
    schedule = Schedule(60, rate=3e-3, head_rate=3e-3, weight_decay=0, ema=0.9, threads=1)
    trained = fit(Lesson(network, sampler, patch_loss, {}), schedule, tmp_path)
    crops = np.stack(
        [
            warped(samples[i].pixels, about(c, np.eye(2), SIDE), SIDE, 255)
            for i, c in zip(known.image, known.centre_xy, strict=True)
        ]
    )
    with torch.inference_mode():
        found = trained(torch.from_numpy(crops)).sigmoid().numpy()
    right = (found[:, :2] >= 0.5) == (known.types[:, :2] == YES)
    assert right.mean() > 0.9
    assert trained.head.bias[2].item() == before  # type: ignore[union-attr]
    file = tmp_path / "types.onnx"
    example = torch.zeros(1, SIDE, SIDE, 3, dtype=torch.uint8)
    free = {"crops": {0: "N"}, "logits": {0: "N"}}
    export_network(trained, example, file, outputs=("logits",), axes=free, name="crops", half=False)
    (logits,) = onnxruntime.InferenceSession(file).run(["logits"], {"crops": crops})
    np.testing.assert_allclose(1 / (1 + np.exp(-logits)), found, atol=1e-4)
    with torch.inference_mode():
        halved = through_half(trained)(torch.from_numpy(crops)).sigmoid().numpy()
    np.testing.assert_allclose(halved, found, atol=0.02)


def test_only_stated_patches_are_known() -> None:
    objects = Objects.of(
        np.zeros((3, 4)) + (0, 0, 8, 6), [0] * 3, types=[[YES, NO], [UNKNOWN, UNKNOWN], [YES, UNKNOWN]]
    )
    known = known_patches((Annotated(Path("a"), objects, "a"),))
    assert len(known) == 2
    assert known.centre_xy.tolist() == [[4, 3], [4, 3]]


def test_abnormal_is_any_type_but_the_normal_one() -> None:
    types = [[YES, NO, NO], [YES, YES, NO], [NO, UNKNOWN, YES], [YES, UNKNOWN, NO], [NO, NO, NO]]
    assert abnormal(np.array(types, np.int8), 0).tolist() == [NO, YES, YES, UNKNOWN, NO]


def at_thresholds(model: GradientBoostingClassifier) -> np.ndarray:
    """Rows whose every value is the float32 nearest to a threshold of its column, on either side of it."""
    rows = np.full((200, 5), 0.5, np.float32)
    for k in range(5):
        limits = np.concatenate([t.tree_.threshold[t.tree_.feature == k] for (t,) in model.estimators_])
        if len(limits):
            rows[:, k] = np.resize(limits.astype(np.float32), 200)
    return np.concatenate([rows, np.nextafter(rows, np.float32(0)), np.nextafter(rows, np.float32(1))])


@pytest.mark.parametrize("depth", [1, 3])
def test_boosting_is_the_same_in_onnx(depth: int, tmp_path: Path) -> None:
    random = np.random.default_rng(0)
    rows = random.random((400, 5)).astype(np.float32)
    label = (rows[:, 0] + rows[:, 1] * rows[:, 2] + random.normal(0, 0.1, 400) > 0.8).astype(int)
    model = GradientBoostingClassifier(n_estimators=30, max_depth=depth, random_state=0).fit(rows, label)
    export_boosting(model, tmp_path / "b.onnx")
    rows = np.concatenate([rows, at_thresholds(model)])
    scores, labels = onnxruntime.InferenceSession(tmp_path / "b.onnx").run(["scores", "label"], {"rows": rows})
    np.testing.assert_allclose(scores, model.predict_proba(rows), atol=1e-5)
    np.testing.assert_array_equal(labels, model.predict(rows))
    three = GradientBoostingClassifier(n_estimators=2).fit(rows, np.arange(len(rows)) % 3)
    with pytest.raises(ValueError, match="3 classes"):
        export_boosting(three, tmp_path / "c.onnx")


def test_a_crop_maps_outlines_as_it_maps_pixels() -> None:
    pixels = np.full((120, 150, 3), 255, np.uint8)
    cv2.rectangle(pixels, (40, 30), (79, 49), (0, 0, 0), -1)
    sample = Sample(pixels, Objects.of([(40, 30, 80, 50)], [0]))
    for seed in range(12):
        turn = ("any", "quarter", "none")[seed % 3]
        augment = Augment(128, turn=turn, lean_deg=10, colour=0, centre_on_objects=1)
        crop = draw(sample, augment, np.random.default_rng(seed))
        if not len(crop.objects) or crop.objects.ignored[0]:
            continue
        ys, xs = np.nonzero(crop.pixels[..., 0] < 128)
        x0, y0, x1, y1 = crop.objects.boxes_xyxy[0]
        np.testing.assert_allclose((xs.min(), ys.min(), xs.max() + 1, ys.max() + 1), (x0, y0, x1, y1), atol=1.6)


def test_what_a_crop_cuts_too_much_of_is_ignored() -> None:
    from wsiengine.training.detection_data import mapped

    objects = Objects.of([(0, 0, 10, 10), (0, 20, 10, 30), (50, 50, 60, 60)], [0, 0, 0])
    shift = np.array([[1.0, 0, -8], [0, 1, 0]])
    found = mapped(objects, shift, (40, 40))
    assert found.boxes_xyxy.tolist() == [[0, 0, 2, 10], [0, 20, 2, 30]]
    assert found.ignored.tolist() == [True, True]
    assert mapped(objects, np.eye(2, 3), (40, 40)).ignored.tolist() == [False, False]
