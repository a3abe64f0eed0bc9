"Callbacks one by one: what they draw, mix, average, stop and log, in all their cases"
import csv, io, itertools, math, os, random, re, sys
from contextlib import ExitStack, redirect_stdout
from functools import partial
from types import SimpleNamespace
from unittest.mock import patch

import numpy as np, pytest, torch
from fastai.vision.all import (AvgSmoothLoss, Callback, CSVLogger, DataLoader, DataLoaders, Learner, MixedPrecision,
                               OptimWrapper, accuracy, set_seed)
from torch import nn
from torch.testing import assert_close
from revvit.core.memory import saved_bytes
from revvit.data.digits import digits_dls
from revvit.models.mvit import RevMViT
from revvit.models.vit import RevViT
from revvit.training import callbacks
from revvit.training.callbacks import MixBatches, MixLoss, NonFiniteError, SeedRun, StopOnNonFinite
from revvit.training.logs import RunLog, SaveBest, ValidateEvery
from revvit.training import progress
from revvit.training.progress import PlainLog, board, check_board, step_memory

torch.set_num_threads(1)
pytestmark = pytest.mark.filterwarnings('ignore')

@pytest.fixture(scope='module')
def dls(): return digits_dls(bs=128, device='cpu')

def made(dls, *cbs, depth=1, **kw):
    "A learner with a tiny Rev-ViT, always from the same weights"
    set_seed(0)
    m = RevViT(img_size=16, patch_size=4, in_chans=1, num_classes=10, embed_dim=16, num_heads=2, depth=depth)
    adamw = partial(OptimWrapper, opt=torch.optim.AdamW)
    return Learner(dls, m, loss_func=nn.CrossEntropyLoss(), opt_func=adamw, cbs=cbs, **kw)

def quiet(learn, f, *args):
    with learn.no_bar(), learn.no_logging(): getattr(learn, f)(*args)
    return learn

# ---------------------------------------------------------------- SeedRun

def order(cb, epoch):
    cb.learn.epoch = epoch
    cb.before_train()
    return next(iter(cb.dls.train))[1][:20].tolist()

def draws(cb, step, rank='0'):
    "From each generator there is"
    cb.learn.train_iter = step
    with patch.dict(os.environ, RANK=rank): cb.before_batch()
    return (*torch.rand(2).tolist(), *np.random.rand(2), random.random())

def test_each_epoch_and_step_has_its_own_draws(dls):
    "The same every time; other epochs, other steps and other processes have others"
    cb = SeedRun(7)
    cb.learn = made(dls)
    assert order(cb, 3) == order(cb, 3) != order(cb, 4)
    assert draws(cb, 5) == draws(cb, 5) != draws(cb, 6)
    assert draws(cb, 5) != draws(cb, 5, '1')

# ---------------------------------------------------------------- mixing

def mixed(dls, x, y, **kw):
    cb = MixBatches(smoothing=0., num_classes=4, **kw)
    cb.learn = SimpleNamespace(xb=(x.clone(),), yb=(y,))
    cb.before_batch()
    return cb.learn.xb[0],cb.learn.yb[0]

ways = dict(mixup=dict(mixup=.8, cutmix=0.), cutmix=dict(mixup=0., cutmix=1.), both=dict(mixup=.8, cutmix=1.))
every_way = pytest.mark.parametrize('kw', ways.values(), ids=ways.keys())

@every_way
@pytest.mark.parametrize('seed', range(5))
@pytest.mark.parametrize('shape', [(4,3,32,32), (4,3,8,32,32)], ids=['images','clips'])
def test_pixels_and_targets_agree(dls, shape, kw, seed):
    "In pictures of one colour each: of every frame, the partner's share is the partner's share of the target"
    set_seed(seed)
    y = torch.arange(4)
    colours = y.float().view(-1, *[1]*(len(shape)-1)).expand(shape)
    x,t = mixed(dls, colours, y, **kw)
    assert x.shape == shape and t.shape == (4,4)
    assert kw['cutmix'] or (t.max(1).values < 1).all()   # a box may be empty
    mean = x.flatten(1, -3).mean((2,3))   # of each channel of each frame
    assert_close(mean, (t@y.float())[:,None].expand_as(mean), rtol=0, atol=1e-5)

