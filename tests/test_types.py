"""What a type checker makes of the names that users type: `revvit/__init__.pyi` says them, and mypy accepts right
calls and no others"""
import ast, os, subprocess, sys
from importlib import import_module
from pathlib import Path

import pytest
import revvit

root = Path(__file__).resolve().parent.parent

right = """
import torch
import revvit
from revvit import RevMViT, RevViT, ReversibleBlock, ReversibleSequence

x = torch.randn(2, 3, 32, 32)
m = RevViT(img_size=32, patch_size=8, embed_dim=24, num_heads=3, depth=2, num_classes=5)
m.set_reversible(True, keep=.1, exact=None)
m.set_grad_checkpointing(False)
m.reset_classifier(3, 'avg')
head: torch.nn.Module = m.get_classifier()
groups: dict = m.group_matcher(coarse=True)
features: torch.Tensor = m.forward_features(x)
logits: torch.Tensor = m.forward_head(features, pre_logits=False)
m.forward_intermediates(x, indices=2, norm=True, output_fmt='NLC', intermediates_only=True)
m.prune_intermediate_layers([0], prune_norm=True)
print(m.feature_info[-1], m.no_weight_decay(), m.tokens(x), m.num_features, m.model_args, m.blocks[:1])
v = RevMViT(img_size=32, embed_dim=8, depth=4, stage_starts=(1,))
v.set_reversible(False)
v.forward_intermediates(x)
s = ReversibleSequence([ReversibleBlock(head, head, drop_path=.1)])
s.set_reversible(True, keep=.5, exact=True)
y1, y2 = s(x, x)
x1, x2 = s.inverse(y1, y2)
x1, x2 = ReversibleBlock(head, head).inverse(y1, y2, exact=False)
y1, y2 = revvit.couple(x, x, head, head)
x1, x2 = revvit.uncouple(y1, y2, head, head)
settings: dict = revvit.input_settings(m)
revvit.save_checkpoint(m, 'w.pth', class_names=['a', 'b', 'c'])
report: revvit.LoadReport = revvit.load_checkpoint(m, 'w.pth', new_head=True)
print(report.loaded, report.problems(), revvit.__version__)
dls = revvit.image_dls('data', settings, bs=4, seed=1, aug=dict(rand_aug=None))
learn = revvit.learner(revvit.digits_dls(bs=64), revvit.recipes['digits'])
learn.fit_one_cycle(1)
net = revvit.detector(m, 3, masks=False, box_dim=64)
revvit.save_checkpoint(net, 'd.pth', class_names=['a', 'b', 'c'])
revvit.load_checkpoint(net, 'w.pth')
answer: dict | list = revvit.inference_model(m, 'bird.jpg')
"""

wrong = dict(
    name="revvit.reversable",
    late_name="revvit.digit_dls",
    switch="m.set_reversible(True, kepe=.1)",
    classes="m.reset_classifier('three')",
    features="words: str = m.forward_features(x)",
    recipe="revvit.learner(revvit.digits_dls(), 3)",
    back="words = s.inverse(y1, y2).upper()",
    report="report.lost")

# what `Tensor` and `Module` do not need: left out, or mypy takes four times as long
inside = [f'torch.{o}' for o in ('_dynamo','_export','_functorch','_higher_order_ops','_inductor','_library',
    '_subclasses','ao','cuda','distributed','distributions','export','fx','jit','multiprocessing','onnx','optim',
    'profiler','sparse','testing','utils')]
others = 'PIL','fastai','fastcore','matplotlib','networkx','numpy','pandas','sklearn','sympy','timm','torchvision'
settings = ('[mypy]\nfollow_imports = silent\nignore_missing_imports = True\n'
            f'[mypy-{",".join(f"{o}.*" for o in (*inside, *others))}]\nfollow_imports = skip\n')

@pytest.fixture(scope='module')
def mypy(request, tmp_path_factory):
    "Its words about a program, a line each"
    pytest.importorskip('mypy')
    cache,folder = request.config.cache.mkdir('mypy'),tmp_path_factory.mktemp('types')
    (folder/'mypy.ini').write_text(settings)
    def check(text):
        (folder/'program.py').write_text(text)
        run = subprocess.run([sys.executable, '-m', 'mypy', '--cache-dir', str(cache), 'program.py'], cwd=folder,
                             env={**os.environ, 'MYPYPATH': str(root)}, capture_output=True, text=True)
        assert run.returncode in (0,1), run.stdout+run.stderr
        return [o for o in run.stdout.splitlines() if ': error: ' in o]
    return check

@pytest.mark.thorough
def test_a_right_program_is_accepted(mypy): assert mypy(right) == []

@pytest.mark.thorough
def test_each_mistake_is_found(mypy):
    "One error for each wrong line, and nowhere else"
    first = right.count('\n')+1
    found = [int(o.split(':')[1]) for o in mypy(right+'\n'.join(wrong.values())+'\n')]
    assert found == [*range(first, first+len(wrong))]

def test_the_stub_has_the_names_of_the_package():
    "From the modules that have them"
    imports = [o for o in ast.parse((root/'revvit'/'__init__.pyi').read_text(encoding='utf8')).body
               if isinstance(o, ast.ImportFrom)]
    names = {a.name: o.module for o in imports for a in o.names}
    assert all(a.name == a.asname for o in imports for a in o.names) and sorted(names) == sorted(revvit.__all__)
    for k,v in names.items(): assert getattr(import_module(f'revvit.{v}'), k) is getattr(revvit, k)
