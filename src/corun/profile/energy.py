"""Whose energy it was: a device's counter shared out over processes, with nothing lost.

The counter tells what the device used; nobody measures what a process used. Idle power would have been used
anyway, so only the rest is shared, in proportion to the SM (or engine) time of each process::

    E_i = (E - P_idle * t) * share_i / sum(share)        E_idle + sum(E_i) + E_unattributed = E

When no process is known to have worked, the active part is `unattributed`; the sum is the counter's delta
either way. (Kepler's rule, P_i = P_active * SM_i / sum SM, with the idle part kept apart.)
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from dataclasses import dataclass
from typing import Generic, TypeVar

K = TypeVar("K", bound=Hashable)


@dataclass(frozen=True)
class EnergyShares(Generic[K]):
    """One window's energy in mJ: idle + sum(processes) + unattributed = the device's delta."""

    idle_mj: float
    processes_mj: Mapping[K, float]
    unattributed_mj: float

    @property
    def total_mj(self) -> float:
        return self.idle_mj + sum(self.processes_mj.values()) + self.unattributed_mj


def share_energy(delta_mj: float, window_ns: int, idle_mw: float, shares: Mapping[K, float]) -> EnergyShares[K]:
    """Share out `delta_mj`, the counter's growth over `window_ns`.

    idle_mw is the mean power of a recorded idle stretch (0 = do not keep idle apart); it never takes more than
    there is. shares are SM percent or busy nanoseconds by process, any unit, not negative; ValueError otherwise.
    """
    if delta_mj < 0 or window_ns < 0 or idle_mw < 0 or any(share < 0 for share in shares.values()):
        raise ValueError("energy, window, idle power and shares must not be negative")
    idle_mj = min(delta_mj, idle_mw * window_ns / 1e9)
    active_mj = delta_mj - idle_mj
    whole = sum(shares.values())
    if whole <= 0:
        return EnergyShares(idle_mj, dict.fromkeys(shares, 0.0), active_mj)
    return EnergyShares(idle_mj, {key: active_mj * (share / whole) for key, share in shares.items()}, 0.0)


def marginal_mj_per_request(services_mj: float, alone_train_mj: float, completed: int) -> float | None:
    """Extra energy per completed request against a run that only trained, over windows of equal length.

    None without a completed request.
    """
    return (services_mj - alone_train_mj) / completed if completed else None
