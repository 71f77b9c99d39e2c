"""Stands for those modules of tensorboard that write event files."""

import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import server

server.imported("tensorboard")


class EventFileWriter:
    def __init__(self, logdir: str) -> None:
        Path(logdir).mkdir(parents=True, exist_ok=True)
        self._id = logdir

    def add_event(self, event: Any) -> None:
        values = {value.tag: value.simple_value for value in event.summary.value}
        step, time = event.step, event.wall_time
        server.call("tensorboard", "log", id=self._id, step=step, time=time, values=values)

    def flush(self) -> None: ...

    def close(self) -> None: ...


class Summary(SimpleNamespace):
    Value = SimpleNamespace


MODULES = {
    "summary.writer.event_file_writer": {"EventFileWriter": EventFileWriter},
    "compat.proto.event_pb2": {"Event": SimpleNamespace},
    "compat.proto.summary_pb2": {"Summary": Summary},
}
__path__ = []
for name, contents in MODULES.items():
    parts = name.split(".")
    for end in range(1, len(parts) + 1):
        full = ".".join(["tensorboard", *parts[:end]])
        module = sys.modules.setdefault(full, ModuleType(full))
        module.__path__ = []
    sys.modules[f"tensorboard.{name}"].__dict__.update(contents)
