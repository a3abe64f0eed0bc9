"""What timm asks of its own models (its tests/test_models.py) and what its users do with one, asked of every model that revvit registers (R27, R21, R22). The models are
narrow, to be quick, but have the depth, the stages and the strides of the real ones; clips have their 16 frames."""
import copy, pickle, sys
from itertools import pairwise

import pytest, timm, torch
from timm.models import create_feature_extractor, group_parameters
from timm.optim import create_optimizer_v2, param_groups_layer_decay
from torch import nn
from torch.testing import assert_close
import revvit
from revvit.core.testing import check_grads, saved_bytes

torch.set_num_threads(1)
names = timm.list_models('*rev*vit*')
every = pytest.mark.parametrize('name', names)
multiscale = pytest.mark.parametrize('name', [o for o in names if 'revmvit' in o])

def narrow(name, **kw):
    "A narrow model of that name, from one seed; no bias is 0 and no scale 1"
    torch.manual_seed(0)
    size = dict(img_size=32, embed_dim=8) if 'revmvit' in name else dict(img_size=64, embed_dim=24, num_heads=3)
    m = timm.create_model(name, **{**size, 'num_classes':7, **kw})
    with torch.no_grad():
        for p in m.parameters(): p.add_(torch.randn(p.shape), alpha=.05)
    return m

def some(name, b=2, chans=3, side=None):
    "Images or clips for it"
    side = side or (32 if 'revmvit' in name else 64)
    return torch.randn(b, chans, *((16,) if '16x4' in name else ()), side, side, generator=torch.Generator().manual_seed(b))

def lacking(m): return [n for n,p in m.named_parameters() if p.grad is None or not p.grad.isfinite().all()]

def test_R27_both_families_are_listed():
    assert names==['revmvit_base_16x4_224', 'revmvit_base_224', 'revmvit_tiny_16x4_224', 'revmvit_tiny_224',
        'revvit_base_patch16_224', 'revvit_large_patch16_224', 'revvit_small_patch16_224', 'revvit_tiny_patch16_224']

@every
def test_R27_forward_is_finite_and_repeats_and_no_image_knows_of_its_batch(name):
    m,x = narrow(name).eval(),some(name)
    y = m(x)
    assert y.shape==(2,7) and y.isfinite().all() and torch.equal(m(x), y)
    assert_close(m(x[1:]), y[1:], rtol=1e-4, atol=1e-5)
    layout = torch.channels_last if x.ndim==4 else torch.channels_last_3d
    assert_close(m(x.contiguous(memory_format=layout)), y, rtol=1e-4, atol=1e-5)
    with torch.no_grad(): assert_close(m(x), y, rtol=1e-4, atol=1e-5)

@pytest.mark.parametrize('on', [True,False], ids=['reversible','plain'])
@every
def test_R27_backward_gives_every_parameter_a_gradient(name, on):
    m,x = narrow(name, drop_path_rate=.1).train(),some(name)
    m.set_reversible(on)
    m(x).mean().backward()
    assert lacking(m)==[]
    assert sum(p.grad.numel() for p in m.parameters())==sum(p.numel() for p in m.parameters())

@every
def test_R27_both_modes_have_the_same_gradients(name):
    kw = dict(depth=3) if 'revvit' in name else dict(depth=4, stage_starts=(1,2))
    check_grads(narrow(name, drop_path_rate=.2, **kw).double(), some(name).double(), tol=1e-10)

@every
def test_R27_the_head_can_be_reset(name):
    m,x = narrow(name).eval(),some(name)
    feats,y = m.forward_features(x),m(x)
    assert feats.shape[0]==2 and feats.shape[-1]==m.num_features==m.head_hidden_size
    assert_close(m.forward_head(feats), y, rtol=1e-5, atol=1e-6)
    pooled = m.forward_head(feats, pre_logits=True)
    assert pooled.shape==(2,m.num_features)
    assert_close(m.get_classifier()(pooled), y, rtol=1e-5, atol=1e-6)
    m.reset_classifier(4)
    assert (m(x).shape,m.num_classes,m.get_classifier().out_features)==((2,4),4,4)
    m.reset_classifier(0)
    assert_close(m(x), pooled, rtol=1e-5, atol=1e-6)
    m.reset_classifier(0, '')
    assert_close(m(x), feats, rtol=1e-5, atol=1e-6)
    m.reset_classifier(3, 'avg')
    assert m(x).shape==(2,3)
    m.train()(x).mean().backward()
    assert lacking(m)==[]
    assert_close(narrow(name, num_classes=0).eval()(x).shape, pooled.shape)
    assert narrow(name, num_classes=0, global_pool='').eval()(x).shape==feats.shape

