"""What a notebook cannot show about images: JPEGs of many kinds through the whole loader, processes that die, and
resuming, with 0, 1 and 2 workers"""
import copy as copying, gc, hashlib, io, json, multiprocessing, os, pickle, random, re, shutil, signal
import sys, time, unicodedata, warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch.testing import assert_close
from revvit.use.evaluation import folder_items
from revvit.data.loader import UnreadableFile, seeded
from revvit.data.class_folders import folder_files as image_files, kind_of_data
from revvit.data.images import ImageTransform, image_dls, open_image, shard_dls, train_tfm
from revvit.training.recipes import recipes

cfg = dict(input_size=(3,32,32), mean=(.485,.456,.406), std=(.229,.224,.225), interpolation='bicubic', crop_pct=.875)
full = dict(rand_aug='rand-m6-n5-mstd0.5-inc1')
pytestmark = pytest.mark.filterwarnings('ignore')

def picture(k, size=(90,60)):
    "A smooth coloured picture, another for each `k`"
    y,x = np.mgrid[:size[1],:size[0]]
    return Image.fromarray(np.stack([127+120*np.sin(x/(9+k)+y/11), 127+120*np.cos(y/(5+k)),
                                     np.full_like(x, 20*k%250, float)], -1).astype(np.uint8))

def save_kind(path, kind, k):
    "One file of a kind that people have"
    im,exif = picture(k, (50+7*k, 80-5*k)),Image.Exif()
    exif[274] = 6
    if kind == 'I;16':
        return Image.fromarray((np.asarray(im.convert('L'))*257.).astype(np.uint16)).save(path.with_suffix('.png'))
    if kind in ('P','RGBA','LA','1'):
        return (im.quantize(16) if kind == 'P' else im.convert(kind)).save(path.with_suffix('.png'))
    if kind == 'webp': return im.save(path.with_suffix('.webp'))
    options = dict(progressive=dict(progressive=True), turned=dict(exif=exif), subsampled=dict(subsampling=2),
                   low=dict(quality=5))
    im.convert(kind if kind in ('L','CMYK') else 'RGB').save(path.with_suffix('.JPEG'),
        quality=options.get(kind, {}).pop('quality', 92), **options.get(kind, {}))

kinds = ['RGB','L','CMYK','progressive','turned','subsampled','low','I;16','P','RGBA','LA','1','webp']

@pytest.fixture(scope='module')
def folder(tmp_path_factory):
    "Two classes, every kind of file in each, in both parts"
    root = tmp_path_factory.mktemp('data')
    for part in ('train','val'):
        for c,name in enumerate(('n01440764','zoë\'s "cats" & dogs')):
            (root/part/name).mkdir(parents=True)
            for k,kind in enumerate(kinds): save_kind(root/part/name/f'{k:02} {kind.replace(";","")}', kind, k%8+c)
    return root

@pytest.fixture
def copy(folder, tmp_path): return Path(shutil.copytree(folder, tmp_path/'copy'))

def plain(dl): return [tuple(o.as_subclass(torch.Tensor) for o in b) for b in dl]
def loaders(path, workers=0, bs=4, seed=1, **kw):
    return image_dls(path, cfg, bs=bs, workers=workers, seed=seed, device='cpu', **kw)

@pytest.mark.parametrize('workers', [0,1,2])
def test_R35_every_kind_of_file_trains(folder, workers):
    """R35: grey, CMYK, palette, 16-bit, transparent, turned, progressive: each becomes a finite (3, 32, 32) with its
    folder's label"""
    dls = loaders(folder, workers, aug=full)
    x,y = map(torch.cat, zip(*plain(dls.train)))
    assert x.shape == (24,3,32,32) and x.isfinite().all() and set(y.tolist()) == {0,1}
    x,y = map(torch.cat, zip(*plain(dls.valid)))
    assert y.tolist() == [0]*13+[1]*13
    assert torch.equal(x, torch.stack([ImageTransform(cfg)(p) for p in image_files(folder)[1]]))

def test_R35_the_same_picture_in_every_kind(tmp_path):
    "R35: whatever the file, the picture comes out: close to the original, upright, not cut off at 8 bits"
    ref = np.asarray(picture(0, (50,80)).convert('L')).astype(float)
    for kind in kinds:
        save_kind(tmp_path/'a', kind, 0)
        f = next(tmp_path.iterdir())
        got = open_image(f, 1)
        if kind == 'turned': got = got.rotate(90, expand=True)   # orientation 6 turns clockwise; back
        err = np.asarray(got).astype(float)-ref
        # one bit a pixel keeps the mean only
        assert abs(err.mean()) < 10 if kind == '1' else np.abs(err).mean() < (25 if kind in ('low','P') else 4), kind
        f.unlink()

row = np.array([[0,128,255]], np.uint8)
grey = Image.fromarray(row)

def clear():
    "A picture whose white last pixel is transparent, with another colour beneath"
    rgba = np.dstack([row, row, row, np.array([[255,255,0]], np.uint8)])
    rgba[0,2,:3] = 7
    return Image.fromarray(rgba)

