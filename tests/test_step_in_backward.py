"""A step made weight by weight in the backward pass is the ordinary step to the bit, and refuses what needs all
gradients"""
import copy
from contextlib import nullcontext
from dataclasses import replace
from unittest import mock

import pytest, timm, torch
from fastai.vision.all import Callback, GradientAccumulation, GradientClip
import revvit
from revvit.core.memory import peak_bytes
from revvit.training.callbacks import NonFiniteError
from revvit.training.recipes import recipes
from revvit.training.resume import keep_state
from revvit.training.step_in_backward import step_early

TINY = dict(
    vit=('revvit_tiny_patch16_224', dict(img_size=32, patch_size=8, embed_dim=32, num_heads=2, depth=3), (3,32,32)),
    mvit=('revmvit_tiny_224', dict(img_size=32, embed_dim=16, depth=3, stage_starts=(1,)), (3,32,32)))
OPTIMIZERS = dict(
    adamw=(torch.optim.AdamW, dict(lr=.01, weight_decay=.1)),
    fused=(torch.optim.AdamW, dict(lr=.01, fused=True)),
    amsgrad=(torch.optim.Adam, dict(lr=.01, amsgrad=True)),
    momentum=(torch.optim.SGD, dict(lr=.01, momentum=.9, nesterov=True)),
    foreach=(torch.optim.AdamW, dict(lr=.01, foreach=True)))

def trained(kind, optimizer, early, steps=3, **mode):
    torch.manual_seed(0)
    name,args,shape = TINY[kind]
    m = timm.create_model(name, num_classes=4, drop_path_rate=.2, **args)
    m.set_reversible(**mode)
    cls,kw = OPTIMIZERS[optimizer]
    names = [[n for n,p in m.named_parameters() if (p.ndim>1)==o] for o in (True,False)]
    opt = cls([dict(params=[m.get_parameter(n) for n in o]) for o in names], **kw)
    handles = step_early(opt, m.parameters()) if early else []
    for i in range(steps):
        for g in opt.param_groups: g['lr'] = .01/(i+1)
        m(torch.randn(3, *shape)).square().sum().backward()
        assert early == all(p.grad is None for p in m.parameters())
        opt.step()
        opt.zero_grad()
    for h in handles: h.remove()
    return {n: (p,opt.state[p]) for n,p in m.named_parameters()}

def equal(a, b):
    for n in a:
        assert torch.equal(a[n][0], b[n][0]), n
        assert a[n][1].keys()==b[n][1].keys()
        for k,v in a[n][1].items(): assert torch.equal(torch.as_tensor(v), torch.as_tensor(b[n][1][k])), (n,k)

@pytest.mark.parametrize('optimizer', OPTIMIZERS)
@pytest.mark.parametrize('kind', TINY)
def test_the_bits_of_the_ordinary_step(kind, optimizer):
    equal(trained(kind, optimizer, True), trained(kind, optimizer, False))

@pytest.mark.parametrize('mode', [dict(exact=True), dict(keep=.3), dict(on=False)], ids=str)
def test_in_every_mode(mode):
    equal(trained('vit', 'adamw', True, **mode), trained('vit', 'adamw', False, **mode))

def test_a_state_that_is_loaded_later():
    "What the optimizer is given after the hooks were set is what goes on"
    found = []
    for early in (True,False):
        torch.manual_seed(0)
        m = torch.nn.Linear(3, 2)
        opt = torch.optim.AdamW(m.parameters(), lr=.01)
        if early: step_early(opt, m.parameters())
        state = {i: dict(step=torch.tensor(9.), exp_avg=torch.ones_like(p), exp_avg_sq=torch.ones_like(p))
                 for i,p in enumerate(m.parameters())}
        opt.load_state_dict(dict(opt.state_dict(), state=state))
        for _ in range(2):
            m(torch.ones(1, 3)).sum().backward()
            opt.step()
            opt.zero_grad()
        found.append([*m.parameters(), *(opt.state[p]['exp_avg'] for p in m.parameters())])
    assert all(map(torch.equal, *found))

