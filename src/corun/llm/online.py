"""The edge server over a socket: clients send sentences, some with labels; it answers while it learns from them.

    {"prompt": "hello", "max_new_tokens": 8}            answered
    {"prompt": "hello", "label": "yes"}                 answered, and learnt from

    model thread ── answers ──────────────────────── adapter written ── answers ──▶
         │ sentence with its label                          ▲ between two batches
         ▼                                                  │
    lessons thread: bs of them ──▶ learner trains on all so far ──▶ its adapter is published

The learner is started when the first bs labels are there, in the sharing mode asked for. "sentence" may stand in
place of "prompt".
"""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

from corun.errors import CorunError, RunFault
from corun.llm import adapters
from corun.llm.base import SharedBase, load_base, share, tree
from corun.llm.edge import MODEL, EdgeOptions, check, job_for, step_row, steps_for
from corun.llm.generate import Generated
from corun.llm.items import Item, example
from corun.llm.learn import Example
from corun.llm.sharing import THREAD, LearnerHandle, scratch, start_learner
from corun.registry import ModelOptions, Servable, load_plugin
from corun.run.records import TRAIN
from corun.run.table import TableWriter
from corun.serve.engine import ServableEngine
from corun.serve.generation import engine_for
from corun.serve.options import ServerOptions
from corun.serve.server import Server, StopRequest
from corun.wire import Address
from corun.wire.messages import Load

LONGEST_DELAY_NS = 2_000_000
NOT_ASKED = Generated((), (), "length")
POLL_S = 0.01


@dataclass(frozen=True)
class Post:
    """Where it serves, what it writes, and the deadline of requests that bring none (0 = none)."""

    address: Address
    out: Path
    deadline_ms: int = 0
    queue_limit: int = 1024


class EdgeService:
    """The text service, with labels handed to `learn`; without `infer` sentences are taken but not answered."""

    def __init__(self, text: Any, learn: Callable[[Item], None] | None, infer: bool) -> None:
        self._text = text
        self._learn = learn
        self._infer = infer

    def __getattr__(self, name: str) -> Any:
        return getattr(self._text, name)

    def decode(self, payload: bytes) -> Any:
        """A request's JSON; ValueError says what is wrong with it or its label."""
        try:
            request = json.loads(payload)
        except ValueError:
            request = None
        if not isinstance(request, dict):
            return self._text.decode(payload)
        label = request.pop("label", None)
        if "sentence" in request:
            request["prompt"] = request.pop("sentence")
        if label is not None and (not isinstance(label, str) or "prompt" not in request):
            raise ValueError("a label is a text beside a prompt")
        sample = self._text.decode(json.dumps(request).encode())
        if label is not None and self._learn is not None:
            prompt = request["prompt"]
            self._learn(Item((prompt,) if isinstance(prompt, str) else tuple(prompt), label))
        return sample

    def submit(self, sample: Any, watch: Any, done: Callable[[Any], None]) -> None:
        """The same for an engine that answers later."""
        if self._infer:
            self._text.submit(sample, watch, done)
        else:
            done(NOT_ASKED)

    def generate(self, batch: Any, watches: Sequence[Any]) -> list[Any]:
        """Answers; empty ones where nothing is to be answered."""
        if not self._infer:
            return [NOT_ASKED] * len(watches)
        answers: list[Any] = self._text.generate(batch, watches)
        return answers


class Lessons:
    """Trains on labelled sentences as they come and publishes the adapter after each round; `add` from any thread.

    start: makes the learner from its first examples. publish: takes the adapter's tensors. rows: train.csv. A round
    begins once `batch_size` new examples are there and makes `steps(new examples)` steps.
    """

    def __init__(
        self,
        start: Callable[[Sequence[Example]], LearnerHandle],
        publish: Callable[[Mapping[str, Any]], None] | None,
        rows: TableWriter,
        batch_size: int,
        steps: Callable[[int], int],
    ) -> None:
        self._start, self._publish, self._rows = start, publish, rows
        self._batch_size, self._steps = batch_size, steps
        self._waiting: list[Example] = []
        self._changed = threading.Condition()
        self._over = False
        self._save_to: Path | None = None
        self.steps = 0
        self.learner: LearnerHandle | None = None
        self.failure: CorunError | None = None
        self._thread = threading.Thread(target=self._work, name="lessons", daemon=True)

    def begin(self) -> None:
        """Learn from now on."""
        self._thread.start()

    def add(self, examples: Sequence[Example]) -> None:
        """More to learn from."""
        with self._changed:
            self._waiting += examples
            self._changed.notify()

    def end(self, save_to: Path) -> None:
        """End after the step in progress: save the adapter if there is one, stop the learner."""
        with self._changed:
            self._over, self._save_to = True, save_to
            self._changed.notify()
        self._thread.join()
        if self.failure is not None:
            raise self.failure

    def _work(self) -> None:
        """The learner's whole life: its process ends with the thread that started it."""
        try:
            while (fresh := self._next()) is not None:
                self._round(fresh)
            if self.learner is not None and self._save_to is not None:
                self.learner.save_adapter(self._save_to)
        except CorunError as error:
            self.failure = error
        if self.learner is not None:
            self.learner.stop()

    def _next(self) -> list[Example] | None:
        with self._changed:
            while len(self._waiting) < self._batch_size:
                if self._over:
                    return None
                self._changed.wait()
            fresh, self._waiting = self._waiting, []
            return fresh

    def _round(self, fresh: list[Example]) -> None:
        if self.learner is None:
            self.learner = self._start(fresh)
        else:
            self.learner.add(fresh)
        self.learner.train(self._steps(len(fresh)))
        while self.learner.busy() and not self._over:
            time.sleep(POLL_S)
        steps = self.learner.report()
        self._rows.rows([step_row(step) for step in steps[self.steps :]])
        self.steps = len(steps)
        if self._publish is not None and not self._over:
            self._publish(self.learner.adapter())


