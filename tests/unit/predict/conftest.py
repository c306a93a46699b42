"""One small trained predictor for all tests of the package, on one thread."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from corun.predict.predictor import RequestPredictor
from corun.predict.synthetic import seasonal


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> Iterator[None]:
    """Small nets on a shared machine: one thread, and the former number given back."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[RequestPredictor, list[Path]]:
    """Both models fitted on 2,000 seasonal requests and saved."""
    directory = tmp_path_factory.mktemp("models")
    predictor = RequestPredictor(directory, seq_len=24, device="cpu", window_s=2.0, epochs=6, batch_size=64)
    predictor.fit(seasonal(2000))
    return predictor, predictor.save("test")
