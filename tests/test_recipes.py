"Recipes: the published numbers typed again, what is refused, what follows from what, and the share of a process"
import json, math, os
from dataclasses import replace
from unittest.mock import patch

import pytest, timm, torch
from fastai.vision.all import Callback, DataLoaders
from timm.models import group_parameters
from torch import nn
from revvit.data.digits import digits_cfg
from revvit.data.images import train_tfm
from revvit.models.mvit import RevMViT
from revvit.models.vit import RevViT
from revvit.training.layers import freeze, layer_groups
from revvit.training.learner import learner
from revvit.training.own_data import own_recipe, read_recipe, recipe_text
from revvit.training.recipes import Recipe, recipe_dls, recipe_model, recipes, warmup_cosine
from revvit.use.choices import fit_to_weights

torch.set_num_threads(1)
pytestmark = pytest.mark.filterwarnings('ignore')
name = 'revvit_tiny_patch16_224'
recipe = Recipe('digits', name, {}, digits_cfg, epochs=2, batch_size=64, lr=1e-3, warmup_epochs=.5)
nan,inf = math.nan,math.inf

# ---------------------------------------------------------------- Recipe

@pytest.mark.parametrize('k,v,said', [
    ('epochs', -1, 'epochs must be a whole number above 0, got -1'),
    ('epochs', 1.5, 'epochs must be a whole number above 0, got 1.5'),
    ('batch_size', 0, 'batch_size must be a whole number above 0, got 0'),
    ('repeats', 0, 'repeats must be a whole number above 0, got 0'),
    ('lr', 0, 'lr must be a number above 0, got 0'),
    ('lr', nan, 'lr must be a number above 0, got nan'),
    ('eps', -1e-8, 'eps must be a number above 0, got -1e-08'),
    ('clip', 0, 'clip must be a number above 0, got 0'),
    ('warmup_epochs', 2, 'warmup_epochs must be from 0 to below 2, got 2'),
    ('warmup_lr', inf, 'warmup_lr must be from 0 to below inf, got inf'),
    ('final_lr', -1e-6, 'final_lr must be from 0 to below inf, got -1e-06'),
    ('smoothing', -.1, 'smoothing must be from 0 to below 1, got -0.1'),
    ('smoothing', 1, 'smoothing must be from 0 to below 1, got 1'),
    ('weight_decay', inf, 'weight_decay must be from 0 to below inf, got inf'),
    ('mixup', -.1, 'mixup must be from 0 to below inf, got -0.1'),
    ('cutmix', nan, 'cutmix must be from 0 to below inf, got nan'),
    ('average', 1, 'average must be from 0 to below 1, got 1'),
    ('accumulate', 0, 'accumulate must be a whole number above 0, got 0'),
    ('backbone_lr', 0, 'backbone_lr must be a number above 0, got 0'),
    ('layer_decay', 1.1, 'layer_decay must be above 0 and at most 1, got 1.1')], ids=str)
def test_what_cannot_be_meant_is_refused(k, v, said):
    with pytest.raises(ValueError) as e: replace(recipe, **{k: v})
    assert str(e.value) == said

def test_none_is_no_limit_and_no_average():
    assert replace(recipe, clip=None, average=None).clip is None

@pytest.mark.parametrize('kw,want', [
    (dict(), (2, .5, 64, 1e-3)),
    (dict(batch_size=128), (2, .5, 128, 2e-3)),
    (dict(epochs=5, batch_size=128, lr=.1), (5, 1.25, 128, .1)),
    (dict(lr=.2), (2, .5, 64, .2))], ids=str)
def test_changed(kw, want):
    r = recipe.changed(**kw)
    assert (r.epochs, r.warmup_epochs, r.batch_size, r.lr) == want

@pytest.mark.parametrize('kw,said', [(dict(epochs=0), 'epochs must be a whole number above 0, got 0'),
    (dict(lr=-1.), 'lr must be a number above 0, got -1.0')], ids=str)
def test_changed_refuses(kw, said):
    with pytest.raises(ValueError, match=said): recipe.changed(**kw)

