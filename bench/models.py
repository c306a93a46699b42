"""Every vision model really serves and really trains: one row each, and the table of docs/models.md.

python -m bench.models                        all of them on the CPU, about 15 minutes on two cores
python -m bench.models --quick                the smallest of each family, trained at a smaller size; a minute or two
python -m bench.models --only resnet18        some
python -m bench.models --docs                 write docs/models.md again, from the last full run

Serving: a server process of its own per model, LOAD over its socket, then real photographs as requests, one in flight.
Every reply is decoded and judged. Training: `python -m corun.train`, two steps on made data of the model's task.
GFLOP are 2 x MAC of one forward pass at the default size, as torch's FlopCounterMode counts them. What fails is a row
with its reason, and the bench goes on.
"""

from __future__ import annotations

import csv
import gc
import math
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import psutil
import typer

from bench.common import last_line, store
from bench.model_table import DOCS, VISION, write_docs
from corun import images, registry
from corun.errors import CorunError, InputError, RunFault, guard
from corun.launch.arguments import spread
from corun.registry import DataOptions, Model
from corun.testing.ask import Asker
from corun.wire import Address, Status, connect
from corun.wire.channel import Channel
from corun.wire.messages import Hello, Load, Stop

ROOT = Path(__file__).resolve().parents[1]
APART = ("RIDCP_dehazing_tiny",)
"""Presets that no figure counts: the same graph as another row."""
LOAD_S, TRAIN_S = 180.0, 420.0
REQUESTS = 15
BATCH, STEPS, SAMPLES = 2, 2, 4


@dataclass(frozen=True)
class Effort:
    """How much is spent on one model.

    request_s: no further request after so long. step_gflop: training runs at the default size where a step
    (3 x forward x batch) stays below it, else at a smaller one.
    """

    request_s: float = 6.0
    step_gflop: float = 260.0


FULL, QUICK = Effort(), Effort(request_s=1.5, step_gflop=16.0)


@dataclass(frozen=True)
class Row:
    """One model; None where it was not measured. requests: how many p50_ms is the median of."""

    family: str
    name: str
    image_size: int
    params: int | None = None
    gflop: float | None = None
    weights: str = ""
    requests: int = 0
    p50_ms: float | None = None
    rss_mib: float | None = None
    train_size: int | None = None
    train_batch: int | None = None
    step_ms: float | None = None
    losses: tuple[float, ...] = ()
    problems: tuple[str, ...] = ()

    @property
    def served(self) -> bool:
        return self.p50_ms is not None

    @property
    def trained(self) -> bool:
        return self.step_ms is not None

    def line(self) -> str:
        """As printed."""
        shape = f"{self.train_batch} x {self.train_size}" if self.train_batch else ""
        cells = (
            f"{self.family:10} {self.name:29} {_cell(self.params, ',d', 12)} {_cell(self.gflop, '.2f', 8)}",
            f"{_cell(self.p50_ms, '.1f', 9)} {_cell(self.step_ms, '.1f', 9)} {shape:>8}",
            f"{_cell(self.rss_mib, '.0f', 6)}  {self.weights}",
        )
        return " ".join([*cells, *(f"\n    failed: {problem}" for problem in self.problems)])


HEAD = f"{'family':10} {'name':29} {'params':>12} {'GFLOP':>8} {'p50 ms':>9} {'step ms':>9} {'trained':>8} {'RSS MiB':>6} weights"


def _cell(value: float | None, form: str, width: int) -> str:
    return ("n/a" if value is None else format(value, form)).rjust(width)


# Serving


@contextmanager
def server(device: str, directory: Path) -> Iterator[tuple[subprocess.Popen[bytes], Address]]:
    """An empty server process."""
    address = Address("unix", str(directory / "server.sock"))
    argv = [sys.executable, str(ROOT / "src" / "server.py"), "--address", str(address), "--device", device]
    argv += ["--warmup", "1", "--threads", "1"]
    with open(directory / "server.log", "wb") as log:
        process = subprocess.Popen(argv, stdout=log, stderr=log, cwd=ROOT)
    try:
        yield process, address
    finally:
        process.terminate()
        process.wait()


