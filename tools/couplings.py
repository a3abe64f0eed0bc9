"""A coupling that stays near the pretrained function, beside the paper's: `python tools/couplings.py` writes
nbs/results/couplings.csv.
A small timm ViT learns scikit-learn's digits upright; its accuracy is measured at once with other couplings of the same
weights. Then each learns 200 digits turned by a quarter, and its weights are read as a plain ViT again. All activations are
stored here: whether they could be rebuilt changes nothing of the function. Five minutes on one core, for depths 8 and 24 and
three seeds; `--depth 2 --steps 2` tries the lines."""
import argparse, copy, csv, sys
from pathlib import Path

import timm, torch
from sklearn.datasets import load_digits
from torch import nn
import revvit

table = Path(__file__).resolve().parent.parent/'nbs'/'results'/'couplings.csv'
columns = 'depth','seed','coupling','upright','turned','plain'
NEAR = dict(rewired=None, half=.5, quarter=.25)   # of the older stream that stays

def coupled(m, coupling):
    "`m`, whose weights another coupling uses"
    if coupling!='plain': revvit.reversible(m, near=NEAR[coupling]).set_reversible(False)
    return m

def vit(depth):
    size = dict(img_size=8, patch_size=2, in_chans=1, embed_dim=32, num_heads=2)
    return timm.create_model('vit_base_patch16_224', depth=depth, num_classes=10, **size)

def fit(m, x, y, idxs, steps, bs, lr):
    "Train `m`"
    opt = torch.optim.AdamW(m.train().parameters(), lr=lr, weight_decay=.05)
    rate = torch.optim.lr_scheduler.OneCycleLR(opt, lr, total_steps=max(steps, 2))
    epochs = -(-steps*bs//len(idxs))
    for i in [i for _ in range(epochs) for i in idxs[torch.randperm(len(idxs))].split(bs)][:steps]:
        nn.functional.cross_entropy(m(x[i]), y[i]).backward()
        opt.step()
        opt.zero_grad()
        rate.step()
    return m

@torch.no_grad()
def right(m, x, y): return round(100*(m.eval()(x).argmax(1)==y).float().mean().item(), 1)

def rows(depth, seed, steps):
    "What is found at a depth from a seed"
    data = load_digits()
    up,y = torch.tensor(data.images, dtype=torch.float32)[:,None]/8-1,torch.tensor(data.target)
    turned = up.rot90(1, (2,3))
    train,held = torch.randperm(len(y), generator=torch.Generator().manual_seed(0)).split(1400)
    torch.manual_seed(seed)
    learned,few = fit(vit(depth), up, y, train, steps, 70, 2e-3),train[torch.randperm(len(train))[:200]]
    for coupling in ('plain',*NEAR):
        m = coupled(copy.deepcopy(learned), coupling)
        at_once = right(m, up[held], y[held])
        torch.manual_seed(seed)
        m.reset_classifier(10)
        tuned = right(fit(m, turned, y, few, steps//5, 20, 1e-3), turned[held], y[held])
        again = right(m if coupling=='plain' else revvit.plain(m), turned[held], y[held])
        yield dict(depth=depth, seed=seed, coupling=coupling, upright=at_once, turned=tuned, plain=again)

if __name__=='__main__':
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('--depth', type=int, help='this depth alone, printed and not written')
    parser.add_argument('--steps', type=int, default=500, help='steps on upright digits; a fifth of them on turned ones')
    args = parser.parse_args()
    torch.set_num_threads(1)
    depths = [args.depth] if args.depth else [8,24]
    with (sys.stdout if args.depth else open(table, 'w', newline='')) as f:
        w = csv.DictWriter(f, columns, lineterminator='\n')
        w.writeheader()
        for depth in depths:
            for seed in range(3):
                for row in rows(depth, seed, args.steps): w.writerow(row); f.flush()