# ---------------------------------------------------------------- the recipes of the package

TABLE = """                    rev_vit_s  rev_vit_b  rev_mvit_b  rev_mvit_b_16x4
           epochs         300        300         300              200
       batch_size         512        512         256               16
               lr      0.0005     0.0005     0.00025           0.0001
    warmup_epochs          70         70          70               50
        warmup_lr       1e-08      1e-08       1e-08            1e-06
         final_lr       1e-06      1e-06       1e-06            1e-06
     weight_decay        0.05        0.1        0.05             0.07
             clip           1          2           1             None
        smoothing         0.1        0.1         0.1              0.1
            mixup         0.8        0.8         0.8              0.8
           cutmix           1          1           1                1
          repeats           1          1           1                2
   drop_path_rate         0.1        0.2         0.1             0.05
        drop_rate           0          0           0              0.5
            erase        0.25       0.25        0.25             0.25
         rand_aug  rand-m7-mstd0.5-inc1 rand-m6-n5-mstd0.5-inc1 rand-m9-n6-mstd0.5-inc1 rand-m7-n4-mstd0.5-inc1"""
published,*ROWS = [o.split() for o in TABLE.splitlines()]
def number(s):
    if s == 'None': return None
    try: return float(s)
    except ValueError: return s

@pytest.mark.parametrize('row', ROWS, ids=lambda o: o[0])
def test_published_numbers(row):
    k,*vals = row
    got = [{'drop_rate': 0, **vars(r), **r.model_args, **r.aug}[k] for r in map(recipes.get, published)]
    assert got == [number(o) for o in vals]

@pytest.mark.parametrize('which', published)
def test_published_habits(which):
    "Adam's defaults, one drop path mask for both halves, and in Rev-MViT no residual of a dropped sample"
    r = recipes[which]
    assert (r.betas, r.eps, r.model_args['shared_drop_path']) == ((.9,.999), 1e-8, True)
    assert r.model_args.get('drop_whole') is (True if 'mvit' in r.model else None)

@pytest.mark.parametrize('which,size', [*zip(published, (22_434_664, 87_335_656, 39_689_320, 34_963_120))])
def test_published_models(which, size):
    "As many numbers as published, and the recipe's drop path and dropout in the model"
    r = recipes[which]
    with torch.device('meta'): m = recipe_model(r, 400 if '16x4' in which else 1000)
    assert sum(p.numel() for p in m.parameters()) == size
    assert m.model_args['drop_path_rate'] == r.model_args['drop_path_rate'] and m.model_args['shared_drop_path']
    assert m.head_drop.p == r.model_args.get('drop_rate', 0.)
    if which == 'rev_mvit_b':
        assert [o.drop_prob for o in m.drops] == pytest.approx([.1*i/15 for i in (1,3,14)], rel=1e-12)

def test_the_digits_and_the_moving_digits():
    "What the data give, the models take"
    digits,moving = recipes['digits'],recipes['moving_digits']
    m = recipe_model(digits, 10)
    assert type(m) is RevViT and m(torch.randn(2,1,16,16)).shape == (2,10)
    assert (len(m.blocks), m.model_args['embed_dim'], digits.aug) == (4, 64, None)
    m = recipe_model(moving, 8)
    assert type(m) is RevMViT and m(torch.randn(2,3,8,32,32)).shape == (2,8) and [len(o) for o in m.stages] == [2,1]

def test_without_arguments_the_model_is_timms_for_the_size():
    m = recipe_model(recipe, 10)
    assert (m.num_classes, m.patch_embed.img_size) == (10, (16,16))

# ---------------------------------------------------------------- data

@pytest.mark.parametrize('which', ['rev_vit_s', 'rev_mvit_b_16x4'])
def test_the_data_are_yours(which):
    with pytest.raises(ValueError, match=r'of this recipe are yours: say where they are \(--data\)'):
        recipe_dls(recipes[which])

