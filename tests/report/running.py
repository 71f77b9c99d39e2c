"""Makes run directories as training writes them, without training."""

import json
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from pitstop.core.recipe import parse_recipe
from pitstop.core.timeline import Timeline

RECIPE = parse_recipe(
    {
        "phases": [
            {"name": "small", "duration": "4ep", "resolution": 32, "batch_size": 100},
            {"name": "large", "duration": "2ep", "resolution": 64, "batch_size": 50},
        ]
    },
    "test",
)
TIMELINE = Timeline(RECIPE, num_samples=1000)
"""40 steps of 100 images at 32 px, then 40 steps of 50 images at 64 px; an evaluation an epoch."""

NOW = datetime(2026, 11, 22, 12, tzinfo=UTC).timestamp()
"""When the last event was written."""

SPEED = 100.0
"""Images a second at 32 px; at 64 px a quarter."""


def stamp(seconds: float) -> str:
    return datetime.fromtimestamp(seconds, UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


def events(steps: int) -> list[dict[str, Any]]:
    """A record each five steps, and each evaluation; the last one was written NOW."""
    written: list[dict[str, Any]] = []
    wall = 0.0
    for step in range(5, steps + 1, 5):
        settings = TIMELINE.settings_at(step - 1)
        segment = settings.segment
        described = {
            "epoch": TIMELINE.epoch(step),
            "phase": segment.phase.name,
            "resolution": segment.resolution,
            "batch_size": segment.batch_size,
            "lr": settings.lr,
            "momentum": settings.momentum,
        }
        images = 5 * segment.batch_size
        seconds = images / SPEED * (segment.resolution / 32) ** 2
        wall += seconds
        share = step / TIMELINE.last
        train = {"images": images, "loss": images * (3 - 2 * share), "top1": images * 0.9 * share}
        timed = {"seconds": seconds, "wait_seconds": seconds / 10, "utilization": 97.0}
        common = {"step": step, "wall_seconds": wall, **described}
        written.append({"kind": "train", "first": step - 5, **common, **train, "top5": 0, **timed})
        if step in TIMELINE.evaluations:
            val = {"loss": 2.5 - share, "top1": 80 * share, "top5": 99.0, "seconds": 2.0}
            written.append({"kind": "val", **common, **val, "memory_mb": 2100.0})
    for event in written:
        event["time"] = stamp(NOW - wall + event["wall_seconds"])
    return written


def write_events(path: Path, written: list[dict[str, Any]]) -> None:
    """Replaces the file, as a run does that goes on."""
    fresh = path.with_suffix(".partial")
    fresh.write_text("".join(json.dumps(event) + "\n" for event in written))
    fresh.replace(path)


def write_run(folder: Path, done: int, *, price: float | None = 3.6, **state: Any) -> Path:
    """Makes a run that has done so many steps, in two starts, with a checkpoint of step 10."""
    (folder / "checkpoints").mkdir(parents=True)
    start = {"step": 0, "epoch": 0.0, "steps": TIMELINE.last, "epochs": 6.0}
    recipe = RECIPE.model_dump(mode="json")
    fields = {"status": "running", "exit_code": None, **start, "recipe": recipe, **state}
    (folder / "run.json").write_text(json.dumps(fields))
    note = {"kind": "note", "step": 0, "wall_seconds": 0.0, "text": "-- digits: 6 epochs"}
    write_events(folder / "events.jsonl", [note | {"time": stamp(NOW - 60)}, *events(done)])
    common = {"kind": "start", "machine": "cpu", "price": price, "world": 1, "attempt": 0}
    first = {"id": "a", "time": stamp(NOW - 900), "host": "box", "step": 0}
    second = {"id": "b", "time": stamp(NOW - 600), "host": "box", "step": 10}
    lines = [
        {**common, **first, "lost_steps": 0, "lost_seconds": 0},
        {"id": "a", "kind": "alive", "seconds": 300, "step": 12, "saved_step": 10},
        {**common, **second, "lost_steps": 2, "lost_seconds": 2},
        {"id": "b", "kind": "alive", "seconds": 600, "step": done, "saved_step": 10},
    ]
    (folder / "ledger.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    manifest = {"step": 10, "epoch": 1.0, "file": "x.pt", "attempt": 0, "sequence": 1}
    (folder / "checkpoints/x.json").write_text(json.dumps(manifest))
    (folder / "checkpoints/x.pt").write_bytes(b"state")
    (folder / "best.safetensors").write_bytes(b"weights")
    return folder
