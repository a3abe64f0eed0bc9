"""Folders and files as people have them, and a run on data that changed since: nothing is learned under a wrong label,
and nothing goes on as if it were the same. Each case here once went wrong without a word, or with a traceback."""
import csv, json, os, shutil, warnings
from dataclasses import replace
from pathlib import Path

import numpy as np, pytest, timm, torch
from PIL import Image
from fastai.vision.all import ClassificationInterpretation
import revvit
from revvit.data.class_folders import folder_files, kind_of_data, part_folders
from revvit.data.images import image_dls
from revvit.data.loader import EpochDL, UnreadableFile
from revvit.training.learner import learner
from revvit.training.own_data import recipe_text
from revvit.training.recipes import recipes
from revvit.training.resume import keep_state
from revvit.use.cli import revvit_predict, revvit_test, revvit_train
from revvit.use.choices import fit_to_weights, start_from
from revvit.use.inference import name_classes

pytestmark = pytest.mark.filterwarnings('ignore')
small = replace(recipes['fine_tune_images'], model='revvit_tiny_patch16_224', epochs=2, warmup_epochs=0, batch_size=4,
    model_args=dict(embed_dim=16, num_heads=2, depth=2), lr=1e-3, layer_decay=None,
    image_cfg={**recipes['fine_tune_images'].image_cfg, 'input_size': (3,32,32)})

def picture(path, red=0):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.full((32,32,3), (red,80,120), np.uint8)).save(path)

def photos(root, names=('cat','dog'), n=6):
    "Class folders below `root`, one colour a class"
    for c,name in enumerate(names):
        for i in range(n): picture(root/name/f'{i}.png', 60*c+i)
    return root

@pytest.fixture
def here(tmp_path, monkeypatch):
    "A folder to work in, with a recipe for a tiny network"
    monkeypatch.chdir(tmp_path)
    (tmp_path/'tiny.json').write_text(recipe_text(small))
    return tmp_path

def said(capfd, code, command, *words):
    "What a command writes, which ends as expected"
    capfd.readouterr()
    got = command([str(o) for o in words])
    out,err = capfd.readouterr()
    assert got==code and 'Traceback' not in err, (got, out, err)
    return out,err

def train(capfd, *words, code=0, recipe='tiny.json'):
    return said(capfd, code, revvit_train, '--recipe', recipe, '--workers', 0, *words)

# --- which folder is what

@pytest.mark.parametrize('names', [('Train','Val'), ('training','validation'), ('Training','Testing'), ('TRAIN','TEST'),
                                   ('train','Valid')], ids='-'.join)
def test_parts_by_other_names(names, tmp_path):
    for o in names: photos(tmp_path/o)
    for o in names: picture(tmp_path/o/'cat'/f'{o}.png')   # no two files alike
    train,held,vocab = folder_files(tmp_path)
    assert vocab==['cat','dog'] and [o.name for o in part_folders(tmp_path)]==[*names]
    assert all(names[0] in Path(o).parts for o in train) and all(names[1] in Path(o).parts for o in held)

@pytest.mark.parametrize('word', ['train','test','Training'])
def test_a_class_that_is_called_as_a_part(word, tmp_path):
    vocab = folder_files(photos(tmp_path, ('bus',word,'tram')))[2]
    assert sorted(vocab)==sorted(['bus',word,'tram']) and part_folders(tmp_path) is None

@pytest.mark.parametrize('word,lack', [('train','val'), ('val','train')])
def test_one_part_without_the_other(word, lack, tmp_path):
    photos(tmp_path/word)
    with pytest.raises(FileNotFoundError) as e: folder_files(tmp_path)
    assert str(e.value)==(f"{tmp_path}: there is a folder {word!r} but no {lack!r}. If it is a class, rename it; if "
                          f"it is all there is, give {tmp_path/word} as the data, and a fifth of it is held out")