@every_way
def test_an_odd_batch_leaves_one_out_and_a_single_item_alone(dls, kw):
    x,t = mixed(dls, torch.rand(5,3,8,8), torch.tensor([0,1,2,3,0]), **kw)
    assert (x.shape, t.shape) == ((4,3,8,8), (4,4))
    x,t = mixed(dls, torch.rand(1,3,8,8), torch.tensor([2]), **kw)
    assert x.shape == (1,3,8,8) and t.tolist() == [2]

def test_half_are_cut_and_half_are_blended(dls):
    set_seed(0)
    x = torch.zeros(2,1,64,64)
    x[1] = 1
    seen = [mixed(dls, x, torch.tensor([0,1]), **ways['both'])[0] for _ in range(400)]
    assert abs(np.mean([bool(((o==0) | (o==1)).all()) for o in seen])-.5) < .1

def test_the_loss_takes_hard_and_soft_targets():
    set_seed(0)
    z,y = torch.randn(4,10),torch.tensor([1,2,3,4])
    soft = torch.full((4,10), .01).scatter(1, y[:,None], .91)
    for t in (y,soft): assert_close(MixLoss(eps=.1)(z, t), -(soft*z.log_softmax(1)).sum(1).mean())
    assert_close(MixLoss(eps=.1).activation(z), z.softmax(1))

# ---------------------------------------------------------------- what is not finite

bad = torch.zeros(4,3)
bad[[1,3],0] = torch.tensor([math.nan, math.inf])

@pytest.mark.parametrize('named,want', [
    ([('a', torch.ones(2)), ('b', torch.ones(2,2,2))], None),
    ([('a', torch.ones(2)), ('b', bad), ('c', bad)], 'b'),
    ([('input 0', bad)], 'input 0 (items 1, 3 of the batch)'),
    ([('input 0', torch.full((7,1), math.nan))], 'input 0 (items 0, 1, 2, 3, 4, ... of the batch)'),
    ([('target 0', bad[:,0])], 'target 0'),
    *[([('loss', torch.tensor(o))], None if o==1. else 'loss') for o in (1., math.inf, -math.inf, math.nan)]], ids=str)
def test_the_first_bad_tensor(named, want): assert callbacks._first_bad(named) == want

class Spoil(Callback):
    "Before the third step, plant `value` in the place `where` and keep the weights"
    order,run_valid = -5,False
    def __init__(self, where, value=math.nan): self.where,self.value = where,value
    def now(self, where): return self.train_iter==2 and self.where==where
    def before_batch(self):
        if self.train_iter==2: self.before = {k: v.clone() for k,v in self.model.state_dict().items()}
        if self.now('input'):
            x = self.xb[0].clone()
            x[5] = self.value
            self.learn.xb = (x,)
        if self.now('parameter'):
            with torch.no_grad(): self.model.blocks[0].g.fn.fc1.weight[0,0] = self.value
    def before_backward(self):
        if self.now('gradient'): self.hook = self.model.head.bias.register_hook(self.spoil)
    def spoil(self, g):
        self.hook.remove()
        return g*self.value
    def after_pred(self):
        if self.now('output'): self.learn.pred = self.pred*self.value
    def unchanged(self): return all(torch.equal(v, self.before[k]) for k,v in self.model.state_dict().items())

@pytest.mark.parametrize('clip', [None, 1.])
@pytest.mark.parametrize('where,said', [('input', 'input 0 (items 5 of the batch)'), ('output', 'output of the model'),
    ('gradient', 'gradient of head.bias'), ('parameter', 'parameter blocks.0.g.fn.fc1.weight')])
def test_a_bad_step_is_named_at_once(dls, where, said, clip):
    learn = made(dls, Spoil(where), StopOnNonFinite(clip))
    with pytest.raises(NonFiniteError) as e: quiet(learn, 'fit', 1)
    want = f'step 3 (epoch 1): {said} is not finite; stopped before the optimizer step, the weights are those of step 2'
    assert (str(e.value), learn.train_iter) == (want, 2)
    assert where == 'parameter' or learn.spoil.unchanged()
    assert all(p.grad is None or not p.grad.any() for p in learn.model.parameters())

