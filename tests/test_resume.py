"""What `revvit_train --resume` finds after kill -9 at every place before and after the first state, and after damage:
the same bits as a run never stopped, or one sentence"""
import json, os, shutil, signal
from dataclasses import replace
from pathlib import Path
from unittest.mock import patch

import pytest, torch
from fastai.vision.all import Callback, DataLoaders, TfmdDL, defaults
from revvit.use import cli
from revvit.models.checkpoints import load_model
from revvit.models.files import read_checkpoint, write_checkpoint
from revvit.data.digits import digits_dls
from revvit.training.learner import learner
from revvit.training.resume import keep_state, states
from revvit.training.recipes import recipes
from test_training import end_of, same, small, spawn, wait

torch.set_num_threads(1)
pytestmark = [pytest.mark.skipif(not hasattr(os, 'fork'), reason='needs fork'), pytest.mark.filterwarnings('ignore')]
short = replace(small, epochs=2) # of five steps each

def die(): os.kill(os.getpid(), signal.SIGKILL)

def killer(event, order, step):
    "A callback that kills its process at an event of a step"
    def at(self):
        if self.train_iter == step: die()
    return type('Killer', (Callback,), {'order': order, event: at})

def dies_replacing(name):
    "`os.replace` that kills its process when a file of that name is about to appear"
    real = os.replace
    def _replace(a, b, *args, **kw):
        if Path(b).name.startswith(name): die()
        return real(a, b, *args, **kw)
    return patch('os.replace', _replace), patch('pathlib.Path.replace', _replace)

def command(cwd, args, kill=None, replacing=None):
    "revvit_train with the narrow recipe, in this process"
    os.chdir(cwd)
    if kill: defaults.callbacks = [*defaults.callbacks, killer(*kill)]
    for o in dies_replacing(replacing) if replacing else (): o.start()
    with patch.dict(recipes, digits=short):
        if code := cli.revvit_train([str(o) for o in args]): raise RuntimeError(code)

def train(cwd, *args, **kw): return wait(spawn(command, cwd, args, **kw))
def names(folder): return sorted(o.name for o in folder.iterdir() if not o.name.endswith('.tmp'))

@pytest.fixture
def here(monkeypatch, capfd, tmp_path):
    "Exit code, output and error stream of the command in this process"
    def _run(*args):
        monkeypatch.chdir(tmp_path)
        capfd.readouterr()
        with patch.dict(recipes, digits=short): code = cli.revvit_train([str(o) for o in args])
        return code, *capfd.readouterr()
    return _run

@pytest.fixture(scope='module')
def straight(tmp_path_factory):
    "A run that nobody stopped"
    path = tmp_path_factory.mktemp('straight')
    assert train(path, '--out', 'run') == 0
    return path/'run'

# event, order among callbacks, step; name of a file about to be written; what is left
first = dict(step_0=(('before_batch', 0, 0), None, ['config.json']),
    step_3=(('after_batch', 90, 3), None, ['config.json']),
    validation=(('before_validate', 90, 5), None, ['config.json']),
    log=(None, 'checkpoint', ['config.json', 'history.csv']),
    checkpoint=(('after_epoch', 65, 5), None, ['checkpoint.pth', 'config.json', 'history.csv']),
    state=(None, 'state', ['checkpoint.pth', 'config.json', 'history.csv']))

@pytest.mark.parametrize('where,out', [*((o, ['--out', 'run']) for o in first), ('step_3', [])], ids=str)
def test_killed_before_the_first_state(where, out, straight, tmp_path, capfd):
    "The same command, repeated, begins again, says so, and ends with the same bits"
    kill,replacing,left = first[where]
    run = tmp_path/('run' if out else 'runs/digits')
    for _ in range(1+(where == 'state')): # the second time in a folder that is not new
        assert train(tmp_path, '--resume', *out, kill=kill, replacing=replacing) == -signal.SIGKILL
        assert names(run) == left and not states(run)
    capfd.readouterr()
    assert train(tmp_path, '--resume', *out) == 0
    assert (f'{run.relative_to(tmp_path)}: stopped before its first state, so the run begins '
            f'again\n' in capfd.readouterr().out)
    assert same(end_of(run), end_of(straight)) and names(run) == names(straight)
    assert [o.name for o in run.parent.iterdir()] == [run.name] # no second run beside it

@pytest.mark.parametrize('flags,step,newest', [(['--save-minutes', '1e-5'], 1, 'state-0-1.pth'),
    (['--save-minutes', '1e-5'], 8, 'state-1-3.pth'),
    (['--save-steps', '1'], 1, 'state-0-1.pth'), (['--save-steps', '2', '--save-minutes', '1000'], 3, 'state-0-2.pth'),
    (['--save-steps', '4', '--save-minutes', '1e-5'], 3, 'state-0-3.pth')], ids=str)
