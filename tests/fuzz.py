"""Random cases for the engine: a net, and up to four things that people do to it, judged by networks written apart from
the package (`apart.py`). A case is a pair of numbers, seed and index, and is the same on every machine. Dropout's draws
are noted where they are drawn and read again by the judge; drop path's survivors are found by trying all choices.
`tools/fuzz.py` runs as many cases as one likes, `test_fuzz.py` some hundred."""
import contextlib, copy, functools, random, threading, types, warnings
from collections import Counter
from types import SimpleNamespace

import numpy as np, torch
from timm.layers import Attention, Mlp
from torch import nn
from torch.nn import functional as F
from torch.nn.modules import module as hooks
from torch.nn.utils import parametrize, prune
from torch.utils.checkpoint import checkpoint
from revvit.core.block import ReversibleBlock
from revvit.core.sequence import ReversibleSequence
from revvit.models.mvit import RevMViT
from revvit.models.vit import RevViT
from apart import MVit, Block, Book, Drop, apart, distance, judge, survivors, tensors, weighted

# ---------------------------------------------------------------- halves

class Fn(nn.Module):
    "`fn(self, x)` with `m` and parameters of its own"
    def __init__(self, fn, m=None, **shapes):
        super().__init__()
        self.fn,self.m = fn,m
        for k,s in shapes.items(): setattr(self, k, nn.Parameter(torch.randn(s)/2))
    def forward(self, x): return self.fn(self, x)

class Mix(nn.Module):
    "Norm and multi-head attention of PyTorch"
    def __init__(self, d, p=0.):
        super().__init__(); self.norm,self.attn = nn.LayerNorm(d),nn.MultiheadAttention(d, 2, batch_first=True)
    def forward(self, x): return self.attn(*[self.norm(x)]*3, need_weights=False)[0]

def no_grad_part(o, x):
    with torch.no_grad(): z = (x*o.w).sin()
    return x*z*o.v
def tied(d):
    m = nn.Sequential(nn.Linear(d, d), nn.Tanh(), nn.Linear(d, d))
    m[2].weight = m[0].weight
    return m
def buffered(d):
    m = Fn(lambda o,x: o.m(x)*o.scale, nn.Linear(d, d))
    m.register_buffer('scale', torch.rand(d)+.5)
    return m

