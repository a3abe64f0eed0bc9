"Surgery on a half: is it still computed from its weights? 10_fused and 11_fused_pooling show a few kinds"
import pytest, torch
from timm.layers import Mlp
from torch import nn
from torch.nn.utils import parametrizations
from revvit.models.layers import attention_half, mlp_half
from revvit.models.pooling import HeadPool, PoolingAttention, PoolingHalf

mlp = {
    'nothing': (True, lambda h: None), 'eps': (True, lambda h: setattr(h.norm, 'eps', .1)),
    'no bias': (True, lambda h: setattr(h.fn, 'fc1', nn.Linear(12, 48, bias=False))),
    'hook': (False, lambda h: h.fn.fc2.register_forward_hook(print)),
    'own forward': (False, lambda h: setattr(h.fn.act, 'forward', torch.relu)),
    'dropout': (False, lambda h: setattr(h.fn.drop1, 'p', 1.)),
    'tanh': (False, lambda h: setattr(h.fn.act, 'approximate', 'tanh')),
    'adapter': (False, lambda h: setattr(h.fn, 'fc1', nn.Sequential(h.fn.fc1))),
    'double': (False, lambda h: h.double()),
    'weight norm': (False, lambda h: parametrizations.weight_norm(h.fn.fc1)),
    'compiled': (False, lambda h: h.compile())}
attention = {
    'nothing': (True, lambda h: None), 'plain formula': (False, lambda h: setattr(h.fn, 'fused_attn', False)),
    'normed queries': (False, lambda h: setattr(h.fn, 'q_norm', nn.LayerNorm(4)))}
pooling = {
    'nothing': (True, lambda h: None), 'eps': (True, lambda h: setattr(h.fn.pool_k.norm, 'eps', .1)),
    'hook': (False, lambda h: h.fn.pool_v.conv.register_forward_hook(print)),
    'no norm': (False, lambda h: setattr(h.fn.pool_k, 'norm', nn.Identity())),
    'pooled queries': (False, lambda h: setattr(h.fn, 'pool_q', HeadPool(8, (1,3,3), (1,1,1)))),
    'wide': (False, lambda h: setattr(h.fn.pool_k, 'conv', nn.Conv2d(8, 8, 5, 2, 2, groups=8, bias=False))),
    'circular': (False, lambda h: setattr(h.fn.pool_k.conv, 'padding_mode', 'circular')),
    'bias': (False, lambda h: setattr(h.fn.pool_k, 'conv', nn.Conv2d(8, 8, 3, 2, 1, groups=8))),
    'heads': (False, lambda h: setattr(h.fn, 'num_heads', 4)),
    'dropout': (False, lambda h: setattr(h.fn.attn_drop, 'p', .1)),
    'half double': (False, lambda h: h.fn.pool_v.double()),
    'own forward': (False, lambda h: setattr(h.fn, 'forward', lambda x: x)),
    'adapter': (False, lambda h: setattr(h.fn, 'proj', nn.Sequential(h.fn.proj)))}

def halves(kind):
    "A half, and a stream for it"
    pooled = PoolingHalf(16, PoolingAttention(16, 16, 2, (1,3,3), (1,2,2)))
    if kind is pooling: return pooled,torch.zeros(1, 1, 4, 4, 16)
    return (mlp_half(12) if kind is mlp else attention_half(12, 3)),torch.zeros(1, 2, 12)

@pytest.mark.parametrize('kind,change', [pytest.param(kind, o, id=f'{name}-{o}') for name,kind in
                                         dict(mlp=mlp, attention=attention, pooling=pooling).items() for o in kind])
def test_surgery_on_a_half(kind, change):
    (half,x),(fused,do) = halves(kind),kind[change]
    do(half)
    assert (half.fused(x) is not None) == fused

def test_a_class_that_was_patched_after_the_import(monkeypatch):
    was = Mlp.forward
    monkeypatch.setattr(Mlp, 'forward', lambda self, x: 2*was(self, x))
    half,x = halves(mlp)
    assert half.fused(x) is None
