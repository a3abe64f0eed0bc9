"""A step on CUDA makes the host wait for nothing. Here on a device that is not there (`fake_cuda.py`), which raises
wherever a value would be read; on a real one `test_gpu.py` asks PyTorch itself, which raises at every
synchronisation."""
import warnings
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from unittest.mock import patch

import pytest, torch
from fastai.vision.all import Callback, DataLoaders, Learner
from torch import nn
from torch.nn.functional import cross_entropy
from revvit.core import self_check
from revvit.core.state import steady
from revvit.training.recipes import recipes
from revvit.training.learner import learner
from revvit.use.measures import _build
from cases import *
from fake_cuda import Waits, fake_cuda, gradients

def step(make, amp=None, loss=None, change=lambda m: None, **kw):
    "A whole step on the device, whose gradients have the shapes, types and devices of their parameters"
    with fake_cuda() as cuda:
        m,xs = make(dtype=torch.float32, **kw)
        change(m)
        m,xs = m.to('cuda'),[torch.empty_like(x, device='cuda') for x in xs]
        target = torch.empty(len(xs[0]), dtype=torch.long, device='cuda')
        cuda.strict = True
        with torch.autocast('cuda', amp or torch.bfloat16, enabled=amp is not None): out = outputs(m(*xs))
        total = loss(out[0], target) if loss else sum(o.float().square().mean() for o in out)
        ps = needing(m)
        for p,g in zip(ps, gradients([total], ps, [torch.ones_like(total)])):
            assert g is None or (g.shape,g.dtype,g.device)==(p.shape,p.dtype,p.device)
        return cuda

STEPS = dict(sequence=partial(sequence, 2, 2, b=3), tail=partial(tailed, 2, 2, b=3), vit=partial(vit, 2, 2, b=3),
    lean=partial(vit, 2, 2, b=3, drop=0),
    images=partial(mvit, (1,), 3, None, b=2), clips=partial(clip, (1,), 3, None, b=2, drop_whole=True))
steps = pytest.mark.parametrize('make', STEPS.values(), ids=STEPS.keys())

@pytest.mark.parametrize('amp', [None,torch.bfloat16,torch.float16], ids=str)
@steps
def test_a_step_waits_for_nothing(make, amp):
    "With dropout and drop path, whose indices come from pinned memory, and the self-check, whose result is read later"
    def drop(m):   # where nobody is dropped there are no indices
        for o in m.modules():
            if isinstance(o, ReversibleBlock): o.drop_path = .6
    copies = step(make, amp, change=drop).copies
    assert ('cpu','cuda') in copies and ('cuda','cpu') in copies

@pytest.mark.parametrize('on,exact', [(True,True), (True,False), (False,True), (False,False)], ids=str)
@pytest.mark.parametrize('make', [STEPS[o] for o in ('sequence','lean','images')], ids=['sequence','lean','images'])
def test_every_mode(make, on, exact):
    step(make, torch.bfloat16, change=lambda m: m.set_reversible(on, exact=exact), rate=int(on))

@pytest.mark.parametrize('loss', [cross_entropy, partial(cross_entropy, label_smoothing=.1)], ids=['hard','smooth'])
def test_losses(loss): step(STEPS['lean'], torch.bfloat16, loss)

@pytest.mark.parametrize('amp', [None,torch.bfloat16], ids=str)
def test_near(amp):
    def near(m):
        for o in m.modules():
            if isinstance(o, ReversibleSequence): o.near = .25
    step(STEPS['lean'], amp, change=near)

def test_attention_asks_for_its_kernel_as_when_it_is_repeated():
    "With a graph both times: without one cuDNN, for one, plans another kernel, whose result may have other bits"
    assert len(set(step(STEPS['lean'], rate=0).softmax)) == 1

