"What a repeated call rests on: PyTorch's private functions by name, autocast, and a device that answers later"
import re
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import pytest, torch
from torch import nn
import revvit
from revvit.core import self_check, state
from revvit.core.dial import chunk_size
from revvit.core.memory import peak_bytes
from revvit.core.replay import Call, check_repeatable, equal_parts, part_of
from revvit.core.state import Record

root = Path(__file__).resolve().parent.parent
source = (root/'revvit'/'core'/'state.py').read_text(encoding='utf8')
PRIVATE = re.findall(r"= private\('(torch[\w.]+)'\)", source)
PRIVATE += [f'torch._C._functorch.is_{o}batchedtensor' for o in ('','legacy_')]

@pytest.mark.parametrize('path', PRIVATE)
def test_a_private_function_that_is_gone_is_named(path, monkeypatch):
    assert state.private(path) is not None
    owner,name = path.rsplit('.', 1)
    monkeypatch.delattr(state.private(owner) if owner!='torch' else torch, name)
    words = f'revvit uses {path}, which PyTorch {torch.__version__} does not have'
    with pytest.raises(ImportError, match=re.escape(words)): state.private(path)

def test_private_functions_have_one_home():
    "No other module of the engine and its layers reaches into `torch._something`"
    wings = [p for o in ('core','models') for p in (root/'revvit'/o).glob('*.py') if p.name!='state.py']
    found = {p.name: re.findall(r'\btorch(?:\.\w+)*\.(?:_C\b|_fused\w+)', p.read_text(encoding='utf8')) for p in wings}
    assert not {k:v for k,v in found.items() if v}

@pytest.mark.parametrize('kind', ['cpu','cuda','mps','xpu','meta'])
def test_autocast_is_asked_for_once(kind):
    "Strict `torch.export` of PyTorch 2.11 cannot trace the question"
    with mock.patch('torch.amp.is_autocast_available', side_effect=AssertionError('asked again')):
        assert state.amp_dtype(torch.device(kind)) is None
        state.same_autocast(torch.device(kind))

def test_autocast_of_a_device_that_came_later():
    with mock.patch('torch.amp.is_autocast_available', return_value=False) as asked:
        assert state.amp_dtype(torch.device('xla')) is None
        assert asked.call_args.args==('xla',)

@pytest.mark.parametrize('device', ['cuda:0','cuda:1'])
def test_an_answer_is_awaited_on_its_own_device(device, monkeypatch):
    "The event stands behind the copy, whatever device is the current one"
    on = []
    class Event:
        def record(self, stream=None): on.append(stream or 'stream of cuda:0')
    kind = SimpleNamespace(Event=Event, current_stream=lambda d=None: f'stream of {d or "cuda:0"}')
    monkeypatch.setattr(torch, 'get_device_module', lambda d: kind)
    monkeypatch.setattr(self_check, '_waiting', [])
    real = torch.empty
    monkeypatch.setattr(torch, 'empty', lambda *a, pin_memory=False, **kw: real(*a, **kw))
    class There: # numbers on a device
        shape,dtype = (2,),torch.float32
    There.device = torch.device(device)
    with mock.patch.object(torch.Tensor, 'copy_', lambda *a, **kw: None): self_check._later(There(), str)
    assert on==[f'stream of {device}'] and len(self_check._waiting)==1

def test_chunks_of_a_device_that_is_no_cpu():
    assert chunk_size(torch.empty(256, 196, 1024, device='meta'))==2**29//64//1024//196

@pytest.mark.parametrize('m, words', [(torch.square,'f must be a module, got'),
                                      (lambda: torch.jit.trace(nn.Linear(2, 2), torch.ones(1, 2)),'scripted or traced'),
                                      (lambda: nn.Sequential(nn.LazyLinear(2)),'lazy module .0. that has no weights'),
                                      (lambda: nn.utils.spectral_norm(nn.Linear(2, 2)),'spectral norm')])
def test_what_cannot_be_repeated(m, words):
    with pytest.raises(ValueError, match=words): check_repeatable('f', m if m is torch.square else m())

