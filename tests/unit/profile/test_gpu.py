"""Rules of the GPU rows and of attribution: the real nvidia-ml-py over a fake library."""

from __future__ import annotations

import importlib.metadata
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType

import pytest

from corun.profile import nvml
from corun.profile.gpu import Gpus, GpuUse
from corun.profile.nvml import Nvml, driver_problem, load_binding
from corun.profile.source import Faults, Row, Unavailable
from corun.profile.tables import GPU
from corun.run.records import names
from corun.testing.nvml import GPU_IS_LOST, INSUFFICIENT_SIZE, NOT_SUPPORTED, SUCCESS, FakeGpu, FakeNvml, installed

NOW_US = 1_800_000_000_000_000
FIELDS = {186: 111, 185: 222, 74: 1, 76: 2, 269: 3, 270: 4, 271: 5, 197: 1 << 40, 198: 7}


class Bench:
    """Open GPUs on a fake library, at a wall clock that the test moves."""

    def __init__(self, library: FakeNvml) -> None:
        self.library = library
        self.now_us = NOW_US
        self.faults = Faults()
        self.gpus = Gpus(self.faults, lambda: self.now_us * 1000)

    def row(self) -> Row:
        """The row of the first GPU."""
        return self.gpus.read()[0][0]

    def uses(self) -> dict[int, GpuUse]:
        """What the processes use."""
        return self.gpus.read()[1]


@contextmanager
def bench(*gpus: FakeGpu, missing: tuple[str, ...] = (), driver: str = "580.65.06") -> Iterator[Bench]:
    """GPUs on a fake library."""
    with installed(FakeNvml(gpus, missing, driver)) as library:
        opened = Bench(library)
        yield opened
        opened.gpus.close()


def test_a_row_holds_what_nvml_says() -> None:
    """Units are NVML's own; field values come by their type; every column is one of gpu.csv."""
    with bench(FakeGpu(fields=FIELDS, mem_used=3 << 29, gpm={2: 61.23456, 3: 30.0, 5: 12.5, 10: 44.0})) as on:
        row = on.row()
    assert set(row) == set(names(GPU)) - {"arm", "repeat", "segment", "tick", "t_ns"}
    assert (row["power_mw"], row["power_instant_mw"], row["power_average_mw"]) == (100_000, 111, 222)
    assert (row["energy_mj"], row["power_limit_mw"], row["throttle_reasons"]) == (1_000_000, 300_000, 4)
    assert (row["util_gpu_pct"], row["util_mem_pct"]) == (50, 20)
    assert (row["mem_used_mib"], row["mem_total_mib"]) == (1536.0, 16384.0)
    assert (row["sm_clock_mhz"], row["mem_clock_mhz"], row["temp_c"]) == (1500, 5000, 60)
    assert (row["throttle_power_ns"], row["throttle_brake_ns"], row["pcie_tx_bytes"]) == (1, 5, 1 << 40)
    assert (row["gpm_sm_pct"], row["gpm_dram_pct"], row["processes"]) == (61.235, 44.0, 0)
    assert on.faults.total == 0


def test_what_a_gpu_cannot_do_is_named_once_and_empty_ever_after() -> None:
    """Not supported, or unknown to an old driver: absent with the reason, never 0 and never a fault."""
    gpu = FakeGpu(fields={74: 9}, failing={"nvmlDeviceGetTotalEnergyConsumption": NOT_SUPPORTED})
    with bench(gpu, missing=("nvmlDeviceGetPowerUsage", "nvmlGpmQueryDeviceSupport")) as on:
        absent = on.gpus.status().absent
        row = on.row()
        asked = dict(on.library.calls)
        on.row()
        assert on.library.calls["nvmlDeviceGetTotalEnergyConsumption"] == asked["nvmlDeviceGetTotalEnergyConsumption"]
    assert not {"energy_mj", "power_mw", "pcie_tx_bytes", "gpm_sm_pct"} & set(row)
    assert row["throttle_power_ns"] == 9
    assert "Not Supported" in absent["gpu0 energy_mj"]
    assert "Function Not Found" in absent["gpu0 power_mw"]
    assert "Not Supported" in absent["gpu0 pcie_tx_bytes"]
    assert "Function Not Found" in absent["gpu0 gpm"]
    assert on.faults.total == 0


def test_an_old_driver_is_asked_in_its_own_words() -> None:
    """Renamed calls fall back to their old name: temperature, throttle reasons, memory, process list."""
    old = (
        "nvmlDeviceGetTemperatureV",
        "nvmlDeviceGetCurrentClocksEventReasons",
        "nvmlDeviceGetMemoryInfo_v2",
        "nvmlDeviceGetComputeRunningProcesses_v3",
    )
    with bench(FakeGpu(processes={7: 1 << 20}), missing=old) as on:
        row = on.row()
        assert not {"gpu0 temp_c", "gpu0 throttle_reasons", "gpu0 memory"} & set(on.gpus.status().absent)
    assert (row["temp_c"], row["throttle_reasons"], row["mem_used_mib"], row["processes"]) == (60, 4, 1024.0, 1)


