"""What people do to a model, in variants of each kind, judged by a network written apart from the package (`apart.py`):
outputs and gradients of inputs and parameters, `None` where plain autograd gives `None`. A case is exact, or refused in
words that help, or warned of; it is never wrong without a word. The numbers are those of the list in which these faults
were first reported."""
import contextlib, contextvars, copy, functools, gc, itertools, threading, types, warnings

import numpy as np, pytest, torch
from timm.layers import Attention, Mlp
from torch import nn
from torch.nn import functional as F
from torch.nn.modules import module as hooks
from torch.nn.utils import parametrize, prune
from revvit.core.self_check import set_self_check
from revvit.core.block import ReversibleBlock
from revvit.core.sequence import ReversibleSequence
from apart import Book, Drop, apart, distance, gradients, judge, ours, survivors, tensors, weighted
from cases import CASES, clip, mlp, mvit, sequence, stack, streams, tailed, vit

# ---------------------------------------------------------------- nets and verdicts

def small(chunk=2): return vit(2, chunk, 0, b=3, dim=8)                                       # Rev-ViT: 2 blocks
# Rev-MViT: streams fused by an MLP
def picture(chunk=2): return mvit((1,), 3, chunk, 0, b=3, size=8, kv_stride=(1,2,2))
# of clips: by their mean, then projected
def film(chunk=2): return clip((1,), 3, chunk, 0, b=3)
def seq(chunk=2): return sequence(3, chunk, 0)
def tail(chunk=2): return tailed(3, chunk, 0)
NETS = dict(vit=small, image=picture, clip=film, sequence=seq, tail=tail)
def nets(names): return pytest.mark.parametrize('net', [NETS[n] for n in names.split()], ids=names.split())

def verdict(net, change=lambda m, drop: None, around=contextlib.nullcontext, between=None, call=None, tol=1e-10):
    """What comes of a step of `net()`, to which `change(model, drop)` was done, `drop(p)` being dropout whose draws the
    judge is told. `around()` is entered for the step, `between(model)` runs between forward and backward, `call(model,
    *xs)` is the forward pass"""
    book = Book()
    def side(judges):
        m,xs = net()
        if judges: apart(m)
        book.keys = -1
        torch.manual_seed(7)
        change(m, lambda p: Drop(p, book, judges))
        def close():
            book.writing = False
            if between: between(m)
        with around(): return gradients(m, xs, call and functools.partial(call, m), close)
    got = []
    v = judge(lambda: got.append(side(False)) or got[0], lambda: side(True), tol)
    if v.kind=='silent' and book.rows: # a part that was tried and done again may count as it was tried
        book.take = 'first'
        w = judge(lambda: got[0], lambda: side(True), tol)
        v = w if w.kind=='exact' else v
    return v

def right(v, *kinds):
    assert v.kind in (kinds or ('exact','refused','warned')), f'{v.kind}: {v.error:.3g}, {v.what}'
    return v

def get(m, path): return m.get_submodule(path)
def put(m, path, new):
    parent,_,name = path.rpartition('.')
    (setattr(get(m, parent), name, new) if not name.isdigit() else get(m, parent).__setitem__(int(name), new))
def wrap(m, path, make): put(m, path, make(get(m, path)))
def double(o): return o.to(torch.float64)

class Lora(nn.Module):
    "`m`, frozen, and a trainable correction of low rank behind dropout; for linear layers and convolutions"
    def __init__(self, m, drop=None):
        super().__init__()
        self.m,self.drop = m.requires_grad_(False),drop or nn.Identity()
        self.down = type(m)(m.in_channels, 2, m.kernel_size, m.stride, m.padding,
                            bias=False) if hasattr(m, 'kernel_size') and m.groups==1 else None
        if isinstance(m, nn.Linear): self.down = nn.Linear(m.in_features, 2, bias=False)
        wide = m.out_features if isinstance(m, nn.Linear) else m.out_channels
        self.up = nn.Parameter(torch.randn(wide, 2)) if self.down is not None else nn.Parameter(torch.randn(wide))
        double(self)
    def forward(self, x):
        o,z = self.m(x),self.drop(x)
        # a depthwise convolution: scaled by channel
        if self.down is None: return o + self.m(z)*self.up.view(-1, *[1]*(o.ndim-2))
        z = self.down(z)
        return o + (z@self.up.T if isinstance(self.m, nn.Linear) else torch.einsum('bc...,oc->bo...', z, self.up))

@nets('vit image clip sequence tail')
@pytest.mark.parametrize('chunk', [1,2,None])
def test_00_the_judge_agrees_on_healthy_models(net, chunk): right(verdict(lambda: net(chunk)), 'exact')

@nets('vit image clip sequence')
def test_00_the_judge_sees_a_wrong_gradient(net, monkeypatch):
    "A backward pass that is wrong by one part in a million is silent to everybody but the judge"
    right(verdict(net, lambda m, drop: [p.register_hook(lambda g: g*1.000001) for p in list(m.parameters())[:1]
                                        if type(m).__module__.startswith('revvit')]), 'silent')

# ---------------------------------------------------------------- 1: parameters in another order

LAYERS = 'f.norm f.fn.qkv f.fn.proj g.norm g.fn.fc1 g.fn.fc2'.split()
class Half(nn.Module):
    def forward(self, w): return w/2
def by_prune(o): prune.random_unstructured(o, 'weight', .3); prune.remove(o, 'weight')
def by_mask(o): prune.random_unstructured(o, 'weight', .3)
def by_old_norm(o): nn.utils.remove_weight_norm(nn.utils.weight_norm(o))
def by_parametrization(o):
    parametrize.register_parametrization(o, 'weight', Half()); parametrize.remove_parametrizations(o, 'weight')
def by_norm(o): nn.utils.parametrizations.weight_norm(o)
def by_hand(o):
    w = o._parameters.pop('weight')
    o.register_parameter('weight', w)
def by_setattr(o):
    w = o.weight
    del o.weight
    o.weight = nn.Parameter(w.detach()*2)
ORDERS = {f.__name__[3:]:f for f in (by_prune, by_mask, by_old_norm, by_parametrization, by_norm, by_hand, by_setattr)}

@pytest.mark.filterwarnings('ignore')
@pytest.mark.parametrize('how', ORDERS.values(), ids=ORDERS)
@pytest.mark.parametrize('layer', LAYERS)
def test_01_parameters_in_another_order(layer, how): right(verdict(small, lambda m, drop: how(get(m.blocks[1], layer))))

