"""A learner made from a recipe, as fastai's users handle one: rates used as given, its other ways to fit, and what a
log holds on a terminal, in a file and in a pipe"""
import math, os, random, re, sys, warnings
from contextlib import redirect_stdout
from dataclasses import replace
from unittest import mock

import numpy as np, pytest, torch
from fastai.vision.all import Callback, CancelFitException, ClassificationInterpretation, GradientClip, error_rate
from matplotlib import pyplot as plt
from pathlib import Path
from PIL import Image
from torch.testing import assert_close
from revvit.models.files import read_checkpoint
from revvit.models.checkpoints import load_model
from revvit.data.digits import digits_dls
from revvit.training.resume import keep_state, states
from revvit.data.video_file import write_video
from revvit.training.recipes import recipe_dls, recipes
from revvit.training.callbacks import NonFiniteError
from revvit.training.learner import learner, plot_history
from revvit.training.logs import SaveBest
from test_resume import command
from test_training import same, small, spawn, wait

torch.set_num_threads(1)
pytestmark = pytest.mark.filterwarnings('ignore')
plain = replace(recipes['digits'], epochs=2, batch_size=256, lr=1e-3, warmup_epochs=0,
                model_args=dict(patch_size=4, embed_dim=16, num_heads=2, depth=1))

def make(recipe=plain, bs=256, **kw): return learner(digits_dls(bs=bs, device='cpu'), recipe, **kw)
def quiet(learn, f, *args, **kw):
    with learn.no_bar(), learn.no_logging(): getattr(learn, f)(*args, **kw)
    return learn

# ---------------------------------------------------------------- rates

@pytest.mark.parametrize('bs,batch_size,lr', [(256, 256, 1e-3), (128, 256, 1e-3), (512, 64, 1e-3), (256, 64, 3e-2)])
def test_a_recipes_rate_is_used_as_it_stands(bs, batch_size, lr):
    "Whatever batches the loaders give; that they are not the recipe's is said"
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter('always')
        learn = make(replace(plain, lr=lr, batch_size=batch_size), bs)
    about = [str(o.message) for o in said if 'learning rate' in str(o.message)]
    assert about == ([] if bs == batch_size else [f"the recipe's learning rate {lr:g} is for batches of {batch_size}, "
                                                  f"but the loaders give {bs}: it is used as it is; "
                                                  f"recipe.changed(batch_size={bs}) scales it"])
    assert quiet(learn, 'fit', 1).recorder.lrs[0] == lr == learn.recipe.lr and learn.recipe.batch_size == bs

def test_scaling_is_said(capsys):
    assert plain.changed(batch_size=64).lr == 1e-3/4
    assert (capsys.readouterr().out == "learning rate 0.00025: the recipe's 0.001 for batches of 256, "
                                       "in proportion to 64\n")
    assert (plain.changed(batch_size=64, lr=1e-3).lr, plain.changed(epochs=7).lr) == (1e-3, 1e-3)
    assert capsys.readouterr().out == ''

@pytest.mark.parametrize('warmup', [0, .5])
@pytest.mark.parametrize('lr', [1e-2, 2e-5, 1e-7], ids=str)
def test_fit_goes_up_to_the_rate_it_is_given(warmup, lr):
    "Also one below the recipe's last rate; the next fit without a rate is the recipe's again"
    learn = quiet(make(replace(plain, warmup_epochs=warmup)), 'fit', 2, lr=lr)
    rates = learn.recorder.lrs # ten steps
    assert max(rates) == pytest.approx(lr, rel=.1 if warmup else 1e-12) and max(rates) <= lr
    assert rates[-1] <= max(rates) and (rates[0] < max(rates)) == bool(warmup)
    assert max(quiet(learn, 'fit', 2).recorder.lrs) == pytest.approx(1e-3, rel=.1)
    learn.lr = lr
    assert max(quiet(learn, 'fit', 2).recorder.lrs) == pytest.approx(lr, rel=.1)

def test_the_rate_reaches_the_weights():
    "Not the log alone: a rate of a tenth moves them about a tenth as far in the first step of Adam"
    def moved(*args):
        learn = make()
        was = learn.model.head.weight.clone()
        class First(Callback):
            def after_step(self):
                self.moved = (self.model.head.weight-was).norm().item()
                raise CancelFitException()
        quiet(learn, 'fit', 1, *args, cbs=(cb := First()))
        return cb.moved
    assert moved(1e-4)/moved() == pytest.approx(.1, rel=1e-3)