@pytest.mark.parametrize('world,rank,want', [('1', '0', (64,0,1)), ('2', '1', (32,1,2))], ids=str)
def test_a_share_of_the_batch(world, rank, want):
    with patch.dict(os.environ, WORLD_SIZE=world, RANK=rank): dl = recipe_dls(recipes['digits'], device='cpu').train
    assert (dl.bs, dl.rank, dl.world) == want

def test_a_share_must_be_whole():
    said = '3 processes cannot share a batch of 64 evenly'
    with patch.dict(os.environ, WORLD_SIZE='3'), pytest.raises(ValueError, match=said): recipe_dls(recipes['digits'])

# ---------------------------------------------------------------- rates

def test_warmup_cosine_by_hand():
    assert [warmup_cosine(p/4, 1., .5) for p in range(5)] == pytest.approx([0.,.5,1.,.5,0.], abs=1e-15)
    # without a warm-up; the cosine of 60 degrees is a half
    assert [warmup_cosine(p, 1.) for p in (0.,1/3,1.)] == pytest.approx([1.,.75,0.], abs=1e-15)
    rate = [warmup_cosine(o/300, 5e-4, 70/300, 1e-8, 1e-6) for o in (0,35,70,185,300)]
    assert rate == pytest.approx([1e-8, (5e-4+1e-8)/2, 5e-4, (5e-4+1e-6)/2, 1e-6], rel=1e-12)

def publishers_lr(epoch, base, max_epoch, warmup_epochs, warmup_start, end=1e-6):
    "The learning rate at a fractional epoch, in the publisher's words"
    if epoch < warmup_epochs: return warmup_start + (base-warmup_start)/warmup_epochs*epoch
    return end + (base-end)*.5*(math.cos(math.pi*(epoch-warmup_epochs)/(max_epoch-warmup_epochs))+1)

FACTS = dict(rev_vit_s=(5e-4, 300, 70, 1e-8), rev_vit_b=(5e-4, 300, 70, 1e-8),
             rev_mvit_b=(2.5e-4, 300, 70, 1e-8), rev_mvit_b_16x4=(1e-4, 200, 50, 1e-6))

def little():
    "Batches of two, four steps an epoch"
    ds = [(torch.zeros(4), 0)]*8
    dls = DataLoaders.from_dsets(ds, ds[:2], bs=2, device='cpu')
    dls.vocab = ['a','b']
    return dls

@pytest.mark.parametrize('which', FACTS)
def test_every_step_has_the_publishers_rate(which):
    "What the scheduler gives the optimizer at each step of all epochs, without the training"
    r,(base,epochs,warmup,start) = recipes[which],FACTS[which]
    learn = learner(little(), r.changed(batch_size=2, lr=r.lr), nn.Linear(4,2))
    learn.create_opt()
    learn.schedule.before_fit()
    for e in range(epochs):
        for i in range(4):
            learn.pct_train = (e+i/4)/epochs
            learn.schedule.before_batch()
            want = publishers_lr(e+i/4, base, epochs, warmup, start)
            assert learn.opt.hypers[-1]['lr'] == pytest.approx(want, rel=1e-12)

@pytest.mark.parametrize('world,lr', [('1', 2.5e-4), ('2', 5e-4), ('16', 4e-3)])
@pytest.mark.filterwarnings('error:the recipe')
def test_processes_together_have_the_recipes_batch(world, lr):
    "Half of it on each of two is the recipe's, without a word; one changed for another batch has a rate in proportion"
    with patch.dict(os.environ, WORLD_SIZE=world):
        r = replace(recipes['rev_vit_s'], batch_size=4).changed(batch_size=2*int(world))
        learn = learner(little(), r, nn.Linear(4,2))
    assert learn.lr == pytest.approx(lr, rel=1e-12)

# ---------------------------------------------------------------- layers, and several batches a step

