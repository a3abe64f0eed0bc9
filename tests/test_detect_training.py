"""Detectors in the Learner and in `revvit_train`: the table, the files of a run, states and the same bits after a kill,
two processes, what is refused, what is chosen for a folder. Tiny detectors on a few canvases of 48 pixels."""
import csv, json, os, shutil, signal, socket, time
from dataclasses import replace
from pathlib import Path

import pytest, torch
import revvit
from revvit.data import scattered_digits as drawn
from revvit.data.scattered_digits import scattered_digits
from revvit.models.files import read_checkpoint
from revvit.training.layers import layer_rates
from revvit.training.learner import learner, plot_history, record_run
from revvit.training.own_data import own_recipe, read_recipe, recipe_text
from revvit.training.recipes import recipe_dls, recipe_model, recipes
from revvit.training.resume import keep_state
from revvit.use import cli
from revvit.use.choices import changed_recipe, fit_to_weights, named_recipe

torch.set_num_threads(1)
pytestmark = pytest.mark.filterwarnings('ignore')

HEADS = dict(recipes['scattered_digits'].detector, out_channels=8, box_dim=16, mask_layers=(8,), anchor_scale=3.,
    rpn_post_nms_top_n_train=20, rpn_post_nms_top_n_test=10, box_batch_size_per_image=8, box_detections_per_img=5)
TINY = replace(recipes['scattered_digits'], epochs=2, batch_size=4, detector=HEADS,
    model_args=dict(embed_dim=8, num_heads=1, depth=3, stage_starts=(1,), drop_path_rate=.1))

@pytest.fixture(scope='module')
def folder(tmp_path_factory):
    "Twelve canvases to learn from, and five"
    with pytest.MonkeyPatch.context() as m:
        m.setattr(drawn, '_parts', dict(train=12, val=5))
        return scattered_digits(tmp_path_factory.mktemp('digits')/'digits')

def made(folder, r=TINY, model=None, out=None, **kw):
    return learner(recipe_dls(r, folder, device='cpu', **kw), r, model, out=out)

def fitted(learn, epochs=None):
    with learn.no_bar(), learn.no_logging(): learn.fit(epochs or learn.recipe.epochs)
    return learn

def same_weights(a, b):
    a,b = a.state_dict(),b.state_dict()
    return a.keys()==b.keys() and all(torch.equal(a[k], b[k]) for k in a)

# ---------------------------------------------------------------- the Learner

def test_a_run_leaves_its_files(folder, tmp_path):
    learn = fitted(made(folder, out=tmp_path))
    rows = list(csv.DictReader((tmp_path/'history.csv').open()))
    assert len(rows) == 2 and all(0 <= float(o['mask_ap50']) <= 1 and float(o['box_ap']) >= 0 for o in rows)
    assert not rows[0]['valid_loss'] and not rows[0]['top_5'] and float(rows[0]['kept_MB'])<float(rows[0]['plain_MB'])
    back = revvit.load_model(tmp_path/'checkpoint.pth')
    assert same_weights(back, learn.model) and back.pretrained_cfg['label_names'] == list('0123456789')
    assert plot_history(learn, tmp_path/'history.png').axes[1].get_title().startswith('AP of masks')
    fresh = recipe_model(TINY, 10).state_dict()
    keys = [k for k,v in learn.model.state_dict().items() if not torch.equal(v, fresh[k])]
    assert {k.split('.')[0] for k in keys} == {'backbone','rpn','roi_heads'}

def test_boxes_alone(folder):
    r = replace(TINY, epochs=1, detector={k:v for k,v in HEADS.items() if k!='mask_layers'} | dict(masks=False))
    learn = fitted(made(folder, r))
    assert [o for o in learn.recorder.metric_names if '_ap' in o] == ['box_ap','box_ap50']
    assert plot_history(learn).axes[1].get_title().startswith('AP of boxes')

