"""Digits scattered on a canvas: the same every time, boxes that fit the ink, written once and whole."""
import json

import numpy as np, pytest, torch
from revvit.data import scattered_digits as module
from revvit.data.coco import read_coco
from revvit.data.digits import digits
from revvit.data.scattered_digits import scattered, scattered_digits, scattered_digits_dls
from revvit.data.scenes import CocoImages

@pytest.fixture
def few(monkeypatch): monkeypatch.setattr(module, '_parts', dict(train=12, val=5))

def test_the_same_every_time(tmp_path, few):
    a,b = (scattered_digits(tmp_path/o) for o in 'ab')
    names = sorted(str(o.relative_to(a)) for o in a.rglob('*'))
    assert names == sorted(str(o.relative_to(b)) for o in b.rglob('*')) and len(names) == 12+5+5
    assert all((a/o).read_bytes() == (b/o).read_bytes() for o in names if (a/o).is_file())

@pytest.mark.parametrize('seed', range(8))
def test_what_is_found_is_ink_and_keeps_apart(seed):
    canvas,found = scattered(*digits(), np.random.RandomState(seed))
    assert canvas.shape == (96,96) and len(found) <= 5
    assert all((canvas[m>0]>100).all() and m.any() for _,m in found)
    edges = [(m.any(0).nonzero()[0],m.any(1).nonzero()[0]) for _,m in found]
    boxes = [(xs[0],ys[0],xs[-1],ys[-1]) for xs,ys in edges]
    for i,a in enumerate(boxes):
        for b in boxes[:i]: assert a[2]<b[0] or b[2]<a[0] or a[3]<b[1] or b[3]<a[1]

def test_boxes_are_the_edges_of_the_masks(tmp_path, few):
    folder = scattered_digits(tmp_path/'x')
    ds,seen = CocoImages(read_coco(folder/'instances_train.json', folder/'train', masks=True)),0
    for i in range(len(ds)):
        _,there = ds[i]
        for box,mask in zip(there['boxes'], there['masks']):
            ys,xs = mask.nonzero(as_tuple=True)
            assert box.tolist() == [xs.min(), ys.min(), xs.max()+1, ys.max()+1]
            seen += 1
    assert seen > 10

def test_held_out_digits_are_others(tmp_path, few, monkeypatch):
    given = []
    def noted(images, labels, rng):
        given.append({o.tobytes() for o in images})
        return scattered(images, labels, rng)
    monkeypatch.setattr(module, 'scattered', noted)
    scattered_digits(tmp_path/'x')
    assert len(given[0])>1400 and len(given[-1])>350 and not given[0]&given[-1]

def test_another_folder_of_coco_is_no_scattered_digits(tmp_path):
    for part in ('train','val'):
        (tmp_path/part).mkdir()
        (tmp_path/f'instances_{part}.json').write_text('{}')
    with pytest.raises(ValueError, match='holds other things than the scattered digits'): scattered_digits(tmp_path)

def test_written_once_and_whole(tmp_path, few, monkeypatch):
    folder = scattered_digits(tmp_path/'x')
    (folder/'train'/'0000.png').write_bytes(b'mine')
    assert scattered_digits(folder) == folder and (folder/'train'/'0000.png').read_bytes() == b'mine'
    def full(*args): raise OSError(28, 'No space left on device')
    monkeypatch.setattr(json, 'dumps', full)
    with pytest.raises(OSError, match='No space left'): scattered_digits(tmp_path/'y')
    assert sorted(o.name for o in tmp_path.iterdir()) == ['x']

def test_a_folder_with_other_things_is_refused(tmp_path):
    (tmp_path/'letter.txt').write_text('')
    with pytest.raises(ValueError, match='holds other things than the scattered digits'): scattered_digits(tmp_path)

def test_batches(tmp_path, few):
    dls = scattered_digits_dls(4, tmp_path/'x', device='cpu')
    images,there = dls.one_batch()
    assert [o.shape for o in images] == [(3,96,96)]*4 and dls.vocab == list('0123456789')
    assert all(t['masks'].shape == (len(t['boxes']),96,96) and t['labels'].ge(1).all() for t in there)
    assert len(list(dls.valid)) == 2