@every
def test_R27_the_configuration_names_what_is_there(name):
    m = narrow(name)
    weights,cfg = m.state_dict(),m.pretrained_cfg
    assert weights[cfg['first_conv']+'.weight'].shape[1]==3 and weights[cfg['classifier']+'.weight'].shape[0]==7
    assert m.get_submodule(cfg['classifier']) is m.get_classifier() and isinstance(m.get_submodule(cfg['first_conv']), (nn.Conv2d,nn.Conv3d))
    data,clip = timm.data.resolve_model_data_config(m),'16x4' in name
    assert data['input_size'][-2:]==(224,224) and data['mean']==((.45,)*3 if clip else (.485,.456,.406)) and data['crop_pct']==.875
    assert timm.get_pretrained_cfg(name).num_classes==(400 if clip else 1000)

@multiscale
def test_R27_features_only_gives_maps_of_the_stated_widths_and_strides(name):
    x,deep = some(name),4 if 'base' in name else 3
    for kw,want in ((dict(), range(deep)), (dict(out_indices=(0,2)), (0,2)), (dict(out_indices=(1,)), (1,)), (dict(out_indices=(-1,)), (deep-1,))):
        m = narrow(name, num_classes=0, features_only=True, **kw)
        assert m.feature_info.reduction()==[4<<i for i in want] and m.feature_info.channels()==[16<<i for i in want]
        maps = m(x)
        assert [o.shape for o in maps]==[(2, 16<<i, *((8,) if '16x4' in name else ()), 8>>i, 8>>i) for i in want]
        assert all(o.isfinite().all() and o.is_contiguous() for o in maps)
        sum(o.square().mean() for o in maps).backward()
        assert [n for n in lacking(m) if 'neck' not in n]==[] # no map has the final norm on it

@pytest.mark.parametrize('name', [o for o in names if 'revvit' in o])
def test_R27_features_only_of_a_vision_transformer(name):
    m,x = narrow(name, num_classes=0, features_only=True, out_indices=(0,-1)),some(name)
    assert m.feature_info.reduction()==[16,16] and m.feature_info.channels()==[48,48]
    assert [o.shape for o in m(x)]==[(2,48,4,4)]*2