@pytest.mark.parametrize('on', [True,False])
def test_frozen_weights_stay(on):
    m = timm.create_model(TINY['vit'][0], num_classes=4, **TINY['vit'][1])
    m.set_reversible(on)
    for p in m.blocks[0].parameters(): p.requires_grad_(False)
    was = copy.deepcopy(m.state_dict())
    opt = torch.optim.AdamW(m.parameters())
    assert len(step_early(opt, m.parameters()))==sum(p.requires_grad for p in m.parameters())
    m(torch.randn(2, 3, 32, 32)).sum().backward()
    moved = {n for n,v in m.state_dict().items() if not torch.equal(v, was[n])}
    assert moved=={n for n,p in m.named_parameters() if p.requires_grad}

def test_weights_without_a_gradient_stay():
    "Those of a half whose result nobody used, for which the hook is called all the same"
    half = lambda: torch.nn.Linear(8, 8)
    seq,moved = revvit.ReversibleSequence([revvit.ReversibleBlock(half(), half())]),[]
    was = copy.deepcopy(seq.state_dict())
    opt = torch.optim.AdamW(seq.parameters())
    step_early(opt, seq.parameters(), lambda p, one: moved.append(p.grad.norm()))
    x = torch.randn(2, 8)
    seq(x, x)[0].sum().backward()
    same = {k for k,v in seq.state_dict().items() if torch.equal(v, was[k])}
    assert same=={'0.g.weight','0.g.bias'} and len(moved)==2

# ---------------------------------------------------------------- a deep model, ours and a rewired one

def ours(depth=3, dim=32):
    return timm.create_model(TINY['vit'][0], num_classes=4, **dict(TINY['vit'][1], embed_dim=dim, depth=depth))

def rewired(depth=3, dim=32):
    torch.manual_seed(0)
    return revvit.reversible(timm.create_model('vit_tiny_patch16_224', img_size=32, patch_size=8, embed_dim=dim,
                                               num_heads=2, depth=depth, num_classes=4))

@pytest.mark.parametrize('optimizer', ['adamw','momentum'])
def test_a_rewired_model_has_the_bits_of_the_ordinary_step(optimizer):
    cls,kw = OPTIMIZERS[optimizer]
    def run(on):
        m = rewired()
        opt = cls(m.parameters(), **kw)
        if on: step_early(opt, m.parameters())
        for i in range(3):
            m(torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(i))).square().sum().backward()
            assert on == all(p.grad is None for p in m.parameters())
            opt.step()
            opt.zero_grad()
        return {n: (p,opt.state[p]) for n,p in m.named_parameters()}
    equal(run(True), run(False))

@pytest.mark.parametrize('make', [ours,rewired])
def test_gradients_that_live_are_one_blocks(make):
    "Bytes in gradients whenever a weight steps: never more than a block's, or those of stem and head"
    m = make(8)
    seen,live = [],lambda: sum(p.grad.nbytes for p in m.parameters() if p.grad is not None)
    opt = torch.optim.AdamW(m.parameters())
    step_early(opt, m.parameters(), lambda p, one: seen.append(live()))
    m(torch.randn(2, 3, 32, 32)).sum().backward()
    block = sum(p.nbytes for p in m.blocks[0].parameters())
    ends = sum(p.nbytes for n,p in m.named_parameters() if not n.startswith('blocks.'))
    assert len(seen)==len(list(m.parameters())) and max(seen) <= max(block, ends) and not live()

@pytest.mark.parametrize('make', [ours,rewired])
def test_the_peak_of_a_step_is_flat_in_depth(make):
    "Gradients of one block at a time"
    def peak(depth, early):
        m,x = make(depth, 96),torch.randn(1, 3, 32, 32)
        opt = torch.optim.AdamW(m.parameters())
        if early: step_early(opt, m.parameters())
        def step():
            m(x).sum().backward()
            opt.step()
            opt.zero_grad()
        step()
        return peak_bytes(step)
    assert peak(12, True)-peak(4, True) < 8*1024 and peak(12, False) > 2*peak(4, False)

