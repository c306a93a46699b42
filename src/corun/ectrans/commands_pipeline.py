"""The commands of `src/ectrans.py` that serve, load, compare and simulate the pipeline."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer

from corun import registry
from corun.clock import NS_PER_MS
from corun.ectrans import mixes, simulate
from corun.ectrans.scheduler import Rules
from corun.errors import InputError, guard
from corun.serve.packing import Limits
from corun.wire import Address

Policy = Annotated[str, typer.Option(help="fcfs, sjf, edf, hrrn or hrrn-stale")]
Packing = Annotated[str, typer.Option(help="off, count or cost")]
MaxItems = Annotated[int, typer.Option("--max-items", min=1, help="sentences in one package")]
MaxTokens = Annotated[int, typer.Option("--max-padded-tokens", min=1, help="sentences x longest of a package")]
Theta = Annotated[float, typer.Option(min=0, help="cost packing: padding allowed per token of its own")]
Hold = Annotated[float, typer.Option("--hold-ms", min=0, help="cost packing: how long an item may be passed over")]
Threshold = Annotated[
    int, typer.Option("--batch-threshold", min=0, help="sentences that make a request batch; 0 = none")
]
Lanes = Annotated[str, typer.Option(help="shared or pinned")]
RtShare = Annotated[float, typer.Option("--rt-share", min=0, max=1, help="share of slots that real-time is sure of")]
Mix = Annotated[str, typer.Option(help="requests x sentences, e.g. 3x256,2x16, or a published mix: H, T, U, V")]
Sizes = Annotated[str, typer.Option(help="Poisson: size:share, ...")]
Partition = Annotated[str, typer.Option(help="what the client sends: text, ids, embed or encoder")]


def register(app: typer.Typer) -> None:
    """Add serve, load, compare and simulate."""
    for command in (serve, load, compare, simulated):
        app.command(command.__name__.replace("simulated", "simulate"))(command)


def serve(
    parts: Annotated[Path, typer.Option(help="directory made by split")],
    port: Annotated[int, typer.Option(min=0, max=65535)] = 5550,
    host: Annotated[str, typer.Option(help="address to listen on")] = "127.0.0.1",
    executor: Annotated[str, typer.Option(help="multitask, multiprocess, pipeline or streams")] = "streams",
    workers: Annotated[int, typer.Option(min=1, help="processes, or pairs of them for pipeline")] = 1,
    decoder: Annotated[str, typer.Option(help="static, continuous or no-cache (historical)")] = "continuous",
    policy: Policy = "hrrn",
    packing: Packing = "cost",
    partition: Partition = "text",
    max_items: MaxItems = 64,
    max_padded_tokens: MaxTokens = 4096,
    theta: Theta = 0.25,
    hold_ms: Hold = 1000.0,
    window_ms: Annotated[
        float, typer.Option("--window-ms", min=0, help="how long a package may wait to fill")
    ] = 20.0,
    batch_threshold: Threshold = 256,
    lanes: Lanes = "shared",
    rt_share: RtShare = 0.5,
    beam: Annotated[int, typer.Option(min=1, help="beams, with --decoder static")] = 1,
    max_new: Annotated[int, typer.Option("--max-new", min=1, help="longest answer, tokens")] = 60,
    device: Annotated[str, typer.Option(help="cpu, cuda or cuda:N")] = "cpu",
    dtype: Annotated[str, typer.Option(help="fp32, bf16 or fp16")] = "fp32",
    threads: Annotated[int, typer.Option(min=1, help="threads of each process' tensor operations")] = 1,
    depth: Annotated[int, typer.Option(min=1, help="packages a pipeline may hold")] = 2,
    start: Annotated[str, typer.Option(help="spawn, or forkserver: children share the libraries' pages")] = "spawn",
    queue_limit: Annotated[int, typer.Option("--queue-limit", min=1, help="sentences that may wait")] = 16384,
    deadline_ms: Annotated[int, typer.Option("--deadline-ms", min=0, help="of requests without one; 0 = none")] = 0,
    reload_tokenizer: Annotated[bool, typer.Option("--reload-tokenizer", help="historical: once a sentence")] = False,
    out: Annotated[Path | None, typer.Option(help="directory for requests.csv, packages.csv, ...")] = None,
) -> None:
    """Serve a split model until Ctrl-C."""
    with guard():
        from corun.ectrans.engines import Model
        from corun.ectrans.executors import Shape
        from corun.ectrans.service import Service, ServiceOptions
        from corun.process import StopSignal, set_threads

        set_threads(threads)
        half = partition if partition in ("embed", "encoder") else "ids"
        model = Model(parts, decoder, half, beam, max_new, max_items, device, dtype, threads, reload=reload_tokenizer)
        rules = Rules(
            policy,
            packing,
            Limits(max_items, max_padded_tokens, theta, round(hold_ms * NS_PER_MS)),
            round(window_ms * NS_PER_MS),
            lanes,
            rt_share,
            workers,
            batch_threshold,
            queue_limit,
        )
        shape = Shape(executor, workers, depth, max_items, max_padded_tokens, start)
        address = Address("tcp", host, port)
        with StopSignal() as stop:
            service = Service(ServiceOptions(model, shape, rules, address, partition, deadline_ms, out), _say)
            summary = service.serve(stop)
        print(json.dumps(summary))


def load(
    port: Annotated[int, typer.Option(min=1, max=65535)] = 5550,
    host: Annotated[str, typer.Option()] = "127.0.0.1",
    mix: Mix = "64x8",
    gap_ms: Annotated[float, typer.Option("--gap-ms", min=0, help="between the requests of a mix")] = 0.0,
    poisson: Annotated[bool, typer.Option("--poisson", help="Poisson arrivals instead of a mix")] = False,
    rate: Annotated[float, typer.Option(min=0, help="Poisson: requests a second")] = 1.0,
    sizes: Sizes = mixes.SIZES,
    duration: Annotated[float, typer.Option(min=0, help="Poisson: seconds")] = 10.0,
    seed: Annotated[int, typer.Option()] = 0,
    text: Annotated[Path | None, typer.Option(help="sentences, one a line; else made ones")] = None,
    partition: Partition = "text",
    parts: Annotated[Path | None, typer.Option(help="client's part, for ids, embed and encoder")] = None,
    dtype: Annotated[str, typer.Option(help="hidden values on the wire: float32 or float16")] = "float32",
    clients: Annotated[int, typer.Option(min=0, help="connections; 0 = one a request")] = 0,
    timeout: Annotated[float, typer.Option(min=0, help="s to wait for the last reply")] = 600.0,
    stop: Annotated[bool, typer.Option("--stop", help="stop the server afterwards")] = False,
) -> None:
    """Send a mix or a Poisson load to a server; prints one JSON object."""
    with guard():
        from corun.ectrans import client

        texts = read_texts(text, seed)
        arrivals = mixes.mix(mixes.parse_mix(mix), gap_ms)
        if poisson:
            arrivals = mixes.poisson(rate, mixes.parse_sizes(sizes), max(1, round(rate * duration)), seed)
        address = Address("tcp", host, port)
        requests = client.requests_of(arrivals, texts, client.maker(partition, parts))
        admin = client.Admin(address)
        replies = client.drive(address, requests, clients, dtype, timeout)
        body = client.summary(replies)
        body["server"] = admin.drain()
        if stop:
            admin.stop()
        print(json.dumps(body))


def read_texts(path: Path | None, seed: int, count: int = 1000) -> list[str]:
    """Sentences of a file, or of the made language; InputError when there are none."""
    if path is None:
        from corun.ectrans.training import tiny_sentences

        return tiny_sentences(count, seed)
    try:
        lines = [line.strip() for line in path.read_text(encoding="utf-8").splitlines()]
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path} cannot be read: {error}") from None
    texts = [line for line in lines if line]
    if not texts:
        raise InputError(f"{path} holds no sentence")
    return texts


def compare(
    matrix: Annotated[str, typer.Argument(help="R1 to R6, corun, several by commas, all, or a JSON file")],
    parts: Annotated[Path, typer.Option(help="directory made by split")],
    repeats: Annotated[int, typer.Option(min=1)] = 5,
    out: Annotated[Path, typer.Option(help="directory for ratios.csv")] = Path("result/ectrans"),
    workers: Annotated[int, typer.Option(min=1, help="processes of the executors that have several")] = 2,
    sentences: Annotated[int, typer.Option(min=1, help="of the larger workloads")] = 512,
    text: Annotated[Path | None, typer.Option(help="sentences, one a line; else made ones")] = None,
    max_new: Annotated[int, typer.Option("--max-new", min=1)] = 60,
    seed: Annotated[int, typer.Option()] = 0,
    with_train: Annotated[str, typer.Option("--with-train", help="corun: model to train beside")] = "",
    train_batch: Annotated[int, typer.Option("--train-batch-size", min=1)] = 16,
) -> None:
    """Measure conditions in turns and write the ratios with their intervals."""
    with guard():
        from corun.ectrans.compare import Settings, run, write

        texts = read_texts(text, seed)
        if with_train:
            registry.model(with_train)
        settings = Settings(parts, repeats, workers, sentences, max_new, seed, texts, with_train, train_batch)
        ratios = run(matrix, settings, _say)
        write(out, ratios)
        print(json.dumps({"ratios": [ratio.body() for ratio in ratios], "out": str(out)}))


def simulated(
    mix: Mix = "H",
    gap_ms: Annotated[float, typer.Option("--gap-ms", min=0)] = 100.0,
    poisson: Annotated[bool, typer.Option("--poisson", help="Poisson arrivals instead of a mix")] = False,
    load: Annotated[float, typer.Option(min=0, help="Poisson: mean service time x rate")] = 0.9,
    count: Annotated[int, typer.Option(min=1, help="Poisson: requests")] = 4000,
    sizes: Sizes = mixes.SIZES,
    seed: Annotated[int, typer.Option()] = 0,
    policy: Annotated[str, typer.Option(help="one or several by commas")] = "fcfs,sjf,hrrn-stale,hrrn",
    packing: Annotated[str, typer.Option(help="one or several by commas: off, count, cost")] = "off,count",
    max_items: MaxItems = 64,
    lanes: Lanes = "shared",
    rt_share: Annotated[float, typer.Option("--rt-share", min=0, max=1)] = 0.0,
    batch_threshold: Threshold = 256,
    servers: Annotated[int, typer.Option(min=1)] = 1,
    service: Annotated[
        str, typer.Option(help="a,b: a package of n sentences takes a + b n seconds")
    ] = "0.236,0.0504",
) -> None:
    """Scheduling in virtual time: no model; a table, then one JSON object."""
    with guard():
        cost = _pair(service)
        arrivals: Sequence[mixes.Arrival] = mixes.mix(mixes.parse_mix(mix), gap_ms)
        if poisson:
            arrivals = mixes.poisson(
                _rate(sizes, max_items, cost, load) * servers, mixes.parse_sizes(sizes), count, seed
            )
        outcomes = {}
        for one in policy.split(","):
            for how in packing.split(","):
                rules = Rules(one, how, Limits(max_items), 0, lanes, rt_share, servers, batch_threshold)
                outcomes[f"{one}, {how}"] = simulate.run(arrivals, rules, cost, servers)
        print(simulate.table(outcomes))
        print(json.dumps({name: outcome.body() for name, outcome in outcomes.items()}))


def _rate(sizes: str, max_items: int, cost: tuple[float, float], utilisation: float) -> float:
    """Requests a second that keep one server busy for a share of the time."""
    mean_s = sum(
        share * (-(-size // max_items) * cost[0] + size * cost[1]) for size, share in mixes.parse_sizes(sizes).items()
    )
    return utilisation / mean_s


def _pair(text: str) -> tuple[float, float]:
    try:
        first, second = (float(part) for part in text.split(","))
    except ValueError:
        raise InputError(f'--service "{text}" is not two numbers a,b') from None
    if min(first, second) < 0 or first + second <= 0:
        raise InputError(f'--service "{text}": give seconds, 0 or more, not both 0')
    return first, second


def _say(line: str) -> None:
    print(line, flush=True)
