"""Tasks of sentences on one model: FIFO, shortest job, earliest deadline or highest response ratio first.

python src/schedule.py --simulate                                     all four policies in virtual time
python src/schedule.py --task_batch 2 --schedule_mode sjf --model tiny --data tasks.json
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated

import typer

from corun.errors import InputError, guard
from corun.process import set_threads

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@app.command()
def main(
    task_batch: Annotated[int, typer.Option("--task_batch", min=1, help="waiting tasks done together")] = 2,
    batch_size_predict: Annotated[int, typer.Option("--batch_size_predict", min=1, help="sentences in a batch")] = 16,
    schedule_mode: Annotated[
        str, typer.Option("--schedule_mode", help="fifo, sjf, edf, hrrn, or all of them")
    ] = "all",
    interval_time: Annotated[float, typer.Option("--interval_time", min=0, help="s between made arrivals")] = 0.1,
    data: Annotated[Path | None, typer.Option(help="JSON list of tasks; else tasks of --sizes")] = None,
    sizes: Annotated[str, typer.Option(help="sentences of each made task")] = "32,4,16,2,8,2,16,1",
    limit: Annotated[float | None, typer.Option(min=0, help="time limit of made tasks, s per sentence")] = None,
    model: Annotated[
        str, typer.Option(help="tiny, small, mid, 6b (random weights) or a checkpoint directory")
    ] = "tiny",
    adapter: Annotated[Path | None, typer.Option(help="LoRA adapter to answer with")] = None,
    new_tokens: Annotated[int, typer.Option("--new_tokens", min=1, help="longest answer")] = 16,
    precision: Annotated[str, typer.Option(help="fp32, bf16 or fp16")] = "fp32",
    device: Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N")] = "auto",
    threads: Annotated[int, typer.Option(min=1)] = 1,
    simulate: Annotated[bool, typer.Option("--simulate", help="virtual time, no model")] = False,
    cost: Annotated[str, typer.Option(help="with --simulate: a,b of a batch of n, a + b n seconds")] = "0.236,0.0504",
) -> None:
    """Run the same arrivals under each policy and print mean, p99 and worst turnaround side by side."""
    with guard():
        set_threads(threads)
        from corun.llm import schedule

        tasks = (
            schedule.read_tasks(data, interval_time)
            if data
            else schedule.made_tasks([int(size) for size in _numbers(sizes)], interval_time, limit)
        )
        modes = schedule.MODES if schedule_mode == "all" else (schedule_mode,)
        rules = [schedule.Rules(mode, task_batch, batch_size_predict) for mode in modes]
        if simulate:
            costs = schedule.BatchCost(*_cost(cost))
            runs = [schedule.simulate(tasks, rule, costs) for rule in rules]
        else:
            execute = _executor(model, adapter, precision, device, new_tokens, batch_size_predict, threads)
            runs = [schedule.task_process(tasks, execute, rule) for rule in rules]
        print(schedule.comparison([schedule.outcome(mode, done) for mode, done in zip(modes, runs, strict=True)]))
        if not simulate:
            print(f"first answer: {runs[0][0].answers[0]!r}")


def _executor(
    model: str, adapter: Path | None, precision: str, device: str, new_tokens: int, batch: int, threads: int
) -> Callable[[Sequence[str]], list[str]]:
    """The model as a function from sentences to answers, warmed up."""
    import torch

    from corun.llm.predict import glm_predict, load_predictor
    from corun.torch_tools import resolve_device

    torch.set_num_threads(threads)
    predictor = load_predictor(model, adapter, precision, resolve_device(device), new_tokens)
    print(f"{model}: {predictor.label}, tokenizer {predictor.tokenizer.label.partition(' ')[0]}", flush=True)
    glm_predict(predictor, ["warm-up"], batch)
    return lambda sentences: glm_predict(predictor, sentences, batch)


def _numbers(text: str) -> list[float]:
    try:
        numbers = [float(part) for part in text.split(",")]
    except ValueError:
        raise InputError(f'"{text}" is not a list of numbers, e.g. 32,4,16') from None
    if not all(0 <= number < 1e6 for number in numbers):
        raise InputError(f'"{text}": numbers from 0 to 1e6 are meant')
    return numbers


def _cost(text: str) -> tuple[float, float]:
    numbers = _numbers(text)
    if len(numbers) != 2:
        raise InputError(f'--cost "{text}" is not two numbers a,b')
    return numbers[0], numbers[1]


if __name__ == "__main__":
    app()
