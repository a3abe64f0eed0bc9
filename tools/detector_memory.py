"""Memory of one training step of Mask R-CNN: `python tools/detector_memory.py` writes nbs/results/detector_memory.csv.
revmvit_base_224, its activations rebuilt or stored, and timm's mvitv2_base as it is and with checkpoints, in torchvision's
heads with their defaults, for one image with 128 things and so as many masks as a step learns from at most; CPU, float32.
Every row is predicted by a dry run, in which the backbone and the pyramid allocate and do not compute; where that is at most
`--most` GB, and that much memory is free, the step is run and measured too. Rows that have been measured stay: called again,
it fills the gaps. An hour on one core. `--sides 96 --tiny` tries the lines."""
import argparse, csv, gc, math, os
from datetime import date
from functools import partial
from pathlib import Path

import timm, torch, torchvision
from torch import nn
from torchvision.models.detection import MaskRCNN
from torchvision.models.detection.anchor_utils import AnchorGenerator
from revvit.core.dry_run import DryRun
from revvit.core.memory import peak_bytes
from revvit.models.detector import PyramidBackbone

path = Path(__file__).resolve().parent.parent/'nbs'/'results'/'detector_memory.csv'
columns = 'model','way','side','weights','predicted','measured','torch','torchvision','timm','date'
ways = [('revmvit_base_224','reversible'),('revmvit_base_224','stored'),('mvitv2_base','checkpointed'),('mvitv2_base','plain')]

class Border(torch.autograd.Function):
    "What stands below allocates alone, what stands above computes: maps get numbers, gradients lose theirs"
    @staticmethod
    def forward(ctx, run, *maps):
        ctx.run = run
        with torch.utils._python_dispatch._disable_current_modes():
            for o in maps: o.data.normal_()   # without a new version, which the backward pass would refuse
        run.unfilled -= {o.untyped_storage()._cdata for o in maps}
        run.few = math.inf
        return tuple(o.view_as(o) for o in maps)
    @staticmethod
    def backward(ctx, *grads):
        ctx.run.few = DryRun.few
        ctx.run.unfilled |= {o.untyped_storage()._cdata for o in grads}
        return None, *grads

class Bordered(nn.Module):
    "A backbone behind a border"
    def __init__(self, body, run): super().__init__(); self.body,self.run,self.out_channels = body,run,body.out_channels
    def forward(self, x):
        self.run.unfilled.add(self.run.count(x).untyped_storage()._cdata)
        self.run.few = DryRun.few
        maps = self.body(x)
        return dict(zip(maps, Border.apply(self.run, *maps.values())))

def backbone(name, way, side, tiny):
    "Maps and pyramid of a model that goes back its way"
    small = dict(embed_dim=8, depth=4, stage_starts=(1,2,3)) if tiny and name.startswith('rev') else {}
    if tiny: name = name.replace('v2_base', 'v2_tiny')
    m = timm.create_model(name, num_classes=0, img_size=side, **small)
    if name.startswith('rev'): m.set_reversible(way=='reversible')
    else: m.set_grad_checkpointing(way=='checkpointed')
    return PyramidBackbone(m, 16 if tiny else 256)

def network(body, strides, side):
    "torchvision's Mask R-CNN with its own heads"
    anchors = AnchorGenerator(tuple((8*s,) for s in strides), ((.5,1.,2.),)*len(strides))
    return MaskRCNN(body, 81, min_size=side, max_size=side, rpn_anchor_generator=anchors).train()

def scene(side):
    "An image with 16 by 8 things"
    w,h = side//16,side//8
    boxes = torch.tensor([[w*i, h*j, w*i+w-1, h*j+h-1] for i in range(16) for j in range(8)], dtype=torch.float32)
    masks = torch.zeros(128, side, side, dtype=torch.uint8)
    for m,(x0,y0,x1,y1) in zip(masks, boxes.int().tolist()): m[y0:y1,x0:x1] = 1
    return torch.rand(3, side, side),dict(boxes=boxes, labels=1+torch.arange(128)%80, masks=masks)

def step(net, x, there): sum(net([x], [there]).values()).backward()

def made(name, way, side, tiny):
    torch.manual_seed(0)
    return (body := backbone(name, way, side, tiny)),body.strides

def measured(case):
    "Peak of a step above what lived before, which are weights, their gradients and the image"
    body,strides = made(*case)
    net = network(body, strides, case[2])
    for p in net.parameters(): p.grad = torch.zeros_like(p)
    return peak_bytes(partial(step, net, *scene(case[2])))

def predicted(case):
    "The same by a dry run, and the bytes of the weights"
    run = DryRun()
    body,strides = made(*case)
    net,there = network(Bordered(body, run), strides, case[2]),scene(case[2])
    for p in net.parameters(): p.grad = torch.zeros_like(p)
    with run:
        run.few = math.inf
        for t in (*net.parameters(), *net.buffers(), *(p.grad for p in net.parameters()), there[0], *there[1].values()): run.count(t)
        before = run.restart()
        step(net, *there)
    return run.peak.total()-before,sum(p.nbytes for p in net.parameters())

def room():
    "Bytes of memory that are free"
    return os.sysconf('SC_AVPHYS_PAGES')*os.sysconf('SC_PAGE_SIZE')

def rows(sides, most, tiny, known):
    versions = torch.__version__.split('+')[0],torchvision.__version__.split('+')[0],timm.__version__,date.today().isoformat()
    for side in sides:
        for way in ways:
            old = known.get((*way, str(side)))
            if old and old[5]: yield old; continue
            gc.collect()
            need,weights = predicted((*way, side, tiny))
            gc.collect()
            seen = measured((*way, side, tiny)) if need<=most*1e9 and need*1.2<room() else ''
            yield *way,side,weights,need,seen,*versions

def read():
    if not path.exists(): return {}
    with path.open(encoding='utf8', newline='') as f: return {tuple(o[:3]): o for o in list(csv.reader(f))[1:]}

def write(found):
    with path.open('w', newline='', encoding='utf8') as f: csv.writer(f, lineterminator='\n').writerows([columns, *found])

if __name__=='__main__':
    ask = argparse.ArgumentParser(description=__doc__)
    ask.add_argument('--sides', type=int, nargs='+', default=[512,768,1024], help='height and width of the image, in pixels')
    ask.add_argument('--most', type=float, default=9., help='GB (10^9 bytes) up to which a step is run')
    ask.add_argument('--tiny', action='store_true', help='small models, nothing written')
    said = ask.parse_args()
    torch.set_num_threads(1)
    known = {} if said.tiny else read()
    for o in rows(said.sides, said.most, said.tiny, dict(known)):
        print(*o, flush=True)
        known[tuple(map(str, o[:3]))] = o
        if not said.tiny: write(known.values())
