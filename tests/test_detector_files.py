"""Files of detectors: saved and built again with the same answers; other categories, sizes and backbones; classifiers'
files, ours and the publishers'; files of strangers, of which nothing is executed, built or half loaded."""
import copy

import pytest, timm, torch
from torch import nn
from torch.testing import assert_close
import revvit
from revvit.models.files import CheckpointError, read_checkpoint, write_checkpoint

torch.set_num_threads(1)
SMALL = dict(min_size=64, max_size=96, out_channels=8, anchor_scale=2., box_dim=16, mask_layers=(8,12))
TIMM = dict(img_size=64, embed_dim=16, num_heads=2, depth=2, dynamic_img_size=True)
BACKBONES = dict(
    rev_mvit=('revmvit_tiny_224', dict(img_size=64, embed_dim=8, num_heads=1, depth=4)),
    rev_vit=('revvit_tiny_patch16_224', dict(img_size=64, embed_dim=16, num_heads=2, depth=2)),
    rewired=('vit_tiny_patch16_224', TIMM))

def made(backbone='rev_mvit', classes=2, masks=True, **kw):
    torch.manual_seed(0)
    name,args = BACKBONES[backbone]
    args = {**args, **kw.pop('backbone_args', {})}
    return revvit.detector(name, classes, masks, backbone_args=args, **{**SMALL, **kw})

def answers(net, x=torch.rand(3, 61, 83, generator=torch.Generator().manual_seed(1))):
    with torch.no_grad(): return net.eval()([x])[0]

def same(a, b): assert set(a)==set(b) and all(torch.equal(a[k], b[k]) for k in a)

@pytest.mark.parametrize('masks', [True,False])
@pytest.mark.parametrize('backbone', BACKBONES)
def test_saved_and_built_again(backbone, masks, tmp_path):
    net = made(backbone, masks=masks, box_detections_per_img=7, box_score_thresh=.01)
    back = revvit.load_model(revvit.save_checkpoint(net, tmp_path/'a.pth', class_names=['cat','dog']))
    same(answers(net), answers(back))
    assert back.pretrained_cfg['label_names'] == ['cat','dog'] and not back.training
    assert back.model_args == net.model_args and back.roi_heads.detections_per_img == 7
    again = revvit.save_checkpoint(back, tmp_path/'b.pth')
    assert read_checkpoint(again)['class_names'] == ['cat','dog']

def test_an_instance_is_saved_as_it_was_built(tmp_path):
    args = dict(embed_dim=8, num_heads=1, depth=6, stage_starts=(1,), img_size=(64,96))
    net = revvit.detector(timm.create_model('revmvit_tiny_224', **args), 2, **SMALL)
    same(answers(net), answers(revvit.load_model(revvit.save_checkpoint(net, tmp_path/'a.pth'))))

def test_colours_go_along(tmp_path):
    net = made(image_mean=[.1,.2,.3], image_std=[.4,.5,.6])
    back = revvit.load_model(revvit.save_checkpoint(net, tmp_path/'a.pth'))
    assert back.transform.image_mean == [.1,.2,.3] and back.pretrained_cfg['std'] == (.4,.5,.6)

def test_a_copy_can_be_saved(tmp_path):
    net = copy.deepcopy(made())
    same(answers(net), answers(revvit.load_model(revvit.save_checkpoint(net, tmp_path/'a.pth'))))

# ---------------------------------------------------------------- into a detector that is there

def test_other_categories(tmp_path):
    file,net = revvit.save_checkpoint(made(), tmp_path/'a.pth'),made(classes=5)
    before = copy.deepcopy(net.state_dict())
    with pytest.raises(CheckpointError, match="does not fit this ReversibleMaskRCNN: 6 shapes differ.*new_head=True"):
        revvit.load_checkpoint(net, file)
    assert all(torch.equal(before[k], v) for k,v in net.state_dict().items())
    report = revvit.load_checkpoint(net, file, new_head=True)
    assert len(report.left) == 6 and not report.problems()
    now,want = net.state_dict(),made().state_dict()
    for k in now: assert torch.equal(now[k], (before if k in {n for n,*_ in report.left} else want)[k]), k

def test_another_size(tmp_path):
    file,net = revvit.save_checkpoint(made(), tmp_path/'a.pth'),made(backbone_args=dict(img_size=(64,96)))
    with pytest.raises(CheckpointError, match='new_size=True resamples'): revvit.load_checkpoint(net, file)
    assert revvit.load_checkpoint(net, file, new_size=True).resampled == ((16,16),(16,24))
    want = timm.layers.resample_abs_pos_embed(made().backbone.maps.model.pos_embed, [16,24], [16,16], 0)
    assert_close(net.backbone.maps.model.pos_embed, want, rtol=0, atol=0)

def test_a_turned_grid_is_noticed(tmp_path):
    net = made(backbone_args=dict(img_size=(64,128)))
    file = revvit.save_checkpoint(made(backbone_args=dict(img_size=(128,64))), tmp_path/'a.pth')
    with pytest.raises(CheckpointError, match='new_size=True resamples'): revvit.load_checkpoint(net, file)

