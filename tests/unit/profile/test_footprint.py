"""Memory of a process as it will be added up: private parts with children, libraries once, and what is available."""

from __future__ import annotations

from pathlib import Path

from corun.profile.footprint import Footprint, available_mib, footprint, resident_mib


def _status(root: Path, pid: int, anon: int, file: int, peak: int, children: str = "") -> None:
    task = root / f"proc/{pid}/task/{pid}"
    task.mkdir(parents=True)
    (task / "children").write_text(children)
    (root / f"proc/{pid}/status").write_text(
        f"Name:\tpython\nVmHWM:\t{peak} kB\nRssAnon:\t{anon} kB\nRssFile:\t{file} kB\nThreads:\t3\n"
    )


def test_private_memory_is_the_peak_less_mapped_files(tmp_path: Path) -> None:
    """A peak that was given back still counts: the next run will need it again."""
    _status(tmp_path, 7, anon=100 * 1024, file=50 * 1024, peak=400 * 1024)
    assert footprint(7, root=tmp_path) == Footprint(350.0, 50.0)


def test_loader_workers_count_and_libraries_are_one_copy(tmp_path: Path) -> None:
    """Descendants of every depth are private memory of their own; mapped files are the largest part, not the sum."""
    _status(tmp_path, 7, 1024, 2048, 3072, children="8")
    _status(tmp_path, 8, 1024, 4096, 5120, children="9 ")
    _status(tmp_path, 9, 2048, 1024, 3072)
    assert footprint(7, root=tmp_path) == Footprint(4.0, 4.0)


def test_a_process_that_is_gone_takes_nothing(tmp_path: Path) -> None:
    """No file, no memory."""
    assert footprint(7, root=tmp_path) == Footprint()


def test_resident_memory_adds_up_and_is_missing_where_the_kernel_is_silent(tmp_path: Path) -> None:
    """RSS and PSS of all processes of a family; PSS is None, not 0, without smaps_rollup."""
    _status(tmp_path, 7, 1024, 2048, 3072, children="8")
    _status(tmp_path, 8, 1024, 4096, 5120)
    for pid, rss in ((7, 3072), (8, 5120)):
        with (tmp_path / f"proc/{pid}/status").open("a") as file:
            file.write(f"VmRSS:\t{rss} kB\n")
    assert resident_mib(7, tmp_path) == (8.0, None)
    (tmp_path / "proc/7/smaps_rollup").write_text("Rss:  3072 kB\nPss:  1536 kB\n")
    assert resident_mib(7, tmp_path) == (8.0, 1.5)
    assert resident_mib(99, tmp_path) == (None, None)


def test_the_smaller_of_machine_and_cgroup_is_available(tmp_path: Path) -> None:
    """A limit of cgroup v2 or v1 less what it uses; "max" and the v1 constant for no limit say nothing."""
    (tmp_path / "proc").mkdir()
    (tmp_path / "proc/meminfo").write_text("MemTotal: 8388608 kB\nMemAvailable: 4194304 kB\n")
    assert available_mib(tmp_path) == 4096
    group = tmp_path / "sys/fs/cgroup"
    (group / "memory").mkdir(parents=True)
    (group / "memory.max").write_text("max\n")
    (group / "memory/memory.limit_in_bytes").write_text("9223372036854771712\n")
    (group / "memory/memory.usage_in_bytes").write_text("1048576\n")
    assert available_mib(tmp_path) == 4096
    (group / "memory.max").write_text(f"{2**31}\n")
    (group / "memory.current").write_text(f"{2**30}\n")
    assert available_mib(tmp_path) == 1024
