"""A detector in Python and by the commands: what is found, drawn, counted and refused; a tiny one that has learned
nothing and leaves nothing out, so that it always finds something."""
import io, json, os
from contextlib import contextmanager
from types import SimpleNamespace

import numpy as np, pytest, timm, torch
from PIL import Image
from torch.testing import assert_close
import revvit
from revvit.data.coco import coco_tools, mask_of, read_coco, run_lengths
from revvit.models.checkpoints import save_checkpoint
from revvit.models.detector import detector
from revvit.use import cli, detect
from revvit.use.detect import detect_files, in_words
from revvit.use.detection import draw_things, find_things, inference_detector, read_scene, thing_names

torch.set_num_threads(1)
H,W = 24,32
NAMES = 'cat','dog'
small = dict(backbone_args=dict(img_size=32, embed_dim=8, num_heads=1, depth=4), out_channels=8, anchor_scale=2.,
    min_size=32, max_size=64, box_dim=16, mask_layers=(8,), rpn_post_nms_top_n_test=20, box_score_thresh=0.,
    box_detections_per_img=6)

def tiny(masks=True, **kw):
    torch.manual_seed(0)
    args = {k: v for k,v in small.items() if masks or k!='mask_layers'}
    net = detector('revmvit_tiny_224', 2, masks, **{**args, **kw}).eval()
    net.pretrained_cfg = dict(label_names=list(NAMES))
    return net

def photo(i, size=(H,W)): return Image.fromarray(np.random.RandomState(i).randint(0, 255, (*size,3)).astype(np.uint8))

def coco(n=3):
    "A thing in each of `n` images but the last; ids with gaps, not in the order of the names"
    def box(i): return [2+i, 3, 12, 10]
    def around(x, y, w, h): return [[x, y, x+w, y, x+w, y+h, x, y+h]]
    return dict(images=[dict(id=10*i, file_name=f'{i}.png', height=H, width=W) for i in range(n)],
        annotations=[dict(id=i, image_id=10*i, category_id=(9,4)[i%2], bbox=box(i), iscrowd=0,
                          segmentation=around(*box(i))) for i in range(n-1)],
        categories=[dict(id=4, name='dog'), dict(id=9, name='cat')])

@pytest.fixture(scope='module')
def zoo(tmp_path_factory):
    "Files of a detector with masks and one without, of a classifier, and folders of photographs"
    path = tmp_path_factory.mktemp('zoo')
    save_checkpoint(tiny(), path/'masks.pth', class_names=list(NAMES))
    save_checkpoint(tiny(False), path/'boxes.pth', class_names=list(NAMES))
    vit = timm.create_model('revvit_tiny_patch16_224', img_size=32, num_classes=2, embed_dim=24, num_heads=2, depth=1)
    save_checkpoint(vit, path/'vit.pth', class_names=list(NAMES))
    for part in ('train','val'):
        (path/'coco'/part).mkdir(parents=True)
        for i in range(3): photo(i).save(path/'coco'/part/f'{i}.png')
        (path/'coco'/f'instances_{part}.json').write_text(json.dumps(coco()))
    for i,name in enumerate(NAMES):
        (path/'classes'/name).mkdir(parents=True)
        photo(i).save(path/'classes'/name/'a.png')
    photo(7, (50,40)).save(path/'large.jpg')
    (path/'bad.png').write_bytes(b'no image')
    return path

@pytest.fixture
def here(monkeypatch, capfd, zoo):
    def _run(name, *args, weights='masks.pth'):
        monkeypatch.chdir(zoo)
        capfd.readouterr()
        code = getattr(cli, name)([*map(str, args), '--weights', weights, '--device', 'cpu', '--workers', '0'])
        return SimpleNamespace(code=code, **dict(zip(('out','err'), capfd.readouterr())))
    return _run

def only_sentence(r, said):
    assert r.code==2 and r.err.count('\n')==1 and said in r.err and not r.out, r

# ---------------------------------------------------------------- Python

