"""Normalisation of slides: whole == blocks bit for bit, fitted without chance, honest where it cannot be fitted."""

import json
import pickle
from dataclasses import dataclass, field

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.fakes import ArraySlide
from tests.pictures import tissue_like
from wsiengine.errors import PlanError
from wsiengine.geometry import Box, Mpp
from wsiengine.normalise import Normaliser, fit_normaliser
from wsiengine.recipe import parse_recipe
from wsiengine.sampling import sample_slide
from wsiengine.stain_report import stain_report
from wsikernels._jit import JIT_OFF
from wsikernels.stain import HAEMATOXYLIN_EOSIN, unit_rows

ONE_UM = Mpp.square(1.0)
RECIPES = [
    "macenko", "vahadane", "standard", "reinhard", "macenko+clahe:region_um=9", "reinhard+clahe:region_um=12,clip=4",
    "clahe:region_um=10", "clahe:region_um=8,channel=haematoxylin", "grey+whiten", "whiten:mode=pca", "demean",
    "background:sigma_um=2", "grey+whiten+background:sigma_um=1.5+clahe:region_um=8",
]  # fmt: skip


@dataclass(frozen=True)
class Mask:
    mask: np.ndarray
    mpp: Mpp = field(default_factory=lambda: Mpp.square(8.0))


