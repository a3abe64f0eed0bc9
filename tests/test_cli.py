"What a notebook cannot show about the commands: the installed scripts, exit codes, Ctrl-C, folders that cannot be written"
import csv, json, os, shutil, signal, subprocess, sys, time
from pathlib import Path

import pytest
import torch
from PIL import Image
from revvit import cli
from revvit.checkpoints import load_model, read_checkpoint

def script(name):
    "The command as installed beside this Python"
    path = shutil.which(name, path=os.pathsep.join([str(Path(sys.executable).parent), os.environ.get('PATH', '')]))
    assert path, f'{name} is not installed: pip install -e .'
    return path

env = {**os.environ, 'OMP_NUM_THREADS': '1', 'CUDA_VISIBLE_DEVICES': ''}
def run(cwd, name, *args, **kwargs): return subprocess.run([script(name), *map(str, args)], cwd=cwd, env=env, capture_output=True, text=True, timeout=300, **kwargs)

@pytest.fixture
def here(monkeypatch, capfd):
    "The same, in this process: for the many cases where starting Python would take longer than the case"
    def _run(cwd, name, *args):
        monkeypatch.chdir(cwd)
        capfd.readouterr()
        code = getattr(cli, name)([str(o) for o in args])
        return subprocess.CompletedProcess(args, code, *capfd.readouterr())
    return _run

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
    assert sorted(o.name for o in out.iterdir()) == ['checkpoint.pth', 'config.json', 'digit_3.png', 'history.csv', 'history.png']
    assert Image.open(out/'history.png').size[0] > 600 and Image.open(out/'digit_3.png').size == (8, 8)
    assert [list(o) for o in csv.reader((out/'history.csv').open())][0] == ['epoch', 'train_loss', 'valid_loss', 'accuracy', 'time']
    config = json.loads((out/'config.json').read_text(encoding='utf8'))
    assert (config['epochs'], config['batch_size'], config['seed'], config['device']) == (1, 128, 0, 'cpu')
    text = (work/'train.out').read_text(encoding='utf8')
    for k in config: assert k in text
    assert '%' in text and 'epoch' in text # fastai's bar and table

def test_last_line_can_be_typed(work):
    "The closing line of the training is a command that works, from the same folder, in a shell"
    line = (work/'train.out').read_text(encoding='utf8').splitlines()[-1].split(': ', 1)[1]
    assert line == 'revvit_predict runs/digits/digit_3.png'
    r = subprocess.run(line.replace('revvit_predict', script('revvit_predict'), 1), shell=True, cwd=work, env=env, capture_output=True, text=True, timeout=300)
    assert (r.returncode, r.stderr) == (0, '') and r.stdout.startswith('runs/digits/digit_3.png: ') and r.stdout.count('%') == 3

def test_json_and_several_files(work, here):
    shutil.copy(work/'runs/digits/digit_3.png', work/'a name with spaces.png')
    r = here(work, 'revvit_predict', 'runs/digits/digit_3.png', 'a name with spaces.png', '--json', '--weights', 'runs/digits/checkpoint.pth')
    a,b = json.loads(r.stdout)
    assert r.stderr == '' and (a['file'], b['file']) == ('runs/digits/digit_3.png', 'a name with spaces.png')
    assert len(a['pred_scores']) == 10 and abs(sum(a['pred_scores'])-1) < 1e-5 and a['pred_scores'] == b['pred_scores']
    assert a['pred_score'] == max(a['pred_scores']) == a['pred_scores'][a['pred_label']] and a['pred_class'] == str(a['pred_label'])

def test_help(tmp_path):
    r = run(tmp_path, 'revvit_train', '--help')
    assert (r.returncode, r.stderr) == (0, '') and 'default' in r.stdout
    for o in 'recipe out epochs batch-size lr workers seed amp weights'.split(): assert f'--{o} ' in r.stdout

