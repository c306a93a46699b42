"""The world changes under a running service: accuracy before, after, and once retraining has been published.

    requests   clean ........ shift │ corrupted ................................................ end
    accuracy   acc_before           │ acc_shifted (old weights) ─ swaps ─▶ acc_recovered (last seconds)
    tail       p99 of requests due around a swap  /  p99 of stretches beside it without one

One pretrained classifier is served; the same network trains beside it on the requests whose labels have come in and
publishes what is better on held-out ones. Everything runs through corun.launch as `main.py` runs it, once per sharing
policy, on the same arrivals. A stretch around a swap is from BEFORE_S before it (validation, writing, the server's
reading and checking) to AFTER_S after it; it is compared with two stretches as long before it and two after it,
where they hold no swap. A p99 that rests on too few requests is null.

    python -m bench.drift [--quick] [--policies none,idle,preempt]
"""

from __future__ import annotations

import subprocess
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer
from numpy.typing import NDArray

from bench.common import last_line, store
from corun.clock import NS_PER_S
from corun.errors import RunFault, guard
from corun.launch.calibrate import free_port
from corun.launch.cells import require_known
from corun.launch.children import PYTHON
from corun.launch.experiment import run_pair
from corun.process import StopSignal, thread_environment
from corun.registry import home
from corun.report import accuracy
from corun.report.accuracy_figure import changes_s
from corun.run import config as configs
from corun.run.directory import RunDirectory
from corun.run.read import Run, read
from corun.stats import percentile_of

MODEL, SIZE, BATCH, CLASSES = "resnet18", 32, 32, 8
SPECS: dict[str, Any] = {
    "none": "none",
    "nice": "nice",
    "idle": "idle",
    "preempt": {"policy": "preempt", "micro": 4},
    "idle+preempt": {"policy": "idle+preempt", "micro": 4},
}
BEFORE_S, AFTER_S = 1.0, 0.5
REGAINED = 0.9
ROLLING_S = 2.0

Flags = NDArray[np.bool_]
Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Plan:
    """How long a run is: seconds of the window, until the shift, and at its end over which recovery is judged."""

    window_s: float
    shift_s: float
    last_s: float
    rate: float
    pretrain_steps: int


FULL = Plan(window_s=75, shift_s=15, last_s=12, rate=60, pretrain_steps=160)
QUICK = Plan(window_s=30, shift_s=7, last_s=6, rate=50, pretrain_steps=110)


@dataclass(frozen=True)
class Seen:
    """All labelled requests of a run in order: due (s from the window's start), right or not, sojourn ms (inf = failed)."""

    due_s: Floats
    right: Flags
    ms: Floats


# Figures, pure


def share(right: Flags) -> float | None:
    """Share of right answers, None of nothing."""
    return round(float(right.mean()), 4) if len(right) else None


def accuracies(seen: Seen, shift_s: float, swaps_s: Sequence[float], last_s: float) -> dict[str, float | None]:
    """acc_before the shift, acc_shifted from it until the first swap after it, acc_recovered in the last seconds."""
    end = float(seen.due_s.max()) if len(seen.due_s) else 0.0
    first = min((swap for swap in swaps_s if swap > shift_s), default=end)
    return {
        "acc_before": share(seen.right[seen.due_s < shift_s]),
        "acc_shifted": share(seen.right[(seen.due_s >= shift_s) & (seen.due_s < first)]),
        "acc_recovered": share(seen.right[seen.due_s >= max(shift_s, end - last_s)]),
    }


def recovery_s(seen: Seen, shift_s: float, before: float | None, shifted: float | None) -> float | None:
    """Seconds from the shift until the last ROLLING_S had regained REGAINED of the lost accuracy; None if never."""
    if before is None or shifted is None or shifted >= before:
        return None
    wanted = shifted + REGAINED * (before - shifted)
    after = seen.due_s >= shift_s
    due, right = seen.due_s[after], np.concatenate([[0], np.cumsum(seen.right[after])])
    begins = np.searchsorted(due, due - ROLLING_S, side="right")
    ends = np.arange(1, len(due) + 1)
    reached = (due >= shift_s + ROLLING_S) & ((right[ends] - right[begins]) / (ends - begins) >= wanted)
    return round(float(due[reached][0]) - shift_s, 2) if reached.any() else None