@pytest.mark.parametrize('masks', [True,False])
def test_the_same_as_torchvision(masks):
    net,x = tiny(masks),read_scene(photo(0))
    with torch.no_grad(): want, = net([x])
    got, = find_things(net, [x], 0)
    assert len(got)==6==len(want['labels']) and [o['pred_label'] for o in got]==want['labels'].tolist()
    assert_close(torch.tensor([o['pred_score'] for o in got]), want['scores'])
    boxes = torch.tensor([o['box'] for o in got])
    assert_close(torch.cat((boxes[:,:2], boxes[:,:2]+boxes[:,2:]), 1), want['boxes'], rtol=0, atol=1e-4)
    assert [o['pred_class'] for o in got]==[NAMES[i-1] for i in want['labels']]
    for o,m in zip(got, want['masks'] if masks else ()):
        assert (mask_of(dict(segmentation=o['mask']), (H,W))==(m[0]>.5).numpy()).all()
    assert masks==('mask' in got[0])

def test_neighbours_change_nothing():
    net,xs = tiny(),[read_scene(photo(i, s)) for i,s in enumerate([(H,W),(40,20),(H,W),(9,70)])]
    together,alone = find_things(net, xs, 0),[find_things(net, [x], 0)[0] for x in xs]
    for a,b in zip(together, alone, strict=True):
        assert [o['pred_label'] for o in a]==[o['pred_label'] for o in b]
        assert_close(torch.tensor([o['box'] for o in a]), torch.tensor([o['box'] for o in b]), rtol=0, atol=1e-3)

@pytest.mark.parametrize('training', [True,False])
def test_a_detector_stays_in_its_mode(training):
    net = tiny().train(training)
    find_things(net, [read_scene(photo(0))])
    assert net.training==training==net.roi_heads.training

def test_limits_of_what_is_found():
    net,x = tiny(),read_scene(photo(0))
    scores = [o['pred_score'] for o in find_things(net, [x], 0)[0]]
    assert scores==sorted(scores, reverse=True)
    assert [o['pred_score'] for o in find_things(net, [x], 0, top=2)[0]]==scores[:2]
    assert [o['pred_score'] for o in find_things(net, [x], scores[3])[0]]==scores[:4] and find_things(net, [x], 1)==[[]]

@pytest.mark.parametrize('amp', ['bf16','fp16'])
def test_mixed_precision(amp):
    net,x = tiny(),read_scene(photo(0))
    got, = find_things(net, [x], 0, amp=amp)
    assert got and all(np.isfinite(o['box']).all() and 0<=o['pred_score']<=1 for o in got)

@pytest.mark.parametrize('kind', ['path','str','pil','array','grey array','8-bit tensor','tensor'])
def test_whatever_is_shown(kind, zoo):
    file = zoo/'coco'/'val'/'0.png'
    pixels = np.asarray(Image.open(file))
    item = {'path': file, 'str': str(file), 'pil': Image.open(file), 'array': pixels, 'grey array': pixels[:,:,0],
            '8-bit tensor': torch.from_numpy(pixels.copy()).permute(2, 0, 1), 'tensor': read_scene(file)}[kind]
    got = inference_detector(tiny(), item, min_score=0)
    want = inference_detector(tiny(), photo(0), min_score=0)
    assert (got['height'],got['width'])==(H,W) and len(got['things'])==6
    if kind!='grey array': assert got==want

def test_several_from_a_file(zoo):
    got = revvit.inference_detector(None, [zoo/'large.jpg', photo(0)], zoo/'masks.pth', 'cpu', 0.)
    assert [(o['height'],o['width']) for o in got]==[(50,40),(H,W)] and json.dumps(got)
    assert got[1]==inference_detector(tiny(), photo(0), min_score=0)

def test_names_of_categories():
    net = tiny()
    assert thing_names(net)==['cat','dog']
    net.pretrained_cfg = {}
    assert thing_names(net)==['1','2']

@pytest.mark.parametrize('make,says', [
    (lambda: find_things(torch.nn.Linear(1, 1), []), 'a Linear is no detector'),
    (lambda: find_things(tiny(), [], 1.5), 'min_score must be from 0 to 1, got 1.5'),
    (lambda: read_scene(torch.rand(1, 3, 4, 4)), r'got \(1, 3, 4, 4\); several go in a list'),
    (lambda: read_scene('film.mp4'), 'film.mp4: a video, but the model takes images'),
    (lambda: read_scene('https://x.org/a.png'), 'addresses are not read'),
    (lambda: revvit.inference_model(tiny(), photo(0)), 'MaskRCNN finds things in images, .*inference_detector'),
    (lambda: revvit.eval_loader(tiny(), '.'), 'ReversibleMaskRCNN finds things in images')])
def test_refusals(make, says):
    with pytest.raises(ValueError, match=says): make()