@pytest.mark.parametrize('way,args,top', [('fit_one_cycle', (2, 5e-3), 5e-3), ('fit_one_cycle', (2,), 1e-3),
                                          ('fit_flat_cos', (2, 3e-3), 3e-3), ('fit_flat_cos', (2,), 1e-3),
                                          ('fit_sgdr', (2, 1, 2e-3), 2e-3)], ids=str)
def test_fastais_own_schedules_replace_ours(way, args, top):
    learn = quiet(make(), way, *args)
    assert max(learn.recorder.lrs) == pytest.approx(top, rel=.1)
    assert np.allclose(learn.recorder.hps['lr'], learn.recorder.lrs) and min(learn.recorder.lrs) < top
    assert max(quiet(learn, 'fit', 1).recorder.lrs) == 1e-3 # and ours is back

@pytest.mark.parametrize('f,args,said', [('freeze', (), 'freeze and fine_tune take parameter groups for layers'),
    ('fine_tune', (1,), 'freeze and fine_tune take'), ('freeze_to', (1,), 'freeze and fine_tune take'),
    ('fit', (1, slice(1e-5, 1e-3)), 'give one number'), ('fit_one_cycle', (1, slice(1e-3)), 'give one number'),
    ('fit_flat_cos', (1, slice(1e-5, 1e-3)), 'give one number')], ids=str)
def test_what_means_layers_is_refused(f, args, said):
    learn = make()
    was = [o.clone() for o in learn.model.parameters()]
    with pytest.raises(ValueError, match=said): quiet(learn, f, *args)
    assert all(map(torch.equal, was, learn.model.parameters()))
    assert all(o.requires_grad for o in learn.model.parameters())

@pytest.mark.parametrize('average', [None, .9])
def test_what_was_frozen_does_not_stay_so_without_a_word(average):
    learn = make(replace(plain, freeze='backbone', average=average))
    quiet(learn, 'fit', 1)
    with pytest.raises(ValueError, match=r'requires_grad_\(True\) and fit\(..., reset_opt=True\)'): learn.unfreeze()
    (learn.weight_average.trained if average else learn.model).requires_grad_(True)
    with pytest.raises(ValueError, match='tensors that need gradients, .*, are not among those that the optimizer was'):
        quiet(learn, 'fit', 1)
    if average: return
    was = [o.clone() for o in learn.model.parameters()]
    quiet(learn, 'fit', 1, reset_opt=True)
    assert not any(map(torch.equal, was, learn.model.parameters()))

@pytest.mark.parametrize('between', [None, 'get_preds', 'lr_find'])
@pytest.mark.parametrize('average', [None, .9])
def test_weights_that_were_loaded_are_trained(average, between, tmp_path):
    "Where a fit with a moving average left the average, they went into that alone"
    learn = make(replace(plain, average=average))
    learn.path = tmp_path
    learn.save('start')
    start = {k: v.clone() for k,v in learn.model.state_dict().items()}
    quiet(learn, 'fit', 1)
    assert not torch.equal(learn.model.head.weight, start['head.weight'])
    learn.load('start')
    if between=='get_preds': quiet(learn, 'get_preds')
    if between=='lr_find': quiet(learn, 'lr_find', show_plot=False, num_it=20)
    seen = []
    def see(cb): seen.append({k: v.clone() for k,v in cb.model.state_dict().items()})
    quiet(learn, 'fit', 1, cbs=Callback(before_batch=see))
    assert all(torch.equal(seen[0][k], v) for k,v in start.items())

def test_training_goes_on_from_the_trained_weights():
    "And not from their average, when nothing was loaded"
    learn = quiet(make(replace(plain, average=.9)), 'fit', 1)
    trained = learn.weight_average.trained.head.weight.clone()
    quiet(learn, 'get_preds')
    learn.model.to('cpu', torch.float32)
    seen = []
    quiet(learn, 'fit', 1, cbs=Callback(before_batch=lambda cb: seen.append(cb.model.head.weight.clone())))
    assert torch.equal(seen[0], trained) and not torch.equal(learn.weight_average.ema.module.head.weight, trained)

