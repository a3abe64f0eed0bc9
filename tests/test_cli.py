"""What a notebook cannot show about the commands: the installed scripts, exit codes, Ctrl-C, folders that cannot be
written"""
import csv, itertools, json, math, os, re, shutil, signal, subprocess, sys, threading, time
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import av
import numpy as np
import pytest
import timm
import torch
from PIL import Image
import revvit
from revvit.use import cli
from revvit.use.reports import dry_run
from revvit.models.checkpoints import load_model, save_checkpoint
from revvit.models.files import read_checkpoint
from revvit.data.digits import digits, hold_out
from revvit.training.recipes import recipes
from revvit.data.images import ImageTransform
from revvit.use.inference import recognise_model
from revvit.data.clips import ClipTransform

def script(name):
    "The command as installed beside this Python"
    path = shutil.which(name, path=os.pathsep.join([str(Path(sys.executable).parent), os.environ.get('PATH', '')]))
    assert path, f'{name} is not installed: pip install -e .'
    return path

env = {**os.environ, 'OMP_NUM_THREADS': '1', 'CUDA_VISIBLE_DEVICES': ''}
def run(cwd, name, *args, **kwargs):
    return subprocess.run([script(name), *map(str, args)], cwd=cwd, env=env, capture_output=True, text=True,
                          timeout=300, **kwargs)

@contextmanager
def started(cwd, *words, env=env, warm=None, stdout=subprocess.DEVNULL):
    """A command that runs meanwhile, of a Python of its own or a fork of `warm`; Ctrl-C reaches it also where these
    tests do not hear it (nohup, &), and nothing is left"""
    def listen(): signal.signal(signal.SIGINT, signal.SIG_DFL)
    how = dict(cwd=cwd, env=env, stdout=stdout, stderr=subprocess.PIPE)
    if warm: p = warm.started(words, **how)
    else: p = subprocess.Popen([*map(str, words)], text=True, start_new_session=True, preexec_fn=listen, **how)
    try: yield p
    finally:
        try: os.killpg(p.pid, signal.SIGKILL)
        except ProcessLookupError: pass
        p.wait()

def no_file_beyond(size):
    "What stands for a full disk, at the start of a process"
    return ("import resource, signal; signal.signal(signal.SIGXFSZ, signal.SIG_IGN); "
            f"resource.setrlimit(resource.RLIMIT_FSIZE, ({size}, {size}))")

@contextmanager
def standard_input(data):
    "What a pipe brings, in this process"
    def write():
        with suppress(BrokenPipeError), open(to, 'wb') as f: f.write(data)   # perhaps nobody reads it
    before,(source,to) = os.dup(0),os.pipe()
    writer = threading.Thread(target=write)
    os.dup2(source, 0)
    os.close(source)
    writer.start()
    try: yield
    finally:
        os.dup2(before, 0)   # closes the pipe
        os.close(before)
        writer.join()

@pytest.fixture
def here(monkeypatch, capfd):
    "The same, in this process: for the many cases where starting Python would take longer than the case"
    def _run(cwd, name, *args):
        monkeypatch.chdir(cwd)
        capfd.readouterr()
        code = getattr(cli, name)([str(o) for o in args])
        return subprocess.CompletedProcess(args, code, *capfd.readouterr())
    return _run

@pytest.fixture
def small_digits(monkeypatch):
    "Training on the digits, for where nothing hangs on the network's size"
    small = dict(patch_size=4, embed_dim=16, num_heads=2, depth=2)
    monkeypatch.setitem(recipes, 'digits', replace(recipes['digits'], model_args=small))

def only_sentence(r, said):
    "Exit code 2 and exactly one sentence"
    assert r.returncode == 2, (r.returncode, r.stderr)
    assert r.stderr.count('\n') == 1 and r.stderr.startswith('revvit_') and said in r.stderr, r.stderr

@pytest.fixture(scope='module')
def work(tmp_path_factory):
    "A folder with one short run in it, made by the command without --out"
    path = tmp_path_factory.mktemp('cli')
    r = run(path, 'revvit_train', '--epochs', 1, '--batch-size', 128)
    assert r.returncode == 0, r.stderr
    assert r.stderr == ''
    (path/'train.out').write_text(r.stdout, encoding='utf8')
    return path

def test_train_leaves_everything(work):
    out = work/'runs'/'digits'
    assert sorted(o.name for o in out.iterdir()) == ['checkpoint.pth', 'config.json', 'digit_3.png', 'history.csv',
                                                     'history.png', 'state-1.pth']
    assert Image.open(out/'history.png').size[0] > 600 and Image.open(out/'digit_3.png').size == (8, 8)
    assert [list(o) for o in csv.reader((out/'history.csv').open())][0] == ['epoch', 'train_loss', 'valid_loss',
        'accuracy', 'top_5', 'lr', 'kept_MB', 'plain_MB', 'peak_MB', 'items_per_second', 'time']
    config = json.loads((out/'config.json').read_text(encoding='utf8'))
    assert (config['epochs'], config['batch_size'], config['seed'], config['device']) == (1, 128, 0, 'cpu')
    text = (work/'train.out').read_text(encoding='utf8')
    assert all(f'{k} ' in text for k,v in config.items() if v not in (None, False, '', {}))
    assert 'epoch 1 of 1: train_loss ' in text and 'epoch 1 of 1, step 1 of 11: loss ' in text
    assert ' MB, plain autograd ' in text and '\r' not in text

def test_what_a_run_says_and_keeps(tmp_path, here):
    """Lines every so many steps, validations every so many epochs, the best epoch's model; and a resumed run goes on
    with the table"""
    words = '--epochs 3 --batch-size 256 --log-every 3 --validate-every 2 --save-best --out run'.split()
    r = here(tmp_path, 'revvit_train', *words)
    assert (r.returncode, r.stderr) == (0, '')
    steps = [o.split(':')[0] for o in r.stdout.splitlines() if o.startswith('epoch ')]
    assert steps == [f'epoch {i} of 3{s}' for i in (1,2,3) for s in (*[f', step {k} of 5' for k in (1,3,5)], '')]
    def table(): return [*csv.DictReader((tmp_path/'run/history.csv').open())]
    was = table()
    assert [(o['epoch'], bool(o['accuracy']), bool(o['top_5'])) for o in was] == [('1',False,False), ('2',True,True),
        ('3',True,True)]
    best = load_model(tmp_path/'run/checkpoint-best.pth').state_dict()
    assert all(bool(o['lr'] and o['items_per_second'] and float(o['plain_MB']) > 5*float(o['kept_MB'])) for o in was)
    (tmp_path/'run/state-3.pth').unlink()
    r = here(tmp_path, 'revvit_train', *words, '--resume')
    assert 'run: goes on with epoch 3\n' in r.stdout and 'epoch 2 of 3: ' not in r.stdout
    timed = ('items_per_second','time')
    assert [{k: v for k,v in o.items() if k not in timed}
            for o in table()] == [{k: v for k,v in o.items() if k not in timed} for o in was]
    assert all(torch.equal(v, best[k]) for k,v in load_model(tmp_path/'run/checkpoint-best.pth').state_dict().items())

def test_a_dry_run_writes_nothing(tmp_path, here):
    r = here(tmp_path, 'revvit_train', '--dry-run', '--epochs', 7, '--batch-size', 256)
    assert (r.returncode, r.stderr, list(tmp_path.iterdir())) == (0, '', [])
    step,run = r.stdout.splitlines()[-2:]
    assert re.fullmatch(r'one step of 256 images: .* s, .* images/s; it keeps .* MB of activations, plain autograd '
                        r'would keep .* MB', step)
    assert re.fullmatch(r'7 epochs of 5 steps: about [\d:]+ with validation; nothing was written', run)

@pytest.mark.parametrize('every,validations', [(1, 7), (2, 4), (9, 1)])
def test_a_dry_run_adds_up(every, validations, monkeypatch):
    "By a clock that goes on by a second whenever it is looked at, each batch takes one"
    ticks = itertools.count()
    monkeypatch.setattr('revvit.use.reports.perf_counter', lambda: next(ticks))
    r = recipes['digits'].changed(epochs=7, batch_size=256)
    learn = revvit.learner(revvit.recipe_dls(r, device='cpu'), r)
    assert dry_run(learn, every)['run'] == 7*5+validations*len(learn.dls.valid)

def test_a_dry_run_is_for_one_process(tmp_path, here, monkeypatch):
    monkeypatch.setenv('WORLD_SIZE', '2')
    only_sentence(here(tmp_path, 'revvit_train', '--dry-run'), '--dry-run looks at one process: start it without '
                  'torchrun')

def test_list_recipes(tmp_path, here):
    r = here(tmp_path, 'revvit_train', '--list-recipes')
    assert (r.returncode, r.stderr, list(tmp_path.iterdir())) == (0, '', [])
    assert [o.split()[0] for o in r.stdout.splitlines()] == [*recipes]

@pytest.mark.parametrize('name', ['tensorboard','wandb'])
def test_a_board_that_is_not_installed(name, tmp_path, here, monkeypatch):
    monkeypatch.setattr('revvit.training.progress.find_spec', lambda name: None)
    only_sentence(here(tmp_path, 'revvit_train', f'--{name}'), f'--{name} needs a package that is not installed: pip '
                  f'install {name}')
    assert not list(tmp_path.iterdir())

def test_tensorboard_has_the_figures(tmp_path, here):
    pytest.importorskip('tensorboard')
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    assert here(tmp_path, 'revvit_train',
                *'--epochs 1 --batch-size 512 --tensorboard --out run'.split()).returncode == 0
    found = EventAccumulator(str(tmp_path/'run/tensorboard'))
    found.Reload()
    assert {'train/loss','train/lr','epoch/accuracy','epoch/top_5'} <= {*found.Tags()['scalars']}

def test_weights_and_biases_has_the_figures(tmp_path, here, monkeypatch):
    "By a module in its place: what a run says of itself goes there, with its step"
    told = []
    board = SimpleNamespace(init=lambda **kw: SimpleNamespace(config=kw['config'],
        log=lambda numbers, step: told.append((step, {*numbers}))))
    monkeypatch.setitem(sys.modules, 'wandb', board)
    monkeypatch.setattr('revvit.training.progress.find_spec', lambda name: True)
    assert here(tmp_path, 'revvit_train', *'--epochs 1 --batch-size 512 --wandb --out run'.split()).returncode == 0
    assert any('train/loss' in names for _,names in told) and any('epoch/accuracy' in names for _,names in told)
    assert told[-1][0] == 2

def test_last_line_can_be_typed(work):
    "The closing line of the training is a command that works, from the same folder, in a shell"
    line = (work/'train.out').read_text(encoding='utf8').splitlines()[-1].split(': ', 1)[1]
    assert line == 'revvit_predict runs/digits/digit_3.png'
    r = subprocess.run(line.replace('revvit_predict', script('revvit_predict'), 1), shell=True, cwd=work, env=env,
                       capture_output=True, text=True, timeout=300)
    assert (r.returncode, r.stderr) == (0, '') and r.stdout.startswith('runs/digits/digit_3.png: ')
    assert r.stdout.count('%') == 5

def test_json_and_several_files(work, here):
    shutil.copy(work/'runs/digits/digit_3.png', work/'a name with spaces.png')
    r = here(work, 'revvit_predict', 'runs/digits/digit_3.png', 'a name with spaces.png', '--json', '--weights',
             'runs/digits/checkpoint.pth')
    a,b = json.loads(r.stdout)
    assert r.stderr == '' and (a['file'], b['file']) == ('runs/digits/digit_3.png', 'a name with spaces.png')
    assert len(a['pred_scores']) == 10 and abs(sum(a['pred_scores'])-1) < 1e-5 and a['pred_scores'] == b['pred_scores']
    assert a['pred_score'] == max(a['pred_scores']) == a['pred_scores'][a['pred_label']]
    assert a['pred_class'] == str(a['pred_label'])

