"""The package's networks once more, written apart from it: ordinary PyTorch, the coupling's equations, activations
stored. `apart(m)` turns a model into such a one where it stands, with its weights, its names and whatever was done to
it; its outputs and gradients are what the fuzzer and the surgery tests compare with. timm's and PyTorch's own layers
are called as they are, so hooks and wrappers are felt."""
import re, traceback, warnings
from pathlib import Path
from types import SimpleNamespace

import torch
from torch import nn
from torch.nn import functional as F

# ---------------------------------------------------------------- the networks

class Block(nn.Module):
    """Equations 1 and 2 of the paper; `keep` says which images go through F and through G, None all. They are scaled
    by the rate of the block, whatever the batch"""
    keep = None
    def part(self, m, x, i):
        if self.keep is None: return m(x)
        # some images alone are a copy, which a half that works in place may change
        return m(x.clone())*self.keep[i].to(x.dtype).view(-1, *[1]*(x.ndim-1))/(1-self.drop_path)
    def forward(self, x1, x2):
        y1 = x1 + self.part(self.f, x2, 0)
        y2 = x2 + self.part(self.g, y1, 1)
        return y1,y2

class Sequence(nn.ModuleList):
    def forward(self, x1, x2, tail=None):
        for b in self: x1,x2 = b(x1, x2)
        return (x1,x2) if tail is None else tail(x1, x2)
    def set_reversible(self, on=True): pass

class Norm(nn.Module):
    def forward(self, x): return self.fn(self.norm(x))

class Fusion(nn.Module):
    def forward(self, x1, x2): return self.norm(torch.cat((x1,x2), -1))

class Pooled(nn.Module):
    def forward(self, x1, x2): return self.fusion(x1, x2).flatten(1, -2).mean(1)

class Patches(nn.Module):
    def forward(self, x): return self.norm(self.proj(x).flatten(2).transpose(1, 2))

class Overlapping(nn.Module):
    def forward(self, x):
        t = self.proj(x)
        return (t if t.ndim==5 else t[:,:,None]).permute(0, 2, 3, 4, 1) # B D T H W -> B T H W D

class Vit(nn.Module):
    def forward(self, x):
        t = self.patch_embed(x) + self.pos_embed
        return self.head(self.head_drop(self.neck(*self.blocks(t, t))))
    def set_reversible(self, on=True): pass

