"""COCO's format: what is refused, and in which words; what is put right; batches that depend on seed, epoch and index
alone."""
import json, shutil

import numpy as np, pytest, torch
from PIL import Image
from revvit.data.coco import CocoError, cut_box, mask_of, read_coco, run_lengths
from revvit.data.loader import UnreadableFile
from revvit.data.scenes import CocoImages, coco_dls, coco_files, draw_scene, is_coco, scene_tfm

torch.set_num_threads(1)
H,W = 24,32

def polygon(x, y, w, h): return [[x, y, x+w, y, x+w, y+h, x, y+h]]

def thing(i, image, box=(4,5,8,6), category=3, **more):
    return {**dict(id=i, image_id=image, category_id=category, bbox=list(box), iscrowd=0,
                   segmentation=polygon(*box)), **more}

def content(n=6):
    "`n` images with one thing each, the last without any"
    return dict(images=[dict(id=i, file_name=f'{i}.png', height=H, width=W) for i in range(n)],
        annotations=[thing(i, i, (2+i,3,8,6), (3,8)[i%2]) for i in range(n-1)],
        categories=[dict(id=8, name='late'), dict(id=3, name='early')])

@pytest.fixture
def folder(tmp_path):
    "A folder with a training and a held-out part"
    for part in ('train','val'):
        (tmp_path/part).mkdir()
        for i in range(6):
            pixels = np.random.RandomState(i).randint(0, 255, (H,W,3)).astype(np.uint8)
            Image.fromarray(pixels).save(tmp_path/part/f'{i}.png')
        (tmp_path/f'instances_{part}.json').write_text(json.dumps(content()))
    return tmp_path

def written(folder, change, part='train'):
    c = content()
    change(c)
    file = folder/f'instances_{part}.json'
    file.write_text(json.dumps(c))
    return file

@pytest.mark.parametrize('on_bad', ['raise','skip'])
def test_two_images_that_are_one_file(on_bad, folder):
    "With things of their own each: a link is no fault, and images are no classes"
    (folder/'train'/'1.png').unlink()
    (folder/'train'/'1.png').hardlink_to(folder/'train'/'0.png')
    with pytest.warns(UserWarning, match='0.png and .*1.png are one and the same file$'):
        data = read_coco(folder/'instances_train.json', folder/'train', on_bad=on_bad)
    assert [o['id'] for o in data.images]==[*range(6)] and [len(o) for o in data.things]==[1]*5+[0]

