"""The benchmark: what a record holds, what becomes of candidates that cannot run, and how files are read back. No
times are judged"""
import ast, json, subprocess, sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest, torch
from revvit.core.device import pick_device
from revvit.use import cli
from revvit.use import benchmark as bench, measures, sets
from revvit.use.measures import Candidate, Group

TINY = dict(img_size=32, embed_dim=16, num_heads=2, depth=2)
PLAIN,OURS = Candidate('plain', 'vit_small_patch16_224'),Candidate('ours', 'revvit_small_patch16_224')
root = Path(__file__).resolve().parent.parent

def group(*candidates, **kw):
    return Group('tiny', candidates or (PLAIN,OURS), 2, (3,32,32), args=TINY, **{**dict(depth=2, rounds=1), **kw})
def rows(*candidates, **kw): return bench.run_group(group(*candidates, **kw))['rows']

@pytest.fixture(scope='module')
def record():
    seen = []
    res = bench.benchmark([group(), group(PLAIN, measures=('operations',))], title='test', command='typed', memory=1e9,
                          done=lambda r: seen.append(json.loads(json.dumps(r))))
    assert [(len(o['groups']), o['complete']) for o in seen] == [(1, False), (2, True)] # handed over after each group
    return seen[-1]

@pytest.fixture
def here(monkeypatch, capfd, tmp_path):
    "The command in this process, on the tiny group"
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sets, 'small_set', lambda: [group()])
    def _run(*args):
        capfd.readouterr()
        code,(out,err) = cli.revvit_bench([str(o) for o in args]),capfd.readouterr()
        # the profiler of a process that used it before the command could quieten it
        return code,out,''.join(o for o in err.splitlines(True) if 'ActivityProfiler' not in o
                                and 'DeviceProperties' not in o)
    return _run

# ---------------------------------------------------------------- the record

def test_what_a_record_holds(record):
    assert (record['format'], record['title'], record['command'], record['device_type'], record['threads'],
            record['memory']) == (1, 'test', 'typed', 'cpu', 1, 1e9)
    assert set(record['versions']) == {'revvit', 'torch', 'timm', 'python'} and record['device'] and record['cores']
    assert record['date'][:2] == '20'
    assert len(record['load']) == len(record['load_after']) == 3 and record['seconds'] > 0
    a,b = record['groups']
    assert (a['title'], a['batch_size'], a['amp'], a['args']['embed_dim'], len(a['rows']),
            len(b['rows'])) == ('tiny', 2, 'float32', 16, 2, 1)
    for r in a['rows']:
        assert r['status'] == 'ok' and 'why' not in r
        for k in ('parameters', 'kept', 'peak', 'per_image', 'per_block', 'largest_batch', 'deepest', 'operations',
                  'seconds', 'images_per_second', 'ratio', 'ratio_low', 'ratio_high'): assert r[k] > 0, k
        assert r['ratio_low'] <= r['ratio'] <= r['ratio_high'] and 0 < r['gradient_error'] < 1e-5
        assert r['kept'] <= r['peak']
    assert a['rows'][0]['ratio'] == 1
    assert 'seconds' not in b['rows'][0] and 'kept' not in b['rows'][0] # only what was asked for

def test_threads_come_back():
    was = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        bench.benchmark([group(PLAIN, measures=('operations',))])
        assert torch.get_num_threads() == 2
    finally: torch.set_num_threads(was)

def test_memory_is_that_of_the_checkers():
    "Kept and peak bytes of a step, and a line through two batch sizes that gives the peak of a third"
    r = measures.Runner(OURS, group())
    x,y = r.batch(2)
    m = measures.memory_of(r, 2)
    assert m == dict(kept=measures.live_bytes(lambda: r.loss(x, y)), peak=measures.peak_bytes(lambda: r.step(x, y)))
    plain = measures.Runner(PLAIN, group())
    line = measures.lines_of(plain, measures.memory_of(plain, 2)['peak'])
    assert line['fixed']+6*line['per_image'] == pytest.approx(measures.memory_of(plain, 6)['peak'], rel=.1)

