"""How property tests draw their examples: the same ones in every run, other ones under `make fuzz`.

A suite that decides whether a change is good must give the same answer twice. New examples are looked for apart
from it; what they find becomes an `@example` of its test. Neither a deadline nor "too slow" may fail a test: they
measure the machine.
"""

from __future__ import annotations

from hypothesis import HealthCheck, settings

UNTIMED = settings(deadline=None, print_blob=True, suppress_health_check=[HealthCheck.too_slow])

settings.register_profile("suite", UNTIMED, derandomize=True)
settings.register_profile("fuzz", UNTIMED, derandomize=False)
settings.load_profile("suite")
