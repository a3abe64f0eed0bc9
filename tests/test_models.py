"""What timm asks of its own models (its tests/test_models.py) and what its users do with one, asked of every model that
revvit registers (R27, R21, R22). The models are narrow, to be quick, but have the depth, the stages and the strides of
the real ones; clips have their 16 frames."""
import copy, pickle, re, sys
from itertools import pairwise

import pytest, timm, torch
from timm.layers import resample_abs_pos_embed
from timm.models import create_feature_extractor, group_parameters
from timm.optim import create_optimizer_v2, param_groups_layer_decay
from torch import nn
from torch.testing import assert_close
import revvit
from revvit.models import zoo
from revvit.core.memory import saved_bytes
from revvit.core.testing import check_grads
from revvit.models.checkpoints import load_model, save_checkpoint
from revvit.models.mvit import MViTSize, RevMViT, mvit_block
from revvit.models.vit import RevViT, ViTSize
from revvit.models.zoo import _split_cfgs, checkpoint_filter_fn, drop_path_rates, our_name, tensors_in

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
    return torch.randn(b, chans, *((16,) if '16x4' in name else ()), side, side,
                       generator=torch.Generator().manual_seed(b))

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

@every
def test_no_number_is_drawn_where_there_are_none(name, monkeypatch):
    "Reading a checkpoint makes such models, and PyTorch takes seven eighths of that time to draw for nothing"
    def drawn(*args, **kw): raise AssertionError('drawn')
    monkeypatch.setattr(zoo, 'trunc_normal_', drawn)
    with torch.device('meta'): m = narrow(name)
    assert all(p.is_meta for p in m.parameters())
    with pytest.raises(AssertionError, match='drawn'): narrow(name)

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
    with pytest.raises(ValueError, match="global_pool must be 'avg' or '', got 'max'"): m.reset_classifier(3, 'max')
    m.train()(x).mean().backward()
    assert lacking(m)==[]
    assert_close(narrow(name, num_classes=0).eval()(x).shape, pooled.shape)
    assert narrow(name, num_classes=0, global_pool='').eval()(x).shape==feats.shape

@every
def test_R27_the_configuration_names_what_is_there(name):
    m = narrow(name)
    weights,cfg = m.state_dict(),m.pretrained_cfg
    assert weights[cfg['first_conv']+'.weight'].shape[1]==3 and weights[cfg['classifier']+'.weight'].shape[0]==7
    assert m.get_submodule(cfg['classifier']) is m.get_classifier()
    assert isinstance(m.get_submodule(cfg['first_conv']), (nn.Conv2d,nn.Conv3d))
    data,clip = timm.data.resolve_model_data_config(m),'16x4' in name
    assert data['input_size'][-2:]==(224,224) and data['mean']==((.45,)*3 if clip else (.485,.456,.406))
    assert data['crop_pct']==.875
    assert timm.get_pretrained_cfg(name).num_classes==(400 if clip else 1000)

