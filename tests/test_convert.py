"""timm's transformers with their blocks rewired: gradients against stored activations, bits, memory, names, copies,
export, features."""
import copy, csv, pickle, warnings
from pathlib import Path

import pytest, timm, torch
import timm.models as zoo
from timm.models import vision_transformer as parts
from torch import nn
import revvit
from revvit.core.memory import peak_bytes, saved_bytes
from revvit.models.convert import RewiredStack
from revvit.models.kinds import kinds
from cases import REMEDY, error, same, used

torch.set_num_threads(1)
TINY = dict(img_size=32, patch_size=8, embed_dim=48, num_heads=3)
def make(name, depth=3, **kw):
    torch.manual_seed(depth)
    tiny = {k:v for k,v in TINY.items() if k!='img_size' or not name.startswith('naflex')}   # which takes any size
    return used(timm.create_model(name, depth=depth, num_classes=5, **{**tiny, **kw}))

VIT = 'vit_base_patch16_224'
# what each has that the one before has not
MODELS = dict(vit=(VIT,{}), deit=('deit_base_distilled_patch16_224',{}), deit3=('deit3_base_patch16_224',{}),
    dinov2=('vit_base_patch14_reg4_dinov2',{}),
    siglip=('vit_base_patch16_siglip_224',{}), post=(VIT,dict(block_fn=parts.ResPostBlock, init_values=.1)),
    diff=('vit_base_patch16_224',dict(attn_layer='diff')), eva02=('eva02_base_patch14_224',{}),
    dinov3=('vit_base_patch16_dinov3',{}),
    mixed=('vit_base_patch16_rope_mixed_224',dict(patch_drop_rate=.3)),
    axial=('vit_base_patch16_rope_224',dict(patch_drop_rate=.3)),
    pe=('vit_pe_core_base_patch16_224',{}),
    beit=('beit_base_patch16_224',{}), shared=('beit_base_patch16_224',dict(use_shared_rel_pos_bias=True)),
    relpos=('vit_relpos_base_patch16_224',dict(shared_rel_pos=True)),
    naflex=('naflexvit_base_patch16_gap',{}), cait=('cait_xxs24_224',{}))
some = pytest.mark.parametrize('name, kw', [(n,kw) for n,kw in MODELS.values()], ids=[*MODELS])
FEW = 'vit','dinov2','mixed','beit'
few = pytest.mark.parametrize('name, kw', [MODELS[k] for k in FEW], ids=FEW)
def images(b=5, dtype=torch.float64):
    return torch.randn(b, 3, 32, 32, generator=torch.Generator().manual_seed(1), dtype=torch.float64).to(dtype)

def outs(o):
    if isinstance(o, torch.Tensor): return [o]
    return [t for v in (o.values() if isinstance(o, dict) else o) for t in outs(v)]
def run(m, x, on, seed=0, **mode):
    "Outputs and all gradients"
    m.set_reversible(on, **mode)
    m.zero_grad()
    torch.manual_seed(seed)
    y = outs(m(x))
    sum(o.double().square().sum() for o in y).backward()
    return [o.detach() for o in y],[p.grad for p in m.parameters()]

def sized(name, kw, depth=3, rate=1, **more):
    "A small model with every kind of dropout"
    drops = dict(drop_path_rate=.2*rate, proj_drop_rate=.2*rate, attn_drop_rate=.2*rate)
    return make(name, depth, **drops, **kw, **more)

@some
@pytest.mark.parametrize('depth', (1,2,3))
def test_gradients_are_those_of_stored_activations(name, kw, depth):
    "float64, dropout, drop path and patch dropout: outputs and every gradient, in parts of two images, and the dial"
    m,x = revvit.reversible(sized(name, kw, depth).double(), chunk=2),images()
    want = run(m, x, False)
    for mode in (dict(), dict(keep=.3)):
        y,grads = run(m, x, True, **mode)
        assert error(y, want[0]) < 1e-12 and error(grads, want[1]) < 1e-12
    blocks = [p.grad for p in m.blocks.parameters()]
    assert any(g is not None and g.abs().max()>0 for g in blocks) and isinstance(m.blocks, RewiredStack)

