"The written-out halves with a scale for each channel of their result: the numbers of autograd"
import pytest, torch
from torch import nn
from timm.layers import LayerScale
from revvit.core.block import ReversibleBlock
from revvit.core.sequence import ReversibleSequence
from revvit.models.layers import AttentionHalf, MlpHalf, attention_half, mlp_half
from revvit.models.fused import FusedAttention, FusedMlp, ORIGINAL, layers_of, product_dtype
from revvit.models.large import SplitAttention, SplitMlp
from revvit.models.layers import _LAYERS

NAMES = ('norm','fn','ls')

class Scaled(nn.Module):
    "A half as a timm block has it: norm, attention or MLP, layer scale"
    def __init__(self, half, dim, start):
        super().__init__()
        self.norm,self.fn,self.ls = half.norm,half.fn,LayerScale(dim, start)
        self.attends = isinstance(half, AttentionHalf)

    def forward(self, x): return self.ls(self.fn(self.norm(x)))

    def fused(self, x, large=False):
        modules,kinds = layers_of(self, NAMES),_LAYERS[AttentionHalf if self.attends else MlpHalf]
        kinds = [Scaled, *kinds[:2], LayerScale, *kinds[2:]]
        dtype = product_dtype(modules, kinds, x)
        if dtype is None: return None
        _,norm,fn,ls,*_ = modules
        if self.attends:
            kind = SplitAttention if large else FusedAttention
            return kind(norm, fn.qkv, fn.proj, dtype, modules, fn.num_heads, scale=ls.gamma)
        return (SplitMlp if large else FusedMlp)(norm, fn.fc1, fn.fc2, dtype, modules, scale=ls.gamma)

ORIGINAL[Scaled] = Scaled.forward

def halves(dim=12, start=.3):
    torch.manual_seed(0)
    made = [Scaled(o, dim, start) for o in (attention_half(dim, 3),mlp_half(dim))]
    for h in made: nn.init.normal_(h.ls.gamma, start, .2)
    return made

@pytest.mark.parametrize('which', (0,1), ids=('attention','mlp'))
@pytest.mark.parametrize('amp', (None,torch.bfloat16,torch.float16), ids=str)
@pytest.mark.parametrize('dtype', (torch.float32,torch.float64), ids=str)
def test_a_scaled_half_has_autograds_bits(which, amp, dtype):
    "The result, and gradients of the input and of every parameter, layer scale's among them"
    if amp and dtype==torch.float64: pytest.skip('autocast leaves float64 alone')
    h = halves()[which].to(dtype)
    x,d = torch.randn(2, 3, 7, 12, dtype=dtype)
    with torch.autocast('cpu', amp or torch.bfloat16, enabled=amp is not None, cache_enabled=False):
        leaf = x.clone().requires_grad_()
        want,kernel = h(leaf),h.fused(x)
    assert isinstance(kernel, FusedMlp if which else FusedAttention) and any(p is h.ls.gamma for p in kernel.params)
    grads = torch.autograd.grad(want, [leaf,*kernel.params], d.to(want.dtype))
    with torch.no_grad():
        kernel.begin()
        o,gx,gp = kernel.vjp(x, d.to(kernel.result))
        nothing,gx2,gp2 = kernel.vjp(x, d.to(kernel.result), False)
        again = kernel.forward(x)
        kernel.end()
    assert nothing is None and len(gp)==len(kernel.params)
    for a,b in zip((o,again,gx,*gp,gx2,*gp2), (want,want,*grads,*grads), strict=True): assert torch.equal(a, b)

@pytest.mark.parametrize('which', (0,1), ids=('attention','mlp'))
def test_a_large_image_in_pieces(which):
    "By heads, or a few tokens at a time: the same numbers, but for rounding"
    h = halves()[which].double()
    x,d = torch.randn(2, 1, 900, 12, dtype=torch.float64)
    leaf = x.clone().requires_grad_()
    want,kernel = h(leaf),h.fused(x, True)
    grads = torch.autograd.grad(want, [leaf,*kernel.params], d)
    with torch.no_grad():
        kernel.begin()
        o,gx,gp = kernel.vjp(x, d)
        again = kernel.forward(x)
        kernel.end()
    for a,b in zip((o,again,gx,*gp), (want,want,*grads), strict=True): torch.testing.assert_close(a, b)

@pytest.mark.parametrize('amp', (None,torch.bfloat16), ids=str)
@pytest.mark.parametrize('exact', (False,True))
@pytest.mark.parametrize('chunk', (2,None))
@pytest.mark.parametrize('drop_path', (0.,.4))
def test_blocks_of_scaled_halves(amp, exact, chunk, drop_path):
    "Reversible as stored, to the bit in the exact mode; part by part, with drop path"
    blocks = ReversibleSequence([ReversibleBlock(*halves(), drop_path=drop_path) for _ in range(3)], chunk)
    xs = torch.randn(2, 5, 7, 12, requires_grad=True)
    def answers(on):
        blocks.set_reversible(on, exact=exact)
        torch.manual_seed(1)
        with torch.autocast('cpu', torch.bfloat16, enabled=amp is not None): ys = blocks(*xs)
        loss = sum((y.double()**2).sum() for y in ys)
        return [*ys, *torch.autograd.grad(loss, [xs,*blocks.parameters()])]
    for a,b in zip(answers(True), answers(False)):
        if exact: assert torch.equal(a, b)
        else: torch.testing.assert_close(a, b, rtol=.02 if amp else 1e-4, atol=.02 if amp else 1e-4)

SURGERY = dict(inplace=lambda h: setattr(h.ls, 'inplace', True),
    hook=lambda h: h.ls.register_forward_hook(lambda *a: None),
    other=lambda h: setattr(h, 'ls', nn.Identity()), double=lambda h: h.ls.double(), replica=lambda h: _replica(h),
    own_forward=lambda h: setattr(h.ls, 'forward', torch.relu))
def _replica(h):
    g = h.ls.gamma
    del h.ls.gamma
    h.ls.gamma = g*1.

@pytest.mark.parametrize('kind', SURGERY)
@pytest.mark.parametrize('which', (0,1), ids=('attention','mlp'))
def test_a_changed_layer_scale_goes_by_autograd(kind, which):
    h = halves()[which]
    assert h.fused(torch.zeros(1, 2, 12)) is not None
    SURGERY[kind](h)
    assert h.fused(torch.zeros(1, 2, 12)) is None