def clear_palette():
    "The same by a palette of which one colour is transparent"
    im = Image.fromarray(np.array([[0,1,2]], np.uint8))
    im.putpalette([0,0,0, 128,128,128, 9,9,9])
    im.info['transparency'] = 2
    return im

exact = {'L.png': grey, 'L.bmp': grey, 'RGB.tiff': grey.convert('RGB'), 'P.gif': grey.convert('RGB').quantize(3),
         'tRNS.png': clear_palette(),
         'RGBA.webp': clear(), 'RGBA.png': clear(), 'LA.png': clear().convert('LA'),
         'CMYK.tiff': grey.convert('RGB').convert('CMYK'),
         'YCbCr.tiff': grey.convert('RGB').convert('YCbCr'), '16.png': Image.fromarray((row*257.).astype(np.uint16))}

@pytest.mark.parametrize('name', exact)
def test_R35_black_grey_and_white_are_exact(tmp_path, name):
    "In each kind of file without loss, for a grey and for a colour model"
    exact[name].save(tmp_path/name, **(dict(lossless=True) if 'webp' in name else {}))
    assert np.asarray(open_image(tmp_path/name, 1)).tolist() == [[0,128,255]]
    assert np.asarray(open_image(tmp_path/name, 3)).tolist() == [[[0]*3, [128]*3, [255]*3]]

def test_R35_one_bit_a_pixel(tmp_path):
    grey.convert('1', dither=0).save(tmp_path/'bits.png')
    assert np.asarray(open_image(tmp_path/'bits.png', 1)).tolist() == [[0,255,255]]

def test_R35_a_printers_jpeg(tmp_path):
    grey.convert('RGB').convert('CMYK').resize((24,8), Image.NEAREST).save(tmp_path/'a.jpg', quality=95)
    got = np.asarray(open_image(tmp_path/'a.jpg', 1))[4,[3,12,20]].astype(int)
    assert np.abs(got-row[0]).max() <= 4

@pytest.mark.parametrize('kind', ['png','jpeg','gif','bmp'])
def test_R35_truncated_anywhere(tmp_path, kind):
    "At no length may part of a picture pass for the whole"
    picture(1, (64,64)).save(tmp_path/f'whole.{kind}')
    data,cut = (tmp_path/f'whole.{kind}').read_bytes(),tmp_path/f'cut.{kind}'
    for n in np.linspace(1, len(data)*.9, 12).astype(int):
        cut.write_bytes(data[:n])
        with pytest.raises(UnreadableFile) as e: open_image(cut)
        assert re.fullmatch(re.escape(str(cut))+r': (not an image|the image cannot be read)[^\n]*', str(e.value))

@pytest.mark.parametrize('name,data,said', [('zero.png', b'', 'the image file is empty (0 bytes)'),
    ('page.jpg', b'<!doctype html>', 'not an image, or in no format that Pillow reads'),
    ('noise.png', b'\x89PNG\r\n\x1a\n'+bytes(range(200)), '')])
def test_R35_no_image(tmp_path, name, data, said):
    (tmp_path/name).write_bytes(data)
    with pytest.raises(UnreadableFile) as e: open_image(tmp_path/name)
    assert str(e.value).startswith(f'{tmp_path/name}: {said}')

@pytest.mark.parametrize('mode,kind', [('F',np.float32), ('I',np.int32)])
def test_R35_no_agreed_white(tmp_path, mode, kind):
    Image.fromarray(row.astype(kind)).save(tmp_path/'a.tiff')
    with pytest.raises(UnreadableFile, match=rf'a.tiff: the image cannot be read: 32-bit pixels \(mode {mode}\) have '
                                             rf'no agreed white'):
        open_image(tmp_path/'a.tiff')

def test_R35_not_a_file(tmp_path):
    with pytest.raises(UnreadableFile, match='a folder, not an image file'): open_image(tmp_path)
    with pytest.raises(FileNotFoundError, match='none.png: no such image file'): open_image(tmp_path/'none.png')
    grey.save(tmp_path/'a.png')
    with pytest.raises(ValueError, match='channels must be 1 or 3, got 4'): open_image(tmp_path/'a.png', 4)

# ---------------------------------------------------------------- from picture to tensor

one = dict(input_size=(1,16,16), mean=(.3,), std=(.5,), interpolation='bilinear', crop_pct=1.)

def test_the_centre_is_cut_out_of_a_tall_picture(tmp_path):
    "128 high and 64 wide: the middle square remains; its first and last row mix with the black beyond the cut"
    tall = np.zeros((128,64), np.uint8)
    tall[32:96] = 255
    Image.fromarray(tall).save(tmp_path/'tall.png')
    x = ImageTransform(one)(tmp_path/'tall.png')
    assert_close(x[:,1:-1], torch.full((1,14,16), (1-.3)/.5), rtol=0, atol=1e-6)

@pytest.mark.parametrize('settings', [one, {**cfg, 'mean': (.1,.2,.3), 'std': (1.,1.,2.)}])
def test_each_channel_has_its_own_mean(tmp_path, settings):
    Image.new('L', (64,128), 128).save(tmp_path/'grey.png')
    want = (128/255-torch.tensor(settings['mean']))/torch.tensor(settings['std'])
    x = ImageTransform(settings)(tmp_path/'grey.png')
    assert_close(x, want[:,None,None].expand(settings['input_size']), rtol=0, atol=1e-5)

