"""The policies of one run together: what the launcher asks before, while and after it starts processes.

sharing = Sharing.prepare({"policy": "idle+preempt", "micro": 8}, cast)     refused -> InputError with reasons
argv = sharing.command(member, argv) + flags;  env |= sharing.environment(member);  threads = sharing.threads(member)
sharing.started({member: pid, ...})       attach, look for borders, cross them
sharing.self_test()                       one second: does it bite?
sharing.enter("corun")                    the arms alone and train run with the gate open and the duty at 1
manifest["sharing"] = sharing.describe()
sharing.close()
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, fields, replace
from typing import Any

from corun.errors import InputError, RunFault
from corun.registry import home
from corun.share.borders import Border, border_between, cross
from corun.share.brakes import Mode
from corun.share.gates import GateOptions
from corun.share.host import Host, why_not
from corun.share.observed import observe
from corun.share.page import Knobs, Page
from corun.share.policies import POLICIES
from corun.share.policy import Cast, Member, Policy, Rule, finest, least_threads
from corun.share.selftest import SELF_TEST_S, Shares, Spinner, spin
from corun.share.spec import NAIVE, in_one_process, parse
from corun.share.start import Setup

GATE = "corun.share.gates:from_options"
CORUN = "corun"


class Sharing:
    """Prepared policies; make it with `prepare`, leave it with `close` (or as a context)."""

    def __init__(self, policies: Sequence[Policy], cast: Cast, host: Host, always_page: bool = False) -> None:
        self.policies = tuple(policies)
        self.cast = cast
        self.borders: list[Border] = []
        self.shares: Shares | None = None
        self.arm = ""
        self._host = host
        self._pids: dict[Member, int] = {}
        self._problems: list[str] = []
        self._heard: dict[str, Any] = {}
        self._notes: list[str] = []
        self.rule = merge_rules(policy.rule() for policy in policies)
        self._gate = self.rule
        self.page: Page | None = Page.create() if self.rule or always_page else None

    @classmethod
    def prepare(
        cls,
        spec: Mapping[str, Any] | str | None,
        cast: Cast,
        host: Host | None = None,
        always_page: bool = False,
        also: Sequence[Mapping[str, Any] | str] = (),
    ) -> Sharing:
        """Parse, ask every policy whether it can be had here, and set it up.

        always_page: a page and a gate even where no policy needs one, so that policies can be switched later.
        also: specs that `switch` may put in force later, on the same processes.
        Where the spec asks for one process, or a policy of it acts only inside one, so does the cast from then on.
        Raises InputError: a bad spec, or a policy that is refused here, with its reasons. RunFault: a set-up failed.
        """
        host = host or Host()
        policies = parse(spec)
        cast = replace(cast, one_process=cast.one_process or in_one_process(spec))
        refused = {policy.name: policy.refusals(host, cast) for policy in policies}
        reasons = [f"{name}: {reason}" for name, why in refused.items() for reason in why]
        if reasons:
            raise InputError("the sharing policy cannot be had here", reasons)
        rules = [merge_rules(policy.rule() for policy in parse(other)) for other in (spec, *also)]
        _only_one(rules)
        sharing = cls(policies, cast, host, always_page or bool(also))
        sharing._gate = merge_rules(rules)
        try:
            for policy in policies:
                policy.prepare(host, cast)
        except (OSError, RunFault):
            sharing.close()
            raise
        return sharing

    def __enter__(self) -> Sharing:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    @property
    def name(self) -> str:
        return "+".join(policy.name for policy in self.policies)

    # Starting processes

    def threads(self, member: Member) -> int:
        """Threads for a process: what a policy fixes, else what it was configured with."""
        for policy in self.policies:
            threads = policy.threads(member, self._host)
            if threads is not None:
                return threads
        return member.threads

    def environment(self, member: Member) -> dict[str, str]:
        """Variables to add to a process' environment."""
        merged: dict[str, str] = {}
        for policy in self.policies:
            merged.update(policy.environment(member))
        return merged

    def setup(self, member: Member) -> Setup:
        """What is set before a process starts."""
        merged = Setup()
        for policy in self.policies:
            merged = merged.merged(policy.setup(member))
        return merged

    def command(self, member: Member, argv: Sequence[str]) -> list[str]:
        """`argv`, wrapped so that the process is under the policy from its first instruction."""
        return self.setup(member).command(argv)

    def flags(self, member: Member) -> list[str]:
        """Flags for the process' own command line: --announce of a server, --gate and the like of a trainer."""
        if member.serves:
            return ["--announce", f"{self.page.path}:{member.index}"] if self.page else []
        if not member.trains:
            return []
        flags = [flag for policy in self.policies for flag in policy.trainer_flags()]
        if self.page:
            flags += ["--gate", GATE, "--gate-options", json.dumps(self._gate_options())]
        if self._gate and self._gate.layers:
            flags.append("--layer-gate")
        return flags

    def _gate_options(self) -> dict[str, Any]:
        assert self.page is not None
        known = {item.name for item in fields(GateOptions)}
        asked: dict[str, Any] = {}
        if self._gate:
            limits = {
                "micro_max": finest(self._gate, not self.cast.on_gpu),
                "least_threads": least_threads(self.cast),
                "cores": len(self._host.cores),
                "service_threads": [self.threads(service) for service in self.cast.services],
            }
            asked = {**self._gate.options, **limits}
        return {"page": str(self.page.path), **{key: value for key, value in asked.items() if key in known}}

    @property
    def lanes(self) -> dict[str, Any]:
        """The streams asked for inside one process, as `make_lanes` takes them; {} = none."""
        return next((lanes for policy in self.policies if (lanes := policy.lanes())), {})

    # Running processes

    def heard(self, lanes: Mapping[str, Any]) -> list[str]:
        """What the one process says of its lanes in HELLO; returns where that is not what was asked for."""
        self._heard = dict(lanes)
        notes = [
            f"{name} was to be {asked} and is {lanes.get(name, 'not known')}"
            for name, asked in self.lanes.items()
            if name != "kind" and lanes.get(name) != asked
        ]
        self._notes = notes
        return notes

    def started(self, pids: Mapping[Member, int]) -> list[str]:
        """Attach to all processes, find and cross borders; returns what the user must know.

        Threads that a process made before it was under the policy are reached here.
        """
        self._pids = dict(pids)
        self._problems = []
        for member, pid in pids.items():
            self._attach(member, pid)
        self._cross_borders()
        return [*self._problems, *(border.sentence() for border in self.borders)]

    def _attach(self, member: Member, pid: int) -> None:
        for policy in self.policies:
            try:
                policy.attach(member, pid, self._host)
            except OSError as error:
                self._problems.append(f"{policy.name} could not be applied to {member.label}: {why_not(error)}")

    def _cross_borders(self) -> None:
        trainers = [pid for member, pid in self._pids.items() if member.trains]
        needed = any(policy.expects(self._host) for policy in self.policies)
        own_group = any(policy.name == "cgroup" for policy in self.policies)
        self.borders = []
        if not trainers or not needed:
            return
        for member, pid in self._pids.items():
            border = border_between(pid, trainers[0], self._host) if member.serves else None
            if border is None:
                continue
            if border.kind == "cgroup" and own_group:
                crossed = Border(border.kind, border.detail, "the trainer's cgroup is the policy's own")
            else:
                crossed = cross(border, trainers[0], self._host)
            if crossed not in self.borders:
                self.borders.append(crossed)

    def enter(self, arm: str) -> None:
        """Put the policy in force for an arm: fully for corun, at rest for alone and train.

        The gate opens and the duty is 1 outside corun. What /proc says (class, nice) stays: it costs nothing while
        nobody else wants the core. Cores are given back, so that `train` is measured with all of them.
        """
        self.arm = arm
        active = arm == CORUN
        for policy in self.policies:
            if policy.kind == "cores":
                self._switch(policy, active)
        if self.page is None:
            return
        rule = self.rule if active and self.rule else Rule()
        self.page.set_knobs(Knobs(rule.micro, rule.duty, self._trainer_threads(active)))
        self.page.mode = rule.mode

    def switch(self, spec: Mapping[str, Any] | str) -> None:
        """Another policy on the same processes, from the next `enter` on.

        Raises InputError for a policy that is more than a rule of the gate: its processes have to be started anew.
        """
        policies = parse(spec)
        before = {policy.name: options_of(policy) for policy in self.policies if _starts(policy)}
        after = {policy.name: options_of(policy) for policy in policies if _starts(policy)}
        rule = merge_rules(policy.rule() for policy in policies)
        layers = bool(rule and rule.layers) == bool(self._gate and self._gate.layers)
        if before != after or not layers or (rule and self.page is None):
            name = "+".join(policy.name for policy in policies)
            raise InputError(f"{name} takes processes that were started under it; these were under {self.name}")
        self.rule = rule

    def _trainer_threads(self, active: bool) -> int:
        trainer = self.cast.trainer
        if trainer is None:
            return 0
        return self.threads(trainer) if active else max(trainer.threads, self.threads(trainer))

    def _switch(self, policy: Policy, active: bool) -> None:
        for member, pid in self._pids.items():
            with suppress(ProcessLookupError):
                (policy.attach if active else policy.detach)(member, pid, self._host)

    def self_test(self, seconds: float = SELF_TEST_S) -> Shares | None:
        """CPU shares of two spinners under the policy; None where no policy is about who gets a core."""
        if not any(policy.expects(self._host) for policy in self.policies):
            return None
        service = Member("server", "self-test")
        self.shares = spin(self._spinner(service), self._spinner(Member("trainer", "self-test")), self._host, seconds)
        return self.shares

    def _spinner(self, member: Member) -> Spinner:
        def attach(pid: int) -> None:
            for policy in self.policies:
                policy.attach(member, pid, self._host)

        environment = {**os.environ, "PYTHONPATH": str(home() / "src"), **self.environment(member)}
        return Spinner(self.setup(member), environment, attach)

    # Reporting

    def describe(self) -> dict[str, Any]:
        """For the manifest: what was asked, what is in force, and why every other policy could not be had."""
        return {
            "policy": self.name,
            **({"one_process": True} if self.cast.one_process else {}),
            "options": {policy.name: options_of(policy) for policy in self.policies},
            "threads": {member.label: self.threads(member) for member in self.cast.members},
            "in_force": {
                **{policy.name: policy.in_force() for policy in self.policies},
                "processes": {member.label: observe(pid, self._host) for member, pid in self._pids.items()},
                "gate": asdict(self.rule) if self.rule else None,
                **({"lanes": self._heard} if self.lanes else {}),
            },
            "borders": [border.sentence() for border in self.borders],
            "problems": [*self._problems, *self._notes],
            "self_test": self.shares.sentence() if self.shares else None,
            "refused": survey(self.cast, self._host, skip={policy.name for policy in self.policies}),
        }

    def close(self) -> None:
        """Tear down in reverse order; the page's file goes last."""
        for policy in reversed(self.policies):
            policy.teardown(self._host)
        if self.page:
            self.page.close()


