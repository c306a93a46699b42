"""Both engines: the tokens of a prompt alone, stamps, cancelling, deadlines, publishing, and what is refused."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import pairwise
from typing import Any

import pytest
import torch

from corun.clock import now_ns
from corun.errors import InputError, RunFault
from corun.llm import adapters
from corun.llm.base import tree
from corun.llm.continuous import ContinuousEngine
from corun.llm.engine import Engine, StaticEngine, Ticket
from corun.llm.generate import Prompt, generate
from corun.llm.learn import LearnOptions, new_learner
from corun.serve.batcher import Batcher

pytestmark = pytest.mark.timeout(600)  # a guard against hanging, wide enough for a machine with ten times the work
PROMPTS = [Prompt([3 + (7 * i + 3 * j) % 250 for j in range(4 + 3 * i)], 4 + 3 * i) for i in range(6)]
ENGINES = ["static", "continuous"]


def make(kind: str, base: Any) -> Any:
    model = adapters.attach(tree(base), "serve", base)
    if kind == "static":
        return StaticEngine(model, Batcher(4, 2_000_000))
    return ContinuousEngine(model, blocks=16, page=16)


@contextmanager
def running(kind: str, base: Any) -> Iterator[Any]:
    engine = make(kind, base)
    engine.start()
    try:
        yield engine
    finally:
        engine.close()


@pytest.fixture(scope="module")
def trained(base: Any) -> dict[str, Any]:
    """An adapter that changes the tokens."""
    learner = new_learner(base, [([3, 4, 5], [9, 9, 9])] * 2, LearnOptions(batch_size=2, lr=0.05))
    for _ in range(6):
        learner.step()
    return learner.adapter()


def alone(base: Any, prompt: Prompt, state: dict[str, Any] | None = None) -> tuple[int, ...]:
    model = adapters.attach(tree(base), "serve", base)
    if state is not None:
        adapters.replace(model, "serve", state)
    return generate(model.eval(), [prompt])[0].ids


@pytest.mark.parametrize("kind", ENGINES)
def test_tokens_equal_those_of_each_prompt_alone(kind: str, base: Any) -> None:
    """Prompts of different lengths answered together get the greedy tokens they get one by one."""
    with running(kind, base) as engine:
        tickets = [engine.submit(prompt) for prompt in PROMPTS]
        results = [ticket.result(60) for ticket in tickets]
    for prompt, done in zip(PROMPTS, results, strict=True):
        assert done.ids == alone(base, prompt)
        assert done.stopped == "length"


@pytest.mark.parametrize("kind", ENGINES)
def test_every_token_has_a_stamp_on_the_monotonic_clock(kind: str, base: Any) -> None:
    """Stamps rise between hand-in and now; TTFT and TPOT come from them."""
    with running(kind, base) as engine:
        ticket = engine.submit(Prompt([5, 6, 7], 8))
        done = ticket.result(60)
    end = now_ns()
    assert len(done.stamps_ns) == len(done.ids) == 8
    assert ticket.arrived_ns <= done.stamps_ns[0]
    assert done.stamps_ns[-1] <= end
    assert all(a <= b for a, b in pairwise(done.stamps_ns))
    first = done.ttft_ms(ticket.arrived_ns)
    assert first is not None
    assert first >= 0
    assert done.tpot_ms is not None
    assert done.tpot_ms * 7 == pytest.approx((done.stamps_ns[-1] - done.stamps_ns[0]) / 1e6)


@pytest.mark.parametrize("kind", ENGINES)
def test_an_answer_ends_at_eos(kind: str, base: Any) -> None:
    """The id given as eos ends its own row; rows beside it go on."""
    tokens = alone(base, Prompt([5, 6, 7], 8))
    with running(kind, base) as engine:
        ending = engine.submit(Prompt([5, 6, 7], 8, eos=tokens[3]))
        other = engine.submit(Prompt([5, 6, 7], 8))
        assert ending.result(60).ids == tokens[: tokens.index(tokens[3]) + 1]
        assert ending.result().stopped == "eos"
        assert other.result(60).ids == tokens


@pytest.mark.parametrize("kind", ENGINES)
def test_a_published_adapter_is_used_by_the_next_prompt(kind: str, base: Any, trained: dict[str, Any]) -> None:
    """Before publishing the tokens are the old adapter's, after it exactly the new one's, for the same prompt."""
    prompt = Prompt([3, 4, 5], 12)
    with running(kind, base) as engine:
        before = engine.submit(prompt)
        assert before.result(60).ids == alone(base, prompt)
        assert engine.publish(trained) == 1
        after = engine.submit(prompt)
        assert after.result(60).ids == alone(base, prompt, trained)
        assert (before.version, after.version) == (0, 1)
    assert before.result().ids != after.result().ids


@pytest.mark.parametrize("kind", ENGINES)
def test_an_adapter_of_another_form_is_refused_and_serving_goes_on(kind: str, base: Any) -> None:
    """A failed publication raises InputError at the publisher and changes nothing."""
    prompt = Prompt([3, 4, 5], 5)
    with running(kind, base) as engine:
        with pytest.raises(InputError, match="same form"):
            engine.publish({"x": torch.zeros(1)})
        ticket = engine.submit(prompt)
        assert ticket.result(60).ids == alone(base, prompt)
        assert ticket.version == 0


@pytest.mark.parametrize("kind", ENGINES)
def test_a_cancelled_prompt_ends_and_its_neighbour_does_not(kind: str, base: Any) -> None:
    """Cancelling resolves the ticket as cancelled before its length is reached (its first token waits for that)."""
    given_up = threading.Event()
    with running(kind, base) as engine:
        long = engine.submit(Prompt([5, 6, 7], 200, on_token=lambda token, at_ns: _wait_for(given_up)))
        short = engine.submit(Prompt([8, 9], 5))
        long.cancel()
        given_up.set()
        assert long.result(60).stopped == "cancelled"
        assert len(long.result().ids) < 200
        assert short.result(60).ids == alone(base, Prompt([8, 9], 5))


def _wait_for(event: threading.Event) -> None:
    assert event.wait(60)


@pytest.mark.parametrize("kind", ENGINES)
def test_a_prompt_past_its_deadline_gets_no_further_token(kind: str, base: Any) -> None:
    """A deadline in the past gives no token at all."""
    with running(kind, base) as engine:
        done = engine.submit(Prompt([5, 6, 7], 50, deadline_ns=now_ns() - 1)).result(60)
    assert (done.ids, done.stopped) == ((), "deadline")


def test_a_deadline_ends_a_static_row_in_mid_answer(base: Any) -> None:
    """Time past the deadline after three tokens leaves exactly those three; the other row gets all of its own."""
    ticks = iter(range(100))
    model = tree(base)
    prompts = [Prompt([5, 6], 9, deadline_ns=6), Prompt([5, 6], 9)]
    first, second = generate(model, prompts, clock=lambda: next(ticks))
    assert (len(first.ids), first.stopped) == (3, "deadline")
    assert (len(second.ids), second.stopped) == (9, "length")
    assert second.ids[:3] == first.ids


@pytest.mark.parametrize("kind", ENGINES)
def test_prompts_that_can_never_be_answered_are_refused_at_once(kind: str, base: Any) -> None:
    """Empty and too long prompts raise where they are handed in, and the engine lives on."""
    with running(kind, base) as engine:
        for prompt in (Prompt([], 5), Prompt([5], 0), Prompt([5] * 100, 3000)):
            with pytest.raises(InputError):
                engine.submit(prompt)
        assert len(engine.submit(Prompt([5], 3)).result(60).ids) == 3


def test_the_continuous_pool_limits_a_prompt(base: Any) -> None:
    """What does not fit the cache pool is refused, though the network could take it: it would end the manager."""
    with running("continuous", base) as engine, pytest.raises(InputError, match="more than 256"):
        engine.submit(Prompt([5] * 200, 57))


@pytest.mark.parametrize("kind", ENGINES)
def test_closing_answers_what_was_handed_in(kind: str, base: Any) -> None:
    """After close every ticket is resolved, and new ones are refused."""
    engine = make(kind, base)
    engine.start()
    tickets = [engine.submit(prompt) for prompt in PROMPTS]
    engine.close()
    assert all(ticket.done and len(ticket.result().ids) == ticket.prompt.max_new_tokens for ticket in tickets)
    with pytest.raises(RunFault, match="closed"):
        engine.submit(PROMPTS[0])


def test_a_failing_network_fails_its_batch_and_not_the_engine(base: Any) -> None:
    """An id outside the table fails that batch with the reason; the next batch is answered."""
    with running("static", base) as engine:
        with pytest.raises(RunFault, match="IndexError"):
            engine.submit(Prompt([100_000], 3)).result(60)
        assert len(engine.submit(Prompt([5], 3)).result(60).ids) == 3


def test_a_dead_manager_fails_every_ticket(base: Any) -> None:
    """When the manager's thread dies, waiting tickets get an error instead of waiting for ever."""
    engine = make("continuous", base)
    engine.start()
    ticket = engine.submit(Prompt([100_000], 3))
    with pytest.raises(RunFault, match="failed"):
        ticket.result(60)
    engine.close()


def test_the_static_engine_serves_in_the_order_of_its_policy(base: Any) -> None:
    """With sjf and batches of one, the shortest waiting prompt is answered first."""
    engine = StaticEngine(adapters.attach(tree(base), "serve", base), policy="sjf")
    order: list[int] = []
    tickets = [engine.submit(Prompt([5, 6], count, cancelled=lambda: False)) for count in (9, 3, 6)]
    threads = [threading.Thread(target=_note, args=(ticket, order)) for ticket in tickets]
    engine.start()
    for thread in threads:
        thread.start()
    engine.close()
    for thread in threads:
        thread.join()
    begun = sorted(tickets, key=lambda ticket: ticket.result().stamps_ns[0])
    assert [ticket.prompt.max_new_tokens for ticket in begun] == [3, 6, 9]
    assert sorted(order) == [3, 6, 9]


def _note(ticket: Ticket, order: list[int]) -> None:
    order.append(len(ticket.result(60).ids))


def test_both_engines_are_engines(base: Any) -> None:
    """They offer the same four methods."""
    for kind in ENGINES:
        engine: Engine = make(kind, base)
        assert all(hasattr(engine, name) for name in ("start", "submit", "publish", "close"))
