"""How OpenMP threads wait between parallel regions.

libgomp spins by default: after each region of the trainer its threads burn 3 to 4 ms of the core a request could
have had. PASSIVE makes them sleep; it must be in the environment before the library is loaded.
"""

from __future__ import annotations

WAIT_POLICY = "OMP_WAIT_POLICY"


def waiting(passive: bool) -> dict[str, str]:
    """Environment of a process whose OpenMP threads sleep (passive) or are left as they are."""
    return {WAIT_POLICY: "PASSIVE"} if passive else {}