def test_what_is_measured_is_what_evaluation_measures(folder):
    from revvit.data.average_precision import average_precision, detections
    learn = fitted(made(folder), 1)
    dl = learn.dls.valid
    want = average_precision(detections(learn.model, dl, progress=False), dl.dataset.data)
    got = dict(zip(learn.recorder.metric_names[3:-1], learn.recorder.values[-1][2:]))
    kinds = dict(box='boxes', mask='masks')
    assert got == {f'{k}_{a}': want[v][a] for k,v in kinds.items() for a in ('ap','ap50')}

@pytest.mark.parametrize('change', [dict(average=.9), dict(accumulate=3), dict(step_in_backward=True, clip=None),
    dict(layer_decay=.5), dict(freeze='backbone'), dict(freeze=1), dict(steps=(1.,))], ids=lambda o: '-'.join(o))
def test_settings_of_a_recipe(change, folder):
    r = replace(TINY, epochs=1 if 'steps' not in change else 2, **change)
    learn = fitted(made(folder, r))
    fresh,now = recipe_model(r, 10).state_dict(),learn.model.state_dict()
    moved = {k.split('.')[0]+'.'*('maps.model' in k) for k in now if not torch.equal(now[k], fresh[k])}
    assert moved >= {'rpn','roi_heads'} and ('backbone.' in moved) == (change.get('freeze')!='backbone')
    if 'steps' in change: assert learn.recorder.lrs[-1] == pytest.approx(r.lr/10)

def test_a_step_in_the_backward_pass_makes_the_same_weights(folder):
    a,b = (fitted(made(folder, replace(TINY, epochs=1, clip=None, step_in_backward=o))) for o in (False,True))
    assert same_weights(a.model, b.model)

def test_fastais_search_for_a_rate(folder):
    learn = made(folder)
    before = {k: v.clone() for k,v in learn.model.state_dict().items()}
    with learn.no_bar(): assert learn.lr_find(num_it=6, show_plot=False).valley>0
    assert all(torch.equal(v, before[k]) for k,v in learn.model.state_dict().items())
    with pytest.raises(ValueError, match='this learner.s two are for weight decay'): learn.fine_tune(1)

def test_rates_by_layers():
    rates = layer_rates(recipe_model(TINY, 10), 1., layer_decay=.5)
    assert rates == [.5**i for i in range(len(rates))][::-1] and len(rates) == 5   # patches, three blocks, the rest

def test_reversible_is_what_is_trained(folder):
    a,b = made(folder),made(folder)
    b.model.set_reversible(False)
    a,b = (dict(fitted(o, 1).model.named_parameters()) for o in (a,b))
    for k in a: torch.testing.assert_close(a[k], b[k], rtol=1e-3, atol=1e-3)

def test_not_a_number_is_named(folder):
    learn = made(folder)
    with torch.no_grad(): learn.model.roi_heads.box_predictor.cls_score.bias.fill_(float('nan'))
    with pytest.raises(FloatingPointError, match='cls_score.bias is not finite'): fitted(learn)

@pytest.mark.parametrize('make,says', [
    (lambda f: replace(TINY, mixup=.8), 'mixup=0.8 is for classes'),
    (lambda f: replace(TINY, smoothing=.1), 'smoothing=0.1 is for classes'),
    (lambda f: replace(TINY, detector=None), "the data 'scattered_digits' want a dictionary as detector"),
    (lambda f: replace(TINY, steps=(3,)), 'steps must be epochs in order'),
    (lambda f: made(f, model=recipe_model(TINY, 3)), 'has 3 categories, the data have 10'),
    (lambda f: made(f, model=recipe_model(recipes['digits'], 10)), 'the model is a RevViT'),
    (lambda f: learner(recipe_dls(recipes['digits'], device='cpu'), TINY), 'learns from coco_dls'),
    (lambda f: recipe_dls(recipes['fine_tune_coco']), 'say where they are')])
def test_refusals(make, says, folder):
    with pytest.raises(ValueError, match=says): make(folder)

