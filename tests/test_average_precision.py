"""COCO's measure, on detections whose precision can be worked out by hand."""
import json

import pytest, torch
from PIL import Image
from torch import nn
from revvit.data.coco import read_coco
from revvit.data.loader import EpochDL
from revvit.data.scenes import CocoImages, as_lists
from revvit.data.average_precision import average_precision, coco_results, detections

def square(x, y, s=20): return [[x, y, x+s, y, x+s, y+s, x, y+s]]

def things(*places, **more):
    return [{**dict(id=k, image_id=i, category_id=c, bbox=[x,y,20,20], area=400, iscrowd=0,
                    segmentation=square(x, y)), **more} for k,(i,c,x,y) in enumerate(places, 1)]

def written(folder, annotations, images=2):
    for i in range(images): Image.new('RGB', (100,80)).save(folder/f'{i}.png')
    (folder/'x.json').write_text(json.dumps(dict(annotations=annotations,
        images=[dict(id=i, file_name=f'{i}.png', height=80, width=100) for i in range(images)],
        categories=[dict(id=4, name='cat'), dict(id=9, name='dog')])))
    return folder/'x.json'

def found(*things, masks=True):
    "Detections as (label, x, y, score)"
    out = dict(boxes=torch.tensor([[x,y,x+20,y+20] for _,x,y,_ in things], dtype=torch.float32).view(-1, 4),
        labels=torch.tensor([o[0] for o in things], dtype=torch.int64), scores=torch.tensor([o[3] for o in things]))
    if masks: out['masks'] = torch.zeros(len(things), 1, 80, 100)
    for k,(_,x,y,_) in enumerate(things):
        if masks: out['masks'][k,0,y:y+20,x:x+20] = .9
    return out

def measured(data, *images):
    return average_precision([o for i,f in enumerate(images) for o in coco_results(f, i, data)], data)

CAT,DOG = (0,4,10,10),(0,9,50,40)
CASES = dict(
    all_found=([found((1,10,10,.9),(2,50,40,.8))], dict(cat=1., dog=1.)),
    one_missing=([found((1,10,10,.9))], dict(cat=1., dog=0.)),
    surer_than_right=([found((1,70,10,.9),(1,10,10,.8),(2,50,40,.8))], dict(cat=.5, dog=1.)),
    found_twice=([found((1,10,10,.9),(1,11,10,.8),(2,50,40,.8))], dict(cat=1., dog=1.)),
    wrong_name=([found((2,10,10,.7),(2,50,40,.8))], dict(cat=0., dog=1.)),
    another_image=([found(), found((1,10,10,.9),(2,50,40,.8))], dict(cat=0., dog=0.)))

@pytest.mark.parametrize('name', CASES)
def test_by_hand(name, tmp_path):
    images,want = CASES[name]
    got = measured(read_coco(written(tmp_path, things(CAT, DOG)), tmp_path), *images)
    for kind in ('boxes','masks'):
        assert got[kind]['classes'] == pytest.approx(want)
        assert got[kind]['ap'] == pytest.approx(sum(want.values())/2)

def test_a_mask_that_is_half_right(tmp_path):
    "The box is right and the mask a half of it: IoU .5 passes at .5 alone"
    f = found((1,10,10,.9))
    f['masks'][0,0,10:20] = 0
    got = measured(read_coco(written(tmp_path, things(CAT)), tmp_path), f)
    assert got['boxes']['ap'] == pytest.approx(1) and got['masks']['ap'] == pytest.approx(.1)
    assert got['masks']['ap50'] == pytest.approx(1) and got['masks']['ap75'] == 0

def test_detections_in_a_crowd_are_forgiven(tmp_path):
    crowd = dict(things((0,4,40,40))[0], id=7, iscrowd=1, segmentation=dict(size=[80,100], counts=[0,8000]),
                 bbox=[0,0,100,80], area=8000)
    inside = found((1,10,10,.9),(1,60,60,.95))
    for there,want in (([*things(CAT), crowd],1.), (things(CAT),.5)):
        got = measured(read_coco(written(tmp_path, there), tmp_path), inside)
        assert got['boxes']['ap'] == pytest.approx(want)

def test_a_category_that_is_nowhere_has_no_ap(tmp_path):
    got = measured(read_coco(written(tmp_path, things(CAT)), tmp_path), found((1,10,10,.9),(2,3,3,.99)))
    assert got['boxes']['classes'] == {'cat': pytest.approx(1), 'dog': None} and got['boxes']['ap'] == pytest.approx(1)

