"States of a run within one process: which file is the newest, what is written when, and what does not belong together"
from dataclasses import replace
from unittest.mock import patch

import pytest, torch
from fastai.vision.all import Callback
from revvit.data.digits import digits_dls
from revvit.models.checkpoints import load_model, save_checkpoint
from revvit.models.files import CheckpointError, read_checkpoint
from revvit.training import resume
from revvit.training.learner import learner
from revvit.training.recipes import recipes
from revvit.training.resume import keep_state, newest_state, states
from test_training import same

torch.set_num_threads(1)
pytestmark = pytest.mark.filterwarnings('ignore')
args = dict(patch_size=4, embed_dim=16, num_heads=2, depth=1, drop_path_rate=.2, proj_drop_rate=.1)
small = replace(recipes['digits'], epochs=3, batch_size=256, warmup_epochs=1, mixup=.8, cutmix=1., average=.9,
                model_args=args)   # three epochs of five steps

class Kill(Callback):
    order = 80
    def __init__(self, at): self.at = at
    def after_batch(self):
        if self.train_iter == self.at: raise KeyboardInterrupt

def made(out, recipe=small, seed=3, workers=0, **kw):
    dls = digits_dls(bs=recipe.batch_size, workers=workers, device='cpu')
    return keep_state(learner(dls, recipe, out=out, seed=seed), **kw)

def quiet(learn, f, *args, **kw):
    with learn.no_bar(), learn.no_logging(): return getattr(learn, f)(*args, **kw)

def run(out, kill=None, **kw):
    "Train in `out`, up to step `kill`"
    learn = made(out, **kw)
    learn.add_cb(Kill(kill))
    try: quiet(learn, 'fit', small.epochs)
    except KeyboardInterrupt: pass
    return learn

def end(learn):
    "Weights, average, optimizer, curves and log of a learner, without the times it took and its speed"
    state = read_checkpoint(states(learn.path)[0])
    state['extra']['history']['rows'] = [o[:-2] for o in state['extra']['history']['rows']] # without speed and time
    r,log = learn.recorder,(learn.path/'history.csv').read_text().splitlines()
    avg = learn.weight_average
    return (state, avg.trained.state_dict(), avg.ema.module.state_dict(), learn.opt.opt.state_dict(),
            r.lrs, list(r.losses), r.values, r.iters, [o.rsplit(',', 2)[0] for o in log])

names = lambda folder: [o.name for o in states(folder)]

@pytest.fixture(scope='module')
def straight(tmp_path_factory): return run(tmp_path_factory.mktemp('straight'))

# ---------------------------------------------------------------- files

def test_the_newest_first(tmp_path):
    "By numbers, not by letters, and nothing else in the folder counts"
    for o in ('state-9.pth', 'state-10.pth', 'state-9-100.pth', 'state-9-20.pth', '.state-11.pth.host-1.tmp',
              'state-x.pth', 'state-12.txt'): (tmp_path/o).touch()
    assert names(tmp_path) == ['state-10.pth', 'state-9-100.pth', 'state-9-20.pth', 'state-9.pth']
    assert names(tmp_path/'none') == []
    assert [resume._file('a', 3, o).name for o in (0,500)] == ['state-3.pth', 'state-3-500.pth']

damages = dict(cut=lambda b: b[:-500], empty=lambda b: b'', changed=lambda b: b[:5000]+bytes([b[5000]^1])+b[5001:])

@pytest.mark.parametrize('damage', damages.values(), ids=damages.keys())
def test_a_damaged_state_is_passed_over_and_named(damage, straight, tmp_path, capsys):
    for o in states(straight.path): (tmp_path/o.name).write_bytes(o.read_bytes())
    newest,before = states(tmp_path)
    newest.write_bytes(damage(newest.read_bytes()))
    assert newest_state(tmp_path)['path'] == str(before)
    said = capsys.readouterr().out
    assert newest.name in said and said.endswith('; the state before it is used\n')
    before.write_bytes(damage(before.read_bytes()))
    with pytest.raises(CheckpointError, match='none of its 2 states can be read; begin again in another folder'):
        newest_state(tmp_path)

def test_a_checkpoint_is_no_state(straight, tmp_path, capsys):
    save_checkpoint(straight.model, tmp_path/'state-1.pth')
    with pytest.raises(CheckpointError, match='none of its 1 states can be read'): newest_state(tmp_path)
    assert 'is a checkpoint, but not the state of a run' in capsys.readouterr().out
    assert newest_state(tmp_path/'none') is None

