"""Do the notebooks show what they say they show? Runs them as nbdev_test does and compares the outputs that are stored
with those that come now: their words, not their numbers, in which machines and versions differ. For people, not for CI:
what a model of ten seconds' training takes for what differs between processors too.
`python tools/outputs.py`, or with the paths of some notebooks."""
import os, re, sys
from pathlib import Path

from execnb.nbio import read_nb
from execnb.shell import CaptureShell
from fastcore.parallel import num_cpus, parallel
from fastcore.xtras import working_directory
from nbdev.config import get_config
from nbdev.process import extract_directives

root = Path(__file__).resolve().parent.parent
NUMBER = re.compile(r'0x[0-9a-f]+|[-+]?(?:\d[\d,]*\.?\d*|\.\d+)(?:e[-+]?\d+)?')

def skip(cell):
    "As nbdev_test does"
    if cell.cell_type != 'code' or 'nbdev_export()' in cell.source: return True
    flags = extract_directives(cell, remove=False)
    return flags.get('eval:') == ['false'] or flags.keys() & get_config().tst_flags.split()

def words(outputs):
    "What a cell shows, without numbers and the room that they take"
    said = []
    for o in outputs:
        if o.get('name') == 'stderr': continue   # never stored
        for kind,v in sorted(o.get('data', {'text': o.get('text', '')}).items()):
            if kind.startswith('image/'): said.append('a picture')
            elif kind != 'text/html': said.append(''.join(v))   # which says the same as text/plain
    return ' '.join(NUMBER.sub('#', '\n'.join(said)).replace('-', ' ').split())

def differing(path):
    "A line for each cell that shows other words than are stored"
    os.environ['IN_TEST'] = '1'
    nb = read_nb(path)
    cells = [o for o in nb.cells if not skip(o) and 'hide' not in extract_directives(o, remove=False)]
    stored = [words(o.get('outputs', ())) for o in cells]
    for o in cells: o.outputs = []
    with working_directory(path.parent): CaptureShell(path).run_all(nb, exc_stop=True, preproc=skip)
    pairs = [(o.id, was, words(o.outputs)) for o,was in zip(cells, stored)]
    return [f"{path.name}, cell {i}: stored {was!r}, now {now!r}" for i,was,now in pairs if was!=now]

if __name__ == '__main__':
    sys.path.insert(0, str(root))
    paths = [Path(o).resolve() for o in sys.argv[1:]] or sorted((root/'nbs').rglob('*.ipynb'))
    workers = min(num_cpus(), 8) if len(paths)>1 else 0
    import outputs   # this file, by a name that workers find: a notebook's shell takes the place of __main__
    found = [o for lines in parallel(outputs.differing, paths, n_workers=workers, pause=.01) for o in lines]
    if found: sys.exit('\n'.join(found) + '\nrun these notebooks with tools/run.py, and look at what changed')
    print(f'{len(paths)} notebooks show what they say')
