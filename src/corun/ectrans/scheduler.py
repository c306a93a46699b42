"""Which items of which requests go to the model next: pure, with the time as an argument.

    offer ─▶ waiting requests ─ policy, lanes ─▶ order ─ packing ─▶ package ─▶ executor ─▶ done | failed
             bounded by items    anew each time          off count cost

The unit of dispatch is the item, so a request may travel in several packages, together with others; it is done when
its last item is. Ranks are made anew at each dispatch from what is left of each request. `simulate` and the server
drive this very object.

Two classes of request: `rt`, and `batch` from `batch_threshold` items on or when asked for. Lanes::

    shared   one pool. Of the packages sent while both classes wait, at least rt_share are led by rt (a credit of
             rt_share a package); what a class does not use the other has
    pinned   round(rt_share * slots) slots serve rt only, the others batch only; a class without slots uses all

With packing `off` a request that was begun goes on before others: whole requests, non-preemptive.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from corun.errors import InputError, suggest
from corun.serve.estimate import Estimate, LearnedCost
from corun.serve.packing import Builder, Item, Limits, make_rule, rest_cost, waste
from corun.serve.policies import Edf, Fifo, Hrrn, HrrnStale, QueuePolicy, Ranking, Sjf, drain
from corun.wire import Status

RT, BATCH = "rt", "batch"
SHARED, PINNED = "shared", "pinned"
POLICIES: Mapping[str, Callable[[Callable[[Any], Ranking]], QueuePolicy[Any]]] = {
    "fcfs": lambda view: Fifo(),
    "sjf": Sjf,
    "edf": Edf,
    "hrrn": Hrrn,
    "hrrn-stale": HrrnStale,
}
MAX_TRIES = 2
NO_DEADLINE_NS = 1 << 62


class Job:
    """One request: its items, and how far they are.

    kind: rt or batch, filled by the scheduler where empty. payload: the caller's, untouched. status: None until it
    ended; then OK, EXPIRED, CANCELLED or FAILED with `detail`. Times in ns of the scheduler's clock, None = not yet.
    """

    def __init__(
        self,
        key: int,
        arrival_ns: int,
        lengths: Sequence[int],
        kind: str = "",
        deadline_ns: int | None = None,
        payload: Any = None,
    ) -> None:
        self.key = key
        self.arrival_ns = arrival_ns
        self.kind = kind
        self.deadline_ns = deadline_ns
        self.payload = payload
        self.size = len(lengths)
        self.tokens = sum(lengths)
        self.items = [Item(self, index, length) for index, length in enumerate(lengths)]
        self.left = self.size
        self.number = 0
        self.first_ns: int | None = None
        self.done_ns: int | None = None
        self.status: Status | None = None
        self.detail = ""

    def end(self, status: Status, now_ns: int, detail: str = "") -> None:
        """It has its outcome; what still waits of it never goes."""
        self.status, self.done_ns, self.detail = status, now_ns, detail
        self.items = []


@dataclass(frozen=True)
class Package:
    """Items that travel together; wait_ns: of the one that came first."""

    number: int
    items: tuple[Item, ...]
    longest: int
    sent_ns: int
    wait_ns: int
    slot: int = 0

    @property
    def padded(self) -> int:
        """Tokens after padding."""
        return len(self.items) * self.longest

    @property
    def real(self) -> int:
        """Tokens before padding."""
        return sum(item.length for item in self.items)

    @property
    def waste(self) -> float:
        """Share of padding among its tokens, 0..1."""
        return waste([item.length for item in self.items])

    @property
    def members(self) -> int:
        """Requests that have an item in it."""
        return len({id(item.owner) for item in self.items})


@dataclass(frozen=True)
class Rules:
    """How requests are scheduled. window_ns: how long a package may wait to fill while the executor is busy.

    queue_limit: items that may wait. slots: packages that may be out at once, for `pinned` lanes. batch_threshold 0:
    every request is rt unless it says otherwise.
    """

    policy: str = "hrrn"
    packing: str = "cost"
    limits: Limits = field(default_factory=Limits)
    window_ns: int = 20_000_000
    lanes: str = SHARED
    rt_share: float = 0.5
    slots: int = 1
    batch_threshold: int = 256
    queue_limit: int = 16384

    def __post_init__(self) -> None:
        problems = []
        if self.policy not in POLICIES:
            problems.append(
                f'policy "{self.policy}" is not one of {", ".join(POLICIES)}{suggest(self.policy, POLICIES)}'
            )
        if self.lanes not in (SHARED, PINNED):
            problems.append(f'lanes "{self.lanes}" is neither {SHARED} nor {PINNED}')
        if not 0 <= self.rt_share <= 1:
            problems.append(f"rt_share is {self.rt_share}: give a share, 0 to 1")
        if self.slots < 1 or self.queue_limit < 1 or self.batch_threshold < 0 or self.window_ns < 0:
            problems.append("slots and queue_limit must be 1 or more, batch_threshold and window_ns 0 or more")
        if problems:
            raise InputError("requests cannot be scheduled like this", problems)
        make_rule(self.packing)


class Scheduler:
    """Requests in, packages out; not thread-safe, no clock. Keys of requests that have not ended are distinct."""

    def __init__(self, rules: Rules, estimate: Estimate | None = None) -> None:
        self.rules = rules
        self.estimate: Estimate = estimate or LearnedCost()
        self.waiting_items = 0
        self.in_flight: dict[int, Package] = {}
        self._policy: QueuePolicy[Job] = POLICIES[rules.policy](self._ranking)
        self._pack = make_rule(rules.packing)
        self._jobs: dict[int, Job] = {}
        self._added = self._sent = 0
        self._credit = 0.0
        self._with_deadline = 0

    def __len__(self) -> int:
        """Requests that have not ended."""
        return len(self._jobs)

    def _ranking(self, job: Job) -> Ranking:
        packages, padded = rest_cost([item.length for item in job.items], self.rules.limits.max_items)
        service = self.estimate.seconds(packages, padded)
        deadline_ns = NO_DEADLINE_NS if job.deadline_ns is None else job.deadline_ns
        return Ranking(job.arrival_ns, service, deadline_ns)

    # In

    def offer(self, job: Job) -> str:
        """Admit a request; otherwise the reason why not."""
        rules = self.rules
        if not job.size:
            return "it holds no sentences"
        longest = max(item.length for item in job.items)
        if longest > rules.limits.max_padded_tokens:
            return f"a sentence of {longest} tokens is over the limit of {rules.limits.max_padded_tokens}"
        if self.waiting_items + job.size > rules.queue_limit:
            return (
                f"the queue is full: {self.waiting_items} of {rules.queue_limit} sentences wait, {job.size} more came"
            )
        if not job.kind:
            large = rules.batch_threshold and job.size >= rules.batch_threshold
            job.kind = BATCH if large else RT
        job.number = self._added
        self._added += 1
        self._jobs[job.key] = job
        self._with_deadline += job.deadline_ns is not None
        self.waiting_items += job.size
        self._policy.push(job)
        return ""

    def cancel(
        self, key: int, now_ns: int, status: Status = Status.CANCELLED, detail: str = "cancelled"
    ) -> Job | None:
        """End a request that has not ended; what is out of it is ignored when it comes back."""
        job = self._jobs.get(key)
        if job is not None:
            self._end(job, status, now_ns, detail)
        return job

    def expire(self, now_ns: int) -> list[Job]:
        """End every request whose deadline has passed."""
        if not self._with_deadline:
            return []
        late = [job for job in self._jobs.values() if job.deadline_ns is not None and job.deadline_ns <= now_ns]
        for job in late:
            self._end(job, Status.EXPIRED, now_ns, "its deadline passed")
        return late

    def clear(self, now_ns: int, detail: str) -> list[Job]:
        """End every request."""
        jobs = list(self._jobs.values())
        for job in jobs:
            self._end(job, Status.CANCELLED, now_ns, detail)
        return jobs

    def next_deadline_ns(self) -> int | None:
        """The earliest deadline of a request that has not ended."""
        if not self._with_deadline:
            return None
        return min(job.deadline_ns for job in self._jobs.values() if job.deadline_ns is not None)

    def _end(self, job: Job, status: Status, now_ns: int, detail: str = "") -> None:
        self.waiting_items -= len(job.items)
        self._with_deadline -= job.deadline_ns is not None
        job.end(status, now_ns, detail)
        self._jobs.pop(job.key, None)

    # Out

    def next(self, now_ns: int, idle: bool = True, slot: int = 0, room: int | None = None) -> Package | None:
        """The package to send now, or None: nothing waits for this slot, or it is worth waiting until `due_ns`.

        idle: the executor has nothing to do. room: items it can take, below the limit of the rules.
        """
        if not self.waiting_items or room == 0 or not (idle or self._worth_sending(now_ns)):
            return None
        everything = [job for job in drain(self._policy, now_ns) if job.items]
        order = self._in_lanes([job for job in everything if self._serves(slot, job)])
        package = Builder(self.rules.limits, room)
        if order:
            self._pack([job.items for job in order], package, now_ns)
        for item in package.items:
            item.tries += 1
        self._take(package.items, now_ns)
        for job in sorted(everything, key=lambda job: (job.arrival_ns, job.number)):
            if job.items:
                self._policy.push(job)
        return self._send(package, now_ns, slot) if package.items else None

    def _worth_sending(self, now_ns: int) -> bool:
        if self.waiting_items >= self.rules.limits.max_items:
            return True
        due_ns = self.due_ns()
        return due_ns is not None and now_ns >= due_ns

    def due_ns(self) -> int | None:
        """When the oldest waiting item has waited for the window; None when nothing waits."""
        arrivals = [job.arrival_ns for job in self._jobs.values() if job.items]
        return min(arrivals) + self.rules.window_ns if arrivals else None

    def _serves(self, slot: int, job: Job) -> bool:
        rules = self.rules
        rt_slots = round(rules.rt_share * rules.slots)
        if rules.lanes != PINNED or rt_slots in (0, rules.slots):
            return True
        return (slot < rt_slots) == (job.kind == RT)

    def _in_lanes(self, order: list[Job]) -> list[Job]:
        """The policy's order, led by a begun request with packing off, or by rt when rt has credit."""
        if not order:
            return order
        lead = order[0]
        if self.rules.packing == "off":
            begun = [job for job in order if job.first_ns is not None]
            lead = min(begun, key=lambda job: (job.first_ns, job.number)) if begun else self._rt_or(lead, order)
        else:
            lead = self._rt_or(lead, order)
        return [lead, *(job for job in order if job is not lead)]

    def _rt_or(self, lead: Job, order: Sequence[Job]) -> Job:
        share = self.rules.rt_share if self.rules.lanes == SHARED else 0.0
        if not share or len({job.kind for job in order}) < 2:
            return lead
        self._credit += share
        if lead.kind != RT and self._credit < 1:
            return lead
        self._credit = max(0.0, self._credit - 1)
        return lead if lead.kind == RT else next(job for job in order if job.kind == RT)

    def _take(self, items: Sequence[Item], now_ns: int) -> None:
        taken = set(map(id, items))
        for job in {id(item.owner): item.owner for item in items}.values():
            job.items = [item for item in job.items if id(item) not in taken]
            job.first_ns = now_ns if job.first_ns is None else job.first_ns
        self.waiting_items -= len(items)

    def _send(self, built: Builder, now_ns: int, slot: int) -> Package:
        self._sent += 1
        wait_ns = now_ns - min(item.owner.arrival_ns for item in built.items)
        package = Package(self._sent, tuple(built.items), built.longest, now_ns, wait_ns, slot)
        self.in_flight[package.number] = package
        return package

    # Back

    def done(self, package: Package, now_ns: int, seconds: float | None = None) -> list[Job]:
        """A whole package came back; the requests that ended with it."""
        self.finish(package, seconds)
        return self.items_done(package.items, now_ns)

    def finish(self, package: Package, seconds: float | None = None) -> None:
        """Nothing of a package is out any more. seconds: what it took the executor, to learn from."""
        self.in_flight.pop(package.number, None)
        if seconds is not None:
            self.estimate.observe(package.padded, seconds)

    def items_done(self, items: Iterable[Item], now_ns: int) -> list[Job]:
        """Items came back one by one (a continuous decoder); the requests that ended with them."""
        ended = []
        for item in items:
            job: Job = item.owner
            job.left -= 1
            if not job.left and job.status is None:
                self._end(job, Status.OK, now_ns)
                ended.append(job)
        return ended

    def failed(self, package: Package, now_ns: int, detail: str, back: Sequence[Item] | None = None) -> list[Job]:
        """A package was lost: its items (or those in `back`) wait again, once; requests that lost one twice end.

        Returns the requests that ended.
        """
        self.in_flight.pop(package.number, None)
        ended = []
        for item in package.items if back is None else back:
            job: Job = item.owner
            if job.status is not None:
                continue
            if item.tries >= MAX_TRIES:
                self._end(job, Status.FAILED, now_ns, detail)
                ended.append(job)
                continue
            job.items.append(item)
            self.waiting_items += 1
            if len(job.items) == 1:
                self._policy.push(job)
        return ended
