"""Both kinds of detector: a few pictures are learnt and found again, and the ONNX file says what torch says."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
import torch

from tests.data import data_dir
from tests.training.drawn import picture
from wsiengine.datasets.images import read_pixels
from wsiengine.evaluate_detection import average_precision, match
from wsiengine.training.backbones import build
from wsiengine.training.centre import CentreDetector, CentreNet, giou
from wsiengine.training.centre_training import centre_lesson
from wsiengine.training.detection_data import Augment, Sample
from wsiengine.training.detection_loop import Lesson, Schedule, fit
from wsiengine.training.detection_recipe import export_detector
from wsiengine.training.rcnn import Limits, RcnnDetector, RcnnNet
from wsiengine.training.rcnn_parts import anchors, clip, decode, encode, iou, pool_regions, suppress
from wsiengine.training.rcnn_training import rcnn_lesson

SIDE = 160
_AUGMENT = Augment(SIDE, scales=(0.95, 1.05), turn="none", colour=0, centre_on_objects=0)


def small(network: str, *, width: float = 0.25) -> torch.nn.Module:
    torch.manual_seed(0)
    backbone = build("resnet18", width)
    backbone.statistics = True
    if network == "centre":
        return CentreNet(backbone, 2, width=32)
    return RcnnNet(backbone, 2, masks=network == "mask_rcnn", width=32, sizes=(6.0,))


def detector_of(network: torch.nn.Module) -> torch.nn.Module:
    return (CentreDetector(network) if isinstance(network, CentreNet) else RcnnDetector(network)).eval()  # type: ignore[arg-type]


def lesson_of(network: torch.nn.Module, samples: list[Sample]) -> Lesson:
    if isinstance(network, CentreNet):
        return centre_lesson(network, samples, _AUGMENT, 2)
    assert isinstance(network, RcnnNet)
    return rcnn_lesson(network, samples, _AUGMENT, 2)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], torch.nn.Module]:
    """Trained once for each kind."""
    made: dict[str, torch.nn.Module] = {}

    def of(kind: str) -> torch.nn.Module:
        if kind not in made:
            out = tmp_path_factory.mktemp(kind)
            samples = [picture((150, 190), 5, seed) for seed in range(3)]
            schedule = Schedule(80, rate=2e-3, head_rate=2e-3, ema=0.9, threads=1)
            made[kind] = fit(lesson_of(small(kind), samples), schedule, out)
        return made[kind]

    return of


def assert_the_same(found: list[np.ndarray], expected: list[np.ndarray]) -> None:
    """Boxes to 0.002 px, scores and masks to 0.002; rows of score 0 are no objects and lie in any order."""
    assert [f.shape for f in found] == [e.shape for e in expected]
    counts = [int((part[1] > 0).sum()) for part in (found, expected)]
    assert counts[0] == counts[1]
    for one, other in zip(found, expected, strict=True):
        np.testing.assert_allclose(one[: counts[0]], other[: counts[0]], atol=2e-3)


def answers(detector: torch.nn.Module, pixels: np.ndarray) -> list[np.ndarray]:
    with torch.inference_mode():
        return [part.numpy() for part in detector(torch.from_numpy(pixels[None]))]


@pytest.mark.parametrize("kind", ["centre", "mask_rcnn"])
def test_what_was_learnt_is_found_again(kind: str, trained: Callable[[str], torch.nn.Module]) -> None:
    detector = detector_of(trained(kind))
    matches = []
    for seed in range(3):
        sample = picture((150, 190), 5, seed)
        boxes, scores, labels, *masks = answers(detector, sample.pixels)
        for k in range(2):
            true = sample.objects.boxes_xyxy[sample.objects.labels == k]
            matches.append(match(boxes[labels == k], scores[labels == k], true, np.zeros(len(true), bool)))
        if masks and len(boxes):
            inside, corner = masks[0][0][14, 14], masks[0][0][0, 0]
            assert inside > 0.5 > corner  # an ellipse fills its box's middle, not its corner
    assert average_precision(matches) > 0.8


@pytest.mark.parametrize("kind", ["centre", "faster_rcnn", "mask_rcnn"])
def test_the_onnx_file_says_what_torch_says(
    kind: str, tmp_path: Path, trained: Callable[[str], torch.nn.Module]
) -> None:
    network = trained(kind) if kind != "faster_rcnn" else small(kind)
    detector = detector_of(network)
    if isinstance(detector, RcnnDetector):
        detector.limits = Limits(before=200, proposals=60, minimum=0.02)
    names = export_detector(detector, tmp_path / "d.onnx", SIDE, half=False)
    session = onnxruntime.InferenceSession(tmp_path / "d.onnx")
    pictures = [picture((150, 190), 5, 0).pixels, picture((201, 97), 3, 8).pixels, np.full((64, 96, 3), 230, np.uint8)]
    for pixels in pictures:
        expected = answers(detector, pixels)
        found = session.run(list(names), {"tiles": pixels[None]})
        assert_the_same(found, expected)


@pytest.mark.parametrize("kind", ["centre", "mask_rcnn"])
def test_half_the_bytes_move_boxes_by_less_than_a_pixel(
    kind: str, tmp_path: Path, trained: Callable[[str], torch.nn.Module]
) -> None:
    detector = detector_of(trained(kind))
    names = export_detector(detector, tmp_path / "half.onnx", SIDE)
    export_detector(detector, tmp_path / "whole.onnx", SIDE, half=False)
    assert (tmp_path / "half.onnx").stat().st_size < 0.65 * (tmp_path / "whole.onnx").stat().st_size
    pixels = picture((150, 190), 5, 0).pixels
    both = [
        onnxruntime.InferenceSession(tmp_path / f"{name}.onnx").run(list(names), {"tiles": pixels[None]})
        for name in ("half", "whole")
    ]
    sure = int((both[1][1] > 0.5).sum())
    np.testing.assert_allclose(both[0][0][:sure], both[1][0][:sure], atol=0.5)
    np.testing.assert_allclose(both[0][1][:sure], both[1][1][:sure], atol=0.02)


def test_real_images_through_onnx(tmp_path: Path, trained: Callable[[str], torch.nn.Module]) -> None:
    pixels = read_pixels(data_dir() / "rbc" / "chula" / "images" / "10.jpg")[:256, :320]
    for kind in ("centre", "mask_rcnn"):
        detector = detector_of(trained(kind))
        names = export_detector(detector, tmp_path / "d.onnx", SIDE, half=False)
        found = onnxruntime.InferenceSession(tmp_path / "d.onnx").run(list(names), {"tiles": pixels[None]})
        assert_the_same(found, answers(detector, pixels))


@pytest.mark.parametrize("kind", ["centre", "mask_rcnn"])
def test_a_picture_of_2048_pixels(kind: str, tmp_path: Path, trained: Callable[[str], torch.nn.Module]) -> None:
    """At its own size, and through the file that the engine runs; most of what is drawn is found."""
    detector = detector_of(trained(kind))
    sample = picture((2048, 2048), 60, 4)
    expected = answers(detector, sample.pixels)
    matched = match(expected[0], expected[1], sample.objects.boxes_xyxy, sample.objects.ignored)
    assert matched.hits.sum() > 30
    names = export_detector(detector, tmp_path / "d.onnx", SIDE, half=False)
    found = onnxruntime.InferenceSession(tmp_path / "d.onnx").run(list(names), {"tiles": sample.pixels[None]})
    sure = int((expected[1] > 0.3).sum())  # the many faint ones of an even ground score alike, in any order
    assert sure > 30
    assert_the_same([part[:sure] for part in found], [part[:sure] for part in expected])


def test_a_training_goes_on_where_it_stopped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("wsiengine.training.detection_loop.CHECKPOINT_EVERY", 2)
    samples = [picture((150, 190), 4, 0)]
    schedule = Schedule(4, threads=1)

    def weights(out: Path) -> torch.Tensor:
        lesson = lesson_of(small("centre", width=0.125), samples)
        return torch.cat([p.flatten() for p in fit(lesson, schedule, out).parameters()])

    whole = weights(tmp_path / "whole")

    class Cut(Exception):
        pass

    def stop(progress: object) -> None:
        if getattr(progress, "iteration", 0) == 3:
            raise Cut

    lesson = lesson_of(small("centre", width=0.125), samples)
    with pytest.raises(Cut):
        fit(lesson, schedule, tmp_path / "cut", stop)
    torch.testing.assert_close(weights(tmp_path / "cut"), whole, rtol=0, atol=0)


# The parts, each against arithmetic by hand.


def test_deltas_there_and_back() -> None:
    random = torch.Generator().manual_seed(0)
    corner = torch.rand(20, 2, generator=random) * 50
    boxes = torch.cat([corner, corner + 5 + torch.rand(20, 2, generator=random) * 40], dim=1)
    wanted = boxes[torch.randperm(20, generator=random)]
    torch.testing.assert_close(decode(boxes, encode(boxes, wanted)), wanted, rtol=1e-4, atol=1e-3)


def test_anchors_lie_on_their_cells() -> None:
    found = anchors((2, 3), 8, (2.0,)).reshape(2, 3, 3, 4)
    torch.testing.assert_close(found[1, 2, 1], torch.tensor([20 - 8.0, 12 - 8.0, 20 + 8.0, 12 + 8.0]))
    wide = found[0, 0, 0]  # ratio 0.5: half as high as wide, of the same area
    assert ((wide[2] - wide[0]) / (wide[3] - wide[1])).item() == pytest.approx(2)
    assert ((wide[2] - wide[0]) * (wide[3] - wide[1])).item() == pytest.approx(256, rel=1e-5)


def test_overlaps_and_clipping() -> None:
    first = torch.tensor([[0.0, 0, 10, 10], [0, 0, 10, 10]])
    second = torch.tensor([[5.0, 0, 15, 10], [20, 0, 30, 10]])
    assert iou(first[:1], second)[0].tolist() == pytest.approx([1 / 3, 0])
    assert giou(first, second).tolist() == pytest.approx([1 / 3, -1 / 3])  # the hull of the second pair is 30 × 10
    assert clip(torch.tensor([[-5.0, -5, 90, 90], [95, 95, 99, 99]]), 50, 60).tolist() == [
        [0, 0, 60, 50],
        [60, 50, 60, 50],
    ]


def test_suppression_is_greedy_and_by_class() -> None:
    boxes = torch.tensor([[0.0, 0, 10, 10], [1, 0, 11, 10], [30, 0, 40, 10], [2, 0, 12, 10]])
    scores = torch.tensor([[0.5, 0.9, 0.2, 0.8], [0.0, 0.0, 0.7, 0.01]])
    assert suppress(boxes, scores, 0.5, 0.05, 10).tolist() == [[0, 1], [0, 2], [1, 2]]
    assert suppress(boxes, scores, 0.5, 0.05, 1).tolist() == [[0, 1], [1, 2]]
    assert suppress(boxes, scores, 0.95, 0.05, 10).tolist() == [[0, 1], [0, 3], [0, 0], [0, 2], [1, 2]]


def test_pooled_regions_of_a_ramp_are_its_values() -> None:
    y, x = torch.meshgrid(torch.arange(20.0), torch.arange(30.0), indexing="ij")
    pooled = pool_regions(torch.stack([x, y])[None], torch.tensor([[40.0, 16.0, 120.0, 96.0]]), 5, 8)
    # The region is cells 5 to 15 across and 2 to 12 down: fifths of 2 cells, whose middle lies at 5.5 + 2k (centres).
    assert pooled[0, 0, 0].tolist() == pytest.approx([5.5, 7.5, 9.5, 11.5, 13.5])
    assert pooled[0, 1, :, 0].tolist() == pytest.approx([2.5, 4.5, 6.5, 8.5, 10.5])
