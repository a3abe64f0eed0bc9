"""What software for reversible networks promises and often breaks, numbered R1 to R27 (R20 and R21, many processes and the compiler, stand elsewhere).
Each is asked of a sequence of any F and G, of one with a tail, and of a real, narrow Rev-ViT; with two different streams, odd and even depths, and every
kind of randomness on. The judge is ordinary autograd: the same weights from the same seed with `set_reversible(False)`, relative L2 errors."""
import copy, multiprocessing, pickle, random, re, threading, warnings
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager, nullcontext
from functools import partial
from pathlib import Path

import numpy as np, pytest, timm, torch
from torch import nn
from torch.nn.functional import cross_entropy, scaled_dot_product_attention
from torch.nn.utils import prune
from torch.utils.checkpoint import checkpoint
from revvit.engine import ReversibleBlock, ReversibleSequence, chunk_size
from revvit.layers import MlpHalf
from revvit.testing import check_directional, check_grads, check_inverse, drift, saved_bytes, weighted_sum
from revvit.vit import RevViT

torch.set_num_threads(1)
REMEDY = r'set_reversible\(False\)'

# ---------------------------------------------------------------- models, and how they are compared

class Tokens(nn.Module):
    "An F that mixes tokens: norm, attention, dropout of its weights"
    def __init__(self, d, p=0.):
        super().__init__()
        self.norm,self.qkv,self.p = nn.LayerNorm(d),nn.Linear(d, 3*d),p
    def forward(self, x):
        q,k,v = self.qkv(self.norm(x)).chunk(3, -1)
        return scaled_dot_product_attention(q, k, v, dropout_p=self.p if self.training else 0.)

def mlp(d=8, p=0.): return nn.Sequential(nn.LayerNorm(d), nn.Linear(d, 2*d), nn.GELU(), nn.Dropout(p), nn.Linear(2*d, d))

@torch.no_grad()
def used(m):
    "`m` as after some training: no bias is 0 and no scale 1"
    for p in m.parameters(): p.add_(torch.randn(p.shape), alpha=.05)
    return m

def stack(depth=3, p=0., drop_path=0., chunk=2, make=None, d=8, dtype=torch.float64):
    "A sequence of `depth` blocks; `make(i)` gives F and G of block i"
    torch.manual_seed(depth)
    return used(ReversibleSequence([ReversibleBlock(*(make(i) if make else (Tokens(d, p),mlp(d, p))), drop_path) for i in range(depth)], chunk)).to(dtype)

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

def streams(b=5, n=3, d=8, seed=1, dtype=torch.float64): return tuple(torch.randn(2, b, n, d, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype))
def images(b=5, size=32, seed=1, dtype=torch.float64): return (torch.randn(b, 3, size, size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype),)

def sequence(depth, chunk, rate=1, dtype=torch.float64, b=5): return stack(depth, .3*rate, .2*rate, chunk, dtype=dtype),streams(b, dtype=dtype)
def tailed(depth, chunk, rate=1, dtype=torch.float64, b=5):
    blocks = stack(depth, .3*rate, .2*rate, chunk)
    return Tailed(blocks, used(Fuse(p=.3*rate))).to(dtype),streams(b, dtype=dtype)
def vit(depth, chunk, rate=1, dtype=torch.float64, b=5, dim=32, heads=2, drop=.3, **kw):
    torch.manual_seed(depth)
    m = RevViT(img_size=32, patch_size=8, embed_dim=dim, num_heads=heads, depth=depth, num_classes=5, chunk=chunk,
               drop_path_rate=.2*rate, proj_drop_rate=drop*rate, attn_drop_rate=.3*rate, drop_rate=.3*rate, **kw)
    return used(m).to(dtype),images(b, dtype=dtype)

CASES = dict(sequence3=partial(sequence, 3, 2), sequence4=partial(sequence, 4, None), tail3=partial(tailed, 3, 2), tail4=partial(tailed, 4, None),
             vit3=partial(vit, 3, 2), vit4=partial(vit, 4, None, dim=48, heads=4, drop=0, shared_drop_path=True))
both = pytest.mark.parametrize('make', CASES.values(), ids=CASES.keys())
two = pytest.mark.parametrize('make', [CASES['tail3'], CASES['vit4']], ids=['tail3','vit4'])

def blocks_of(m): return m if isinstance(m, ReversibleSequence) else m.blocks
def put(m, half, block, new): setattr(blocks_of(m)[block], half, new.to(next(m.parameters()).dtype))
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
    return torch.get_rng_state().numpy().tobytes(),(kind, keys.tobytes(), *rest),random.getstate()

class Trap(nn.Module):
    "`m`, but the calls whose numbers are in `at` fail; the first is 1"
    def __init__(self, m, *at, error=KeyError): super().__init__(); self.m,self.at,self.error,self.calls = m,at,error,0
    def forward(self, x):
        self.calls += 1
        if self.calls in self.at: raise self.error('trap')
        return self.m(x)

# ---------------------------------------------------------------- the gradient core: R1 to R19

@pytest.mark.parametrize('depth', [*range(1, 10), 24])
@pytest.mark.parametrize('kind', [sequence, tailed, vit])
def test_R01_gradients_of_everything_at_any_depth(kind, depth):
    "float64: outputs, input gradients and parameter gradients are those of plain autograd, with the rates on and off, in parts and whole"
    for chunk,rate in ((2,0),(None,1),(1,1)):
        m,xs = kind(depth, chunk, rate, b=3)
        check_grads(m, *xs)

