"""ChatGLM2 at the edge: one adapter answers while another one learns, over one base network.

python src/edge_server.py --preset tiny                                   random weights, new adapters
python src/edge_server.py --glm_path chatglm2-6b --inference_path adapter --train_tag 0 --data questions.jsonl
python src/edge_server.py --preset tiny --port 54100           sentences and labels come from clients over the socket
"""

from __future__ import annotations

from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from corun.errors import InputError, guard
from corun.process import StopSignal, set_threads

if TYPE_CHECKING:
    from collections.abc import Sequence

    from corun.llm.edge import EdgeOptions, EdgeResult
    from corun.llm.items import Item

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@app.command()
def main(
    glm_path: Annotated[str, typer.Option("--glm_path", help="directory of a ChatGLM2-6B checkpoint")] = "",
    train_path: Annotated[str, typer.Option("--train_path", help="adapter to train on; empty = a new one")] = "",
    inference_path: Annotated[str, typer.Option("--inference_path", help="adapter that answers; empty = new")] = "",
    train_tag: Annotated[int, typer.Option("--train_tag", min=0, max=1, help="1 = train")] = 1,
    inference_tag: Annotated[int, typer.Option("--inference_tag", min=0, max=1, help="1 = answer")] = 1,
    bs: Annotated[int, typer.Option(min=1, help="batch size of both")] = 2,
    data: Annotated[Path | None, typer.Option(help="JSON or JSON lines of sentences and labels")] = None,
    port: Annotated[int, typer.Option(min=0, max=65535, help="serve clients here until Ctrl-C; 0 = only --data")] = 0,
    host: Annotated[str, typer.Option(help="with --port: address to listen on")] = "127.0.0.1",
    deadline_ms: Annotated[
        int, typer.Option("--deadline_ms", min=0, help="with --port: of requests without one")
    ] = 0,
    accumulate: Annotated[int, typer.Option(min=1, help="batches of one optimiser step")] = 1,
    checkpoint: Annotated[Path | None, typer.Option(help="written when --data is learnt")] = None,
    resume: Annotated[Path | None, typer.Option(help="a checkpoint to go on from, with the same --data")] = None,
    preset: Annotated[str, typer.Option(help="without --glm_path: tiny, small, mid or 6b, random weights")] = "tiny",
    epochs: Annotated[int, typer.Option(min=1, help="passes over the data")] = 1,
    lr: Annotated[float, typer.Option(min=0, help="learning rate")] = 1e-4,
    sharing: Annotated[str, typer.Option(help="process, thread or none (two copies of the base)")] = "process",
    engine: Annotated[str, typer.Option(help="static or continuous batching")] = "static",
    new_tokens: Annotated[int, typer.Option("--new_tokens", min=1, help="longest answer")] = 32,
    precision: Annotated[str, typer.Option(help="fp32, bf16 or fp16")] = "fp32",
    device: Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N")] = "auto",
    threads: Annotated[int, typer.Option(min=1, help="intra-op threads of each side")] = 1,
    publish: Annotated[bool, typer.Option(help="after training answer again with the learner's adapter")] = True,
    out: Annotated[
        Path | None, typer.Option(help="directory for adapter/ and answers.jsonl; default in result/")
    ] = None,
) -> None:
    """Train and answer at the same time; prints losses, answers, time to first token and time per token."""
    with guard():
        set_threads(threads)
        from corun.llm import edge
        from corun.llm import items as texts
        from corun.run.directory import result_root
        from corun.torch_tools import resolve_device

        options = edge.EdgeOptions(
            glm_path=glm_path or None,
            preset=preset,
            train_path=_path(train_path),
            inference_path=_path(inference_path),
            train=train_tag == 1,
            infer=inference_tag == 1,
            bs=bs,
            epochs=epochs,
            lr=lr,
            sharing=sharing,
            engine=engine,
            new_tokens=new_tokens,
            precision=precision,
            device=resolve_device(device),
            threads=threads,
            publish=publish,
            accumulate=accumulate,
            checkpoint=checkpoint,
            resume=resume,
        )
        directory = out or result_root() / f"edge-{datetime.now():%Y%m%d-%H%M%S}"
        if port:
            _serve(texts.read_items(data) if data else [], options, host, port, deadline_ms, directory)
        else:
            items = texts.read_items(data) if data else list(edge.DEFAULT_DATA)
            result = edge.serve_and_learn(items, options, directory / "adapter")
            _show(result)
            edge.write(result, directory)
        print(f"written to {directory}")


def _serve(
    items: Sequence[Item], options: EdgeOptions, host: str, port: int, deadline_ms: int, directory: Path
) -> None:
    from corun.llm.online import Post, serve
    from corun.wire import Address

    if options.checkpoint or options.resume:
        raise InputError("--checkpoint and --resume belong to --data; with --port go on from --train_path")
    with StopSignal() as stop:
        post = Post(Address("tcp", host, port), directory, deadline_ms)
        print(f"stopped: {serve(items, options, post, stop)}")


def _path(text: str) -> Path | None:
    return Path(text).expanduser() if text else None


def _show(result: EdgeResult) -> None:
    print(f"base: {result.base}")
    if result.steps:
        print(f"trained {len(result.steps)} steps, loss {result.steps[0].loss:.4f} -> {result.steps[-1].loss:.4f}")
    for answer in result.answers:
        ttft, tpot = (f"{ms:.1f} ms" if ms is not None else "n/a" for ms in (answer.ttft_ms, answer.tpot_ms))
        print(
            f"[{answer.version}] {answer.index}: {answer.text!r}  ({answer.tokens} tokens, ttft {ttft}, tpot {tpot})"
        )
    if result.label:
        print(f"note: {result.label}")


if __name__ == "__main__":
    app()
