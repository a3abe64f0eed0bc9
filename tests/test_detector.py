"""Detectors: torchvision's heads on reversible backbones. In float64 the gradients of the whole loss against stored
activations; what odd images and odd targets do; the switch."""
import copy

import pytest, timm, torch
from torch import nn
from torch.testing import assert_close
from torchvision.models.detection.mask_rcnn import MaskRCNNHeads
import revvit
from revvit.core.memory import saved_bytes
from revvit.models.detector import FeatureMaps, PyramidBackbone, ReversibleFasterRCNN, detector, last_of_each_stride

torch.set_num_threads(1)
TINY = dict(img_size=64, num_classes=0)
SMALL = dict(min_size=64, max_size=96, out_channels=8, anchor_scale=2., rpn_batch_size_per_image=16,
    rpn_post_nms_top_n_train=20, rpn_post_nms_top_n_test=20, box_batch_size_per_image=8, box_detections_per_img=5)

def rev_mvit(**kw):
    return timm.create_model('revmvit_tiny_224', **TINY, **dict(dict(embed_dim=8, num_heads=1, depth=4), **kw))
def rev_vit(**kw):
    return timm.create_model('revvit_tiny_patch16_224', **TINY, **dict(dict(embed_dim=16, num_heads=2, depth=3), **kw))
def rewired():
    return revvit.reversible(timm.create_model('vit_tiny_patch16_224', **TINY, embed_dim=16, num_heads=2, depth=3,
                                               dynamic_img_size=True))
def rewired_swin():
    return revvit.reversible(timm.create_model('swin_tiny_patch4_window7_224', **TINY, embed_dim=8, depths=(2,2,2),
                                               num_heads=(1,2,2), strict_img_size=False, drop_path_rate=0.))
BACKBONES = dict(rev_mvit=rev_mvit, rev_vit=rev_vit, rewired_vit=rewired, rewired_swin=rewired_swin)

def made(backbone, masks=True, **kw):
    "A small detector; torchvision's mask head has four wide convolutions"
    torch.manual_seed(0)
    if masks: kw = dict(mask_head=MaskRCNNHeads(SMALL['out_channels'], (256,), 1), **kw)
    return detector(BACKBONES[backbone]() if isinstance(backbone, str) else backbone, 2, masks, **{**SMALL, **kw})

def scene(size, boxes, labels, dtype=torch.float32, seed=0):
    "An image, and what is in it"
    h,w = size
    x,masks = torch.rand(3, h, w, dtype=dtype, generator=torch.Generator().manual_seed(seed)),[]
    for x0,y0,x1,y1 in boxes:
        m = torch.zeros(h, w, dtype=torch.uint8)
        m[y0:y1,x0:x1] = 1
        masks.append(m)
    return x,dict(boxes=torch.tensor(boxes, dtype=dtype).view(-1, 4), labels=torch.tensor(labels, dtype=torch.int64),
        masks=torch.stack(masks) if masks else torch.zeros(0, h, w, dtype=torch.uint8))

SCENES = dict(
    two_sizes=[((64,64), [(5,5,30,40)], [1]), ((56,80), [(10,5,50,30),(0,0,20,20)], [2,1])],
    batch_of_1=[((64,64), [(5,5,30,40)], [1])],
    nothing_there=[((64,64), [], []), ((64,64), [], [])],
    one_without=[((64,64), [], []), ((64,72), [(5,5,30,40)], [2])],
    odd_size=[((61,83), [(5,5,30,40)], [1])],
    high=[((87,64), [(5,5,30,40)], [1])],
    box_of_all=[((64,64), [(0,0,64,64)], [1])])

def step(net, scenes, on=True, dtype=torch.float64, **kw):
    "The loss, and gradients by name"
    net.set_reversible(on, **kw)
    net.zero_grad()
    images,there = zip(*(scene(*o, dtype=dtype, seed=i) for i,o in enumerate(scenes)))
    torch.manual_seed(1)
    loss = sum(net(list(images), list(there)).values())
    loss.backward()
    return {'loss':loss.detach(), **{k:p.grad for k,p in net.named_parameters()}}

