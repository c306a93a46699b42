"""The columns of profile.csv, gpu.csv and process.csv.

Counters stand here raw, as the kernel or the driver counts them; rates are differences of two rows over the
difference of their t_ns and are made in the report, where a wrong rate can still be put right. An empty cell
means "could not be read here", never zero. profile.csv has further columns on the right for what device.json
and RAPL name on this machine; profiler.json lists them with their units.
"""

from __future__ import annotations

from corun.run.records import Column, Table

SEGMENT: Table = (
    Column("arm", "", "str", "alone, train or corun; idle outside a window; empty when started by hand"),
    Column("repeat", "", "int", "repetition, from 0; empty outside a window"),
    Column("segment", "", "int", "time window of the run, from 0; empty outside a window"),
)

TICK: Table = (
    *SEGMENT,
    Column("tick", "", "int", "number on the grid of periods, from 0; skipped ones leave a gap"),
    Column("t_ns", "ns", "int", "CLOCK_MONOTONIC just before the readings of this tick"),
)

_OWN: Table = (
    Column("t_wall_ns", "ns", "int", "wall clock at t_ns by the anchor taken at the start"),
    Column("late_us", "us", "int", "t_ns minus the tick's deadline"),
    Column("missed", "", "int", "ticks skipped since the row before, because a reading stalled"),
    Column("read_us", "us", "int", "what all readings of this tick took"),
    Column("read_errors", "", "int", "failed readings since the start (counter)"),
)

_CPU_STATES = {
    "user": "normal processes, guests included",
    "nice": "niced processes, guests included",
    "system": "the kernel",
    "idle": "nothing to do",
    "iowait": "idle with a disk request outstanding; not reliable on several cores",
    "irq": "interrupts",
    "softirq": "soft interrupts, the network's among them",
    "steal": "taken by other guests of the hypervisor",
}
CPU: Table = (
    *(
        Column(f"cpu_{state}_ns", "ns", "int", f"CPU time of all cores, {doc} (counter, steps of 10 ms)")
        for state, doc in _CPU_STATES.items()
    ),
    Column("ctx_switches", "", "int", "context switches of all cores (counter)"),
    Column("forks", "", "int", "processes and threads created (counter)"),
    Column("procs_running", "", "int", "threads running or waiting for a core"),
    Column("procs_blocked", "", "int", "threads waiting for a disk"),
)

MEMORY: Table = (
    Column("mem_total_mib", "MiB", "float", "memory of the host"),
    Column("mem_free_mib", "MiB", "float", "memory nobody uses"),
    Column("mem_available_mib", "MiB", "float", "memory a new program can have without swapping"),
    Column("mem_cached_mib", "MiB", "float", "page cache"),
    Column("mem_dirty_mib", "MiB", "float", "page cache waiting to be written"),
    Column("swap_total_mib", "MiB", "float", "swap space"),
    Column("swap_free_mib", "MiB", "float", "swap space nobody uses"),
)

PRESSURE: Table = tuple(
    Column(
        f"psi_{resource}_{kind}_us",
        "us",
        "int",
        f"time in which {who} waited for {what} (pressure stall information, counter)",
    )
    for resource, what in (("cpu", "a core"), ("memory", "memory"), ("io", "a disk"))
    for kind, who in (("some", "some thread"), ("full", "every thread"))
)

NETWORK: Table = (
    Column("net_rx_bytes", "B", "int", "received on all interfaces but the loopback (counter)"),
    Column("net_tx_bytes", "B", "int", "sent on all interfaces but the loopback (counter)"),
    Column("net_rx_packets", "", "int", "packets received, without the loopback (counter)"),
    Column("net_tx_packets", "", "int", "packets sent, without the loopback (counter)"),
    Column("net_errors", "", "int", "receive and send errors, without the loopback (counter)"),
    Column("net_drops", "", "int", "packets dropped on receipt or sending, without the loopback (counter)"),
    Column("lo_bytes", "B", "int", "bytes over the loopback: clients and services on one host (counter)"),
)

PROFILE: Table = (*TICK, *_OWN, *CPU, *MEMORY, *PRESSURE, *NETWORK)