@pytest.mark.parametrize('name,flags', [('revvit_train', 'recipe data print-recipe model img-size frames freeze '
                                         'layer-decay backbone-lr accumulate clip step-in-backward out epochs '
                                         'batch-size lr workers seed amp weights resume save-steps save-minutes chunk '
                                         'keep exact no-exact'), ('revvit_predict', 'weights model top views crops '
                                             'batch-size workers classes features device draw min-score json version'),
    ('revvit_test', 'data root on-bad weights model batch-size workers views crops classes device per-class confusion '
                    'predictions json version'),
    ('revvit_memory', 'batch-size img-size frames classes dtype optimizer step-in-backward keep exact no-exact rewire '
                      'memory device json'), ('revvit_bench', 'small models depths batch-sizes dtypes rivals '
                                                  'settings memory minutes threads out device json')])
def test_help(name, flags, capfd):
    with pytest.raises(SystemExit) as e: getattr(cli, name)(['--help'])
    out,err = capfd.readouterr()
    assert (e.value.code, err) == (0, '') and 'default' in out
    for o in flags.split(): assert re.search(f'--{o}[ \\n]', out), o

@pytest.mark.parametrize('name,args,said', [
    ('revvit_train', ['--epochs', '-3'], '--epochs must be 1 or more, got -3'),
    ('revvit_predict', ['no.png'], 'no checkpoint.pth under runs/')])
@pytest.mark.thorough
def test_installed_commands_refuse(name, args, said, tmp_path):
    "The installed commands do what the functions below do; importing everything else prints nothing"
    only_sentence(run(tmp_path, name, *args), said)

@pytest.mark.parametrize('args,said', [
    (['--recipe', 'imagenet'], "there is no recipe 'imagenet'; there is: digits"),
    (['--epochs', '-3'], '--epochs must be 1 or more, got -3'),
    (['--epochs', 'many'], "invalid int value: 'many'"), (['--batch-size', '0'], '--batch-size must be 1 or more'),
    (['--batch_size', '1000000'], '1437 training images'),
    (['--lr', 'nan'], 'lr must be a number above 0'), (['--workers', '-1'], 'workers must be 0 or more'),
    pytest.param(['--amp', 'fp16'], 'needs a CUDA device',
                 marks=pytest.mark.skipif(torch.cuda.is_available(), reason='there is a CUDA device')),
    (['--colour', 'red'], 'unrecognized arguments'),
    (['--weights', 'missing.pth'], 'missing.pth'), (['--weights', 'noise.pth'], 'noise.pth'),
    (['--out', 'noise.pth/run'], 'noise.pth'), (['--out', '.'], 'not empty')], ids=' '.join)
def test_train_refuses(args, said, tmp_path, here):
    "Bad input is one sentence, exit code 2, and leaves no trace"
    (tmp_path/'noise.pth').write_bytes(b'no weights at all')
    only_sentence(here(tmp_path, 'revvit_train', *args), said)
    assert [o.name for o in tmp_path.iterdir()] == ['noise.pth']

def test_seed_must_be_a_seed(tmp_path, here):
    only_sentence(here(tmp_path, 'revvit_train', '--seed', '-1'), 'seed must be from 0 to')

def test_train_refuses_weights_of_another_model(work, tmp_path, here):
    "A checkpoint that is fine but belongs to something else is named, with what differs"
    other = load_model(work/'runs/digits/checkpoint.pth')
    torch.save({k: v for k,v in other.state_dict().items() if 'blocks.3' not in k}, tmp_path/'three.pth')
    only_sentence(here(tmp_path, 'revvit_train', '--weights', 'three.pth'), 'three.pth does not fit')
    assert not (tmp_path/'runs').exists()

@pytest.mark.parametrize('data,said', [(b'', 'empty'), (b'\x89PNG\r\n\x1a\n', 'image'), (b'<html>', 'not an image'),
                                       (None, 'no such image file')], ids=['empty', 'cut', 'html', 'missing'])
def test_predict_refuses_pictures(data, said, work, here):
    "R35: the sentence names the file, and the good picture beside it is still answered"
    if data is not None: (work/'bad.png').write_bytes(data)
    else: (work/'bad.png').unlink(missing_ok=True)
    r = here(work, 'revvit_predict', 'bad.png', 'runs/digits/digit_3.png')
    only_sentence(r, said)
    assert 'bad.png: ' in r.stderr and r.stdout.startswith('runs/digits/digit_3.png: ')

@pytest.mark.parametrize('args,said', [([], 'required: FILE'), (['d.png', '--weights', 'no.pth'], 'no.pth'),
    (['d.png', '--weights', 'd.png'], 'd.png'),
    (['d.png', '--weights', '.'], 'cannot read .'), (['d.png'], 'no checkpoint.pth under runs/'),
    (['d.png', '--top', '0'], 'top must be 1 or more')], ids=' '.join)
def test_predict_refuses(args, said, work, tmp_path, here):
    shutil.copy(work/'runs/digits/digit_3.png', tmp_path/'d.png')
    only_sentence(here(tmp_path, 'revvit_predict', *args), said)

