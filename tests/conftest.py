"""Where the models of `cases.py` compute: on the CPU, or where the environment variable REVVIT_DEVICE says; which cases
are asked, in which order; how tests start other processes, and what Python looks through for garbage"""
import atexit, gc, os
from collections import Counter

import pytest
from quick import quick
from warm import Warm

gc.disable()   # nothing is garbage while modules are imported and tests collected; on again in `quick_collections`

def pytest_addoption(parser):
    parser.addoption('--cases', choices=['some','others','all'], help="some: a quarter of the cases of each large "
        "matrix, and nothing marked thorough; others: what that leaves out; all. Without it some, but all where "
        "files, tests, -k, -m thorough, --lf, --ff or --sw are given, and on a GPU")

def is_named(config):
    "Does the command say which tests it wants?"
    wishes = (getattr(config.option, o, None) for o in ('keyword','lf','failedfirst','stepwise'))
    return config.args_source==config.ArgsSource.ARGS or any(wishes) or 'thorough' in config.option.markexpr

def pytest_configure(config):
    name,option = os.environ.get('REVVIT_DEVICE'),config.option
    if option.cases is None: option.cases = 'all' if is_named(config) or name else 'some'   # workers get it from here
    if not name: return
    from revvit.core.device import pick_device
    try: pick_device(name)
    except ValueError as e: raise pytest.UsageError(f"REVVIT_DEVICE={name}: {e}")

@pytest.fixture(scope='session')
def warm():
    "Starts programs without the seconds that imports take"
    yield (started:=Warm())
    started.close()

@pytest.fixture
def strict():
    "A backward pass that does not come back is an error"
    from revvit.core.self_check import set_self_check
    was = set_self_check('error')
    yield
    set_self_check(was)

@pytest.fixture(scope='session', autouse=True)
def one_backward_pass():
    """The first one in a process starts a thread for each device that PyTorch knows of. In version 2.15 a fake tensor
    makes it know eight; a first pass after that, and no process that is forked later can go backwards"""
    import torch
    torch.ones(1, requires_grad=True).sum().backward()

@pytest.fixture(scope='module', autouse=True)
def quick_collections():
    """Half a million objects of the imports stay as long as the process: looking through them again at each
    `gc.collect()`, which every measurement of memory begins with, took a third of the suite's time"""
    gc.enable()
    gc.collect()
    gc.freeze()

# files with few tests that take long; the others go by how many they have, and the last are short in both ways
LONG = 'training','memory','start','distributed','deploy','tutorials','detector','scattered_digits'

def pytest_report_header(config):
    if config.option.cases=='some': return "a quarter of each large matrix; the rest: pytest --cases others"

def choose(config, items):
    "Leave the cases that the option `--cases` is about"
    if config.option.cases=='all': return
    asked = quick(items)
    if config.option.cases=='others': asked = {*items}-asked
    config.hook.pytest_deselected(items=[o for o in items if o not in asked])
    items[:] = [o for o in items if o in asked]

def pytest_collection_modifyitems(config, items):
    "Shared out to several processes, long files come first, or one process waits for the other at the end"
    choose(config, items)
    if not hasattr(config, 'workerinput'): return
    counts = Counter(o.path for o in items)
    def key(o): return o.path.stem.removeprefix('test_') not in LONG, -counts[o.path], o.path.name
    items.sort(key=key)

atexit.register(gc.unfreeze)   # at the very end, or libraries report all of it as leaks
