"Every way to say which model is meant, what one says of a file, and the accuracy over a folder or a list"
import math, urllib.error
from pathlib import Path

import av, numpy as np, pytest, timm, torch
from PIL import Image
from timm.models import is_model_pretrained, save_for_hf
from torch import nn, tensor
from torch.testing import assert_close
from torch.utils.data import DataLoader, DistributedSampler
from revvit.data.digits import digits, digits_cfg, digits_dls
from revvit.data.images import ImageTransform
from revvit.data.video_file import write_video
from revvit.data.views import ClipCrops
from revvit.models.checkpoints import input_settings, save_checkpoint
from revvit.use.evaluation import class_index, eval_loader, evaluate, folder_items, per_class
from revvit.use.inference import (aliases, class_names, describe_probs, evaluating, extract_feat, get_model,
                                  inference_model, model_name, predict_file, predict_views, recognise_model)
from revvit.use.many import predict_files
from revvit.use.reader import Reader

TINY = 'revvit_tiny_patch16_224'
narrow = dict(embed_dim=24, num_heads=2, depth=2)
said = lambda words: pytest.raises(ValueError, match=words)

class Known(nn.Module):
    "Logits are 0 and ln 3 times the mean of the input, features that mean and twice that mean"
    def __init__(self, names=None, num_classes=2, num_frames=None):
        super().__init__()
        self.w,self.drop = nn.Parameter(tensor([0.,math.log(3)])),nn.Dropout(.5)
        self.num_classes,self.num_frames = num_classes,num_frames
        self.pretrained_cfg = dict(input_size=(1,8,8), mean=(0.,), std=(1.,), interpolation='bilinear', crop_pct=1.,
                                   label_names=names)
    def forward_features(self, x): return self.drop(x).flatten(1)
    def forward_head(self, x, pre_logits=False):
        x = x.mean(1, keepdim=True)
        return x*tensor([1.,2.]) if pre_logits else x*self.w
    def forward(self, x): return self.forward_head(self.forward_features(x))

def film(path, n=30, size=48):
    "A square that moves to the right"
    with av.open(str(path), 'w') as f:
        s = f.add_stream('libx264', rate=30, width=size, height=size, pix_fmt='yuv420p')
        for i in range(n):
            im = np.zeros((size,size,3), np.uint8)
            im[16:32,i:i+8] = 255
            f.mux(s.encode(av.VideoFrame.from_ndarray(im, format='rgb24')))
        f.mux(s.encode())

@pytest.fixture(scope='module')
def zoo(tmp_path_factory):
    "Files of weights of each kind, and a picture"
    path = tmp_path_factory.mktemp('zoo')
    torch.manual_seed(0)
    own = timm.create_model(TINY, img_size=32, num_classes=3, **narrow)
    save_checkpoint(own, path/'own.pth', class_names=['ant','bee','cat'])
    save_for_hf(own, path/'folder', model_args=own.model_args)
    full = timm.create_model('revmvit_tiny_224', num_classes=7)
    torch.save(dict(model_state=full.state_dict(), epoch=9), path/'full.pyth')
    torch.save(dict(epoch=3), path/'none.pth')
    (path/'bad.pth').write_bytes(b'no weights')
    Image.new('RGB', (20,20), 'white').save(path/'white.png')
    return path

# ---------------------------------------------------------------- names

@pytest.mark.parametrize('model,some', [
    (Known(['cat','dog']), {0: 'cat', 1: 'dog'}), (Known(), {0: '0', 1: '1'}), (Known(num_frames=16), {0: '0', 1: '1'}),
    (Known(num_classes=1000), {0: 'tench, Tinca tinca', 999: 'toilet tissue, toilet paper, bathroom tissue'}),
    (Known(num_classes=400, num_frames=16), {0: 'abseiling', 399: 'zumba', 196: "massaging person's head",
        208: 'passing American football (in game)', 308: 'skiing (not slalom or crosscountry)'}),
    (Known(num_classes=1000, num_frames=16), {0: '0', 999: '999'}), # no data set of clips has a thousand classes
    (Known(num_classes=0), {}), (Known(['a']*1000, num_classes=1000), {0: 'a', 999: 'a'})],
    ids=['own', 'numbers', 'clips', 'ImageNet', 'Kinetics-400', 'a thousand of clips', 'none', 'own of a thousand'])