@pytest.mark.parametrize('stored', [None, 'kept', 'hooked'])
@pytest.mark.parametrize('make', [STEPS[o] for o in ('sequence','tail','images')], ids=['sequence','tail','images'])
def test_cudnn_tunes_nothing_meanwhile(make, stored, monkeypatch):
    """With benchmark=True it times kernels once in each thread: the repetition, in another, could be given other ones;
    what it chose before is found again unless `deterministic` differs. Stored blocks between rebuilt ones are no
    exception: theirs would be found by the rebuilt ones"""
    flags = torch.backends.cudnn
    monkeypatch.setattr(flags, 'benchmark', True)
    monkeypatch.setattr(flags, 'deterministic', False)
    seen = []
    def note(*args): seen.append((torch.is_grad_enabled(),flags.benchmark,flags.deterministic))
    def listen(m):
        halves = [o for b in m.modules() if isinstance(b, ReversibleBlock) for o in (b.f,b.g)]
        for o in halves+[o for o in m.modules() if isinstance(o, Fuse)]: o.register_forward_pre_hook(note)
        if stored=='kept':
            for o in m.modules():
                if isinstance(o, ReversibleSequence): o.set_reversible(keep=.5, exact=True)
        if stored=='hooked': blocks_of(m)[0].register_forward_hook(lambda *args: None)
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')   # what the hooked block stores
        step(make, change=listen)
    assert (flags.benchmark,flags.deterministic)==(True,False)
    assert {g for g,*_ in seen}=={False,True}   # forwards, and repeated with a graph
    assert not any(tunes for _,tunes,_ in seen) and all(other for *_,other in seen)

@pytest.fixture
def flags(monkeypatch):
    "cuDNN's, to be changed at will"
    o = torch.backends.cudnn
    for k in ('benchmark','deterministic'): monkeypatch.setattr(o, k, getattr(o, k))
    return o

def both(flags): return flags.benchmark,flags.deterministic

@pytest.mark.parametrize('was', [(True,False), (True,True)])
def test_flags_come_back_whatever_happens(flags, was):
    flags.benchmark,flags.deterministic = was
    with pytest.raises(ZeroDivisionError), steady(torch.device('cuda')):
        assert both(flags)==(False,True)
        1/0
    assert both(flags)==was

def test_flags_are_those_of_all_runs_at_a_time(flags):
    "In threads of several devices one run may begin within another and end after it"
    flags.benchmark,flags.deterministic = True,False
    a = steady(torch.device('cuda'))
    a.__enter__()
    with steady(torch.device('cuda')): pass
    b = steady(torch.device('cuda', 1))
    b.__enter__()
    a.__exit__(None, None, None)
    assert both(flags)==(False,True)
    b.__exit__(None, None, None)
    assert both(flags)==(True,False)

@pytest.mark.parametrize('device', ['cpu','cuda'])
def test_flags_stay_where_nothing_is_tuned(flags, device):
    flags.benchmark,flags.deterministic = device=='cpu',False
    with steady(torch.device(device)): assert both(flags)==(device=='cpu',False)

def test_flags_that_may_not_be_set_are_left(flags, monkeypatch):
    flags.benchmark = True
    monkeypatch.setattr(torch.backends, 'flags_frozen', lambda: True)
    with steady(torch.device('cuda')): assert flags.benchmark

def test_a_step_leaves_nothing_behind():
    "Real self-checks afterwards are heard, and compare real numbers"
    step(STEPS['sequence'])
    assert not self_check._waiting
    m,xs = sequence(2, 2)
    loss_of(m, xs).backward()
    assert type(self_check._weights(8, torch.device('cpu'), torch.float64)) is torch.Tensor

@pytest.mark.parametrize('name,args', [('vit_tiny_patch16_224', dict(depth=1, drop_path_rate=.1)),
    ('revvit_tiny_patch16_224', dict(depth=2, drop_path_rate=.1)), ('revmvit_base_224', dict(drop_path_rate=.1)),
    ('revmvit_base_16x4_224', {}), ('mvitv2_base', dict(drop_path_rate=.1))])
def test_models_can_be_made_there(name, args):
    "Every weight is drawn on the device, as the benchmark does"
    with fake_cuda():
        made = _build(name, args, torch.device('cuda'))
        assert {p.device.type for p in made.parameters()} == {'cuda'}

def _read(x): float(x.sum()); return x
def _branch(x): return x if x.sum()>0 else -x
def _find(x): x.nonzero(); return x
def _choose(x): return x.masked_fill(x>0, 0.) + x[x>0].sum()
def _fetch(x): return x + x.detach().cpu().sum().to(x.device)
def _send(x): return x + torch.ones(x.shape[-1]).to(x.device)
# not pinned, so it waits after all
def _send_later(x): return x + torch.ones(x.shape[-1]).to(x.device, non_blocking=True)
def _same(x): torch.equal(x, x); return x

class Layer(nn.Module):
    def __init__(self, fn, m): super().__init__(); self.fn,self.m = fn,m
    def forward(self, x): return self.m(self.fn(x))

