"The layers of both networks, case by case: what the notebooks 12_layers and 15_pooling show once"
import copy, math, pickle

import pytest, torch
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import prune
from torch.testing import assert_close
from revvit.core.block import ReversibleBlock
from revvit.core.coupling import couple, uncouple
from revvit.core.memory import saved_bytes
from revvit.core.sequence import ReversibleSequence
from revvit.models.fused import untouched
from revvit.models.layers import (MlpFusion, PatchEmbed, PooledFusion,
                                  StreamFusion, attention_half, check_images, mlp_half)
from revvit.models.pooling import HeadPool, OverlapPatchEmbed, PoolingAttention, StageTransition

double = dict(dtype=torch.float64)

@pytest.fixture(autouse=True)
def seeded(): torch.manual_seed(0)

def grid(b=2, t=3, h=5, w=6, d=12): return torch.randn(b, t, h, w, d, **double)
def streams(): return torch.randn(2, 3, 2, 5, 6, 8, **double).unbind()

# ---------------------------------------------------------------- what is no batch of images or clips

images = {
    (3,32,32): r"expected images of shape \(B, 3, H, W\), got \(3, 32, 32\)",
    (2,3,8,32,32): r"got \(2, 3, 8, 32, 32\)",
    (2,1,32,32): "expected 3 channels, got 1 in images of shape",
    (2,3,32,40): "image height and width must be multiples of the patch, 16x16 pixels: got 32x40",
    (2,3,0,32): "got 0x32"}
clips = {
    (2,3,32,32): r"expected clips of shape \(B, 3, T, H, W\), got \(2, 3, 32, 32\)",
    (2,3,7,32,32): "number of frames, height and width must be multiples of the patch, 2x4x4: got 7x32x32",
    (2,1,8,32,32): "expected 3 channels, got 1 in clips"}
wrong = [(shape, (16,16), words) for shape,words in images.items()] + [(shape, (2,4,4), words) for shape,
    words in clips.items()]

@pytest.mark.parametrize('shape, patch, words', wrong, ids=str)
def test_check_images_refuses(shape, patch, words):
    with pytest.raises(ValueError, match=words): check_images(torch.zeros(shape), 3, patch)

def test_check_images_wants_floats_and_passes_the_rest():
    with pytest.raises(ValueError, match="expected normalised float images, got torch.uint8: convert"):
        check_images(torch.zeros(2, 3, 32, 32, dtype=torch.uint8), 3, (16,16))
    check_images(torch.zeros(2, 3, 32, 48), 3, (16,16))
    check_images(torch.zeros(2, 3, 8, 32, 48), 3, (2,4,4))
    check_images(torch.zeros(0, 3, 32, 48).half(), 3, (16,16))

@pytest.mark.parametrize('make, words', [
    (lambda: PatchEmbed(30, 8), "img_size must be a multiple of patch_size: got 30 and 8"),
    (lambda: PatchEmbed((32,30), 8), "got .32, 30. and 8"),
    (lambda: PatchEmbed(32, 0), "must be a multiple of patch_size"),
    (lambda: OverlapPatchEmbed((4,16,24), (7,7), (4,4)), "as many numbers: got .4, 16, 24., .7, 7. and .4, 4."),
    (lambda: OverlapPatchEmbed((18,24), (7,7), (4,4)), "must be a multiple of the patch stride: got 18x24 and 4x4"),
    (lambda: HeadPool(4, (1,2,2), (1,1,1)), "pooling kernels must be odd, got 1x2x2"),
    (lambda: attention_half(10, 3), "num_heads must divide the width: got 3 heads and width 10"),
    (lambda: attention_half(10, 0), "got 0 heads and width 10"),
    (lambda: PoolingAttention(12, 24, 5, (1,3,3), (1,1,1)), "got 5 heads and width 24")])
def test_impossible_sizes_are_refused(make, words):
    with pytest.raises(ValueError, match=words): make()

# ---------------------------------------------------------------- patches

@pytest.mark.parametrize('layout', ['channels last', 'transposed', 'a batch of one', 'none', 'cut'])
def test_patch_embed_of_any_layout(layout):
    embed,x = PatchEmbed(32, 8, 3, 6),torch.randn(4, 3, 32, 48)
    want = embed(x)
    assert want.shape==(4, 24, 6) and want.is_contiguous()                      # 32/8 * 48/8 tokens
    if layout=='cut':
        with pytest.raises(ValueError, match='got 32x47'): embed(x[...,:-1])
        return
    other = {'channels last': x.to(memory_format=torch.channels_last), 'a batch of one': x[:1], 'none': x[:0],
             'transposed': torch.randn(4, 3, 48, 32).transpose(2, 3).copy_(x)}[layout]
    got = embed(other)
    assert got.is_contiguous()
    assert_close(got, want[:len(other)], rtol=1e-5, atol=1e-6)

