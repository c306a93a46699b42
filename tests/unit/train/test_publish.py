"""Learning from labelled arrivals and publishing: never a label before its time, never a worse version."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from corun.arrivals import schedule as schedules
from corun.clock import NS_PER_MS, NS_PER_S, now_ns
from corun.errors import InputError
from corun.train.arrivals import ArrivalBatches, Arrivals, is_held_out
from corun.train.options import PublishOptions, TrainOptions
from corun.train.publish import Publisher, Scores, decide
from corun.train.trainer import Trainer
from corun.weights import Versions

MODEL, SIZE = "squeezenet1_1", 17
COUNT = st.integers(0, 200)


# What is known when


@given(
    st.lists(st.integers(0, 10**10), min_size=1, max_size=60).map(sorted),
    st.floats(0, 5, allow_nan=False),
    st.integers(-(10**9), 2 * 10**10),
)
def test_no_label_is_known_before_its_delay_is_over(due: list[int], delay_s: float, later: int) -> None:
    """An arrival counts as labelled exactly from its due time plus the delay on, and nothing before the start."""
    arrivals = Arrivals(np.array(due, np.int64), list(range(len(due))), range(len(due)), delay_s)
    assert arrivals.labelled(10**15) == 0
    start = 10**12
    arrivals.begin(start)
    known = [instant for instant in due if start + instant + round(delay_s * NS_PER_S) <= start + later]
    assert arrivals.labelled(start + later) == len(known)


@given(st.lists(st.integers(0, 40), min_size=1, max_size=80), st.integers(0, 100), st.booleans())
def test_held_out_payloads_are_never_learnt_from(payloads: list[int], count: int, held_out: bool) -> None:
    """The two kinds share no payload however often one is sent; the newest come first and at most `count`."""
    arrivals = Arrivals(np.arange(len(payloads)), payloads, range(41), 0.0)
    arrivals.begin(0)
    found = arrivals.newest(count, held_out, len(payloads))
    expected = [payload for payload in reversed(payloads) if is_held_out(payload) == held_out]
    assert found == expected[:count]


# What is decided


@given(COUNT, COUNT, st.one_of(st.none(), COUNT), COUNT, st.floats(0, 1, allow_nan=False))
def test_a_version_that_is_not_better_is_never_published(
    candidate: int, service: int, previous: int | None, samples: int, gain: float
) -> None:
    """Publishing needs a clear gain on enough samples; going back needs the previous one to be clearly best."""
    verdict = decide(Scores(samples, candidate, service, previous), gain, 32)
    if samples < 32:
        assert verdict == "wait"
    if verdict == "publish":
        assert candidate > service
        assert candidate - service >= gain * samples
    if verdict == "rollback":
        assert previous is not None
        assert previous > service
        assert previous >= candidate
        assert previous - service >= gain * samples


@pytest.mark.parametrize(
    ("scores", "verdict"),
    [
        (Scores(64, 60, 50), "publish"),
        (Scores(64, 50, 50), "keep"),
        (Scores(64, 51, 50), "keep"),
        (Scores(64, 40, 50), "keep"),
        (Scores(64, 40, 50, 60), "rollback"),
        (Scores(64, 62, 50, 60), "publish"),
        (Scores(64, 40, 50, 51), "keep"),
        (Scores(31, 31, 0), "wait"),
    ],
)
def test_decisions(scores: Scores, verdict: str) -> None:
    """Clearly better is published, clearly worse than before is rolled back, the rest stays."""
    assert decide(scores, 0.03, 32) == verdict


# A trainer that publishes


def _files(folder: Path, count: int = 160) -> PublishOptions:
    """A schedule of one request a millisecond, and drift.json with the shift in its middle."""
    rows = np.zeros(count, schedules.ROW)
    rows["intended_ns"], rows["id"], rows["payload"] = np.arange(count) * NS_PER_MS, range(count), range(count)
    schedules.save(schedules.Schedule(rows), folder / "schedule.npy")
    (folder / "drift.json").write_text(json.dumps({"shift_at": count // 2, "corruption": "invert", "count": count}))
    return PublishOptions(
        str(folder / "weights"), str(folder / "schedule.npy"), label_delay_s=0.0, every_s=0.001, samples=32, least=16
    )


def _job(folder: Path, **changes: Any) -> TrainOptions:
    given: dict[str, Any] = {"model": MODEL, "data": f"drift:{folder / 'drift.json'}", "batch_size": 8}
    given |= {"image_size": SIZE, "count": 64, "seed": 3, "publish": _files(folder)}
    return TrainOptions(**{**given, **changes})


@pytest.fixture
def job(tmp_path: Path) -> Trainer:
    torch.set_num_threads(1)
    trainer = Trainer(_job(tmp_path))
    trainer.begin(now_ns() - 10 * NS_PER_S)
    return trainer


class Record:
    """Events as they are told."""

    def __init__(self) -> None:
        self.kinds: list[str] = []
        self.details: list[str] = []

    def __call__(self, kind: str, detail: str) -> None:
        self.kinds.append(kind)
        self.details.append(detail)


def _answer_always(trainer: Trainer, label: int) -> None:
    """Make the network answer one class, whatever it sees."""
    with torch.no_grad():
        last = trainer.trainable.module.classifier[1]
        last.weight.zero_()
        last.bias.zero_()
        last.bias[label] = 5.0


def test_batches_mix_new_arrivals_with_what_was_known(job: Trainer) -> None:
    """A batch has its share of labelled arrivals and the rest from the training set; before any label, only the latter."""
    batches = job.batches
    assert isinstance(batches, ArrivalBatches)
    (pixels, classes), decode_ns = batches.next()
    assert pixels.shape == (8, 3, SIZE, SIZE)
    assert classes.shape == (8,)
    assert decode_ns > 0
    batches.arrivals.begin(now_ns() + 3600 * NS_PER_S)
    assert batches.validation(8, now_ns()) is None
    assert batches.next()[0][0].shape == (8, 3, SIZE, SIZE)


def test_the_first_act_is_to_publish_the_starting_weights(job: Trainer, tmp_path: Path) -> None:
    """So that there is always something to roll back to, and rows always say which weights answered."""
    told = Record()
    Publisher(job, _publish(job), told)
    versions = Versions(tmp_path / "weights")
    _, state = versions.read(1)
    own = job.trainable.module.state_dict()
    assert all(torch.equal(state[name], own[name]) for name in own)
    assert told.kinds == ["publish"]


def test_better_is_published_worse_is_not_and_what_turns_out_worse_goes_back(job: Trainer, tmp_path: Path) -> None:
    """The pointer moves forward for a clear gain, stays for a loss, and back once the old version is better again."""
    batches, told = job.batches, Record()
    assert isinstance(batches, ArrivalBatches)
    found = batches.validation(32, now_ns())
    assert found is not None
    counts = torch.bincount(found[1], minlength=8)
    common, rare = int(counts.argmax()), int(counts.argmin())
    _answer_always(job, rare)
    publisher, versions = Publisher(job, _publish(job), told), Versions(tmp_path / "weights")

    _answer_always(job, common)
    assert _verdict(publisher) == "publish"
    assert versions.current().version == 2  # type: ignore[union-attr]
    assert versions.card(2).accuracy == float(counts[common]) / len(found[1])
    _answer_always(job, rare)
    assert _verdict(publisher) == "keep"
    assert versions.current().version == 2  # type: ignore[union-attr]

    batches.arrivals.items = [(pixels, rare) for pixels, _ in _all(batches.arrivals.items)]
    _answer_always(job, common)
    assert _verdict(publisher) == "rollback"
    pointer = versions.current()
    assert pointer is not None
    assert (pointer.version, pointer.why) == (1, "rollback")
    bias = job.trainable.module.classifier[1].bias
    assert int(bias.argmax()) == rare, "training goes on from what serves again"
    assert told.kinds == ["publish", "publish", "validate", "rollback"]


def test_a_restarted_trainer_goes_on_from_what_serves(job: Trainer, tmp_path: Path) -> None:
    """A new process takes up the version the pointer names instead of publishing its own beginning."""
    _answer_always(job, 5)
    Publisher(job, _publish(job), Record())
    again, told = Trainer(replace(job.options, seed=9)), Record()
    Publisher(again, _publish(again), told)
    assert int(again.trainable.module.classifier[1].bias.argmax()) == 5
    assert told.kinds == ["resume"]
    assert Versions(tmp_path / "weights").known() == [1]


def test_the_gate_stands_between_parts_of_a_validation(job: Trainer) -> None:
    """A sharing policy that holds the trainer holds its validations too, in the trainer's own words."""
    publisher, asked = Publisher(job, _publish(job), Record()), []
    job.gate.wait = asked.append  # type: ignore[method-assign]
    _verdict(publisher)
    assert asked == ["step"] * 2, "one part for the candidate, one for the version in service"