def test_damaged_checkpoint_is_refused(work, tmp_path, here):
    "R30: one flipped bit"
    data = bytearray((work/'runs/digits/checkpoint.pth').read_bytes())
    data[len(data)//2] ^= 4
    (tmp_path/'flipped.pth').write_bytes(data)
    only_sentence(here(tmp_path, 'revvit_predict', work/'runs/digits/digit_3.png', '--weights', 'flipped.pth'),
                  'flipped.pth')

# Prediction with other models than the digits' one, and on videos

reference = Path(__file__).parent/'reference'
narrow = dict( # timm's name, arguments, class names
    vit=('revvit_tiny_patch16_224', dict(img_size=32, patch_size=8, embed_dim=24, num_heads=2, depth=2),
         ['ant', 'bee', 'cat']),
    mvit=('revmvit_tiny_224', dict(img_size=32, embed_dim=8, num_heads=1), ['ant', 'bee', 'cat', 'dog', 'eel', 'fox']),
    clip=('revmvit_tiny_16x4_224', dict(img_size=32, num_frames=4, embed_dim=8, num_heads=1), ['left', 'right', 'up']))

def film(path, n=60, sound=False, picture=True):
    "A square that moves to the right, 30 frames a second; with sound, or sound alone"
    with av.open(str(path), 'w') as f:
        v = f.add_stream('libx264', rate=30, width=48, height=40, pix_fmt='yuv420p') if picture else None
        a = f.add_stream('aac', rate=16000, layout='mono') if sound else None
        for i in range(n if picture else 0):
            im = np.full((40, 48, 3), 60, np.uint8)
            im[12:24, i//2:i//2+8] = (250, 200, 80)
            f.mux(v.encode(av.VideoFrame.from_ndarray(im, format='rgb24')))
        if picture: f.mux(v.encode())
        for i in range(20 if sound else 0):
            o = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format='fltp', layout='mono')
            o.sample_rate,o.pts = 16000,1024*i
            f.mux(a.encode(o))
        if sound: f.mux(a.encode())

@pytest.fixture(scope='module')
def zoo(tmp_path_factory):
    "A folder with a file of weights of each kind, a picture, and good and bad videos"
    path = tmp_path_factory.mktemp('zoo')
    for k,(name,args,names) in narrow.items():
        torch.manual_seed(1)
        m = timm.create_model(name, num_classes=len(names), **args)
        with torch.no_grad(): m.head.weight.normal_(std=2) # so that the answers differ between files
        save_checkpoint(m, path/f'{k}.pth', class_names=names)
    Image.fromarray(np.random.RandomState(0).randint(0, 255, (50, 70, 3), np.uint8)).save(path/'noise.png')
    film(path/'good.mp4')
    film(path/'with sound.mp4', sound=True)
    film(path/'audio.mp4', sound=True, picture=False)
    film(path/'one.mp4', n=1)
    (path/'cut.mp4').write_bytes((path/'good.mp4').read_bytes()[:-150])
    (path/'half.mp4').write_bytes((path/'good.mp4').read_bytes()[:700])
    (path/'empty.mp4').touch()
    (path/'text.mp4').write_text('no video at all'*100, encoding='utf8')
    return path

def scores(path, weights, views=5):
    "Probabilities by hand: what the command has to say"
    m = load_model(weights)
    cfg = m.pretrained_cfg
    x = ClipTransform(cfg, views)(path) if len(cfg['input_size']) == 4 else ImageTransform(cfg)(path)[None]
    with torch.no_grad(): return m(x).softmax(1).mean(0), m.forward_head(m.forward_features(x), pre_logits=True).mean(0)

def test_video_in_class_names_out(zoo, here):
    """The installed command names what is in videos, with the probabilities of 5 views averaged; of sound alone it
    says so"""
    r = here(zoo, 'revvit_predict', 'good.mp4', 'audio.mp4', 'with sound.mp4', '--weights', 'clip.pth')
    only_sentence(r, 'audio.mp4: there is sound in it but no video')
    for line,file in zip(r.stdout.splitlines(), ('good.mp4', 'with sound.mp4'), strict=True):
        best = sorted(zip(scores(zoo/file, zoo/'clip.pth')[0].tolist(), narrow['clip'][2]), reverse=True)
        assert line == f"{file}: {', '.join(f'{n} ({100*p:.1f} %)' for p,n in best)}"

@pytest.mark.parametrize('kind,file,args', [('vit', 'noise.png', []), ('mvit', 'noise.png', []),
                                            ('clip', 'good.mp4', []), ('clip', 'good.mp4', ['--views', 1])], ids=str)
def test_numbers_and_features(kind, file, args, zoo, tmp_path, here):
    "Probabilities in JSON, and features in an archive, for each family of models"
    r = here(zoo, 'revvit_predict', file, '--json', '--weights', f'{kind}.pth', '--features', tmp_path/'f.npz', *args)
    assert (r.returncode, r.stderr) == (0, '')
    want,feat = scores(zoo/file, zoo/f'{kind}.pth', *args[1:])
    a, = json.loads(r.stdout)
    torch.testing.assert_close(torch.tensor(a['pred_scores']), want, rtol=0, atol=1e-5)
    assert (a['file'], a['pred_label'], a['pred_class']) == (file, want.argmax().item(), narrow[kind][2][want.argmax()])
    with np.load(tmp_path/'f.npz') as z:
        assert z.files == [file]
        torch.testing.assert_close(torch.from_numpy(z[file]), feat, rtol=0, atol=1e-4)
    assert [o.name for o in tmp_path.iterdir()] == ['f.npz']

@pytest.mark.parametrize('file,said', [('audio.mp4', 'sound in it but no video'), ('cut.mp4', 'truncated'),
    ('half.mp4', 'truncated'), ('one.mp4', 'a video of 1 frame'), ('missing.mp4', 'no such video file'),
    ('empty.mp4', 'empty (0 bytes)'),
    ('text.mp4', 'not a video'), ('noise.png', 'an image, but the model takes clips of 4 frames')])
def test_predict_refuses_videos(file, said, zoo, here):
    "R36: one sentence that begins with the file, exit code 2, and the good video beside it is answered"
    r = here(zoo, 'revvit_predict', file, 'good.mp4', '--weights', 'clip.pth')
    only_sentence(r, said)
    assert r.stderr.startswith(f'revvit_predict: {file}: ') and r.stdout.startswith('good.mp4: ')
    assert r.stdout.count('\n') == 1

def test_published_weights_that_cannot_be_fetched(work, tmp_path, here, monkeypatch):
    """A name alone means the published weights; without network (here: a proxy that is not there), the sentence says
    where they are"""
    monkeypatch.setenv('TORCH_HOME', str(tmp_path))
    for o in ('http_proxy', 'https_proxy'): monkeypatch.setenv(o, 'http://127.0.0.1:9')
    r = here(work, 'revvit_predict', 'runs/digits/digit_3.png', '--model', 'REV_VIT_S')
    assert r.returncode == 2 and r.stdout == ''
    assert r.stderr.splitlines()[-1].startswith('revvit_predict: the weights of revvit_small_patch16_224.fb_in1k could '
                                                'not be had from https://dl.fbaipublicfiles.com/')

@pytest.mark.parametrize('file,name', [('REV_VIT_S', 'revvit_small_patch16_224'),
                                       ('mmpretrain_revvit_small', 'revvit_small_patch16_224'),
                                       ('REV_MVIT_B_16_CONV', 'revmvit_base_224'),
                                       ('REV_MVIT_B_16x4_CONV', 'revmvit_base_16x4_224')])
def test_published_files_tell_their_model(file, name):
    "The shapes in each published layout fit one model of ours; no numbers needed"
    tensors = {k: torch.empty(v, device='meta') for k,
               v in json.loads((reference/f'{file}.json').read_text(encoding='utf8'))['tensors'].items()}
    assert recognise_model('x.pth', dict(model_state=tensors)) == (name, 400 if '16x4' in file else 1000)

def test_published_file_without_a_name(zoo, tmp_path, here):
    "A full-size file in mmpretrain's layout, with random numbers: recognised, and its classes are ImageNet's"
    g = torch.Generator().manual_seed(0)
    shapes = json.loads((reference/'mmpretrain_revvit_small.json').read_text(encoding='utf8'))['tensors']
    torch.save(dict(state_dict={k: torch.randn(v, generator=g)*.05 for k,v in shapes.items()}), tmp_path/'small.pth')
    r = here(zoo, 'revvit_predict', 'noise.png', '--json', '--weights', tmp_path/'small.pth')
    assert (r.returncode, r.stderr) == (0, '')
    a, = json.loads(r.stdout)
    assert len(a['pred_scores']) == 1000
    assert a['pred_class'] == timm.data.ImageNetInfo().index_to_description(a['pred_label'])

@pytest.mark.thorough
def test_features_on_a_full_disk(work, tmp_path, warm):
    """A file that may not grow beyond 100 bytes stands for a full disk: a sentence that names the archive, and no old
    one that would look like the answer"""
    pytest.importorskip('resource')
    (tmp_path/'f.npz').write_bytes(b'old')
    words = script('revvit_predict'), 'runs/digits/digit_3.png', '--features', tmp_path/'f.npz'
    only_sentence(warm.run(words, work, env, before=no_file_beyond(100)), 'f.npz: ')
    assert not [*tmp_path.iterdir()]

@pytest.fixture(scope='module')
def folder(tmp_path_factory):
    "The 360 test digits as PNG files in class folders, under val"
    path,(images,labels) = tmp_path_factory.mktemp('folder'),digits()
    for c in range(10): (path/'val'/str(c)).mkdir(parents=True)
    for i in hold_out(labels, 36)[1]: Image.fromarray(images[i]).save(path/'val'/str(labels[i])/f'{i}.png')
    return path

def test_accuracy_of_a_folder(work, folder, warm):
    "The command's numbers are those counted by hand, and those of the training's last line"
    m = load_model(work/'runs/digits/checkpoint.pth')
    paths = sorted((folder/'val').rglob('*.png'))
    y = torch.tensor([int(o.parent.name) for o in paths])
    with torch.no_grad(): z = m(torch.stack([ImageTransform(m.pretrained_cfg)(o) for o in paths]))
    rank = (z > z.gather(1, y[:,None])).sum(1)
    r = warm.run((script('revvit_test'), '--data', folder, '--workers', 1, '--json'), work, env)
    assert (r.returncode, r.stderr) == (0, '')
    res = json.loads(r.stdout)
    assert (res['n'], res['top1'], res['top5']) == (360, (rank < 1).sum().item()/360, (rank < 5).sum().item()/360)
    assert math.isclose(res['loss'], torch.nn.functional.cross_entropy(z, y).item(), rel_tol=1e-5)
    assert f"{100*res['top1']:.2f} % of 360 test images right" in (work/'train.out').read_text(encoding='utf8')

@pytest.mark.parametrize('batch', [1, 7, 360])
def test_batch_size_changes_nothing(batch, work, folder, here):
    r = here(work, 'revvit_test', '--data', folder/'val', '--workers', 0, '--batch-size', batch)
    assert (r.returncode, r.stderr) == (0, '')
    first = here(work, 'revvit_test', '--data', folder/'val', '--workers', 0)
    assert r.stdout == first.stdout
    assert re.fullmatch(r'top-1 [\d.]+ %, top-5 [\d.]+ %, loss [\d.]+; 360 files in .*\n', r.stdout)

def test_accuracy_on_videos(zoo, tmp_path, here):
    """Class folders of videos, for a model of clips, matched by the class names in the file; and the publisher's list
    of them"""
    for o in ('left', 'right', 'up'):
        (tmp_path/o).mkdir()
        shutil.copy(zoo/'good.mp4', tmp_path/o/'a.mp4')
    r = here(zoo, 'revvit_test', '--data', tmp_path, '--weights', 'clip.pth', '--workers', 0, '--views', 2, '--json')
    res,p = json.loads(r.stdout),scores(zoo/'good.mp4', zoo/'clip.pth', 2)[0]
    assert (r.returncode, res['n'], res['top1'], res['top5']) == (0, 3, 1/3, 1.)
    assert math.isclose(res['loss'], -p.log().mean().item(), rel_tol=1e-4)
    (tmp_path/'val.csv').write_text('left/a.mp4 0\nright/a.mp4 1\nup/a.mp4 2\n', encoding='utf8')
    r = here(zoo, 'revvit_test', '--data', tmp_path/'val.csv', '--weights', 'clip.pth', '--workers', 0,
             '--views', 2, '--json')
    assert r.returncode == 0 and {**json.loads(r.stdout), 'data': ''} == {**res, 'data': ''}

@pytest.mark.parametrize('change,said', [('bad image', 'bad.png: not an image'), ('strange', '1 of 11 class folders is '
    'no class of the model: ten'), ('empty', '0'), ('missing', 'no such folder')])
def test_test_refuses(change, said, work, tmp_path, here):
    "R38: before or during the count, by name, and no number is printed"
    for c in range(10):
        (tmp_path/'d'/str(c)).mkdir(parents=True)
        if c or change != 'empty': shutil.copy(work/'runs/digits/digit_3.png', tmp_path/'d'/str(c)/'a.png')
    if change == 'bad image': (tmp_path/'d/4/bad.png').write_bytes(b'no image')
    if change == 'strange': (tmp_path/'d/ten').mkdir()
    for workers in (0, 2):
        r = here(work, 'revvit_test', '--data', tmp_path/('e' if change == 'missing' else 'd'), '--workers', workers)
        only_sentence(r, said)
        assert r.stdout == ''

@pytest.mark.skipif(os.name != 'posix', reason='a terminal is made as POSIX has it')
def test_bar_on_a_terminal(work, folder, warm):
    "The error stream of a terminal shows a bar; the result stays alone on the standard output"
    import fcntl, pty, struct, termios
    ours,theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack('HHHH', 24, 80, 0, 0)) # a new one has no columns
    p = warm.started((script('revvit_test'), '--data', folder, '--workers', 0), cwd=work, env=env,
                     stdout=subprocess.PIPE, stderr=theirs)
    os.close(theirs)
    said = b''
    try:
        while part := os.read(ours, 4096): said += part # as it comes, or the command would wait for us
    except OSError: pass # the end of a terminal, on Linux
    os.close(ours)
    out = p.communicate(timeout=300)[0]
    assert p.returncode == 0 and b'0/12' in said and out.startswith('top-1 ') and out.count('\n') == 1

@pytest.mark.parametrize('flags,first,then,again', [
    ([], (0., None), [], (0., None)), (['--keep', .25, '--exact'], (.25, True), [], (.25, True)),
    (['--no-exact'], (0., False), ['--keep', 1], (1., False)),
    (['--keep', 1], (1., None), ['--keep', 0, '--exact'], (0., True)),
    (['--exact'], (0., True), ['--no-exact'], (0., False))], ids=str)
def test_keep_and_exact(flags, first, then, again, tmp_path, here, monkeypatch, small_digits):
    """They reach the model and config.json; a run that goes on is as it was begun where the command does not say
    otherwise"""
    from revvit.training import progress
    # it measures both modes by forward passes of its own
    monkeypatch.setattr(progress, 'step_memory', lambda model, x: (1, 2))
    seen,calls = [],itertools.count(1)
    def forward(self, x, old=revvit.RevViT.forward):
        seen.append((self.blocks.reversible, self.blocks.keep, self.blocks.exact))
        if next(calls) == 5: raise KeyboardInterrupt   # two steps and one batch of test images, an epoch
        return old(self, x)
    monkeypatch.setattr(revvit.RevViT, 'forward', forward)
    line = ['--epochs', 2, '--batch-size', 512, '--out', 'run']
    for code,more,want in ((130, flags, first), (0, ['--resume', *then], again)):
        assert here(tmp_path, 'revvit_train', *line, *more).returncode == code
        cfg = json.loads((tmp_path/'run/config.json').read_text(encoding='utf8'))
        assert (cfg['keep'], cfg['exact']) == want and {*seen} == {(True, *want)}
        seen.clear()

def test_a_damaged_config_says_what_to_give(tmp_path, here):
    assert here(tmp_path, 'revvit_train', '--epochs', 1, '--batch-size', 1024, '--out', 'run').returncode == 0
    cfg = json.loads((tmp_path/'run/config.json').read_text(encoding='utf8'))
    (tmp_path/'run/config.json').write_text(json.dumps({**cfg, 'keep': 'all'}))
    line = ['--epochs', 1, '--batch-size', 1024, '--out', 'run', '--resume']
    only_sentence(here(tmp_path, 'revvit_train', *line), "run/config.json: keep is 'all' and exact is None: give "
                  "--keep and --exact")

def test_second_run_leaves_the_first_alone(work, here):
    before = {o: (o.stat().st_mtime_ns, o.read_bytes()) for o in (work/'runs/digits').iterdir()}
    r = here(work, 'revvit_train', '--epochs', 1, '--batch-size', 512, '--weights', 'runs/digits/checkpoint.pth')
    assert r.returncode == 0 and (work/'runs/digits-2/checkpoint.pth').exists() and 'digits-2' in r.stdout
    assert {o: (o.stat().st_mtime_ns, o.read_bytes()) for o in (work/'runs/digits').iterdir()} == before

@pytest.mark.skipif(not hasattr(os, 'geteuid'), reason='folder permissions are those of POSIX')
def test_unwritable_folder(tmp_path, here):
    "Also for root, whom permissions do not stop: no folder can be made inside /proc"
    if os.geteuid():
        (tmp_path/'locked').mkdir(mode=0o500)
        only_sentence(here(tmp_path, 'revvit_train', '--out', 'locked/run'), 'locked/run: Permission denied')
    elif Path('/proc/self').exists(): only_sentence(here(tmp_path, 'revvit_train', '--out', '/proc/run'), '/proc/run: ')
    else: pytest.skip('neither a user nor /proc')

def test_full_disk(tmp_path, warm):
    """A file that may not grow beyond 8 kB stands for a full disk: the run ends with a sentence that names the
    checkpoint"""
    pytest.importorskip('resource')
    words = script('revvit_train'), '--epochs', 1, '--batch-size', 512
    r = warm.run(words, tmp_path, env, before=no_file_beyond(8192))
    only_sentence(r, 'checkpoint.pth')
    assert sorted(o.name for o in (tmp_path/'runs/digits').iterdir()) == ['config.json', 'history.csv']