@pytest.mark.parametrize('which', ['revvit_tiny_patch16_224', 'revmvit_tiny_224'])
def test_rates_by_layer(which):
    "Each parameter once; the factor by hand, from the depth that timm gives it; no decay on vectors"
    m = timm.create_model(which, num_classes=3)
    layers = group_parameters(m, m.group_matcher(coarse=False), reverse=True)
    groups,last = layer_groups(m, .1, .05, layer_decay=.5, backbone_lr=.01),max(layers.values())
    of = {id(p): o for o in groups for p in o['params']}
    assert sum(len(o['params']) for o in groups) == len([*m.parameters()])
    for n,p in m.named_parameters():
        want = 1. if layers[n] == last else .1*.5**(last-1-layers[n])
        assert of[id(p)]['lr_scale'] == pytest.approx(want) and of[id(p)]['weight_decay'] == (.05 if p.ndim > 1 else 0.)

def test_one_rate_means_the_classifiers():
    "fit, a rate given to fit, and the schedule's end: each layer has its share"
    r = replace(recipe, batch_size=256, warmup_epochs=0, layer_decay=.5, model_args=tiny)
    learn = learner(recipe_dls(r, device='cpu'), r)
    for kw,lr in (({}, 1e-3), (dict(lr=1e-2), 1e-2)):
        with learn.no_bar(), learn.no_logging(), patch.object(type(learn), '_do_epoch'): learn.fit(1, **kw)
        rates = {o['lr_scale']: o['lr'] for o in learn.opt.opt.param_groups}
        assert rates == pytest.approx({.5**i: lr*.5**i for i in range(4)})
        assert learn.schedule.peaks[-1] == pytest.approx(lr)

tiny = dict(patch_size=4, embed_dim=16, num_heads=2, depth=2)

@pytest.mark.parametrize('upto,free', [('backbone', 'head'), (0, 'blocks head neck'), ('1', 'blocks head neck'),
                                       (2, 'head')])
def test_frozen_layers_stay(upto, free):
    "Two steps leave the bits of what is frozen, and move all else"
    r = replace(recipe, epochs=1, batch_size=512, warmup_epochs=0, freeze=upto, model_args=tiny)
    learn = learner(recipe_dls(r, device='cpu'), r)
    was = {k: v.clone() for k,v in learn.model.state_dict().items()}
    with learn.no_bar(), learn.no_logging(): learn.fit(1)
    moved = {k for k,v in learn.model.state_dict().items() if not torch.equal(v, was[k])}
    assert ' '.join(sorted({k.split('.')[0] for k in moved})) == free
    assert moved == {n for n,p in learn.model.named_parameters() if p.requires_grad}

@pytest.mark.parametrize('upto', ['head', 3, -1, '1.5'])
def test_what_cannot_be_frozen(upto):
    with pytest.raises(ValueError, match='freeze must be backbone or a number of blocks from 0 to 2'):
        freeze(timm.create_model(name, depth=2), upto)

@pytest.mark.parametrize('mixup', [0., .8])
def test_batches_of_a_step(mixup):
    """22 batches make 5 steps of four and leave two out, in each of two epochs, with and without mixup, which leaves
    out an image of odd batches"""
    r = replace(recipe, epochs=2, batch_size=65, warmup_epochs=0, accumulate=4, mixup=mixup, model_args=tiny)
    learn,steps = learner(recipe_dls(r, device='cpu'), r),[]
    note = Callback(after_step=lambda *_: steps.append(learn.train_iter))
    with learn.no_bar(), learn.no_logging(), learn.added_cbs(note): learn.fit(2)
    assert steps == [3,7,11,15,19, 25,29,33,37,41]

# ---------------------------------------------------------------- own data, and recipes as files

@pytest.mark.parametrize('kind,end', [('images', 'png'), ('clips', 'mp4')])
def test_own_recipe(kind, end, tmp_path):
    for i in range(24):
        (tmp_path/'d'/'ab'[i%2]).mkdir(parents=True, exist_ok=True)
        (tmp_path/'d'/'ab'[i%2]/f'{i}.{end}').touch()
    (scratch,r,why),(_,tuned,_) = (own_recipe(tmp_path/'d', o) for o in (False,True))
    assert (scratch, r.data, r.batch_size, r.layer_decay, tuned.layer_decay) == (f'fine_tune_{kind}', kind,
        3, None, .75)
    assert 'random weights' in why and tuned.model in tuned.pretrained and 'tiny' in r.model
    m = recipe_model(r, 2)
    assert m(torch.randn(1, *r.image_cfg['input_size'])).shape == (1,2) and sum(o.numel() for o in m.parameters()) < 2e6