def test_states_from_the_first_step_on(flags, step, newest, straight, tmp_path, capfd):
    assert train(tmp_path, '--out', 'run', *flags, kill=('after_batch', 90, step)) == -signal.SIGKILL
    assert states(tmp_path/'run')[0].name == newest
    assert train(tmp_path, '--out', 'run', '--resume', *flags) == 0
    at = newest.removesuffix('.pth').split('-')
    assert f'run: goes on after step {at[2]} of epoch {int(at[1])+1}\n' in capfd.readouterr().out
    assert same(end_of(tmp_path/'run'), end_of(straight))

def test_another_command_does_not_begin_there(here, tmp_path):
    "What config.json says is what a state would say: another seed or recipe is another run"
    assert train(tmp_path, '--out', 'run', kill=('after_batch', 90, 2)) == -signal.SIGKILL
    was = (tmp_path/'run/config.json').read_bytes()
    for args,said in ((['--seed', '5'], 'its --seed is 0, here it is 5'),
                      (['--lr', '.1'], 'its --lr is 0.004, here it is 0.1'),
                      (['--average', '.5'], 'its --average is 0.9, here it is 0.5')):
        assert here('--out', 'run', '--resume', *args)[::2] == (2, f'revvit_train: run was begun by another command: '
            f'{said}\n')
    assert (tmp_path/'run/config.json').read_bytes() == was and names(tmp_path/'run') == ['config.json']

@pytest.mark.parametrize('text,state', [(b'', False), (b'\xff\xfe', False), (b'{"recipe": "dig', True), (b'[]', True)],
                         ids=str)
def test_config_half_written(text, state, straight, here, tmp_path):
    "It is written anew, beside a state and without one"
    if state: shutil.copytree(straight, tmp_path/'run')
    else: (tmp_path/'run').mkdir()
    (tmp_path/'run/config.json').write_bytes(text)
    code,out,err = here('--out', 'run', '--resume')
    assert (code, err) == (0, '') and 'run/config.json cannot be read: it is written anew\n' in out
    assert json.loads((tmp_path/'run/config.json').read_text())['recipe'] == 'digits'
    assert same(end_of(tmp_path/'run'), end_of(straight))

def test_config_missing(straight, here, tmp_path):
    shutil.copytree(straight, tmp_path/'run')
    (tmp_path/'run/config.json').unlink()
    code,out,err = here('--out', 'run', '--resume')
    assert (code, err) == (0, '') and 'run/config.json is missing: it is written anew\n' in out
    assert names(tmp_path/'run') == names(straight)

def test_only_damaged_states(straight, here, tmp_path):
    "They are not thrown away: an error that says what one can do"
    shutil.copytree(straight, tmp_path/'run')
    for o in states(tmp_path/'run'): o.write_bytes(o.read_bytes()[:5000])
    before = {o.name: o.read_bytes() for o in (tmp_path/'run').iterdir()}
    code,_,err = here('--out', 'run', '--resume')
    assert (code, err) == (2, 'revvit_train: run: none of its 2 states can be read; begin again in another folder, or '
                              'remove this one\n')
    assert {o.name: o.read_bytes() for o in (tmp_path/'run').iterdir()} == before

def test_complete(straight, here, tmp_path):
    "Nothing is trained, and what a kill after the last epoch left out is made"
    shutil.copytree(straight, tmp_path/'run')
    (tmp_path/'run/history.png').unlink()
    code,out,err = here('--out', 'run', '--resume')
    assert (code, err) == (0, '') and 'run: all 2 epochs are done, nothing is left to train\n' in out
    assert names(tmp_path/'run') == names(straight) and same(end_of(tmp_path/'run'), end_of(straight))

@pytest.mark.parametrize('what', ['trained', 'picture', 'foreign config', 'no config'])
def test_what_is_no_run_before_its_first_state_is_left_alone(what, straight, here, tmp_path):
    "A trained model whose states were deleted, and folders of other programs"
    run = tmp_path/'run'
    shutil.copytree(straight, run)
    for o in states(run): o.unlink()
    if what == 'trained': (run/'history.png').unlink()
    if what == 'picture': (run/'history.csv').unlink()
    if what == 'foreign config':
        for o in ('history.csv', 'history.png'): (run/o).unlink()
        (run/'config.json').write_text('{"architectures": ["ViT"]}')
    if what == 'no config': [(run/o).unlink() for o in ('config.json', 'history.csv', 'history.png')]
    before = {o.name: o.read_bytes() for o in run.iterdir()}
    assert here('--out', 'run', '--resume')[::2] == (2, 'revvit_train: run is not empty and holds no state to go on '
                                                        'from: choose another folder, or delete this one first\n')
    assert {o.name: o.read_bytes() for o in run.iterdir()} == before
    assert load_model(run/'checkpoint.pth').num_classes == 10