def test_a_slope_between_whole_chunks():
    "A line through two and three chunks goes on as memory does; one through two images of a chunk does not"
    g,line = replace(group(), shape=(3,112,112), args=dict(TINY, img_size=112, embed_dim=32)),{}
    for sizes in (None,(16,24)):
        r = measures.Runner(replace(OURS, args=dict(chunk=8)), replace(g, slope=sizes))
        o = measures.lines_of(r, measures.memory_of(r, 2)['peak'])
        line[sizes] = o['fixed']+40*o['per_image']
    there = measures.memory_of(r, 40)['peak']
    assert line[16,24] == pytest.approx(there, rel=.01)
    assert line[None] != pytest.approx(there, rel=.2)

@pytest.mark.parametrize('memory,batch,largest,deepest',
                         [(1000, 2, 10, 9), (1000, 10, 10, 3), (199, 1, 0, 2), (0, 1, 0, 0)])
def test_what_fits(memory, batch, largest, deepest):
    "By hand: 16 bytes a weight, 40 fixed, 80 an image, 100 a further block"
    row = dict(parameters=10, fixed=40, per_image=60, input=20, per_block=100)
    assert measures.fits(row, memory, batch, 3) == dict(largest_batch=largest, deepest=deepest)

def test_gradient_error_sees_a_wrong_gradient(monkeypatch):
    r = measures.Runner(OURS, group())
    want = measures.exact_gradients(r)
    assert measures.gradient_error(r, want) < 1e-5
    step = measures.Runner.step
    def wrong(self, x, y):
        step(self, x, y)
        for p in self.model.parameters(): p.grad *= 1.1
    monkeypatch.setattr(measures.Runner, 'step', wrong)
    assert measures.gradient_error(r, want) == pytest.approx(.1, rel=1e-3)

def test_gradients_are_judged_some_images_at_a_time():
    r = measures.Runner(PLAIN, replace(group(), batch_size=5))
    for a,b in zip(measures.exact_gradients(r, 2), measures.exact_gradients(r, 5)):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-14)

def test_operations_are_counted():
    "More where something is done again, and the same in every run"
    n = {c.name: measures.operations(measures.Runner(c, group()))
         for c in (PLAIN, replace(PLAIN, name='checkpointed', way='checkpointed'), OURS,
                   replace(OURS, name='stored', settings=dict(on=False)))}
    assert n['plain'] < n['checkpointed'] and n['stored'] < n['ours']
    assert n['plain'] == measures.operations(measures.Runner(PLAIN, group()))

# ---------------------------------------------------------------- ways and settings

@pytest.mark.parametrize('way', ['checkpointed', 'attention kept'])
def test_ways_keep_less_and_have_the_same_gradients(way):
    a,b = rows(PLAIN, replace(PLAIN, way=way), measures=('memory','error'))
    assert b['kept'] < a['kept'] and b['gradient_error'] < 1e-5

def test_attention_is_kept_and_not_repeated():
    "Fewer operations than with everything checkpointed would be repeated, and more bytes than it keeps"
    a,b = rows(replace(PLAIN, way='checkpointed'), replace(PLAIN, way='attention kept'),
               measures=('memory',), depth=None)
    assert b['kept'] > a['kept']

def test_compiled_rivals(monkeypatch):
    """Each budget is compiled for itself, though models and shapes are alike, and holds while it is; compiling itself
    takes too long here"""
    seen = []
    def compile_fx(graph, inputs, **kw):
        seen.append(torch._functorch.config.activation_memory_budget)
        return graph.forward
    monkeypatch.setattr('torch._inductor.compile_fx.compile_fx', compile_fx)
    res = rows(*(replace(PLAIN, way=w) for w in ('compiled', 'budget 0.1', 'budget 0.5')))
    assert [o['status'] for o in res] == ['ok']*3 and seen == [1., .1, .5]
    assert torch._functorch.config.activation_memory_budget == 1.
    for r in res: assert r['operations'] is None and r['fixed'] == 0 and r['per_image'] == r['peak']/2

def test_what_is_compiled_comes_last(monkeypatch):
    "A run that is out of time has measured all else; the rows stay in their order"
    began = []
    monkeypatch.setattr(bench, 'Runner', lambda c, *a: began.append(c.name) or 1/0)
    ways = dict(whole='compiled', blocks='blocks compiled')
    res = rows(PLAIN, *(replace(PLAIN, name=k, way=w) for k,w in ways.items()), OURS)
    assert began == ['plain', 'ours', 'whole', 'blocks']
    assert [o['name'] for o in res] == ['plain', 'whole', 'blocks', 'ours']

