# What `import revvit` offers, as a type checker sees it; tests/test_types.py compares this with the package
__version__: str

from .core.coupling import couple as couple, uncouple as uncouple
from .core.dial import Plan as Plan, chunk_size as chunk_size
from .core.block import ReversibleBlock as ReversibleBlock
from .core.context import PerBlock as PerBlock, PerImage as PerImage
from .core.self_check import self_check as self_check, set_self_check as set_self_check
from .core.sequence import ReversibleSequence as ReversibleSequence
from .models.layers import MeanFusion as MeanFusion, MlpFusion as MlpFusion
from .models.pooling import StageTransition as StageTransition
from .models.vit import RevViT as RevViT
from .models.mvit import RevMViT as RevMViT
from .models.files import CheckpointError as CheckpointError, read_checkpoint as read_checkpoint
from .models.checkpoints import (LoadReport as LoadReport, input_settings as input_settings,
    load_checkpoint as load_checkpoint, load_model as load_model, save_checkpoint as save_checkpoint)
from .models.convert import plain as plain, reversible as reversible
from .models.detector import detector as detector
from .core.memory import (live_bytes as live_bytes, live_trace as live_trace, peak_bytes as peak_bytes,
    per_image as per_image, saved_bytes as saved_bytes)
from .core.testing import (check_directional as check_directional, check_grads as check_grads,
    check_inverse as check_inverse, drift as drift)
from .data.digits import digits_dls as digits_dls
from .data.images import image_dls as image_dls, shard_dls as shard_dls
from .data.clips import clip_dls as clip_dls
from .data.moving_digits import moving_digits_dls as moving_digits_dls
from .data.scenes import coco_dls as coco_dls
from .data.scattered_digits import scattered_digits_dls as scattered_digits_dls
from .training.recipes import (Recipe as Recipe, recipe_dls as recipe_dls, recipe_model as recipe_model,
    recipes as recipes)
from .training.learner import learner as learner, plot_history as plot_history, record_run as record_run
from .training.distributed import distribute as distribute, join_group as join_group, leave_group as leave_group
from .training.resume import keep_state as keep_state
from .use.inference import (class_names as class_names, extract_feat as extract_feat, get_model as get_model,
    inference_model as inference_model)
from .use.detection import draw_things as draw_things, inference_detector as inference_detector
from .use.evaluation import eval_loader as eval_loader, evaluate as evaluate
from .use.memory_need import memory as memory
