"""What users of the engine rely on and no requirement names: odd halves and streams, hooks, surgery, and other
features of PyTorch"""
import copy, threading, warnings
from contextlib import contextmanager
from functools import partial

import pytest, torch
from torch import nn
from torch.nn.utils import prune
from torch.utils.checkpoint import checkpoint
from revvit.core.block import ReversibleBlock
from revvit.core.dial import chunk_size
from revvit.core.sequence import ReversibleSequence
from revvit.models.layers import MlpHalf
from revvit.core.testing import check_grads, check_inverse, weighted_sum
from cases import *


class Fn(nn.Module):
    "A function as a module, with parameters of its own"
    def __init__(self, fn, **shapes):
        super().__init__()
        self.fn = fn
        for k,s in shapes.items(): setattr(self, k, nn.Parameter(torch.randn(s)/2))
    def forward(self, x): return self.fn(self, x)

class First(nn.Module):
    "The first of what `m` returns, fed `x` as often as it wants"
    def __init__(self, m, n=1): super().__init__(); self.m,self.n = m,n
    def forward(self, x): return self.m(*[x]*self.n)[0]

class Nested(nn.Module):
    "An F that is a sequence itself"
    def __init__(self): super().__init__(); self.seq = stack(2, .3, .2, chunk=1)
    def forward(self, x): return sum(self.seq(x, x.flip(-1)))

def tied():
    m = nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 8))
    m[2].weight = m[0].weight
    return m
def no_grad_part(m, x):
    with torch.no_grad(): z = (x*m.w).sin()
    return x*z*m.v

# all of them look at each image alone; some do odd things with what they are given
HALVES = dict(tied=tied, unused=lambda: Fn(lambda m,x: x*m.w, w=8, unused=3),
    constant=lambda: Fn(lambda m,x: m.w.expand(x.shape), w=(3,8)), ones=lambda: Fn(lambda m,x: torch.ones_like(x)),
    identity=nn.Identity, view=lambda: Fn(lambda m,x: x.view_as(x)), flip=lambda: Fn(lambda m,x: x.flip(-1)),
    expanded=lambda: Fn(lambda m,x: x[...,:1].expand(x.shape)), detached=lambda: Fn(lambda m,x: x.detach()),
    alias=lambda: Fn(lambda m,x: x+m.w+m.v, w=(1,3,8), v=(1,3,8)), scalar=lambda: Fn(lambda m,x: x*m.w, w=()),
    pieces=lambda: Fn(lambda m,x: x@torch.cat((m.w,m.v)), w=(4,8), v=(4,8)), no_grad=lambda: Fn(no_grad_part, w=8, v=8),
    weight_norm=lambda: nn.utils.parametrizations.weight_norm(nn.Linear(8, 8)),
    weight_norm2=lambda: nn.utils.weight_norm(nn.Linear(8, 8)),
    orthogonal=lambda: nn.utils.parametrizations.orthogonal(nn.Linear(8, 8)),
    lstm=lambda: First(nn.LSTM(8, 8, batch_first=True)),
    attention=lambda: First(nn.MultiheadAttention(8, 2, dropout=.2, batch_first=True), 3),
    encoder=lambda: nn.TransformerEncoderLayer(8, 2, 16, batch_first=True),
    checkpointed=lambda: Fn(lambda m,x: checkpoint(m.inner, x, use_reentrant=False)), nested=Nested)

@pytest.mark.filterwarnings('ignore:.*weight_norm:FutureWarning')
@pytest.mark.parametrize('name', HALVES)
def test_any_f_and_g(name):
    """As F and as G, drop path on, in parts and whole, in a batch of one: tied and unused weights, no weights, views,
    aliases, parametrizations, a sequence inside"""
    def half():
        m = HALVES[name]()
        if name=='checkpointed': m.inner = mlp(p=.3)
        return m
    for chunk,b in ((1,5),(None,5),(None,1)):
        check_grads(stack(3, .3, .2, chunk, lambda i: (half(),mlp(p=.3)) if i%2 else (Tokens(8, .3),half())),
                    *streams(b))

def test_weights_shared_between_halves_blocks_and_tail():
    def same_half(i): m = mlp(p=.3); return m,m
    check_grads(stack(3, drop_path=.2, make=same_half), *streams())
    m,xs = tailed(4, 2)
    m.blocks[3].f.qkv.weight = m.blocks[0].f.qkv.weight
    m.blocks[1].g[1].weight = nn.Parameter(m.blocks[1].f.qkv.weight.detach()[:16].clone())
    m.tail.lin.weight = nn.Parameter(m.blocks[2].g[4].weight.detach()[:3].repeat(1, 1))
    m.tail.norm.bias = m.blocks[2].g[1].bias
    m.blocks[2].f.norm.bias = m.blocks[2].g[0].bias
    check_grads(m, *xs)