def test_class_names(model, some):
    names = class_names(model)
    assert len(names) == model.num_classes and {i: names[i] for i in some} == some

@pytest.mark.parametrize('name', [*aliases, 'configs/Kinetics/REV_MVIT_B_16x4_CONV.yaml',
    'configs/revvit/revvit-base_8xb256_in1k.py'])
def test_publishers_names(name):
    "Each is one of our models, with published weights, of the same size and kind"
    ours = model_name(name)
    assert timm.is_model(ours) and is_model_pretrained(ours)
    assert ('mvit' in ours) == ('MVIT' in name) and ('small' in ours) == ('VIT_S' in name or 'small' in name)
    assert ('16x4' in ours) == ('16x4' in name)

def test_timms_names_stay():
    for o in (TINY, 'resnet10t'): assert model_name(o) == o
    with said("there is no model 'REV_VIT_XL'; ours are revmvit_base_16x4_224, "): model_name('REV_VIT_XL')

# ---------------------------------------------------------------- which model

@pytest.mark.parametrize('name', timm.list_models(['revvit_*','revmvit_*']))
def test_a_model_is_recognised_by_its_tensors(name):
    "With any number of classes; no other is taken for it, and with some tensors gone none is"
    with torch.device('meta'): tensors = timm.create_model(name, num_classes=7).state_dict()
    assert recognise_model('x.pth', dict(model_state=tensors)) == (name,7)
    gone = list(tensors)[len(tensors)//2].rpartition('.')[0]
    short = {k: v for k,v in tensors.items() if not k.startswith(gone)}
    with said('x.pth does not say which model it is for: add its name'): recognise_model('x.pth', short)

def test_another_size_is_not_guessed():
    "The size of the image cannot be told from the shapes alone"
    with torch.device('meta'): tensors = timm.create_model(TINY, img_size=384).state_dict()
    with said('x.pth does not say which model it is for'): recognise_model('x.pth', tensors)

@pytest.mark.parametrize('file,name', [('own.pth',None), ('own.pth',TINY), ('folder',None), ('full.pyth',None),
    ('full.pyth','revmvit_tiny_224')])
def test_model_from_a_file(file, name, zoo):
    m = get_model(name, zoo/file, 'cpu')
    want = (torch.load(zoo/'full.pyth')['model_state']
            if file == 'full.pyth' else get_model(weights=zoo/'own.pth').state_dict())
    assert not m.training and m.state_dict().keys() == want.keys()
    for k,v in m.state_dict().items(): assert torch.equal(v.cpu(), want[k].cpu()), k
    assert m.num_classes == (7 if file == 'full.pyth' else 3)
    if file == 'own.pth': assert class_names(m) == ['ant','bee','cat']

def test_a_name_alone_is_fetched_once(tmp_path, monkeypatch):
    "Without network a sentence; with the file that timm would fetch in PyTorch's cache, no network is needed"
    def none(*args, **kwargs): raise urllib.error.URLError('no network')
    monkeypatch.setenv('TORCH_HOME', str(tmp_path))
    monkeypatch.setattr(torch.hub, 'download_url_to_file', none)
    where = 'https://dl.fbaipublicfiles.com/pyslowfast/rev/REV_VIT_S.pyth: no network; download the file'
    with pytest.raises(ConnectionError, match=f'could not be had from {where}'): get_model('REV_VIT_S')
    (tmp_path/'hub'/'checkpoints').mkdir(parents=True, exist_ok=True)
    s = timm.create_model('revvit_small_patch16_224')
    torch.save(dict(model_state=s.state_dict()), tmp_path/'hub'/'checkpoints'/'REV_VIT_S.pyth')
    got = get_model('revvit-small_3rdparty_in1k', device='cpu')
    assert torch.equal(got.head.weight, s.head.weight) and not got.training

@pytest.mark.parametrize('name,file,words', [
    (None, None, 'which model\\? give its name'), ('resnet9999', None, "there is no model 'resnet9999'"),
    (TINY, None, f'no published weights of {TINY} are known'), (None, 'bad.pth', 'bad.pth: it is '),
    (None, 'none.pth', 'none.pth: expected tensors by name'),
    ('revmvit_tiny_224', 'none.pth', 'none.pth: expected tensors by name'),
    ('resnet10t', 'own.pth', 'weights from a file are for our own models'),
    ('REV_VIT_S', 'own.pth', f'holds a {TINY}, not a revvit_small'),
    ('revmvit_tiny_16x4_224', 'full.pyth', 'full.pyth does not fit')])
def test_no_model_of_these(name, file, words, zoo):
    with said(words): get_model(name, file and zoo/file)

@pytest.mark.parametrize('device', ['cuda:99', 'tpu'])
def test_no_model_there(device, zoo):
    with said(f"device '{device}' cannot be used"): get_model(None, zoo/'own.pth', device)

# ---------------------------------------------------------------- one file

def test_modes_come_back_after_an_error():
    m = nn.Sequential(nn.Dropout(), nn.Dropout().eval(), nn.Linear(2,2))
    with pytest.raises(KeyError), evaluating(m):
        assert not any(o.training for o in m.modules()) and not m(torch.ones(1,2)).requires_grad
        raise KeyError
    assert [m.training, *(o.training for o in m)] == [True,True,False,True]

def test_answer_of_a_known_model(zoo):
    "Its dropout would spoil it in training mode, in which it is before and after"
    m = Known(['cat','dog']).train()
    res = inference_model(m, zoo/'white.png')
    assert list(res) == ['pred_label','pred_score','pred_scores','pred_class'] and m.training
    assert (res['pred_label'], res['pred_class'], res['pred_score']) == (1, 'dog', res['pred_scores'][1])
    assert_close(res['pred_scores'], [.25,.75], rtol=0, atol=1e-6)
    assert inference_model(Known(), zoo/'white.png')['pred_class'] == '1'
    assert_close(extract_feat(m, zoo/'white.png'), tensor([1.,2.]), rtol=0, atol=1e-6)

def test_answer_of_a_file_of_weights(zoo):
    m = get_model(weights=zoo/'own.pth', device='cpu')
    x = ImageTransform(input_settings(m))(zoo/'white.png')[None]
    with torch.no_grad(): want = m(x)[0].softmax(0)
    res = inference_model(None, zoo/'white.png', weights=zoo/'own.pth', device='cpu')
    assert_close(tensor(res['pred_scores']), want, rtol=0, atol=1e-6)
    assert res['pred_class'] == ['ant','bee','cat'][want.argmax()]

def test_views_are_averaged():
    "As probabilities and as features: of a white and a black view"
    two = torch.cat([torch.ones(1,1,8,8), torch.zeros(1,1,8,8)])
    probs,feats = predict_views(Known(), [two])[0]
    assert_close((probs,feats), (tensor([.375,.625]).double(), tensor([.5,1.]).double()), rtol=0, atol=1e-6)

def test_more_views_see_more(tmp_path):
    film(tmp_path/'v.mp4', 40)
    c = timm.create_model('revmvit_tiny_16x4_224', img_size=32, num_frames=4, num_classes=3)
    assert not torch.allclose(*(extract_feat(c, tmp_path/'v.mp4', views=n) for n in (1,3)), atol=1e-5)

@pytest.mark.parametrize('classes,pool,call,words', [(0, 'avg', inference_model, 'no classifier, only features'),
    (3, '', inference_model, 'does not pool its tokens'), (3, '', extract_feat, 'does not pool its tokens')])
def test_a_model_without_a_single_answer(classes, pool, call, words, zoo):
    m = timm.create_model(TINY, img_size=32, num_classes=0, **narrow)
    m.reset_classifier(classes, pool)
    with said(words): call(m, zoo/'white.png')

def test_features_need_no_classifier(zoo):
    assert extract_feat(timm.create_model(TINY, img_size=32, num_classes=0, **narrow), zoo/'white.png').shape == (48,)

@pytest.mark.parametrize('call', [predict_file, inference_model, extract_feat])
def test_an_answer_that_is_no_number(call, zoo):
    m = Known()
    m.w.data[0] = math.nan
    with pytest.raises(FloatingPointError, match="white.png: the model's output is not a number"):
        call(m, zoo/'white.png')

@pytest.mark.parametrize('file,words', [('none.png', 'none.png: no such image file'),
    ('a.mp4', 'a.mp4: a video, but the model takes images')])
def test_images_that_are_none(file, words, zoo):
    with pytest.raises((ValueError, OSError), match=words): inference_model(Known(), zoo/file)

@pytest.mark.parametrize('kind,words', [('none', 'no such video'), ('empty', 'empty'), ('cut', 'truncated'),
    ('one', 'a video of 1 frame'), ('image', 'white.png: an image, but the model takes clips of 4 frames')])
def test_videos_that_are_none(kind, words, zoo, tmp_path):
    c = timm.create_model('revmvit_tiny_16x4_224', img_size=32, num_frames=4, num_classes=3)
    path = zoo/'white.png' if kind == 'image' else tmp_path/f'{kind}.mp4'
    if kind in ('cut', 'one'): film(path, 40 if kind == 'cut' else 1)
    if kind == 'cut': path.write_bytes(path.read_bytes()[:-200])
    if kind == 'empty': path.touch()
    with pytest.raises((ValueError, OSError)) as error: inference_model(c, path)
    assert f'{path.name}: ' in str(error.value) and words in str(error.value)

def test_weights_go_with_a_name(zoo):
    with said('weights go with the name of a model'): inference_model(Known(), zoo/'white.png', weights=zoo/'own.pth')

def test_inputs_of_several_shapes_keep_their_order():
    "Those of one shape go through the model together; each has its own answer"
    xs = [torch.full((v,1,n,n), float(i)) for i,(v,n) in enumerate([(1,8), (1,4), (2,8), (1,8), (1,4)])]
    got = predict_views(Known(), xs)
    for x,(p,f) in zip(xs, got):
        assert_close((p,f), tuple(o.mean(0) for o in (torch.stack([x.new_zeros(len(x)), math.log(3)*x.mean((1,2,3))], 1)
            .double().softmax(1), x.mean((1,2,3))[:,None].double()*tensor([1.,2.]).double())), rtol=0, atol=1e-6)
    assert predict_views(Known(), []) == []

def shown(zoo):
    "A colour picture in every form"
    im = Image.effect_noise((40,30), 50).convert('RGB')
    im.save(zoo/'shown.png')
    a = np.array(im)
    return dict(path=zoo/'shown.png', words=str(zoo/'shown.png'), pil=im, array=a,
                tensor=torch.from_numpy(a).movedim(-1, 0),
                strides=np.asfortranarray(a))

@pytest.mark.parametrize('channels', [1, 3])
@pytest.mark.parametrize('kind', ['words', 'pil', 'array', 'tensor', 'strides', 'prepared'])
def test_a_picture_in_every_form(kind, channels, zoo):
    "Gives the answer of its file, to the bit"
    m = timm.create_model(TINY, img_size=32, num_classes=3, in_chans=channels, **narrow)
    if channels == 1: m.pretrained_cfg = {**m.pretrained_cfg, **digits_cfg, 'input_size': (1,32,32)}
    forms = shown(zoo)
    x = forms[kind] if kind != 'prepared' else Reader(m)(forms['path'])[0]
    assert inference_model(m, x) == inference_model(m, forms['path'])
    assert torch.equal(extract_feat(m, x), extract_feat(m, forms['path']))

def test_grey_and_turned_pictures(zoo):
    "A grey array, one with a channel of its own, and a photograph that its EXIF turns"
    m = timm.create_model(TINY, img_size=32, num_classes=3, **narrow)
    a = np.array(Image.effect_noise((40,30), 50))
    want = inference_model(m, Image.fromarray(a).convert('RGB'))
    assert inference_model(m, a) == inference_model(m, a[:,:,None]) == want
    im,exif = Image.fromarray(a).convert('RGB'),Image.Exif()
    exif[0x112] = 6
    im.save(zoo/'turned.png', exif=exif)
    opened = Image.open(zoo/'turned.png')
    assert inference_model(m, opened) == inference_model(m, zoo/'turned.png') != want and opened.size == (40,30)

@pytest.mark.parametrize('bs', [None, 1, 2, 7])
def test_a_list_gives_a_list(bs, zoo):
    m = timm.create_model(TINY, img_size=32, num_classes=3, **narrow)
    items = (list(shown(zoo).values())[:3]+[zoo/'white.png']+[torch.randn(3,32,32,
        generator=torch.Generator().manual_seed(i)) for i in range(3)])
    got,feats = inference_model(m, items, bs=bs),extract_feat(m, tuple(items), bs=bs)
    for o,a,f in zip(items, got, feats):
        one = inference_model(m, o)
        assert a['pred_class'] == one['pred_class']
        assert_close((a['pred_scores'], f), (one['pred_scores'], extract_feat(m, o)), rtol=0, atol=1e-5)
    assert inference_model(m, []) == [] == extract_feat(m, [])

@pytest.mark.parametrize('item,words', [(np.ones((4,5,6), np.uint8), r'8-bit array \(H, W, 3\) or \(H, W\), got uint8 '
                                         r'of shape \(4, 5, 6\)'),
    (np.ones((8,8,3)), 'got float64 of shape'), (torch.ones(4,3,32,32), r'got \(4, 3, 32, 32\); for a batch give '
                                                 r'list\(x\)'),
    (torch.ones(4,3,8,8, dtype=torch.uint8), 'several go in a list')])
def test_what_is_no_picture(item, words):
    with said(words): inference_model(timm.create_model(TINY, img_size=32, num_classes=3, **narrow), item)

@pytest.mark.parametrize('item', [np.ones((8,8,3), np.uint8), Image.new('RGB', (8,8)),
                                  torch.ones(3,8,8, dtype=torch.uint8)])
def test_pictures_for_a_model_of_clips(item):
    c = timm.create_model('revmvit_tiny_16x4_224', img_size=32, num_frames=4, num_classes=3)
    with said('an image, but the model takes clips of 4 frames: a video file, or a prepared tensor'):
        inference_model(c, item)
    x = Reader(c)._prepared(torch.zeros(3,4,32,32))
    assert x.shape == (1,3,4,32,32) and len(inference_model(c, torch.zeros(3,4,32,32))['pred_scores']) == 3

@pytest.mark.parametrize('crops', [1, 3, 5])
def test_crops_are_averaged(crops, zoo, tmp_path):
    "As by hand: every crop through the model, the mean of the probabilities; three of them at the smaller scale"
    m = timm.create_model(TINY, img_size=32, num_classes=3, **narrow)
    m.pretrained_cfg = {**m.pretrained_cfg, 'crop_pct': .8}
    im = Image.effect_noise((80,40), 50).convert('RGB')
    cfg,short = input_settings(m),32 if crops == 3 else 40
    big = im.resize((2*short,short), Image.Resampling.BICUBIC)
    places = {1: [(24,4)], 3: [(0,0), (16,0), (32,0)], 5: [(0,0), (48,0), (0,8), (48,8), (24,4)]}[crops]
    mean,std = (tensor(cfg[k])[:,None,None] for k in ('mean','std'))
    x = torch.stack([(torch.from_numpy(np.array(big.crop((a,b,a+32,b+32)))).movedim(-1,0)/255-mean)/std
                     for a,b in places])
    with torch.no_grad(): want = m.eval()(x).softmax(1).mean(0)
    assert_close(tensor(inference_model(m, im, crops=crops)['pred_scores']), want, rtol=0, atol=1e-5)

@pytest.mark.parametrize('size', [(48,96), (96,48), (48,48)], ids=str)
def test_three_crops_reach_both_ends_of_a_video(size, tmp_path):
    "SlowFast's: left, middle and right of a wide one, top, middle and bottom of a tall one; clips first, then crops"
    h,w = size
    f = np.zeros((30,h,w,3), np.uint8)
    if w>h: f[:,:,-w//8:] = 255
    else: f[:,-h//8:] = 255
    write_video(tmp_path/'v.mp4', f, qscale=1)
    cfg = dict(input_size=(3,4,32,32), mean=(0.,)*3, std=(1.,)*3, interpolation='bilinear', crop_pct=.8)
    x = ClipCrops(cfg, 2, 3)(tmp_path/'v.mp4')
    light = x.mean((1,2,3,4)).view(2,3)
    assert x.shape == (6,3,4,32,32) and ((light[:,2] > .1).all() and (light[:,0] < .05).all() or h == w)
    assert_close(light[0], light[1], rtol=0, atol=.02)
    if h == w: assert_close(x[0], x[2], rtol=0, atol=0)

@pytest.mark.parametrize('crops', [0, 2, 4, 30])
def test_crops_that_are_none(crops, zoo):
    with said('crops must be 1'): inference_model(Known(), zoo/'white.png', crops=crops)

def test_four_words():
    got = describe_probs(Known(['cat','dog']), tensor([.25,.75]))
    assert got == dict(pred_label=1, pred_score=.75, pred_scores=[.25,.75], pred_class='dog')

# ---------------------------------------------------------------- counting

class Itself(nn.Linear):
    "Logits are the mean over all but classes"
    def forward(self, x): return x.flatten(2).mean(2)

def items():
    "Five items, class 0 first and class 6 last; the labels come first, second, fifth, last and first"
    z,y = torch.arange(7.).flip(0).repeat(5,1),tensor([0,1,4,6,0])
    return z,y,[(o[:,None,None],l) for o,l in zip(z, y)]

@pytest.mark.parametrize('bs', [1, 2, 3, 5, 100])
def test_items_are_counted(bs):
    z,y,dset = items()
    want = dict(top1=.4, top5=.8, loss=nn.functional.cross_entropy(z, y).item(), n=5)
    assert_close(evaluate(Itself(1,1), DataLoader(dset, bs)), want, rtol=0, atol=1e-6)

@pytest.mark.parametrize('progress', [None, False, True])
def test_a_bar_when_asked_for(progress, capfd):
    "Or on a terminal, which tests/test_cli.py has; a file or a pipe gets none"
    evaluate(Itself(1,1), DataLoader(items()[2], 2), progress)
    assert ('0/3' in capfd.readouterr().err) == (progress is True)

def test_fewer_than_five_classes():
    z,y,_ = items()
    assert evaluate(Itself(1,1), [(z[:,:3,None,None], y.clamp(max=2).byte())])['top5'] == 1

def test_views_count_once():
    "The probabilities of two views are averaged; one view is an ordinary batch"
    two = torch.stack([tensor([0.,math.log(3)]), torch.zeros(2)])[None,:,:,None,None,None] # B V classes T H W
    for x,p in ((two,5/8), (two[:,:1],3/4), (two[:,0],3/4)):
        want = dict(top1=1., top5=1., loss=-math.log(p), n=1)
        assert_close(evaluate(Itself(1,1), [(x, tensor([1]))]), want, rtol=0, atol=1e-6)

def test_fastai_counts_the_same():
    from fastai.vision.all import CrossEntropyLossFlat, Learner, accuracy
    dls = digits_dls(device='cpu', bs=100)
    torch.manual_seed(0)
    net = timm.create_model(TINY, in_chans=1, img_size=16, patch_size=4, num_classes=10, drop_path_rate=.5, **narrow)
    got = evaluate(net.train(), dls.valid)
    assert all(o.training for o in net.modules()) and got['n'] == 360
    learn = Learner(dls, net, loss_func=CrossEntropyLossFlat(), metrics=accuracy)
    with learn.no_bar(), learn.no_logging(): loss,acc = learn.validate()
    assert_close((got['loss'],got['top1']), (loss,acc), rtol=0, atol=1e-5)

def loaders():
    "Loaders that would falsify the count, and what is said of each"
    z,y,dset = items()
    z = z[...,None,None]
    yield 'dropped', DataLoader(dset, 2, drop_last=True), 'the loader drops the last 1 of 5 items'
    yield 'fastai', digits_dls(device='cpu', bs=100).train, 'the loader drops the last 37 of 1437 items'
    yield 'shared', DataLoader(dset, 2, sampler=DistributedSampler(dset, 2, 0)), 'shares its items among processes'
    yield 'empty', DataLoader(dset[:0], 2), 'there is nothing to evaluate'
    yield 'high', [(z[:2], tensor([0,7]))], 'item 1 has the label 7, but the model has 7 classes, 0 to 6'
    yield 'low', [(z[:2], y[:2]), (z[:1], tensor([-1]))], 'item 2 has the label -1'
    yield 'floats', [(z[:2], y[:2].float())], 'expected 2 labels, whole numbers, got torch.float32'
    yield 'vectors', [(z[:2], z[:2,:,0,0])], r'of shape \(2, 7\)'
    yield 'short', [(z[:2], y[:1])], r'of shape \(1,\)'

@pytest.mark.parametrize('kind', ['dropped', 'fastai', 'shared', 'empty', 'high', 'low', 'floats', 'vectors', 'short'])
def test_what_would_falsify_the_count(kind):
    dl,words = {k: (dl,words) for k,dl,words in loaders()}[kind]
    with said(words): evaluate(Itself(1,1), dl)

def test_nothing_dropped_is_fine(): assert evaluate(Itself(1,1), DataLoader(items()[2], 5, drop_last=True))['n'] == 5

def test_logits_of_another_shape():
    with said(r'expected logits of shape \(B, classes\), got \(3, 2, 4\)'):
        evaluate(nn.Conv1d(1, 2, 1), [(torch.ones(3,1,4), tensor([0,1,0]))])

def test_logits_that_are_no_number():
    z,y,dset = items()
    dset[3][0][2] = math.nan
    with pytest.raises(FloatingPointError, match="item 3: the model's output is not a number"):
        evaluate(Itself(1,1), DataLoader(dset, 2))

# ---------------------------------------------------------------- folders and lists

@pytest.mark.parametrize('folders,model,want', [(['dog','cat'], Known(['dog','bird','cat'], 3), dict(dog=0, cat=2)),
    (['n15075141','n01440764'], Known(num_classes=1000), dict(n15075141=999, n01440764=0)),
    (['zumba','archery'], Known(num_classes=400, num_frames=4), dict(zumba=399, archery=5)),
    (['b','a'], Known(), dict(a=0, b=1))], ids=['own', 'ImageNet', 'Kinetics-400', 'alphabet'])
def test_which_class_a_folder_holds(folders, model, want): assert class_index(folders, model) == want

@pytest.mark.parametrize('folders,model,words', [
    (['dog','cat','cow'], Known(['dog','cat']), '1 of 3 class folders is no class of the model: cow'),
    (['a','b'], Known(['dog','cat']),
     r"2 class folders \(a, b, ...\) cannot be matched with the model's 2 classes \(dog, cat, ...\)"),
    (['a','b','c'], Known(), r"3 class folders \(a, b, c, ...\) cannot be matched with the model's 2 classes \(0, 1")])
def test_folders_of_other_classes(folders, model, words):
    with said(words): class_index(folders, model)

words = 'zero one two three four five six seven eight nine'.split()

@pytest.fixture(scope='module')
def net():
    torch.manual_seed(0)
    m = timm.create_model(TINY, in_chans=1, img_size=16, patch_size=4, num_classes=10, **narrow)
    m.pretrained_cfg = {**digits_cfg, 'label_names': words}
    return m

@pytest.fixture
def data(tmp_path):
    "Six digits of each class, in folders whose alphabet is not the order of the classes"
    images,labels = digits()
    for c,word in enumerate(words):
        (tmp_path/'data'/'val'/word).mkdir(parents=True)
        for i in np.flatnonzero(labels==c)[:6]: Image.fromarray(images[i]).save(tmp_path/'data'/'val'/word/f'{i}.png')
    return tmp_path/'data'

def test_files_and_labels(net, data):
    found,labels = folder_items(data, net),digits()[1]
    assert len(found) == 60 and found == folder_items(data/'val', net)
    for path,label in found: assert label == labels[int(Path(path).stem)]

@pytest.mark.parametrize('make,folder,words', [([], 'none', 'none: no such folder'), ([], 'file', 'file: not a folder'),
    ([], 'data/val/one', 'one: no class folders in it'),
    (['data/val/ten'], 'data', 'val: 1 of 11 class folders is no class of the model: ten'),
    (['lone/one'], 'lone', r"lone: no images for the class 'one' \(files that end in .jpg")])
def test_folders_that_cannot_be_tested(make, folder, words, net, data):
    (data.parent/'file').touch()
    for o in make: (data.parent/o).mkdir(parents=True)
    with said(words): folder_items(data.parent/folder, net)

@pytest.mark.parametrize('bs,workers', [(7,0), (60,0), (16,2)])
def test_accuracy_is_that_of_single_files(bs, workers, net, data):
    found = folder_items(data, net)
    one = [inference_model(net, path) for path,_ in found]
    right = sum(o['pred_class']==Path(path).parent.name for o,(path,_) in zip(one, found))/60
    loss = -sum(math.log(o['pred_scores'][l]) for o,(_,l) in zip(one, found))/60
    got = evaluate(net, eval_loader(net, data, bs, workers))
    assert_close((got['top1'],got['loss'],got['n']), (right,loss,60), rtol=0, atol=1e-5)

def test_sizes_of_batches(net, data):
    assert eval_loader(net, data).batch_size == 32
    with said('the batch size must be 1 or more'): eval_loader(net, data, 0)

@pytest.mark.parametrize('workers', [0, 1])
def test_a_broken_file_ends_the_count(workers, net, data):
    (data/'val'/'one'/'bad.png').write_bytes(b'no image')
    with said('bad.png: not an image'): evaluate(net, eval_loader(net, data, 60, workers))

def test_accuracy_of_videos(tmp_path):
    "In class folders, in the list `val.csv` beside them, and in a list elsewhere"
    for i,o in enumerate('abc'):
        (tmp_path/o).mkdir()
        film(tmp_path/o/'v.mp4', 30+5*i)
    torch.manual_seed(0)
    c = timm.create_model('revmvit_tiny_16x4_224', img_size=32, num_frames=4, num_classes=3)
    one = [inference_model(c, path, views=2)['pred_scores'] for path,_ in folder_items(tmp_path, c)]
    got = evaluate(c, eval_loader(c, tmp_path, bs=2, views=2))
    loss = -sum(math.log(o[i]) for i,o in enumerate(one))/3
    assert_close((got['loss'],got['n']), (loss,3), rtol=0, atol=1e-5)
    assert eval_loader(c, tmp_path).batch_size == 4
    lines = 'a/v.mp4 0\nb/v.mp4 1\nc/v.mp4 2\n'
    (tmp_path/'val.csv').write_text(lines)
    (tmp_path/'elsewhere').mkdir()
    (tmp_path/'elsewhere'/'some.csv').write_text(lines)
    for data,root in (('val.csv',None), ('.',None), ('elsewhere/some.csv',tmp_path)):
        dl = eval_loader(c, tmp_path/data, bs=2, views=2, root=root)
        assert_close(evaluate(c, dl), got, rtol=0, atol=1e-6)
    (tmp_path/'val.csv').write_text('a/v.mp4 0\nb/v.mp4 3\n')
    with said('val.csv, line 2: the label must be below 3, got 3'): eval_loader(c, tmp_path)

def test_classes_one_by_one():
    "Of the files that are of a class, not of those taken for it; a class without files has no line"
    judged = dict(label=tensor([0,0,2,2]), predicted=tensor([0,2,2,2]), place=tensor([0,1,0,0]))
    assert per_class(judged, ['cat','cow','dog']) == [
        {'class': 'cat', 'label': 0, 'n': 2, 'top1': .5}, {'class': 'dog', 'label': 2, 'n': 2, 'top1': 1.}]

def test_many_files_one_by_one(tmp_path, monkeypatch):
    "Each answer is checked under the name of its file, and mixed precision reaches the model"
    torch.manual_seed(0)
    m = timm.create_model('revvit_tiny_patch16_224', img_size=32, num_classes=3, embed_dim=24, num_heads=2, depth=1)
    nn.init.normal_(m.head.weight)
    files,named = [str(tmp_path/f'{i}.png') for i in range(5)],[]
    for i,o in enumerate(files): Image.new('RGB', (32,32), (40*i,0,90)).save(o)
    monkeypatch.setattr('revvit.use.many.check_probs', lambda probs, file: named.append(file))
    full,half = (torch.stack([p for p,_ in predict_files(m, files, bs=2, amp=amp)]) for amp in ('off','bf16'))
    assert named == files*2 and 0 < (full-half).abs().max() < .05
