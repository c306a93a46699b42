"""`python -m corun.train`: one training job, by hand or under a launcher."""

from __future__ import annotations

from corun.train.program import app

if __name__ == "__main__":
    app()