def on_a_gpu(monkeypatch, step):
    "The limit on the process's memory, wherever it is set; `step(n)` is what a step of `n` images does"
    limits = []
    monkeypatch.setattr(torch.cuda, 'memory_allocated', lambda d: 8)
    monkeypatch.setattr(torch.cuda, 'get_device_properties', lambda d: SimpleNamespace(total_memory=100))
    monkeypatch.setattr(torch.cuda, 'set_per_process_memory_fraction', lambda f, d: limits.append(f))
    monkeypatch.setattr(measures, 'clean', lambda device: None)
    monkeypatch.setattr(measures, 'memory_of', lambda runner, n: step(n) or dict(peak=n))
    monkeypatch.setattr(measures, 'step_seconds', lambda runner, x, y: .01*x)
    return limits

RUNNER = SimpleNamespace(device=torch.device('cuda', 0), parameters=1, group=SimpleNamespace(batch_size=4),
                         batch=lambda n: (n,n))

@pytest.mark.parametrize('fits,n,want', [(200,90,90), (85,90,81), (75,90,72), (10,90,None), (1000,900,300)])
def test_the_largest_batch_is_run(monkeypatch, fits, n, want):
    "Of what should fit all, nine tenths or eight; of what takes longer than three seconds as much as takes three"
    def step(n):
        if n>fits: raise torch.OutOfMemoryError('CUDA out of memory')
    limits = on_a_gpu(monkeypatch, step)
    res = measures.try_largest(RUNNER, n, 50.)
    assert limits == [.42, 1.]   # 8 bytes a weight are there already
    assert res is None if want is None else (res['batch_size'], res['images_per_second']) == (want, pytest.approx(100))

def test_where_none_fits_none_is_run(monkeypatch):
    limits = on_a_gpu(monkeypatch, lambda n: None)
    assert measures.try_largest(RUNNER, 0, 50.) is None and not limits

def test_no_batch_is_run_twice(monkeypatch):
    "Nine tenths of two are one, and so are eight"
    asked = []
    def step(n):
        asked.append(n)
        raise torch.OutOfMemoryError('CUDA out of memory')
    on_a_gpu(monkeypatch, step)
    assert measures.try_largest(RUNNER, 2, 50.) is None and asked == [2,1]

def test_the_largest_batch_of_whom(monkeypatch):
    "Of all but compiled models, whose every size takes a compilation, and the offloaded, which would fill the computer"
    tried = []
    monkeypatch.setattr(bench, 'try_largest', lambda runner, n, memory: tried.append((runner.candidate.way, n)) or {})
    g = group(*(replace(PLAIN, way=o) for o in ('eager','offloaded','compiled','checkpointed','eager','eager')))
    them = [dict(status='ok', largest_batch=k) for k in range(4)]+[dict(status='failed'), dict(status='ok')]
    bench._largest(them, g, 'cpu', 1e9, lambda: False)
    assert tried == [('eager',0), ('checkpointed',3)]
    bench._largest(them, g, 'cpu', 1e9, lambda: True)
    assert len(tried) == 2

@pytest.mark.parametrize('largest', [True,False])
def test_a_device_that_answers_no_more_costs_no_other_row(largest, monkeypatch):
    "After some errors of a driver all that is asked of it fails, tidying up too"
    def gone(*args): raise RuntimeError('CUDA error: an illegal memory access was encountered')
    for o in ('clean','try_largest'): monkeypatch.setattr(bench, o, gone)
    row = dict(name='a', status='ok', largest_batch=9)
    if largest: bench._largest([row], group(PLAIN), 'cpu', 1e9, lambda: False)
    else: assert bench._attempt(row, gone) is None
    assert 'illegal memory access' in (row['tried'] if largest else row)['why']

@pytest.mark.parametrize('way', ['fails','does not fit'])
def test_what_was_measured_stays_whatever_the_largest_batch_does(way, monkeypatch):
    "A kernel that cannot count so far, a driver that gives up: the row keeps its figures, and the table says why"
    def trap(runner, n, memory):
        if way=='fails': raise RuntimeError('canUse32BitIndexMath')
    monkeypatch.setattr(bench, 'try_largest', trap)
    row = dict(name='a', status='ok', largest_batch=10**6, seconds=1., ratio=1.)
    bench._largest([row], group(PLAIN), 'cpu', 1e9, lambda: False)
    assert row['status'] == 'ok'
    said = bench.table(dict(rows=[row])).loc['a']
    why = 'canUse32BitIndexMath' if way=='fails' else 'did not fit'
    assert said['ratio'] == '1.00' and why in said['at the largest']