STREAMS = dict(rows=(lambda i: (mlp(p=.3),mlp()),(5,8)), numbers=(lambda i: (nn.Tanh(),nn.GELU()),(5,)),
    video=(lambda i: (mlp(p=.3),mlp()),(5,2,3,4,8)),
    maps=(lambda i: (nn.Sequential(nn.GroupNorm(2, 8), nn.Conv2d(8, 8, 3, padding=1), nn.GELU(), nn.Dropout2d(.3)),
                     nn.Conv2d(8, 8, 1)),(5,8,6,7)))

@pytest.mark.parametrize('make, shape', STREAMS.values(), ids=STREAMS.keys())
def test_streams_of_any_shape(make, shape):
    m,(a,b) = stack(3, 0, .2, 2, make),torch.randn(2, *shape, generator=torch.Generator().manual_seed(0),
                                                   dtype=torch.float64)
    assert 1 <= chunk_size(a)
    check_grads(m, a, b)
    check_inverse(m, a, b)
    if a.ndim==4: check_grads(m, *(o.contiguous(memory_format=torch.channels_last) for o in (a,b)))

@pytest.mark.parametrize('bad', [torch.zeros(5, 3, 8, dtype=torch.int64), torch.zeros(5, 3, 8, dtype=torch.complex64),
                                 torch.zeros(()), [1.]], ids=['integer','complex','scalar','list'])
def test_other_streams_are_refused_in_a_sentence(bad):
    for m in (stack(2), stack(2).requires_grad_(False)):
        with pytest.raises(ValueError, match='streams are floating-point tensors with images first, got'): m(bad, bad)

@pytest.mark.parametrize('needs', [(True,False),(False,True),(True,True)])
@pytest.mark.parametrize('used', [(0,),(1,),(0,1)])
def test_any_of_the_streams_may_need_a_gradient_and_be_used(needs, used):
    "Also where G of the last block then has none; and both streams may be one tensor"
    m,xs = sequence(3, 2)
    xs = [x.clone().requires_grad_(n) for x,n in zip(xs, needs)]
    def run(*xs):
        torch.manual_seed(0)
        out = m(*xs)
        return torch.autograd.grad(sum(out[i].square().sum() for i in used),
                                   [*(x for x in xs if x.requires_grad), *m.parameters()], allow_unused=True)
    agrees(m, lambda: run(*xs))
    if all(needs): agrees(m, lambda: run(xs[0], xs[0])[1:])

@pytest.mark.parametrize('rate', [0, 1], ids=['all kept','dropout and drop path'])
@pytest.mark.parametrize('chunk', [2, None])
def test_outputs_may_be_changed_in_place(chunk, rate):
    "Nothing that the backward pass needs is lost; with stored activations PyTorch refuses, as of any residual stream"
    m,xs = sequence(3, chunk, rate=rate)
    def run(change, seed):
        torch.manual_seed(seed)
        y1,y2 = change(*m(*xs))
        y1.mul_(2); y2[0] = 0; y1 += y2
        return torch.autograd.grad(weighted_sum((y1,y2)), needing(m))
    def untouched(*ys): return ys
    def copies(*ys): return [y.clone() for y in ys]
    for seed in range(4):   # with some drop path spares all images of the last block, with others not
        want = plain(m, lambda: run(copies, seed))
        assert error(run(untouched, seed), want) < 1e-12
        try: got = plain(m, lambda: run(untouched, seed))
        except RuntimeError as e: assert 'modified by an inplace operation' in str(e)
        else: assert rate and error(got, want) < 1e-12

def test_float16_streams():
    m,xs = sequence(3, 2, dtype=torch.float16)
    assert error(grads(m, xs), plain(m, lambda: grads(m, xs))) < 1e-2

@few
def test_gradcheck(make):
    m,xs = make(rate=0, b=2)
    assert torch.autograd.gradcheck(lambda *o: m(*o[:len(xs)]), (*(x.requires_grad_() for x in xs), *m.parameters()),
                                    fast_mode=True)

# --- what cannot be repeated is refused, and says so

def captured(kind):
    "A sequence whose F of block 1 or tail uses a tensor that is neither its input nor its parameter"
    w = torch.randn(8, dtype=torch.float64, requires_grad=True)
    m,tail = stack(3, make=lambda i: (Fn(lambda m,x: x.sin()*(m.context if m.context is not None else 1.)),mlp())),None
    for b in m: b.f.context = None
    if kind=='list': m[1].f.fn = lambda m,x: x.sin()*w
    if kind=='computed': m[1].f.context = (w*2).exp()
    if kind=='tail':
        class Tail(nn.Module):
            def forward(self, x1, x2): return (x1+x2)*w
        tail = Tail()
    return m,tail,w