@pytest.mark.filterwarnings('ignore')
@pytest.mark.parametrize('how', [by_prune,by_old_norm,by_hand])
@pytest.mark.parametrize('layer', ['stages.1.0.g.norm','stages.1.0.g.fn.fc1','stages.0.0.f.fn.qkv',
                                   'transitions.0.g.norm','transitions.0.g.fn.fc2','transitions.0.f.fn.qkv',
                                   'transitions.0.f.fn.pool_q.conv','transitions.0.f.fn.pool_q.norm'])
def test_01_parameters_in_another_order_in_stages(layer, how):
    right(verdict(picture, lambda m, drop: how(get(m, layer))))

def test_01_several_layers_and_parts_exchanged():
    "All layers of a half at once; and a linear layer built by its owner with the bias first"
    def all_layers(m, drop):
        for o in LAYERS: by_prune(get(m.blocks[0], o))
    right(verdict(small, all_layers))
    class Linear(nn.Linear):
        def __init__(self, a, b): super().__init__(a, b); by_hand(self)
    right(verdict(small, lambda m, drop: put(m.blocks[1], 'g.fn.fc1', double(Linear(8, 32)))))

# ---------------------------------------------------------------- 2: randomness in stage transitions

def behind(path): return lambda m, drop: wrap(m, path, lambda o: nn.Sequential(o, drop(.3)))
def before(path): return lambda m, drop: wrap(m, path, lambda o: nn.Sequential(drop(.3), o))
def lora(path): return lambda m, drop: wrap(m, path, lambda o: Lora(o, drop(.3)))
def drawing_hook(path):
    def change(m, drop):
        d = drop(.3)
        get(m, path).register_forward_hook(lambda o, i, out: d(out))
    return change
def drawing_pre_hook(path):
    def change(m, drop):
        d = drop(.3)
        get(m, path).register_forward_pre_hook(lambda o, i: (d(i[0]),))
    return change
P = 'transitions.0.'
NOISE = {f'{w.__name__}-{p}':w(P+p) for w,
    p in [*itertools.product([behind,before,lora,drawing_hook,drawing_pre_hook],
                             ['proj','f.fn.pool_q.conv','f.fn.qkv','f.fn.pool_k.conv','f.fn.proj']),
    *itertools.product([behind,before,drawing_hook,drawing_pre_hook],
                       ['f.fn.pool_q','f.fn.pool_q.norm','f.fn.pool_v','fuse','f.norm','f','g','g.fn.act'])]
    if not (w in (behind,before,drawing_pre_hook) and p=='fuse')
    and not (w in (behind,before) and p in ('f',))}

@pytest.mark.parametrize('change', NOISE.values(), ids=NOISE)
def test_02_randomness_in_a_transition(change): right(verdict(film, change))

@pytest.mark.parametrize('path', ['f.fn.pool_q','fuse.mlp','fuse.mlp.fc1','proj'])
def test_02_randomness_in_a_transition_of_images(path): right(verdict(picture, behind(P+path)))

def test_02_a_generator_of_ones_own():
    "A layer that draws from a generator that no global state tells of"
    class Own(nn.Module):
        def __init__(self, book, judges):
            super().__init__()
            self.g,self.book,self.judges = torch.Generator().manual_seed(3),book,judges
        def forward(self, x):
            if not self.judges and self.book.writing:
                self.book.note('own', x, (torch.rand(x.shape, generator=self.g)>.3).to(x))
            mask = self.book.find('own', x) if self.judges or self.book.writing else (torch.rand(x.shape,
                generator=self.g)>.3).to(x)
            return x*mask
    for path in ('transitions.0.proj','transitions.0.f.fn.pool_q'):
        right(verdict(film, lambda m, drop: wrap(m, path, lambda o: nn.Sequential(o, Own((d:=drop(0)).book, d.judge)))))

# --- 3: patches of classes and functions, hooks for all modules

@contextlib.contextmanager
def patched(owner, name, new):
    old,own = getattr(owner, name),name in vars(owner)
    setattr(owner, name, functools.wraps(old)(lambda *a, **kw: new(old, *a, **kw)))
    try: yield
    finally: # an inherited one must not stay as its own: torch.fx patches the base class
        if own: setattr(owner, name, old)
        else: delattr(owner, name)

def twice(old, self, x, *a, **kw): return old(self, x*2, *a, **kw)
def shifted(old, self, x, *a, **kw): return old(self, x, *a, **kw)+.1
PATCHES = {f'{c.__name__}-{h.__name__}':functools.partial(patched, c, 'forward', h)
           for c in (Attention, Mlp, nn.GELU, nn.Linear, nn.LayerNorm, nn.Dropout, nn.Identity, nn.Conv2d,
                     nn.Conv3d) for h in (twice, shifted)}
PATCHES['Linear.__call__'] = functools.partial(patched, nn.Linear, '__call__', twice)
PATCHES['Module.__call__'] = functools.partial(patched, nn.Module, '__call__',
                                               lambda old, self, *a, **kw: old(self, *a, **kw)*1.1
                                               if type(self) is nn.LayerNorm else old(self, *a, **kw))
FUNCTIONS = {n:functools.partial(patched, F, n, lambda old, x, *a, **kw: old(x, *a, **kw)*1.1)
             for n in ('gelu','linear','layer_norm','scaled_dot_product_attention','dropout')}

@pytest.mark.parametrize('patch', PATCHES.values(), ids=PATCHES)
@nets('vit image clip')
def test_03_patches_of_classes(net, patch): right(verdict(net, around=patch))

@pytest.mark.parametrize('patch', FUNCTIONS.values(), ids=FUNCTIONS)
@nets('vit')
def test_03_patches_of_functions(net, patch): right(verdict(net, around=patch))

def test_03_patch_made_before_the_model_and_undone_after():
    for patch in PATCHES.values():
        def net():
            with patch(): return small()
        right(verdict(net), 'exact')

@contextlib.contextmanager
def hooked(register, hook):
    handle = register(hook)
    try: yield
    finally: handle.remove()

