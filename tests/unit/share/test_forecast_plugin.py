"""A forecaster from elsewhere: the predictive policy learns the load from a past trace."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from corun.errors import InputError
from corun.share.forecast import make_forecaster
from corun.share.spec import parse

LEARNED = "corun.predict.forecast:from_history"


@pytest.fixture
def history(tmp_path: Path) -> Path:
    """Delays of a trace whose rate swings between 2/s and 20/s every 20 s."""
    rng = np.random.default_rng(3)
    gaps = np.concatenate([rng.exponential(1 / rate, int(20 * rate)) for rate in [2, 20] * 8])
    path = tmp_path / "delays.csv"
    path.write_text("\n".join(f"{gap:.6f}" for gap in gaps) + "\n")
    return path


def test_the_learned_quantile_lies_above_the_mean(history: Path) -> None:
    """After steady windows of 20/s the forecast of the 90 % quantile is above 20/s, and it falls with the load."""
    forecaster = make_forecaster(LEARNED, 1.0, str(history))
    assert forecaster.forecast() is None
    for _ in range(12):
        forecaster.observe(20.0)
    high = forecaster.forecast()
    for _ in range(12):
        forecaster.observe(2.0)
    low = forecaster.forecast()
    assert high is not None
    assert low is not None
    assert low < 20.0 < high


def test_the_policy_hands_it_to_the_trainers_gate(history: Path) -> None:
    """config.json's options reach the gate as they were given."""
    (policy,) = parse({"policy": "predictive", "forecaster": LEARNED, "history": str(history)})
    rule = policy.rule()
    assert rule is not None
    assert (rule.options["forecaster"], rule.options["history"]) == (LEARNED, str(history))


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"forecaster": "oracle"}, "MODULE:FUNCTION"),
        ({"forecaster": "corun.nowhere:x"}, "cannot be loaded"),
        ({"forecaster": LEARNED}, 'give its file as "history"'),
        ({"forecaster": LEARNED, "history": "/nowhere.csv"}, "/nowhere.csv"),
    ],
)
def test_what_cannot_forecast_is_refused_before_anything_starts(options: dict[str, str], sentence: str) -> None:
    """An unknown forecaster, a missing history: bad input, said when the configuration is read."""
    with pytest.raises(InputError, match=sentence):
        parse({"policy": "predictive", **options})