@pytest.mark.parametrize('which', recipes)
@pytest.mark.parametrize('end', ['json', 'yaml'])
def test_a_recipe_comes_back_from_its_file(which, end, tmp_path):
    if end == 'yaml': pytest.importorskip('yaml')
    (tmp_path/f'r.{end}').write_text(recipe_text(recipes[which]))
    back = read_recipe(tmp_path/f'r.{end}')
    assert replace(back, image_cfg={}) == replace(recipes[which], image_cfg={})
    assert {k: tuple(v) if isinstance(v, list) else v for k,v in recipes[which].image_cfg.items()} == back.image_cfg

@pytest.mark.parametrize('text,said', [('{', 'not a recipe in JSON'), ('[1]', 'expected settings by name'),
    ('{"epoch": 1}', "a recipe has no 'epoch'"),
    ('{"data": "images"}', 'the recipe lacks model, model_args, image_cfg, epochs, batch_size, lr'),
    (None, 'no such recipe file')], ids=str)
def test_recipe_files_that_are_none(text, said, tmp_path):
    if text is not None: (tmp_path/'r.json').write_text(text)
    with pytest.raises((ValueError, FileNotFoundError), match=said) as e: read_recipe(tmp_path/'r.json')
    assert str(e.value).startswith(str(tmp_path/'r.json'))

@pytest.mark.parametrize('k,v,said', [('lr', None, 'lr must be a number, got None'), ('lr', '.1', "number, got '.1'"),
    ('model', None, 'model must be a word'), ('image_cfg', [1], 'image_cfg must be settings by name, got (1,)'),
    ('model_args', None, 'model_args must be settings by name'), ('epochs', '4', "must be a whole number, got '4'"),
    ('epochs', True, 'must be a whole number, got True'), ('clip', 'none', "clip must be a number or null, got 'none'"),
    ('betas', .9, 'betas must be a list, got 0.9'), ('betas', [.9], 'two numbers from 0 to below 1, got (0.9,)'),
    ('betas', ['a',.9], "must be two numbers"), ('steps', ['a'], "steps must be epochs in order, from 2 to 20, got"),
    ('threads', 1.5, 'threads must be a whole number or null, got 1.5'),
    ('step_in_backward', 'yes', "must be true or false, got 'yes'"), ('detector', False, 'settings by name or null'),
    ('freeze', 1.5, 'must be a word or a whole number or null'), ('smoothing', None, 'smoothing must be a number'),
    ('data', ['images'], "data must be a word, got ('images',)"), ('data', 'nope', 'data must be one of digits')],
    ids=str)
def test_settings_of_another_kind(k, v, said, tmp_path):
    "Each was a traceback, or a sentence that named neither the file nor the setting"
    path = tmp_path/'r.json'
    path.write_text(json.dumps({**json.loads(recipe_text(recipes['fine_tune_images'])), k: v}))
    with pytest.raises(ValueError) as e: read_recipe(path)
    assert str(e.value).startswith(f'{path}: ') and said in str(e.value)