def test_one_level_too_high(tmp_path):
    photos(tmp_path/'photos')
    with pytest.raises(ValueError) as e: folder_files(tmp_path)
    assert str(e.value)==(f"{tmp_path}: 'photos' is the only class, and there is nothing to tell it from; "
                          f"did you mean {tmp_path/'photos'}, which holds the folders 'cat', 'dog'?")

@pytest.mark.parametrize('parts', [False, True], ids=['undivided','divided'])
def test_one_class_alone(parts, tmp_path):
    for o in ('train','val') if parts else '.': photos(tmp_path/o, ('cat',))
    with pytest.raises(ValueError, match="'cat' is the only class, and there is nothing to tell it from$"):
        folder_files(tmp_path)

def test_two_levels_of_classes_are_said(tmp_path):
    for o in ('camera 1','camera 2'): photos(tmp_path/o)
    with pytest.warns(UserWarning) as heard: vocab = folder_files(tmp_path)[2]
    assert vocab==['camera 1','camera 2']
    assert [str(o.message) for o in heard]==[f"{tmp_path}: the classes are 'camera 1', 'camera 2', and each of these "
        "folders holds 'cat', 'dog' and no images beside them: if those are the classes, bring them together directly "
        f"below {tmp_path}"]

def test_folders_within_classes_that_differ_are_nothing_new(tmp_path):
    for o in ('cat/2020','cat/2021','dog/2020'): photos(tmp_path, (o,))
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        assert folder_files(tmp_path)[2]==['cat','dog']

@pytest.mark.parametrize('name', ['@eaDir','$RECYCLE.BIN','$Recycle.Bin','@Recycle','lost+found','__MACOSX',
                                  'System Volume Information'])
def test_folders_of_systems_are_no_classes(name, tmp_path):
    photos(tmp_path, ('cat','dog',name))
    assert folder_files(tmp_path)[2]==['cat','dog']

def test_the_classes_are_said_and_written(here, capfd):
    out,_ = train(capfd, '--data', photos(here/'photos', ('cat','dog','emu','gnu')), '--out', 'run', '--epochs', 1)
    assert f"{here/'photos'}: 4 classes, 'cat', 'dog', 'emu' and 1 more; without a folder for each part" in out
    assert json.loads((here/'run'/'config.json').read_text())['classes']=="4: 'cat', 'dog', 'emu' and 1 more"

@pytest.mark.parametrize('allow', [False, True])
def test_one_file_in_two_classes(allow, tmp_path):
    photos(tmp_path)
    os.link(tmp_path/'cat'/'0.png', tmp_path/'dog'/'same.png')
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        with pytest.raises((ValueError,UserWarning)) as e: folder_files(tmp_path, allow_shared=allow)
    assert 'are one and the same file, in two classes' in str(e.value) and ('allow_shared' in str(e.value))!=allow

# --- files that cannot be read, and names

@pytest.mark.parametrize('workers', [0,1])
def test_nothing_that_can_be_read_is_no_epoch(workers, tmp_path):
    for o in photos(tmp_path).rglob('*.png'): o.write_bytes(b'<html>404</html>')
    dls = image_dls(tmp_path, small.image_cfg, bs=4, workers=workers, on_bad='skip', device='cpu')
    with pytest.raises(ValueError, match=r"no item could be read: .*\.png, .*, \.\.\.$"):
        list(dls.train)

def test_a_command_stops_where_nothing_can_be_read(here, capfd):
    for o in photos(here/'photos').rglob('*.png'): o.write_bytes(b'<html>404</html>')
    _,err = train(capfd, '--data', 'photos', '--out', 'run', '--on-bad', 'skip', code=2)
    assert err.splitlines()[-1].startswith("revvit_train: no item could be read: photos/")
    assert '--on-bad' not in err.splitlines()[-1] and not (here/'run'/'checkpoint.pth').exists()

