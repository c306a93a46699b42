"""Sleep until another process changes a word of shared memory (futex(2)), without a descriptor or a busy loop.

The waker pays a system call only while somebody sleeps, so announcing a request stays free of them. Where the
system call is unknown (another kernel or processor) waiting falls back to short sleeps.
"""

from __future__ import annotations

import ctypes
import errno
import platform
import sys
import time

from corun.clock import NS_PER_S

_FUTEX_WAIT = 0
_FUTEX_WAKE = 1
_EVERYBODY = 2**31 - 1
_NUMBERS = {"x86_64": 202, "aarch64": 98, "riscv64": 98, "ppc64le": 221, "s390x": 238}
_NUMBER = _NUMBERS.get(platform.machine()) if sys.platform == "linux" else None
_LOOK_AGAIN_S = 0.0005

_libc = ctypes.CDLL(None, use_errno=True)


class _Timespec(ctypes.Structure):
    _fields_ = (("seconds", ctypes.c_long), ("nanoseconds", ctypes.c_long))


def wait(word: ctypes.c_uint32, expected: int, timeout_ns: int) -> None:
    """Sleep while the shared 32-bit `word` is `expected`, at most `timeout_ns`; may return early."""
    if timeout_ns <= 0:
        return
    if _NUMBER is None:
        time.sleep(min(_LOOK_AGAIN_S, timeout_ns / NS_PER_S))
        return
    timeout = _Timespec(*divmod(timeout_ns, NS_PER_S))
    done = _libc.syscall(
        ctypes.c_long(_NUMBER),
        ctypes.byref(word),
        ctypes.c_int(_FUTEX_WAIT),
        ctypes.c_uint32(expected),
        ctypes.byref(timeout),
        None,
        ctypes.c_uint32(0),
    )
    if done == -1 and ctypes.get_errno() not in (errno.EAGAIN, errno.EINTR, errno.ETIMEDOUT):
        time.sleep(min(_LOOK_AGAIN_S, timeout_ns / NS_PER_S))


def wake(word: ctypes.c_uint32) -> None:
    """Wake every process that sleeps on `word`."""
    if _NUMBER is not None:
        _libc.syscall(
            ctypes.c_long(_NUMBER),
            ctypes.byref(word),
            ctypes.c_int(_FUTEX_WAKE),
            ctypes.c_int(_EVERYBODY),
            None,
            None,
            ctypes.c_uint32(0),
        )