@pytest.mark.skipif(not hasattr(os, 'killpg'), reason='needs process groups')
@pytest.mark.parametrize('workers', [0, 2])
def test_ctrl_c(workers, tmp_path, warm):
    """As from a terminal, to the whole process group, after the first checkpoint: exit code 130, one sentence, the
    checkpoint whole, no process left"""
    ckpt,end = tmp_path/'runs/digits/checkpoint.pth',time.monotonic()+240
    words = script('revvit_train'), '--epochs', 500, '--workers', workers
    with started(tmp_path, *words, warm=warm, stdout=subprocess.PIPE) as p:
        while not ckpt.exists() and p.poll() is None and time.monotonic() < end: time.sleep(.05)
        assert ckpt.exists(), p.poll()
        time.sleep(.3)
        os.killpg(p.pid, signal.SIGINT)
        out,err = p.communicate(timeout=300)
        assert (p.returncode, err.count('\n')) == (130, 1), err
        assert err.startswith('revvit_train: stopped in epoch ') and 'checkpoint.pth holds the model after epoch' in err
        assert read_checkpoint(ckpt)['class_names'] == [str(o) for o in range(10)]
        assert load_model(ckpt).num_classes == 10
        assert not list(ckpt.parent.glob('.*.tmp'))
        end = time.monotonic()+300
        while time.monotonic() < end:
            try: os.killpg(p.pid, 0)
            except ProcessLookupError: break
            time.sleep(.1)
        else: pytest.fail('a process of the run is still there')

@pytest.mark.thorough
def test_ctrl_c_before_the_first_epoch_ends(tmp_path, warm):
    cfg,end = tmp_path/'runs/digits/config.json',time.monotonic()+240
    with started(tmp_path, script('revvit_train'), '--batch-size', 1, warm=warm, stdout=subprocess.PIPE) as p:
        while not cfg.exists() and p.poll() is None and time.monotonic() < end: time.sleep(.05)
        time.sleep(1) # of the many seconds that an epoch of one image a step takes
        p.send_signal(signal.SIGINT)
        _,err = p.communicate(timeout=300)
    assert (p.returncode, err) == (130, 'revvit_train: stopped in epoch 1; no epoch was finished, so there is no '
                                   'checkpoint; the same command with --resume begins again\n')

@pytest.mark.skipif(not Path('/proc/self/task').exists(), reason='needs /proc')
@pytest.mark.thorough
def test_R39_a_killed_reader_ends_the_run(tmp_path, here, warm):
    "Exit code 1, one sentence; and the same command with --resume gets through"
    words = ['--epochs', '4', '--batch-size', '64', '--workers', '2', '--out', 'run', '--resume']
    with started(tmp_path, script('revvit_train'), *words, warm=warm) as p:
        ckpt,kids,end = tmp_path/'run/checkpoint.pth',Path(f'/proc/{p.pid}/task/{p.pid}/children'),time.monotonic()+240
        while not ckpt.exists() and p.poll() is None and time.monotonic() < end: time.sleep(.02)
        while not kids.read_text() and p.poll() is None and time.monotonic() < end: time.sleep(.002)
        time.sleep(.1) # into the epoch
        os.kill(int(kids.read_text().split()[0]), signal.SIGKILL)
        _,err = p.communicate(timeout=300)
    assert (p.returncode, err.count('\n')) == (1, 1), err
    assert 'a process that reads data was killed' in err and 'with --resume goes on' in err
    r = here(tmp_path, 'revvit_train', *words)
    assert r.returncode == 0, r.stderr
    table = (tmp_path/'run/history.csv').read_text().split()
    assert [o.split(',')[0] for o in table] == ['epoch', *'1234']

def test_R39_news_of_a_killed_reader_in_the_middle_of_a_tensor(work, tmp_path, warm):
    "It comes between any two steps of Python's; what it leaves half made is not another word"
    for i in range(10): (tmp_path/'classes'/str(i)).mkdir(parents=True)
    for i in range(20): os.link(work/'runs/digits/digit_3.png', tmp_path/'classes'/str(i%10)/f'{i}.png')
    news = """import multiprocessing
from torch.multiprocessing.reductions import StorageWeakRef
def init(self, storage, whole=StorageWeakRef.__init__):
    if multiprocessing.parent_process(): return whole(self, storage)
    self.cdata = storage._weak_ref()
    raise RuntimeError('DataLoader worker (pid 7) is killed by signal: Killed.')
StorageWeakRef.__init__ = init"""
    words = script('revvit_test'), '--data', 'classes', '--weights', work/'runs/digits/checkpoint.pth', '--workers', 2
    r = warm.run(words, tmp_path, env, before=news)
    only_sentence(r, 'a process that reads files was killed')

@pytest.mark.skipif(not Path('/proc/self/task').exists(), reason='needs /proc')
@pytest.mark.parametrize('name,args', [('revvit_predict', ['many', '--batch-size', 1]),
                                       ('revvit_test', ['--data', 'classes', '--batch-size', 1])])
def test_R39_a_killed_reader_ends_the_answers(name, args, work, tmp_path, warm):
    "Exit code 2 and one sentence that says what helps"
    for i in range(10): (tmp_path/'classes'/str(i)).mkdir(parents=True)
    for i in range(2000): os.link(work/'runs/digits/digit_3.png', tmp_path/'classes'/str(i%10)/f'{i}.png')
    (tmp_path/'many').symlink_to(tmp_path/'classes')
    words = script(name), *args, '--weights', work/'runs/digits/checkpoint.pth', '--workers', 2
    with started(tmp_path, *words, warm=warm) as p:
        kids,end = Path(f'/proc/{p.pid}/task/{p.pid}/children'),time.monotonic()+240
        while len(kids.read_text().split()) < 2 and p.poll() is None and time.monotonic() < end: time.sleep(.002)
        os.kill(int(kids.read_text().split()[0]), signal.SIGKILL)
        _,err = p.communicate(timeout=300)
    assert (p.returncode, err.count('\n')) == (2, 1), err
    assert 'a process that reads files was killed' in err and 'fewer --workers' in err

def test_spoilt_training_stops(work, tmp_path, here):
    """R26 through the command: weights that are not finite end the run with exit code 1 and one sentence, before
    anything is saved"""
    m = load_model(work/'runs/digits/checkpoint.pth')
    with torch.no_grad(): m.head.bias[3] = float('nan')
    torch.save(m.state_dict(), tmp_path/'nan.pth')
    r = here(tmp_path, 'revvit_train', '--weights', 'nan.pth')
    assert r.returncode == 1 and r.stderr.count('\n') == 1 and r.stderr.startswith('revvit_train: step 1 (epoch 1): '
        'parameter head.bias is not finite'), r.stderr
    assert not (tmp_path/'runs/digits/checkpoint.pth').exists()

# Memory that runs out

_small_room = """
import json, os, resource, sys
from pathlib import Path
from revvit.use import cli
import fastai.vision.all, revvit.training.learner, revvit.training.resume, revvit.data.moving_digits
import revvit.training.distributed, matplotlib.figure
for i,(name,mb,*args) in enumerate(json.loads(sys.argv[1])):
    if child := os.fork():   # the imports are shared
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
        continue
    for k,end in ((1,'out'),(2,'err')): os.dup2(os.open(f'{i}.{end}', os.O_WRONLY|os.O_CREAT), k)
    now = int(Path('/proc/self/statm').read_text().split()[0])*resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (now+mb*2**20,)*2)
    sys.exit(getattr(cli, name)(args))
"""
_small_rooms = dict(
    revvit_train=(20, '--batch-size 1437 --epochs 1 --out small',
        'in epoch 1 with batches of 1437; no epoch was finished; a smaller --batch-size; a smaller --chunk'),
    revvit_predict=(8, 'noise.png --weights wide.pth', 'fewer --views'),
    revvit_test=(8, '--data ten --weights wide.pth --workers 0', 'a smaller --batch-size'))

@pytest.fixture(scope='module')
def small_rooms(zoo, tmp_path_factory, warm):
    "Exit code and error stream of each, from one process that has imported everything"
    path = tmp_path_factory.mktemp('rooms')
    wide = timm.create_model('revvit_tiny_patch16_224', num_classes=3, img_size=256, patch_size=4, depth=2,
                             embed_dim=48, num_heads=2)
    save_checkpoint(wide, path/'wide.pth', class_names=narrow['vit'][2])
    shutil.copy(zoo/'noise.png', path)
    for o in narrow['vit'][2]:
        (path/'ten'/o).mkdir(parents=True)
        shutil.copy(zoo/'noise.png', path/'ten'/o)
    lines = json.dumps([(name, mb, *words.split()) for name,(mb,words,_) in _small_rooms.items()])
    r = warm.run(('-c', _small_room, lines), path, env)
    codes = list(map(int, r.stdout.split()))
    assert len(codes) == len(_small_rooms), r.stderr
    return {name: (code, (path/f'{i}.err').read_text()) for i,(name,code) in enumerate(zip(_small_rooms, codes))}

@pytest.mark.skipif(not Path('/proc/self/statm').exists(), reason='needs /proc')
@pytest.mark.parametrize('name', _small_rooms)
@pytest.mark.thorough
def test_no_memory_is_a_sentence(name, small_rooms):
    "A limit that leaves little beyond what the imports take: a real failure of the allocator, wherever it comes"
    code,err = small_rooms[name]
    only_sentence(subprocess.CompletedProcess(name, code, '', err), 'out of memory on the CPU')
    assert all(o in err for o in _small_rooms[name][2].split('; ')) and '--device' not in err, err

def _fails(error):
    "What raises `error`: the allocator's is real"
    if error != 'allocator': raise error
    torch.empty(2**50, dtype=torch.uint8)

full_errors = dict(cuda=torch.OutOfMemoryError('CUDA out of memory. Tried to allocate 20.00 GiB. GPU 0 has a total '
                                               'capacity of 8 GiB'), allocator='allocator', python=MemoryError(),
    mps=RuntimeError('MPS backend out of memory (MPS allocated: 8.00 GB). Tried to allocate 256.00 MB on private '
                     'pool.'), cublas=RuntimeError('CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling'),
    system=OSError(12, 'Cannot allocate memory'))

@pytest.mark.parametrize('kind', full_errors)
def test_memory_that_runs_out_leaves_checkpoint_and_state(kind, tmp_path, here, monkeypatch, small_digits):
    """In the second epoch: one sentence, files as the first epoch left them; and with --resume --chunk the run ends
    as it would have"""
    line,calls = ['--epochs', 2, '--batch-size', 512, '--out', 'run'],[]
    def forward(self, x, old=revvit.RevViT.forward):
        if len(x) > 2: calls.append(x)   # not what memory is measured by
        if len(calls) == 5: _fails(full_errors[kind])   # two steps and one batch of 360 test images each epoch
        return old(self, x)
    with monkeypatch.context() as m:
        m.setattr(revvit.RevViT, 'forward', forward)
        r = here(tmp_path, 'revvit_train', *line)
    only_sentence(r, 'in epoch 2 with batches of 512; run/checkpoint.pth holds the model after epoch 1, and the same '
                     'command with --resume goes on')
    assert 'a smaller --chunk' in r.stderr
    assert ('on the GPU' in r.stderr) == (kind in ('cuda','mps','cublas')) == ('--device cpu' in r.stderr)
    assert load_model(tmp_path/'run/checkpoint.pth').num_classes == 10 and (tmp_path/'run/state-1.pth').exists()
    if kind != 'cuda': return
    assert here(tmp_path, 'revvit_train', *line, '--resume', '--chunk', 100).returncode == 0
    assert here(tmp_path, 'revvit_train', *line[:-1], 'whole').returncode == 0
    for a,b in zip(*(load_model(tmp_path/o/'checkpoint.pth').state_dict().values() for o in ('run', 'whole'))):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-4)