@both
def test_R02_masks_are_those_of_plain_and_are_replayed(make):
    "Dropout, attention dropout and drop path: the plain mode's masks, and a gradient that agrees with finite differences"
    m,xs = make()
    a,b = (outputs(plain(m, lambda: (torch.manual_seed(s),m(*xs))[1])) for s in (0,1))
    assert error(a, b) > 1e-3 # there are masks
    check_grads(m, *xs)
    torch.manual_seed(123)
    m,xs = make(b=3)
    check_directional(m, *xs)

@both
def test_R03_each_of_three_forwards_keeps_its_masks(make):
    m,xs = make()
    want = [grads(m, xs, s) for s in range(3)]
    losses = [loss_of(m, xs, s) for s in range(3)]
    for s in (1,2,0): assert same(torch.autograd.grad(losses[s], needing(m)), want[s])

@both
def test_R04_a_block_used_twice_and_a_model_called_twice(make):
    m,xs = make()
    blocks_of(m)[2] = blocks_of(m)[0]
    check_grads(m, *xs)
    def twice():
        torch.manual_seed(0)
        a,b = m(*xs),m(*(x.flip(0) for x in xs))
        return torch.autograd.grad(weighted_sum((outputs(a), outputs(b))), needing(m))
    agrees(m, twice)

@both
def test_R05_random_states(make):
    "After forward torch, NumPy and Python stand where plain autograd leaves them, after backward where they stood before, and an evaluation moves nothing"
    m,xs = make()
    def after(seed):
        loss = loss_of(m, xs, seed)
        was = rng_states()
        loss.backward()
        assert rng_states()==was
        return was
    first,second = after(0),after(1)
    assert first==plain(m, lambda: after(0)) and second==plain(m, lambda: after(1)) and first!=second # nobody seeds
    m.eval()
    was = rng_states()
    m(*xs)
    with torch.no_grad(): m(*xs)
    assert rng_states()==was