@pytest.mark.parametrize('name,args,said', [('revvit_train', ['--epochs', '-3'], 'epochs must be a whole number above 0, got -3'), ('revvit_predict', ['no.png'], 'no checkpoint.pth under runs/')])
def test_installed_commands_refuse(name, args, said, tmp_path):
    "The installed commands do what the functions below do; importing everything else prints nothing"
    only_sentence(run(tmp_path, name, *args), said)

@pytest.mark.parametrize('args,said', [
    (['--recipe', 'imagenet'], "there is no recipe 'imagenet'; there is: digits"), (['--epochs', '-3'], 'epochs must be a whole number above 0, got -3'),
    (['--epochs', 'many'], "invalid int value: 'many'"), (['--batch-size', '0'], 'batch_size must be a whole number above 0'), (['--batch_size', '1000000'], '1437 training images'),
    (['--lr', 'nan'], 'lr must be a number above 0'), (['--workers', '-1'], 'workers must be 0 or more'), pytest.param(['--amp', 'fp16'], 'needs a CUDA device', marks=pytest.mark.skipif(torch.cuda.is_available(), reason='there is a CUDA device')), (['--colour', 'red'], 'unrecognized arguments'),
    (['--weights', 'missing.pth'], 'missing.pth'), (['--weights', 'noise.pth'], 'noise.pth'), (['--out', 'noise.pth/run'], 'noise.pth'), (['--out', '.'], 'not empty')], ids=' '.join)
def test_train_refuses(args, said, tmp_path, here):
    "Bad input is one sentence, exit code 2, and leaves no trace"
    (tmp_path/'noise.pth').write_bytes(b'no weights at all')
    only_sentence(here(tmp_path, 'revvit_train', *args), said)
    assert [o.name for o in tmp_path.iterdir()] == ['noise.pth']

def test_seed_must_be_a_seed(tmp_path, here): only_sentence(here(tmp_path, 'revvit_train', '--seed', '-1'), 'seed must be from 0 to')

def test_train_refuses_weights_of_another_model(work, tmp_path, here):
    "A checkpoint that is fine but belongs to something else is named, with what differs"
    other = load_model(work/'runs/digits/checkpoint.pth')
    torch.save({k: v for k,v in other.state_dict().items() if 'blocks.3' not in k}, tmp_path/'three.pth')
    only_sentence(here(tmp_path, 'revvit_train', '--weights', 'three.pth'), 'three.pth does not fit')
    assert not (tmp_path/'runs').exists()

@pytest.mark.parametrize('data,said', [(b'', 'empty'), (b'\x89PNG\r\n\x1a\n', 'image'), (b'<html>', 'not an image'), (None, 'no such image file')], ids=['empty', 'cut', 'html', 'missing'])
def test_predict_refuses_pictures(data, said, work, here):
    "R35: the sentence names the file, and the good picture beside it is still answered"
    if data is not None: (work/'bad.png').write_bytes(data)
    else: (work/'bad.png').unlink(missing_ok=True)
    r = here(work, 'revvit_predict', 'bad.png', 'runs/digits/digit_3.png')
    only_sentence(r, said)
    assert 'bad.png: ' in r.stderr and r.stdout.startswith('runs/digits/digit_3.png: ')

@pytest.mark.parametrize('args,said', [([], 'required: FILE'), (['d.png', '--weights', 'no.pth'], 'no.pth'), (['d.png', '--weights', 'd.png'], 'd.png'),
    (['d.png', '--weights', '.'], 'cannot read .'), (['d.png'], 'no checkpoint.pth under runs/'), (['d.png', '--top', '0'], 'top must be 1 or more')], ids=' '.join)
def test_predict_refuses(args, said, work, tmp_path, here):
    shutil.copy(work/'runs/digits/digit_3.png', tmp_path/'d.png')
    only_sentence(here(tmp_path, 'revvit_predict', *args), said)

