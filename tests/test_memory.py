"What the byte counters of `revvit.core.memory` count, by hand"
from functools import partial
from unittest import mock

import pytest, torch
from torch import nn
from revvit.core.memory import live_bytes, live_trace, peak_bytes, per_image, saved_bytes

@pytest.fixture
def x(): return torch.randn(1000, requires_grad=True)

def fingers(device='cpu'):
    a,b = (torch.empty(n, device=device) for n in (1000,500))   # 4,000 and 6,000 bytes
    del a                                                       # 2,000
    return torch.empty(250, device=device)                      # 3,000, and 1,000 when b has gone

def test_what_was_there_before_is_left_out(x):
    w = torch.randn(1000, requires_grad=True)
    def times(): return x*w
    assert [saved_bytes(times, *known) for known in ((),(x,),([x,w],),(nn.ParameterList([x]),))]==[8000,4000,0,4000]

def test_the_release_of_older_memory_is_left_out():
    old = [torch.empty(1000)]
    def swap(): old.append(torch.empty(500)); old.pop(0)
    assert [live_trace(swap) for _ in range(2)]==[[0,2000]]*2

def test_peak_and_rest(x):
    def exp_sin(): return x.exp().sin()
    def summed(): return exp_sin().sum()
    found = [f(o) for o in (fingers,exp_sin,summed) for f in (peak_bytes,live_bytes)]
    assert found==[6000,1000, 8000,8000, 8004,4004]

def test_gradient_buffers_are_counted_once():
    net,data = nn.Sequential(*(nn.Linear(64, 64) for _ in range(4))),torch.randn(2, 64)
    def step(): net(data).sum().backward()
    params = 4*sum(p.numel() for p in net.parameters())
    assert [live_bytes(step), live_bytes(step)]==[params,0]
    later = peak_bytes(step)
    net.zero_grad(set_to_none=True)
    assert peak_bytes(step)-later > .7*params

def test_on_a_gpu_that_is_pretended():
    fakes = dict.fromkeys(('synchronize','reset_peak_memory_stats'), mock.Mock())
    fakes['memory_allocated'] = mock.Mock(side_effect=[100,130]*2)
    fakes['max_memory_allocated'] = mock.Mock(return_value=250)
    with mock.patch.multiple(torch.cuda, **fakes):
        assert [peak_bytes(fingers, 'cuda:0'), live_bytes(fingers, 'cuda')]==[150,30]

@pytest.mark.skipif(not torch.cuda.is_available(), reason='needs a GPU')
def test_on_a_gpu():
    "Whose allocator rounds up to 512 bytes"
    run = partial(fingers, 'cuda')
    assert [peak_bytes(run, 'cuda'), live_bytes(run, 'cuda')]==[4096+2048,1024]

def test_a_slope_needs_two_sizes():
    assert per_image(lambda b: 100+7*b, 2, 6)==7
    with pytest.raises(ValueError, match='want b1 < b2, got 4 and 4'): per_image(len, 4, 4)
