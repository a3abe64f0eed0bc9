"""What a repetition may do that the first call did not: answer otherwise where nothing is subtracted, draw inside
operations of others, meet a cache of weights, another mode of attention, another way through the code. Each case is
exact, refused, or warned of, at every setting of `keep`."""
import warnings

import pytest, timm, torch
from torch import nn
from torch._subclasses import FakeTensorMode
from torch.nn.utils import parametrizations, parametrize
import revvit
from revvit.core.dial import stored_bytes
from cases import *
from test_engine_surgery import Fn

keeps = pytest.mark.parametrize('keep', [0., .07, .5])
chunks = pytest.mark.parametrize('chunk', [1, 2, None])

def kept(m, keep, fn, **kw):
    "`fn()` with some activations kept"
    m.set_reversible(True, keep=keep, **kw)
    return fn()

# ---------------------------------------------------------------- a G whose answer nothing depends on

class Scaled(nn.Module):
    "An attribute is no weight, and nobody looks at it"
    def __init__(self): super().__init__(); self.lin,self.by = nn.Linear(8, 8),1.
    def forward(self, x): return self.lin(x)*self.by

def changing(half, **kw):
    m = stack(4, .2, .2, 2, lambda i: (mlp(),Scaled()) if half=='g' else (Scaled(),mlp()), **kw)
    return m,streams(dtype=kw.get('dtype', torch.float64))

def warned(f):
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter('always')
        f()
    return [str(o.message) for o in said if 'did not come back' in str(o.message)]

@keeps
@pytest.mark.parametrize('half', 'fg')
@pytest.mark.parametrize('near', [None, .5])
@pytest.mark.parametrize('exact', [False, True])
def test_another_answer_is_heard_of(keep, half, near, exact):
    "Once for a run, in every block that does not store all; the same answers are silent"
    if near and not exact: return
    m,xs = changing(half, dtype=torch.float32)
    m.near = near
    m.set_reversible(True, keep=keep, exact=exact)
    def step(by, block):
        loss = loss_of(m, xs)
        getattr(m[block], half).by = by
        try: loss.backward()
        finally: getattr(m[block], half).by = 1.
    assert not warned(lambda: step(1., 3))
    for block in (2, 3): assert len(warned(lambda: step(1.5, block)))==1, block   # .5 keeps the first ones whole

@keeps
def test_another_answer_is_an_error_where_errors_are_asked_for(keep):
    m,xs = changing('g')
    m.set_reversible(True, keep=keep)
    was = revvit.set_self_check('error')
    try:
        loss = loss_of(m, xs)
        m[3].g.by = 2.
        with pytest.raises(RuntimeError, match='did not come back'): loss.backward()
    finally: revvit.set_self_check(was)
    assert all(p.grad is None for p in m.parameters())

@keeps
@pytest.mark.parametrize('check', ['warn', 'off'])
def test_a_check_changes_no_gradient(keep, check):
    m,xs = changing('g')
    was = revvit.set_self_check(check)
    try: got = kept(m, keep, lambda: grads(m, xs))
    finally: revvit.set_self_check(was)
    assert error(got, plain(m, lambda: grads(m, xs))) < 1e-12

# ---------------------------------------------------------------- random numbers, caches, modes

@torch.library.custom_op('revvit_tests::mask', mutates_args=())
def mask(x:torch.Tensor, p:float)->torch.Tensor: return nn.functional.dropout(torch.ones_like(x), p)

@keeps
@chunks
@pytest.mark.parametrize('half', [0, 1])
def test_numbers_drawn_inside_an_operation_of_others(half, chunk, keep):
    "It bears none of the tags by which PyTorch's own say that they draw"
    def make(i):
        own = Fn(lambda m,x: x*m.w*mask(x.detach(), .5), w=8)
        return (own,mlp()) if half==0 else (mlp(),own)
    m,xs = stack(3, chunk=chunk, make=make),streams()
    want = plain(m, lambda: grads(m, xs))
    assert error(kept(m, keep, lambda: grads(m, xs)), want) < 1e-12

@keeps
@chunks
@pytest.mark.parametrize('scope', ['step', 'forward'])
@pytest.mark.parametrize('first', [True, False], ids=['used before', 'used after'])
def test_weights_that_parametrize_has_cached(first, scope, chunk, keep):
    "Also of a layer that serves outside of the run too"
    def normed(): return nn.Sequential(parametrizations.weight_norm(nn.Linear(8, 8)), nn.GELU())
    m,(x1,x2) = stack(3, chunk=chunk, make=lambda i: (normed(),normed())),streams()
    head = m[1].f[0]
    def step():
        with parametrize.cached():
            loss = weighted_sum(tuple(map(head, m(head(x1) if first else x1, x2))))
            if scope=='step': return torch.autograd.grad(loss, needing(m))
        return torch.autograd.grad(loss, needing(m))
    want = plain(m, step)
    assert error(kept(m, keep, step), want) < 1e-12

@keeps
@pytest.mark.parametrize('name', ['vit', 'image', 'clip', 'timm'])
def test_attention_draws_in_its_own_mode(name, keep):
    "timm's asks whether the attention trains, not its layer of dropout"
    if name=='timm':
        m,xs = timm.create_model('vit_tiny_patch16_224', img_size=32, patch_size=8, embed_dim=16, num_heads=2, depth=3,
                                 num_classes=3, attn_drop_rate=.5),images()
        m = revvit.reversible(m.double())
    else: m,xs = {'vit': vit, 'image': partial(mvit, (1,)), 'clip': partial(clip, (1,))}[name](4, 2)
    for o in m.modules():
        if isinstance(o, nn.Dropout): o.eval()
    torch.manual_seed(0)
    one = m(*xs)
    torch.manual_seed(1)
    assert not torch.equal(m(*xs), one)   # it draws
    want = plain(m, lambda: [*grads(m, xs), one])
    assert error(kept(m, keep, lambda: [*grads(m, xs), one]), want) < 1e-12