def test_damaged_checkpoint_is_refused(work, tmp_path, here):
    "R30: one flipped bit"
    data = bytearray((work/'runs/digits/checkpoint.pth').read_bytes())
    data[len(data)//2] ^= 4
    (tmp_path/'flipped.pth').write_bytes(data)
    only_sentence(here(tmp_path, 'revvit_predict', work/'runs/digits/digit_3.png', '--weights', 'flipped.pth'), 'flipped.pth')

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

def test_full_disk(tmp_path):
    "A file that may not grow beyond 8 kB stands for a full disk: the run ends with a sentence that names the checkpoint"
    resource = pytest.importorskip('resource')
    def limit():
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (8192, 8192))
    r = run(tmp_path, 'revvit_train', '--epochs', 1, '--batch-size', 512, preexec_fn=limit)
    only_sentence(r, 'checkpoint.pth')
    assert sorted(o.name for o in (tmp_path/'runs/digits').iterdir()) == ['config.json', 'history.csv']

@pytest.mark.skipif(not hasattr(os, 'killpg'), reason='needs process groups')
@pytest.mark.parametrize('workers', [0, 2])
def test_ctrl_c(workers, tmp_path):
    "As from a terminal, to the whole process group, after the first checkpoint: exit code 130, one sentence, the checkpoint whole, no process left"
    p = subprocess.Popen([script('revvit_train'), '--epochs', '500', '--workers', str(workers)], cwd=tmp_path, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True)
    ckpt,end = tmp_path/'runs/digits/checkpoint.pth',time.monotonic()+240
    while not ckpt.exists() and p.poll() is None and time.monotonic() < end: time.sleep(.05)
    assert ckpt.exists(), p.communicate()[1]
    time.sleep(.3)
    os.killpg(p.pid, signal.SIGINT)
    out,err = p.communicate(timeout=60)
    assert p.returncode == 130 and err.count('\n') == 1 and err.startswith('revvit_train: stopped in epoch ') and 'checkpoint.pth holds the model after epoch' in err, (p.returncode, err)
    assert read_checkpoint(ckpt)['class_names'] == [str(o) for o in range(10)] and load_model(ckpt).num_classes == 10
    assert not list(ckpt.parent.glob('.*.tmp'))
    end = time.monotonic()+30
    while time.monotonic() < end:
        try: os.killpg(p.pid, 0)
        except ProcessLookupError: break
        time.sleep(.1)
    else: pytest.fail('a process of the run is still there')

def test_ctrl_c_before_the_first_epoch_ends(tmp_path):
    p = subprocess.Popen([script('revvit_train'), '--batch-size', '1'], cwd=tmp_path, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    log,end = tmp_path/'runs/digits/history.csv',time.monotonic()+240
    while not log.exists() and p.poll() is None and time.monotonic() < end: time.sleep(.05)
    p.send_signal(signal.SIGINT)
    _,err = p.communicate(timeout=60)
    assert (p.returncode, err) == (130, 'revvit_train: stopped in epoch 0; no epoch was finished, so there is no checkpoint\n')

def test_spoilt_training_stops(work, tmp_path, here):
    "R26 through the command: weights that are not finite end the run with exit code 1 and one sentence, before anything is saved"
    m = load_model(work/'runs/digits/checkpoint.pth')
    with torch.no_grad(): m.head.bias[3] = float('nan')
    torch.save(m.state_dict(), tmp_path/'nan.pth')
    r = here(tmp_path, 'revvit_train', '--weights', 'nan.pth')
    assert r.returncode == 1 and r.stderr.count('\n') == 1 and r.stderr.startswith('revvit_train: step 1 (epoch 0): parameter head.bias is not finite'), r.stderr
    assert not (tmp_path/'runs/digits/checkpoint.pth').exists()

def test_importing_revvit_is_light(tmp_path):
    "fastai, matplotlib and scikit-learn are loaded by those who train, not by those who only want a model"
    code = "import sys, revvit, revvit.cli; print([o for o in ('fastai', 'matplotlib', 'sklearn', 'pandas') if o in sys.modules])"
    r = subprocess.run([sys.executable, '-W', 'ignore', '-c', code], cwd=tmp_path, env=env, capture_output=True, text=True, timeout=300)
    assert r.stdout == '[]\n', r.stdout + r.stderr