@pytest.mark.parametrize('kind', ['cuda', 'allocator', 'python'])
@pytest.mark.parametrize('name', ['revvit_predict', 'revvit_test'])
def test_memory_that_runs_out_elsewhere(name, kind, zoo, tmp_path, here, monkeypatch):
    (tmp_path/'ant').mkdir()
    for o in ('bee', 'cat', 'ant'): (tmp_path/o).mkdir(exist_ok=True); shutil.copy(zoo/'noise.png', tmp_path/o)
    monkeypatch.setattr(revvit.RevViT, 'forward', lambda self, x: _fails(full_errors[kind]))
    monkeypatch.setattr(revvit.RevViT, 'forward_features', lambda self, x: _fails(full_errors[kind]))
    r = here(zoo, name, *(['noise.png'] if name == 'revvit_predict' else ['--data', tmp_path, '--workers', 0]),
             '--weights', 'vit.pth')
    only_sentence(r, 'out of memory on the ')
    assert r.stdout == '' and '--batch-size' in r.stderr

def test_memory_that_runs_out_is_no_bad_file(zoo, tmp_path, monkeypatch):
    "A picture is not counted as unreadable because there was no room for it"
    from revvit.data.images import open_image
    monkeypatch.setattr(Image.Image, 'convert', lambda *args: _fails(MemoryError()))
    Image.new('L', (8, 8)).save(tmp_path/'grey.png')
    with pytest.raises(MemoryError): open_image(tmp_path/'grey.png')

# One device policy, and a GPU without float64

@pytest.mark.parametrize('device', ['cuda:99', 'mps', 'tpu', 'cuda:x', 'meta'])
@pytest.mark.parametrize('name,args', [('revvit_train', []), ('revvit_predict', ['noise.png', '--weights', 'vit.pth']),
                                       ('revvit_test', ['--data', '.', '--weights', 'vit.pth'])])
def test_a_device_that_is_not_there(name, args, device, zoo, here):
    if device == 'mps' and torch.backends.mps.is_available(): pytest.skip('it is there')
    before = sorted(zoo.iterdir())
    only_sentence(here(zoo, name, *args, '--device', device), f"device '{device}' cannot be used: ")
    assert sorted(zoo.iterdir()) == before

def test_all_pick_the_same_device(zoo, monkeypatch):
    "On a machine with nothing but Apple's GPU (pretended): all ask one function, and none picks for itself"
    from revvit.core import device
    from revvit.data import digits, from_files, images
    from revvit.use import benchmark, inference, train
    monkeypatch.setattr(torch.cuda, 'is_available', lambda: False)
    monkeypatch.setattr(torch.backends.mps, 'is_available', lambda: True)
    went = []
    monkeypatch.setattr(torch.nn.Module, 'to', lambda self, device: went.append(str(device)) or self)
    inference.get_model(weights=zoo/'vit.pth')
    assert went == ['mps']
    for o in (digits, images, from_files, train, benchmark, inference):
        assert o.pick_device is device.pick_device, o.__name__
    assert not [o.name for o in Path(revvit.__file__).parent.rglob('*.py')
                if 'default_device' in o.read_text(encoding='utf8')]

class OnTheHost(torch.Tensor):
    "What `.cpu()` gave, where float64 is welcome"

class NoFloat64(torch.overrides.TorchFunctionMode):
    "As on Apple's GPU: a float64 tensor cannot be made from what lies there"
    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func is torch.Tensor.cpu: return args[0].as_subclass(OnTheHost)
        out,ins = func(*args, **(kwargs or {})),torch.utils._pytree.tree_leaves((args, kwargs))
        there = any(isinstance(o, torch.Tensor) and not isinstance(o, OnTheHost) and o.dtype == torch.float32
                    for o in ins)
        for o in torch.utils._pytree.tree_leaves(out):
            if there and isinstance(o, torch.Tensor) and o.dtype == torch.float64 and not isinstance(o, OnTheHost):
                raise TypeError(f'{func}: no float64 on this device')
        return out

@pytest.mark.parametrize('kind', narrow)
def test_no_float64_on_the_device(kind, zoo, tmp_path, here):
    "Prediction, features and testing, of images and of clips; and that the stand-in would notice"
    file = 'good.mp4' if kind == 'clip' else 'noise.png'
    for o in narrow[kind][2]: (tmp_path/'d'/o).mkdir(parents=True); shutil.copy(zoo/file, tmp_path/'d'/o)
    with NoFloat64():
        with pytest.raises(TypeError): torch.ones(2).double()
        a = here(zoo, 'revvit_predict', file, '--weights', f'{kind}.pth', '--features', tmp_path/'f.npz', '--views', 2)
        b = here(zoo, 'revvit_test', '--data', tmp_path/'d', '--weights', f'{kind}.pth', '--workers', 0, '--views', 2)
    assert (a.returncode, a.stderr, b.returncode, b.stderr) == (0, '', 0, '') and (tmp_path/'f.npz').exists()

def small(recipe, folder, zoo, monkeypatch):
    "A published recipe with a narrow model, and two files a class to train and to test it in `folder`"
    from dataclasses import replace
    from revvit.training.recipes import recipes
    r = recipes[recipe]
    clip,frames = r.data == 'clips',(4,) if r.data == 'clips' else ()
    args = dict(embed_dim=24, num_heads=2, depth=2) if 'revvit' in r.model else dict(embed_dim=8, depth=4,
        stage_starts=(2,))
    monkeypatch.setitem(recipes, recipe, replace(r, image_cfg={**r.image_cfg, 'input_size': (3,*frames,32,32)},
                                                 model_args={**r.model_args, **args}))
    for part in ('train', 'val'):
        for c in ('n01440764', 'n01443537'):
            (folder/part/c).mkdir(parents=True)
            for i in range(2):
                shutil.copy(zoo/('good.mp4' if clip else 'noise.png'), folder/part/c/f"{i}.{'mp4' if clip else 'png'}")
        if clip:
            (folder/f'{part}.csv').write_text(''.join(f'{part}/{c}/{i}.mp4 {k}\n' for k,
                                                      c in enumerate(('n01440764', 'n01443537')) for i in range(2)),
                                              encoding='utf8')

@pytest.mark.parametrize('recipe', ['digits', 'rev_vit_s', 'rev_mvit_b', 'rev_mvit_b_16x4'])
def test_training_makes_no_float64_on_the_device(recipe, zoo, tmp_path, here, monkeypatch):
    "A run with everything a recipe asks for, averaged weights too, and its test at the end"
    if recipe != 'digits': small(recipe, tmp_path, zoo, monkeypatch)
    words = ['--epochs', 1, '--average', .9, '--recipe', recipe, '--out', 'run'] + (['--batch-size', 512]
                       if recipe == 'digits' else ['--data', '.', '--batch-size', 2, '--workers', 0])
    with NoFloat64(): r = here(tmp_path, 'revvit_train', *words)
    assert r.returncode == 0, r.stderr

@pytest.mark.parametrize('recipe,how', [('rev_vit_s', 'symlink'), ('rev_vit_s', 'hard link'),
                                        ('rev_mvit_b_16x4', 'symlink'), ('rev_mvit_b_16x4', 'hard link'),
                                        ('rev_mvit_b_16x4', 'line')])
def test_a_file_in_training_and_test_data(recipe, how, zoo, tmp_path, here, monkeypatch):
    "One sentence that names the flag; with it one warning, and the run goes on"
    small(recipe, tmp_path, zoo, monkeypatch)
    names = ['n01440764/0.mp4', 'n01443537/1.mp4'] if 'clip' in recipe or '16x4' in recipe else ['n01440764/0.png',
        'n01443537/1.png']
    for o in names:
        (tmp_path/'val'/o).unlink()
        if how == 'symlink': (tmp_path/'val'/o).symlink_to(tmp_path/'train'/o)
        else: os.link(tmp_path/'train'/o, tmp_path/'val'/o)
    if how == 'line':
        (tmp_path/'val.csv').write_text((tmp_path/'train.csv').read_text(encoding='utf8'), encoding='utf8')
    words = ['--recipe', recipe, '--data', '.', '--epochs', 1, '--batch-size', 2, '--workers', 0, '--out', 'run']
    r = here(tmp_path, 'revvit_train', *words)
    only_sentence(r, '(--allow-shared)')
    assert not (tmp_path/'run').exists()
    with pytest.warns(UserWarning) as said: r = here(tmp_path, 'revvit_train', *words, '--allow-shared')
    assert r.returncode == 0 and (tmp_path/'run'/'checkpoint.pth').exists(), r.stderr
    assert sum('one and the same file' in str(o.message) for o in said) == 1

# Streams, addresses, flags

@pytest.mark.skipif(not Path('/dev/stdin').exists(), reason='needs /dev/stdin')
def test_a_picture_from_a_pipe(work, tmp_path, here, warm):
    "As the shell's `|` and `<` give it, and as a named pipe; an empty pipe, and a device, are said to be that"
    picture = (work/'runs/digits/digit_3.png').read_bytes()
    ours = '--weights','runs/digits/checkpoint.pth'   # whichever other runs are there
    want = here(work, 'revvit_predict', 'runs/digits/digit_3.png', *ours).stdout.split(': ')[1]
    said = warm.run((script('revvit_predict'), '/dev/stdin', '/dev/null', *ours), work, env, picture)
    assert said.stdout == f'/dev/stdin: {want}'
    assert said.stderr == 'revvit_predict: /dev/null: a device, not an image file\n' and said.returncode == 2
    os.mkfifo(tmp_path/'pipe')
    for data in (picture, b''):
        writer = subprocess.Popen([sys.executable, '-c', f"open({str(tmp_path/'pipe')!r}, 'wb').write({data!r})"])
        r = here(work, 'revvit_predict', tmp_path/'pipe', *ours)
        assert writer.wait(30) == 0
        if data: assert (r.returncode, r.stdout) == (0, f"{tmp_path/'pipe'}: {want}")
        else: only_sentence(r, 'pipe: the image file is empty (0 bytes)')

def test_a_video_or_weights_from_a_pipe(zoo, tmp_path, here):
    os.mkfifo(tmp_path/'pipe.mp4')
    only_sentence(here(zoo, 'revvit_predict', tmp_path/'pipe.mp4', '--weights', 'clip.pth'),
                  'pipe.mp4: a pipe or a device, and a video is read at many places: save it as a file first')
    only_sentence(here(zoo, 'revvit_predict', 'noise.png', '--weights', tmp_path/'pipe.mp4'),
                  'it is a pipe or a device, save what comes out of it as a file first')

@pytest.mark.parametrize('address', ['https://x.org/a.png', 'http://x.org/b.mp4', 's3://bucket/c', 'ftp://x/y'])
def test_addresses_are_not_read(address, zoo, tmp_path, here):
    "The whole address in the sentence, for each flag that takes a path; a good file beside a bad one is answered"
    for name,args in (('revvit_predict', ['noise.png', '--weights', address]),
                      ('revvit_predict', ['noise.png', '--weights', 'vit.pth', '--classes', address]),
                      ('revvit_test', ['--data', address, '--weights', 'vit.pth']),
                      ('revvit_train', ['--data', address, '--recipe', 'rev_vit_s']),
                      ('revvit_train', ['--weights', address]), ('revvit_train', ['--out', address])):
        only_sentence(here(zoo, name, *args), f'cannot read {address}: addresses are not read, download the file first')
    r = here(zoo, 'revvit_predict', address, 'noise.png', '--weights', 'vit.pth')
    only_sentence(r, f'cannot read {address}: addresses are not read')
    assert r.stdout.startswith('noise.png: ')

