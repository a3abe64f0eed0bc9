"""Do notebooks and modules agree? Exports and cleans a copy of the project, and fails naming every file that this changes.
A module that no notebook makes is named too: the copy starts with no module but __init__.py."""
import os, shutil, sys, tempfile
from pathlib import Path
from nbdev.clean import nbdev_clean
from nbdev.doclinks import nbdev_export

root = Path(__file__).resolve().parent.parent

def contents(top):
    "The bytes of every notebook and module under `top`"
    paths = [*(top/'nbs').rglob('*.ipynb'), *(top/'revvit').rglob('*.py'), top/'pyproject.toml']
    return {p.relative_to(top).as_posix(): p.read_bytes() for p in paths if '.ipynb_checkpoints' not in p.parts}

before = contents(root)
with tempfile.TemporaryDirectory() as tmp:
    for o in before:
        if o.endswith('.py') and not o.endswith('__init__.py'): continue
        (Path(tmp)/o).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(root/o, Path(tmp)/o)
    shutil.copy(root/'settings.ini', tmp)
    os.chdir(tmp)
    nbdev_export.__wrapped__() # the bare functions: the commands would read this script's arguments
    nbdev_clean.__wrapped__()
    after = contents(Path(tmp))
    os.chdir(root)
differ = sorted(o for o in before.keys() | after.keys() if before.get(o) != after.get(o))
if not differ:
    print('notebooks and modules agree')
    sys.exit()
orphans = [o for o in differ if o not in after]
sys.exit(f"notebooks and modules disagree: {', '.join(differ)}; run nbdev_export and nbdev_clean"
         + (f", and remove what no notebook makes: {', '.join(orphans)}" if orphans else ''))