def test_an_optimizer_of_the_average_trains_nothing_and_is_refused():
    learn = quiet(make(replace(plain, average=.9)), 'fit', 1)
    with pytest.raises(ValueError, match='make a new learner'): quiet(learn, 'fit', 1, reset_opt=True)

def test_the_remedy_for_freezing_works():
    learn = make()
    learn.model.requires_grad_(False)
    learn.model.head.requires_grad_(True)
    was = {k: v.clone() for k,v in learn.model.state_dict().items()}
    quiet(learn, 'fit', 1, lr=1e-2)
    assert {k for k,v in learn.model.state_dict().items() if not torch.equal(v, was[k])} == {'head.weight', 'head.bias'}

@pytest.mark.parametrize('average', [None, .9])
@pytest.mark.parametrize('kw', [dict(num_it=12), dict(num_it=30, end_lr=1e9, stop_div=False)],
                         ids=['mild', 'diverging'])
def test_lr_find_leaves_no_trace(average, kw, tmp_path):
    "It suggests, and what is trained then, and written, is what would have been without it; before and after a fit"
    recipe = replace(plain, average=average)
    one = quiet(make(recipe, out=tmp_path/'one'), 'fit', 2)
    two = keep_state(make(recipe, out=tmp_path/'two'))
    assert two.lr_find(show_plot=False, **kw).valley > 0
    assert not states(tmp_path/'two') and not list((tmp_path/'two').glob('*.*')) and not hasattr(two, 'lr_finder')
    quiet(two, 'fit', 2)
    assert same(one.model.state_dict(), two.model.state_dict()) and one.recorder.values == two.recorder.values
    files = {o.name: o.read_bytes() for o in (tmp_path/'two').glob('*.*')}
    two.lr_find(show_plot=False, num_it=12)
    assert {o.name: o.read_bytes() for o in (tmp_path/'two').glob('*.*')} == files and not two.recorder.values[2:]
    assert two.validate()[1] == one.recorder.values[-1][2] # the weights are what they were

# ---------------------------------------------------------------- the log

def logged(cwd, name, args, tty=False):
    "revvit_train with its output in a file of that descriptor"
    sys.stdout = open(os.dup(name), 'w', encoding='utf8')
    command(cwd, args)
    sys.stdout.flush()

@pytest.mark.skipif(not hasattr(os, 'fork'), reason='needs fork')
@pytest.mark.parametrize('kind,epochs', [('file', 10), ('pipe', 3)])
def test_a_redirected_log_is_plain_and_short(kind, epochs, tmp_path):
    "A line for each epoch below 160 bytes, and nothing that redraws: the 60 epochs of the default run stay below 12 kB"
    end,begin = os.pipe() if kind == 'pipe' else (None, os.open(tmp_path/'log', os.O_CREAT | os.O_WRONLY))
    pid = spawn(logged, tmp_path, begin, ['--epochs', epochs, '--batch-size', 1024])
    os.close(begin)
    said = b''
    while kind == 'pipe' and (part := os.read(end, 4096)): said += part
    assert wait(pid) == 0
    if kind == 'file': said = (tmp_path/'log').read_bytes()
    assert not set(said) & {13, 27, 8} and len(said) < 2500+160*epochs
    lines = [o for o in said.decode().splitlines() if o.startswith('epoch ')]
    rows = [o for o in lines if re.match(r'epoch \d+ of \d+: train_loss [\d.]+, valid_loss [\d.]+, accuracy [\d.]+ %, '
                                         r'top_5 [\d.]+ %, time ', o)]
    assert [int(o.split()[1]) for o in rows] == [*range(1, epochs+1)] and all(o.endswith(' left') for o in rows[:-1])
    assert 'left' not in rows[-1]

