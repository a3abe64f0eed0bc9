"""Nothing bypasses the saving in silence: a block that goes by ordinary autograd, for whatever reason, says so once,
with what it stores. FSDP stands in `test_distributed.py`."""
import re, types, warnings

import pytest, torch
from torch.utils.checkpoint import checkpoint
from revvit.core.block import ReversibleBlock
from revvit.core.memory import saved_bytes
from cases import *

def _hook(b): b.register_forward_hook(lambda *o: None)
def _pre_hook(b): b.register_forward_pre_hook(lambda *o: None)
def _backward_hook(b): b.register_full_backward_hook(lambda *o: None)
def _backward_pre_hook(b): b.register_full_backward_pre_hook(lambda *o: None)
def _own_forward(b): b.forward = types.MethodType(ReversibleBlock.forward, b)
class Other(ReversibleBlock):
    def forward(self, x1, x2): return super().forward(x1, x2)
def _own_class(b): b.__class__ = Other
def _compile(b): b.compile(backend='eager')

SAYS = re.compile(r'(.*) goes by ordinary autograd, because (.*): it stores ([\d.e+-]+) MB of activations that would '
                  r'be rebuilt')
def told(fn):
    "Who stores, why and how many megabytes, as the warnings during `fn()` say"
    with warnings.catch_warnings(record=True) as heard:
        warnings.simplefilter('always')
        fn()
    return [(m[1], m[2], float(m[3])) for o in heard if (m := SAYS.fullmatch(str(o.message)))]

def stored(b, xs):
    "Megabytes that a block stores"
    b = ReversibleBlock(b.f, b.g)
    told(lambda: b(*xs))
    return saved_bytes(lambda: b(*xs), b, *xs)/1e6

@pytest.mark.parametrize('bypass,why', [(_hook,'there is a hook on it'), (_pre_hook,'there is a hook on it'),
    (_backward_hook,'there is a hook on it'), (_backward_pre_hook,'there is a hook on it'),
    (_own_forward,'it has a forward of its own'), (_own_class,'it has a forward of its own'),
    (_compile,'it is compiled (compile its F and G instead)')], ids=lambda o: getattr(o, '__name__', ''))
@pytest.mark.parametrize('depth', [3,6])
def test_a_block_in_a_sequence_says_once_what_it_stores(bypass, why, depth):
    """By number; the others are rebuilt as before, the gradient is the same, and neither evaluation nor the plain
    mode has anything to say"""
    m,xs = stack(depth),streams(8)
    want,mb = grads(m, xs),stored(m[1], xs)
    free = saved_bytes(lambda: loss_of(m, xs), m, *xs)
    bypass(m[1])
    with torch.no_grad(): assert not told(lambda: m(*xs))
    assert not told(lambda: plain(m, lambda: grads(m, xs)))
    (name,reason,said), = told(lambda: grads(m, xs))
    assert (name,reason)==('block 1', why) and said==pytest.approx(mb, rel=.35 if bypass is _compile else .01)
    assert not told(lambda: grads(m, xs)) and error(grads(m, xs), want) < 1e-12
    kept = saved_bytes(lambda: loss_of(m, xs), m, *xs)
    assert kept < free+1.4e6*mb+4*xs[0].nbytes   # that block, and the ends of the run before it

@pytest.mark.parametrize('p,drop_path', [(0,0), (.3,.2)])
def test_blocks_called_one_by_one(p, drop_path):
    """Each once, with the masks of a block that says nothing; by a sequence, without gradients, inside a checkpoint
    or frozen there is nothing to say"""
    m,xs = stack(4, p, drop_path),streams(8)
    def loop():
        ys = xs
        for b in m: ys = b(*ys)
        return ys
    with torch.no_grad(): assert not told(loop)
    assert not told(lambda: [checkpoint(b, *xs, use_reentrant=False) for b in m])
    want = []
    torch.manual_seed(0)
    said = told(lambda: want.append(loop()))
    assert [o[:2] for o in said]==4*[('a ReversibleBlock', 'it is called by itself (give it to a ReversibleSequence)')]
    if not drop_path: assert said[2][2]==pytest.approx(stored(m[2], xs), rel=.01)
    torch.manual_seed(0)
    assert not told(lambda: want.append(loop())) and same(want[0], want[1])
    m = stack(4, p, drop_path)
    for on in (True,False):
        m.set_reversible(on)
        assert not told(lambda: m(*xs))
    assert not told(lambda: m.requires_grad_(False)[0](*xs))
