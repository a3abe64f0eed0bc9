"""What a notebook cannot show about training: killed processes, full disks, dead workers; and the published recipes
on real files, narrow and short"""
import os, random, resource, shutil, signal, time
from dataclasses import replace
from pathlib import Path

import av, numpy as np, pytest, torch
from PIL import Image
from fastai.vision.all import Callback
from revvit.models.checkpoints import load_model
from revvit.models.files import read_checkpoint
from revvit.data.digits import digits_dls
from revvit.training.resume import keep_state, states
from revvit.training.recipes import recipe_dls, recipes
from revvit.training.learner import learner

torch.set_num_threads(1)
pytestmark = [pytest.mark.skipif(not hasattr(os, 'fork'), reason='needs fork'), pytest.mark.filterwarnings('ignore')]

# ---------------------------------------------------------------- a run in a process of its own

small = replace(recipes['digits'], epochs=4, batch_size=256, warmup_epochs=1, mixup=.8, cutmix=1., average=.9,
    model_args=dict(patch_size=4, embed_dim=16, num_heads=2, depth=2, drop_path_rate=.2, proj_drop_rate=.1))

def go(out, workers=0, every=2, epochs=None, cbs=()):
    "Train in `out`, going on where a run there was stopped"
    recipe = small if epochs is None else small.changed(epochs=epochs)
    learn = keep_state(learner(digits_dls(bs=256, workers=workers, device='cpu'), recipe, out=out, seed=3),
                       resume=True, every=every)
    with learn.no_bar(), learn.no_logging(), learn.added_cbs(cbs): learn.fit(recipe.epochs)
    return learn

def spawn(f, *args, error=None, **kwargs):
    "Call `f` in a new process, with its own process group; its number"
    pid = os.fork()
    if pid: return pid
    code = 1
    try:
        os.setpgid(0, 0)
        torch.rand(random.randint(1, 9)) # whatever was drawn before must not matter
        f(*args, **kwargs)
        code = 0
    except BaseException as e:
        resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY,)*2)
        if error: os.write(error, f'{type(e).__name__}: {e}'.encode())
    finally: os._exit(code)

def _opened(path): return os.open(path, os.O_CREAT | os.O_WRONLY)

def wait(pid, seconds=120):
    "Exit status of a process; None if it has to be killed after that time"
    end = time.monotonic()+seconds
    while time.monotonic() < end:
        got,status = os.waitpid(pid, os.WNOHANG)
        if got: return os.waitstatus_to_exitcode(status)
        time.sleep(.02)
    os.killpg(pid, signal.SIGKILL)
    os.waitpid(pid, 0)

def nobody_left(group, seconds=30):
    "Is a process group empty before long?"
    end = time.monotonic()+seconds
    while time.monotonic() < end:
        try: os.killpg(group, 0)
        except ProcessLookupError: return True
        time.sleep(.1)
    os.killpg(group, signal.SIGKILL)

def children(pid): return [int(o) for o in Path(f'/proc/{pid}/task/{pid}/children').read_text().split()]

def same(a, b):
    if isinstance(a, torch.Tensor): return torch.equal(a, b)
    if isinstance(a, dict): return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    if isinstance(a, (list, tuple)): return len(a) == len(b) and all(map(same, a, b))
    return a == b

def end_of(out):
    "All that a finished run left: weights, optimizer, average, curves, rows; without the times it took and its speed"
    state = read_checkpoint(states(out)[0])
    state['extra']['history']['rows'] = [o[:-2] for o in state['extra']['history']['rows']] # without speed and time
    log = [o.rsplit(',', 2)[0] for o in (out/'history.csv').read_text().splitlines()]
    return state, log, load_model(out/'checkpoint.pth').state_dict()

@pytest.fixture(scope='module')
def straight(tmp_path_factory):
    "The end of a run that nobody stopped"
    out = tmp_path_factory.mktemp('straight')
    assert wait(spawn(go, out)) == 0
    return out

# ---------------------------------------------------------------- R33, R34: killed and resumed

