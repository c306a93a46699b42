"""Rules of energy: counters that wrap, and sharing out without a remainder."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from corun.profile.energy import marginal_mj_per_request, share_energy
from corun.profile.rapl import Rapl, Unwrapped
from corun.profile.source import Row, Unavailable
from corun.testing.sysfs import FakeMachine


def read(source: Rapl) -> Row:
    """The cells of one reading."""
    row: Row = {}
    source.read(row)
    return row


@given(st.integers(1, 10**12), st.integers(0, 10**12), st.lists(st.integers(0, 10**12), max_size=20))
def test_a_counter_that_wraps_is_made_to_grow(limit: int, first: int, steps: list[int]) -> None:
    """As long as less than one range is used between two readings, the unwrapped counter is exact."""
    true = first % (limit + 1)
    counter = Unwrapped(limit)
    assert counter.add(true) == true
    for step in steps:
        true += step % (limit + 1)
        assert counter.add(true % (limit + 1)) == true


def test_every_domain_has_its_column(tmp_path: Path) -> None:
    """Packages and their parts are named after the kernel's names, a part with its package before it."""
    machine = FakeMachine(tmp_path).rapl("0", "package-0", 10).rapl("0:0", "core", 20).rapl("1", "package-1", 30)
    source = Rapl(machine.root)
    expected = {"rapl_package_0_uj": 10, "rapl_package_0_core_uj": 20, "rapl_package_1_uj": 30}
    assert read(source) == expected
    assert [column.name for column in source.columns] == list(expected)


def test_a_wrap_between_two_ticks_is_undone(tmp_path: Path) -> None:
    """The kernel's counter starts over at its range; the column goes on."""
    machine = FakeMachine(tmp_path).rapl("0", "package-0", 995, range_uj=999)
    source = Rapl(machine.root)
    machine.rapl("0", "package-0", 5, range_uj=999)
    assert read(source) == {"rapl_package_0_uj": 1005}


def test_without_rapl_the_source_is_unavailable(tmp_path: Path) -> None:
    """No powercap, no energy: the reason names the place."""
    with pytest.raises(Unavailable, match="intel-rapl"):
        Rapl(tmp_path)


def test_a_domain_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    """One domain less is told, the others are read."""
    machine = FakeMachine(tmp_path).rapl("0", "package-0", 10).rapl("1", "package-1", 10)
    machine.write("/sys/class/powercap/intel-rapl:1/energy_uj", "")
    source = Rapl(machine.root)
    assert "rapl_package_1_uj" in source.status().absent
    assert read(source) == {"rapl_package_0_uj": 10}


amounts = st.floats(0, 1e9, allow_nan=False)


@given(amounts, st.integers(0, 10**12), amounts, st.dictionaries(st.integers(), amounts, max_size=6))
def test_nothing_is_lost(delta_mj: float, window_ns: int, idle_mw: float, shares: dict[int, float]) -> None:
    """Idle + processes + unattributed is the device's delta, and no part is negative."""
    parts = share_energy(delta_mj, window_ns, idle_mw, shares)
    assert parts.total_mj == pytest.approx(delta_mj, rel=1e-9, abs=1e-6)
    assert min([parts.idle_mj, parts.unattributed_mj, *parts.processes_mj.values()]) >= 0
    assert set(parts.processes_mj) == set(shares)


def test_the_active_part_follows_the_shares() -> None:
    """100 J over 10 s with 4 W idle: 60 J are shared 3 : 1."""
    parts = share_energy(100_000, 10_000_000_000, 4_000, {"server": 60, "trainer": 20})
    assert (parts.idle_mj, parts.unattributed_mj) == (40_000, 0)
    assert parts.processes_mj == {"server": 45_000, "trainer": 15_000}


def test_without_a_share_the_energy_is_nobodys() -> None:
    """When nobody is known to have worked, the active part is unattributed, not divided evenly."""
    parts = share_energy(100, 0, 0, {"server": 0.0})
    assert (parts.processes_mj, parts.unattributed_mj) == ({"server": 0.0}, 100)


def test_idle_never_takes_more_than_there_is() -> None:
    """An idle power measured too high leaves nothing to share, not a negative rest."""
    assert share_energy(10, 10**9, 20, {"a": 1.0}).processes_mj == {"a": 0.0}


@pytest.mark.parametrize("bad", [(-1, 0, 0), (0, -1, 0), (0, 0, -1)])
def test_negative_amounts_are_refused(bad: tuple[float, int, float]) -> None:
    """A counter that went backwards is a mistake of the caller."""
    with pytest.raises(ValueError, match="negative"):
        share_energy(*bad, {})
    with pytest.raises(ValueError, match="negative"):
        share_energy(1, 1, 1, {"a": -0.1})


def test_marginal_energy_needs_a_request() -> None:
    """Extra energy per completed request; nothing completed has no answer."""
    assert marginal_mj_per_request(500, 300, 4) == 50
    assert marginal_mj_per_request(500, 300, 0) is None
