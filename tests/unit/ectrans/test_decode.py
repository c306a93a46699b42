"""Decoding: rows that join and leave a running batch answer as they would alone, without any cache."""

from __future__ import annotations

from collections.abc import Hashable
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch.utils.flop_counter import FlopCounterMode

from corun.ectrans import build, decode, parts, training
from corun.ectrans.decode import ContinuousDecoder, Decoder, StaticDecoder, no_cache_decoder
from corun.ectrans.encode import Encoder
from corun.ectrans.tokens import Tokenizer
from corun.errors import InputError

pytestmark = pytest.mark.timeout(600)  # a guard against hanging, wide enough for a machine with ten times the work
TOLERANCE = 1e-4
SEARCH = settings(
    max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
)
SENTENCES = 24


def random_parts(architecture: str, seed: int = 3) -> tuple[Encoder, Decoder]:
    """A network whose random weights are large enough to make every prefix answer differently."""
    model = build.random_model("tiny", architecture, seed)
    torch.manual_seed(seed)
    with torch.no_grad():
        for name, value in model.named_parameters():
            if value.dim() > 1 and "embed" not in name and "shared" not in name:
                value.normal_(0, 0.15)
    return Encoder(build.encoder_of(model), model.config), Decoder(model)


@pytest.fixture(scope="module", params=build.ARCHITECTURES)
def network(request: pytest.FixtureRequest) -> tuple[Encoder, Decoder]:
    return random_parts(request.param)


@pytest.fixture(scope="module")
def learned(trained_parts: Path) -> tuple[Encoder, Decoder, list[list[int]]]:
    """The trained tiny network and the ids of sentences of mixed lengths."""
    tokenizer = Tokenizer.load(trained_parts)
    ids = [tokenizer.encode(sentence) for sentence in training.tiny_sentences(SENTENCES)]
    return parts.load_encoder(trained_parts), parts.load_decoder(trained_parts), ids


class Watched(ContinuousDecoder):
    """A continuous decoder that keeps the logits of every step of every row."""

    def __init__(self, decoder: Decoder, slots: int, max_new: int) -> None:
        super().__init__(decoder, slots, max_new)
        self.seen: dict[Hashable, list[torch.Tensor]] = {}
        self.longest = 0

    def logits(self, batch: decode.Batch) -> torch.Tensor:
        result = super().logits(batch)
        for row, values in zip(self._rows, result, strict=True):
            self.seen.setdefault(row.key, []).append(values.clone())
        self.longest = max(self.longest, batch.length)
        return result


def run(
    continuous: ContinuousDecoder, encoder: Encoder, rows: list[list[int]], joins: list[int]
) -> dict[Hashable, list[int]]:
    """Answers when row i asks to join from step joins[i] on, in that order, as soon as a slot is free."""
    waiting = sorted(range(len(rows)), key=lambda i: (joins[i], i))
    answers: dict[Hashable, list[int]] = {}
    step = 0
    while waiting or continuous.active:
        ready = [i for i in waiting if joins[i] <= step][: continuous.free]
        if ready:
            continuous.admit(*encoder.encode([rows[i] for i in ready]), ready)
            waiting = [i for i in waiting if i not in ready]
        answers |= dict(continuous.step())
        step += 1
    return answers


@st.composite
def histories(draw: st.DrawFn) -> tuple[list[list[int]], list[int], int]:
    """Sentences of 1 to 9 tokens, the step from which each may join, and a number of slots."""
    rows = draw(st.lists(st.lists(st.integers(3, 999), min_size=1, max_size=9), min_size=1, max_size=7))
    joins = draw(st.lists(st.integers(0, 12), min_size=len(rows), max_size=len(rows)))
    return rows, joins, draw(st.integers(1, 4))


@SEARCH
@given(histories())
def test_joining_and_leaving_change_nothing(
    network: tuple[Encoder, Decoder], history: tuple[list[list[int]], list[int], int]
) -> None:
    """Whatever joins and leaves when, each row's logits are those of its prefix alone without cache, within 1e-4."""
    encoder, decoder = network
    rows, joins, slots = history
    watched = Watched(decoder, slots, max_new=8)
    answers = run(watched, encoder, rows, joins)
    assert sorted(answers) == list(range(len(rows)))
    for i, row in enumerate(rows):
        ids = answers[i]
        prefix = torch.tensor([[decoder.start_id, *ids[:-1]]])
        expected = decoder.logits(*encoder.encode([row]), prefix)[0]
        found = torch.stack(watched.seen[i])
        found[:, decoder.pad_id] = expected[:, decoder.pad_id]
        assert found.shape == expected.shape
        assert (found - expected).abs().max() < TOLERANCE
        assert len(ids) == 8 or ids[-1] == decoder.eos_id


