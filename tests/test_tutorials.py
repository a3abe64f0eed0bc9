"""Tutorials run as they are read: each from its first cell to its last, and each program that is meant to be pasted by
itself, in a process and an empty folder of its own. Models and training are made small around the code, which is not
changed. That the full ones learn what they should is asserted in the notebooks, so an assertion may fail here."""
import json, os, re
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

root = Path(__file__).resolve().parent.parent
tutorials = sorted((root/'nbs'/'tutorials').glob('*.ipynb'))
name = lambda p: p.stem
READ = 'fine_tune_images','fine_tune_pretrained','train_clips'

def cells(path, kind):
    return [''.join(c['source']) for c in json.loads(path.read_text(encoding='utf8'))['cells']
            if c['cell_type'] == kind]

# ---------------------------------------------------------------- what is pasted

pasted = [pytest.param(path, code, id=f'{path.stem}-{i}') for path in tutorials for i,
          code in enumerate(re.findall(r'^```python\n(.*?)^```', '\n'.join(cells(path, 'markdown')), re.M|re.S))]

small_models = '''
import sys, timm, torch
torch.set_num_threads(1)
from timm.models import create_model
def small(name, **kw):
    "The model of that name, narrow and for small images"
    clips = dict(num_frames=4, img_size=32, embed_dim=8, depth=2, stage_starts=(1,))
    less = clips if '16x4' in name else dict(img_size=32, embed_dim=12, num_heads=2, depth=2)
    if 'mvit' in name: less['stage_starts'] = (1,)
    return create_model(name, **{**less, **kw})
timm.create_model = small
import revvit
from functools import partial
revvit.detector = partial(revvit.detector, box_dim=32, mask_layers=(8,))
'''

def write_data(folder, warm):
    "The folders and files that the programs name: photographs, things to detect, videos, published weights"
    rng = np.random.RandomState(0)
    for part,n in (('train',32), ('val',3)):
        for c in ('cat','dog'):
            (folder/'photos'/part/c).mkdir(parents=True)
            for i in range(n):
                Image.fromarray(rng.randint(0, 255, (40,48,3), np.uint8)).save(folder/'photos'/part/c/f'{i}.jpg')
    for part,n in (('train',4), ('val',1)):
        (folder/'things'/part).mkdir(parents=True)
        for i in range(n):
            Image.fromarray(rng.randint(0, 255, (40,48,3), np.uint8)).save(folder/'things'/part/f'{i}.jpg')
        images = [dict(id=i, file_name=f'{i}.jpg', height=40, width=48) for i in range(n)]
        found = [dict(id=i, image_id=i, category_id=1, bbox=[8,8,20,20], segmentation=[[8,8,28,8,28,28,8,28]])
                 for i in range(n)]
        content = dict(images=images, annotations=found, categories=[dict(id=1, name='cat')])
        (folder/'things'/f'instances_{part}.json').write_text(json.dumps(content))
    code = small_models + '''
from pathlib import Path
import numpy as np
from revvit.data.video_file import write_video
Path('videos').mkdir()
for part,n in (('train',8), ('val',2)):
    for i in range(n): write_video(Path(f'videos/{part}{i}.mp4'), np.full((6,32,32), 30*i, np.uint8))
    Path(f'videos/{part}.csv').write_text(''.join(f'{part}{i}.mp4 {i%2}\\n' for i in range(n)))
for file,model in (('REV_VIT_S.pyth','revvit_small_patch16_224'), ('REV_MVIT_B_16x4.pyth','revmvit_base_16x4_224')):
    torch.save(dict(model_state=small(model).state_dict()), file)
'''
    ran = run(code, folder, warm)
    assert ran.returncode == 0, ran.stderr[-2000:]

def run(code, folder, warm):
    (folder/'program.py').write_text(code, encoding='utf8')
    env = {**os.environ, 'PYTHONPATH': str(root), 'OMP_NUM_THREADS': '1', 'MPLBACKEND': 'agg',
           'CUDA_VISIBLE_DEVICES': ''}
    return warm.run([folder/'program.py'], folder, env)