# ---------------------------------------------------------------- in a learner

early = replace(recipes['digits'], epochs=2, warmup_epochs=.5, batch_size=300, clip=None, step_in_backward=True,
                model_args=dict(patch_size=4, embed_dim=16, num_heads=2, depth=2))
late = lambda: mock.patch('revvit.training.learner._fused', lambda device: True)

def learner(recipe, **kw): return revvit.learner(revvit.digits_dls(bs=recipe.batch_size, device='cpu'), recipe, **kw)

def fitted(learn, n=2, **kw):
    with learn.no_bar(), learn.no_logging(): learn.fit(n, **kw)
    return learn

def weights(learn): return list(learn.model.state_dict().values())

@pytest.mark.parametrize('change', [{}, dict(average=.9), dict(layer_decay=.7), dict(mixup=.8), dict(freeze=1)],
                         ids=str)
@pytest.mark.parametrize('gpu', [False,True])
def test_a_run_ends_with_the_same_weights(gpu, change):
    "With the optimizer of a CPU, and with that of a GPU, which reads its check later"
    found = []
    for on in (True,False):
        with late() if gpu else nullcontext(): learn = learner(replace(early, step_in_backward=on, **change))
        found.append(fitted(learn))
    assert all(map(torch.equal, *map(weights, found)))
    assert found[0].recorder.values==found[1].recorder.values
    assert found[0].stop_on_non_finite.late==gpu and not found[0].model.head.bias._post_accumulate_grad_hooks

@pytest.mark.parametrize('every', [None,2])
def test_a_stopped_run_goes_on(every, tmp_path):
    class Stop(Callback):
        order = 80
        def after_batch(self):
            if self.train_iter==7: raise KeyboardInterrupt
    straight = fitted(keep_state(learner(early, out=tmp_path/'a'), every=every))
    with pytest.raises(KeyboardInterrupt): fitted(keep_state(learner(early, out=tmp_path/'b'), every=every), cbs=Stop())
    again = fitted(keep_state(learner(early, out=tmp_path/'b'), every=every, resume=True))
    assert all(map(torch.equal, *map(weights, (straight,again))))

class Spoil(Callback):
    order,run_valid = -5,False
    def __init__(self, weight, at=2): self.weight,self.at = weight,at
    def before_backward(self):
        if self.train_iter!=self.at: return
        self.was = {n: p.detach().clone() for n,p in self.model.named_parameters()}
        p = self.model.get_parameter(self.weight)
        self.hook = p.register_hook(lambda g: [self.hook.remove(), g*float('nan')][1])

@pytest.mark.parametrize('gpu', [False,True])
@pytest.mark.parametrize('name,ahead', [('head.bias', False), ('blocks.1.g.fn.fc1.weight', True)])
def test_a_gradient_that_is_not_finite(name, ahead, gpu):
    "Its weight does not move, nor do those that come after it; the message says whether others have"
    with late() if gpu else nullcontext(): learn = learner(early)
    spoil = Spoil(name)
    with pytest.raises(NonFiniteError) as e: fitted(learn, cbs=spoil)
    words = 'norm of the gradient of' if gpu else 'gradient of'
    assert str(e.value).startswith(f'step 3 (epoch 1): {words} {name} is not finite; ')
    moved = {n for n,p in learn.model.named_parameters() if not torch.equal(p, spoil.was[n])}
    assert name not in moved and not any(n.startswith(('blocks.0','patch_embed')) for n in moved)
    assert bool(moved)==ahead or name=='head.bias'
    if moved: assert 'go on from the state before it (--resume)' in str(e.value)
    assert all(torch.isfinite(p).all() for p in learn.model.parameters())

def test_a_loss_that_is_not_finite_moves_nothing():
    learn = learner(early)
    with torch.no_grad(): learn.model.head.bias[0] = float('nan')
    was = copy.deepcopy(learn.model.state_dict())
    with pytest.raises(NonFiniteError, match='the weights are those of step 0'): fitted(learn)
    assert all(torch.equal(a.nan_to_num(), b.nan_to_num()) for a,
               b in zip(was.values(), learn.model.state_dict().values()))

