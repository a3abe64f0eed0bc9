"""Several processes, R20: what they compute together is what one computes. `torchrun` starts this very file twice over
(Gloo, 127.0.0.1, float64); the first process writes what it found, and the tests read that."""
import gc, json, os, pickle, re, signal, subprocess, sys, time, warnings
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from unittest.mock import patch

import pytest, timm, torch
import revvit, revvit.training.resume
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from fastai.vision.all import Callback
from revvit.training.distributed import distribute, join_group, leave_group
from revvit.core.block import ReversibleBlock
from revvit.core.sequence import ReversibleSequence
from revvit.data.digits import digits_dls
from revvit.models.mvit import RevMViT
from revvit.training.resume import keep_state, states
from revvit.core.memory import saved_bytes
from revvit.training.recipes import recipes
from revvit.training.callbacks import NonFiniteError
from revvit.training.learner import learner
from revvit.models.convert import RewiredStack
from revvit.models.vit import RevViT

# ---------------------------------------------------------------- what each process does

def mlp(d=8): return nn.Sequential(nn.LayerNorm(d), nn.Linear(d, 2*d), nn.GELU(), nn.Linear(2*d, d))

class Stack(nn.Module):
    "A sequence of blocks whose two streams differ"
    def __init__(self, depth):
        super().__init__(); self.blocks = ReversibleSequence([ReversibleBlock(mlp(), mlp()) for _ in range(depth)])
    def forward(self, x): return sum(self.blocks(x, x.flip(1))).mean(1)

KINDS = dict(sequence=lambda depth=3: (Stack(depth), torch.randn(8, 3, 8)),
    vit=lambda depth=3: (RevViT(img_size=16, patch_size=8, embed_dim=16, num_heads=2, depth=depth, num_classes=5),
                         torch.randn(8, 3, 16, 16)),
    mvit=lambda depth=4: (RevMViT(img_size=32, embed_dim=8, depth=depth, stage_starts=(1,), num_classes=5),
                          torch.randn(8, 3, 32, 32)),
    rewired=lambda depth=3: (revvit.reversible(timm.create_model('vit_base_patch16_224', img_size=16, patch_size=8,
        embed_dim=16, num_heads=2, depth=depth, num_classes=5)), torch.randn(8, 3, 16, 16)))
DDP = dict(default={}, find_unused=dict(find_unused_parameters=True), static_graph=dict(static_graph=True),
           bucket_view=dict(gradient_as_bucket_view=True))

def made(kind, *depth):
    torch.manual_seed(0)
    m,x = KINDS[kind](*depth)
    return m.double(),x.double()
def part(x): return x.chunk(dist.get_world_size())[dist.get_rank()]
def loss(o): return o.square().sum(1).mean()
def grads(m):
    return torch.cat([(p.grad.full_tensor() if hasattr(p.grad, 'full_tensor') else p.grad).flatten()
                      for p in m.parameters()])
def alone(kind):
    m,x = made(kind)
    loss(m(x)).backward()
    return grads(m)
def error(m, ref): return float((grads(m)-ref).norm()/ref.norm())

def ddp(kind, ref):
    "Error of the averaged gradient, for each way to use DDP"
    for name,kw in DDP.items():
        m,x = made(kind)
        both = DistributedDataParallel(m, **kw)
        for _ in range(2): # a static graph is used from the second step on
            both.zero_grad()
            loss(both(part(x))).backward()
        yield name,error(m, ref)
    m,x = made(kind)
    both = DistributedDataParallel(m)
    for i,o in enumerate(part(x).chunk(2)):
        with both.no_sync() if i==0 else nullcontext(): (loss(both(o))/2).backward()
    yield 'no_sync',error(m, ref)

def stacks(m): return [s for s in m.modules() if isinstance(s, (ReversibleSequence,RewiredStack))]
def blocks(m): return [b for s in stacks(m) for b in s._modules.values()]
WRAPS = dict(root=lambda m: [m], sequences=lambda m: [*stacks(m), m], blocks=lambda m: [*blocks(m), m],
    halves=lambda m: [*(o for b in blocks(m) for o in ((b.attn, b.mlp) if hasattr(b, 'attn') else (b.f, b.g))), m],
    layers=lambda m: [*(o for b in blocks(m) for o in b.g.modules() if isinstance(o, nn.Linear)), m],
    tail=lambda m: [*([m.neck] if hasattr(m, 'neck') else []), m])

def fsdp(kind, ref):
    "Error of the gradient, or of what kind and with what words the wrapping was refused"
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.device_mesh import init_device_mesh
    mesh = init_device_mesh('cpu', (dist.get_world_size(),))
    for name,parts in WRAPS.items():
        m,x = made(kind)
        for o in parts(m): fully_shard(o, mesh=mesh)
        try:
            loss(m(part(x))).backward()
            yield name,error(m, ref)
        except Exception as e: yield name,f'{type(e).__name__}: {e}'
        dist.barrier()