def test_heads_that_cannot_be_saved_are_refused_before_training(folder, tmp_path):
    net = revvit.detector(TINY.model, 10, backbone_args=TINY.model_args, box_head=torch.nn.Flatten(), **HEADS)
    with pytest.raises(ValueError, match='its box_head is a Flatten'): made(folder, model=net, out=tmp_path)

# ---------------------------------------------------------------- stopped and taken up again

@pytest.mark.parametrize('workers', [0,2])
def test_resumed_with_the_same_bits(workers, folder, tmp_path):
    whole = fitted(made(folder, workers=workers))
    class Stop(revvit.training.callbacks.Callback):
        order = 99
        def after_batch(self):
            if self.training and self.train_iter==4: raise KeyboardInterrupt   # within the second epoch
    first = keep_state(made(folder, out=tmp_path, workers=workers), every=1)
    first.add_cb(Stop())
    with pytest.raises(KeyboardInterrupt): fitted(first)
    again = keep_state(made(folder, out=tmp_path, workers=workers), resume=True)
    assert again.keep_state.pending['step'] == 1
    fitted(again)
    assert same_weights(whole.model, again.model) and whole.recorder.values == again.recorder.values

def test_a_longer_run_moves_its_steps(folder, tmp_path):
    r = replace(TINY, epochs=1, warmup_epochs=.2, steps=(.5,))
    fitted(keep_state(made(folder, r, out=tmp_path)))
    longer = r.changed(epochs=2)
    assert longer.steps == (1.,)
    learn = fitted(keep_state(made(folder, longer, out=tmp_path), resume=True))
    assert len(learn.recorder.lrs) == 6 and learn.recorder.lrs[-1] == pytest.approx(r.lr/10)

SETUP = '''
import sys; sys.path.insert(0, {tests!r})
import torch; torch.set_num_threads(1)
from test_detect_training import TINY
from revvit.training.recipes import recipes
recipes['scattered_digits'] = TINY
from revvit.use import cli
'''

@pytest.mark.thorough
def test_killed_and_resumed(warm, folder, tmp_path):
    "kill -9 of the command"
    code = SETUP.format(tests=str(Path(__file__).parent))+'sys.exit(cli.revvit_train(sys.argv[1:]))'
    env = {**os.environ, 'PYTHONPATH': str(Path(revvit.__file__).parents[1])}
    args = ['--recipe','scattered_digits','--data',folder,'--save-steps',1]
    def run(out, *more): return warm.run(['-c', code, *map(str, args), '--out', str(out), *more], tmp_path, env)
    assert run(tmp_path/'whole').returncode == 0
    p = warm.started(['-c', code, *map(str, args), '--out', str(tmp_path/'killed')], cwd=tmp_path, env=env)
    while not (tmp_path/'killed'/'state-1.pth').exists() and p.poll() is None: time.sleep(.01)
    os.kill(p.pid, signal.SIGKILL)
    p.wait()
    r = run(tmp_path/'killed', '--resume')
    assert r.returncode == 0, r.stderr
    a,b = (read_checkpoint(tmp_path/o/'checkpoint.pth')['state_dict'] for o in ('whole','killed'))
    assert all(torch.equal(a[k], b[k]) for k in a)

# ---------------------------------------------------------------- two processes

PAIR = """
import hashlib, json
from revvit.data.average_precision import detections
from revvit.training import detect
from revvit.training.distributed import distribute, join_group, leave_group
from revvit.training.learner import learner
from revvit.training.recipes import recipe_dls
from revvit.models.checkpoints import save_checkpoint
join_group()
counted,measure = [],detect.average_precision
def noted(found, *args):
    counted.append(len(found))
    return measure(found, *args)
detect.average_precision = noted
learn = distribute(learner(recipe_dls(TINY, sys.argv[1], device='cpu'), TINY))
with learn.no_bar(), learn.no_logging(): learn.fit(2)
found = [(o['image_id'],o['category_id'],o['score']) for o in detections(learn.model, learn.dls.valid, progress=False)]
weights = b''.join(v.numpy().tobytes() for v in learn.model.state_dict().values())
said = dict(values=[[*o] for o in learn.recorder.values], found=found, counted=counted,
            share=learn.dls.valid.get_idxs(), weights=hashlib.sha256(weights).hexdigest())
json.dump(said, open(f"{os.environ['RANK']}.json", 'w'))
if os.environ['RANK']=='0': save_checkpoint(learn.model, 'both.pth')
leave_group()
"""

