"Callbacks one by one: what they draw, mix, average, stop and log, in all their cases"
import io, math, os, random, sys
from contextlib import ExitStack, redirect_stdout
from functools import partial
from types import SimpleNamespace
from unittest.mock import patch

import numpy as np, pytest, torch
from fastai.vision.all import AvgSmoothLoss, Callback, CSVLogger, Learner, MixedPrecision, OptimWrapper, set_seed
from torch import nn
from torch.testing import assert_close
from revvit.data.digits import digits_dls
from revvit.models.vit import RevViT
from revvit.training import callbacks
from revvit.training.callbacks import MixBatches, MixLoss, NonFiniteError, SeedRun, StopOnNonFinite
from revvit.training.logs import PlainLog, RunLog

torch.set_num_threads(1)
pytestmark = pytest.mark.filterwarnings('ignore')

@pytest.fixture(scope='module')
def dls(): return digits_dls(bs=128, device='cpu')

def made(dls, *cbs, depth=1, **kw):
    "A learner with a tiny Rev-ViT, always from the same weights"
    set_seed(0)
    m = RevViT(img_size=16, patch_size=4, in_chans=1, num_classes=10, embed_dim=16, num_heads=2, depth=depth)
    adamw = partial(OptimWrapper, opt=torch.optim.AdamW)
    return Learner(dls, m, loss_func=nn.CrossEntropyLoss(), opt_func=adamw, cbs=cbs, **kw)

def quiet(learn, f, *args):
    with learn.no_bar(), learn.no_logging(): getattr(learn, f)(*args)
    return learn

# ---------------------------------------------------------------- SeedRun

def order(cb, epoch):
    cb.learn.epoch = epoch
    cb.before_train()
    return next(iter(cb.dls.train))[1][:20].tolist()

def draws(cb, step, rank='0'):
    "From each generator there is"
    cb.learn.train_iter = step
    with patch.dict(os.environ, RANK=rank): cb.before_batch()
    return (*torch.rand(2).tolist(), *np.random.rand(2), random.random())

def test_each_epoch_and_step_has_its_own_draws(dls):
    "The same every time; other epochs, other steps and other processes have others"
    cb = SeedRun(7)
    cb.learn = made(dls)
    assert order(cb, 3) == order(cb, 3) != order(cb, 4)
    assert draws(cb, 5) == draws(cb, 5) != draws(cb, 6)
    assert draws(cb, 5) != draws(cb, 5, '1')

# ---------------------------------------------------------------- mixing

def mixed(dls, x, y, **kw):
    cb = MixBatches(smoothing=0., num_classes=4, **kw)
    cb.learn = SimpleNamespace(xb=(x.clone(),), yb=(y,))
    cb.before_batch()
    return cb.learn.xb[0],cb.learn.yb[0]

ways = dict(mixup=dict(mixup=.8, cutmix=0.), cutmix=dict(mixup=0., cutmix=1.), both=dict(mixup=.8, cutmix=1.))
every_way = pytest.mark.parametrize('kw', ways.values(), ids=ways.keys())

@every_way
@pytest.mark.parametrize('seed', range(5))
@pytest.mark.parametrize('shape', [(4,3,32,32), (4,3,8,32,32)], ids=['images','clips'])
def test_pixels_and_targets_agree(dls, shape, kw, seed):
    "In pictures of one colour each: of every frame, the partner's share is the partner's share of the target"
    set_seed(seed)
    y = torch.arange(4)
    colours = y.float().view(-1, *[1]*(len(shape)-1)).expand(shape)
    x,t = mixed(dls, colours, y, **kw)
    assert x.shape == shape and t.shape == (4,4)
    assert kw['cutmix'] or (t.max(1).values < 1).all()   # a box may be empty
    mean = x.flatten(1, -3).mean((2,3))   # of each channel of each frame
    assert_close(mean, (t@y.float())[:,None].expand_as(mean), rtol=0, atol=1e-5)