def on(kind, new): return lambda m, *a: new(*a) if type(m) is kind else None
GLOBAL = {f'{what}-{kind.__name__}':functools.partial(hooked, register, on(kind, new))
    for kind in (nn.Linear, nn.LayerNorm, nn.GELU, Attention) for what,register,new in
    (('forward', hooks.register_module_forward_hook, lambda i,o: o*1.1),
     ('pre', hooks.register_module_forward_pre_hook, lambda i: (i[0]*1.1,)),
     ('backward', hooks.register_module_full_backward_hook, lambda i,o: tuple(None if g is None else g*1.1 for g in i)),
     ('backward_pre', hooks.register_module_full_backward_pre_hook, lambda o: tuple(g*1.1 for g in o)))}

@pytest.mark.filterwarnings('ignore')
@pytest.mark.parametrize('hook', GLOBAL.values(), ids=GLOBAL)
@nets('vit clip')
def test_03_hooks_for_all_modules(net, hook): right(verdict(net, around=hook))

# ---------------------------------------------------------------- 4: dropout that drops all

def rate(path, p=1.):
    def change(m, drop): get(m, path).p = p
    return change
@pytest.mark.parametrize('path', ['blocks.1.f.fn.proj_drop','blocks.1.g.fn.drop1','blocks.1.g.fn.drop2',
                                  'blocks.0.f.fn.attn_drop'])
def test_04_dropout_of_all(path): right(verdict(small, rate(path)))

@pytest.mark.parametrize('path', ['stages.1.0.f.fn.proj_drop','stages.0.0.g.fn.drop1','transitions.0.g.fn.drop2',
                                  'transitions.0.f.fn.proj_drop','head_drop'])
@nets('image clip')
def test_04_dropout_of_all_in_stages(net, path): right(verdict(net, rate(path)))

@pytest.mark.parametrize('kind', [nn.Dropout,nn.Dropout1d,nn.AlphaDropout], ids=lambda o: o.__name__)
def test_04_dropout_of_all_somewhere_else(kind):
    right(verdict(small, lambda m, drop: wrap(m, 'blocks.1.g.fn.act', lambda o: nn.Sequential(o, kind(1.)))))
    right(verdict(small, lambda m, drop: put(m, 'blocks.1.f.fn.norm', kind(1.))))
    right(verdict(seq, lambda m, drop: wrap(m, '1.g', lambda o: nn.Sequential(o, kind(1.)))))

# ---------------------------------------------------------------- 5: `forward` of an instance

def instance(path):
    "As accelerate's hooks do it: a `forward` on the instance that calls the old one"
    def change(m, drop):
        o = get(m, path)
        old = o.forward
        def new(*args, **kw):
            out = old(*(a*1.1 for a in args), **kw)
            return tuple(t*1.2 for t in out) if isinstance(out, tuple) else out*1.2
        o.forward = functools.update_wrapper(new, old)
    return change
def method(path):
    "A method in its place"
    def change(m, drop):
        o = get(m, path)
        o.forward = types.MethodType(lambda self, *a: tuple(t*1.2 for t in out)
                                     if isinstance(out:=type(self).forward(self, *a), tuple) else out*1.2, o)
    return change
PLACES = dict(vit='blocks.0 blocks.1.f blocks.0.g blocks.1.f.fn blocks.1.f.norm blocks.0.f.fn.qkv blocks.1.g.fn '
                  'blocks.1.g.fn.fc1 blocks.1.g.fn.act blocks.0.g.norm neck neck.fusion head patch_embed '
                  'patch_embed.proj',
              clip='stages.0.0 stages.1.0.f stages.1.0.g stages.0.0.f.fn stages.0.0.f.fn.qkv stages.0.0.f.fn.pool_k '
                   'stages.0.0.f.fn.pool_k.conv transitions.0.fuse transitions.0 transitions.0.f transitions.0.f.fn '
                   'transitions.0.f.fn.pool_q transitions.0.f.fn.pool_q.conv transitions.0.proj transitions.0.g')

@pytest.mark.parametrize('how', [instance,method])
@pytest.mark.parametrize('net, path', [(n,p) for n in PLACES for p in PLACES[n].split()], ids=lambda o: o
                         if isinstance(o, str) else None)
def test_05_forward_of_an_instance(net, path, how):
    "In training, and the same outputs without gradients"
    right(verdict(NETS[net], how(path)))
    both = []
    for judges in (False,True):
        m,xs = NETS[net]()
        if judges: apart(m)
        how(path)(m, None)
        with torch.no_grad(): both.append({'output 0':m(*xs), 'output 1':m.eval()(*xs)})
    assert distance(*both)[1] < 1e-12

@pytest.mark.parametrize('path', ['0','1','2'])
def test_05_forward_of_a_block_in_a_sequence(path):
    for how in (instance,method): right(verdict(seq, how(path)))

# ---------------------------------------------------------------- 6: the user's module is only read

@nets('vit image clip sequence')
def test_06_two_threads_going_backward_through_one_model(net):
    m,xs = net()
    own = [(o, dict(o._parameters), dict(o._buffers)) for o in m.modules()]
    ps,tries,found = list(m.parameters()),12,[]
    def loss(i): return weighted(m(*(x*(1+i) for x in xs)), i)
    want = [torch.autograd.grad(loss(i), ps) for i in (0,1)]
    gate = threading.Barrier(2)
    def work(i):
        try:
            for _ in range(tries):
                l = loss(i)
                gate.wait(30)
                found.append((i, torch.autograd.grad(l, ps)))
        except BaseException as e:
            found.append((i, e))
            gate.abort()
    threads = [threading.Thread(target=work, args=(i,)) for i in (0,1)]
    for t in threads: t.start()
    for t in threads: t.join()
    for o,p,b in own:
        assert o._parameters.keys()==p.keys() and all(o._parameters[k] is v for k,v in p.items())
        assert all(o._buffers[k] is v for k,v in b.items())
    for i,g in found:
        if isinstance(g, BaseException): assert ours(g), g # refused
        else: assert distance(dict(enumerate_names(g)), dict(enumerate_names(want[i])))[1] < 1e-10
def enumerate_names(gs): return ((f'parameter {i}', g) for i,g in enumerate(gs))

@nets('vit image clip sequence tail')
def test_06_nothing_is_written_to_the_module_not_for_a_moment(net):
    "Looked at from inside every call, forwards and backwards"
    m,xs = net()
    own = [(o, n, p) for o in m.modules() for n,p in o._parameters.items()]
    wrong,calls = set(),[]
    def look(*_):
        calls.append(1)
        wrong.update(n for o,n,p in own if o._parameters.get(n) is not p)
    for n,o in m.named_modules():
        if type(o) in (nn.Linear,nn.LayerNorm,nn.Conv2d,nn.Conv3d): o.register_forward_hook(look)
    loss = weighted(m(*xs))
    once = len(calls)
    loss.backward()
    assert not wrong and len(calls) > once # repeated, and looked at there