def test_a_gpu_without_a_number_is_the_current_one(monkeypatch):
    "What limits a process's memory wants the number"
    monkeypatch.setattr(torch, 'zeros', lambda *a, **k: torch.ones(1))
    monkeypatch.setattr(torch.cuda, 'current_device', lambda: 3)
    assert pick_device('cuda') == torch.device('cuda', 3) and pick_device('cuda:1') == torch.device('cuda', 1)

def test_settings_are_data():
    "Whatever `set_reversible` takes; what it does not take is a row that says so"
    a,b,c = rows(OURS, replace(OURS, settings=dict(on=False)), replace(OURS, settings=dict(on=True, no_such=.07)),
                 measures=('memory',))
    assert a['kept'] < b['kept'] and c['status'] == 'failed' and 'no_such' in c['why']
    assert c['settings'] == dict(on=True, no_such=.07)

# ---------------------------------------------------------------- what cannot run

def test_a_rival_that_cannot_be_made_has_a_row():
    a,b,c = rows(PLAIN, Candidate('none', 'vit_none'), replace(OURS, way='no such way'))
    assert (a['status'], b['status'], c['status']) == ('ok', 'failed', 'failed') and 'vit_none' in b['why']
    assert 'no such way' in c['why'] and '\n' not in b['why']
    assert 'seconds' in a and 'seconds' not in b

@pytest.mark.parametrize('error,status,why', [(RuntimeError('[enforce fail] DefaultCPUAllocator: not enough memory: '
    'you tried to allocate 64000000 bytes.'), 'out of memory', '64.0 MB'),
    (torch.OutOfMemoryError('CUDA out of memory. Tried to allocate 20.00 MiB.'), 'out of memory', 'on the GPU, where '
     '20.00 MiB'), (ValueError('two\nlines'), 'failed', 'ValueError: two lines')], ids=['CPU', 'CUDA', 'other'])
@pytest.mark.parametrize('at', [1, 7], ids=['at once', 'in a round'])
def test_a_step_that_fails_has_a_row(error, status, why, at, monkeypatch):
    "At the first step or among the timed ones; the others are measured as if nothing had been"
    step,n = measures.Runner.step,[0]
    def trap(self, x, y):
        if self.candidate is OURS:
            n[0] += 1
            if n[0] >= at: raise error
        return step(self, x, y)
    monkeypatch.setattr(measures.Runner, 'step', trap)
    a,b = rows(rounds=2, measures=('operations','time') if at==1 else ('memory','operations','time'), depth=None)
    assert n[0] == at, n # not tried again
    assert a['status'] == 'ok' and a['ratio'] == 1 and a['rounds'] == 2
    assert b['status'] == status and why in b['why'] and 'ratio' not in b and ('kept' in b) == (at == 7)

def test_without_a_first_candidate_there_are_times_but_no_ratios():
    a,b = rows(Candidate('none', 'vit_none'), OURS, measures=('time',))
    assert a['status'] == 'failed' and b['seconds'] > 0 and 'ratio' not in b

def test_ctrl_c_is_no_row(monkeypatch):
    def stop(self, x, y): raise KeyboardInterrupt
    monkeypatch.setattr(measures.Runner, 'step', stop)
    with pytest.raises(KeyboardInterrupt): rows()

def test_when_time_is_over_rows_say_so():
    res = bench.benchmark([group()], minutes=-1)['groups'][0]['rows']
    assert [o['status'] for o in res] == ['not run']*2 and 'time' in res[0]['why']

# ---------------------------------------------------------------- sets

@pytest.mark.parametrize('groups', [sets.small_set(), sets.large_set()], ids=['small', 'large'])
def test_sets_name_what_there_is(groups):
    import timm
    from torchvision.models import list_models
    for g in groups:
        assert len({c.name for c in g.candidates}) == len(g.candidates) > 1
        assert not g.candidates[0].model.startswith('rev') and g.candidates[-1].model.startswith('rev')
        for c in g.candidates:
            assert c.way in measures.ways and (timm.is_model(c.model) or c.model.split('/')[1] in list_models())
            # other masks
            if g.args.get('drop_path_rate') or c.args.get('drop_path_rate'): assert 'error' not in g.measures

