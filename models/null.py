"""A model that does nothing for a known time: it calibrates the harness and emulates a deterministic server.

Payloads may be any bytes. Options (`extra`), all optional:

    reply_bytes   length of each reply, default 4
    service_ms    how long `forward` takes for a batch of any size, default 0
    busy          true: spend that time on the CPU instead of asleep, default false

Torch is never imported, so a `null` service shows what the sockets, queue and stamps cost by themselves.
"""

from __future__ import annotations

import time
from collections.abc import Callable

from corun.clock import now_ns
from corun.errors import InputError, suggest
from corun.registry import Model, ModelOptions, ServableInfo

REPLY_BYTES = 4
MAX_REPLY_BYTES = 64 * 1024 * 1024
EXTRAS = ("reply_bytes", "service_ms", "busy")


class Null:
    """A servable whose batch is its number of samples and whose answer is zeros."""

    def __init__(
        self,
        options: ModelOptions,
        clock: Callable[[], int] = now_ns,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        reply_bytes, service_ms, busy = _checked(options)
        self.reply = bytes(reply_bytes)
        self.service_ns = round(service_ms * 1e6)
        self.busy = busy
        self.clock = clock
        self.sleep = sleep
        self.info = ServableInfo(
            model="null",
            task="null",
            params=0,
            image_size=0,
            weights="none",
            precision=options.precision,
            device="cpu",
            notes=f"service {service_ms:g} ms {'busy' if busy else 'asleep'}" if service_ms else "",
        )

    def decode(self, payload: bytes) -> bytes:
        """The payload as it is."""
        return payload

    def preprocess(self, samples: list[bytes]) -> int:
        """How many samples there are."""
        return len(samples)

    def to_device(self, batch: int) -> int:
        """The same number."""
        return batch

    def forward(self, batch: int) -> int:
        """Take `service_ms`, by a deadline on the clock so that sleep's lateness does not add up."""
        if self.service_ns:
            deadline = self.clock() + self.service_ns
            while (left_ns := deadline - self.clock()) > 0:
                if not self.busy:
                    self.sleep(left_ns / 1e9)
        return batch

    def to_host(self, output: int) -> int:
        """The same number."""
        return output

    def postprocess(self, output: int, count: int) -> list[bytes]:
        """`count` replies of `reply_bytes` zeros."""
        return [self.reply] * count

    def example(self) -> bytes:
        """An empty payload."""
        return b""


def _checked(options: ModelOptions) -> tuple[int, float, bool]:
    """(reply_bytes, service_ms, busy); InputError lists every option that is unknown or out of range."""
    extra = options.extra
    reply_bytes, service_ms = extra.get("reply_bytes", REPLY_BYTES), extra.get("service_ms", 0)
    busy = extra.get("busy", False)
    problems = [f'option "{key}" is unknown{suggest(key, EXTRAS)}' for key in extra if key not in EXTRAS]
    if not _is_whole(reply_bytes) or not 0 <= reply_bytes <= MAX_REPLY_BYTES:
        problems.append(f"reply_bytes is {reply_bytes!r}: give a whole number from 0 to {MAX_REPLY_BYTES}")
    if not (_is_whole(service_ms) or isinstance(service_ms, float)) or not 0 <= service_ms < float("inf"):
        problems.append(f"service_ms is {service_ms!r}: give milliseconds, 0 or more")
    if not isinstance(busy, bool):
        problems.append(f"busy is {busy!r}: give true or false")
    if problems:
        raise InputError("the null model cannot be built", problems)
    return reply_bytes, float(service_ms), busy


def _is_whole(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


MODELS = (
    Model(
        name="null",
        family="null",
        task="null",
        image_size=0,
        serve=Null,
        train=None,
        code_licence="Apache-2.0",
        weights_licence="none",
        notes="answers at once, or after a fixed service time",
    ),
)
