"""The models that the requirements are asked of, and how two ways to compute are compared.
The judge is ordinary autograd: the same weights from the same seed with `set_reversible(False)`, relative L2 errors."""
import os, random
from functools import partial

import numpy as np, pytest, torch
from torch import nn
from torch.nn.functional import scaled_dot_product_attention
from revvit.core.block import ReversibleBlock
from revvit.core.device import pick_device
from revvit.core.sequence import ReversibleSequence
from revvit.models.mvit import RevMViT
from revvit.core.testing import weighted_sum
from revvit.models.vit import RevViT

torch.set_num_threads(1)
DEVICE = pick_device(os.environ.get('REVVIT_DEVICE', 'cpu'))   # where all of them compute
if DEVICE.type=='cuda':   # the same bits twice are asked for, and float32 that is float32
    torch.backends.cudnn.deterministic,torch.backends.cudnn.allow_tf32 = True,False
REMEDY = r'set_reversible\(False\)'

# --- makers: `make(chunk, rate, dtype, b)` gives a model and its inputs

class Tokens(nn.Module):
    "An F that mixes tokens: norm, attention, dropout of its weights"
    def __init__(self, d, p=0.):
        super().__init__()
        self.norm,self.qkv,self.p = nn.LayerNorm(d),nn.Linear(d, 3*d),p
    def forward(self, x):
        q,k,v = self.qkv(self.norm(x)).chunk(3, -1)
        return scaled_dot_product_attention(q, k, v, dropout_p=self.p if self.training else 0.)

def mlp(d=8, p=0.):
    return nn.Sequential(nn.LayerNorm(d), nn.Linear(d, 2*d), nn.GELU(), nn.Dropout(p), nn.Linear(2*d, d))

@torch.no_grad()
def used(m):
    "`m` as after some training: no bias is 0 and no scale 1"
    for p in m.parameters(): p.add_(torch.randn(p.shape), alpha=.05)
    return m

def stack(depth=3, p=0., drop_path=0., chunk=2, make=None, d=8, dtype=torch.float64):
    "A sequence of `depth` blocks; `make(i)` gives F and G of block i"
    torch.manual_seed(depth)
    return used(ReversibleSequence([ReversibleBlock(*(make(i) if make else (Tokens(d, p),mlp(d, p))), drop_path)
                                    for i in range(depth)], chunk)).to(DEVICE, dtype)

class Fuse(nn.Module):
    "A tail: norm of both streams, dropout, a linear layer, mean over tokens"
    def __init__(self, d=8, p=0.):
        super().__init__()
        self.norm,self.drop,self.lin = nn.LayerNorm(2*d),nn.Dropout(p),nn.Linear(2*d, 3)
    def forward(self, x1, x2): return self.lin(self.drop(self.norm(torch.cat((x1,x2), -1)))).mean(1)

class Tailed(nn.Module):
    "A sequence and its tail"
    def __init__(self, blocks, tail): super().__init__(); self.blocks,self.tail = blocks,tail
    def forward(self, x1, x2): return self.blocks(x1, x2, tail=self.tail)
    def set_reversible(self, on=True): self.blocks.set_reversible(on)

def streams(b=5, n=3, d=8, seed=1, dtype=torch.float64):
    return tuple(torch.randn(2, b, n, d, generator=torch.Generator().manual_seed(seed),
                             dtype=torch.float64).to(DEVICE, dtype))
def images(b=5, size=32, seed=1, dtype=torch.float64):
    return (torch.randn(b, 3, size, size, generator=torch.Generator().manual_seed(seed),
                        dtype=torch.float64).to(DEVICE, dtype),)

def clips(b=5, frames=4, size=16, seed=1, dtype=torch.float64):
    return (torch.randn(b, 3, frames, size, size, generator=torch.Generator().manual_seed(seed),
                        dtype=torch.float64).to(DEVICE, dtype),)

def sequence(depth, chunk, rate=1, dtype=torch.float64, b=5):
    return stack(depth, .3*rate, .2*rate, chunk, dtype=dtype),streams(b, dtype=dtype)
def tailed(depth, chunk, rate=1, dtype=torch.float64, b=5):
    blocks = stack(depth, .3*rate, .2*rate, chunk)
    return Tailed(blocks, used(Fuse(p=.3*rate))).to(DEVICE, dtype),streams(b, dtype=dtype)
def vit(depth, chunk, rate=1, dtype=torch.float64, b=5, dim=32, heads=2, drop=.3, **kw):
    torch.manual_seed(depth)
    m = RevViT(img_size=32, patch_size=8, embed_dim=dim, num_heads=heads, depth=depth, num_classes=5, chunk=chunk,
               drop_path_rate=.2*rate, proj_drop_rate=drop*rate, attn_drop_rate=.3*rate, drop_rate=.3*rate, **kw)
    return used(m).to(DEVICE, dtype),images(b, dtype=dtype)

