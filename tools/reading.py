"""How long the notebooks take to read: `python tools/reading.py` prints minutes of each, and sums.
200 words of prose, 10 lines of a module or 15 lines of other code a minute; hidden cells are not read."""
import json, re
from pathlib import Path

root = Path(__file__).resolve().parent.parent
wings = ['tutorials','core','data','models','training','use','results']
# From the idea to a trained model and what it answers, in the order of reading. The other notebooks are the workshop:
# they are looked up by whoever changes or uses that part
story = ['index', 'core/00_coupling', 'core/01_exact', 'core/04_dial', 'core/05_engine', 'core/07_sequence',
         'models/12_layers', 'models/14_vit', 'models/15_pooling', 'models/16_mvit', 'models/19_convert',
         'data/21_digits', 'training/30_recipes', 'training/32_learner', 'use/40_inference']
budgets = dict(core=120, all=420) # minutes for the story's part in core, and for all of it

def minutes(path):
    "How long the notebook at `path` takes"
    words,exported,other = 0,0,0
    for c in json.loads(Path(path).read_text(encoding='utf8'))['cells']:
        src = ''.join(c['source'])
        if c['cell_type'] == 'markdown': words += len(src.split())
        if c['cell_type'] != 'code' or '#| hide' in src: continue
        lines = sum(bool(l.strip()) and not l.startswith('#|') for l in src.splitlines())
        if re.search(r'^#\|\s*export', src, re.M): exported += lines
        else: other += lines
    return words/200 + exported/10 + other/15

def rounded(m):
    "To 5 minutes: a small edit shall not change what is shown"
    return max(5, 5*round(m/5))

def all_minutes():
    "By name, 'core/00_coupling'; the index, then wing by wing"
    paths = [root/'nbs/index.ipynb', *(p for w in wings for p in sorted((root/'nbs'/w).glob('[!._]*.ipynb')))]
    return {p.relative_to(root/'nbs').with_suffix('').as_posix(): minutes(p) for p in paths}

if __name__ == '__main__':
    found = all_minutes()
    for k,m in found.items(): print(f"{m:5.0f}  {'story' if k in story else '     '}  {k}")
    def total(name, keys): print(f'{sum(found[k] for k in keys):5.0f}  {name}')
    for w in wings: total(w, [k for k in found if k.startswith(f'{w}/')])
    total(f"the story's core, of {budgets['core']}", [k for k in story if k.startswith('core/')])
    total(f"the story, of {budgets['all']}", story)
    total('all', found)
