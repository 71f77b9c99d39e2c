"""pitstop: train image classifiers on machines that may be taken away."""

__version__ = "0.1.0"