# ---------------------------------------------------------------- another way through the code

def routed(lost):
    "Images that are marked take another way, through a weight that is not registered"
    return lambda m,x: x*m.w*lost if (x[:,0,0]>9).any() else x*m.w

@keeps
@chunks
def test_a_gradient_that_one_part_would_lose_is_refused(chunk, keep):
    lost = torch.ones(8, dtype=torch.float64, requires_grad=True)
    for marked in (0, 2, 4):
        def make(i): return Fn(routed(lost) if i==2 else lambda m,x: x*m.w, w=8),mlp()
        m,(x1,x2) = stack(3, chunk=chunk, make=make),streams()
        for x in (x1,x2): x[marked,0,0] = 99
        m.set_reversible(True, keep=keep)
        with pytest.raises(RuntimeError, match=r'uses a tensor of shape \(8,\) that needs a gradient'):
            loss_of(m, (x1,x2)).backward()

class Energy(nn.Module):
    "An F that is a gradient itself, as in energy transformers and Hopfield layers"
    def __init__(self): super().__init__(); self.lin = nn.Linear(8, 8)
    def forward(self, x):
        with torch.enable_grad():
            if not x.requires_grad: x = x.requires_grad_()
            return torch.autograd.grad(self.lin(x).tanh().square().sum(), x, create_graph=True)[0]

@keeps
@chunks
@pytest.mark.filterwarnings('ignore:.*keeps what it computes')
def test_an_f_that_differentiates_its_input(chunk, keep):
    m,xs = stack(3, chunk=chunk, make=lambda i: (Energy(),mlp())),streams()
    want = plain(m, lambda: grads(m, xs))
    assert error(kept(m, keep, lambda: grads(m, xs)), want) < 1e-12

NAMES = dict(vit='revvit_tiny_patch16_224', image='revmvit_tiny_224', clip='revmvit_tiny_16x4_224')

@pytest.mark.parametrize('on', [True, False])
@pytest.mark.parametrize('name', NAMES)
def test_tensors_without_memory(name, on):
    "And nothing of them is left for real ones"
    def make(): return timm.create_model(NAMES[name], img_size=32, embed_dim=24, num_classes=3)
    def some(): return torch.randn(2, 3, *([16] if name=='clip' else []), 32, 32)
    with FakeTensorMode():
        m = make()
        m.set_reversible(on)
        m(some()).sum().backward()
        assert all(p.grad is not None for p in m.parameters())
    m,x = make(),some()
    agrees(m, lambda: grads(m, (x,)), 1e-4)

def test_the_dial_measures_what_is_there():
    "A first batch of none, and a start that is frozen, do not decide for all that follow"
    block,x = stack(1)[0],streams()[0]
    want = stored_bytes(stack(1)[0], x)
    assert stored_bytes(block, x[:0])==want>0
    block = stack(1)[0].requires_grad_(False)
    assert stored_bytes(block, x)<want
    assert stored_bytes(block.requires_grad_(True), x)==want

class Product(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, w): ctx.save_for_backward(x, w); return x*w
    @staticmethod
    def backward(ctx, d):
        x,w = ctx.saved_tensors
        return d*w,(d*x).sum((0,1))

@keeps
@pytest.mark.parametrize('frozen', [True, False])
@pytest.mark.parametrize('own', [True, False], ids=['own function', 'of PyTorch'])
def test_weights_in_the_place_of_frozen_ones(own, frozen, keep):
    "By `functional_call`: exact, but where a function of the user's would be given the frozen ones in the repetition"
    product = Product.apply if own else torch.mul
    m,xs = stack(3, make=lambda i: (Fn(lambda m,x: product(x, m.w), w=8),mlp())),streams()
    given = {k: (2*p.detach()).requires_grad_() for k,p in m.named_parameters()}
    m.requires_grad_(not frozen)
    def step():
        loss = weighted_sum(torch.func.functional_call(m, given, tuple(xs)))
        return torch.autograd.grad(loss, [*given.values()])
    want = plain(m, step)
    m.set_reversible(True, keep=keep)
    if not own: assert error(step(), want) < 1e-12
    else:
        with pytest.raises(RuntimeError, match=REMEDY): step()

@keeps
def test_compiled_code_of_ones_own_runs_compiled_both_times(keep):
    "Where each operation is watched, the compiler would stand aside, and its masks would be others in the repetition"
    calls = []
    def backend(graph, inputs):
        def run(*args): calls.append(1); return graph(*args)
        return run
    class Own(nn.Module):
        def __init__(self): super().__init__(); self.lin = nn.Linear(8, 8)
        def forward(self, x): return nn.functional.dropout(self.lin(x), .3, self.training)
    torch._dynamo.reset()
    m,xs = stack(2, chunk=5, make=lambda i: (mlp(),Own())),streams()
    for o in m: o.g.compile(backend=backend)
    m.set_reversible(True, keep=keep)
    loss = loss_of(m, xs)
    forwards = len(calls)
    loss.backward()
    assert forwards>=2 and len(calls)>forwards
    torch._dynamo.reset()