def free_port():
    with socket.socket() as s:
        s.bind(('127.0.0.1', 0))
        return s.getsockname()[1]

@pytest.mark.thorough
def test_two_processes(warm, folder, tmp_path):
    "Gradients are averaged, and each held-out image is counted once"
    from revvit.data.average_precision import detections
    env = {**os.environ, 'PYTHONPATH': str(Path(revvit.__file__).parents[1]), 'MASTER_ADDR': '127.0.0.1',
           'MASTER_PORT': str(free_port()), 'WORLD_SIZE': '2', 'LOCAL_WORLD_SIZE': '2'}
    code = 'import os\n'+SETUP.format(tests=str(Path(__file__).parent))+PAIR
    both = [warm.started(['-c', code, str(folder)], cwd=tmp_path, env={**env, 'RANK': str(i), 'LOCAL_RANK': str(i)})
            for i in (0,1)]
    assert [p.wait() for p in both] == [0,0]
    a,b = (json.loads((tmp_path/f'{i}.json').read_text()) for i in (0,1))
    assert (a['share'],b['share']) == ([0,2,4],[1,3])
    for k in ('values','found','counted','weights'):
        if k!='values': assert a[k] == b[k], k
    assert [o[2:] for o in a['values']] == [o[2:] for o in b['values']]   # the first is each one's own training loss
    net = revvit.load_model(tmp_path/'both.pth')
    alone = detections(net, recipe_dls(TINY, folder, device='cpu').valid, progress=False)
    want = sorted((o['image_id'],o['category_id'],o['score']) for o in alone)
    assert want and a['counted'][-1] == len(want)
    got = sorted(map(tuple, a['found']))
    assert [o[:2] for o in got] == [o[:2] for o in want]
    assert [o[2] for o in got] == pytest.approx([o[2] for o in want], abs=1e-5)
    assert not same_weights(net, recipe_model(TINY, 10))

# ---------------------------------------------------------------- recipes and folders

@pytest.mark.parametrize('name', ['mask_rcnn_rev_mvit_b','scattered_digits','fine_tune_coco'])
def test_recipes_as_files(name, tmp_path):
    (tmp_path/'r.json').write_text(recipe_text(recipes[name]))
    assert read_recipe(tmp_path/'r.json') == recipes[name]

def test_the_published_numbers_again():
    r = recipes['mask_rcnn_rev_mvit_b']
    assert (r.epochs,r.batch_size,r.lr,r.weight_decay,r.clip) == (36,64,1.6e-4,.1,None)
    assert [round(o*67500/36) for o in (r.warmup_epochs, *r.steps)] == [250,52500,62500]
    with torch.device('meta'): net = recipe_model(r, 80)
    assert net.transform.min_size == (1024,) and net.transform.max_size == 1024
    assert net.roi_heads.box_head.fc6.out_features == 1024 and len(net.roi_heads.mask_head) == 4
    assert net.backbone.maps.model.model_args['drop_path_rate'] == .2

def test_a_folder_finds_its_recipe(folder):
    name,r,why = own_recipe(folder)
    assert (name,r.model,r.batch_size) == ('fine_tune_coco','revmvit_tiny_224',1)
    assert 'holds 12 training images with boxes and masks' in why and named_recipe('fine_tune_coco', folder)[1] == r
    assert changed_recipe(r, img_size=64).image_cfg['input_size'] == (3,64,64)

