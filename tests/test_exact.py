"""The exact mode and the dial: the same bits as with stored activations, whatever the precision, the part size, the
randomness and what is kept; and memory. The judge of bits is the plain mode on the same grid, `set_reversible(False,
exact=True)`; of gradients, plain autograd in float64."""
import warnings
from contextlib import nullcontext
from functools import partial

import pytest, torch
from torch import nn
from revvit.core.context import PerImage
from revvit.core.dial import spend
from revvit.core.exact import Snap
from revvit.core.self_check import Start, set_self_check
from revvit.core.memory import peak_bytes, per_image, saved_bytes
from revvit.core.testing import weighted_sum
from cases import *

AMP = {'float32': None, 'bfloat16': torch.bfloat16, 'float16': torch.float16}
amps = pytest.mark.parametrize('amp', AMP.values(), ids=AMP.keys())
NETS = {k: CASES[k] for k in ('sequence3','tail4','vit3','vit4','image6','clip5')}
nets = pytest.mark.parametrize('make', NETS.values(), ids=NETS.keys())

pytestmark = pytest.mark.usefixtures('strict')

def sequences(m): return [o for o in m.modules() if isinstance(o, ReversibleSequence)]
def switch(m, on, **kw):
    "`set_reversible` of a model, or of the sequence and tail in a test's own"
    for o in [m] if hasattr(m, 'model_args') else sequences(m): o.set_reversible(on, **kw)

def answers(m, xs, amp, seed=0):
    "Outputs, and gradients of inputs and weights"
    xs = [x.detach().clone().requires_grad_() for x in xs]
    torch.manual_seed(seed)
    with torch.autocast('cpu', amp) if amp else nullcontext(): out = m(*xs)
    return [*outputs(out), *torch.autograd.grad(weighted_sum(out), [*xs, *needing(m)], allow_unused=True)]

def equal(a, b): return all(p is q is None or torch.equal(p, q) for p,q in zip(a, b, strict=True))

@pytest.mark.parametrize('rate', [0,1])
@amps
@nets
def test_same_bits_as_stored(make, amp, rate):
    "At every part size, with and without dropout and drop path, at every setting of the dial"
    m,xs = make(rate=rate, dtype=torch.float32)
    for chunk in (1,2,None):
        for s in sequences(m): s.chunk = chunk
        switch(m, False, exact=True)
        want = answers(m, xs, amp)
        for keep in (0.,.06,.5)[:3 if chunk==2 else 1]:
            switch(m, True, exact=True, keep=keep)
            assert equal(answers(m, xs, amp), want), (chunk,keep)

class Often(nn.Module):
    "Reads its stream four times"
    def forward(self, x): return x.softmax(-1) + x/(1+x.square().sum(1, keepdim=True)) + x.mean(-1, keepdim=True)

class Near(nn.Module):
    "Mixes neighbours: another kernel where channels lie last in memory"
    def __init__(self, d=16): super().__init__(); self.conv = nn.Conv2d(d, d, 3, padding=1)
    def forward(self, x): return self.conv(x)

def strange(s, layout):
    "Streams, and weights of a loss, that lie elsewise in memory"
    def turn(o): return o.to(memory_format=torch.channels_last) if layout=='last' else o.mT.contiguous().mT
    xs = torch.randn(2, 3, 16, 12, 12, generator=torch.Generator().manual_seed(s))
    return [o.contiguous() if layout=='usual' else turn(o) for o in xs]

@pytest.mark.parametrize('make', [Often,Near])
@pytest.mark.parametrize('layout', ['usual','last','transposed'])
def test_same_bits_of_strided_streams(layout, make):
    "And of halves that read a stream several times, in parts of any size"
    torch.manual_seed(0)
    for chunk in (1,2,None):
        seq,found = ReversibleSequence([ReversibleBlock(make(), make(), .3*i) for i in range(2)], chunk),[]
        for on in (False,True):
            seq.set_reversible(on, exact=True)
            xs = [x.detach().clone().requires_grad_() for x in strange(1, layout)]
            assert xs[0].is_contiguous() == (layout=='usual')
            torch.manual_seed(1)
            ys = seq(*xs)
            loss = sum((y*w).mean(1).square().sum() + y.norm(dim=-1).sum() for y,w in zip(ys, strange(2, layout)))
            found.append([loss, *ys, *torch.autograd.grad(loss, [*xs, *seq.parameters()])])
        assert equal(*found), chunk

