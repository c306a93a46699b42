"""A fake /proc and /sys below a directory, for sources that take a `root`.

    machine = FakeMachine(tmp_path).host().process(4711, run_ns=5_000_000)
    CpuTimes(machine.root)

Files are rewritten in place, so a kept descriptor sees the new text as it would on a real machine. What a
fake cannot do is fail with ESRCH: an ended thread or process has empty files instead.
"""

from __future__ import annotations

import mmap
from pathlib import Path

PAGE_MIB = mmap.PAGESIZE / (1024 * 1024)

_STAT = """\
cpu  {user} 2 300 4000 50 6 7 8 0 0
cpu0 {user} 2 300 4000 50 6 7 8 0 0
intr 215457 0 0 9
ctxt {ctxt}
btime 1795233586
processes 5265
procs_running 3
procs_blocked 1
softirq 164471 0 18756
"""

_MEMINFO = """\
MemTotal:       16777216 kB
MemFree:         {free} kB
MemAvailable:    8388608 kB
Buffers:           10472 kB
Cached:          1048576 kB
SwapCached:            0 kB
SwapTotal:             0 kB
SwapFree:              0 kB
Dirty:              2048 kB
"""

_NET = """\
Inter-|   Receive                                                |  Transmit
 face |bytes    packets errs drop fifo frame compressed multicast|bytes    packets errs drop fifo colls carrier compressed
    lo:     500       5    0    0    0     0          0         0      700       5    0    0    0     0       0          0
  eth0:    1000      10    1    2    0     0          0         0     2000      20    3    4    0     0       0          0
  eth1:      10       1    0    0    0     0          0         0       20       2    0    0    0     0       0          0
"""


class FakeMachine:
    """Writes what the kernel would show; every method returns the machine, so that calls chain."""

    def __init__(self, root: Path) -> None:
        self.root = root

    def write(self, path: str, text: str) -> FakeMachine:
        """One file, made or rewritten in place."""
        file = self.root / path.lstrip("/")
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text, encoding="utf-8")
        return self

    def host(self, user: int = 100, ctxt: int = 261195, free: int = 4194304, psi_us: int = 77) -> FakeMachine:
        """CPU, memory, network and pressure; `user` is in ticks of 10 ms, `free` in kB."""
        self.write("/proc/stat", _STAT.format(user=user, ctxt=ctxt))
        self.write("/proc/meminfo", _MEMINFO.format(free=free))
        self.write("/proc/net/dev", _NET)
        for resource in ("cpu", "memory", "io"):
            averages = "avg10=0.00 avg60=0.00 avg300=0.00"
            self.write(f"/proc/pressure/{resource}", f"some {averages} total={psi_us}\nfull {averages} total=0\n")
        return self

    def process(
        self,
        pid: int,
        *,
        run_ns: int = 1_000_000,
        wait_ns: int = 2_000,
        user: int = 10,
        system: int = 5,
        threads: dict[int, tuple[int, int, int, int, int]] | None = None,
        rss_pages: int = 256,
        state: str = "S",
        ppid: int = 1,
        name: str = "a (tricky) name",
    ) -> FakeMachine:
        """A process; threads: number -> (run_ns, wait_ns, slices, voluntary, involuntary)."""
        threads = threads or {pid: (run_ns, wait_ns, 7, 3, 4)}
        groups, faults = "0 0 0 0 0", "11 0 2 0"
        times = f"{user} {system} 0 0 20 0 {len(threads)} 0 99"
        text = f"{pid} ({name}) {state} {ppid} {groups} {faults} {times} 4096 {rss_pages} 18446744073709551615\n"
        self.write(f"/proc/{pid}/stat", text)
        for number, counters in threads.items():
            self.thread(pid, number, *counters)
        (self.root / f"proc/{pid}/fd").mkdir(exist_ok=True)
        return self.children(pid)

    def thread(
        self, pid: int, number: int, run_ns: int, wait_ns: int, slices: int, voluntary: int, involuntary: int
    ) -> FakeMachine:
        """One thread's schedstat and status."""
        task = f"/proc/{pid}/task/{number}"
        self.write(f"{task}/schedstat", f"{run_ns} {wait_ns} {slices}\n")
        switches = f"voluntary_ctxt_switches:\t{voluntary}\nnonvoluntary_ctxt_switches:\t{involuntary}\n"
        return self.write(f"{task}/status", f"Name:\tx\nPid:\t{number}\n{switches}")

    def children(self, pid: int, *numbers: int) -> FakeMachine:
        """What the main thread of `pid` has started."""
        return self.write(f"/proc/{pid}/task/{pid}/children", " ".join(map(str, numbers)) + " ")

    def end_process(self, pid: int) -> FakeMachine:
        """The process is gone: a kept descriptor reads nothing more."""
        return self.write(f"/proc/{pid}/stat", "")

    def end_thread(self, pid: int, number: int) -> FakeMachine:
        """The thread is gone."""
        return self.write(f"/proc/{pid}/task/{number}/schedstat", "")

    def thermal_zone(self, number: int, kind: str, millidegrees: int) -> FakeMachine:
        """/sys/class/thermal/thermal_zone<number>."""
        zone = f"/sys/class/thermal/thermal_zone{number}"
        return self.write(f"{zone}/type", f"{kind}\n").write(f"{zone}/temp", f"{millidegrees}\n")

    def core(self, number: int, khz: int) -> FakeMachine:
        """A core with cpufreq."""
        return self.write(f"/sys/devices/system/cpu/cpu{number}/cpufreq/scaling_cur_freq", f"{khz}\n")

    def rapl(self, number: str, name: str, energy_uj: int, range_uj: int = 262_143_328_850) -> FakeMachine:
        """/sys/class/powercap/intel-rapl:<number>, e.g. "0" or "0:1"."""
        domain = f"/sys/class/powercap/intel-rapl:{number}"
        self.write(f"{domain}/name", f"{name}\n").write(f"{domain}/max_energy_range_uj", f"{range_uj}\n")
        return self.write(f"{domain}/energy_uj", f"{energy_uj}\n")

    def drm(self, pid: int, fd: int, client: int, busy_ns: int, memory_kib: int = 0) -> FakeMachine:
        """An open DRM device of a process with its engine time."""
        (self.root / "dev/dri").mkdir(parents=True, exist_ok=True)
        link = self.root / f"proc/{pid}/fd/{fd}"
        link.parent.mkdir(parents=True, exist_ok=True)
        if not link.is_symlink():
            link.symlink_to("/dev/dri/renderD128")
        return self.write(
            f"/proc/{pid}/fdinfo/{fd}",
            f"pos:\t0\ndrm-driver:\tamdgpu\ndrm-pdev:\t0000:03:00.0\ndrm-client-id:\t{client}\n"
            f"drm-engine-gfx:\t{busy_ns} ns\ndrm-engine-capacity-gfx:\t1\n"
            f"drm-memory-vram:\t{memory_kib} KiB\ndrm-resident-vram:\t{memory_kib} KiB\n",
        )
