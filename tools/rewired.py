"""Which of timm's models can be rewired: `python tools/rewired.py` writes nbs/models/timm_rewired.csv, `--only vit_*`
prints some of it. Each model whose blocks have an attention and an MLP is made without memory (on the meta device) and
rewired. Of those that can be, one of each make (model class, block, layers in it) is then made small, and asked what
stands in `ASKED`. Fifteen minutes on two cores, 4 GB."""
import argparse, copy, csv, gc, inspect, sys, warnings
from pathlib import Path

import timm, torch
from torch import nn
import revvit
from revvit.core.memory import saved_bytes
from revvit.models.convert import RewiredStack

table = Path(__file__).resolve().parent.parent/'nbs'/'models'/'timm_rewired.csv'
columns = 'model','class','block','rewired','layers','error','kept','asked','why'
TINY = [o|dict(drop_path_rate=.2) for o in (
    dict(depth=3, embed_dim=48, num_heads=3), dict(depths=(2,2), embed_dim=24, num_heads=(2,4)),
    dict(depth=3, embed_dim=64, num_heads=4, num_kv_heads=None), dict(depth=3, embed_dim=64, num_heads=4),
    dict(depth=3, embed_dim=64, num_heads=4, num_kv_heads=(4,2,4)), dict(depth=3), {})] + [{}]
SIZES = dict(img_size=64),dict(img_size=112),{}
MOST = 6e7   # weights of a model that is compared

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
def blocks(m): return [b for s in stacks(m) for b in s._modules.values()]

def make_of(m):
    "What tells one make from another: the classes of the layers in the first block of each kind"
    first = {type(b).__name__: b for b in blocks(m)}
    return type(m).__name__,tuple((k,tuple(type(o).__name__ for o in b.modules())) for k,b in sorted(first.items()))

def look(name):
    "A row of the table, the make, and how many weights there are"
    with torch.device('meta'): m = timm.create_model(name)
    if not is_transformer(m): return None,None,0
    row,cls = dict(model=name, layers=0, error='', kept='', asked='', why='', block=''),type(m)
    row['class'] = f"{cls.__module__.split('.')[-1]}.{cls.__name__}"
    try: m = revvit.reversible(m)
    except (ValueError,RuntimeError) as e:
        return row|dict(rewired='no', why=str(e).removeprefix('nothing to rewire: ')),None,0
    names = sorted({f"{type(b).before.__module__.split('.')[-1]}.{type(b).__name__}" for b in blocks(m)})
    size = sum(p.numel() for p in m.parameters())
    return row|dict(rewired='yes', block=' '.join(names), layers=len(blocks(m))),make_of(m),size

class Large(Exception): 'A model that is too large to be compared'

def small(name):
    "How the model is made small, and images for it"
    for kw in TINY:
        for size in SIZES:
            torch.manual_seed(0)
            try:
                settings = dict(num_classes=5, **kw, **size)
                with torch.device('meta'): n = sum(p.numel() for p in timm.create_model(name, **settings).parameters())
                if n>MOST: raise Large('not compared: it cannot be made small')
                m = timm.create_model(name, **settings)
                chans,*_,side = m.pretrained_cfg.get('input_size', (3,224,224))
                side = size.get('img_size') or side
                x = torch.randn(2, chans, side, side, dtype=torch.float64)
                m.double().eval()(x)
                return settings,x
            except Exception as e: last = e
    raise last

def built(name, settings, **kw):
    "The model with weights as after some training: no scale is 1e-5"
    torch.manual_seed(0)
    m = timm.create_model(name, **settings, **kw).double()
    with torch.no_grad():
        for p in m.parameters(): p.add_(torch.randn_like(p), alpha=.05)
    return m

def flat(o):
    "Tensors in an output"
    if isinstance(o, torch.Tensor): return [o]
    return [t for v in (o.values() if isinstance(o, dict) else o) for t in flat(v)]

