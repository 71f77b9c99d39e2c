"""Property tests ask the same questions on every run, and are not timed."""

from hypothesis import HealthCheck, settings

settings.register_profile(
    "pitstop",
    derandomize=True,
    deadline=None,
    max_examples=30,
    suppress_health_check=[HealthCheck.too_slow],
)
settings.load_profile("pitstop")