@pytest.mark.parametrize('workers', [0, pytest.param(2, marks=pytest.mark.thorough)])
def test_R33_kill_9_and_resume_gives_the_same_bits(workers, straight, tmp_path):
    "SIGKILL at random moments, also while a state is being written, until the run gets through"
    rng,kills,orphans = random.Random(workers),0,[]
    while kills < 6:
        had = states(tmp_path)[:1]
        pid = spawn(go, tmp_path, workers)
        end = time.monotonic()+60
        while states(tmp_path)[:1] == had and time.monotonic() < end: time.sleep(.005)
        time.sleep(rng.uniform(0, .3))
        os.kill(pid, signal.SIGKILL)
        status = wait(pid)
        orphans.append(pid)
        if status == 0: break
        assert status == -signal.SIGKILL
        kills += 1
    assert kills >= 2, 'hardly a kill hit the run: the test shows nothing'
    if status: assert wait(spawn(go, tmp_path, workers)) == 0
    assert same(end_of(tmp_path), end_of(straight))
    assert sorted(o.name for o in tmp_path.iterdir()) == ['checkpoint.pth', 'history.csv', 'state-3-4.pth',
        'state-4.pth']
    assert all(map(nobody_left, orphans)), 'loader processes outlive a killed run'

def test_R34_a_damaged_newest_state_is_passed_over(straight, tmp_path, capfd):
    run = tmp_path/'run'
    shutil.copytree(straight, run)
    newest,before = states(run)
    data = bytearray(newest.read_bytes())
    data[len(data)//2] ^= 1
    newest.write_bytes(data)
    assert wait(spawn(go, run)) == 0
    out = capfd.readouterr().out
    assert str(newest) in out and 'digest' in out and 'the state before it is used' in out
    assert states(run) == [newest, before] and same(end_of(run), end_of(straight))

# ---------------------------------------------------------------- R39: what can go wrong around a run

class Slow(Callback):
    "So that there is time to do something to it"
    def after_batch(self): time.sleep(.05)

@pytest.mark.skipif(not Path('/proc/self/task').exists(), reason='needs /proc')
@pytest.mark.thorough
def test_R39_a_killed_worker_ends_the_run(tmp_path):
    "Within 30 s, by name, with the last state and checkpoint whole and no process left"
    pid = spawn(go, tmp_path, 2, None, 500, cbs=[Slow()], error=_opened(tmp_path/'error'))
    end = time.monotonic()+60
    while not states(tmp_path) and time.monotonic() < end: time.sleep(.02)
    while not (kids := children(pid)) and time.monotonic() < end: time.sleep(.005)
    time.sleep(.1)
    os.kill(kids[0], signal.SIGKILL)
    assert wait(pid, 30) == 1
    said = (tmp_path/'error').read_text()
    assert ('DataLoader worker' in said and 'killed' in said.lower() or 'a process that reads data was '
            'ended' in said), said
    assert read_checkpoint(states(tmp_path)[0])['extra']['train_iter'] > 0
    assert load_model(tmp_path/'checkpoint.pth').num_classes == 10
    assert nobody_left(pid)

class Full(Callback):
    "From now on no file may grow beyond `limit` bytes, as on a full disk"
    def __init__(self, limit): self.limit = limit
    def before_train(self): resource.setrlimit(resource.RLIMIT_FSIZE, (self.limit, resource.RLIM_INFINITY))

@pytest.mark.parametrize('limit,file', [(60, 'history.csv'), (8192, 'checkpoint.pth'), (100_000, 'state-')])
def test_R39_a_full_disk_is_named(limit, file, straight, tmp_path):
    """For the log, the checkpoint and the state: the file is named, nothing half written stays, and the last state is
    good"""
    run,error = tmp_path/'run',tmp_path/'error'
    shutil.copytree(straight, run)
    states(run)[0].unlink()
    last = states(run)[0].read_bytes()
    assert wait(spawn(go, run, cbs=[Full(limit)], error=_opened(error)), 60) == 1
    assert file in error.read_text(), error.read_text()
    assert not [o for o in run.iterdir() if o.name.endswith('.tmp')] and [o.read_bytes() for o in states(run)] == [last]
    if file == 'state-':
        assert wait(spawn(go, run)) == 0
        assert same(end_of(run), end_of(straight))

@pytest.mark.skipif(not os.geteuid() == 0 or not Path('/proc/self').exists(), reason='for root, whom permissions do '
                    'not stop')
def test_R39_an_unwritable_folder_is_named_at_once():
    with pytest.raises(OSError, match='/proc/run'): learner(digits_dls(bs=256, device='cpu'), small, out='/proc/run')

# ---------------------------------------------------------------- the published recipes, on files

rng = np.random.RandomState(0)

@pytest.fixture(scope='module')
def imagenet(tmp_path_factory):
    "JPEGs of several sizes in class folders, named as ImageNet's"
    root = tmp_path_factory.mktemp('imagenet')
    for part,n in (('train', 6), ('val', 3)):
        for c in ('n01440764', 'n01443537', 'n01484850'):
            (root/part/c).mkdir(parents=True)
            for i in range(n):
                Image.fromarray(rng.randint(0, 255, (40+9*i, 70-5*i, 3), np.uint8)).save(root/part/c/f'{c}_{i}.JPEG')
    return root

@pytest.fixture(scope='module')
def kinetics(tmp_path_factory):
    "Videos of several sizes, rates and codecs, and lists of them"
    root = tmp_path_factory.mktemp('kinetics')
    for i,(codec,rate,size) in enumerate((('libx264', 30, (48, 64)), ('mpeg4', 25, (64, 48)), ('libx264', 15, (40, 40)),
                                          ('mpeg4', 30, (50, 80)))*2):
        with av.open(str(root/f'video {i}.mp4'), 'w') as c:
            s = c.add_stream(codec, rate=rate)
            s.height,s.width,s.pix_fmt = *size,'yuv420p'
            for _ in range(30): c.mux(s.encode(av.VideoFrame.from_ndarray(rng.randint(0, 255, (*size, 3), np.uint8))))
            c.mux(s.encode())
    (root/'train.csv').write_text(''.join(f'"video {i}.mp4" {i%2}\n' for i in range(6)))
    (root/'val.csv').write_text(''.join(f'"video {i}.mp4" {i%2}\n' for i in (6, 7)))
    return root

narrow = dict(vit=dict(embed_dim=24, num_heads=3, depth=3, patch_size=16),
              mvit=dict(embed_dim=8, depth=4, stage_starts=(1,)))

@pytest.mark.parametrize('name', ['rev_vit_s', 'rev_vit_b', 'rev_mvit_b', 'rev_mvit_b_16x4'])
def test_published_recipe_trains_tests_resumes(name, imagenet, kinetics, tmp_path):
    """Full augmentation, mixing and drop path as published, a narrow model on small pictures; a run in two halves
    ends as one in one piece"""
    full = recipes[name]
    cfg = dict(full.image_cfg, input_size=(3, *((4,) if full.data == 'clips' else ()), 64, 64))
    recipe = replace(full.changed(epochs=2, batch_size=2), image_cfg=cfg,
                     model_args={**full.model_args, **narrow['mvit' if 'mvit' in name else 'vit']})
    def make(out, workers=0):
        dls = recipe_dls(recipe, kinetics if full.data == 'clips' else imagenet, workers=workers, seed=1, device='cpu')
        return keep_state(learner(dls, recipe, out=out, seed=1), resume=True)
    one = make(tmp_path/'one')
    with one.no_bar(), one.no_logging(): one.fit(2)
    assert all(torch.isfinite(torch.stack(one.recorder.losses)))
    x,_ = one.dls.train.one_batch()
    assert len(x) == 2*full.repeats and len(one.dls.vocab) == (2 if full.data == 'clips' else 3)
    for dl in one.dls: assert dl.one_batch()[0].shape[1:] == cfg['input_size']
    class Stop(Callback):
        order = 90
        def after_epoch(self): raise KeyboardInterrupt
    two = make(tmp_path/'two', workers=2)
    with two.no_bar(), two.no_logging(), two.added_cbs(Stop()), pytest.raises(KeyboardInterrupt): two.fit(2)
    two = make(tmp_path/'two')
    with two.no_bar(), two.no_logging(): two.fit(2)
    assert same(two.model.state_dict(), one.model.state_dict()) and two.recorder.values == one.recorder.values
    assert len(load_model(tmp_path/'two'/'checkpoint.pth').pretrained_cfg['label_names']) == len(one.dls.vocab)
