"""Start-up: wall time of the commands that must answer at once, next to an empty Python.

Method. Each command is a fresh process of the `pitstop` beside this interpreter, timed from start
to exit, its output thrown away. The commands take turns; the first round only warms the disk cache
and the compiled modules, and the medians are those of the others.

    python benchmarks/startup.py --rounds 9
"""

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path
from statistics import median

PITSTOP = str(Path(sys.executable).with_name("pitstop"))

COMMANDS: dict[str, list[str]] = {
    "python -c pass": [sys.executable, "-c", "pass"],
    "pitstop --help": [PITSTOP, "--help"],
    "pitstop plan standard --samples 1281167": [
        *(PITSTOP, "plan", "standard"),
        *("--samples", "1281167"),
    ],
}

LIMITS = {"pitstop --help": 0.3, "pitstop plan standard --samples 1281167": 0.6}
"""Seconds that a command may take on two cores."""


def seconds_of(command: list[str]) -> float:
    """Runs a command and returns its wall time; raises if it fails."""
    started = time.perf_counter()
    subprocess.run(command, check=True, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
    return time.perf_counter() - started


def measure(rounds: int) -> dict[str, list[float]]:
    """Returns the seconds of each command in each round, without the first one."""
    taken: dict[str, list[float]] = {name: [] for name in COMMANDS}
    for _ in range(1 + rounds):
        for name, command in COMMANDS.items():
            taken[name].append(seconds_of(command))
    return {name: seconds[1:] for name, seconds in taken.items()}


def report(rounds: int, taken: dict[str, list[float]]) -> None:
    """Prints the result, and again as JSON."""
    print(f"start-up: medians of {rounds} (lowest to highest), Python {sys.version.split()[0]}")
    for name, seconds in taken.items():
        limit = f", to stay below {LIMITS[name]} s" if name in LIMITS else ""
        spread = f"({min(seconds):.3f} to {max(seconds):.3f})"
        print(f"  {name:<40} {median(seconds):.3f} s {spread}{limit}")
    result = {
        "benchmark": "startup",
        "rounds": rounds,
        "median_seconds": {name: round(median(seconds), 4) for name, seconds in taken.items()},
        "limit_seconds": LIMITS,
    }
    print(json.dumps(result))


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=9, help="after the warm-up (default 9)")
    rounds = parser.parse_args().rounds
    report(rounds, measure(rounds))


if __name__ == "__main__":
    main()
