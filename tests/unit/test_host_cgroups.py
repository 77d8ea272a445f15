"""Which cgroup directories a berth lives in, on the three kinds of host."""

from __future__ import annotations

from pathlib import Path

import pytest

from quicferry.host import cgroups
from quicferry.protocol.errors import FerryError

PATH = "/libpod_parent/libpod-1"


def group(folder: Path, *pids: int) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "cgroup.procs").write_text("".join(f"{pid}\n" for pid in pids))
    return folder


def test_v2_and_the_payload_in_a_subgroup(tmp_path: Path) -> None:
    group(tmp_path, 1)
    (tmp_path / "cgroup.controllers").write_text("cpu memory\n")
    group(tmp_path / "machine.slice" / "libpod-1.scope")
    payload = group(tmp_path / "machine.slice" / "libpod-1.scope" / "container", 42, 43)
    assert cgroups.directories_of(42, "/machine.slice/libpod-1.scope", tmp_path) == [payload]
    assert cgroups.join(77, 42, "/machine.slice/libpod-1.scope", [tmp_path]) == [payload]
    assert (payload / "cgroup.procs").read_text() == "77"


def test_v1_and_hybrid_join_every_hierarchy_once(tmp_path: Path) -> None:
    expected = []
    for name in ("cpu,cpuacct", "memory", "systemd", "unified"):
        group(tmp_path / name, 1)
        expected.append(group(tmp_path / name / PATH.lstrip("/"), 42))
    (tmp_path / "cpu").symlink_to("cpu,cpuacct")
    (tmp_path / "cpuacct").symlink_to("cpu,cpuacct")
    (tmp_path / "empty").mkdir()
    joined = cgroups.join(77, 42, PATH, [tmp_path])
    assert [folder.resolve() for folder in joined] == sorted(expected)
    assert all((folder / "cgroup.procs").read_text() == "77" for folder in expected)


def test_the_first_root_that_shows_the_berth_is_taken(tmp_path: Path) -> None:
    group(tmp_path / "other" / "memory", 1)
    wanted = group(tmp_path / "right" / "memory" / PATH.lstrip("/"), 42)
    group(tmp_path / "right" / "memory", 1)
    where = [tmp_path / "missing", tmp_path / "other", tmp_path / "right"]
    assert cgroups.join(77, 42, PATH, where) == [wanted]


def test_a_berth_that_no_root_shows_is_told(tmp_path: Path) -> None:
    group(tmp_path / "memory", 1)
    with pytest.raises(FerryError, match="can't join") as caught:
        cgroups.join(77, 42, PATH, [tmp_path, tmp_path / "missing"])
    assert caught.value.code == "machine_unfit"
    assert "privileged" in caught.value.hint


def test_a_container_without_a_cgroup_needs_nothing() -> None:
    assert cgroups.join(77, 42, "", []) == []


def test_the_hosts_own_mounts_are_looked_at_last(tmp_path: Path) -> None:
    roots = cgroups.roots(4711)
    assert roots[0] == Path("/proc/4711/root/sys/fs/cgroup")
    assert roots[-1] == Path("/sys/fs/cgroup")
    assert len(cgroups.roots(0)) == 2
