"""Code that is wrong on purpose, and what the checks of `revvit.core.testing` say of it; more of it stands in their
notebook"""
import random
from types import SimpleNamespace

import pytest, torch
from torch import nn
from torch.autograd.function import once_differentiable
from torch.testing import assert_close
from revvit.core import testing
from revvit.core.coupling import couple, uncouple
from revvit.core.testing import check_directional, check_grads, check_inverse

# ---------------------------------------------------------------- a stack that is right, as in the notebook

def branch(dim, p): return nn.Sequential(nn.Linear(dim,2*dim), nn.GELU(), nn.Dropout(p), nn.Linear(2*dim,dim))

class ToyFn(torch.autograd.Function):
    @staticmethod
    def forward(ctx, toy, x1, x2, *params):
        ctx.toy,ctx.rng = toy,[]
        y = toy.run(ctx,x1,x2)
        ctx.save_for_backward(*y)
        return y
    @staticmethod
    @once_differentiable
    def backward(ctx, d1, d2): return None, *ctx.toy.back(ctx,*ctx.saved_tensors,d1,d2)

class Toy(nn.Module):
    "A small reversible stack that is right"
    def __init__(self, depth=3, dim=4, p=0.):
        super().__init__()
        self.f,self.g = (nn.ModuleList(branch(dim,p) for _ in range(depth)) for _ in range(2))
        self.reversible = True
    def set_reversible(self, on=True): self.reversible = on
    def forward(self, x1, x2):
        return ToyFn.apply(self,x1,x2,*self.parameters()) if self.reversible else self.plain(x1,x2)
    def plain(self, x1, x2):
        for f,g in zip(self.f,self.g): x1,x2 = couple(x1,x2,f,g)
        return x1,x2
    def inverse(self, y1, y2):
        for f,g in zip(self.f[::-1],self.g[::-1]): y1,y2 = uncouple(y1,y2,f,g)
        return y1,y2
    def run(self, ctx, x1, x2):
        for f,g in zip(self.f,self.g):
            ctx.rng.append(torch.get_rng_state()); x1 = x1 + f(x2)
            ctx.rng.append(torch.get_rng_state()); x2 = x2 + g(x1)
        return x1,x2
    def again(self, m, src, dy, rng, grads):
        with torch.random.fork_rng(devices=[]), torch.enable_grad():
            torch.set_rng_state(rng)
            y = m(x:=src.detach().requires_grad_())
        ps = [p for p in m.parameters() if p.requires_grad]
        dx,*dps = torch.autograd.grad(y, [x,*ps], dy)
        grads.update(zip(ps,dps))
        return y.detach(),dx
    def step(self, i, ctx, y1, y2, d1, d2, grads):
        r,d = self.again(self.g[i], y1, d2, ctx.rng[2*i+1], grads); y2,d1 = y2-r,d1+d
        r,d = self.again(self.f[i], y2, d1, ctx.rng[2*i],   grads); y1,d2 = y1-r,d2+d
        return y1,y2,d1,d2
    def back(self, ctx, *state):
        grads = {}
        for i in reversed(range(len(self.f))): state = self.step(i,ctx,*state,grads)
        return *state[2:], *(grads.get(p) for p in self.parameters())

def make(cls=Toy, *args, **kw):
    torch.manual_seed(0)
    return cls(*args,**kw).double()

@pytest.fixture
def streams():
    gen = torch.Generator().manual_seed(1)
    return torch.randn(2, 3,5,4, dtype=torch.float64, generator=gen).unbind()

@pytest.mark.parametrize('check', [check_inverse,check_grads,check_directional])
@pytest.mark.parametrize('p', [0.,.3])
def test_what_is_right_passes(check, p, streams): assert check(make(p=p), *streams) < 1e-6

# ---------------------------------------------------------------- what is wrong

class Hidden(Toy):
    "Parameters are not arguments; `.backward()` runs inside backward"
    def forward(self, x1, x2): return ToyFn.apply(self,x1,x2) if self.reversible else self.plain(x1,x2)
    def again(self, m, src, dy, rng, grads):
        with torch.random.fork_rng(devices=[]), torch.enable_grad():
            torch.set_rng_state(rng)
            y = m(x:=src.detach().requires_grad_())
        torch.autograd.backward(y,dy)
        return y.detach(),x.grad
    def back(self, *args): return super().back(*args)[:2]

class WrongStream(Toy):
    "Recomputes G from y2 instead of y1"
    def step(self, i, ctx, y1, y2, d1, d2, grads):
        r,d = self.again(self.g[i], y2, d2, ctx.rng[2*i+1], grads); y2,d1 = y2-r,d1+d
        r,d = self.again(self.f[i], y2, d1, ctx.rng[2*i],   grads); y1,d2 = y1-r,d2+d
        return y1,y2,d1,d2

class Pollutes(Toy):
    "Calls `.backward()` inside backward and reads `.grad`"
    def again(self, m, src, dy, rng, grads):
        r = Hidden.again(self,m,src,dy,rng,grads)
        grads.update({p:p.grad.clone() for p in m.parameters()})
        return r

class NeedsInput(Toy):
    "Cuts the graph when no input needs a gradient"
    def forward(self, x1, x2):
        y = super().forward(x1,x2)
        return y if x1.requires_grad or not self.reversible else tuple(o.detach() for o in y)

class Zeros(Toy):
    "Gives a gradient of zero to a parameter it does not use"
    def __init__(self, *args, **kw): super().__init__(*args,**kw); self.idle = nn.Parameter(torch.ones(1))
    def back(self, *args): return *(torch.zeros_like(self.idle) if g is None else g for g in super().back(*args)),