def first(c): return c['annotations'][0]
FAULTS = dict(
    unknown_category=(lambda c: first(c).update(category_id=9), 'annotation 0 has category 9, which is not there'),
    unknown_image=(lambda c: first(c).update(image_id=77), 'annotation 0 is of image 77, which is not there'),
    box_of_three=(lambda c: first(c).update(bbox=[1,2,3]), r'annotation 0 has the box \[1, 2, 3\], wanted four'),
    box_of_words=(lambda c: first(c).update(bbox=['a',2,3,4]), 'annotation 0 has the box .*wanted four'),
    box_not_finite=(lambda c: first(c).update(bbox=[float('nan'),2,3,4]), 'annotation 0 has the box .*wanted four'),
    point=(lambda c: first(c).update(segmentation=[[1,2,3,4]]), 'annotation 0: a polygon wants three points'),
    odd_polygon=(lambda c: first(c).update(segmentation=[[1]*7]), 'annotation 0: a polygon wants three points'),
    odd_shape=(lambda c: first(c).update(segmentation='square'), 'annotation 0: its segmentation is str'),
    runs_too_few=(lambda c: first(c).update(segmentation=dict(size=[H,W], counts=[3,4])), 'do not add up to the image'),
    runs_of_another=(lambda c: first(c).update(segmentation=dict(size=[W,H], counts=[H*W])), 'run-length code is for'),
    no_segmentation=(lambda c: first(c).pop('segmentation'), 'annotation 0 has no segmentation, and masks are to be'),
    no_box=(lambda c: first(c).pop('bbox'), "entry 0 of 'annotations' lacks 'bbox'"),
    no_id=(lambda c: c['images'][1].pop('id'), "entry 1 of 'images' lacks 'id'"),
    height_a_word=(lambda c: c['images'][1].update(height='24'), "image 1 is '24' by 32 pixels, wanted whole"),
    height_negative=(lambda c: c['images'][1].update(height=-3), 'image 1 is -3 by 32 pixels'),
    name_a_number=(lambda c: c['images'][1].update(file_name=5), 'image 1 has the file_name 5, wanted a file in'),
    name_outside=(lambda c: c['images'][1].update(file_name='../val/1.png'), 'wanted a file in'),
    ids_of_two_kinds=(lambda c: c['images'][5].update(id='5'), "ids of 'images' are partly numbers and partly words"),
    id_a_list=(lambda c: first(c).update(image_id=[1]), r"entry 0 of 'annotations' has the image_id \[1\], wanted"),
    size_none=(lambda c: first(c).update(segmentation=dict(size=None, counts=[H*W])), 'run-length code is for None'),
    text_that_is_none=(lambda c: first(c).update(segmentation=dict(size=[H,W], counts='oops!!')), 'do not add up to'),
    text_too_long=(lambda c: first(c).update(segmentation=dict(size=[H,W], counts='P')), 'do not add up to'),
    one_name_twice=(lambda c: c['categories'][0].update(name='early'), 'two categories have one name'),
    another_size=(lambda c: c['images'][1].update(height=99), f'1.png is {H}x{W} pixels, and image 1 is said to'),
    twice=(lambda c: c['annotations'][1].update(id=0), "two entries of 'annotations' have the id 0"),
    one_file_twice=(lambda c: c['images'][1].update(file_name='0.png'), 'two images have one file_name'),
    no_categories=(lambda c: c['categories'].clear(), 'has no categories'),
    no_images=(lambda c: (c['images'].clear(), c['annotations'].clear()), 'has no images'),
    no_list=(lambda c: c.pop('annotations'), "holds no list 'annotations'"),
    no_entries=(lambda c: c.update(images=[1]), "holds no list 'images'"))

@pytest.mark.parametrize('name', FAULTS)
def test_a_faulty_entry_is_named(name, folder):
    change,says = FAULTS[name]
    file = written(folder, change)
    with pytest.raises(CocoError, match=says) as e: read_coco(file, folder/'train', masks=True)
    assert str(e.value).startswith(f'{file}: ')

def test_not_json_and_not_there(folder):
    (folder/'x.json').write_text('{')
    with pytest.raises(CocoError, match='x.json: not a JSON file'): read_coco(folder/'x.json', folder)
    with pytest.raises(FileNotFoundError, match='y.json: no such file'): read_coco(folder/'y.json', folder)

def test_images_that_cannot_be_read(folder):
    (folder/'train'/'2.png').unlink()
    (folder/'train'/'4.png').write_bytes(b'')
    file = folder/'instances_train.json'
    with pytest.raises(UnreadableFile, match=r'2.png: no such image file \(and 1 more'): read_coco(file, folder/'train')
    with pytest.warns(UserWarning, match='2 unreadable files are left out'):
        data = read_coco(file, folder/'train', on_bad='skip')
    assert [o['id'] for o in data.images] == [0,1,3,5]
    assert [[a['id'] for a in o] for o in data.things] == [[0],[1],[3],[]]

@pytest.mark.parametrize('box,want', [((-3,-2,8,6), [0,0,5,4]), ((28,20,9,9), [28,20,32,24]),
    ((0,0,99,99), [0,0,32,24]), ((1.5,2.5,3,4), [1.5,2.5,4.5,6.5])])
def test_a_box_is_cut_at_the_edges(box, want, folder):
    assert cut_box(box, (H,W)) == want
    data = read_coco(written(folder, lambda c: first(c).update(bbox=list(box))), folder/'train')
    assert data.things[0][0]['box'] == want

@pytest.mark.parametrize('box', [(4,5,0,6), (4,5,8,0), (4,5,-2,6), (40,5,8,6), (-9,5,8,6)])
def test_a_box_without_area_is_left_out_and_counted(box, folder):
    file = written(folder, lambda c: first(c).update(bbox=list(box)))
    with pytest.warns(UserWarning, match='1 box has no area inside the image and is left out: annotation 0'):
        data = read_coco(file, folder/'train')
    assert not data.things[0] and len(data.things[1]) == 1