@nets('vit sequence')
def test_06_halves_that_remember_what_their_weights_are(net):
    "A cache by the identity of a weight, as quantisers and adapters keep one"
    class Cached(nn.Module):
        def __init__(self, m): super().__init__(); self.m,self.cache = m,{}
        def forward(self, x):
            for n,p in self.m.named_parameters(): self.cache.setdefault(n, id(p))
            if any(self.cache[n]!=id(p) for n,p in self.m.named_parameters()): raise KeyError('another weight')
            return self.m(x)
    right(verdict(net, lambda m, drop: wrap(m, 'blocks.1.f' if net is small else '1.f', Cached)))

# ---------------------------------------------------------------- 7: others that draw random numbers

class Wait(nn.Module):
    "`m`; while it is being called, another thread does `work`, and is done before it returns"
    def __init__(self, m, work): super().__init__(); self.m,self.work = m,work
    fn = property(lambda self: self.m.fn)
    def forward(self, x):
        t = threading.Thread(target=self.work)
        t.start(); t.join()
        return self.m(x)

@pytest.mark.parametrize('chunk', [1,2,None])
@pytest.mark.parametrize('net, path', [(small,'blocks.1.f'),(small,'blocks.0.g.fn'),(film,'stages.1.0.f'),
                                       (film,'transitions.0.f'),(film,'transitions.0.proj'),(seq,'1.g'),(small,'neck')])
def test_07_a_thread_that_draws_meanwhile(net, path, chunk):
    "Only what a module draws itself counts: such a model has no dropout"
    kind = Both if path=='neck' else Wait
    def change(m, drop): return wrap(m, path, lambda o: kind(o, lambda: torch.rand(2)))
    right(verdict(lambda: net(chunk), change), 'exact')
@pytest.mark.parametrize('at', [0,1,2])
@pytest.mark.parametrize('net, path', [(small,'blocks.1.f'),(film,'stages.1.0.g'),(seq,'1.g')],
                         ids=['vit','clip','sequence'])
def test_07_a_thread_that_draws_now_and_then(net, path, at):
    "During some parts of the batch and not during others, forwards or backwards"
    def change(m, drop):
        calls = []
        def work():
            calls.append(1)
            if len(calls)%3==at: torch.rand(2)
        wrap(m, path, lambda o: Wait(o, work))
    right(verdict(lambda: net(1), change), 'exact')

class Both(Wait):
    def forward(self, *xs):
        t = threading.Thread(target=self.work)
        t.start(); t.join()
        return self.m(*xs)

@pytest.mark.parametrize('net, path', [(small,'blocks.1.f'),(film,'stages.1.0.f'),(seq,'1.g')])
def test_07_the_threads_generator_is_not_rewound(net, path):
    "Nobody's numbers come twice"
    drawn = []
    def change(m, drop):
        wrap(m, path, lambda o: Wait(o, lambda: drawn.append(float(torch.rand((), dtype=torch.float64)))))
    m,xs = net(1)
    change(m, None)
    torch.manual_seed(0)
    for _ in range(2): weighted(m(*xs)).backward()
    assert len(set(drawn))==len(drawn) > 3

@nets('vit clip sequence')
def test_07_a_busy_thread(net):
    "Drawing all the time, in five steps"
    m,xs = net()
    stop = threading.Event()
    def draw():
        while not stop.wait(1e-4): torch.rand(3)
    t = threading.Thread(target=draw)
    t.start()
    try:
        for _ in range(5): right(verdict(lambda: (copy.deepcopy(m), xs)), 'exact')
    finally: stop.set(); t.join()

@pytest.mark.parametrize('where', ['blocks.1.f.fn.proj_drop','blocks.0.g.fn.drop1'])
def test_07_dropout_beside_a_thread_that_draws(where):
    "With dropout of its own the repetition is right, refused or warned of"
    def change(m, drop):
        put(m, where, drop(.3))
        wrap(m, 'blocks.1.f', lambda o: Wait(o, lambda: torch.rand(2)))
    right(verdict(small, change))

# ---------------------------------------------------------------- 8: what hooks and halves keep

class Keeps(nn.Module):
    "`m`, with what it was given and what it gave"
    def __init__(self, m, box): super().__init__(); self.m,self.box = m,box
    fn = property(lambda self: self.m.fn)
    def forward(self, x):
        o = self.m(x)
        self.box.append((x, o))
        return o
def keeps(how, path):
    def change(m, drop):
        m.box,o = [],get(m, path)
        if how=='module': put(m, path, Keeps(o, m.box))
        if how=='pre': o.register_forward_pre_hook(lambda o, i: m.box.append((i[0],)))
        if how=='hook': o.register_forward_hook(lambda o, i, out: m.box.append((i[0], out)))
        if how=='view': o.register_forward_pre_hook(lambda o, i: m.box.append((i[0][:,:1].detach(),)))
    return change
KEPT = [(small,'blocks.0.f'),(small,'blocks.1.g'),(small,'blocks.1.f.norm'),(small,'blocks.1.g.fn.fc1'),
        (film,'stages.0.0.f'),(film,'stages.1.0.g'),(film,'transitions.0.f'),(seq,'0.f'),(seq,'2.g')]

@pytest.mark.parametrize('when', ['after forward','after backward','in the loss'])
@pytest.mark.parametrize('how', ['module','pre','hook','view'])
@pytest.mark.parametrize('net, path', KEPT, ids=[p for _,p in KEPT])
def test_08_what_is_kept_stays_what_it_was(net, path, how, when):
    "Values after the forward pass, after the backward pass, and a loss of what was kept: as plain, or refused"
    def side(judges):
        m,xs = net(None)
        if judges: apart(m)
        keeps(how, path)(m, None)
        out = m(*xs)
        kept = [t for o in m.box[:1] for t in o]
        named = {f'output {i}':o.detach().clone() for i,o in enumerate(kept)}
        loss = weighted(out)
        if when=='in the loss': loss = loss + weighted(kept, 1)
        loss.backward()
        if when=='after backward': named = {f'output {i}':o.detach().clone() for i,o in enumerate(kept)}
        return {**named, **{n:p.grad for n,p in m.named_parameters()}}
    right(judge(lambda: side(False), lambda: side(True), kept_in_loss=when=='in the loss'))

