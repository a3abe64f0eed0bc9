"""What F and G are given beside their stream: rotary tables, masks, a memory that needs a gradient.
The judge is ordinary autograd."""
import copy, warnings
from typing import NamedTuple

import pytest, torch
from torch import nn
from torch.nn.functional import scaled_dot_product_attention
from revvit.core.block import ReversibleBlock
from revvit.core.context import PerBlock, PerImage
from revvit.core.memory import peak_bytes
from revvit.core.sequence import ReversibleSequence
from revvit.core.testing import weighted_sum
from cases import DEVICE, REMEDY, error, mlp, same, used

D,N,M = 8,3,5

class Rotary(nn.Module):
    "Attention whose queries and keys are turned by a table, with a mask, and dropout of its weights"
    def __init__(self, p):
        super().__init__()
        self.norm,self.qkv,self.p = nn.LayerNorm(D),nn.Linear(D, 3*D),p
    def turned(self, x, rope):
        cos,sin = rope
        a,b = x.chunk(2, -1)
        return torch.cat((a*cos-b*sin, a*sin+b*cos), -1)
    def forward(self, x, rope, mask=None):
        q,k,v = self.qkv(self.norm(x)).chunk(3, -1)
        q,k = self.turned(q, rope),self.turned(k, rope)
        return scaled_dot_product_attention(q, k, v, mask, self.p if self.training else 0.)

class Cross(nn.Module):
    "Attention to a memory, turned a little by the table too"
    def __init__(self, p):
        super().__init__()
        self.norm,self.q,self.kv,self.drop = nn.LayerNorm(D),nn.Linear(D, D),nn.Linear(D, 2*D),nn.Dropout(p)
    def forward(self, x, memory, rope=None, time=None):
        x = self.norm(x) if rope is None else self.norm(x)*rope[0].repeat(1, 2)
        if time is not None: x = x + time[:,None]
        return self.drop(scaled_dot_product_attention(self.q(x), *self.kv(memory).chunk(2, -1)))

def stack(depth, rate, chunk):
    torch.manual_seed(depth)
    return used(ReversibleSequence([ReversibleBlock(Rotary(.3*rate), Cross(.3*rate), .3*rate, f_takes=('rope','mask'),
        g_takes=('memory','rope','time')) for _ in range(depth)], chunk)).to(DEVICE, torch.float64)

