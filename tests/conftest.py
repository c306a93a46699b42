"""What holds for every test: a property has no time limit of its own, for the machine may stand still at any moment."""

from __future__ import annotations

from hypothesis import HealthCheck, settings

settings.register_profile("corun", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("corun")
