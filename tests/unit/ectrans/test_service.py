"""The translation server: the same answers under every executor, decoder and policy; limits, deadlines, dead workers."""

from __future__ import annotations

import os
import signal
import threading
from itertools import product
from pathlib import Path

import numpy as np
import pytest
from tests.unit.ectrans.serving import RULES, answered, ragged, reference, serving, until

from corun.clock import NS_PER_MS
from corun.ectrans import client, compare, mixes, wire
from corun.ectrans.memory import of_group, total
from corun.ectrans.scheduler import POLICIES, Rules, Scheduler
from corun.ectrans.tokens import Tokenizer
from corun.ectrans.training import tiny_sentences
from corun.errors import InputError, RunFault
from corun.serve.packing import RULES as PACKINGS
from corun.serve.packing import Limits
from corun.wire import Status

pytestmark = pytest.mark.timeout(600)  # a guard against hanging, wide enough for a machine with ten times the work
TEXTS = tiny_sentences(23)
WAYS = [
    ("multitask", "no-cache", 1),
    ("multitask", "static", 1),
    ("multiprocess", "static", 2),
    ("multiprocess", "continuous", 2),
    ("pipeline", "static", 1),
    ("pipeline", "continuous", 2),
    ("streams", "static", 1),
    ("streams", "continuous", 1),
]


@pytest.fixture(scope="module")
def expected(trained_parts: Path) -> dict[str, str]:
    """Each sentence translated alone: the reference."""
    return reference(trained_parts, TEXTS)