def serve(model: Model, device: str, effort: Effort, directory: Path) -> dict[str, Any]:
    """Load `model` into a server of its own and ask it: cells of the row."""
    with server(device, directory) as (process, address):
        control = Channel(connect(address, 30.0, retry=True))
        control.request(Load(model.name), LOAD_S)
        hello = control.request(Hello(role="bench"))
        payloads = registry.request_payloads("sample", DataOptions(image_size=model.image_size, count=4))
        taken: list[float] = []
        with Asker(address) as asker:
            deadline = time.monotonic() + effort.request_s
            while len(taken) < REQUESTS and (len(taken) < 1 or time.monotonic() < deadline):
                payload = payloads[len(taken) % len(payloads)].data
                answer = asker.ask(payload, LOAD_S)
                if answer.status != Status.OK:
                    raise RunFault(f"answered {Status(answer.status).name}: {answer.payload[:200]!r}")
                CHECKS[model.task](model, payload, answer.payload)
                taken.append(answer.ms)
        rss_mib = psutil.Process(process.pid).memory_info().rss / (1 << 20)
        control.request(Stop("done"))
        control.close()
    return {
        "params": hello["info"]["params"],
        "weights": hello["info"]["weights"],
        "requests": len(taken),
        "p50_ms": round(statistics.median(taken), 3),
        "rss_mib": round(rss_mib, 1),
    }


def check_classes(model: Model, payload: bytes, reply: bytes) -> None:
    """Five distinct classes of ImageNet, most probable first."""
    rows = registry.load_plugin("models", "cnn").read_reply(reply)
    classes, probabilities = zip(*rows, strict=True)
    _require(len(set(classes)) == 5 and all(0 <= entry < 1000 for entry in classes), f"classes are {classes}")
    falling = list(probabilities) == sorted(probabilities, reverse=True)
    _require(falling and 0 < sum(probabilities) <= 1.001, f"probabilities are {probabilities}")


def check_boxes(model: Model, payload: bytes, reply: bytes) -> None:
    """Boxes inside the picture, of known classes, best first; random weights find none."""
    rows = registry.load_plugin("models", "yolo").decode_detections(reply)
    height, width = images.decode_rgb(payload).shape[:2]
    inside = (rows["x1"] >= 0).all() and (rows["x2"] <= width).all() and (rows["y2"] <= height).all()
    _require(bool(inside) and ((rows["class"] >= 0) & (rows["class"] < 80)).all(), f"boxes are {rows[:3]}")


def check_map(model: Model, payload: bytes, reply: bytes) -> None:
    """A class for every cell of the input square."""
    cells, classes = registry.load_plugin("models", "deeplab").decode_class_map(reply)
    _require(cells.shape == (model.image_size, model.image_size) and cells.max() < classes, f"map of {cells.shape}")


def check_picture(model: Model, payload: bytes, reply: bytes) -> None:
    """A picture of the input's size that is not one flat colour."""
    picture = images.decode_rgb(reply)
    _require(picture.shape == (model.image_size, model.image_size, 3), f"picture of {picture.shape}")
    _require(float(picture.std()) > 0, "the picture is one flat colour")


CHECKS: dict[str, Callable[[Model, bytes, bytes], None]] = {
    "classification": check_classes,
    "detection": check_boxes,
    "segmentation": check_map,
    "dehazing": check_picture,
}


def _require(condition: bool, what: str) -> None:
    if not condition:
        raise RunFault(f"the reply is not well-formed: {what}")


# Training