@every
def test_R27_intermediates(name):
    m,x = narrow(name).eval(),some(name)
    end,maps = m.forward_intermediates(x)
    info = m.feature_info
    assert [o.shape[1] for o in maps]==[o['num_chs'] for o in info] and [x.shape[-1]//o.shape[-1] for o in maps]==[o['reduction'] for o in info]
    assert_close(end, m.forward_features(x), rtol=1e-4, atol=1e-5)
    assert [type(m.get_submodule(o['module'])).__name__ for o in info]==[type((m.stages if 'revmvit' in name else m.blocks)[0]).__name__]*len(info)
    last, = m.forward_intermediates(x, 1, norm=True, output_fmt='NLC', intermediates_only=True)
    assert_close(last, end, rtol=1e-4, atol=1e-5)
    first,last = m.forward_intermediates(x, [0,-1], intermediates_only=True)
    assert_close([first,last], [maps[0],maps[-1]], rtol=1e-4, atol=1e-5)
    toks = m.forward_intermediates(x, [0], output_fmt='NLC', stop_early=True)[1][0]
    assert_close(toks.transpose(1, 2).reshape(maps[0].shape), maps[0], rtol=1e-4, atol=1e-5)
    assert m.prune_intermediate_layers([0,1])==[0,1]
    assert_close(m.forward_intermediates(x, [0,1], intermediates_only=True), maps[:2], rtol=1e-4, atol=1e-5)
    assert not list(m.get_classifier().parameters())

@every
def test_R27_intermediates_keep_about_what_a_forward_pass_keeps(name):
    "Two more streams at the end of each stage where a map is taken, and no activations of a transition"
    m,x = narrow(name),some(name)
    take = None if 'revmvit' in name else 1
    once,maps = (saved_bytes(fn, m, x) for fn in (lambda: m(x), lambda: m.forward_intermediates(x, take)))
    m.set_reversible(False)
    assert maps<2.5*once and maps<.2*saved_bytes(lambda: m(x), m, x)

@pytest.mark.parametrize('name, strict', [*((o,False) for o in names), *((o,True) for o in names if 'base' in o)]) # strict takes seconds, and sizes share their code
def test_R21_export_answers_as_the_model_for_any_batch(name, strict):
    m,x = narrow(name, **(dict(depth=2) if 'revvit' in name else dict(depth=3, stage_starts=(1,)))).eval(),some(name, 3)
    e = torch.export.export(m, (some(name),), dynamic_shapes={'x': {0: torch.export.Dim('batch', max=64)}}, strict=strict).module()
    for o in (x, x[:1]): assert_close(e(o), m(o), rtol=1e-5, atol=1e-5)

@pytest.mark.parametrize('name', [o for o in names if 'tiny' in o])
def test_R21_a_compiled_model_stores_no_more_and_has_the_same_gradients(name):
    "The compiler's front ends, with a break at the engine; no C++ compiler needed"
    m,x = narrow(name, **(dict(depth=3) if 'revvit' in name else dict(depth=4, stage_starts=(1,2)))).train(),some(name)
    fast = torch.compile(m, backend='aot_eager')
    want,got = (torch.autograd.grad(o(x).square().sum(), [*m.parameters()]) for o in (m,fast))
    for a,b in zip(got, want): assert_close(a, b, rtol=1e-4, atol=1e-5)
    assert saved_bytes(lambda: fast(x), m, x)<=1.2*saved_bytes(lambda: m(x), m, x)
    torch.compiler.reset()

@every
def test_R22_copies_and_pickles_are_the_same_model(name):
    m,x = narrow(name, drop_path_rate=.2),some(name)
    m.train()(x).sum().backward()
    def answer(m):
        torch.manual_seed(1)
        y = m.train()(x)
        grads = torch.autograd.grad(y.square().sum(), [*m.parameters()])
        return [y, m.eval()(x), *grads]
    want = answer(m)
    for twin in (copy.deepcopy(m), pickle.loads(pickle.dumps(m))):
        assert list(twin.state_dict())==list(m.state_dict()) and all(torch.equal(a, b) for a,b in zip(answer(twin), want, strict=True))

@every
def test_R27_grad_checkpointing_is_the_switch_of_the_reversible_mode(name):
    m,x = narrow(name).train(),some(name)
    names,y,kept = list(m.state_dict()),m(x),{}
    for on in (False,True):
        m.set_grad_checkpointing(on)
        assert list(m.state_dict())==names
        assert_close(m(x), y, rtol=1e-5, atol=1e-5)
        kept[on] = saved_bytes(lambda: m(x), m, x)
    assert kept[True]<.2*kept[False]

@every
def test_R27_options_of_create_model(name):
    assert narrow(name, in_chans=1).eval()(some(name, chans=1)).shape==(2,7)
    m = narrow(name, drop_path_rate=.3)
    blocks = [o for o in m.modules() if isinstance(o, revvit.ReversibleBlock)]
    rates = [o.drop_path for o in blocks]
    assert rates==sorted(rates) and rates[0]==0 and rates[-1]==pytest.approx(.3)
    x = some(name, 8)
    assert not torch.equal(m.train()(x), m(x)) and torch.equal(m.eval()(x), m(x))
    m,x = narrow(name, img_size=96).eval(),some(name, side=96)
    assert m(x).shape==(2,7)
    assert m(x[...,:64]).shape==(2,7) # another shape than it was made for: position vectors are resampled
    with pytest.raises(ValueError, match='multiple'): m(x[...,:63])

@every
def test_R27_groups_hold_every_parameter_and_rise_with_depth(name):
    m = narrow(name)
    for coarse in (False,True):
        groups = group_parameters(m, m.group_matcher(coarse=coarse))
        assert sorted(n for o in groups.values() for n in o)==sorted(n for n,_ in m.named_parameters())
    by_id = {id(p): g['lr_scale'] for g in param_groups_layer_decay(m, layer_decay=.7) for p in g['params']}
    scale = {n: by_id[id(p)] for n,p in m.named_parameters()}
    if 'revmvit' in name: body = [f'{part}.{i}.{j}.' if part=='stages' else f'{part}.{i}.' for i,s in enumerate(m.stages) for part,n in (('stages',len(s)),('transitions',1)) for j in range(n)][:-1]
    else: body = [f'blocks.{i}.' for i in range(len(m.blocks))]
    parts = [[v for n,v in scale.items() if n.startswith(o)] for o in ('patch_embed',*body,'neck','head')]
    assert all(len(set(o))==1 for o in parts) and len({v for n,v in scale.items() if n.startswith('pos_embed')} | set(parts[0]))==1
    steps = [b[0]/a[0] for a,b in pairwise(parts)]
    assert steps==pytest.approx([1/.7]*len(body) + [1, 1/.7]) and parts[-1][0]==1 # the final norm goes with the last block

@every
def test_R27_optimizers(name):
    m,x = narrow(name, img_size=64),some(name, side=64) # or the last stage would have one place, where a key has no gradient
    params = dict(m.named_parameters())
    assert set(m.no_weight_decay())<=set(params)
    for kw in ({}, dict(layer_decay=.7)):
        opt = create_optimizer_v2(m, opt='adamw', lr=1e-3, weight_decay=.1, **kw)
        inside = [p for g in opt.param_groups for p in g['params']]
        assert sorted(map(id, inside))==sorted(map(id, params.values()))
        for g in opt.param_groups: assert all((p.ndim>1)==(g['weight_decay']>0) for p in g['params'])
    before = {n:p.detach().clone() for n,p in params.items()}
    nn.functional.cross_entropy(m.train()(x), torch.arange(len(x))).backward()
    opt.step()
    assert [n for n,p in params.items() if torch.equal(p, before[n])]==[]

@every
def test_R27_feature_extractor_by_fx(name):
    m,x = narrow(name).eval(),some(name)
    net = create_feature_extractor(m, ['head'])
    assert_close(net(x)['head'], m(x), rtol=1e-5, atol=1e-5)
    net(x)['head'].mean().backward()
    assert lacking(m)==[]

# ---------------------------------------------------------------- wrapped by an adapter, built under a debugger

class LowRank(nn.Module):
    "A layer and a small addition, as LoRA makes it"
    def __init__(self, layer):
        super().__init__()
        self.base,conv = layer.requires_grad_(False),type(layer)
        self.down = conv(layer.in_channels, 2, layer.kernel_size, layer.stride, layer.padding, bias=False)
        self.up = conv(2, layer.out_channels, 1)
    def forward(self, x): return self.base(x) + self.up(self.down(x))

wrappers = dict(sequential=nn.Sequential, low_rank=LowRank, parametrized=lambda o: nn.utils.parametrizations.weight_norm(o))

@pytest.mark.parametrize('wrap', wrappers.values(), ids=wrappers.keys())
@pytest.mark.parametrize('name', ['revvit_small_patch16_224', 'revmvit_base_224', 'revmvit_base_16x4_224'])
def test_the_patch_embedding_can_be_wrapped(name, wrap):
    "Still the right gradients, the same in both modes, and the number of channels is still checked"
    few = dict(num_frames=4) if '16x4' in name else {}
    m = narrow(name, **few, **(dict(depth=3) if 'revvit' in name else dict(depth=4, stage_starts=(1,2)))).double()
    x = (some(name)[:,:,:4] if few else some(name)).double()
    want = m(x)
    m.patch_embed.proj = wrap(m.patch_embed.proj).double()
    if wrap is not LowRank: assert_close(m(x), want, rtol=1e-10, atol=1e-10)
    check_grads(m, x)
    trained = [n for n,p in m.named_parameters() if p.requires_grad]
    assert any('patch_embed' in n for n in trained)
    m(x).mean().backward()
    assert [n for n,p in m.named_parameters() if p.requires_grad and not p.grad.any()]==[]
    with pytest.raises(ValueError, match='expected 3 channels, got 4'): copy.deepcopy(m)(torch.cat((x,x[:,:1]), 1))

@pytest.mark.parametrize('writes', [False, True], ids=['reads','writes'])
@every
def test_a_model_can_be_built_under_a_debugger(name, writes):
    "One that looks at local variables at every line, and one that keeps notes among them; the constructor's arguments are what they are"
    notes,codes = [], {o.__init__.__code__ for o in (revvit.models.vit.RevViT, revvit.models.mvit.RevMViT)}
    def look(frame, event, arg):
        inside = frame.f_code in codes
        if not inside and not (frame.f_back and frame.f_back.f_code in codes): return
        for o in (frame, frame.f_back):
            seen = o.f_locals
            if writes and o.f_code in codes:
                notes.append(f'note_{len(notes)}')
                seen[notes[-1]] = 1
        return look
    kw = dict(num_classes=7, drop_path_rate=.1, embed_dim=24, num_heads=3)
    want = timm.create_model(name, **kw).model_args
    before = sys.gettrace()
    sys.settrace(look)
    try: got = timm.create_model(name, **kw).model_args
    finally: sys.settrace(before)
    assert got==want and not set(notes)&set(got) and bool(notes)==writes
