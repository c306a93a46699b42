"""The three training programs as a user runs them: exit codes, files, and what a fresh RequestPredictor makes of them."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pandas as pd
import pytest

from corun.errors import RunFault
from corun.predict.data import NS
from corun.predict.predictor import RequestPredictor
from corun.predict.synthetic import seasonal

SRC = Path(__file__).resolve().parents[2] / "src"
FAST = ("--seq-len", "12", "--epochs", "2", "--batch-size", "64", "--window-s", "2")


@pytest.fixture(scope="module")
def trace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    requests = seasonal(1500)
    path = tmp_path_factory.mktemp("data") / "BurstGPT_1.csv"
    pd.DataFrame(
        {
            "Timestamp": requests.t_ns / NS,
            "Model": "ChatGPT",
            "Request tokens": requests.request_tokens.astype(int),
            "Response tokens": requests.response_tokens.astype(int),
        }
    ).to_csv(path, index=False)
    return path


def run(program: str, *argv: object, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(SRC / f"{program}_training.py"), *map(str, argv)]
    return subprocess.run(command, capture_output=True, text=True, timeout=500, cwd=cwd, check=False)


def module(program: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"{program}_training", SRC / f"{program}_training.py")
    assert spec is not None
    assert spec.loader is not None
    loaded = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(loaded)
    return loaded


@pytest.mark.parametrize("program", ["simple", "production", "cpu"])
def test_a_program_ends_with_0_and_a_fresh_predictor_finds_its_models(
    program: str, trace: Path, tmp_path: Path
) -> None:
    """Weights, card and pictures are there under the documented names, and load by themselves."""
    device = () if program == "cpu" else ("--device", "cpu")
    out = tmp_path / "results.json"
    argv = ("--data-path", trace, "--sample-size", 1400, "--model-dir", tmp_path, "--out-json", out)
    done = run(program, *argv, *FAST, *device, "--models", "lstm", "dlinear")
    assert done.returncode == 0, done.stderr
    assert "reloaded and found identical" in done.stdout
    for name in ("lstm", "dlinear"):
        (weights,) = tmp_path.glob(f"{program}_{name}_????????_??????.pth")
        card = json.loads(weights.with_suffix(".json").read_text())
        assert card["settings"]["seq_len"] == 12
        assert card["settings"]["epochs"] == 2
        assert card["data"]["rows"] == 1400
        assert len(card["data"]["sha256"]) == 64
    assert len(list(tmp_path.glob(f"{program}_*_learning_curves.png"))) == 1
    assert len(list(tmp_path.glob(f"{program}_*_request_forecast.png"))) == 1
    assert json.loads(out.read_text())["verified"] is True
    answer = RequestPredictor(tmp_path).predict_next_request(pd.read_csv(trace))
    assert set(answer["predictions"]) == {"lstm", "dlinear"}


def test_models_selects_the_models(trace: Path, tmp_path: Path) -> None:
    """--models dlinear trains and saves that one only."""
    done = run("cpu", "--data-path", trace, "--model-dir", tmp_path, *FAST, "--models", "dlinear")
    assert done.returncode == 0, done.stderr
    assert [path.name.split("_")[1] for path in tmp_path.glob("*.pth")] == ["dlinear"]


@pytest.mark.parametrize(
    ("argv", "reason"),
    [
        (("--data-path", "none.csv"), "none.csv: the trace cannot be read"),
        ((), "dataset/BurstGPT_1_cleaned.csv does not exist"),
        (("--data-path", "TRACE", "--models", "lsmt"), 'did you mean "lstm"'),
        (("--data-path", "TRACE", "--sample-size", "300"), "rows are too few"),
        (("--data-path", "TRACE", "--epochs", "0"), "epochs is 0"),
        (("--data-path", "TRACE", "--sample-size", "1"), "--sample-size"),
    ],
    ids=["no file", "nothing found", "unknown model", "too few rows", "no epochs", "no sample"],
)
def test_bad_arguments_and_data_end_with_2_and_the_reason(
    argv: tuple[str, ...], reason: str, trace: Path, tmp_path: Path
) -> None:
    """Exit code 2, one message, no traceback, no file."""
    given = [str(trace) if word == "TRACE" else word for word in argv]
    done = run("cpu", *given, "--model-dir", tmp_path / "models", cwd=tmp_path)
    assert done.returncode == 2
    assert reason in " ".join((done.stdout + done.stderr).split())
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "models").exists()


def test_a_directory_that_cannot_be_written_is_no_success(trace: Path, tmp_path: Path) -> None:
    """Trained but not saved is not done: exit code 2 with the path."""
    blocked = tmp_path / "file"
    blocked.write_text("")
    done = run("cpu", "--data-path", trace, "--model-dir", blocked, *FAST, "--models", "dlinear")
    assert done.returncode == 2
    assert "cannot be written" in done.stderr


def test_simple_trainer_says_whether_it_worked(trace: Path, tmp_path: Path) -> None:
    """SimpleTrainer().run_simple_training(data_path, sample_size) is True after a verified save, else False."""
    settings = {"seq_len": 12, "epochs": 1, "batch_size": 256, "device": "cpu"}
    trainer = module("simple").SimpleTrainer(model_dir=tmp_path, **settings)
    assert trainer.run_simple_training(str(trace), 1200) is True
    assert list(tmp_path.glob("simple_lstm_*.pth"))
    assert trainer.run_simple_training(str(tmp_path / "none.csv"), 1200) is False
    assert "cannot be read" in trainer.reason


def test_a_failed_verification_is_no_success(
    trace: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """When the reloaded model does not forecast what the saved one did, the answer is False."""

    def differs(self: RequestPredictor, paths: list[Path]) -> None:
        raise RunFault("lstm: the reloaded request model does not forecast what the saved one did")

    monkeypatch.setattr(RequestPredictor, "verify", differs)
    trainer = module("simple").SimpleTrainer(model_dir=tmp_path, seq_len=12, epochs=1, batch_size=256, device="cpu")
    assert trainer.run_simple_training(trace, 1200) is False
    assert "does not forecast what the saved one did" in capsys.readouterr().err
