"""profile -> fit -> search: how many of the services fit beside the training job, policy by policy.

    profile   each model alone; under each policy the trainer alone, each model beside it, and all models together
    search    size k of the set: gallop and bisect; of all sets of a size the one with the most room is asked about
    a set     too big for memory? implied by a smaller or larger set that was measured? sure enough by the model?
              else measured, window after window, until the sequential test says meets or misses

Every window measured goes into the model before the next question, so the model is best where the answer lies. What is
already in the profile is not measured again. Nothing here starts a process or knows a clock: `measure` does.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Final

from corun.plan.batching import Choice
from corun.plan.estimate import Estimate, Evidence, Tail, alone_condition, percentile_of
from corun.plan.measured import Condition, Memory, Profile, Window, sojourns
from corun.plan.memory import Limits, Need, need, peaks
from corun.plan.question import Candidate, Question
from corun.plan.search import bisect_count, bisect_rate, subsets
from corun.plan.sequential import LOOKS, Word, judge, together
from corun.share.foreign import DIRTY_CORES

SURE: Final = 0.975
FULL: Final = 1000.0
HIGH_LOAD: Final = 0.7
TRIES: Final = 2

Measure = Callable[[Condition, int], Window]
Say = Callable[[str], None]
Set = tuple[Candidate, ...]


@dataclass(frozen=True)
class Machine:
    """What the plan is for. threads: the trainer's. ladder: multiples of a rate at which a service is also measured."""

    cores: int
    threads: int
    limits: Limits
    ladder: tuple[float, ...] = ()


@dataclass(frozen=True)
class Finding:
    """Whether a set keeps its promise, and from what that is known: memory, measured, implied or predicted."""

    word: Word
    source: str
    kept: float
    detail: str = ""

    @property
    def fits(self) -> bool:
        """Undecided after all looks counts by what is more probable."""
        return self.word == "meets" or (self.word == "undecided" and self.kept >= 0.5)


@dataclass(frozen=True)
class Place:
    """One service of a plan: what it will take, and the rate it could take beside the others at theirs."""

    candidate: Candidate
    tail: Tail
    can_take: float


@dataclass(frozen=True)
class Answer:
    """The plan of one policy. training: speed over alone, None = nobody trains. runs: windows behind the model."""

    policy: str
    places: tuple[Place, ...]
    finding: Finding
    training: float | None
    need: Need
    spread: float
    runs: int
    blocked: str = ""

    @property
    def services(self) -> Set:
        return tuple(place.candidate for place in self.places)

    @property
    def goodput(self) -> float:
        """Requests/s carried within the promise."""
        return sum(place.candidate.rate for place in self.places)


