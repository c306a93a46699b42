"""NVML through nvidia-ml-py: the only module that imports pynvml, and the only place that maps its errors.

    ReadFault
    └── NvmlFault            this call failed this time
        ├── NotHere          it never works on this device, driver or user
        └── NothingFound     the query found nothing; for process utilisation: nobody was active

The distribution called `pynvml` is a deprecated redirector; `binding_problem` reports it.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.metadata
from typing import Any

from corun.profile.source import ReadFault, Unavailable

Handle = Any

_NEVER = {
    "InvalidArgument",
    "NotSupported",
    "NoPermission",
    "FunctionNotFound",
    "ArgumentVersionMismatch",
    "Deprecated",
}
_NOTHING = {"NotFound"}
_WRONG_PROCESS_LISTS = ((535, 43), (535, 86))


class NvmlFault(ReadFault):
    """One NVML call failed."""


class NotHere(NvmlFault):
    """This call never works on this device, with this driver or for this user."""


class NothingFound(NvmlFault):
    """The query found nothing."""


class Nvml:
    """An initialised NVML whose errors are ours. Unavailable without the binding, the library or the driver."""

    def __init__(self) -> None:
        self.binding = load_binding()
        try:
            self.binding.nvmlInit()
        except self.binding.NVMLError as error:
            raise Unavailable(f"NVML: {error}") from error

    def call(self, function: str, *arguments: Any) -> Any:
        """Call `function` of the binding; NvmlFault names the call and NVML's reason."""
        known = getattr(self.binding, function, None)
        if known is None:
            raise NotHere(f"{function}: this nvidia-ml-py does not know it")
        try:
            return known(*arguments)
        except self.binding.NVMLError as error:
            raise _mapped(function, error) from error

    def driver(self) -> str:
        """The driver's version, or an empty text."""
        try:
            return str(self.call("nvmlSystemGetDriverVersion"))
        except NvmlFault:
            return ""

    def close(self) -> None:
        """Give NVML back."""
        with contextlib.suppress(NvmlFault):
            self.call("nvmlShutdown")


def load_binding() -> Any:
    """The module pynvml of nvidia-ml-py; Unavailable when it is missing or is another one of that name."""
    try:
        binding = importlib.import_module("pynvml")
    except ImportError as error:
        raise Unavailable("the package nvidia-ml-py is not installed") from error
    if not hasattr(binding, "_nvmlGetFunctionPointer"):
        raise Unavailable("the installed pynvml is not NVIDIA's; install nvidia-ml-py in its place")
    return binding


def _mapped(function: str, error: Exception) -> NvmlFault:
    """NVML's error as ours; the binding names its classes NVMLError_<Reason>."""
    reason = type(error).__name__.removeprefix("NVMLError_")
    text = f"{function}: {error}"
    if reason in _NEVER:
        return NotHere(text)
    return NothingFound(text) if reason in _NOTHING else NvmlFault(text)


def succeeded(fault: NvmlFault) -> bool:
    """The binding raises the code 0 (success) where it expected to be asked for a larger buffer."""
    return getattr(fault.__cause__, "value", None) == 0


def binding_problem() -> str:
    """What is wrong with the installed NVML binding, or an empty text."""
    try:
        importlib.metadata.distribution("pynvml")
    except importlib.metadata.PackageNotFoundError:
        return ""
    return "the deprecated package pynvml is installed beside nvidia-ml-py; uninstall pynvml"


def driver_problem(version: str) -> str:
    """Known faults of a driver, or an empty text: 535.43 to 535.86 list wrong processes."""
    parts = tuple(int(part) for part in version.split(".")[:2] if part.isdigit())
    if len(parts) == 2 and _WRONG_PROCESS_LISTS[0] <= parts <= _WRONG_PROCESS_LISTS[1]:
        return f"driver {version} reports wrong processes; use 535.98 or later"
    return ""