@some
def test_names_weights_and_function_come_and_go(name, kw):
    m,x = sized(name, kw).eval(),images(2, dtype=torch.float32)
    want,names,kind = outs(m(x)),[*m.state_dict()],type(m)
    modules,tensors = [n for n,_ in m.named_modules()],m.state_dict()
    r = revvit.reversible(m)
    assert r is m and isinstance(m, kind) and [*m.state_dict()]==names and [n for n,_ in m.named_modules()]==modules
    assert not same(outs(m(x)), want)   # another function, of the same weights
    m.load_state_dict(tensors)
    assert revvit.plain(m) is m and type(m) is kind and same(outs(m(x)), want)

@some
@pytest.mark.parametrize('amp', (None,torch.bfloat16), ids=str)
def test_exact_mode_has_the_bits_of_stored_activations(name, kw, amp):
    m,x = revvit.reversible(sized(name, kw), chunk=2),images(dtype=torch.float32)
    with torch.autocast('cpu', amp or torch.bfloat16, enabled=amp is not None):
        stored,rebuilt = run(m, x, False, exact=True),run(m, x, True, exact=True)
    for a,b in zip(stored, rebuilt): assert same([o for o in a if o is not None], [o for o in b if o is not None])

@few
def test_what_is_kept_does_not_grow_with_depth(name, kw):
    def kept(depth):
        quiet = {k:v for k,v in kw.items() if k!='patch_drop_rate'}
        m,x = revvit.reversible(sized(name, quiet, depth, 0)),images(dtype=torch.float32)
        return saved_bytes(lambda: m(x), m)
    # a table of rotary angles for each block is made outside of the blocks
    assert kept(12)-kept(3) <= (9*2*16*3*16*4*2 if 'mixed' in name else 0)

def peak_streams(dim, heads, patch, depth):
    "Streams an image at the peak of a step, from the slope between two batch sizes"
    torch.manual_seed(0)
    tiny = dict(img_size=14*patch, patch_size=patch, embed_dim=dim, num_heads=heads)
    m = revvit.reversible(timm.create_model(VIT, depth=depth, num_classes=5, **tiny), chunk=1)
    def peak(b):
        x = torch.randn(b, 3, 14*patch, 14*patch)
        def step(): m(x).square().mean().backward()
        step()
        return peak_bytes(step)
    return (peak(24)-peak(12))/12/(197*dim*4)

def test_peak_in_streams():
    "At a quarter of the width of ViT-B; its image takes as much as a stream there too"
    assert peak_streams(192, 3, 8, 3) < 4.5

@pytest.mark.slow
def test_peak_in_streams_of_a_vit_base(): assert peak_streams(768, 12, 16, 12) < 4.5

@some
def test_copies_pickles_and_evaluation(name, kw):
    m,x = revvit.reversible(sized(name, kw)).eval(),images(2, dtype=torch.float32)
    want = outs(m(x))
    for other in (copy.deepcopy(m), pickle.loads(pickle.dumps(m))):
        assert same(outs(other(x)), want) and type(other) is type(m)
        outs(other.train()(x))[0].sum().backward()
        assert all(p.grad is None for p in m.parameters()) and other.blocks[0].f.owner is other.blocks[0]
    with torch.no_grad(): assert error(outs(m(x)), want) < 1e-5   # attention with a mask has another kernel there

@some
def test_export_in_evaluation(name, kw):
    m,x = revvit.reversible(sized(name, kw)).eval(),images(2, dtype=torch.float32)
    assert error(outs(torch.export.export(m, (x,)).module()(x)), outs(m(x))) < 1e-6

@pytest.mark.parametrize('key', ['vit','dinov2','eva02','mixed','beit'])
def test_features(key):
    "Of a model, after chosen blocks; the last is what forward_features norms, and a truncated model gives the same"
    name,kw = MODELS[key]
    m,x = revvit.reversible(sized(name, kw, 4).double()).eval(),images(2)
    last,(one,three) = m.forward_intermediates(x, [1,3], output_fmt='NLC')
    assert error([last], [m.forward_features(x)]) < 1e-12 and one.shape==three.shape
    m.set_reversible(False)
    alone = dict(output_fmt='NLC', intermediates_only=True)
    assert error(m.forward_intermediates(x, [1], stop_early=True, **alone), [one]) < 1e-12
    m.set_reversible(True)
    p = list(m.blocks.parameters())
    def grads(on):
        m.set_reversible(on)
        found = m.forward_intermediates(x, [0,2], intermediates_only=True)
        return torch.autograd.grad(sum(o.square().sum() for o in found), p, allow_unused=True)
    assert error(grads(True), grads(False)) < 1e-12
    m.prune_intermediate_layers([1])
    assert len(m.blocks)==2 and isinstance(m.blocks, RewiredStack)
    assert error(m.forward_intermediates(x, [1], **alone), [one]) < 1e-12