def train(m, xs, opt, on, steps=20):
    "Weights after `steps` steps on shuffled batches"
    m = copy.deepcopy(m)
    m.set_reversible(on)
    opt,rows = opt(m.parameters()),torch.arange(len(xs[0]))
    torch.manual_seed(7)
    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(rows, *xs), batch_size=8, shuffle=True)
    for _ in range(steps//len(loader)):
        for i,*batch in loader:
            loss = cross_entropy(torch.cat([o.flatten(1) for o in outputs(m(*batch))], 1), i%3)
            loss.backward()
            opt.step()
            opt.zero_grad()
    return [p.detach() for p in m.parameters()]

@both
def test_R06_training_repeats_to_the_bit_and_follows_plain(make):
    "20 steps with shuffling, dropout and drop path in float32 (two loading processes: notebook 09_training)"
    m,xs = make(dtype=torch.float32, b=40)
    adamw,sgd = partial(torch.optim.AdamW, lr=1e-3),partial(torch.optim.SGD, lr=1e-2, momentum=.9)
    first = train(m, xs, adamw, True)
    assert error(first, m.parameters()) > 1e-3 # it trains
    assert same(train(m, xs, adamw, True), first)
    # Adam divides the keys' bias, whose gradient is rounding and nothing else, by its own size; so SGD here
    assert error(train(m, xs, sgd, True), train(m, xs, sgd, False)) < 1e-5

@pytest.mark.parametrize('inside', [True,False], ids=['inside','outside'])
@pytest.mark.parametrize('dtype', [torch.bfloat16,torch.float16], ids=str)
@both
def test_R07_autocast(make, dtype, inside):
    "The replay is under the forward's autocast wherever backward runs, and streams stay float32"
    m,xs = make(dtype=torch.float32)
    seen = []
    blocks_of(m)[1].f.register_forward_pre_hook(lambda f,args: seen.append(args[0].dtype))
    def run(seed):
        with torch.autocast('cpu', dtype):
            loss = loss_of(m, xs, seed)
            if inside: return torch.autograd.grad(loss, needing(m))
        return torch.autograd.grad(loss, needing(m))
    errors = sorted(error(run(s), plain(m, lambda: run(s))) for s in range(6))
    assert set(seen)=={torch.float32}
    # where a rebuilt number lies within float32 rounding of the border between two half-precision values, one step of those shows (a replay
    # without autocast is 4e-3 off, every time)
    assert errors[1] < 1e-6 and errors[-1] < 1e-3

@pytest.mark.parametrize('kind', [sequence, vit])
def test_R08_a_whole_model_in_bfloat16(kind):
    m,xs = kind(12, 2, dtype=torch.bfloat16)
    a,b = (torch.cat([o.double().flatten() for o in g]) for g in (grads(m, xs),plain(m, lambda: grads(m, xs))))
    assert a.isfinite().all() and float(a@b/a.norm()/b.norm()) > .999

@pytest.mark.parametrize('plant', ['loss','scale'])
@both
def test_R09_grad_scaler(make, plant):
    "An infinity, planted or from a scale that float16 cannot hold, is seen: the step is skipped, the scale halved, and the next step is plain's"
    def run():
        m,xs = make(dtype=torch.float32)
        m.set_reversible(on)
        opt,scaler = torch.optim.SGD(m.parameters(), lr=1e-2),torch.amp.GradScaler('cpu', init_scale=2.**60 if plant=='scale' else 2.**8)
        before = [p.detach().clone() for p in m.parameters()]
        for step in range(2):
            with torch.autocast('cpu', torch.float16): loss = loss_of(m, xs, step)
            if step==0 and plant=='loss': loss = loss*float('inf')
            scale = scaler.get_scale()
            scaler.scale(loss).backward()
            scaler.step(opt)
            scaler.update()
            opt.zero_grad()
            if step==0:
                assert same([p.detach() for p in m.parameters()], before) and scaler.get_scale()==scale/2
                if plant=='scale': scaler.update(2.**8)
        after = [p.detach() for p in m.parameters()]
        assert error(after, before) > 1e-5 and scaler.get_scale()==2.**(8 if plant=='scale' else 7)
        return after
    on = True; got = run()
    on = False; assert error(got, run()) < 1e-6

@both
def test_R10_accumulation_frozen_parameters(make):
    m,xs = make()
    def accumulated(n, seed=0):
        m.zero_grad()
        torch.manual_seed(seed)
        for part in zip(*(x.chunk(n) for x in xs)): weighted_sum([o.square() for o in outputs(m(*part))]).backward()
        return [p.grad for p in m.parameters()]
    assert len(xs[0].chunk(4))==3 # of 2, 2 and 1
    agrees(m, partial(accumulated, 4))
    for i,p in enumerate(m.parameters()): p.requires_grad_(i%3==1)
    agrees(m, partial(accumulated, 4)) # the same pattern of None, too
    assert [p.grad is None for p in m.parameters()]==[i%3!=1 for i,_ in enumerate(m.parameters())]

def test_R10_four_micro_batches_are_one_batch():
    m,xs = stack(3),streams(8)
    sums = lambda n: sum((torch.stack(m(*o)).square().sum() for o in zip(*(x.chunk(n) for x in xs))), torch.zeros(()))
    assert error(torch.autograd.grad(sums(4), needing(m)), plain(m, lambda: torch.autograd.grad(sums(1), needing(m)))) < 1e-12

@pytest.mark.parametrize('layer', [lambda: nn.BatchNorm1d(3), lambda: nn.SyncBatchNorm(3), lambda: nn.InstanceNorm1d(3, track_running_stats=True),
    lambda: nn.utils.spectral_norm(nn.Linear(8, 8)), lambda: nn.utils.parametrizations.spectral_norm(nn.Linear(8, 8))], ids=['batch','sync','instance','spectral','spectral2'])
def test_R10_layers_with_running_statistics_are_refused_by_name(layer):
    with pytest.raises(ValueError, match=r'^g holds .* \(1.*state changes in every forward pass'): ReversibleBlock(mlp(), nn.Sequential(nn.GELU(), layer()))
    m = stack(3)
    m[1].f = layer().double() # past the constructor: then where it runs
    with pytest.raises(ValueError, match='^f of block 1 holds .*state changes'): m(*streams())
    class Tail(Fuse):
        def forward(self, x1, x2): return self.more(super().forward(x1, x2)[:,:,None].expand(-1, -1, 8))
    tail = Tail()
    tail.more = layer()
    with pytest.raises(ValueError, match='^the tail holds .* \\(more.*state changes'): stack(3)(*streams(), tail=tail.double())

@both
def test_R11_frozen_stem(make):
    "Streams that need no gradient: every parameter behind them gets its own, exactly"
    m,xs = make()
    want = dict(zip([n for n,_ in m.named_parameters()], plain(m, lambda: grads(m, xs))))
    for n,p in m.named_parameters(): p.requires_grad_(not n.startswith(('patch_embed','pos_embed','0.','blocks.0.')))
    loss_of(m, xs).backward()
    for n,p in m.named_parameters():
        if p.requires_grad: assert error([p.grad], [want[n]]) < 1e-9, n # one at a time, and a bias of keys has none but rounding
        else: assert p.grad is None

@both
def test_R12_asking_for_some_gradients_touches_no_other(make):
    m,xs = make()
    x = xs[0].clone().requires_grad_()
    xs = (x, *xs[1:])
    some = needing(m)[::3]
    agrees(m, lambda: torch.autograd.grad(loss_of(m, xs), [x, *some]))
    want = plain(m, lambda: torch.autograd.grad(loss_of(m, xs), [x, *some]))
    assert x.grad is None and all(p.grad is None for p in m.parameters())
    loss_of(m, xs).backward(inputs=[x])
    assert error([x.grad], want[:1]) < 1e-12 and all(p.grad is None for p in m.parameters())
    loss_of(m, xs).backward(inputs=some)
    assert error([p.grad for p in some], want[1:]) < 1e-12
    assert [p.grad is None for p in m.parameters()]==[not any(p is o for o in some) for p in m.parameters()]

@both
def test_R13_parameter_hooks_fire_once_with_the_final_gradient(make):
    m,xs = make()
    want,fired,after = plain(m, lambda: grads(m, xs)),[],[]
    for i,p in enumerate(m.parameters()):
        p.register_hook(lambda g, i=i: fired.append((i, g.clone())) or 2*g)
        p.register_post_accumulate_grad_hook(lambda p, i=i: after.append((i, p.grad.clone())))
    loss_of(m, xs).backward()
    for seen,times in ((fired,1),(after,2)):
        assert sorted(i for i,_ in seen)==list(range(len(want)))
        assert error([g for _,g in sorted(seen, key=lambda o: o[0])], [times*g for g in want]) < 1e-12

@both
def test_R13_hooks_on_f_and_g_run_and_count(make):
    "Once a part forwards and once a part backwards; with dropout the parts are one, and the part that found that out comes on top"
    for rate in (0,1):
        m,xs = make(rate, b=6)
        calls,back = [],[]
        blocks_of(m)[1].f.register_forward_hook(lambda *o: calls.append(len(o[2])))
        blocks_of(m)[1].f.register_full_backward_hook(lambda *o: back.append(1))
        agrees(m, lambda: grads(m, xs))
        calls.clear(); back.clear()
        if rate: blocks_of(m)[1].drop_path = 0.
        grads(m, xs)
        chunk = blocks_of(m).chunk
        parts = 3*[2] if chunk else [6]
        want = 2*parts if not rate else [6,6] if not chunk else [2,6,6]
        assert calls==want and len(back)==(1 if rate else len(parts))

@both
def test_R14_double_backward_is_refused_with_its_remedy(make):
    "A gradient penalty is never dropped: an error that says what to do, and that is right"
    m,xs = make()
    x = xs[0].clone().requires_grad_()
    def penalised():
        loss = loss_of(m, (x, *xs[1:])).square()
        g, = torch.autograd.grad(loss, x, create_graph=True)
        return torch.autograd.grad(loss + 10*g.square().sum(), needing(m), allow_unused=True)
    with pytest.raises(RuntimeError, match='double backward.*'+REMEDY): penalised()
    with warnings.catch_warnings():
        warnings.simplefilter('ignore') # PyTorch's, about memory
        with pytest.raises(RuntimeError, match=REMEDY): loss_of(m, xs).backward(create_graph=True)
    agrees(m, lambda: grads(m, xs))
    penalty = plain(m, penalised)
    assert error(penalty, plain(m, lambda: grads(m, xs))) > 1e-3

@both
def test_R15_retained_graphs_can_be_walked_again_and_freed_ones_not(make):
    m,xs = make()
    loss,ps = loss_of(m, xs),needing(m)
    one,two,three = (torch.autograd.grad(loss, ps, retain_graph=o) for o in (True,True,False))
    assert same(one, two) and same(one, three)
    with pytest.raises(RuntimeError, match='backward through the graph a second time'): torch.autograd.grad(loss, ps)
    loss = loss_of(m, xs) # two calls for a half of the parameters each
    late = torch.autograd.grad(loss, ps[len(ps)//2:], retain_graph=True)
    assert error([*torch.autograd.grad(loss, ps[:len(ps)//2]), *late], one) < 1e-12

@both
def test_R16_inputs_and_outputs_may_be_edited_parameters_and_buffers_not(make):
    m,xs = make()
    want = grads(m, xs)
    mine = [x.clone() for x in xs]
    torch.manual_seed(0)
    out = m(*mine)
    loss = weighted_sum(out)
    with torch.no_grad():
        for o in (*outputs(out), *mine): o.zero_()
    if not isinstance(m, RevViT): # there the stem keeps the images, and autograd itself refuses
        assert error(torch.autograd.grad(loss, needing(m)), want) < 1e-12
    for half,name in (('f','norm.weight'),('g','(norm|0).weight')):
        loss = loss_of(m, xs)
        with torch.no_grad(): next(getattr(blocks_of(m)[1], half).parameters()).mul_(1) # the value does not matter
        with pytest.raises(RuntimeError, match=f"'{name}' in {half} of block 1 was changed between forward and backward.*{REMEDY}"): loss.backward()
        m.zero_grad()
    agrees(m, lambda: grads(m, xs))

class Table(nn.Module):
    "A G with a buffer"
    def __init__(self): super().__init__(); self.register_buffer('table', torch.linspace(.5, 1, 8))
    def forward(self, x): return x.sin()*self.table

def test_R16_buffers():
    m,xs = stack(3, make=lambda i: (Tokens(8),Table())),streams()
    check_grads(m, *xs)
    for edit in (lambda: m[2].g.table.mul_(2), lambda: setattr(m[2].g, 'table', m[2].g.table*2), lambda: m.load_state_dict(m.state_dict())):
        loss = loss_of(m, xs)
        edit()
        with pytest.raises(RuntimeError, match="in g of block 2 was changed between"): loss.backward()

@both
def test_R17_a_mode_switched_in_between_is_refused(make):
    m,xs = make()
    for part,name in ((m,''),(blocks_of(m)[0].f,'f of block 0'),(blocks_of(m)[2].g,'g of block 2')):
        loss = loss_of(m, xs)
        part.eval()
        with pytest.raises(RuntimeError, match=f'{name}.* was switched between train.. and eval.. before backward.*{REMEDY}'): loss.backward()
        m.train()
        m.zero_grad()
        loss = loss_of(m.eval(), xs)
        part.train()
        with pytest.raises(RuntimeError, match='was switched'): loss.backward()
        m.train()
        m.zero_grad()
    agrees(m, lambda: grads(m, xs))

@pytest.mark.parametrize('half', 'fg')
@both
def test_R18_an_error_in_f_or_g_leaves_nothing_half_done(make, half):
    "In forward or backward: no gradient on any block or tail, random states and modes as they were, the next step exact"
    m,xs = make()
    trap = Trap(getattr(blocks_of(m)[1], half))
    put(m, half, 1, trap)
    want = plain(m, lambda: grads(m, xs))
    trap.calls = 0
    with torch.autocast('cpu', torch.bfloat16, enabled=False): grads(m, xs)
    trap.at = (1, trap.calls+trap.calls) # the first call forwards, the last one backwards
    trap.calls = 0
    with pytest.raises(KeyError, match='trap'): loss_of(m, xs)
    trap.calls = trap.at[1]//2
    loss = loss_of(m, xs)
    was = rng_states()
    with pytest.raises(KeyError, match='trap'): loss.backward()
    assert rng_states()==was and torch.is_grad_enabled() and not torch.is_autocast_enabled('cpu') and m.training
    assert all(p.grad is None for n,p in m.named_parameters() if not n.startswith('head')) # what is behind blocks and tail, autograd did before
    m.zero_grad()
    loss_of(m, xs).backward()
    assert error([p.grad for p in m.parameters()], want) < 1e-12

@both
def test_R18_random_states_after_an_error_in_forward_are_those_of_plain(make):
    def after():
        m,xs = make()
        m.set_reversible(on)
        put(m, 'g', 2, Trap(blocks_of(m)[2].g, 1))
        with pytest.raises(KeyError): loss_of(m, xs)
        return rng_states()
    on = True; got = after()
    on = False; assert got==after()

@both
def test_R19_evaluation(make):
    "With gradients it is plain's, five calls agree to the bit, and training with all rates 0 is the same function"
    m,xs = make()
    check_grads(m.eval(), *xs)
    first = outputs(m(*xs))
    for _ in range(4): assert same(outputs(m(*xs)), first)
    with torch.no_grad(): assert error(outputs(m(*xs)), first) < 1e-12
    m,xs = make(rate=0)
    trained = outputs(m(*xs))
    assert same(outputs(m.eval()(*xs)), trained) and error(outputs(plain(m, lambda: m(*xs))), trained) < 1e-12

# ---------------------------------------------------------------- copies, memory, drift: R22 to R24

@pytest.fixture(scope='module')
def other_process():
    "Runs functions in a fresh interpreter that gives freed memory back at once"
    with pytest.MonkeyPatch.context() as mp:
        for k in ('MALLOC_MMAP_THRESHOLD_','MALLOC_TRIM_THRESHOLD_'): mp.setenv(k, '65536')
        with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context('spawn')) as pool:
            pool.submit(int).result()
            yield lambda fn, *args: pool.submit(fn, *args).result(timeout=300)

def answers(m, xs):
    "Output in evaluation, and gradients in training"
    with torch.no_grad(): out = outputs(m.eval()(*xs))
    return [o.numpy() for o in (*out, *grads(m.train(), xs))]

@both
def test_R22_copies_fresh_and_used(make, other_process):
    "deepcopy, pickle, another process and a state_dict: bit-equal, and no name depends on the mode"
    m,xs = make()
    for used in (False,True):
        if used: loss_of(m, xs).backward()
        want,twin = answers(m, xs),make()[0]
        for p in twin.parameters(): nn.init.zeros_(p)
        twin.load_state_dict(m.state_dict())
        got = [answers(o, xs) for o in (copy.deepcopy(m), pickle.loads(pickle.dumps(m)), twin)] + [other_process(answers, m, xs)]
        assert all(np.array_equal(a, b) for o in got for a,b in zip(o, want, strict=True))
    assert list(m.state_dict())==plain(m, lambda: list(m.state_dict()))

def status(key): return int(re.search(rf'{key}:\s+(\d+)', Path('/proc/self/status').read_text())[1])/1024

def extra_peak(step):
    "Megabytes that `step` takes at its peak, over those before it"
    Path('/proc/self/clear_refs').write_text('5') # the kernel counts anew
    before = status('VmRSS')
    step()
    return status('VmHWM')-before

def wide(kind, depth):
    "A model and a batch that is large beside it; every block drops alike, so that only the depths differ"
    if kind==vit:
        m,xs = vit(depth, 8, dtype=torch.float32, b=256, dim=48, heads=4)
        for o in m.blocks: o.drop_path = .05
        return m,xs
    return stack(depth, .3, .2, 64, lambda i: (nn.Sequential(nn.LayerNorm(64), nn.Linear(64, 64), nn.GELU(), nn.Dropout(.3), nn.Linear(64, 64)),mlp(64)),
                 dtype=torch.float32),streams(512, 16, 64, dtype=torch.float32)

def memory(kind):
    "Extra peak at depths 4 and 16 and of plain at 16, growth in 50 forwards, and whether the inputs survived"
    torch.set_num_threads(1)
    peaks = []
    for depth,on in ((4,True),(16,True),(16,False)):
        m,xs = wide(kind, depth)
        m.set_reversible(on)
        def step(): loss_of(m, xs).backward()
        if on: step() # the buffers of the weights' gradients exist from here on
        peaks.append(min(extra_peak(step) for _ in range(3)) if on else extra_peak(step))
        if (depth,on)==(4,True):
            was,copies = status('VmRSS'),[x.clone() for x in xs]
            for _ in range(50): out = m(*(x[:len(x)//8] for x in xs))
            del out
            grown,intact = status('VmRSS')-was-sum(x.nbytes for x in xs)/2**20,same(xs, copies)
    return *peaks,grown,intact

@pytest.mark.skipif(not Path('/proc/self/clear_refs').exists(), reason="Linux counts a process's peak memory, others do not")
@pytest.mark.parametrize('kind', [sequence, vit])
def test_R23_memory_does_not_grow_with_depth(kind, other_process):
    at4,at16,stored,grown,intact = other_process(memory, kind)
    assert at16 <= 1.05*at4 and at16 <= .1*stored, (at4,at16,stored)
    assert grown < 5 and intact, grown

@pytest.mark.parametrize('kind', [sequence, vit])
def test_R24_drift_is_measured_by_one_call_per_block_and_warns(kind):
    m,xs = kind(6, 2, rate=0, dtype=torch.float32)
    xs = (m.tokens(*xs).detach(),)*2 if kind==vit else xs
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        errors = drift(blocks_of(m), *xs)
    assert len(errors)==6 and 0 < max(errors) < 1e-5
    with torch.no_grad():
        for p in blocks_of(m).parameters(): p.mul_(16 if kind==sequence else 64)
    with pytest.warns(UserWarning, match='the input of block [0-5] is rebuilt with an error of .*the limit of 1e-05'): worse = drift(blocks_of(m), *xs, limit=1e-5)
    assert max(worse) > 3*max(errors)

# ---------------------------------------------------------------- inputs and models: R25 to R27

@pytest.mark.parametrize('b', [0,1])
@both
def test_R25_batches_of_one_and_of_none(make, b):
    m,xs = make(b=b)
    assert all(len(o)==b for o in outputs(m(*xs)))
    if b: check_grads(m, *xs)
    else:
        agrees(m, lambda: [g for g in grads(m, xs)])
        assert all(g is not None and not g.any() for g in grads(m, xs))

def test_R25_memory_layouts():
    m,(x,) = vit(3, 2)
    wide = torch.randn(5, 3, 32, 64, dtype=torch.float64)
    for o in (x.contiguous(memory_format=torch.channels_last), wide[...,::2], x.transpose(2, 3), x[:1].expand(5, 3, 32, 32)): check_grads(m, o)
    m,(a,b) = sequence(3, 2)
    strided = lambda o: o.transpose(0, 2).contiguous().transpose(0, 2)
    check_grads(m, strided(a), b[:,:1].expand_as(b))
    check_grads(m, torch.stack((a,b), -1)[...,0], strided(b))

@pytest.mark.parametrize('x, words', [(torch.zeros(2, 3, 32, 32, dtype=torch.uint8),'normalised float images, got torch.uint8'), (torch.zeros(2, 1, 32, 32),'expected 3 channels, got 1'),
    (torch.zeros(2, 3, 33, 32),'multiples of the patch, 8x8 pixels: got 33x32'), (torch.zeros(3, 32, 32),r'\(B, 3, H, W\), got \(3, 32, 32\)'),
    (torch.zeros(2, 3, 4, 32, 32),r'\(B, 3, H, W\), got \(2, 3, 4, 32, 32\)')], ids=['uint8','channels','size','no batch','clip'])
def test_R25_wrong_images_are_refused_in_a_sentence(x, words):
    with pytest.raises(ValueError, match=words): vit(3, 2, dtype=torch.float32)[0](x)

def test_R25_another_size_of_image():
    m,_ = vit(3, 2)
    assert m(*images(2, 64)).shape==(2,5)
    check_grads(m, *images(2, 48))

@pytest.mark.parametrize('change, words', [(lambda x: x[:2],r'\(5, 3, 8\).* and \(2, 3, 8\)'), (lambda x: x.float(),'float64 .* and .* float32'), (lambda x: x[...,:7],r'and \(5, 3, 7\)')], ids=['batch','dtype','width'])
def test_R25_streams_that_differ_are_refused(change, words):
    for m in (stack(3), stack(3).eval().requires_grad_(False)):
        with pytest.raises(ValueError, match='streams differ: .*'+words): m(streams()[0], change(streams()[1]))

@pytest.mark.parametrize('bad', [float('nan'), float('inf')])
@both
def test_R26_one_bad_sample_leaves_the_others_as_they_were_to_the_bit(make, bad):
    "In training and evaluation, with and without gradients (a training run that stops by name: notebook 09_training)"
    m,xs = make(dtype=torch.float32)
    spoilt = [x.clone() for x in xs]
    for x in spoilt: x[2] = bad
    others = [0,1,3,4]
    for on,training,grad in ((True,True,True),(False,True,True),(True,False,True),(True,False,False)):
        m.train(training)
        m.set_reversible(on)
        with torch.set_grad_enabled(grad): (a,b) = (outputs((torch.manual_seed(0),m(*o))[1]) for o in (xs,spoilt))
        for p,q in zip(a, b): assert torch.equal(p[others], q[others]) and not q[2].isfinite().all()

@pytest.mark.parametrize('name', timm.list_models('revvit_*'))
def test_R27_every_registered_model_keeps_timms_habits(name):
    kw = dict(img_size=32, patch_size=8, embed_dim=48, num_heads=4, depth=3, num_classes=7) # narrow, or the large one would take a minute
    torch.manual_seed(0)
    m = timm.create_model(name, drop_path_rate=.2, **kw)
    x, = images(2, dtype=torch.float32)
    m.eval()
    assert m(x[:1]).shape==(1,7) and m(x).isfinite().all()
    torch.testing.assert_close(m(x[:1].contiguous(memory_format=torch.channels_last)), m(x)[:1], rtol=1e-4, atol=1e-4)
    m.train()(x).mean().backward()
    for n,p in m.named_parameters(): assert p.grad is not None and p.grad.isfinite().all(), n
    m.eval()
    names,cfg = set(m.state_dict()),m.pretrained_cfg
    assert cfg['first_conv']+'.weight' in names and cfg['classifier']+'.weight' in names and m.get_classifier() is m.head
    f = m.forward_features(x)
    assert f.shape==(2,16,96) and same([m.forward_head(f)], [m(x)])
    assert m.forward_head(f, pre_logits=True).shape==(2,96)==(2,m.num_features)
    m.reset_classifier(4)
    assert m(x).shape==(2,4) and m.num_classes==4
    m.reset_classifier(0)
    assert m(x).shape==(2,96)
    assert m.forward_intermediates(x)[0].shape==f.shape and [o.shape for o in m.forward_intermediates(x, intermediates_only=True)]==3*[(2,96,4,4)]
    features = timm.create_model(name, features_only=True, **{k:v for k,v in kw.items() if k!='num_classes'})
    assert [o.shape[1:] for o in features(x)]==[(c,32//r,32//r) for c,r in zip(features.feature_info.channels(), features.feature_info.reduction())]
    assert timm.create_model(name, **{**kw,'num_classes':0})(x).shape==(2,96)
    pretrained = timm.get_pretrained_cfg(name)
    assert pretrained is not None and pretrained.input_size==(3,224,224) and pretrained.num_classes==1000

# ---------------------------------------------------------------- beyond the list: what users of any F and G rely on

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
HALVES = dict(tied=tied, unused=lambda: Fn(lambda m,x: x*m.w, w=8, unused=3), constant=lambda: Fn(lambda m,x: m.w.expand(x.shape), w=(3,8)), ones=lambda: Fn(lambda m,x: torch.ones_like(x)),
    identity=nn.Identity, view=lambda: Fn(lambda m,x: x.view_as(x)), flip=lambda: Fn(lambda m,x: x.flip(-1)), expanded=lambda: Fn(lambda m,x: x[...,:1].expand(x.shape)), detached=lambda: Fn(lambda m,x: x.detach()),
    alias=lambda: Fn(lambda m,x: x+m.w+m.v, w=(1,3,8), v=(1,3,8)), scalar=lambda: Fn(lambda m,x: x*m.w, w=()), pieces=lambda: Fn(lambda m,x: x@torch.cat((m.w,m.v)), w=(4,8), v=(4,8)), no_grad=lambda: Fn(no_grad_part, w=8, v=8),
    weight_norm=lambda: nn.utils.parametrizations.weight_norm(nn.Linear(8, 8)), weight_norm2=lambda: nn.utils.weight_norm(nn.Linear(8, 8)), orthogonal=lambda: nn.utils.parametrizations.orthogonal(nn.Linear(8, 8)),
    lstm=lambda: First(nn.LSTM(8, 8, batch_first=True)), attention=lambda: First(nn.MultiheadAttention(8, 2, dropout=.2, batch_first=True), 3), encoder=lambda: nn.TransformerEncoderLayer(8, 2, 16, batch_first=True),
    checkpointed=lambda: Fn(lambda m,x: checkpoint(m.inner, x, use_reentrant=False)), nested=Nested)

@pytest.mark.filterwarnings('ignore:.*weight_norm:FutureWarning')
@pytest.mark.parametrize('name', HALVES)
def test_any_f_and_g(name):
    "As F and as G, drop path on, in parts and whole, in a batch of one: tied and unused weights, no weights, views, aliases, parametrizations, a sequence inside"
    def half():
        m = HALVES[name]()
        if name=='checkpointed': m.inner = mlp(p=.3)
        return m
    for chunk,b in ((1,5),(None,5),(None,1)): check_grads(stack(3, .3, .2, chunk, lambda i: (half(),mlp(p=.3)) if i%2 else (Tokens(8, .3),half())), *streams(b))

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

STREAMS = dict(rows=(lambda i: (mlp(p=.3),mlp()),(5,8)), numbers=(lambda i: (nn.Tanh(),nn.GELU()),(5,)), video=(lambda i: (mlp(p=.3),mlp()),(5,2,3,4,8)),
    maps=(lambda i: (nn.Sequential(nn.GroupNorm(2, 8), nn.Conv2d(8, 8, 3, padding=1), nn.GELU(), nn.Dropout2d(.3)),nn.Conv2d(8, 8, 1)),(5,8,6,7)))

@pytest.mark.parametrize('make, shape', STREAMS.values(), ids=STREAMS.keys())
def test_streams_of_any_shape(make, shape):
    m,(a,b) = stack(3, 0, .2, 2, make),torch.randn(2, *shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    assert 1 <= chunk_size(a)
    check_grads(m, a, b)
    check_inverse(m, a, b)
    if a.ndim==4: check_grads(m, *(o.contiguous(memory_format=torch.channels_last) for o in (a,b)))

@pytest.mark.parametrize('bad', [torch.zeros(5, 3, 8, dtype=torch.int64), torch.zeros(5, 3, 8, dtype=torch.complex64), torch.zeros(()), [1.]], ids=['integer','complex','scalar','list'])
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
        return torch.autograd.grad(sum(out[i].square().sum() for i in used), [*(x for x in xs if x.requires_grad), *m.parameters()], allow_unused=True)
    agrees(m, lambda: run(*xs))
    if all(needs): agrees(m, lambda: run(xs[0], xs[0])[1:])

def test_outputs_may_be_changed_in_place():
    m,xs = sequence(3, 2)
    def run():
        torch.manual_seed(0)
        y1,y2 = m(*xs)
        y1.mul_(2); y2[0] = 0; y1 += y2
        return torch.autograd.grad(weighted_sum((y1,y2)), needing(m))
    agrees(m, run)

def test_float16_streams():
    m,xs = sequence(3, 2, dtype=torch.float16)
    assert error(grads(m, xs), plain(m, lambda: grads(m, xs))) < 1e-2

@two
def test_gradcheck(make):
    m,xs = make(rate=0, b=2)
    assert torch.autograd.gradcheck(lambda *o: m(*o[:len(xs)]), (*(x.requires_grad_() for x in xs), *m.parameters()), fast_mode=True)

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
    with pytest.raises(RuntimeError, match=rf"{'the tail' if tail else 'f of block 1'} uses a tensor of shape \(8,\) that needs a gradient.*{REMEDY}"): run().backward()
    assert all(p.grad is None for p in m.parameters())
    with torch.no_grad(): w.requires_grad_(False)
    if kind=='list': agrees(m, lambda: torch.autograd.grad(run(), needing(m)))

def noisy(m, x):
    "Noise for images that are marked"
    return x*m.w*torch.rand_like(x) if (x[:,0,0]>9).any() else x*m.w

def test_noise_that_the_first_part_does_not_draw_is_refused():
    m,(x1,x2) = stack(2, chunk=1, make=lambda i: (Fn(noisy, w=8),mlp())),streams()
    x2[3,0,0] = 10
    with pytest.raises(RuntimeError, match=f'f of block 0 drew random numbers for some images and not for the first.*{REMEDY}'): m(x1, x2)
    m.chunk = None
    agrees(m, lambda: grads(m, (x1,x2)))

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
    with torch.inference_mode(), pytest.raises(RuntimeError, match=f'in inference_mode.*{REMEDY}'): loss.backward(retain_graph=True)
    inner = []
    def hook(g):
        if not inner: inner.append(1); torch.autograd.grad(loss, needing(m), retain_graph=True)
    hook = m[2].f.norm.weight.register_hook(hook)
    with pytest.raises(RuntimeError, match='two backward passes through one reversible run at a time'): loss.backward(retain_graph=True)
    hook.remove()
    assert all(p.grad is None for p in m.parameters())
    assert same(torch.autograd.grad(loss, needing(m)), grads(m, xs))

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
    for call,words in ((lambda: ReversibleBlock(torch.square, nn.GELU()),'f must be a module, got'), (lambda: ReversibleSequence([], chunk=0),'at least 1 image, got 0'),
        (lambda: ReversibleBlock(mlp(), mlp(), 1.),'at least 0 and below 1, got 1.0'), (lambda: stack(2)(*streams(), tail=lambda a,b: a+b),'tail must be a module, got function'),
        (lambda: stack(2)(*streams(), tail=nn.CosineSimilarity(0)),'one tensor with a row for each image'), (lambda: stack(2, make=lambda i: (nn.Linear(8, 7),mlp()))(*streams()),r'f of block 0 returned .* 3, 7\)'),
        (lambda: stack(2, make=lambda i: (mlp(),nn.ReLU(inplace=True)))(*streams()),'g of block 0 changed its input in place'), (lambda: stack(2, .3)[0].inverse(*streams()),r'call eval\(\) first')):
        with pytest.raises((ValueError,RuntimeError), match=words): call()

# --- hooks, and lists of blocks

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
    dict(other=lambda: setattr(g, 'fn', mlp(32).double()), none=lambda: setattr(g, 'fn', nn.Identity()), subclass=lambda: setattr(m.blocks[1], 'g', Doubled(32, copy.deepcopy(g.fn)).double()),
         own=lambda: double(g), inner=lambda: double(g.fn.fc1), dropout=lambda: setattr(g.fn, 'drop1', nn.Tanh()), activation=lambda: setattr(g.fn, 'act', nn.GELU('tanh')),
         hook=lambda: g.fn.fc1.register_forward_hook(lambda m,i,o: 2*o), weight_norm=lambda: nn.utils.parametrizations.weight_norm(g.fn.fc1), prune=lambda: prune.random_unstructured(g.fn.fc1, 'weight', .5),
         frozen=lambda: g.fn.fc1.bias.requires_grad_(False), eps=lambda: setattr(g.norm, 'eps', .1), norm=lambda: setattr(g, 'norm', nn.LayerNorm(32, elementwise_affine=False)))[kind]()
    return m,xs

@pytest.mark.parametrize('kind', 'other none subclass own inner dropout activation hook weight_norm prune frozen eps norm'.split())
def test_surgery_on_a_rev_vit(kind):
    m,xs = changed_mlp(kind)
    check_grads(m, *xs)

# --- other features of PyTorch

@pytest.mark.parametrize('context', [torch.autograd.graph.save_on_cpu, lambda: torch.autograd.graph.saved_tensors_hooks(lambda t: t.numpy().copy(), torch.from_numpy)], ids=['save_on_cpu','hooks'])
@two
def test_saved_tensor_hooks(make, context):
    m,xs = make()
    def run():
        with context(): return torch.autograd.grad(loss_of(m, xs), needing(m))
    agrees(m, run)
    with context(): loss = loss_of(m, xs)
    assert same(torch.autograd.grad(loss, needing(m), retain_graph=True), torch.autograd.grad(loss, needing(m)))

@pytest.mark.parametrize('reentrant', [True,False])
@two
def test_checkpoint_around(make, reentrant):
    m,xs = make()
    xs = tuple(x.requires_grad_() for x in xs)
    def run():
        torch.manual_seed(0)
        m.zero_grad()
        weighted_sum(checkpoint(m, *xs, use_reentrant=reentrant)).backward()
        return [p.grad for p in m.parameters()]
    agrees(m, run)

@pytest.mark.filterwarnings('ignore:There is a performance drop')
@two
def test_torch_func(make):
    "Under its transforms the plain mode answers; functional_call alone stays reversible, and keeps to the weights it was given"
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

@pytest.mark.parametrize('context', [deterministic, partial(default_dtype, torch.float64), partial(default_dtype, torch.bfloat16)], ids=['deterministic','float64','bfloat16'])
@two
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

@two
def test_backward_from_another_thread(make):
    m,xs = make()
    want = plain(m, lambda: grads(m, xs))
    thread = threading.Thread(target=loss_of(m, xs).backward)
    thread.start(); thread.join()
    assert error([p.grad for p in m.parameters()], want) < 1e-12

@two
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
@two
def test_compile(make, what):
    "Compiled F and G, or the whole model with a break at the engine (the compiler's front ends; no C++ compiler needed)"
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
@two
def test_export(make, strict):
    m,xs = make()
    graph = torch.export.export(m.eval(), xs, strict=strict).module()
    assert error(outputs(graph(*xs)), outputs(m(*xs))) < 1e-12
