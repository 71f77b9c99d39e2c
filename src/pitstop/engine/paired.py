"""Statistics of paired runs: the mean of their differences and Student's t interval."""

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

CONFIDENCE = 0.95


@dataclass(frozen=True)
class Difference:
    """The mean of paired differences, and its interval; one pair has none."""

    mean: float
    interval: tuple[float, float] | None


def difference(pairs: Sequence[tuple[float, float]]) -> Difference:
    """Returns by how much the first of each pair is above the second, with its 95% t interval.

    Of several runs of a pair, what they have in common (seed, hour, machine) cancels out.
    """
    differences = [one - other for one, other in pairs]
    n, mean = len(differences), statistics.fmean(differences)
    if n < 2:
        return Difference(mean, None)
    margin = t_quantile(n - 1, CONFIDENCE) * statistics.stdev(differences) / math.sqrt(n)
    return Difference(mean, (mean - margin, mean + margin))


def t_quantile(degrees: int, confidence: float) -> float:
    """Returns t such that Student's distribution has `confidence` of its mass in [-t, t].

    Finds by bisection where `_mass_within` is that.
    """
    low, high = 0.0, math.pi / 2
    for _ in range(60):  # halves down to the precision of a float
        middle = (low + high) / 2
        below = _mass_within(middle, degrees) < confidence
        low, high = (middle, high) if below else (low, middle)
    return math.sqrt(degrees) * math.tan(low)


def _mass_within(angle: float, degrees: int) -> float:
    """Returns the mass in [-t, t] where t = sqrt(degrees) tan(angle).

    Exact for whole degrees of freedom (Abramowitz and Stegun, 26.7.3 and 26.7.4).
    """
    sine, cosine = math.sin(angle), math.cos(angle)
    odd = degrees % 2
    term = cosine if odd else 1.0
    total = 0.0
    for k in range(2 + odd, degrees + 1, 2):
        total += term
        term *= cosine**2 * (k - 1) / k
    return 2 / math.pi * (angle + sine * total) if odd else sine * total
