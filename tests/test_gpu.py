"""What only a GPU can show, and what the rest of the suite promises for a CPU, asked there: `REVVIT_DEVICE=cuda pytest
tests/test_gpu.py`. Every line runs on a CPU as well (`REVVIT_DEVICE=cpu`), so that a machine with a GPU finds them in
order; without that variable they wait."""
import os
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest, torch
import torch.distributed as dist
from fastai.vision.all import Callback
from torch.nn.parallel import DistributedDataParallel
from revvit.core.self_check import hear
from revvit.core.device import pick_device
from revvit.data.digits import digits_dls
from revvit.core.memory import peak_bytes, per_image
from revvit.training.recipes import recipes
from revvit.training.callbacks import NonFiniteError
from revvit.training.learner import learner
from cases import *

CUDA = DEVICE.type=='cuda'
there = pytest.mark.skipif('REVVIT_DEVICE' not in os.environ, reason='for a GPU: set REVVIT_DEVICE=cuda')
AMP = [None,torch.bfloat16,torch.float16]
amps = pytest.mark.parametrize('amp', AMP, ids=str)

def autocast(amp): return torch.autocast(DEVICE.type, amp or torch.bfloat16, enabled=amp is not None)
def finish():
    "Wait for the device, and for what it has to say"
    if CUDA: torch.cuda.synchronize()
    hear()

@pytest.fixture(autouse=True)
def _healthy(recwarn):
    "No self-check fires, here or after the device has answered"
    yield
    finish()
    said = [str(o.message) for o in recwarn if 'did not come back' in str(o.message)]
    assert not said, said