@pytest.mark.parametrize('kind', ['list','computed','tail'])
def test_a_gradient_that_would_be_lost_is_refused(kind):
    "A condition from another network, a weight that is not registered: plain autograd would give it a gradient"
    m,tail,w = captured(kind)
    def run(): return weighted_sum(m(*streams(), tail=tail))
    assert plain(m, lambda: torch.autograd.grad(run(), w)[0].any())
    m,tail,w = captured(kind)
    with pytest.raises(RuntimeError, match=rf"{'the tail' if tail else 'f of block 1'} uses a tensor of shape \(8,\) "
                                           rf"that needs a gradient.*{REMEDY}"): run().backward()
    assert all(p.grad is None for p in m.parameters())
    with torch.no_grad(): w.requires_grad_(False)
    if kind=='list': agrees(m, lambda: torch.autograd.grad(run(), needing(m)))

def noisy(m, x):
    "Noise for images that are marked"
    return x*m.w*torch.rand_like(x) if (x[:,0,0]>9).any() else x*m.w

def test_noise_that_some_parts_draw_and_others_do_not():
    m,(x1,x2) = stack(2, chunk=1, make=lambda i: (Fn(noisy, w=8),mlp())),streams()
    x2[3,0,0] = 10
    other = copy.deepcopy(m)
    for m.chunk in (1,2,None):
        other.chunk = m.chunk
        m.set_reversible(True, exact=True)
        other.set_reversible(False, exact=True)   # goes part by part, whoever draws
        check_grads(m, x1, x2, reference=other)
        m.set_reversible(True)
        def seeded(*xs): torch.manual_seed(0); return m(*xs)
        assert torch.autograd.gradcheck(seeded, (x1.requires_grad_(), x2.requires_grad_()), fast_mode=True)

def test_a_parameter_with_other_memory_is_refused():
    "As moving a model or swapping averaged weights makes it; the version of the parameter does not tell"
    m,xs = sequence(3, 2)
    loss = loss_of(m, xs)
    m[1].f.qkv.weight.data = m[1].f.qkv.weight.data*2
    with pytest.raises(RuntimeError, match="'qkv.weight' in f of block 1 was changed"): loss.backward()

def test_backward_in_inference_mode_or_inside_another_is_refused():
    m,xs = sequence(3, 2)
    loss = loss_of(m, xs)
    with torch.no_grad(): agrees(m, lambda: [torch.autograd.grad(loss, needing(m), retain_graph=True)[0]])
    with torch.inference_mode(), pytest.raises(RuntimeError, match=f'in inference_mode.*{REMEDY}'):
        loss.backward(retain_graph=True)
    inner = []
    def hook(g):
        if not inner: inner.append(1); torch.autograd.grad(loss, needing(m), retain_graph=True)
    hook = m[2].f.norm.weight.register_hook(hook)
    with pytest.raises(RuntimeError, match='two backward passes through one reversible run at a time'):
        loss.backward(retain_graph=True)
    hook.remove()
    assert all(p.grad is None for p in m.parameters())
    assert same(torch.autograd.grad(loss, needing(m)), grads(m, xs))

@pytest.mark.filterwarnings('ignore:block . goes by ordinary autograd') # test_stored has the warning
@pytest.mark.parametrize('fault', [KeyError, KeyboardInterrupt])
def test_an_interrupt_and_a_hooked_block_leave_no_gradients_either(fault):
    for hooked in (None,2,3):
        m,xs = sequence(5, None)
        m[0].f = Trap(m[0].f, 2, error=fault)
        if hooked is not None: m[hooked].register_forward_hook(lambda *o: None)
        loss = loss_of(m, xs)
        with pytest.raises(fault): loss.backward()
        assert all(p.grad is None for p in m.parameters())

def test_wrong_blocks_and_tails_are_refused_in_a_sentence():
    for call,words in ((lambda: ReversibleBlock(torch.square, nn.GELU()),'f must be a module, got'),
        (lambda: ReversibleSequence([], chunk=0),'at least 1 image, got 0'),
        (lambda: ReversibleBlock(mlp(), mlp(), 1.),'at least 0 and below 1, got 1.0'),
        (lambda: stack(2)(*streams(), tail=lambda a,b: a+b),'tail must be a module, got function'),
        (lambda: stack(2)(*streams(), tail=nn.CosineSimilarity(0)),'one tensor with a row for each image'),
        (lambda: stack(2, make=lambda i: (nn.Linear(8, 7),mlp()))(*streams()),r'f of block 0 returned .* 3, 7\)'),
        (lambda: stack(2, make=lambda i: (mlp(),nn.ReLU(inplace=True)))(*streams()),'g of block 0 '
         'changed its input in place'), (lambda: stack(2, .3)[0].inverse(*streams()),r'call eval\(\) first')):
        with pytest.raises((ValueError,RuntimeError), match=words): call()

# --- hooks, and lists of blocks

