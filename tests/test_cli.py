"What a notebook cannot show about the commands: the installed scripts, exit codes, Ctrl-C, folders that cannot be written"
import csv, json, math, os, re, shutil, signal, subprocess, sys, time
from pathlib import Path

import av
import numpy as np
import pytest
import timm
import torch
from PIL import Image
from revvit import cli
from revvit.checkpoints import load_model, read_checkpoint, save_checkpoint
from revvit.images import ImageTransform, digits, hold_out
from revvit.inference import _recognise
from revvit.videos import ClipTransform

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
    assert sorted(o.name for o in out.iterdir()) == ['checkpoint.pth', 'config.json', 'digit_3.png', 'history.csv', 'history.png', 'state-1.pth']
    assert Image.open(out/'history.png').size[0] > 600 and Image.open(out/'digit_3.png').size == (8, 8)
    assert [list(o) for o in csv.reader((out/'history.csv').open())][0] == ['epoch', 'train_loss', 'valid_loss', 'accuracy', 'time']
    config = json.loads((out/'config.json').read_text(encoding='utf8'))
    assert (config['epochs'], config['batch_size'], config['seed'], config['device']) == (1, 128, 0, 'cpu')
    text = (work/'train.out').read_text(encoding='utf8')
    for k in config: assert k in text
    assert 'epoch 0, train_loss ' in text and '\r' not in text

def test_last_line_can_be_typed(work):
    "The closing line of the training is a command that works, from the same folder, in a shell"
    line = (work/'train.out').read_text(encoding='utf8').splitlines()[-1].split(': ', 1)[1]
    assert line == 'revvit_predict runs/digits/digit_3.png'
    r = subprocess.run(line.replace('revvit_predict', script('revvit_predict'), 1), shell=True, cwd=work, env=env, capture_output=True, text=True, timeout=300)
    assert (r.returncode, r.stderr) == (0, '') and r.stdout.startswith('runs/digits/digit_3.png: ') and r.stdout.count('%') == 5

def test_json_and_several_files(work, here):
    shutil.copy(work/'runs/digits/digit_3.png', work/'a name with spaces.png')
    r = here(work, 'revvit_predict', 'runs/digits/digit_3.png', 'a name with spaces.png', '--json', '--weights', 'runs/digits/checkpoint.pth')
    a,b = json.loads(r.stdout)
    assert r.stderr == '' and (a['file'], b['file']) == ('runs/digits/digit_3.png', 'a name with spaces.png')
    assert len(a['pred_scores']) == 10 and abs(sum(a['pred_scores'])-1) < 1e-5 and a['pred_scores'] == b['pred_scores']
    assert a['pred_score'] == max(a['pred_scores']) == a['pred_scores'][a['pred_label']] and a['pred_class'] == str(a['pred_label'])

@pytest.mark.parametrize('name,flags', [('revvit_train', 'recipe out epochs batch-size lr workers seed amp weights resume save-steps save-minutes'), ('revvit_predict', 'weights model top views classes features device json'),
    ('revvit_test', 'data weights model batch-size workers views classes device json')])
def test_help(name, flags, capfd):
    with pytest.raises(SystemExit) as e: getattr(cli, name)(['--help'])
    out,err = capfd.readouterr()
    assert (e.value.code, err) == (0, '') and 'default' in out
    for o in flags.split(): assert re.search(f'--{o}[ \\n]', out), o

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

# Prediction with other models than the digits' one, and on videos

