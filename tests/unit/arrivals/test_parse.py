"""Naming arrival processes: parameters, suggestions, config dicts, command-line text, descriptions."""

from __future__ import annotations

import contextlib
import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from corun.arrivals.legacy import Legacy
from corun.arrivals.parse import ALIASES, PROCESSES, describe, from_config, from_text, of_rate, parse
from corun.arrivals.processes import (
    ClosedLoop,
    Constant,
    ExactCount,
    Gamma,
    Mmpp,
    Offline,
    Poisson,
    Process,
    Ramp,
    Sine,
    Step,
)
from corun.arrivals.recorded import MinuteCounts, Replay, Trace
from corun.arrivals.schedule import Stream, make, save
from corun.errors import InputError

NAMED: list[tuple[dict[str, object], Process]] = [
    ({"name": "constant", "rate": 5}, Constant(5.0)),
    ({"name": "poisson", "rate": 10}, Poisson(10.0)),
    ({"name": "gamma", "rate": 10, "shape": 0.5}, Gamma(10.0, 0.5)),
    ({"name": "mmpp", "rate": 10, "on_s": 2, "floor": 0.1}, Mmpp(10.0, 2.0, 4.0, 0.1)),
    ({"name": "burst", "rate": 10}, Mmpp(10.0)),
    ({"name": "sine", "rate": 10, "amplitude": 1, "period_s": 5}, Sine(10.0, 1.0, 5.0)),
    ({"name": "ramp", "first": 0, "last": 9}, Ramp(0.0, 9.0)),
    ({"name": "step", "rate": 10, "high": 40, "from_s": 5, "until_s": 9}, Step(10.0, 40.0, 5.0, 9.0)),
    ({"name": "closed", "streams": 4, "think_s": 0.5}, ClosedLoop(4, 0.5)),
    ({"name": "offline", "count": 100}, Offline(100)),
    ({"name": "saturation", "count": 100.0}, Offline(100)),
    ({"name": "legacy", "rate": 20}, Legacy(20.0)),
    ({"name": "poisson", "rate": 10, "exact": True}, ExactCount(Poisson(10.0))),
    ({"name": "poisson", "rate": 10, "exact": 250}, ExactCount(Poisson(10.0), 250)),
    ({"name": "poisson", "rate": 10, "exact": False}, Poisson(10.0)),
]


@pytest.mark.parametrize(("config", "process"), NAMED)
def test_a_config_dict_names_a_process(config: dict[str, object], process: Process) -> None:
    """`name` and parameters give the process; whole numbers serve where a number is wanted."""
    assert from_config(config) == process
    assert config["name"]


@pytest.mark.parametrize(("config", "process"), NAMED)
def test_command_line_text_means_the_same(config: dict[str, object], process: Process) -> None:
    """`name:key=value,...` is the config dict in one word."""
    pairs = ",".join(f"{key}={json.dumps(value)}" for key, value in config.items() if key != "name")
    assert from_text(f"{config['name']}:{pairs}") == process


def test_text_may_give_the_rate_alone() -> None:
    """`poisson:20` is Poisson at 20/s, as people type it."""
    assert from_text("poisson:20") == Poisson(20.0)
    assert from_text(" gamma:10, shape=2 ") == Gamma(10.0, 2.0)
    assert from_text("closed") == ClosedLoop()


def test_rate_zero_is_the_azure_trace() -> None:
    """The original's convention: 0 means the packaged trace, anything else Poisson."""
    azure = of_rate(0)
    assert isinstance(azure, Trace)
    assert azure.offsets_s.size == 2979
    assert of_rate(12.5) == Poisson(12.5)
    scaled = parse("azure", rate=20)
    assert scaled.rate == pytest.approx(20.0)


def test_traces_are_fitted_to_a_rate(tmp_path: Path) -> None:
    """`rate` changes a trace's mean by compressing time, or by thinning when asked; without it nothing changes."""
    path = tmp_path / "delays.csv"
    path.write_text("0.1\n0.3\n")
    own = parse("trace", path=str(path))
    fast = parse("trace", path=str(path), rate=10)
    thin = parse("trace", path=str(path), rate=1, fit="thin", format="delays")
    assert isinstance(own, Trace)
    assert isinstance(fast, Trace)
    assert isinstance(thin, Trace)
    assert (own.rate, own.keep) == (pytest.approx(5.0), 1.0)
    assert (fast.span_s, fast.rate) == (pytest.approx(0.2), pytest.approx(10.0))
    assert (thin.span_s, thin.keep) == (pytest.approx(0.4), pytest.approx(0.2))


