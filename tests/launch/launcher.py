"""Calls launch() as the command line does.

Usage: python launcher.py NPROC RESTARTS NODES NODE_RANK ENDPOINT COMMAND...   (`-`: absent)
"""

import sys

from pitstop.launch.local import Nodes, launch

nproc, restarts, count, place, endpoint, *command = sys.argv[1:]
nodes = Nodes(
    int(count), None if place == "-" else int(place), None if endpoint == "-" else endpoint
)
sys.exit(launch(command, nproc=int(nproc), nodes=nodes, max_restarts=int(restarts)))
