"""How training starts: the published starting weights, parameter by parameter, and the first steps of the published
recipes. From a start where all biases are zero a sample that was dropped whole stays zero, and each layer norm after it
multiplies its gradient by a thousand: norms of millions, or NaN, in the first step."""
import random
from dataclasses import replace

import av, numpy as np, pytest, timm, torch
from fastai.vision.all import Callback, CancelFitException
from PIL import Image
from scipy.stats import kstest
from sklearn.datasets import load_digits
from torch import nn
from torch.nn.functional import interpolate
from torch.nn.utils import get_total_norm
from timm.layers import DropPath
from revvit.models.checkpoints import input_settings
from revvit.data.images import train_tfm
from revvit.training.recipes import recipe_dls, recipe_model, recipes
from revvit.training.learner import learner
from revvit.data.clips import ClipAugment, ClipTransform, TrainClips

torch.set_num_threads(1)
pytestmark = pytest.mark.filterwarnings('ignore')
published = ['rev_vit_s', 'rev_vit_b', 'rev_mvit_b', 'rev_mvit_b_16x4']
each = pytest.mark.parametrize('name', published)

# ---------------------------------------------------------------- starting weights

layers = ((nn.Linear, 'linear'), ((nn.Conv2d, nn.Conv3d), 'convolution'), (nn.LayerNorm, 'norm'))

def kinds(model):
    "Kind, name, parameter and layer of every parameter"
    for n,p in model.named_parameters():
        owner = model.get_submodule(n.rpartition('.')[0])
        layer = next((word for cls,word in layers if isinstance(owner, cls)), None)
        yield f"{layer} {n.rpartition('.')[2]}" if layer else n, n, p.detach().double(), owner

def normal(p): return kstest(p.flatten()[:20_000]/.02, 'norm').pvalue
def uniform(p, layer):
    bound = layer.weight[0].numel()**-.5   # PyTorch's own start, which the publisher leaves to this one kind
    return kstest(p.flatten()/bound, 'uniform', (-1, 2)).pvalue

RULES = {'linear weight': lambda p, _: normal(p) > 1e-6, 'convolution weight': lambda p, _: normal(p) > 1e-6,
         'pos_embed': lambda p, _: normal(p) > 1e-6, 'pos_embed_temporal': lambda p, _: normal(p) > 1e-6,
         'linear bias': lambda p, _: bool((p == torch.tensor(.02)).all()),
         'norm bias': lambda p, _: bool((p == torch.tensor(.02)).all()),
         'norm weight': lambda p, _: bool((p == 1).all()),
         'convolution bias': lambda p, layer: uniform(p, layer) > 1e-6}

def strangers(model): return [n for kind,n,p,layer in kinds(model) if not RULES[kind](p, layer)]

@each
def test_every_parameter_starts_as_the_publishers(name):
    model = recipe_model(recipes[name], 400)
    assert strangers(model) == []
    counts = {}
    for kind,*_ in kinds(model): counts[kind] = counts.get(kind, 0)+1
    blocks = 12 if 'mvit' not in name else 16
    # by hand: qkv, proj, fc1, fc2 and two norms a block; the last norm and the classifier. Pooling has two convolutions
    # with norms a block and a third in each of the three
    # transitions; these fuse streams by the two layers of an MLP, or average them and project the residual by one
    pools = 0 if 'mvit' not in name else 2*blocks+3
    linear = 4*blocks + 1 + (6 if name == 'rev_mvit_b' else 3 if 'mvit' in name else 0)
    assert counts['convolution weight'] == pools+1 and counts['convolution bias'] == 1
    assert counts['norm weight'] == counts['norm bias'] == 2*blocks + 1 + pools
    assert counts['linear weight'] == linear and counts['linear bias'] == linear - (16 if '16x4' in name else 0)
    assert counts['pos_embed'] == 1 and ('pos_embed_temporal' in counts) == ('16x4' in name)

@each
def test_drawn_again_and_a_new_classifier(name):
    "From empty memory, after training, and the head of other classes"
    small = dict(embed_dim=16, num_heads=2, depth=3) if 'mvit' not in name else dict(embed_dim=16, depth=5)
    r = replace(recipes[name], model_args={**recipes[name].model_args, **small,
                                           **({'stage_starts': (2,)} if 'mvit' in name else {})})
    with torch.device('meta'): model = recipe_model(r, 7)
    model = model.to_empty(device='cpu')
    with torch.no_grad():
        for p in model.parameters(): p.fill_(3.)
    model.init_weights()
    assert strangers(model) == []
    with torch.no_grad():
        for p in model.parameters(): p.fill_(3.)
    model.reset_classifier(300)
    assert [n for n in strangers(model) if n.startswith('head')] == []
    model.double().reset_classifier(3)
    assert model.head.weight.dtype == torch.float64 and (model.head.bias == .02).all()

