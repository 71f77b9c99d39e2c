"""Stands for mlflow and mlflow.entities."""

import sys
from dataclasses import dataclass
from types import ModuleType, SimpleNamespace

import server

server.imported("mlflow")


@dataclass
class Metric:
    key: str
    value: float
    timestamp: int
    step: int


sys.modules["mlflow.entities"] = ModuleType("mlflow.entities")
sys.modules["mlflow.entities"].__dict__["Metric"] = Metric


def get_tracking_uri() -> str:
    return "https://user:pw@mlflow.test"


class MlflowClient:
    def get_experiment_by_name(self, name: str) -> SimpleNamespace | None:
        known = [line["name"] for line in server.calls("mlflow", "experiment")]
        return SimpleNamespace(experiment_id=str(known.index(name))) if name in known else None

    def create_experiment(self, name: str) -> str:
        assert self.get_experiment_by_name(name) is None, "exists"
        server.call("mlflow", "experiment", name=name)
        return str(len(server.calls("mlflow", "experiment")) - 1)

    def create_run(
        self, experiment_id: str, *, run_name: str, tags: dict[str, str]
    ) -> SimpleNamespace:
        [tag] = tags.values()
        run_id = f"run-{len(server.calls('mlflow', 'run'))}"
        server.call("mlflow", "run", id=run_id, experiment=experiment_id, name=run_name, tag=tag)
        return SimpleNamespace(info=SimpleNamespace(run_id=run_id))

    def search_runs(self, experiments: list[str], *, filter_string: str) -> list[SimpleNamespace]:
        return [
            SimpleNamespace(info=SimpleNamespace(run_id=line["id"]))
            for line in server.calls("mlflow", "run")
            if line["experiment"] in experiments
            and filter_string == f"tags.`pitstop.run` = '{line['tag']}'"
        ]

    def update_run(self, run_id: str, *, status: str, name: str) -> None:
        server.call("mlflow", "status", id=run_id, status=status)

    def get_metric_history(self, run_id: str, key: str) -> list[Metric]:
        logged = [line for line in server.calls("mlflow", "log") if line["id"] == run_id]
        return [Metric(key, 0.0, 0, line["step"]) for line in logged if key in line["values"]]

    def log_batch(self, run_id: str, *, metrics: list[Metric]) -> None:
        assert len(metrics) <= 1000
        for step in dict.fromkeys(metric.step for metric in metrics):
            same = [metric for metric in metrics if metric.step == step]
            values = {metric.key: metric.value for metric in same}
            time = same[0].timestamp / 1000
            server.call("mlflow", "log", id=run_id, step=step, time=time, values=values)

    def set_terminated(self, run_id: str, *, status: str) -> None:
        server.call("mlflow", "status", id=run_id, status=status)
