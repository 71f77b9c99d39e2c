"""Installs the pitstop wheel that lies beside this file, and goes on as pitstop's container.

It is process 1 of a SageMaker training container, in the channel with the wheel: this file is in
BASE/input/data/pitstop. An image that has pitstop keeps it. Standard library only.
"""

import importlib.util
import os
import signal
import subprocess
import sys
from pathlib import Path

INSTALL = ("-m", "pip", "install", "--quiet", "--disable-pip-version-check")


def main() -> None:
    # To process 1, a signal without a handler is lost; a blocked one waits, also for what follows
    signal.pthread_sigmask(signal.SIG_BLOCK, (signal.SIGTERM, signal.SIGINT))
    here = Path(__file__).absolute().parent
    base = here.parents[2]
    if importlib.util.find_spec("pitstop") is None:
        wheels = [str(wheel) for wheel in here.glob("*.whl")]
        code = subprocess.call([sys.executable, *INSTALL, *wheels])
        if code != 0:
            line = f"pip could not install pitstop (exit code {code}): see the log"
            (base / "output").mkdir(parents=True, exist_ok=True)
            (base / "output" / "failure").write_text(line)
            sys.exit(code)
    container = ["-P", "-m", "pitstop.launch.container", str(base)]
    os.execv(sys.executable, [sys.executable, *container])


if __name__ == "__main__":
    main()