class CpuScaler(MixedPrecision):
    "fastai's mixed precision with a CPU scaler that halves a factor of 1024 on overflow"
    def before_fit(self):
        self.autocast,self.left_out = torch.autocast('cpu', dtype=torch.bfloat16),[]
        self.learn.scaler,self.scales = torch.amp.GradScaler('cpu', init_scale=1024.),[]
    def after_cancel_step(self): self.left_out.append((self.train_iter, self.learn.spoil.unchanged()))

class Factors(Callback):
    "Keep the scaler's factors, which fastai drops after the fit"
    order,run_valid = 60,False
    def before_fit(self): self.seen = []
    def after_batch(self): self.seen.append(self.scaler.get_scale())

def test_what_a_scaler_skips_stops_nothing(dls):
    "The step is skipped, the factor is halved, training goes on to the end of the epoch"
    learn = quiet(made(dls, Spoil('gradient', math.inf), StopOnNonFinite(), CpuScaler(), Factors()), 'fit', 1)
    assert (learn.factors.seen[:4], len(learn.factors.seen)) == ([1024.,1024.,512.,512.], 11)
    assert learn.cpu_scaler.left_out == [(2,True)] and all(p.isfinite().all() for p in learn.model.parameters())

def test_what_is_sent_is_sent():
    t = torch.tensor([1.,2.])
    later = callbacks.Later(t)
    t += 1
    assert later.there() and later.read().tolist() == [1.,2.]

# ---------------------------------------------------------------- losses and logs

def test_the_running_mean_is_fastais():
    ours,theirs = callbacks._SmoothLoss(.98),AvgSmoothLoss(.98)
    for o in (ours,theirs): o.reset()
    for loss in torch.rand(20):
        for o in (ours,theirs): o.accumulate(SimpleNamespace(loss=loss))
        assert torch.equal(ours.value, theirs.value)
    assert ours.count == 20

def history(dls, cb, path):
    "The log after two epochs, after a validation, after predictions, and after another epoch"
    learn = made(dls, cb, path=path)
    for f in (('fit',2), ('validate',), ('get_preds',), ('fit',1)):
        quiet(learn, *f)
        yield (path/'history.csv').read_text()

def test_the_log_outlives_a_validation(dls, tmp_path):
    "fastai's own does not; a second fit starts a new table"
    fit,validate,*_ = history(dls, CSVLogger(), tmp_path)
    assert fit.splitlines()[1] not in validate
    fit,validate,preds,again = history(dls, RunLog(), tmp_path)
    assert [o.split(',')[0] for o in fit.splitlines()] == ['epoch','1','2']
    assert fit == validate == preds and len(again.splitlines()) == 2
    assert [o.name for o in tmp_path.iterdir()] == ['history.csv']

def plain_lines(dls, *args, silent=(), epochs=2, **kw):
    with redirect_stdout(io.StringIO()) as said, ExitStack() as stack:
        learn = made(dls, PlainLog(*args, **kw))
        for o in silent: stack.enter_context(getattr(learn, o)())
        learn.fit(epochs)
        learn.validate(), learn.get_preds()
    return said.getvalue().splitlines()

def heads(lines): return [o.split(':')[0] for o in lines]
def steps(*ks, epoch): return [f'epoch {epoch} of 2, step {k} of 11' for k in ks]+[f'epoch {epoch} of 2']

def test_plain_lines(dls):
    "A line every five of eleven steps, for the first and the last, and one an epoch, with the time left but at the end"
    lines = plain_lines(dls, 5)
    assert heads(lines) == steps(1,5,10,11, epoch=1)+steps(1,5,10,11, epoch=2)
    assert all(o.isprintable() for o in lines) and 'left' not in lines[-1] and all('left' in o for o in lines[:5])
    assert all('images/s' in o and 'accuracy' in o and 'lr 0.' in o for o in lines if 'step' in o)

@pytest.mark.parametrize('args,silent,n', [((11,), (), 6), ((5,), ('no_logging',), 8),
                                           ((5,), ('no_bar','no_logging'), 0)], ids=str)
def test_fewer_lines(dls, args, silent, n): assert len(plain_lines(dls, *args, silent=silent)) == n

