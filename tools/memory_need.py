"""Is what `revvit.memory` says what a step takes? `python tools/memory_need.py` runs a training step of every registered model
and of three rewired ones at three batch sizes, and others in other settings, and writes what was predicted and what was
measured to nbs/use/memory_measured.csv. Twenty minutes on a CPU with 16 GB. With words, only rows that
hold them all, printed: `python tools/memory_need.py tiny bfloat16`."""
import csv, gc, sys
from functools import partial
from pathlib import Path

import timm, torch
import revvit
from revvit.core.memory import peak_bytes
from revvit.core.testing import tensors_of
from revvit.training.step_in_backward import step_early
from revvit.use.memory_need import turned

path = Path(__file__).resolve().parent.parent/'nbs'/'use'/'memory_measured.csv'
columns = 'model','batch_size','way','settings','predicted','measured','ratio'

sizes = dict(revvit_tiny_patch16_224=(2,5,16), revvit_small_patch16_224=(2,4,9), revvit_base_patch16_224=(1,3,8),
    revvit_large_patch16_224=(1,2,4), revmvit_tiny_224=(2,5,9), revmvit_base_224=(1,3,8),
    revmvit_tiny_16x4_224=(1,2,3), revmvit_base_16x4_224=(1,2))
rewired = dict(vit_tiny_patch16_224=(2,9,20), eva02_tiny_patch14_224=(2,5,9), vit_small_patch14_reg4_dinov2=(2,5,9))
others = [dict(optimizer='sgd'), dict(optimizer='momentum'), dict(step_in_backward=True), dict(keep=.3), dict(exact=True),
          dict(dtype='bfloat16'), dict(optimizer='none')]

def cases():
    "Model, batch size, way and settings of each row"
    for name,bs in sizes.items():
        for b in bs: yield name,b,'reversible',{}
    yield 'revmvit_base_16x4_224',4,'reversible',dict(img_size=112)   # the profiler's notes of 3 clips fill 12 GB
    for name,bs in rewired.items():
        more = dict(img_size=224) if 'dinov2' in name else {}
        for b in bs: yield name,b,'reversible',dict(rewire=True, **more)
        for way in ('checkpointed','plain'): yield name,bs[1],way,more
    for name in ('revvit_tiny_patch16_224','revmvit_tiny_224'):
        for way in ('checkpointed','plain'): yield name,5,way,{}
        for o in others: yield name,5,'reversible',o

def predicted(name, b, way, settings):
    return revvit.memory(name, b, device='cpu', **settings).ways[way].total

def measured(name, b, way, settings):
    "Weights, averages, batch and the peak of a step above them"
    s = dict(optimizer='adamw', dtype='float32', step_in_backward=False, rewire=False, keep=0., exact=None)|settings
    sizes = dict(img_size='img_size', frames='num_frames')
    args = {sizes[k]: v for k,v in s.items() if k in sizes}|s.get('model_args', {})
    m = timm.create_model(name, **args)
    m = turned(revvit.reversible(m) if s['rewire'] else m, way, s['keep'], s['exact']).train()
    make = dict(adamw=torch.optim.AdamW, sgd=torch.optim.SGD, momentum=partial(torch.optim.SGD, momentum=.9))
    opt = make[s['optimizer']](m.parameters(), lr=1e-4) if s['optimizer']!='none' else None
    if s['step_in_backward']: step_early(opt, m.parameters())
    chans,*frames,h,w = m.pretrained_cfg['input_size']
    frames = [s.get('frames', o) for o in frames]
    shape,amp = (chans,*frames,*getattr(getattr(m, 'patch_embed', None), 'img_size', (h,w))),getattr(torch, s['dtype'])
    def step(x):
        with torch.autocast('cpu', amp, enabled=amp!=torch.float32): out = m(x)
        loss = torch.nn.functional.cross_entropy(out.float(), torch.zeros(len(x), dtype=torch.long))
        del out
        loss.backward()
        if opt: opt.step()
        m.zero_grad()
    step(torch.randn(1, *shape))
    x = torch.randn(b, *shape)
    averages = tensors_of([[*o.values()] for o in opt.state.values()]) if opt else []
    own = [o.untyped_storage() for o in (*m.parameters(), *m.buffers(), *averages, x)]
    return sum({o.data_ptr(): o.nbytes() for o in own}.values())+peak_bytes(partial(step, x))

def row(case):
    gc.collect()
    name,b,way,settings = case
    p,m = predicted(*case),measured(*case)
    return dict(zip(columns, (name,b,way,' '.join(f'{k}={v}' for k,v in settings.items()),p,m,f'{p/m:.4f}')))

if __name__=='__main__':
    words,rows = sys.argv[1:],[]
    for c in cases():
        if not all(o in str(c) for o in words): continue
        rows.append(row(c))
        print(*rows[-1].values(), flush=True)
    if words: sys.exit()
    with path.open('w', newline='', encoding='utf8') as f:
        out = csv.DictWriter(f, columns, lineterminator='\n')
        out.writeheader()
        out.writerows(rows)