class Product(nn.Module):
    "A matrix product of the very numbers that come in; of an odd width, a part's would begin anywhere in memory"
    def __init__(self, dim):
        super().__init__()
        self.first,self.last = nn.Linear(dim, dim),nn.Linear(dim, dim)
    def forward(self, x, other=0.): return self.last(self.first(x).tanh()+other)

@pytest.mark.parametrize('context', [False,True])
@pytest.mark.parametrize('dim', [5,6,16])
@pytest.mark.parametrize('chunk', [1,2,3,None])
def test_same_bits_where_drop_path_picks_parts(chunk, dim, context):
    "Some processors round a product differently where its numbers begin elsewhere (an AMD EPYC, PyTorch 2.15)"
    torch.manual_seed(0)
    blocks = [ReversibleBlock(Product(dim), Product(dim), .3, ('other',)*context, ('other',)*context) for _ in range(2)]
    net,got = ReversibleSequence(blocks, chunk),[]
    x,given = torch.randn(7, 3, dim),torch.randn(7, 3, dim, requires_grad=True)
    wanted = [*net.parameters(), *[given]*context]
    for on in (True,False):
        net.set_reversible(on, exact=True)
        torch.manual_seed(2)
        ys = net(x, x, **dict(other=PerImage(given)) if context else {})
        got.append([*ys, *torch.autograd.grad(sum(o.sin().sum() for o in ys), wanted)])
    assert equal(*got)

@amps
@pytest.mark.parametrize('depth, scale', [(48,3.),(1000,1.)], ids=['48 blocks, weights x3','1000 blocks'])
def test_same_bits_at_depth(depth, scale, amp):
    m,xs = stack(depth, dtype=torch.float32, chunk=3),streams(b=3, dtype=torch.float32)
    with torch.no_grad():
        for p in m.parameters():
            if p.ndim>1: p.mul_(scale)
    switch(m, False, exact=True)
    want = answers(m, xs, amp)
    switch(m, True, exact=True)
    assert equal(answers(m, xs, amp), want)
    back = m.eval().inverse(*(o.detach() for o in m(*xs)))
    if amp is None: assert all(map(torch.equal, back, ((x*2**14).round()/2**14 for x in xs)))

@nets
def test_on_by_itself_under_autocast(make):
    "And off without it, but where samples may begin as zero"
    m,xs = make(dtype=torch.float32)
    for amp in (torch.bfloat16,None):
        switch(m, True)
        got = answers(m, xs, amp)
        switch(m, True, exact=amp is not None)
        for o in sequences(m): o.exact |= o.from_zero
        assert equal(answers(m, xs, amp), got)

@nets
def test_the_grid_moves_less_than_autocast(make):
    m,xs = make(rate=0, dtype=torch.float32)
    switch(m, False, exact=False)
    want = answers(m, xs, None)
    noise = error(answers(m, xs, torch.bfloat16), want)
    switch(m, False, exact=True)
    assert error(answers(m, xs, None), want) < noise/5

class Fickle(nn.Module):
    "Answers a little differently the second time"
    def __init__(self, m, by): super().__init__(); self.m,self.by,self.calls = m,by,0
    def forward(self, x):
        self.calls += 1
        return self.m(x)*(1+self.by*(self.calls>1))

