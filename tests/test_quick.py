"Which cases a run of the whole suite asks: each test, and of each large matrix a quarter"
import os, re
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
