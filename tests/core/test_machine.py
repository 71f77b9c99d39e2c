"""Cores, and each rank's share of them."""

import os

import pytest

from pitstop.core import machine


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="macOS has no such thing")
def test_only_the_cores_that_the_process_may_use_count():
    before = os.sched_getaffinity(0)
    assert machine.cores() == len(before)
    os.sched_setaffinity(0, {min(before)})
    try:
        assert machine.cores() == 1
    finally:
        os.sched_setaffinity(0, before)


@pytest.mark.parametrize(("ranks", "share"), [(1, 8), (3, 2), (8, 1), (100, 1)])
def test_each_rank_has_its_share_of_the_cores_and_at_least_one(monkeypatch, ranks, share):
    monkeypatch.setattr(machine, "cores", lambda: 8)
    assert machine.cores_a_rank(ranks) == share
