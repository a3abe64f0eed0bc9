"""What the byte counters of `revvit.core.memory` count, by hand; and whether what a dry run predicts is what a step
takes"""
import copy, gc, json, sys, weakref
from functools import partial
from inspect import signature
from pathlib import Path
from unittest import mock

import pytest, timm, torch
from torch import nn
import revvit
from revvit.core.dial import stored_bytes
from revvit.core.dry_run import DryRun
from revvit.core.memory import live_bytes, live_trace, peak_bytes, per_image, saved_bytes
from revvit.training.progress import step_memory
from revvit.use import cli, memory_need
from revvit.use.memory_need import EightBitStates, Trial, largest_batch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent/'tools'))
import memory_need as tool   # predicts and measures

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

def test_measuring_leaves_nothing_behind():
    "Autograd hands a layer's result to the hook with its graph, which would hold itself"
    m = timm.create_model('revvit_tiny_patch16_224', img_size=32, embed_dim=32, num_heads=2, depth=1)
    half,x = m.blocks[0].f,torch.randn(2, 4, 32)
    def count(): return [saved_bytes(lambda: half(x), half, x), stored_bytes(m.blocks[0], x)]
    assert min(count())>0
    assert live_bytes(lambda: count() and None)==0

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

# ---------------------------------------------------------------- a dry run beside a real one

DEPTH = dict(model_args=dict(depth=4))   # all of them at full depth: in the slow test
STAGES = dict(img_size=64, model_args=dict(depth=4, stage_starts=(1,3)))
VIT,REWIRED = dict(img_size=64, **DEPTH),dict(rewire=True, img_size=56, **DEPTH)
SMALL = [('revvit_tiny_patch16_224', VIT), ('revmvit_tiny_224', STAGES),
    ('revmvit_tiny_16x4_224', dict(STAGES, frames=4)), ('vit_tiny_patch16_224', dict(rewire=True, **VIT)),
    ('eva02_tiny_patch14_224', REWIRED), ('vit_small_patch14_reg4_dinov2', REWIRED)]

@pytest.mark.parametrize('b', [2,9])
@pytest.mark.parametrize('name,settings', SMALL, ids=[o for o,_ in SMALL])
def test_what_is_predicted_is_measured(name, settings, b):
    assert .95 < float(tool.row((name,b,'reversible',settings))['ratio']) < 1.05

@pytest.mark.parametrize('settings', [*tool.others, dict(optimizer='momentum', step_in_backward=True)], ids=str)
def test_in_every_setting(settings):
    case = ('revvit_tiny_patch16_224',6,'reversible',dict(settings, img_size=64))
    assert .9 < float(tool.row(case)['ratio']) < 1.1

@pytest.mark.parametrize('name,size', [('revmvit_tiny_224', STAGES), ('vit_tiny_patch16_224', VIT), ('resnet18', {})],
                         ids=['revmvit_tiny_224','vit_tiny_patch16_224','resnet18'])
@pytest.mark.parametrize('way', ['checkpointed','plain'])
def test_the_other_ways(name, size, way):
    "Ours, timm's, and a network that is no transformer"
    assert .95 < float(tool.row((name,5,way,size))['ratio']) < 1.05

@pytest.mark.slow
@pytest.mark.parametrize('case', list(tool.cases()), ids=lambda o: '-'.join(map(str, o[:3]))+str(o[3] or ''))
def test_every_registered_model(case):
    "At full size; what was found stands in nbs/use/memory_measured.csv"
    assert .9 < float(tool.row(case)['ratio']) < 1.1

def test_every_registered_model_was_measured():
    "At three batch sizes or more, as were three rewired ones"
    rows = tool.path.read_text(encoding='utf8').splitlines()[1:]
    counts = {n: sum(o.startswith(f'{n},') and ',reversible,' in o for o in rows) for n in (*tool.sizes, *tool.rewired)}
    assert {*timm.list_models('rev*')}=={*tool.sizes} and min(counts.values())>=3
    assert all(.9 < float(o.split(',')[-1]) < 1.1 for o in rows)

def test_one_estimate_of_what_is_kept():
    "What a run says in its lines is what a dry run finds"
    m,x = timm.create_model('revvit_tiny_patch16_224', img_size=64, depth=3),torch.randn(6, 3, 64, 64)
    for on,said in zip((True,False), step_memory(m, x)):
        m.set_reversible(on)
        with DryRun() as run:
            net,y = copy.deepcopy(m),torch.randn(6, 3, 64, 64)
            before = run.now.total()
            out = net(y)
            found = run.now.total()-before
        assert found == live_bytes(lambda: m(x))
        assert found-out.nbytes == pytest.approx(said, rel=.01)   # the answer is the caller's

def test_nothing_of_the_callers_changes():
    m = timm.create_model('revvit_tiny_patch16_224', img_size=32, depth=2).eval()
    was,state = copy.deepcopy(m.state_dict()),torch.get_rng_state()
    revvit.memory(m, 4)
    assert all(torch.equal(v, was[k]) for k,v in m.state_dict().items()) and not m.training
    assert all(p.grad is None and not p._post_accumulate_grad_hooks for p in m.parameters())
    assert torch.equal(state, torch.get_rng_state()) and m.blocks.reversible

@pytest.mark.parametrize('settings', [{}, dict(optimizer='momentum', step_in_backward=True)], ids=['','in backward'])
def test_a_dry_run_leaves_nothing(settings):
    "Weights, their hooks and the optimizer must not hold each other, or who asks for many models runs out of memory"
    made = []
    def make():
        m = timm.create_model('revvit_tiny_patch16_224', img_size=32, depth=1)
        made.extend(map(weakref.ref, (m, *m.parameters())))
        return m
    Trial(make, (3,32,32), **settings).at(2)
    gc.collect()
    assert made and not [o() for o in made if o() is not None]

