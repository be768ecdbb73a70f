"""CPUs and memory that a process may use, from trees of /proc and /sys as kernels show them; the nodes of --nodes."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from pilotq.broker.errors import InvalidInput
from pilotq.workers.machine.topology import NodePlan, memory_bytes, numa_groups, parse_nodes, usable_cpus, virtual_nodes

MASK = sorted(os.sched_getaffinity(0))
PHYSICAL = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
V2 = "30 25 0:27 {inside} /sys/fs/cgroup rw,nosuid shared:4 - cgroup2 cgroup2 rw"
V1 = "33 25 0:30 {inside} /sys/fs/cgroup/{name} rw,nosuid shared:9 - cgroup cgroup rw,{name}"


def tree(root: Path, files: dict[str, str]) -> str:
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text + "\n")
    return str(root)


def v2(root: Path, path: str, files: dict[str, str], inside: str = "/") -> str:
    texts = {"proc/self/cgroup": f"0::{path}", "proc/self/mountinfo": V2.format(inside=inside)}
    return tree(root, texts | {f"sys/fs/cgroup/{name}": text for name, text in files.items()})


def test_on_this_machine() -> None:
    cpus = usable_cpus()
    assert cpus == MASK[: len(cpus)]
    assert cpus
    assert 0 < memory_bytes() <= PHYSICAL
    assert sorted(cpu for group in numa_groups(cpus) for cpu in group) == cpus


def test_without_cgroups_the_mask_and_the_machine_count(tmp_path: Path) -> None:
    assert usable_cpus(str(tmp_path)) == MASK
    assert memory_bytes(str(tmp_path)) == PHYSICAL
    assert numa_groups([3, 4], str(tmp_path)) == [[3, 4]]


@pytest.mark.parametrize(
    ("quota", "count"),
    [("max 100000", len(MASK)), ("100000 100000", 1), ("199999 100000", 1), ("50000 100000", 1),
     ("99900000 100000", len(MASK))],
)  # fmt: skip
def test_a_quota_of_cgroup_v2_is_rounded_down_to_at_least_one(tmp_path: Path, quota: str, count: int) -> None:
    assert usable_cpus(v2(tmp_path, "/a", {"a/cpu.max": quota})) == MASK[:count]


def test_limits_of_cgroups_above_count_too(tmp_path: Path) -> None:
    files = {"a/b/cpu.max": "max 100000", "a/cpu.max": "100000 100000", "a/b/memory.max": "max", "a/memory.max": "4096"}
    root = v2(tmp_path, "/a/b", files)
    assert usable_cpus(root) == MASK[:1]
    assert memory_bytes(root) == 4096


def test_a_limit_of_a_neighbour_does_not_count(tmp_path: Path) -> None:
    root = v2(tmp_path, "/a", {"b/cpu.max": "100000 100000", "b/memory.max": "4096", "a/memory.max": "8192"})
    assert usable_cpus(root) == MASK
    assert memory_bytes(root) == 8192


@pytest.mark.parametrize(("inside", "path"), [("/docker/x", "/docker/x"), ("/docker/x", "/elsewhere"), ("/", "/")])
def test_a_container_sees_its_limit_at_the_mount_point(tmp_path: Path, inside: str, path: str) -> None:
    assert memory_bytes(v2(tmp_path, path, {"memory.max": "4096"}, inside)) == 4096


def test_cgroup_v1(tmp_path: Path) -> None:
    mounts = "\n".join(V1.format(inside="/", name=name) for name in ("cpu,cpuacct", "memory"))
    root = tree(tmp_path, {
        "proc/self/cgroup": "5:cpu,cpuacct:/slurm/job_1\n4:memory:/slurm/job_1\n1:name=systemd:/x",
        "proc/self/mountinfo": mounts,
        "sys/fs/cgroup/cpu,cpuacct/slurm/job_1/cpu.cfs_quota_us": "-1",
        "sys/fs/cgroup/cpu,cpuacct/slurm/job_1/cpu.cfs_period_us": "100000",
        "sys/fs/cgroup/cpu,cpuacct/slurm/cpu.cfs_quota_us": "150000",
        "sys/fs/cgroup/cpu,cpuacct/slurm/cpu.cfs_period_us": "100000",
        "sys/fs/cgroup/memory/slurm/job_1/memory.limit_in_bytes": "8192",
        "sys/fs/cgroup/memory/memory.limit_in_bytes": "9223372036854771712",
    })  # fmt: skip
    assert usable_cpus(root) == MASK[:1]
    assert memory_bytes(root) == 8192


def test_cpus_are_grouped_by_numa_node(tmp_path: Path) -> None:
    folder = "sys/devices/system/node"
    lists = {"node0": "0-3,8-11", "node1": "4-7", "node10": "12", "node2": ""}
    root = tree(tmp_path, {f"{folder}/{name}/cpulist": text for name, text in lists.items()})
    assert numa_groups([1, 5, 8, 7, 12, 40], root) == [[1, 8], [5, 7], [12], [40]]


@pytest.mark.parametrize(
    ("spec", "nodes"),
    [
        ("4", [("n0", 4)]),
        ("4,2,2", [("n0", 4), ("n1", 2), ("n2", 2)]),
        ("n1:2", [("n1", 2)]),
        ("n1:4, n2:4", [("n1", 4), ("n2", 4)]),
        ("a.b-c_d:1,3", [("a.b-c_d", 1), ("n1", 3)]),
        ("4096", [("n0", 4096)]),
    ],
)
def test_forms_of_nodes(spec: str, nodes: list[tuple[str, int]]) -> None:
    assert parse_nodes(spec) == nodes


@pytest.mark.parametrize(
    ("spec", "problem"),
    [
        ("", "no number of cores"),
        ("0", "no number of cores"),
        ("4097", "no number of cores"),
        ("-1", "no number of cores"),
        ("two", "no number of cores"),
        ("4,,2", "no number of cores"),
        ("n1:", "no number of cores"),
        (":4", "node name ''"),
        ("a b:4", "node name 'a b'"),
        ("a/b:4", "node name"),
        ("x" * 64 + ":4", "node name"),
        ("n1:4,n1:4", "named twice"),
        ("n1:4,2", "named twice"),
    ],
)
def test_what_nodes_cannot_be(spec: str, problem: str) -> None:
    with pytest.raises(InvalidInput, match=problem) as caught:
        parse_nodes(spec)
    assert f"--nodes {spec}: " in str(caught.value)


def test_virtual_nodes_take_cpus_in_turn() -> None:
    assert virtual_nodes("1,b:2", [4, 6, 8], "host") == [
        NodePlan("n0", [0], {0: 4}, False),
        NodePlan("b", [0, 1], {0: 6, 1: 8}, False),
    ]


def test_virtual_nodes_share_when_there_are_too_few_cpus() -> None:
    assert virtual_nodes("2,3", [4, 6], "host") == [
        NodePlan("n0", [0, 1], {0: 4, 1: 6}, True),
        NodePlan("n1", [0, 1, 2], {0: 4, 1: 6, 2: 4}, True),
    ]


def test_the_automatic_node_is_the_host_with_its_own_numbers() -> None:
    assert virtual_nodes(None, [4, 6], "host.example.org") == [NodePlan("host", [4, 6], {4: 4, 6: 6}, False)]