def rebuilt(m, xs, amp, seed=0):
    "What F and G of the first block read in the forward pass, and what when they are repeated"
    seen,b = {'f':[],'g':[]},blocks_of(m)[0]
    hooks = [getattr(b, n).register_forward_pre_hook(lambda _,args,n=n: seen[n].append(args[0].detach().clone()))
             for n in seen]
    with autocast(amp): loss = loss_of(m, xs, seed)
    loss.backward()
    for h in hooks: h.remove()
    halves = [(o[:len(o)//2], o[len(o)//2:][::-1]) for o in seen.values()]   # the last part is repeated first
    return [t for a,_ in halves for t in a],[t for _,b in halves for t in b]

@there
@amps
@both
def test_rebuilt_streams_have_the_same_bits(make, amp):
    "The first thing to look at: forward pass and repetition through the same kernels"
    m,xs = make(dtype=torch.float32)
    m.set_reversible(True, exact=True) if not isinstance(m, Tailed) else m.blocks.set_reversible(True, exact=True)
    first,again = rebuilt(m, xs, amp)
    assert first and same(again, first)

@there
@amps
@both
def test_gradients(make, amp):
    """Those of ordinary autograd on the same device, with dropout and drop path; the rest is the order in which a
    kernel adds"""
    m,xs = make(dtype=torch.float32)
    def run():
        with autocast(amp): loss = loss_of(m, xs)
        return torch.autograd.grad(loss, needing(m))
    if amp is None: return agrees(m, run, 1e-5)
    want = plain(m, run)
    noise = error(plain(m, lambda: grads(m, xs)), want)   # autocast's own
    assert error(run(), want) < .5*noise

@there
@few
def test_gradients_float64(make):
    m,xs = make()
    agrees(m, lambda: grads(m, xs), 1e-11)

@there
@few
def test_scaler(make):
    "Steps in float16 with a scaler follow those with stored activations, through an overflow"
    def run(on):
        m,xs = make(dtype=torch.float32)
        m.set_reversible(on)
        opt,scaler = torch.optim.SGD(m.parameters(), lr=1e-3),torch.amp.GradScaler(DEVICE.type, init_scale=2.**40)
        for step in range(25):
            with autocast(torch.float16): loss = loss_of(m, xs, step)
            scaler.scale(loss).backward()
            scaler.step(opt)
            scaler.update()
            opt.zero_grad()
        return [p.detach() for p in m.parameters()],scaler.get_scale()
    (got,scale),(want,wanted) = run(True),run(False)
    assert scale==wanted < 2.**40 and error(got, want) < 1e-3

@there
@both
def test_masks_and_generators(make):
    "Both modes drop the same, for every part, and leave all generators alike; the backward pass leaves them alone"
    m,xs = make(dtype=torch.float32)
    def run():
        torch.manual_seed(3)
        out = outputs(m(*xs))
        return out,rng_states()
    (got,state),(want,wanted) = run(),plain(m, run)
    assert state==wanted and error(got, want) < 1e-5
    weighted_sum(got).backward()
    assert rng_states()==wanted
    assert error(outputs(m(*xs)), want) > 1e-3   # there are masks

@contextmanager
def no_waiting():
    "PyTorch raises where the host waits for the device"
    if not CUDA: yield
    else:
        torch.cuda.set_sync_debug_mode('error')
        try: yield
        finally: torch.cuda.set_sync_debug_mode('default')

@there
@amps
@both
def test_a_step_waits_for_nothing(make, amp):
    "The second step: the first makes what is made once"
    m,xs = make(dtype=torch.float32)
    opt = torch.optim.AdamW(m.parameters(), lr=1e-4, fused=True)
    def step():
        with autocast(amp): loss = sum(o.float().square().mean() for o in outputs(m(*xs)))
        loss.backward()
        opt.step()
        opt.zero_grad()
    step()
    finish()
    with no_waiting(): step()

@there
@pytest.mark.parametrize('kind', [vit, partial(mvit, ())], ids=['vit','mvit'])
@pytest.mark.parametrize('amp', AMP[:2], ids=str)
def test_peak_for_one_more_image_does_not_grow_with_depth(kind, amp):
    def slope(depth):
        def measure(b):
            m,xs = kind(depth, 2, 0, dtype=torch.float32, b=b)
            def step():
                with autocast(amp): loss = weighted_sum(m(*xs))
                loss.backward()
            step()
            return peak_bytes(step, DEVICE)
        return per_image(measure, 16, 48)
    a,b = slope(2),slope(8)
    assert 0 < b < 1.05*a+512

@there
@few
def test_ddp(make):
    "One process, NCCL's if there is a GPU: gradients in buckets, twice"
    m,xs = make(rate=0, dtype=torch.float32)
    want = plain(m, lambda: grads(m, xs))
    dist.init_process_group('nccl' if CUDA else 'gloo', store=dist.HashStore(), rank=0, world_size=1)
    try:
        d = DistributedDataParallel(m, gradient_as_bucket_view=True)
        for _ in range(2):
            d.zero_grad()
            loss_of(d, xs).backward()
            assert error([p.grad for p in m.parameters()], want) < 1e-5
        del d
    finally: dist.destroy_process_group()

@there
@pytest.mark.parametrize('amp', ['auto','bf16','fp16','off'] if CUDA else ['auto','off'])
def test_learner(amp, tmp_path):
    "An epoch of training with mixup and a moving average ends with a checkpoint and a finite loss"
    r = replace(recipes['digits'], epochs=1, batch_size=256, warmup_epochs=0., mixup=.8, average=.9,
                model_args=dict(patch_size=4, embed_dim=32, num_heads=2, depth=2, drop_path_rate=.2))
    learn = learner(digits_dls(bs=256, device=pick_device(str(DEVICE))), r, out=tmp_path, amp=amp)
    with learn.no_bar(), learn.no_logging(): learn.fit(1)
    assert 0 < float(learn.recorder.losses[-1]) < 10 and (tmp_path/'checkpoint.pth').exists()

class Watch(Callback):
    "From the third step on nothing waits: the loader, all callbacks, the optimizer"
    order,run_valid = -30,False
    def before_batch(self):
        if self.train_iter==2 and CUDA: torch.cuda.set_sync_debug_mode('error')
    def after_train(self):
        if CUDA: torch.cuda.set_sync_debug_mode('default')

@there
@pytest.mark.parametrize('amp', ['bf16','off'] if CUDA else ['off'])
@pytest.mark.parametrize('workers', [0,2])
def test_learner_waits_for_nothing(workers, amp):
    r = replace(recipes['digits'], epochs=1, batch_size=128, warmup_epochs=0., mixup=.8, average=.9,
                model_args=dict(patch_size=4, embed_dim=32, num_heads=2, depth=2, drop_path_rate=.2))
    learn = learner(digits_dls(bs=128, workers=workers, device=pick_device(str(DEVICE))), r, amp=amp)
    try:
        with learn.no_bar(), learn.no_logging(): learn.fit(1, cbs=Watch())
    finally:
        if CUDA: torch.cuda.set_sync_debug_mode('default')
    assert learn.stop_on_non_finite.late==CUDA and len(learn.recorder.losses)==11
    assert all(torch.isfinite(o) for o in learn.recorder.losses)

@there
def test_learner_stops():
    "The device leaves out a bad step, and the host hears of it"
    r = replace(recipes['digits'], epochs=1, batch_size=128, warmup_epochs=0.,
                model_args=dict(patch_size=4, embed_dim=32, num_heads=2, depth=2))
    learn = learner(digits_dls(bs=128, device=pick_device(str(DEVICE))), r, amp='off')
    class Spoil(Callback):
        order,run_valid = -5,False
        def before_batch(self):
            if self.train_iter!=3: return
            self.before = [p.detach().clone() for p in self.model.parameters()]
            self.learn.xb = (self.xb[0].clone().index_fill_(0, torch.tensor([7], device=DEVICE), float('nan')),)
    with learn.no_bar(), learn.no_logging(), pytest.raises(NonFiniteError, match=r'step 4 \(epoch 1\): input 0 \(items '
        r'7 of the batch\)'): learn.fit(1, cbs=(spoil := Spoil()))
    assert same(list(learn.model.parameters()), spoil.before)

@pytest.mark.thorough
def test_these_tests_run(warm):
    "One case of each on the CPU, every test of this file: a GPU shall find no error but its own"
    which = '(vit3 or vit4 or test_learner or None-vit) and not torch.float16 and not these'
    code = 'import pytest, sys; sys.exit(pytest.main(sys.argv[1:]))'
    p = warm.run(['-c', code, '-q', '-n0', '-p', 'no:cacheprovider', __file__, '-k', which], Path.cwd(),
                 {**os.environ, 'REVVIT_DEVICE': 'cpu'})
    assert p.returncode==0 and ' skipped' not in p.stdout, p.stdout[-3000:]