def drawn(*shape, seed=1):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(DEVICE)
def things(depth, b=5, per_block=False):
    "Streams and what they are given, all of which needs a gradient"
    def table(i):
        angles = drawn(N, D//2, seed=10+i)
        return angles.cos().requires_grad_(),angles.sin().requires_grad_()
    xs = [drawn(b, N, D, seed=s).requires_grad_() for s in (2,3)]
    memory,time = drawn(b, M, D).requires_grad_(),drawn(b, D).requires_grad_()
    mask = drawn(b, N, N, seed=7).requires_grad_()
    rope = PerBlock([table(i) for i in range(depth)]) if per_block else table(0)
    learned = [memory, time, mask, *(t for o in rope.values for t in o)] if per_block else [memory, time, mask, *rope]
    return xs,dict(rope=rope, mask=PerImage(mask), memory=PerImage(memory), time=PerImage(time)),learned

def answers(seq, xs, context, learned, **mode):
    seq.set_reversible(**mode)
    torch.manual_seed(0)
    ys = seq(*xs, **context)
    return [*ys, *torch.autograd.grad(weighted_sum(ys), [*xs, *learned, *seq.parameters()])]

@pytest.mark.parametrize('depth', range(1, 7))
@pytest.mark.parametrize('chunk, rate, per_block', [(2,0,False),(None,1,True),(1,1,False),(2,1,True)])
def test_gradients_of_all_that_is_given(depth, chunk, rate, per_block):
    "Dropout, drop path, tables for all images and for each block, cut and whole: ordinary autograd's numbers"
    seq,(xs,context,learned) = stack(depth, rate, chunk),things(depth, per_block=per_block)
    want = answers(seq, xs, context, learned, on=False)
    assert error(answers(seq, xs, context, learned), want) < 1e-12
    for keep in (.1,.5,1): assert error(answers(seq, xs, context, learned, keep=keep), want) < 1e-12

@pytest.mark.parametrize('depth', (1,3,6))
@pytest.mark.parametrize('amp', (None,torch.bfloat16), ids=str)
def test_exact_mode_gives_the_bits_of_stored_activations(depth, amp):
    seq,(xs,context,learned) = stack(depth, 1, 2).float(),things(depth)
    single = lambda t: t.detach().float().requires_grad_()
    xs,learned = [single(x) for x in xs],[single(t) for t in learned]
    memory,time,mask,*rope = learned
    context = dict(rope=tuple(rope), mask=PerImage(mask), memory=PerImage(memory), time=PerImage(time))
    with torch.autocast(DEVICE.type, amp or torch.bfloat16, enabled=amp is not None):
        stored,rebuilt = (answers(seq, xs, context, learned, on=on, exact=True) for on in (False,True))
    assert same(rebuilt, stored)

def test_some_gradients_frozen_streams_and_no_gradients_at_all():
    seq,(xs,context,learned) = stack(4, 1, 2),things(4)
    for p in seq.parameters(): p.requires_grad_(False)
    xs = [x.detach() for x in xs]
    def run(wanted, on):
        seq.set_reversible(on)
        torch.manual_seed(0)
        return torch.autograd.grad(weighted_sum(seq(*xs, **context)), wanted)
    for wanted in (learned, learned[:1], learned[2:3], learned[3:]):
        assert error(run(wanted, True), run(wanted, False)) < 1e-12
    with torch.no_grad(): assert not seq(*xs, **context)[0].requires_grad

def test_a_batch_that_nobody_survives_and_one_of_one_image():
    for b,rate in ((1,.9),(3,.9)):
        seq,(xs,context,learned) = stack(3, 0, 1),things(3, b)
        for block in seq: block.drop_path = rate
        assert error(answers(seq, xs, context, learned), answers(seq, xs, context, learned, on=False)) < 1e-12

def test_two_backward_passes_a_graph_kept_and_a_gradient_accumulated():
    seq,(xs,context,learned) = stack(3, 1, 2),things(3)
    want = answers(seq, xs, context, learned)[2:]
    torch.manual_seed(0)
    loss = weighted_sum(seq(*xs, **context))
    for keep in (True,False):
        assert same(torch.autograd.grad(loss, [*xs, *learned, *seq.parameters()], retain_graph=keep), want)
    torch.manual_seed(0)
    weighted_sum(seq(*xs, **context)).backward()
    assert same([t.grad for t in learned], want[2:2+len(learned)])

def test_what_is_computed_from_weights_carries_their_gradient():
    "A table made by a layer: its weight's gradient comes through all blocks"
    seq,(xs,context,_) = stack(5, 1, 2),things(5)
    lin = nn.Linear(D, D).to(DEVICE, torch.float64)
    def run(on):
        seq.set_reversible(on)
        torch.manual_seed(0)
        given = context|dict(memory=PerImage(lin(context['memory'].value)))
        return torch.autograd.grad(weighted_sum(seq(*xs, **given)), list(lin.parameters()))
    assert error(run(True), run(False)) < 1e-12

def test_the_way_back():
    seq,(xs,context,_) = stack(4, 0, 2).eval(),things(4, per_block=True)
    with torch.no_grad(): assert error(seq.inverse(*seq(*xs, **context), **context), xs) < 1e-12

@pytest.mark.skipif(DEVICE.type!='cpu', reason='counts the CPU allocator')
@pytest.mark.parametrize('cut', (True,False))
@pytest.mark.parametrize('what', ('memory','mask','rope'))
def test_a_gradient_does_not_cost_memory_that_grows_with_depth(what, cut):
    n = 2 if what=='memory' else 40   # a table and a mask are as long as the tokens
    def peak(depth):
        torch.manual_seed(0)
        F,takes = (lambda: Cross(0.),('memory',)) if what=='memory' else (lambda: Rotary(0.),('rope','mask'))
        seq = ReversibleSequence([ReversibleBlock(mlp(D), F(), g_takes=takes) for _ in range(depth)], 4)
        def learned(*shape): return torch.randn(*((32,) if cut else ()), *shape, requires_grad=True)
        def given(k, *shape): return PerImage(learned(*shape)) if cut else learned(*shape)
        rope = (lambda o: PerImage(o) if cut else o)((learned(n, D//2),learned(n, D//2)))
        context = dict(memory=given('memory', 400, D)) if what=='memory' else dict(rope=rope)
        if what=='mask': context['mask'] = given('mask', n, n)
        x = torch.randn(32, n, D)
        def step(): torch.stack([y.square().mean() for y in seq(x, x, **context)]).sum().backward()
        step()
        return peak_bytes(step)
    assert peak(16) < 1.05*peak(4)

def test_a_mask_that_needs_a_gradient_has_its_kernel_in_both_directions():
    "Attention takes another one there: exact mode gives the bits of stored activations all the same"
    class Masked(nn.Module):
        def __init__(self): super().__init__(); self.qkv = nn.Linear(12, 36)
        def forward(self, x, mask):
            q,k,v = self.qkv(x).unflatten(-1, (3,1,12)).transpose(1, 3).unbind(2)
            return scaled_dot_product_attention(q, k, v, mask).squeeze(1)
    torch.manual_seed(0)
    seq = ReversibleSequence([ReversibleBlock(Masked(), mlp(12), f_takes=('mask',)) for _ in range(6)], 4).to(DEVICE)
    xs,mask = torch.randn(2, 8, 49, 12, device=DEVICE),torch.randn(49, 49, device=DEVICE, requires_grad=True)
    stored,rebuilt = (answers(seq, [x.requires_grad_() for x in xs.clone().unbind()], dict(mask=mask), [mask], on=on,
                              exact=True) for on in (False,True))
    assert same(rebuilt, stored)

def test_changes_in_between_are_refused_by_name():
    for k,t in (('memory',lambda c: c['memory'].value),('rope',lambda c: c['rope'][1])):
        seq,(xs,context,_) = stack(2, 0, 2),things(2)
        context = {k: copy.copy(v) for k,v in context.items()}
        context['memory'].value = context['memory'].value.detach()
        context['rope'] = tuple(o.detach().clone() for o in context['rope'])
        loss = weighted_sum(seq(*xs, **context))
        t(context).mul_(2)
        words = f"'{k}', which is given to . of block 1, was changed between forward and backward.*{REMEDY}"
        with pytest.raises(RuntimeError, match=words): loss.backward()

def test_the_self_check_sees_what_no_counter_tells():
    seq,(xs,context,_) = stack(2, 0, 2),things(2)
    loss = weighted_sum(seq(*xs, **context))
    context['memory'].value.data.mul_(2)   # does not move the version counter
    with pytest.warns(RuntimeWarning, match='did not come back'): loss.backward()

def test_refusals_before_anything_is_computed():
    seq,(xs,context,_) = stack(2, 0, 2),things(2)
    for more,words in ((dict(words=1),"no F or G takes 'words'.*mask, memory, rope, time"),
            (dict(memory=PerImage(drawn(4, M, D))),"'memory' is for 4 images, and there are 5"),
            (dict(rope=PerBlock([1])),"'rope' has values for 1 blocks, and there are 2")):
        with pytest.raises(ValueError, match=words): seq(*xs, **(context|more))
    for takes,words in (('rope',"f_takes is a tuple of names, got 'rope'"),(('tail',),'cannot be called tail')):
        with pytest.raises(ValueError, match=words): ReversibleBlock(mlp(), mlp(), f_takes=takes)
    with pytest.raises(TypeError, match='rope'): seq(*xs, memory=context['memory'])

def test_a_block_that_goes_by_ordinary_autograd_gets_it_too():
    seq,(xs,context,learned) = stack(4, 1, 2),things(4, per_block=True)
    want = answers(seq, xs, context, learned)
    seq[2].register_forward_hook(lambda *o: None)
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        assert error(answers(seq, xs, context, learned), want) < 1e-12

def test_none_is_as_good_as_not_given():
    "So a half with a backward pass of its own keeps it, and a value that F needs no tensor for is handed on as it is"
    seq,(xs,context,learned) = stack(2, 0, 2),things(2)
    context,learned = {k:v for k,v in context.items() if k!='time'},[learned[0],*learned[2:]]
    assert same(answers(seq, xs, context|dict(time=None), learned), answers(seq, xs, context, learned))

class Pair(NamedTuple):
    scale:torch.Tensor
    shift:torch.Tensor

class Modulated(nn.Module):
    "A linear layer whose input is scaled and shifted as each image says"
    def __init__(self):
        super().__init__()
        self.lin = nn.Linear(D, D)
    def forward(self, x, pair): return self.lin(x*pair.scale+pair.shift)

@pytest.mark.parametrize('chunk', [1,2,None])
def test_a_named_tuple_is_cut_as_a_tuple_is(chunk):
    torch.manual_seed(0)
    blocks = [ReversibleBlock(Modulated(), nn.Linear(D, D), f_takes=['pair']) for _ in range(3)]
    seq = ReversibleSequence(blocks, chunk).to(DEVICE, torch.float64)
    learned = [torch.randn(5, 1, D, dtype=torch.float64, device=DEVICE, requires_grad=True) for _ in range(2)]
    xs = [torch.randn(5, 3, D, dtype=torch.float64, device=DEVICE, requires_grad=True) for _ in range(2)]
    context = dict(pair=PerImage(Pair(*learned)))
    assert error(answers(seq, xs, context, learned), answers(seq, xs, context, learned, on=False)) < 1e-12
