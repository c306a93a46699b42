"""The text service over a real socket, both ways of batching: streaming, stamps, cancelling, deadlines, publishing."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from tests.unit.serve.tools import Serving

from corun import registry
from corun.clock import now_ns
from corun.errors import InputError
from corun.llm import adapters
from corun.llm.learn import LearnOptions, new_learner
from corun.registry import ModelOptions
from corun.serve.generation import GeneratingEngine, SubmittingEngine, engine_for
from corun.testing.ask import Asker
from corun.wire import STREAM, Status, request_flags

plugin = registry.load_plugin("models", "chatglm")
LONG = b'{"ids": [5, 6, 7], "max_new_tokens": 1000}'
SHORT = b'{"prompt": "hello", "max_new_tokens": 6}'
KINDS = ["static", "continuous"]


@contextmanager
def serving(engine: str, **options: Any) -> Iterator[tuple[Serving, Asker]]:
    """A tiny random network behind a socket, and a client."""
    servable = plugin.serve("tiny", ModelOptions(extra={"engine": engine, "max_running": 4, "cache_tokens": 8192}))
    with (
        Serving(load=lambda message: engine_for(servable), model="chatglm2-tiny", **options) as server,
        Asker(server.server.address) as asker,
    ):
        yield server, asker


@pytest.mark.parametrize("engine", KINDS)
def test_parts_add_up_to_the_reply(engine: str) -> None:
    """Who asks for a stream gets a part per token, in order, then the whole reply; texts and ids add up to it."""
    with serving(engine) as (_, asker):
        streamed, whole = asker.ask(SHORT, flags=STREAM), asker.ask(SHORT)
    reply = json.loads(streamed.payload)
    assert streamed.status == Status.OK
    assert [id for part in streamed.parts for id in json.loads(part)["ids"]] == reply["ids"]
    assert reply["text"].startswith("".join(json.loads(part)["text"] for part in streamed.parts))
    assert streamed.tokens == whole.tokens == len(reply["ids"]) == 6
    assert (whole.parts, whole.payload) == ((), streamed.payload)


def test_both_engines_give_the_same_answers() -> None:
    """Requests of different lengths, in flight together, get the same greedy tokens from either engine."""
    payloads = [b'{"ids": [%d, 9, 8], "max_new_tokens": %d}' % (3 + i, 4 + 3 * i) for i in range(6)]
    found = []
    for engine in KINDS:
        with serving(engine, max_batch=3) as (_, asker):
            ids = [asker.send(payload) for payload in payloads]
            found.append([asker.receive(id).payload for id in ids])
    assert found[0] == found[1]


@pytest.mark.parametrize("engine", KINDS)
def test_a_cancelled_answer_ends_between_two_tokens(engine: str) -> None:
    """After CANCEL the reply says CANCELLED, with fewer tokens than asked for, and the next request is answered."""
    with serving(engine) as (_, asker):
        long = asker.send(LONG, STREAM)
        asker.parts(long, 3)
        asker.cancel(long)
        answer = asker.receive(long)
        assert answer.status == Status.CANCELLED
        assert 3 <= answer.tokens < 1000
        assert asker.ask(SHORT).status == Status.OK


def test_a_waiting_request_is_cancelled_at_once() -> None:
    """Its reply comes while the request before it is still being answered; the one behind it keeps its turn."""
    with serving("static") as (_, asker):
        long = asker.send(LONG, STREAM)
        asker.parts(long, 1)
        waiting, behind = asker.send(SHORT), asker.send(SHORT)
        asker.cancel(waiting)
        assert asker.receive(waiting).status == Status.CANCELLED
        assert asker.parts(long, 1)
        asker.cancel(long)
        assert asker.receive(long).status == Status.CANCELLED
        assert asker.receive(behind).status == Status.OK


@pytest.mark.parametrize("engine", KINDS)
def test_a_deadline_ends_an_answer(engine: str) -> None:
    """A request's own deadline ends it in mid-answer with EXPIRED; tokens made until then were sent."""
    with serving(engine) as (_, asker):
        asker.ask(SHORT)
        answer = asker.ask(LONG, flags=request_flags(stream=True, deadline_ms=150))
    assert answer.status == Status.EXPIRED
    assert len(answer.parts) == answer.tokens < 1000
    assert "deadline" in json.loads(answer.payload)["error"]


def test_a_deadline_that_passed_in_the_queue_computes_nothing() -> None:
    """The server's own deadline counts from the intended time; a request that waited past it gets no token."""
    with serving("static", deadline_ms=300, max_batch=1) as (_, asker):
        due_ns = now_ns()
        first, second = (asker.send(LONG, due_ns=due_ns) for _ in range(2))
        assert asker.receive(first).status == Status.EXPIRED
        answer = asker.receive(second)
    assert (answer.status, answer.tokens) == (Status.EXPIRED, 0)