def test_the_last_words_name_a_file_that_can_be_read(here, capfd):
    photos(here/'photos')
    held = sorted(folder_files('photos')[1])
    Path(held[0]).write_bytes(b'torn')
    out,_ = train(capfd, '--data', 'photos', '--out', 'run', '--on-bad', 'skip')
    assert f"revvit_predict {held[1]} " in out.splitlines()[-1]+' '

def test_a_test_skips_what_its_run_skipped(here, capfd):
    photos(here/'photos')
    Path(sorted(folder_files('photos')[1])[0]).write_bytes(b'torn')
    train(capfd, '--data', 'photos', '--on-bad', 'skip')
    out,err = said(capfd, 0, revvit_test, '--data', 'photos', '--workers', 0)
    assert '1 files in photos, 1 left out' in out and '1 of 2 files cannot be read' in err

def test_names_that_are_no_utf8(here, capfd):
    "As an old disk has them"
    try: photos(here/'photos', ('cat', STRANGE:=os.fsdecode(b'caf\xe9')))
    except (UnicodeError,OSError): pytest.skip('this system has no such names')
    for i in range(2): os.rename(here/'photos'/'cat'/f'{i}.png', here/'photos'/'cat'/f'{STRANGE}{i}.png')
    out,_ = train(capfd, '--data', 'photos', '--out', 'run')
    assert "'caf\\udce9'" in out
    said(capfd, 0, revvit_test, '--data', 'photos', '--weights', 'run/checkpoint.pth', '--predictions', 'p.csv',
         '--confusion', 'c.png', '--per-class', '--workers', 0)
    out,_ = said(capfd, 0, revvit_predict, *(here/'photos'/'cat').iterdir(), '--weights', 'run', '--features', 'f.npz',
                 '--workers', 0)
    assert len(out.splitlines())==6 and len(np.load('f.npz'))==6

def test_a_list_of_names_begins_with_a_mark(tmp_path):
    "Windows' editors write one"
    model = timm.create_model('revvit_tiny_patch16_224', depth=1, num_classes=2)
    path = tmp_path/'names.txt'
    path.write_text('cat\ndog\n', 'utf-8-sig')
    name_classes(model, path)
    assert model.pretrained_cfg['label_names']==['cat','dog']


# --- weights by name

@pytest.mark.parametrize('name,why', [('resnet18', "for images, got 'resnet18'"),
    ('revmvit_base_16x4_224.fb_k400', "for images, got 'revmvit_base_16x4_224'"), ('photo', "no model 'photo'")])
def test_published_weights_of_another_model(name, why, monkeypatch):
    monkeypatch.setattr('revvit.use.inference._fetch', lambda name: pytest.fail(f'fetches {name}'))
    with pytest.raises(ValueError, match=why): fit_to_weights(recipes['fine_tune_images'], Path(name))

@pytest.mark.parametrize('name', ['resnet18','revvit_small_patch16_224.fb_in1k'])
def test_published_weights_are_not_fetched_in_vain(name, monkeypatch):
    monkeypatch.setattr('revvit.use.inference._fetch', lambda name: pytest.fail(f'fetches {name}'))
    model = timm.create_model('revvit_tiny_patch16_224', depth=1)
    with pytest.raises(ValueError, match=f"{name} is for a {name.split('.')[0]}, and the model is a revvit_tiny_patch"):
        start_from(model, Path(name))

# --- going on with a run

def changed(folder, how):
    if how=='one more': picture(folder/'train'/'cat'/'new.png')
    if how=='one less': (folder/'train'/'cat'/'0.png').unlink()
    if how=='renamed': os.rename(folder/'train'/'cat'/'0.png', folder/'train'/'cat'/'z.png')
    if how=='another label': os.rename(folder/'train'/'cat'/'0.png', folder/'train'/'dog'/'00.png')
    if how=='held out': (folder/'val'/'cat'/'1.png').unlink()

def divided(root):
    for part in ('train','val'): photos(root/part)
    return root

