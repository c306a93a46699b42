"""Does forecasting help? Next requests and windows of the Azure LLM traces, made data, and a throttled trainer.

    traces      next request, one step ahead: LSTM and DLinear against the best naive forecast, chosen on validation
    windowed    requests of the next 10 s and 60 s
    synthetic   made data: structure must be found (ideal skill 0.29), independent requests must not be "predicted"
    policies    one service beside a trainer in virtual time: no throttle, reactive EWMA, predictive q90, oracle
    cost_ms     CPU time of one forecast
    reading     1.4 million rows of a BurstGPT-like file: seconds and peak memory of the process

The traces are played ten times faster. The first half fits the forecasters, the second is simulated: 1 s windows,
8 ms (conv) or 4 ms (code) of service, 30 ms training steps at half speed while both work, promise 100 ms. The predictive
policy's headroom is the smallest that keeps the promise for 99 % of the first half's requests (none where the load breaks
it without training); EWMA and oracle leave a tenth. There is one arrival sequence of each trace, so a point proves little
by itself: `frontier` sweeps the headroom and compares violations at equal training speed, and `robustness` repeats that
at nine settings a trace and with other promises than 99 %.

    python -m bench.predictor [--quick] [--traces DIR] [--training]
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import pandas as pd
import torch
import typer
from numpy.typing import NDArray

from bench.common import last_line, store
from corun.errors import InputError, guard
from corun.predict import data, levels, scores
from corun.predict.baselines import WINDOW_ALPHAS, best_ewma, candidates, ridge_forecasts, states
from corun.predict.fitting import Settings
from corun.predict.forecast import EwmaForecaster, LoadForecaster
from corun.predict.levels import BASELINE, Level
from corun.predict.series import request_series, window_series
from corun.predict.sharing import Device, DutyRule, Shared, calibrate, shares, simulate
from corun.predict.synthetic import MAKERS

Floats = NDArray[np.float64]
Forecast = Callable[[float], float]
Point = dict[str, float]

ROOT = Path(__file__).resolve().parents[1]
TRACES = ROOT.parent / "shared" / "traces"
FILES = {"azure_conv": "AzureLLMInferenceTrace_conv.csv", "azure_code": "AzureLLMInferenceTrace_code.csv"}
MODELS = ("lstm", "dlinear")
SETTINGS = Settings(seq_len=50, epochs=15, batch_size=128, patience=3)
WINDOW_SETTINGS = Settings(seq_len=12, epochs=100, batch_size=16, patience=10)
ROWS = 6000
WINDOWS_S = (10, 60)
ROLLING = (("rolling_mean", 12),)

COMPRESSION = 10.0
CONTROL_S = 1.0
SERVICE_S = {"azure_conv": 0.008, "azure_code": 0.004}
PROMISE_S = 0.1
HEADROOM = {"ewma": 0.1, "oracle": 0.1}
POLICIES = ("ewma", "predictive", "oracle")
LATE_PCT = 1.0
OTHER_LATE_PCT = (0.5, 2.0)
SWEEP = tuple(round(-0.4 + 0.1 * step, 1) for step in range(12))
READ_ROWS = 1_400_000
TRAINING_ROWS = 100_000

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@app.command()
def main(
    quick: Annotated[bool, typer.Option("--quick", help="one seed, under two minutes")] = False,
    traces: Annotated[Path | None, typer.Option(help="directory of the Azure LLM 2023 traces")] = None,
    training: Annotated[
        bool, typer.Option("--training", help="time cpu_training.py on 100,000 made rows too")
    ] = False,
) -> None:
    """Judge the forecasts and what they are good for."""
    with guard():
        torch.set_num_threads(1)
        found = _traces(traces)
        started = time.monotonic()
        seeds = (0,) if quick else (0, 1, 2)
        policies, by_trace, frontier, sweeps = _policies(found)
        figures: dict[str, Any] = {
            "traces": {name: _next_request(requests, seeds) for name, requests in found.items()},
            "windowed": {
                name: {f"{window}s": _windowed(requests, window) for window in WINDOWS_S}
                for name, requests in found.items()
            },
            "synthetic": _synthetic(seeds),
            "policies": policies,
            "policies_by_trace": by_trace,
            "frontier": frontier,
            "cost_ms": _cost(found["azure_conv"]),
            "reading": _reading(),
        }
        if not quick:
            figures["frontier"]["robustness"] = _robustness(found)
        if training:
            figures["training"] = _training()
        figures["seconds"] = round(time.monotonic() - started, 1)
        figures = _rounded(figures)
        details = {
            "quick": quick,
            "settings": str(SETTINGS),
            "window_settings": str(WINDOW_SETTINGS),
            "sweeps": sweeps,
        }
        store("predictor_quick" if quick else "predictor", figures, _rounded(details))
        last_line(figures)


def _traces(given: Path | None) -> dict[str, data.Requests]:
    folder = given or Path(os.environ.get("CORUN_TRACES") or TRACES)
    missing = [f"{folder / name} does not exist" for name in FILES.values() if not (folder / name).is_file()]
    if missing:
        hint = "give --traces or $CORUN_TRACES: a directory with both files of github.com/Azure/AzurePublicDataset, data/"
        raise InputError("the Azure LLM 2023 traces are not there", [*missing, hint])
    return {name: data.read(folder / file) for name, file in FILES.items()}


def _next_request(requests: data.Requests, seeds: Sequence[int]) -> dict[str, Any]:
    series = request_series(requests)
    fits = [levels.fit(series, MODELS, replace(SETTINGS, seed=seed)) for seed in seeds]
    outcome = fits[0]
    _say(f"{requests.source.path}: recommended {[fit.recommended for fit in fits]}")
    table: dict[str, Any] = {}
    for place, field in enumerate(series.fields):
        table[field.name] = {name: _of(outcome, name, field.name) for name in MODELS}
        for name in MODELS:
            maes = [fit.scores[name][field.name].mae for fit in fits]
            table[field.name][name]["mae_by_seed"] = maes
        table[field.name]["best_naive"] = {
            "name": outcome.naive[place].label,
            **_of(outcome, BASELINE, field.name),
            "mae_in_hindsight": min(outcome.all_naive[field.name].values()),
        }
    return table | {"recommended": [fit.recommended for fit in fits]}


def _of(outcome: Level, name: str, field: str) -> dict[str, Any]:
    score = outcome.scores[name][field]
    skill = {} if name == BASELINE else {"skill": score.skill, "skill_ci": list(score.skill_ci)}
    return {
        "mae": score.mae,
        "rmse": score.rmse,
        "mase": score.mase,
        **skill,
        "coverage": score.coverage,
        "coverage_adaptive": score.coverage_adaptive,
    }


def _windowed(requests: data.Requests, window_s: int) -> dict[str, Any]:
    """Requests of the next window; naive forecasts and the linear autoregression at 80/20, nets where they fit."""
    series = window_series(requests, window_s)
    counts = series.targets[:, 0]
    fitted, cut = int(0.6 * counts.size), int(0.8 * counts.size)
    table = {one.label: states(one, counts)[:-1, 0] for one in candidates(counts[:fitted], ROLLING, WINDOW_ALPHAS)}
    chosen = min(table, key=lambda name: float(np.abs(counts[fitted:cut] - table[name][fitted:cut]).mean()))
    table["ar12"] = ridge_forecasts(counts, cut)[:-1, 0]
    errors = {name: np.abs(counts[cut:] - forecast[cut:]) for name, forecast in table.items()}
    rows: dict[str, Any] = {
        name: {
            "mae": float(error.mean()),
            "skill": 1 - float(error.mean() / errors[chosen].mean()),
            "skill_ci": list(scores.ratio_interval(error, errors[chosen])),
        }
        for name, error in errors.items()
        if np.isfinite(error).all()
    }
    return {"best_naive": chosen, "test_windows": counts.size - cut, **rows, **_window_nets(requests, window_s)}


def _window_nets(requests: data.Requests, window_s: int) -> dict[str, Any]:
    try:
        outcome = levels.fit(window_series(requests, window_s), MODELS, WINDOW_SETTINGS, length=12, minimum=5)
    except InputError as error:
        return {"nets": str(error)}
    rows = {name: _of(outcome, name, "requests") for name in (*MODELS, BASELINE)}
    rows[BASELINE]["mae_in_hindsight"] = min(outcome.all_naive["requests"].values())
    return {"nets": rows | {"recommended": outcome.recommended}}


def _synthetic(seeds: Sequence[int]) -> dict[str, Any]:
    """Mean skill over the three targets, the worse model and the worst seed; on Poisson what was recommended."""
    skill, recommended = {}, {}
    for kind, make in MAKERS.items():
        outcomes = [
            levels.fit(request_series(make(ROWS, seed)), MODELS, replace(SETTINGS, seed=seed)) for seed in seeds
        ]
        means = [
            float(np.mean([score.skill for score in outcome.scores[name].values()]))
            for outcome in outcomes
            for name in MODELS
        ]
        skill[kind], recommended[kind] = min(means), [outcome.recommended for outcome in outcomes]
        _say(f"{kind}: skill {[round(mean, 3) for mean in means]}, recommended {recommended[kind]}")
    return {
        "seasonal_skill": skill["seasonal"],
        "ar_skill": skill["ar"],
        "poisson_skill": skill["poisson"],
        "poisson_recommended": [name for name in recommended["poisson"] if name != BASELINE],
        "recommended": recommended,
        "rows": ROWS,
    }


def _policies(
    traces: Mapping[str, data.Requests],
) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any], dict[str, Any]]:
    """The four policies over both traces, each trace alone, predictive against the frontier, and the sweeps."""
    scenes = {name: Scene(requests, SERVICE_S[name]) for name, requests in traces.items()}
    outcomes = {name: scene.policies() for name, scene in scenes.items()}
    pooled = {}
    for policy in ("none", *POLICIES):
        runs = [outcomes[name][policy] for name in scenes]
        pooled[policy] = {
            "slo_violation_pct": float(100 * np.concatenate([run.sojourn_s > PROMISE_S for run in runs]).mean()),
            "train_samples_per_s": float(np.mean([run.train_samples_per_s for run in runs])),
        }
    by_trace = {name: {policy: _point(run) for policy, run in runs.items()} for name, runs in outcomes.items()}
    sweeps = {name: scene.sweep() for name, scene in scenes.items()}
    frontier: dict[str, Any] = {
        name: _against(sweeps[name], by_trace[name])
        | {"q90_coverage": scene.covered, "headroom": scene.calibrated(LATE_PCT)}
        for name, scene in scenes.items()
    }
    frontier["predictive_on_or_above"] = all(one["predictive_on_or_above"] for one in frontier.values())
    return pooled, by_trace, frontier, sweeps


def _robustness(traces: Mapping[str, data.Requests]) -> list[dict[str, Any]]:
    """The same comparison at other control windows and service times: was the setting picked?"""
    rows = []
    for name, requests in traces.items():
        for control_s in (0.5, 1.0, 2.0):
            for factor in (0.75, 1.0, 1.25):
                scene = Scene(requests, SERVICE_S[name] * factor, control_s)
                points = {policy: _point(run) for policy, run in scene.policies().items()}
                row = {"trace": name, "control_s": control_s, "service_ms": 1000 * SERVICE_S[name] * factor}
                sweep = scene.sweep()
                others = {
                    f"late_{late:g}_pct": _against(
                        sweep, points | {"predictive": _point(scene.run("predictive", scene.calibrated(late)))}
                    )["predictive_on_or_above"]
                    for late in OTHER_LATE_PCT
                }
                rows.append(row | {"headroom": scene.calibrated(LATE_PCT)} | _against(sweep, points) | others)
                _say(str(rows[-1]))
    return rows


class Scene:
    """The second half of one trace, ten times faster, and the forecasts a policy may act on."""

    def __init__(self, requests: data.Requests, service_s: float, control_s: float = CONTROL_S) -> None:
        arrivals = (requests.t_ns - requests.t_ns[0]) / data.NS / COMPRESSION
        self.service_s, self.control_s = service_s, control_s
        self.start_s = float(np.floor(arrivals[-1] / 2 / control_s)) * control_s
        self.windows = int((arrivals[-1] - self.start_s) // control_s)
        self.tested = arrivals[(arrivals >= self.start_s) & (arrivals < self.start_s + self.windows * control_s)]
        past = self.past = arrivals[arrivals < self.start_s]
        learned = LoadForecaster.fit(past, control_s)
        counts = np.histogram(past, control_s * np.arange(self.start_s / control_s + 1))[0].astype(np.float64)
        reactive = EwmaForecaster(control_s, best_ewma(counts, WINDOW_ALPHAS).value)

        def coming(now_s: float) -> float:
            return float(((arrivals >= now_s) & (arrivals < now_s + control_s)).sum()) / control_s

        self.forecasts: dict[str, Forecast] = {
            "ewma": lambda now_s: reactive.forecast(now_s, arrivals)[0],
            "predictive": lambda now_s: learned.forecast(now_s, arrivals)[0],
            "oracle": coming,
        }
        starts = self.start_s + control_s * np.arange(self.windows)
        self.covered = float(np.mean([self.forecasts["predictive"](now_s) >= coming(now_s) for now_s in starts]))

    def run(self, policy: str, headroom: float) -> Shared:
        duty = np.ones(self.windows)
        if policy != "none":
            rule, forecast = DutyRule(headroom=headroom), self.forecasts[policy]
            duty = shares(forecast, self.service_s, rule, self.start_s, self.windows, self.control_s)
        return simulate(self.tested - self.start_s, self.service_s, duty, self.control_s, Device())

    def policies(self) -> dict[str, Shared]:
        headroom = HEADROOM | {"none": 0.0, "predictive": self.calibrated(LATE_PCT)}
        return {policy: self.run(policy, headroom[policy]) for policy in ("none", *POLICIES)}

    def calibrated(self, late_pct: float) -> float:
        """The predictive policy's headroom, from the first half alone."""
        return calibrate(
            self.forecasts["predictive"],
            self.past,
            self.service_s,
            PROMISE_S,
            self.control_s,
            Device(),
            late_pct,
        )

    def sweep(self) -> dict[str, list[Point]]:
        """EWMA and predictive at every headroom."""
        return {
            policy: [_point(self.run(policy, headroom)) for headroom in SWEEP] for policy in ("ewma", "predictive")
        }