@dataclass
class Planner:
    """Answers one question. measured: windows it asked for; unfit: kinds that cannot run at all, and why.

    looks: windows one set may take. budget: windows the search may measure; after that the model alone decides.
    choices: by candidate, why it is served in the batches it is.
    """

    question: Question
    profile: Profile
    machine: Machine
    measure: Measure
    say: Say = lambda line: None
    looks: int = LOOKS
    budget: float = math.inf
    measured: int = 0
    unfit: dict[str, str] = field(default_factory=dict)
    choices: dict[str, Choice] = field(default_factory=dict)
    _refuted: dict[str, list[frozenset[str]]] = field(default_factory=dict)
    _used: set[tuple[Condition, int]] = field(default_factory=set)

    # Asking

    def answers(self) -> Iterator[Answer]:
        """The answer of each policy, as soon as it is known."""
        self.profile_alone()
        for policy in self.question.policies:
            self.profile_policy(policy)
            yield self.answer(policy)

    def answer(self, policy: str, may_measure: bool = True) -> Answer:
        """The largest set of candidates under a policy, by the goal of the question."""
        fits = lambda size: self._any_fits(policy, size, may_measure)  # noqa: E731
        count = bisect_count(1, len(self._able()), fits, self._guess(policy))
        found = self._chosen(policy, count)
        return self._answer(policy, found, self._blocked(policy, count + 1))

    def refute(self, policy: str, chosen: Iterable[Candidate]) -> None:
        """A set was validated and missed its promise: it and all larger ones are out."""
        self._refuted.setdefault(policy, []).append(frozenset(one.name for one in chosen))

    # Profiling

    def profile_alone(self) -> None:
        """Each model by itself, at its rate and, where the machine's ladder has one, at a high load."""
        for candidate in self._distinct():
            window = self.window(alone_condition(candidate), 0)
            answered = any(sample.services_ms for sample in window.samples)
            if window.fault or not answered:
                self.unfit[candidate.kind] = window.fault or f"no request was answered in {window.seconds:g} s"
                continue
            high = self._high_rate(candidate, window)
            if high:
                self.window(Condition(((candidate.kind, high),)), 0)

    def conditions(self) -> list[Condition]:
        """What the profile measures first, whatever comes out; rates of high load are found on the way."""
        able, job = self._distinct(), self.question.job
        found = [alone_condition(candidate) for candidate in able]
        for policy in self.question.policies:
            if job:
                found += [Condition((), job.label, policy)]
                found += [self._condition((candidate,), policy) for candidate in able]
            if len(able) > 1:
                found.append(self._condition(able, policy))
        return list(dict.fromkeys(found))

    def profile_policy(self, policy: str) -> None:
        """The trainer alone, each model beside it, then all models together."""
        able = self._distinct()
        if self.question.job:
            self.window(Condition((), self.question.job.label, policy), 0)
            for candidate in able:
                if self.window(self._condition((candidate,), policy), 0).fault:
                    self.say(f"{candidate.kind} does not run beside {self.question.job.label} under {policy}")
        if len(able) > 1 and self._need(able).fits and self._strangers(policy, able):
            self.window(self._condition(able, policy), 0)

    def _strangers(self, policy: str, able: Sequence[Candidate]) -> set[str]:
        """Models that no window under this policy has shown beside another one."""
        wanted = self._condition(able, policy)
        seen = [one.condition for one in self.profile.windows()]
        met = [
            one.loads for one in seen if (one.job, one.policy) == (wanted.job, wanted.policy) and len(one.loads) > 1
        ]
        return {one.kind for one in able} - {kind for loads in met for kind, _ in loads}

    def _high_rate(self, candidate: Candidate, window: Window) -> float | None:
        (sample,) = window.samples
        shares = zip(sample.services_ms, sample.batches or [1] * len(sample.services_ms), strict=True)
        mean_ms = sum(ms / size for ms, size in shares) / max(1, len(sample.services_ms))
        rates = [candidate.rate * factor for factor in self.machine.ladder if factor > 1]
        return max((rate for rate in rates if rate * mean_ms / 1000 <= HIGH_LOAD), default=None)

    def window(self, condition: Condition, repeat: int) -> Window:
        """A window from the profile, or measured now."""
        self._used.add((condition, repeat))
        kept = self.profile.get(condition, repeat)
        if kept:
            return kept
        self.say(condition.label)
        window = self.measure(condition, repeat)
        self.measured += 1
        if window.fault:
            self.say(f"does not fit: {window.fault}")
        self.profile.add(window)
        return window

    @property
    def reused(self) -> int:
        """Windows used that were in the profile already."""
        return len(self._used) - self.measured

    def disturbed(self) -> tuple[int, float] | None:
        """How many of the windows used others disturbed, and the most cores they took; None when none."""
        used = [window for condition, repeat in self._used if (window := self.profile.get(condition, repeat))]
        foreign = [window.foreign_cores for window in used if window.foreign_cores > DIRTY_CORES]
        return (len(foreign), max(foreign)) if foreign else None

    # What is known

    def evidence(self, policy: str) -> Evidence:
        """All windows of the profile that tell something about a policy: any rate, any model that was measured alone."""
        job = self.question.job.label if self.question.job else ""
        windows = [one for one in self.profile.windows() if all(sample.services_ms for sample in one.samples)]
        windows = [one for one in windows if one.condition.loads and not one.fault]
        alone = [one for one in windows if not one.condition.job and len(one.condition.loads) == 1]
        known = {model for one in alone for model, _ in one.condition.loads}
        under = [one for one in windows if one.condition.job == job and (not job or one.condition.policy == policy)]
        together = [one for one in under if {model for model, _ in one.condition.loads} <= known]
        together = together if job else [one for one in together if len(one.condition.loads) > 1]
        trained = [self.profile.get(Condition((), job, policy), 0)] if job else []
        speed = next((window.samples_per_s for window in trained if window), None)
        self._used.update((window.condition, window.repeat) for window in (*alone, *together))
        threads = self.machine.threads if job else 0
        parts = (self.question.slo, self.machine.cores, threads, tuple(alone), tuple(together), speed)
        return Evidence(*parts, self.profile.curves)

    def estimate(self, policy: str) -> Estimate:
        """The model of a policy from everything measured so far."""
        key = (policy, len(self.profile))
        if key not in self._estimates:
            self._estimates[key] = self.evidence(policy).estimate()
        return self._estimates[key]

    _estimates: dict[tuple[str, int], Estimate] = field(default_factory=dict)

    def finding(self, policy: str, chosen: Set, may_measure: bool = True) -> Finding:
        """Whether a set keeps the promise; measured when nothing else tells and it may be."""
        known = self._known(policy, chosen)
        if known:
            return known
        kept = self.estimate(policy).kept(chosen)
        if kept >= SURE or kept <= 1 - SURE:
            return Finding("meets" if kept >= SURE else "misses", "predicted", kept)
        if not may_measure or self.measured >= self.budget:
            return Finding("undecided", "predicted", kept)
        return self._measured(policy, chosen, self.looks)

    def _known(self, policy: str, chosen: Set) -> Finding | None:
        """Without the model: memory, this set as measured, and what larger and smaller sets imply."""
        short = self._need(chosen)
        if not short.fits:
            return Finding("misses", "memory", 0.0, f"needs {short.host_mib:.0f} MiB, {short.gpu_mib:.0f} on the GPU")
        names = frozenset(one.name for one in chosen)
        if any(bad <= names for bad in self._refuted.get(policy, [])):
            return Finding("misses", "measured", 0.0, "missed when it was validated")
        if self._windows(policy, chosen):
            found = self._judged(policy, chosen)
            if found.word != "undecided" or len(self._windows(policy, chosen)) >= self.looks:
                return found
        return self._implied(policy, chosen)

    def _implied(self, policy: str, chosen: Set) -> Finding | None:
        mine = Condition(tuple((one.kind, one.rate) for one in chosen)).loads
        wanted = self._condition(chosen, policy)
        for window in self.profile.windows():
            other = window.condition
            if (other.job, other.policy) != (wanted.job, wanted.policy) or other.loads == mine:
                continue
            smaller, larger = _within(other.loads, mine), _within(mine, other.loads)
            if window.fault and smaller:
                return Finding("misses", "memory", 0.0, f"{other.label}: {window.fault}")
            if (smaller or larger) and not window.fault and other.loads:
                word = self._word(self.profile.windows(other), [model for model, _ in other.loads])
                if (word == "misses" and smaller) or (word == "meets" and larger):
                    return Finding(word, "implied", float(word == "meets"), other.label)
        return None

    def _measured(self, policy: str, chosen: Set, looks: int) -> Finding:
        condition = self._condition(chosen, policy)
        for repeat in range(looks):
            if self.window(condition, repeat).fault:
                break
            if self._judged(policy, chosen).word != "undecided":
                break
        return self._judged(policy, chosen)

    def _judged(self, policy: str, chosen: Set) -> Finding:
        windows = self._windows(policy, chosen)
        faults = [window.fault for window in windows if window.fault]
        if faults:
            return Finding("misses", "memory", 0.0, faults[0])
        kinds = [one.kind for one in chosen]
        word = self._word(windows, kinds)
        slo = self.question.slo
        worst = max((percentile_of(sojourns(windows, kind), slo.percentile) for kind in kinds), default=0.0)
        kept = {"meets": 1.0, "misses": 0.0, "undecided": 0.75 if worst <= slo.bound_ms else 0.25}[word]
        requests = min((len(sojourns(windows, kind)) for kind in kinds), default=0)
        counted = f"{len(windows)} window{'s' * (len(windows) > 1)}, {requests} requests a service"
        return Finding(word, "measured", kept, f"worst {slo.name} {worst:.4g} ms in {counted}")

    def _word(self, windows: Sequence[Window], models: Iterable[str]) -> Word:
        slo = self.question.slo
        return together(judge(sojourns(windows, model), slo, self.looks).word for model in dict.fromkeys(models))

    def _windows(self, policy: str, chosen: Set) -> list[Window]:
        return self.profile.windows(self._condition(chosen, policy))

    # Sets

    def _able(self) -> list[Candidate]:
        return [candidate for candidate in self.question.candidates if candidate.kind not in self.unfit]

    def _distinct(self) -> list[Candidate]:
        """One candidate of each kind and rate that can run."""
        return list({(one.kind, one.rate): one for one in reversed(self._able())}.values())[::-1]

    def _condition(self, chosen: Iterable[Candidate], policy: str) -> Condition:
        job = self.question.job.label if self.question.job else ""
        return Condition(tuple((one.kind, one.rate) for one in chosen), job, policy)

    def _need(self, chosen: Sequence[Candidate]) -> Need:
        seen = peaks(self.profile.windows())
        parts = [seen.get(f"server {one.kind}", Memory()) for one in chosen]
        if self.question.job:
            parts.append(seen.get(f"trainer {self.question.job.label}", Memory()))
        return need(parts, self.machine.limits, self.question.memory_margin)

    def ranked(self, policy: str, size: int) -> list[Set]:
        """Sets of a size, the one most likely to keep its promises first; larger rates and memory break no tie."""
        estimate = self.estimate(policy)
        sets = subsets(self._able(), size, lambda one: -estimate.running([one])[0].load)
        unique = list({self._condition(chosen, policy): chosen for chosen in reversed(sets)}.values())[::-1]
        bound = self.question.slo.bound_ms

        def room(chosen: Set) -> float:
            return max(estimate.points(chosen), default=0.0) / bound

        return sorted(unique, key=room)

    def _any_fits(self, policy: str, size: int, may_measure: bool) -> bool:
        """Whether a set of a size fits: the best by the model, and after a surprise the next best."""
        for _ in range(TRIES):
            open_sets = (chosen for chosen in self.ranked(policy, size) if self._hopeful(policy, chosen))
            best = next(open_sets, None)
            if best is None:
                return False
            if self.finding(policy, best, may_measure).fits:
                return True
        return False

    def _hopeful(self, policy: str, chosen: Set) -> bool:
        known = self._known(policy, chosen)
        return known.fits if known else self.estimate(policy).kept(chosen) > 1 - SURE

    def _guess(self, policy: str) -> int:
        """The largest size the model believes in."""
        able = self._able()
        sizes = range(len(able), 0, -1)
        return next((k for k in sizes if self.estimate(policy).kept(self.ranked(policy, k)[0]) >= 0.5), 1)

    def _chosen(self, policy: str, count: int) -> Set:
        if count == 0 or not self._able():
            return ()
        fitting = [one for one in self.ranked(policy, count) if self.finding(policy, one, may_measure=False).fits]
        if not fitting:
            return ()
        if self.question.goal == "goodput":
            return max(fitting, key=lambda chosen: self._headroom(policy, chosen))
        if self.question.goal == "training":
            return max(fitting, key=self.estimate(policy).training)
        return fitting[0]

    def _headroom(self, policy: str, chosen: Set) -> float:
        """Requests/s of all services when every rate is raised by one factor until the promise breaks."""
        total = sum(one.rate for one in chosen)
        return total * bisect_rate(
            1.0, FULL, lambda factor: self._passes(policy, [_at(one, factor) for one in chosen])
        )

    def _passes(self, policy: str, chosen: Sequence[Candidate]) -> bool:
        estimate = self.estimate(policy)
        return max(estimate.points(chosen), default=0.0) <= self.question.slo.bound_ms

    def can_take(self, policy: str, chosen: Set, index: int) -> float:
        """The rate (requests/s) service `index` could take before a promise breaks, the others at theirs; predicted."""
        own = chosen[index]

        def passes(factor: float) -> bool:
            return self._passes(policy, [*chosen[:index], _at(own, factor), *chosen[index + 1 :]])

        return own.rate * bisect_rate(0.01, FULL, passes)

    def _blocked(self, policy: str, size: int) -> str:
        """Why one more service does not fit."""
        if size > len(self._able()):
            return "all that can run fit" if not self.unfit else "; ".join(f"{k}: {v}" for k, v in self.unfit.items())
        best = self.ranked(policy, size)[0]
        found = self.finding(policy, best, may_measure=False)
        names = ", ".join(one.name for one in best)
        if found.source == "predicted":
            worst = max(self.estimate(policy).tails(best), key=lambda tail: tail.predicted_ms)
            return f"{names}: {worst.name} {self.question.slo.name} predicted {worst.predicted_ms:.4g} ms"
        return f"{names}: {found.source} {found.detail}".strip()

    def _answer(self, policy: str, chosen: Set, blocked: str) -> Answer:
        estimate = self.estimate(policy)
        tails = estimate.tails(chosen)
        places = tuple(
            Place(one, tail, self.can_take(policy, chosen, index))
            for index, (one, tail) in enumerate(zip(chosen, tails, strict=True))
        )
        finding = self.finding(policy, chosen, may_measure=False) if chosen else Finding("misses", "predicted", 0.0)
        training = estimate.training(chosen) if self.question.job else None
        runs = len(self.evidence(policy).together) + len(self.evidence(policy).alone)
        return Answer(policy, places, finding, training, self._need(chosen), estimate.spread, runs, blocked)