def agree(got, want):
    for k in want:
        assert (got[k] is None)==(want[k] is None), k
        if want[k] is not None: assert_close(got[k], want[k], rtol=1e-7, atol=1e-11, msg=lambda m: f'{k}: {m}')

@pytest.mark.parametrize('masks', [True,False])
@pytest.mark.parametrize('scenes', SCENES)
@pytest.mark.parametrize('backbone', BACKBONES)
def test_gradients_of_the_whole_loss(backbone, scenes, masks):
    net = made(backbone, masks).double()
    got,want = (step(net, SCENES[scenes], on) for on in (True,False))
    agree(got, want)
    weights = [k for k,p in net.named_parameters() if 'maps.model' in k and p.ndim>1 and 'pos_embed' not in k]
    assert len(weights)>9 and not [k for k in weights if not got[k].any() and 'relative_position' not in k]

@pytest.mark.parametrize('backbone', BACKBONES)
def test_exact_gives_the_same_bits(backbone):
    net = made(backbone)
    got,want = (step(net, SCENES['two_sizes'], on, torch.float32, exact=True) for on in (True,False))
    for k in want: assert want[k] is None or torch.equal(got[k], want[k]), k

@pytest.mark.parametrize('keep', [.1,1.])
def test_the_dial(keep):
    net = made('rev_mvit').double()
    agree(step(net, SCENES['two_sizes'], keep=keep), step(net, SCENES['two_sizes'], False))

def test_drop_path_draws_alike():
    net = made(rev_mvit(drop_path_rate=.5)).double()
    agree(step(net, SCENES['two_sizes']), step(net, SCENES['two_sizes'], False))

@pytest.mark.parametrize('backbone', BACKBONES)
def test_autocast(backbone):
    net = made(backbone)
    with torch.autocast('cpu', torch.bfloat16): got = step(net, SCENES['one_without'], dtype=torch.float32)
    want = step(net, SCENES['one_without'], dtype=torch.float32)
    assert_close(got['loss'], want['loss'], rtol=.1, atol=.1)
    for k in want:
        assert (got[k] is None)==(want[k] is None) and (got[k] is None or got[k].isfinite().all())
    assert sum(g is not None and bool(g.any()) for g in got.values())>30

@pytest.mark.parametrize('size', [(87,64),(64,64),(40,200)])
def test_pooling_knows_the_strides_whatever_comes_first(size):
    net = made('rev_mvit').eval()
    with torch.no_grad(): net([torch.rand(3, *size)])
    for o in (net.roi_heads.box_roi_pool,net.roi_heads.mask_roi_pool): assert o.scales == [1/4,1/8,1/16]

def test_own_predictors():
    predictor = nn.Identity()
    net = made('rev_mvit', box_predictor=predictor)
    assert net.roi_heads.box_predictor is predictor and net.roi_heads.mask_predictor is not None

@pytest.mark.parametrize('make', [rev_mvit,rev_vit])
def test_what_is_kept_does_not_grow_with_depth(make):
    def kept(depth):
        maps = FeatureMaps(make(depth=depth))
        return saved_bytes(lambda: maps(torch.rand(2, 3, 64, 64)), maps)
    assert kept(16)-kept(8) <= 8*1024   # 1 kB for each further block