def test_a_crowd_is_kept_aside(folder):
    runs = dict(size=[H,W], counts=[0,H*W])
    file = written(folder, lambda c: first(c).update(iscrowd=1, segmentation=runs))
    data = read_coco(file, folder/'train', masks=True)
    assert not data.things[0] and data.crowds[0][0]['id'] == 0
    assert CocoImages(data)[0][1]['labels'].tolist() == []

def test_labels_are_1_and_up_in_the_order_of_the_ids(folder):
    data = read_coco(folder/'instances_train.json', folder/'train')
    assert (data.vocab,data.ids) == (['early','late'],[3,8])
    assert [CocoImages(data)[i][1]['labels'].tolist() for i in range(6)] == [[1],[2],[1],[2],[1],[]]

@pytest.mark.parametrize('seed', range(20))
def test_runs_written_as_a_text(seed, folder):
    "What COCO's tools write is understood, and one letter less is not"
    from pycocotools import mask
    rng = np.random.RandomState(seed)
    m = (rng.rand(H, W) < rng.choice((.02,.5,.98))).astype(np.uint8)
    text = mask.encode(np.asfortranarray(m))['counts'].decode()
    def with_text(t): return written(folder, lambda c: first(c).update(segmentation=dict(size=[H,W], counts=t)))
    data = read_coco(with_text(text), folder/'train')
    assert (mask_of(data.things[0][0], (H,W)) == m).all()
    with pytest.raises(CocoError, match='do not add up'): read_coco(with_text(text[:-1]), folder/'train')

def test_polygon_runs_and_compressed_runs_are_the_same_mask():
    from pycocotools import mask
    want = np.zeros((H,W), np.uint8)
    want[5:11,4:12] = 1
    packed = mask.encode(np.asfortranarray(want))
    text = dict(packed, counts=packed['counts'].decode())
    plain = run_lengths(want)
    assert plain == dict(size=[H,W], counts=[101]+[6,18]*7+[6,493])
    for o in (polygon(4, 5, 8, 6), packed, text, plain): assert (mask_of(dict(segmentation=o), (H,W)) == want).all()
    two = polygon(4, 5, 4, 6)+polygon(8, 5, 4, 6)
    assert (mask_of(dict(segmentation=two), (H,W)) == want).all()

@pytest.mark.parametrize('masks', [True,False])
def test_an_image_without_things(masks, folder):
    x,there = CocoImages(read_coco(folder/'instances_train.json', folder/'train'), masks, scene_tfm(16))[5]
    assert x.shape == (3,16,16) and there['boxes'].shape == (0,4) and there['labels'].dtype == torch.int64
    assert ('masks' in there) == masks and (not masks or there['masks'].shape == (0,16,16))

def test_images_of_another_size_can_be_left_out(folder):
    file = written(folder, lambda c: c['images'][1].update(height=99))
    with pytest.warns(UserWarning, match='1 image is left out: .*1.png is 24x32 pixels'):
        data = read_coco(file, folder/'train', on_bad='skip')
    assert [o['id'] for o in data.images] == [0,2,3,4,5]

@pytest.mark.parametrize('said,ok', [((W,H), True), ((H,W), False)])
def test_a_photograph_that_its_tag_turns(said, ok, folder):
    im = Image.open(folder/'train'/'1.png')
    exif = Image.Exif()
    exif[274] = 6
    im.save(folder/'train'/'1.png', exif=exif)
    def change(c):
        c['images'][1].update(height=said[0], width=said[1])
        c['annotations'][1].update(bbox=[1,2,3,4], segmentation=polygon(1, 2, 3, 4))
    file = written(folder, change)
    if ok: assert CocoImages(read_coco(file, folder/'train'))[1][0].shape == (3,W,H)
    else:
        with pytest.raises(CocoError, match='1.png is 32x24 pixels, which the EXIF tag turns, and image 1 is said'):
            read_coco(file, folder/'train')

@pytest.mark.parametrize('mode', ['L','RGBA','P'])
def test_images_of_other_modes(mode, folder):
    Image.open(folder/'train'/'0.png').convert(mode).save(folder/'train'/'0.png')
    x,_ = CocoImages(read_coco(folder/'instances_train.json', folder/'train'))[0]
    assert x.shape == (3,H,W) and 0 <= x.min() and x.max() <= 1

