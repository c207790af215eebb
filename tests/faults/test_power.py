"""Power cuts: whatever was not synced is gone, and the run goes on from the rest."""

from pathlib import Path

import pytest

from tests.faults.cuts import cuts, record
from tests.faults.power import Step

FEW = 15  # benchmarks/faults.py takes all


def test_a_power_cut_at_any_moment_loses_no_finished_block(
    slide: Path, wanted: dict[str, bytes], tmp_path: Path
) -> None:
    found = list(cuts(record(slide, tmp_path / "recorded")))
    assert len(found) > 100
    assert {cut.safe_tiles for cut in found} >= {0, 117}
    publishing = next(k for k, cut in enumerate(found) if "rename /.work/results/annotations.geojson" in cut.words)
    for cut in [*found[: publishing : publishing // FEW], *found[publishing:]]:
        assert cut.survived(slide, tmp_path / "out", wanted), cut.words


@pytest.mark.parametrize(
    ("kind", "below"), [("content", "/.work/journal"), ("content", "/.work/results/"), ("sync", ""), ("sync", "/.work")]
)
def test_a_sync_left_out_would_be_seen(
    slide: Path, wanted: dict[str, bytes], tmp_path: Path, kind: str, below: str
) -> None:
    """The test of the test above."""
    out = tmp_path / "recorded"
    recorder = record(slide, out)
    recorder.steps = [step for step in recorder.steps if not _is(step, kind, f"{out}{below}")]
    found = list(cuts(recorder))[::-3]
    assert any(not cut.survived(slide, tmp_path / "out", wanted) for cut in found)


def _is(step: Step, kind: str, path: str) -> bool:
    return step.kind == kind and (step.path == path or (path.endswith("/") and step.path.startswith(path)))