# ---------------------------------------------------------------- 9: None where plain autograd gives None

class Reads(nn.Module):
    "A tail of the streams `which`"
    def __init__(self, which): super().__init__(); self.which,self.lin = which,nn.Linear(8, 3).double()
    def forward(self, *ys):
        return sum((self.lin(ys[i]).mean(1) for i in self.which), self.lin.bias.expand(len(ys[0]), 3))

@pytest.mark.parametrize('depth', [1,2,3])
@pytest.mark.parametrize('which', [(0,),(1,),(0,1),()], ids=str)
@pytest.mark.parametrize('chunk', [1,None])
def test_09_a_tail_that_reads_one_stream(which, depth, chunk):
    def net():
        m,xs = tailed(depth, chunk, 0)
        m.tail = Reads(which)
        return m,xs
    right(verdict(net))

@pytest.mark.parametrize('used', [0,1])
@pytest.mark.parametrize('depth', [1,2,3])
def test_09_an_output_that_nobody_uses(used, depth):
    right(verdict(lambda: sequence(depth, 2, 0), call=lambda m, *xs: m(*xs)[used]))

UNUSED = dict(detached=lambda m: Apply(m, lambda m,x: m(x).detach()),
              input_detached=lambda m: Apply(m, lambda m,x: m(x.detach())),
              constant=lambda m: Apply(m, lambda m,x: torch.ones_like(x)))
class Apply(nn.Module):
    def __init__(self, m, fn): super().__init__(); self.m,self.fn = m,fn
    def forward(self, x): return self.fn(self.m, x)
@pytest.mark.parametrize('kind', UNUSED)
@pytest.mark.parametrize('path', ['0.f','0.g','1.f','2.g'])
def test_09_halves_whose_weights_have_no_gradient(path, kind):
    right(verdict(seq, lambda m, drop: wrap(m, path, UNUSED[kind])))

def test_09_weights_without_gradient_do_not_decay():
    m,xs = tailed(2, 2, 0)
    m.tail = Reads((0,))
    was = {n:p.detach().clone() for n,p in m.named_parameters()}
    opt = torch.optim.AdamW(m.parameters(), lr=.1, weight_decay=.5)
    m(*xs).sum().backward()
    opt.step()
    for n,p in m.named_parameters(): assert torch.equal(p, was[n])==n.startswith('blocks.1.g'), n

# ---------------------------------------------------------------- 10: hooks for saved tensors

@nets('vit image clip sequence tail')
@pytest.mark.parametrize('how', ['identity','list','detached'])
def test_10_what_a_hook_holds_is_not_overwritten(net, how):
    held = []
    def pack(t):
        t = t.detach() if how=='detached' else t
        held.append((t, t.detach().clone()))
        return t if how!='list' else len(held)-1
    def unpack(o): return held[o][0] if how=='list' else o
    right(verdict(net, around=lambda: torch.autograd.graph.saved_tensors_hooks(pack, unpack)))
    m,xs = net()
    held.clear()
    with torch.autograd.graph.saved_tensors_hooks(pack, unpack): loss = weighted(m(*xs))
    loss.backward()
    for t,was in held: assert torch.equal(t, was)
    first = [p.grad.clone() for p in m.parameters() if p.grad is not None]
    m.zero_grad()
    with torch.autograd.graph.saved_tensors_hooks(pack, unpack): loss = weighted(m(*xs))
    for _ in range(2): loss.backward(retain_graph=True)
    assert all(torch.allclose(p.grad, 2*g, rtol=1e-9) for p,
               g in zip((p for p in m.parameters() if p.grad is not None), first))

# ---------------------------------------------------------------- 11: what plain autograd can do

@nets('vit image clip sequence tail')
def test_11_flop_counter(net):
    "The gradient is there, and so are the operations of the forward pass and, at least, those of the backward pass"
    from torch.utils.flop_counter import FlopCounterMode
    counts = []
    @contextlib.contextmanager
    def around():
        with FlopCounterMode(display=False) as c: yield
        counts.append(c.get_total_flops())
    right(verdict(net, around=around), 'exact')
    assert counts[0] >= counts[1] > 0 # ours, which repeats the forward pass, and the judge's

class Tagged(torch.Tensor): "A subclass that does nothing of its own, as fastai's images or torchvision's"
class Logged(torch.Tensor):
    "One that looks at each function"
    @classmethod
    def __torch_function__(cls, func, kinds, args=(), kwargs=None):
        return super().__torch_function__(func, kinds, args, kwargs or {})

@pytest.mark.parametrize('kind', [Tagged,Logged,nn.Parameter], ids=lambda o: o.__name__)
@nets('vit image clip sequence tail')
def test_11_subclasses_of_tensors_as_input(net, kind):
    def call(m, *xs):
        return m(*(nn.Parameter(x.detach()*1) if kind is nn.Parameter else x.as_subclass(kind) for x in xs))
    v = right(verdict(net, call=call))
    assert v.kind!='refused' or str(v.fault) # and if it is refused, then in words

@pytest.mark.parametrize('p', [0,.3])
@pytest.mark.parametrize('net, path', [('vit','patch_embed.proj'),('image','patch_embed.proj'),
    ('clip','patch_embed.proj'),('vit','blocks.1.f.fn.qkv'),('vit','blocks.0.f.fn.proj'),('vit','blocks.1.g.fn.fc1'),
    ('clip','stages.0.0.f.fn.qkv'),
    ('clip','stages.1.0.f.fn.pool_k.conv'),('clip','transitions.0.proj'),('clip','transitions.0.f.fn.qkv'),
    ('image','transitions.0.f.fn.pool_q.conv'),('image','transitions.0.fuse.mlp.fc1'),('vit','head')])
def test_11_adapters_on_any_layer(net, path, p):
    right(verdict(NETS[net], lambda m, drop: wrap(m, path, lambda o: Lora(o, drop(p) if p else None))), 'exact')
    right(verdict(NETS[net], lambda m, drop: wrap(m, path,
                                                  lambda o: nn.Sequential(o, drop(p) if p else nn.Identity()))),
          'exact')

@pytest.mark.parametrize('kw', [dict(attn_head_dim=8), dict(attn_head_dim=2),
                                dict(qk_norm=True, norm_layer=nn.LayerNorm), dict(gated=True), dict(qkv_bias=False),
                                dict(proj_bias=False), dict(scale_norm=True, norm_layer=nn.LayerNorm)], ids=str)
