"""Rules of device.json: both forms, discovery, values and all errors at once."""

from __future__ import annotations

import contextlib
import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from corun.errors import InputError
from corun.profile.device import Device, value_of
from corun.profile.device_file import DeviceFile, Reading, load, parse
from corun.profile.patterns import expand, slug, tidy
from corun.profile.source import Cell, Faults, Row, Unavailable
from corun.testing.sysfs import FakeMachine

ROOT = Path(__file__).resolve().parents[3]


def row_of(device: Device) -> Row:
    """The cells of one reading."""
    row: Row = {}
    device.read(row)
    return row


def opened(machine: FakeMachine, *readings: dict[str, object]) -> Device:
    """A device in the pattern form on a fake machine."""
    return Device(parse({"readings": list(readings)}), machine.root, Faults())


def original(cores: int = 16, zones: int = 7) -> dict[str, object]:
    """The published research code's device.json."""
    cpufreq = "/sys/devices/system/cpu/cpu{n}/cpufreq/scaling_"
    names = {
        "freq_min": "min_freq",
        "freq_now": "cur_freq",
        "freq_max": "max_freq",
        "available_freq": "available_frequencies",
        "governor": "governor",
        "setspeed": "setspeed",
        "available_governor": "available_governors",
    }
    mali = "/sys/class/misc/mali0/device/"
    battery = "/sys/class/power_supply/battery/"
    return {
        "cpu": {
            f"cpu{n}": {key: cpufreq.replace("{n}", str(n)) + file for key, file in names.items()} | {"temp": ""}
            for n in range(cores)
        },
        "gpu": {
            "freq": mali + "clock",
            "temp": "",
            "usage": mali + "utilization",
            "setfreq": "",
            "governor": mali + "dvfs",
            "available_freq": "",
            "available_governor": mali + "dvfs_governor",
        },
        "battery": {
            "cap": battery + "capacity",
            "cur": battery + "current_now",
            "vol": battery + "voltage_now",
            "temp": battery + "temp",
        },
        "thermal": {f"thermal_zone{n}": f"/sys/class/thermal/thermal_zone{n}/temp" for n in range(zones)},
        "other": {"net_info": "/proc/net/dev", "mem_info": "/proc/meminfo"},
    }


def test_numbers_are_discovered_in_their_order(tmp_path: Path) -> None:
    """{n} finds every core there is, cpu2 before cpu10, whatever their number."""
    machine = FakeMachine(tmp_path)
    for core in (10, 2, 0):
        machine.core(core, 1000 * core)
    path = "/sys/devices/system/cpu/cpu{n}/cpufreq/scaling_cur_freq"
    device = opened(machine, {"column": "cpu{n}_khz", "path": path, "unit": "kHz"})
    assert [column.name for column in device.columns] == ["cpu0_khz", "cpu2_khz", "cpu10_khz"]
    assert row_of(device) == {"cpu0_khz": 0, "cpu2_khz": 2000, "cpu10_khz": 10000}


def test_the_zone_type_is_stored(tmp_path: Path) -> None:
    """Zone numbers move between boots: the type stands in the column and in the status."""
    machine = FakeMachine(tmp_path).thermal_zone(0, "x86_pkg_temp", 45000).thermal_zone(1, "gpu-thermal", 50500)
    zone = "/sys/class/thermal/thermal_zone{n}"
    device = opened(machine, {"column": "thermal_{n}_{label}_mc", "path": f"{zone}/temp", "label": f"{zone}/type"})
    assert row_of(device) == {"thermal_0_x86_pkg_temp_mc": 45000, "thermal_1_gpu_thermal_mc": 50500}
    details = device.status().details["thermal_1_gpu_thermal_mc"]
    assert isinstance(details, dict)
    assert details["type"] == "gpu-thermal"


def test_two_values_in_one_file(tmp_path: Path) -> None:
    """`47@200000000Hz` is two readings with a regular expression each."""
    machine = FakeMachine(tmp_path).write("/sys/class/devfreq/fb000000.gpu/load", "47@200000000Hz\n")
    path = "/sys/class/devfreq/{name}.gpu/load"
    device = opened(
        machine,
        {"column": "gpu_load_pct", "path": path, "regex": "^(\\d+)@"},
        {"column": "gpu_clock_mhz", "path": path, "regex": "@(\\d+)Hz", "scale": 1e-6},
    )
    assert row_of(device) == {"gpu_load_pct": 47, "gpu_clock_mhz": 200}


def test_a_condition_chooses_the_device(tmp_path: Path) -> None:
    """only_if reads where another file fits, a device-tree text with its closing NUL included."""
    machine = FakeMachine(tmp_path)
    for name, kind in (("17000000.gv11b", "gv11b\x00"), ("1d84000.ufs", "ufs\x00")):
        machine.write(f"/sys/class/devfreq/{name}/device/of_node/name", kind)
        machine.write(f"/sys/class/devfreq/{name}/device/load", "420")
    condition = {"path": "/sys/class/devfreq/{name}/device/of_node/name", "matches": "gv11b|gp10b"}
    reading = {
        "column": "gpu_pct",
        "path": "/sys/class/devfreq/{name}/device/load",
        "scale": 0.1,
        "only_if": condition,
    }
    assert row_of(opened(machine, reading)) == {"gpu_pct": 42}