@pytest.mark.parametrize('name,args,flag', [
    ('revvit_train', '--on-bad foo', '--on-bad must be raise or skip, got \'foo\''),
    ('revvit_train', '--new-head', '--new-head goes with --weights'),
    ('revvit_train', '--new-size', '--new-size goes with --weights'),
    ('revvit_train', '--batch-size 0', '--batch-size'), ('revvit_train', '--epochs 0', '--epochs'),
    ('revvit_train', '--lr -1', '--lr'), ('revvit_train', '--average 2', '--average'),
    ('revvit_train', '--amp bf61', '--amp must be'),
    ('revvit_train', '--save-steps 0', '--save-steps'), ('revvit_train', '--threads 0', '--threads'),
    ('revvit_train', '--workers -2', '--workers'), ('revvit_train', '--seed -2', '--seed'),
    ('revvit_train', '--chunk 0', '--chunk'),
    ('revvit_train', '--keep 1.5', '--keep must be from 0 to 1, got 1.5'),
    ('revvit_train', '--keep -0.1', '--keep must be from 0 to 1, got -0.1'),
    ('revvit_train', '--keep nan', '--keep must be from 0 to 1, got nan'),
    ('revvit_train', '--keep much', "--keep: invalid float value: 'much'"),
    ('revvit_train', '--amp fp16 --device cpu', "--amp 'fp16' needs"),
    ('revvit_train', '--weights seven.pth', '; --new-head leaves the model\'s classifier'),
    ('revvit_train', '--weights large.pth', '; --new-size resamples'),
    ('revvit_train', '--recipe rev_vit_s', '--data'), ('revvit_train', '--recipe rev_vit_s --root x --data '
                                                       '.', '--root is for'), ('revvit_predict', 'noise.png --top '
                                                           '0', '--top'), ('revvit_predict', 'noise.png --views '
                                                               '0', '--views'),
    ('revvit_predict', 'noise.png --weights odd.pth', '--model'), ('revvit_predict', 'noise.png --model '
        'revvit_tiny_patch16_224', '--weights'), ('revvit_test', '--data . --batch-size 0', '--batch-size'),
    ('revvit_test', '--data . --workers -1', '--workers')], ids=str)
def test_messages_name_flags(name, args, flag, zoo, tmp_path, here):
    "What a command says is in the words of the command line, and nothing was begun"
    from revvit.training.recipes import recipe_model, recipes
    save_checkpoint(recipe_model(recipes['digits'], 7), tmp_path/'seven.pth')
    save_checkpoint(timm.create_model('revvit_tiny_patch16_224',
                                      **{**recipes['digits'].model_args, 'in_chans': 1, 'img_size': 32,
                                         'num_classes': 10}), tmp_path/'large.pth')
    torch.save(timm.create_model('revvit_tiny_patch16_224', embed_dim=24, num_heads=2, depth=3).state_dict(),
               tmp_path/'odd.pth')
    shutil.copy(zoo/'noise.png', tmp_path)
    before = sorted(tmp_path.rglob('*'))
    r = here(tmp_path, name, *args.split())
    only_sentence(r, flag)
    assert not re.search(r'(?<![\w-])(batch_size|new_head|new_size|save_steps|on_bad)\b|=(True|False|None)',
                         r.stderr), r.stderr
    assert sorted(tmp_path.rglob('*')) == before

@pytest.mark.parametrize('args', [['missing.png'], ['missing.png', 'gone.png'], ['noise.png', '--weights', 'no.pth'],
                                  ['noise.png', '--weights', 'vit.pth', '--classes', 'no.txt'],
                                  ['noise.png', '--weights', 'vit.pth', '--device', 'tpu']], ids=' '.join)
def test_no_old_features_after_a_failure(args, zoo, tmp_path, here):
    (tmp_path/'f.npz').write_bytes(b'of another run')
    r = here(zoo, 'revvit_predict', *args, *([] if '--weights' in args else ['--weights', 'vit.pth']), '--features',
             tmp_path/'f.npz')
    assert r.returncode == 2 and not [*tmp_path.iterdir()]

def test_features_do_not_replace_another_kind_of_file(zoo, here):
    "A slip of the hand would cost the picture"
    before = (zoo/'noise.png').read_bytes()
    only_sentence(here(zoo, 'revvit_predict', 'noise.png', '--weights', 'vit.pth', '--features', 'noise.png'),
                  'noise.png: there is such a file, and its name does not end in .npz')
    assert (zoo/'noise.png').read_bytes() == before

@pytest.mark.skipif(not hasattr(signal, 'SIGINT') or os.name != 'posix', reason='signals are those of POSIX')
@pytest.mark.parametrize('name,swallow', [('revvit_train', False), ('revvit_predict', True), ('revvit_test', False)])
@pytest.mark.thorough
def test_ctrl_c_while_importing(name, swallow, tmp_path):
    "A package that takes long to import, and one that catches everything: exit code 130 and one sentence"
    wait = f"open({str(tmp_path/'here')!r}, 'w').close(); time.sleep(600)"
    (tmp_path/'timm').mkdir()
    (tmp_path/'timm/__init__.py').write_text(f"import time\ntry: {wait}\nexcept BaseException: raise ImportError('no "
                                             f"timm')\n" if swallow else f"import time; {wait}")
    path = os.pathsep.join([str(tmp_path), str(Path(cli.__file__).parents[1])])
    end = time.monotonic()+240
    with started(tmp_path, script(name), env={**env, 'PYTHONPATH': path}, stdout=subprocess.PIPE) as p:
        while not (tmp_path/'here').exists() and p.poll() is None and time.monotonic() < end: time.sleep(.02)
        p.send_signal(signal.SIGINT)
        out,err = p.communicate(timeout=300)
    assert (p.returncode, out, err) == (130, '', f'{name}: interrupted\n')

@pytest.mark.skipif(os.name != 'posix', reason='pipes are those of POSIX')
@pytest.mark.parametrize('name,args', [
    ('revvit_predict', ['--weights', 'runs/digits/checkpoint.pth', *['runs/digits/digit_3.png']*50]),
    ('revvit_train', ['--epochs', '1', '--batch-size', '512', '--out'])], ids=['predict', 'train'])
def test_a_reader_that_leaves(name, args, work, tmp_path, warm):
    "`| head -1`: nothing is said, and the exit code is that of a program in a pipe"
    args = args+[str(tmp_path/'run')] if name == 'revvit_train' else args
    with started(work, script(name), *args, warm=warm, stdout=subprocess.PIPE) as p:
        assert p.stdout.readline()
        p.stdout.close()
        err = p.stderr.read()
        assert (p.wait(300), err) == (141, '')

@pytest.mark.parametrize('first,said', [('', ''),
    ('revvit.use.cli.revvit_train(["--epochs", "-3"])', 'revvit_train: --epochs must be 1 or more, got -3\n')])
def test_importing_and_refusing_are_light(first, said, tmp_path):
    "fastai, matplotlib and scikit-learn are loaded by those who train, not by those who only want a model or mistype"
    code = (f"import sys, revvit, revvit.use.cli; {first}\n"
            "print([o for o in ('fastai', 'matplotlib', 'sklearn', 'pandas') if o in sys.modules])")
    r = subprocess.run([sys.executable, '-W', 'ignore', '-c', code], cwd=tmp_path, env=env, capture_output=True,
                       text=True, timeout=300)
    assert (r.stdout, r.stderr) == ('[]\n', said)

@pytest.mark.parametrize('name,words,said', [('revvit_predict', '--model revvit_huge noise.png',
                                              "no model 'revvit_huge'"),
    ('revvit_predict', 'noise.png --weights vit.pth --features .', 'a folder, not a file'),
    ('revvit_predict', 'noise.png --weights vit.pth --features gone/f.npz', 'there is no folder gone'),
    ('revvit_predict', 'noise.png --weights vit.pth --classes few.txt', 'few.txt has 2 names, but the model has 3 '
     'classes'),
    ('revvit_predict', 'noise.png --weights vit.pth --classes noise.png', 'noise.png: not a text file'),
    ('revvit_predict', 'good.mp4 --weights vit.pth', 'good.mp4: a video, but the model takes images'),
    ('revvit_test', '', 'required: --data'), ('revvit_test', '--data . --weights text.mp4', 'text.mp4'),
    ('revvit_train', '--recipe digits --data .', 'brings its own data'),
    ('revvit_train', '--lr 0', '--lr must be a number above 0'),
    ('revvit_train', '--average 1', '--average must be from 0 to below 1'),
    ('revvit_train', '--out few.txt', 'few.txt'),
    ('revvit_train', '--save-minutes 0', '--save-minutes must be a number above 0, got 0.0'),
    ('revvit_train', '--out /dev/null/x', '/dev/null'),
    ('revvit_bench', '--minutes 0', '--minutes must be a number above'),
    ('revvit_bench', '--memory nan', '--memory must be a number above 0'), ('revvit_bench', '--device tpu', 'tpu'),
    ('revvit_bench', '--models revvit_tiny_patch16_224 --dtypes int8', '--dtypes must be of float32')], ids=str)
def test_more_that_cannot_be(name, words, said, zoo, here):
    (zoo/'few.txt').write_text('a\nb\n')
    only_sentence(here(zoo, name, *words.split()), said)

def test_names_of_ones_own_for_foreign_weights(zoo, tmp_path, here):
    "A bare file of a whole model: ImageNet's names where it has a thousand classes, a text file's where it has two"
    torch.manual_seed(0)
    for n in (2, 1000):
        torch.save(timm.create_model('revvit_tiny_patch16_224', num_classes=n).state_dict(), tmp_path/f'{n}.pth')
    (tmp_path/'few.txt').write_text('a\nb\n\n')
    r = here(zoo, 'revvit_predict', 'noise.png', '--weights', tmp_path/'2.pth', '--classes', tmp_path/'few.txt')
    assert r.returncode == 0 and sorted(re.findall(r'(\w) \(', r.stdout)) == ['a','b']
    line = ['noise.png', '--weights', tmp_path/'1000.pth', '--top', 1]
    a,b = (here(zoo, 'revvit_predict', *line, *more) for more in ([], ['--model', 'revvit_tiny_patch16_224']))
    assert a.returncode == 0 and a.stdout == b.stdout
    assert a.stdout.split(': ', 1)[1].rpartition(' (')[0] in timm.data.ImageNetInfo().label_descriptions()

def test_a_run_from_weights_begins_where_they_ended(work, tmp_path, here):
    "After one more epoch the loss is lower than after the first"
    weights = work/'runs/digits/checkpoint.pth'
    assert here(tmp_path, 'revvit_train', '--epochs', 1, '--batch-size', 128, '--weights', weights).returncode == 0
    first,then = (float((o/'history.csv').read_text().splitlines()[1].split(',')[2])
                  for o in (work/'runs/digits', tmp_path/'runs/digits'))
    assert then < first

def test_a_published_recipe_on_ones_own_data(zoo, tmp_path, here, monkeypatch):
    """What the recipe says reaches config.json, in proportion to the batch and the epochs; the last line says how
    good it is"""
    small('rev_vit_s', tmp_path, zoo, monkeypatch)
    words = '--recipe rev_vit_s --data . --epochs 2 --batch-size 4 --workers 0 --out run --average .9'
    r = here(tmp_path, 'revvit_train', *words.split())
    assert r.returncode == 0 and 'top-1 ' in r.stdout and 'of 4 held-out files' in r.stdout
    cfg = json.loads((tmp_path/'run/config.json').read_text())
    assert (cfg['recipe'], cfg['lr'], cfg['warmup_epochs'], cfg['average']) == ('rev_vit_s', 5e-4*4/512, 2*70/300, .9)
    assert (cfg['mixup'], cfg['aug']['rand_aug']) == (.8, 'rand-m7-mstd0.5-inc1')

def test_a_command_that_means_another_run(work, here):
    words = ['--epochs', 1, '--batch-size', 128, '--out', 'runs/digits', '--resume', '--seed', 3]
    only_sentence(here(work, 'revvit_train', *words), 'state-1.pth belongs to another run: its --seed '
                                                      'is 0, here it is 3')

# Folders, patterns, lists and standard input; tests of more than one number

