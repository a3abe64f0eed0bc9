__version__ = "0.0.1"

import os as _os, signal as _signal, sys as _sys

_command = _os.path.basename(_sys.argv[0] if _sys.argv else '')

def _interrupted(*_):
    "Ctrl-C while a command is still importing, when nothing is at work that could be lost"
    _os.write(2, f"{_command}: interrupted\n".encode())
    _os._exit(130)

# only in the first process of a command, which takes Python's handler back when it begins (`revvit.cli.command`)
_process = _sys.modules.get('multiprocessing.process')
_first = _process is None or _process.parent_process() is None
if _command.startswith('revvit_') and _first and _signal.getsignal(_signal.SIGINT) is _signal.default_int_handler:
    _signal.signal(_signal.SIGINT, _interrupted)

from .coupling import *
from .engine import *
from .vit import *  # registers the models with timm
from .mvit import *
from .checkpoints import *
from .inference import *
