"""The training process' conversation with the launcher: it trains inside armed windows and rests outside.

    HELLO ▶   ARM(start_at, stop_at) ◀ ready   START   ── steps ──   DRAIN ◀ counts   …   STOP

Between two steps the control socket is looked at without waiting, so an answer comes within one step. While a gate
holds the trainer in the middle of a step, STATS and CLOCK are answered at once; anything else opens the gate, so
that the step ends, and is answered then.
A step that runs over the window's end is finished and recorded; the summary counts the part inside.
"""

from __future__ import annotations

import os
import select
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from corun import __version__
from corun.clock import NS_PER_S, now_ns
from corun.errors import PeerClosed
from corun.process import StopFlag
from corun.run.records import TRAIN
from corun.run.table import EventLog, TableWriter
from corun.train.trainer import Step, Trainer
from corun.wire.channel import Channel, answer_clock
from corun.wire.frames import RequestHeader
from corun.wire.messages import Arm, Clock, Drain, Hello, Message, Start, Stats, Stop

ANSWERS_AT_ONCE = 4


class StepLog:
    """train.csv and the epoch events of one job."""

    def __init__(self, out: Path | None, model: str) -> None:
        self._table = TableWriter(out / "train.csv", TRAIN, append=True) if out else None
        self._events = EventLog(out / "events.csv") if out else None
        self._model = model
        self.segment = Arm("train", 0, 0, 0, 0)

    def step(self, step: Step) -> None:
        """One row."""
        if self._table:
            segment = {
                "train_model_name": self._model,
                "arm": self.segment.arm,
                "repeat": self.segment.repeat,
                "segment": self.segment.segment,
            }
            self._table.row({**segment, **step.row()})

    def event(self, kind: str, detail: str) -> None:
        """One event."""
        if self._events:
            self._events.write(kind, "trainer", self._model, detail)

    def close(self) -> None:
        for open_file in (self._table, self._events):
            if open_file:
                open_file.close()


class Session:
    """Train when told to; `run` returns when the launcher says STOP or goes away, or on a stop signal.

    facts: what HELLO says besides, e.g. with whom it shares its process.
    """

    def __init__(
        self,
        trainer: Trainer,
        channel: Channel,
        log: StepLog,
        stop: StopFlag,
        facts: Mapping[str, Any] | None = None,
    ) -> None:
        self._trainer = trainer
        self._channel = channel
        self._log = log
        self._stop = stop
        self._facts = dict(facts or {})
        self._segment: Arm | None = None
        self._running = False
        self._steps = 0
        self._last: Step | None = None
        self._held_back: list[tuple[RequestHeader, Message]] = []

    def run(self) -> None:
        hello = Hello(
            role="trainer",
            name=self._trainer.options.model,
            pid=os.getpid(),
            version=__version__,
            model=self._trainer.options.model,
            device=self._trainer.options.device,
            clock_ns=now_ns(),
            info={**self._trainer.describe(), **self._facts},
        )
        self._channel.introduce(hello)
        self._trainer.gate.attend = self._attend
        while not self._stop.requested and self._answer():
            if self._due():
                self._train_window()
            else:
                select.select([self._channel.fileno(), self._stop.fileno()], [], [], self._seconds_to_start())
        save(self._trainer, self._log)

    def _seconds_to_start(self) -> float | None:
        if self._segment is None or not self._running:
            return None
        return max(0.0, (self._segment.start_at_ns - now_ns()) / NS_PER_S)

    def _due(self) -> bool:
        segment = self._segment
        return self._running and segment is not None and now_ns() >= segment.start_at_ns

    def _train_window(self) -> None:
        segment = self._segment
        assert segment is not None
        while self._running and self._segment is segment and not self._stop.requested:
            if now_ns() >= segment.stop_at_ns:
                break
            if self._trainer.finished:
                self._log.event("finished", f"{self._trainer.options.epochs} epochs done")
                break
            self._last = one_step(self._trainer, self._log)
            self._steps += 1
            if not self._answer():
                self._stop.request()
        if self._segment is segment:
            self._running = False

    def _attend(self) -> bool:
        """Called while the gate holds the trainer; True when the step must come to its end."""
        while not (self._held_back or self._stop.requested):
            try:
                received = self._channel.receive(0.0)
            except PeerClosed:
                self._stop.request()
                break
            if received is None:
                return False
            if isinstance(received[1], Stats | Clock):
                self._handle(*received, now_ns())
            else:
                self._held_back.append(received)
        return True

    def _answer(self) -> bool:
        """Answer what has arrived; False once the launcher said STOP or went away.

        A few at a time: a launcher that asks again at every answer must not keep the trainer from its steps.
        """
        while self._held_back:
            if not self._handle(*self._held_back.pop(0), now_ns()):
                return False
        for _ in range(ANSWERS_AT_ONCE):
            try:
                received = self._channel.receive(0.0)
                if received is None:
                    return True
                if not self._handle(*received, now_ns()):
                    return False
            except PeerClosed:
                return False
        return True

    def _handle(self, header: RequestHeader, message: Message, received_ns: int) -> bool:
        match message:
            case Arm():
                self._segment, self._running, self._steps = message, False, 0
                self._log.segment = message
                self._trainer.begin(message.start_at_ns)
                self._channel.reply(header, {"ready": True})
            case Start():
                self._running = self._segment is not None
                self._channel.reply(header)
            case Stats():
                self._channel.reply(header, self._counts())
            case Drain():
                self._running = False
                self._channel.reply(header, self._counts())
            case Clock():
                answer_clock(self._channel, header, received_ns)
            case Stop():
                self._running = False
                self._channel.reply(header, self._counts())
                return False
            case _:
                self._channel.fail(header, f"a trainer does not answer {type(message).__name__}")
        return True

    def _counts(self) -> dict[str, object]:
        last = self._last
        return {
            "steps": self._steps,
            "steps_total": self._trainer.steps_done,
            "epoch": self._trainer.batches.epoch,
            "loss": last.loss if last else None,
            "samples_per_s": last.samples_per_s if last else None,
            "finished": self._trainer.finished,
            **self._trainer.gate.report(),
        }


def one_step(trainer: Trainer, log: StepLog) -> Step:
    """One step with its row, and at an epoch's end the event and the checkpoint."""
    step = trainer.step()
    log.step(step)
    if trainer.at_epoch_end:
        log.event("epoch", f"epoch {step.epoch} done, loss {step.loss:.4f}")
        save(trainer, log)
    trainer.after_step()
    return step


def save(trainer: Trainer, log: StepLog) -> None:
    """Checkpoint if one was asked for."""
    if trainer.options.checkpoint:
        trainer.save(trainer.options.checkpoint)
        log.event("checkpoint", f"step {trainer.steps_done}: {trainer.options.checkpoint.name}")