@pytest.mark.filterwarnings('ignore:block . goes by ordinary autograd') # test_stored has the warning
def test_hooks_may_replace_what_they_see():
    m,xs = sequence(5, 2)
    m[0].f.register_forward_hook(lambda m,i,o: o*2)
    m[0].g.register_forward_pre_hook(lambda m,i: (i[0]*.5,))
    m[1].f.register_full_backward_hook(lambda m,gi,go: (gi[0]*3,))
    m[1].g.register_full_backward_pre_hook(lambda m,go: (go[0]*3,))
    check_grads(m, *xs)
    m[2].register_forward_hook(lambda m,i,o: (o[0]*2,o[1])) # a whole block: by ordinary autograd, between two runs
    m[4].register_forward_pre_hook(lambda m,i: (i[1],i[0]))
    check_grads(m, *xs)

@pytest.mark.filterwarnings('ignore:block . goes by ordinary autograd') # test_stored has the warning
def test_a_block_with_its_own_forward():
    class Crossed(ReversibleBlock):
        def forward(self, x1, x2): return super().forward(x1, x2)[::-1]
    m,xs = sequence(4, 2)
    m[1] = Crossed(Tokens(8, .3), mlp(), .2).double()
    check_grads(m, *xs)
    assert error(m.eval()(*xs), plain(m, lambda: m(*xs))) < 1e-12

def test_lists_of_blocks_can_be_changed():
    m,xs = sequence(3, 2)
    def new(): return ReversibleBlock(Tokens(8, .3), mlp(), .2).double()
    m.append(new()); m.insert(1, new()); m[0] = new(); m.extend([new()])
    del m[2]; m.pop(0); m += stack(2)
    assert len(m)==6 and len(list(m))==6
    check_grads(m, *xs)
    for part in (m[1:4], m[::-1]):
        assert type(part) is ReversibleSequence and (part.chunk,part.reversible)==(m.chunk,m.reversible)
        check_grads(part, *xs)
    assert m[1:1](*xs)[0] is xs[0]

def test_sequences_one_after_another_and_in_other_modes():
    s,t = stack(3, .3, .2),stack(4, .3, .2, None)
    xs = streams()
    def run(rs, rt):
        s.set_reversible(rs); t.set_reversible(rt)
        torch.manual_seed(0)
        y = s(*xs)
        z = t(y[1], y[0])
        return torch.autograd.grad(weighted_sum((*s(*z), y[0], z[1])), [*s.parameters(), *t.parameters()])
    want = run(False, False)
    for modes in ((True,True),(True,False),(False,True)): assert error(run(*modes), want) < 1e-12

def test_tails_with_frozen_weights_and_behind_frozen_blocks():
    m,xs = tailed(3, 2)
    m.tail.norm.requires_grad_(False)
    agrees(m, lambda: grads(m, xs))
    m.tail.requires_grad_(False)
    agrees(m, lambda: grads(m, xs))
    m.requires_grad_(True).blocks.requires_grad_(False)
    agrees(m, lambda: grads(m, xs))
    m.blocks[1].requires_grad_(True)
    agrees(m, lambda: grads(m, xs))

def changed_mlp(kind):
    "A Rev-ViT with another G in block 1 than the one that has a backward pass of its own"
    class Doubled(MlpHalf):
        def forward(self, x): return 2*super().forward(x)
    m,xs = vit(3, 2, rate=0)
    g = m.blocks[1].g
    double = lambda o: setattr(o, 'forward', lambda x, f=o.forward: 2*f(x))
    dict(other=lambda: setattr(g, 'fn', mlp(32).double()), none=lambda: setattr(g, 'fn', nn.Identity()),
         subclass=lambda: setattr(m.blocks[1], 'g', Doubled(32, copy.deepcopy(g.fn)).double()),
         own=lambda: double(g), inner=lambda: double(g.fn.fc1), dropout=lambda: setattr(g.fn, 'drop1', nn.Tanh()),
         activation=lambda: setattr(g.fn, 'act', nn.GELU('tanh')),
         hook=lambda: g.fn.fc1.register_forward_hook(lambda m,i,o: 2*o),
         weight_norm=lambda: nn.utils.parametrizations.weight_norm(g.fn.fc1),
         prune=lambda: prune.random_unstructured(g.fn.fc1, 'weight', .5),
         frozen=lambda: g.fn.fc1.bias.requires_grad_(False), eps=lambda: setattr(g.norm, 'eps', .1),
         norm=lambda: setattr(g, 'norm', nn.LayerNorm(32, elementwise_affine=False)))[kind]()
    return m,xs

@pytest.mark.parametrize('kind', 'other none subclass own inner dropout activation hook weight_norm '
                                 'prune frozen eps norm'.split())
def test_surgery_on_a_rev_vit(kind):
    m,xs = changed_mlp(kind)
    check_grads(m, *xs)

# --- other features of PyTorch

@pytest.mark.parametrize('context', [torch.autograd.graph.save_on_cpu,
                                     lambda: torch.autograd.graph.saved_tensors_hooks(lambda t: t.numpy().copy(),
                                         torch.from_numpy)], ids=['save_on_cpu','hooks'])
