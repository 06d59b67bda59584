import math
import os
import platform
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from service import host
from service.errors import SettingsError
from service.host import Processor

V1 = "4:memory:/box\n3:cpu,cpuacct:/box\n1:name=systemd:/box\n"
CGROUP = "sys/fs/cgroup"


@pytest.fixture
def make(tmp_path):
    """Return a function that makes a host's root of files, by their paths."""

    def make(files):
        for name, content in files.items():
            path = tmp_path / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(content)
        return tmp_path

    return make


@pytest.mark.parametrize(
    ("content", "cores"),
    [("max 100000", None), ("150000 100000", 1.5), ("50000 100000", 0.5), ("", None), ("x", None)],
)
def test_quota_of_v2_is_its_share_of_the_period(make, content, cores):
    root = make({"proc/self/cgroup": "0::/\n", f"{CGROUP}/cpu.max": f"{content}\n"})

    assert host.quota(root) == cores


@pytest.mark.parametrize(
    ("quota", "cores"), [("-1", None), ("250000", 2.5), ("0", None), ("", None)]
)
def test_quota_of_v1_is_its_share_of_the_period(make, quota, cores):
    folder = f"{CGROUP}/cpu/box"
    root = make(
        {
            "proc/self/cgroup": V1,
            f"{folder}/cpu.cfs_quota_us": quota,
            f"{folder}/cpu.cfs_period_us": "100000\n",
        }
    )

    assert host.quota(root) == cores


def test_threads_keep_to_the_cpus_they_are_started_on_and_nobody_else_does():
    usual = os.sched_getaffinity(0)
    if len(usual) < 2:
        pytest.skip("threads that keep to the only CPU show nothing")
    one, found = {min(usual)}, []

    def start():
        thread = threading.Thread(target=lambda: found.append(os.sched_getaffinity(0)))
        thread.start()
        thread.join()
        return "started"

    assert host.started_on(one, start) == host.started_on((), start) == "started"

    assert found == [one, usual]
    assert os.sched_getaffinity(0) == usual


def test_what_cannot_be_started_is_refused_in_its_own_words():
    def fail():
        raise OSError(98, "Address already in use")

    with pytest.raises(OSError, match="Address already in use"):
        host.started_on({min(os.sched_getaffinity(0))}, fail)


def test_cpu_that_the_system_refuses_is_named_and_nothing_is_started():
    with pytest.raises(SettingsError) as caught:
        host.started_on({9998, 9999}, lambda: pytest.fail("started"))

    assert str(caught.value) == (
        "io_cpus lists 9998-9999, which the system refuses: Invalid argument; name others, or none"
    )


def test_thread_that_began_where_less_is_allowed_is_let_go_and_any_other_left_where_it_is():
    usual, found = host.cpus(), []

    def work():
        for began, numbers in (
            ({min(usual)}, usual),
            ({min(usual)}, set()),
            ({min(usual)}, {9999}),
            (usual, {min(usual)}),
        ):
            os.sched_setaffinity(0, began)
            host.let_go(numbers)
            found.append(os.sched_getaffinity(0))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert found == [usual, {min(usual)}, {min(usual)}, usual]


@pytest.mark.parametrize(
    ("numbers", "text"), [((), ""), ((3,), "3"), ((2, 0, 1, 5, 7, 8), "0-2,5,7-8")]
)
def test_processors_are_shown_as_ranges(numbers, text):
    assert host.shown(numbers) == text


@pytest.mark.parametrize(
    ("content", "limit"), [("max", None), ("1073741824", 1 << 30), ("9223372036854771712", None)]
)
def test_limit_of_memory_is_that_of_either_version(make, content, limit):
    v2 = make({"proc/self/cgroup": "0::/\n", f"{CGROUP}/memory.max": content})
    assert host.memory_limit_bytes(v2) == limit

    v1 = make(
        {"proc/self/cgroup": V1, f"{CGROUP}/memory/box/memory.limit_in_bytes": f"{content}\n"}
    )
    assert host.memory_limit_bytes(v1 / ".") == limit


def test_smallest_limit_of_a_group_and_of_those_above_it_holds(make):
    files = {"proc/self/cgroup": "0::/a/b\n"}
    for folder, quota in ((".", "400000"), ("a", "200000"), ("a/b", "300000"), ("c", "100000")):
        files[f"{CGROUP}/{folder}/cpu.max"] = f"{quota} 100000"

    assert host.quota(make(files)) == 2


@pytest.mark.parametrize("path", ["/docker/0123", "/../../other"])
def test_group_that_a_container_does_not_see_is_looked_for_at_the_top(make, path):
    root = make(
        {"proc/self/cgroup": f"0::{path}\n", f"{CGROUP}/cpu.max": "100000 100000"},
    )

    assert host.quota(root) == 1