def kept(kind):
    "Bytes that a forward pass under FSDP keeps at two depths, and the warnings about it"
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.device_mesh import init_device_mesh
    mesh = init_device_mesh('cpu', (dist.get_world_size(),))
    for name in ('root', 'sequences', 'blocks'):
        found = []
        for depth in (4, 8):
            m,x = made(kind, depth)
            for o in WRAPS[name](m): fully_shard(o, mesh=mesh)
            with warnings.catch_warnings(record=True) as heard:
                warnings.simplefilter('always')
                loss(m(part(x))).backward() # the first pass makes what is made once
            said = [str(o.message) for o in heard if 'stores' in str(o.message)]
            found.append((saved_bytes(lambda: loss(m(part(x)))), said))
            dist.barrier()
        yield name,found

small = replace(recipes['digits'], epochs=3, batch_size=256, warmup_epochs=1, average=.9, mixup=.8,
                model_args=dict(patch_size=4, embed_dim=16, num_heads=2, depth=2, drop_path_rate=.2))
class Stop(Callback):
    order = 90
    def after_batch(self):
        if self.train_iter==8: raise KeyboardInterrupt
class Poison(Callback):
    "A NaN in one process only"
    order = 40
    def before_batch(self):
        if self.training and self.train_iter==2 and dist.get_rank()==1: self.learn.xb = (self.xb[0]*float('nan'),)

