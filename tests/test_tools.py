"The commands in `tools/` that nothing else here runs"
import json, os
from pathlib import Path

import pytest

tools = Path(__file__).resolve().parent.parent/'tools'
@pytest.fixture
def run(warm): return lambda *args: warm.run(args, tools.parent, os.environ)

SUITE = '''
import pytest, timm
from timm import list_models
@pytest.mark.parametrize('model_name', list_models(exclude_filters=['*rev*'], name_matches_cfg=True))
def test_model_forward(model_name): assert 'vit' in model_name
@pytest.mark.parametrize('model_name', list_models('resnet*'))
def test_model_forward_torchscript(model_name): assert PASSES
@pytest.mark.parametrize('model_name', list_models(pretrained=True))
def test_model_load_pretrained(model_name): assert False
def test_of_another_model(): assert False
'''

def test_timms_suite_is_asked_of_our_models_alone(run, tmp_path):
    "What is expected to fail does not make it fail; what is expected to fail and passes does"
    (tmp_path/'tests').mkdir()
    for passes,status in ((False,0),(True,1)):
        (tmp_path/'tests'/'test_models.py').write_text(SUITE.replace('PASSES', str(passes)))
        o = run(tools/'timm_tests.py', tmp_path)
        assert o.returncode==status, o.stdout+o.stderr
        assert ('8 passed' in o.stdout and '8 xfailed' in o.stdout) if status==0 else '8 failed' in o.stdout, o.stdout
    assert sorted(p.name for p in tmp_path.rglob('*'))==['test_models.py','tests'] # nothing is written there

def test_a_folder_without_timms_tests_is_refused_in_a_sentence(run, tmp_path):
    o = run(tools/'timm_tests.py', tmp_path)
    assert o.returncode==2 and 'holds no tests/test_models.py' in o.stderr and 'Traceback' not in o.stderr

def notebook(path, *cells):
    "A notebook of cells that are given as code and as the line that they printed once"
    def cell(i, code, said):
        out = dict(output_type='stream', name='stdout', text=[said+'\n'])
        return dict(cell_type='code', id=f'cell{i}', metadata={}, execution_count=None, source=[code], outputs=[out])
    made = dict(nbformat=4, nbformat_minor=5, metadata={}, cells=[cell(i, *o) for i,o in enumerate(cells)])
    path.write_text(json.dumps(made))
    return path

def test_outputs_that_say_something_else_are_named(run, tmp_path):
    "Other numbers do not, nor what is hidden or not run; an error ends it"
    same = ("print('took', 2.5, 's')", 'took -1e-3  s'),('#| hide\nprint(1)', 'x'),('#| notest\nprint(1)', 'x')
    o = run(tools/'outputs.py', notebook(tmp_path/'a.ipynb', *same))
    assert o.returncode==0 and '1 notebooks show what they say' in o.stdout, o.stdout+o.stderr
    b = notebook(tmp_path/'b.ipynb', *same, ("print('seven of 9')", 'six of 9'))
    o = run(tools/'outputs.py', tmp_path/'a.ipynb', b)
    assert o.returncode==1 and "b.ipynb, cell cell3: stored 'six of #', now 'seven of #'" in o.stderr, o.stderr
    assert 'a.ipynb' not in o.stderr
    o = run(tools/'outputs.py', notebook(tmp_path/'c.ipynb', ('1/0', 'x')))
    assert o.returncode==1 and 'ZeroDivisionError' in o.stdout+o.stderr
