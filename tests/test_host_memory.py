"""Free memory is the machine's, or what a container may still take."""

from pathlib import Path

import pytest

from msn_export import host


def test_what_is_free_here_is_below_what_there_is() -> None:
    total = next(
        int(line.split()[1]) * 1024
        for line in Path("/proc/meminfo").read_text().splitlines()
        if line.startswith("MemTotal:")
    )
    assert 2**20 < host.available_memory() <= total


@pytest.fixture
def cgroup(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Let a folder stand for /sys/fs/cgroup, version 2 and version 1."""
    monkeypatch.setattr(host, "_of_system", lambda: 64 * 2**30)
    folders = tuple((str(tmp_path / root[1:]), *names) for root, *names in host._CGROUPS)
    monkeypatch.setattr(host, "_CGROUPS", folders)
    for root, *_ in folders:
        Path(root).mkdir(parents=True, exist_ok=True)
    return tmp_path / "sys/fs/cgroup"


def test_a_containers_limit_counts_and_not_the_machines_memory(cgroup) -> None:
    (cgroup / "memory.max").write_text(f"{4 * 2**30}\n")
    (cgroup / "memory.current").write_text(f"{3 * 2**30}\n")
    assert host.available_memory() == 2**30
    # what the kernel holds of files can be had back
    (cgroup / "memory.stat").write_text(f"anon 5\ninactive_file {2**30}\nactive_file 7\n")
    assert host.available_memory() == 2 * 2**30
    (cgroup / "memory.current").write_text(f"{9 * 2**30}\n")
    assert host.available_memory() == 0


def test_a_limit_of_version_1_counts_too(cgroup) -> None:
    (cgroup / "memory" / "memory.limit_in_bytes").write_text(f"{2**30}\n")
    (cgroup / "memory" / "memory.usage_in_bytes").write_text(f"{2**29}\n")
    assert host.available_memory() == 2**29


def test_without_a_limit_the_machines_memory_counts(cgroup) -> None:
    assert host.available_memory() == 64 * 2**30
    (cgroup / "memory.max").write_text("max\n")
    (cgroup / "memory.current").write_text("1\n")
    assert host.available_memory() == 64 * 2**30
