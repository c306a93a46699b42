"""Benchmarks: one module each, run as `python -m bench.<name>` from a checkout; results go to bench/results/."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "src"))