GPU: Table = (
    *TICK,
    Column("gpu", "", "int", "NVML index, in the order of the PCI bus"),
    Column(
        "power_mw",
        "mW",
        "int",
        "nvmlDeviceGetPowerUsage: a 1 s average from Ampere on, except GA100 and older, where it is instant",
    ),
    Column("power_instant_mw", "mW", "int", "field 186; A100 and H100 sample a quarter of the time"),
    Column("power_average_mw", "mW", "int", "field 185, average over 1 s"),
    Column("energy_mj", "mJ", "int", "since the driver was loaded (counter, Volta and later)"),
    Column("power_limit_mw", "mW", "int", "enforced limit, read again once a minute"),
    Column("util_gpu_pct", "%", "int", "share of time with at least one kernel running; not occupancy"),
    Column("util_mem_pct", "%", "int", "share of time the memory was read or written"),
    Column("mem_used_mib", "MiB", "float", "device memory in use"),
    Column("mem_total_mib", "MiB", "float", "device memory"),
    Column("sm_clock_mhz", "MHz", "int", "clock of the SMs now"),
    Column("mem_clock_mhz", "MHz", "int", "clock of the memory now"),
    Column("temp_c", "°C", "int", "temperature of the chip"),
    Column("throttle_reasons", "", "int", "bit mask nvmlClocksEventReasons at this instant"),
    Column("throttle_power_ns", "ns", "int", "clocks held down by the software power cap (counter, field 74)"),
    Column("throttle_sync_ns", "ns", "int", "clocks held down by sync boost (counter, field 76)"),
    Column("throttle_sw_thermal_ns", "ns", "int", "by software thermal slowdown (counter, field 269)"),
    Column("throttle_hw_thermal_ns", "ns", "int", "by hardware thermal slowdown (counter, field 270)"),
    Column("throttle_brake_ns", "ns", "int", "by the external power brake (counter, field 271)"),
    Column("pcie_tx_bytes", "B", "int", "sent by the GPU over PCIe (counter, may wrap, field 197)"),
    Column("pcie_rx_bytes", "B", "int", "received by the GPU over PCIe (counter, may wrap, field 198)"),
    Column("processes", "", "int", "processes with a compute context"),
    Column("gpm_sm_pct", "%", "float", "SMs busy since the tick before (GPM, Hopper and later)"),
    Column("gpm_occupancy_pct", "%", "float", "warps resident of those possible (GPM)"),
    Column("gpm_tensor_pct", "%", "float", "tensor cores busy (GPM)"),
    Column("gpm_dram_pct", "%", "float", "memory bandwidth in use (GPM)"),
)

PROCESS: Table = (
    *TICK,
    Column("pid", "", "int", "process"),
    Column("ppid", "", "int", "its parent; children of a watched process carry its role and name"),
    Column("role", "", "str", "server, client, trainer, profiler, launcher ...; server+trainer: one process"),
    Column("name", "", "str", "which one"),
    Column(
        "cpu_ns",
        "ns",
        "int",
        "on a core, all threads, from schedstat; user + system where the kernel has none (counter)",
    ),
    Column("cpu_user_ns", "ns", "int", "in user mode, all threads, ended ones included (counter, 10 ms steps)"),
    Column("cpu_system_ns", "ns", "int", "in the kernel, ended threads included (counter, 10 ms steps)"),
    Column("runq_wait_ns", "ns", "int", "ready but waiting for a core, summed over the threads (counter)"),
    Column("ctx_voluntary", "", "int", "times a thread gave its core up, summed over the threads (counter)"),
    Column("ctx_involuntary", "", "int", "times a thread lost its core, summed over the threads (counter)"),
    Column("threads", "", "int", "threads now"),
    Column("rss_mib", "MiB", "float", "resident memory, shared pages included"),
    Column("major_faults", "", "int", "page faults that needed a disk (counter)"),
    Column("gpu", "", "str", "GPUs it has a context on, joined by +"),
    Column("gpu_mem_mib", "MiB", "float", "device memory it holds, over its GPUs"),
    Column("gpu_sm_pct", "%", "float", "SM utilisation NVML attributes to it, summed over its GPUs"),
    Column("gpu_busy_ns", "ns", "int", "GPU engine time from DRM fdinfo (counter)"),
    Column("gpu_attr", "", "str", "how its share of the GPU is known: fdinfo, nvml_sm, exclusive, or empty"),
    Column("gpu_note", "", "str", "clamped: NVML reported more than 100 %"),
)