@pytest.mark.parametrize('key', ['vit','dinov2','eva02','mixed','beit','cait'])
def test_feature_maps_of_timms_wrapper(key):
    "A model made with features_only: maps of timm's shapes, gradients, and back to the bit"
    name,kw = MODELS[key]
    m,x = make(name, 4, features_only=True, out_indices=[1,3], **kw).double().eval(),images(2)
    want,kinds = m(x),[type(o) for o in m.modules()]
    shapes = [o.shape for o in revvit.reversible(m, chunk=1)(x)]
    assert shapes==[o.shape for o in want]
    (y,grads),ref = run(m, x, True),run(m, x, False)
    assert error(y, ref[0]) < 1e-12 and error(grads, ref[1]) < 1e-12
    copied = copy.deepcopy(m)
    assert same(copied(x), m(x)) and pickle.loads(pickle.dumps(m)).state_dict().keys()==m.state_dict().keys()
    assert same(revvit.plain(m)(x), want) and [type(o) for o in m.modules()]==kinds

def test_the_table_of_timms_models():
    "All that can be rewired were compared; those that were asked more gave it"
    path = Path(__file__).parents[1]/'nbs/models/timm_rewired.csv'
    rows = list(csv.DictReader(path.read_text(encoding='utf8').splitlines()))
    works = [o for o in rows if o['rewired']=='yes']
    assert len(rows)>500 and len(works)>300 and {o['rewired'] for o in rows}=={'yes','no'}
    asked = 'names exact deepcopy export features intermediates features_only'.split()
    for o in works:
        assert float(o['error'])<1e-6 and abs(int(o['kept'] or 0))<=1000, o['model']
        if not o['asked']: continue
        assert all(k in o['asked'].split() or f'not asked: {k}' in o['why'] for k in asked), o['model']
    assert all(o['why'] for o in rows if o['rewired']=='no') and sum(bool(o['asked']) for o in works)>300

def test_masks_reach_attention():
    m,x = revvit.reversible(make(VIT).double(), chunk=2),images()
    mask = torch.rand(5, 1, 17, 17, generator=torch.Generator().manual_seed(2))>.3
    mask |= torch.eye(17, dtype=torch.bool)
    def grads(on, **kw):
        m.set_reversible(on)
        return torch.autograd.grad(m(x, **kw).square().sum(), list(m.parameters()))
    for kw in (dict(attn_mask=mask), dict(attn_mask=mask[0,0]), dict(is_causal=True)):
        assert error(grads(True, **kw), grads(False, **kw)) < 1e-12
    assert error(grads(True, attn_mask=mask), grads(True)) > 1e-3

def test_the_usual_halves_are_written_out():
    m = revvit.reversible(make('deit3_base_patch16_224'))
    x = torch.randn(2, 17, 48)
    assert [type(h.fused(x)).__name__ for h in (m.blocks[0].f, m.blocks[0].g)]==['FusedAttention','FusedMlp']
    m.blocks[0].attn.proj.register_forward_hook(lambda *o: None)
    assert m.blocks[0].f.fused(x) is None and m.blocks[0].g.fused(x) is not None

def test_layers_may_be_exchanged_and_frozen_later():
    m,x = revvit.reversible(make(VIT).double(), chunk=2),images()
    m(x)
    m.blocks[1].mlp = nn.Sequential(nn.Linear(48, 48), nn.Tanh()).double()
    for p in m.blocks[0].parameters(): p.requires_grad_(False)
    m.patch_embed.requires_grad_(False)
    want,got = run(m, x, False),run(m, x, True)
    assert error(got[1], want[1]) < 1e-12 and m.blocks[1].mlp[0].weight.grad is not None
    for i,b in enumerate(m.blocks): b.drop_path = .1*i
    assert [b.drop_path for b in m.blocks]==[0.,.1,.2]