@pytest.fixture(scope='module')
def album(zoo):
    "Seven pictures of several shapes and kinds in folders, with other things among them"
    path,rng = zoo/'album',np.random.default_rng(0)
    (path/'more'/'deep').mkdir(parents=True)
    names = ['a.png','b.JPG','c d.bmp','more/e.png','more/deep/f.gif','more/deep/g[1].png','more/h.webp']
    for i,o in enumerate(names): Image.fromarray(rng.integers(0, 255, (40+i,60-5*i,3), np.uint8)).save(path/o)
    (path/'notes.txt').write_text('no picture')
    (path/'.hidden.png').write_bytes(b'')
    (path/'__MACOSX').mkdir()
    (zoo/'list.txt').write_text('\ufeffalbum/a.png\n\n  album/more/deep  \nalbum/*.JPG\n', encoding='utf8')
    (zoo/'@at.png').write_bytes((path/'a.png').read_bytes())
    return [f'album/{o}' for o in names]

def answered(r): return [o.rpartition(': ')[0] for o in r.stdout.splitlines()]

@pytest.mark.parametrize('words,which,notes', [(['album'], 'abcehfg', 1), (['album/'], 'abcehfg', 1),
    (['album/*.png','album/b.JPG'], 'ab', 0),
    (['album/**/*.png'], 'age', 0), (['album/more/deep/g[[]1].png'], 'g', 0), (['album/more/deep/g[1].png'], 'g', 0),
    (['@list.txt'], 'afgb', 0),
    (['album/more','album/a.png','album/a.png'], 'ehfgaa', 0), (['@at.png'], '@', 0)], ids=str)
def test_what_words_mean(words, which, notes, album, zoo, here):
    """Files in the order of the words, in folders sorted; other files of a folder are counted in one line, which is
    no fault"""
    r = here(zoo, 'revvit_predict', *words, '--weights', 'vit.pth')
    assert (r.returncode, [o.rpartition('/')[2][0] for o in answered(r)]) == (0, list(which)), r.stderr
    assert r.stderr.count('\n') == notes and (not notes or 'album: 3 files are left out' in r.stderr
                                              and '1 .txt' in r.stderr), r.stderr

@pytest.mark.parametrize('word,said', [('empty', 'empty: a folder with no file in it'), ('texts', 'texts: 1 file is '
    'left out'),
    ('gone*.png', 'gone*.png: no file fits this pattern'), ('@gone.txt', 'gone.txt: No such file'),
    ('@noise.png', 'noise.png: not a text file'),
    ('@blank.txt', 'blank.txt: no names in it'), ('gone.png', 'gone.png: no such image file'),
    ('https://x.org/?.png', 'addresses are not read')])
def test_words_that_mean_nothing(word, said, album, zoo, here):
    "A sentence and exit code 2; the picture beside it has its answer"
    for o in ('empty', 'texts'): (zoo/o).mkdir(exist_ok=True)
    (zoo/'texts'/'a.txt').write_text('x')
    (zoo/'blank.txt').write_text('\n \n')
    r = here(zoo, 'revvit_predict', word, 'noise.png', '--weights', 'vit.pth')
    only_sentence(r, said)
    assert r.stdout.startswith('noise.png: ') and r.stdout.count('\n') == 1

@pytest.mark.parametrize('args', ['--batch-size 1', '--batch-size 2', '--batch-size 3 --workers 2', '--batch-size 100',
                                  '--workers 1', ''])
def test_batches_change_no_answer(args, album, zoo, tmp_path, here):
    "In the order of the words, equal to those one by one; a bad file in the middle costs a sentence"
    (zoo/'bad.png').write_bytes(b'no image')
    words = [*album[:3], 'bad.png', *album[3:]]
    r = here(zoo, 'revvit_predict', *words, '--weights', 'vit.pth', '--json', '--features', tmp_path/'f.npz',
             *args.split())
    only_sentence(r, 'bad.png: not an image')
    got = json.loads(r.stdout)
    assert [o['file'] for o in got] == album
    with np.load(tmp_path/'f.npz') as z:
        for o in got:
            probs,feat = scores_of_picture(zoo/o['file'], zoo/'vit.pth')
            torch.testing.assert_close(torch.tensor(o['pred_scores']), probs, rtol=0, atol=1e-5)
            torch.testing.assert_close(torch.from_numpy(z[o['file']]), feat, rtol=0, atol=1e-4)

def scores_of_picture(path, weights):
    m = load_model(weights).eval()
    with torch.no_grad():
        x = ImageTransform(revvit.input_settings(m))(path)[None]
        return m(x)[0].softmax(0),m.forward_head(m.forward_features(x), pre_logits=True)[0]

@pytest.mark.parametrize('top', [1, 2, 3, 9])
def test_top_in_the_json(top, zoo, here):
    "By name, the most probable first, and not more than there are"
    (o,) = json.loads(here(zoo, 'revvit_predict', 'noise.png', '--weights', 'vit.pth', '--json', '--top', top).stdout)
    assert [a['pred_score'] for a in o['top']] == sorted(o['pred_scores'], reverse=True)[:top]
    assert all(a['pred_class'] == narrow['vit'][2][a['pred_label']]
               and a['pred_score'] == o['pred_scores'][a['pred_label']] for a in o['top'])
    assert len(o['pred_scores']) == 3 and o['top'][0] == {k: o[k] for k in ('pred_label','pred_score','pred_class')}

@pytest.mark.parametrize('kind,file', [('vit','noise.png'), ('clip','good.mp4')])
def test_standard_input(kind, file, zoo, here):
    "A picture or a video from a pipe, without a name; the answer is that of the file"
    words,data = ['--weights', f'{kind}.pth', '--views', '1', '--json'],(zoo/file).read_bytes()
    (want,) = json.loads(here(zoo, 'revvit_predict', file, *words).stdout)
    with standard_input(data): r = here(zoo, 'revvit_predict', '-', 'gone.png', *words)
    (got,) = json.loads(r.stdout)
    assert r.returncode == 2 and r.stderr.startswith('revvit_predict: gone.png: ') and got['file'] == '-'
    assert {k: v for k,v in got.items() if k != 'file'} == {k: v for k,v in want.items() if k != 'file'}
    with standard_input(b'nothing good'): only_sentence(here(zoo, 'revvit_predict', '-', *words), 'revvit_predict: -: ')

def test_standard_input_is_one_file(zoo, here):
    only_sentence(here(zoo, 'revvit_predict', '-', '-', '--weights', 'vit.pth'),
                  'standard input is one file, and is named once')

@pytest.fixture(scope='module')
def three(zoo):
    "Nine pictures in three class folders, one of them spoilt"
    rng = np.random.default_rng(1)
    for c,o in enumerate(narrow['vit'][2]):
        (zoo/'three'/o).mkdir(parents=True)
        for i in range(3): Image.fromarray(rng.integers(0, 255, (40,70+c,3), np.uint8)).save(zoo/'three'/o/f'{i}.png')
    (zoo/'three'/'bee'/'1.png').write_bytes(b'no image')
    return zoo

def asked(zoo, file, crops=1):
    return revvit.inference_model(None, zoo/file, weights=zoo/'vit.pth', device='cpu', crops=crops)

@pytest.mark.parametrize('words', ['--batch-size 1', '--batch-size 4 --workers 2', '--crops 3',
                                   '--crops 5 --batch-size 2'])
def test_every_number_of_a_test(words, three, tmp_path, here):
    "Counts, classes, matrix and table agree with asking for each file alone, whatever the batches"
    args = ['--data', 'three', '--weights', 'vit.pth', '--on-bad', 'skip', '--workers', 0, *words.split()]
    files = dict(confusion=tmp_path/'m.csv', predictions=tmp_path/'p.csv')
    r = here(three, 'revvit_test', *args, '--json', '--per-class', '--confusion', files['confusion'], '--predictions',
             files['predictions'])
    assert r.returncode == 0
    assert r.stderr.startswith('revvit_test: 1 of 9 files cannot be read and are not counted: three/bee/1.png: ')
    assert r.stderr.count('\n') == 1
    res,names = json.loads(r.stdout),narrow['vit'][2]
    rows = list(csv.DictReader(files['predictions'].open()))
    crops = int(words.split('--crops ')[1][0]) if 'crops' in words else 1
    assert [o['file'] for o in rows] == [f'three/{c}/{i}.png' for c in names for i in range(3) if (c,i) != ('bee',1)]
    for o in rows:
        one = asked(three, o['file'], crops)
        assert (o['label'], o['predicted']) == (o['file'].split('/')[1], one['pred_class'])
        assert abs(float(o['probability'])-one['pred_score']) < 1e-5
    right = [o['label'] == o['predicted'] for o in rows]
    assert (res['n'], res['skipped'], res['top1']) == (8, 1, sum(right)/8)
    for o in res['classes']:
        mine = [a == b for a,b in ((x['label'], x['predicted']) for x in rows) if a == o['class']]
        assert (o['n'], o['top1']) == (len(mine), sum(mine)/len(mine)) and names[o['label']] == o['class']
    m = list(csv.reader(files['confusion'].open()))
    assert m[0] == ['label',*names] and [o[0] for o in m[1:]] == names
    assert [[int(v) for v in o[1:]] for o in m[1:]] == [[sum((x['label'], x['predicted']) == (a,b) for x in rows)
        for b in names] for a in names]

def test_a_picture_of_the_matrix(three, tmp_path, here):
    r = here(three, 'revvit_test', '--data', 'three', '--weights', 'vit.pth', '--on-bad', 'skip', '--per-class',
             '--workers', 0, '--confusion', tmp_path/'m.png')
    assert r.returncode == 0 and min(Image.open(tmp_path/'m.png').size) > 300
    assert [o.split(': ')[0] for o in r.stdout.splitlines()[1:]] == narrow['vit'][2]
    assert r.stdout.splitlines()[0].endswith('8 files in three, 1 left out')

@pytest.mark.parametrize('words,said', [('--confusion m.txt', 'm.txt: the name must end in .png or .csv'),
    ('--predictions p.png', 'p.png: the name must end in .csv'),
    ('--predictions gone/p.csv', 'there is no folder gone'), ('--confusion noise.png', 'noise.png: there is such a '
        'file already'), ('--on-bad drop', '--on-bad must be raise or skip'),
    ('--crops 2', '--crops must be 1 (the middle), 3'), ('--on-bad raise --predictions p.csv', 'three/bee/1.png: not '
        'an image'), ('--crops x', 'invalid int value')])
def test_tests_that_cannot_be(words, said, three, here):
    "One sentence, no number, and nothing is written"
    before = sorted(o.name for o in three.iterdir())
    r = here(three, 'revvit_test', '--data', 'three', '--weights', 'vit.pth', '--workers', 0, *words.split())
    only_sentence(r, said)
    assert r.stdout == '' and sorted(o.name for o in three.iterdir()) == before

def test_no_file_can_be_read(zoo, here):
    for o in narrow['vit'][2]:
        (zoo/'spoilt'/o).mkdir(parents=True)
        (zoo/'spoilt'/o/'a.png').write_bytes(b'no image')
    only_sentence(here(zoo, 'revvit_test', '--data', 'spoilt', '--weights', 'vit.pth', '--on-bad', 'skip', '--workers',
                       0), 'none of the 3 files can be read: spoilt/ant/a.png: ')

def test_other_files_in_a_test_folder(three, here):
    "Counted in a sentence, as for predictions, and no line of Python"
    (three/'three'/'ant'/'notes.txt').write_text('x')
    r = here(three, 'revvit_test', '--data', 'three', '--weights', 'vit.pth', '--on-bad', 'skip', '--workers', 0)
    (three/'three'/'ant'/'notes.txt').unlink()
    assert r.returncode == 0 and r.stderr.startswith('revvit_test: three: 1 file is left out, ')
    assert r.stderr.count('\n') == 2

