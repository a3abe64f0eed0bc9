"The commands in `tools/` that nothing else here runs"
import os
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