def test_a_rate_for_a_layer_of_that_name():
    "CaiT and Gemma have one layer of drop path for both halves, and call it drop_path"
    m,x = revvit.reversible(make('cait_xxs24_224').double(), chunk=2),images()
    for b in m.blocks: b.drop_path = .3
    assert m.blocks[0].drop_path==.3 and m.blocks[0]._modules['drop_path'].drop_prob==.3
    want,got = run(m, x, False),run(m, x, True)
    assert error(got[1], want[1]) < 1e-12
    for b in m.blocks: b.drop_path = 0
    assert not same(run(m, x, True)[0], got[0])

def test_checkpointing_of_stages_is_switched_off():
    m = member('swin')
    m.set_grad_checkpointing()
    assert any(getattr(o, 'grad_checkpointing', False) for o in m.layers)
    assert not any(getattr(o, 'grad_checkpointing', False) for o in revvit.reversible(m).layers)

def replica(m):
    "As torch.nn.parallel.replicate makes, which wants GPUs: its parameters are plain tensors"
    copies = {}
    for o in reversed(list(m.modules())):
        r = copies[o] = o._replicate_for_data_parallel()
        for n,c in o._modules.items():
            if c is not None: r._modules[n] = copies[c]; setattr(r, n, copies[c])
        for n,p in o._parameters.items(): setattr(r, n, p if p is None else p.clone())
        r._former_parameters = {}
    return copies[m]

@few
def test_replicas_of_data_parallel(name, kw):
    "Refused with a remedy where weights would be missed, and right in plain mode and in evaluation"
    m,x = revvit.reversible(sized(name, {k:v for k,v in kw.items() if k!='patch_drop_rate'}, rate=0).double()),images()
    def grads(other): return torch.autograd.grad(sum(o.square().sum() for o in outs(other(x))), list(m.parameters()))
    m.set_reversible(False)
    want = grads(m)
    assert error(grads(replica(m)), want) < 1e-12
    m.set_reversible(True)
    with torch.no_grad(): assert error(outs(replica(m)(x)), outs(m(x))) < 1e-12
    with pytest.raises(RuntimeError, match=f'needs a gradient, but is neither.*{REMEDY}'): grads(replica(m))

def test_timms_switch_is_ours():
    m = revvit.reversible(make(VIT), keep=.2, exact=True)
    assert (m.blocks.reversible,m.blocks.keep,m.blocks.exact)==(True,.2,True)
    m.set_grad_checkpointing(False)
    assert not m.blocks.reversible and not m.grad_checkpointing

# --- one small member of each kind of block that the models above do not have

SMALL = dict(img_size=32, num_classes=5, drop_path_rate=.2)
HEADS = dict(embed_dim=24, num_heads=2)
def named(name, **kw): return lambda depth: timm.create_model(name, **SMALL, **HEADS, depth=depth, **kw)
def swin(name):
    sizes = dict(window_size=4, embed_dim=12, num_heads=(1,2))
    return lambda depth: timm.create_model(name, **SMALL, **sizes, depths=(1,depth))
def nest(depth): return zoo.nest.Nest(**SMALL, embed_dims=(24,)*3, num_heads=(1,)*3, depths=(1,1,depth))
def volo(depth):
    outlook = dict(downsamples=(True,False,False,False), outlook_attention=(True,False,False,False))
    sizes = dict(embed_dims=(24,)*4, num_heads=(2,)*4, **outlook)
    return zoo.volo.VOLO((1,1,depth,1), **SMALL, **sizes, mlp_ratio=2.)
def gcvit(depth): return zoo.gcvit.GlobalContextVit(**SMALL, embed_dim=12, depths=(1,depth), num_heads=(1,2),
    window_ratio=(4,8), layer_scale=.1)
def pvt(depth):
    return zoo.pvt_v2.PyramidVisionTransformerV2(num_classes=5, drop_path_rate=.2, embed_dims=(16,)*4,
        depths=(1,1,1,depth), num_heads=(1,1,2,2), mlp_ratios=(2,)*4)
def sam(depth):
    return named('samvit_base_patch16', patch_size=8, window_size=3, global_attn_indexes=(1,), neck_chans=16)(depth)