reference = Path(__file__).parent/'reference'
narrow = dict( # timm's name, arguments, class names
    vit=('revvit_tiny_patch16_224', dict(img_size=32, patch_size=8, embed_dim=24, num_heads=2, depth=2), ['ant', 'bee', 'cat']),
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
    x = ClipTransform(m.pretrained_cfg, views)(path) if len(m.pretrained_cfg['input_size']) == 4 else ImageTransform(m.pretrained_cfg)(path)[None]
    with torch.no_grad(): return m(x).softmax(1).mean(0), m.forward_head(m.forward_features(x), pre_logits=True).mean(0)

def test_video_in_class_names_out(zoo):
    "The installed command names what is in videos, with the probabilities of 5 views averaged; of sound alone it says so"
    r = run(zoo, 'revvit_predict', 'good.mp4', 'audio.mp4', 'with sound.mp4', '--weights', 'clip.pth')
    only_sentence(r, 'audio.mp4: there is sound in it but no video')
    for line,file in zip(r.stdout.splitlines(), ('good.mp4', 'with sound.mp4'), strict=True):
        best = sorted(zip(scores(zoo/file, zoo/'clip.pth')[0].tolist(), narrow['clip'][2]), reverse=True)
        assert line == f"{file}: {', '.join(f'{n} ({100*p:.1f} %)' for p,n in best)}"

@pytest.mark.parametrize('kind,file,args', [('vit', 'noise.png', []), ('mvit', 'noise.png', []), ('clip', 'good.mp4', []), ('clip', 'good.mp4', ['--views', 1])], ids=str)
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

@pytest.mark.parametrize('file,said', [('audio.mp4', 'sound in it but no video'), ('cut.mp4', 'truncated'), ('half.mp4', 'truncated'), ('one.mp4', 'a video of 1 frame'), ('missing.mp4', 'no such video file'), ('empty.mp4', 'empty (0 bytes)'),
    ('text.mp4', 'not a video'), ('noise.png', 'an image, but the model takes clips of 4 frames')])
def test_predict_refuses_videos(file, said, zoo, here):
    "R36: one sentence that begins with the file, exit code 2, and the good video beside it is answered"
    r = here(zoo, 'revvit_predict', file, 'good.mp4', '--weights', 'clip.pth')
    only_sentence(r, said)
    assert r.stderr.startswith(f'revvit_predict: {file}: ') and r.stdout.startswith('good.mp4: ') and r.stdout.count('\n') == 1

def test_published_weights_that_cannot_be_fetched(work, tmp_path, here, monkeypatch):
    "A name alone means the published weights; without network (here: a proxy that is not there), the sentence says where they are"
    monkeypatch.setenv('TORCH_HOME', str(tmp_path))
    for o in ('http_proxy', 'https_proxy'): monkeypatch.setenv(o, 'http://127.0.0.1:9')
    r = here(work, 'revvit_predict', 'runs/digits/digit_3.png', '--model', 'REV_VIT_S')
    assert r.returncode == 2 and r.stdout == '' and r.stderr.splitlines()[-1].startswith('revvit_predict: the weights of revvit_small_patch16_224.fb_in1k could not be had from https://dl.fbaipublicfiles.com/')

@pytest.mark.parametrize('file,name', [('REV_VIT_S', 'revvit_small_patch16_224'), ('mmpretrain_revvit_small', 'revvit_small_patch16_224'), ('REV_MVIT_B_16_CONV', 'revmvit_base_224'), ('REV_MVIT_B_16x4_CONV', 'revmvit_base_16x4_224')])
def test_published_files_tell_their_model(file, name):
    "The shapes in each published layout fit one model of ours; no numbers needed"
    tensors = {k: torch.empty(v, device='meta') for k,v in json.loads((reference/f'{file}.json').read_text(encoding='utf8'))['tensors'].items()}
    assert _recognise('x.pth', dict(model_state=tensors)) == (name, 400 if '16x4' in file else 1000)

def test_published_file_without_a_name(zoo, tmp_path, here):
    "A full-size file in mmpretrain's layout, with random numbers: recognised, and its classes are ImageNet's"
    g = torch.Generator().manual_seed(0)
    shapes = json.loads((reference/'mmpretrain_revvit_small.json').read_text(encoding='utf8'))['tensors']
    torch.save(dict(state_dict={k: torch.randn(v, generator=g)*.05 for k,v in shapes.items()}), tmp_path/'small.pth')
    r = here(zoo, 'revvit_predict', 'noise.png', '--json', '--weights', tmp_path/'small.pth')
    assert (r.returncode, r.stderr) == (0, '')
    a, = json.loads(r.stdout)
    assert len(a['pred_scores']) == 1000 and a['pred_class'] == timm.data.ImageNetInfo().index_to_description(a['pred_label'])

def test_features_on_a_full_disk(work, tmp_path):
    "A file that may not grow beyond 100 bytes stands for a full disk: a sentence that names the archive, and the old one as it was"
    resource = pytest.importorskip('resource')
    (tmp_path/'f.npz').write_bytes(b'old')
    def limit():
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (100, 100))
    only_sentence(run(work, 'revvit_predict', 'runs/digits/digit_3.png', '--features', tmp_path/'f.npz', preexec_fn=limit), 'f.npz: ')
    assert [(o.name, o.read_bytes()) for o in tmp_path.iterdir()] == [('f.npz', b'old')]

@pytest.fixture(scope='module')
def folder(tmp_path_factory):
    "The 360 test digits as PNG files in class folders, under val"
    path,(images,labels) = tmp_path_factory.mktemp('folder'),digits()
    for c in range(10): (path/'val'/str(c)).mkdir(parents=True)
    for i in hold_out(labels, 36)[1]: Image.fromarray(images[i]).save(path/'val'/str(labels[i])/f'{i}.png')
    return path