@pytest.mark.parametrize('amp', [None,torch.bfloat16], ids=['float32','bfloat16'])
@pytest.mark.parametrize('half', 'fg')
@nets
def test_a_wrong_repetition_is_reported(make, half, amp):
    "By one part in a hundred, which other checks would take for rounding of bfloat16"
    m,xs = make(rate=0, dtype=torch.float32)
    for s in sequences(m): s.chunk = None
    put(m, half, 1, Fickle(getattr(blocks_of(m)[1], half), .01))
    switch(m, True, exact=True)
    with pytest.raises(RuntimeError, match=r'the backward pass through blocks? .*did not come '
                                           r'back.*set_reversible\(False\)'): answers(m, xs, amp)

def test_streams_that_leave_the_grid_are_reported():
    m,xs = stack(3, dtype=torch.float32),[1e5*x for x in streams(dtype=torch.float32)]
    switch(m, True, exact=True)
    with pytest.raises(RuntimeError, match='beyond 1,024'): answers(m, xs, None)

def test_refused_for_streams_without_enough_digits():
    m,xs = stack(2, dtype=torch.bfloat16),streams(dtype=torch.bfloat16)
    switch(m, True, exact=True)
    with pytest.raises(ValueError, match='float32 or float64, got torch.bfloat16'): m(*xs)
    switch(m, True)
    assert all(o.isfinite().all() for o in m(*xs))

# ---------------------------------------------------------------- the dial

@pytest.mark.parametrize('rate', [0,1])
@nets
def test_gradients_at_every_setting(make, rate):
    m,xs = make(rate=rate)
    switch(m, False)
    want = answers(m, xs, None)
    for keep in (.02,.06,.12,.3,.7,1.):
        switch(m, True, keep=keep)
        assert error(answers(m, xs, None), want) < 1e-12, keep

def test_what_is_kept_grows_with_the_dial_and_stays_below_it():
    m,xs = vit(6, 2, 0, torch.float32, b=8)
    def kept(): return saved_bytes(lambda: loss_of(m, xs), m, *xs)
    m.set_reversible(False)
    everything = kept()
    m.set_reversible(True)
    least,found = kept(),[]
    for keep in (0.,.03,.07,.2,.4,.7,1.):
        m.set_reversible(True, keep=keep)
        found.append(kept())
        assert found[-1] <= 1.1*(least+keep*(everything-least)), keep
    assert found==sorted(found) and found[0]==least and found[-1]>=.95*everything
    m.set_reversible(True, keep=.07)
    plan = m.blocks.plan(torch.empty(8, 16, 32))
    assert (plan.x2,plan.whole)==(6,0) and 'second stream of 6' in str(plan)

@pytest.mark.parametrize('bad', [-.1,1.1])
def test_a_share_is_from_0_to_1(bad):
    for m in (stack(2),vit(2, 2)[0],CASES['clip5']()[0]):
        with pytest.raises(ValueError, match='keep is a share'): m.set_reversible(True, keep=bad)

# ---------------------------------------------------------------- memory