@pytest.fixture(scope='module')
def folder(tmp_path_factory, warm):
    write_data(folder := tmp_path_factory.mktemp('pasted'), warm)
    return folder

def test_there_is_something_to_paste(): assert {*READ} <= {o.values[0].stem for o in pasted}

@pytest.mark.parametrize('path,code', pasted)
def test_pasted_program_runs(folder, path, code, warm):
    "By itself: with its own imports, in its own order, from data and weights on disk to a trained model"
    ran = run(small_models+code, folder, warm)
    assert ran.returncode == 0, ran.stderr[-2000:]

# ---------------------------------------------------------------- what is read

# an epoch of fastai's is two steps, there are fewer digits, and a network of timm's has two blocks; a failed assertion
# about what was learned or saved is no failure of this test
short = '''
import ast, timm, torch
torch.set_num_threads(1)
from fastai.vision.all import CancelTrainException, Callback, Learner
import revvit.data.digits, revvit.data.moving_digits
class Few(Callback):
    "Two steps an epoch"
    order = 70
    def before_batch(self):
        if self.training and self.iter>1: raise CancelTrainException
init = Learner.__init__
def short_init(self, *args, **kwargs):
    init(self, *args, **kwargs)
    self.add_cb(Few())
Learner.__init__ = short_init
create = timm.create_model
timm.create_model = lambda name, **kwargs: create(name, **dict(dict(depth=2) if name[:4]=='vit_' else {}, **kwargs))
digits,hold_out = revvit.data.digits.digits,revvit.data.digits.hold_out
revvit.data.digits.digits = lambda: tuple(o[:100] for o in digits())
# not that of the videos, which is bound already
revvit.data.digits.hold_out = lambda labels, per_class, seed=0: hold_out(labels, min(per_class, 4), seed)
'''

@pytest.mark.parametrize('path', [o for o in tutorials if o.stem in READ], ids=name)
def test_cells_run_in_order(path, tmp_path, warm):
    "Nothing is used that an earlier cell does not make; the process knows nothing but the page"
    code = short + f'''
names = {{'__name__': '__main__'}}
for i,cell in enumerate({cells(path, 'code')!r}):
    for line in ast.parse(cell).body:   # one by one: what follows a failed assertion runs too
        try: exec(compile(ast.Module([line], []), f'cell {{i}}', 'exec'), names)
        except AssertionError: print('assertion', ast.unparse(line))
'''
    ran = run(code, tmp_path, warm)
    assert ran.returncode == 0, ran.stderr[-2000:]

# ---------------------------------------------------------------- what the tables promise

def test_what_the_tables_name_is_there():
    """Each flag, recipe field and function on our side of the tables for people who come from elsewhere; no option of
    theirs stands twice"""
    from dataclasses import fields
    import revvit
    from revvit.training.recipes import Recipe
    from revvit.use import cli
    from revvit.use.command import flags_parser
    flags = {o for c in ('revvit_train','revvit_predict','revvit_test')
             for a in flags_parser(getattr(cli, c).__wrapped__)._actions for o in a.option_strings}
    tables = [o for src in cells(root/'nbs/tutorials/from_slowfast.ipynb', 'markdown')
              for o in re.split(r'\n\n', src) if re.match(r'\|.*\| here \|\n', o)]
    assert len(tables) == 3
    for t in tables:
        theirs,ours = zip(*(re.fullmatch(r'\| (.*?) \| (.*) \|', o).groups() for o in t.splitlines()[2:]))
        named = ' '.join(ours)
        assert not {*re.findall(r'(?<![\w-])--[a-z][a-z-]*', named)} - flags
        assert not {*re.findall(r'Recipe\.(\w+)', named)} - {o.name for o in fields(Recipe)}
        for o in re.findall(r'revvit\.(\w+)', named): assert callable(getattr(revvit, o)), o
        options = [o for row in theirs for o in re.findall(r'`(--?[a-z][\w-]*)', row)]
        assert len(options) == len({*options})
        assert all(not o.startswith('none') or ':' in o or ' by ' in o
                   for o in ours), [o for o in ours if o.startswith('none')]