def test_a_thing_of_two_parts_is_cut(folder):
    "Its box is that of the ink that is left, and without ink it goes"
    def two(c): first(c).update(bbox=[0,0,32,24], segmentation=polygon(0, 0, 3, 24)+polygon(29, 0, 3, 24))
    ds = CocoImages(read_coco(written(folder, two), folder/'train'), True, scene_tfm(32, (1.,3.)))
    torch.manual_seed(0)
    seen = []
    for _ in range(60):
        _,there = ds[0]
        seen.append(len(there['boxes']))
        for box,m in zip(there['boxes'], there['masks']):
            ys,xs = m.nonzero(as_tuple=True)
            assert box.tolist() == [xs.min(), ys.min(), xs.max()+1, ys.max()+1]
    assert 0 in seen and 1 in seen

@pytest.mark.parametrize('kw,says', [(dict(bs=0), 'batch size must be 1 or more, got 0'),
    (dict(on_bad='ignore'), "on_bad must be 'raise' or 'skip', got 'ignore'")])
def test_arguments_that_make_no_sense(kw, says, folder):
    with pytest.raises(ValueError, match=says): made(folder, **kw)

def test_boxes_and_masks_stay_together(folder):
    "Wherever crop, scale and mirror put a thing, the mask fills its box"
    ds = CocoImages(read_coco(folder/'instances_train.json', folder/'train'), True, scene_tfm(32, (.7,2.)))
    torch.manual_seed(0)
    seen = 0
    for i in list(range(5))*6:
        x,there = ds[i]
        assert x.shape == (3,32,32) and 0 <= x.min() and x.max() <= 1
        for box,m in zip(there['boxes'], there['masks']):
            ys,xs = m.nonzero(as_tuple=True)
            edges = torch.stack([xs.min(), ys.min(), xs.max()+1, ys.max()+1]).float()
            assert (edges-box).abs().max() == 0
            seen += 1
    assert seen > 15

def test_shorter_sides(folder):
    ds = CocoImages(read_coco(folder/'instances_train.json', folder/'train'), True, scene_tfm(64, None, (30,48), 0.))
    torch.manual_seed(0)
    sizes = {tuple(ds[0][0].shape[1:]) for _ in range(12)}
    assert sizes == {(30,40),(48,64)}

# ---------------------------------------------------------------- batches

def batches(dl): return [([x.clone() for x in xs], [t['boxes'].clone() for t in ts]) for xs,ts in dl]
def same(a, b):
    return len(a)==len(b) and all(torch.equal(x, y) for o,p in zip(a, b) for u,v in zip(o, p) for x,y in zip(u, v))
def made(folder, **kw):
    return coco_dls(folder, **{**dict(bs=2, tfm=scene_tfm(16, (.8,1.4)), device='cpu'), **kw})

def test_the_same_batches_with_0_1_and_2_workers(folder):
    want = batches(made(folder).train)
    for n in (1,2): assert same(batches(made(folder, workers=n).train), want)
    assert not same(batches(made(folder, seed=1).train), want)

def test_an_epoch_can_be_entered_in_the_middle(folder):
    dl = made(folder).train
    batches(dl)
    second = batches(dl)
    again = made(folder).train
    again.set_epoch(1, 1)
    assert same(batches(again), second[1:])

def test_processes_share_an_epoch(folder):
    parts = [made(folder, bs=1, rank=r, world=2).train.get_idxs() for r in (0,1)]
    assert sorted(sum(parts, [])) == list(range(6))

def test_an_error_in_a_transform_names_the_file(folder):
    def broken(x, there): raise KeyError('speed')
    with pytest.raises(KeyError) as e: made(folder, tfm=broken).train.one_batch()
    assert '.png' in str(e.value)+''.join(getattr(e.value, '__notes__', []))