@pytest.mark.thorough
def test_a_long_epoch_has_lines_between(tmp_path):
    """Every hundred steps: epoch, step, loss, accuracy, rate, images a second, time left, memory; none while it
    validates"""
    with open(tmp_path/'log', 'w') as f, redirect_stdout(f):
        learn = make(plain, 13)
        learn.plain_log.every = 100
        learn.fit(2)
        losses,rates = learn.recorder.losses,learn.recorder.lrs
        learn.validate(), learn.get_preds()
    lines = (tmp_path/'log').read_text().splitlines()
    want = (r'epoch %d of 2, step %d of 110: loss \d\.\d{4}, accuracy \d+\.\d %%, lr [\de.-]+, [\d.]+ images/s,( '
            r'[\d:]+ left,)? '
            r'keeps [\d.]+ MB, plain autograd [\d.]+ MB')
    rows = [o for i in (1,2) for o in (*[want % (i, k) for k in (1,100,110)], rf'epoch {i} of 2: train_loss .*')]
    assert len(lines) == 8 and all(map(re.fullmatch, rows, lines)), lines
    assert float(lines[1].split('loss ')[1].split(',')[0]) == pytest.approx(losses[99].item(), abs=1e-4)
    assert float(lines[1].split('lr ')[1].split(',')[0]) == pytest.approx(rates[99], rel=1e-2)

@pytest.mark.skipif(os.name != 'posix', reason='a terminal is made as POSIX has it')
def test_on_a_terminal_the_bar_moves(tmp_path):
    import fcntl, pty, struct, termios
    ours,theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack('HHHH', 24, 100, 0, 0)) # a new one has no columns
    pid = spawn(logged, tmp_path, theirs, ['--epochs', 2, '--batch-size', 64, '--threads', 1])
    os.close(theirs)
    said = b''
    try:
        while part := os.read(ours, 4096): said += part
    except OSError: pass # the end of a terminal, on Linux
    os.close(ours)
    assert wait(pid) == 0
    frames = re.findall(r'\d+\.\d+% \[(\d+)/22', said.decode())
    # fastai's table has it in its head only
    assert len({*frames}) > 3 and b'\r' in said and said.count(b'train_loss') == 1, said[-500:]

def test_silenced(capsys):
    "`no_bar` and `no_logging` mean what they mean in fastai"
    learn = make()
    with learn.no_logging(): learn.fit(1)
    # in place of the bar, which fastai keeps too
    assert re.fullmatch(r'epoch 1 of 1, step 1 of 5: .*\n', capsys.readouterr().out)
    with learn.no_bar(): learn.fit(1)
    assert capsys.readouterr().out.count('\n') == 1
    quiet(learn, 'fit', 1)
    assert capsys.readouterr().out == ''

# ---------------------------------------------------------------- what a step costs

def test_one_norm_a_step_for_the_check_and_the_limit():
    "The weights are those that fastai's own clipping gives"
    with mock.patch('torch.nn.utils.get_total_norm', wraps=torch.nn.utils.get_total_norm) as norm:
        learn = quiet(make(replace(plain, clip=.1)), 'fit', 1)
    assert norm.call_count == len(learn.dls.train) == len(learn.recorder.lrs)
    other = make(replace(plain, clip=None))
    other.add_cb(GradientClip(.1))
    weights = [list(o.model.state_dict().values())
               for o in (learn, quiet(other, 'fit', 1), quiet(make(replace(plain, clip=None)), 'fit', 1))]
    assert all(map(torch.equal, *weights[:2])) and not all(map(torch.equal, *weights[::2]))

@pytest.mark.parametrize('before,after', [(True, True), (None, True), (True, None)], ids=str)
def test_a_fused_optimizer_resumes_to_the_bit(before, after, tmp_path):
    """A state goes on with the kind of AdamW that wrote it, also where the learner would take the other: old states,
    another device"""
    def run(kind, folder, *cbs, **kw):
        with mock.patch('revvit.training.learner._fused', lambda device: kind):
            learn = keep_state(make(out=folder), **kw)
        learn.add_cbs(cbs)
        try: quiet(learn, 'fit', 2)
        except KeyboardInterrupt: pass
        return learn
    class Stop(Callback):
        def after_epoch(self):
            if self.epoch == 1: raise KeyboardInterrupt
    straight = run(before, tmp_path/'a')
    assert bool(straight.opt.opt.defaults['fused']) == bool(before)
    run(before, tmp_path/'b', Stop())
    for o in states(tmp_path/'b')[:-1]: o.unlink()
    again = run(after, tmp_path/'b', resume=True)
    assert all(map(torch.equal, straight.model.state_dict().values(), again.model.state_dict().values()))

def test_adamw_is_fused_on_a_gpu():
    from revvit.training.learner import _fused
    assert [_fused(o) for o in ('cuda', torch.device('cuda:1'), 'cpu', 'mps', None)] == [True, True, None, None, None]