@pytest.mark.parametrize('longer', [False, True], ids=['as planned','longer'])
@pytest.mark.parametrize('how', ['one more','one less','renamed','another label','held out'])
def test_a_run_does_not_go_on_with_other_data(how, longer, here, capfd):
    train(capfd, '--data', divided(here/'photos'), '--out', 'run', '--save-steps', 1)
    before = {o.name: o.read_bytes() for o in (here/'run').iterdir()}
    changed(here/'photos', how)
    _,err = train(capfd, '--data', 'photos', '--out', 'run', '--resume', *(['--epochs', 3] if longer else []), code=2)
    n,held = 12+{'one more': 1, 'one less': -1}.get(how, 0),12-(how=='held out')
    now = f"{n} training files and {held} held out"
    if (n,held)==(12,12): now = "as many, but with other names or labels"
    assert f"belongs to a run on 12 training files and 12 held out; now there are {now}. Put the data back (" in err
    assert {o.name: o.read_bytes() for o in (here/'run').iterdir()}==before

def weights_of(run):
    return torch.load(run/'checkpoint.pth', weights_only=True)['state_dict']

@pytest.mark.parametrize('way', ['moved','from within','absolute'])
def test_a_run_goes_on_with_a_copy_of_its_data(way, here, capfd, monkeypatch):
    "And comes to the weights of a run whose data stayed where they were"
    photos(here/'photos')
    for o in ('stayed','run'): train(capfd, '--data', 'photos', '--out', o)
    train(capfd, '--data', 'photos', '--out', 'stayed', '--resume', '--epochs', 3)
    if way=='moved': shutil.move(here/'photos', here/'elsewhere')
    if way=='from within': monkeypatch.chdir(here/'photos')
    given = {'moved': 'elsewhere', 'from within': '.', 'absolute': here/'photos'}[way]
    out,_ = train(capfd, '--data', given, '--out', here/'run', '--resume', '--epochs', 3, recipe=here/'tiny.json')
    assert 'goes on with epoch 3' in out
    ours,theirs = (weights_of(here/o) for o in ('run','stayed'))
    assert all(torch.equal(ours[k], theirs[k]) for k in theirs)

def test_what_else_differs_is_said_first(here, capfd):
    "Another seed holds out other files, and they are not to blame"
    train(capfd, '--data', photos(here/'photos', n=10), '--out', 'run')
    _,err = train(capfd, '--data', 'photos', '--out', 'run', '--resume', '--seed', 1, code=2)
    assert 'belongs to another run: its --seed is 0, here it is 1' in err

@pytest.mark.parametrize('which', [0,1])
def test_a_mark_on_one_side_alone(which, here, capfd):
    "Loaders made by hand have none"
    learns = []
    for i in range(2):
        dls = image_dls(photos(here/'photos'), small.image_cfg, bs=4, workers=0, device='cpu')
        if i==which: del dls.mark
        learn = learner(dls, replace(small, epochs=1+i), seed=0)
        keep_state(learn, here/'states', resume=i==1)
        learn.fit(1+i)
        learns.append(learn)
    assert learns[1].keep_state.written

@pytest.mark.parametrize('same', ['./first/checkpoint.pth', 'first/../first/checkpoint.pth'])
def test_its_own_weights_by_another_path(same, here, capfd):
    photos(here/'photos')
    train(capfd, '--data', 'photos', '--out', 'first')
    train(capfd, '--data', 'photos', '--out', 'run', '--weights', 'first/checkpoint.pth')
    _,err = train(capfd, '--data', 'photos', '--out', 'run', '--weights', same, '--resume', '--epochs', 3)
    assert 'goes on with what it has learned' not in err