@pytest.mark.parametrize(("executor", "decoder", "workers"), WAYS)
def test_every_way_of_serving_gives_the_reference_in_order(
    trained_parts: Path, expected: dict[str, str], executor: str, decoder: str, workers: int
) -> None:
    """Seven ragged clients, one request of several packages: byte for byte what a sentence alone gives, in order."""
    requests = ragged(TEXTS)
    wanted = [tuple(expected[text] for text in request.sentences.texts) for request in requests]
    with serving(trained_parts, executor, decoder, workers) as (service, admin):
        ways = list(product(POLICIES, PACKINGS))
        few = 1 if decoder == "no-cache" else 4
        for policy, packing in ways if executor == "streams" else ways[:: len(ways) // few]:
            admin.drain()
            rules = Rules(policy, packing, Limits(max_items=8), slots=workers, batch_threshold=16)
            service.scheduler = Scheduler(rules)
            assert answered(client.drive(service.address, requests, timeout_s=60)) == wanted, (policy, packing)
        tally = admin.drain()
        assert tally["tokenizer_loads"] == Tokenizer.loads


@pytest.mark.parametrize("partition", ["ids", "embed", "encoder"])
def test_every_partition_gives_the_reference(trained_parts: Path, expected: dict[str, str], partition: str) -> None:
    """Ids, embeddings or hidden states from the client give the answers that text gives, as ids."""
    requests = ragged(TEXTS, client.maker(partition, trained_parts))
    texts = [request.sentences.texts for request in ragged(TEXTS)]
    half = partition if partition in ("embed", "encoder") else "ids"
    with serving(trained_parts, partition=half) as (service, _):
        got = answered(client.drive(service.address, requests, timeout_s=60))
    decode = Tokenizer.load(trained_parts).decode
    assert [[decode(ids) for ids in answers] for answers in got] == [
        [expected[text] for text in own] for own in texts
    ]


def test_the_reloading_tokenizer_changes_nothing_but_time(trained_parts: Path, expected: dict[str, str]) -> None:
    """The historical mode gives the same answers; it opens the tokenizer's file once a sentence."""
    request = [client.Request(0, wire.Sentences("text", texts=tuple(TEXTS[:3])))]
    with serving(trained_parts, reload=True) as (service, _):
        before = Tokenizer.loads
        (answers,) = answered(client.drive(service.address, request, timeout_s=60))
        assert Tokenizer.loads == before + 3
    assert answers == tuple(expected[text] for text in TEXTS[:3])


def test_no_batch_lane_does_not_hang(trained_parts: Path) -> None:
    """Pinned lanes that are all real-time still serve a request over the batch threshold."""
    request = [client.Request(0, wire.Sentences("text", texts=tuple(TEXTS[:20])))]
    with serving(trained_parts, lanes="pinned", rt_share=1.0) as (service, _):
        assert len(answered(client.drive(service.address, request, timeout_s=60))[0]) == 20


@pytest.mark.parametrize("executor", ["multiprocess", "pipeline"])
def test_a_package_of_a_killed_worker_is_served_by_the_next(
    trained_parts: Path, expected: dict[str, str], executor: str
) -> None:
    """A worker killed in mid-package costs time: it is started anew and the requests get their answers."""
    requests = ragged(TEXTS)[:2]
    with serving(trained_parts, executor) as (service, _):
        stopped = service.executor.pids()
        for pid in stopped:
            os.kill(pid, signal.SIGSTOP)
        replies: list[client.Reply] = []
        thread = threading.Thread(
            target=lambda: replies.extend(client.drive(service.address, requests, timeout_s=90))
        )
        thread.start()
        until(lambda: bool(service.scheduler.in_flight))
        for pid in stopped:
            os.kill(pid, signal.SIGKILL)
        thread.join(100)
        assert answered(replies) == [tuple(expected[text] for text in one.sentences.texts) for one in requests]
        assert not set(stopped) & set(service.executor.pids())


def test_what_cannot_be_served_is_answered_with_its_reason(trained_parts: Path) -> None:
    """Over the queue's limit, too late, or not for this server: each gets its status and a sentence; serving goes on.

    The deadline is put into the past only when the queue has refused the others, however long that took.
    """
    text = wire.Sentences("text", texts=tuple(TEXTS[:6]))
    with serving(trained_parts, "multiprocess", queue_limit=10, max_items=1) as (service, admin):
        worker = service.executor.pids()[0]
        os.kill(worker, signal.SIGSTOP)
        waiting = [client.Request(0, text, deadline_ms=600_000)]
        waited: list[client.Reply] = []
        thread = threading.Thread(target=lambda: waited.extend(client.drive(service.address, waiting, timeout_s=60)))
        thread.start()
        until(lambda: len(service.scheduler) == 1)
        requests = [
            client.Request(0, text),
            client.Request(0, wire.Sentences("ids", ids=([5] * 800,))),
            client.Request(0, wire.Sentences("encoder", values=(np.zeros((2, 64), np.float32),))),
        ]
        full, long, foreign = client.drive(service.address, requests, timeout_s=60)
        (job,) = service.scheduler._jobs.values()
        assert job.deadline_ns == job.payload.t_first_ns + 600_000 * NS_PER_MS
        job.deadline_ns = job.arrival_ns
        thread.join(90)
        (late,) = waited
        os.kill(worker, signal.SIGCONT)
        assert (late.status, late.detail) == (Status.EXPIRED, "its deadline passed")
        assert full.status == Status.REJECTED
        assert "queue is full" in full.detail
        assert long.status == Status.BAD_REQUEST
        assert "800 tokens" in long.detail
        assert foreign.status == Status.BAD_REQUEST
        assert 'not "encoder"' in foreign.detail
        assert answered(client.drive(service.address, [client.Request(0, text)], timeout_s=60))
        counts = admin.drain()["requests"]
        assert counts == {"EXPIRED": 1, "REJECTED": 1, "BAD_REQUEST": 2, "OK": 1}


def test_shared_weights_need_less_memory_than_own(
    trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Four processes that map one weight file have a smaller PSS in all than four with copies."""
    from corun.ectrans import build, parts

    monkeypatch.setitem(build.PRESETS, "wide", build.Preset(256, 4, 2, 1024, 16_000, 48, 0.02))
    build.write_model(build.random_model("wide"), tmp_path / "wide")
    (tmp_path / "wide" / "tokenizer.model").write_bytes((trained / "tokenizer.model").read_bytes())
    split = parts.split(tmp_path / "wide", tmp_path / "parts")
    weights_mib = sum(path.stat().st_size for path in split.glob("*.safetensors")) / 2**20
    sizes = {}
    for executor in ("multitask", "multiprocess"):
        with serving(split, executor, workers=4, max_new=2) as (service, _):
            sizes[executor] = total(of_group(service.executor.pids()))["pss_mib"]
    assert sizes["multiprocess"] < sizes["multitask"] - 2 * weights_mib


def test_conditions_are_compared_in_turns(trained_parts: Path) -> None:
    """Each condition runs once a repeat; ratios come with an interval around the median, and say how many."""
    settings = compare.Settings(trained_parts, repeats=2, sentences=16, texts=TEXTS)
    one = compare.Condition("one", packing="count", batch=8)
    lines: list[str] = []
    found = compare.measure([one], settings, {"": compare.requests_for(settings, "2x8")}, lines.append)
    assert [len(measured.runs) for measured in found.values()] == [2]
    assert len(lines) == 2
    ratio = compare.ratio(found["one"], found["one"], "total_s")
    assert (ratio.lo, ratio.median, ratio.hi, ratio.n) == (1.0, 1.0, 1.0, 2)
    assert compare.ratio_of("a", "b", "x", []).n == 0
    with pytest.raises(InputError, match="R7"):
        compare.run("R7", settings)


def test_a_client_says_which_request_failed() -> None:
    """`checked` names the first request that is not OK."""
    reply = client.Reply(3, 1, 0, 0, 1, Status.REJECTED, detail="full")
    with pytest.raises(RunFault, match="request 3 ended REJECTED: full"):
        client.checked([reply])
    assert client.summary([reply])["requests"] == {"REJECTED": 1}
    assert client.total_s([]) == 0
    assert len(client.requests_of(mixes.mix([2, 1], 0), TEXTS, client.maker("text", None))) == 2
    assert RULES.policy == "hrrn"