def test_a_reading_that_fails_is_empty_and_counted() -> None:
    """A lost GPU does not look like an idle one: empty cells and faults, and the other GPU goes on.

    Only the power limit stays, a setting that is asked for once a minute.
    """
    lost, well = FakeGpu(fields=FIELDS, energy_mj=5), FakeGpu(energy_mj=6)
    with bench(lost, well) as on:
        everything = (name for name in dir(FakeNvml) if name.startswith("_nvmlDeviceGet"))
        lost.failing = dict.fromkeys((name[1:] for name in everything), GPU_IS_LOST)
        rows, _ = on.gpus.read()
    assert {key for key, value in rows[0].items() if value is not None} == {"gpu", "power_limit_mw"}
    assert rows[1]["energy_mj"] == 6
    assert on.faults.by_source["gpu0 energy_mj"] == 1
    assert on.faults.by_source["gpu0 processes"] == 1


def test_a_failing_field_costs_only_its_own_cell() -> None:
    """One field value that fails later is one fault; the others of the same call stay."""
    gpu = FakeGpu(fields=dict(FIELDS))
    with bench(gpu) as on:
        del gpu.fields[197]
        row = on.row()
    assert "pcie_tx_bytes" not in row
    assert row["pcie_rx_bytes"] == 7
    assert on.faults.by_source["gpu0 pcie_tx_bytes"] == 1


def test_the_power_limit_is_asked_for_once_a_minute() -> None:
    """It is a setting: sixty ticks share one call."""
    with bench(FakeGpu()) as on:
        before = on.library.calls["nvmlDeviceGetEnforcedPowerLimit"]
        for _ in range(120):
            on.row()
        assert on.library.calls["nvmlDeviceGetEnforcedPowerLimit"] - before == 2


def test_sm_share_is_the_newest_sample_of_each_process() -> None:
    """Several samples of one process: the newest counts; memory comes from the process list."""
    gpu = FakeGpu(processes={7: 1 << 30, 8: 1 << 29})
    with bench(gpu) as on:
        gpu.samples = [(7, NOW_US + 1, 10), (7, NOW_US + 3, 61), (7, NOW_US + 2, 20), (8, NOW_US + 1, 5)]
        uses = on.uses()
    assert uses == {7: GpuUse("0", 1024.0, 61, "nvml_sm"), 8: GpuUse("0", 512.0, 5, "nvml_sm")}


def test_nobody_active_is_zero_for_those_on_the_gpu() -> None:
    """NVML answers "not found" when nobody was active: a process on the GPU then had 0 %, without a fault."""
    with bench(FakeGpu(processes={7: 1 << 30})) as on:
        assert on.uses() == {7: GpuUse("0", 1024.0, 0, "nvml_sm")}
    assert on.faults.total == 0


def test_success_without_samples_is_nobody_active() -> None:
    """Some drivers answer success where the binding expects to be asked for a buffer; that is no error."""
    with bench(FakeGpu(processes={7: 1 << 20}, failing={"nvmlDeviceGetProcessUtilization": SUCCESS})) as on:
        assert on.uses()[7].sm_pct == 0
    assert on.faults.total == 0


def test_samples_are_asked_for_since_the_newest_one_seen() -> None:
    """The first question goes back one second, never to 0; later ones start at the newest sample."""
    gpu = FakeGpu(processes={7: 0})
    with bench(gpu) as on:
        gpu.samples = [(7, NOW_US + 500, 10)]
        on.uses()
        on.now_us += 1_000_000
        on.uses()
        assert on.library.asked_since_us[0] == NOW_US - 1_000_000
        assert on.library.asked_since_us[-1] == NOW_US + 500


def test_junk_samples_are_dropped_and_told() -> None:
    """Samples without a process or from the future are the driver's padding; they do not move the stamp."""
    gpu = FakeGpu(processes={7: 0})
    with bench(gpu) as on:
        gpu.samples = [(0, NOW_US + 1, 50), (7, NOW_US + 10**12, 50), (7, NOW_US + 2, 30)]
        assert on.uses()[7].sm_pct == 30
        on.uses()
        assert on.library.asked_since_us[-1] == NOW_US + 2
    assert on.faults.by_source["gpu0 nvml_sm"] >= 1


def test_more_than_all_is_clamped_and_flagged() -> None:
    """More than 100 % is the driver's mistake: the cell says 100 and the note says so."""
    gpu = FakeGpu(processes={7: 0})
    with bench(gpu) as on:
        gpu.samples = [(7, NOW_US + 1, 4_000_000)]
        use = on.uses()[7]
    assert (use.sm_pct, use.note) == (100, "clamped")
    assert use.cells()["gpu_note"] == "clamped"