def test_patch_embed_under_autocast():
    with torch.autocast('cpu', torch.bfloat16):
        assert PatchEmbed(32, 8, 3, 12)(torch.randn(1, 3, 32, 32)).dtype==torch.bfloat16

def test_overlapping_patches_of_images_and_clips():
    embed,x = OverlapPatchEmbed((16,24), (7,7), (4,4), 3, 6),torch.randn(2, 3, 16, 24)
    window = F.pad(x, (3,3,3,3))[0,:,4:11,8:15]                                 # around the token in row 1, column 2
    want = (embed.proj.weight*window).sum((1,2,3)) + embed.proj.bias
    assert_close(embed(x)[0,0,1,2], want, rtol=1e-4, atol=1e-5)
    assert embed(x).is_contiguous() and embed(x).shape==(2,1,4,6,6)
    clips = OverlapPatchEmbed((4,16,24), (3,7,7), (2,4,4), 3, 6)
    assert clips(torch.randn(2, 3, 4, 16, 24)).shape==(2,2,4,6,6) and clips.grid_size==(2,4,6)
    assert clips(torch.zeros(0, 3, 4, 16, 24)).shape==(0,2,4,6,6)
    with pytest.raises(ValueError, match='got 3x16x24'): clips(torch.zeros(1, 3, 3, 16, 24))

# ---------------------------------------------------------------- halves and fusions

def test_rates_and_widths_arrive():
    f,g = attention_half(12, 3, qkv_bias=False, attn_drop=.1, proj_drop=.2).fn,mlp_half(12, 1.5, drop=.3).fn
    assert (f.attn_drop.p, f.proj_drop.p, f.qkv.bias) == (.1, .2, None)
    assert (g.drop1.p, g.drop2.p, g.fc1.out_features) == (.3, .3, 18)
    p = PoolingAttention(12, 12, 3, (1,3,3), (1,2,2), attn_drop=.2, proj_drop=.3).double()
    x = grid()
    assert (p.attn_drop.p, p.proj_drop.p) == (.2, .3)
    assert not torch.equal(p(x), p(x)) and torch.equal(p.eval()(x), p(x))

def test_a_block_comes_back():
    f,g = attention_half(12, 3).double(),mlp_half(12).double()
    xs = torch.randn(2, 2, 7, 12, **double).unbind()
    ys = couple(*xs, f, g)
    assert [o.shape for o in ys]==[o.shape for o in xs]
    for back,was in zip(uncouple(*ys, f, g), xs): assert_close(back, was, rtol=0, atol=1e-12)

def test_the_order_of_the_streams_matters_to_the_fusion():
    fuse,(a,b) = StreamFusion(2),torch.randn(2, 1, 1, 2).unbind()
    assert_close(fuse(b, a), fuse(a, b).roll(2, -1), rtol=0, atol=1e-6)
    assert fuse(a[:0], b[:0]).shape==(0, 1, 4)
    a,b = torch.randn(2, 3, 2, 4, 5, 2)
    assert_close(PooledFusion(fuse)(a, b), PooledFusion(fuse)(a.flatten(1,3), b.flatten(1,3)), rtol=0, atol=1e-6)

def test_mlp_fusion_widens():
    fuse,(a,b) = MlpFusion(4),torch.randn(2, 3, 5, 4)
    assert fuse(a, b).shape==(3,5,8) and fuse.mlp.fc1.out_features==16

parts = dict(attention=lambda: (attention_half(12, 3), (torch.randn(2, 7, 12, **double),)),
             mlp=lambda: (mlp_half(12), (torch.randn(2, 7, 12, **double),)),
             pooling=lambda: (PoolingAttention(12, 24, 3, (3,3,3), (1,4,4), (1,2,2)), (grid(),)),
             mlp_transition=lambda: (StageTransition(8, 2, (1,3,3), (1,2,2), (1,2,2), 'mlp'), streams()),
             mean_transition=lambda: (StageTransition(8, 2, (3,3,3), (1,2,2), (1,2,2), 'mean'), streams()))
each = pytest.mark.parametrize('make', parts.values(), ids=parts)