# --- the first steps of the published recipes, on scikit-learn's digits

@pytest.fixture(scope='module')
def images(tmp_path_factory):
    "32 training images of each digit in class folders, and two held out"
    root,(pixels,labels) = tmp_path_factory.mktemp('images'),load_digits(return_X_y=True)
    for c in range(10):
        for part,some in (('train', slice(32)), ('val', slice(32, 34))):
            (root/part/str(c)).mkdir(parents=True)
            for i,o in enumerate(pixels[labels == c][some]):
                picture(o).resize((48, 40)).save(root/part/str(c)/f'{i}.png')
    return root

def picture(pixels): return Image.fromarray((pixels.reshape(8, 8)*15.9).astype(np.uint8)).convert('RGB')

@pytest.fixture(scope='module')
def videos(tmp_path_factory):
    "Digits that go to the right or down, 16 videos to train on and two held out"
    root,pixels = tmp_path_factory.mktemp('videos'),load_digits().data
    for i in range(18):
        with av.open(str(root/f'{i}.mp4'), 'w') as c:
            s = c.add_stream('libx264', rate=30)
            s.height,s.width,s.pix_fmt = 40,48,'yuv420p'
            for t in range(0, 20):
                frame = Image.new('RGB', (48, 40))
                frame.paste(picture(pixels[i]).resize((20, 20)), (t, 8) if i%2 else (14, t))
                c.mux(s.encode(av.VideoFrame.from_image(frame)))
            c.mux(s.encode())
    for part,some in (('train', range(16)), ('val', range(16, 18))):
        (root/f'{part}.csv').write_text(''.join(f'{i}.mp4 {i%2}\n' for i in some))
    return root

class Watch(Callback):
    "The norm of the gradient before it is clipped, and how many samples left each transition as nothing"
    order = -100
    def __init__(self, steps): self.steps,self.norms,self.dropped = steps,[],0
    def before_fit(self):
        for o in getattr(self.model, 'drops', ()): o.register_forward_hook(lambda m, x, y: self.count(y))
    def count(self, y): self.dropped += int((y.flatten(1) == 0).all(1).sum())
    def before_step(self):
        assert self.loss.isfinite() and all(p.grad.isfinite().all()
                                            for p in self.model.parameters()), f"step {len(self.norms)+1}"
        self.norms.append(float(get_total_norm([p.grad for p in self.model.parameters()])))
    def after_step(self):
        if len(self.norms) == self.steps: raise CancelFitException

def watched(name, images, videos, bs, side, frames, steps, **model_args):
    "Train by a published recipe on digits; what was seen"
    full,clips = recipes[name],'16x4' in name
    cfg = {**full.image_cfg, 'input_size': (3, frames, side, side) if clips else (3, side, side)}
    r = replace(full.changed(batch_size=bs), image_cfg=cfg, model_args={**full.model_args, **model_args})
    learn,watch = learner(recipe_dls(r, videos if clips else images, workers=0, device='cpu'), r, seed=1),Watch(steps)
    with learn.no_bar(), learn.no_logging(), learn.added_cbs(watch): learn.fit(50)
    assert len(watch.norms) == steps and max(watch.norms) < 100, watch.norms
    return watch

# narrow, as deep as published; in one part, which for so narrow a model is several times as fast
SLIM = dict(vit=dict(embed_dim=12, num_heads=2, chunk=32), mvit=dict(embed_dim=8, chunk=32))

@each
def test_fifty_steps_of_a_published_recipe(name, images, videos):
    "Its own augmentation, mixing, drop rates and depth, a narrow model, 32 images or 8 videos twice a step"
    seen = watched(name, images, videos, 8 if '16x4' in name else 32, 32, 4, 50,
                   **SLIM['mvit' if 'mvit' in name else 'vit'])
    assert seen.dropped or 'mvit' not in name

# the real size (224 pixels, 16 frames) takes minutes, and its parameters differ in the number of position vectors alone
@each
@pytest.mark.parametrize('side,frames', [(64, 4), pytest.param(224, 16, marks=pytest.mark.slow)], ids=['small','real'])
def test_the_first_step_at_full_width(name, side, frames, images, videos):
    "16 images, or 8 videos twice"
    seen = watched(name, images, videos, 8 if '16x4' in name else 16, side, frames, 1)
    print(name, side, 'norm', *seen.norms, 'dropped', seen.dropped)
    assert seen.dropped or name != 'rev_mvit_b'