def around(due_s: Floats, swaps_s: Sequence[float]) -> tuple[Flags, Flags]:
    """Which requests are due around a swap, and which in two such stretches before it and two after it without one."""
    near, beside = np.zeros(len(due_s), bool), np.zeros(len(due_s), bool)
    length = BEFORE_S + AFTER_S
    for swap in swaps_s:
        begin = swap - BEFORE_S
        near |= (due_s >= begin) & (due_s < begin + length)
        beside |= (due_s >= begin - 2 * length) & (due_s < begin + 3 * length)
    return near, beside & ~near


def tail(seen: Seen, swaps_s: Sequence[float]) -> dict[str, Any]:
    """p99 around swaps over p99 beside them, and what it rests on."""
    near, beside = around(seen.due_s, swaps_s)
    found = {}
    for percentile in (50, 95, 99):
        pair = [percentile_of(seen.ms[mask], percentile) for mask in (near, beside)]
        found[f"p{percentile}_ms_during_swap"], found[f"p{percentile}_ms_beside"] = pair
        whole = pair[0] is not None and pair[1] is not None and np.isfinite(pair).all()
        found[f"p{percentile}_x_during_swap"] = round(pair[0] / pair[1], 3) if whole else None  # type: ignore[operator]
    return {**found, "requests_during_swap": int(near.sum()), "requests_beside": int(beside.sum())}


# Runs