@pytest.mark.parametrize('backbone', BACKBONES)
def test_strides_are_those_of_the_maps(backbone):
    back = PyramidBackbone(BACKBONES[backbone](), 8)
    for h,w in ((64,64),(128,64)):
        maps = back(torch.rand(1, 3, h, w))
        assert [tuple(o.shape[1:]) for o in maps.values()] == [(8, max(1, h//s), max(1, w//s)) for s in back.strides]
        assert list(maps)[-1] == 'pool'

def test_one_image_learned_by_heart():
    "Its box, label and mask come back"
    net = made(rev_mvit(embed_dim=16), box_batch_size_per_image=32)
    x,mask = torch.full((3,64,64), .2),torch.zeros(1, 64, 64, dtype=torch.uint8)
    x[:,16:40,16:48],mask[:,16:40,16:48] = .9,1
    there = dict(boxes=torch.tensor([[16.,16.,48.,40.]]), labels=torch.tensor([2]), masks=mask)
    opt = torch.optim.AdamW(net.parameters(), 1e-3)   # at twice the rate one start in six has not learned it
    for _ in range(60):
        sum(net([x], [there]).values()).backward()
        opt.step(); opt.zero_grad()
    found = net.eval()([x])[0]
    assert found['labels'][0] == 2 and found['scores'][0] > .5
    assert (found['boxes'][0]-there['boxes'][0]).abs().max() < 6
    got = found['masks'][0] > .5
    assert (got & mask.bool()).sum()/(got | mask.bool()).sum() > .7

def test_a_copy_and_its_weights_detect_the_same():
    net,other = made('rev_mvit').eval(),made('rev_mvit').eval()
    for p in other.parameters(): p.data.add_(1)
    other.load_state_dict(net.state_dict())
    x = torch.rand(3, 64, 64)
    with torch.no_grad(): want,*got = (o([x])[0] for o in (net, copy.deepcopy(net), other))
    for o in got:
        for k in want: assert torch.equal(o[k], want[k])

def test_colours_are_the_backbones():
    model = rev_mvit()
    model.pretrained_cfg = dict(mean=(.1,.2,.3), std=(.4,.5,.6))
    t = detector(model, 1, **SMALL).transform
    assert (t.image_mean,t.image_std,t.size_divisible) == ([.1,.2,.3],[.4,.5,.6],32)
    assert detector(rev_mvit(), 1, image_mean=[0.]*3, **SMALL).transform.image_mean == [0.]*3

def test_a_backbone_by_name():
    net = revvit.detector('revvit_tiny_patch16_224', 3, False, **SMALL)
    assert isinstance(net, ReversibleFasterRCNN) and net.roi_heads.mask_head is None
    assert net.roi_heads.box_predictor.cls_score.out_features == 4

class NoMaps(nn.Module):
    def set_reversible(self, on=True): pass

@pytest.mark.parametrize('make,says', [
    (lambda: detector(timm.create_model('vit_tiny_patch16_224', depth=1), 2), 'VisionTransformer is not reversible'),
    (lambda: detector(rev_vit(), 0), 'num_classes must be 1 or more, got 0'),
    (lambda: detector(timm.create_model('revmvit_tiny_16x4_224'), 2), 'RevMViT takes clips'),
    (lambda: detector(rev_vit(dynamic_img_size=False), 2), 'RevViT does not take images of any size'),
    (lambda: detector(revvit.reversible(timm.create_model('vit_tiny_patch16_224', depth=1)), 2),
     'VisionTransformer does not take images of any size .*dynamic_img_size=True'),
    (lambda: detector(NoMaps(), 2), 'NoMaps lacks them'),
    (lambda: last_of_each_stride(revvit.RevViT(img_size=28, patch_size=14, depth=1)), 'RevViT has 14')])
def test_refusals(make, says):
    with pytest.raises(ValueError, match=says): make()

@pytest.mark.parametrize('label,who,says', [(3, {}, 'target 1 has the label 3, and the detector has 2 categories'),
    (0, dict(image_id='ab'), 'image ab has the label 0'), (-1, {}, 'target 1 has the label -1')])
def test_labels_of_no_category(label, who, says):
    images,there = zip(*(scene((64,64), [(5,5,30,40)], [1]) for _ in range(2)))
    there[1].update(labels=torch.tensor([label]), **who)
    net = made('rev_vit')
    with pytest.raises(ValueError, match=says): net(list(images), list(there))
    assert len(net.eval()(list(images))) == 2   # labels are asked of those that learn

@pytest.mark.parametrize('masks,name', [(True,'box_score_tresh'), (False,'mask_head'), (True,'size')])
def test_words_that_torchvision_does_not_know(masks, name):
    with pytest.raises(TypeError, match=f"RCNN has no argument '{name}'"): detector(rev_vit(), 2, masks, **{name: None})

@pytest.mark.parametrize('widths', [8, (), '8'])
def test_widths_of_the_mask_head(widths):
    with pytest.raises(ValueError, match='mask_layers must be the widths of one convolution or more, as'):
        detector(rev_vit(), 2, mask_layers=widths)