@pytest.mark.parametrize('n, chunk', [(0,3),(1,3),(3,3),(5,2),(64,41),(7,1)])
def test_parts_are_equal_or_one_more(n, chunk):
    x = torch.arange(n)
    parts = equal_parts(n, chunk)
    assert torch.equal(torch.cat([part_of(x, o) for o in parts]), x)
    sizes = [len(part_of(x, o)) for o in parts]
    assert max(sizes)<=chunk and max(sizes)-min(sizes)<=1 or n==0
    if n<=chunk: assert parts==[slice(None)]

CHANGES = {
    "'0.bias' in f was changed": lambda m: m[0].bias.zero_(),
    'f was switched between train': lambda m: m[1].eval(),
    'layers of f were replaced': lambda m: m.__delitem__(1),
    'layers of f': lambda m: m.append(nn.ReLU())}

@pytest.mark.parametrize('words', CHANGES)
def test_a_call_that_would_be_another_is_refused(words):
    m = nn.Sequential(nn.Linear(2, 2), nn.Dropout(.1))
    call = Call(Record(m), 'f', torch.ones(3, 2), 2)
    with torch.no_grad(): CHANGES[words](m)
    with pytest.raises(RuntimeError, match=words): call.prepare([True]*2)

def test_a_gradient_is_no_change():
    m = nn.Linear(2, 2)
    call = Call(Record(m), 'f', torch.ones(3, 2), 2)
    m.weight.grad = torch.ones(2, 2)
    call.prepare([True]*2)

class Product(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, w):
        ctx.save_for_backward(x, w)
        return x@w.t()
    @staticmethod
    def backward(ctx, d):
        x,w = ctx.saved_tensors
        return d@w,d.t()@x

class Tail(nn.Module):
    "Both streams through a layer, in one of several ways"
    def __init__(self, kind):
        super().__init__()
        self.kind,self.fc,self.idle = kind,nn.Linear(16, 8),nn.Linear(2, 2)
        if kind=='hook': self.fc.weight.register_hook(lambda g: 2*g)
        if kind=='frozen': self.fc.bias.requires_grad_(False)
        if kind=='twice': self.more = self.fc
        if kind=='dropout': self.drop = nn.Dropout(.3)
        if kind=='embedding': self.table = nn.Embedding(3, 16, sparse=True)

    def forward(self, a, b):
        x = torch.cat((a,b), 1)
        if self.kind=='function': return Product.apply(x, self.fc.weight)+self.fc.bias
        if self.kind=='dropout': x = self.drop(x)
        if self.kind=='embedding': x = x*self.table(torch.zeros(len(x), dtype=torch.long))
        o = self.fc(x)
        return o*self.more(x).tanh() if self.kind=='twice' else o

KINDS = ['plain','hook','frozen','twice','dropout','embedding','function']

@pytest.mark.parametrize('kind', KINDS)
@pytest.mark.parametrize('images', [1,2,5,6])
def test_gradients_of_a_tail_in_parts(kind, images):
    "From the second part on they are added as they come, and are what ordinary autograd says"
    found = []
    for on in (True,False):
        torch.manual_seed(0)
        blocks = [revvit.ReversibleBlock(nn.Linear(8, 8), nn.Linear(8, 8))]
        seq,tail = revvit.ReversibleSequence(blocks, chunk=2).double(),Tail(kind).double()
        seq.set_reversible(on)
        x = torch.randn(images, 8, dtype=torch.float64)
        torch.manual_seed(1)
        seq(x, x, tail=tail).square().sum().backward()
        found.append({n:p.grad for m in (seq,tail) for n,p in m.named_parameters()})
    for n,g in found[1].items():
        if g is None: assert found[0][n] is None
        else: torch.testing.assert_close(found[0][n].to_dense(), g.to_dense())

def test_a_tail_in_parts_has_one_set_of_gradients():
    "Beside the sum there is one weight's gradient at a time, not all of them"
    tail = nn.Sequential(*(nn.Linear(512, 512) for _ in range(6)))
    class Fuse(nn.Module):
        def __init__(self): super().__init__(); self.layers = tail
        def forward(self, a, b): return self.layers(a+b)
    seq,fuse = revvit.ReversibleSequence([], chunk=2),Fuse()
    for p in fuse.parameters(): p.grad = torch.zeros_like(p)
    def peak(images):
        x = torch.randn(images, 512, requires_grad=True)
        return peak_bytes(lambda: seq(x, x, tail=fuse).sum().backward())
    one = tail[0].weight.nbytes
    assert peak(4)-peak(2) < 2*one   # six without it