def _against(sweep: Mapping[str, Sequence[Point]], points: Mapping[str, Point]) -> dict[str, Any]:
    """Predictive against the frontier that no throttle and EWMA at every headroom make.

    gain_pct: by how many percentage points its violations are below the frontier's at equal training speed, mean over
    its own sweep. On or above: at its own setting it trains no less than the frontier with as many violations or fewer
    (to 1 %).
    """
    front = [points["none"], *sweep["ewma"]]
    own = points["predictive"]
    reached = [one["train_samples_per_s"] for one in front if one["slo_violation_pct"] <= own["slo_violation_pct"]]
    holds = own["train_samples_per_s"] >= 0.99 * max(_along(front, own), *reached, 0.0)
    return {"gain_pct": float(np.mean(_gains(sweep["predictive"], front))), "predictive_on_or_above": holds}


def _point(run: Shared) -> Point:
    return {"slo_violation_pct": run.violation_pct(PROMISE_S), "train_samples_per_s": run.train_samples_per_s}


def _along(front: Sequence[Point], point: Point) -> float:
    """Training speed of the piecewise linear frontier at the point's violations; 0 left of it."""
    best: dict[float, float] = {}
    for one in front:
        violations = one["slo_violation_pct"]
        best[violations] = max(best.get(violations, 0.0), one["train_samples_per_s"])
    places = sorted(best)
    return float(np.interp(point["slo_violation_pct"], places, [best[place] for place in places], left=0.0))