def test_11_other_attention(kw):
    right(verdict(small, lambda m, drop: put(m, 'blocks.1.f.fn',
                                             double(Attention(8, 2, **{**dict(qkv_bias=True), **kw})))), 'exact')

@pytest.mark.filterwarnings('ignore')
@pytest.mark.parametrize('vectorize', [True,False])
@nets('vit sequence clip')
def test_11_jacobian(net, vectorize):
    def side(judges):
        m,xs = net()
        if judges: apart(m)
        def few(*o): return tensors(m(*o))[0].flatten()[:5]
        jacobian = torch.autograd.functional.jacobian(few, xs, vectorize=vectorize)
        return dict(enumerate_names(tensors(jacobian)))
    right(judge(lambda: side(False), lambda: side(True)))

class Embeds(nn.Module):
    "Vectors for what the sign of a token says"
    def __init__(self, sparse): super().__init__(); self.e = double(nn.Embedding(3, 8, sparse=sparse))
    def forward(self, x): return x*self.e((x[...,0].sign()+1).long())
@pytest.mark.parametrize('sparse', [True,False])
@pytest.mark.parametrize('chunk', [1,None])
@pytest.mark.parametrize('path', ['0.f','2.g'])
def test_11_embeddings_in_a_half(path, chunk, sparse):
    right(verdict(lambda: seq(chunk), lambda m, drop: put(m, path, Embeds(sparse))))

class Int8(torch.Tensor):
    "Weights that know how to be multiplied, and little else, as torchao's"
    @classmethod
    def __torch_function__(cls, func, kinds, args=(), kwargs=None):
        if func.__name__ in ('chunk','split','t','repeat','__getitem__','unbind','transpose','mm','addmm','to'):
            raise NotImplementedError(f'Int8 knows no {func.__name__}')
        if func is F.linear:
            args,kinds = tuple(a.as_subclass(torch.Tensor) if isinstance(a, Int8) else a for a in args),()
        with torch._C.DisableTorchFunctionSubclass(): o = func(*args, **(kwargs or {}))
        return o.as_subclass(Int8) if func is torch.Tensor.detach else o
def quantised(m):
    for o in m.modules():
        if isinstance(o, nn.Linear): o.weight = nn.Parameter(o.weight.detach().as_subclass(Int8), requires_grad=False)
@pytest.mark.parametrize('net', [small,picture,film,seq])
def test_11_quantised_weights(net): right(verdict(net, lambda m, drop: quantised(m)))

@pytest.mark.filterwarnings('ignore')
@pytest.mark.parametrize('kind', ['script','trace','lazy'])
@pytest.mark.parametrize('which', 'fg')
def test_11_halves_that_cannot_be_repeated_are_refused_at_once(kind, which):
    half = dict(script=lambda: torch.jit.script(mlp()), trace=lambda: torch.jit.trace(mlp(), torch.randn(2, 3, 8)),
                lazy=lambda: nn.LazyLinear(8))[kind]()
    fs = dict(f=mlp(), g=mlp())
    fs[which] = nn.Sequential(nn.Tanh(), half)
    with pytest.raises(ValueError, match=rf'^{which} '): ReversibleBlock(**fs)

# ---------------------------------------------------------------- 12: a device context around the step; 13: words

@pytest.mark.parametrize('where', ['forward','backward','both'])
@pytest.mark.parametrize('device', ['cpu','meta'])
@nets('vit image clip sequence tail')
def test_12_a_device_context_around_the_step(net, device, where):
    "As PyTorch's own checkpoint tests ask: nothing is made on a device that nobody meant"
    def side(judges):
        m,xs = net()
        if judges: apart(m)
        xs = [x.clone().requires_grad_() for x in xs]
        with torch.device(device) if where!='backward' else contextlib.nullcontext(): out = m(*xs)
        loss = weighted(out)
        with torch.device(device) if where!='forward' else contextlib.nullcontext(): loss.backward()
        return {'output 0':tensors(out)[0].detach(), **dict(enumerate_names([x.grad for x in xs])),
                **{n:p.grad for n,p in m.named_parameters()}}
    right(judge(lambda: side(False), lambda: side(True)), 'exact')

@pytest.mark.parametrize('kind', ['jvp','dual'])
@pytest.mark.parametrize('chunk', [1,None])
def test_13_forward_mode_is_right_or_names_the_way_out(chunk, kind):
    # PyTorch has no forward mode for attention on a CPU
    m,xs = stack(3, chunk=chunk, make=lambda i: (mlp(),mlp())),streams()
    def run():
        if kind=='jvp': return torch.func.jvp(lambda *o: m(*o), xs, tuple(torch.ones_like(x) for x in xs))[1]
        with torch.autograd.forward_ad.dual_level():
            return [torch.autograd.forward_ad.unpack_dual(o).tangent
                    for o in tensors(m(*(torch.autograd.forward_ad.make_dual(x, torch.ones_like(x)) for x in xs)))]
    try: got = run()
    except (RuntimeError,ValueError,NotImplementedError) as e: assert 'set_reversible(False)' in str(e), e
    else:
        apart(m)
        assert distance(dict(enumerate_names(tensors(got))), dict(enumerate_names(tensors(run()))))[1] < 1e-10

@pytest.mark.parametrize('net', [small,seq])
def test_13_fullgraph_names_the_way_out(net):
    m,xs = net()
    torch._dynamo.reset()
    try:
        with pytest.raises(Exception, match=r'set_reversible\(False\)'):
            torch.compile(m, backend='eager', fullgraph=True)(*xs)
        m.set_reversible(False)
        torch.compile(m, backend='eager', fullgraph=True)(*xs)
    finally: torch._dynamo.reset()

EDITS = dict(deleted=lambda b: delattr(b.g, 'act') if hasattr(b.g, 'act') else b.g.__delitem__(2),
             added=lambda b: b.g.add_module('more', nn.Dropout(.5)), exchanged=lambda b: b.g.__setitem__(2, nn.Tanh()))