@each
def test_a_sample_that_is_not_a_number_stays_alone(make):
    m,xs = make()
    m = m.double().eval()
    want,bad = m(*xs),[o.clone() for o in xs]
    bad[0][1] = float('nan')
    got = m(*bad)
    others = [i for i in range(len(want)) if i!=1]
    assert torch.equal(got[others], want[others]) and got[1].isnan().all()
    assert m(*(o[:0] for o in xs)).shape==(0, *want.shape[1:])

@each
def test_copies_and_pickles(make):
    m,xs = make()
    m = m.double()
    for twin in (copy.deepcopy(m), pickle.loads(pickle.dumps(m))): assert torch.equal(twin(*xs), m(*xs))

# ---------------------------------------------------------------- pooling

kernels = [((1,3,3),(1,2,2)), ((3,3,3),(1,2,2)), ((3,3,3),(2,4,4)), ((5,3,3),(2,2,2)), ((1,3,3),(2,1,1))]
pooled = pytest.mark.parametrize('kernel, stride', kernels, ids=str)

def by_head(pool, x):
    "PyTorch's 3-d convolution of one head after the other, then the norm"
    pad,weight = [o//2 for o in pool.kernel],pool.conv.weight.view(4, 1, *pool.kernel)
    ys = [F.conv3d(h.movedim(-1, 1), weight, None, pool.stride, pad, 1, 4) for h in x.split(4, -1)]
    return torch.cat([pool.norm(y.movedim(1, -1)) for y in ys], -1)

@pooled
def test_head_pool_is_the_convolution_of_each_head(kernel, stride):
    pool,x = HeadPool(4, kernel, stride).double(),grid()
    assert_close(pool(x), by_head(pool, x), rtol=0, atol=1e-12)
    assert_close(pool.conv_per_head(x), pool.grouped_conv(x), rtol=0, atol=1e-12)
    assert pool(x).shape==(2, *(math.ceil(n/o) for n,o in zip((3,5,6), stride)), 12)
    assert_close(pool(x[:,:1]), by_head(pool, x[:,:1]), rtol=0, atol=1e-12)
    assert pool(x[:,:1,:1,:1]).shape==(2,1,1,1,12)
    assert len(pool(x[:0]))==len(pool.conv_per_head(x[:0]))==0

@pytest.mark.parametrize('kernel, stride', kernels[:2], ids=str)
def test_what_is_done_to_a_pooling_layer_is_felt(kernel, stride):
    "A hook, weights channels last, pruning, another convolution, none at all"
    pool,x = HeadPool(4, kernel, stride).double(),grid()
    pool.norm = nn.Identity()
    want = pool(x)
    hook = pool.conv.register_forward_hook(lambda m,i,o: 2*o)
    assert_close(pool(x), 2*want, rtol=0, atol=1e-12)
    hook.remove()
    assert untouched(pool.conv, type(pool.conv)) and torch.equal(pool(x), want)
    pool.to(memory_format=torch.channels_last if pool.flat else torch.channels_last_3d)
    assert_close(pool(x), want, rtol=0, atol=1e-12)
    prune.identity(pool.conv, 'weight')
    pool.conv.weight_mask.zero_()
    assert not pool(x).any()
    pool.conv = type(pool.conv)(4, 4, 1, padding=1, padding_mode='circular', groups=4).double()
    assert torch.equal(pool(x), pool.conv_per_head(x))
    pool.conv = nn.Identity()
    assert torch.equal(pool(x), x)

@pytest.mark.parametrize('kernel, stride', [*kernels[:2], ((3,3,3),(1,8,8))], ids=str)
def test_head_pool_under_bfloat16(kernel, stride):
    "Gradients of input and kernel within the rounding of the true ones (R7): a wrong one is off by half and more"
    pool,x = HeadPool(4, kernel, stride),torch.randn(2, 3, 8, 8, 8, requires_grad=True)
    def grads(on):
        with torch.autocast('cpu', torch.bfloat16, enabled=on): y = pool(x)
        return torch.autograd.grad(y.float().pow(3).sum(), (x, pool.conv.weight))
    for a,b in zip(grads(True), grads(False)): assert (a-b).norm()<.1*b.norm()

def attention_by_hand(m, x):
    "The formula, one head at a time"
    q,k,v = (p(o).flatten(1, 3) for p,o in zip((m.pool_q,m.pool_k,m.pool_v), m.qkv(x).chunk(3, -1)))
    d = q.shape[-1]//m.num_heads
    weights = [(a@b.transpose(1, 2)/d**.5).softmax(-1) for a,b in zip(q.split(d, -1), k.split(d, -1))]
    return m.proj(torch.cat([w@o for w,o in zip(weights, v.split(d, -1))], -1))

@pytest.mark.parametrize('kw', [dict(q_stride=(1,2,2)), dict(q_stride=(1,2,2), qkv_bias=False), {}], ids=str)
def test_pooling_attention_is_its_formula(kw):
    "And a hook on the joint layer is felt: it makes up for halved weights"
    att,x = PoolingAttention(12, 24, 3, (3,3,3), (1,4,4), **kw).double(),grid()
    want = att(x)
    assert_close(want.flatten(1, 3), attention_by_hand(att, x), rtol=0, atol=1e-12)
    assert want.shape==((2,3,3,3,24) if kw else (2,3,5,6,24))
    with torch.no_grad():
        for p in att.qkv.parameters(): p.mul_(.5)
    att.qkv.register_forward_hook(lambda m,i,o: 2*o)
    assert_close(att(x), want, rtol=0, atol=1e-12)

@pytest.mark.parametrize('fusion, kernel', [('mlp',(1,3,3)), ('mean',(3,3,3))])
def test_a_stage_transition_is_its_formula_in_both_modes(fusion, kernel):
    t,xs = StageTransition(8, 2, kernel, (1,2,2), (1,2,2), fusion).double(),streams()
    x = t.fuse(*xs)
    residual = x if fusion=='mlp' else x@t.proj.weight.T + t.proj.bias
    y = t.f.fn.pool_q(residual) + t.f.fn(t.f.norm(x))
    assert_close(t(*xs), y + t.g.fn(t.g.norm(y)), rtol=0, atol=1e-12)
    assert t(*xs).shape==(3,2,3,3,16)
    kept,grads = {},{}
    for on in (True,False):
        t.set_reversible(on)
        kept[on] = saved_bytes(lambda: t(*xs), t)
        grads[on] = torch.autograd.grad(t(*xs).pow(3).sum(), list(t.parameters()))
    assert kept[True]<.8*kept[False] and all(torch.equal(a, b) for a,b in zip(grads[True], grads[False]))

@pytest.mark.parametrize('shared', [False, True])
def test_drop_path_spares_as_many_images_as_it_says(shared):
    "F and G draw apart, unless they share"
    block = ReversibleBlock(nn.Identity(), nn.Identity(), .25, shared_drop_path=shared)
    rows = block.survivors(torch.empty(100_000, 1))
    assert all(abs(len(o)/100_000-.75) < .01 for o in rows)
    both = len(set(rows[0].tolist())&set(rows[1].tolist()))
    assert abs(both/100_000-(.75 if shared else .75**2)) < .01

def test_nothing_is_picked_where_drop_path_spares_all():
    "No indices then, so that nothing is copied"
    block,seen = ReversibleBlock(nn.Identity(), nn.Identity(), .1),[]
    for seed in range(40):
        torch.manual_seed(seed)
        want = [o.nonzero().flatten().tolist() for o in torch.rand(2, 6) >= .1]
        torch.manual_seed(seed)
        got = block.survivors(torch.empty(6, 1))
        assert [list(range(6)) if o is None else o.tolist() for o in got] == want
        assert all((o is None)==(len(w)==6) for o,w in zip(got, want))
        seen += [o is None for o in got]
    assert .4 < sum(seen)/len(seen) < .65   # .9**6 is .53

@pytest.mark.parametrize('shared', [False, True])
@pytest.mark.parametrize('on', [True, False], ids=['rebuilt','stored'])
def test_drop_path_makes_up_for_those_it_drops(on, shared):
    "An image gets nothing from a half, or as much more as others are left out, both ways"
    f,g = (nn.Linear(8, 8) for _ in range(2))
    seq = ReversibleSequence([ReversibleBlock(f, g, .2, shared)], chunk=7).double()
    seq.set_reversible(on)
    x1,x2 = torch.randn(2, 40, 3, 8, **double).requires_grad_()
    y1,y2 = seq(x1, x2)
    of_f,of_g = (((y-x)/m(o)).detach().flatten(1) for x,y,m,o in ((x1,y1,f,x2),(x2,y2,g,y1)))
    for o in (of_f,of_g):
        assert {round(v, 9) for v in o.flatten().tolist()} == {0., 1.25}
        assert_close(o, o[:,:1].expand_as(o), rtol=0, atol=1e-9)   # whole images
    assert torch.equal(of_f[:,0].round(), of_g[:,0].round()) == shared
    back, = torch.autograd.grad(y1.sum(), x2)
    assert_close(back, of_f[:,:1,None]*f.weight.sum(0).expand_as(back), rtol=0, atol=1e-9)
