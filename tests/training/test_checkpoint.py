"""What a training is resumed from."""

import os
from pathlib import Path

import pytest
import torch

from tests.training.test_resume import same
from wsiengine.training import checkpoint


def parts() -> checkpoint.Parts:
    network = torch.nn.Linear(3, 2)
    optimiser = torch.optim.AdamW(network.parameters(), lr=0.5)
    network(torch.ones(1, 3)).sum().backward()
    optimiser.step()
    return {"network": network, "optimiser": optimiser}


def test_every_part_gets_its_own_state_back(tmp_path: Path) -> None:
    old, new = parts(), parts()
    assert checkpoint.read(tmp_path, new) == {}
    assert not same(old["network"].state_dict(), new["network"].state_dict())
    checkpoint.write(tmp_path, old, iteration=7)
    assert checkpoint.read(tmp_path, new) == {"iteration": 7}
    assert same(old["network"].state_dict(), new["network"].state_dict())
    steps = [part["optimiser"].state_dict()["state"][0]["exp_avg"] for part in (old, new)]
    assert torch.equal(*steps)


def test_a_checkpoint_is_on_the_disk_before_it_replaces_the_last(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else a power cut may leave its name without its bytes."""
    done: list[str] = []
    syncing, replacing = os.fsync, Path.replace

    def fsync(descriptor: int) -> None:
        syncing(descriptor)
        done.append(f"sync {(tmp_path / 'checkpoint.new').stat().st_size > 1000}")

    def replace(self: Path, target: Path) -> Path:
        done.append(f"replace {self.name}")
        return replacing(self, target)

    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(Path, "replace", replace)
    checkpoint.write(tmp_path, parts(), iteration=1)
    assert done == ["sync True", "replace checkpoint.new"]