@few
def test_saved_tensor_hooks(make, context):
    m,xs = make()
    def run():
        with context(): return torch.autograd.grad(loss_of(m, xs), needing(m))
    agrees(m, run)
    with context(): loss = loss_of(m, xs)
    assert same(torch.autograd.grad(loss, needing(m), retain_graph=True), torch.autograd.grad(loss, needing(m)))

@pytest.mark.parametrize('reentrant', [True,False])
@few
def test_checkpoint_around(make, reentrant):
    m,xs = make()
    xs = tuple(x.requires_grad_() for x in xs)
    def run():
        torch.manual_seed(0)
        m.zero_grad()
        weighted_sum(checkpoint(m, *xs, use_reentrant=reentrant)).backward()
        return [p.grad for p in m.parameters()]
    agrees(m, run)

class Own(torch.autograd.Function):
    "Not a function of PyTorch's, so weights cannot be lent to it"
    @staticmethod
    def forward(ctx, x, w): ctx.save_for_backward(x, w); return x*w
    @staticmethod
    def backward(ctx, d): return d*ctx.saved_tensors[1],(d*ctx.saved_tensors[0]).sum(tuple(range(d.ndim-1)))

class Both(nn.Module):
    "One weight, in a function of PyTorch's and in one that is not"
    def __init__(self): super().__init__(); self.w = nn.Parameter(torch.randn(8)/2)
    def forward(self, x): return torch.tanh(x*self.w)+Own.apply(x, self.w)

@pytest.mark.parametrize('chunk', [2,None])
@pytest.mark.parametrize('way', ['as it is','no leaf','hook'])
def test_a_weight_in_a_function_of_ones_own(way, chunk):
    """Both its gradients count; with a hook on it, which would run inside and out, it is refused, and so is what was
    made of a weight"""
    m = stack(2, 0., 0., chunk, lambda i: (Both(),mlp()))
    leaves = [p for p in m.parameters()]
    if way=='no leaf':
        for b in m: b.f._parameters['w'] = b.f.w*1.1
    if way=='hook': m[0].f.w.register_hook(lambda g: g*2)
    def step(on):
        m.set_reversible(on)
        return torch.autograd.grad(weighted_sum(m(*streams(4))), leaves, retain_graph=way=='no leaf')
    if way=='as it is': assert error(step(True), step(False)) < 1e-12
    else:
        with pytest.raises(RuntimeError, match={'hook': 'f of block 0 gives a weight of shape .8,., on which there is '
                                                        'a hook', 'no leaf': 'is neither its input nor its '
                                                'parameter'}[way]): step(True)

class Second(nn.Module):
    "A tail that reads the second stream alone"
    def __init__(self): super().__init__(); self.lin = nn.Linear(8, 3)
    def forward(self, y1, y2): return self.lin(y2).mean(1)

@pytest.mark.parametrize('behind', [(), ('hook',), ('hook','own forward')], ids=' '.join)
def test_an_error_backwards_takes_back_new_gradients_alone(behind):
    """In the run where it happens: stored blocks behind it, for one reason or for two, keep theirs, and so does a
    weight that had a gradient before, with what was added to it"""
    m = stack(3+len(behind), 0., 0., 2, lambda i: (nn.Linear(8, 8), nn.Linear(8, 8)))
    for b,why in zip(m[3:], behind):
        if why=='hook': b.register_forward_hook(lambda *a: None)
        else: b.forward = b.forward
    m[0].f = trap = Trap(m[0].f)
    m[1].f.weight.grad = torch.zeros_like(m[1].f.weight)
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        loss = weighted_sum(m(*streams(4)))
    trap.at = trap.calls+1,
    with pytest.raises(KeyError, match='trap'): loss.backward()
    assert m[1].f.weight.grad.abs().sum() > 0
    had = [n for n,p in m.named_parameters() if p.grad is not None]
    assert had==['1.f.weight', *(n for n,_ in m.named_parameters() if int(n[0])>2)]

@pytest.mark.parametrize('chunk', [1,None])
def test_a_half_without_a_gradient_is_not_differentiated(chunk):
    "What works in place on what its own gradient needs has none; plain PyTorch does not mind where nobody asks for it"
    m = stack(1, 0., 0., chunk, lambda i: (nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.ReLU(inplace=True)),
                                           Fn(lambda m,x: m.w.expand(x.shape), w=(1,8))))
    tail = Second().double()
    def step(on):
        m.set_reversible(on)
        return torch.autograd.grad(weighted_sum(m(*streams(4), tail)), [*m.parameters(), *tail.parameters()],
                                   allow_unused=True)
    assert error(step(True), step(False)) < 1e-12
    assert step(True)[0] is None

class Unknown(nn.Module):
    "Draws, and has no layer that says so"
    def __init__(self): super().__init__(); self.lin = nn.Linear(8, 8)
    def forward(self, x): return self.lin(x*torch.rand_like(x))*torch.rand_like(x)