def moved(folder, layout):
    "The same data as others lay them out"
    if layout.startswith('roboflow'):
        for part,name in (('train','train'),('val',layout.split()[1])):
            (folder/part).rename(folder/name)
            (folder/f'instances_{part}.json').rename(folder/name/'_annotations.coco.json')
    elif layout!='flat':
        (folder/'annotations').mkdir()
        if layout=='images': (folder/'images').mkdir()
        for part in ('train','val'):
            (folder/f'instances_{part}.json').rename(folder/'annotations'/f'instances_{part}2017.json')
            (folder/part).rename(folder/('images' if layout=='images' else '')/f'{part}2017')
    return folder

@pytest.mark.parametrize('layout', ['flat','annotations','images','roboflow valid','roboflow test','roboflow val'])
def test_where_the_parts_are(layout, folder):
    want = batches(made(folder).train)
    assert is_coco(moved(folder, layout)) and made(folder).vocab == ['early','late']
    assert same(batches(made(folder).train), want)

def test_a_part_alone(folder):
    "Roboflow's third part, or any file, when one part is asked for"
    moved(folder, 'roboflow valid')
    shutil.copytree(folder/'valid', folder/'test')
    assert coco_files(folder, 'val')[1] == folder/'valid'   # the first of them
    for path in (folder/'test', folder/'test'/'_annotations.coco.json'):
        assert is_coco(path) and coco_files(path, 'val') == (folder/'test'/'_annotations.coco.json', folder/'test')
        with pytest.raises(ValueError, match='one file instances_train.*found 0'): coco_files(path, 'train')

def test_folders_of_classes_are_none_of_this(tmp_path):
    (tmp_path/'train'/'cat').mkdir(parents=True)
    (tmp_path/'x.txt').write_text('')
    assert not is_coco(tmp_path) and not is_coco(tmp_path/'x.txt') and not is_coco(tmp_path/'nowhere')
    with pytest.raises(FileNotFoundError, match='nowhere: no such file'): coco_files(tmp_path/'nowhere', 'val')

def test_a_batch_of_one_image_of_odd_size(folder):
    pixels = np.zeros((17,23,3), np.uint8)
    Image.fromarray(pixels).save(folder/'train'/'1.png')
    def odd(c):
        c['images'][1].update(height=17, width=23)
        c['annotations'][1].update(bbox=[0,0,23,17], segmentation=polygon(0, 0, 23, 17))
    written(folder, odd)
    sizes = {tuple(x.shape) for xs,_ in made(folder, bs=1, tfm=scene_tfm(64, None)).train for x in xs}
    assert sizes == {(3,H,W),(3,17,23)}

def test_parts_that_are_missing_or_differ(folder):
    with pytest.raises(ValueError, match='6 training images are too few'): made(folder, bs=7)
    def other(c): c['categories'][0].update(name='other')
    written(folder, other, 'val')
    with pytest.raises(CocoError, match='instances_val.json: its categories are not those of instances_train.json'):
        made(folder)
    (folder/'instances_val.json').unlink()
    with pytest.raises(ValueError, match=r'wanted one file instances_val\*.json, .* found 0'): made(folder)

def test_masks_without_pycocotools(folder, monkeypatch):
    monkeypatch.setattr('revvit.data.coco.find_spec', lambda name: None)
    with pytest.raises(ImportError, match='pip install pycocotools'): made(folder).train.one_batch()
    assert len(made(folder, masks=False).train.one_batch()[0]) == 2

def test_a_picture_of_what_was_found():
    x = torch.zeros(3, 40, 40)
    there = dict(boxes=torch.tensor([[4.,4.,20.,20.],[22.,22.,38.,38.]]), labels=torch.tensor([1,2]),
        scores=torch.tensor([.9,.2]), masks=torch.ones(2, 1, 40, 40)*torch.tensor([.9,.1]).view(2, 1, 1, 1))
    drawn = draw_scene(x, there, ['a','b'])
    assert drawn.shape == (3,400,400) and drawn[:,40,100].any() and not draw_scene(x, there, ['a','b'], .95).any()

def test_masks_that_lie_on_each_other_are_seen():
    there = dict(boxes=torch.tensor([[0.,0.,40.,40.]]*2), labels=torch.tensor([1,2]), masks=torch.ones(2, 40, 40))
    drawn = draw_scene(torch.zeros(3, 40, 40), there, ['a','b'])
    assert drawn[:,200,200].any()   # inside, far from the lines and the names