def test_boxes_without_outlines(folder, tmp_path, here):
    "As many tools export them: Faster R-CNN learns from them"
    shutil.copytree(folder, tmp_path/'boxes')
    for o in (tmp_path/'boxes').glob('*.json'):
        content = json.loads(o.read_text())
        for a in content['annotations']: a['segmentation'] = []
        o.write_text(json.dumps(content))
    name,r,why = own_recipe(tmp_path/'boxes')
    assert r.detector['masks'] is False and 'training images with boxes, in' in why
    code,out,err = here('--data', tmp_path/'boxes', '--img-size', 64, '--dry-run')
    assert code == 0 and 'one step of 1 images' in out, err

def test_a_recipe_fits_weights(folder, tmp_path):
    net = recipe_model(TINY, 4)
    revvit.save_checkpoint(net, tmp_path/'a.pth')
    again = recipe_model(fit_to_weights(recipes['fine_tune_coco'], tmp_path/'a.pth'), 10)
    report = revvit.load_checkpoint(again, tmp_path/'a.pth', new_head=True)
    assert not report.problems() and again.transform.image_mean == net.transform.image_mean
    small = dict(embed_dim=8, num_heads=1, depth=3, stage_starts=(1,), img_size=32)
    import timm
    revvit.save_checkpoint(timm.create_model('revmvit_tiny_224', num_classes=5, **small), tmp_path/'b.pth')
    r = fit_to_weights(recipes['fine_tune_coco'], tmp_path/'b.pth')
    assert r.image_cfg['input_size'] == (3,640,640) and r.model_args['embed_dim'] == 8

@pytest.fixture
def here(folder, tmp_path, monkeypatch, capsys):
    "`revvit_train` in this process: exit code, output, errors"
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(recipes, 'scattered_digits', TINY)
    def run(*args):
        code = cli.revvit_train([str(o) for o in args])
        return code,*capsys.readouterr()
    return run

def test_revvit_train(here, folder, tmp_path):
    code,out,err = here('--recipe', 'scattered_digits', '--data', folder, '--save-best', '--epochs', 1, '--keep', .5)
    assert code == 0, err
    assert 'epoch 1 of 1, step 1 of 3: loss' in out and 'keeps' in out and 'mask AP50' in out.splitlines()[-2]
    assert out.splitlines()[-1].startswith('Now try: revvit_predict') and '/val/0000.png' in out
    left = {o.name for o in (tmp_path/'runs'/'scattered_digits').iterdir()}
    assert left == {'checkpoint.pth','checkpoint-best.pth','config.json','history.csv','history.png','state-1.pth'}
    assert json.loads((tmp_path/'runs/scattered_digits/config.json').read_text())['detector']['box_dim'] == 16

def test_dry_run(here, folder, tmp_path):
    code,out,_ = here('--recipe', 'scattered_digits', '--data', folder, '--dry-run')
    assert code == 0 and 'one step of 4 images' in out and 'nothing was written' in out
    assert not (tmp_path/'runs').exists()

def test_from_weights(here, folder, tmp_path):
    revvit.save_checkpoint(recipe_model(TINY, 3), tmp_path/'a.pth')
    args = '--recipe', 'scattered_digits', '--data', folder, '--weights', tmp_path/'a.pth', '--dry-run'
    code,_,err = here(*args)
    assert code and '--new-head leaves' in err and len(err.splitlines()) == 1
    code,out,_ = here(*args, '--new-head')
    assert code == 0 and 'left out as asked: roi_heads.box_predictor' in out

@pytest.mark.parametrize('args,says', [
    (('--recipe','rev_vit_s','--data','FOLDER'), "is in COCO's format, with things to detect"),
    (('--data','FOLDER','--allow-shared'), '--allow-shared is for folders of classes'),
    (('--data','FOLDER','--frames','4'), '--frames is for clips'),
    (('--recipe','mask_rcnn_rev_mvit_b'), 'say where they are (--data)'),
    (('--recipe','scattered_digits','--data','FOLDER','--img-size','64'), 'have one size'),
    (('--recipe','scattered_digits','--data','FOLDER','--freeze','99'), 'freeze must be backbone or a number')])
def test_what_the_command_refuses(args, says, here, folder):
    code,_,err = here(*(folder if o=='FOLDER' else o for o in args))
    assert code and says in err and len(err.splitlines()) == 1