@every_way
def test_an_odd_batch_leaves_one_out_and_a_single_item_alone(dls, kw):
    x,t = mixed(dls, torch.rand(5,3,8,8), torch.tensor([0,1,2,3,0]), **kw)
    assert (x.shape, t.shape) == ((4,3,8,8), (4,4))
    x,t = mixed(dls, torch.rand(1,3,8,8), torch.tensor([2]), **kw)
    assert x.shape == (1,3,8,8) and t.tolist() == [2]

def test_half_are_cut_and_half_are_blended(dls):
    set_seed(0)
    x = torch.zeros(2,1,64,64)
    x[1] = 1
    seen = [mixed(dls, x, torch.tensor([0,1]), **ways['both'])[0] for _ in range(400)]
    assert abs(np.mean([bool(((o==0) | (o==1)).all()) for o in seen])-.5) < .1

def test_the_loss_takes_hard_and_soft_targets():
    set_seed(0)
    z,y = torch.randn(4,10),torch.tensor([1,2,3,4])
    soft = torch.full((4,10), .01).scatter(1, y[:,None], .91)
    for t in (y,soft): assert_close(MixLoss(eps=.1)(z, t), -(soft*z.log_softmax(1)).sum(1).mean())
    assert_close(MixLoss(eps=.1).activation(z), z.softmax(1))

# ---------------------------------------------------------------- what is not finite

bad = torch.zeros(4,3)
bad[[1,3],0] = torch.tensor([math.nan, math.inf])

@pytest.mark.parametrize('named,want', [
    ([('a', torch.ones(2)), ('b', torch.ones(2,2,2))], None),
    ([('a', torch.ones(2)), ('b', bad), ('c', bad)], 'b'),
    ([('input 0', bad)], 'input 0 (items 1, 3 of the batch)'),
    ([('input 0', torch.full((7,1), math.nan))], 'input 0 (items 0, 1, 2, 3, 4, ... of the batch)'),
    ([('target 0', bad[:,0])], 'target 0'),
    *[([('loss', torch.tensor(o))], None if o==1. else 'loss') for o in (1., math.inf, -math.inf, math.nan)]], ids=str)
def test_the_first_bad_tensor(named, want): assert callbacks._first_bad(named) == want

class Spoil(Callback):
    "Before the third step, plant `value` in the place `where` and keep the weights"
    order,run_valid = -5,False
    def __init__(self, where, value=math.nan): self.where,self.value = where,value
    def now(self, where): return self.train_iter==2 and self.where==where
    def before_batch(self):
        if self.train_iter==2: self.before = {k: v.clone() for k,v in self.model.state_dict().items()}
        if self.now('input'):
            x = self.xb[0].clone()
            x[5] = self.value
            self.learn.xb = (x,)
        if self.now('parameter'):
            with torch.no_grad(): self.model.blocks[0].g.fn.fc1.weight[0,0] = self.value
    def before_backward(self):
        if self.now('gradient'): self.hook = self.model.head.bias.register_hook(self.spoil)
    def spoil(self, g):
        self.hook.remove()
        return g*self.value
    def after_pred(self):
        if self.now('output'): self.learn.pred = self.pred*self.value
    def unchanged(self): return all(torch.equal(v, self.before[k]) for k,v in self.model.state_dict().items())

@pytest.mark.parametrize('clip', [None, 1.])
@pytest.mark.parametrize('where,said', [('input', 'input 0 (items 5 of the batch)'), ('output', 'output of the model'),
    ('gradient', 'gradient of head.bias'), ('parameter', 'parameter blocks.0.g.fn.fc1.weight')])
def test_a_bad_step_is_named_at_once(dls, where, said, clip):
    learn = made(dls, Spoil(where), StopOnNonFinite(clip))
    with pytest.raises(NonFiniteError) as e: quiet(learn, 'fit', 1)
    want = f'step 3 (epoch 0): {said} is not finite; stopped before the optimizer step, the weights are those of step 2'
    assert (str(e.value), learn.train_iter) == (want, 2)
    assert where == 'parameter' or learn.spoil.unchanged()
    assert all(p.grad is None or not p.grad.any() for p in learn.model.parameters())