def serve(
    items: Sequence[Item], options: EdgeOptions, post: Post, stop: StopRequest, say: Callable[[str], None] = print
) -> str:
    """Serve until `stop` or STOP, learning from `items` and from what clients send; what came of it, in a sentence.

    Writes infer_server/edge.csv, train.csv, events.csv and the learner's adapter/ below `post.out`.
    """
    check(items, options)
    with scratch() as directory, TableWriter(post.out / "train.csv", TRAIN) as rows:
        base = load_base(options.glm_path, options.preset, options.precision, options.device)
        shared = None
        if options.train and options.sharing != THREAD:
            shared = share(base, Path(directory), options.glm_path)
            base = shared.open()
        text = _text_service(base, options)
        engines: list[ServableEngine] = []
        server = _server(options, post, engines, say)
        lessons = _lessons(base, shared, options, rows, text, server) if options.train else None
        engines.append(engine_for(cast(Servable, EdgeService(text, _learner_of(base, lessons), options.infer))))
        if lessons is not None:
            lessons.begin()
            lessons.add([example(item, base.tokenizer) for item in items])
        try:
            counts = server.serve(Load(MODEL), stop).counts
        finally:
            if lessons is not None:
                lessons.end(post.out / "adapter")
        version = text.info.version or 0
        return f"{counts.summary()}; {lessons.steps if lessons else 0} steps trained, {version} adapters published"


def _text_service(base: Any, options: EdgeOptions) -> Any:
    plugin = load_plugin("models", "chatglm")
    module = adapters.attach(tree(base), adapters.SERVE, base, options.inference_path).eval()
    settings = {
        **plugin.SERVING,
        "engine": options.engine,
        "max_new_tokens": options.new_tokens,
        "limit": max(options.new_tokens, plugin.SERVING["limit"]),
        "max_running": options.bs,
    }
    built = ModelOptions(weights=options.glm_path, device=options.device, precision=options.precision)
    return plugin.ChatGlm(base, module, built, MODEL, settings)


def _server(options: EdgeOptions, post: Post, engines: list[ServableEngine], say: Callable[[str], None]) -> Server:
    """A server of the engine that will be in `engines`, and of no other."""
    continuous = options.engine == "continuous"

    def load(message: Load) -> ServableEngine:
        if not engines:
            raise RunFault("the edge server keeps the model it was started with")
        _set_threads(options.threads)
        return engines.pop()

    return Server(
        ServerOptions(
            name="edge",
            address=post.address,
            queue_limit=post.queue_limit,
            max_batch=1 if continuous else options.bs,
            max_delay_ns=0 if continuous else LONGEST_DELAY_NS,
            threads=options.threads,
            out=post.out,
            deadline_ms=post.deadline_ms,
        ),
        load,
        say,
    )


def _lessons(
    base: Any, shared: SharedBase | None, options: EdgeOptions, rows: TableWriter, text: Any, server: Server
) -> Lessons:
    def start(examples: Sequence[Example]) -> LearnerHandle:
        return start_learner(shared, base, job_for(examples, options), options.sharing)

    def publish(state: Mapping[str, Any]) -> None:
        def write() -> None:
            text.publish(state)
            version = (text.info.version or 0) + 1
            text.info = replace(text.info, version=version)
            server.event("publish", f"version {version} of the adapter")

        server.queue.post(write)

    publishes = options.infer and options.publish
    return Lessons(start, publish if publishes else None, rows, options.bs, lambda count: steps_for(count, options))


def _learner_of(base: Any, lessons: Lessons | None) -> Callable[[Item], None] | None:
    return None if lessons is None else lambda item: lessons.add([example(item, base.tokenizer)])


def _set_threads(count: int) -> None:
    import torch

    torch.set_num_threads(count)
