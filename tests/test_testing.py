"What the checks of `revvit.core.testing` are made of, and what they accept"
import random, re, warnings

import numpy as np
import pytest, torch
from torch import nn
from torch.testing import assert_close
from revvit import ReversibleBlock, ReversibleSequence
from revvit.core import testing
from revvit.core.testing import check_grads, check_inverse, drift, weighted_sum

def stack(depth=3, dim=4, p=0., dtype=torch.float64):
    torch.manual_seed(0)
    def half(): return nn.Sequential(nn.Linear(dim, 2*dim), nn.GELU(), nn.Dropout(p), nn.Linear(2*dim, dim))
    return ReversibleSequence(ReversibleBlock(half(), half()) for _ in range(depth)).to(dtype)

@pytest.fixture
def streams():
    gen = torch.Generator().manual_seed(1)
    return torch.randn(2, 3,5,4, dtype=torch.float64, generator=gen).unbind()

# ---------------------------------------------------------------- distances and limits

three,near = torch.tensor([3.,4.]),torch.tensor([3.,4.5])

@pytest.mark.parametrize('got,want,floor,says', [
    (near, three, 0., .1), (three*torch.tensor([float('nan'),1.]), three, 0., float('nan')), (0*three, 0*three, 0., 0.),
    (three, 0*three, 0., float('inf')), (three, 0*three, 50., .1)])
def test_relative_distance(got, want, floor, says):
    assert testing._rel(got, want, floor) == pytest.approx(says, nan_ok=True)

def test_the_floor_is_a_percent_of_the_typical_norm():
    assert testing._floor([three, None, 7*three]) == pytest.approx(.25)
    assert testing._floor([]) == 0

def test_limits_by_type():
    assert [testing._tol(None, t) for t in (torch.float32,torch.int32)] == [1e-5,0.]
    assert testing._tol(0., torch.float32) == 0
    with pytest.raises(ValueError, match="no default tolerance for torch.bfloat16: give tol"):
        testing._tol(None, torch.bfloat16)

def test_gap():
    assert testing._gap(torch.tensor([1.,2.]), torch.tensor([1.,4.])) == .5
    assert testing._gap(*torch.zeros(2, 3)) == testing._gap(*torch.zeros(2, 0, 5)) == 0

def test_weights_leave_the_generator_alone():
    state = torch.get_rng_state()
    y = torch.zeros(2, 3, requires_grad=True)
    weighted_sum({'a':y, 'b':(y.detach(),None)}).backward()
    assert len(y.grad.unique()) == 6 and torch.equal(torch.get_rng_state(), state)

# ---------------------------------------------------------------- nothing is left behind

def draw(): return float(torch.rand(())),np.random.rand(),random.random()

def test_every_generator_is_watched_and_put_back():
    before = testing._rng()
    first = draw()
    assert [k for k,v in testing._rng().items() if v!=before[k]] == ['torch','numpy','python']
    testing._set_rng(before)
    assert testing._rng()==before and draw()==first

def test_gradients_and_buffers_come_back_when_the_code_inside_fails():
    bn = nn.BatchNorm1d(4)
    bn.weight.grad = g = torch.ones(4)
    before = testing._rng()
    with pytest.raises(ZeroDivisionError), testing._restored(bn, seed=0):
        assert [p.grad for p in bn.parameters()] == [None,None]
        bn(torch.randn(8, 4)).sum().backward()
        draw(); 1/0
    assert bn.num_batches_tracked.item()==0 and bn.running_mean.tolist()==[0.]*4
    assert bn.weight.grad is g and bn.bias.grad is None and testing._rng()==before

def test_mixed_modes_come_back_mixed():
    m = stack()
    m[1].eval()
    modes = [o.training for o in m.modules()]
    with testing._restored(m): m.eval()
    assert [o.training for o in m.modules()] == modes

def test_an_emptied_storage_counts_as_changed():
    a,b,c = torch.ones(3, 2)
    a = a.clone()
    a.untyped_storage().resize_(0)
    assert testing._changed([a,b,c], [b,b,2*b]) == [0,2]

def test_equal_inputs_are_refused():
    a = torch.ones(2)
    with pytest.raises(ValueError, match='two inputs are equal'): testing._differ([a,a])
    testing._differ([a,2*a])
    testing._differ([a[:0],a[:0]])

# ---------------------------------------------------------------- one run, and what is compared

class Times(nn.Module):
    def __init__(self):
        super().__init__()
        self.w,self.idle = nn.Parameter(torch.tensor(3.)),nn.Parameter(torch.tensor(1.))
    def forward(self, x): return self.w*x

@pytest.mark.parametrize('way', testing._WAYS)
def test_a_run_by_hand(way):
    "y = 3*2, and the loss is 5y"
    m = Times()
    got = testing._run(m, m, [torch.tensor(2.)], lambda out: 5*out, 0, way)
    frozen = way==testing._WAYS[2]
    want = {'output 0':6., 'gradient of input 0':None if frozen else 15., 'gradient of w':10., 'gradient of idle':None}
    assert got.named == want and got.side == []

