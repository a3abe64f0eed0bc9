"Which cases a run of the whole suite asks: each test, and of each large matrix a quarter"
import os, re, shutil
from dataclasses import dataclass
from pathlib import Path

import pytest
from quick import quick

root = Path(__file__).resolve().parent.parent

@dataclass(eq=False)
class Item:
    "As much of pytest's as is asked"
    nodeid: str
    marks: tuple = ()
    def get_closest_marker(self, mark): return mark if mark in self.marks else None

def item(name, *marks): return Item(name, marks)
def asked(*items): return {o.nodeid for o in quick(items)}

@pytest.mark.parametrize('n,left', [(1,1), (2,2), (3,1), (4,1), (5,2), (40,10)])
def test_a_quarter_of_a_matrix_is_asked(n, left):
    got = asked(*(item(f't.py::f[{i}]') for i in range(n)))
    assert len(got)==left

def test_which_does_not_hang_on_the_order_nor_on_other_tests():
    mine = [item(f't.py::f[{i}]') for i in range(40)]
    others = [item(f't.py::g[{i}]') for i in range(40)]
    assert asked(*mine)==asked(*reversed(mine))==asked(*others, *mine)-asked(*others)

def test_marks():
    some = [item(f't.py::f[{i}]', 'every_case') for i in range(9)]
    assert len(asked(*some))==9
    slow,thorough = item('t.py::g', 'slow'),item('t.py::h', 'thorough')
    assert asked(slow, thorough)=={'t.py::g'}
    # a marked case does not count: two others are no matrix
    assert len(asked(*(item(f't.py::f[{i}]') for i in range(2)), item('t.py::f[2]', 'thorough')))==2

def test_both_runs_ask_everything_once(warm):
    "By the command, of a file with matrices"
    def names(*args):
        words = ['-n','0','--collect-only','-q',*args]
        o = warm.run(['-c', f'import pytest; raise SystemExit(pytest.main({words}))'], root, os.environ)
        assert o.returncode==0, o.stdout+o.stderr
        return [l for l in o.stdout.splitlines() if '::' in l]
    file = 'tests/test_near.py'
    whole,some,others = names(file),names(file, '--cases', 'some'),names(file, '--cases', 'others')
    assert sorted(some+others)==sorted(whole) and len(some) < len(others)
    tests = lambda names: {re.sub(r'\[.*', '', o) for o in names}
    assert tests(some)==tests(whole)

MATRIX = """import pytest
@pytest.mark.parametrize('i', range(12))
def test_f(i): assert False
@pytest.mark.thorough
def test_g(): assert False
"""

@pytest.mark.parametrize('words,asked', [('', 3), ('-k f', 12), ('test_matrix.py', 13), ('-m thorough', 1),
    ('--cases others', 10), ('--cases all', 13), ('--lf', 13), ('--ff', 13), ('--cases some test_matrix.py', 3)])
def test_what_a_command_asks(words, asked, tmp_path, warm):
    "A bare one a quarter, one that names something all of it; each says how many it leaves"
    for o in ('conftest','quick','warm'): shutil.copy(root/f'tests/{o}.py', tmp_path)
    (tmp_path/'test_matrix.py').write_text(MATRIX)
    args = ['-q','-W','ignore',*words.split()]
    env = {k: v for k,v in os.environ.items() if k not in ('REVVIT_DEVICE','PYTEST_ADDOPTS')}
    o = warm.run(['-c', f'import pytest; raise SystemExit(pytest.main({args}))'], tmp_path, env)
    left = f', {13-asked} deselected' if asked<13 else ''
    assert f'{asked} failed{left} in' in o.stdout, o.stdout+o.stderr