FAMILIES = dict(relpos_post=named('vit_relpos_base_patch16_rpn_224', patch_size=8),
    eva_post=named('eva02_enormous_patch14_clip_224', patch_size=8), deepseek=named('deepseek_vit_412m', patch_size=8),
    gemma4=named('gemma4_vit_167m', patch_size=8), qwen=named('qwen3_vit_88m', patch_size=8),
    swin=swin('swin_tiny_patch4_window7_224'), swin2=swin('swinv2_tiny_window8_256'),
    nest=nest, volo=volo, gcvit=gcvit, pvt=pvt, sam=sam)
families = pytest.mark.parametrize('key', FAMILIES)

def member(key, depth=2):
    torch.manual_seed(depth)
    return used(FAMILIES[key](depth))
def named_class(name):
    module,cls = name.split('.')
    return getattr(getattr(zoo, module, None), cls, None)
def stacks(m): return [o for o in m.modules() if isinstance(o, RewiredStack)]
def blocks_of(m): return {type(b).before for s in stacks(m) for b in s._modules.values()}

def test_every_kind_of_block_has_a_member():
    "Among the models above and here"
    ours = [make(n, 1, **kw) for n,kw in MODELS.values()] + [member(k, 1) for k in FAMILIES]
    found = {o.forward for m in ours for o in blocks_of(revvit.reversible(m))}
    assert not {o for o in map(named_class, kinds) if o is not None and o.forward not in found}

@families
def test_a_member_of_each_kind_learns_comes_back_and_is_copied(key):
    "Gradients in float64 with drop path, exact mode, names, the old bits, a copy, an export, features"
    m,x = member(key),images(3)
    want,names,kind = outs(m.float().eval()(x.float())),[*m.state_dict()],type(m)
    weights = copy.deepcopy(m.state_dict())
    revvit.reversible(m, chunk=1)
    assert [*m.state_dict()]==names
    m.train().double()
    ref = run(m, x, False)
    for mode in (dict(), dict(keep=.3)):
        y,grads = run(m, x, True, **mode)
        assert error(y, ref[0]) < 1e-6 and error(grads, ref[1]) < 1e-6   # some norms compute in float32
    stored,rebuilt = (run(m.float(), x.float(), on, exact=True) for on in (False,True))
    for a,b in zip(stored, rebuilt): assert same([o for o in a if o is not None], [o for o in b if o is not None])
    m.eval().load_state_dict(weights)   # a stem may have batch norm
    m.set_reversible(True)
    out,few = outs(m(x.float())),x[:2].float()
    assert same(outs(copy.deepcopy(m)(x.float())), out)
    assert error(outs(torch.export.export(m, (few,)).module()(few)), outs(m(few))) < 1e-5
    assert error(outs(m.forward_head(m.forward_features(x.float()))), out) < 1e-6
    last,inner = m.forward_intermediates(x.float())
    assert error([last], [m.forward_features(x.float())]) < 1e-6
    assert same(outs(revvit.plain(m)(x.float())), want) and type(m) is kind
    assert [o.shape for o in m.forward_intermediates(x.float())[1]]==[o.shape for o in inner]

@families
def test_gradients_of_features_within_are_those_of_stored_activations(key):
    m,x = revvit.reversible(member(key).double(), chunk=1),images(2)
    def found(on):
        m.set_reversible(on)
        torch.manual_seed(0)
        inner = m.forward_intermediates(x, intermediates_only=True)
        given = torch.autograd.grad(sum(o.square().sum() for o in inner), list(m.parameters()), allow_unused=True)
        return [*inner, *(o for o in given if o is not None)]
    assert error(found(True), found(False)) < 1e-6   # some norms compute in float32

@families
def test_a_member_of_each_kind_keeps_nothing_more_when_it_is_deeper(key):
    def kept(depth):
        m,x = revvit.reversible(member(key, depth), chunk=1),images(3, dtype=torch.float32)
        for b in (b for s in m.modules() if isinstance(s, RewiredStack) for b in s): b.drop_path = 0.
        return saved_bytes(lambda: m(x), m)
    assert kept(6)-kept(2) <= 4*1000   # four blocks' bookkeeping