def test_the_gpu_set_has_every_rival():
    "Beside a ViT-L in bfloat16; what is compiled in a group of its own, at the end"
    gs = [g for g in sets.large_set() if 'revvit_large' in g.title and g.amp=='bfloat16' and not 'drop' in g.title]
    assert {'eager', 'checkpointed', 'attention kept', 'offloaded', 'compiled', 'budget 0.1', 'budget 0.5'} == {c.way
        for g in gs for c in g.candidates if c.settings is None and not c.model.startswith('rev')}
    compiled = [any(c.compiled for c in g.candidates) for g in sets.large_set()]
    assert sum(compiled) == compiled[-1] == 1 and len({g.title for g in sets.large_set()}) == len(compiled)
    assert {c.model for g in sets.large_set() for c in g.candidates} >= {'torchvision/mvit_v1_b', 'mvitv2_base',
        'vit_small_patch16_224', 'vit_base_patch16_224', 'vit_large_patch16_224'}

def test_own_set_is_a_product():
    gs = sets.own_set(['revvit_tiny_patch16_224'], [1,2], [3,4], ['float32','bfloat16'], ['eager'], ['stored'])
    assert sorted((g.batch_size, g.args['depth'], g.amp) for g in gs) == sorted((b, d, a) for b in (1,2)
        for d in (3,4) for a in ('float32','bfloat16'))
    assert [c.settings for c in gs[0].candidates] == [None, dict(on=False)]

# ---------------------------------------------------------------- tables, files, figures

def test_table(record):
    t = bench.table(record['groups'][0])
    assert list(t.index) == ['plain', 'ours']
    assert {'step', 'ratio', 'images/s', 'operations', 'kept MB', 'peak MB', 'largest batch', 'deepest',
            'gradient error'} <= set(t)
    assert 'why not' not in t and 'reserved MB' not in t and t.loc['plain', 'ratio'] == '1.00'
    broken = bench.table(dict(title='x', rows=[dict(name='a', status='failed', why='no'),
                                               dict(name='b', status='ok', seconds=.002)]))
    assert broken.loc['a', 'why not'] == 'failed: no' and broken.loc['b', 'why not'] == ''
    assert broken.loc['b', 'step'] == '2 ms'

def test_figure_leaves_out_what_was_not_measured(record):
    import matplotlib.pyplot as plt
    g = json.loads(json.dumps(record['groups'][0]))
    g['rows'].append(dict(name='a', model='b', status='failed', why='no'))
    assert len(bench.plot_group(g).lines) == 2
    plt.close('all')

@pytest.mark.parametrize('n', [0, 1, 2])
def test_reader_and_the_results_notebook(n, record, tmp_path, monkeypatch):
    "The notebook's own code on a folder of so many files"
    import matplotlib.pyplot as plt
    for i in range(n):
        (tmp_path/f'{i}.json').write_text(json.dumps(dict(record, title=f'run {i}',
            date=f'20{20-i}-01-01T00:00:00+00:00')))
    found = bench.read_results(tmp_path)
    assert list(found) == [f'{i}.json' for i in reversed(range(n))]
    path = root/'nbs'/'results'/'measured.ipynb'
    code = [''.join(c['source']) for c in json.loads(path.read_text(encoding='utf8'))['cells']
            if c['cell_type'] == 'code']
    from execnb.shell import CaptureShell
    monkeypatch.chdir(tmp_path)
    shell,said = CaptureShell(),''
    for src in code:
        out = shell.run(src)
        assert not shell.exc, (src, shell.exc)
        said += str(out)
    for i in range(n): assert f'run {i}' in said
    assert ('revvit_bench' in said) # no GPU's file here: how one is made
    plt.close('all')

@pytest.mark.parametrize('text,said', [('{', 'not JSON'), ('[]', 'no results'), ('{"format": 2}', 'no results')])
def test_files_that_are_something_else_are_named(text, said, tmp_path):
    (tmp_path/'odd.json').write_text(text)
    with pytest.raises(ValueError, match=f'odd.json: {said}'): bench.read_results(tmp_path)

# ---------------------------------------------------------------- the command

