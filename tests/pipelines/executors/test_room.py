"""What a machine has room for, also in a container that may use a part of it."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from quantpress.pipelines.executors import room
from quantpress.pipelines.machine import available_threads, free_memory


@pytest.fixture
def container(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Folder of a control group inside of another one, inside of the root's."""
    groups = tmp_path / "cgroup"
    own = groups / "outer" / "own"
    own.mkdir(parents=True)
    named = tmp_path / "named"
    named.write_text("0::/outer/own\n")
    monkeypatch.setattr(room, "_CGROUPS", groups)
    monkeypatch.setattr(room, "_OWN_CGROUP", named)
    monkeypatch.setattr(room, "available_threads", lambda: 16)
    monkeypatch.setattr(room, "free_memory", lambda: 64 << 30)
    return own


def test_without_limits_it_is_what_the_system_has(container: Path) -> None:
    (container / "cpu.max").write_text("max 100000\n")
    (container / "memory.max").write_text("max\n")
    (container / "memory.current").write_text("1000\n")
    assert room.usable_cores() == 16
    assert room.free_bytes() == 64 << 30


def test_without_control_groups_it_is_what_the_system_has(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(room, "_OWN_CGROUP", tmp_path / "missing")
    assert room.usable_cores() == available_threads()
    assert abs(room.free_bytes() - free_memory()) < 4 << 30


@pytest.mark.parametrize(("limit", "cores"), [("400000 100000", 4), ("150000 100000", 2), ("1000 100000", 1)])
@pytest.mark.parametrize("outer", [False, True])
def test_a_share_of_the_processors_counts_as_so_many(container: Path, limit: str, cores: int, outer: bool) -> None:
    (container.parent if outer else container).joinpath("cpu.max").write_text(f"{limit}\n")
    assert room.usable_cores() == cores


def test_a_memory_limit_counts_less_what_is_used_but_for_cached_files(container: Path) -> None:
    (container / "memory.max").write_text(f"{8 << 30}\n")
    (container / "memory.current").write_text(f"{3 << 30}\n")
    assert room.free_bytes() == 5 << 30
    (container / "memory.stat").write_text(f"anon 5\ninactive_file {1 << 30}\nactive_file 7\n")
    assert room.free_bytes() == 6 << 30
    (container.parent / "memory.max").write_text(f"{4 << 30}\n")
    (container.parent / "memory.current").write_text(f"{5 << 30}\n")
    assert room.free_bytes() == 0


def test_limits_of_older_systems_count_too(tmp_path: Path, container: Path) -> None:
    (tmp_path / "named").write_text("7:cpu,cpuacct:/docker/1f\n4:memory:/docker/1f\n1:name=systemd:/\n0::/\n")
    for name in ("cpu", "memory"):  # the folder that is mounted is the group itself
        (tmp_path / "cgroup" / name).mkdir()
    memory, cpu = tmp_path / "cgroup" / "memory", tmp_path / "cgroup" / "cpu"
    (cpu / "cpu.cfs_quota_us").write_text("-1\n")
    (cpu / "cpu.cfs_period_us").write_text("100000\n")
    assert room.usable_cores() == 16
    (cpu / "cpu.cfs_quota_us").write_text("250000\n")
    assert room.usable_cores() == 3
    (memory / "memory.limit_in_bytes").write_text(f"{8 << 30}\n")
    (memory / "memory.usage_in_bytes").write_text(f"{5 << 30}\n")
    (memory / "memory.stat").write_text(f"inactive_file 10\ntotal_inactive_file {2 << 30}\n")
    assert room.free_bytes() == 5 << 30


@pytest.mark.parametrize(
    ("named", "ids"),
    [
        ("", ()),
        ("-1", ()),
        ("0", ("0",)),
        ("1, 0", ("1", "0")),
        ("0,-1,1", ("0",)),
        ("GPU-8932f937,MIG-1", ("GPU-8932f937", "MIG-1")),
    ],
)
def test_devices_that_a_user_names_are_those_that_are_lent(named: str, ids: tuple[str, ...]) -> None:
    assert room.visible_gpus({"CUDA_VISIBLE_DEVICES": named}) == ids


def test_devices_are_counted_by_their_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(room, "_DEVICES", tmp_path)
    assert room.visible_gpus({}) == ()
    for name in ("nvidia0", "nvidia1", "nvidiactl", "nvidia-uvm", "nvidia1x"):
        (tmp_path / name).touch()
    assert room.visible_gpus({}) == ("0", "1")


@pytest.mark.skipif(not Path("/proc/self/cgroup").exists(), reason="no control groups")
def test_this_machine_has_room_for_this_test() -> None:
    assert 1 <= room.usable_cores() <= (os.cpu_count() or 1)
    assert room.free_bytes() > 0