def test_a_rate_can_be_looked_for():
    learn = learner(early)
    was = copy.deepcopy(learn.model.state_dict())
    with learn.no_bar(): assert learn.lr_find(show_plot=False, num_it=12).valley > 0
    assert all(torch.equal(v, learn.model.state_dict()[k]) for k,v in was.items())
    assert all(map(torch.equal, *map(weights, (fitted(learn),fitted(learner(early))))))

@pytest.mark.parametrize('cb,said', [(GradientClip(1.), 'clipping'), (GradientAccumulation(64), 'accumulation')])
def test_callbacks_that_need_all_gradients(cb, said):
    with pytest.raises(ValueError, match=f'step_in_backward=True does not go with {said}: it needs all '
                                         f'gradients at once; '):
        fitted(learner(early), cbs=cb)

def test_several_processes_and_scales():
    with mock.patch('revvit.training.step_in_backward.num_distrib', lambda: 2):
        with pytest.raises(ValueError, match='does not go with several processes'): fitted(learner(early))
    learn = learner(early)
    learn.scaler = torch.amp.GradScaler('cpu')
    with pytest.raises(ValueError, match="does not go with float16's scale.*bfloat16"): fitted(learn)

@pytest.mark.parametrize('change,said', [(dict(clip=1.), 'clip=1, the norm of all gradients'),
                                         (dict(accumulate=2), 'accumulate=2, the sum over several batches')])
def test_recipes_that_need_all_gradients(change, said):
    with pytest.raises(ValueError, match=f'step_in_backward=True does not go with {said}'): replace(early, **change)

class Ends(Callback):
    "End a fit in its second step, in the backward pass or after it"
    order = 99
    def __init__(self, learn, inside): self.inside,self.p = inside,next(learn.model.parameters())
    def hooked(self, p):
        if self.train_iter==1: raise KeyboardInterrupt
    def before_fit(self):
        self.handle = self.p.register_post_accumulate_grad_hook(self.hooked) if self.inside else None
    def after_step(self):
        if not self.inside and self.train_iter==1: raise KeyboardInterrupt

@pytest.mark.filterwarnings('ignore')
@pytest.mark.parametrize('inside', [True, False])
def test_a_fit_that_was_ended_leaves_no_step_behind(inside):
    "Neither in a backward pass of one's own, nor in another learner, nor in the next fit of this one"
    r = replace(recipes['digits'], epochs=1, batch_size=256, warmup_epochs=0, clip=None, step_in_backward=True,
                model_args=dict(patch_size=4, embed_dim=16, num_heads=2, depth=2))
    def learner(model=None, **kw):
        return revvit.learner(revvit.digits_dls(bs=256, device='cpu'), replace(r, **kw), model)
    def fit(learn, *cbs, **kw):
        with learn.no_bar(), learn.no_logging(): learn.fit(1, cbs=list(cbs), **kw)
        return [o.detach().clone() for o in learn.model.parameters()]
    learn = learner()
    end = Ends(learn, inside)
    with pytest.raises(KeyboardInterrupt): fit(learn, end)
    if inside: end.handle.remove()
    learn.remove_cb(end)   # fastai leaves what a fit was given
    model,was = learn.model,copy.deepcopy(learn.model.state_dict())
    x,y = (o.as_subclass(torch.Tensor) for o in learn.dls.train.one_batch())
    torch.nn.functional.cross_entropy(model(x), y).backward()
    assert all(torch.equal(v, was[k]) for k,v in model.state_dict().items())
    model.zero_grad()
    clean = learner().model
    clean.load_state_dict(was)
    for kw in (dict(step_in_backward=False), dict()):
        ours,theirs = learner(copy.deepcopy(clean), **kw),learner(model, **kw)
        assert all(map(torch.equal, fit(ours), fit(theirs)))
        model.load_state_dict(was)