n = torch.full((2,), float('nan'))
@pytest.mark.parametrize('got,want,says', [
    ({'a':near}, {'a':three}, 'relative error of 0.1'), ({'a':None}, {'a':three}, 'is missing'),
    ({'a':three}, {'a':None}, 'is there'), ({'a':three.double()}, {'a':three}, 'torch.float64'),
    ({'a':n}, {'a':n}, 'nan'), ({'output 1':three}, {}, 'is there')])
def test_each_difference_is_a_sentence(got, want, says):
    bad = testing._compare(got, want)[1]
    assert len(bad)==1 and says in bad[0]

def test_what_is_no_difference():
    assert testing._compare({'output 0':three,'gradient of w':None,'buffer n':three},
                            {'output 0':three,'gradient of w':None}) == ({'output 0':0.}, [])
    assert testing._compare({'a':near}, {'a':three}, tol=.2)[1] == []
    errs,_ = testing._compare({'gradient of w':three, 'gradient of k':three*2e-9},
                              {'gradient of w':three, 'gradient of k':three*1e-9})
    assert errs['gradient of k'] < 1e-6   # a key's bias: all rounding

def test_the_mode_is_switched_inside_a_wrapper_and_back():
    m = stack()
    m.set_reversible(False)
    with testing._switched(nn.Sequential(m), True): assert m.reversible
    assert not m.reversible
    with pytest.raises(ValueError, match='ReLU has no set_reversible'), testing._switched(nn.ReLU(), True): pass

def test_a_reference_with_other_weights_is_refused(streams):
    with pytest.raises(ValueError, match='other parameters'): check_grads(stack(), *streams, reference=stack(2))
    other = stack()
    with torch.no_grad(): other[0].f[0].weight.add_(1)
    with pytest.raises(ValueError, match='another value'): check_grads(stack(), *streams, reference=other)

# ---------------------------------------------------------------- what passes

@pytest.mark.parametrize('depth', [1,2,3,8])
def test_the_way_back_at_any_depth(depth, streams): check_inverse(stack(depth, p=.5), *streams)

@pytest.mark.parametrize('images', [0,1])
def test_the_way_back_of_few(images, streams): check_inverse(stack(), *(x[:images] for x in streams))

def test_the_way_back_has_a_limit(streams):
    check_inverse(stack(dtype=torch.float32), *(x.float() for x in streams))
    with pytest.raises(AssertionError, match='the limit is 1e-30'): check_inverse(stack(), *streams, tol=1e-30)

@pytest.mark.parametrize('depth', [1,2,3,6])
def test_gradients_at_any_depth(depth, streams): check_grads(stack(depth, p=.3), *streams)

@pytest.mark.parametrize('change', ['eval','one','seed','frozen','module'])
def test_gradients_however_it_is_used(change, streams):
    m,kwargs = stack(p=.3),{}
    if change=='eval': m.eval()
    if change=='one': streams = [x[:1] for x in streams]
    if change=='seed': kwargs = dict(seed=3)
    if change=='frozen': m[1].f.requires_grad_(False)
    if change=='module':
        kwargs = dict(reference=stack(p=.3))
        kwargs['reference'].set_reversible(False)
    check_grads(m, *streams, **kwargs)

# ---------------------------------------------------------------- directions

def test_directions_are_not_perpendicular():
    gen = torch.Generator().manual_seed(0)
    g = torch.randn(100, dtype=torch.float64, generator=gen)
    for v in [testing._direction(g, gen) for _ in range(50)]:
        assert abs(testing._norm(v)-1) < 1e-12 and abs(float((g*v).sum())) > .5*testing._norm(g)/15
    assert [testing._direction(g*k, gen).shape for k in (0.,float('nan'))] == [g.shape]*2

class Creeping(nn.Module):
    "Identity whose inverse is off by `by`"
    def __init__(self, by):
        super().__init__()
        self.by = by
    def forward(self, x1, x2): return x1,x2
    def inverse(self, y1, y2): return y1+self.by,y2

nan = float('nan')

@pytest.mark.parametrize('bys,limit,errors,says', [
    ((.5,.5,.5), 1e-3, [.75,.5,.25], 'input of block 0 .* error of 0.75 of .* limit of 0.001 is passed at block 2:'),
    ((.5,.5,.5), .75, [.75,.5,.25], None),
    ((.5,nan,.5), 10., [nan,nan,.25], 'input of block 0 .* error of nan of .* limit of 10 is passed at block 1:')])
def test_drift_names_the_worst_block_and_leaves_modes(bys, limit, errors, says):
    blocks = nn.ModuleList(map(Creeping, bys))
    blocks[1].eval()
    with warnings.catch_warnings(record=True) as heard:
        warnings.simplefilter('always')
        got = drift(blocks, torch.tensor([[1.,2.]]), torch.tensor([[2.,1.]]), limit)
    assert got == pytest.approx(errors, nan_ok=True) and [m.training for m in blocks] == [True,False,True]
    assert len(heard) == bool(says) and (not says or re.search(says, str(heard[0].message)))

def test_drift_is_the_same_in_both_modes(streams):
    m = stack(p=.3)
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        assert drift(m, *streams) == drift(m.eval(), *streams)
