"""Does the policy bite? Two processes spin on one core for a second, and the kernel says who got it.

One is started as a service would be and one as the trainer, with the same wrapper and the same attach. Under nice 19
or SCHED_IDLE the service's spinner gets nearly all of the core, without a policy half of it; half under a policy
means that something between them (a session, a cgroup) has cancelled it. Times are CPU times of the two, so other
load on the machine shortens both and does not decide between them. Both end at one instant: a spinner that only gets
the core once the other has gone must find that its time is over.
"""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass

from corun.errors import RunFault
from corun.share.host import Host
from corun.share.start import Setup

SELF_TEST_S = 1.0
BITES_FROM = 0.75
_START_S = 20.0

_SPIN = """
import sys, time
sys.stdout.write("ready\\n"); sys.stdout.flush()
end = float(sys.stdin.readline())
began = time.process_time()
while time.monotonic() < end:
    pass
print(time.process_time() - began)
"""


@dataclass(frozen=True)
class Spinner:
    """How one of the two is started and, once it runs, attached."""

    setup: Setup
    environment: Mapping[str, str]
    attach: Callable[[int], None]
    new_session: bool = False


@dataclass(frozen=True)
class Shares:
    """CPU seconds of the two spinners on one core."""

    service_s: float
    trainer_s: float

    @property
    def service(self) -> float:
        """The service's share of what both got, 0.5 without a policy and near 1 under one that bites."""
        total = self.service_s + self.trainer_s
        return self.service_s / total if total else 0.5

    @property
    def bites(self) -> bool:
        return self.service >= BITES_FROM

    def sentence(self) -> str:
        """For the console and the manifest."""
        verdict = "the policy bites" if self.bites else "the policy does NOT bite"
        return f"{verdict}: of one core the service's spinner got {self.service:.2f}, the trainer's {1 - self.service:.2f}"


def spin(service: Spinner, trainer: Spinner, host: Host, seconds: float = SELF_TEST_S) -> Shares:
    """Let both spin on the last core for `seconds`; RunFault when a spinner cannot be started."""
    core = host.cores[-1]
    started: list[subprocess.Popen[str]] = []
    try:
        for spinner in (service, trainer):
            started.append(_start(spinner))
        for process, spinner in zip(started, (service, trainer), strict=True):
            _wait_ready(process)
            spinner.attach(process.pid)
            host.set_cores(process.pid, (core,))
        end_s = time.monotonic() + seconds
        for process in started:
            assert process.stdin is not None
            process.stdin.write(f"{end_s}\n")
            process.stdin.flush()
        return Shares(*(_result(process, seconds) for process in started))
    except OSError as error:
        raise RunFault(f"the self-test of the sharing policy failed: {error.strerror or error}") from error
    finally:
        for process in started:
            with suppress(OSError):
                process.kill()
            process.communicate()


def _start(spinner: Spinner) -> subprocess.Popen[str]:
    argv: Sequence[str] = [sys.executable, "-c", _SPIN]
    return subprocess.Popen(
        spinner.setup.command(argv),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=dict(spinner.environment),
        start_new_session=spinner.new_session,
    )


def _wait_ready(process: subprocess.Popen[str]) -> None:
    assert process.stdout is not None
    if process.stdout.readline().strip() != "ready":
        process.kill()
        _, errors = process.communicate()
        raise RunFault(f"the self-test's spinner did not start: {errors.strip().splitlines()[-1:] or 'no output'}")


def _result(process: subprocess.Popen[str], seconds: float) -> float:
    began = time.monotonic()
    try:
        out, _ = process.communicate(timeout=seconds + _START_S)
        return float(out.strip())
    except (subprocess.TimeoutExpired, ValueError) as error:
        waited = time.monotonic() - began
        raise RunFault(f"the self-test's spinner gave no answer within {waited:.0f} s") from error