@pytest.mark.parametrize('fn', [_read,_branch,_find,_choose,_fetch,_send,_send_later,_same], ids=lambda o: o.__name__)
def test_what_waits_is_seen(fn):
    "In a layer of the user's: the test above could fail"
    def change(m): m[1].g = Layer(fn, m[1].g)
    with pytest.raises((Waits,torch._subclasses.fake_tensor.DynamicOutputShapeException)):
        step(STEPS['sequence'], change=change)

def test_the_self_check_waits_where_it_shall_stop(strict):
    "An error must come at once, a warning may come with the next step"
    with pytest.raises((Waits,torch._subclasses.fake_tensor.DynamicOutputShapeException)): step(STEPS['vit'])

# ---------------------------------------------------------------- a whole step of the Learner

class Strict(Callback):
    "From the third step on nothing may wait, from the loader's side of the step to the last callback"
    order,run_valid = -30,False
    def __init__(self, cuda): self.cuda = cuda
    def before_batch(self): self.cuda.strict = self.train_iter>=2

class Loose(Callback):
    order,run_valid = 90,False
    def __init__(self, cuda): self.cuda = cuda
    def after_batch(self): self.cuda.strict = False

def backward(self):
    "Node by node: PyTorch's own engine wants a real device"
    ps = needing(self.model)
    for p,g in zip(ps, gradients([self.loss_grad], ps, [torch.ones_like(self.loss_grad)])): p.grad = g

class Batches(list):
    "Loader of two tensors a batch, on the device"
    bs,device = 4,torch.device('cuda')
    dataset = property(list)

def trained(recipe, cbs=(), amp='off', bar=False, every=None):
    # a kind of tensor that a fake one cannot be
    with fake_cuda() as cuda, patch.object(Learner, '_backward',
                                           backward), patch('fastai.losses.TensorBase', lambda x: x):
        x,y = torch.rand(4, 1, 16, 16, device='cuda'),torch.zeros(4, dtype=torch.long, device='cuda')
        dls = DataLoaders(Batches([(x,y)]*6), Batches([]))
        dls.vocab = [str(o) for o in range(10)]
        learn = learner(dls, recipe, amp=amp)
        with ExitStack() as stack:
            if not bar: stack.enter_context(learn.no_bar())
            stack.enter_context(patch('timm.utils.model_ema.torch.Generator',
                                      lambda device, new=torch.Generator: new()))
            stack.enter_context(learn.no_logging())
            # it counts storages, which fake tensors lack
            stack.enter_context(patch('revvit.training.progress.step_memory', lambda model, x: (1,2)))
            if every: learn.plain_log.every = every
            stack.enter_context(patch.object(Learner, '_do_epoch_validate', lambda *a, **kw: None))
            learn.fit(1, cbs=[Strict(cuda), Loose(cuda), *cbs])
        return learn,cuda

small = replace(recipes['digits'], epochs=1, batch_size=4, warmup_epochs=0,
                model_args=dict(patch_size=4, embed_dim=16, num_heads=2, depth=2, drop_path_rate=.2))

@pytest.mark.parametrize('bar', [False,True], ids=['quiet','bar'])
@pytest.mark.parametrize('recipe', [small, replace(small, clip=None), replace(small, mixup=.8, cutmix=1.),
                                    replace(small, average=.9)], ids=['clip','free','mixed','average'])
def test_a_learners_step_waits_for_nothing(recipe, bar):
    "Schedule, seeds, mixing, loss, its record, the check of the gradients, the limit, AdamW, the average and the bar"
    learn,cuda = trained(recipe, bar=bar)
    assert learn.stop_on_non_finite.late and len(learn.recorder.lrs)==6 and ('cuda','cpu') in cuda.copies

def test_lines_wait_for_nothing(capsys):
    "One for each step; they are written when their numbers have come"
    learn,_ = trained(replace(small, mixup=.8), bar=True, every=1)
    assert capsys.readouterr().out.count(', step ') == 6

def test_a_learners_step_in_bfloat16(): assert trained(small, amp='bf16')[0].mixed_precision.amp_mode.value=='bf16'

class Reads(Callback):
    def after_step(self): self.seen = self.loss.item()
class Asks(Callback):
    order = 55   # after the recorder
    def after_batch(self):
        if self.learn.recorder.losses[-1]>0: pass

@pytest.mark.parametrize('cb', [Reads,Asks])
def test_a_callback_that_reads_is_seen(cb):
    with pytest.raises((Waits,torch._subclasses.fake_tensor.DataDependentOutputException)): trained(small, cbs=[cb()])