class Pool(nn.Module):
    "A convolution of each head's channels alone, with the same kernels, then the norm of each head"
    def forward(self, x):
        (B,T,H,W,D),d = x.shape,self.head_dim
        x = x.view(B, T, H, W, D//d, d).permute(0, 4, 5, 1, 2, 3).reshape(B*(D//d), d, T, H, W)
        if any(isinstance(o, nn.Conv3d) for o in self.conv.modules()): y = self.conv(x)
        else: y = self.conv(x.transpose(1, 2).reshape(-1, d, H, W)).unflatten(0, (-1, T)).transpose(1, 2)
        # B heads d t h w -> B t h w heads*d
        return self.norm(y.unflatten(0, (B, -1)).permute(0, 3, 4, 5, 1, 2)).flatten(-2)

class Pooling(nn.Module):
    def forward(self, x):
        q,k,v = (p(o) for p,o in zip((self.pool_q,self.pool_k,self.pool_v), self.qkv(x).chunk(3, -1)))
        grid,nh = q.shape[1:-1],self.num_heads
        q,k,v = (o.reshape(len(o), -1, nh, o.shape[-1]//nh).transpose(1, 2) for o in (q,k,v))
        a = (q@k.transpose(-2, -1)/q.shape[-1]**.5).softmax(-1)
        if self.training and self.attn_drop.p==1: a = a*0 # the one rate at which dropout is no chance
        return self.proj_drop(self.proj((a@v).transpose(1, 2).flatten(2).unflatten(1, grid)))

class FuseMlp(nn.Module):
    def forward(self, x1, x2):
        x = torch.cat((x1,x2), -1)
        return x + self.mlp(x)

class FuseMean(nn.Module):
    def forward(self, x1, x2): return (x1+x2)/2

class Transition(nn.Module):
    def forward(self, x1, x2):
        x = self.fuse(x1, x2)
        y = self.f.fn.pool_q(self.proj(x)) + self.f(x)
        return y + self.g(y)
    def set_reversible(self, on=True): pass

class MVit(nn.Module):
    def forward(self, x):
        x = self.patch_embed(x)
        (_,T,H,W,D),pos = x.shape,self.pos_embed
        x = x + pos.view(1, 1, H, W, D)
        if self.pos_embed_temporal is not None: x = x + self.pos_embed_temporal.view(1, T, 1, 1, D)
        for stage,then,drop in zip(self.stages, self.transitions, self.drops): x = drop(then(*stage(x, x)))
        x = self.neck(*self.stages[-1](x, x))
        return self.head(self.head_drop(x))
    def set_reversible(self, on=True): pass

CLASSES = dict(ReversibleBlock=Block, ReversibleSequence=Sequence, PreNorm=Norm, AttentionHalf=Norm, MlpHalf=Norm,
    PoolingHalf=Norm, StreamFusion=Fusion, PooledFusion=Pooled,
    PatchEmbed=Patches, OverlapPatchEmbed=Overlapping, HeadPool=Pool, PoolingAttention=Pooling, MlpFusion=FuseMlp,
    MeanFusion=FuseMean,
    StageTransition=Transition, RevViT=Vit, RevMViT=MVit)

def apart(m):
    "`m`, its modules from the package turned into those above"
    for o in m.modules():
        if type(o).__module__.startswith('revvit.'): o.__class__ = CLASSES[type(o).__name__]
    return m

# ---------------------------------------------------------------- dropout whose draws the judge knows

class Book:
    """What layers drew for each row of what they were given; who is asked twice is taken at the last word, at the
    first, or in turn: a half in two places may be given the same rows twice"""
    take = 'last'
    def __init__(self): self.writing,self.rows,self.strict,self.used = True,{},False,set()
    def note(self, key, x, mask): self.rows.setdefault(key, []).append((x.detach().clone(), mask.detach().clone()))
    def find(self, key, x):
        "The mask drawn for each row of `x`; ones for a row that was not asked for"
        out = torch.ones_like(x)
        xs = x.detach().flatten(1).double()
        if self.strict and len(xs.unique(dim=0))<len(xs): raise LookupError('rows alike: who drew what is not known')
        todo = torch.ones(len(x), dtype=torch.bool, device=x.device)
        for n,(rows,masks) in list(enumerate(self.rows.get(key, [])))[::-1 if self.take=='last' else 1]:
            if rows.shape[1:]!=x.shape[1:]: continue
            d = (xs[:,None]-rows.flatten(1).double()[None]).abs().amax(-1)
            near,i = d.min(1)
            hit = todo & (near <= self.tol*(1+xs.abs().amax(1)))
            if self.take=='in turn':
                hit &= torch.tensor([(key,n,k) not in self.used for k in i.tolist()], device=x.device)
                self.used.update((key,n,k) for k in i[hit].tolist())
            out[hit] = masks[i[hit]].to(out.dtype)
            todo &= ~hit
        return out
    tol = 1e-9

class Drop(nn.Module):
    """Dropout by the global generator. The first model to run draws and notes; the judge, which has `judge` set,
    reads what was drawn"""
    def __init__(self, p, book, judge=False):
        super().__init__()
        self.p,self.book,self.judge = p,book,judge
        self.key = book.keys = getattr(book, 'keys', -1)+1
    def forward(self, x):
        if not self.training: return x
        if self.judge: return x*self.book.find(self.key, x)
        mask = F.dropout(torch.ones_like(x), self.p)
        if self.book.writing: self.book.note(self.key, x, mask)
        return x*mask
    def __deepcopy__(self, memo): return Drop(self.p, self.book, self.judge)

def survivors(model, xs, out, rates):
    """Masks of drop path by trying all: for each image the choice at the blocks `rates` with which the judge `model`
    gives `out`; None if none does"""
    n,b = 2*len(rates),len(out[0])
    # 2**n choices of n bits
    choice = torch.arange(2**n)[:,None].bitwise_right_shift(torch.arange(n)).bitwise_and(1).bool()
    for i,o in enumerate(rates): o.keep = (choice[:,2*i].repeat(b), choice[:,2*i+1].repeat(b))
    with torch.no_grad(): tried = tensors(model(*(x.repeat_interleave(2**n, 0) for x in xs)))
    gap = sum((t.unflatten(0, (b, -1)) - o[:,None]).flatten(2).abs().amax(-1) for t,o in zip(tried, out))
    best,k = gap.min(1)
    for i,o in enumerate(rates): o.keep = (choice[k,2*i], choice[k,2*i+1])
    return float(best.max())

# ---------------------------------------------------------------- one step, and its verdict

def tensors(o): return [o] if isinstance(o, torch.Tensor) else [t for u in o for t in tensors(u)]

def weighted(out, seed=0):
    "A scalar that every output element has its own share in"
    g = torch.Generator('cpu').manual_seed(seed)
    return sum((o*torch.randn(o.shape, generator=g, dtype=torch.float64, device='cpu').to(o)).sum()
               for o in tensors(out))

def gradients(model, xs, call=None, between=None, seed=0):
    "Outputs and, by name, gradients or None, of one step of `model`"
    xs = [x.detach().clone().requires_grad_() for x in xs]
    for p in model.parameters(): p.grad = None
    torch.manual_seed(seed)
    out = (call or model)(*xs)
    named = {f'output {i}':o.detach().clone() for i,o in enumerate(tensors(out))}
    loss = weighted(out)
    if between: between()
    loss.backward()
    return {**named, **{f'input {i}':x.grad for i,x in enumerate(xs)}, **{n:p.grad for n,p in model.named_parameters()}}

def distance(got, want, zeros=False):
    """The name that differs most, and by how much: relative L2, small ones measured by the size of the others;
    infinite where one is None, unless `zeros` may stand for it"""
    if got.keys()!=want.keys(): return str(sorted(got.keys()^want.keys())[:3]),float('inf')
    norms = [float(w.detach().double().norm()) for k,w in want.items() if w is not None and not k.startswith('output')]
    floor,worst = .01*(sum(n*n for n in norms)/max(1, len(norms)))**.5,('nothing',0.)
    for k,w in want.items():
        g = got[k]
        if zeros and (g is None)!=(w is None) and not (w if g is None else g).any(): continue
        if (g is None)!=(w is None): return f"{k} is {'None' if g is None else 'there'}",float('inf')
        if g is None: continue
        if g.shape!=w.shape: return f'{k} is {tuple(g.shape)}',float('inf')
        g,w = g.detach().double(),w.detach().double()
        n,d = max(float(w.norm()), 0. if k.startswith('output') else floor),float((g-w).norm())
        e = d/n if n else (0. if d==0 else float('inf'))
        if not e<=worst[1]: worst = (k, e if e==e else float('inf'))
    return worst

NAMES = re.compile(r'\b(?:run|runs|block|tail|half|halves|stage|transition|streams?|model|sequence|[fg])\b', re.I)
REMEDY = re.compile(r'set_reversible\(|\b(?:use|call|make|give|step|detach|draw|switch|keep|want|wanted|leave|finish|'
                    r'expected|pass|put|move|build|register)\b')
HERE = Path(__file__).resolve().parent

def ours(e):
    "Did the package itself raise the exception `e`, in words that name what it is about and what to do?"
    if not isinstance(e, (RuntimeError,ValueError)): return False
    frames = traceback.extract_tb(e.__traceback__)
    import revvit
    home = Path(revvit.__file__).resolve().parent
    return bool(frames) and Path(frames[-1].filename).resolve().is_relative_to(home) and bool(NAMES.search(str(e))
        and REMEDY.search(str(e)))

STORES = re.compile(r'\bstores\b|ordinary autograd') # tells of memory, not of gradients
WRONG = re.compile(r'\bc[ao]me back\b|\bwrong\b|\binexact\b|\bdrift')
LOST = re.compile(r'no gradient flows') # tells of a loss of what was kept, and excuses nothing else
def tells(w):
    return (issubclass(w.category, RuntimeWarning) and bool(NAMES.search(str(w.message)))
            and not STORES.search(str(w.message)))

def judge(candidate, reference, tol=1e-10, kept_in_loss=False, zeros=False):
    """What comes of `candidate()`, compared with `reference()`: both give tensors by name. The verdict's `kind` is one
    of exact, refused, warned (wrong, or not to be compared, but said), alarm (right, but called wrong), both (the
    reference crashes too), crash, silent"""
    got = fault = wrong = None
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter('always')
        try: got = candidate()
        except Exception as e: fault = e
    said = [str(w.message) for w in said if tells(w)]
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        try: want = reference()
        except Exception as e: wrong = e
    kind,what,err = 'exact','',0.
    if wrong is not None: kind,what = 'both',f'{type(wrong).__name__}: {wrong}'
    elif fault is not None: kind,what = ('refused' if ours(fault) else 'crash'),f'{type(fault).__name__}: {fault}'
    else:
        what,err = distance(got, want, zeros)
        right = err <= tol
        excused = [o for o in said if kept_in_loss or not LOST.search(o)]
        kind = ('alarm' if any(map(WRONG.search, said)) else 'exact') if right else 'warned' if excused else 'silent'
        if said: what = said[0]
    return SimpleNamespace(kind=kind, what=what, error=err, said=said, fault=fault)