class First(nn.Module):
    "A transition's drop path that takes the first sample alone"
    def forward(self, x): return torch.cat((x[:1]*0, x[1:]))

@pytest.mark.parametrize('where', [0, 1, 2])
@pytest.mark.parametrize('name', published[2:])
def test_a_sample_dropped_at_any_transition(name, where):
    "As deep as published; before the first steps the norm was beyond 1e6, or no number, wherever blocks follow"
    size = dict(embed_dim=8, drop_path_rate=0.)
    r = replace(recipes[name], image_cfg={**recipes[name].image_cfg,
                                          'input_size': (3, *((4,) if '16x4' in name else ()), 64, 64)},
                model_args={**recipes[name].model_args, **size})
    model,(_,*rest) = recipe_model(r, 5),r.image_cfg['input_size']
    assert all(isinstance(o, DropPath) for o in model.drops)
    model.drops[where] = First()
    x = torch.randn(4, 3, *rest, generator=torch.Generator().manual_seed(0))
    nn.functional.cross_entropy(model(x), torch.arange(4)).backward()
    assert get_total_norm([p.grad for p in model.parameters()]) < 100

# ---------------------------------------------------------------- how a published recipe makes pictures and clips

@each
def test_recipe_model_and_loaders_say_the_same(name):
    r = recipes[name]
    model = timm.create_model(r.model, embed_dim=8*12)
    clips = '16x4' in name
    assert {k: model.pretrained_cfg[k] for k in r.image_cfg} == r.image_cfg == {k: v for k,
        v in input_settings(model).items() if k in r.image_cfg}
    assert set(r.image_cfg) >= {'input_size', 'mean', 'std', 'interpolation', 'crop_pct',
                                *(('frame_stride', 'frame_rate') if clips else ())}
    assert r.image_cfg['interpolation'] == ('bilinear' if clips else 'bicubic')
    aug = ClipAugment(r.image_cfg, **r.aug) if clips else train_tfm(r.image_cfg, **r.aug)
    crop,rand = (aug.crop,aug.rand_augment(256)) if clips else (aug.transforms[0],aug.transforms[2])
    assert crop.interpolation.value == r.image_cfg['interpolation']
    assert {o.kwargs['resample'] for o in rand.ops} == {Image.Resampling.BICUBIC}

@pytest.mark.parametrize('how', ['bilinear', 'bicubic'])
def test_clips_are_resized_as_their_settings_say(how, videos):
    "The test-time resize and the one before training's augmentation, against PyTorch's of whole frames"
    path,cfg = videos/'0.mp4',dict(recipes['rev_mvit_b_16x4'].image_cfg, mean=(0.,)*3, std=(1.,)*3, crop_pct=1.,
                                   interpolation=how)
    def small(frames, how):
        return interpolate(frames.float(), (16,19), mode=how, align_corners=False, antialias=True).clamp(0, 255)
    # 3 T H W -> T 3 H W
    def test_time(*size): return (ClipTransform({**cfg, 'input_size': (3,4,*size)})(path)[0]*255).transpose(0, 1)
    def train(*size):
        random.seed(0)
        return TrainClips({**cfg, 'input_size': (3,4,*size)}, lambda o: o)(path)[0]
    other = dict(bilinear='bicubic', bicubic='bilinear')[how]
    for got,whole,cut in ((test_time(16,16), test_time(40,48), slice(2, 18)),
                          (train(16,16), train(40,48), slice(None))):
        near,far = ((got-small(whole, o)[...,cut]).abs().max() for o in (how, other))
        assert near < 5 and far > 10

@pytest.mark.parametrize('kind', ['images', 'clips'])
def test_posterizing_to_no_bits_is_black(kind):
    "Magnitude 10, which the recipe of Rev-MViT-B reaches; newer Pillows refuse to keep 0 bits"
    cfg = recipes['rev_mvit_b' if kind == 'images' else 'rev_mvit_b_16x4'].image_cfg
    ops = (train_tfm(cfg, 'rand-m10-inc1').transforms[2]
           if kind == 'images' else ClipAugment(cfg, 'rand-m10-inc1').rand_augment(64)).ops
    op, = (o for o in ops if o.name == 'PosterizeIncreasing')
    op.prob,photo = 1.,Image.fromarray(np.random.RandomState(0).randint(1, 255, (8,8,3), np.uint8))
    assert np.asarray(op(photo)).max() == 0 and op(photo).size == photo.size
    op.magnitude = 5
    assert np.array_equal(np.asarray(op(photo)), np.asarray(photo) & 0b11000000)