def fit(out, *cbs, **when):
    world = dist.get_world_size()
    learn = learner(digits_dls(bs=256//world, device='cpu', rank=dist.get_rank(), world=world), small, out=out, seed=2)
    distribute(keep_state(learn, resume=True, **(when or dict(every=2))))
    with learn.no_bar(), learn.no_logging(), learn.added_cbs(cbs):
        try: learn.fit(small.epochs)
        except KeyboardInterrupt: pass
    return learn

def resumed(out, **when):
    "Do a run in one piece and one in two end with the same bits, here and in the other process?"
    with patch('revvit.training.distributed.DistributedDataParallel', wraps=DistributedDataParallel) as ddp:
        straight = fit(out/'straight')
    fit(out/'broken', Stop(), **when)
    dist.barrier()
    sent,send = [],dist.broadcast_object_list
    def measured(box, *args, **kw):
        sent.append(len(pickle.dumps(box)))
        return send(box, *args, **kw)
    with patch('torch.distributed.broadcast_object_list', measured): again = fit(out/'broken', **when)
    mine = [*straight.model.state_dict().values(), *again.model.state_dict().values()]
    box = [mine]
    dist.broadcast_object_list(box)
    n = len(mine)//2
    same = (all(map(torch.equal, mine[:n], mine[n:])) and all(map(torch.equal, mine, box[0]))
            and straight.recorder.values == again.recorder.values)
    torch.manual_seed(0)
    draws = [None]*2
    dist.all_gather_object(draws, float(straight.recorder.losses[-1]))
    return dict(same=same, wraps=ddp.call_count, view=ddp.call_args.kwargs.get('gradient_as_bucket_view'), sent=sent,
                log=len((out/'broken'/'history.csv').read_text().splitlines()),
                files=sorted(o.name for o in (out/'broken').iterdir()), loss=draws)

def main(what, out):
    torch.set_num_threads(1)
    gc.collect()
    gc.freeze()   # what is kept is counted after a collection: not through all that was imported
    join_group(minutes=2)
    try:
        if what == 'poison': return fit(out, Poison())
        found = {f'{test.__name__} {kind} {name}': e for kind in KINDS for test in (ddp, fsdp) for name,
                 e in test(kind, alone(kind))}
        found |= {f'kept {kind} {name}': o for kind in KINDS for name,o in kept(kind)}
        found['resume'] = resumed(out)
        # a clock that stands still; it is not looked at
        if dist.get_rank(): revvit.training.resume.monotonic = lambda: 0.
        found['minutes'] = resumed(out/'minutes', minutes=1e-5)
        if not dist.get_rank(): (out/'found.json').write_text(json.dumps(found))
    finally: leave_group()

# ---------------------------------------------------------------- the tests

env = {**os.environ, 'OMP_NUM_THREADS': '1', 'CUDA_VISIBLE_DEVICES': ''}
def torchrun(*args, seconds=240):
    "Run this file in two processes: exit status, error stream, and whether any process was left"
    words = [sys.executable, '-W', 'ignore', '-m', 'torch.distributed.run', '--standalone', '--nproc_per_node', '2',
             __file__, *map(str, args)]
    p = subprocess.Popen(words, env=env, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
                         start_new_session=True)
    try: err = p.communicate(timeout=seconds)[1]
    finally:
        end,left = time.monotonic()+10,True
        while left and time.monotonic() < end:
            try: os.killpg(p.pid, 0)
            except ProcessLookupError: left = False
            time.sleep(.1)
        if left: os.killpg(p.pid, signal.SIGKILL)
    return p.returncode, err, left

pytestmark = pytest.mark.skipif(not hasattr(os, 'killpg') or not dist.is_available(), reason='needs process groups')

@pytest.fixture(scope='module')
def found(tmp_path_factory):
    out = tmp_path_factory.mktemp('two')
    code,err,left = torchrun('all', out)
    assert code == 0 and not left, err[-3000:]
    return json.loads((out/'found.json').read_text())

@pytest.mark.parametrize('kind', KINDS)
@pytest.mark.parametrize('way', [*DDP, 'no_sync'])
def test_R20_ddp_gives_the_gradient_of_one_process(found, kind, way): assert found[f'ddp {kind} {way}'] < 1e-12

@pytest.mark.parametrize('kind', KINDS)
@pytest.mark.parametrize('wrap', ['root', 'sequences', 'blocks'])
def test_R20_fsdp_of_the_model_and_of_whole_blocks_is_exact(found, kind, wrap):
    assert found[f'fsdp {kind} {wrap}'] < 1e-12

@pytest.mark.parametrize('kind', KINDS)
@pytest.mark.parametrize('wrap', ['root', 'sequences'])
def test_fsdp_of_the_model_or_of_sequences_keeps_the_saving(found, kind, wrap):
    "Four blocks more keep nothing more but their bookkeeping"
    (four,said),(eight,too) = found[f'kept {kind} {wrap}']
    assert eight-four <= 4*1000 and not said and not too, (four, eight, said)

@pytest.mark.parametrize('kind', KINDS)
def test_fsdp_of_single_blocks_says_what_it_stores(found, kind):
    "Each block by its number, with a way out; what is said is what is kept"
    (four,said4),(eight,said8) = found[f'kept {kind} blocks']
    n = 4 if kind!='mvit' else 3 # its transition is no block
    assert len(said4)==n and len(said8)==n+4
    assert all(re.match(r'block \d+ goes by ordinary autograd, because fully_shard was called on it \(call it on the '
                        r'whole sequence instead\): it stores', o) for o in said4+said8)
    mb = [float(re.search(r'stores ([\d.e+-]+) MB', o)[1]) for o in said8]
    assert eight-four > 4*1000 and eight > .9e6*sum(mb)

@pytest.mark.parametrize('kind,wrap', [(k, w) for k in KINDS for w in ('halves', 'layers', 'tail')
                                       if (k, w) not in (('sequence','tail'), ('rewired','tail'))])
def test_R20_fsdp_inside_a_block_is_refused_with_a_remedy(found, kind, wrap):
    "A half on its own would free its weights before they are needed again"
    said = found[f'fsdp {kind} {wrap}']
    assert isinstance(said, str) and 'set_reversible(False)' in said, said

@pytest.mark.parametrize('when', ['resume', 'minutes'])
def test_R33_two_processes_stopped_and_resumed_end_with_the_same_bits(found, when):
    "States by steps, and by the first process's clock while the other's stands still"
    assert found[when]['same'] and found[when]['log'] == 4
    assert found[when]['loss'][0] == found[when]['loss'][1]
    # and no trace of the other process
    assert found[when]['files'] == ['checkpoint.pth', 'history.csv', 'state-2-4.pth', 'state-3.pth']

def test_one_wrapper_a_fit_and_no_state_in_a_pickle(found):
    """Three epochs share their gradient buckets; a resumed run's state is read by each process, and only its path is
    sent"""
    assert (found['resume']['wraps'], found['resume']['view']) == (1, True)
    assert found['resume']['sent'] and max(found['resume']['sent']) < 2000

@pytest.mark.thorough
def test_R26_a_nan_in_one_process_stops_all(tmp_path):
    "With its own sentence, a failing exit status, the states from before, and no process left"
    code,err,left = torchrun('poison', tmp_path, seconds=120)
    assert code and not left
    assert 'step 3 (epoch 1): input 0' in err and 'is not finite' in err, err[-3000:]
    assert [o.name for o in states(tmp_path)] == ['state-0-2.pth']

if __name__ == '__main__':
    main(sys.argv[1], Path(sys.argv[2]))
    # after FSDP, PyTorch's own threads now and then abort a process that is done and only has to end ("terminate called
    # without an active exception")
    os._exit(0)
