"""The coupling that leans on the newer stream: the same bits as with stored activations, the formula's gradients,
memory that grows by bits alone, and rewired models that stay near the plain ones."""
import copy, pickle, warnings
from contextlib import nullcontext

import pytest, timm, torch
from torch import nn
import revvit
from revvit.core.block import ReversibleBlock
from revvit.core.context import PerImage
from revvit.core.memory import saved_bytes
from revvit.core.near import lean_off, lean_on, near_mean
from revvit.core.sequence import ReversibleSequence
from revvit.core.testing import drift
from cases import error, mlp

nears = pytest.mark.parametrize('near', (.5,.25))

pytestmark = pytest.mark.usefixtures('strict')

def blocks(depth, p=0., drop_path=0., dtype=torch.float32):
    torch.manual_seed(0)
    return [ReversibleBlock(mlp(5, p), mlp(5, p), drop_path).to(dtype) for _ in range(depth)]

def answers(seq, amp=False, n=7, **context):
    "Streams, and gradients of the input and of the weights"
    dtype = next(seq.parameters()).dtype
    torch.manual_seed(1)
    x = torch.randn(n, 3, 5, dtype=dtype, requires_grad=True)
    with torch.autocast('cpu', torch.bfloat16) if amp else nullcontext(): ys = seq(x, x, **context)
    loss = ys[0].square().sum()+ys[1].sin().sum()
    return *ys,*torch.autograd.grad(loss, [x, *seq.parameters()], allow_unused=True)

@nears
@pytest.mark.parametrize('depth', (1,2,5))
@pytest.mark.parametrize('chunk', (None,1,3))
@pytest.mark.parametrize('p,drop_path', ((0.,0.),(.2,.4)))
@pytest.mark.parametrize('keep', (0.,.3))
@pytest.mark.parametrize('dtype,amp', ((torch.float32,False),(torch.float32,True),(torch.float64,False)))
def test_the_bits_of_stored_activations(near, depth, chunk, p, drop_path, keep, dtype, amp):
    seq = ReversibleSequence(blocks(depth, p, drop_path, dtype), chunk, near=near)
    seq.set_reversible(True, keep)
    got = answers(seq, amp)
    seq.set_reversible(False, exact=True)
    assert all(torch.equal(a, b) for a,b in zip(got, answers(seq, amp), strict=True))

@nears
@pytest.mark.parametrize('depth', (1,4))
def test_the_formulas_gradients(near, depth):
    bs = blocks(depth, dtype=torch.float64)
    class Formula(nn.ModuleList):
        def forward(self, x1, x2):
            for b in self:
                x1 = near*x1 + (1-near)*x2 + (1+near)*b.f(x2)
                x2 = near*x2 + (1-near)*x1 + (1+near)*b.g(x1)
            return x1,x2
    assert error(answers(ReversibleSequence(bs, near=near)), answers(Formula(bs))) < 1e-9

@nears
def test_off_the_grid_it_is_the_formula(near):
    seq = ReversibleSequence(blocks(3, dtype=torch.float64), near=near)
    want = answers(seq)
    seq.set_reversible(False)
    assert error(answers(seq), want) < 1e-9