@pytest.mark.parametrize('edit', ['deleted','added','exchanged'])
def test_13_a_layer_that_was_changed_before_backward_is_not_called_a_switch(edit):
    "What was done is said; and no one reads of train and eval where nobody switched"
    m,xs = seq()
    loss = weighted(m(*xs))
    EDITS[edit](m[1])
    with warnings.catch_warnings(record=True) as said, contextlib.suppress(RuntimeError, ValueError):
        warnings.simplefilter('always')
        try: loss.backward()
        except (RuntimeError,ValueError) as e:
            assert 'train()' not in str(e) and ours(e) and 'g of block 1' in str(e), e
            return
    assert any('train()' not in str(w.message) and issubclass(w.category, RuntimeWarning) for w in said)

@pytest.mark.parametrize('value', [1.,1.5,-.1])
@pytest.mark.parametrize('shared', [True,False])
def test_13_a_drop_path_rate_set_later(value, shared):
    m,xs = seq()
    m[1].shared_drop_path = shared
    with pytest.raises(ValueError, match='drop_path must be at least 0 and below 1'):
        m[1].drop_path = value
        m(*xs)

# --- the self-check: every backward pass compares what came back with what a run began with

@contextlib.contextmanager
def self_check(mode):
    set_self_check(mode)
    try: yield
    finally: set_self_check('warn')

class State(nn.Module):
    "F or G that does `fn(self, x)`; its state is no tensor"
    def __init__(self, m, fn):
        super().__init__()
        self.m,self.fn,self.n = m,fn,0
        self.adapters = nn.ModuleList(double(nn.Linear(8, 8)) for _ in range(2)); self.scale = 1.
    def forward(self, x): return self.fn(self, x)

def counting(self, x):
    self.n += 1
    return self.m(x)*self.n
def noisy(self, x): return self.m(x)+torch.from_numpy(np.random.default_rng().standard_normal(tuple(x.shape)))
def by_mode(self, x): return self.m(x)*(2. if MODE.get() else 1.)
def by_flag(self, x): return self.m(x)*(2. if torch.are_deterministic_algorithms_enabled() else 1.)
MODE = contextvars.ContextVar('mode', default=False)
def task(self, x): return self.adapters[self.n](self.m(x))
def scaled(self, x): return self.m(x)*self.scale

def leave(m, name, value): return lambda m: setattr(half_of(m), name, value)
def half_of(m): return m[1].f if isinstance(m, ReversibleSequence) else m.blocks[1].f
ACTIVE = {'task index':(task, lambda m: setattr(half_of(m), 'n', 1)),
    'attribute':(scaled, lambda m: setattr(half_of(m), 'scale', 1.01)), 'counter':(counting, None),
    'does not repeat itself':(noisy, None), 'context':(by_mode, lambda m: MODE.set(False)),
    'global mode':(by_flag, lambda m: torch.use_deterministic_algorithms(False))}

def notices(net, change, between=None, before=lambda: None):
    "The backward pass warns by the run's name, says what to do, and raises when asked to"
    for mode in ('warn','error'):
        m,xs = net()
        change(m)
        before()
        with self_check(mode):
            loss = weighted(m(*xs))
            if between: between(m)
            if mode=='error':
                with pytest.raises(RuntimeError, match=r'set_reversible\(False\)') as e: loss.backward()
                assert ours(e.value)
            else:
                with warnings.catch_warnings(record=True) as said:
                    warnings.simplefilter('always')
                    loss.backward()
                said = [w for w in said if issubclass(w.category, RuntimeWarning)]
                assert len(said)==1, [str(w.message) for w in said]
                assert 'set_reversible(False)' in str(said[0].message) and 'block' in str(said[0].message)
        with self_check('off'), warnings.catch_warnings():
            warnings.simplefilter('error')
            m,xs = net()
            change(m)
            before()
            loss = weighted(m(*xs))
            if between: between(m)
            loss.backward()

@pytest.mark.parametrize('chunk', [1,None])
@pytest.mark.parametrize('kind', ACTIVE)
def test_self_check_sees_what_no_inspection_can(kind, chunk):
    fn,between = ACTIVE[kind]
    def before():
        MODE.set(True)
        if kind=='global mode': torch.use_deterministic_algorithms(True)
    def change(m): m[1].f = State(m[1].f, fn)
    try: notices(lambda: seq(chunk), change, between, before)
    finally:
        MODE.set(False)
        torch.use_deterministic_algorithms(False)

@pytest.mark.parametrize('chunk', [1,None])
@pytest.mark.parametrize('where', ['1.f','0.g'])
def test_self_check_or_exact_with_generators_forked_in_f(where, chunk):
    "What F draws leaves no trace in the global generator, which has moved on when F is repeated"
    def change(m, drop):
        d = drop(.3)
        def forked(self, x):
            with torch.random.fork_rng(devices=[]): return d(self.m(x))
        wrap(m, where, lambda o: State(o, forked))
    right(verdict(lambda: seq(chunk), change, between=lambda m: torch.rand(3)))

class Peft(nn.Module):
    "A layer with adapters, one of which is active, as peft's"
    def __init__(self, m):
        super().__init__()
        self.base,self.active = m.requires_grad_(False),'a'
        self.lora = nn.ModuleDict({k:double(nn.Linear(m.in_features, m.out_features)) for k in 'ab'})
    def set_adapter(self, name): self.active = name
    def forward(self, x): return self.base(x)+self.lora[self.active](x)

CHANGES = dict(adapter=lambda m: get(m, 'blocks.0.f.fn.qkv').set_adapter('b'),
               activation=lambda m: setattr(m.blocks[1].g.fn, 'act', nn.SiLU()),
               attention_scale=lambda m: (setattr(m.blocks[1].f.fn, 'fused_attn', False),
                                          setattr(m.blocks[1].f.fn, 'scale', 1.)),
               eps=lambda m: setattr(m.blocks[0].f.norm, 'eps', .1),
               eps_of_mlp=lambda m: setattr(m.blocks[0].g.norm, 'eps', .1),
               approximate=lambda m: setattr(m.blocks[0].g.fn.act, 'approximate', 'tanh'),
               heads=lambda m: (setattr(m.blocks[1].f.fn, 'num_heads', 4), setattr(m.blocks[1].f.fn, 'head_dim', 2)))
@pytest.mark.parametrize('chunk', [1,None])
@pytest.mark.parametrize('kind', CHANGES)
def test_self_check_or_refusal_of_changes_before_backward(kind, chunk):
    "Python state of layers the package knows: noticed by whatever looks first"
    right(verdict(lambda: small(chunk), lambda m, drop: wrap(m, 'blocks.0.f.fn.qkv', Peft) if kind=='adapter' else None,
                  between=CHANGES[kind]))

