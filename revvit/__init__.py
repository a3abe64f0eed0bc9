__version__ = "0.0.1"

import multiprocessing, os, signal, sys

_command = os.path.basename(sys.argv[0] if sys.argv else '')

def _interrupted(*_):
    "Ctrl-C while a command is still importing, when nothing is at work that could be lost"
    os.write(2, f"{_command}: interrupted\n".encode())
    os._exit(130)

# only in the first process of a command, which takes its own handler when it begins (`revvit.cli.command`)
if _command.startswith('revvit_') and multiprocessing.parent_process() is None and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    signal.signal(signal.SIGINT, _interrupted)

from .coupling import *
from .engine import *
from .vit import *  # registers the models with timm
from .mvit import *
from .checkpoints import *
from .inference import *