def _gains(points: Sequence[Point], front: Sequence[Point]) -> list[float]:
    """Violations of the frontier minus the point's own, at the point's training speed, where the frontier reaches."""
    ordered = sorted(front, key=lambda one: one["train_samples_per_s"])
    speeds = [one["train_samples_per_s"] for one in ordered]
    violations = [one["slo_violation_pct"] for one in ordered]
    inside = [one for one in points if speeds[0] <= one["train_samples_per_s"] <= speeds[-1]]
    return [
        float(np.interp(one["train_samples_per_s"], speeds, violations)) - one["slo_violation_pct"] for one in inside
    ]


def _cost(requests: data.Requests) -> dict[str, float]:
    """CPU milliseconds of one forecast: a net's next request from 50 rows, the policy's quantile from all arrivals."""
    series = request_series(requests)
    outcome = levels.fit(series, MODELS, replace(SETTINGS, epochs=1))
    arrivals = (requests.t_ns - requests.t_ns[0]) / data.NS
    learned = LoadForecaster.fit(arrivals, 10.0)
    last = np.array([len(series)])
    calls: dict[str, Callable[[], object]] = {
        "lstm": lambda: outcome.models["lstm"].levels(series, last),
        "dlinear": lambda: outcome.models["dlinear"].levels(series, last),
        "load_forecaster": lambda: learned.forecast(float(arrivals[-1]), arrivals),
    }
    return {name: _cpu_ms(call) for name, call in calls.items()}