def slide_and_mask(height=320, width=400, seed=0, edge=48):
    """A slide at 1 µm/px with tissue inside a margin of noisy glass, and its mask at 8 µm/px."""
    rng = np.random.default_rng(seed)
    pixels = rng.integers(238, 246, (height, width, 3), dtype=np.uint8)
    inside = (slice(edge, height - edge), slice(edge, width - edge))
    pixels[inside] = tissue_like(height, width, seed)[inside]
    mask = np.zeros((height // 8, width // 8), bool)
    mask[edge // 8 : -edge // 8, edge // 8 : -edge // 8] = True
    return ArraySlide(pixels, 1.0), Mask(mask)


def fitted(text, slide, mask, mpp=ONE_UM):
    return fit_normaliser(parse_recipe(text), slide, mask, mpp)


def applied(normaliser, slide, box, mpp=ONE_UM):
    return normaliser.apply(slide.read(box.grow(normaliser.halo_px), mpp), box)


SLIDE, MASK = slide_and_mask()
FITTED = {} if JIT_OFF else {text: fitted(text, SLIDE, MASK) for text in RECIPES}


@pytest.mark.skipif(JIT_OFF, reason="whole slides are slow to interpret; the kernels' own tests cover it")
@settings(max_examples=8)
@given(
    cut_y=st.integers(1, 79), cut_x=st.integers(1, 96), corner=st.tuples(st.integers(-20, 250), st.integers(-30, 310))
)
@pytest.mark.parametrize("text", RECIPES)
def test_whole_equals_blocks(text, cut_y, cut_x, corner):
    normaliser = FITTED[text]
    box = Box(0, 0, 80, 97).shift(*corner)  # partly outside the slide, too
    whole = applied(normaliser, SLIDE, box)
    pieces = np.zeros_like(whole)
    for part in (*Box(0, 0, cut_y, 97).pieces(cut_y, cut_x), *Box(cut_y, 0, 80, 97).pieces(80, cut_x)):
        pieces[part.slices] = applied(normaliser, SLIDE, part.shift(*corner))
    assert np.array_equal(whole, pieces)
    assert whole.shape == (80, 97, 3)


@pytest.mark.skipif(JIT_OFF, reason="whole slides are slow to interpret")
@pytest.mark.parametrize("text", RECIPES)
def test_changes_something_and_is_stored_whole(text):
    normaliser = FITTED[text]
    box = Box(100, 100, 160, 170)
    after = applied(normaliser, SLIDE, box)
    assert not np.array_equal(after, SLIDE.read(box, ONE_UM))
    again = Normaliser.from_json(normaliser.to_json())
    assert again == normaliser
    assert again.to_json() == normaliser.to_json()
    assert np.array_equal(applied(again, SLIDE, box), after)
    assert np.array_equal(applied(pickle.loads(pickle.dumps(normaliser)), SLIDE, box), after)
    json.loads(normaliser.to_json(), parse_constant=pytest.fail)  # no NaN


def test_nothing_to_do_gives_the_pixels_back():
    normaliser = fitted("none", SLIDE, MASK)
    pixels = SLIDE.read(Box(0, 0, 9, 7), ONE_UM)
    assert normaliser.apply(pixels, Box(0, 0, 9, 7)) is pixels
    assert normaliser.halo_px == 0
    assert Normaliser.from_json(normaliser.to_json()) == normaliser == Normaliser()


def test_stain_comes_before_clahe_and_glass_is_left():
    normaliser = fitted("macenko+clahe:region_um=20,clip=4", SLIDE, MASK)
    assert [step.kind for step in normaliser.steps] == ["density", "clahe"]
    stained_first = normaliser.steps[0]
    box = Box(0, 0, 16, 400)  # bare glass, noisy
    glass = SLIDE.read(box, ONE_UM)
    moved = np.abs(applied(normaliser, SLIDE, box).astype(int) - stained_first.apply(glass, box))
    assert np.mean(moved > 0) < 0.03  # "glass" begins below all but its darkest pixels
    assert moved.max() <= 2


@pytest.mark.parametrize(
    "before", ["", "macenko+", "reinhard+", "grey+", "demean+", "whiten+", "background:sigma_um=4+"]
)
def test_glass_is_spared_or_it_is_said(before):
    normaliser = fitted(f"{before}clahe:region_um=16,clip=4", SLIDE, MASK)
    box = Box(0, 0, 24, 200)  # bare glass, noisy
    first = Normaliser(normaliser.recipe, normaliser.steps[:-1])
    noise = [applied(n, SLIDE, box).std() for n in (first, normaliser)]
    spared = noise[1] < 1.1 * noise[0]
    assert spared == ("background" not in before)
    assert spared == (not any("cannot spare" in note for note in normaliser.notes))


def test_the_fit_finds_the_slides_stains():
    found = np.array(fitted("macenko", SLIDE, MASK).fit["vectors"])
    assert np.degrees(np.arccos((found * unit_rows(HAEMATOXYLIN_EOSIN)).sum(axis=1))).max() < 12


@pytest.mark.skipif(JIT_OFF, reason="whole slides are slow to interpret")
def test_two_stainings_of_one_tissue_become_alike():
    pale, strong = (np.clip(255 * (SLIDE.read(Box(0, 0, 320, 400), ONE_UM) / 255.0) ** g, 0, 255) for g in (0.7, 1.3))
    slides = [ArraySlide(np.rint(p).astype(np.uint8), 1.0) for p in (pale, strong)]
    box = Box(60, 60, 250, 330)
    before = [slide.read(box, ONE_UM).mean(axis=(0, 1)) for slide in slides]
    for text in ("macenko", "vahadane", "reinhard"):
        after = [applied(fitted(text, slide, MASK), slide, box).mean(axis=(0, 1)) for slide in slides]
        assert np.abs(np.subtract(*after)).max() < 0.25 * np.abs(np.subtract(*before)).max(), text


def test_fit_ignores_chance_blocks_and_pyramids():
    assert fitted("macenko+clahe", SLIDE, MASK) == fitted("macenko+clahe", SLIDE, MASK)
    fine = np.repeat(np.repeat(SLIDE.read(Box(0, 0, 320, 400), ONE_UM), 2, axis=0), 2, axis=1)
    plain, pyramid = (ArraySlide(fine, 0.5, downsamples=d) for d in ((1,), (1, 2)))
    assert (
        fitted("macenko+clahe", plain, MASK)
        == fitted("macenko+clahe", pyramid, MASK)
        == fitted("macenko+clahe", SLIDE, MASK)
    )


def test_sampling_is_bounded_and_keeps_to_the_mask():
    slide, mask = slide_and_mask(1280, 1296, edge=160)
    sample = sample_slide(slide, mask.mask, mask.mpp)
    area = sum(read.box.area for read in slide.reads)
    assert len(slide.reads) <= 304
    assert area <= 304 * 64 * 64
    assert sample.glass.min() >= 200
    assert np.mean(sample.tissue.min(axis=1) < 200) > 0.5


def test_samples_are_told_apart_by_the_mask_to_its_pixel():
    mask = np.zeros((40, 50), bool)
    mask[3:29, 5:41] = True  # no edge on a patch's
    pixels = np.where(np.kron(mask, np.ones((8, 8), bool))[..., None], (100, 60, 90), (240, 241, 242)).astype(np.uint8)
    sample = sample_slide(ArraySlide(pixels, 1.0), mask, Mpp.square(8.0))
    assert len(sample.tissue) > 5000
    assert (sample.tissue == (100, 60, 90)).all()
    assert len(sample.glass) > 1000
    assert (sample.glass == (240, 241, 242)).all()


@pytest.mark.parametrize("text", ["macenko", "vahadane", "reinhard", "macenko+clahe:region_um=16", "whiten", "demean"])
@pytest.mark.parametrize("kind", ["glass", "almost empty", "no tissue", "one colour"])
def test_hopeless_slides_are_left_alone_in_words(text, kind):
    slide, mask = slide_and_mask(160, 200)
    pixels = slide.read(Box(0, 0, 160, 200), ONE_UM)
    if kind == "one colour":
        pixels = np.full_like(pixels, (170, 90, 150))
    else:
        pixels = np.where(pixels < 236, 240, pixels).astype(np.uint8)
    if kind == "almost empty":
        pixels[60:80, 60:80] = tissue_like(20, 20)
    slide = ArraySlide(pixels, 1.0)
    if kind == "no tissue":
        mask = Mask(np.zeros_like(mask.mask))
    normaliser = fitted(text, slide, mask)
    after = applied(normaliser, slide, Box(0, 0, 160, 200))
    if text in ("macenko", "vahadane", "macenko+clahe:region_um=16") or kind == "no tissue":
        assert normaliser.notes or kind == "one colour"
        stain_only = [step for step in normaliser.steps if step.kind != "clahe"]
        assert not stain_only or kind == "one colour"
    if text in ("macenko", "vahadane") and not normaliser.steps:
        assert np.array_equal(after, pixels)
    assert all(note.endswith(".") and len(note) > 30 for note in normaliser.notes)


def test_another_stain_is_not_forced_into_haematoxylin_and_eosin():
    rng = np.random.default_rng(0)
    amounts = rng.gamma(2.0, 0.3, (320, 400, 2))
    amounts *= np.array([[1, 0.05], [0.05, 1], [1, 1]])[rng.integers(0, 3, (320, 400))]
    brown = 255 * np.exp(-amounts @ unit_rows([[0.65, 0.70, 0.29], [0.27, 0.57, 0.78]]))
    slide = ArraySlide(np.rint(brown).astype(np.uint8), 1.0)
    refused = fitted("macenko", slide, MASK)
    assert refused.steps == ()
    assert "left as they are" in refused.notes[0]
    assert fitted("macenko:stains=hdab", slide, MASK).notes == ()


def test_extreme_targets_are_limited_in_words():
    target = {"vectors": [[0.6, 0.7, 0.3], [0.1, 0.9, 0.2]], "strengths": [30.0, 1.0]}
    normaliser = fit_normaliser(parse_recipe([{"step": "macenko", "target": target}]), SLIDE, MASK, ONE_UM)
    assert "limited to 0.4- to 2.5-fold" in normaliser.notes[0]


def test_regions_of_clahe_are_micrometres():
    assert fitted("clahe:region_um=64", SLIDE, MASK, Mpp.square(0.5)).steps[0].region_px == 128
    assert fitted("clahe:region_um=64", SLIDE, MASK, Mpp.square(0.5)).halo_px == 192
    with pytest.raises(PlanError, match="8 px are needed"):
        fitted("clahe:region_um=10", SLIDE, MASK, Mpp.square(2.0))


@pytest.mark.parametrize("text", ["clahe:region_um=200000", "background:sigma_um=1e5"])
def test_neighbourhoods_wider_than_any_block_are_refused(text):
    with pytest.raises(PlanError, match=r"00 px round every block at .*; at most 4,096 are possible"):
        fitted(text, SLIDE, MASK)


@pytest.mark.parametrize("pixels", [np.zeros((9, 7, 3)), np.zeros((9, 7, 4), np.uint8), np.zeros((7, 9, 3), np.uint8)])
def test_bad_pixels(pixels):
    with pytest.raises(ValueError, match="needs uint8 pixels of shape"):
        Normaliser().apply(pixels, Box(0, 0, 9, 7))


def test_unknown_version_of_a_stored_normaliser():
    with pytest.raises(ValueError, match="version 1"):
        Normaliser.from_json('{"version": 2}')


@pytest.mark.parametrize("text", ["macenko+clahe:region_um=16", "reinhard", "none"])
def test_stain_report(tmp_path, text):
    if JIT_OFF and text != "none":
        pytest.skip("whole slides are slow to interpret")
    import cv2

    slide, _ = slide_and_mask(800, 840, edge=96)
    report = stain_report(slide, parse_recipe(text), tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted(report["files"])
    both = cv2.imread(str(tmp_path / "stain.png"))
    assert both.shape == (768, 2 * 768 + 8, 3)
    assert np.array_equal(both[:, :768], both[:, 776:]) == (text == "none")
    stored = Normaliser.from_json((tmp_path / "stain.json").read_text())
    assert stored.recipe == parse_recipe(text)
    assert report["lines"][0] == ("recipe", str(stored.recipe))
    json.dumps(report)