def test_files_that_would_share_a_column_are_numbered(tmp_path: Path) -> None:
    """A pattern whose column does not tell its files apart numbers them; no value is lost."""
    machine = FakeMachine(tmp_path).write("/sys/a/one/v", "1").write("/sys/a/two/v", "2")
    assert row_of(opened(machine, {"column": "v", "path": "/sys/a/{name}/v"})) == {"v": 1, "v_2": 2}


def test_a_text_is_kept_as_text(tmp_path: Path) -> None:
    """A governor is a word."""
    machine = FakeMachine(tmp_path).write("/sys/g", "schedutil\n")
    device = opened(machine, {"column": "governor", "path": "/sys/g", "kind": "text"})
    assert row_of(device) == {"governor": "schedutil"}
    assert device.columns[0].kind == "str"


def test_a_reading_that_fails_later_is_its_own_empty_cell(tmp_path: Path) -> None:
    """One bad text is one fault; the other readings stay."""
    machine = FakeMachine(tmp_path).write("/sys/a", "1").write("/sys/b", "2")
    faults = Faults()
    readings = [{"column": "a", "path": "/sys/a"}, {"column": "b", "path": "/sys/b"}]
    device = Device(parse({"readings": readings}), machine.root, faults)
    machine.write("/sys/a", "<unsupported>\n")
    assert row_of(device) == {"b": 2}
    assert faults.by_source["device a"] == 1


def test_what_is_not_here_is_named(tmp_path: Path) -> None:
    """Absent readings have a reason; with none left the source is unavailable; `required` ones stop the start."""
    machine = FakeMachine(tmp_path).write("/sys/a", "1").write("/sys/text", "no number")
    missing: dict[str, object] = {"column": "b", "path": "/sys/b"}
    device = opened(machine, {"column": "a", "path": "/sys/a"}, missing, {"column": "c", "path": "/sys/text"})
    assert device.status().absent["b"] == "no /sys/b"
    assert "no number" in device.status().absent["c"]
    with pytest.raises(Unavailable, match="none of the 1 readings"):
        opened(machine, missing)
    with pytest.raises(InputError, match="b: nothing at /sys/b"):
        opened(machine, {"column": "a", "path": "/sys/a"}, missing | {"required": True})


def test_one_of_several_alternatives_is_enough(tmp_path: Path) -> None:
    """Readings of different vendors may share a column; the one that is here is not called absent."""
    machine = FakeMachine(tmp_path).write("/sys/two", "2")
    device = opened(machine, {"column": "v", "path": "/sys/one"}, {"column": "v", "path": "/sys/two"})
    assert row_of(device) == {"v": 2}
    assert device.status().absent == {}


def test_the_originals_file_is_read_as_it_is(tmp_path: Path) -> None:
    """Frequencies, GPU, battery and thermal zones are read; settings are known and skipped."""
    machine = FakeMachine(tmp_path).core(0, 1800000).core(15, 2400000).thermal_zone(0, "battery", 31000)
    machine.write("/sys/class/misc/mali0/device/utilization", "47\n").write(
        "/sys/class/misc/mali0/device/clock", "572\n"
    )
    machine.write("/sys/class/power_supply/battery/current_now", "-120000\n")
    device = Device(parse(original()), machine.root, Faults())
    assert row_of(device) == {
        "cpu0_khz": 1800000,
        "cpu15_khz": 2400000,
        "gpu_freq": 572,
        "gpu_usage_pct": 47,
        "battery_current_ua": -120000,
        "thermal_0_battery_mc": 31000,
    }
    assert len(parse(original()).readings) == 16 + 2 + 4 + 7


def test_the_originals_file_may_have_any_number_of_cores() -> None:
    """17 cores and more were a KeyError in the original; here each core in the file is a reading."""
    assert len(parse(original(cores=64, zones=0)).readings) == 64 + 2 + 4


def test_all_mistakes_are_listed_at_once() -> None:
    """Every problem of the file stands in one error, with its place and a suggestion for near misses."""
    content = {
        "roots": "/",
        "root": "sys",
        "readings": [
            {"column": "Cpu khz", "path": "sys/x", "scale": "1"},
            {"colunm": "a", "column": "a", "path": "/a", "regex": "(", "required": 1},
            {"column": "b_{n}", "path": "/b", "regex": "no group"},
            {"column": "c_{n}", "path": "/c"},
            {"column": "c_{label}", "path": "/c"},
            {"column": "d", "path": "/d", "kind": "txt", "only_if": {"path": "/x/{n}"}},
            {"column": "t_ns", "path": "/e"},
            7,
        ],
    }
    with pytest.raises(InputError) as caught:
        parse(content)
    text = "\n".join(caught.value.problems)
    for wanted in (
        'roots: unknown key; did you mean "root"?',
        'root: must be an absolute directory, not "sys"',
        "readings[0].column: must be lower case",
        'readings[0].path: must be an absolute path, not "sys/x"',
        "readings[0].scale: must be a number",
        'readings[1].colunm: unknown key; did you mean "column"?',
        'readings[1].regex: "(" is not a regular expression',
        "readings[1].required: must be true or false",
        'readings[2].regex: "no group" needs a group',
        "readings[3]: {n} does not stand in path",
        "readings[4]: {label} does not stand in path; give a label file",
        'readings[5].kind: must be number or text, not "txt"',
        "readings[5].only_if.matches: is missing",
        'readings[6].column: "t_ns" is a column of the profiler itself',
        "readings[7]: must be an object, not int",
    ):
        assert wanted in text


