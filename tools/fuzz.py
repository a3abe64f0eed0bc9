"""Random cases for the engine, for as long as one likes: `python tools/fuzz.py --minutes 10 --seed 0`.
Prints how many cases were exact, refused, warned of, or crash without the package too (both); and for each that is none of these one line that
reproduces it, with as few things done to the net as show the fault. Ends with status 1 if there was one. `tests/fuzz.py` says what a case is."""
import argparse, sys, time, traceback, warnings
from collections import Counter
from pathlib import Path

root = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(root), str(root/'tests')]

def arguments():
    p = argparse.ArgumentParser(description=__doc__.split('\n')[0])
    p.add_argument('--minutes', type=float, default=1., help='how long to run (default 1)')
    p.add_argument('--seed', type=int, default=0, help='other seeds have other cases (default 0)')
    p.add_argument('--start', type=int, default=0, help='number of the first case (default 0)')
    p.add_argument('--case', metavar='SEED:INDEX', help='run this case alone and show what came of it')
    p.add_argument('--only', metavar='0,2', help="with --case: of what the case does to the net, these things; '-' for none")
    a = p.parse_args()
    if a.only is not None and a.case is None: p.error('--only goes with --case')
    try:
        a.case = a.case and [int(o) for o in a.case.split(':')]
        a.only = None if a.only is None else [] if a.only=='-' else [int(o) for o in a.only.split(',')]
        if a.case and len(a.case)!=2: raise ValueError
    except ValueError: p.error(f"--case takes two whole numbers such as 0:17 and --only such as 0,2: got {a.case} and {a.only}")
    return a

def one(seed, index, only):
    "A case by itself, with all that is known of it"
    import fuzz
    v = fuzz.case(seed, index, only)
    print(fuzz.recipe(v), *v.said, sep='\n')
    if v.fault: traceback.print_exception(v.fault)
    return v.fault_of_ours

def many(seed, start, minutes):
    "Cases until the time is up; how many were faults"
    import fuzz, torch
    torch.set_num_threads(1)
    kinds,faults,index,end = Counter(),0,start,time.time()+60*minutes
    try:
        while time.time() < end:
            v = fuzz.case(seed, index)
            kinds[v.kind] += 1
            if v.fault_of_ours:
                faults += 1
                print(fuzz.recipe(fuzz.shrunk(v)), flush=True)
            index += 1
    except KeyboardInterrupt: print('stopped')
    print(f"{index-start} cases from {seed}:{start} on: {', '.join(f'{n} {k}' for k,n in kinds.most_common())}; {faults} faults")
    return faults

if __name__=='__main__':
    warnings.simplefilter('ignore')
    a = arguments()
    sys.exit(bool(one(*a.case, a.only) if a.case else many(a.seed, a.start, a.minutes)))