def test_training_goes_on_after_a_validation(job: Trainer) -> None:
    """Validating changes neither the mode nor the weights of what is being trained."""
    publisher = Publisher(job, _publish(job), Record())
    before = {name: value.clone() for name, value in job.trainable.module.state_dict().items()}
    assert _verdict(publisher) == "keep"
    assert job.trainable.module.training
    assert all(torch.equal(value, before[name]) for name, value in job.trainable.module.state_dict().items())
    assert np.isfinite(job.step().loss)


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"data": "digits"}, "drift"),
        ({"compile": True}, "compile"),
        ({"workers": 2}, "workers is 2"),
    ],
)
def test_jobs_that_cannot_publish_say_why(tmp_path: Path, changes: dict[str, Any], sentence: str) -> None:
    """Data without labelled requests, loader processes and compiled networks are refused."""
    with pytest.raises(InputError) as raised:
        Trainer(_job(tmp_path, **changes))
    assert sentence in " ".join([raised.value.what, *raised.value.problems])


def test_a_schedule_without_the_stream_is_refused(tmp_path: Path) -> None:
    """Labels of a stream nobody sends never come; that is said at the start."""
    options = replace(_files(tmp_path), stream=4)
    with pytest.raises(InputError, match="stream 4"):
        Trainer(_job(tmp_path, publish=options))


def _publish(trainer: Trainer) -> PublishOptions:
    assert trainer.options.publish is not None
    return trainer.options.publish


def _verdict(publisher: Publisher) -> str | None:
    publisher._next_ns = 0
    return publisher.after_step()


def _all(items: Any) -> list[Any]:
    return [items[index] for index in range(len(items))]
