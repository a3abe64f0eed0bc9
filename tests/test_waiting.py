"""A step on CUDA makes the host wait for nothing. Here on a device that is not there (`fake_cuda.py`), which raises wherever a value would be read;
on a real one `test_gpu.py` asks PyTorch itself, which raises at every synchronisation."""
from functools import partial

import pytest, torch
from torch import nn
from torch.nn.functional import cross_entropy
from revvit.core.exact import set_self_check
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
        for p,g in zip(ps, gradients([total], ps, [torch.ones_like(total)])): assert g is None or (g.shape,g.dtype,g.device)==(p.shape,p.dtype,p.device)
        return cuda

STEPS = dict(sequence=partial(sequence, 2, 2, b=3), tail=partial(tailed, 2, 2, b=3), vit=partial(vit, 2, 2, b=3), lean=partial(vit, 2, 2, b=3, drop=0),
    images=partial(mvit, (1,), 3, None, b=2), clips=partial(clip, (1,), 3, None, b=2, drop_whole=True))
steps = pytest.mark.parametrize('make', STEPS.values(), ids=STEPS.keys())

@pytest.mark.parametrize('amp', [None,torch.bfloat16,torch.float16], ids=str)
@steps
def test_a_step_waits_for_nothing(make, amp):
    "With dropout and drop path, whose indices come from pinned memory, and the self-check, whose result is read later"
    copies = step(make, amp).copies
    assert ('cpu','cuda') in copies and ('cuda','cpu') in copies

@pytest.mark.parametrize('on,exact', [(True,True), (True,False), (False,True), (False,False)], ids=str)
@pytest.mark.parametrize('make', [STEPS[o] for o in ('sequence','lean','images')], ids=['sequence','lean','images'])
def test_every_mode(make, on, exact): step(make, torch.bfloat16, change=lambda m: m.set_reversible(on, exact=exact), rate=int(on))

@pytest.mark.parametrize('loss', [cross_entropy, partial(cross_entropy, label_smoothing=.1)], ids=['hard','smooth'])
def test_losses(loss): step(STEPS['lean'], torch.bfloat16, loss)

def test_attention_asks_for_its_kernel_as_when_it_is_repeated():
    "With a graph both times: without one cuDNN, for one, plans another kernel, whose result may have other bits"
    assert len(set(step(STEPS['lean'], rate=0).softmax)) == 1

def _read(x): float(x.sum()); return x
def _branch(x): return x if x.sum()>0 else -x
def _find(x): x.nonzero(); return x
def _choose(x): return x.masked_fill(x>0, 0.) + x[x>0].sum()
def _fetch(x): return x + x.detach().cpu().sum().to(x.device)
def _send(x): return x + torch.ones(x.shape[-1]).to(x.device)
def _send_later(x): return x + torch.ones(x.shape[-1]).to(x.device, non_blocking=True)   # not pinned, so it waits after all
def _same(x): torch.equal(x, x); return x

class Layer(nn.Module):
    def __init__(self, fn, m): super().__init__(); self.fn,self.m = fn,m
    def forward(self, x): return self.m(self.fn(x))

@pytest.mark.parametrize('fn', [_read,_branch,_find,_choose,_fetch,_send,_send_later,_same], ids=lambda o: o.__name__)
def test_what_waits_is_seen(fn):
    "In a layer of the user's: the test above could fail"
    def change(m): m[1].g = Layer(fn, m[1].g)
    with pytest.raises((Waits,torch._subclasses.fake_tensor.DynamicOutputShapeException)): step(STEPS['sequence'], change=change)

def test_the_self_check_waits_where_it_shall_stop():
    "An error must come at once, a warning may come with the next step"
    was = set_self_check('error')
    try:
        with pytest.raises((Waits,torch._subclasses.fake_tensor.DynamicOutputShapeException)): step(STEPS['vit'])
    finally: set_self_check(was)