def train_size(model: Model, gflop: float | None, step_gflop: float = FULL.step_gflop) -> int:
    """Side at which a step stays below step_gflop: the default, its half or its quarter, a multiple of 32."""
    side = model.image_size
    for part in (1, 2, 4):
        side = model.image_size if part == 1 else max(64, model.image_size // part // 32 * 32)
        if gflop is None or 3 * BATCH * gflop * (side / model.image_size) ** 2 <= step_gflop:
            break
    return side


def train(model: Model, device: str, size: int, directory: Path) -> dict[str, Any]:
    """STEPS steps of `python -m corun.train`: cells of the row."""
    options = {"model": model.name, "data": "synthetic", "image-size": size, "batch-size": BATCH, "steps": STEPS}
    options |= {"count": SAMPLES, "device": device, "lr": 0.001, "out": directory}
    argv = [
        sys.executable,
        "-m",
        "corun.train",
        *(word for key, value in options.items() for word in (f"--{key}", str(value))),
    ]
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "src")}
    done = subprocess.run(
        argv, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=TRAIN_S, check=False
    )
    if done.returncode:
        raise RunFault(f"training exited with {done.returncode}: {_last_lines(done.stderr)}")
    with open(directory / "train.csv", newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    losses = tuple(round(float(row["loss"]), 5) for row in rows)
    if len(rows) != STEPS or not all(map(math.isfinite, losses)):
        raise RunFault(f"{len(rows)} steps with losses {losses}; expected {STEPS} finite ones")
    step_ms = statistics.median(float(row["step_ms"]) for row in rows)
    return {"train_size": size, "train_batch": BATCH, "step_ms": round(step_ms, 1), "losses": losses}


def _last_lines(text: str) -> str:
    return " ".join(text.strip().splitlines()[-3:])[-400:]


# Counting


def count_gflop(model: Model) -> float:
    """GFLOP (2 x MAC) of one forward pass at the default size; attention's fused path, which hides them, is off.

    Elementwise work, pooling, sampling and deformable convolutions' bilinear reads are not counted by torch.
    """
    import torch
    from torch.utils.flop_counter import FlopCounterMode

    servable: Any = model.serve(registry.ModelOptions())
    batch = servable.to_device(servable.preprocess([servable.decode(servable.example())]))
    fused = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with FlopCounterMode(display=False) as counter:
            servable.forward(batch)
    finally:
        torch.backends.mha.set_fastpath_enabled(fused)
    del servable
    gc.collect()
    return round(counter.get_total_flops() / 1e9, 3)


# Putting it together


def measure(model: Model, device: str, effort: Effort) -> Row:
    """The row of one model; every part that fails leaves its reason."""
    cells: dict[str, Any] = {}
    problems: list[str] = []

    def part(what: str, work: Callable[[], dict[str, Any]]) -> None:
        try:
            cells.update(work())
        except (CorunError, ValueError, RuntimeError, OSError, subprocess.SubprocessError) as error:
            problems.append(f"{what}: {type(error).__name__}: {' '.join(str(error).split())[:400]}")

    with tempfile.TemporaryDirectory(prefix="corun-models-") as name:
        directory = Path(name)
        part("counting", lambda: {"gflop": count_gflop(model)})
        part("serving", lambda: serve(model, device, effort, directory))
        size = train_size(model, cells.get("gflop"), effort.step_gflop)
        part("training", lambda: train(model, device, size, directory))
    return Row(model.family, model.name, model.image_size, **cells, problems=tuple(problems))


def chosen(quick: bool, only: Sequence[str]) -> list[Model]:
    """Models to measure: all of a vision task, those named, or one per family."""
    if only:
        named = [registry.model(name) for name in only]
        strange = [f"{model.name}: its task is {model.task}" for model in named if model.task not in VISION]
        if strange:
            raise InputError(f"only models of {', '.join(VISION)} are measured here", strange)
        return named
    rows = [model for model in registry.models().values() if model.task in VISION]
    if not quick:
        return rows
    return [
        registry.model(name) for name in ("mobilenet_v3_small", "yolov5n", "deeplabv3_mobilenet_v3_large", *APART)
    ]


def figures_of(rows: Sequence[Row]) -> dict[str, Any]:
    """The last line: how many served and trained, who failed, and the presets that count apart."""
    counted = [row for row in rows if row.name not in APART]
    return {
        "served": sum(row.served for row in counted),
        "trained": sum(row.trained for row in counted),
        "failed": [row.name for row in rows if row.problems],
        "apart": {row.name: {"served": row.served, "trained": row.trained} for row in rows if row.name in APART},
    }


app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@app.command()
def main(
    quick: Annotated[bool, typer.Option("--quick", help="one model per family")] = False,
    only: Annotated[list[str] | None, typer.Option(help="these models (several names may follow)")] = None,
    device: Annotated[str, typer.Option(help="cpu, cuda or cuda:N")] = "cpu",
    docs: Annotated[bool, typer.Option("--docs", help=f"only write {DOCS.name} again")] = False,
) -> None:
    """Serve and train every vision model; the last line is one JSON object."""
    with guard():
        if docs:
            print(write_docs())
            return
        print(HEAD, flush=True)
        rows = []
        for model in chosen(quick, only or []):
            rows.append(measure(model, device, QUICK if quick else FULL))
            print(rows[-1].line(), flush=True)
        figures = figures_of(rows)
        whole = not (quick or only)
        store(
            "models" if whole else "models-part", figures, {"device": device, "rows": [asdict(row) for row in rows]}
        )
        if whole:
            write_docs()
        last_line(figures)


if __name__ == "__main__":
    sys.argv[1:] = spread(sys.argv[1:], "--only")
    app()
