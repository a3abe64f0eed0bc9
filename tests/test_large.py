"""One image with more tokens than a block should work on at a time: its halves in pieces, in 8 streams at the peak,
with the gradients and the bits of the whole."""
import pytest, torch
from revvit.core.block import ReversibleBlock
from revvit.core.sequence import ReversibleSequence
from revvit.models.large import SplitAttention, SplitMlp
from revvit.models.layers import attention_half, mlp_half
from revvit.core.memory import peak_bytes
from revvit.core.testing import weighted_sum
from cases import *
from test_exact import AMP, amps, answers, equal, switch

pytestmark = [pytest.mark.skipif(DEVICE.type!='cpu', reason='elsewhere such an image is no large one'),
              pytest.mark.usefixtures('strict')]
TOKENS,DIM = 1700,24

def large(depth=2, b=2, drop_path=0., chunk=None, dtype=torch.float32, heads=4, make=None, **kw):
    "Blocks of the standard halves, and streams of images that are more than a chunk"
    torch.manual_seed(depth)
    halves = make or (lambda: (attention_half(DIM, heads, **kw),mlp_half(DIM)))
    m = used(ReversibleSequence([ReversibleBlock(*halves(), drop_path) for _ in range(depth)], chunk,
                                'large')).to(DEVICE, dtype)
    return m,streams(b, TOKENS, DIM, dtype=dtype)

@pytest.mark.parametrize('drop_path', [0.,.4])
@pytest.mark.parametrize('bias', [False,True])
def test_gradients_of_the_whole(bias, drop_path):
    m,xs = large(2, 3, drop_path, dtype=torch.float64, qkv_bias=bias)
    switch(m, False)
    want = answers(m, xs, None)
    switch(m, True)
    assert error(answers(m, xs, None), want) < 1e-12

@pytest.mark.parametrize('drop_path', [0.,.4])
@amps
def test_same_bits_as_stored(amp, drop_path):
    "One image and several, all weights and some of them frozen"
    for b,frozen in ((1,False),(3,True)):
        m,xs = large(2, b, drop_path)
        for p in list(m[1].parameters())[::2]: p.requires_grad_(not frozen)
        switch(m, False, exact=True)
        want = answers(m, xs, amp)
        switch(m, True, exact=True)
        assert equal(answers(m, xs, amp), want)

@pytest.mark.parametrize('exact', [False,True])
def test_eight_streams_at_the_peak(exact):
    """Of a whole Rev-ViT-S on 3,136 tokens, streams and their gradients included, the gradients of one block's
    weights left out"""
    torch.manual_seed(0)
    m = RevViT(img_size=896, depth=1, num_classes=2).to(DEVICE)
    m.set_reversible(True, exact=exact)
    x = torch.randn(1, 3, 896, 896, device=DEVICE)
    def step(): m(x).square().sum().backward()
    step()
    weights = sum(p.nbytes for p in m.blocks[0].parameters())
    assert (peak_bytes(step, DEVICE)-weights)/(4*3136*384) < 8

@pytest.mark.parametrize('b, chunk, tokens, want', [(1,None,1700,True), (2,None,1700,True), (2,1,1700,True),
                                                    (2,2,1700,False), (2,1,1600,False)])
def test_when_an_image_is_in_pieces(b, chunk, tokens, want, monkeypatch):
    "One image at a time, and more rows than the budget"
    (m,xs),used = large(1, b, chunk=chunk),set()
    for k in (SplitAttention,SplitMlp):
        monkeypatch.setattr(k, 'vjp', lambda self, *a, k=k, was=k.vjp: used.add(k) or was(self, *a))
    weighted_sum(m(*(x[:,:tokens].contiguous() for x in xs))).backward()
    assert used==({SplitAttention,SplitMlp} if want else set())

def test_no_double_backward_in_pieces():
    "Of the reference of the exact mode; without the grid there is one"
    m,xs = large(1, 1)
    xs = [x.requires_grad_() for x in xs]
    for exact in (True,False):
        switch(m, False, exact=exact)
        def first(): return torch.autograd.grad(weighted_sum(m(*xs)), xs, create_graph=True)
        if exact:
            with pytest.raises(RuntimeError, match='no double backward.*exact=False'): first()
        else: assert first()[0].requires_grad

def test_changed_weights_are_noticed():
    m,xs = large(1, 1)
    for on in (False,True):
        switch(m, on, exact=True)
        out = weighted_sum(m(*xs))
        with torch.no_grad(): m[0].g.fn.fc2.weight.add_(1)
        with pytest.raises(RuntimeError, match='modified|changed'): out.backward()