STAGES = dict(eps=lambda m: setattr(m.stages[1][0].f.norm, 'eps', .1),
              eps_of_pool=lambda m: setattr(m.stages[0][0].f.fn.pool_k.norm, 'eps', .1),
              activation=lambda m: setattr(m.stages[0][0].g.fn, 'act', nn.SiLU()),
              transition=lambda m: setattr(m.transitions[0].f.fn.pool_q.norm, 'eps', .1),
              transition_mlp=lambda m: setattr(m.transitions[0].g.fn, 'act', nn.SiLU()))
@pytest.mark.parametrize('kind', STAGES)
def test_self_check_or_refusal_in_stages(kind): right(verdict(film, between=STAGES[kind]))

@pytest.mark.parametrize('scale', [1e9,1e12])
@pytest.mark.parametrize('where', ['f','g'])
def test_self_check_sees_drift(scale, where):
    "Digits that a large F takes with it do not come back"
    def change(m): setattr(m[1], where, State(getattr(m[1], where), scaled)); getattr(m[1], where).scale = scale
    def net(): return stack(3, chunk=2, dtype=torch.float32),streams(dtype=torch.float32)
    notices(net, change)

def test_self_check_modes_are_checked():
    with pytest.raises(ValueError, match='warn.*error.*off'): set_self_check('loud')

@pytest.mark.parametrize('dtype', [torch.float64,torch.float32,'autocast'], ids=str)
@pytest.mark.parametrize('make', [CASES[k] for k in ('sequence3','tail4','vit3','vit4','image6','clip5')],
                         ids='sequence3 tail4 vit3 vit4 image6 clip5'.split())
def test_self_check_is_silent_on_healthy_models(make, dtype):
    """Training, with all randomness, by chunks and whole, streams a hundred times larger too, frozen weights, a
    retained graph"""
    with warnings.catch_warnings():
        warnings.simplefilter('error', RuntimeWarning)
        m,xs = make(dtype=torch.float32 if dtype=='autocast' else dtype, b=3)
        for scale in (1,100):
            with torch.autocast('cpu', torch.bfloat16) if dtype=='autocast' else contextlib.nullcontext():
                loss = weighted(m(*(x*scale for x in xs)))
            loss.backward(retain_graph=scale==1)
            if scale==1: loss.backward()
        for p in list(m.parameters())[::2]: p.requires_grad_(False)
        weighted(m(*xs)).backward()

@pytest.mark.parametrize('autocast', [True,False])
@pytest.mark.parametrize('make', [CASES['tail4'],CASES['vit3'],CASES['clip5']], ids=['tail4','vit3','clip5'])
def test_self_check_is_silent_while_a_model_trains(make, autocast):
    m,xs = make(dtype=torch.float32, b=3)
    opt = torch.optim.AdamW(m.parameters(), lr=1e-2)
    with warnings.catch_warnings():
        warnings.simplefilter('error', RuntimeWarning)
        for s in range(10):
            with torch.autocast('cpu', torch.bfloat16, enabled=autocast): loss = weighted(m(*xs)).square()
            loss.backward()
            opt.step()
            opt.zero_grad()

def test_self_check_and_numbers_that_are_none():
    "A sample that is not a number, and an infinite one, are no drift: the loss tells of them"
    with warnings.catch_warnings():
        warnings.simplefilter('error', RuntimeWarning)
        for bad in (float('nan'),float('inf')):
            m,xs = seq()
            xs[0][1,0,0] = bad
            weighted(m(*xs)).backward()

def flipped(self, x): return self.m(x).flip(-1) if self.n else self.m(x)
def centred(self, x): return F.layer_norm(self.m(x), x.shape[-1:])*self.scale
def exchanged(self, x): return self.m(x).roll(1, 1) if self.n else self.m(x)
BALANCED = dict(flipped=(flipped, 'n', 1), centred=(centred, 'scale', 2.), exchanged=(exchanged, 'n', 1))
@pytest.mark.parametrize('chunk', [1,None])
@pytest.mark.parametrize('kind', BALANCED)
def test_self_check_sees_changes_that_leave_the_sum_of_an_image(kind, chunk):
    "Channels or tokens in another order, or a centred output of another size, add up to what they did"
    fn,name,value = BALANCED[kind]
    def change(m): m[1].f = State(m[1].f, fn)
    notices(lambda: seq(chunk), change, lambda m: setattr(m[1].f, name, value))

TAILS = dict(eps=lambda m: setattr(m.tail.norm, 'eps', .5), layer=lambda m: setattr(m.tail, 'drop', nn.Tanh()),
             dropout=lambda m: setattr(m.tail.drop, 'p', .5))
@pytest.mark.parametrize('kind', TAILS)
def test_self_check_or_refusal_of_a_changed_tail(kind):
    "A tail is repeated too, though nothing is rebuilt from it"
    right(verdict(tail, between=TAILS[kind]), 'refused', 'warned', *(('exact',) if kind=='dropout' else ()))

def test_self_check_or_refusal_of_a_changed_neck():
    right(verdict(small, between=lambda m: setattr(m.neck.fusion.norm, 'eps', .5)), 'refused', 'warned')

# ---------------------------------------------------------------- what is kept: healthy layers are not suspected

class Turned(nn.Module):
    "`m` over channels: its answer is a view of what it computed"
    def __init__(self, m, how): super().__init__(); self.m,self.how = m,how
    def forward(self, x): return self.how(self.m(x.transpose(1, 2)))
VIEWS = dict(transpose=lambda o: o.transpose(1, 2), reshape=lambda o: o.permute(0, 2, 1).reshape(len(o), 3, 8),
    twice=lambda o: o.transpose(1, 2)[...,:8].view(len(o), 3, 8),
    split=lambda o: o.transpose(1, 2).chunk(1, -1)[0])

@pytest.mark.parametrize('how', VIEWS.values(), ids=VIEWS)
@pytest.mark.parametrize('layer', [lambda: nn.Conv1d(8, 8, 3, padding=1), lambda: nn.GroupNorm(2, 8)],
                         ids=['conv','norm'])
@pytest.mark.filterwarnings('error::RuntimeWarning')
def test_a_layer_that_answers_with_a_view_keeps_nothing(layer, how):
    m = stack(2, chunk=2, make=lambda i: (Turned(layer(), how),mlp()))
    weighted(m(*streams())).backward()