class Ending(nn.Module):
    "A tail that draws twice"
    def __init__(self): super().__init__(); self.drop,self.lin = nn.Dropout(.3),nn.Linear(8, 3)
    def forward(self, y1, y2): return self.lin(self.drop(self.drop(y1)+y2)).mean(1)

@pytest.mark.parametrize('on', [True,False])
@pytest.mark.parametrize('chunk', [1,2,None])
@pytest.mark.parametrize('half', [lambda: nn.Sequential(nn.Dropout(.3), nn.Linear(8, 8), nn.Dropout(.2)), Unknown],
                         ids=['dropout','unknown'])
@pytest.mark.parametrize('rate', [0.,.3])
def test_reentrant_checkpoint_draws_the_same(half, chunk, on, rate):
    """Its forward pass runs without a graph and its repetition with one: what both draw is what one pass with a graph
    draws"""
    torch.manual_seed(0)
    m,tail = stack(3, rate, 0., chunk, lambda i: (half(),mlp(p=.2))),Ending().double()
    m.set_reversible(on)
    xs = [x.requires_grad_() for x in streams(5)]
    leaves = [*xs, *m.parameters(), *tail.parameters()]
    def step(call):
        for o in leaves: o.grad = None
        torch.manual_seed(1)
        out = call(*xs, tail)
        weighted_sum(out).backward()
        return [out, *(o.grad for o in leaves)]
    want = step(m)
    for reentrant in (False,True): assert error(step(partial(checkpoint, m, use_reentrant=reentrant)), want) < 1e-12

@pytest.mark.filterwarnings('ignore:There is a performance drop')
@pytest.mark.parametrize('make', [CASES['tail3'], CASES['vit4'], CASES['clip5'], CASES['image7']],
                         ids=['tail3','vit4','clip5','image7'])
def test_torch_func(make):
    """Under its transforms the plain mode answers; functional_call alone stays reversible, and keeps to the weights
    it was given"""
    m,xs = make(rate=0)
    weights = {k:(v*1.1).detach().requires_grad_() for k,v in m.named_parameters()}
    def loss(ws): return weighted_sum(torch.func.functional_call(m, ws, xs))
    want = plain(m, lambda: torch.autograd.grad(loss(weights), list(weights.values())))
    assert error(torch.autograd.grad(loss(weights), list(weights.values())), want) < 1e-12
    assert error(torch.func.grad(loss)(weights).values(), want) < 1e-12
    each = torch.func.vmap(lambda *o: outputs(m(*(x[None] for x in o)))[0][0])(*xs)
    assert error([each], outputs(m(*xs))[:1]) < 1e-12
    # weights that come from others, as in meta-learning
    agrees(m, lambda: torch.autograd.grad(loss({k:v*1.1 for k,v in m.named_parameters()}), needing(m)))

@pytest.mark.filterwarnings('ignore') # they are its messages
def test_anomaly_mode():
    m,xs = tailed(3, 2)
    with torch.autograd.detect_anomaly():
        check_grads(m, *xs)
        xs[1][0] = float('nan')
        with pytest.raises(RuntimeError, match='returned nan'): loss_of(m, xs).backward()

@contextmanager
def default_dtype(dtype):
    was = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try: yield
    finally: torch.set_default_dtype(was)

@contextmanager
def deterministic():
    torch.use_deterministic_algorithms(True)
    try: yield
    finally: torch.use_deterministic_algorithms(False)

@pytest.mark.parametrize('context', [deterministic, partial(default_dtype, torch.float64),
                                     partial(default_dtype, torch.bfloat16)],
                         ids=['deterministic','float64','bfloat16'])
@few
def test_global_settings(make, context):
    m,xs = make()
    want = grads(m, xs)
    with context(): check_grads(m, *xs)
    with context(): assert error(grads(m, xs), want) < 1e-12 # the draws do not depend on them

def test_on_the_meta_device():
    "Shapes without numbers, to plan memory"
    m,xs = tailed(3, 2)
    m = m.to('meta')
    with torch.device('meta'): m(*(x.to('meta') for x in xs)).sum().backward()
    assert all(p.grad.shape==p.shape for p in m.parameters())

@few
def test_backward_from_another_thread(make):
    m,xs = make()
    want = plain(m, lambda: grads(m, xs))
    thread = threading.Thread(target=loss_of(m, xs).backward)
    thread.start(); thread.join()
    assert error([p.grad for p in m.parameters()], want) < 1e-12

@few
def test_optimizer_step_inside_backward(make):
    "Weights that change as soon as their gradient is there, one of them shared by two blocks"
    def run():
        m,xs = make()
        m.set_reversible(on)
        b = blocks_of(m)
        next(b[2].g.children()).bias = next(b[0].g.children()).bias
        @torch.no_grad()
        def step(p): p.sub_(p.grad, alpha=.01); p.grad = None
        for p in m.parameters(): p.register_post_accumulate_grad_hook(step)
        for s in range(3): loss_of(m, xs, s).backward()
        return list(m.parameters())
    on = True; got = run()
    on = False; assert error(got, run()) < 1e-12