def test_a_run_goes_on_with_its_own_weights(here, capfd):
    photos(here/'photos')
    train(capfd, '--data', 'photos', '--out', 'first')
    start = ['--data','photos','--weights','first/checkpoint.pth','--out','run']
    train(capfd, *start)
    shutil.copy('first/checkpoint.pth', 'other.pth')
    for given,epochs in ((['--weights','other.pth'],3), ([],4)):
        _,err = train(capfd, '--data', 'photos', '--out', 'run', '--resume', '--epochs', epochs, *given)
        assert json.loads((here/'run'/'config.json').read_text())['weights']=='first/checkpoint.pth'
        told = "run goes on with what it has learned, not with other.pth" in err
        assert told==bool(given)

@pytest.mark.parametrize('average', [False, True], ids=['last','average'])
@pytest.mark.parametrize('how', ['gone','damaged'])
def test_a_run_that_is_done_lost_its_checkpoint(how, average, here, capfd):
    flags = ['--average', .5] if average else []
    train(capfd, '--data', photos(here/'photos'), '--out', 'run', *flags)
    path,whole = here/'run'/'checkpoint.pth',weights_of(here/'run')
    path.unlink() if how=='gone' else path.write_bytes(b'torn')
    train(capfd, '--data', 'photos', '--out', 'run', '--resume', *flags)
    again = weights_of(here/'run')
    assert all(torch.equal(whole[k], again[k]) for k in whole)

# --- what a run writes

def test_a_rewired_model_of_timms_is_measured(here, capsys):
    "As fastai's own lines are, where nothing can be redrawn; what is not ours cannot be saved, and this is said first"
    dls = image_dls(photos(here/'photos'), small.image_cfg, bs=4, workers=0, device='cpu')
    def made(): return revvit.reversible(timm.create_model('vit_tiny_patch16_224', img_size=32, num_classes=2, depth=2))
    with pytest.raises(ValueError, match="out='run': a .* does not say how it was built, so there can be no"):
        learner(dls, small, made(), out='run')
    assert not (here/'run').exists()
    net = made()
    net.set_reversible(True, .1, True)
    ways = [(o.reversible, o.keep, o.exact) for o in net.modules() if 'reversible' in vars(o)]
    learner(dls, small, net).fit(1)
    assert ways and [(o.reversible, o.keep, o.exact) for o in net.modules() if 'reversible' in vars(o)]==ways
    assert 'plain autograd' in capsys.readouterr().out

def test_a_report_that_cannot_be_written_costs_nothing(here, capfd, monkeypatch):
    train(capfd, '--data', photos(here/'photos'))
    def full(*args, **kwargs): raise OSError(28, 'No space left on device', 'p.csv')
    monkeypatch.setattr('revvit.use.evaluation.write_file', full)
    out,err = said(capfd, 2, revvit_test, '--data', 'photos', '--predictions', 'p.csv', '--workers', 0)
    assert out.startswith('top-1 ') and 'p.csv: No space left on device' in err

def test_a_folder_where_nothing_may_be_written(here, capfd, monkeypatch):
    "Found before the work"
    train(capfd, '--data', photos(here/'photos'))
    (here/'shut').mkdir()
    real = os.access
    def access(path, mode, **kw): return Path(path).name!='shut' and real(path, mode, **kw)
    monkeypatch.setattr(os, 'access', access)
    out,err = said(capfd, 2, revvit_test, '--data', 'photos', '--predictions', 'shut/p.csv', '--workers', 0)
    assert not out and 'shut/p.csv: nothing may be written in shut' in err

def test_dollars_in_names_of_classes(here, capfd):
    train(capfd, '--data', photos(here/'photos', ('a$b','c$^{')))
    said(capfd, 0, revvit_test, '--data', 'photos', '--confusion', 'c.png', '--workers', 0)
    assert Image.open('c.png').size[0]>100

@pytest.mark.parametrize('flag', ['--img-size','--frames'])
def test_a_size_of_nothing(flag, here, capfd):
    _,err = said(capfd, 2, revvit_train, '--data', photos(here/'photos'), flag, 0)
    assert f"{flag} must be 1 or more, got 0" in err

# --- what a run says of its data afterwards