def test_an_output_that_is_no_number(zoo):
    net = tiny()
    net.backbone.pyramid.layer_blocks[0][0].weight.data.fill_(float('nan'))
    with pytest.raises(FloatingPointError, match='large.jpg: the model.s output is not a number'):
        inference_detector(net, zoo/'large.jpg')

@pytest.mark.parametrize('size,want', [((H,W),(384,288)), ((900,1600),(1280,720)), ((5,3000),(1280,2)),
                                       ((1,1),(400,400))])
def test_pictures(size, want):
    things = inference_detector(tiny(), photo(0), min_score=0)['things']
    assert draw_things(photo(0, size), []).size==want
    whole = np.ones(size, np.uint8)
    one = dict(pred_label=2, pred_class='dog', pred_score=.5, box=[0.,0.,size[1],size[0]], mask=run_lengths(whole))
    drawn,plain = draw_things(photo(0, size), [one]),draw_things(photo(0, size), [])
    assert drawn.size==want and drawn.tobytes()!=plain.tobytes() and draw_things(photo(0), things).size==(384,288)

# ---------------------------------------------------------------- revvit_predict

def test_lines_and_pictures(here, zoo, tmp_path):
    r = here('revvit_predict', 'coco/val', 'large.jpg', '--min-score', 0, '--top', 3, '--draw', tmp_path/'new'/'drawn')
    lines = r.out.splitlines()
    assert r.code==0 and len(lines)==4 and lines[3].startswith('large.jpg: ') and ' %' in lines[3]
    assert r.err==f"revvit_predict: 4 pictures in {tmp_path/'new'/'drawn'}\n"
    names = ['0.png','1.png','2.png','large.jpg']
    assert sorted(o.name for o in (tmp_path/'new'/'drawn').iterdir())==names
    assert Image.open(tmp_path/'new'/'drawn'/'large.jpg').format=='JPEG'
    said = here('revvit_predict', 'large.jpg', '--min-score', '1')
    assert (said.code, said.out)==(0, 'large.jpg: nothing of 100 % or more\n')

def test_json(here, zoo):
    r = here('revvit_predict', 'large.jpg', 'coco/val/0.png', '--json', '--min-score', 0)
    first,second = json.loads(r.out)
    want = inference_detector(tiny(), zoo/'large.jpg', min_score=0)
    assert first==dict(file='large.jpg', **want) and (second['height'],second['width'])==(H,W)
    o = first['things'][0]
    assert {*o}=={'pred_label','pred_class','pred_score','box','mask'} and o['mask']['size']==[50,40]
    x,y,w,h = o['box']
    assert 0<=x and 0<=y and x+w<=40.001 and y+h<=50.001
    boxes = json.loads(here('revvit_predict', 'large.jpg', '--json', '--min-score', 0, weights='boxes.pth').out)
    assert boxes[0]['things'] and all('mask' not in o for o in boxes[0]['things'])

@pytest.mark.parametrize('batch,amp', [(1,'off'), (4,'off'), (2,'bf16')])
def test_batches(batch, amp, here):
    r = here('revvit_predict', 'coco/val', 'large.jpg', 'bad.png', 'gone.png', '--batch-size', batch, '--amp', amp,
             '--json', '--min-score', 0)
    assert r.code==2 and [o['file'] for o in json.loads(r.out)]==[f'coco/val/{i}.png' for i in range(3)]+['large.jpg']
    assert r.err.splitlines()==['revvit_predict: bad.png: not an image, or in no format that Pillow reads',
                                'revvit_predict: gone.png: no such image file']

def test_files_read_by_processes(zoo):
    files = [str(zoo/'coco'/'val'/f'{i}.png') for i in range(3)]+[str(zoo/'bad.png')]
    here,there = (list(detect_files(tiny(), files, 0, workers=n)) for n in (0,1))
    assert here==there and 'bad.png: not an image' in here[3]

@contextmanager
def standard_input(data):
    "What a pipe brings, in this process"
    before,(source,to) = os.dup(0),os.pipe()
    with open(to, 'wb') as f: f.write(data)   # less than a pipe holds
    os.dup2(source, 0)
    os.close(source)
    try: yield
    finally:
        os.dup2(before, 0)
        os.close(before)

def test_standard_input(here, tmp_path):
    data = io.BytesIO()
    photo(0).save(data, 'PNG')
    with standard_input(data.getvalue()): r = here('revvit_predict', '-', '--min-score', 0, '--draw', tmp_path)
    assert r.code==0 and r.out.startswith('-: ') and [o.name for o in tmp_path.iterdir()]==['standard input.png']

