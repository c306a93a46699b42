"""How OpenMP threads wait between parallel regions.

libgomp spins by default: after each region of the trainer its threads burn 3 to 4 ms of the core a request could
have had. PASSIVE makes them sleep; it must be in the environment before the library is loaded. Sleeping at once costs a
trainer of small layers a fifth of its speed (0.79 is left, resnet18 at 32 px on two cores); with a quarter of a
millisecond of spinning first, longer than the gap between two layers, 0.95 is left.
"""

from __future__ import annotations

WAIT_POLICY = "OMP_WAIT_POLICY"
SPINS = "GOMP_SPINCOUNT"
SHORT = "10000"


def waiting(passive: bool) -> dict[str, str]:
    """Environment of a process whose OpenMP threads soon sleep (passive) or are left as they are."""
    return {WAIT_POLICY: "PASSIVE", SPINS: SHORT} if passive else {}