def test_a_state_holds_plain_tensors(straight):
    "fastai's own kinds are no plain content of a file"
    p = resume._progress(straight, 3, 0)
    assert [type(p['history'][k]) for k in ('losses','loss','lrs')] == [torch.Tensor]*3
    assert (p['train_iter'], p['history']['lrs'].shape, len(p['history']['rows'])) == (15, (15,), 3)
    assert len(p['opt']['state']) == len(list(straight.model.parameters()))

# ---------------------------------------------------------------- stopped and resumed

def test_stopped_four_times(straight, tmp_path):
    "At the first step, within epochs with a state every second step, before the end; with loader processes between"
    plan = ((1,0,None), (3,2,'state-0-2.pth'), (9,0,'state-1-4.pth'), (14,2,'state-2-4.pth'), (None,0,'state-3.pth'))
    for kill,workers,newest in plan:
        again = run(tmp_path, kill, workers=workers, resume=True, every=2)
        assert names(tmp_path)[:1] == ([newest] if newest else [])
    assert same(end(again), end(straight))

def test_the_comparison_can_fail(straight, tmp_path):
    "An optimizer that has forgotten its means ends elsewhere"
    learn = made(tmp_path, resume=straight.path/'state-2.pth')
    learn.opt.opt.state.clear()
    quiet(learn, 'fit', 3)
    assert learn.recorder.values[:2] == straight.recorder.values[:2]
    assert not same(learn.weight_average.trained.state_dict(), straight.weight_average.trained.state_dict())

def test_states_by_time(straight, tmp_path):
    "With hardly any time between, one after every step; a search for a rate before going on changes nothing"
    run(tmp_path, 2, minutes=1e-5)
    assert names(tmp_path) == ['state-0-2.pth', 'state-0-1.pth']
    learn = made(tmp_path, resume=True)
    quiet(learn, 'lr_find', num_it=6, show_plot=False)
    quiet(learn, 'fit', 3)
    assert same(end(learn), end(straight))

def test_none_while_no_time_passes(tmp_path):
    with patch.object(resume, 'monotonic', lambda: 7.): run(tmp_path, 4, minutes=1e-5)
    assert names(tmp_path) == []

def test_a_finished_run_has_nothing_to_do(straight):
    "A validation before the fit is only a validation, of the restored weights"
    learn = made(straight.path, resume=True)
    assert list(quiet(learn, 'validate'))[-2:] == straight.recorder.values[-1][1:]
    was = {o.name: o.read_bytes() for o in straight.path.iterdir()}
    quiet(learn, 'fit', 3)
    assert same(learn.model.state_dict(), straight.model.state_dict())
    now,then = learn.recorder,straight.recorder
    assert (now.values, now.iters) == (then.values, then.iters) and same(list(now.losses), list(then.losses))
    assert learn.run_log.rows == straight.run_log.rows
    assert {o.name: o.read_bytes() for o in straight.path.iterdir()} == was
    assert torch.equal(load_model(straight.path/'checkpoint.pth').head.weight, straight.model.head.weight)

# ---------------------------------------------------------------- what does not belong together

@pytest.mark.parametrize('kw,said', [
    (dict(recipe=replace(small, weight_decay=.1)), 'its weight_decay is 0.2, here it is 0.1'),
    (dict(seed=4), 'its seed is 3, here it is 4'),
    (dict(recipe=replace(small, batch_size=128)), 'belongs to another run'),
    (dict(recipe=replace(small, data='images')), 'to a run on digits, and this one is on images: give the folder and')],
    ids=['decay','seed','batch','data'])
def test_another_run_is_refused(kw, said, straight, tmp_path):
    with pytest.raises(ValueError, match=said): made(tmp_path, resume=straight.path/'state-2.pth', **kw)

@pytest.mark.parametrize('fit,said', [((4,), 'planned for 3 epochs and cannot go on with 4'),
    ((3,1e-3), 'planned for learning rates up to about 0.004 and cannot go on with others, up to 0.001')], ids=str)
def test_another_fit_is_refused(fit, said, straight, tmp_path):
    learn = made(tmp_path, resume=straight.path/'state-2.pth')
    with pytest.raises(ValueError, match=said): quiet(learn, 'fit', *fit)

@pytest.mark.parametrize('kw,said', [(dict(every=0), 'every must be at least 1 step, got 0'),
    *[(dict(minutes=o), 'minutes must be a number above 0') for o in (0, -1., float('nan'), float('inf'))]], ids=str)
def test_times_that_cannot_be_meant(kw, said, tmp_path):
    with pytest.raises(ValueError, match=said): made(tmp_path, **kw)

def test_nothing_yet_is_the_beginning(tmp_path): assert made(tmp_path, resume=True).keep_state.pending is None