def test_no_picture_over_an_image(here, zoo):
    before = (zoo/'large.jpg').read_bytes()
    only_sentence(here('revvit_predict', 'large.jpg', '--draw', '.'), 'large.jpg: is one of the images')
    assert (zoo/'large.jpg').read_bytes()==before

@pytest.mark.parametrize('args,weights,says', [
    ('large.jpg --crops 3', 'masks.pth', '--crops is for models that name whole images'),
    ('large.jpg --views 2', 'masks.pth', '--views is for models that name whole images'),
    ('large.jpg --features f.npz', 'masks.pth', '--features is for models that name whole images'),
    ('large.jpg --min-score 50', 'masks.pth', '--min-score must be from 0 to 1, got 50'),
    ('large.jpg --amp fp8', 'masks.pth', '--amp must be off, bf16 or fp16'),
    ('large.jpg --top 0', 'masks.pth', '--top must be 1 or more'),
    ('large.jpg --draw bad.png', 'masks.pth', 'bad.png: '),
    ('large.jpg --draw x', 'vit.pth', '--draw and --min-score are for a detector, and vit.pth names images'),
    ('large.jpg --min-score .3', 'vit.pth', '--draw and --min-score are for a detector')])
def test_predict_refuses(args, weights, says, here):
    only_sentence(here('revvit_predict', *args.split(), weights=weights), says)

def test_things_in_words():
    def things(*scores): return [dict(pred_class=n, pred_score=s) for n,s in scores]
    assert in_words(things(('a',.9),('b',.8),('a',.75)), .5)=='2 x a (90.0 75.0 %), b (80.0 %)'
    assert in_words(things(*[('a',.5)]*7), .5)=='7 x a (50.0 50.0 50.0 50.0 50.0 ... %)'
    assert in_words([], .25)=='nothing of 25 % or more'

# ---------------------------------------------------------------- revvit_test

@pytest.fixture
def right(monkeypatch, zoo):
    "A detector that finds what the file says, cats and dogs by its own labels"
    data = read_coco(zoo/'coco'/'instances_val.json', zoo/'coco'/'val')
    def found(things):
        names = [data.vocab[data.ids.index(a['category_id'])] for a in things]
        return [dict(pred_label=1+NAMES.index(n), pred_score=.9, box=a['bbox'], mask=code(mask_of(a, (H,W))))
                for n,a in zip(names, things)]
    def code(m):
        o = coco_tools('mask').encode(np.asfortranarray(m))
        return {**o, 'counts': o['counts'].decode()}
    known = {read_scene(p).sum().item(): found(o) for p,o in zip(data.items, data.things)}
    monkeypatch.setattr(detect, 'find_things', lambda model, images, *args: [known[x.sum().item()] for x in images])

def test_what_is_right_counts_as_right(here, right):
    r = here('revvit_test', '--data', 'coco', '--per-class')
    assert (r.code, r.err)==(0, '')
    all_right = 'AP 100.0 %, AP50 100.0 %, AP75 100.0 %; small 100.0 %, medium none there, large none there'
    assert r.out.splitlines()==[f'boxes: {all_right}', f'masks: {all_right}', '3 images in coco with 2 things',
        'dog: boxes AP 100.0 %, masks AP 100.0 %, 1 thing', 'cat: boxes AP 100.0 %, masks AP 100.0 %, 1 thing']

@pytest.mark.parametrize('per_class', [True,False])
def test_ap_as_json(per_class, here, right):
    r = here('revvit_test', '--data', 'coco', '--json', *['--per-class']*per_class)
    got = json.loads(r.out)
    assert (got['data'],got['images'],got['things'],got['boxes']['ap'])==('coco',3,2,pytest.approx(1))
    assert got['masks']['medium'] is None and ('classes' in got['boxes'])==per_class
    if per_class: assert got['boxes']['classes']==pytest.approx(dict(dog=1, cat=1))

@pytest.mark.parametrize('weights,kinds', [('masks.pth',['boxes','masks']), ('boxes.pth',['boxes'])])
@pytest.mark.parametrize('batch', [1,2])
def test_a_detector_that_knows_nothing(weights, kinds, batch, here):
    r = here('revvit_test', '--data', 'coco', '--batch-size', batch, '--amp', 'off', weights=weights)
    assert r.code==0 and [o.split(':')[0] for o in r.out.splitlines()]==[*kinds, '3 images in coco with 2 things']