HALVES = dict(
    linear=lambda d, n: nn.Linear(d, d), mlp=lambda d, n: nn.Sequential(nn.LayerNorm(d), nn.Linear(d, 2*d), nn.GELU(),
        nn.Linear(2*d, d)),
    drop=lambda d, n: nn.Sequential(nn.LayerNorm(d), nn.Linear(d, d), n.drop(.4), nn.Linear(d, d)),
    drop_end=lambda d, n: nn.Sequential(nn.Linear(d, d), n.drop(.5)),
    drop_all=lambda d, n: nn.Sequential(nn.Linear(d, d), nn.Dropout(1.), nn.Linear(d, d)),
    attention=lambda d, n: Mix(d), conv=lambda d, n: Fn(lambda o,x: o.m(x.transpose(1, 2)).transpose(1, 2),
                                                        nn.Conv1d(d, d, 3, padding=1)),
    lstm=lambda d, n: Fn(lambda o,x: o.m(x)[0], nn.LSTM(d, d, batch_first=True)),
    gru=lambda d, n: Fn(lambda o,x: o.m(x)[0], nn.GRU(d, d//2, bidirectional=True, batch_first=True)),
    norm=lambda d, n: nn.LayerNorm(d), group=lambda d, n: Fn(lambda o,x: o.m(x.transpose(1, 2)).transpose(1, 2),
        nn.GroupNorm(2, d)), rms=lambda d, n: nn.RMSNorm(d),
    embed=lambda d, n: Fn(lambda o,x: x*o.m((x[...,0].sign()+1).long()), nn.Embedding(3, d)),
    sparse=lambda d, n: Fn(lambda o,x: x*o.m((x[...,0].sign()+1).long()), nn.Embedding(3, d, sparse=True)),
    tied=lambda d, n: tied(d), functional=lambda d, n: Fn(lambda o,x: F.gelu(F.linear(x, o.w))*o.v, w=(d,d), v=d),
    buffer=lambda d, n: buffered(d), unused=lambda d, n: Fn(lambda o,x: x*o.w, w=d, v=3),
    constant=lambda d, n: Fn(lambda o,x: o.w.expand(x.shape), w=(1,d)),
    detached=lambda d, n: Fn(lambda o,x: o.m(x).detach(), nn.Linear(d, d)),
    view=lambda d, n: Fn(lambda o,x: x.flip(-1)),
    identity=lambda d, n: nn.Identity(),
    no_grad=lambda d, n: Fn(no_grad_part, w=d, v=d),
    checkpointed=lambda d, n: Fn(lambda o,x: checkpoint(o.m, x, use_reentrant=False),
                                 nn.Sequential(nn.Linear(d, d), n.drop(.3))),
    encoder=lambda d, n: nn.TransformerEncoderLayer(d, 2, 2*d, dropout=0., batch_first=True),
    weight_norm=lambda d, n: nn.utils.parametrizations.weight_norm(nn.Linear(d, d)),
    nested=lambda d, n: Fn(lambda o,x: sum(o.m(x, x.flip(-1))),
                           ReversibleSequence([ReversibleBlock(nn.Linear(d, d), nn.Sequential(nn.Linear(d, d),
                               nn.Tanh()))], n.r.choice((1,None)))),
    in_place_inside=lambda d, n: nn.Sequential(nn.Linear(d, d), nn.ReLU(inplace=True)),
    in_place=lambda d, n: nn.ReLU(inplace=True), prelu=lambda d, n: nn.PReLU(),
    scalar=lambda d, n: Fn(lambda o,x: x*o.w, w=()))
RARE = 'in_place',

# ---------------------------------------------------------------- nets

class Ends(nn.Module):
    "A tail: of both streams or of one"
    def __init__(self, d, which, drop):
        super().__init__(); self.which,self.norm,self.drop,self.lin = which,nn.LayerNorm(d),drop,nn.Linear(d, 3)
    def forward(self, *ys): return self.lin(self.drop(sum(self.norm(ys[i]) for i in self.which))).mean(1)

class Tailed(nn.Module):
    def __init__(self, blocks, tail): super().__init__(); self.blocks,self.tail = blocks,tail
    def forward(self, x1, x2): return self.blocks(x1, x2, tail=self.tail)

def half(n, d):
    "One of the halves, the odd ones seldom"
    name = n.r.choice([k for k in HALVES if k not in RARE or n.r.random()<.2])
    n.halves.append(name)
    return HALVES[name](d, n)

def sequence(n):
    d,depth,chunk,b,tokens = n.r.choice((4,6,8)),n.r.randint(1, 4),n.r.choice((1,2,None)),n.r.randint(2,
        5),n.r.randint(2, 4)
    m = ReversibleSequence([ReversibleBlock(half(n, d), half(n, d)) for _ in range(depth)], chunk)
    if n.r.random()<.4:
        m = Tailed(m, Ends(d, n.r.choice([(0,1),(0,1),(0,),(1,)]), n.drop(.3) if n.r.random()<.4 else nn.Identity()))
    n.say(f"{'tailed ' if isinstance(m, Tailed) else ''}sequence of {depth} (chunk {chunk}, width {d}, {b}x{tokens}): "
          f"{' '.join(n.halves)}")
    return m,[torch.randn(b, tokens, d) for _ in range(2)]

def vit(n):
    d,depth,chunk,b = n.r.choice((4,8)),n.r.randint(1, 4),n.r.choice((1,2,None)),n.r.randint(2, 5)
    n.say(f'Rev-ViT of {depth} (chunk {chunk}, width {d}, batch {b})')
    return RevViT(img_size=8, patch_size=4, embed_dim=d, num_heads=n.r.choice((1,2)), depth=depth, num_classes=3,
                  mlp_ratio=2., qkv_bias=n.r.random()<.7, chunk=chunk),[torch.randn(b, 3, 8, 8)]

def mvit(n):
    clip,depth,chunk,b,fusion = n.r.random()<.5,n.r.randint(2, 4),n.r.choice((1,2,None)),n.r.randint(2,
        4),n.r.choice(('mlp','mean'))
    starts = tuple(sorted(n.r.sample(range(1, depth), n.r.randint(1, min(2, depth-1)))))
    n.say(f"Rev-MViT for {'clips' if clip else 'images'} of {depth}, transitions {starts} by {fusion} (chunk {chunk}, "
          f"batch {b})")
    kw = dict(num_frames=4, patch_kernel=(3,3,3), patch_stride=(2,2,2),
              pool_kernel=(3,3,3)) if clip else dict(patch_kernel=(3,3), patch_stride=(2,2))
    m = RevMViT(img_size=8, embed_dim=4, num_heads=1, depth=depth, stage_starts=starts, kv_stride=(1,2,2), mlp_ratio=2.,
                qkv_bias=n.r.random()<.7, stream_fusion=fusion, num_classes=3, chunk=chunk, **kw)
    return m,[torch.randn(b, 3, 4, 8, 8) if clip else torch.randn(b, 3, 8, 8)]

NETS = [sequence]*5+[vit]*4+[mvit]*2

# --- what is done to a net: each draws from `n.r` and says what it does

def named(n, *kinds):
    return [(k,o) for k,o in n.model.named_modules() if k and isinstance(o, kinds)
            and not any(p in k for p in ('parametrizations','attn.out_proj'))]
def pick(n, *kinds):
    "A layer of these kinds by name, or None where there is none"
    found = named(n, *kinds)
    return n.r.choice(found) if found else (None,None)
def place(m, path, new):
    parent,_,name = path.rpartition('.')
    m.get_submodule(parent)._modules[name] = new.to(next(m.parameters(), torch.empty(0)).dtype)
def halves_of(n):
    return [(f'{k}.{h}' if k else h, getattr(b, h)) for k,b in n.model.named_modules()
            if type(b) in (ReversibleBlock,Block) for h in 'fg']
def some_half(n): return n.r.choice(halves_of(n))
LEAVES = nn.Linear,nn.LayerNorm,nn.Conv2d,nn.Conv3d

def weight_surgery(n):
    k,o = pick(n, *LEAVES)
    if k is None or parametrize.is_parametrized(o) or o._parameters.get('weight') is None: return
    def reorder(): o.register_parameter('weight', o._parameters.pop('weight'))
    class Half(nn.Module):
        def forward(self, w): return w/2
    ways = dict(prune=lambda: prune.random_unstructured(o, 'weight', .3),
        prune_removed=lambda: prune.remove(prune.random_unstructured(o, 'weight', .3), 'weight'),
        weight_norm=lambda: nn.utils.parametrizations.weight_norm(o),
        weight_norm_removed=lambda: nn.utils.remove_weight_norm(nn.utils.weight_norm(o)), reordered=reorder,
        parametrized=lambda: parametrize.register_parametrization(o, 'weight', Half()),
        parametrization_removed=lambda: parametrize.remove_parametrizations(parametrize.register_parametrization(o,
            'weight', Half()), 'weight'))
    way = n.r.choice(list(ways))
    n.say(f'{way} {k}')
    ways[way]()

class Lora(nn.Module):
    "A frozen layer and a trainable correction"
    def __init__(self, m, drop):
        super().__init__()
        self.m,self.drop,self.linear,self.dims = m.requires_grad_(False),drop,isinstance(m, nn.Linear),m.weight.ndim-2
        self.scale = nn.Parameter(torch.randn(m.out_features if isinstance(m, nn.Linear) else m.out_channels))
        if isinstance(m, nn.Linear):
            self.down,self.up = nn.Linear(m.in_features, 2, bias=False),nn.Linear(2, m.out_features, bias=False)
    def forward(self, x):
        if self.linear: return self.m(x)+self.up(self.down(self.drop(x)))*self.scale
        return self.m(x)+self.m(self.drop(x))*self.scale.view(-1, *[1]*self.dims)

def adapter(n):
    k,o = pick(n, nn.Linear, nn.Conv2d, nn.Conv3d)
    if k is None or parametrize.is_parametrized(o) or type(o) not in (nn.Linear,nn.Conv2d,nn.Conv3d): return
    p = n.r.choice((0,.4))
    n.say(f'LoRA on {k}, dropout {p}')
    place(n.model, k, Lora(o, n.drop(p) if p else nn.Identity()))

def wrapped(n):
    k,o = pick(n, *LEAVES, nn.GELU, nn.Identity, Mlp, Attention)
    if k is None: return
    new = dict(drop=lambda: n.drop(.4), drop_all=lambda: nn.Dropout(1.), drop_none=lambda: nn.Dropout(0.), tanh=nn.Tanh,
               nothing=nn.Identity)
    name = n.r.choice(list(new))
    n.say(f'{name} around {k}')
    place(n.model, k, nn.Sequential(o, new[name]()) if n.r.random()<.5
          or isinstance(o, nn.Identity) else nn.Sequential(new[name](), o))

def replaced(n):
    k,o = pick(n, *LEAVES, nn.GELU, nn.Dropout)
    if k is None: return
    class Linear(nn.Linear):
        def forward(self, x): return super().forward(x)*.5
    if type(o) is nn.Linear:
        new = n.r.choice([lambda: Linear(o.in_features, o.out_features),
                          lambda: nn.Linear(o.in_features, o.out_features, bias=False),
                          lambda: nn.Sequential(nn.Linear(o.in_features, o.out_features), nn.Tanh())])()
    elif type(o) is nn.LayerNorm:
        new = n.r.choice([lambda: nn.LayerNorm(o.normalized_shape, eps=.1),
                          lambda: nn.LayerNorm(o.normalized_shape, elementwise_affine=False),
                          lambda: nn.LayerNorm(o.normalized_shape, bias=False), lambda: nn.RMSNorm(o.normalized_shape),
                          nn.Identity])()
    elif type(o) is nn.GELU:
        new = n.r.choice([lambda: nn.GELU('tanh'), nn.SiLU, nn.Tanh, lambda: nn.ReLU(inplace=True)])()
    # of that one attention asks the rate alone
    elif type(o) is nn.Dropout and not k.endswith('attn_drop'): new = n.drop(.3)
    else: return
    n.say(f'{k} replaced by {type(new).__name__}')
    place(n.model, k, new)

def settings(n):
    k,o = pick(n, nn.LayerNorm, nn.GELU, nn.Dropout, Attention)
    if k is None: return
    name,value = {nn.LayerNorm:('eps',.1), nn.GELU:('approximate','tanh'), nn.Dropout:('p',1.),
                  Attention:('fused_attn',False)}.get(type(o), (None,None))
    if name is None or k=='head_drop': return
    n.say(f'{k}.{name} = {value}')
    setattr(o, name, value)

def any_module(n):
    return n.r.choice([(k,o) for k,o in n.model.named_modules() if k
                                      and type(o) not in (nn.ModuleList,nn.ModuleDict)
                                      and 'parametrizations' not in k and not k.endswith('.attn.out_proj')
                                      and not isinstance(o, (ReversibleSequence,))
                                      and type(o).__name__!='Sequence'])

def scaled(o, s): return tuple(t*s for t in o) if isinstance(o, tuple) else o*s if isinstance(o, torch.Tensor) else o
def hook(n):
    k,o = any_module(n)
    d = n.drop(.3)
    ways = dict(forward=lambda: o.register_forward_hook(lambda m,i,out: scaled(out, 1.1)),
        pre=lambda: o.register_forward_pre_hook(lambda m,i: scaled(i, 1.1)),
        watching=lambda: o.register_forward_hook(lambda *a: None),
        backward=lambda: o.register_full_backward_hook(lambda m,gi,go: tuple(None if g is None else g*1.1 for g in gi)),
        backward_pre=lambda: o.register_full_backward_pre_hook(lambda m, go: tuple(None
            if g is None else g*1.1 for g in go)),
        drawing=lambda: o.register_forward_hook(lambda m,i,out: d(out) if isinstance(out, torch.Tensor) else None))
    way = n.r.choice(list(ways))
    n.say(f'{way} hook on {k}')
    n.zeros |= way.startswith('backward')   # PyTorch's give zeros to what is behind them, where no gradient comes
    ways[way]()

def keeping(n):
    "A hook or a module keeps what it sees, and the values are compared after the backward pass"
    k,o = some_half(n)
    inner = [(f'{k}.{j}' if j else k, u) for j,u in o.named_modules()
             if not isinstance(u, (nn.ModuleList,ReversibleSequence))]
    k,o = n.r.choice(inner[:6])
    way = n.r.choice(('input','output','pre'))
    n.say(f'hook that keeps the {way} of {k}')
    def keep(m, i, out=None):
        t = out if way=='output' else i[0]
        if isinstance(t, torch.Tensor): n.box.append(t)
    (o.register_forward_pre_hook if way=='pre' else o.register_forward_hook)(keep)

def instance_forward(n):
    k,o = any_module(n)
    old = o.forward
    if n.r.random()<.5: o.forward = functools.update_wrapper(lambda *a, **kw: scaled(old(*a, **kw), 1.1), old)
    else: o.forward = types.MethodType(lambda self, *a, **kw: scaled(type(self).forward(self, *a, **kw), 1.1), o)
    n.say(f'forward of {k} set')

@contextlib.contextmanager
def patched(owner, name, new):
    old,own = getattr(owner, name),name in vars(owner)
    setattr(owner, name, lambda *a, **kw: new(old, *a, **kw))
    try: yield
    finally: # an inherited one must not stay as its own: torch.fx patches the base class
        if own: setattr(owner, name, old)
        else: delattr(owner, name)
@contextlib.contextmanager
def undone(handle):
    h = handle()
    try: yield
    finally: h.remove()

def class_patch(n):
    c,s = n.r.choice((Attention,Mlp,nn.GELU,nn.Linear,nn.LayerNorm,nn.Dropout,nn.Identity,nn.Conv2d,
                      nn.Tanh)),n.r.choice((1.1,.9))
    n.say(f'{c.__name__}.forward patched')
    n.around.append(lambda: patched(c, 'forward', lambda old, self, *a, **kw: scaled(old(self, *a, **kw), s)))

def global_hook(n):
    c = n.r.choice((nn.GELU,nn.Linear,nn.LayerNorm,Attention,nn.Dropout))
    ways = dict(forward=lambda: hooks.register_module_forward_hook(lambda m,i,o: scaled(o, 1.1)
        if type(m) is c else None), pre=lambda: hooks.register_module_forward_pre_hook(lambda m,i: scaled(i, 1.1)
            if type(m) is c else None),
        backward=lambda: hooks.register_module_full_backward_hook(lambda m,gi,go: tuple(None if g is None else g*1.1
            for g in gi) if type(m) is c else None))
    way = n.r.choice(list(ways))
    n.say(f'global {way} hook on {c.__name__}')
    n.zeros |= way=='backward'
    n.around.append(lambda: undone(ways[way]))

def frozen(n):
    ps = list(n.model.named_parameters())
    if n.r.random()<.3:
        k,o = some_half(n)
        n.say(f'{k} frozen')
        o.requires_grad_(False)
    else:
        share = n.r.choice((.2,.5,.9))
        n.say(f'{share:.0%} of the parameters frozen')
        for _,p in ps: p.requires_grad_(n.r.random()>=share)
    if ps: n.model.get_parameter(ps[-1][0]).requires_grad_(True)

def shared(n):
    by = {}
    for k,o in named(n, nn.Linear, nn.LayerNorm):
        if 'weight' in o._parameters and o._parameters['weight'] is not None and o.weight.is_leaf:
            by.setdefault(tuple(o.weight.shape), []).append((k,o))
    by = [v for v in by.values() if len(v)>1]
    if not by: return
    (k,a),(j,b) = n.r.sample(n.r.choice(by), 2)
    n.say(f'{k}.weight is {j}.weight')
    a.weight = b.weight

def shared_half(n):
    hs = halves_of(n)
    shapes = [(k,o,[tuple(p.shape) for p in o.parameters()]) for k,o in hs]
    same = [(a,b) for a in shapes for b in shapes if a[0]!=b[0] and a[2]==b[2] and a[0][-1]==b[0][-1]]
    if not same: return
    a,b = n.r.choice(same)
    n.say(f'{a[0]} is {b[0]}')
    n.model.get_submodule(a[0].rpartition('.')[0])._modules[a[0][-1]] = b[1]

def drop_path(n):
    blocks = [b for b in n.model.modules() if type(b) in (ReversibleBlock,Block)]
    # survivors are told by many digits
    if not n.model.training or n.rates or n.state or n.step in TWICE or n.dtype!=torch.float64: return
    for b in n.r.sample(blocks, min(len(blocks), n.r.randint(1, 3))):
        b.drop_path = n.r.choice((.2,.5,.8))
        n.rates.append(b)
    n.say(f"drop path {' '.join(str(b.drop_path) for b in n.rates)}")

# --- state that no tensor holds. PyTorch's own checkpoint does not look after it, so such a net has none: there would
# be nothing to compare with

TWICE,AGAIN = ('two','two threads'),('checkpoint','reentrant')
def recomputes(n): return n.step in AGAIN or 'checkpointed' in n.halves

class State(nn.Module):
    "`m`, then something that depends on `n`"
    def __init__(self, m, fn): super().__init__(); self.m,self.fn,self.n,self.vs = m,fn,1,nn.Parameter(torch.rand(3)+.5)
    def forward(self, x): return self.fn(self, x)
def counts(o, x):
    o.n += 1
    return o.m(x)*o.n
def forked(o, x):
    with torch.random.fork_rng(devices=[]): return o.m(x)*torch.rand_like(x)
def task(o, x): return o.m(x)*o.vs[o.n]

def stateful(n):
    if recomputes(n): return
    k,o = some_half(n)
    ways = dict(task=task, adapter=lambda o,x: o.m(x)*o.vs[{1:0,2:1}[o.n]], attribute=lambda o,x: o.m(x)*o.n,
                training=lambda o,x: o.m(x)*(2. if o.training else 1.))
    way = n.r.choice(list(ways))
    n.state = True
    n.say(f'{way} of {k} changed before backward')
    s = State(o, ways[way])
    place(n.model, k, s)
    n.between.append(lambda: s.eval() if way=='training' else setattr(s, 'n', 2))

def does_not_repeat(n):
    """A counter, or noise from elsewhere: there is no plain gradient to compare with unless F is called once, so F's
    value is noted for the judge"""
    if recomputes(n): return
    k,o = some_half(n)
    n.book.keys += 1   # one half may have two of them
    way,book,key = n.r.choice(('counter','noise')),n.book,f'state {k} {n.book.keys}'
    n.state = True
    n.say(f'{way} in {k}')
    def factor(o, x):
        if n.judges: return o.m(x)*book.find(key, x)
        if way=='counter': o.n += 1; f = torch.full_like(x, o.n)
        else: f = torch.from_numpy(np.random.default_rng().random(tuple(x.shape))).to(x)
        if book.writing: book.note(key, x, f)
        return o.m(x)*f
    place(n.model, k, State(o, factor))

def late_setting(n):
    if recomputes(n): return
    k,o = pick(n, nn.LayerNorm, nn.GELU, nn.Dropout)
    if k is None: return
    name,value = {nn.LayerNorm:('eps',.5), nn.GELU:('approximate','tanh'),
                  nn.Dropout:('p',.5)}[type(o)] if type(o) in (nn.LayerNorm,nn.GELU,nn.Dropout) else (None,None)
    if name is None: return
    n.state = True
    n.say(f'{k}.{name} = {value} before backward')
    n.between.append(lambda: setattr(o, name, value))

def late_edit(n):
    if recomputes(n): return
    k,o = some_half(n)
    ways = dict(mode=lambda: o.eval(),
        weight=lambda: torch.no_grad()(lambda: [p.mul_(1.5) for p in list(o.parameters())[:1]])(),
        data=lambda: [setattr(p, 'data', p.data*1.5) for p in list(o.parameters())[:1]],
        hook=lambda: o.register_forward_hook(lambda m,i,out: scaled(out, 1.5)),
        forward=lambda: setattr(o, 'forward', lambda x: x*0))
    way = n.r.choice(list(ways))
    n.state,n.zeros = True,n.zeros or way=='forward'   # what gave zeros may then give nothing
    n.say(f'{way} of {k} changed before backward')
    n.between.append(ways[way])

# --- what goes on meanwhile

@contextlib.contextmanager
def busy():
    stop = threading.Event()
    def draw():
        while not stop.wait(2e-4): torch.rand(3)
    t = threading.Thread(target=draw)
    t.start()
    try: yield
    finally: stop.set(); t.join()

def thread_draws(n):
    if recomputes(n): return
    n.busy = True
    n.say('a thread draws random numbers')
    n.around.append(busy)

@contextlib.contextmanager
def training(m, xs):
    "A thread that trains `m` all the while; its failure is a failure here"
    stop,fault = threading.Event(),[]
    def work():
        try:
            while not stop.wait(1e-3): weighted(m(*xs)).backward()
        except Exception as e: fault.append(e)
    t = threading.Thread(target=work)
    t.start()
    try: yield
    finally: stop.set(); t.join()
    if fault: raise fault[0]

def thread_trains(n):
    if recomputes(n): return
    n.busy = True
    m = ReversibleSequence([ReversibleBlock(nn.Sequential(nn.LayerNorm(4), nn.Linear(4, 4), nn.Dropout(.5)),
                                            nn.Linear(4, 4), .3) for _ in range(2)], 1)
    n.say('a thread trains another model')
    # not within a device or a patch
    if not n.judges: n.around.insert(0, lambda: training(m, [torch.ones(3, 2, 4, device='cpu')]*2))

class Wait(nn.Module):
    "`m`, while another thread draws"
    def __init__(self, m): super().__init__(); self.m = m
    def forward(self, x):
        t = threading.Thread(target=torch.rand, args=(2,))
        t.start(); t.join()
        return self.m(x)
def thread_draws_inside(n):
    if recomputes(n): return
    k,o = some_half(n)
    n.say(f'a thread draws while {k} works')
    n.busy = True
    place(n.model, k, Wait(o))

def contexts(n):
    ways = dict(saved_identity=lambda: torch.autograd.graph.saved_tensors_hooks(lambda t: t, lambda t: t),
        save_on_cpu=torch.autograd.graph.save_on_cpu, device=lambda: torch.device('meta'),
        anomaly=lambda: torch.autograd.set_detect_anomaly(True, check_nan=False),
        default=lambda: default_dtype(torch.bfloat16),
        saved_copy=lambda: torch.autograd.graph.saved_tensors_hooks(lambda t: t.clone(), lambda t: t))
    way = n.r.choice(list(ways))
    n.saves |= way.startswith('save')
    n.say(f'within {way}')
    n.around.append(ways[way])
@contextlib.contextmanager
def default_dtype(dtype):
    was = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try: yield
    finally: torch.set_default_dtype(was)

def stepping(n):
    step = n.r.choice(('retain',*TWICE,'other thread',*AGAIN,'one output','grad of some','in place'))
    if step in TWICE and n.rates or step in AGAIN and (n.state or n.busy) or step=='reentrant' and n.needs: return
    n.step = step
    n.say(n.step)

def evaluates(n):
    if n.rates: return
    n.say('eval mode')
    n.model.eval()
def partly_eval(n):
    if n.rates: return
    k,o = some_half(n)
    n.say(f'{k} in eval mode')
    o.eval()

def inputs(n):
    if n.step=='reentrant': return
    n.needs = n.r.choice(((False,False),(True,False),(False,True)))[:len(n.xs)]
    n.say(f'inputs need gradients: {n.needs}')

INGREDIENTS = ([weight_surgery]*4 + [adapter]*4 + [wrapped]*4 + [replaced]*3 + [settings]*2 + [hook]*4 + [keeping]*2
               + [instance_forward]*3 + [class_patch]*3 + [global_hook]*2 + [frozen]*3 + [shared]*2 + [shared_half]*2
               + [drop_path]*5 + [stateful]*2 + [does_not_repeat]*2 + [late_setting]*2 + [late_edit]*2
               + [thread_draws, thread_trains] + [thread_draws_inside]*2 + [contexts]*3 + [stepping]*4
               + [evaluates, partly_eval, inputs])

# ---------------------------------------------------------------- one case

def build(seed, index, judges, book, only=None):
    "The case's net, as the package has it or apart from it, with what is done to it"
    def start(*what):
        r = random.Random(f'{seed}/{index}/'+'/'.join(map(str, what)))
        torch.manual_seed(r.getrandbits(40))
        return r
    n = SimpleNamespace(judges=judges, book=book, halves=[], words=[], around=[], between=[], box=[], rates=[],
                        state=False, busy=False, zeros=False, saves=False, step='backward', needs=None)
    n.say,n.r,book.keys = n.words.append,start('net'),-1
    n.drop = lambda p: Drop(p, book, judges)
    n.model,n.xs = n.r.choice(NETS)(n)
    with torch.no_grad():
        for p in n.model.parameters(): p.add_(torch.randn(p.shape), alpha=.1)
    n.dtype,n.autocast = n.r.choices([torch.float64,torch.float32],[.94,.06])[0],False
    # PyTorch's depthwise convolutions in bfloat16 are wrong on CPUs
    if n.dtype==torch.float32 and not isinstance(n.model, (RevMViT,MVit)): n.autocast = n.r.random()<.5
    n.tol = 1e-10 if n.dtype==torch.float64 else .1 if n.autocast else 1e-4
    if n.dtype!=torch.float64: n.say('autocast' if n.autocast else 'float32')
    n.model,n.xs = n.model.to(n.dtype),[x.to(n.dtype) for x in n.xs]
    if judges: apart(n.model)
    count = start('count').choice((0,1,1,2,2,2,3,3,4))
    for i in range(count):
        if only is not None and i not in only: continue
        n.r = start(i)
        n.r.choice(INGREDIENTS)(n)
    n.model.to(n.dtype)
    return n,count

def step(n, first=None):
    """Outputs, kept tensors and gradients by name; `first` is what the package gave, for the judge to find drop
    path's survivors by"""
    m,named = n.model,{}
    if n.judges and n.rates and first:
        named_out = [o for k,o in first.items() if k.startswith('output')]
        n.book.strict = False # each image is tried many times
        with quiet(n): survivors(m, [x for x in n.xs], named_out, n.rates)
        n.box.clear()
    n.book.strict = n.judges
    xs = [x.detach().clone().requires_grad_(not n.needs or n.needs[i]) for i,x in enumerate(n.xs)]
    leaves = {**{f'input {i}':x for i,x in enumerate(xs) if x.requires_grad},
              **{k:p for k,p in m.named_parameters() if p.requires_grad}}
    torch.manual_seed(1)
    def forward(*xs):
        with torch.autocast('cpu', torch.bfloat16) if n.autocast else contextlib.nullcontext(): return m(*xs)
    with contextlib.ExitStack() as stack:
        for o in n.around: stack.enter_context(o())
        if n.step in ('checkpoint','reentrant') and not n.judges:
            out = checkpoint(forward, *xs, use_reentrant=n.step=='reentrant')
        else: out = forward(*xs)
        outs = tensors(out)
        named.update({f'output {i}':o.detach().clone() for i,o in enumerate(outs)})
        # a norm would not see the factor alone
        if n.step=='two': outs = [*outs, *tensors(forward(*(x.flip(-1)*.5 for x in xs)))]
        other = weighted(forward(*(x.flip(-1)*.7 for x in xs)), 1) if n.step=='two threads' else None
        n.book.writing,n.kept = False,len(n.box)
        if n.step=='in place':
            # PyTorch does not notice where a hook saves the output itself, and its own gradient is then wrong
            if n.judges and n.saves: outs[0] = outs[0].clone()
            outs[0].mul_(2)
        loss = weighted(outs[:1] if n.step=='one output' else outs)
        for o in n.between: o()
        named.update(backward(n, loss, other, leaves))
    if n.kept: kept(n, named, first)
    return {k:v.to_dense() if v is not None and v.is_sparse else v for k,v in named.items()}

def kept(n, named, first):
    """Rows that hooks kept in the forward pass, as they are now; the judge gives for each that the package kept the
    one of its own that is nearest"""
    rows = [r.detach().double().flatten().clone() for t in n.box[:n.kept] for r in t]
    if not n.judges: named.update({f'kept {i}':r for i,r in enumerate(rows)})
    for k,r in (first or {}).items():
        if not k.startswith('kept '): continue
        near = [o for o in rows if o.shape==r.shape]
        # a layer inside may see rows of another shape
        named[k] = min(near, key=lambda o: float((o-r).norm())) if near else r

@contextlib.contextmanager
def quiet(n):
    with contextlib.ExitStack() as stack:
        for o in n.around:
            if o is not busy: stack.enter_context(o())
        yield

def backward(n, loss, other, leaves):
    "Gradients by name, in one of the ways to ask for them"
    names,ts = list(leaves),list(leaves.values())
    def ask(loss, ts, **kw): return torch.autograd.grad(loss, ts, allow_unused=True, **kw)
    if n.step=='grad of some': return dict(zip(names[::2], ask(loss, ts[::2])))
    if n.step=='two threads':
        found = {}
        def work(i, loss):
            try: found[i] = ask(loss, ts)
            except BaseException as e: found[i] = e
        jobs = [threading.Thread(target=work, args=o) for o in enumerate((loss, other))]
        for j in jobs:
            j.start()
            if n.judges: j.join()
        for j in jobs: j.join()
        for e in found.values():
            if isinstance(e, BaseException): raise e
        return {f'{k} of {i}':g for i in (0,1) for k,g in zip(names, found[i])}
    for t in ts: t.grad = None
    if n.step=='retain': loss.backward(retain_graph=True)
    if n.step=='other thread':
        fault = []
        def work():
            try: loss.backward()
            except BaseException as e: fault.append(e)
        j = threading.Thread(target=work)
        j.start(); j.join()
        if fault: raise fault[0]
    else: loss.backward()
    return {k:t.grad for k,t in leaves.items()}

def case(seed, index, only=None):
    "Verdict of a case, with its description in words"
    book,seen = Book(),{}
    words,n = [],None
    def side(judges):
        nonlocal n
        book.used.clear()
        n,_ = build(seed, index, judges, book, only)
        words[:] = n.words
        n.book.tol = 1e-9 if n.dtype==torch.float64 else 1e-2 if n.autocast else 1e-4
        out = step(n, seen)
        if not judges: seen.update(out)
        return out
    like = build(seed, index, False, Book(), only)[0]
    # below half of the digits a change is not told from rounding
    if like.state and like.dtype==torch.float32 and not like.autocast: like.tol = 2e-3
    told = {}
    def asked():
        out = side(True)
        for k,o in told.items(): # a hook may keep a row as it was tried
            if k.startswith('kept ') and (o-seen[k]).norm()<(out[k]-seen[k]).norm(): out[k] = o
        told.update(out)
        return out
    v = judge(lambda: side(False), asked, like.tol, zeros=like.zeros)
    for book.take in ('first','in turn'): # a part that was tried and done again may count as it was tried
        if v.kind!='silent' or not book.rows: break
        w = judge(lambda: dict(seen), asked, like.tol, zeros=like.zeros)
        v = w if w.kind=='exact' else v
    v.words,v.seed,v.index,v.only = '; '.join(words),seed,index,only
    v.fault_of_ours = v.kind in ('silent','crash') or v.kind=='alarm' and not (n.state or n.busy)
    return v

def shrunk(v):
    "The same fault with as few things done as will do"
    _,count = build(v.seed, v.index, False, Book())
    keep = list(range(count)) if v.only is None else list(v.only)
    for i in list(keep):
        w = case(v.seed, v.index, [o for o in keep if o!=i])
        if w.kind==v.kind: v,keep = w,[o for o in keep if o!=i]
    return v

def recipe(v):
    "One line that says what happened and how to see it again"
    only = '' if v.only is None else f" --only {','.join(map(str, v.only)) or '-'}"
    return (f"{v.kind}{f' {v.error:.2g}' if v.error else ''}: python tools/fuzz.py --case {v.seed}:{v.index}{only}   # "
            f"{v.words}; {v.what[:150]}")

def run(seed, indices):
    "Verdicts counted, and those that are a fault of the package's"
    kinds,faults = Counter(),[]
    torch.set_num_threads(1)
    for i in indices:
        v = case(seed, i)
        kinds[v.kind] += 1
        if v.fault_of_ours: faults.append(v)
    return kinds,faults
