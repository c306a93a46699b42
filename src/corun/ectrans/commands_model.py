"""The commands of `src/ectrans.py` that make, train, split and try a translation model."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from corun.errors import InputError, guard
from corun.process import set_threads

EVERY_STEPS = 50
Model = Annotated[Path, typer.Option("--model", help="model directory")]
Parts = Annotated[Path, typer.Option("--parts", help="directory that `split` wrote")]
Out = Annotated[Path, typer.Option("--out", help="directory to write")]
Device = Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N")]
Threads = Annotated[int, typer.Option(min=1, help="intra-op threads")]


def register(app: typer.Typer) -> None:
    """Add prepare, train, split, join, check and predict."""
    for command in (prepare, train, split, join, check, predict):
        app.command()(command)


def prepare(
    out: Out = Path("models/nmt"),
    preset: Annotated[str, typer.Option(help="tiny (0.2 M parameters) or base (60 M)")] = "tiny",
    architecture: Annotated[str, typer.Option(help="marian or t5")] = "marian",
    text: Annotated[Path | None, typer.Option(help="sentences to train the tokenizer on")] = None,
    synthetic: Annotated[int, typer.Option(min=1, help="without --text: made sentence pairs")] = 2000,
    seed: Annotated[int, typer.Option(help="of the random weights")] = 0,
) -> None:
    """Make a model directory: a tokenizer and random weights."""
    with guard():
        from corun.ectrans import build
        from corun.registry import load_plugin

        texts = load_plugin("datasets", "pairs").read_all(text) if text else None
        build.prepare(preset, texts, synthetic, out, seed, architecture)
        print(f"{architecture} {preset}, random weights of seed {seed}, in {out}")


def train(
    model: Model,
    pairs: Annotated[Path | None, typer.Option(help="JSON lines of source and target")] = None,
    synthetic: Annotated[int, typer.Option(min=1, help="without --pairs: made sentence pairs")] = 4000,
    steps: Annotated[int, typer.Option(min=1, help="batches")] = 1000,
    batch: Annotated[int, typer.Option(min=1, help="pairs in a batch")] = 32,
    device: Device = "cpu",
    threads: Threads = 1,
    seed: Annotated[int, typer.Option(help="of the pairs and their order")] = 0,
) -> None:
    """Train a model directory in place."""
    with guard():
        set_threads(threads)
        from corun.ectrans import training
        from corun.registry import load_plugin
        from corun.torch_tools import resolve_device

        language = load_plugin("datasets", "pairs")
        found = language.read_pairs(pairs) if pairs else language.made_pairs(synthetic, seed)
        losses = training.train(model, found, steps, resolve_device(device), seed, batch, _report)
        print(f"loss {losses[0]:.4f} -> {losses[-1]:.4f} in {steps} steps; {model} is trained")


def _report(step: int, loss: float) -> None:
    if step % EVERY_STEPS == 0:
        print(f"step {step}: loss {loss:.4f}", flush=True)


def split(
    model: Model,
    out: Out,
    embedding: Annotated[bool, typer.Option(help="put a copy of the source table into device/")] = False,
) -> None:
    """Write the encoder part, the decoder part and the client's part of a model."""
    with guard():
        from corun.ectrans import parts

        parts.split(model, out, embedding)
        manifest = parts.read_manifest(out)
        for name, file in manifest["files"].items():
            print(f"{file['bytes'] / 2**20:9.2f} MiB  {name}")


def join(parts: Parts, out: Out) -> None:
    """Put the parts together to a model directory."""
    with guard():
        from corun.ectrans import parts as pieces

        print(f"whole model in {pieces.join(parts, out)}")


def check(
    parts: Parts,
    model: Annotated[Path | None, typer.Option("--model", help="compare with this model directory")] = None,
) -> None:
    """Check every file's hash, and that the parts give the whole network's logits bit for bit."""
    with guard():
        from corun.ectrans import parts as pieces

        pieces.check(parts, model)
        print(f"{parts}: every file is intact, the logits are equal")


def predict(
    parts: Parts,
    sentences: Annotated[list[str] | None, typer.Argument(help="sentences; none = read from standard input")] = None,
    datafile: Annotated[Path | None, typer.Option("--datafile", help="text file, one sentence a line")] = None,
    batch_size: Annotated[int, typer.Option("--batch-size", min=1)] = 8,
    beam: Annotated[int, typer.Option(min=1)] = 1,
    max_new: Annotated[int, typer.Option("--max-new", min=1, help="longest answer in tokens")] = 60,
    cache: Annotated[bool, typer.Option(help="--no-cache: the historical mode without key-value cache")] = True,
    device: Device = "cpu",
    dtype: Annotated[str, typer.Option(help="fp32, bf16 or fp16")] = "fp32",
    threads: Threads = 1,
) -> None:
    """Translate sentences in one process, in batches in their order."""
    with guard():
        set_threads(threads)
        from corun.ectrans import translate
        from corun.torch_tools import resolve_device

        lines = _lines(sentences or [], datafile)
        translator = translate.load(parts, resolve_device(device), dtype, max_new, beam, cache)
        for start in range(0, len(lines), batch_size):
            for answer in translator.translate(lines[start : start + batch_size]):
                print(answer, flush=True)


def _lines(sentences: list[str], datafile: Path | None) -> list[str]:
    if datafile is not None:
        from corun.registry import load_plugin

        found: list[str] = load_plugin("datasets", "pairs").read_texts(datafile)
        return found
    if not sentences:
        sentences = [line.rstrip("\n") for line in typer.get_text_stream("stdin")]
    kept = [line for line in sentences if line.strip()]
    if not kept:
        raise InputError("there is nothing to translate: give sentences, --datafile or lines on standard input")
    return kept