def test_the_own_training_part_is_not_held_out(here, capfd):
    "Files of one name in both parts"
    train(capfd, '--data', divided(here/'photos'), '--out', 'run')
    given = ['--weights','run','--workers',0]
    for part in ('photos','photos/val'):
        _,err = said(capfd, 0, revvit_test, '--data', part, *given)
        assert 'may have been trained on' not in err
    _,err = said(capfd, 0, revvit_test, '--data', 'photos/train', *given)
    assert 'it may have been trained on some of them' in err and 'counted are' not in err
    _,err = said(capfd, 2, revvit_test, '--data', 'photos/train', '--part', 'held-out', *given)
    assert 'no held-out.csv beside the weights names files of it' in err

def test_a_copy_of_a_folder_that_the_run_divided(here, capfd):
    train(capfd, '--data', photos(here/'photos'), '--out', 'run')
    shutil.copytree(here/'photos', here/'copy')
    _,err = said(capfd, 0, revvit_test, '--data', 'copy', '--weights', 'run', '--workers', 0)
    assert 'counted are the 2 files that the run in run held out' in err

def test_results_among_the_classes(here, capfd, monkeypatch):
    photos(here/'photos')
    _,err = train(capfd, '--data', 'photos', '--out', 'photos/run', code=2)
    assert "--out 'photos/run' would stand among the class folders in photos" in err
    monkeypatch.chdir(here/'photos')
    _,err = said(capfd, 2, revvit_train, '--recipe', '../tiny.json', '--data', '.')
    assert "--out 'runs' would stand among the class folders in ." in err
    assert sorted(o.name for o in (here/'photos').iterdir())==['cat','dog']

def test_a_run_that_died_before_its_first_state_begins_again(here, capfd):
    "Whatever number of threads PyTorch chose"
    train(capfd, '--data', divided(here/'photos'), '--out', 'run')
    for o in (here/'run').iterdir():
        if o.name not in ('config.json','held-out.csv'): o.unlink()
    out,_ = train(capfd, '--data', 'photos', '--out', 'run', '--resume')
    assert 'stopped before its first state, so the run begins again' in out
    out,_ = said(capfd, 0, revvit_train, '--recipe', 'run/config.json', '--data', 'photos', '--out', 'run', '--resume')
    assert 'all 2 epochs are done' in out

def test_two_reports_in_one_file(here, capfd):
    train(capfd, '--data', photos(here/'photos'))
    _,err = said(capfd, 2, revvit_test, '--data', 'photos', '--predictions', 'p.csv', '--confusion', 'p.csv')
    assert 'p.csv: one file cannot hold the confusion matrix and the predictions' in err and not Path('p.csv').exists()

def test_videos_of_a_list_are_counted_by_lines_that_say_something(tmp_path):
    for o in ('train','val'): (tmp_path/f'{o}.csv').write_text('a.mp4 0\n\nb.mp4 1')
    assert kind_of_data(tmp_path)==('clips',2)

@pytest.mark.parametrize('kind', [str,Path])
def test_labels_of_other_files(kind, here):
    dls = image_dls(photos(here/'photos'), small.image_cfg, bs=4, workers=0, device='cpu')
    y = dls.test_dl([kind(here/'photos'/o) for o in ('dog/0.png','cat/1.png')], with_labels=True).one_batch()[1]
    assert y.tolist()==[1,0]

@pytest.mark.parametrize('ask', [lambda learn: learn.get_preds(), ClassificationInterpretation.from_learner],
                         ids=['get_preds','interpretation'])
def test_answers_for_each_file(ask, here):
    "An IndexError far from the file that cannot be read"
    torn = sorted(folder_files(photos(here/'photos', n=8))[1])[0]
    Path(torn).write_bytes(b'torn')
    learn = learner(image_dls(here/'photos', small.image_cfg, bs=4, workers=0, on_bad='skip', device='cpu'), small)
    learn.fit(1)
    with pytest.raises(UnreadableFile, match=torn): ask(learn)