def test_the_only_process_has_the_whole_gpu() -> None:
    """Without process samples (MIG, some boards) one process alone is `exclusive`, several are unknown."""
    gpu = FakeGpu(processes={7: 1 << 20}, failing={"nvmlDeviceGetProcessUtilization": NOT_SUPPORTED})
    with bench(gpu) as on:
        assert "gpu0 nvml_sm" in on.gpus.status().absent
        assert on.uses() == {7: GpuUse("0", 1.0, 50, "exclusive")}
        gpu.processes[8] = None
        assert on.uses() == {7: GpuUse("0", 1.0), 8: GpuUse("0", None)}
        assert on.uses()[8].cells() == {
            "gpu": "0",
            "gpu_mem_mib": None,
            "gpu_sm_pct": None,
            "gpu_attr": "",
            "gpu_note": "",
        }


def test_a_process_on_two_gpus_is_one_row() -> None:
    """Memory and share are added, and the GPUs are named."""
    gpus = [FakeGpu(processes={7: 1 << 20}), FakeGpu(processes={7: 2 << 20})]
    with bench(*gpus) as on:
        gpus[0].samples, gpus[1].samples = [(7, NOW_US + 1, 30)], [(7, NOW_US + 1, 40)]
        assert on.uses() == {7: GpuUse("0+1", 3.0, 70, "nvml_sm")}


def test_the_facts_of_a_gpu_are_told_once() -> None:
    """Name, identity, limit and driver stand in the status, for profiler.json."""
    with bench(FakeGpu(name="H", uuid="GPU-1")) as on:
        details = on.gpus.status().details
    assert details["driver"] == "580.65.06"
    assert details["gpu0"] == {"name": "H", "uuid": "GPU-1", "power_limit_mw": 300_000, "mig_mode": [0, 0]}


def test_drivers_with_wrong_process_lists_are_named() -> None:
    """535.43 to 535.86 list wrong processes; others do not."""
    assert driver_problem("535.54.03")
    assert not driver_problem("535.104.05")
    assert not driver_problem("")
    with bench(FakeGpu(), driver="535.86.05") as on:
        assert "wrong processes" in str(on.gpus.status().details["warning"])


def test_without_a_gpu_nvml_is_unavailable() -> None:
    """No device, or none that answers: the reason is NVML's."""
    with installed(FakeNvml([])), pytest.raises(Unavailable, match="no GPU"):
        Gpus(Faults())
    library = FakeNvml([FakeGpu()])
    library.failing["nvmlDeviceGetCount_v2"] = GPU_IS_LOST
    with installed(library), pytest.raises(Unavailable, match="lost"):
        Gpus(Faults())


def test_nvml_that_does_not_start_is_unavailable() -> None:
    """A driver that is not loaded is a reason, not a traceback."""
    library = FakeNvml([FakeGpu()])
    library.failing["nvmlInitWithFlags"] = 9
    with installed(library), pytest.raises(Unavailable, match="Driver Not Loaded"):
        Nvml()


def test_an_error_of_this_moment_does_not_rule_a_reading_out() -> None:
    """Only what can never work is given up; a reading that fails at the probe is tried again."""
    gpu = FakeGpu(failing={"nvmlDeviceGetPowerUsage": GPU_IS_LOST})
    with bench(gpu) as on:
        gpu.failing.clear()
        assert on.row()["power_mw"] == 100_000
    assert on.faults.total == 1


def test_a_call_the_binding_does_not_know_is_not_here() -> None:
    """An older nvidia-ml-py lacks a name; that is the same as an older driver."""
    with installed(FakeNvml([FakeGpu()])) as library:
        opened = Nvml()
        with pytest.raises(nvml.NotHere, match="does not know it"):
            opened.call("nvmlDeviceGetTheMeaningOfLife")
        library.failing["nvmlDeviceGetCount_v2"] = INSUFFICIENT_SIZE
        with pytest.raises(nvml.NvmlFault, match="Insufficient"):
            opened.call("nvmlDeviceGetCount")


def test_another_package_called_pynvml_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """The unofficial binding is told apart by what it lacks; no binding at all is a reason too."""
    monkeypatch.setitem(sys.modules, "pynvml", ModuleType("pynvml"))
    with pytest.raises(Unavailable, match="install nvidia-ml-py"):
        load_binding()
    monkeypatch.setitem(sys.modules, "pynvml", None)
    with pytest.raises(Unavailable, match="not installed"):
        load_binding()


def test_the_redirector_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    """The deprecated distribution `pynvml` beside nvidia-ml-py is a problem that is named."""
    monkeypatch.setattr(importlib.metadata, "distribution", lambda name: object())
    assert "uninstall pynvml" in nvml.binding_problem()