def clock(monkeypatch, tick):
    "Each look at the clock is `tick` seconds after the one before"
    now = itertools.count(0, tick)
    monkeypatch.setattr(progress, 'perf_counter', lambda: next(now))

@pytest.mark.parametrize('tick,first,then', [(1e-9, [1], []), (1e9, list(range(1,12)), list(range(1,12)))],
                         ids=['short','long'])
def test_lines_by_time(dls, monkeypatch, tick, first, then):
    "Of a run of no time the first step and the epochs; of one without end each step"
    clock(monkeypatch, tick)
    assert heads(plain_lines(dls)) == steps(*first, epoch=1)+steps(*then, epoch=2)

def test_first_and_last_step_of_long_epochs(dls, monkeypatch):
    "They have their line although those before are not ten seconds old"
    clock(monkeypatch, 1.)
    said = heads(plain_lines(dls))
    assert {*steps(1,11, epoch=1), *steps(1,11, epoch=2)} <= {*said} and len(said) < 22

@pytest.mark.parametrize('rate', [.5, 5, 50])
def test_an_hour_of_lines_is_short(monkeypatch, rate):
    "Under 100 kB, however many lines a second are due; the last one is always written"
    seconds = [0]
    monkeypatch.setattr(progress, 'perf_counter', lambda: seconds[0])
    log,line = PlainLog(),'x'*150
    log.start,log.written = 0,0
    with redirect_stdout(io.StringIO()) as said:
        for i in range(int(3600*rate)):
            seconds[0] = i/rate
            log._print(line)
        log._print('the end', must=True)
    assert 80_000 < len(said.getvalue()) < 100_000 and said.getvalue().endswith('the end\n')

class Tick(Callback):
    "A step takes so many seconds of a clock that nobody waits for"
    order = -90
    def __init__(self, each): self.each,self.now = each,0
    def after_loss(self): self.now += self.each*self.training

@pytest.mark.parametrize('epochs,each', [(400, 3.), (60, 20.)], ids=['short epochs','long epochs'])
@pytest.mark.thorough
def test_an_hour_reads_as_a_report(monkeypatch, epochs, each):
    """Of a whole run of 3,600 seconds: under 100 kB, no line over 200 characters, epochs in order, a sign of life at
    least every half minute, the last epoch without time left"""
    tick,model = Tick(each),nn.Sequential(nn.Flatten(), nn.Linear(256, 10))
    monkeypatch.setattr(progress, 'perf_counter', lambda: tick.now)
    loader = DataLoader([(torch.rand(1, 16, 16), i) for i in range(6)], bs=2)   # three steps
    learn = Learner(DataLoaders(loader, loader), model, loss_func=MixLoss(), metrics=accuracy, cbs=[PlainLog(), tick])
    with redirect_stdout(io.StringIO()) as said: learn.fit(epochs, 1e-3)
    text,lines = said.getvalue(),said.getvalue().splitlines()
    assert tick.now == 3600 and 10_000 < len(text.encode()) < 100_000 and max(map(len, lines)) <= 200
    assert all(o.isprintable() for o in lines)
    form = rf'epoch (\d+) of {epochs}(?:, step (\d) of 3)?: .*'
    at = [(int(m[1]), int(m[2] or 99)) for m in (re.fullmatch(form, o) for o in lines)]
    assert at == sorted(set(at)) and at[0] == (1, 1) and at[-1] == (epochs, 99) and 'left' not in lines[-1]
    steps = [3*(e-1)+min(s, 3) for e,s in at]
    assert max(b-a for a,b in zip(steps, steps[1:]))*each <= 40

@pytest.mark.parametrize('pred,y,n', [([[1.,0],[0,1]], [0,0], 1), ([[1.,0],[0,1]], [[.9,.1],[.2,.8]], 2),
    ([[1.,0],[0,1]], [.5,.5], None), ([1.,0], [1,0], None)], ids=['classes','mixed','numbers','no classes'])
def test_right_answers(pred, y, n):
    got = progress._right(torch.tensor(pred), torch.tensor(y))
    assert got is None if n is None else got == n

def small_net(depth=2):
    return RevViT(img_size=16, patch_size=4, in_chans=1, num_classes=10, embed_dim=16, num_heads=2, depth=depth,
                  drop_path_rate=.2)