# ---------------------------------------------------------------- what a GPU finds is read a step later

class Spoil(Callback):
    "In step `at`, counted from 0, put `value` into the place `where`, and keep the weights as they were before"
    order,run_valid = -5,False
    def __init__(self, where, at=2, value=float('nan')): self.where,self.at,self.value = where,at,value
    def before_batch(self):
        if self.train_iter != self.at: return
        if self.where == 'parameter':
            with torch.no_grad(): self.model.blocks[0].g.fn.fc1.weight[0,0] = self.value
        self.before = {k: v.clone() for k,v in self.model.state_dict().items()}
        if self.where == 'input':
            x = self.xb[0].clone()
            x[[5,9]] = self.value
            self.learn.xb = (x,)
    def after_pred(self):
        if self.train_iter == self.at and self.where == 'output': self.learn.pred = self.pred*self.value
    def after_loss(self):   # as it is shown: the gradient stays finite
        if self.train_iter == self.at and self.where == 'loss': self.learn.loss = self.loss*self.value
    def before_backward(self):
        if self.train_iter == self.at and self.where == 'gradient':
            self.hook = self.model.head.bias.register_hook(lambda g: [self.hook.remove(), g*self.value][1])

PLACES = dict(input='input 0 (items 5, 9 of the batch)', parameter='parameter blocks.0.g.fn.fc1.weight',
              output='output of the model', loss='loss', gradient='norm of the gradient of head.bias')

def late(recipe=plain, **kw):
    "A learner with the optimizer of a GPU, which can leave out a step by what stands on the device"
    with mock.patch('revvit.training.learner._fused', lambda device: True): return make(recipe, **kw)

def stopped(learn, spoil, f='fit', *args, **kw):
    with pytest.raises(NonFiniteError) as e: quiet(learn, f, *args, cbs=spoil, **kw)
    assert same({k: v.nan_to_num() for k,v in learn.model.state_dict().items()},
                {k: v.nan_to_num() for k,v in spoil.before.items()})
    assert not hasattr(learn.opt.opt, 'found_inf') and all(p.grad is None for p in learn.model.parameters())
    return str(e.value)

@pytest.mark.parametrize('at', [0, 2, 4, 5])
@pytest.mark.parametrize('where', PLACES)
def test_a_bad_step_is_left_out_and_named_later(where, at):
    """In the first step, in the last of an epoch and in the first of the next: the weights are those before it,
    although the host hears of it a step later"""
    learn = late(replace(plain, clip=.1))
    said = stopped(learn, spoil := Spoil(where, at), 'fit', 2)
    assert said == (f"step {at+1} (epoch {at//5+1}): {PLACES[where]} is not finite; stopped before the optimizer step, "
                    f"the weights are those of step {at}")
    assert learn.train_iter == at+1 and learn.stop_on_non_finite.late

@pytest.mark.parametrize('value', [float('inf'), -float('inf')])
def test_infinite_as_well(value):
    assert 'gradient of head.bias' in stopped(late(), Spoil('gradient', 2, value), 'fit', 1)

def test_the_moments_of_adam_are_left_out_too():
    learn = late()
    class Keep(Callback):
        order = 80
        def after_batch(self):
            if self.train_iter == 1:
                self.was = [{k: v.clone() for k,v in o.items()} for o in self.opt.opt.state.values()]
    keep,spoil = Keep(),Spoil('gradient', 1)
    with pytest.raises(NonFiniteError): quiet(learn, 'fit', 1, cbs=[keep, spoil])
    assert all(same(dict(a), dict(b)) for a,b in zip(keep.was, learn.opt.opt.state.values()))

@pytest.mark.parametrize('every', [1, 3])
def test_no_state_of_a_bad_step_is_written(every, tmp_path):
    learn = keep_state(late(out=tmp_path), every=every)
    stopped(learn, Spoil('gradient', 2), 'fit', 1)
    assert all(torch.isfinite(v).all() for o in states(tmp_path) for v in read_checkpoint(o)['state_dict'].values())
    assert [o.name for o in states(tmp_path)] == (['state-0-2.pth', 'state-0-1.pth'] if every == 1 else [])

