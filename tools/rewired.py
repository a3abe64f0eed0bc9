"""Which of timm's models can be rewired: `python tools/rewired.py` writes nbs/models/timm_rewired.csv, `--only vit_*` prints some of it.
Each model whose blocks have an attention and an MLP is made without memory (on the meta device) and rewired. Of those that
can be, one of each make (model class, block, layers in it) is then made small, in float64, and its gradients are compared with
stored activations, in training, with drop path; and made plain again it has to give its old bits. Ten minutes on two cores."""
import argparse, csv, inspect, sys, warnings
from pathlib import Path

import timm, torch
from torch import nn
import revvit
from revvit.models.convert import RewiredStack

table = Path(__file__).resolve().parent.parent/'nbs'/'models'/'timm_rewired.csv'
columns = 'model','class','block','rewired','layers','error','why'
TINY = [o|dict(drop_path_rate=.2) for o in (dict(depth=3, embed_dim=48, num_heads=3), dict(depths=(2,2), embed_dim=24, num_heads=(2,4)),
        dict(depth=3, embed_dim=64, num_heads=4, num_kv_heads=None), dict(depth=3, embed_dim=64, num_heads=4), dict(depth=3), {})] + [{}]

def entries(pattern):
    "Names of timm's models in the modules that know of attention and of MLPs"
    for module in timm.list_modules():
        if not hasattr(timm.models, module): continue   # ours
        source = inspect.getsource(getattr(timm.models, module))
        if 'attn' in source and 'mlp' in source and module!='mlp_mixer': yield from timm.list_models(pattern, module=module)

def is_transformer(m):
    "Has some module an attention and an MLP?"
    has = lambda o, word: any(word in n.lower() for n,_ in o.named_children())
    return any(has(o, 'attn') and has(o, 'mlp') for o in m.modules())

def stacks(m): return [o for o in m.modules() if isinstance(o, RewiredStack)]

def make_of(m):
    "What tells one make from another: the classes of the layers in the first block of each kind"
    first = {type(b).__name__: b for s in stacks(m) for b in s._modules.values()}
    return type(m).__name__,tuple((k,tuple(type(o).__name__ for o in b.modules())) for k,b in sorted(first.items()))

def look(name):
    "A row of the table, and the make"
    with torch.device('meta'): m = timm.create_model(name)
    if not is_transformer(m): return None,None
    row,cls = dict(model=name, layers=0, error='', why='', block=''),type(m)
    row['class'] = f"{cls.__module__.split('.')[-1]}.{cls.__name__}"
    try: m = revvit.reversible(m)
    except (ValueError,RuntimeError) as e: return row|dict(rewired='no', why=str(e).removeprefix('nothing to rewire: ')),None
    blocks = [b for s in stacks(m) for b in s._modules.values()]
    names = sorted({f"{type(b).before.__module__.split('.')[-1]}.{type(b).__name__}" for b in blocks})
    return row|dict(rewired='yes', block=' '.join(names), layers=len(blocks)),make_of(m)

class Large(Exception): 'A model that is too large to be compared'

def small(name):
    "The model at a small size, and images for it"
    for kw in TINY:
        for size in (dict(img_size=64),dict(img_size=112),{}):
            torch.manual_seed(0)
            try:
                with torch.device('meta'): n = sum(p.numel() for p in timm.create_model(name, num_classes=5, **kw, **size).parameters())
                if n>3e7: raise Large('not compared: it cannot be made small')
                m = timm.create_model(name, num_classes=5, **kw, **size).double()
                side = size.get('img_size') or m.pretrained_cfg.get('input_size', (3,224,224))[-1]
                x = torch.randn(2, m.pretrained_cfg.get('input_size', (3,))[0], side, side, dtype=torch.float64)
                m.eval()(x)
                return m,x
            except Exception as e: last = e
    raise last

def flat(o):
    "Tensors in an output"
    if isinstance(o, torch.Tensor): return [o]
    return [t for v in (o.values() if isinstance(o, dict) else o) for t in flat(v)]

def check(name):
    "Largest relative error of the gradients of a small model, rewired, against stored activations"
    m,x = small(name)
    with torch.no_grad():
        for p in m.parameters(): p.add_(torch.randn_like(p), alpha=.05)   # as after some training: no scale is 1e-5
    names,ref = list(m.state_dict()),flat(m(x))
    revvit.reversible(m, chunk=1)
    assert list(m.state_dict())==names, 'names changed'
    params = [p for s in stacks(m) for p in s.parameters()]
    def grads(on):
        m.zero_grad()
        m.set_reversible(on)
        torch.manual_seed(0)
        sum(o.square().sum() for o in flat(m(x)) if o.requires_grad).backward()
        return torch.cat([p.grad.flatten() for p in params if p.grad is not None])
    error = 0.
    for mode in (True,False): # batch norm in the stem counts in training
        m.train(mode)
        want = grads(False)
        error = max(error, float((grads(True)-want).norm()/want.norm()))
    again = flat(revvit.plain(m).eval()(x))
    assert mode or all(map(torch.equal, again, ref)) or any(isinstance(o, nn.BatchNorm2d) for o in m.modules()), 'not the old bits'
    return error

def write(rows, checked):
    "The table; what was found of one model of a make holds for the others"
    with open(table, 'w', newline='') as f:
        w = csv.DictWriter(f, columns, lineterminator='\n')
        w.writeheader()
        for row,make in rows: w.writerow(row | checked.get(make, {}))

def checked_as(name):
    "What is found of a model: the columns that its make shares"
    try: return dict(error=f'{check(name):.0e}', why='', rewired='yes')
    except Large as e: return dict(why=str(e))
    except Exception as e: return dict(error='', why=f'{type(e).__name__}: {e}'.splitlines()[0][:200], rewired='fails')

if __name__=='__main__':
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('--only', default='*', help='a pattern of model names; prints and writes nothing')
    only = parser.parse_args().only
    warnings.simplefilter('ignore')
    torch.set_num_threads(1)
    rows,checked = [],{}
    for name in sorted({*entries(only)}):
        print(name, file=sys.stderr, flush=True)
        try: row,make = look(name)
        except Exception as e: row,make = dict(model=name, rewired='?', why=f'not made without memory: {type(e).__name__}: {e}'.splitlines()[0][:200]),None
        if row is None: continue
        if make is not None and not checked.get(make, {}).get('rewired'): checked[make] = checked_as(name)
        rows.append((row, make))
        if only=='*': write(rows, checked)
        else: print(row | checked.get(make, {}))