def test_autocast_switched_inside_f():
    class Careful(nn.Module):
        def __init__(self): super().__init__(); self.a,self.b = nn.Linear(8, 8),nn.Linear(8, 8)
        def forward(self, x):
            with torch.autocast('cpu', enabled=False): x = self.a(x)
            return self.b(x)
    m,xs = stack(3, make=lambda i: (Careful(),mlp()), chunk=None, dtype=torch.float32),streams(dtype=torch.float32)
    def run():
        with torch.autocast('cpu', torch.bfloat16): return grads(m, xs)
    agrees(m, run, 1e-6)

@pytest.mark.parametrize('what', ['halves','whole'])
@few
def test_compile(make, what):
    """Compiled F and G, or the whole model with a break at the engine (the compiler's front ends; no C++ compiler
    needed)"""
    m,xs = make()
    want = plain(m, lambda: grads(m, xs))
    torch._dynamo.reset()
    run = torch.compile(m, backend='aot_eager') if what=='whole' else m
    if what=='halves':
        for b in blocks_of(m):
            for h in (b.f,b.g): h.compile(backend='aot_eager')
    for _ in range(2):
        torch.manual_seed(0)
        assert error(torch.autograd.grad(weighted_sum(run(*xs)), needing(m)), want) < 1e-12
    torch._dynamo.reset()

@pytest.mark.parametrize('strict', [True,False])
@few
def test_export(make, strict):
    m,xs = make()
    graph = torch.export.export(m.eval(), xs, strict=strict).module()
    assert error(outputs(graph(*xs)), outputs(m(*xs))) < 1e-12

# --- Rev-MViT as people use it

multiscale = pytest.mark.parametrize('make', [CASES[k] for k in ('image6','image7','clip5','clip6')],
                                     ids=['image6','image7','clip5','clip6'])

@multiscale
def test_stages_in_different_modes_and_parts(make):
    "`set_reversible` and `chunk` of each stage alone; the plain model is the same"
    m,xs = make()
    for i in range(2**len(m.stages)):
        for k,s in enumerate(m.stages): s.chunk = (1,3,None)[(i+k)%3] # masks depend on it
        want = plain(m, lambda: grads(m, xs))
        for k,s in enumerate(m.stages): s.set_reversible(bool(i>>k&1))
        assert error(grads(m, xs), want) < 1e-12

@multiscale
def test_what_is_trained_on_features(make):
    "Detectors and probes: gradients through intermediate maps, tokens, no classifier, a new one, or no pooling"
    m,xs = make()
    def through(fn):
        torch.manual_seed(0)
        return torch.autograd.grad(weighted_sum(fn(*xs)), needing(m), allow_unused=True)
    for fn in (m.forward_features, m.forward_intermediates,
               lambda x: m.forward_intermediates(x, indices=[0], intermediates_only=True),
               lambda x: m.forward_head(m.forward_features(x), pre_logits=True)):
        agrees(m, lambda: through(fn))
    for args in ((0,),(7,),(7,'')):
        m.reset_classifier(*args)
        check_grads(m.double(), *xs)

@pytest.mark.parametrize('make', [CASES['vit3'], CASES['clip5']], ids=['vit3','clip5'])
def test_replicas_of_data_parallel(make):
    "Their parameters are plain tensors that nobody registered: refused with a remedy, and right in plain mode"
    m,xs = make(rate=0)
    def replica():
        copies = {}
        for o in reversed(list(m.modules())): # as torch.nn.parallel.replicate does, which wants GPUs
            r = copies[o] = o._replicate_for_data_parallel()
            for n,c in o._modules.items():
                if c is not None: r._modules[n] = copies[c]; setattr(r, n, copies[c])
            for n,p in o._parameters.items():
                if p is None: r._parameters[n] = None
                else: setattr(r, n, p.clone())
            r._former_parameters = {}
        return copies[m]
    want = plain(m, lambda: grads(m, xs))
    with pytest.raises(RuntimeError, match=f'needs a gradient, but is neither.*{REMEDY}'):
        grads(m, xs) and torch.autograd.grad(weighted_sum(replica()(*xs)), needing(m))
    assert error(plain(m, lambda: torch.autograd.grad(weighted_sum(replica()(*xs)), needing(m))), want) < 1e-12

def test_one_stage_is_a_vision_transformer_with_pooled_keys():
    m,xs = mvit((), 3, 2)
    assert len(m.stages)==1 and not len(m.transitions)
    check_grads(m, *xs)
    check_inverse(m.eval().stages[0], *torch.randn(2, 3, 1, 8, 8, 8, dtype=torch.float64))