def test_after_a_bad_step_the_learner_trains_on():
    "What was left out is forgotten: a second fit ends as that of a learner which never met it"
    learn,other = late(),late()
    stopped(learn, Spoil('gradient', 0), 'fit', 1)
    learn.create_opt(), other.create_opt()
    assert same(quiet(learn, 'fit', 1).model.state_dict(), quiet(other, 'fit', 1).model.state_dict())

@pytest.mark.parametrize('clip', [None, .1])
def test_read_late_or_at_once_gives_the_same(clip):
    "The same optimizer, weights and recorded losses, to the bit"
    a,b = late(replace(plain, clip=clip)),late(replace(plain, clip=clip))
    with mock.patch('revvit.training.callbacks._reads_late', lambda learn: False): quiet(a, 'fit', 2)
    quiet(b, 'fit', 2)
    assert not a.stop_on_non_finite.late and b.stop_on_non_finite.late
    assert same(a.model.state_dict(), b.model.state_dict()) and same(a.recorder.losses, b.recorder.losses)
    assert a.recorder.values == b.recorder.values

def test_when_it_is_read_at_once():
    """Where the optimizer cannot leave out a step, under a scaler, which leaves out steps of its own, and while a
    rate is looked for"""
    from revvit.training.callbacks import _reads_late
    learn = late()
    learn.create_opt()
    assert _reads_late(learn)
    for k,v in dict(scaler=torch.amp.GradScaler('cpu'), lr_finder=0).items():
        setattr(learn, k, v)
        assert not _reads_late(learn)
        delattr(learn, k)
    learn.scaler = torch.amp.GradScaler('cpu', enabled=False)   # of bfloat16
    assert _reads_late(learn)
    other = make()
    other.create_opt()
    assert not _reads_late(other)
    assert late().lr_find(show_plot=False, num_it=12).valley > 0

def test_the_losses_are_fastais():
    "Its running mean to the bit, which on a GPU stays there until the epoch ends"
    from fastai.vision.all import AvgSmoothLoss
    learn,seen = make(),AvgSmoothLoss()
    class Beside(Callback):
        order,run_valid = 55,False
        def before_fit(self):
            self.all = []
            seen.reset()
        def after_batch(self):
            seen.accumulate(self.learn)
            self.all.append(seen.value)
    quiet(learn, 'fit', 2, cbs=(beside := Beside()))
    assert len(beside.all) == 10 and same(list(map(float, learn.recorder.losses)), list(map(float, beside.all)))

# ---------------------------------------------------------------- the parts of a learner

def parts(learn): return [type(o).__name__ for o in learn.cbs.sorted('order')]
always = ['SeedRun','TrainEvalCallback','CastToTensor','StopOnNonFinite','Recorder','LossLater','PlainLog',
          'ProgressCallback','Schedule']

@pytest.mark.parametrize('change,more', [(dict(), {}), (dict(mixup=.8), dict(MixBatches=3)),
    (dict(cutmix=1.), dict(MixBatches=3)), (dict(average=.9), dict(WeightAverage=1))], ids=str)
def test_callbacks_in_order(change, more):
    want = always[:]
    for k,i in more.items(): want.insert(i, k)
    assert parts(make(replace(plain, **change))) == want

def test_a_run_has_the_formulas_rates():
    "At every step of two epochs, a fifth of an epoch of them for warming up"
    learn = quiet(make(replace(plain, lr=2e-3, warmup_epochs=.4)), 'fit', 2)
    n,w,b = 10,2,2e-3
    down = lambda i: 1e-6+(b-1e-6)*(1+math.cos(math.pi*(i-w)/(n-w)))/2
    want = [1e-8+(b-1e-8)*i/w if i < w else down(i) for i in range(n)]
    assert learn.recorder.lrs == pytest.approx(want, rel=1e-6)

def test_vectors_are_not_decayed():
    "Two groups by dimension, decay on one, the recipe's betas and eps on both"
    learn = make(replace(plain, weight_decay=.2, betas=(.8,.99), eps=1e-6))
    learn.create_opt()
    free,decayed = learn.opt.opt.param_groups
    got = [(o['weight_decay'], o['betas'], o['eps']) for o in (free,decayed)]
    assert got == [(0.,(.8,.99),1e-6), (.2,(.8,.99),1e-6)]
    named = {id(p): n for n,p in learn.model.named_parameters()}
    names = [{named[id(p)] for p in o['params']} for o in (free,decayed)]
    assert names[0] == {n for n,p in learn.model.named_parameters() if p.ndim <= 1}
    assert names[0] | names[1] == {*named.values()}
    assert 'head.bias' in names[0] and {'pos_embed','head.weight'} <= names[1]