@nears
@pytest.mark.parametrize('shape', ((1,1),(3,7),(2,5,11),(2,3,40000)))
@pytest.mark.parametrize('dtype', (torch.float32,torch.float64))
def test_there_and_back(near, shape, dtype):
    torch.manual_seed(0)
    a,b = (torch.randn(2, *shape)*50).to(dtype).mul(2**14).round()/2**14
    was = a.clone()
    lost = lean_on(a, b, near)
    assert not torch.equal(a, was)
    lean_off(a, b, near, lost)
    assert torch.equal(a, was)
    assert lost.numel()==-(-a.numel()*round(1/near)//16)   # one bit, or two

@nears
def test_what_is_kept_grows_by_bits(near):
    def kept(depth):
        seq,x = ReversibleSequence(blocks(depth), near=near),torch.randn(16, 3, 5)
        return saved_bytes(lambda: seq(x, x), seq)
    each = 2*16*3*5*round(1/near)//16
    assert kept(9)-kept(4)==5*each

@nears
def test_context(near):
    class Plus(nn.Module):
        def __init__(self): super().__init__(); self.lin = nn.Linear(5, 5)
        def forward(self, x, memory): return self.lin(x).tanh()*memory
    def run(on):
        torch.manual_seed(0)
        bs = [ReversibleBlock(Plus(), mlp(5), .3, f_takes=('memory',)) for _ in range(3)]
        seq = ReversibleSequence(bs, 2, near=near)
        seq.set_reversible(on, exact=True)
        memory = torch.randn(7, 3, 5, requires_grad=True)
        ys = answers(seq, memory=PerImage(memory))
        x = torch.randn(7, 3, 5)
        torch.manual_seed(2)
        return *ys,*torch.autograd.grad(sum(o.sin().sum() for o in seq(x, x, memory=PerImage(memory))), memory)
    assert all(torch.equal(a, b) for a,b in zip(run(True), run(False), strict=True))

@nears
def test_one_stream_without_a_gradient(near):
    seq = ReversibleSequence(blocks(2), near=near)
    def one(k, on):
        seq.set_reversible(on, exact=True)
        torch.manual_seed(1)
        x = torch.randn(7, 3, 5)
        return torch.autograd.grad(seq(x, x)[k].sin().sum(), [*seq.parameters()], allow_unused=True)
    for k in (0,1):
        for a,b in zip(one(k, True), one(k, False), strict=True): assert a is b is None or torch.equal(a, b)

@nears
def test_twice_through_one_graph(near):
    seq,x = ReversibleSequence(blocks(3), near=near),torch.randn(4, 3, 5)
    loss = sum(o.square().sum() for o in seq(x, x))
    first,second = (torch.autograd.grad(loss, [*seq.parameters()], retain_graph=True) for _ in range(2))
    assert all(torch.equal(a, b) for a,b in zip(first, second, strict=True))

@nears
def test_a_block_with_a_hook_goes_by_ordinary_autograd(near):
    seq = ReversibleSequence(blocks(3, dtype=torch.float64), near=near)
    want = answers(seq)
    seq[1].register_forward_hook(lambda *args: None)
    with pytest.warns(RuntimeWarning, match='block 1 goes by ordinary autograd'): got = answers(seq)
    assert error(got, want) < 1e-9

@nears
def test_another_answer_is_noticed(near):
    class Fickle(nn.Module):
        n = 0
        def __init__(self): super().__init__(); self.lin = nn.Linear(5, 5)
        def forward(self, x): self.n += 1; return self.lin(x)+self.n
    seq = ReversibleSequence([*blocks(1), ReversibleBlock(Fickle(), mlp(5)), *blocks(1)], near=near)
    with pytest.raises(RuntimeError, match='did not come back to what the forward pass computed'): answers(seq)

def test_a_fault_in_the_bits_is_noticed(monkeypatch):
    from revvit.core import half
    monkeypatch.setattr(half, 'lean_off', lambda old, new, near, lost: lean_off(old, new, near, lost^1))
    with pytest.raises(RuntimeError, match='did not come back'): answers(ReversibleSequence(blocks(2), near=.5))

@nears
def test_no_number_stays_none(near):
    seq = ReversibleSequence(blocks(2), near=near)
    x = torch.randn(4, 3, 5)
    x[0,0,0] = float('nan')
    assert seq(x, x)[0][0].isnan().any() and seq(x, x)[0][1:].isfinite().all()

@pytest.mark.parametrize('near', (0,.3,1,2,'half',[.5]))
def test_shares_that_are_none(near):
    with pytest.raises(ValueError, match=r'near must be None, 0\.5 or 0\.25, got'): ReversibleSequence(near=near)
    with pytest.raises(ValueError, match=r'near must be None, 0\.5 or 0\.25, got'): revvit.reversible(vit(), near=near)

@nears
def test_what_the_grid_wants(near):
    seq,m = ReversibleSequence(blocks(2), near=near),revvit.reversible(vit(), near=near)
    for o in (seq,m):
        with pytest.raises(ValueError, match='leave exact=False out'): o.set_reversible(True, exact=False)
        o.set_reversible(False, exact=False)
    x = torch.randn(2, 3, 5)
    with pytest.raises(ValueError, match='kept for gradients alone'): seq.inverse(x, x)
    seq = ReversibleSequence(blocks(2), near=near).bfloat16()
    with pytest.raises(ValueError, match='needs streams in float32 or float64, got torch.bfloat16'): answers(seq)
    with torch.no_grad(): assert seq(x.bfloat16(), x.bfloat16())[0].dtype==torch.bfloat16

def vit(dtype=torch.float32, **kwargs):
    "A small timm ViT whose blocks weigh as much as learned ones"
    torch.manual_seed(0)
    size = dict(img_size=16, patch_size=4, embed_dim=32, num_heads=2, depth=4, num_classes=10) | kwargs
    m = timm.create_model('vit_tiny_patch16_224', **size).to(dtype)
    with torch.no_grad():
        for p in m.blocks.parameters(): p.mul_(2 if p.ndim>1 else 1)
    return m

def gradients(m, amp=False):
    torch.manual_seed(1)
    x = torch.randn(5, 3, 16, 16, dtype=next(m.parameters()).dtype, requires_grad=True)
    with torch.autocast('cpu', torch.bfloat16) if amp else nullcontext(): y = m(x)
    return y,*torch.autograd.grad(y.square().sum(), [x, *m.parameters()])

@nears
@pytest.mark.parametrize('amp', (False,True))
@pytest.mark.parametrize('kwargs', (dict(),dict(drop_path_rate=.3, proj_drop_rate=.1),dict(init_values=.1)))
def test_rewired_and_near(near, amp, kwargs):
    m = revvit.reversible(vit(**kwargs), near=near).train()
    got = gradients(m, amp)
    m.set_reversible(False, exact=True)
    assert all(torch.equal(a, b) for a,b in zip(got, gradients(m, amp), strict=True))

@pytest.mark.parametrize('name', ('swin_tiny_patch4_window7_224','eva02_tiny_patch14_224','beit_base_patch16_224'))
def test_other_kinds_of_blocks(name):
    swin = dict(img_size=56, embed_dim=24, depths=(2,2), num_heads=(2,4))
    small = swin if 'swin' in name else dict(img_size=28, embed_dim=36, depth=3, num_heads=3)
    torch.manual_seed(0)
    m = revvit.reversible(timm.create_model(name, num_classes=3, **small).double(), near=.5).train()
    x = torch.randn(2, 3, small['img_size'], small['img_size'], dtype=torch.float64)
    def run(): torch.manual_seed(3); return torch.autograd.grad(m(x).square().sum(), [*m.parameters()])
    got = run()
    m.set_reversible(False)
    assert error(got, run()) < 1e-8

def test_nearer_than_rewired():
    m,x = vit().eval(),torch.randn(5, 3, 16, 16)
    with torch.no_grad():
        want,far = m(x),[]
        for o in (None,.5,.25): far.append(error((revvit.reversible(copy.deepcopy(m), near=o)(x),), (want,)))
    assert far[0] > 2*far[1] > 3*far[2] > 0, far

@nears
def test_what_else_a_model_is_asked(near):
    m,x = revvit.reversible(vit().eval(), near=near),torch.randn(2, 3, 16, 16)
    with torch.no_grad(): want = m(x)
    for o in (copy.deepcopy(m),pickle.loads(pickle.dumps(m))):
        with torch.no_grad(): assert torch.equal(o(x), want)
    torch.testing.assert_close(torch.export.export(m, (x,)).module()(x), want, rtol=1e-3, atol=1e-3)   # no grid there
    with torch.no_grad(): last,maps = m.forward_intermediates(x, indices=[1,3], norm=True)
    torch.testing.assert_close(maps[-1].flatten(2).mT, last[:,1:])
    assert m.state_dict().keys()==vit().state_dict().keys()
    back = revvit.plain(m)
    with torch.no_grad(): assert torch.equal(back(x), vit().eval()(x))
    assert not any(hasattr(o, 'near') for o in back.modules())

def test_the_streams_as_one():
    a,b = torch.randn(2, 3, 4)
    assert torch.equal(near_mean(a, b, None), (a+b)/2)
    torch.testing.assert_close(near_mean(a, b, .5), (2*b+a)/3)

@nears
@pytest.mark.parametrize('amp', (False,True))
def test_compiled(near, amp):
    m = revvit.reversible(vit(), near=near).train()
    want,got = gradients(m, amp),gradients(torch.compile(m, backend='eager'), amp)
    assert all(torch.equal(a, b) for a,b in zip(got, want, strict=True))

@nears
@pytest.mark.filterwarnings('ignore::torch.jit.TracerWarning') # sizes become constants
def test_traced(near):
    m,x = revvit.reversible(vit().eval(), near=near),torch.randn(2, 3, 16, 16)
    traced = torch.jit.trace(m, x, check_trace=False)   # of which the grid is no part
    assert not {'floor','Snap','_Lean'} & {n.kind().split('::')[-1] for n in traced.inlined_graph.nodes()}
    m.set_reversible(False)
    torch.testing.assert_close(traced(x), m(x))

def test_refused_before_anything_is_changed():
    m = vit()
    with pytest.raises(ValueError, match='leave exact=False out'): revvit.reversible(m, near=.5, exact=False)
    assert type(m) is type(vit()) and type(m.blocks[0]) is type(vit().blocks[0])

def test_near_by_its_name():
    seq = ReversibleSequence(blocks(2))
    seq.near = .3
    with pytest.raises(ValueError, match=r'near must be None, 0\.5 or 0\.25, got 0\.3'): answers(seq)
    seq.near = None
    seq.set_reversible(True, exact=False)
    seq.near = .25
    with pytest.raises(ValueError, match='leave exact=False out'): answers(seq)

def test_a_block_that_knows_nothing_of_it():
    class Own(ReversibleBlock):
        def forward(self, x1, x2, *args, **context): return x1+self.f(x2),x2+self.g(x1)
    seq = ReversibleSequence([*blocks(1), Own(mlp(5), mlp(5))], near=.5)
    with pytest.raises(ValueError, match='block 1 has a forward of its own, which knows nothing of near'): answers(seq)

def test_drift_has_no_bits():
    x = torch.randn(2, 3, 5)
    with pytest.raises(ValueError, match='kept for gradients alone'):
        drift(ReversibleSequence(blocks(2), near=.5), x, x)

@nears
def test_no_bits_for_a_stream_that_is_kept(near):
    def kept(keep):
        seq,x = ReversibleSequence(blocks(4), near=near),torch.randn(16, 3, 5)
        seq.set_reversible(True, keep)
        return saved_bytes(lambda: seq(x, x), seq),seq.plan(x).x2
    (none,_),(some,n) = kept(0.),kept(.2)
    assert n and some-none==n*(16*3*5*4-16*3*5*round(1/near)//16)
