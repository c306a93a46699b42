"""The edge server over a socket: answers while it learns from labelled sentences that clients send."""

from __future__ import annotations

import csv
import json
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from corun.errors import InputError
from corun.llm import adapters
from corun.llm.base import tree
from corun.llm.edge import EdgeOptions
from corun.llm.generate import Prompt, generate
from corun.llm.items import Item, prompt_ids
from corun.llm.learn import LearnOptions, new_learner
from corun.llm.online import Post, serve
from corun.llm.sharing import THREAD
from corun.testing.ask import Asker
from corun.wire import Address, Status, connect
from corun.wire.channel import Channel
from corun.wire.messages import Stop

QUESTION = json.dumps({"prompt": "hello", "max_new_tokens": 6}).encode()
LESSONS = [json.dumps({"sentence": [word], "label": "yes", "max_new_tokens": 2}).encode() for word in ("hello", "hi")]


class NeverStop:
    """A stop signal that does not come."""

    requested = False

    def __init__(self) -> None:
        import os

        self._fd = os.eventfd(0)

    def fileno(self) -> int:
        return self._fd

    def close(self) -> None:
        import os

        os.close(self._fd)


@contextmanager
def edge(tmp_path: Path, **options: Any) -> Iterator[Address]:
    """An edge server in a thread; stopped at the end."""
    address = Address("unix", str(tmp_path / "edge.sock"))
    failures: list[BaseException] = []
    stop = NeverStop()

    def run() -> None:
        try:
            settings = EdgeOptions(**{"sharing": THREAD, "new_tokens": 6, "lr": 0.05, "epochs": 20, **options})
            serve([], settings, Post(address, tmp_path), stop, lambda line: None)
        except BaseException as error:  # noqa: BLE001 - raised again in the test's thread
            failures.append(error)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    events = tmp_path / "events.csv"
    until(lambda: failures or (events.exists() and ",ready," in events.read_text()))
    try:
        yield address
    finally:
        if not failures:
            channel = Channel(connect(address))
            channel.request(Stop(), 60.0)
            channel.close()
        thread.join(60)
    assert not thread.is_alive()
    stop.close()
    if failures:
        raise failures[0]


def rows(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def until(condition: Callable[[], Any]) -> Any:
    deadline = time.monotonic() + 60
    while not (value := condition()):
        assert time.monotonic() < deadline
        time.sleep(0.02)
    return value


@pytest.mark.parametrize("engine", ["static", "continuous"])
def test_labels_from_clients_are_learnt_and_published(engine: str, tmp_path: Path, base: Any) -> None:
    """Answers are the untrained adapter's until enough labels came, then exactly the published adapter's."""
    with edge(tmp_path, engine=engine) as address, Asker(address, 60.0) as asker:
        before = json.loads(asker.ask(QUESTION).payload)["ids"]
        assert [asker.ask(lesson).status for lesson in LESSONS] == [Status.OK] * 2
        until(lambda: "publish" in (tmp_path / "events.csv").read_text())
        after = json.loads(asker.ask(QUESTION).payload)["ids"]
    prompt = Prompt(prompt_ids(Item(("hello",)), base.tokenizer), 6)
    (plain,) = generate(tree(base), [prompt])
    (learnt,) = generate(adapters.attach(tree(base), "serve", base, tmp_path / "adapter").eval(), [prompt])
    assert (before, after) == (list(plain.ids), list(learnt.ids))
    assert before != after
    served = rows(tmp_path / "infer_server" / "edge.csv")
    assert [row["weights_version"] for row in served] == ["", "", "", "1"]
    assert served[0]["tokens_out"] == "6"


def test_the_steps_are_those_of_training_alone(tmp_path: Path, base: Any) -> None:
    """train.csv has the losses that the same examples give without a server, bit for bit."""
    with edge(tmp_path) as address, Asker(address, 60.0) as asker:
        for lesson in LESSONS:
            asker.ask(lesson)
        until(lambda: "publish" in (tmp_path / "events.csv").read_text())
    tokenizer = base.tokenizer
    examples = [
        (prompt_ids(Item((word,)), tokenizer), [*tokenizer.encode("yes", special=False), tokenizer.eos])
        for word in ("hello", "hi")
    ]
    learner = new_learner(base, examples, LearnOptions(batch_size=2, lr=0.05))
    steps = rows(tmp_path / "train.csv")
    assert [float(row["loss"]) for row in steps] == [learner.step().loss for _ in steps]
    assert len(steps) == 20


def test_without_answering_sentences_are_only_learnt(tmp_path: Path) -> None:
    """With inference off a labelled sentence is acknowledged with an empty answer and trains."""
    with edge(tmp_path, infer=False, epochs=1) as address, Asker(address, 60.0) as asker:
        answers = [json.loads(asker.ask(lesson).payload) for lesson in LESSONS]
        until(lambda: len(rows(tmp_path / "train.csv")) == 1)
    assert [answer["ids"] for answer in answers] == [[], []]
    assert (tmp_path / "adapter" / "adapter_config.json").is_file()


def test_bad_labels_are_bad_requests(tmp_path: Path) -> None:
    """A label that is no text is refused; without training a label is ignored."""
    with edge(tmp_path, train=False) as address, Asker(address, 60.0) as asker:
        assert asker.ask(b'{"prompt": "a", "label": 3}').status == Status.BAD_REQUEST
        assert asker.ask(b'{"ids": [5], "label": "yes"}').status == Status.BAD_REQUEST
        assert asker.ask(b"[]").status == Status.BAD_REQUEST
        assert asker.ask(LESSONS[0]).status == Status.OK
    assert rows(tmp_path / "train.csv") == []


def test_nothing_to_do_is_refused(tmp_path: Path) -> None:
    """Neither training nor answering is an error before anything is built."""
    with pytest.raises(InputError, match="cannot start"):
        serve([], EdgeOptions(train=False, infer=False), Post(Address("unix", "x"), tmp_path), NeverStop())
