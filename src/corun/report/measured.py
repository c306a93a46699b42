"""How a run was measured: the manifest as a person reads it, and the whole of it to keep."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

from corun.report import html
from corun.run.read import Run

Manifest = dict[str, Any]


def measured(run: Run) -> str:
    """Everything that determined the numbers, as HTML."""
    manifest = run.manifest
    config = manifest.get("config") or {}
    parts = [
        html.facts(_run_facts(run)),
        "<h3>Services</h3>" + _services(manifest),
        "<h3>Training</h3>" + _job(manifest),
        "<h3>Machine</h3>" + html.facts(_named(manifest.get("hardware") or {})),
        "<h3>Versions</h3>" + html.facts(_named(manifest.get("versions") or {})),
        html.folded("Configuration in force", html.preformatted(json.dumps(config, indent=1))),
        html.folded(
            "Whole manifest",
            html.download("manifest.json", json.dumps(manifest, indent=1), "application/json")
            + html.preformatted(json.dumps(manifest, indent=1)),
        ),
    ]
    return "\n".join(parts)


def _run_facts(run: Run) -> Iterator[tuple[str, Any]]:
    manifest = run.manifest
    config, git = manifest.get("config") or {}, manifest.get("git") or {}
    sharing = manifest.get("sharing") or {}
    yield "run", manifest.get("run")
    yield "status", manifest.get("status")
    yield "started", manifest.get("started")
    yield "finished", manifest.get("finished")
    yield "command", " ".join(str(word) for word in manifest.get("argv", []))
    yield "sharing policy", _policy(sharing)
    yield "arms", ", ".join(config.get("arms", []))
    yield "repeats", config.get("repeat")
    yield "seed", config.get("seed")
    yield "schedule", f"sha256 {manifest['schedule_sha256']}" if manifest.get("schedule_sha256") else None
    yield "threads", ", ".join(f"{who} {count}" for who, count in (manifest.get("threads") or {}).items())
    yield "clients wait by", _senders(manifest)
    if git.get("commit"):
        yield "code", f"{git['commit'][:12]}{', with local changes' if git.get('dirty') else ''}"


def _policy(sharing: dict[str, Any]) -> str | None:
    rest = ", ".join(f"{name} {value}" for name, value in sharing.items() if name != "policy")
    policy = sharing.get("policy")
    return f"{policy} ({rest})" if policy and rest else policy


def _services(manifest: Manifest) -> str:
    rows = [
        (
            entry.get("name"),
            entry.get("arch"),
            weights(manifest, "server", str(entry.get("name"))),
            hello(manifest, "server", str(entry.get("name"))).get("device") or entry.get("device"),
            entry.get("precision"),
            entry.get("rate"),
            _process(entry),
            f"{entry.get('policy')}, batch {entry.get('max_batch')}, limit {entry.get('queue_limit')}",
            entry.get("threads"),
        )
        for entry in (manifest.get("config") or {}).get("services", [])
    ]
    columns = ("service", "model", "weights", "device", "precision", "rate/s", "arrivals", "queue", "threads")
    if not rows:
        return html.paragraph("No service was part of this run.")
    random = any(row[2] == "random" for row in rows)
    note = html.paragraph("With random weights the timings hold and the answers mean nothing.", "caption")
    return html.table(columns, rows, "Services") + note * random


def _process(entry: dict[str, Any]) -> str:
    process = entry.get("process")
    return f"{entry.get('mode')} loop, {process if isinstance(process, str) else json.dumps(process)}"


def _job(manifest: Manifest) -> str:
    job = (manifest.get("config") or {}).get("train")
    if not job:
        return html.paragraph("No training job was part of this run.")
    named = {name: value for name, value in job.items() if value not in (None, False, {}, 0)}
    label = f"{job['arch']}_{job['batch_size']}"
    return html.facts([("weights", weights(manifest, "trainer", label)), *_named(named)])


def weights(manifest: Manifest, role: str, name: str) -> str | None:
    """The label of the weights a process used: random, default, or the file's digest."""
    said = hello(manifest, role, name)
    return said.get("weights_label") or (said.get("info") or {}).get("weights")


def hello(manifest: Manifest, role: str, name: str) -> dict[str, Any]:
    """What a process said about itself when it was ready."""
    processes = manifest.get("processes", [])
    found = [process for process in processes if process.get("role") == role and process.get("name") == name]
    return (found[0].get("hello") or {}) if found else {}


def _senders(manifest: Manifest) -> str:
    """How the clients waited for their due times, each way once."""
    timings = [
        (process.get("hello") or {}).get("timing")
        for process in manifest.get("processes", [])
        if process.get("role") == "client"
    ]
    said = (f"{timing['rung']}, scheduled {timing['policy']}" for timing in timings if timing and "rung" in timing)
    return "; ".join(dict.fromkeys(said))


def _named(values: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    for name, value in values.items():
        yield name.replace("_", " "), ", ".join(map(str, value)) if isinstance(value, list | tuple) else value