def test_images_that_were_left_out_do_not_count(tmp_path):
    file = written(tmp_path, things(CAT, (1,4,10,10)))
    (tmp_path/'1.png').unlink()
    with pytest.warns(UserWarning, match='left out'): data = read_coco(file, tmp_path, on_bad='skip')
    assert measured(data, found((1,10,10,.9)))['boxes']['ap'] == pytest.approx(1)

@pytest.mark.parametrize('masks', [True,False])
def test_nothing_found(masks, tmp_path):
    data = read_coco(written(tmp_path, things(CAT)), tmp_path)
    got = average_precision(coco_results(found(), 0, data), data, masks)
    assert list(got) == ['boxes','masks'][:1+masks]
    for kind in ('boxes','masks')[:1+masks]:
        assert got[kind]['ap'] == 0 and got[kind]['classes'] == dict(cat=0., dog=None) and got[kind]['medium'] is None

def test_boxes_alone(tmp_path):
    got = measured(read_coco(written(tmp_path, things(CAT)), tmp_path), found((1,10,10,.9), masks=False))
    assert list(got) == ['boxes'] and got['boxes']['ap'] == pytest.approx(1)

def changed(**more): return [{**o, **more} for o in things(CAT)]
def without(*keys): return [{k:v for k,v in o.items() if k not in keys} for o in things(CAT)]
AS_IT_STANDS = dict(
    id_0=changed(id=0), id_a_word=changed(id='a7'), no_area=without('area'), no_iscrowd=without('iscrowd'),
    over_the_edge=changed(bbox=[-30,10,60,20], segmentation=[[0,10,30,10,30,30,0,30]]),
    box_outside=[*things(CAT), dict(things((0,4,200,200))[0], id=5)],
    crowd_without_outline=[*things(CAT), dict(things((0,4,60,50))[0], id=5, iscrowd=1, segmentation=[])])

@pytest.mark.filterwarnings('ignore:.*have no area|.*has no area')
@pytest.mark.parametrize('name', AS_IT_STANDS)
def test_what_reading_put_right_is_what_is_measured(name, tmp_path):
    data = read_coco(written(tmp_path, AS_IT_STANDS[name]), tmp_path)
    f = found((1,10,10,.9))
    if name=='over_the_edge':
        f['boxes'] = torch.tensor([[0.,10.,30.,30.]])
        f['masks'][0,0,10:30,:30] = .9
    got = measured(data, f)
    assert got['boxes']['classes']['cat'] == pytest.approx(1) and got['masks']['classes']['cat'] == pytest.approx(1)

def test_boxes_alone_in_the_file(tmp_path):
    "A detector that gives masks is measured by its boxes"
    data = read_coco(written(tmp_path, without('segmentation')), tmp_path)
    assert list(measured(data, found((1,10,10,.9)))) == ['boxes']

def test_by_masks_a_size_is_that_of_the_mask(tmp_path):
    "A thin thing in a large box is small; the surer false one is large by its box"
    thin = dict(things(CAT)[0], bbox=[0,0,100,80], area=100, segmentation=[[0,0,100,0,100,1,0,1]])
    f = found((1,10,10,.9),(1,10,10,.95))
    f['boxes'],f['masks'] = torch.tensor([[0.,0.,100.,80.],[0.,0.,99.,79.]]),torch.zeros(2, 1, 80, 100)
    f['masks'][0,0,:1],f['masks'][1,0,70:71] = .9,.9
    got = measured(read_coco(written(tmp_path, [thin]), tmp_path), f)
    assert got['masks']['small'] == pytest.approx(.5)

@pytest.mark.parametrize('training', [True,False])
def test_a_detector_is_left_as_it_was(training, tmp_path):
    class Blind(nn.Module):
        def __init__(self):
            super().__init__()
            self.frozen = nn.Linear(1, 1)
        def forward(self, images):
            assert not self.training and not torch.is_grad_enabled()
            return [found() for _ in images]
    model = Blind().train(training)
    model.frozen.eval()
    data = read_coco(written(tmp_path, things(CAT)), tmp_path)
    assert detections(model, EpochDL(CocoImages(data), 2, create_batch=as_lists)) == []
    assert model.training == training and not model.frozen.training