def test_a_closed_connection_ends_its_answer() -> None:
    """Nobody is left to read it: the server stops making its tokens and serves the next client."""
    with serving("static") as (server, asker):
        with Asker(server.server.address) as gone:
            gone.parts(gone.send(LONG, STREAM), 2)
        assert asker.ask(SHORT).status == Status.OK


@pytest.mark.parametrize("engine", KINDS)
def test_server_rows_have_tokens_and_their_times(engine: str, tmp_path: Path) -> None:
    """tokens_in, tokens_out, ttft_ms and tpot_ms stand in the row of an answer, and nothing impossible."""
    with serving(engine, out=tmp_path) as (_, asker):
        asker.ask(SHORT)
        asker.ask(b"no json")
    with (tmp_path / "infer_server" / "svc.csv").open() as file:
        good, bad = csv.DictReader(file)
    assert (good["status"], good["tokens_out"], int(good["tokens_in"]) > 6) == ("OK", "6", True)
    assert 0 < float(good["ttft_ms"]) <= float(good["latency"])
    assert float(good["ttft_ms"]) + 5 * float(good["tpot_ms"]) <= float(good["latency"])
    assert (bad["status"], bad["tokens_in"], bad["ttft_ms"]) == ("BAD_REQUEST", "", "")


def test_requests_wait_in_the_queue_while_the_running_batch_is_full(tmp_path: Path) -> None:
    """With four places the fifth request is picked only after one of the four has ended."""
    with serving("continuous", out=tmp_path) as (_, asker):
        running = [asker.send(b'{"ids": [5], "max_new_tokens": 40}', STREAM) for _ in range(4)]
        for id in running:
            asker.parts(id, 1)
        fifth = asker.send(SHORT)
        for id in (*running, fifth):
            assert asker.receive(id).status == Status.OK
    with (tmp_path / "infer_server" / "svc.csv").open() as file:
        rows = {int(row["id"]): row for row in csv.DictReader(file)}
    assert int(rows[fifth]["s_picked_ns"]) >= min(int(rows[id]["s_d2h_ns"]) for id in running)


def test_a_prompt_that_can_never_fit_is_a_bad_request() -> None:
    """The cache pool's limit is the client's mistake, not the engine's end."""
    with serving("continuous") as (_, asker):
        answer = asker.ask(b'{"ids": [5], "max_new_tokens": 1025}')
        assert answer.status == Status.BAD_REQUEST
        assert asker.ask(SHORT).status == Status.OK


def test_the_servable_says_which_engine_it_wants() -> None:
    """Pictures keep the plain engine."""
    assert type(engine_for(plugin.serve("tiny", ModelOptions()))) is GeneratingEngine
    continuous = engine_for(plugin.serve("tiny", ModelOptions(extra={"engine": "continuous"})))
    assert isinstance(continuous, SubmittingEngine)
    continuous.close()
    with pytest.raises(InputError, match="cannot be built"):
        plugin.serve("tiny", ModelOptions(extra={"engine": "dynamic"}))


@pytest.mark.parametrize("engine", KINDS)
def test_a_published_adapter_answers_the_next_request(engine: str, base: Any, tmp_path: Path) -> None:
    """Published between two batches of a serving server: before it the old tokens, after it the new adapter's own."""
    learner = new_learner(base, [([3, 4, 5], [9, 9, 9])] * 2, LearnOptions(lr=0.1))
    for _ in range(10):
        learner.step()
    adapters.save(adapters.attach(plugin.parts().assemble(base.shape, base.state), "serve", base), "serve", tmp_path)
    options = ModelOptions(extra={"engine": engine, "adapter": str(tmp_path)})
    servable = plugin.serve("tiny", options)
    payload = b'{"ids": [3, 4, 5], "max_new_tokens": 8}'
    with Serving(load=lambda message: engine_for(servable)) as server, Asker(server.server.address) as asker:
        before = asker.ask(payload).payload
        server.server.queue.post(lambda: servable.publish(learner.adapter()))
        after = asker.ask(payload).payload
    learner.save_adapter(tmp_path / "new")
    fresh = plugin.serve("tiny", ModelOptions(extra={"adapter": str(tmp_path / "new")}))
    batch = fresh.to_device(fresh.preprocess([fresh.decode(payload)]))
    assert before != after == fresh.postprocess(fresh.forward(batch), 1)[0]