@pytest.mark.parametrize('amp,said', [('bf16', "amp='bf16' needs a CUDA device: on cpu fastai would silently train"),
    ('fp16', "amp='fp16' needs a CUDA device"), ('half', "amp must be 'auto', 'bf16', 'fp16' or 'off', got 'half'")])
def test_amp_that_cannot_be_is_refused(amp, said):
    with pytest.raises(ValueError, match=said): make(amp=amp)

@pytest.mark.parametrize('amp', ['auto','off'])
def test_on_a_cpu_nothing_is_mixed(amp): assert not hasattr(make(amp=amp), 'mixed_precision')

def test_of_several_processes_the_first_writes(tmp_path):
    learn = make(out=tmp_path/'a'/'b')
    save = learn.save_checkpoint
    assert (learn.path, save.path) == (tmp_path/'a'/'b', tmp_path/'a'/'b'/'checkpoint.pth') and learn.path.is_dir()
    assert save.kwargs == dict(class_names=[str(o) for o in range(10)], input_settings=plain.image_cfg)
    with mock.patch.dict(os.environ, RANK='1'): other = make(out=tmp_path/'c')
    assert not hasattr(other, 'run_log') and not hasattr(other, 'save_checkpoint') and not (tmp_path/'c').exists()

def test_the_file_holds_what_was_trained(tmp_path):
    "Weights as they are now, class names and image settings; the log has a line per epoch"
    ran = quiet(make(out=tmp_path), 'fit', 2)
    back = load_model(ran.path/'checkpoint.pth')
    assert same(back.state_dict(), ran.model.state_dict())
    assert back.pretrained_cfg['label_names'] == [str(o) for o in range(10)]
    assert {k: back.pretrained_cfg[k] for k in plain.image_cfg} == plain.image_cfg
    log = (ran.path/'history.csv').read_text().splitlines()
    columns = 'epoch,train_loss,valid_loss,accuracy,top_5,lr,kept_MB,plain_MB,peak_MB,items_per_second,time'
    assert (log[0], len(log)) == (columns, 3)

def test_the_picture_of_a_run(tmp_path):
    "Both losses at their steps, the accuracy at its epochs; nothing else is written by predictions and validations"
    ran = quiet(make(out=tmp_path/'run'), 'fit', 2)
    losses,acc = (o.lines for o in plot_history(ran, tmp_path/'history.png').axes)
    assert len(losses[0].get_ydata()) == 10 and [*losses[1].get_xdata()] == [5,10] and [*acc[0].get_xdata()] == [1,2]
    log = (ran.path/'history.csv').read_text().splitlines()
    assert acc[0].get_ydata()[-1]/100 == pytest.approx(float(log[-1].split(',')[3]), abs=1e-6)
    assert (tmp_path/'history.png').read_bytes()[:4] == b'\x89PNG'
    was = {o.name: o.stat().st_mtime_ns for o in ran.path.iterdir()}
    quiet(ran, 'get_preds'), quiet(ran, 'validate')
    assert {o.name: o.stat().st_mtime_ns for o in ran.path.iterdir()} == was
    with pytest.raises(ValueError, match='nothing to plot'): plot_history(ran)

# ---------------------------------------------------------------- fastai's words about a trained learner