def step(m, x, on, call=None, **mode):
    "Outputs, and the gradients of all weights"
    m.zero_grad()
    m.set_reversible(on, **mode)
    torch.manual_seed(0)
    y = flat((call or m)(x))
    sum(o.square().sum() for o in y if o.requires_grad).backward()
    return [o.detach() for o in y],{n: p.grad for n,p in m.named_parameters() if p.grad is not None}

def far(m, x, call=None, only=None, **mode):
    "Largest relative error of outputs and gradients, all together, with rebuilt activations against stored ones"
    found = [step(m, x, on, call, **mode) for on in (False,True)]
    assert found[0][1].keys()==found[1][1].keys(), 'other weights have gradients'
    pairs = [[torch.cat([g.flatten() for n,g in grads.items() if only is None or n in only]) for _,grads in found],
             [torch.cat([o.flatten() for o in y]) for y,_ in found]]
    return max(float((b-a).norm()/a.norm()) for a,b in pairs)

# ---------------------------------------------------------------- what is asked of a small model

def gradients(name, settings, x):
    "The largest relative error of the blocks' gradients in float64, in training with drop path and in evaluation"
    m,error = revvit.reversible(built(name, settings), chunk=1),0.
    inner = {n for n,p in m.named_parameters() if any(p is o for s in stacks(m) for o in s.parameters())}
    for mode in (True,False):   # batch norm in the stem counts in training
        m.train(mode)
        error = max(error, *(far(m, x, only=inner, **dial) for dial in (dict(),dict(keep=.3))))
    assert error < 1e-6, f'gradients are {error:.0e} away'
    return f'{error:.0e}'

def kept(name, settings, x):
    "Bytes that one more block keeps"
    m = built(name, settings).float()
    x = x.float()
    for o in m.modules():
        if isinstance(o, timm.layers.DropPath): o.drop_prob = 0.
    few = copy.deepcopy(m)
    found = [revvit.reversible(o.train(), chunk=1) for o in (m,few)]
    for s in stacks(few):
        for k in list(s._modules)[1:]: del s._modules[k]
    more = len(blocks(m))-len(blocks(few))
    return round((saved_bytes(lambda: m(x), m)-saved_bytes(lambda: few(x), few))/more) if more else ''

def names(name, settings, x):
    "Names of weights and modules stay, and the plain model comes back with the bits it had"
    m = built(name, settings).eval()
    was,modules,want,kind = list(m.state_dict()),[n for n,_ in m.named_modules()],flat(m(x)),type(m)
    revvit.reversible(m, chunk=1)
    assert list(m.state_dict())==was and [n for n,_ in m.named_modules()]==modules, 'names changed'
    step(m, x, True)
    assert all(map(torch.equal, flat(revvit.plain(m)(x)), want)) and type(m) is kind, 'not the old bits'

def exact(name, settings, x):
    "In exact mode rebuilt activations give the bits of stored ones, outputs and gradients, in training"
    m = revvit.reversible(built(name, settings).float(), chunk=1).train()
    (y,grads),(out,others) = (step(m, x.float(), on, exact=True) for on in (False,True))
    assert all(map(torch.equal, y, out)), 'other outputs in exact mode'
    wrong = [n for n,g in grads.items() if not torch.equal(g, others[n])]
    assert not wrong, f'other bits in exact mode: {len(wrong)} gradients, as that of {wrong[0]}'

@torch.no_grad()
def deepcopy(name, settings, x):
    "A copy computes the same"
    m = revvit.reversible(built(name, settings)).eval()
    assert all(map(torch.equal, flat(copy.deepcopy(m)(x)), flat(m(x)))), 'a copy computes something else'

@torch.no_grad()
def close(a, b): return all(float((o-p).norm()) <= 1e-5*float(p.norm()) for o,p in zip(flat(a), flat(b), strict=True))

@torch.no_grad()
def export(name, settings, x):
    "torch.export in evaluation"
    m,x = revvit.reversible(built(name, settings).float()).eval(),x.float()
    assert close(torch.export.export(m, (x,)).module()(x), m(x)), 'what is exported computes something else'