def best(answers: Sequence[Answer], question: Question) -> Answer | None:
    """The answer that serves the goal of the question; None when nothing fits anywhere.

    count: most services, then most training. goodput: most requests/s, then most training. training: most training
    among the policies whose plan has at most one service less than the largest.
    """
    some = [answer for answer in answers if answer.places]
    if not some:
        return None
    if question.goal == "goodput":
        return max(some, key=lambda one: (one.goodput, one.training or 0.0))
    if question.goal == "training":
        most = max(len(one.places) for one in some)
        enough = [one for one in some if len(one.places) >= max(1, most - 1)]
        return max(enough, key=lambda one: (one.training or 0.0, len(one.places)))
    return max(some, key=lambda one: (len(one.places), one.training or 0.0))


def _at(candidate: Candidate, factor: float) -> Candidate:
    return replace(candidate, rate=candidate.rate * factor)


def _within(small: Sequence[tuple[str, float]], large: Sequence[tuple[str, float]]) -> bool:
    """Whether every load of `small` has one of its own in `large` at the same or a higher rate."""
    left = sorted(large, key=lambda load: load[1])
    for model, rate in sorted(small, key=lambda load: -load[1]):
        match = next((load for load in left if load[0] == model and load[1] >= rate), None)
        if match is None:
            return False
        left.remove(match)
    return True


__all__ = ["Answer", "Finding", "Machine", "Place", "Planner", "best"]