def test_late_rows_answer_differently_from_each_other(network: tuple[Encoder, Decoder]) -> None:
    """The random networks of the property test are no constant: their answers have several tokens."""
    encoder, decoder = network
    rows = [[5, 6, 7], [100, 200, 300, 400], [42] * 6]
    answers = run(ContinuousDecoder(decoder, 2, 8), encoder, rows, [0, 2, 5])
    assert len({token for ids in answers.values() for token in ids}) >= 3


def test_the_position_correction_matters() -> None:
    """Marian without the correction of positions answers wrongly, so the property test can fail."""
    encoder, decoder = random_parts("marian")
    watched = Watched(decoder, 2, 8)
    watched._inputs = lambda tokens, length: {"decoder_input_ids": tokens}  # type: ignore[method-assign]
    answers = run(watched, encoder, [[5, 6, 7], [9, 8]], [0, 4])
    prefix = torch.tensor([[decoder.start_id, *answers[1][:-1]]])
    expected = decoder.logits(*encoder.encode([[9, 8]]), prefix)[0]
    found = torch.stack(watched.seen[1])
    found[:, decoder.pad_id] = expected[:, decoder.pad_id]
    assert (found - expected).abs().max() > 100 * TOLERANCE


def test_given_embeddings_are_scaled_by_the_network() -> None:
    """transformers multiplies given decoder embeddings by embed_scale (4.x did not): the correction relies on it."""
    encoder, decoder = random_parts("marian")
    hidden, mask = encoder.encode([[5, 6, 7]])
    ids = torch.tensor([[decoder.start_id, 5]])
    stack = decoder.module.get_decoder()
    given_embeddings = decoder.module(
        encoder_outputs=(hidden,), attention_mask=mask, decoder_inputs_embeds=stack.embed_tokens(ids)
    ).logits
    assert torch.equal(given_embeddings, decoder.logits(hidden, mask, ids))
    assert stack.embed_scale == 8.0


def test_greedy_is_the_same_in_every_decoder(learned: tuple[Encoder, Decoder, list[list[int]]]) -> None:
    """Static, continuous and no-cache decoding give the same tokens as each sentence alone, with real ends."""
    encoder, decoder, rows = learned
    alone = [no_cache_decoder(decoder, 20).decode(*encoder.encode([row]))[0] for row in rows]
    assert all(ids[-1] == decoder.eos_id for ids in alone)
    assert len({len(ids) for ids in alone}) >= 5
    batch = encoder.encode(rows)
    assert StaticDecoder(decoder, 20).decode(*batch) == alone
    assert no_cache_decoder(decoder, 20).decode(*batch) == alone
    joins = [3 * (i % 5) for i in range(len(rows))]
    answers = run(ContinuousDecoder(decoder, 6, 20), encoder, rows, joins)
    assert [answers[i] for i in range(len(rows))] == alone


def test_continuous_takes_fewer_steps(learned: tuple[Encoder, Decoder, list[list[int]]]) -> None:
    """With as many slots as a batch has rows, continuous decoding ends in fewer steps than static batches in order."""
    encoder, decoder, rows = learned
    continuous = ContinuousDecoder(decoder, 4, 20)
    run(continuous, encoder, rows, [0] * len(rows))
    static = StaticDecoder(decoder, 20)
    batches = [static.decode(*encoder.encode(rows[i : i + 4])) for i in range(0, len(rows), 4)]
    assert continuous.steps < sum(max(map(len, batch)) for batch in batches)


@pytest.mark.parametrize("cache", [True, False])
def test_beams(learned: tuple[Encoder, Decoder, list[list[int]]], cache: bool) -> None:
    """Beam search has an answer per sentence that ends once, batched as alone, with and without cache."""
    encoder, decoder, rows = learned
    beams = StaticDecoder(decoder, 20, beam=3, cache=cache)
    answers = beams.decode(*encoder.encode(rows[:6]))
    assert answers == [beams.decode(*encoder.encode([row]))[0] for row in rows[:6]]
    assert all(ids.count(decoder.eos_id) <= 1 and decoder.pad_id not in ids for ids in answers)