def pretrain(folder: Path, steps: int) -> Path:
    """Weights trained on the clean distribution by the real trainer."""
    path = folder / "pretrained.pt"
    argv = [PYTHON, "-m", "corun.train", "--model", MODEL, "--data", "drift", "--image-size", str(SIZE)]
    argv += ["--batch-size", str(BATCH), "--lr", "0.05", "--count", "4096", "--epochs", "0", "--steps", str(steps)]
    argv += ["--device", "cpu", "--seed", "1", "--checkpoint", str(path)]
    environment = {**thread_environment(2), "PYTHONPATH": str(home() / "src")}
    done = subprocess.run(argv, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RunFault(f"pretraining failed: {done.stderr[-500:]}")
    print(done.stdout.splitlines()[-2], flush=True)
    return path


def config_of(policy: str, weights: Path, plan: Plan) -> configs.Config:
    """The run of one policy as main.py would read it."""
    both = {"arch": MODEL, "data": "drift", "image_size": SIZE, "weights": str(weights), "device": "cpu"}
    publish = {"every_s": 2.5, "label_delay_s": 1.0}
    return configs.parse(
        {
            "train": [{**both, "batch_size": BATCH, "lr": 0.03, "count": 1024, "publish": publish}],
            "infer": [{**both, "name": "service", "rate": plan.rate}],
            "arms": ["corun"],
            "duration_s": plan.window_s,
            "drift": {"shift_at_s": plan.shift_s, "corruption": "invert", "severity": 5},
            "sharing": SPECS[policy],
            "drain_timeout_s": 30,
            "port": free_port(),
            "seed": 7,
        }
    )


def measure(policy: str, weights: Path, plan: Plan, folder: Path) -> dict[str, Any]:
    """Run one policy and reduce it."""
    cells = configs.pairs(config_of(policy, weights, plan))
    require_known(cells)
    run = RunDirectory.create(folder / policy.replace("+", "-"), cells[0].resolved(), cells[0].digest())
    with StopSignal() as stop:
        outcome = run_pair(cells[0], run, stop, lambda line: print(f"{policy}: {line}", flush=True))
    if outcome.status != "complete":
        raise RunFault(f"{policy}: {'; '.join(outcome.reasons)}")
    accuracy.write(run.path)
    return reduced(read(run.path), plan)


def reduced(run: Run, plan: Plan) -> dict[str, Any]:
    """The figures of one run, and what lies behind them."""
    window, table = run.windows[0], run.infer_client["service"]
    seen = Seen(
        (table["t_intended_ns"] - window.start_ns) / NS_PER_S,
        accuracy.right_of(table),
        np.where(table["status"] == "OK", table["sojourn_ms"], np.inf),
    )
    swaps = [second for second in changes_s(run, window.start_ns) if second < window.seconds]
    levels = accuracies(seen, plan.shift_s, swaps, plan.last_s)
    tails = tail(seen, swaps)
    inside = (run.train["t_start_ns"] >= window.start_ns) & (run.train["t_end_ns"] <= window.stop_ns)
    return {
        **levels,
        "recovery_s": recovery_s(seen, plan.shift_s, levels["acc_before"], levels["acc_shifted"]),
        "p99_x_during_swap": tails["p99_x_during_swap"],
        "failed": int((table["status"] != "OK").sum()),
        "failed_during_swap": int(np.isinf(seen.ms[around(seen.due_s, swaps)[0]]).sum()),
        "swaps": len(swaps),
        "rollbacks": events(run, "server", "rollback"),
        "refused": events(run, "server", "refused"),
        "details": {
            **tails,
            "swaps_s": [round(second, 3) for second in swaps],
            "requests": dict(Counter(table["status"].tolist())),
            "accuracy_after_shift": share(seen.right[seen.due_s >= plan.shift_s]),
            "train_steps": int(inside.sum()),
            "p99_ms": percentile_of(seen.ms, 99),
            "accuracy_by_second": [row.accuracy for row in accuracy.seconds(run)],
            "events": [
                f"{(t - window.start_ns) / NS_PER_S:.2f} s {role} {kind}: {detail}"
                for t, role, kind, detail in zip(
                    *(run.events[name] for name in ("t_ns", "role", "kind", "detail")), strict=True
                )
                if kind in ("publish", "swap", "rollback", "refused")
            ],
        },
    }


def events(run: Run, role: str, kind: str) -> int:
    """How many events of one kind a role recorded."""
    return int(((run.events["role"] == role) & (run.events["kind"] == kind)).sum())


app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@app.command()
def main(
    quick: Annotated[bool, typer.Option("--quick", help="two policies, 30 s each")] = False,
    weights: Annotated[Path | None, typer.Option(help="checkpoint to start from instead of pretraining")] = None,
    policies: Annotated[str, typer.Option(help=f"of {', '.join(SPECS)}")] = "",
) -> None:
    """Accuracy through a shift and publication, and the tail through swaps, by sharing policy."""
    with guard():
        plan = QUICK if quick else FULL
        chosen = policies.split(",") if policies else ["none", "idle"] if quick else ["none", "idle", "preempt"]
        began = time.monotonic()
        with tempfile.TemporaryDirectory(prefix="corun-drift-") as name:
            weights = weights.resolve() if weights else pretrain(Path(name), plan.pretrain_steps)
            found = {policy: measure(policy, weights, plan, Path(name)) for policy in chosen}
        details = {policy: figures.pop("details") for policy, figures in found.items()}
        for policy, figures in found.items():
            print(f"{policy}: {_sentence(figures)}")
        behind = {"plan": asdict(plan), "model": f"{MODEL} {SIZE} px", "wall_s": time.monotonic() - began, **details}
        store("drift_quick" if quick else "drift", {"policies": found}, behind)
        last_line({"policies": found})


def _sentence(figures: dict[str, Any]) -> str:
    def shown(value: Any, unit: str = "") -> str:
        return "n/a" if value is None else f"{value:g}{unit}"

    return (
        f"accuracy {shown(figures['acc_before'])} before, {shown(figures['acc_shifted'])} after the shift, "
        f"{shown(figures['acc_recovered'])} at the end, regained after {shown(figures['recovery_s'], ' s')}; "
        f"{figures['swaps']} swaps, p99 around them {shown(figures['p99_x_during_swap'], 'x')} of beside them; "
        f"{figures['failed']} failed, {figures['failed_during_swap']} of them around swaps"
    )


if __name__ == "__main__":
    app()