@pytest.mark.parametrize('backbone', BACKBONES)
def test_a_classifier_fills_the_backbone_alone(backbone, tmp_path):
    name,args = BACKBONES[backbone]
    theirs,net = timm.create_model(name, num_classes=7, **args),made(backbone)
    if backbone=='rewired': torch.save(theirs.state_dict(), tmp_path/'a.pth')
    else: revvit.save_checkpoint(theirs, tmp_path/'a.pth')
    heads = copy.deepcopy(net.roi_heads.state_dict())
    report,want = revvit.load_checkpoint(net, tmp_path/'a.pth'),theirs.state_dict()
    for k,v in net.backbone.maps.model.state_dict().items(): assert torch.equal(v, want[k]), k
    assert report.share == 1 and {'head.weight','head.bias'} <= {n for n,*_ in report.left}
    assert all(torch.equal(heads[k], v) for k,v in net.roi_heads.state_dict().items())

def test_a_classifier_of_another_depth_is_refused(tmp_path):
    name,args = BACKBONES['rev_vit']
    revvit.save_checkpoint(timm.create_model(name, **{**args, 'depth': 4}), tmp_path/'a.pth')
    net = made('rev_vit')
    before = copy.deepcopy(net.state_dict())
    says = "does not fit the detector's backbone, a RevViT: 24 tensors only in the file"
    with pytest.raises(CheckpointError, match=says):
        revvit.load_checkpoint(net, tmp_path/'a.pth')
    assert all(torch.equal(before[k], v) for k,v in net.state_dict().items())

def test_a_detectors_file_is_no_classifiers(tmp_path):
    file = revvit.save_checkpoint(made(), tmp_path/'a.pth')
    name,args = BACKBONES['rev_mvit']
    with pytest.raises(CheckpointError, match='holds a ReversibleMaskRCNN'):
        revvit.load_checkpoint(timm.create_model(name, **args), file)

# ---------------------------------------------------------------- what is not written, and what is not read

@pytest.mark.parametrize('make,says', [
    (lambda: made(mask_head=nn.Sequential(nn.Conv2d(8, 12, 1))), 'its mask_head is a Sequential, which is code'),
    (lambda: revvit.detector(revvit.reversible(timm.create_model('vit_tiny_patch16_224', **TIMM)), 2, **SMALL),
     'does not know how it was made; give detector the VisionTransformer by its name')])
def test_what_cannot_be_saved(make, says, tmp_path):
    with pytest.raises(ValueError, match=says): revvit.save_checkpoint(make(), tmp_path/'a.pth')
    assert not list(tmp_path.iterdir())

def test_class_names_are_counted(tmp_path):
    with pytest.raises(ValueError, match='3 class names for 2 classes'):
        revvit.save_checkpoint(made(), tmp_path/'a.pth', class_names='abc')

def changed(content, **kw): return {**content, 'model_args': {**content['model_args'], **kw}}

@pytest.mark.parametrize('change,says', [
    (lambda c: {**c, 'version': 2}, 'version 2: this revvit knows version 1'),
    (lambda c: {k:v for k,v in c.items() if k!='model_args'}, "KeyError: 'model_args'"),
    (lambda c: changed(c, backbone=None), 'cannot build the ReversibleMaskRCNN that'),
    (lambda c: changed(c, backbone=dict(name='hf-hub:evil/model', args={})), 'no model of timm'),
    (lambda c: changed(c, backbone=dict(name='local-dir:/', args={})), 'no model of timm'),
    (lambda c: changed(c, backbone=dict(name='vit_tiny_patch16_224', args=dict(checkpoint_path='x'))),
     "leave 'checkpoint_path' out"),
    (lambda c: changed(c, backbone=dict(name='vit_tiny_patch16_224', args={}), pretrained=True), 'says pretrained'),
    (lambda c: changed(c, backbone=dict(model='RevMViT', model_args=dict(depth=10**9))), 'more layers than its'),
    (lambda c: changed(c, mask_layers=(8,)*10**4), 'more layers than its'),
    (lambda c: changed(c, out_channels=10**6), 'does not fit this ReversibleMaskRCNN'),
    (lambda c: changed(c, box_dim=10**7), 'does not fit this ReversibleMaskRCNN'),
    (lambda c: changed(c, num_classes=10**6), 'does not fit this ReversibleMaskRCNN'),
    (lambda c: changed(c, nonsense=1), "no argument 'nonsense'"),
    (lambda c: {**c, 'state_dict': {}}, 'more layers than its 0 tensors'),
    (lambda c: {**c, 'state_dict': {**c['state_dict'], 'more': torch.zeros(2)}}, '1 tensor only in the file: more')])
def test_files_of_strangers(change, says, tmp_path):
    write_checkpoint(tmp_path/'b.pth', change(read_checkpoint(revvit.save_checkpoint(made(), tmp_path/'a.pth'))))
    with pytest.raises(CheckpointError, match=says): revvit.load_model(tmp_path/'b.pth')

def test_a_flipped_bit(tmp_path):
    data = bytearray(revvit.save_checkpoint(made(), tmp_path/'a.pth').read_bytes())
    data[len(data)//2] ^= 1
    (tmp_path/'b.pth').write_bytes(data)
    for read in (revvit.load_model, lambda o: revvit.load_checkpoint(made(), o)):
        with pytest.raises(CheckpointError, match='do not match its digest'): read(tmp_path/'b.pth')

class Evil:
    def __init__(self, path): self.path = path
    def __reduce__(self): return open, (self.path, 'w')

def test_nothing_is_executed(tmp_path):
    content = read_checkpoint(revvit.save_checkpoint(made(), tmp_path/'a.pth'))
    torch.save(changed(content, backbone=Evil(str(tmp_path/'made'))), tmp_path/'b.pth')
    with pytest.raises(CheckpointError, match='asks to call'): revvit.load_model(tmp_path/'b.pth')
    assert not (tmp_path/'made').exists()