def test_an_earlier_schedule_is_replayed(tmp_path: Path) -> None:
    """`replay` reads a stored schedule's stream; a stream it does not have is refused."""
    schedule = make([Stream(2, Poisson(30.0))], 10.0, seed=1)
    path = tmp_path / "schedule.npy"
    save(schedule, path)
    replay = parse("replay", path=str(path), stream=2)
    assert isinstance(replay, Replay)
    assert np.array_equal(make([Stream(0, replay)], 10.0, seed=5).intended_ns, schedule.intended_ns)
    with pytest.raises(InputError, match="has no stream 0"):
        parse("replay", path=str(path))


REFUSED: list[tuple[str, dict[str, float | int | str | bool], str]] = [
    ("poison", {"rate": 1}, 'did you mean "poisson"'),
    ("xyz", {}, "known: azure, burst"),
    ("poisson", {}, "rate is missing"),
    ("poisson", {"rat": 1}, 'no parameter "rat"; did you mean "rate"'),
    ("poisson", {"rate": "10"}, "rate must be a number, not '10'"),
    ("poisson", {"rate": True}, "rate must be a number, not True"),
    ("poisson", {"rate": 0}, "rate must be above 0"),
    ("offline", {"count": 1.5}, "count must be a whole number"),
    ("trace", {"path": 3}, "path must be text"),
    ("azure", {"rate": 5, "fit": "thinn"}, 'did you mean "thin"'),
    ("gamma", {"rate": 1, "shape": 1, "exact": True}, "an exact count exists for poisson, sine, ramp and step"),
    ("poisson", {"rate": 1, "exact": "yes"}, "count must be a whole number"),
    ("poisson", {"rate": 1, "exact": -3}, "count must be in 0"),
]


@pytest.mark.parametrize(("name", "parameters", "message"), REFUSED)
def test_bad_names_and_parameters_are_refused(
    name: str, parameters: dict[str, float | int | str | bool], message: str
) -> None:
    """The error says which parameter, what was found, and the nearest thing that exists."""
    with pytest.raises(InputError, match=message):
        parse(name, **parameters)


def test_all_parameter_problems_come_at_once() -> None:
    """A misspelt, a missing and a mistyped parameter are three problems of one error."""
    with pytest.raises(InputError) as caught:
        parse("gamma", rte=1, shape="low")
    assert len(caught.value.problems) == 3


@pytest.mark.parametrize(
    "config", [{}, {"name": 5}, {"name": "poisson", "rate": [1]}, {"name": "poisson", "rate": None}]
)
def test_configs_of_the_wrong_kind_are_refused(config: dict[str, object]) -> None:
    """A config without a name, or with a value that is no plain value, is an input error."""
    with pytest.raises(InputError):
        from_config(config)


@given(st.text(max_size=40))
@settings(max_examples=200, deadline=None)
def test_any_text_is_a_process_or_an_input_error(text: str) -> None:
    """No command-line text can raise anything but InputError."""
    with contextlib.suppress(InputError):
        from_text(text)


@given(st.sampled_from(sorted({*PROCESSES, *ALIASES})), st.text(max_size=30))
@example("poisson", "name=3")
@example("poisson", "1" * 400)
@example("offline", "count=" + "1" * 400)
@example("trace", "path=a\0b")
@example("replay", "path=a\0b")
@settings(max_examples=200, deadline=None)
def test_any_parameters_are_a_process_or_an_input_error(name: str, text: str) -> None:
    """A known name with arbitrary parameter text raises nothing but InputError either."""
    with contextlib.suppress(InputError):
        from_text(f"{name}:{text}")


@pytest.mark.parametrize(
    "process",
    [*(process for _, process in NAMED), Trace(np.array([0.0]), 1.0), Replay(np.array([0.0])), MinuteCounts((3,))],
)
def test_descriptions_are_plain(process: Process) -> None:
    """A description is JSON with the process's name, short even for a trace."""
    text = json.dumps(describe(process))
    assert json.loads(text)["name"] == process.name
    assert len(text) < 300


@pytest.mark.parametrize(
    "process",
    [Poisson(3.0), Gamma(3.0, 2.0), Mmpp(3.0), Sine(3.0), Ramp(1.0, 2.0), Step(1.0, 2.0, 3.0, 4.0), Constant(3.0)],
)
def test_a_description_names_the_process_again(process: Process) -> None:
    """Synthetic processes survive the way through a manifest."""
    assert from_config(dict(describe(process))) == process