def test_group_outside_of_what_a_container_sees_is_not_read(make):
    root = make({"proc/self/cgroup": "0::/../x\n", "sys/fs/x/cpu.max": "100000 100000"})

    assert host.quota(root) is None


@pytest.mark.parametrize("quota", [0.2, 1.0, 1.2])
def test_cores_are_the_quota_rounded_up_and_at_most_the_affinity(make, quota):
    text = f"{round(quota * 100_000)} 100000"
    root = make({"proc/self/cgroup": "0::/\n", f"{CGROUP}/cpu.max": text})

    assert host.cores(root) == min(host.affinity(), math.ceil(quota))


def test_affinity_is_what_the_kernel_lets_this_process_run_on():
    allowed = os.sched_getaffinity(0)
    try:
        os.sched_setaffinity(0, {min(allowed)})
        assert host.affinity() == host.cores() == 1
    finally:
        os.sched_setaffinity(0, allowed)
    assert host.affinity() == len(allowed)


def test_host_that_tells_nothing_has_no_limits(tmp_path):
    assert host.quota(tmp_path) is None
    assert host.memory_limit_bytes(tmp_path) is None
    assert host.memory_bytes(tmp_path) is None
    assert host.available_bytes(tmp_path) is None
    assert host.cores(tmp_path) == host.affinity()
    assert host.gpus(tmp_path) == []
    assert host.processor(tmp_path) == Processor(platform.machine(), frozenset())


def test_memory_of_the_machine_is_in_bytes(make):
    root = make({"proc/meminfo": "MemTotal:       2048 kB\nMemAvailable:   1024 kB\n"})

    assert host.memory_bytes(root) == 2 << 20
    assert host.available_bytes(root) == 1 << 20


def test_processor_is_the_first_one_with_its_flags(make):
    root = make(
        {
            "proc/cpuinfo": "processor\t: 0\nmodel name\t: Fast: 2.5\nflags\t\t: avx2 avx_vnni\n\n"
            "processor\t: 1\nmodel name\t: Slow\nflags\t\t: none\n"
        }
    )

    assert host.processor(root) == Processor("Fast: 2.5", frozenset({"avx2", "avx_vnni"}))


def test_processor_of_another_kind_has_its_features(make):
    root = make({"proc/cpuinfo": "processor\t: 0\nFeatures\t: fp asimddp i8mm\n"})

    assert host.processor(root).flags == {"fp", "asimddp", "i8mm"}
    assert host.processor(root).name == platform.machine()


def test_this_host_is_read_without_an_error():
    assert host.cores() >= 1
    assert (host.memory_bytes() or 0) > (host.available_bytes() or 0) > 0
    assert host.processor().flags


KEEPER = """
import os, sys
from pathlib import Path
from service import host

def resident_bytes():
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")

if sys.argv[1] == "steady":
    assert host.keep_memory_steady()
before = resident_bytes()
large = bytes(16 << 20)
del large  # by itself glibc keeps blocks of up to this size from now on
blocks = [bytes(1 << 17) for _ in range(1024)]
del blocks[:-1]
print(resident_bytes() - before)
"""


def kept_bytes(how):
    command = [sys.executable, "-c", KEEPER, how]
    return int(subprocess.run(command, capture_output=True, text=True, check=True).stdout)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="other allocators know no such call")
def test_large_blocks_go_back_to_the_system_though_larger_ones_were_freed_before():
    assert kept_bytes("by itself") > 64 << 20
    assert kept_bytes("steady") < 16 << 20


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="other allocators know no such call")
def test_memory_that_was_freed_between_what_is_in_use_is_given_back():
    def resident_bytes() -> int:
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")

    blocks = [bytes(4_000) for _ in range(50_000)]
    in_use = blocks[::100]
    del blocks
    before_bytes = resident_bytes()

    assert host.give_back_memory()

    assert resident_bytes() < before_bytes - (100 << 20)
    assert len(in_use) == 500


def test_of_a_processors_flags_only_those_that_kernels_differ_by_are_told():
    found = host.Processor("Fast", frozenset({"fpu", "avx2", "fma", "ht", "avx512_vnni"}))

    assert found.kernel_flags == ("fma", "avx2", "avx512_vnni")


def test_devices_are_named_as_their_driver_names_them(make):
    told = "Model: \t\t NVIDIA H200\nIRQ:   \t\t 41\nBus Type: \t PCIe\n"
    places = ("0000:00:06.0", "0000:00:07.0")
    root = make({f"proc/driver/nvidia/gpus/{one}/information": told for one in places})

    assert host.gpus(root) == ["NVIDIA H200", "NVIDIA H200"]