@pytest.mark.parametrize('settings,said', [({**cfg, 'mean': (.5,)}, 'must have one value for each of 3 channels'),
    (dict(input_size=(3,32,32)), 'image settings lack crop_pct, interpolation, mean, std')])
def test_settings_that_do_not_fit(settings, said):
    with pytest.raises(ValueError, match=said): ImageTransform(settings)

def test_R37_own_transform_of_one_file(tmp_path):
    grey.save(tmp_path/'a.png')
    assert ImageTransform(cfg, tfm=lambda im: im.size)(tmp_path/'a.png') == (3,1)
    with pytest.raises(AttributeError, match='a.png: '): ImageTransform(cfg, tfm=lambda im: im.sise)(tmp_path/'a.png')

# ---------------------------------------------------------------- the published augmentation

facts = dict(rev_vit_s=(2,7), rev_vit_b=(5,6), rev_mvit_b=(6,9))   # operations, magnitude

@pytest.mark.parametrize('name', facts)
def test_steps_are_the_published_ones(name):
    r = recipes[name]
    crop,flip,rand,_,norm,erase = train_tfm(r.image_cfg, **r.aug).transforms
    assert (crop.size, crop.scale, crop.interpolation.name, flip.p) == ((224,224), (.08,1.), 'BICUBIC', .5)
    assert crop.ratio == pytest.approx((3/4,4/3))
    n,m = facts[name]
    assert (rand.num_layers, {(o.magnitude, o.magnitude_std, o.prob) for o in rand.ops}) == (n, {(m,.5,.5)})
    assert_close((norm.mean, norm.std), tuple(torch.tensor(r.image_cfg[k]) for k in ('mean','std')))
    assert (erase.probability, erase.per_pixel, erase.min_count, erase.max_count) == (.25, True, 1, 1)
    names = [o.name for o in rand.ops]
    assert len(names) == 15 and 'ContrastIncreasing' in names and 'Cutout' not in names

def test_colour_jitter_is_where_rand_augment_is_not():
    jitter = train_tfm(cfg).transforms[2]
    assert [*jitter.brightness, *jitter.contrast, *jitter.saturation] == pytest.approx([.6,1.4]*3)
    assert 'ColorJitter' not in str(train_tfm(cfg, **full))

def test_shares_of_boxes_and_mirrors():
    """Of 400 grey pictures a quarter has a box, no larger than a third; of 400 with a bright left half, half are
    mirrored"""
    mean = Image.new('RGB', (40,40), (124,116,104))
    half = Image.fromarray(np.repeat([[255]*20+[0]*20], 40, 0).astype(np.uint8)).convert('RGB')
    tiny = {**cfg, 'input_size': (3,16,16)}
    with seeded(0):
        tfm = train_tfm(tiny, color_jitter=0., scale=(1.,1.))
        noisy = torch.stack([tfm(mean) for _ in range(400)]).abs().amax(1) > .1   # B C H W -> B H W
        tfm = train_tfm(tiny, color_jitter=0., scale=(1.,1.), erase=0.)
        left = torch.stack([tfm(half)[0] for _ in range(400)])
    area = noisy.float().mean((1,2))
    area = area[area > 0]
    assert abs(len(area)/400-.25) < .06 and abs((left[:,8,2] > left[:,8,-3]).float().mean()-.5) < .06
    assert .02*.8 <= area.min() and area.max() <= 1/3*1.1

# ---------------------------------------------------------------- folders