def test_a_file_and_its_images(here, right, zoo):
    r = here('revvit_test', '--data', 'coco/instances_val.json', '--root', 'coco/val')
    assert r.code==0 and 'boxes: AP 100.0 %' in r.out
    only_sentence(here('revvit_test', '--data', 'coco/instances_val.json'), '0.png: no such image file (and 2 more')

def test_images_that_cannot_be_read(here, right, zoo, tmp_path):
    "Its size can be read, and its pixels end too early"
    (tmp_path/'val').mkdir()
    for i in range(3): photo(i).save(tmp_path/'val'/f"{i}.{'png' if i else 'jpg'}")
    c = coco()
    c['images'][0]['file_name'] = '0.jpg'
    (tmp_path/'instances_val.json').write_text(json.dumps(c))
    whole = (tmp_path/'val'/'0.jpg').read_bytes()
    (tmp_path/'val'/'0.jpg').write_bytes(whole[:-400])
    r = here('revvit_test', '--data', tmp_path)
    only_sentence(r, '0.jpg: the image cannot be read: ')
    assert '--on-bad skip leaves out' in r.err
    r = here('revvit_test', '--data', tmp_path, '--on-bad', 'skip')
    assert r.code==0 and 'boxes: AP 100.0 %' in r.out and f'2 images in {tmp_path} with 1 thing, 1 left out' in r.out
    assert 'revvit_test: 1 image cannot be read and is not counted: ' in r.err
    got = json.loads(here('revvit_test', '--data', tmp_path, '--on-bad', 'skip', '--json').out)
    assert (got['images'],got['skipped'])==(2,1)

def categories(zoo, tmp_path, change):
    c = coco()
    change(c)
    (tmp_path/'x.json').write_text(json.dumps(c))
    return '--data', tmp_path/'x.json', '--root', 'coco/val'

def test_categories_are_known_by_name(here, right, zoo, tmp_path):
    "In any order, more or fewer, as long as no thing is of one that the detector lacks"
    def more(c): c['categories'].append(dict(id=1, name='things'))   # as Roboflow has it
    assert 'boxes: AP 100.0 %' in here('revvit_test', *categories(zoo, tmp_path, more)).out
    def fewer(c):
        c['categories'].pop(0)
        c['annotations'] = [o for o in c['annotations'] if o['category_id']==9]
    assert 'boxes: AP 100.0 %' in here('revvit_test', *categories(zoo, tmp_path, fewer)).out
    def other(c): c['categories'][0]['name'] = 'cow'
    only_sentence(here('revvit_test', *categories(zoo, tmp_path, other)),
                  "x.json: 1 thing of the category 'cow', which is none of the detector's 2: cat, dog")
    def strange(c): c.update(annotations=[], categories=[dict(id=1, name='cow')])
    only_sentence(here('revvit_test', *categories(zoo, tmp_path, strange)), 'none of its categories is one of the')

@pytest.mark.parametrize('args,weights,says', [
    ('--data coco --confusion c.png', 'masks.pth', '--confusion is for models that name whole images'),
    ('--data coco --predictions p.csv', 'masks.pth', '--predictions is for models that name whole images'),
    ('--data coco --crops 3', 'masks.pth', '--crops is for models that name whole images'),
    ('--data coco --views 3', 'masks.pth', '--views is for models that name whole images'),
    ('--data coco --part all', 'masks.pth', '--part is for folders of classes'),
    ('--data coco --on-bad ignore', 'masks.pth', '--on-bad must be raise or skip'),
    ('--data gone', 'masks.pth', 'gone: no such folder'),
    ('--data classes', 'masks.pth', "classes: no data in COCO's format"),
    ('--data bad.png', 'masks.pth', "bad.png: no data in COCO's format"),
    ('--data coco', 'vit.pth', "coco: things in images, in COCO's format, on which a detector is tested, and vit.pth "
                               "names images")])
def test_test_refuses(args, weights, says, here):
    only_sentence(here('revvit_test', *args.split(), weights=weights), says)

def test_without_pycocotools(here, monkeypatch):
    monkeypatch.setattr('revvit.data.coco.find_spec', lambda name: None)
    only_sentence(here('revvit_test', '--data', 'coco'), 'pip install pycocotools')
