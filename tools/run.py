"""Run one notebook in its folder and store what it shows: `python tools/run.py nbs/core/00_coupling.ipynb`.
Slow cells run too; cells marked notest, and cuda where there is no GPU, keep the output they have.
Stops at the first error and then writes nothing."""
import sys
from pathlib import Path

import torch
from execnb.nbio import read_nb, write_nb
from execnb.shell import CaptureShell
from fastcore.xtras import working_directory
from nbdev.clean import nbdev_clean
from nbdev.process import extract_directives

def skip(cell):
    flags = extract_directives(cell, remove=False) if cell.cell_type == 'code' else {}
    return ('nbdev_export()' in cell.source or flags.get('eval:') == ['false'] or 'notest' in flags
            or 'cuda' in flags and not torch.cuda.is_available())

path = Path(sys.argv[1]).resolve()
nb,shell = read_nb(path),CaptureShell()
shell.run("import warnings; warnings.simplefilter('ignore', FutureWarning); warnings.simplefilter('ignore', DeprecationWarning)")
for cell in nb.cells:   # what shows nothing any more shall not keep what it once showed
    if cell.cell_type == 'code' and not skip(cell): cell.outputs = []
with working_directory(path.parent): shell.run_all(nb, exc_stop=True, preproc=skip)
write_nb(nb, path)
nbdev_clean.__wrapped__(str(path))
