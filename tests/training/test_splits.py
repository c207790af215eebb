"""Splits of the benchmark: whole cases, every field tested once, other groupings."""

from collections import Counter

import pytest

from benchmarks.crc5_splits import FOLDS, grouped, recipe_of, splits
from tests.training.fields import write_sets
from wsiengine.training.data import check_leak, read_fields


@pytest.fixture(scope="module")
def fields(tmp_path_factory):
    return read_fields(write_sets(tmp_path_factory.mktemp("data"), images=10))


@pytest.mark.parametrize("name", list(splits()))
def test_no_case_is_on_both_sides(name, fields):
    split = splits()[name]
    regrouped = grouped(fields, split.grouping)
    recipe, chosen = recipe_of(split, regrouped)
    train = recipe.chosen(regrouped) if {f.label for f in regrouped if f.fold in recipe.folds} else []
    check_leak(train, chosen)
    if name != "half" and "fold" not in name:
        assert chosen


def test_another_grouping_moves_whole_cases_and_spreads_every_class(fields):
    again = grouped(fields, 1)
    assert {f.case: f.fold for f in again} != {f.case: f.fold for f in fields}
    assert len({(f.case, f.fold) for f in again}) == len({f.case for f in fields})
    spread = Counter((f.source, f.label, f.fold) for f in again)
    assert len(spread) == len({(f.source, f.label) for f in fields}) * len(FOLDS)
    assert set(spread.values()) == {2}
    tested = [f.image for k in FOLDS for f in recipe_of(splits()[f"again{k}"], again)[1]]
    assert sorted(tested) == sorted(f.image for f in fields)


def test_a_set_without_adenoma_trains_two_classes(fields):
    recipe, chosen = recipe_of(splits()["only-lc25000"], fields)
    assert recipe.classes == ("Normal", "Adenocarcinoma")
    assert {f.source for f in chosen} == {"ebhi", "glas"}
