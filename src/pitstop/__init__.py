"""pitstop: train image classifiers on machines that may be taken away.

from pitstop import train

run = train("demo")
print(run.metrics.top1)
"""

from importlib import import_module

__version__ = "0.1.0"


def __getattr__(name: str) -> object:
    """Imports `pitstop.api` when it is first asked for: `import pitstop` stays light."""
    if name in ("Run", "train"):
        return getattr(import_module("pitstop.api"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