def test_command_prints_tables_and_leaves_one_file(here, tmp_path):
    code,out,err = here('--device', 'cpu', '--out', 'new/folder')
    assert (code, err) == (0, '')
    (path,) = (tmp_path/'new'/'folder').iterdir()
    record = json.loads(path.read_text())
    assert record['complete'] and record['command'] == 'revvit_bench --device cpu' and record['title'] == 'small set'
    assert str(tmp_path) not in path.read_text()
    assert path.name in out and 'small set: ' in out and 'plain' in out and 'ours' in out and 'gradient error' in out
    (path.parent/'other.txt').write_text('stays')

@pytest.mark.parametrize('there', [True, False])
def test_where_the_file_goes_by_default(there, here, tmp_path):
    if there: (tmp_path/'nbs'/'results').mkdir(parents=True)
    code,out,err = here('--small', '--json', '--device', 'cpu')
    (path,) = tmp_path.rglob('*.json')
    assert (code, err) == (0, '') and path.parent == (tmp_path/'nbs'/'results' if there else tmp_path)
    assert json.loads(out) == json.loads(path.read_text())

@pytest.mark.parametrize('args,said', [(['--models', 'revvit_huge'], 'models must be of'),
    (['--depths', '3'], '--depths must come with --models'), (['--batch-sizes', '2'], '--batch-sizes must come with '
        '--models'),
    (['--models', 'revvit_tiny_patch16_224', '--small'], 'leave it or --models out'),
    (['--models', 'revvit_tiny_patch16_224', '--rivals', 'faster'], 'rivals must be of eager'),
    (['--models', 'revvit_tiny_patch16_224', '--settings', 'x'], 'settings must be of reversible'),
    (['--models', 'revvit_tiny_patch16_224', '--batch-sizes', '0'], '1 or more'),
    (['--models', 'revvit_tiny_patch16_224', '--depths', '2.5'], "got '2.5'"),
    (['--models', 'revmvit_base_224', '--depths', '2'], 'depths are for ViTs'),
    (['--memory', '0'], '--memory must be a number above 0'),
    (['--minutes', 'inf'], '--minutes must be a number above 0'), (['--threads', '0'], '--threads must be 1 or more'),
    (['--device', 'meta'], 'device'), (['--out', 'file'], 'file'), (['--fast'], 'unrecognized')], ids=' '.join)
def test_command_refuses(args, said, here, tmp_path):
    (tmp_path/'file').write_text('x')
    code,out,err = here(*args)
    assert (code, out) == (2, '') and err.count('\n') == 1 and err.startswith('revvit_bench: ') and said in err, err
    assert [o.name for o in tmp_path.iterdir()] == ['file']

@pytest.mark.parametrize('finished', [0, 1])
def test_ctrl_c_leaves_the_finished_groups(finished, here, tmp_path, monkeypatch):
    run,n = bench.run_group,[0]
    def stop(*args):
        n[0] += 1
        if n[0] > finished: raise KeyboardInterrupt
        return run(*args)
    monkeypatch.setattr(sets, 'small_set', lambda: [group(PLAIN, measures=('operations',))]*2)
    monkeypatch.setattr(bench, 'run_group', stop)
    code,_,err = here('--device', 'cpu')
    found = [json.loads(o.read_text()) for o in tmp_path.glob('*.json')]
    assert code == 130 and err.count('\n') == 1 and 'stopped' in err and len(found) == finished
    if finished: assert not found[0]['complete'] and len(found[0]['groups']) == 1 and ', 1 group\n' in err

def test_a_process_of_its_own_says_nothing_else(tmp_path):
    """The profiler would report on the error stream whenever it starts; and the benchmark is imported when it is
    asked for"""
    line = ['--models', 'revvit_tiny_patch16_224', '--depths', '1', '--batch-sizes', '1', '--rivals', 'eager',
            '--settings', 'stored', '--device', 'cpu']
    code = ('import sys; from revvit.use.cli import revvit_bench; assert "revvit.use.benchmark" not in sys.modules; '
            'sys.exit(revvit_bench())')
    r = subprocess.run([sys.executable, '-W', 'ignore', '-c', code, *line], cwd=tmp_path, capture_output=True,
                       text=True, timeout=300)
    assert (r.returncode, r.stderr) == (0, ''), r.stderr
    (path,) = tmp_path.iterdir()
    assert [o['status'] for o in json.loads(path.read_text())['groups'][0]['rows']] == ['ok','ok']
