__version__ = "0.0.1"

from .coupling import *
from .engine import *
from .vit import *  # registers the models with timm
from .mvit import *
from .checkpoints import *
from .inference import *