class Odd(parts.Block):
    "A block that does something else"
    def forward(self, x, attn_mask=None, is_causal=False): return x + self.attn(x)

REFUSED = dict(
    parallel=(lambda: make(VIT, block_fn=parts.ParallelScalingBlock),
        'ParallelScalingBlock, and attention and MLP are one sum'),
    things=(lambda: make(VIT, block_fn=parts.ParallelThingsBlock), 'ParallelThingsBlock, and several attentions'),
    odd=(lambda: make(VIT, block_fn=Odd), 'Odd, and nobody has written down'),
    maxvit=(lambda: timm.create_model('test_maxvit'), 'MaxxVitBlock, and convolutions come before'),
    coatnet=(lambda: timm.create_model('test_coatnet'), 'the first one of each stage halves the map'),
    convnet=(lambda: timm.create_model('resnet18'), 'no list of blocks with attention'),
    xcit=(lambda: timm.create_model('xcit_nano_12_p16_224'), 'XCABlock, and it has three sums'),
    twice=(lambda: revvit.reversible(make(VIT)), 'is reversible already'),
    ours=(lambda: timm.create_model('revvit_tiny_patch16_224'), 'is reversible already'),
    none=(lambda: 'vit', 'model must be a module, got str'))
@pytest.mark.parametrize('build, words', REFUSED.values(), ids=REFUSED)
def test_what_cannot_be_rewired_is_refused_in_a_sentence(build, words):
    m = build()
    kinds = [type(o) for o in m.modules()] if isinstance(m, nn.Module) else []
    with pytest.raises(ValueError, match=words): revvit.reversible(m)
    if kinds: assert [type(o) for o in m.modules()]==kinds   # and left as it was

def test_other_refusals():
    with pytest.raises(ValueError, match='only what revvit.reversible returned'): revvit.plain(make(VIT))
    m,x = revvit.reversible(make(VIT, drop_path_rate=.2)),images(dtype=torch.float32)
    m.blocks[2].drop_path1.drop_prob = .5
    with pytest.raises(ValueError, match='one drop path rate for both halves.*0.2 and 0.5'): m(x)
    m = revvit.reversible(make(VIT))
    t = m.patch_drop(m._pos_embed(m.patch_embed(x)))
    with pytest.raises(RuntimeError, match='between block 1 and the next.*forward_intermediates'):
        for i,b in enumerate(m.blocks): t = b(t if i!=2 else t*1)
    loss = m(x).sum()
    with torch.no_grad(): m.blocks[1].attn.qkv.weight.mul_(2)
    with pytest.raises(RuntimeError, match=f"'attn.qkv.weight' in f of block 1 was changed.*{REMEDY}"): loss.backward()

def test_a_hook_on_a_block_is_heard_and_said():
    m,x = revvit.reversible(make(VIT, 4).double()),images()
    want,seen = run(m, x, False),[]
    m.blocks[1].register_forward_hook(lambda *o: seen.append(1))
    with pytest.warns(RuntimeWarning, match='block 1 goes by ordinary autograd, because there is a hook on it'):
        got = run(m, x, True)
    assert seen and error(got[1], want[1]) < 1e-12

def test_training_goes_down():
    "A few steps of a rewired model, with autocast"
    m,x = revvit.reversible(make('vit_base_patch14_reg4_dinov2', drop_path_rate=.1)),images(16, dtype=torch.float32)
    opt,y = torch.optim.AdamW(m.parameters(), lr=3e-3),torch.arange(16)%5
    losses = []
    for _ in range(20):
        with torch.autocast('cpu', torch.bfloat16): loss = nn.functional.cross_entropy(m(x).float(), y)
        loss.backward()
        opt.step(); opt.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < .5*losses[0]

@pytest.mark.parametrize('new', [nn.Linear, None], ids=['linear','block'])
def test_what_was_not_rewired_among_what_was(new):
    "A layer, or a block of timm's own"
    m,x = make('vit_tiny_patch16_224', 3),images(2).float()
    block = nn.Linear(8, 8) if new else make('vit_tiny_patch16_224', 1).blocks[0]
    m = revvit.reversible(m)
    m.blocks[1] = block
    with pytest.raises(TypeError, match=r'block 1 is of type (Linear|Block) and was not rewired: change the'): m(x)
