"""The method of the GPU table on a CPU: sets of processes, one of them a single process, measured in turns."""

from __future__ import annotations

import pytest
from bench.sharing import figures
from bench.sharing_sets import Settings, measure_sets

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]


def test_sets_are_measured_in_turns_and_the_rest_is_refused() -> None:
    """Separate processes switched between two policies, one process beside them: a row each, ratios to the same
    baselines; what needs a GPU has its reasons instead of a row."""
    settings = Settings(
        "squeezenet1_1",
        "squeezenet1_1",
        "cpu",
        4,
        seconds=1.5,
        repeats=1,
        image_size=64,
        train_size=32,
        utilisation=0.1,
    )
    measured = measure_sets(settings, ["none", "preempt", "one_process", "stream_priority", "memory_cap"])
    assert set(measured.cells) == {"alone", "train", "none", "preempt", "one_process"}
    found = figures(measured)
    for name in ("none", "preempt", "one_process"):
        assert found["policies"][name]["train_x"] > 0
        assert found["policies"][name]["requests"] > 5
    assert len({found["policies"][name]["requests"] for name in ("none", "preempt", "one_process")}) == 1
    assert any("not on a GPU" in reason for reason in found["refused"]["stream_priority"])
    assert not any("separate processes" in reason for reason in found["refused"]["stream_priority"])
    assert "memory_cap" in found["refused"]
    assert 0 < measured.utilisation < 1
