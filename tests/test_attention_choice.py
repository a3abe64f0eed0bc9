"Attention takes the same kernel in the forward pass, which has no graph, and in its repetition, which has one"
from contextlib import nullcontext
import pytest, torch
from torch import nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from revvit.core.self_check import set_self_check
from revvit.core.replay import Trained, as_trained
from revvit.core.block import ReversibleBlock
from revvit.core.sequence import ReversibleSequence

class Shortcut(nn.Module):
    "In eval mode, and where no gradient is wanted, PyTorch computes these by a kernel of their own"
    def __init__(self, kind):
        super().__init__()
        self.norm = nn.LayerNorm(16)
        if kind=='layer': self.layer = nn.TransformerEncoderLayer(16, 2, 32, 0., batch_first=True, norm_first=True)
        else: self.layer = nn.MultiheadAttention(16, 2, batch_first=True)
        self.kind = kind

    def forward(self, x):
        h = self.norm(x)
        return self.layer(h) if self.kind=='layer' else self.layer(h, h, h, need_weights=self.kind=='weights')[0]

@pytest.mark.parametrize('kind', ('layer','attention','weights'))
@pytest.mark.parametrize('chunk', (1,None))
def test_layers_with_a_shortcut_for_inference_come_back_to_the_bit(kind, chunk):
    "Fine-tuning in eval mode: with the shortcut forwards, streams are rebuilt wrongly, and the self-check says so"
    torch.manual_seed(0)
    m = ReversibleSequence([ReversibleBlock(Shortcut(kind), Shortcut(kind)) for _ in range(4)], chunk).eval()
    xs = torch.randn(2, 3, 7, 16, requires_grad=True)
    def answers(on):
        m.set_reversible(on, exact=True)
        ys = m(*xs)
        return [*ys, *torch.autograd.grad(sum((o**2).sum() for o in ys), [xs,*m.parameters()])]
    was = set_self_check('error')
    try: pairs = [*zip(answers(True), answers(False), strict=True)]
    finally: set_self_check(was)
    assert all(torch.equal(a, b) for a,b in pairs)

class Seen(TorchFunctionMode):
    "Whether attention is called with a graph"
    def __init__(self): super().__init__(); self.calls = []
    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        q = kwargs.get('query', args[0] if args else None)
        if func is F.scaled_dot_product_attention: self.calls.append(torch.is_grad_enabled() and q.requires_grad)
        return func(*args, **kwargs)

@pytest.mark.parametrize('named', (False,True))
@pytest.mark.parametrize('trained', (False,True))
def test_attention_chooses_as_if_differentiated(trained, named):
    q,k,v = torch.randn(3, 2, 2, 5, 8)
    with Seen() as seen, torch.no_grad(), Trained() if trained else nullcontext():
        args,kwargs = ((),dict(query=q, key=k, value=v)) if named else ((q,k,v),{})
        o = F.scaled_dot_product_attention(*args, **kwargs)
        other = torch.relu(q)
    assert seen.calls==[trained] and not (o.requires_grad or other.requires_grad or q.requires_grad)
    torch.testing.assert_close(o, F.scaled_dot_product_attention(q, k, v))

def test_where_the_choice_is_guided():
    "On any device but a CPU, and there for layers with a shortcut; a compiled half has kernels of its own"
    cpu,cuda = map(torch.device, ('cpu','cuda'))
    plain,short = nn.Linear(2, 2),nn.MultiheadAttention(4, 2)
    def guided(m, device): return isinstance(as_trained([*m.modules()], device), Trained)
    assert [guided(plain, cpu), guided(plain, cuda), guided(short, cpu)]==[False,True,False]
    assert guided(short.eval(), cpu)
    plain.compile()
    assert not guided(plain, cuda) and not guided(torch.compile(nn.Linear(2, 2)), cuda)