def _starts(policy: Policy) -> bool:
    """Whether a policy does something to processes, not only to the gate."""
    return policy.rule() is None and policy.name != NAIVE


def _only_one(rules: Sequence[Rule | None]) -> None:
    """InputError when rules that one gate is to follow in turn ask for different options of it."""
    asked: dict[str, Any] = {}
    for rule in rules:
        for name, value in (rule.options if rule else {}).items():
            if name != "micro_max" and asked.setdefault(name, value) != value:
                raise InputError(f"policies that are switched have one gate, which cannot have {name} {value} too")


def options_of(policy: Policy) -> dict[str, Any]:
    """The options a policy was built with."""
    return {item.name: getattr(policy, item.name) for item in fields(policy) if item.init}  # type: ignore[arg-type]


def merge_rules(rules: Any) -> Rule | None:
    """What several cooperative policies ask of the gate together; None when none asks anything."""
    asked = [rule for rule in rules if rule is not None]
    if not asked:
        return None
    options: dict[str, Any] = {}
    mode = Mode.FREE
    for rule in asked:
        options.update(rule.options)
        mode |= Mode(rule.mode)
    micro = max(rule.micro for rule in asked)
    if "micro_max" in options:
        parts = max(rule.options.get("micro_max", 0) for rule in asked)
        options["micro_max"] = max(parts, micro) if parts else 0
    return Rule(int(mode), options, micro, min(rule.duty for rule in asked), any(rule.layers for rule in asked))


def survey(cast: Cast, host: Host, skip: set[str] | frozenset[str] = frozenset()) -> dict[str, list[str]]:
    """Why each policy cannot be had here; those that can be are left out.

    A policy that acts inside one process is asked as if it had one: asking for it gives it one.
    """
    found: dict[str, list[str]] = {}
    for name, cls in POLICIES.items():
        if name in skip:
            continue
        try:
            reasons = cls().refusals(host, replace(cast, one_process=cast.one_process or cls.one_process))
        except InputError:
            continue
        if reasons:
            found[name] = reasons
    return found


def available(cast: Cast, host: Host) -> list[str]:
    """Names of the policies that can be had here (options they cannot do without left aside)."""
    refused = survey(cast, host)
    return [name for name in POLICIES if name not in refused]