@pytest.mark.parametrize('b', [1,2,7])
def test_memory_is_that_of_the_batch(b):
    "Reckoned from one and two items; nothing random is drawn, and modes stay as they were"
    m,x,state = small_net(),torch.rand(b,1,16,16),torch.get_rng_state()
    m.train().blocks.set_reversible(True, keep=.5, exact=True)
    m.head.eval()
    got = step_memory(m, x)
    b = m.blocks
    assert (m.training, m.head.training, b.reversible, b.keep, b.exact) == (True, False, True, .5, True)
    assert torch.equal(torch.get_rng_state(), state)
    m.eval()
    want = saved_bytes(lambda: m(x), m, x)
    m.set_reversible(False)
    assert got == (want, saved_bytes(lambda: m(x), m, x)) and got[0] < got[1]

WAYS = 'training','reversible','keep','exact','recompute'
def settings(m): return {k: {o: vars(v)[o] for o in WAYS if o in vars(v)} for k,v in m.named_modules()}   # of all parts

@pytest.mark.parametrize('on', [True, False])
def test_every_part_stays_as_it_was_set(on):
    "Transitions between stages, too, which pool once more or keep what they pooled"
    m = RevMViT(img_size=32, embed_dim=8, depth=3, stage_starts=(1,2), num_classes=3, drop_path_rate=.1).train()
    m.set_reversible(on, keep=.25 if on else 0.)
    m.head.eval()
    before = settings(m)
    assert any('recompute' in o for o in before.values())
    step_memory(m, torch.rand(2,3,32,32))
    assert settings(m)==before

@pytest.mark.parametrize('b', [2,7])
def test_what_is_kept_once_counts_once(b):
    "Weights in another precision, say, which do not grow with the batch"
    m,x = small_net(),torch.rand(b,1,16,16)
    with torch.autocast('cpu', torch.bfloat16):
        _,plain = step_memory(m, x)
        m.eval().set_reversible(False)
        one,all = (saved_bytes(lambda: m(o), m, x) for o in (x[:1],x))
    assert plain == all < b*one

def test_accuracy_of_the_lines(dls):
    "The share of right answers since the line before"
    told,right,log = [],[],PlainLog(4)
    log.sinks.append(lambda numbers,step: told.append(numbers.get('train/accuracy')))
    def note(cb):
        if cb.training: right.append((cb.pred.argmax(1)==cb.y).float().mean().item())
    quiet(made(dls, log, Callback(after_loss=note)), 'fit', 1)
    want = [sum(right[a:b])/(b-a) for a,b in ((0,1),(1,4),(4,8),(8,11))]
    assert told[:4] == pytest.approx(want, abs=1e-6) and len(right) == 11

def test_a_run_is_not_changed_by_being_measured(dls, tmp_path):
    ends = []
    for cbs in ((), (RunLog(),)):
        set_seed(0)
        learn = Learner(dls, small_net(), loss_func=nn.CrossEntropyLoss(), cbs=[SeedRun(0), PlainLog(), *cbs],
                        path=tmp_path)
        quiet(learn, 'fit', 1)
        assert (learn.plain_log.memory is None) == (not cbs)
        ends.append(learn.model.state_dict())
    assert all(torch.equal(ends[0][k], ends[1][k]) for k in ends[0])

def test_columns_of_the_table(dls, tmp_path):
    "Memory and speed beside fastai's columns; a spreadsheet finds as many cells in each row"
    learn = Learner(dls, small_net(), loss_func=nn.CrossEntropyLoss(), metrics=accuracy,
                    cbs=[PlainLog(), RunLog(), ValidateEvery(2)], path=tmp_path)
    quiet(learn, 'fit', 3)
    first,*_ = rows = list(csv.DictReader((tmp_path/'history.csv').open()))
    assert [*first] == ['epoch','train_loss','valid_loss','accuracy','top_5','lr','kept_MB','plain_MB','peak_MB',
                        'items_per_second','time']
    assert [o['epoch'] for o in rows] == ['1','2','3'] and [bool(o['accuracy']) for o in rows] == [False,True,True]
    assert all(float(o['plain_MB']) > 2*float(o['kept_MB']) and float(o['items_per_second']) > 0
               and not o['peak_MB'] for o in rows)

