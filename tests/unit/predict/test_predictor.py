"""RequestPredictor: the documented answers, saving and loading, honest errors."""

from __future__ import annotations

import json
import shutil
from datetime import datetime
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch

from corun.errors import InputError, RunFault
from corun.predict import checkpoint
from corun.predict.data import NS, Requests
from corun.predict.predictor import RequestPredictor
from corun.predict.synthetic import poisson, seasonal

pytestmark = pytest.mark.timeout(600)  # a guard against hanging, wide enough for a machine with ten times the work
Trained = tuple[RequestPredictor, list[Path]]
FIELDS = {"inter_arrival_s", "request_tokens", "response_tokens"}


def frame(requests: Requests) -> pd.DataFrame:
    return pd.DataFrame(
        {
            "Timestamp": requests.t_ns / NS,
            "Elapsed time": 0.0,
            "Request tokens": requests.request_tokens,
            "Response tokens": requests.response_tokens,
        }
    )


def test_the_answer_has_the_documented_keys(trained: Trained) -> None:
    """Every model and the baseline give the same fields; the recommendation is one of their names."""
    answer = trained[0].predict_next_request(frame(seasonal(500, seed=9)))
    assert set(answer) == {"predictions", "baseline", "recommended", "recommended_by_field"}
    assert set(answer["predictions"]) == {"lstm", "dlinear"}
    assert answer["recommended"] in {"lstm", "dlinear", "baseline"}
    for one in (*answer["predictions"].values(), answer["baseline"]):
        assert set(one) == FIELDS | {"timestamp", "confidence", "interval", "method", "trained"}
        assert set(one["interval"]) == FIELDS
        for field in FIELDS:
            low, high = one["interval"][field]
            assert low <= one[field] <= high
    json.dumps(answer)


def test_the_timestamp_is_the_last_arrival_plus_the_gap(trained: Trained) -> None:
    """In the trace's own unit: seconds for BurstGPT."""
    history = frame(seasonal(500))
    one = trained[0].predict_next_request(history)["predictions"]["lstm"]
    assert one["timestamp"] == pytest.approx(history["Timestamp"].iloc[-1] + one["inter_arrival_s"], abs=1e-6)


def test_azure_histories_are_answered_with_date_and_time(trained: Trained) -> None:
    """The format of the history does not have to be the one trained on."""
    stamps = pd.to_datetime("2023-11-16 18:15:46") + pd.to_timedelta(np.arange(100) * 0.25, unit="s")
    history = pd.DataFrame({"TIMESTAMP": stamps.astype(str), "ContextTokens": 300, "GeneratedTokens": 50})
    answer = trained[0].predict_next_request(history)
    assert answer["baseline"]["timestamp"].startswith("2023-11-16 18:16:1")


def test_a_fresh_object_loads_the_newest_models(trained: Trained) -> None:
    """Nothing but the directory is needed, and the forecast is bit for bit the one of the object that trained."""
    predictor, paths = trained
    history = frame(seasonal(300, seed=4))
    fresh = RequestPredictor(paths[0].parent, device="cpu")
    assert fresh.predict_next_request(history) == predictor.predict_next_request(history)


def test_without_models_the_answer_is_an_error_and_nothing_else(tmp_path: Path) -> None:
    """Never a fallback under a model's name."""
    answer = RequestPredictor(tmp_path, device="cpu").predict_next_request(frame(seasonal(300)))
    assert list(answer) == ["error"]
    assert "no trained models" in answer["error"]
    assert "cpu_training.py" in answer["error"]


def test_the_environment_names_the_default_directory(trained: Trained, monkeypatch: pytest.MonkeyPatch) -> None:
    """RequestPredictor() alone finds the models in $CORUN_MODEL_DIR."""
    monkeypatch.setenv("CORUN_MODEL_DIR", str(trained[1][0].parent))
    assert "predictions" in RequestPredictor(device="cpu").predict_next_request(frame(seasonal(300)))


def test_a_model_that_is_not_there_is_named(trained: Trained, tmp_path: Path) -> None:
    """One of two requested models is trained: its forecast, and why the other has none."""
    for path in (trained[1][0], trained[1][0].with_suffix(".json")):
        shutil.copy(path, tmp_path)
    answer = RequestPredictor(tmp_path, device="cpu").predict_next_request(frame(seasonal(300)))
    assert set(answer["predictions"]) == {"lstm"}
    assert set(answer["missing"]) == {"dlinear"}


@pytest.mark.parametrize(
    ("history", "message"),
    [
        (frame(seasonal(20)), "needs 25"),
        (frame(seasonal(300)).drop(columns="Request tokens"), 'no column "Request tokens"'),
        ("trace.csv", "give a pandas table"),
    ],
    ids=["too short", "missing column", "no table"],
)
def test_a_history_that_cannot_be_used_is_an_error(trained: Trained, history: object, message: str) -> None:
    """A map with the single key error, saying what is wrong."""
    answer = trained[0].predict_next_request(history)  # type: ignore[arg-type]
    assert list(answer) == ["error"]
    assert message in answer["error"]


def test_confidence_is_measured_not_constant(trained: Trained) -> None:
    """It is a share of calibration rows, so the models differ."""
    answer = trained[0].predict_next_request(frame(seasonal(300)))
    values = [one["confidence"] for one in (*answer["predictions"].values(), answer["baseline"])]
    assert all(0 < value < 1 for value in values)
    assert len(set(values)) == 3


def test_changing_the_history_changes_every_models_forecast(trained: Trained) -> None:
    """Forecasts are conditional: the same rows half a season later give another answer."""
    history = frame(seasonal(500))
    first, second = (trained[0].predict_next_request(history.head(rows)) for rows in (480, 492))
    for name in ("lstm", "dlinear"):
        assert first["predictions"][name]["request_tokens"] != second["predictions"][name]["request_tokens"]


