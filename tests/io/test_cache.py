"""The cache is where the user says, else where the system keeps caches."""

from pathlib import Path

import pytest

from pitstop.io.cache import cache_directory


@pytest.mark.parametrize(
    ("stated", "place"),
    [
        ({}, "/home/me/.cache/pitstop"),
        ({"XDG_CACHE_HOME": "/x"}, "/x/pitstop"),
        ({"XDG_CACHE_HOME": "/x", "PITSTOP_CACHE": "~/p"}, "/home/me/p"),
        ({"XDG_CACHE_HOME": "", "PITSTOP_CACHE": ""}, "/home/me/.cache/pitstop"),
    ],
)
def test_the_cache_is_where_the_user_says_else_where_caches_are(monkeypatch, stated, place):
    monkeypatch.setenv("HOME", "/home/me")
    for name in ("PITSTOP_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    for name, value in stated.items():
        monkeypatch.setenv(name, value)
    assert cache_directory() == Path(place)
