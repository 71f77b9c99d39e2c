from pitstop.api import Run as Run
from pitstop.api import train as train

__version__: str
