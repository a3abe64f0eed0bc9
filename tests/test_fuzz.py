"""Two hundred of the fuzzer's cases, fifty of them in a run of the whole suite, five hundred with the slow tests
(`fuzz.py`; `tools/fuzz.py` runs as many as one likes), and that it would see a fault"""
import warnings

import pytest, torch
import fuzz
from apart import Book
from revvit.core.sequence import ReversibleSequence

CASES,PARTS = 520,20
parts = [*range(8), *(pytest.param(i, marks=pytest.mark.slow) for i in range(8, PARTS))]   # a sample of a sample

@pytest.mark.filterwarnings('ignore')
@pytest.mark.parametrize('part', parts)
def test_no_case_is_wrong_without_a_word(part):
    kinds,faults = fuzz.run(0, range(part, CASES, PARTS))
    assert not faults, '\n'.join(map(fuzz.recipe, faults))
    assert kinds['exact'] > sum(kinds.values())/2 # and not refused

@pytest.mark.filterwarnings('ignore')
def test_a_case_is_the_same_each_time():
    for i in range(12):
        a,b = (fuzz.build(1, i, False, Book())[0] for _ in range(2))
        assert a.words==b.words and all(map(torch.equal, a.xs, b.xs))
        assert all(map(torch.equal, a.model.parameters(), b.model.parameters()))
        assert ([k for k,_ in a.model.named_parameters()]==[k for k,_ in fuzz.build(1, i, True,
            Book())[0].model.named_parameters()])

def broken(kind, old):
    "A sequence that is wrong in a way that only gradients, or only None, or only outputs show"
    class Wrong(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x): return x.clone()
        @staticmethod
        def backward(ctx, d): return d*(1+1e-8)
    def forward(self, x1, x2, tail=None):
        if kind=='gradient': return old(self, Wrong.apply(x1), x2, tail)
        if kind=='output': return old(self, x1*(1+1e-8), x2, tail)
        return old(self, x1, x2.detach(), tail)
    return forward

@pytest.mark.filterwarnings('ignore')
@pytest.mark.parametrize('kind', ['gradient','output','detached'])
def test_the_fuzzer_sees_a_fault_of_one_part_in_a_hundred_million(kind, monkeypatch):
    tried = [fuzz.case(2, i, []) for i in range(40)] # the nets alone, nothing done to them
    healthy = [v.index for v in tried if v.kind=='exact' and not v.said][:10]
    monkeypatch.setattr(ReversibleSequence, 'forward', broken(kind, ReversibleSequence.forward))
    seen = [v.kind for v in (fuzz.case(2, i, []) for i in healthy)]
    assert seen.count('silent') >= 8, seen # not those in float32, or whose stream has no gradient
