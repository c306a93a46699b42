"""Nets and their training: shapes, what the outputs depend on, best weights restored, settings checked."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from corun.errors import InputError, RunFault
from corun.predict import fitting
from corun.predict.data import Requests
from corun.predict.fitting import DEFAULTS, Settings, settings_for, train
from corun.predict.nets import NETS, Shape, build, pinball
from corun.predict.series import request_series, split
from corun.predict.synthetic import seasonal

LEVELS = (0.05, 0.1, 0.5, 0.9, 0.95)
QUICK = Settings(seq_len=12, epochs=3, batch_size=64)


def small_series(rows: int = 600) -> tuple[object, object]:
    series = request_series(seasonal(rows))
    return series, split(len(series), 12, 20)


@pytest.mark.parametrize("name", NETS)
@pytest.mark.parametrize("length", [2, 12, 25, 80])
def test_nets_give_one_output_per_quantile_target_and_horizon(name: str, length: int) -> None:
    """(B, L, C) becomes (B, H, T, Q) for short and long inputs alike."""
    net = build(name, Shape(length, 4, 3, 6, 5), LEVELS, 0)
    assert net(torch.zeros(7, length, 4)).shape == (7, 6, 3, 5)


@pytest.mark.parametrize("name", NETS)
def test_the_same_seed_builds_the_same_net(name: str) -> None:
    """Weights depend on the seed alone, and building one leaves the process's random state as it was."""
    shape = Shape(12, 3, 3, 1, 5)
    torch.manual_seed(1)
    expected = torch.rand(1)
    torch.manual_seed(1)
    nets = [build(name, shape, LEVELS, 3) for _ in range(2)]
    assert torch.equal(torch.rand(1), expected)
    for one, other in zip(nets[0].state_dict().values(), nets[1].state_dict().values(), strict=True):
        assert torch.equal(one, other)


def test_a_fresh_dlinear_is_the_mean_of_its_input() -> None:
    """On noise it has nothing to unlearn: its median starts at the input's mean, the quantiles at the normal's."""
    net = build("dlinear", Shape(30, 3, 3, 1, 5), LEVELS, 0)
    x = torch.zeros(1, 30, 3)
    out = net(x)[0, 0, 0]
    assert out.tolist() == pytest.approx([-1.645, -1.282, 0.0, 1.282, 1.645], abs=1e-3)
    assert net(x + 2.0)[0, 0, 1, 2].item() == pytest.approx(2.0, abs=1e-5)


def test_an_unknown_net_is_refused_with_a_suggestion() -> None:
    """The message names the nearest one."""
    with pytest.raises(InputError, match='did you mean "lstm"'):
        build("lstmm", Shape(2, 1, 1, 1, 1), (0.5,), 0)


@given(st.lists(st.floats(-5, 5), min_size=3, max_size=30), st.sampled_from([0.1, 0.5, 0.9]), st.floats(-5, 5))
def test_pinball_is_least_at_the_quantile(values: list[float], level: float, other: float) -> None:
    """No constant has a smaller pinball loss than the sample's own quantile (Koenker & Bassett 1978)."""
    actual = torch.tensor(values, dtype=torch.float64).view(-1, 1, 1)

    def loss(constant: float) -> float:
        return float(pinball(torch.full((*actual.shape, 1), constant, dtype=torch.float64), actual, (level,)))

    best = float(np.quantile(np.array(values), level, method="inverted_cdf"))
    assert loss(best) <= loss(other) + 1e-9


@pytest.mark.parametrize("name", NETS)
def test_the_best_epochs_weights_are_restored(name: str) -> None:
    """The net that comes back has the lowest held-out loss of all epochs, not the last one's.

    A shallow copy of the state would go on training: the returned loss would be the last epoch's.
    """
    series, parts = small_series()
    seen: list[float] = []
    settings = Settings(seq_len=12, epochs=8, batch_size=16, lr=0.2, patience=8)
    trained, curve = train(name, series, parts, settings, on_epoch=lambda epoch: seen.append(epoch.early_loss))
    rows = np.arange(max(parts.early.start, 12), parts.early.stop)
    logs = (series.log_targets[rows] - trained.output_mean) / trained.output_std
    windows = np.lib.stride_tricks.sliding_window_view(series.features, 12, axis=0).transpose(0, 2, 1)[rows - 12]
    scaled = ((windows - trained.input_mean) / trained.input_std).astype(np.float32)
    with torch.inference_mode():
        again = pinball(
            trained.net(torch.from_numpy(scaled)), torch.from_numpy(logs[:, None].astype(np.float32)), LEVELS
        )
    assert curve.early[-1] > min(curve.early), "the test needs a run whose last epoch is not its best"
    assert float(again) == pytest.approx(min(curve.early), rel=1e-4)
    assert curve.early[curve.best_epoch] == min(curve.early)
    assert seen == curve.early