@pytest.mark.parametrize('drop', [0.,.1])
@pytest.mark.parametrize('exact', [False,True])
def test_four_streams_at_the_peak(drop, exact):
    """At any depth, with dropout too; in streams an image, whose generator states (5,056 bytes a part of a half) are
    left out"""
    def peak(depth):
        torch.manual_seed(0)
        m = RevViT(img_size=64, patch_size=8, embed_dim=64, num_heads=2, depth=depth, num_classes=2,
                   proj_drop_rate=drop, chunk=8)
        m.set_reversible(True, exact=exact)
        def measure(b):
            x = torch.randn(b, 3, 64, 64)
            def step(): m(x).square().sum().backward()
            step()
            return peak_bytes(step) - (2*depth*5056*(b//8) if drop else 0)
        return per_image(measure, 32, 64)/(64*64*4)
    a,b = peak(2),peak(6)
    assert max(a, b) < 4.2 and abs(a-b) < .05, (a,b)

@pytest.mark.parametrize('depth', [12,48,pytest.param(1000, marks=pytest.mark.slow)])
def test_four_streams_at_the_peak_of_deep_networks(depth):
    m = RevViT(img_size=32, patch_size=8, embed_dim=64, num_heads=2, depth=depth, num_classes=2, chunk=4)
    def measure(b):
        x = torch.randn(b, 3, 32, 32)
        def step(): m(x).square().sum().backward()
        step()
        return peak_bytes(step)
    streams = per_image(measure, 8, 16)/(16*64*4)
    assert 3.9 < streams < 4.1, streams

def test_a_further_block_keeps_nothing():
    def kept(depth):
        m,xs = vit(depth, 2, 0, torch.float32)
        return saved_bytes(lambda: loss_of(m, xs), m, *xs)
    assert kept(12)-kept(3) <= 9*1000

@pytest.mark.parametrize('exact', [False,True])
def test_a_sample_dropped_whole_is_no_alarm(exact):
    "It begins as zero, and what comes back is rounding and nothing else"
    m,xs = sequence(6, 2, dtype=torch.float32)
    xs = [x.clone().index_fill_(0, torch.tensor([1]), 0.).requires_grad_() for x in xs]
    m.set_reversible(True, exact=exact)
    loss_of(m, xs).backward()

@pytest.mark.parametrize('frames', [1,4])
def test_samples_dropped_whole_between_stages(frames):
    """They begin a stage as zero, and every norm makes much of what rounding leaves of them: the exact mode is the
    default there (1 % of the gradient without it)"""
    from revvit import RevMViT
    torch.manual_seed(0)
    clips = dict(num_frames=frames, patch_kernel=(3,3,3), patch_stride=(2,2,2),
                 pool_kernel=(3,3,3)) if frames>1 else dict(patch_kernel=(3,3), patch_stride=(2,2))
    m = RevMViT(img_size=32, embed_dim=8, depth=12, stage_starts=(1,4), kv_stride=(1,2,2), num_classes=5,
                drop_path_rate=.6, shared_drop_path=True, drop_whole=True, **clips)
    assert [o.from_zero for o in m.stages] == [False,True,True] and m.stages[1][:2].from_zero
    xs = (torch.randn(8, 3, 32, 32) if frames==1 else torch.randn(8, 3, frames, 32, 32),)
    got = grads(m, xs)
    m.set_reversible(False)
    assert error(got, grads(m, xs)) < 1e-5
    m.set_reversible(False, exact=False)
    assert error(got, grads(m, xs)) < 5e-3   # the grid moves the function by its rounding, and narrow norms enlarge it

# ---------------------------------------------------------------- what the self-check sees

def _rows(x): return x.flip(1)
def _centred(x): return 1.1*x
def _exchanged(x): return x[:,[1,0,2,3,4]]
def _smaller(x): return x*torch.tensor([1.,.99,1.])[:,None,None]

@pytest.mark.parametrize('change', [_rows,_centred,_exchanged,_smaller])
def test_a_stream_that_came_back_otherwise(change):
    "In another order; with a plain sum of zero before and after; one image of three"
    x = torch.randn(3, 5, 4, generator=torch.Generator().manual_seed(0))
    if change is _centred: x -= x.mean(-1, keepdim=True)
    start = Start((x,), 'a run')
    assert start.message(start.errors((x*(1+1e-6),))) is None
    assert 'a run did not come back' in start.message(start.errors((change(x),)))

def test_one_step_of_the_grid_is_seen_and_what_is_not_finite_speaks_for_itself():
    x = Snap.apply(torch.randn(3, 5, 4, generator=torch.Generator().manual_seed(0)), torch.float32)
    start = Start((x,x), 'a run', True)
    assert [int(start.errors(o).sum()) for o in ((x,x),(x,x+2**-14))]==[0,3]
    nan = x.clone()
    nan[0] = torch.nan
    assert start.message(start.errors((nan,x))) is None

def test_what_becomes_of_the_sentence():
    with pytest.raises(ValueError, match="one of warn, error, off, got 'on'"): set_self_check('on')
    assert [set_self_check(o) for o in ('warn','off','error')]==['error','warn','off']
