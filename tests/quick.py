"""What `pytest` asks by itself, and what it leaves for `pytest --cases others`.

A matrix of promises by models by modes by precisions takes long, and its cases fail together more often than alone. So
a run of the whole suite asks a quarter of each, and leaves out what is marked `thorough`, tests of some ten seconds
each; CI asks the others in a step of their own. What is named (a file, a test, `-k`, `--lf` and such) is asked
whole, and so is all that runs on a GPU."""
from collections import defaultdict
from math import ceil
from zlib import crc32

MATRIX,SHARE = 3,1/4   # cases from which on a test is a matrix, and how many of them are asked

def is_marked(item, mark): return item.get_closest_marker(mark) is not None

def quick(items):
    "Those of pytest's `items` that a whole run asks, as a set"
    chosen,cases = set(),defaultdict(list)
    for o in items:
        if is_marked(o, 'slow'): chosen.add(o)   # asked by its own mark
        elif not is_marked(o, 'thorough'): cases[o.nodeid.split('[')[0]].append(o)
    for some in cases.values():
        few = len(some)<MATRIX or is_marked(some[0], 'every_case')
        # by their names, so that neither the order nor other tests change which
        some.sort(key=lambda o: crc32(o.nodeid.encode()))
        chosen.update(some if few else some[:ceil(len(some)*SHARE)])
    return chosen