def test_a_name_and_its_module_need_the_same():
    def totals(*args, **kw): return {k: v.total for k,v in revvit.memory(*args, **kw).ways.items()}
    m,args = timm.create_model('vit_tiny_patch16_224', img_size=64, depth=2),dict(img_size=64, model_args=dict(depth=2))
    name = 'vit_tiny_patch16_224'
    assert totals(m, 4) == pytest.approx(totals(name, 4, **args), rel=1e-4)
    assert totals(revvit.reversible(m), 4) == pytest.approx(totals(name, 4, rewire=True, **args), rel=1e-4)

def test_rules_of_a_gpu():
    "Parts as large as half a gigabyte, and memory in pieces of 512 bytes"
    t = {o: Trial(lambda: timm.create_model('revvit_tiny_patch16_224', depth=2), (3,224,224), device=o)
         for o in ('cpu','cuda')}
    cpu,cuda = (t[o].at(64) for o in ('cpu','cuda'))
    assert cuda['half'] > 3*cpu['half'] and all(v%512==0 for v in cuda.values())

@pytest.mark.parametrize('memory,each', [(10**6,1000), (10**6,7), (999,1000), (5*10**8,10**6)])
def test_the_largest_batch(memory, each):
    best = largest_batch(lambda n: 500+each*n, memory)
    right = (memory-500)//each
    assert .99*right-1 <= best <= right

def test_the_states_of_an_8_bit_optimizer():
    optim = pytest.importorskip('torchao.optim')
    m = nn.Sequential(nn.Linear(64, 128), nn.Linear(128, 3))
    real,said = optim.AdamW8bit(m.parameters()),EightBitStates(m.parameters())
    m(torch.ones(1, 64)).sum().backward()
    said.step()
    for p in m.parameters():
        both = [real._new_buffer(p, o) for o in (True,False)]
        parts = [getattr(o, k) for o in both for k in ('codes','scale')] if hasattr(both[0], 'codes') else both
        assert sum(o.nbytes for o in said.state[p].values())==sum(o.nbytes for o in parts)

# ---------------------------------------------------------------- the command

@pytest.mark.thorough
def test_the_command_says_what_the_function_says(capsys, monkeypatch):
    "It asks the function, with all that the line says, and prints what that answers"
    asked,ask = [],memory_need.memory
    def noted(*args, **kw):
        asked.append((signature(ask).bind(*args, **kw), ask(*args, **kw)))
        return asked[-1][1]
    monkeypatch.setattr(memory_need, 'memory', noted)
    line = ('revmvit_tiny_16x4_224 --batch-size 3 --img-size 32 --frames 4 --classes 5 --dtype bfloat16 --optimizer '
            'momentum --step-in-backward --keep .2 --exact --memory 50MB --device cuda --json')
    assert cli.revvit_memory(line.split())==0
    (found,) = json.loads(capsys.readouterr().out)
    ((given,answer),) = asked
    given.apply_defaults()
    want = signature(ask).bind('revmvit_tiny_16x4_224', 3, 32, 4, None, 'bfloat16', 'momentum', .2, True, True,
                               memory=50e6, device='cuda', classes=5)
    want.apply_defaults()
    assert given==want and found==answer.to_dict() and found['memory']==50e6

def test_the_command_rewires(capsys):
    line = 'vit_tiny_patch16_224 deit_tiny_patch16_224 --rewire --no-exact --img-size 64 --device cpu'
    assert cli.revvit_memory(line.split())==0
    said = capsys.readouterr().out
    assert said.count('reversible') == 2 and said.count('together') == 2 and 'largest' not in said

@pytest.mark.parametrize('line,said', [
    ('no_such_model', "there is no model 'no_such_model' in timm"),
    ('revvit_smal_patch16_224', 'is it revvit_small_patch16_224'),
    ('revvit_tiny_patch16_224 --memory lots', "--memory must be like 24GB or 800MB, got 'lots'"),
    ('revvit_tiny_patch16_224 --memory 0', '--memory must be a number of bytes above 0'),
    ('revvit_tiny_patch16_224 --batch-size 0', '--batch-size must be 1 or more, got 0'),
    ('revvit_tiny_patch16_224 --img-size -16', '--img-size must be 1 or more, got -16'),
    ('revvit_tiny_patch16_224 --img-size 100', '100'),
    ('revvit_tiny_patch16_224 --frames 4', 'takes no num_frames'),
    ('revvit_tiny_patch16_224 --keep 2', 'keep is a share'),
    ('revvit_tiny_patch16_224 --dtype int8', '--dtype must be of float32, bfloat16, float16'),
    ('revvit_tiny_patch16_224 --optimizer adam', '--optimizer must be of adamw, adamw_8bit'),
    ('revvit_tiny_patch16_224 --optimizer none --step-in-backward', '--step-in-backward needs an optimizer'),
    ('revvit_tiny_patch16_224 --device tpu', "--device must be of cpu, cuda, got 'tpu'"),
    ('revvit_tiny_patch16_224 --rewire', 'reversible already'), ('resnet18 --rewire', 'nothing to rewire'),
    ('resnet18 --img-size 64', 'resnet18 takes no img_size'), ('', 'required: MODEL')], ids=str)
def test_what_the_command_refuses(line, said, capsys):
    code,(out,err) = cli.revvit_memory(line.split()),capsys.readouterr()
    assert (code, out) == (2, '') and err.count('\n')==1 and said in err, err
    assert err.startswith('revvit_memory: ')