class CpuScaler(MixedPrecision):
    "fastai's mixed precision with a CPU scaler that halves a factor of 1024 on overflow"
    def before_fit(self):
        self.autocast,self.left_out = torch.autocast('cpu', dtype=torch.bfloat16),[]
        self.learn.scaler,self.scales = torch.amp.GradScaler('cpu', init_scale=1024.),[]
    def after_cancel_step(self): self.left_out.append((self.train_iter, self.learn.spoil.unchanged()))

class Factors(Callback):
    "Keep the scaler's factors, which fastai drops after the fit"
    order,run_valid = 60,False
    def before_fit(self): self.seen = []
    def after_batch(self): self.seen.append(self.scaler.get_scale())

def test_what_a_scaler_skips_stops_nothing(dls):
    "The step is skipped, the factor is halved, training goes on to the end of the epoch"
    learn = quiet(made(dls, Spoil('gradient', math.inf), StopOnNonFinite(), CpuScaler(), Factors()), 'fit', 1)
    assert (learn.factors.seen[:4], len(learn.factors.seen)) == ([1024.,1024.,512.,512.], 11)
    assert learn.cpu_scaler.left_out == [(2,True)] and all(p.isfinite().all() for p in learn.model.parameters())

def test_what_is_sent_is_sent():
    t = torch.tensor([1.,2.])
    later = callbacks._Later(t)
    t += 1
    assert later.there() and later.read().tolist() == [1.,2.]

# ---------------------------------------------------------------- losses and logs

def test_the_running_mean_is_fastais():
    ours,theirs = callbacks._SmoothLoss(.98),AvgSmoothLoss(.98)
    for o in (ours,theirs): o.reset()
    for loss in torch.rand(20):
        for o in (ours,theirs): o.accumulate(SimpleNamespace(loss=loss))
        assert torch.equal(ours.value, theirs.value)
    assert ours.count == 20

def history(dls, cb, path):
    "The log after two epochs, after a validation, after predictions, and after another epoch"
    learn = made(dls, cb, path=path)
    for f in (('fit',2), ('validate',), ('get_preds',), ('fit',1)):
        quiet(learn, *f)
        yield (path/'history.csv').read_text()

def test_the_log_outlives_a_validation(dls, tmp_path):
    "fastai's own does not; a second fit starts a new table"
    fit,validate,*_ = history(dls, CSVLogger(), tmp_path)
    assert fit.splitlines()[1] not in validate
    fit,validate,preds,again = history(dls, RunLog(), tmp_path)
    assert [o.split(',')[0] for o in fit.splitlines()] == ['epoch','0','1']
    assert fit == validate == preds and len(again.splitlines()) == 2
    assert [o.name for o in tmp_path.iterdir()] == ['history.csv']

def plain_lines(dls, every, *silent):
    with redirect_stdout(io.StringIO()) as said, ExitStack() as stack:
        learn = made(dls, PlainLog(every))
        for o in silent: stack.enter_context(getattr(learn, o)())
        learn.fit(2)
        learn.validate(), learn.get_preds()
    return said.getvalue().splitlines()

def test_plain_lines(dls):
    "A line every five of eleven steps and one an epoch, with the time left but at the end; nothing is redrawn"
    lines = plain_lines(dls, 5)
    steps = [[f'epoch {i}, step {s} of 22' for s in ss]+[f'epoch {i}, train'] for i,ss in enumerate(((5,10),(15,20)))]
    assert [o.split(':')[0].partition('_loss')[0] for o in lines] == steps[0]+steps[1]
    assert all(o.isprintable() for o in lines) and 'left' not in lines[-1]
    assert all('images/s' in o and ' left' in o for o in lines if 'step' in o)

@pytest.mark.parametrize('args,n', [((11,), 2), ((5,'no_logging'), 4), ((5,'no_bar','no_logging'), 0)], ids=str)
def test_fewer_lines(dls, args, n): assert len(plain_lines(dls, *args)) == n
