"""Language models as real processes: a co-run of config.json, clients that give up, the edge server on its port."""

from __future__ import annotations

import csv
import json
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tests.processes.tools import Program, wait_until

from corun.testing.ask import Asker
from corun.wire import STREAM, Address, Status


def rows(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


@pytest.mark.timeout(900)
def test_a_co_run_of_chatglm2_has_token_metrics(
    start: Callable[..., Program], write_config: Callable[[dict[str, Any]], Path], tmp_path: Path
) -> None:
    """`"train": chatglm2, "infer": chatglm2` measures alone, train and corun; tokens stand in rows, summary and table."""
    config = write_config(
        {
            "train": [{"arch": "chatglm2", "optimizer": "adamw", "lr": 0.001, "batch_size": 2, "threads": 1}],
            "infer": [{"arch": "chatglm2", "rate": 4, "count": 8}],
            "duration_s": 5,
        }
    )
    program = start("main.py", "--config", config, "--out", tmp_path / "runs", "--no-report")
    assert program.wait() == 0, program.output()
    assert "TTFT p50" in program.output()
    (run,) = (tmp_path / "runs").iterdir()
    served = [row for row in rows(run / "infer_client" / "chatglm2.csv") if row["status"] == "OK"]
    assert served
    for row in served:
        assert 8 <= int(row["tokens_out"]) <= 32
        assert 0 < float(row["ttft_ms"]) <= float(row["sojourn_ms"])
        last_ms = float(row["ttft_ms"]) + float(row["tpot_ms"]) * (int(row["tokens_out"]) - 1)
        assert last_ms <= float(row["sojourn_ms"]) + 1e-3
    assert {row["arm"] for row in rows(run / "train.csv")} >= {"train", "corun"}
    arms = json.loads((run / "summary.json").read_text())["arms"]
    assert arms["alone"]["services"]["chatglm2"]["tokens_per_s"] > 0
    assert arms["corun"]["train_steps"] > 0


@pytest.mark.timeout(900)
def test_clients_give_deadlines_and_take_requests_back(
    start: Callable[..., Program], free_port: Callable[..., int], tmp_path: Path
) -> None:
    """Every request that is too slow ends EXPIRED or CANCELLED, none is lost, and --whole answers have no TTFT."""
    port = free_port()
    data = tmp_path / "azure.csv"
    data.write_text("ContextTokens,GeneratedTokens\n" + "20,250\n10,2\n" * 2)
    server = start("server.py", "--model", "chatglm2-tiny", "--port", port)
    wait_until(lambda: "ready on" in server.output())
    common = ("--port", port, "--data", f"text:{data}", "--count", 4, "--rate", 5, "--duration", 3, "--out", tmp_path)
    clients = {
        "open": start("client_async.py", *common, "--name", "open", "--cancel-after-ms", 60),
        "closed": start("client.py", *common, "--name", "closed", "--stream", 1, "--cancel-after-ms", 60),
        "late": start("client_async.py", *common, "--name", "late", "--stream", 2, "--deadline-ms", 60),
        "whole": start("client_async.py", *common, "--name", "whole", "--stream", 3, "--whole", "--rate", 1),
    }
    found = {}
    for name, program in clients.items():
        program.wait()
        found[name] = rows(tmp_path / "infer_client" / f"{name}.csv")
    assert {row["status"] for row in found["open"]} | {row["status"] for row in found["closed"]} <= {
        "OK",
        "CANCELLED",
    }
    assert "CANCELLED" in {row["status"] for row in found["open"]} & {row["status"] for row in found["closed"]}
    assert "EXPIRED" in {row["status"] for row in found["late"]} <= {"OK", "EXPIRED"}
    assert all(row["ttft_ms"] == "" and row["tokens_out"] for row in found["whole"] if row["status"] == "OK")
    server.signal(signal.SIGTERM)
    assert server.wait() == 0


@pytest.mark.timeout(900)
def test_the_edge_server_learns_from_its_clients_in_a_process(
    start: Callable[..., Program], free_port: Callable[..., int], tmp_path: Path
) -> None:
    """The original's flags with --port: labelled sentences train a child process, its adapter is published and saved."""
    port, out = free_port(), tmp_path / "edge"
    flags = ("--glm_path", "", "--train_path", "", "--inference_path", "", "--train_tag", 1, "--inference_tag", 1)
    program = start(
        "edge_server.py",
        *flags,
        "--bs",
        2,
        "--port",
        port,
        "--new_tokens",
        5,
        "--lr",
        0.05,
        "--epochs",
        5,
        "--out",
        out,
    )
    wait_until(lambda: "ready on" in program.output())
    with Asker(Address("tcp", "127.0.0.1", port)) as asker:
        for word in ("hello", "hi"):
            answer = asker.ask(json.dumps({"prompt": word, "label": "yes"}).encode(), flags=STREAM)
            assert (answer.status, len(answer.parts)) == (Status.OK, 5)
        wait_until(lambda: ",publish," in (out / "events.csv").read_text())
        assert asker.ask(b'{"prompt": "hello"}').status == Status.OK
    program.signal(signal.SIGINT)
    assert program.wait() == 0, program.output()
    assert [row["weights_version"] for row in rows(out / "infer_server" / "edge.csv")] == ["", "", "1"]
    assert len(rows(out / "train.csv")) == 5
    assert (out / "adapter" / "adapter_model.safetensors").is_file()
