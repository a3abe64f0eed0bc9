"""What software for reversible networks promises and often breaks, numbered R1 to R26 (R20 and R21, many processes and
the compiler, stand elsewhere). Each is asked of a sequence of any F and G, of one with a tail, of a narrow Rev-ViT, and
of Rev-MViTs for images and for clips; with two different streams, odd and even depths, and every kind of randomness on.
`cases.py` makes the models and says how they are judged."""
import copy, multiprocessing, pickle, re, warnings
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path

import numpy as np, pytest, torch
from torch import nn
from torch.nn.functional import cross_entropy
from revvit.core.block import ReversibleBlock
from revvit.core.memory import live_bytes, peak_bytes, saved_bytes
from revvit.core.testing import check_directional, check_grads, drift, weighted_sum
from cases import *

# ---------------------------------------------------------------- the gradient core: R1 to R19

# up to 4 stages
IMAGES,CLIPS = partial(mvit, lambda d: fitting(d, 1, 2, 6)),partial(clip, lambda d: fitting(d, d//2, d-1))

@pytest.mark.parametrize('depth', [*range(1, 10), 24])
@pytest.mark.parametrize('kind', [sequence, tailed, vit, IMAGES, CLIPS],
                         ids=['sequence','tailed','vit','images','clips'])
def test_R01_gradients_of_everything_at_any_depth(kind, depth):
    """float64: outputs, input gradients and parameter gradients are those of plain autograd, with the rates on and
    off, in parts and whole"""
    # those are the largest, and R2 has more of them
    for chunk,rate in ((2,0),(None,1),(1,1))[:2 if kind in (IMAGES,CLIPS) else 3]:
        m,xs = kind(depth, chunk, rate, b=3)
        check_grads(m, *xs)

@both
def test_R02_masks_are_those_of_plain_and_are_replayed(make):
    """Dropout, attention dropout and drop path: the plain mode's masks, and a gradient that agrees with finite
    differences"""
    m,xs = make()
    a,b = (outputs(plain(m, lambda: (torch.manual_seed(s),m(*xs))[1])) for s in (0,1))
    assert error(a, b) > 1e-3 # there are masks
    check_grads(m, *xs)
    torch.manual_seed(123)
    m,xs = make(b=3)
    if isinstance(m, RevMViT): # a quarter of its many parameters is enough
        for i,p in enumerate(m.parameters()): p.requires_grad_(i%4==0)
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
    """After forward torch, NumPy and Python stand where plain autograd leaves them, after backward where they stood
    before, and an evaluation moves nothing"""
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
    opt,rows = opt(m.parameters()),torch.arange(len(xs[0]), device=DEVICE)
    torch.manual_seed(7)
    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(rows, *xs), batch_size=8, shuffle=True)
    for _ in range(steps//len(loader)):
        for i,*batch in loader:
            loss = cross_entropy(torch.cat([o.flatten(1) for o in outputs(m(*batch))], 1), i%3)
            loss.backward()
            opt.step()
            opt.zero_grad()
    return [p.detach() for p in m.parameters()]

@fewer
def test_R06_training_repeats_to_the_bit_and_follows_plain(make):
    "20 steps with shuffling, dropout and drop path in float32 (two loading processes: notebook 32_learner)"
    m,xs = make(dtype=torch.float32, b=40)
    adamw,sgd = partial(torch.optim.AdamW, lr=1e-3),partial(torch.optim.SGD, lr=1e-2, momentum=.9)
    first = train(m, xs, adamw, True)
    assert error(first, m.parameters()) > 1e-3 # it trains
    assert same(train(m, xs, adamw, True), first)
    # Adam divides the keys' bias, whose gradient is rounding and nothing else, by its own size; so SGD here
    assert error(train(m, xs, sgd, True), train(m, xs, sgd, False)) < 1e-5

@pytest.mark.parametrize('inside', [True,False], ids=['inside','outside'])
@pytest.mark.parametrize('dtype', [torch.bfloat16,torch.float16], ids=str)
@fewer
def test_R07_autocast(make, dtype, inside):
    "The replay is under the forward's autocast wherever backward runs, and streams stay float32"
    m,xs = make(dtype=torch.float32)
    seen = []
    blocks_of(m)[1].f.register_forward_pre_hook(lambda f,args: seen.append(args[0].dtype))
    def run(seed):
        with torch.autocast(DEVICE.type, dtype):
            loss = loss_of(m, xs, seed)
            if inside: return torch.autograd.grad(loss, needing(m))
        return torch.autograd.grad(loss, needing(m))
    errors = sorted(error(run(s), plain(m, lambda: run(s))) for s in range(6))
    assert set(seen)=={torch.float32}
    # where a rebuilt number lies within float32 rounding of the border between two half-precision values, one step of
    # those shows (a replay
    # without autocast is 4e-3 off, every time)
    assert errors[1] < 1e-6 and errors[-1] < 1e-3

@pytest.mark.parametrize('kind', [sequence, vit, IMAGES, CLIPS], ids=['sequence','vit','images','clips'])
def test_R08_a_whole_model_in_bfloat16(kind):
    def cosine(a, b):
        a,b = (torch.cat([o.double().flatten() for o in g]) for g in (a,b))
        return float(a@b/a.norm()/b.norm()) # not a number where one of them holds none
    m,xs = kind(12, 2, dtype=torch.bfloat16)
    assert cosine(grads(m, xs), plain(m, lambda: grads(m, xs))) > .999
    # both could be wrong: PyTorch 2.15 has depthwise convolutions in bfloat16 whose weight gradients are, on a CPU with
    # 8 or 16 channels
    m,xs = kind(12, 2, 0, torch.bfloat16)
    got = grads(m, xs)
    want = plain(m.double(), lambda: grads(m, [x.double() for x in xs]))
    for (n,_),a,b in zip(m.named_parameters(), got, want):
        if 'pool' in n and b.norm() > 1e-9: assert cosine([a], [b]) > .9, n # a single key has no gradient
    assert cosine(got, want) > .99

@pytest.mark.parametrize('plant', ['loss','scale'])
@both
def test_R09_grad_scaler(make, plant):
    """An infinity, planted or from a scale that float16 cannot hold, is seen: the step is skipped, the scale halved,
    and the next step is plain's"""
    def run():
        m,xs = make(dtype=torch.float32)
        m.set_reversible(on)
        opt,scaler = torch.optim.SGD(m.parameters(), lr=1e-2),torch.amp.GradScaler(DEVICE.type, init_scale=2.**60
            if plant=='scale' else 2.**8)
        before = [p.detach().clone() for p in m.parameters()]
        for step in range(2):
            with torch.autocast(DEVICE.type, torch.float16): loss = loss_of(m, xs, step)
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
    sums = lambda n: sum((torch.stack(m(*o)).square().sum() for o in zip(*(x.chunk(n) for x in xs))),
                         torch.zeros((), device=DEVICE))
    assert error(torch.autograd.grad(sums(4), needing(m)),
                 plain(m, lambda: torch.autograd.grad(sums(1), needing(m)))) < 1e-12

@pytest.mark.parametrize('layer', [lambda: nn.BatchNorm1d(3), lambda: nn.SyncBatchNorm(3),
    lambda: nn.InstanceNorm1d(3, track_running_stats=True),
    lambda: nn.utils.spectral_norm(nn.Linear(8, 8)), lambda: nn.utils.parametrizations.spectral_norm(nn.Linear(8, 8))],
                         ids=['batch','sync','instance','spectral','spectral2'])
def test_R10_layers_with_running_statistics_are_refused_by_name(layer):
    with pytest.raises(ValueError, match=r'^g holds .* \(1.*state changes in every forward pass'):
        ReversibleBlock(mlp(), nn.Sequential(nn.GELU(), layer()))
    m = stack(3)
    m[1].f = layer().double() # past the constructor: then where it runs
    with pytest.raises(ValueError, match='^f of block 1 holds .*state changes'): m(*streams())
    class Tail(Fuse):
        def forward(self, x1, x2): return self.more(super().forward(x1, x2)[:,:,None].expand(-1, -1, 8))
    tail = Tail()
    tail.more = layer()
    with pytest.raises(ValueError, match='^the tail holds .* \\(more.*state changes'):
        stack(3)(*streams(), tail=tail.double())

STEM = 'patch_embed','pos_embed'

@pytest.mark.parametrize('frozen', [(*STEM,'0.','blocks.0.','stages.0.0.'), (*STEM,'0.','1.','blocks.','stages.0.'),
                                    (*STEM,'stages.0.','transitions.0.')], ids=['stem','stage','stages'])
@both
def test_R11_frozen_stem(make, frozen):
    """Streams that need no gradient: every parameter behind them gets its own, exactly; what is frozen may end inside
    a run, with a run, or with a stage transition"""
    m,xs = make()
    want = dict(zip([n for n,_ in m.named_parameters()], plain(m, lambda: grads(m, xs))))
    for n,p in m.named_parameters(): p.requires_grad_(not n.startswith(frozen))
    loss_of(m, xs).backward()
    for n,p in m.named_parameters():
        if not p.requires_grad: assert p.grad is None
        # softmax does not see it: rounding is all there is
        elif 'pool_k.norm.bias' in n: assert max(p.grad.norm(), want[n].norm()) < 1e-14, n
        else: assert error([p.grad], [want[n]]) < 1e-9, n # one at a time, and small ones have more rounding

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
    "Once a part forwards and once a part backwards, with dropout as without"
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
        assert calls==2*parts and len(back)==len(parts)

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
    if not hasattr(m, 'patch_embed'): # there the stem keeps the images, and autograd itself refuses
        assert error(torch.autograd.grad(loss, needing(m)), want) < 1e-12
    for half,name in (('f','norm.weight'),('g','(norm|0).weight')):
        loss = loss_of(m, xs)
        with torch.no_grad(): next(getattr(blocks_of(m)[1], half).parameters()).mul_(1) # the value does not matter
        with pytest.raises(RuntimeError, match=f"'{name}' in {half} of block 1 was changed between forward and "
                                               f"backward.*{REMEDY}"): loss.backward()
        m.zero_grad()
    agrees(m, lambda: grads(m, xs))

@pytest.mark.parametrize('name, edit', [('image6','fuse.mlp.fc1.weight'),('image6','f.norm.bias'),
                                        ('clip5','f.fn.pool_q.conv.weight'),('clip5','g.fn.fc2.weight'),
                                        ('clip5','proj.weight')])
def test_R16_stage_transitions(name, edit):
    m,xs = CASES[name]()
    loss = loss_of(m, xs)
    with torch.no_grad(): m.transitions[0].get_parameter(edit).mul_(1)
    with pytest.raises(RuntimeError, match=f"'{edit}' in .* was changed between forward and backward.*{REMEDY}"):
        loss.backward()
    m.zero_grad()
    agrees(m, lambda: grads(m, xs))

class Table(nn.Module):
    "A G with a buffer"
    def __init__(self): super().__init__(); self.register_buffer('table', torch.linspace(.5, 1, 8))
    def forward(self, x): return x.sin()*self.table

def test_R16_buffers():
    m,xs = stack(3, make=lambda i: (Tokens(8),Table())),streams()
    check_grads(m, *xs)
    for edit in (lambda: m[2].g.table.mul_(2), lambda: setattr(m[2].g, 'table', m[2].g.table*2),
                 lambda: m.load_state_dict(m.state_dict())):
        loss = loss_of(m, xs)
        edit()
        with pytest.raises(RuntimeError, match="in g of block 2 was changed between"): loss.backward()

@both
def test_R17_a_mode_switched_in_between_is_refused(make):
    m,xs = make()
    parts = [(m,''),(blocks_of(m)[0].f,'f of block 0'),(blocks_of(m)[2].g,'g of block 2')]
    if isinstance(m, RevMViT): parts.append((m.transitions[0].g,'tail'))
    for part,name in parts:
        loss = loss_of(m, xs)
        part.eval()
        with pytest.raises(RuntimeError, match=f'{name}.* was switched between train.. and eval.. before '
                                               f'backward.*{REMEDY}'): loss.backward()
        m.train()
        m.zero_grad()
        loss = loss_of(m.eval(), xs)
        part.train()
        with pytest.raises(RuntimeError, match='was switched'): loss.backward()
        m.train()
        m.zero_grad()
    agrees(m, lambda: grads(m, xs))

def later(m):
    """How the names of parameters begin that a Rev-MViT uses behind the run of blocks `blocks_of(m)` and the
    transition at its end"""
    if not isinstance(m, RevMViT): return []
    n,k = len(m.stages)-1,list(m.stages).index(blocks_of(m))
    return ([f'stages.{i}.' for i in range(k+1, n+1)] + [f'transitions.{i}.'
        for i in range(k+1, n)] + ['neck']) if k<n else []

@pytest.mark.parametrize('half', 'fg')
@both
def test_R18_an_error_in_f_or_g_leaves_nothing_half_done(make, half):
    """In forward or backward: no gradient in the run of blocks nor in its tail, those of what comes later whole, random
    states and modes as they were, and the next step exact"""
    m,xs = make()
    trap = Trap(getattr(blocks_of(m)[1], half))
    put(m, half, 1, trap)
    want = plain(m, lambda: grads(m, xs))
    trap.calls = 0
    with torch.autocast(DEVICE.type, torch.bfloat16, enabled=False): grads(m, xs)
    trap.at = (1, trap.calls+trap.calls) # the first call forwards, the last one backwards
    trap.calls = 0
    with pytest.raises(KeyError, match='trap'): loss_of(m, xs)
    trap.calls = trap.at[1]//2
    loss = loss_of(m, xs)
    was = rng_states()
    with pytest.raises(KeyError, match='trap'): loss.backward()
    assert rng_states()==was and torch.is_grad_enabled() and not torch.is_autocast_enabled(DEVICE.type) and m.training
    for (n,p),w in zip(m.named_parameters(), want): # what is behind blocks and tail, autograd did before
        assert p.grad is None or n.startswith(('head',*later(m))) and error([p.grad],
            [w]) < 1e-9 or 'pool_k.norm.bias' in n, n
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

def there(m, xs):
    "`answers` of what came as it lies on the CPU: not every machine lets processes share a GPU's memory"
    return answers(m.to(DEVICE), [x.to(DEVICE) for x in xs])

def answers(m, xs):
    "Output in evaluation, and gradients in training"
    with torch.no_grad(): out = outputs(m.eval()(*xs))
    return [o.cpu().numpy() for o in (*out, *grads(m.train(), xs))]

@both
def test_R22_copies_fresh_and_used(make, other_process):
    "deepcopy, pickle, another process and a state_dict: bit-equal, and no name depends on the mode"
    m,xs = make()
    for used in (False,True):
        if used: loss_of(m, xs).backward()
        want,twin = answers(m, xs),make()[0]
        for p in twin.parameters(): nn.init.zeros_(p)
        twin.load_state_dict(m.state_dict())
        got = [answers(o, xs) for o in (copy.deepcopy(m), pickle.loads(pickle.dumps(m)),
                                        twin)]
        got.append(other_process(there, copy.deepcopy(m).cpu(), [x.cpu() for x in xs]))
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
        m,xs = vit(depth, 128, dtype=torch.float32, b=256, dim=48, heads=4)
        for o in m.blocks: o.drop_path = .05
        return m,xs
    return stack(depth, .3, .2, 64,
                 lambda i: (nn.Sequential(nn.LayerNorm(64), nn.Linear(64, 64), nn.GELU(), nn.Dropout(.3),
                                          nn.Linear(64, 64)),mlp(64)),
                 dtype=torch.float32),streams(512, 16, 64, dtype=torch.float32)

def memory(kind):
    """Peak bytes of tensors in a step at depths 4 and 16, then as the kernel sees it: extra peak at depth 16, of
    plain at 16, growth in 50 forwards; and whether the inputs survived"""
    torch.set_num_threads(1)
    peaks = []
    for depth,on in ((4,True),(16,True),(16,False)):
        m,xs = wide(kind, depth)
        m.set_reversible(on)
        def step(): loss_of(m, xs).backward()
        # the kernel counts pages, half a megabyte up or down: enough to compare with plain, not to see a twentieth
        if on:
            step() # the buffers of the weights' gradients exist from here on
            peaks.append(peak_bytes(step))
        if depth==16: peaks.append(extra_peak(step))
        if (depth,on)==(4,True):
            was,copies = status('VmRSS'),[x.clone() for x in xs]
            for _ in range(50): out = m(*(x[:len(x)//8] for x in xs))
            del out
            grown,intact = status('VmRSS')-was-sum(x.nbytes for x in xs)/2**20,same(xs, copies)
    return *peaks,grown,intact

@pytest.mark.skipif(DEVICE.type!='cpu', reason='asks the kernel of the host; test_gpu.py asks the device')
@pytest.mark.skipif(not Path('/proc/self/clear_refs').exists(), reason="Linux counts a process's "
                    "peak memory, others do not")
@pytest.mark.parametrize('kind', [sequence, vit])
def test_R23_memory_does_not_grow_with_depth(kind, other_process):
    at4,at16,taken,stored,grown,intact = other_process(memory, kind)
    assert at16 <= 1.05*at4 and taken <= .1*stored, (at4,at16,taken,stored)
    assert grown < 5 and intact, grown

def step_bytes(m, xs):
    "What autograd keeps after the forward pass of a training step, and the step's peak"
    def step(): loss_of(m, xs).backward()
    step() # the buffers of the weights' gradients exist from here on
    return saved_bytes(lambda: loss_of(m, xs), m, *xs),peak_bytes(step, DEVICE)

@pytest.mark.parametrize('kind, rate', [(mvit,0),(clip,1)])
@pytest.mark.parametrize('stage', [0,1,2])
def test_R23_blocks_in_any_stage_of_a_rev_mvit_are_free(kind, stage, rate):
    """Bytes kept and peak do not know how many blocks a stage has, but for the states of the random generator: 5,056
    bytes for each part of a half with dropout"""
    def measured(n):
        m,xs = kind({0:(n,n+2), 1:(1,n+2), 2:(1,3)}[stage], n+4, 2, rate, torch.float32, b=4)
        # it rises with the depth, and with it the images that are left
        for o in (o for s in m.stages for o in s): o.drop_path = .1*rate
        return step_bytes(m, xs)
    (kept1,peak1),(kept4,peak4) = measured(1),measured(4)
    assert kept4==kept1 and peak4-peak1 <= rate*3*2*2*5300, (peak1,peak4)

@pytest.mark.parametrize('kind', [mvit, clip])
def test_R23_a_rev_mvit_needs_a_tenth_of_plain_and_leaks_nothing(kind):
    m,xs = kind((11,), 12, 2, 0, torch.float32, b=10)
    kept,peak = step_bytes(m, xs)
    plain_kept,plain_peak = plain(m, lambda: step_bytes(m, xs))
    assert kept <= .05*plain_kept and peak <= .1*plain_peak, (kept/plain_kept,peak/plain_peak)
    def forwards():
        for _ in range(3): m(*xs)
    assert live_bytes(forwards, DEVICE) <= .01*kept

def kept(m, xs): return saved_bytes(lambda: loss_of(m, xs), m, *xs)

@pytest.mark.parametrize('kind', [mvit, clip])
def test_R23_a_stage_transition_keeps_its_input_alone(kind):
    "Wherever it stands: behind blocks, behind another transition, behind blocks that are frozen"
    apart,adjacent = (kind(starts, 6, 2, dtype=torch.float32) for starts in ((1,3),(1,2)))
    assert kept(*adjacent) <= 1.01*kept(*apart)
    m,xs = apart
    m.requires_grad_(True)
    for n,p in m.named_parameters(): p.requires_grad_(not n.startswith((*STEM,'stages.0.')))
    assert kept(m, xs) <= 1.01*kept(*kind((1,3), 6, 2, dtype=torch.float32))

def runs(m, xs):
    "Runs of blocks of a model, each with the streams that enter it"
    if not hasattr(m, 'patch_embed'): return [(m,xs)]
    found,hooks = [],[]
    def note(s, x): found.append((s,[o.detach() for o in x[:2]]))
    for s in m.modules():
        if isinstance(s, ReversibleSequence) and len(s): hooks.append(s.register_forward_pre_hook(note))
    m.eval()(*xs)
    for h in hooks: h.remove()
    return found

@pytest.mark.parametrize('kind', [sequence, vit, IMAGES, CLIPS], ids=['sequence','vit','images','clips'])
def test_R24_drift_is_measured_by_one_call_per_block_and_warns(kind):
    "One call for each run of blocks"
    m,xs = kind(6, 2, rate=0, dtype=torch.float32)
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        errors = [drift(s, *o) for s,o in runs(m, xs)]
    assert [len(e) for e in errors]==[len(s) for s,_ in runs(m, xs)] and 0 < max(map(max, errors)) < 1e-5
    with torch.no_grad():
        for s,_ in runs(m, xs):
            for p in s.parameters(): p.mul_(16 if kind==sequence else 64)
    for (s,o),e in zip(runs(m, xs), errors):
        with pytest.warns(UserWarning, match=f'the input of block [0-{len(s)-1}] is rebuilt with an error of .*the '
                                             f'limit of 1e-05'): worse = drift(s, *o, limit=1e-5)
        assert max(worse) > 3*max(e)

# ---------------------------------------------------------------- inputs: R25 and R26

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
    wide = torch.randn(5, 3, 32, 64, dtype=torch.float64, device=DEVICE)
    for o in (x.contiguous(memory_format=torch.channels_last), wide[...,::2], x.transpose(2, 3),
              x[:1].expand(5, 3, 32, 32)): check_grads(m, o)
    m,(a,b) = sequence(3, 2)
    strided = lambda o: o.transpose(0, 2).contiguous().transpose(0, 2)
    check_grads(m, strided(a), b[:,:1].expand_as(b))
    check_grads(m, torch.stack((a,b), -1)[...,0], strided(b))

@pytest.mark.parametrize('name', ['image7','clip5'])
def test_R25_memory_layouts_of_a_rev_mvit(name):
    m,(x,) = CASES[name](b=3)
    last = torch.channels_last if x.ndim==4 else torch.channels_last_3d
    for o in (x.contiguous(memory_format=last), torch.cat((x,x), -1)[...,::2], x.transpose(-2, -1),
              x[:1].expand(x.shape), x.flip(0).transpose(0, 1).contiguous().transpose(0, 1)): check_grads(m, o)

@pytest.mark.parametrize('name', ['vit3', 'clip5', 'image7'])
def test_R25_weights_in_channels_last(name):
    "As timm's training script makes them with --channels-last"
    m,(x,) = CASES[name](b=3)
    last = torch.channels_last if x.ndim==4 else torch.channels_last_3d
    check_grads(m.to(memory_format=last), x.contiguous(memory_format=last))

ZEROS = torch.zeros
@pytest.mark.parametrize('model, x, words', [('vit',ZEROS(2, 3, 32, 32, dtype=torch.uint8),'normalised float images, '
                                              'got torch.uint8'), ('vit',ZEROS(2, 1, 32, 32),'expected 3 channels, got '
                                                  '1'),
    ('vit',ZEROS(2, 3, 33, 32),'multiples of the patch, 8x8 pixels: got 33x32'),
    ('vit',ZEROS(3, 32, 32),r'\(B, 3, H, W\), got \(3, 32, 32\)'), ('vit',ZEROS(2, 3, 4, 32, 32),r'\(B, 3, H, W\), got '
        r'\(2, 3, 4, 32, 32\)'),
    ('image',ZEROS(2, 3, 16, 16, dtype=torch.uint8),'normalised float images, got torch.uint8'),
    ('image',ZEROS(2, 4, 16, 16),'expected 3 channels, got 4'), ('image',ZEROS(2, 3, 16, 15),'multiples of the patch, '
        '2x2 pixels: got 16x15'),
    ('image',ZEROS(2, 3, 0, 16),'got 0x16'), ('image',ZEROS(3, 16, 16),r'\(B, 3, H, W\), got \(3, 16, 16\)'),
    ('image',ZEROS(2, 3, 4, 16, 16),r'expected images of shape \(B, 3, H, W\), got \(2, 3, 4, 16, 16\)'),
    ('clip',ZEROS(2, 3, 4, 16, 16, dtype=torch.uint8),'normalised float clips, got torch.uint8'),
    ('clip',ZEROS(2, 4, 3, 16, 16),'expected 3 channels, got 4'), ('clip',ZEROS(2, 3, 4, 18, 16),'multiples of the '
        'patch, 2x4x4: got 4x18x16'),
    ('clip',ZEROS(2, 3, 3, 16, 16),'number of frames.* multiples of the patch, 2x4x4: got 3x16x16'),
    ('clip',ZEROS(2, 3, 1, 16, 16),'got 1x16x16'), ('clip',ZEROS(2, 3, 16, 16),r'expected clips of shape \(B, 3, T, H, '
                                                    r'W\), got \(2, 3, 16, 16\)')],
    ids=lambda o: None
    if isinstance(o, str) else 'x'.join(map(str, o.shape))+(' uint8' if o.dtype==torch.uint8 else ''))
def test_R25_wrong_images_are_refused_in_a_sentence(model, x, words):
    make = dict(vit='vit3', image='image6', clip='clip5')[model]
    with pytest.raises(ValueError, match=words): CASES[make](dtype=torch.float32)[0](x)

def test_R25_another_size_of_image():
    m,_ = vit(3, 2)
    assert m(*images(2, 64)).shape==(2,5)
    check_grads(m, *images(2, 48))

@pytest.mark.parametrize('name, shape', [('image6',(24,16)), ('image7',(10,14)), ('clip5',(4,16,24)),
                                         ('clip6',(8,12,20)), ('clip5',(2,4,4)), ('clip6',(6,20,8))], ids=str)
def test_R25_other_sizes_and_numbers_of_frames(name, shape):
    "Not square, odd grids, a single token; the position embedding is resampled and gets its gradient"
    m,_ = CASES[name]()
    x = torch.randn(3, 3, *shape, dtype=torch.float64, device=DEVICE)
    assert m.eval()(x).shape==(3,5)
    check_grads(m.train(), x)

@pytest.mark.parametrize('change, words', [(lambda x: x[:2],r'\(5, 3, 8\).* and \(2, 3, 8\)'),
                                           (lambda x: x.float(),'float64 .* and .* float32'),
                                           (lambda x: x[...,:7],r'and \(5, 3, 7\)')], ids=['batch','dtype','width'])
def test_R25_streams_that_differ_are_refused(change, words):
    for m in (stack(3), stack(3).eval().requires_grad_(False)):
        with pytest.raises(ValueError, match='streams differ: .*'+words): m(streams()[0], change(streams()[1]))

@pytest.mark.parametrize('bad', [float('nan'), float('inf')])
@both
def test_R26_one_bad_sample_leaves_the_others_as_they_were_to_the_bit(make, bad):
    "In training and evaluation, with and without gradients (a training run that stops by name: notebook 31_callbacks)"
    m,xs = make(dtype=torch.float32)
    spoilt = [x.clone() for x in xs]
    for x in spoilt: x[2] = bad
    others = [0,1,3,4]
    for on,training,grad in ((True,True,True),(False,True,True),(True,False,True),(True,False,False)):
        m.train(training)
        m.set_reversible(on)
        with torch.set_grad_enabled(grad): (a,b) = (outputs((torch.manual_seed(0),m(*o))[1]) for o in (xs,spoilt))
        for p,q in zip(a, b): assert torch.equal(p[others], q[others]) and not q[2].isfinite().all()