def seen_by(kind, folder):
    "A learner that has seen pictures or clips of two colours, its held-out files, and one of them in other forms"
    if kind == 'images':
        for i in range(24):
            (path := folder/('dark','light')[i%2]).mkdir(parents=True, exist_ok=True)
            Image.new('RGB', (32,32), ((i+20,)*3, (230-i,)*3)[i%2]).save(path/f'{i}.png')
        r = replace(recipes['fine_tune_images'], model='revvit_tiny_patch16_224',
                    model_args=dict(embed_dim=16, num_heads=2, depth=1),
                    image_cfg=dict(recipes['fine_tune_images'].image_cfg, input_size=(3,32,32)))
    else:
        for i in range(12):
            (path := folder/('dark','light')[i%2]).mkdir(parents=True, exist_ok=True)
            write_video(path/f'{i}.mp4', np.full((8,32,32), (i+20, 230-i)[i%2], np.uint8))
        r = replace(recipes['moving_digits'], data='clips',
                    model_args=dict(recipes['moving_digits'].model_args, embed_dim=16, depth=1, stage_starts=()),
                    image_cfg=dict(recipes['moving_digits'].image_cfg, input_size=(3,4,32,32)))
    r = replace(r, batch_size=4, epochs=3, lr=1e-2, warmup_epochs=0, aug=None, layer_decay=None)
    learn = quiet(learner(recipe_dls(r, folder, workers=0, device='cpu'), r), 'fit', 3)
    path = [*learn.dls.held][0]
    other = [Image.open(path), np.array(Image.open(path))] if kind == 'images' else []
    return learn,[path, Path(path), learn.dls.valid_ds[0][0], *other]

@pytest.mark.parametrize('kind', ['images','clips'])
def test_fastais_words(kind, tmp_path):
    "predict in every form, get_preds of a test_dl, show_batch, show_results, and ClassificationInterpretation"
    learn,forms = seen_by(kind, tmp_path/'data')
    with learn.no_bar(), learn.no_logging():
        probs,y = learn.get_preds()
        said = [learn.predict(o) for o in forms]
        again,_ = learn.get_preds(dl=learn.dls.test_dl(forms))
        seen = ClassificationInterpretation.from_learner(learn)
        matrix = seen.confusion_matrix()
        learn.dls.show_batch(max_n=3), learn.show_results(max_n=3)
        seen.plot_top_losses(2), seen.plot_confusion_matrix()
        learn.show_results(ds_idx=0, max_n=2)
    right = (probs.argmax(1) == y).float().mean()
    for name,i,p in said:
        assert name == learn.dls.vocab[i] == learn.dls.vocab[probs[0].argmax()]
        assert_close(p, probs[0], rtol=0, atol=1e-6)
    assert_close(again, probs[:1].expand_as(again), rtol=0, atol=1e-6)
    assert_close(probs.sum(1), torch.ones(len(probs)))
    assert matrix.sum() == len(y) and matrix.trace()/len(y) == pytest.approx(right.item())
    assert right == learn.validate()[1]
    worst = plt.figure(plt.get_fignums()[2]).axes[0].get_title() # prediction, actual, loss, probability
    i = seen.top_losses(1)[1][0]
    assert worst.startswith(f'{learn.dls.vocab[probs[i].argmax()]}/{learn.dls.vocab[y[i]]} / ')
    plt.close('all')

# ---------------------------------------------------------------- R6

busy = replace(plain, model_args=dict(patch_size=4, embed_dim=16, num_heads=2, depth=2, drop_path_rate=.2,
                                      proj_drop_rate=.1, attn_drop_rate=.1))
def weights(seed=0, workers=0, reversible=True):
    "After ten steps with everything random switched on, in one vector"
    torch.rand(random.randint(1, 9)) # whatever was drawn before must not matter
    learn = learner(digits_dls(bs=256, workers=workers, device='cpu'), busy, seed=seed)
    learn.model.set_reversible(reversible)
    quiet(learn, 'fit', 2)
    return torch.cat([p.detach().flatten() for p in learn.model.parameters()])

def test_R6_one_seed_one_result():
    "To the bit, also when two other processes gather the batches; stored activations differ by rounding alone"
    w = weights()
    assert torch.equal(weights(), w) and torch.equal(weights(workers=2), w)
    assert not torch.allclose(weights(seed=1), w, atol=1e-3)
    assert (weights(reversible=False)-w).norm()/w.norm() < 1e-5

# ---------------------------------------------------------------- metrics of one's own

@pytest.mark.parametrize('metrics,title', [([error_rate], 'error_rate, '), ([], 'valid_loss, ')], ids=['one','none'])
def test_other_metrics_than_accuracy(metrics, title, tmp_path):
    learn = make()
    learn.metrics = metrics
    quiet(learn, 'fit', 1)
    assert plot_history(learn).axes[1].get_title().startswith(title)
    with pytest.raises(ValueError, match='the best epoch is that of the highest accuracy, box_ap or mask_ap, and this'):
        quiet(learn, 'fit', 1, cbs=SaveBest(tmp_path/'best.pth'))