@pytest.mark.parametrize("name", NETS)
def test_training_is_repeatable(name: str) -> None:
    """The same data, settings and seed give the same forecasts, bit for bit; another seed does not."""
    series, parts = small_series()
    rows = np.arange(100, 120)
    first, second = (train(name, series, parts, QUICK)[0].at(series, rows) for _ in range(2))
    other = train(name, series, parts, Settings(seq_len=12, epochs=3, batch_size=64, seed=1))[0].at(series, rows)
    assert np.array_equal(first, second)
    assert not np.array_equal(first, other)


@pytest.mark.parametrize("name", NETS)
def test_changing_weights_changes_the_output(name: str) -> None:
    """Forecasts come from the net: another set of weights gives another forecast."""
    series, parts = small_series()
    trained, _ = train(name, series, parts, QUICK)
    rows = np.arange(100, 110)
    before = trained.at(series, rows)
    with torch.no_grad():
        for parameter in trained.net.parameters():
            parameter.add_(0.1)
    assert not np.array_equal(trained.at(series, rows), before)


@pytest.mark.parametrize("name", NETS)
def test_permuting_future_rows_leaves_past_forecasts_bit_identical(name: str) -> None:
    """No leak: what comes after row k cannot be seen in any forecast up to row k, trained on rows before it."""
    requests = seasonal(700)
    series = request_series(requests)
    parts = split(len(series), 12, 20)
    cut = parts.validation.start + 1
    order = np.concatenate([np.arange(cut), np.random.default_rng(0).permutation(np.arange(cut, len(requests)))])
    shuffled = Requests(
        requests.t_ns,
        requests.request_tokens[order],
        requests.response_tokens[order],
        requests.elapsed_s,
        requests.format,
    )
    other = request_series(shuffled)
    rows = np.arange(parts.train.start + 12, cut - 1)
    first, second = (train(name, one, parts, QUICK)[0].at(one, rows) for one in (series, other))
    assert not np.array_equal(series.targets, other.targets)
    assert np.array_equal(first, second)


@pytest.mark.parametrize("interval", [0.5, 0.8, 0.9])
def test_levels_never_cross_and_keep_their_names(interval: float) -> None:
    """Whatever the interval's ends, the five outputs are ordered by their levels: also when the ends lie inside q10-q90."""
    series, parts = small_series()
    settings = Settings(seq_len=12, epochs=1, batch_size=64, interval=interval)
    out = train("dlinear", series, parts, settings)[0].at(series, np.arange(50, 90))
    by_level = out[..., np.argsort(settings.levels, kind="stable")]
    assert (np.diff(by_level, axis=-1) >= 0).all()


def test_a_diverging_loss_is_a_fault_with_the_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    """A loss that is no number ends the training with advice, never with a saved model."""
    series, parts = small_series()
    monkeypatch.setattr(fitting, "pinball", lambda forecast, actual, levels: forecast.sum() * float("nan"))
    with pytest.raises(RunFault, match="lower --lr"):
        train("dlinear", series, parts, QUICK)


def test_defaults_are_the_documented_ones() -> None:
    """Input, epochs and batch: 100/100/64 on CUDA, 80/50/32 on the CPU."""
    assert [(one.seq_len, one.epochs, one.batch_size) for one in DEFAULTS.values()] == [(100, 100, 64), (80, 50, 32)]
    assert settings_for("cuda:1").device == "cuda:1"


def test_impossible_settings_are_all_named() -> None:
    """Every problem at once."""
    with pytest.raises(InputError) as caught:
        Settings(seq_len=1, epochs=0, batch_size=0, lr=11, interval=1.0)
    assert len(caught.value.problems) == 5