def _cpu_ms(call: Callable[[], object], times: int = 200) -> float:
    call()
    began = time.process_time()
    for _ in range(times):
        call()
    return 1000 * (time.process_time() - began) / times


def _reading() -> dict[str, Any]:
    """Seconds and peak resident MiB of a process that reads 1.4 million rows, its imports included in the memory.

    VmHWM, because a child's ru_maxrss begins at its parent's.
    """
    code = (
        "import sys, time; from pathlib import Path; from corun.predict.data import read; t = time.monotonic();"
        "rows = len(read(Path(sys.argv[1]))); s = time.monotonic() - t;"
        "peak = [line for line in open('/proc/self/status') if line.startswith('VmHWM')][0].split()[1];"
        "print(rows, s, int(peak) / 1024)"
    )
    with tempfile.TemporaryDirectory() as folder:
        path = _made_file(Path(folder) / "made.csv", READ_ROWS)
        done = subprocess.run([sys.executable, "-c", code, str(path)], capture_output=True, text=True, check=True)
    rows, seconds, peak_mib = done.stdout.split()
    return {"rows": int(rows), "seconds": float(seconds), "peak_mib": float(peak_mib)}


def _training() -> dict[str, Any]:
    """Seconds of cpu_training.py on 100,000 made rows, both models, all defaults."""
    with tempfile.TemporaryDirectory() as folder:
        path = _made_file(Path(folder) / "made.csv", TRAINING_ROWS)
        argv = [str(ROOT / "src" / "cpu_training.py"), "--data-path", str(path), "--sample-size", str(TRAINING_ROWS)]
        started = time.monotonic()
        done = subprocess.run([sys.executable, *argv, "--model-dir", folder], stdout=subprocess.DEVNULL, check=False)
        return {"rows": TRAINING_ROWS, "seconds": time.monotonic() - started, "exit_code": done.returncode}


def _made_file(path: Path, rows: int) -> Path:
    """A file of BurstGPT's form: Poisson arrivals at 0.27/s with whole stamps, log-normal tokens."""
    rng = np.random.default_rng(0)
    request, response = (np.exp(rng.normal(mean, 1.0, rows)).astype(np.int64) for mean in (6.0, 5.0))
    table = {
        "Timestamp": np.cumsum(rng.exponential(3.7, rows)).astype(np.int64),
        "Model": np.where(rng.random(rows) < 0.9, "ChatGPT", "GPT-4"),
        "Request tokens": request,
        "Response tokens": response,
        "Total tokens": request + response,
        "Log Type": np.where(rng.random(rows) < 0.5, "Conversation log", "API log"),
    }
    pd.DataFrame(table).to_csv(path, index=False)
    return path


def _rounded(value: Any) -> Any:
    """Five significant digits, for reading; nan as null."""
    if isinstance(value, Mapping):
        return {key: _rounded(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_rounded(item) for item in value]
    if isinstance(value, float | np.floating):
        return float(f"{value:.5g}") if np.isfinite(value) else None
    return json.loads(json.dumps(value, default=str))


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


if __name__ == "__main__":
    app()
