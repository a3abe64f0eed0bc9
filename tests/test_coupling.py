"What a coupling accepts and refuses, beside what its notebook shows"
import pytest, torch
from torch import nn
from torch.testing import assert_close
from revvit.core.coupling import call_checked, couple, uncouple

def half(d):
    torch.manual_seed(d)
    return nn.Sequential(nn.LayerNorm(d), nn.Linear(d, 2*d), nn.GELU(),
                         nn.Linear(2*d, d)).double().requires_grad_(False)

def streams(*shape):
    gen = torch.Generator().manual_seed(0)
    return torch.randn(2, *shape, dtype=torch.float64, generator=gen).unbind()

# ---------------------------------------------------------------- what F and G may do

answers = dict(promoted=(torch.float64, torch.Tensor.float, 'f returned (4, 3) float32'),
               smaller=(torch.float64, lambda x: x[:1], 'f returned (1, 3) float64'),
               scalar=(torch.float64, lambda x: x.sum(), 'f returned () float64'),
               elsewhere=(torch.float64, lambda x: x.to('meta'), 'f returned (4, 3) float64 on meta'),
               tuple=(torch.float64, lambda x: (x,None), 'f returned tuple'),
               in_place=(torch.float64, nn.ReLU(inplace=True), 'f changed its input in place'),
               in_part=(torch.float64, lambda x: x[0].zero_()+x, 'f changed its input in place'))
answers['promoted'] = (torch.bfloat16, *answers['promoted'][1:])   # a float32 answer on a bfloat16 stream

@pytest.mark.parametrize('kind', answers)
def test_an_answer_that_could_not_be_undone_is_refused(kind):
    dtype,f,said = answers[kind]
    with pytest.raises(ValueError) as e: call_checked(f, torch.ones(4, 3, dtype=dtype), 'f')
    assert said in str(e.value)

@pytest.mark.parametrize('way', [couple,uncouple])
@pytest.mark.parametrize('which', ['f','g'])
def test_both_ways_name_the_function(way, which):
    x1,x2 = streams(4, 3)
    def bad(x): return x.sum()
    with pytest.raises(ValueError, match=rf'^{which} returned \(\) float64'):
        way(x1, x2, *((bad,half(3)) if which=='f' else (half(3),bad)))

def test_a_narrower_answer_passes():
    assert call_checked(torch.Tensor.bfloat16, torch.ones(4, 3), 'f').dtype == torch.bfloat16

def test_inference_mode_counts_no_writes():
    with torch.inference_mode():
        assert_close(call_checked(torch.neg, torch.ones(2), 'f'), -torch.ones(2), rtol=0, atol=0)

# ---------------------------------------------------------------- streams

@pytest.mark.parametrize('way', [couple,uncouple])
@pytest.mark.parametrize('other', [lambda x: x[:1], torch.Tensor.float, lambda x: x.to('meta')],
                         ids=['shape','dtype','device'])
def test_streams_that_differ_are_refused(way, other):
    x1,x2 = streams(4, 3)
    with pytest.raises(ValueError, match=r'^streams differ: \(4, 3\) float64 on cpu and '):
        way(x1, other(x2), half(3), half(3))

@pytest.mark.parametrize('kind', ['odd','one','empty','strided'])
def test_shapes_and_layouts(kind):
    "R25: an odd number of channels, one image, none, memory that is not contiguous"
    x = streams(dict(odd=6, one=1, empty=0, strided=6)[kind], 7, 5)
    if kind=='strided':
        x = [o.transpose(1, 2).contiguous().transpose(1, 2) for o in x]
        assert not x[0].is_contiguous()
    y = couple(*x, half(5), half(5))
    assert [o.shape for o in y] == [o.shape for o in x]
    assert_close(uncouple(*y, half(5), half(5)), tuple(x), rtol=0, atol=1e-12)

def test_a_sample_that_is_not_a_number_stays_alone():
    "R26"
    x1,x2 = streams(6, 7, 5)
    bad = x1.clone()
    bad[0] = torch.nan
    for good,other in zip(couple(x1, x2, half(5), half(5)), couple(bad, x2, half(5), half(5))):
        assert other[0].isnan().all() and torch.equal(good[1:], other[1:])

class Coupled(nn.Module):
    def __init__(self): super().__init__(); self.f,self.g = half(3),half(3)
    def forward(self, x1, x2): return couple(x1, x2, self.f, self.g)

def test_export_for_any_batch():
    "R21"
    m,(x1,x2) = Coupled(),streams(4, 3)
    batch = {0:torch.export.Dim('batch')}
    exported = torch.export.export(m, (x1,x2), strict=False, dynamic_shapes=(batch,batch)).module()
    assert_close(exported(x1[:3], x2[:3]), m(x1[:3], x2[:3]), rtol=0, atol=1e-12)