def damage(path, how):
    data = path.read_bytes()
    path.write_bytes(dict(truncated=data[:len(data)//2], zero=b'', html=b'<!doctype html>',
                          header=b'\xff'*20+data[20:])[how])

@pytest.mark.parametrize('workers', [0,2])
@pytest.mark.parametrize('how', ['truncated','html','header'])
def test_R35_raise_names_the_file(copy, how, workers):
    "R35: by default one sentence with the path ends the run"
    bad = copy/'train'/'n01440764'/'00 RGB.JPEG'
    damage(bad, how)
    with pytest.raises(UnreadableFile) as e: plain(loaders(copy, workers).train)
    assert f'{bad}: ' in str(e.value)
    gc.collect(); assert not multiprocessing.active_children()

@pytest.mark.parametrize('workers', [0,1,2])
def test_R35_skip_counts_and_keeps_labels(copy, workers):
    "R35: skipped files are counted, in training and validation; no label is another picture's"
    def top_left(im):
        return torch.tensor([im.size[0]*1000+im.size[1], *np.asarray(im)[0,0],
                             *np.asarray(im)[-1,-1]]).float()[:,None,None]
    files = image_files(copy)[0]
    known = {tuple(top_left(open_image(p)).flatten().tolist()): p for p in files}
    for part in ('train','val'):
        for name in ('00 RGB.JPEG','05 subsampled.JPEG'): damage(copy/part/'n01440764'/name, 'truncated')
    dls = loaders(copy, workers, bs=5, tfm=top_left, on_bad='skip')
    epoch = plain(dls.train)
    seen = [(known[tuple(x.flatten().tolist())], y) for b in epoch for x,y in zip(b[0], b[1].tolist())]
    assert all(('n01440764' in p) == (y == 0) for p,y in seen)
    assert len(epoch) == 5 and len({p for p,_ in seen}) == len(seen)
    left_out = set(dls.train.bad_items())
    assert left_out <= {str(copy/'train'/'n01440764'/o) for o in ('00 RGB.JPEG','05 subsampled.JPEG')}
    assert len(seen)+len(left_out) == 25
    assert sum(len(y) for _,y in dls.valid) == 24 and len(dls.valid.bad_items()) == 2

@pytest.mark.parametrize('workers', [0,2])
def test_R35_skipping_keeps_the_other_batches(copy, workers):
    "R35, R40: a torn file changes no other item of the epoch"
    before = plain(loaders(copy, aug=full).train)
    damage(copy/'train'/'n01440764'/'00 RGB.JPEG', 'truncated')
    after = plain(loaders(copy, workers, aug=full, on_bad='skip').train)
    assert len(after) == len(before)
    for (xa,ya),(xb,yb) in zip(after, before):
        if len(ya) == len(yb): assert torch.equal(xa, xb) and torch.equal(ya, yb)
        else: assert len(ya) == len(yb)-1 and all(any(torch.equal(o, p) for p in xb) for o in xa)

class Custom(Exception): pass

@pytest.mark.parametrize('workers', [0,1,2])
@pytest.mark.parametrize('kind', [TypeError, KeyError, IndexError, ZeroDivisionError, AttributeError, Custom])
def test_R37_own_exceptions_arrive(folder, kind, workers):
    "R37: an exception in a user's transform has its own type and the file's path, whatever the policy for torn files"
    def tfm(im): raise kind('mine')
    with pytest.raises(kind, match=r'(JPEG|png|webp): mine') as e:
        plain(loaders(folder, workers, tfm=tfm, on_bad='skip').train)
    assert type(e.value) is kind and str(folder) in str(e.value)

def test_shown_pictures_have_their_colours_back(folder):
    dls = loaders(folder)
    shown = dls.valid.decode(dls.valid.one_batch())[0].as_subclass(torch.Tensor)
    x = torch.stack([ImageTransform(cfg)(o) for o in list(image_files(folder)[1])[:4]])
    mean,std = (torch.tensor(cfg[k])[:,None,None] for k in ('mean','std'))
    assert_close(shown, (x*std+mean).clip(0, 1), rtol=0, atol=1e-5)

def in_memory(path, kind):
    "A file as people have it in memory"
    im = open_image(path)
    return {'str': str(path), 'Path': Path(path), 'PIL': im, 'array': np.asarray(im),
            'tensor': torch.from_numpy(np.asarray(im).transpose(2,0,1).copy()),
            'prepared': ImageTransform(cfg)(path)}[kind]

@pytest.mark.parametrize('workers', [0,2])
@pytest.mark.parametrize('kind', ['str','Path','PIL','array','tensor','prepared','all of them'])
def test_what_a_learner_may_be_asked(folder, kind, workers):
    "`test_dl` of paths, PIL images, arrays and tensors, also mixed, in any order: the tensor of the file"
    dls,files = loaders(folder, workers, aug=full),[*image_files(folder)[1]]
    each = ['PIL','str','prepared','array','Path','tensor']
    x, = (map(torch.cat,
              zip(*plain(dls.test_dl([in_memory(f, each[i%6] if kind == 'all of them' else kind) for i,
                                      f in enumerate(files)])))))
    assert torch.equal(x, torch.stack([ImageTransform(cfg)(f) for f in files]))

@pytest.mark.parametrize('item,said', [(np.zeros((4,5)), 'expected an image as 8-bit array'),
                                       (np.zeros((3,4,5,3), np.uint8), 'several go in a list'),
                                       ('gone.png', 'gone.png: no such image file')], ids=['floats','stack','gone'])
def test_what_a_learner_cannot_be_asked(folder, item, said):
    with pytest.raises((ValueError, FileNotFoundError), match=said): loaders(folder).test_dl([item]).one_batch()

@pytest.mark.parametrize('kw,said', [(dict(bs=27), '^26 training files are too few for a batch of 27: batch_size=26 or '
                                                   'less would work'),
    (dict(bs=14, world=2), 'too few for each of 2 processes to have 14: batch_size=26 or less'),
    (dict(aug=full, tfm=len), 'give one of the two'),
    (dict(on_bad='hide'), "on_bad must be 'raise' or 'skip'"),
    (dict(valid='valid'), "there is a folder 'train' but no 'valid'")])
def test_R38_settings_that_cannot_work(folder, kw, said):
    with pytest.raises((ValueError, FileNotFoundError), match=said): loaders(folder, **kw)

def refused(path, **kw):
    with pytest.raises((ValueError, OSError)) as e: loaders(path, **kw)
    said = str(e.value)
    assert '\n' not in said and said.startswith(str(path)), said
    return said[len(str(path))+1:]

def test_R38_found_before_the_first_epoch(copy):
    "R38: each fault of a folder is one sentence that begins with its path"
    (copy/'val'/'new').mkdir(); assert refused(copy).startswith("val: the class 'new' is not in 'train'")
    (copy/'train'/'new').mkdir()
    assert refused(copy).startswith("train: no images for the class 'new' (files that end in .jpg")
    picture(1).save(copy/'train'/'new'/'a.jpg'); assert refused(copy).startswith("val: no images for the class 'new'")
    (copy/'val'/'new').rmdir(); assert refused(copy).startswith("val: no folder for the class 'new' of 'train'")
    shutil.rmtree(copy/'train'/'new')
    (copy/'train'/'N01440764').mkdir(); assert "'N01440764' and 'n01440764' are one name written twice" in refused(copy)
    (copy/'train'/'N01440764').rmdir()
    (copy/'val'/'.hidden').mkdir(); loaders(copy)
    twin = copy/'val'/'n01440764'/'twin.jpg'
    os.link(copy/'train'/'n01440764'/'00 RGB.JPEG', twin)
    assert 'are one and the same file, in training and held out' in refused(copy)
    twin.unlink()
    twin.symlink_to(copy/'gone.jpg'); assert refused(copy) == f'val/n01440764/twin.jpg: no such image file'
    twin.unlink()
    twin.write_bytes(b''); assert refused(copy) == f'val/n01440764/twin.jpg: the image file is empty (0 bytes)'
    assert len(loaders(copy, on_bad='skip').valid_ds) == 26
    shutil.rmtree(copy/'val'); assert "there is a folder 'train' but no 'val'" in refused(copy)
    shutil.rmtree(copy/'train')
    for o in ('train','val'): (copy/o).mkdir()
    assert refused(copy) == 'train: holds no folders, one for each class is needed'

def warned(call):
    "The answer, and what was warned"
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter('always', UserWarning)
        return call(), [str(o.message) for o in said if o.category is UserWarning]

@pytest.mark.parametrize('link', [os.symlink, os.link])
def test_R38_links_within_a_part_are_counted(copy, link):
    "Some images shown more often, by links of either kind: they train, and one warning has their number"
    first = copy/'train'/'n01440764'/'00 RGB.JPEG'
    for i in range(3): link(first, first.with_name(f'again {i}.jpg'))
    dls,said = warned(lambda: loaders(copy))
    assert len(dls.train_ds) == 29 and len(said) == 1
    assert said[0].endswith('are one and the same file (and 2 more such files)')

@pytest.mark.parametrize('how', ['folder','symlink','hard link'])
def test_R38_links_between_the_parts_are_refused_or_allowed(copy, how):
    """A held-out image that is trained on too is an error, or a warning if asked for; also where `val` is a link to
    `train`"""
    held,n = copy/'val'/'n01440764',1
    if how == 'folder':
        shutil.rmtree(copy/'val'); (copy/'val').symlink_to(copy/'train'); n = 26
    else: (os.symlink if how == 'symlink' else os.link)(copy/'train'/'n01440764'/'00 RGB.JPEG', held/'x.jpg')
    more = f' (and {n-1} more such files)' if n > 1 else ''
    assert refused(copy).endswith(f'are one and the same file{more}, in training and held out: allow it by '
                                  f'allow_shared (--allow-shared) if that is meant')
    dls,said = warned(lambda: loaders(copy, allow_shared=True))
    assert len(dls.train_ds) == 26 and len(said) == 1
    assert said[0].endswith(f'are one and the same file{more}, in training and held out')
    assert warned(lambda: loaders(copy, check=False))[1] == []

def left_overs(folder):
    "What systems leave behind among images"
    for part in ('train','val'):
        (folder/part/'__MACOSX').mkdir(); (folder/part/'.thumbs').mkdir()
        for o in (folder/part, folder/part/'n01440764', folder/part/'__MACOSX', folder/part/'.thumbs'):
            for name in ('._x.jpg','.DS_Store','Thumbs.db','desktop.ini'): (o/name).write_bytes(b'not an image')
        (folder/part/'n01440764'/'__MACOSX').mkdir()
        (folder/part/'n01440764'/'__MACOSX'/'y.jpg').write_bytes(b'not an image')

def test_R38_left_overs_of_systems(copy):
    """They neither stop a run nor are they trained on, and what is left out within the classes is counted by its
    ending, in one sentence for each part"""
    left_overs(copy)
    (copy/'train'/'n01440764'/'raw.heic').touch(); (copy/'train'/'n01440764'/'LICENSE').touch()
    (files,held,vocab),said = warned(lambda: image_files(copy))
    assert (len(files), len(held), len(vocab)) == (26, 26, 2) and len(said) == 2
    assert said[0].startswith(f"{copy/'train'}: 7 files are left out, being none of .jpg, .jpeg, .png and such: 3 "
                              f"hidden, ")
    assert all(o in said[0] for o in ('1 .db','1 .ini','1 .heic','1 without an ending',
                                      f"(as {copy/'train'/'n01440764'}{os.sep}"))
    assert said[1].startswith(f"{copy/'val'}: 5 files are left out, ")
    plain(loaders(copy).train)
    assert [p for p,_ in folder_items(copy, Known(2))] == list(held)

class Known:
    "What the lists of a test ask of a model"
    def __init__(self, num_classes): self.num_classes,self.pretrained_cfg = num_classes,None

formats = {'gif':'GIF', 'avif':'AVIF', 'jp2':'JPEG2000', 'jfif':'JPEG', 'tga':'TGA', 'webp':'WEBP', 'bmp':'BMP',
           'ppm':'PPM', 'apng':'PNG', 'GIF':'GIF'}

@pytest.mark.parametrize('end', formats)
def test_R35_what_is_predicted_is_trained_on(tmp_path, end):
    "One list of endings: training, tests and prediction read the same files"
    Image.init()
    if formats[end] not in Image.SAVE: pytest.skip('this Pillow does not write it')
    for part in ('train','val'):
        for k in range(4):
            (tmp_path/part/f'c{k%2}').mkdir(parents=True, exist_ok=True)
            picture(k).save(tmp_path/part/f'c{k%2}'/f'{k}.{end}', formats[end])
    dls,said = warned(lambda: loaders(tmp_path, bs=2))
    x,y = map(torch.cat, zip(*plain(dls.valid)))
    items = folder_items(tmp_path, Known(2))
    assert not said and len(dls.train_ds) == 4 and y.tolist() == [i for _,i in items] == [0,0,1,1]
    assert torch.equal(x, torch.stack([ImageTransform(cfg)(p) for p,_ in items]))

@pytest.mark.parametrize('end', ['gif','png','webp'])
def test_R35_moving_pictures_give_their_first_frame(tmp_path, end):
    grey = [Image.new('L', (20,20), 60*i) for i in range(4)]
    grey[1].save(tmp_path/f'a.{end}', save_all=True, append_images=grey[2:],
                 **(dict(lossless=True) if end == 'webp' else {}))
    assert np.unique(np.asarray(open_image(tmp_path/f'a.{end}'))).tolist() == [60]

def test_R38_no_permission(copy, monkeypatch):
    "R38: a file that this user may not read (the system is asked, which tells root yes: so its answer is replaced)"
    f,may = copy/'train'/'n01440764'/'00 RGB.JPEG',os.access
    monkeypatch.setattr(os, 'access', lambda p, mode: str(p) != str(f) and may(p, mode))
    assert refused(copy) == 'train/n01440764/00 RGB.JPEG: no permission to read it'
    with pytest.warns(UserWarning, match='1 unreadable file is left out: .*no permission to read it'):
        assert len(loaders(copy, on_bad='skip').train_ds) == 25
    assert len(loaders(copy, check=False).train_ds) == 26

def test_R38_names(tmp_path):
    """R38: unicode, spaces, newlines and quotes in names work and keep their order; two spellings of one accented
    name do not"""
    names = sorted(['a b', 'tab\tnew\nline', 'épée', '日本', "o'\"x", '%s{}'])
    for part in ('train','val'):
        for i,n in enumerate(names):
            (tmp_path/part/n).mkdir(parents=True)
            picture(i).save(tmp_path/part/n/f' {n}.jpg')
    dls = loaders(tmp_path, bs=2, workers=1)
    assert list(dls.vocab) == names and torch.cat([y for _,y in plain(dls.valid)]).tolist() == list(range(6))
    (tmp_path/'train'/unicodedata.normalize('NFD', 'épée')).mkdir()
    assert 'are one name written twice' in refused(tmp_path)

def slow(im): time.sleep(.02); return torch.zeros(3,4,4)

@pytest.mark.skipif(not hasattr(signal, 'SIGKILL'), reason='needs signals')
@pytest.mark.parametrize('how', ['SIGKILL','SIGTERM'])
def test_R39_a_killed_worker_is_noticed(folder, how):
    "R39: a worker that dies ends the pass within 30 s with the cause, and leaves no process behind"
    it = iter(loaders(folder, 2, bs=2, tfm=slow).train)
    next(it)
    start = time.monotonic()
    os.kill(multiprocessing.active_children()[0].pid, getattr(signal, how))
    ended = 'a process that reads data was ended from outside, most often for want of memory: '
    # PyTorch's sentence alone if it was told between two batches
    with pytest.raises(RuntimeError, match=f'^({ended})?DataLoader worker .*pid'): list(it)
    assert time.monotonic()-start < 30
    del it; gc.collect()
    assert not multiprocessing.active_children()

epochs_script = """
import sys, torch, hashlib, random, warnings
warnings.filterwarnings('ignore')
from revvit.data.images import image_dls
path,workers,epoch,batch = sys.argv[1],*map(int, sys.argv[2:])
random.seed(workers+7); torch.manual_seed(workers)
cfg = dict(input_size=(3,32,32), mean=(.485,.456,.406), std=(.229,.224,.225), interpolation='bicubic', crop_pct=.875)
dl = image_dls(path, cfg, bs=4, workers=workers, seed=1,
               aug=dict(rand_aug='rand-m6-n5-mstd0.5-inc1'), device='cpu').train
dl.set_epoch(epoch, batch)
for x,y in dl: print(hashlib.sha256(x.numpy().tobytes()+y.numpy().tobytes()).hexdigest())
"""

def test_R40_same_batches_in_another_process(folder, tmp_path, warm):
    "R40: a new process that is told epoch and batch goes on with the very bytes, with any number of workers"
    dl = loaders(folder, 0, aug=full).train
    ref = [[hashlib.sha256(x.numpy().tobytes()+y.numpy().tobytes()).hexdigest() for x,y in plain(dl)] for _ in range(3)]
    run = warm.run(['-c', epochs_script, folder, 2, 2, 3], tmp_path, os.environ)
    assert run.stdout.split() == ref[2][3:], run.stderr

@pytest.mark.parametrize('workers', [1,2])
def test_R40_workers_change_nothing(folder, workers):
    "R40: two epochs, equal to the bit; the global generators are neither asked nor moved"
    ref = loaders(folder, 0, aug=full).train
    ref = [plain(ref), plain(ref)]
    torch.manual_seed(workers); np.random.seed(workers); random.seed(workers)
    dl = loaders(folder, workers, aug=full).train
    state = torch.get_rng_state(),np.random.get_state()[1].tolist(),random.getstate()
    assert_close([plain(dl), plain(dl)], ref, rtol=0, atol=0)
    assert torch.equal(torch.get_rng_state(), state[0]) and np.random.get_state()[1].tolist() == state[1]
    assert random.getstate() == state[2]
    assert not torch.equal(ref[0][0][0], ref[1][0][0])

@pytest.mark.parametrize('world', [2,3])
def test_R40_processes_share_one_order(folder, world):
    "R40: the batches of several processes are the parts of one process's; held-out items are dealt out once"
    ref = plain(loaders(folder, bs=6, aug=full).train)
    parts = [loaders(folder, bs=6//world, aug=full, rank=r, world=world) for r in range(world)]
    assert_close([tuple(map(torch.cat, zip(*b))) for b in zip(*(plain(o.train) for o in parts))], ref, rtol=0, atol=0)
    assert sorted(i for o in parts for i in o.valid.get_idxs()) == list(range(26))

def test_loaders_travel(folder):
    "A loader can be copied, pickled and emptied, as `learn.export` does; a new one of it keeps its seed"
    dls = loaders(folder, aug=full)
    ref = plain(dls.train)
    for other in (copying.deepcopy(dls), pickle.loads(pickle.dumps(dls))):
        other.train.set_epoch(0)
        assert_close(plain(other.train), ref, rtol=0, atol=0)
    assert len(dls.new_empty().train) == 0
    assert dls.train.new().seed == 1

def test_shards_resume_by_epoch(folder, tmp_path):
    """Tar shards: the same seed and number of workers repeat an epoch in a new loader, and the held-out images come
    in order"""
    wds = pytest.importorskip('webdataset')
    files,held,vocab = image_files(folder)
    for part,items in dict(train=files, val=held).items():
        with wds.ShardWriter(f'{tmp_path}/{part}-%04d.tar', maxcount=7, verbose=0) as out:
            for i,f in enumerate(items):
                data = io.BytesIO(); open_image(f).save(data, 'jpeg')
                out.write({'__key__': f'{i:04}', 'jpg': data.getvalue(), 'cls': vocab.index(Path(f).parent.name)})
    counts = [7,7,7,5]
    (tmp_path/'_info.json').write_text(json.dumps(dict(splits={p: dict(name=p, num_samples=26,
        filenames=[f'{p}-{i:04}.tar' for i in range(4)], shard_lengths=counts) for p in ('train','val')})))
    def dls(): return shard_dls(tmp_path, cfg, vocab, bs=4, workers=2, seed=3, aug=full, device='cpu')
    a = dls().train
    ref = [list(a), list(a)]
    b = dls().train
    b.set_epoch(1)
    assert_close(list(b), ref[1], rtol=0, atol=0)
    assert torch.cat([y for _,y in dls().valid]).tolist() == [0]*13+[1]*13

@pytest.mark.parametrize('kw,said', [(dict(workers=0), 'workers must be at least 1, got 0'),
                                     ({}, 'holds no _info.json')])
def test_shards_that_cannot_work(tmp_path, kw, said):
    if kw: (tmp_path/'_info.json').write_text('{}')
    with pytest.raises((ValueError, FileNotFoundError), match=said): shard_dls(tmp_path, cfg, ['a'], **kw)

def test_shards_without_the_package(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, 'webdataset', None)
    with pytest.raises(ImportError, match='needs the package webdataset: pip install webdataset'):
        shard_dls(tmp_path, cfg, ['a'])

def test_shards_cannot_be_entered_in_the_middle(folder, tmp_path):
    wds = pytest.importorskip('webdataset')
    with wds.TarWriter(f'{tmp_path}/a.tar') as out: out.write({'__key__': '0', 'jpg': b'', 'cls': 0})
    part = dict(num_samples=1, filenames=['a.tar'], shard_lengths=[1])
    (tmp_path/'_info.json').write_text(json.dumps(dict(splits={o: dict(part, name=o) for o in ('train','val')})))
    dl = shard_dls(tmp_path, cfg, ['a'], bs=1, workers=1, device='cpu').train
    with pytest.raises(ValueError, match=r'cannot be entered in the middle of an epoch \(at batch 2\)'):
        dl.set_epoch(1, batch=2)

# ---------------------------------------------------------------- folders that nobody has divided

@pytest.fixture
def photos(folder, tmp_path): return Path(shutil.copytree(folder/'train', tmp_path/'photos'))

def names(items, path): return {Path(o).relative_to(path).as_posix() for o in items}

def test_a_fifth_of_each_class_is_held_out(photos, tmp_path, capsys):
    "3 of 13 in both classes; the seed chooses, not the place of the folder; and a line says so"
    train,held,vocab = image_files(photos)
    assert (len(train), len(held), [*held.values()]) == (20, 6, [0]*3+[1]*3) and not {*train}&{*held}
    assert 'without a folder for each part, 6 of 26 images are held out' in capsys.readouterr().out
    moved = Path(shutil.copytree(photos, tmp_path/'elsewhere'/'photos'))
    assert names(image_files(moved)[1], moved) == names(held, photos) != names(image_files(photos, seed=1)[1], photos)
    dls = image_dls(photos, cfg, bs=4, workers=0, seed=1, device='cpu')
    assert {*map(str, dls.valid_ds.items)} == {*image_files(photos, seed=1)[1]}

def test_more_files_move_few_to_the_other_side(photos):
    _,held,_ = image_files(photos)
    for o in [*photos.rglob('*.png')][:4]: shutil.copy(o, o.with_name('new '+o.name))
    assert len(names(held, photos) & names(image_files(photos)[1], photos)) >= 4

@pytest.mark.parametrize('valid', ['valid', 'validation', 'test'])
def test_other_names_of_val(valid, copy):
    (copy/'val').rename(copy/valid)
    assert [len(o) for o in image_files(copy)] == [26, 26, 2]

@pytest.mark.parametrize('case,said', [('lonely', 'the only file of its class; at least 2 are needed'),
    ('empty', "no images for the class 'empty'"),
    ('linked', 'are one and the same file'), ('torn', 'the image file is empty')])
def test_what_cannot_be_divided(case, said, photos):
    (photos/case).mkdir()
    some = sorted(photos.rglob('*.png'))[0]
    if case in ('lonely','linked','torn'): shutil.copy(some, photos/case/'a.png')
    if case == 'linked':
        for i in range(20): (photos/case/f'{i}.png').symlink_to(photos/case/'a.png')
    if case == 'torn': (photos/case/'b.png').touch()
    with pytest.raises((ValueError, UnreadableFile), match=said): image_files(photos)

@pytest.mark.parametrize('files,want', [(['a/1.jpg','a/2.mp4.txt'], 'images'), (['a/1.mp4'], 'clips'),
    (['train.csv','val.csv'], 'clips'),
    (['train.csv','val.csv','a/1.png'], 'images'), ([f'a/{i}.png' for i in range(10)]+['a/1.mp4','.hidden/2.mp4'],
                                                    'images'),
    (['a/1.png','a/2.mp4'], '1 images and 1 videos'), (['a/1.txt'], 'neither images nor videos'),
    ([], 'no such folder')], ids=str)
def test_kind_of_data(files, want, tmp_path):
    for o in files:
        (tmp_path/'d'/o).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path/'d'/o).touch()
    if want in ('images', 'clips'): assert kind_of_data(tmp_path/'d')[0] == want
    else:
        with pytest.raises((ValueError, FileNotFoundError), match=want): kind_of_data(tmp_path/'d')

# ---------------------------------------------------------------- what a model is shown of an image that is tested

@pytest.mark.parametrize('size', [(80,64), (48,48), (50,90)])
@pytest.mark.parametrize('share', [.875,1.,.5])
def test_R35_centre_crop(share, size, tmp_path):
    """The short side becomes side/crop_pct by the named filter, the middle is cut out, pixels are normalised: Pillow,
    by hand"""
    side,(w,h) = 32,size
    Image.fromarray(np.random.RandomState(0).randint(0, 255, (h,w,3), np.uint8)).save(tmp_path/'a.png')
    got = ImageTransform(dict(cfg, input_size=(3,side,side), crop_pct=share))(tmp_path/'a.png')
    short = int(side/share)
    new = (short, int(short*h/w)) if w<=h else (int(short*w/h), short)
    im = Image.open(tmp_path/'a.png').resize(new, Image.Resampling.BICUBIC)
    left,top = (int(round((o-side)/2)) for o in new)
    x = torch.tensor(np.array(im.crop((left, top, left+side, top+side)))).permute(2, 0, 1)/255
    want = (x-torch.tensor(cfg['mean'])[:,None,None])/torch.tensor(cfg['std'])[:,None,None]
    torch.testing.assert_close(got, want, rtol=0, atol=1e-5)