class OnModule(Toy):
    "Keeps the random states on the module"
    def run(self, ctx, *xs): y = super().run(ctx,*xs); self.rng = ctx.rng; return y
    def back(self, ctx, *state): ctx.rng = self.rng; return super().back(ctx,*state)

class Reseeds(Toy):
    "Sets the global generator in its forward"
    def run(self, ctx, *xs): torch.manual_seed(7); return super().run(ctx,*xs)

class ReseedsBoth(Reseeds):
    "The same in its plain forward"
    def plain(self, *xs): return self.run(SimpleNamespace(rng=[]),*xs)

class PythonSeed(Toy):
    "Draws from Python's generator"
    def run(self, ctx, *xs): random.random(); return super().run(ctx,*xs)

class Moves(Toy):
    "Sets the global generator in its backward"
    def back(self, ctx, *state): torch.set_rng_state(ctx.rng[0]); return super().back(ctx,*state)

class Frees(Toy):
    "Empties the caller's first stream"
    def forward(self, x1, x2): return (super().forward(x1,x2), x1.untyped_storage().resize_(0))[0]

class UndoInPlace(Toy):
    "Its inverse works in the tensors it is given"
    def inverse(self, y1, y2): return y1.sub_(1),super().inverse(y1,y2)[1]

class Nan(Toy):
    "NaN on the way back, and in one gradient"
    def inverse(self, *ys): return [x*float('nan') for x in super().inverse(*ys)]
    def back(self, *args): return *(r:=super().back(*args))[:-1], r[-1]*float('nan')

class BatchNorm(Toy):
    "Updates running statistics in the recomputation too"
    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.f[0] = nn.Sequential(nn.BatchNorm1d(5), self.f[0])

WROTE = 'by autograd.grad: autograd.grad wrote into the .grad of f.0.0.weight and 23 more'
INVERSE = [(Nan,'error of nan'), (Frees,'forward changed its input x1'), (UndoInPlace,'inverse changed its input y1')]
GRADS = [(WrongStream,0.,'gradient of input 0 has a relative error of'),
         (Nan,0.,'gradient of g.2.3.bias has a relative error of nan'),
         (Hidden,0.,f'{WROTE}; gradient of f.0.0.weight is missing'), (Pollutes,0.,WROTE),
         (NeedsInput,0.,'by backward() with inputs that need no gradient: gradient of f.0.0.weight is missing'),
         (Zeros,0.,'gradient of idle is there, not so in the reference'),
         (OnModule,.3,'by backward() after another forward: gradient of input 0'),
         (Reseeds,0.,"the forward leaves torch's random state elsewhere"),
         (ReseedsBoth,0.,'it is the same after two seeds'),
         (PythonSeed,0.,"the forward leaves python's random state elsewhere"),
         (Moves,.3,"the backward moved torch's random state"), (Frees,0.,'the forward changed input 0'),
         (BatchNorm,0.,'buffer f.0.0.running_mean has a relative error')]
SLOPES = [(Hidden,'gradient of f.0.0.weight says 0 along'), (Nan,'gradient of g.2.3.bias says nan')]

def refused(check, m, streams, words):
    with pytest.raises(AssertionError) as e: check(m, *streams)
    assert words in str(e.value)

@pytest.mark.parametrize('fault,words', INVERSE)
def test_the_way_back(fault, words, streams): refused(check_inverse, make(fault), streams, words)

@pytest.mark.parametrize('fault,p,words', GRADS)
def test_gradients(fault, p, words, streams): refused(check_grads, make(fault, p=p), streams, words)

@pytest.mark.parametrize('fault,words', SLOPES)
def test_slopes(fault, words, streams): refused(check_directional, make(fault, p=.3), streams, words)

def test_a_wrong_state_shows_with_dropout_only(streams): check_grads(make(OnModule), *streams)

def test_a_check_that_failed_leaves_its_module_as_it_was(streams):
    m,before = make(Pollutes, p=.3),testing._rng()
    refused(check_grads, m, streams, 'wrote into')
    assert testing._rng()==before and m.reversible and m.training and m.g[0][0].bias.grad is None

# ---------------------------------------------------------------- slopes

def test_a_slope_by_hand():
    "Of the sum of cubes at (1, 2): 3 along the first axis, 12 along the second"
    t = torch.tensor([1.,2.], dtype=torch.float64, requires_grad=True)
    slopes = [testing._slope(lambda: (t**3).sum(), t, v, 1e-5) for v in torch.eye(2).double()]
    assert_close(torch.tensor(slopes), torch.tensor([3.,12.]), rtol=0, atol=1e-6)
    assert t.tolist()==[1.,2.]

class KeyBias(nn.Module):
    "Softmax of scores to which a constant is added: a gradient that is zero on paper"
    def __init__(self):
        super().__init__()
        self.weight,self.bias = (nn.Parameter(torch.ones(n, dtype=torch.float64)) for n in (4,1))
    def forward(self, x): return (x*self.weight+self.bias).softmax(-1)

def test_a_gradient_that_is_zero_on_paper(streams): check_directional(KeyBias(), streams[0])

def test_from_any_global_state(streams):
    m = make(p=.3)
    first = check_directional(m, *streams)
    torch.manual_seed(5)
    assert check_directional(m, *streams)==first

def test_slopes_need_float64(streams):
    with pytest.raises(ValueError, match='f.0.0.weight is torch.float32: finite differences need float64'):
        check_directional(make().float(), *streams)