def test_the_card_tells_where_the_model_comes_from(trained: Trained) -> None:
    """Configuration, seeds, split, scores, scaler and learning curve are in the JSON beside the weights."""
    card = json.loads(trained[1][0].with_suffix(".json").read_text())
    assert card["model"] == "lstm"
    assert card["settings"]["seq_len"] == 24
    assert card["seeds"]["weights"] == 0
    assert card["data"]["rows"] == 2000
    assert set(card["results"]["request"]["split"]) == {"train", "early", "validation", "calibration", "test"}
    assert set(card["results"]["request"]["test"]) == FIELDS
    assert len(card["results"]["request"]["learning"]["train"]) == 6
    assert card["levels"]["request"]["scaler"]["input_mean"]


def test_saving_twice_in_one_second_overwrites_nothing(trained: Trained) -> None:
    """The second pair of files gets the next free second."""
    predictor, paths = trained
    stamp = datetime.strptime("_".join(paths[0].stem.split("_")[-2:]), checkpoint.STAMP)
    again = predictor.save("test", stamp)
    assert not set(again) & set(paths)
    for path in again:
        path.unlink()
        path.with_suffix(".json").unlink()


def test_the_newest_stamp_wins_whatever_the_prefix(tmp_path: Path) -> None:
    """By the stamp in the name, not by the file's own time; other files are not looked at."""
    for name in ("cpu_lstm_20250101_000000", "production_lstm_20260101_000000", "lstm_20240101_000000", "x_lstm_1"):
        (tmp_path / f"{name}.pth").touch()
    assert checkpoint.newest(tmp_path, "lstm") == tmp_path / "production_lstm_20260101_000000.pth"
    assert checkpoint.newest(tmp_path, "dlinear") is None


def test_weights_that_do_not_belong_to_their_card_are_refused(trained: Trained, tmp_path: Path) -> None:
    """A flipped byte is found by the hash."""
    path = Path(shutil.copy(trained[1][0], tmp_path))
    shutil.copy(trained[1][0].with_suffix(".json"), tmp_path)
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(bytes(content))
    with pytest.raises(InputError, match="does not belong to its card"):
        checkpoint.load(path)


def test_a_checkpoint_that_would_run_code_is_refused(trained: Trained, tmp_path: Path) -> None:
    """Weights are read in torch's weights-only mode: a pickle of anything else is an error, not a call."""
    card = json.loads(trained[1][0].with_suffix(".json").read_text())
    path = tmp_path / trained[1][0].name
    torch.save({"request.bias": Path}, path)
    card["weights_sha256"] = __import__("hashlib").sha256(path.read_bytes()).hexdigest()
    path.with_suffix(".json").write_text(json.dumps(card))
    with pytest.raises(InputError, match="cannot be used"):
        checkpoint.load(path)


@pytest.mark.parametrize("damage", ["", "{", '{"format": 99}'])
def test_a_damaged_card_is_refused(trained: Trained, tmp_path: Path, damage: str) -> None:
    """No card, half a card, another format."""
    path = Path(shutil.copy(trained[1][0], tmp_path))
    if damage:
        path.with_suffix(".json").write_text(damage)
    with pytest.raises(InputError, match=r"card|format"):
        checkpoint.load(path)


def test_verification_fails_when_the_saved_weights_differ(trained: Trained) -> None:
    """Only identical forecasts pass: one changed weight after saving is found."""
    predictor, paths = trained
    predictor.verify(paths)
    parameter = next(predictor._levels["lstm"]["request"].trained.net.parameters())
    with torch.no_grad():
        parameter.add_(1e-3)
        try:
            with pytest.raises(RunFault, match="does not forecast what the saved one did"):
                predictor.verify(paths)
        finally:
            parameter.sub_(1e-3)


def test_nothing_to_save_is_an_error(tmp_path: Path) -> None:
    """Before fit there is nothing."""
    with pytest.raises(InputError, match="call fit first"):
        RequestPredictor(tmp_path, device="cpu").save()


def test_unknown_models_are_refused_with_a_suggestion() -> None:
    """By name, at construction."""
    with pytest.raises(InputError, match='"dliner" is not a model; did you mean "dlinear"'):
        RequestPredictor(models=("dliner",), device="cpu")


def test_rates_are_forecast_from_the_history_alone(tmp_path: Path) -> None:
    """No model is needed; a Poisson load of 5/s over 2 s windows has its mean, and quantiles near the Poisson's own."""
    answer = RequestPredictor(tmp_path, device="cpu").predict_rate(frame(poisson(4000, seed=2)), 2.0, 3)
    assert [len(answer["windows"]), answer["window_s"]] == [3, 2.0]
    for window in answer["windows"]:
        requests = window["requests"]
        assert requests["mean"] == pytest.approx(10, abs=1)
        assert 4 <= requests["q10"] < 8 <= requests["q50"] <= 12 < requests["q90"] <= 17
        assert set(window["tokens"]) == {"mean", "q10", "q50", "q90", "method"}
    starts = [window["start"] for window in answer["windows"]]
    assert np.diff(starts).tolist() == pytest.approx([2.0, 2.0])


def test_too_short_a_history_for_rates_is_an_error(tmp_path: Path) -> None:
    """The number of windows needed is given."""
    answer = RequestPredictor(tmp_path, device="cpu").predict_rate(frame(poisson(50)), 10.0, 2)
    assert list(answer) == ["error"]
    assert "12 are needed" in answer["error"]