# ---------------------------------------------------------------- longer runs, and several batches a step

def test_a_run_made_longer(here, tmp_path):
    """Two epochs become four: the rates of the last ten steps are those of a run of four, a line says so, and fewer
    than before are refused"""
    assert here('--out', 'run')[0] == 0 and here('--out', 'long', '--epochs', '4')[0] == 0
    code,out,err = here('--out', 'run', '--epochs', '4', '--resume')
    assert (code, err) == (0, '') and '2 epochs become 4: the learning rate, ' in out
    lrs = [read_checkpoint(tmp_path/o/'state-4.pth')['extra']['history']['lrs'] for o in ('run','long')]
    assert len(lrs[0]) == 20 and torch.allclose(lrs[0][10:], lrs[1][10:], rtol=1e-9)
    assert not torch.allclose(lrs[0][:10], lrs[1][:10])
    assert len((tmp_path/'run/history.csv').read_text().splitlines()) == 5
    code,_,err = here('--out', 'run', '--epochs', '3', '--resume')
    assert code == 2 and 'its epochs is 4, here it is 3' in err.replace('--epochs', 'epochs')

def test_a_state_waits_for_the_step(here, tmp_path):
    """Saved after every batch, with two batches a step: states stand between steps alone, and a run from one of them
    ends with the same bits"""
    line = ['--accumulate', '2', '--epochs', '1', '--save-steps', '1']
    assert here('--out', 'run', *line)[0] == 0
    found = {o.name for o in states(tmp_path/'run')}
    assert found == {'state-1.pth', 'state-0-4.pth'}
    os.makedirs(tmp_path/'again')
    shutil.copy(tmp_path/'run/state-0-4.pth', tmp_path/'again')
    shutil.copy(tmp_path/'run/config.json', tmp_path/'again')
    assert here('--out', 'again', '--resume', *line)[0] == 0
    a,b = (load_model(tmp_path/o/'checkpoint.pth').state_dict() for o in ('run','again'))
    assert all(torch.equal(v, b[k]) for k,v in a.items())

def test_a_state_of_an_older_version(here, tmp_path):
    "It knows nothing of settings that came later, which have their defaults"
    assert here('--out', 'run', '--epochs', '2')[0] == 0
    (tmp_path/'run/state-2.pth').unlink()
    c = read_checkpoint(tmp_path/'run/state-1.pth')
    del c['model_args']['dynamic_img_size']
    for k in ('layer_decay', 'backbone_lr', 'freeze', 'accumulate', 'pretrained'): del c['extra']['run'][k]
    write_checkpoint(tmp_path/'run/state-1.pth', c)
    assert here('--out', 'run', '--epochs', '2', '--resume')[0] == 0

# ---------------------------------------------------------------- a folder with states of something else

def kept(folder, **kw):
    "A learner that keeps its states in `folder`"
    return keep_state(learner(digits_dls(bs=256, device='cpu'), replace(short, warmup_epochs=0)), folder, **kw)

def fit(learn, n, stop=None):
    class Stop(Callback):
        order = 90
        def before_epoch(self):
            if self.epoch==stop: raise KeyboardInterrupt
    with learn.no_bar(), learn.no_logging(): learn.fit(n, cbs=Stop())

def test_a_new_run_does_not_mix_its_states_with_old_ones(tmp_path):
    "The newest of them would be the old run's, however far the new one is"
    fit(kept(tmp_path), 2)
    before = {o: o.read_bytes() for o in states(tmp_path)}
    with pytest.raises(ValueError, match='state-2.pth is the state of another run, .*: resume=True goes on with it'):
        kept(tmp_path)
    assert {o: o.read_bytes() for o in states(tmp_path)}==before
    fit(kept(tmp_path, resume=True), 2)

def test_a_second_fit_has_states_of_its_own(tmp_path):
    learn = kept(tmp_path)
    fit(learn, 2)
    assert names(tmp_path)==['state-1.pth','state-2.pth']
    with pytest.raises(KeyboardInterrupt): fit(learn, 2, stop=1)
    assert names(tmp_path)==['state-1.pth']

@pytest.mark.parametrize('kw', [dict(every=2), dict(minutes=1)], ids=str)
def test_loaders_that_begin_with_an_epoch_alone(kw, tmp_path):
    "The schedule would go on in the middle, the batches at the beginning"
    dls = digits_dls(bs=256, device='cpu')
    bare = DataLoaders(*(TfmdDL(o.dataset, bs=256) for o in (dls.train,dls.valid)))
    bare.vocab = dls.vocab
    learn = learner(bare, replace(short, warmup_epochs=0))
    with pytest.raises(ValueError, match='every and minutes are for loaders that can begin within an epoch'):
        keep_state(learn, tmp_path, **kw)
    keep_state(learn, tmp_path)