def fitting(depth, *starts): return tuple(sorted({s for s in starts if 0<s<depth}))
def mvit(starts, depth, chunk, rate=1, dtype=torch.float64, b=5, size=16, drop=.3, **kw):
    "A narrow Rev-MViT for images of 8x8 tokens; `starts` are its stage transitions, or a function of the depth"
    torch.manual_seed(depth)
    m = RevMViT(**{**dict(img_size=size, patch_kernel=(3,3), patch_stride=(2,2), embed_dim=8, kv_stride=(1,4,4),
                          num_classes=5), **kw},
                depth=depth, stage_starts=starts(depth) if callable(starts) else starts, chunk=chunk,
                drop_path_rate=.2*rate, proj_drop_rate=drop*rate, attn_drop_rate=.3*rate, drop_rate=.3*rate)
    return used(m).to(DEVICE, dtype),images(b, size, dtype=dtype) if m.num_frames is None else clips(b, m.num_frames,
        size, dtype=dtype)
def clip(*args, **kw):
    "A narrow Rev-MViT for clips of 2x4x4 tokens"
    return mvit(*args, **{**dict(num_frames=4, patch_kernel=(3,7,7), patch_stride=(2,4,4), pool_kernel=(3,3,3),
                                 kv_stride=(1,2,2), stream_fusion='mean', qkv_bias=False), **kw})

# transitions one after another and with blocks between them, a last stage with and without blocks; both ways to fuse
# streams; drop path in transitions too
CASES = dict(sequence3=partial(sequence, 3, 2), sequence4=partial(sequence, 4, None), tail3=partial(tailed, 3, 2),
             tail4=partial(tailed, 4, None),
             vit3=partial(vit, 3, 2), vit4=partial(vit, 4, None, dim=48, heads=4, drop=0, shared_drop_path=True),
             image6=partial(mvit, (1,2), 6, 2),
             image7=partial(mvit, (3,5), 7, None, num_heads=2, drop=0, stream_fusion='mean', qkv_bias=False,
                            drop_whole=True, shared_drop_path=True),
             clip5=partial(clip, (3,), 5, None, drop_whole=True),
             clip6=partial(clip, (1,5), 6, 2, stream_fusion='mlp', qkv_bias=True))
both = pytest.mark.parametrize('make', CASES.values(), ids=CASES.keys())
# for what takes long
fewer = pytest.mark.parametrize('make', [v for k,v in CASES.items() if k not in ('image7','clip6')],
                                ids=[k for k in CASES if k not in ('image7','clip6')])
few = pytest.mark.parametrize('make', [CASES[k] for k in ('tail3','vit4','clip5')], ids=['tail3','vit4','clip5'])

# ---------------------------------------------------------------- comparing

def blocks_of(m):
    "The run of blocks that a test takes apart; of a model in stages the longest, which has 3 at least"
    return m if isinstance(m, ReversibleSequence) else max(m.stages, key=len) if isinstance(m, RevMViT) else m.blocks
def put(m, half, block, new): setattr(blocks_of(m)[block], half, new.to(next(m.parameters())))
def error(got, want):
    "Relative L2 distance of two lists of tensors; infinite where only one of two is None or not finite"
    got,want = list(got),list(want)
    assert len(got)==len(want)
    if any((a is None)!=(b is None) for a,b in zip(got, want)): return float('inf')
    a,b = (torch.cat([o.detach().double().flatten() for o in os if o is not None]) for os in (got,want))
    e = float((a-b).norm()/b.norm().clamp_min(1e-300))
    return e if e==e else float('inf')
def same(got, want): return all(torch.equal(a, b) for a,b in zip(got, want, strict=True))
def outputs(o): return o if isinstance(o, tuple) else (o,)
def loss_of(m, xs, seed=0):
    torch.manual_seed(seed)
    return weighted_sum(m(*xs))
def needing(m): return [p for p in m.parameters() if p.requires_grad]
def grads(m, xs, seed=0): return torch.autograd.grad(loss_of(m, xs, seed), needing(m), allow_unused=True)
def plain(m, fn):
    "`fn()` with stored activations"
    m.set_reversible(False)
    try: return fn()
    finally: m.set_reversible(True)
def agrees(m, fn, tol=1e-12):
    "Does `fn()`, a list of tensors, give the same in both modes?"
    want = plain(m, fn)
    assert error(fn(), want) < tol
def rng_states():
    kind,keys,*rest = np.random.get_state()
    there = []
    if DEVICE.type not in ('cpu','meta'): there = [torch.get_device_module(DEVICE).get_rng_state().numpy().tobytes()]
    return torch.get_rng_state().numpy().tobytes(),there,(kind, keys.tobytes(), *rest),random.getstate()

class Trap(nn.Module):
    "`m`, but the calls whose numbers are in `at` fail; the first is 1"
    def __init__(self, m, *at, error=KeyError): super().__init__(); self.m,self.at,self.error,self.calls = m,at,error,0
    def forward(self, x):
        self.calls += 1
        if self.calls in self.at: raise self.error('trap')
        return self.m(x)