@pytest.mark.parametrize('views,crops', [(1,3), (2,3), (2,5)])
def test_views_and_crops_of_a_video(views, crops, zoo, tmp_path, here):
    "SlowFast's views times crops: the loss is that of the mean of their probabilities, by both commands"
    from revvit.data.views import ClipCrops
    m = load_model(zoo/'clip.pth').eval()
    x = ClipCrops(revvit.input_settings(m), views, crops)(zoo/'good.mp4')
    with torch.no_grad(): want = m(x).softmax(1).mean(0)
    assert len(x) == views*crops
    (tmp_path/'val.csv').write_text(f"{zoo/'good.mp4'} 1\n")
    words = ['--weights', zoo/'clip.pth', '--views', views, '--crops', crops, '--json', '--workers', 0]
    (o,) = json.loads(here(zoo, 'revvit_predict', 'good.mp4', *words).stdout)
    torch.testing.assert_close(torch.tensor(o['pred_scores']), want, rtol=0, atol=1e-5)
    assert math.isclose(json.loads(here(zoo, 'revvit_test', '--data', tmp_path, *words).stdout)['loss'],
                        -want[1].log().item(), rel_tol=1e-4)

# ---------------------------------------------------------------- one's own images and clips

@pytest.fixture
def photos(tmp_path):
    "Three classes of noise of three colours, an odd file among them"
    rng = np.random.default_rng(0)
    for c,name in enumerate(('red', 'green', 'blue')):
        (tmp_path/'photos'/name).mkdir(parents=True)
        for i in range(10):
            a = rng.integers(0, 120, (40,48,3), dtype=np.uint8)
            a[...,c] += 100
            Image.fromarray(a).save(tmp_path/'photos'/name/f'{i}.png')
    (tmp_path/'photos'/'red'/'notes.txt').write_text('odd')
    return tmp_path

@pytest.mark.filterwarnings('ignore:.*file is left out')
def test_photographs_without_a_recipe(photos, here):
    """One command: what was found, what was held out and how well it went; then longer, tested on what was held out,
    and begun from its own weights"""
    with pytest.warns(UserWarning, match='1 file is left out.*1 .txt'):
        r = here(photos, 'revvit_train', '--data', 'photos', '--out', 'run', '--epochs', 1, '--workers', 0)
    assert r.returncode == 0
    for o in ('photos holds 30 images: recipe fine_tune_images, from random weights', '6 of 30 images are held out',
              'of 6 held-out files', 'Now try: revvit_predict photos'): assert o in r.stdout, o
    cfg = json.loads((photos/'run/config.json').read_text(encoding='utf8'))
    assert (cfg['recipe'], cfg['model'], cfg['batch_size'], cfg['training items']) == ('fine_tune_images',
        'revvit_tiny_patch16_224', 3, 24)
    held = (photos/'run/held-out.csv').read_text(encoding='utf8').splitlines()
    assert len(held) == 6 and [o[-1] for o in held] == ['0','0','1','1','2','2']
    r = here(photos, 'revvit_train', '--data', 'photos', '--out', 'run', '--epochs', 2, '--workers', 0, '--resume')
    assert r.returncode == 0 and '1 epochs become 2' in r.stdout
    top1 = re.search(r'top-1 [\d.]+ %', r.stdout)[0]
    r = here(photos, 'revvit_test', '--data', 'run/held-out.csv', '--weights', 'run/checkpoint.pth', '--workers', 0)
    assert r.returncode == 0 and r.stdout.startswith(top1) and '6 files' in r.stdout
    for part,n in (('', 6), ('held-out', 6), ('all', 30)):
        words = ['--data', photos/'photos', '--weights', 'run/checkpoint.pth', '--workers', 0,
                 *(['--part', part] if part else [])]
        r = here(photos, 'revvit_test', *words, '--on-bad', 'skip')
        assert r.returncode == 0 and f'; {n} files in' in r.stdout and (n == 30 or r.stdout.startswith(top1)), (part, r)
        assert ('counted are the 6 files that the run in run held out' in r.stderr) == (n == 6)
    shutil.copytree(photos/'photos', photos/'moved')
    words = ['revvit_test', '--data', 'moved', '--weights', 'run/checkpoint.pth', '--workers', 0]
    r = here(photos, *words)   # a copy; notes.txt is skipped as in the run
    assert r.returncode == 0 and '; 6 files in' in r.stdout and r.stdout.startswith(top1)
    assert 'moved: counted are the 6 files that the run in run held out, by their names' in r.stderr
    (photos/'moved'/os.path.relpath(held[0].split()[0], photos/'photos')).unlink()
    r = here(photos, *words)
    assert r.returncode == 0 and '; 29 files in' in r.stdout
    assert 'moved: all files are counted, for this is not the folder that the run in run divided' in r.stderr
    (photos/'halved').mkdir()
    (photos/'moved').rename(photos/'halved/val')
    r = here(photos, 'revvit_test', '--data', 'halved', *words[3:])   # divided by its owner
    assert r.returncode == 0 and '; 29 files in' in r.stdout and 'are counted' not in r.stderr
    (photos/'elsewhere').mkdir()
    shutil.copy(photos/'run/checkpoint.pth', photos/'elsewhere')
    for args,said in ((['--part', 'held-out'], 'no held-out.csv beside the weights'),
                      (['--part', 'some'], "--part must be held-out or all, got 'some'")):
        only_sentence(here(photos, 'revvit_test', '--data', 'photos', '--weights', 'elsewhere/checkpoint.pth', *args),
                      said)
    r = here(photos, 'revvit_train', '--data', 'photos', '--weights', 'run/checkpoint.pth', '--img-size', 48,
             '--dry-run')
    assert r.returncode == 0 and 'resampled' in r.stdout and 'from 6x6 to 3x3' in r.stdout, r.stdout
    line = ['--weights', 'run/checkpoint.pth', '--freeze', 'backbone', '--layer-decay', .5, '--backbone-lr', 1e-4,
            '--accumulate', 2, '--epochs', 1, '--workers', 0]
    assert here(photos, 'revvit_train', '--data', 'photos', '--out', 'tuned', *line).returncode == 0
    a,b = (load_model(photos/o/'checkpoint.pth').state_dict() for o in ('run', 'tuned'))
    assert {k for k in a if not torch.equal(a[k], b[k])} == {'head.weight', 'head.bias'}

@pytest.mark.filterwarnings('ignore:.*file is left out')
def test_photographs_that_cannot_be_read(photos, here):
    "Left out, counted and named without a word from the user; an error on demand, which says how to go on"
    torn = photos/'photos/red/torn.png'
    torn.write_bytes((photos/'photos/red/1.png').read_bytes()[:200]), (photos/'photos/green/empty.png').touch()
    words = ['--data', 'photos', '--epochs', 1, '--workers', 0]
    with pytest.warns(UserWarning) as said: r = here(photos, 'revvit_train', *words, '--out', 'run')
    names = {Path(o.split()[0]).name for o in (photos/'run/held-out.csv').read_text().splitlines()}
    assert r.returncode == 0 and json.loads((photos/'run/config.json').read_text())['on_bad'] == 'skip'
    assert any('1 unreadable file is left out: photos/green/empty.png' in str(o.message) for o in said)
    if 'torn.png' in names: assert '(1 more cannot be read)' in r.stdout
    else: assert any('cannot be read and are left out: photos/red/torn.png' in str(o.message) for o in said)
    (photos/'photos/green/empty.png').unlink()
    only_sentence(here(photos, 'revvit_train', *words, '--on-bad', 'raise', '--out', 'other'),
                  'torn.png: the image cannot be read')
    words = ['--data', 'photos', '--part', 'all', '--weights', 'run/checkpoint.pth', '--workers', 0]
    r = here(photos, 'revvit_test', *words)   # as the run did
    assert r.returncode == 0 and '1 of 31 files cannot be read and are not counted' in r.stderr
    r = here(photos, 'revvit_test', *words, '--on-bad', 'raise')
    assert r.returncode == 2 and r.stderr.endswith('; --on-bad skip leaves out what cannot be read\n')

def test_steps_in_the_backward_pass(tmp_path, here):
    "The same weights, and config.json says how"
    words = ['--epochs', 1, '--batch-size', 512, '--clip', 0]
    for out,more in (('a', []), ('b', ['--step-in-backward'])):
        assert here(tmp_path, 'revvit_train', *words, *more, '--out', out).returncode == 0
    a,b = (load_model(tmp_path/o/'checkpoint.pth').state_dict() for o in 'ab')
    assert all(torch.equal(a[k], b[k]) for k in a)
    cfgs = [json.loads((tmp_path/o/'config.json').read_text(encoding='utf8')) for o in 'ab']
    assert [(o['clip'],o['step_in_backward']) for o in cfgs] == [(None,False),(None,True)]

def test_films_without_a_recipe(tmp_path, here):
    for name in ('left', 'right'):
        (tmp_path/'films'/name).mkdir(parents=True)
        for i in range(4): film(tmp_path/'films'/name/f'{i}.mp4', n=12+i)
    r = here(tmp_path, 'revvit_train', '--data', 'films', '--out', 'run', '--epochs', 1, '--workers', 0, '--img-size',
             32, '--frames', 4)
    assert r.returncode == 0 and 'films holds 8 videos: recipe fine_tune_clips' in r.stdout
    assert 'of 2 held-out files, 5 views each' in r.stdout
    assert json.loads((tmp_path/'run/config.json').read_text(encoding='utf8'))['image_cfg']['input_size'] == [3,4,32,32]

def test_a_recipe_to_edit(tmp_path, here):
    "Printed, edited, trained; and the config.json of that run is one too"
    r = here(tmp_path, 'revvit_train', '--print-recipe', '--epochs', 1, '--batch-size', 512)
    assert r.returncode == 0 and not [*tmp_path.iterdir()]
    (tmp_path/'mine.json').write_text(r.stdout.replace('"smoothing": 0.1', '"smoothing": 0.2'))
    assert here(tmp_path, 'revvit_train', '--recipe', 'mine.json').returncode == 0
    assert here(tmp_path, 'revvit_train', '--recipe', 'runs/mine/config.json').returncode == 0
    cfgs = [json.loads((tmp_path/'runs'/o/'config.json').read_text(encoding='utf8')) for o in ('mine', 'mine-2')]
    assert [(o['recipe'], o['smoothing'], o['batch_size']) for o in cfgs] == [('mine', .2, 512)]*2

@pytest.mark.parametrize('args,said', [(['--batch-size', 25], '24 training files are too few for a batch of 25: '
                                        '--batch-size 24 or less would work'),
    (['--model', 'resnet18'], '--model must be one of revmvit_base_224'), (['--img-size', 100], '--img-size must be a '
        'multiple of patch_size'), (['--frames', 8], '--frames is for clips'),
    (['--freeze', 7], '--freeze must be backbone or a number of blocks from 0 to 6'),
    (['--layer-decay', 2], '--layer-decay must be above 0 and at most 1'),
    (['--accumulate', 9], '--accumulate must be at most the 8 batches'),
    (['--clip', -1], '--clip must be a number above 0'),
    (['--step-in-backward'], '--step-in-backward does not go with --clip 1, the norm of all gradients at once'),
    (['--step-in-backward', '--clip', 0, '--accumulate', 2], '--step-in-backward does not go with --accumulate 2'),
    (['--backbone-lr', 0], '--backbone-lr must be a number above 0'),
    (['--recipe', 'no.json'], 'no.json: no such recipe file'),
    (['--weights', 'no.pth'], 'no.pth'), (['--recipe', 'digits'], 'brings its own data')], ids=str)
def test_own_data_refusals(args, said, photos, here):
    "One sentence, and no folder"
    (photos/'photos/red/notes.txt').unlink()
    only_sentence(here(photos, 'revvit_train', '--data', 'photos', '--workers', 0, '--out', 'run', *args), said)
    assert [o.name for o in photos.iterdir()] == ['photos']

def test_a_folder_of_both(photos, here):
    for i in range(9): (photos/'photos/blue'/f'{i}.mp4').touch()
    only_sentence(here(photos, 'revvit_train', '--data', 'photos'), 'holds 30 images and 9 videos, so it is not clear '
                  'what to train on: `revvit_train --data photos --recipe fine_tune_images`')
