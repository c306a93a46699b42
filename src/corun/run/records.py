"""The columns of every table a run writes: name, unit, type and meaning, in the order they stand in the file.

`result/README.md` is generated from here. An empty cell means "not measured", never zero.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from corun.wire.frames import STAMPS

SCHEMA_VERSION = 1


@dataclass(frozen=True)
class Column:
    """One column; kind is "int", "float" or "str"."""

    name: str
    unit: str
    kind: str
    doc: str


Table = tuple[Column, ...]


def names(table: Sequence[Column]) -> tuple[str, ...]:
    """Column names in file order."""
    return tuple(column.name for column in table)


_SEGMENT: Table = (
    Column("arm", "", "str", "alone, train or corun"),
    Column("repeat", "", "int", "repetition, from 0"),
    Column("segment", "", "int", "time window of the run, from 0"),
)

_ORIGINAL_CLIENT: Table = (
    Column("work_start", "s", "float", "wall clock at the intended send time (seconds since the epoch)"),
    Column("infer_model_name", "", "str", "model of the service"),
    Column("train_model_name", "", "str", "model that was being trained, or none"),
    Column("image_size", "px", "int", "side of the network's input"),
    Column("device", "", "str", "device of the service"),
    Column("file_name", "", "str", "name of the request's payload"),
    Column("latency", "ms", "float", "sojourn: reply received minus intended send time"),
)

_STAMP_DOCS = {
    "rx_first": "first byte of the request at the server",
    "rx_done": "last byte of the request at the server; it enters the queue",
    "picked": "taken from the queue by the policy",
    "batched": "its batch was closed",
    "decoded": "payload decoded",
    "preprocessed": "resized, normalised, batched on the host",
    "h2d": "on the device",
    "device": "network finished",
    "d2h": "result back on the host",
    "tx": "reply ready to be sent",
}
_STAMP_COLUMNS: Table = tuple(
    Column(f"s_{name}_ns", "ns", "int", f"server stamp: {_STAMP_DOCS[name]}") for name in STAMPS
)

INFER_CLIENT: Table = (
    *_ORIGINAL_CLIENT,
    Column("request_rate", "1/s", "float", "asked mean rate of the stream; 0 = trace"),
    Column("service", "", "str", "name of the service"),
    *_SEGMENT,
    Column("stream", "", "int", "client stream"),
    Column("id", "", "int", "request number in its stream, unique within the run"),
    Column(
        "status",
        "",
        "str",
        "OK, REJECTED, BAD_REQUEST, FAILED, NOT_LOADED, DRAINING, EXPIRED, CANCELLED, LOST",
    ),
    Column("t_intended_ns", "ns", "int", "intended send time"),
    Column("t_wake_ns", "ns", "int", "the sender woke up for it"),
    Column("t_tx_start_ns", "ns", "int", "first byte handed to the kernel"),
    Column("t_tx_done_ns", "ns", "int", "last byte handed to the kernel"),
    Column("t_rx_ns", "ns", "int", "reply complete at the client; empty when none came"),
    Column("sojourn_ms", "ms", "float", "t_rx - t_intended: the headline latency"),
    Column("response_ms", "ms", "float", "t_rx - t_tx_start"),
    Column("slip_ms", "ms", "float", "t_tx_start - t_intended"),
    Column("reply_bytes", "B", "int", "size of the reply's payload"),
    Column("batch", "", "int", "size of the batch it ran in"),
    *_STAMP_COLUMNS,
    Column("label", "", "int", "true class of the payload, where the data set knows it"),
    Column("answer", "", "int", "first class of the reply, where the payload has a label"),
    Column("tokens_out", "", "int", "tokens of the reply; empty for models that make none"),
    Column(
        "ttft_ms", "ms", "float", "time to first token: its arrival minus t_intended; empty for a reply in one piece"
    ),
    Column("tpot_ms", "ms", "float", "time per token after the first: (last - first) / (tokens - 1)"),
)

INFER_SERVER: Table = (
    *_ORIGINAL_CLIENT[:6],
    Column("latency", "ms", "float", "s_tx - s_rx_done: time in the server"),
    Column("service", "", "str", "name of the service"),
    *_SEGMENT,
    Column("stream", "", "int", "client stream"),
    Column("id", "", "int", "request number in its stream"),
    Column("status", "", "str", "how the request ended"),
    Column("payload_bytes", "B", "int", "size of the request's payload"),
    Column("reply_bytes", "B", "int", "size of the reply's payload"),
    Column("batch", "", "int", "size of the batch it ran in"),
    Column("queue_len", "", "int", "requests waiting when it was enqueued"),
    *_STAMP_COLUMNS,
    Column("detail", "", "str", "why it was not OK"),
    Column("weights_version", "", "int", "published version of the weights that answered; empty before the first"),
    Column("tokens_in", "", "int", "tokens of the prompt; empty for models that make none"),
    Column("tokens_out", "", "int", "tokens made"),
    Column("ttft_ms", "ms", "float", "time to first token: on the host minus s_rx_done"),
    Column("tpot_ms", "ms", "float", "time per token after the first: (last - first) / (tokens - 1)"),
)

TRAIN: Table = (
    Column("train_model_name", "", "str", "model being trained"),
    *_SEGMENT,
    Column("epoch", "", "int", "epoch, from 0"),
    Column("step", "", "int", "optimiser step over the whole run, from 0"),
    Column("t_start_ns", "ns", "int", "step began (waiting for data included)"),
    Column("t_end_ns", "ns", "int", "step ended, device synchronised"),
    Column("step_ms", "ms", "float", "t_end - t_start"),
    Column("data_wait_ms", "ms", "float", "waiting for the loader"),
    Column("decode_ms", "ms", "float", "decoding and transforming the batch, in whichever process did it"),
    Column("samples", "", "int", "samples in the step"),
    Column("samples_per_s", "1/s", "float", "samples / step time"),
    Column("loss", "", "float", "mean loss of the step"),
    Column("gate_wait_ms", "ms", "float", "held at the gate by the sharing policy, all stops of the step together"),
    Column("micro", "", "int", "micro-batches the step was cut into"),
)

ACCURACY: Table = (
    Column("service", "", "str", "name of the service"),
    *_SEGMENT,
    Column("t_ns", "ns", "int", "when the second began"),
    Column("t_s", "s", "float", "the same, from the start of the window"),
    Column("n", "", "int", "labelled requests due in it"),
    Column("correct", "", "int", "of them answered OK, the first class being the label"),
    Column("accuracy", "", "float", "correct / n"),
    Column("weights_version", "", "int", "newest published weights among those that answered"),
)

EVENTS: Table = (
    Column("t_ns", "ns", "int", "when"),
    Column(
        "kind",
        "",
        "str",
        "start, load, warmup, ready, window_start, window_end, epoch, checkpoint, publish, swap, rollback, refused, fault, stop ...",
    ),
    Column("role", "", "str", "launcher, server, client, trainer, profiler"),
    Column("name", "", "str", "which one"),
    Column("detail", "", "str", "what happened, in words"),
)

SUMMARY: Table = (
    Column("arm", "", "str", "alone, train or corun"),
    Column("repeat", "", "int", "repetition, or empty for all repetitions together"),
    Column("service", "", "str", "name of the service, or the trainer's model in rows of role trainer"),
    Column("role", "", "str", "server or trainer"),
    Column("model", "", "str", "model"),
    Column("weights", "", "str", "random, default, or the file's digest"),
    Column("requests", "", "int", "requests scheduled"),
    Column("ok", "", "int", "answered with OK"),
    Column("errors", "", "int", "everything else, lost ones included"),
    Column("intended_rate", "1/s", "float", "scheduled requests / window"),
    Column("sent_rate", "1/s", "float", "requests really sent inside the window / window"),
    Column("p50_ms", "ms", "float", "sojourn, exact; empty below 11 samples"),
    Column("p90_ms", "ms", "float", "sojourn; empty below 64 samples"),
    Column("p95_ms", "ms", "float", "sojourn; empty below 130 samples"),
    Column("p99_ms", "ms", "float", "sojourn; empty below 662 samples"),
    Column("max_ms", "ms", "float", "sojourn"),
    Column("mean_ms", "ms", "float", "sojourn"),
    Column("response_p50_ms", "ms", "float", "response"),
    Column("response_p90_ms", "ms", "float", "response"),
    Column("response_p95_ms", "ms", "float", "response"),
    Column("response_p99_ms", "ms", "float", "response"),
    Column("response_max_ms", "ms", "float", "response"),
    Column("tokens_per_s", "1/s", "float", "tokens of replies with OK / window; empty for models that make none"),
    Column("ttft_p50_ms", "ms", "float", "time to first token, from the intended send time"),
    Column("ttft_p99_ms", "ms", "float", "the same; empty below 662 samples"),
    Column("tpot_p50_ms", "ms", "float", "time per token after the first"),
    Column("slip_p50_ms", "ms", "float", "slip of the sender"),
    Column("slip_p99_ms", "ms", "float", "slip of the sender"),
    Column("train_samples_per_s", "1/s", "float", "training speed inside the window"),
    Column("train_steps", "", "int", "optimiser steps that ended inside the window"),
    Column("loss_first", "", "float", "mean loss of the first tenth of the steps"),
    Column("loss_last", "", "float", "mean loss of the last tenth of the steps"),
)