@multiscale
def test_R27_features_only_gives_maps_of_the_stated_widths_and_strides(name):
    x,deep = some(name),4 if 'base' in name else 3
    for kw,want in ((dict(), range(deep)), (dict(out_indices=(0,2)), (0,2)), (dict(out_indices=(1,)), (1,)),
                    (dict(out_indices=(-1,)), (deep-1,))):
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
    assert [o.shape[1] for o in maps]==[o['num_chs'] for o in info]
    assert [x.shape[-1]//o.shape[-1] for o in maps]==[o['reduction'] for o in info]
    assert_close(end, m.forward_features(x), rtol=1e-4, atol=1e-5)
    assert [type(m.get_submodule(o['module'])).__name__
            for o in info]==[type((m.stages if 'revmvit' in name else m.blocks)[0]).__name__]*len(info)
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

# strict takes seconds, and sizes share their code
@pytest.mark.parametrize('name, strict', [*((o,False) for o in names), *((o,True) for o in names if 'base' in o)])
def test_R21_export_answers_as_the_model_for_any_batch(name, strict):
    m,x = narrow(name, **(dict(depth=2) if 'revvit' in name else dict(depth=3, stage_starts=(1,)))).eval(),some(name, 3)
    e = torch.export.export(m, (some(name),), dynamic_shapes={'x': {0: torch.export.Dim('batch', max=64)}},
                            strict=strict).module()
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
        assert list(twin.state_dict())==list(m.state_dict())
        assert all(torch.equal(a, b) for a,b in zip(answer(twin), want, strict=True))

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
    if 'revmvit' in name: assert {*groups}=={*range(len(m.stages)+2)} # stem, whole stages, head
    by_id = {id(p): g['lr_scale'] for g in param_groups_layer_decay(m, layer_decay=.7) for p in g['params']}
    scale = {n: by_id[id(p)] for n,p in m.named_parameters()}
    if 'revmvit' in name:
        body = [f'{part}.{i}.{j}.' if part=='stages' else f'{part}.{i}.' for i,s in enumerate(m.stages) for part,
                n in (('stages',len(s)),('transitions',1)) for j in range(n)][:-1]
    else: body = [f'blocks.{i}.' for i in range(len(m.blocks))]
    parts = [[v for n,v in scale.items() if n.startswith(o)] for o in ('patch_embed',*body,'neck','head')]
    assert all(len(set(o))==1 for o in parts)
    assert len({v for n,v in scale.items() if n.startswith('pos_embed')} | set(parts[0]))==1
    steps = [b[0]/a[0] for a,b in pairwise(parts)]
    # the final norm goes with the last block
    assert steps==pytest.approx([1/.7]*len(body) + [1, 1/.7]) and parts[-1][0]==1

@every
def test_R27_optimizers(name):
    # or the last stage would have one place, where a key has no gradient
    m,x = narrow(name, img_size=64),some(name, side=64)
    params = dict(m.named_parameters())
    assert m.no_weight_decay()==set() # the published recipes decay position vectors
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

wrappers = dict(sequential=nn.Sequential, low_rank=LowRank,
                parametrized=lambda o: nn.utils.parametrizations.weight_norm(o))

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
    """One that looks at local variables at every line, and one that keeps notes among them; the constructor's
    arguments are what they are"""
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

# --- what the notebooks 13_zoo, 14_vit and 16_mvit show once

film = dict(num_frames=4, patch_kernel=(3,7,7), patch_stride=(2,4,4), pool_kernel=(3,3,3), kv_stride=(1,8,8),
            stream_fusion='mean', qkv_bias=False)

def tiny(kind, depth=5, **kw):
    "A small model whose weights are far from their quiet start"
    torch.manual_seed(depth)
    if kind=='vit':
        m = RevViT(**{**dict(img_size=32, patch_size=8, embed_dim=24, num_heads=3, depth=depth, num_classes=5), **kw})
    else:
        args = dict(img_size=32, embed_dim=8, depth=depth, stage_starts=tuple(o for o in (1,3) if o<depth),
                    num_classes=5)
        m = RevMViT(**{**args, **(film if kind=='clips' else {}), **kw})
    for n,p in m.named_parameters(): nn.init.normal_(p, float(n.endswith('norm.weight')), .2 if p.ndim>1 else .1)
    return m

def inputs(kind, b=3, **kw):
    return torch.randn(b, 3, *((4,) if kind=='clips' else ()), 32, 32, generator=torch.Generator().manual_seed(b), **kw)

kinds = pytest.mark.parametrize('kind', ['vit','images','clips'])

@pytest.mark.parametrize('make, words', [
    (lambda: ViTSize(384, 5, 12), "num_heads must divide embed_dim: got 5 and 384"),
    (lambda: ViTSize(384, 6, 0), "depth must be a whole number above 0, got 0"),
    (lambda: ViTSize(384, 6, 12.), "got 12.0"),
    (lambda: MViTSize(stage_starts=(0,3)), r"must rise, above 0 and below the depth: got \(0, 3\) and depth 16"),
    (lambda: MViTSize(stage_starts=(3,3)), "stage_starts must rise"),
    (lambda: MViTSize(depth=14), r"got \(1, 3, 14\) and depth 14"),
    (lambda: MViTSize(num_heads=5), "num_heads must divide embed_dim: got 5 and 96"),
    (lambda: MViTSize(stream_fusion='max'), "'mlp' or 'mean', got 'max'"),
    (lambda: MViTSize(pool_kernel=(3,3)), r"three numbers above 0, over time, height and width: got \(3, 3\)"),
    (lambda: MViTSize(q_stride=(1,0,2)), "q_stride must be three numbers above 0"),
    (lambda: MViTSize(kv_stride=(1,0,2)), "kv_stride must be three numbers above 0"),
    (lambda: MViTSize(num_frames=16), r"clips take patches of 3 numbers, got kernel \(7, 7\)"),
    (lambda: MViTSize(patch_stride=(2,4,4)), "images take patches of 2 numbers"),
    (lambda: RevViT(embed_dim=10, num_heads=3), "num_heads must divide embed_dim"),
    (lambda: RevViT(global_pool='token'), "global_pool must be 'avg' or '', got 'token'"),
    (lambda: RevViT(drop_path_rate=1.), "drop_path"),
    (lambda: RevViT(img_size=100), "img_size must be a multiple of patch_size"),
    (lambda: RevMViT(img_size=30), "the size must be a multiple of the patch stride: got 30x30 and 4x4"),
    (lambda: tiny('clips', num_frames=3), "got 3x32x32 and 2x4x4"),
    (lambda: tiny('vit').reset_classifier(-1), "num_classes must be 0 or more, got -1"),
    (lambda: tiny('images').forward_intermediates(inputs('images'), output_fmt='NHWC'),
     "must be 'NCHW' or 'NLC', got 'NHWC'")])
def test_impossible_sizes_and_options_are_refused(make, words):
    with pytest.raises(ValueError, match=words): make()

def test_options_arrive():
    rates = dict(drop_rate=.1, proj_drop_rate=.2, attn_drop_rate=.3, drop_path_rate=.4, shared_drop_path=True,
                 chunk=2, in_chans=1)
    v = RevViT(embed_dim=16, num_heads=2, depth=3, mlp_ratio=1.5, qkv_bias=False, **rates)
    f,g = v.blocks[1].f.fn,v.blocks[1].g.fn
    assert (f.num_heads, f.qkv.bias, f.attn_drop.p, f.proj_drop.p, g.drop1.p,
            g.fc1.out_features)==(2, None, .3, .2, .2, 24)
    assert (v.head_drop.p, v.blocks.chunk, v.patch_embed.proj.in_channels,
            v.blocks[1].shared_drop_path)==(.1, 2, 1, True)
    assert [o.drop_path for o in v.blocks]==[0, .2, .4]
    m = RevMViT(img_size=32, embed_dim=8, depth=5, stage_starts=(1,3), num_classes=0, mlp_ratio=2,
                drop_whole=True, **rates)
    f,g = m.transitions[1].f.fn,m.transitions[1].g.fn
    assert (m.head_drop.p, g.drop1.p, f.attn_drop.p, g.fc1.out_features,
            m.patch_embed.proj.in_channels)==(.1, .2, .3, 64, 1)
    assert [(s.chunk, s[0].shared_drop_path) for s in m.stages]==[(2, True)]*3
    assert [s[0].drop_path for s in m.stages]+[d.drop_prob for d in m.drops]==pytest.approx([0, .2, .4, .1, .3])
    assert [d.drop_prob for d in tiny('images', drop_path_rate=.4).drops]==[0, 0]
    b = mvit_block(8, 2, (1,3,3), (1,2,2), 1.5, False, .1, .2, drop_path=.3, shared_drop_path=True)
    assert (b.f.fn.qkv.bias, b.f.fn.proj_drop.p, b.f.fn.attn_drop.p, b.g.fn.drop1.p)==(None, .1, .2, .1)
    assert (b.g.fn.fc1.out_features, b.drop_path, b.shared_drop_path)==(12, .3, True)

def test_lists_become_tuples():
    args = dict(depth=4, stage_starts=[1,2], img_size=[32,64], embed_dim=8)
    assert timm.create_model('revmvit_base_224', **args).model_args['stage_starts']==(1,2)
    assert timm.create_model('revvit_tiny_patch16_224', img_size=[32,64], depth=1).model_args['img_size']==(32,64)

@kinds
def test_the_walk_by_hand(kind):
    "Both streams begin as the tokens, in each stage; norm, mean, classifier; dropout before the classifier in training"
    m,x = tiny(kind).eval().requires_grad_(False),inputs(kind)
    t = m.tokens(x)
    assert t.is_contiguous()
    stacks,tails = ([m.blocks],[]) if kind=='vit' else (m.stages,m.transitions)
    for i,stack in enumerate(stacks):
        if i: assert t.shape[1:]==(2 if kind=='clips' else 1, 8>>i, 8>>i, 8<<i)
        a = b = t
        for block in stack: a,b = block(a, b)
        if i<len(tails): t = tails[i](a, b)
    fused = m.neck.fusion.norm(torch.cat((a,b), -1)).flatten(1, -2)
    assert_close(m.forward_features(x), fused, rtol=1e-5, atol=1e-5)
    assert_close(m(x), m.head(fused.mean(1)), rtol=1e-5, atol=1e-5)
    m.head_drop.p,pooled = .5,fused.mean(1)
    kept = torch.cat([m.train().forward_head(fused, pre_logits=True)/pooled for _ in range(20)]).round()
    assert set(kept.unique().tolist())=={0,2} and .4<(kept==0).float().mean()<.6

@kinds
def test_streams_are_float32_under_autocast(kind):
    m,x = tiny(kind),inputs(kind)
    with torch.autocast('cpu', torch.bfloat16):
        t = m.tokens(x)
        assert (t.dtype, m.forward_features(x).dtype)==(torch.float32, torch.float32)
        for o in getattr(m, 'transitions', [])[:1]: assert o(t, t).dtype==torch.float32

def test_halves_of_different_sizes():
    m,x = tiny('vit', 3, mlp_ratio=1.5).double(),inputs('vit', dtype=torch.float64)
    check_grads(m, x)
    def saliency(on):
        m.eval().set_reversible(on)
        xi = x.clone().requires_grad_()
        return torch.autograd.grad(m(xi)[:,0].sum(), xi)[0]
    assert_close(saliency(True), saliency(False), rtol=1e-10, atol=1e-12)

@pytest.mark.parametrize('on, training', [(True,False), (True,True), (False,True)])
@kinds
def test_intermediates_draw_what_a_forward_pass_draws(kind, on, training):
    "With drop path and dropout: the last one is `forward_features`' result, maps and tokens hold the same numbers"
    more = dict(drop_whole=True) if kind!='vit' else {}
    m,x = tiny(kind, drop_path_rate=.4, proj_drop_rate=.1, **more).train(training),inputs(kind)
    m.set_reversible(on)
    def seeded(fn, *args, **kw):
        torch.manual_seed(3)
        return fn(*args, **kw)
    want = seeded(m.forward_features, x)
    end,(a,b) = seeded(m.forward_intermediates, x, [1,-1], norm=True, output_fmt='NLC')
    maps = seeded(m.forward_intermediates, x, [1,-1], norm=True, intermediates_only=True)
    for o in (end, b): assert_close(o, want, rtol=1e-4, atol=1e-5)
    assert_close(maps[0].flatten(2).transpose(1, 2), a, rtol=1e-5, atol=1e-5)

@kinds
def test_intermediates_stop_early_and_take_no_images(kind):
    m,x = tiny(kind).eval(),inputs(kind)
    end,(o,) = m.forward_intermediates(x, [0], stop_early=True, output_fmt='NLC')
    if kind=='vit': assert_close(end, m.neck.fusion.norm(o), rtol=0, atol=1e-5)
    else: assert torch.equal(end, o)
    assert len(m.forward_intermediates(x[:0], 1)[1][0])==0

@kinds
def test_model_args_rebuild_the_model(kind):
    m,x = tiny(kind, drop_path_rate=.1),inputs(kind)
    m.reset_classifier(3)
    fresh = type(m)(**m.model_args)
    fresh.load_state_dict(m.state_dict())
    assert torch.equal(fresh.eval()(x), m.eval()(x)) and m(x).shape==(3,3)

@every
def test_full_size_shapes(name):
    "Without numbers"
    with torch.device('meta'): m,clip = timm.create_model(name).eval(),'16x4' in name
    x = torch.empty(2, 3, *((16,) if clip else ()), 224, 224, device='meta')
    assert m(x).shape==(2, 400 if clip else 1000)
    assert m.forward_features(x).shape==(2, 196 if 'revvit' in name else 49*4**(4-len(m.stages))*(8 if clip else 1),
                                         m.num_features)

def test_fx_sees_a_stack_as_one_step():
    m,x = tiny('vit', 3).eval(),inputs('vit')
    out = create_feature_extractor(m, ['blocks','head'])(x)
    assert_close(out['blocks'], m.forward_head(m.forward_features(x), pre_logits=True), rtol=1e-5, atol=1e-5)
    def grads(y): return torch.autograd.grad(y.square().sum(), list(m.parameters()))
    for a,b in zip(grads(out['head']), grads(m(x))): assert_close(a, b, rtol=1e-4, atol=1e-5)

def test_two_transitions_in_a_row_keep_what_any_two_stages_do():
    m,x = timm.create_model('revmvit_base_224', depth=4, stage_starts=(1,2), chunk=1),torch.randn(1, 3, 224, 224)
    streams = [2*n*n*d*4 for n,d in ((56,96), (28,192), (14,384))]              # bytes, float32
    assert saved_bytes(lambda: m(x), m, x)==sum(streams) + 4*m.num_features

@pytest.mark.parametrize('name', ['transitions.0.f.fn.pool_q.conv.weight', 'stages.0.0.g.fn.fc1.weight'])
def test_a_weight_changed_in_between_is_refused_in_a_plain_stage_too(name):
    m = tiny('images')
    m.stages[0].set_reversible(False)
    loss = m(inputs('images')).square().mean()
    with torch.no_grad(): m.get_parameter(name).mul_(1.1)
    with pytest.raises(RuntimeError, match='changed between forward and backward|modified by an inplace'):
        loss.backward()

# --- names of published tensors, and what timm's loader is given

slowfast_names = {
    'rev_backbone.layers.0.F.attn.pool_k.weight': 'stages.0.0.f.fn.pool_k.conv.weight',
    'rev_backbone.layers.1.F.attn.norm_q.bias': 'transitions.0.f.fn.pool_q.norm.bias',
    'rev_backbone.layers.2.G.mlp.fc1.weight': 'stages.1.0.g.fn.fc1.weight',
    'rev_backbone.layers.13.F.norm.weight': 'stages.2.9.f.norm.weight',
    'rev_backbone.layers.14.res_proj.bias': 'transitions.2.proj.bias',
    'rev_backbone.layers.3.pre_q_fuse.fuse_fn.fc2.weight': 'transitions.1.fuse.mlp.fc2.weight',
    'rev_backbone.layers.15.F.attn.qkv.weight': 'stages.3.0.f.fn.qkv.weight',
    'pos_embed_spatial': 'pos_embed', 'pos_embed_temporal': 'pos_embed_temporal',
    'norm.bias': 'neck.fusion.norm.bias', 'head.projection.bias': 'head.bias'}
vit_names = {
    'rev_backbone.layers.11.G.mlp.fc2.bias': 'blocks.11.g.fn.fc2.bias', 'norm.bias': 'neck.fusion.norm.bias',
    'backbone.layers.3.ffn.layers.0.0.weight': 'blocks.3.g.fn.fc1.weight', 'backbone.ln1.bias': 'neck.fusion.norm.bias',
    'backbone.layers.0.ln1.weight': 'blocks.0.f.norm.weight', 'backbone.layers.0.ln2.weight': 'blocks.0.g.norm.weight',
    'backbone.patch_embed.projection.bias': 'patch_embed.proj.bias', 'backbone.pos_embed': 'pos_embed',
    'head.projection.weight': 'head.weight', 'head.fc.bias': 'head.bias',
    'pos_embed_spatial': 'pos_embed_spatial'}

@pytest.mark.parametrize('theirs, ours, starts', [*((a, b, (1,3,14)) for a,b in slowfast_names.items()),
                                                  *((a, b, None) for a,b in vit_names.items())])
def test_published_names(theirs, ours, starts): assert our_name(theirs, starts)==ours

@kinds
def test_our_names_and_unknown_ones_stay(kind):
    m = tiny(kind)
    keys,starts = list(m.state_dict()),m.model_args.get('stage_starts')
    assert [our_name(o, starts) for o in keys]==keys
    assert our_name('rev_backbone.layers.0.H.weight', starts)=='rev_backbone.layers.0.H.weight'

@pytest.mark.parametrize('content', [dict(a=1), dict(model_state=dict(a=1), epoch=3),
                                     dict(state_dict={'module.a':1}, meta={}),
                                     dict(model={'module._orig_mod.a':1}, opt=None)])
def test_tensors_are_found_where_programs_put_them(content):
    def filled(o): return {k: filled(v) if isinstance(v, dict) else torch.zeros(1) if v==1 else v for k,v in o.items()}
    assert list(tensors_in(filled(content)))==['a']

@pytest.mark.parametrize('content, words', [(dict(epoch=3, weights={}), 'but found epoch, weights'),
                                            (dict(state_dict={}), 'but found nothing'), ({}, 'but found nothing')])
def test_content_without_tensors_is_refused(content, words):
    with pytest.raises(ValueError, match=words): tensors_in(content)

def as_slowfast(weights, dim):
    "Tensors of a Rev-ViT as SlowFast writes them"
    out = {}
    for k,v in weights.items():
        k = re.sub(r'^head\.', 'head.projection.', re.sub(r'^neck\.fusion\.', '', k))
        k = re.sub(r'^blocks\.(\d+)\.f\.fn\.', r'rev_backbone.layers.\1.F.attn.', k)
        k = re.sub(r'^blocks\.(\d+)\.g\.fn\.', r'rev_backbone.layers.\1.G.mlp.', k)
        k = re.sub(r'^blocks\.(\d+)\.([fg])\.', lambda o: f'rev_backbone.layers.{o[1]}.{o[2].upper()}.', k)
        out |= {k.replace('qkv', q): p for q,p in zip('qkv', v.split(dim))} if 'qkv' in k else {k: v}
    return dict(epoch=0, model_state=out, optimizer_state={}, cfg='')

def test_slowfasts_tensors_arrive_where_they_belong():
    m = tiny('vit', 2)
    sd,theirs = m.state_dict(),as_slowfast(m.state_dict(), 24)
    assert 'rev_backbone.layers.1.F.attn.k.bias' in theirs['model_state'] and 'norm.weight' in theirs['model_state']
    for source in (sd, theirs, dict(state_dict=sd)):
        got = checkpoint_filter_fn(source, m)
        assert got.keys()==sd.keys() and all(torch.equal(got[k], sd[k]) for k in sd)
    joined = {f'rev_backbone.layers.0.F.attn.{o}.weight': torch.full((2,2), i) for i,o in enumerate('qkv')}
    got = checkpoint_filter_fn(joined, tiny('images'))
    assert {k: v[:,0].tolist() for k,v in got.items()}=={'stages.0.0.f.fn.qkv.weight': [0,0,1,1,2,2]}

def test_position_vectors_of_another_size_are_resampled():
    m,wide,tall = tiny('vit', 2),tiny('vit', 2, img_size=(32,64)),tiny('vit', 2, img_size=(64,32))
    got = checkpoint_filter_fn(m.state_dict(), wide)['pos_embed']
    assert_close(got, resample_abs_pos_embed(m.pos_embed, [4,8], [4,4], 0), rtol=0, atol=0)
    turned = checkpoint_filter_fn(wide.state_dict(), tall, grid=(4,8))['pos_embed']
    assert_close(turned, resample_abs_pos_embed(wide.pos_embed, [8,4], [4,8], 0), rtol=0, atol=0)
    for o in (m, tiny('clips')): # no grid: left for the strict comparison to refuse
        assert checkpoint_filter_fn(dict(pos_embed=torch.zeros(1, 15, 8)), o)['pos_embed'].shape==(1,15,8)

def test_places_and_times_of_a_clip_are_resampled():
    m,other = tiny('clips'),tiny('clips', img_size=(32,48), num_frames=8)
    got = checkpoint_filter_fn({f'module.{k}': v for k,v in m.state_dict().items()}, other)
    assert_close(got['pos_embed'], resample_abs_pos_embed(m.pos_embed, [8,12], [8,8], 0), rtol=0, atol=0)
    want = nn.functional.interpolate(m.pos_embed_temporal.transpose(1, 2), 4, mode='linear').transpose(1, 2)
    assert_close(got['pos_embed_temporal'], want, rtol=0, atol=0)
    other.load_state_dict(got)
    back = checkpoint_filter_fn(other.state_dict(), m, grid=(4,8,12))
    assert (back['pos_embed'].shape, back['pos_embed_temporal'].shape)==((1,64,8), (1,2,8))

def test_a_published_kernel_without_a_reach_in_time_is_flattened():
    "For images SlowFast's pooling kernels have a time axis of one; ours have none, and of clips all keep theirs"
    for kind,shape in (('images',(8,1,3,3)), ('clips',(8,1,3,3,3))):
        m = tiny(kind)
        k,v = next((k,v) for k,v in m.state_dict().items() if k.endswith('pool_k.conv.weight'))
        got = checkpoint_filter_fn({k: v.reshape(8, 1, -1, 3, 3)}, m)[k]
        assert got.shape==v.shape==shape and torch.equal(got, v)

def test_only_clips_have_times():
    args = dict(img_size=32, embed_dim=8)
    assert 'frame_stride' not in timm.create_model('revmvit_tiny_224', **args).pretrained_cfg
    m = timm.create_model('revmvit_tiny_16x4_224', num_frames=4, pretrained_cfg_overlay=dict(frame_stride=2), **args)
    assert [m.pretrained_cfg[k] for k in ('input_size','frame_stride','frame_rate')]==[(3,4,224,224), 2, 30]
    with pytest.raises(TypeError):
        timm.create_model('revvit_tiny_patch16_224', pretrained_cfg_overlay=dict(frame_stride=2))

# ---------------------------------------------------------------- another size

SIZED = dict(vit=lambda **kw: RevViT(img_size=32, patch_size=8, embed_dim=16, num_heads=2, depth=2,
                                     num_classes=3, **kw),
    images=lambda **kw: RevMViT(img_size=32, embed_dim=8, depth=3, stage_starts=(1,), num_classes=3, **kw),
    clips=lambda **kw: RevMViT(img_size=32, num_frames=4, embed_dim=8, depth=3, stage_starts=(1,), patch_kernel=(3,7,7),
                               patch_stride=(2,4,4), pool_kernel=(3,3,3), num_classes=3, **kw))
def sized(kind, *side):
    return torch.randn(2, 3, *([4] if kind=='clips' else []), *side, generator=torch.Generator().manual_seed(0))

@pytest.mark.parametrize('kind', SIZED)
@pytest.mark.parametrize('new', [64,(48,64),32])
def test_set_input_size(kind, new, tmp_path):
    """What the model computed from such images by resampling on the way, it computes by vectors of its own; saved and
    loaded too"""
    torch.manual_seed(0)
    m = SIZED[kind]().eval()
    m.pos_embed.requires_grad_(kind!='vit')
    x = sized(kind, *((new,new) if isinstance(new, int) else new))
    with torch.no_grad(): want = m(x)
    m.set_input_size(img_size=new)
    assert m.pos_embed.shape[1]==(x.shape[-2]//m.patch_embed.patch_size[-2])*(x.shape[-1]//m.patch_embed.patch_size[-1])
    assert m.pos_embed.requires_grad==(kind!='vit') and m.model_args['img_size']==tuple(x.shape[-2:])
    with torch.no_grad(): assert_close(m(x), want, rtol=1e-5, atol=1e-5)
    again = load_model(save_checkpoint(m, tmp_path/'m.pth'))
    with torch.no_grad(): assert_close(again(x), m(x), rtol=0, atol=0)
    assert again.patch_embed.img_size==m.patch_embed.img_size==tuple(x.shape[-2:])
    if kind=='vit': assert m.patch_embed.num_patches==m.pos_embed.shape[1]

@pytest.mark.parametrize('kind', SIZED)
def test_dynamic_img_size(kind):
    "Other sizes by default; without it they are refused, with what helps"
    assert SIZED[kind](dynamic_img_size=True)(sized(kind, 64, 32)).shape==(2,3)
    m = SIZED[kind](dynamic_img_size=False)
    assert m(sized(kind, 32, 32)).shape==(2,3)
    with pytest.raises(ValueError, match='images of 32x32 pixels are wanted, got 64x32: set_input_size'):
        m(sized(kind, 64, 32))
    with pytest.raises(ValueError, match='img_size must be a multiple of the patch'): m.set_input_size(33)
    m.set_input_size((64,32))
    assert m(sized(kind, 64, 32)).shape==(2,3)
    with pytest.raises(ValueError, match='images of 64x32 pixels are wanted, got 32x32'): m(sized(kind, 32, 32))

def test_drop_path_rises_evenly():
    assert drop_path_rates(.3, 1)==[0] and drop_path_rates(.1, 12)==pytest.approx(torch.linspace(0, .1, 12).tolist())

def test_what_timm_has_no_room_for_is_taken_out_and_kept():
    cfgs = dict(pretrained_cfg=dict(frame_rate=25, input_size=(3,8,32,32)), pretrained_cfg_overlay='a tag')
    got,times = _split_cfgs(cfgs)
    assert times==dict(frame_stride=4, frame_rate=25)
    assert got==dict(pretrained_cfg=dict(input_size=(3,32,32)), pretrained_cfg_overlay='a tag')