def test_mistakes_in_the_originals_form_are_listed_too() -> None:
    """Unknown keys of the nested form are errors with a suggestion, at every level."""
    content = original(cores=1, zones=1) | {"baterry": {}, "other": {"net": ""}}
    content["cpu"] = {"cpu0": {"freq_no": "/x"}, "core1": {}, "cpu2": 5}
    content["thermal"] = {"zone": "/x", "thermal_zone1": "relative"}
    with pytest.raises(InputError) as caught:
        parse(content)
    text = "\n".join(caught.value.problems)
    for wanted in (
        'baterry: unknown key; did you mean "battery"?',
        'cpu.cpu0.freq_no: unknown key; did you mean "freq_now"?',
        "cpu.core1: unknown key",
        "cpu.cpu2: must be an object",
        "thermal.zone: unknown key",
        "thermal.thermal_zone1: must be an absolute path",
        "other.net: unknown key",
    ):
        assert wanted in text


@pytest.mark.parametrize(
    ("text", "wanted"),
    [("{", "is not JSON"), ("[]", "must hold a JSON object"), ("\xff", "is not UTF-8"), (None, "cannot read")],
)
def test_a_file_that_is_no_json_says_where(tmp_path: Path, text: str | None, wanted: str) -> None:
    """A file that cannot be read or parsed is one sentence with its path."""
    path = tmp_path / "device.json"
    if text is not None:
        path.write_bytes(text.encode("latin-1"))
    with pytest.raises(InputError, match=wanted):
        load(path)


def test_the_file_in_the_repository_is_valid() -> None:
    """device.json of the checkout loads and has no reading twice."""
    device = load(ROOT / "device.json")
    assert len({(reading.column, reading.path) for reading in device.readings}) == len(device.readings) > 10


@pytest.mark.parametrize(
    ("text", "reading", "value"),
    [
        ("47", Reading("a", "/a"), 47),
        ("47000", Reading("a", "/a", scale=0.001), 47),
        ("47500", Reading("a", "/a", scale=0.001), 47.5),
        ("-3.5", Reading("a", "/a"), -3.5),
        ("47 %", Reading("a", "/a", regex=r"(\d+)"), 47),
    ],
)
def test_values_are_scaled(text: str, reading: Reading, value: Cell) -> None:
    """regex, then number, then scale; whole numbers stay whole."""
    assert value_of(text, reading) == value


@pytest.mark.parametrize("text", ["", "nan", "inf", "on"])
def test_what_is_no_number_is_refused(text: str) -> None:
    """No number, no cell."""
    with pytest.raises(ValueError, match=r"number|could not convert"):
        value_of(text, Reading("a", "/a"))


@given(
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.text(max_size=5),
        lambda inner: (
            st.lists(inner, max_size=3)
            | st.dictionaries(
                st.sampled_from(
                    ["readings", "column", "path", "root", "cpu", "cpu0", "gpu", "thermal", "only_if", "x"]
                ),
                inner,
                max_size=4,
            )
        ),
        max_leaves=12,
    )
)
def test_any_json_is_a_device_file_or_an_input_error(content: object) -> None:
    """Whatever stands in the file, the answer is a DeviceFile or a list of problems, never a traceback."""
    json.dumps(content)
    with contextlib.suppress(InputError):
        assert isinstance(parse(content), DeviceFile)


def test_a_placeholder_used_twice_is_the_same_text(tmp_path: Path) -> None:
    """hwmon2/x2 fits /hwmon{n}/x{n}; hwmon2/x3 does not."""
    FakeMachine(tmp_path).write("/hwmon2/x2", "").write("/hwmon2/x3", "").write("/hwmon2/x2y", "")
    assert [match.path.name for match in expand(tmp_path, "/hwmon{n}/x{n}")] == ["x2"]
    assert [match.values for match in expand(tmp_path, "/hwmon{n}/x{m}")] == [
        {"n": "2", "m": "2"},
        {"n": "2", "m": "3"},
    ]


@given(st.text(max_size=20))
def test_any_text_makes_a_column_part(text: str) -> None:
    """A slug has only lower case letters, digits and single underscores inside."""
    made = tidy(slug(text))
    assert made == made.strip("_")
    assert all(character in "abcdefghijklmnopqrstuvwxyz0123456789_" for character in made)
    assert "__" not in made