@pytest.mark.parametrize('accuracies,saved', [((.1,.3,.2,.3,.4), (0,1,4)), ((None,.2,None,.1,.2), (1,))], ids=str)
def test_the_best_epoch(accuracies, saved, tmp_path, monkeypatch):
    "Higher than all before; where epochs are not validated, of those that are"
    cb,at = SaveBest(tmp_path/'best.pth'),[]
    monkeypatch.setattr('revvit.training.logs.save_checkpoint', lambda *a, **kw: at.append(len(rec.values)-1))
    rec = SimpleNamespace(metric_names=['epoch','train_loss','valid_loss','accuracy','time'], values=[])
    cb.learn = SimpleNamespace(recorder=rec, model=None)
    for o in accuracies:
        rec.values.append([1.,1.,o])
        cb.trained = True
        cb.after_epoch()
    assert tuple(at) == saved

@pytest.mark.parametrize('n,epochs,validated', [(1,3,[0,1,2]), (2,5,[1,3,4]), (9,3,[2])])
def test_validate_every(dls, n, epochs, validated):
    learn = made(dls, ValidateEvery(n))
    quiet(learn, 'fit', epochs)
    assert [i for i,o in enumerate(learn.recorder.values) if o[1] is not None] == validated
    with learn.no_bar(), learn.no_logging(): assert learn.validate()[0] > 0

@pytest.mark.parametrize('classes,n', [(7, 2), (5, None), (2, None)])
def test_among_the_five_likeliest(classes, n):
    "Of five classes each is, which is not worth a word"
    assert progress._right(torch.arange(7.)[:classes].repeat(3,1), torch.tensor([6,2,1])%classes, 5) == n

def test_top_5_of_an_epoch(dls, tmp_path):
    "As counted afterwards, over all batches"
    learn = Learner(dls, small_net(), loss_func=nn.CrossEntropyLoss(), cbs=PlainLog(), path=tmp_path)
    quiet(learn, 'fit', 1)
    said = learn.plain_log.columns()['top_5']
    z,y = learn.get_preds()
    assert said == f'{(z.topk(5)[1]==y[:,None]).any(1).float().mean().item():.4g}'

def test_boards_hear_steps_and_epochs(dls):
    heard,log = [],PlainLog(5)
    log.sinks.append(lambda numbers,step: heard.append((step, {*numbers})))
    quiet(made(dls, log), 'fit', 1)
    step = {f'train/{o}' for o in ('loss','accuracy','lr','items_per_second','epoch')}
    assert heard == [(k, step) for k in (1,5,10,11)]+[(11, {'epoch/train_loss','epoch/valid_loss','epoch/top_5'})]

@pytest.mark.parametrize('name', ['tensorboard','wandb'])
def test_a_board_that_is_not_there(name, monkeypatch):
    monkeypatch.setattr(progress, 'find_spec', lambda name: None)
    with pytest.raises(ValueError, match=f'--{name} needs a package that is not installed: pip install {name}'):
        check_board(name)

class Written(list):
    "What a board was told, in place of the board"
    def __init__(self, *args, **kwargs): self.made = args,kwargs
    def add_scalar(self, k, v, step): self.append((k, v, step))
    def log(self, numbers, step): self.append((numbers, step))
    def flush(self): pass

def test_what_boards_are_told(monkeypatch, tmp_path):
    made = []
    def make(*args, **kwargs):
        made.append(Written(*args, **kwargs))
        return made[-1]
    monkeypatch.setattr(progress, 'find_spec', lambda name: True)
    monkeypatch.setitem(sys.modules, 'torch.utils.tensorboard', SimpleNamespace(SummaryWriter=make))
    monkeypatch.setitem(sys.modules, 'wandb', SimpleNamespace(init=make))
    for o in ('tensorboard','wandb'): board(o, tmp_path, dict(lr=1))(dict(a=.5, b=2), 3)
    assert made[0] == [('a', .5, 3), ('b', 2, 3)] and made[0].made == ((str(tmp_path/'tensorboard'),), {})
    assert made[1] == [(dict(a=.5, b=2), 3)]
    assert made[1].made == ((), dict(project='revvit', name=tmp_path.name, dir=str(tmp_path), config=dict(lr=1)))
