"""timm's own model tests, asked of our models: `python tools/timm_tests.py CHECKOUT [options of pytest]`.
CHECKOUT is a clone of https://github.com/huggingface/pytorch-image-models; nothing is written to it. The tests use the timm that is installed.
A test that cannot pass stands in `expected`, with its reason; one that passes in spite of standing there is a failure too."""
import fnmatch, sys
from pathlib import Path
import pytest

sys.dont_write_bytecode = True
OURS = '*rev*vit*'
script = 'TorchScript compiles neither the coupling nor the checks of the input; torch.export does, see tests/test_export.py'
clip = 'the test makes images, of the size in the registry, which has no room for a time axis; the model takes clips'
tokens = 'forward_features gives tokens, not maps: test_model_default_cfgs_non_std is for such models, and timm asks its own transformers that alone'
expected = [ # test, model, why it fails
    ('test_model_forward_torchscript', '*', script), ('test_model_forward_fx_torchscript', '*', script),
    ('test_model_backward', '*_16x4_*', clip), ('test_model_backward_fx', '*_16x4_*', clip), ('test_model_default_cfgs', '*', tokens)]

class Ours:
    "A plugin of pytest: timm's tests see our models alone, and what is expected to fail is marked"
    def __init__(self):
        import timm, revvit # timm from where it is installed, before pytest puts the checkout in front
        self.list_models,self.timm = timm.list_models,timm
        timm.list_models,timm.list_pretrained = self.names,lambda *args, **kw: []

    def names(self, filter='', module='', pretrained=False, exclude_filters='', name_matches_cfg=False, include_tags=None):
        "Ours, whatever names and modules were asked for, because no list of timm's knows them; but nothing is downloaded"
        return [] if pretrained else self.list_models(OURS, include_tags=include_tags)

    def pytest_collection_modifyitems(self, config, items):
        ours = [o for o in items if hasattr(o, 'callspec') and fnmatch.fnmatch(str(o.callspec.params.get('model_name')), OURS)]
        config.hook.pytest_deselected(items=[o for o in items if o not in ours])
        items[:] = ours
        for o in items:
            name,model = o.originalname,o.callspec.params['model_name']
            for test,pattern,why in expected:
                if name==test and fnmatch.fnmatch(model, pattern): o.add_marker(pytest.mark.xfail(reason=why, strict=True))

def main(args):
    if not args or args[0] in ('-h','--help'):
        print(__doc__, file=sys.stdout if args else sys.stderr)
        return 0 if args else 2
    tests = Path(args[0])/'tests'/'test_models.py'
    if not tests.exists():
        print(f"{args[0]} holds no tests/test_models.py: give a checkout of huggingface/pytorch-image-models", file=sys.stderr)
        return 2
    options = ['-q', '-rxXf', '-p', 'no:cacheprovider', '-W', 'ignore', '--tb=short']
    return pytest.main([str(tests), *options, *args[1:]], plugins=[Ours()])

if __name__=='__main__': sys.exit(main(sys.argv[1:]))
