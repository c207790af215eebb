"""Cores and memory: the container's where that is less than the machine's."""

import os
from pathlib import Path

import pytest

from wsiengine import machine


@pytest.fixture
def groups(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A machine of 16 cores, and an empty tree of groups."""
    monkeypatch.setattr(machine, "_GROUPS", tmp_path / "groups")
    monkeypatch.setattr(machine, "_OWN_GROUP", tmp_path / "cgroup")
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(16)))
    (tmp_path / "groups").mkdir()
    return tmp_path / "groups"


def write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


def test_without_a_container_all_cores(groups: Path) -> None:
    assert machine.usable_cores() == 16
    write(groups / "cpu.max", "max 100000\n")
    assert machine.usable_cores() == 16


@pytest.mark.parametrize(("quota", "cores"), [("200000", 2), ("150000", 2), ("50000", 1), ("9900000", 16)])
def test_a_share_of_the_processor(groups: Path, quota: str, cores: int) -> None:
    write(groups / "cpu.max", f"{quota} 100000\n")
    assert machine.usable_cores() == cores


def test_of_groups_within_groups_the_tightest_counts(groups: Path) -> None:
    write(groups.parent / "cgroup", "0::/user/job/step\n")
    write(groups / "user" / "job" / "cpu.max", "300000 100000\n")
    write(groups / "user" / "job" / "step" / "cpu.max", "max 100000\n")
    write(groups / "user" / "memory.max", "1234567\n")
    write(groups / "user" / "job" / "memory.max", "max\n")
    assert machine.usable_cores() == 3
    assert machine.usable_memory_bytes() == 1234567


def test_groups_of_the_first_kind(groups: Path) -> None:
    write(groups.parent / "cgroup", "5:cpu,cpuacct:/job\n3:memory:/job\n")
    write(groups / "cpu,cpuacct" / "job" / "cpu.cfs_quota_us", "400000")
    write(groups / "cpu,cpuacct" / "job" / "cpu.cfs_period_us", "100000")
    write(groups / "memory" / "job" / "memory.limit_in_bytes", "7654321")
    assert machine.usable_cores() == 4
    assert machine.usable_memory_bytes() == 7654321
    write(groups / "cpu,cpuacct" / "job" / "cpu.cfs_quota_us", "-1")
    assert machine.usable_cores() == 16


def test_rubbish_is_no_limit(groups: Path) -> None:
    write(groups / "cpu.max", "much\n")
    write(groups / "memory.max", "\n")
    write(groups.parent / "cgroup", "0::/../../etc\n")
    assert machine.usable_cores() == 16
    assert machine.usable_memory_bytes() > 1 << 28


def test_the_plan_counts_them(groups: Path) -> None:
    from wsiengine.planning import Options

    write(groups / "cpu.max", "300000 100000\n")
    assert Options().worker_threads == 3
    assert Options(threads=5).worker_threads == 5
