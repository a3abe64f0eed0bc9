__version__ = "0.0.1"

import os as _os, signal as _signal, sys as _sys

_command = _os.path.basename(_sys.argv[0] if _sys.argv else '')

def _interrupted(*_):
    "Ctrl-C while a command is still importing, when nothing is at work that could be lost"
    _os.write(2, f"{_command}: interrupted\n".encode())
    _os._exit(130)

# only in the first process of a command, which takes Python's handler back when it begins (`revvit.use.command`)
_process = _sys.modules.get('multiprocessing.process')
_first = _process is None or _process.parent_process() is None
if _command.startswith('revvit_') and _first and _signal.getsignal(_signal.SIGINT) is _signal.default_int_handler:
    _signal.signal(_signal.SIGINT, _interrupted)

from .core.coupling import couple, uncouple
from .core.block import ReversibleBlock
from .core.context import PerBlock, PerImage
from .core.dial import Plan, chunk_size
from .core.self_check import self_check, set_self_check
from .core.sequence import ReversibleSequence
from .models.layers import MeanFusion, MlpFusion
from .models.pooling import StageTransition
from .models.vit import RevViT   # registers its models with timm, as does the next
from .models.mvit import RevMViT
from .models.files import CheckpointError, read_checkpoint
from .models.checkpoints import LoadReport, input_settings, load_checkpoint, load_model, save_checkpoint
from .models.convert import plain, reversible

# what needs fastai, or reads data, is imported where it is first used
_later = {'revvit.core.memory': ('live_bytes', 'live_trace', 'peak_bytes', 'per_image', 'saved_bytes'),
          'revvit.core.testing': ('check_directional', 'check_grads', 'check_inverse', 'drift'),
          'revvit.models.detector': ('detector',),
          'revvit.data.digits': ('digits_dls',),
          'revvit.data.images': ('image_dls', 'shard_dls'),
          'revvit.data.clips': ('clip_dls',),
          'revvit.data.moving_digits': ('moving_digits_dls',),
          'revvit.data.scenes': ('coco_dls',),
          'revvit.data.scattered_digits': ('scattered_digits_dls',),
          'revvit.training.recipes': ('Recipe', 'recipe_dls', 'recipe_model', 'recipes'),
          'revvit.training.learner': ('learner', 'plot_history', 'record_run'),
          'revvit.training.distributed': ('distribute', 'join_group', 'leave_group'),
          'revvit.training.resume': ('keep_state',),
          'revvit.use.inference': ('class_names', 'extract_feat', 'get_model', 'inference_model'),
          'revvit.use.detection': ('draw_things', 'inference_detector'),
          'revvit.use.evaluation': ('eval_loader', 'evaluate'),
          'revvit.use.memory_need': ('memory',)}
_home = {name: module for module,names in _later.items() for name in names}

def __getattr__(name):
    if name not in _home: raise AttributeError(f"module 'revvit' has no attribute {name!r}")
    from importlib import import_module
    return getattr(import_module(_home[name]), name)

__all__ = [o for o in globals() if not o.startswith('_') and o not in ('core', 'models')] + list(_home)

def __dir__(): return sorted({*globals(), *_home})