@multiscale
def test_weights_and_statistics_after_surgery(make):
    "Blocks added and taken away, a transition's norm replaced, weights parametrized and shared"
    m,xs = make()
    s = blocks_of(m)
    s.append(copy.deepcopy(s[0])); del s[1]
    m.transitions[0] = copy.deepcopy(m.transitions[0])
    m.transitions[0].g.norm = nn.Identity()
    nn.utils.parametrizations.weight_norm(s[0].f.fn.pool_v.conv)
    nn.utils.parametrizations.weight_norm(m.transitions[0].f.fn.qkv)
    m.transitions[0].f.fn.pool_k.norm.bias = m.transitions[0].f.fn.pool_v.norm.bias
    check_grads(m, *xs)

class Adapted(nn.Module):
    "A frozen linear layer and a trainable correction of low rank"
    def __init__(self, m):
        super().__init__()
        self.m,self.down,self.up = m.requires_grad_(False),nn.Linear(m.in_features, 2, bias=False),nn.Linear(2,
            m.out_features)
    weight,bias = property(lambda self: self.m.weight),property(lambda self: self.m.bias)
    def forward(self, x): return self.m(x) + self.up(self.down(x))

@pytest.mark.parametrize('kind', ['adapter','hook','pool_hook','prune'])
def test_surgery_inside_pooling_attention(kind):
    "What an adapter, a hook or pruning does to queries, keys and values is felt"
    m,xs = CASES['clip5'](rate=0)
    before,a = m.eval()(*xs),m.stages[0][1].f.fn
    dict(adapter=lambda: setattr(a, 'qkv', Adapted(a.qkv).double()),
         hook=lambda: a.qkv.register_forward_hook(lambda m,i,o: 2*o),
         pool_hook=lambda: a.pool_v.conv.register_forward_hook(lambda m,i,o: o**2),
         prune=lambda: prune.random_unstructured(a.pool_v.conv, 'weight', .5))[kind]()
    assert error([m(*xs)], [before]) > 1e-6
    check_grads(m.train(), *xs)
    if kind=='prune': loss_of(m, xs).backward(); check_grads(m, *xs)

def test_batch_statistics_in_a_transition_is_refused():
    m,xs = CASES['clip5']()
    m.transitions[0].g.norm = nn.BatchNorm1d(4).double()
    with pytest.raises(ValueError, match='tail.* holds BatchNorm1d.*state changes'): m(*xs)

# --- what comes in the place of a block, or out of one

ONE_STREAM = dict(first=lambda block, xs, ys: ys[0], second=lambda block, xs, ys: ys[1],
                  four=lambda block, xs, ys: (*ys, *ys), halved=lambda block, xs, ys: (ys[0][:1], ys[1][:1]))

@pytest.mark.parametrize('how', ['training','stored','eval'])
@pytest.mark.parametrize('hook', ONE_STREAM)
@pytest.mark.parametrize('at', [0,-1])
@pytest.mark.parametrize('kind', ['sequence3','vit3','clip5'])
def test_a_hook_that_returns_no_pair(kind, at, hook, how):
    "Two images were taken for two streams, behind the last block without a word"
    m,xs = CASES[kind](b=2)
    blocks = m if kind=='sequence3' else m.blocks if kind=='vit3' else m.stages[-1]
    list(blocks)[at].register_forward_hook(ONE_STREAM[hook])
    m.train(how!='eval').set_reversible(how!='stored')
    with torch.set_grad_enabled(how!='eval'), warnings.catch_warnings():
        warnings.simplefilter('ignore')
        with pytest.raises(ValueError, match=r'block \d+ gave .*, wanted both streams, each .*get and return the pair'):
            m(*xs)

@pytest.mark.parametrize('how', ['training','stored'])
@pytest.mark.parametrize('new', [nn.Identity, lambda: nn.Linear(8,8)], ids=['identity','linear'])
def test_no_block_in_the_place_of_one(new, how):
    m,xs = CASES['sequence3']()
    m[1] = new()
    m.set_reversible(how=='training')
    with pytest.raises(TypeError, match=r'block 1 is of type (Identity|Linear) and takes no two streams: '): m(*xs)

@pytest.mark.parametrize('kind', [nn.Sequential, nn.ModuleList])
def test_a_list_of_blocks_is_no_sequence(kind):
    "As people shorten other networks"
    def wrapped(blocks): return nn.Sequential(*blocks) if kind is nn.Sequential else nn.ModuleList(blocks)
    m,xs = CASES['vit3']()
    m.blocks = wrapped(list(m.blocks)[:1])
    with pytest.raises(TypeError, match=rf'blocks is of type {kind.__name__}, and .*model.blocks\[:6\] is one'): m(*xs)
    m,xs = CASES['clip5']()
    m.stages[1] = wrapped(list(m.stages[1])[:1])
    with pytest.raises(TypeError, match=rf'stages\[1\] is of type {kind.__name__}, .*model.stages\[1\]\[:6\]'): m(*xs)