@pytest.mark.parametrize('data,part,k,v,said', [
    ('images', 'aug', 'foo', 1, "aug has no 'foo'; for images it has rand_aug, color_jitter, erase, scale, hflip"),
    ('images', 'aug', 'hflip', 'often', "hflip of aug must be a number, got 'often'"),
    ('images', 'aug', 'scale', .5, 'scale of aug must be a list, got 0.5'),
    ('clips', 'aug', 'jitter', [1,2], "aug has no 'jitter'; for clips it has rand_aug, color_jitter,"),
    ('coco', 'aug', 'erase', 1, "aug has no 'erase'; for coco it has jitter, sides, hflip"),
    ('digits', 'aug', 'hflip', .5, 'the digits are changed in one way: leave aug out'),
    ('images', 'image_cfg', 'mean', None, 'mean must be in numbers, got None'),
    ('images', 'image_cfg', 'std', ['a','b','c'], "std must be in numbers, got ('a', 'b', 'c')"),
    ('clips', 'image_cfg', 'std', [.5], 'must have one value for each of 3 channels'),
    ('images', 'image_cfg', 'input_size', [3,'32',32], "input_size must be whole numbers above 0, got (3, '32', 32)"),
    ('images', 'image_cfg', 'input_size', [3,32,0], 'input_size must be whole numbers above 0, got (3, 32, 0)'),
    ('images', 'image_cfg', 'interpolation', 'cubic', "bilinear, bicubic, box, hamming, lanczos, random, got 'cubic'"),
    ('images', 'image_cfg', 'crop_pct', 0, 'crop_pct must be above 0, got 0')], ids=str)
def test_settings_within_settings(data, part, k, v, said, tmp_path):
    which = dict(images='fine_tune_images', clips='fine_tune_clips', coco='fine_tune_coco', digits='digits')[data]
    path,content = tmp_path/'r.json',json.loads(recipe_text(recipes[which]))
    content[part] = {**(content[part] or {}), k: v}
    path.write_text(json.dumps(content))
    with pytest.raises(ValueError) as e: read_recipe(path)
    assert str(e.value).startswith(f'{path}: ') and said in str(e.value)

def test_settings_that_are_missing(tmp_path):
    path,content = tmp_path/'r.json',json.loads(recipe_text(recipes['fine_tune_images']))
    del content['image_cfg']['mean']
    path.write_text(json.dumps(content))
    with pytest.raises(ValueError, match='r.json: image settings lack mean$'): read_recipe(path)

@pytest.mark.parametrize('change,said', [(dict(model='foo'), "the recipe's model 'foo' is none of timm's or ours"),
    (dict(model_args=dict(foo=1)), r"model 'revvit_tiny_patch16_224': .*unexpected keyword argument 'foo'"),
    (dict(model='resnet18'), "the recipe's model 'resnet18': .*unexpected keyword argument 'img_size'")], ids=str)
def test_models_that_cannot_be_made(change, said):
    with pytest.raises(ValueError, match=said): recipe_model(replace(recipe, **change), 2)

def test_a_randaugment_that_timm_does_not_know():
    with pytest.raises(ValueError, match="rand_aug must be like 'rand-m6-n5-mstd0.5-inc1', got 'often'"):
        train_tfm(recipes['fine_tune_images'].image_cfg, 'often')

def test_a_recipe_file_that_is_no_text(tmp_path):
    (tmp_path/'r.json').write_bytes(b'{"data": "caf\xe9"}')
    with pytest.raises(ValueError, match='r.json: not a recipe in JSON: '): read_recipe(tmp_path/'r.json')

def test_a_model_that_is_not_ours(tmp_path):
    r = replace(recipes['fine_tune_images'], model='vit_tiny_patch16_224', model_args=dict(depth=1))
    with pytest.raises(ValueError, match="'vit_tiny_patch16_224' is not reversible"): recipe_model(r, 2)

def test_foreign_weights_bring_their_model(tmp_path):
    "A bare file of a published network is known by its tensors; the data keep their size"
    torch.save(timm.create_model('revvit_tiny_patch16_224').state_dict(), tmp_path/'w.pth')
    r = recipes['fine_tune_images']
    assert fit_to_weights(r, tmp_path/'w.pth') == replace(r, model='revvit_tiny_patch16_224') != r

def test_yaml_numbers_without_a_point(tmp_path):
    "PyYAML takes 1e-3 for text"
    pytest.importorskip('yaml')
    (tmp_path/'r.yaml').write_text(recipe_text(recipe).replace('0.001', '1e-3').replace('0.999', '1e-1'))
    back = read_recipe(tmp_path/'r.yaml')
    assert (back.lr, back.betas) == (1e-3, (.9,.1))
