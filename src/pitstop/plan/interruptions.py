"""What interruptions cost, in closed form: the oracle of `plan.simulate`."""

import math


def expected_seconds(
    work: float, interval: float, save: float, restart: float, rate_per_hour: float
) -> float:
    """Returns the expected time of so much work on machines that are taken away.

    Interruptions come at random, independent of each other (a Poisson process). Work is saved after
    each `interval` and at the end; an interruption loses what was done since the last save. Of n
    seconds, a save included, the number of tries that fail is e^(rate n) - 1 in the mean, and each
    of them ends with a restart: together these take (1 / rate + restart) (e^(rate n) - 1).

    J. T. Daly, "A higher order estimate of the optimum checkpoint interval for restart dumps",
    Future Generation Computer Systems 22 (2006), equation 13, where restarts are not interrupted.

    Args:
        work: seconds of work, saves apart; more than 0.
        interval: seconds of work from one save to the next; more than 0.
        save: seconds for which a save stops the work.
        restart: seconds from an interruption until work goes on; nothing interrupts these.
        rate_per_hour: interruptions an hour; may be 0.

    Returns:
        seconds; infinite where they are too many to count.
    """
    if rate_per_hour == 0:
        return work + saves(work, interval) * save
    failures = expected_interruptions(work, interval, save, rate_per_hour)
    return (3600 / rate_per_hour + restart) * failures


def expected_interruptions(
    work: float, interval: float, save: float, rate_per_hour: float
) -> float:
    """Returns the expected number of interruptions; see `expected_seconds`."""
    rate = rate_per_hour / 3600
    whole = saves(work, interval) - 1
    last = work - whole * interval
    try:
        return whole * math.expm1(rate * (interval + save)) + math.expm1(rate * (last + save))
    except OverflowError:
        return math.inf


def saves(work: float, interval: float) -> int:
    """Returns how often is saved: after each interval, and at the end."""
    assert work > 0
    assert interval > 0
    return math.ceil(work / interval * (1 - 1e-12))
