"""Continuous batching: transformers' manager behind the engine interface, with what it needs to be safe here.

A finished answer leaves the batch at once and a waiting prompt takes its place. The manager's interface is young
(fields come and go between minor versions), so nothing outside this module touches it. What is handled:

- block sharing is off: it would reuse keys and values made with an older adapter;
- the number of cache blocks is given: by default the manager takes most of the free memory;
- a prompt too long for the pool would end the manager's thread: it is refused when it is handed in;
- cancelling gives no result event: the ticket is resolved here;
- no eos is -1, and the switch to flash attention, which may look for files on a hub, is off;
- the manager's thread may die: then every ticket fails with the reason.

A publication waits for the step being computed. Prompts in flight go on with the new adapter over keys and values of
the old one; `version` of a ticket is that at its hand-in. Times come from perf_counter, which is CLOCK_MONOTONIC.
"""

from __future__ import annotations

import itertools
import threading
from collections.abc import Callable, Mapping
from typing import Any

from corun.clock import NS_PER_S, now_ns
from corun.errors import InputError, RunFault
from corun.llm import adapters
from corun.llm.engine import Ticket, check_fits
from corun.llm.generate import Generated, Prompt

TURN_S = 0.02
NO_EOS = -1
LEAST_PAGE = 4


class ContinuousEngine:
    """Greedy continuous batching over a pool of `blocks` pages of `page` tokens, at most `max_batch` prompts at once.

    At most one engine per module tree: the batch is one flattened row, so it has one adapter.
    """

    def __init__(
        self,
        model: Any,
        blocks: int = 64,
        page: int = 32,
        max_batch: int = 16,
        max_batch_tokens: int = 512,
        name: str = adapters.SERVE,
    ) -> None:
        if blocks < 1 or page < LEAST_PAGE or max_batch < 1:
            raise InputError(f"the cache cannot have {blocks} blocks of {page} tokens for {max_batch} prompts")
        self.model = model.eval()
        self.name = name
        self.version = 0
        self._max_batch = max_batch
        self._limit = min(blocks * page, int(model.config.max_position_embeddings))
        self._manager = _manager(model, blocks, page, max_batch, max_batch_tokens)
        self._tickets: dict[str, Ticket] = {}
        self._lock = threading.Lock()
        self._numbers = itertools.count()
        self._closed = False
        self._thread = threading.Thread(target=self._collect, name="continuous-engine", daemon=True)

    def start(self) -> None:
        self._manager.start()
        self._thread.start()

    @property
    def has_room(self) -> bool:
        """Whether one more prompt would be computed at once."""
        return len(self._tickets) < self._max_batch

    def submit(self, prompt: Prompt, on_done: Callable[[Ticket], None] | None = None) -> Ticket:
        """Hand a prompt to the running batch; InputError when the pool can never hold it, RunFault once it stopped."""
        check_fits(prompt, self._limit)
        ticket = Ticket(prompt, now_ns(), on_done)
        ticket.version = self.version
        number = f"p{next(self._numbers)}"
        with self._lock:
            if self._closed or not self._manager.is_running():
                raise RunFault("the engine is closed")
            self._tickets[number] = ticket
        eos = NO_EOS if prompt.eos is None else prompt.eos
        self._manager.add_request(
            list(prompt.ids),
            number,
            prompt.max_new_tokens,
            streaming=prompt.on_token is not None,
            record_timestamps=True,
            eos_token_id=eos,
        )
        return ticket

    def publish(self, state: Mapping[str, Any], timeout_s: float = 60.0) -> int:
        """Write adapter tensors between two steps; InputError when they do not fit, RunFault once it stopped."""
        if not self._manager.is_running():
            raise RunFault("the engine is closed")
        with self._manager.pause():
            adapters.replace(self.model, self.name, state)
            self.version += 1
        return self.version

    def close(self) -> None:
        """Answer what was handed in, then end both threads."""
        with self._lock:
            self._closed = True
        if self._thread.is_alive():
            self._thread.join()
        if self._manager.is_running():
            self._manager.stop(block=True)

    def _collect(self) -> None:
        """Hand results to their tickets, and give up those whose time is over."""
        while True:
            result = self._manager.get_result(timeout=TURN_S)
            if result is not None:
                self._resolve(result)
            self._give_up()
            if not self._manager.is_running():
                self._fail_all(RuntimeError("the manager of continuous batching stopped"))
                return
            with self._lock:
                if self._closed and not self._tickets:
                    return

    def _resolve(self, result: Any) -> None:
        ended = result.is_finished()
        with self._lock:
            ticket = (self._tickets.pop if ended else self._tickets.get)(result.request_id, None)
        if ticket is None:
            return
        self._show(ticket, result)
        if not ended:
            return
        if result.error:
            ticket.fail(RuntimeError(result.error))
            return
        ids = tuple(result.generated_tokens)
        stopped = "eos" if ids and ids[-1] == ticket.prompt.eos else "length"
        stamps = tuple(round(stamp * NS_PER_S) for stamp in result.timestamps or ())
        ticket.resolve(Generated(ids, stamps, stopped))

    def _show(self, ticket: Ticket, result: Any) -> None:
        """Tell whoever follows the answer its new tokens."""
        follow = ticket.prompt.on_token
        if follow is not None and not result.error:
            shown, ids = ticket.shown, result.generated_tokens
            for token, stamp in zip(ids[shown:], result.timestamps[shown:], strict=False):
                follow(token, round(stamp * NS_PER_S))
            ticket.shown = len(ids)

    def _give_up(self) -> None:
        now = now_ns()
        with self._lock:
            given_up = {number: why for number, ticket in self._tickets.items() if (why := ticket.given_up(now))}
            tickets = {number: self._tickets.pop(number) for number in given_up}
        for number, why in given_up.items():
            self._manager.cancel_request(number)
            tickets[number].resolve(Generated((), (), why))

    def _fail_all(self, error: BaseException) -> None:
        with self._lock:
            self._closed = True
            tickets, self._tickets = self._tickets, {}
        for ticket in tickets.values():
            ticket.fail(error)


def _manager(model: Any, blocks: int, page: int, max_batch: int, max_batch_tokens: int) -> Any:
    from transformers import ContinuousBatchingConfig, GenerationConfig

    return model.init_continuous_batching(
        generation_config=GenerationConfig(do_sample=False, eos_token_id=NO_EOS, pad_token_id=0),
        continuous_batching_config=ContinuousBatchingConfig(
            page_size=page,
            num_blocks=blocks,
            max_requests_per_batch=max_batch,
            max_batch_tokens=max_batch_tokens,
            allow_block_sharing=False,
            auto_switch_to_flash=False,
        ),
    )
