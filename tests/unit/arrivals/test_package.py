"""The package as a whole: what importing it costs a measured process, and what it exports."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import corun.arrivals

SOURCE = Path(corun.arrivals.__file__).parents[2]
HEAVY = ("torch", "scipy", "pandas", "pyarrow", "matplotlib", "pydantic")


def test_importing_arrivals_loads_numpy_only() -> None:
    """Clients import this package: no heavy library may come with it, nor when a Poisson schedule is judged."""
    program = (
        "import sys; from corun.arrivals import Poisson, Stream, make, validate;"
        "s = make([Stream(0, Poisson(50.0))], 10.0, 0); validate(s.intended_ns, Poisson(50.0), 10.0);"
        f"print([name for name in {HEAVY!r} if name in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True, env={"PYTHONPATH": str(SOURCE)}
    )
    assert done.stdout.strip() == "[]"


def test_exports_exist() -> None:
    """Every exported name can be imported, and each is listed once."""
    assert len(set(corun.arrivals.__all__)) == len(corun.arrivals.__all__)
    assert all(hasattr(corun.arrivals, name) for name in corun.arrivals.__all__)