@torch.no_grad()
def features(name, settings, x):
    "The head of the features is the answer"
    m = revvit.reversible(built(name, settings)).eval()
    assert close(m.forward_head(m.forward_features(x)), m(x)), 'the head of the features is not the answer'

def intermediates(name, settings, x):
    "Features from within: timm's shapes, the last one as it is, gradients"
    m = built(name, settings).eval()
    shapes = [o.shape for o in flat(m.forward_intermediates(x))]
    revvit.reversible(m, chunk=1)
    last,inner = m.forward_intermediates(x)
    assert [o.shape for o in flat((last,inner))]==shapes, 'intermediates have other shapes'
    assert close(last, m.forward_features(x)), 'the last intermediate is not forward_features'
    error = far(m, x, lambda x: m.forward_intermediates(x, intermediates_only=True))
    assert error < 1e-6, f'gradients of intermediates are {error:.0e} away'

def features_only(name, settings, x):
    "timm's wrapper for feature maps: its shapes and gradients"
    m = built(name, {k: v for k,v in settings.items() if k!='num_classes'}, features_only=True).eval()
    shapes = [o.shape for o in m(x)]
    revvit.reversible(m, chunk=1)
    assert [o.shape for o in m(x)]==shapes, 'feature maps have other shapes'
    error = far(m, x)
    assert error < 1e-6, f'gradients of feature maps are {error:.0e} away'

ASKED = names,exact,deepcopy,export,features,intermediates,features_only

def timm_too(ask, name, settings, x):
    "Does the model as timm makes it fail in the same way?"
    m = timm.create_model(name, **settings).eval()
    try:
        if ask is export: torch.export.export(m, (x.float(),))
        if ask is features: m.forward_head(m.double().forward_features(x))
        if ask is intermediates: m.double().forward_intermediates(x)
        if ask is features_only: timm.create_model(name, features_only=True).eval()
    except Exception: return True

def one_line(e): return ' '.join(f'{type(e).__name__}: {e}'.split())[:200]

def checked_as(name):
    "What is found of a model: the columns that its make shares"
    try: settings,x = small(name)
    except Large as e: return dict(why=str(e))
    try: found = dict(error=gradients(name, settings, x), kept=kept(name, settings, x))
    except Exception as e: return dict(why=one_line(e), rewired='fails')
    passed,faults,theirs = [],[],[]
    for ask in ASKED:
        gc.collect()
        try: ask(name, settings, x)
        except Exception as e:
            if timm_too(ask, name, settings, x): theirs.append(ask.__name__)
            else: faults.append(f'{ask.__name__}: {one_line(e)}')
        else: passed.append(ask.__name__)
    why = [*faults, *(f"not asked: {o}, which timm's own does not give" for o in theirs)]
    return found|dict(asked=' '.join(passed), why='; '.join(why), rewired='fails' if faults else 'yes')

# ----------------------------------------------------------------

def rows_of(pattern):
    "Rows, makes and sizes of the models without memory"
    for name in sorted({*entries(pattern)}):
        print(name, file=sys.stderr, flush=True)
        try: found = look(name)
        except Exception as e:
            why = 'not made without memory: '+one_line(e)
            found = dict(model=name, rewired='?', why=why),None,0
        if found[0] is not None: yield found

if __name__=='__main__':
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('--only', default='*', help='a pattern of model names; prints and writes nothing')
    only = parser.parse_args().only
    warnings.simplefilter('ignore')
    torch.set_num_threads(1)
    rows,smallest,checked = list(rows_of(only)),{},{}
    for row,make,size in rows:
        if make is not None: smallest[make] = min(smallest.get(make, (size,row['model'])), (size,row['model']))
    for make,(_,name) in smallest.items():
        checked[make] = checked_as(name)
        print(name, checked[make], file=sys.stderr, flush=True)
    found = [row | checked.get(make, {}) for row,make,_ in rows]
    if only!='*':
        print(*found, sep='\n')
        sys.exit()
    with open(table, 'w', newline='') as f:
        w = csv.DictWriter(f, columns, lineterminator='\n')
        w.writeheader()
        w.writerows(found)