def test_the_cache_stays_as_short_as_the_longest_answer(network: tuple[Encoder, Decoder]) -> None:
    """A batch that never empties does not grow: leading slots nobody uses are dropped, so positions never run out."""
    encoder, decoder = network
    watched = Watched(decoder, 3, max_new=6)
    rows = [[5 + i, 6, 7 + i] for i in range(20)]
    run(watched, encoder, rows, [2 * i for i in range(20)])
    assert watched.steps > 20
    assert watched.longest <= 6
    assert watched.cache_length == 0


def test_as_long_as_the_table_of_positions(network: tuple[Encoder, Decoder]) -> None:
    """Marian refuses answers its table of positions cannot number; T5 has no such table."""
    _, decoder = network
    if decoder.max_positions is None:
        assert ContinuousDecoder(decoder, 1, 5000).free == 1
        return
    assert ContinuousDecoder(decoder, 1, decoder.max_positions).free == 1
    for make in (StaticDecoder, no_cache_decoder):
        with pytest.raises(InputError, match="table of positions"):
            make(decoder, decoder.max_positions + 1)
    with pytest.raises(InputError, match="table of positions"):
        ContinuousDecoder(decoder, 1, decoder.max_positions + 1)


def test_the_last_position_can_be_reached() -> None:
    """An answer as long as the table of positions comes out whole, also beside a row that joined late."""
    config = build.configuration("tiny")
    config.max_position_embeddings = 12
    torch.manual_seed(3)
    model = build.model_class(config)(config).eval()
    encoder, decoder = Encoder(model.get_encoder(), config), Decoder(model)
    decoder.eos_id = 999
    answers = run(ContinuousDecoder(decoder, 2, 12), encoder, [[5, 6], [7, 8], [9]], [0, 3, 5])
    assert [len(answers[i]) for i in range(3)] == [12, 12, 12]


def test_cancelling(network: tuple[Encoder, Decoder]) -> None:
    """A cancelled row is gone and its slot free; the others answer as if it had never been."""
    encoder, decoder = network
    rows = [[5, 6, 7], [100, 200, 300, 400], [42, 7]]
    expected = StaticDecoder(decoder, 8).decode(*encoder.encode(rows))
    longest = max(range(3), key=lambda i: len(expected[i]))
    continuous = ContinuousDecoder(decoder, 3, 8)
    continuous.admit(*encoder.encode(rows), [0, 1, 2])
    answers = dict(continuous.step())
    running = continuous.active
    assert continuous.cancel(longest)
    assert not continuous.cancel(longest)
    assert continuous.free == 3 - running + 1
    while continuous.active:
        answers |= dict(continuous.step())
    assert answers == {i: ids for i, ids in enumerate(expected) if i != longest}


def test_what_cannot_be_admitted(network: tuple[Encoder, Decoder]) -> None:
    """Too many rows, a key twice and a count that does not fit are refused; an empty step does nothing."""
    encoder, decoder = network
    hidden, mask = encoder.encode([[5, 6], [7, 8]])
    continuous = ContinuousDecoder(decoder, 2, 4)
    assert continuous.step() == []
    continuous.admit(hidden[:0], mask[:0], [])
    for keys in (["a"], ["a", "a"], ["a", "b", "c"]):
        with pytest.raises(InputError, match="cannot admit"):
            continuous.admit(hidden, mask, keys)
    continuous.admit(hidden[:1], mask[:1], ["a"])
    with pytest.raises(InputError, match="cannot admit"):
        continuous.admit(hidden[:1], mask[:1], ["a"])
    with pytest.raises(InputError, match="slots is 0"):
        ContinuousDecoder(decoder, 0)
    with pytest.raises(InputError, match="beam is 0"):
        StaticDecoder(decoder, beam=0)


def test_what_the_cache_is_worth() -> None:
    """At 20 target tokens, 36 source tokens and beam 3 no cache costs at least 5 times the operations of a cache.

    Widths of the base preset with two layers a side: the ratio is that of decoder and encoder together.
    """
    config = build.configuration("base")
    config.encoder_layers = config.decoder_layers = 2
    with torch.device("cpu"):
        model = build.model_class(config)(config).eval()
    encoder, decoder = Encoder(model.get_encoder(), config), Decoder(model)
    rows = [[3 + (7 * i + j) % 900 for i in range(36)] for j in range(2)]

    def operations(cache: bool) -> int:
        static = StaticDecoder(decoder, 20, beam=3, cache=cache)
        static._how.min_new_tokens = 20
        with FlopCounterMode(display=False) as counter:
            static.decode(*encoder.encode(rows))
        return int(counter.get_total_flops())

    assert operations(cache=False) >= 5 * operations(cache=True)