def test_accuracy_of_a_folder(work, folder):
    "The installed command's numbers are those counted by hand, and those of the training's last line"
    m = load_model(work/'runs/digits/checkpoint.pth')
    paths = sorted((folder/'val').rglob('*.png'))
    y = torch.tensor([int(o.parent.name) for o in paths])
    with torch.no_grad(): z = m(torch.stack([ImageTransform(m.pretrained_cfg)(o) for o in paths]))
    rank = (z > z.gather(1, y[:,None])).sum(1)
    r = run(work, 'revvit_test', '--data', folder, '--workers', 1, '--json')
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
    assert r.stdout == first.stdout and re.fullmatch(r'top-1 [\d.]+ %, top-5 [\d.]+ %, loss [\d.]+; 360 files in .*\n', r.stdout)

def test_accuracy_on_videos(zoo, tmp_path, here):
    "Class folders of videos, for a model of clips, matched by the class names in the file; and the publisher's list of them"
    for o in ('left', 'right', 'up'):
        (tmp_path/o).mkdir()
        shutil.copy(zoo/'good.mp4', tmp_path/o/'a.mp4')
    r = here(zoo, 'revvit_test', '--data', tmp_path, '--weights', 'clip.pth', '--workers', 0, '--views', 2, '--json')
    res,p = json.loads(r.stdout),scores(zoo/'good.mp4', zoo/'clip.pth', 2)[0]
    assert (r.returncode, res['n'], res['top1'], res['top5']) == (0, 3, 1/3, 1.) and math.isclose(res['loss'], -p.log().mean().item(), rel_tol=1e-4)
    (tmp_path/'val.csv').write_text('left/a.mp4 0\nright/a.mp4 1\nup/a.mp4 2\n', encoding='utf8')
    r = here(zoo, 'revvit_test', '--data', tmp_path/'val.csv', '--weights', 'clip.pth', '--workers', 0, '--views', 2, '--json')
    assert r.returncode == 0 and {**json.loads(r.stdout), 'data': ''} == {**res, 'data': ''}

@pytest.mark.parametrize('change,said', [('bad image', 'bad.png: not an image'), ('strange', '1 of 11 class folders is no class of the model: ten'), ('empty', '0'), ('missing', 'no such folder')])
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
def test_bar_on_a_terminal(work, folder):
    "The error stream of a terminal shows a bar; the result stays alone on the standard output"
    import fcntl, pty, struct, termios
    ours,theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack('HHHH', 24, 80, 0, 0)) # a new one has no columns
    p = subprocess.Popen([script('revvit_test'), '--data', str(folder), '--workers', '0'], cwd=work, env=env, stdout=subprocess.PIPE, stderr=theirs, text=True)
    os.close(theirs)
    said = b''
    try:
        while part := os.read(ours, 4096): said += part # as it comes, or the command would wait for us
    except OSError: pass # the end of a terminal, on Linux
    os.close(ours)
    out = p.communicate(timeout=300)[0]
    assert p.returncode == 0 and b'0/12' in said and out.startswith('top-1 ') and out.count('\n') == 1

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
    cfg,end = tmp_path/'runs/digits/config.json',time.monotonic()+240
    while not cfg.exists() and p.poll() is None and time.monotonic() < end: time.sleep(.05)
    time.sleep(1) # of the many seconds that an epoch of one image a step takes
    p.send_signal(signal.SIGINT)
    _,err = p.communicate(timeout=60)
    assert (p.returncode, err) == (130, 'revvit_train: stopped in epoch 0; no epoch was finished, so there is no checkpoint; the same command with --resume begins again\n')

@pytest.mark.skipif(not Path('/proc/self/task').exists(), reason='needs /proc')
def test_R39_a_killed_reader_ends_the_run(tmp_path):
    "Exit code 1, one sentence, within 30 s; and the same command with --resume gets through"
    words = ['--epochs', '12', '--batch-size', '64', '--workers', '2', '--out', 'run', '--resume']
    p = subprocess.Popen([script('revvit_train'), *words], cwd=tmp_path, env=env, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, start_new_session=True)
    ckpt,kids,end = tmp_path/'run/checkpoint.pth',Path(f'/proc/{p.pid}/task/{p.pid}/children'),time.monotonic()+240
    while not ckpt.exists() and p.poll() is None and time.monotonic() < end: time.sleep(.02)
    while not kids.read_text() and p.poll() is None and time.monotonic() < end: time.sleep(.002)
    time.sleep(.1) # into the epoch
    os.kill(int(kids.read_text().split()[0]), signal.SIGKILL)
    _,err = p.communicate(timeout=30)
    assert p.returncode == 1 and err.count('\n') == 1 and 'a process that reads data was killed' in err and 'with --resume goes on' in err, err
    r = run(tmp_path, 'revvit_train', *words)
    assert r.returncode == 0 and [o.split(',')[0] for o in (tmp_path/'run/history.csv').read_text().split()] == ['epoch', *map(str, range(12))], r.stderr

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
