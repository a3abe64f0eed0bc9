"How functions become commands, what comes back from them, and where a run goes"
import os, warnings
from pathlib import Path
from types import SimpleNamespace

import pytest
import revvit
from fastcore.basics import store_attr
from revvit.data.loader import UnreadableFile
from revvit.training.recipes import recipes
from revvit.use import cli, predict, runs, train
from revvit.use.command import FlagGroup, all_flags, command, command_line, flags_of, flags_parser, one_sentence
from revvit.use.runs import claim_run, newest_checkpoint

# ---------------------------------------------------------------- flags

def demo(
    files:list, # Pictures
    batch_size:int|None=None, # Images a step
    lr:float=1e-3, # Learning rate
    name:str='a', # 50% of a name
    # The comment may stand above,
    # on two lines
    json:bool=False,
    exact:bool|None=None, # To the bit
):
    "Show what came"

def needs_data(
    data:Path, # Folder
): "Use a folder"

plain = dict(files=['a'], batch_size=None, lr=1e-3, name='a', json=False, exact=None)

@pytest.mark.parametrize('words,differs', [('a', {}), ('a b.png', dict(files=['a','b.png'])),
    ('a --batch-size 3', dict(batch_size=3)), ('a --lr 1', dict(lr=1.)), ('a --name x', dict(name='x')),
    ('a --json', dict(json=True)), ('a --exact', dict(exact=True)), ('a --no-exact', dict(exact=False))])
def test_flags(words, differs): assert vars(flags_parser(demo).parse_args(words.split())) == {**plain, **differs}

@pytest.mark.parametrize('words,said', [('', 'required: FILE'), ('a --lr x', "argument --lr: invalid float value: 'x'"),
    ('a --batch 3', 'unrecognized arguments: --batch'), ('a --batch-size 1.5', "invalid int value: '1.5'")])
def test_words_that_are_no_flags(words, said):
    with pytest.raises(ValueError, match=said): flags_parser(demo).parse_args(words.split())

def test_a_flag_that_must_be_given():
    assert flags_parser(needs_data).parse_args(['--data', 'a b']).data == Path('a b')
    with pytest.raises(ValueError, match='required: --data'): flags_parser(needs_data).parse_args([])

def test_help():
    said = ' '.join(flags_parser(demo).format_help().split())
    for o in ('Show what came', 'FILE Pictures', '--batch-size N Images a step',
              '--lr X Learning rate (default: 0.001)',
              '--name NAME 50% of a name (default: a)', '--json The comment may stand above, on two lines',
              '--exact, --no-exact To the bit'): assert o in said, o

@pytest.mark.parametrize('args,line', [(dict(files='a', json=False), 'demo --files a'),
    (dict(json=True), 'demo --json'),
    (dict(batch_size=3, name='two words'), "demo --batch-size 3 --name 'two words'"), (dict(lr=1e-3), 'demo')])
def test_the_line_that_means_a_call(args, line): assert command_line(demo, args) == line

def test_a_line_without_its_folder():
    assert command_line(demo, dict(name='x', lr=.1), without=('name',)) == 'demo --lr 0.1'

class Size(FlagGroup):
    "How large"
    def __init__(self,
        max_side:int=32, # Pixels
        # To the bit, as
        # always
        exact:bool|None=None,
    ): store_attr()

class Kind(FlagGroup):
    "Which kind"
    def __init__(self,
        kind:str='a', # Of picture
    ): store_attr()

@command
def shrink(
    size:Size, # A
    kind:Kind, # B
    out:Path=Path('x'), # Folder
):
    "Make smaller"
    flags = all_flags(size, kind)
    if flags.max_side > 64: raise ValueError(f'max_side must be 64 at most, got {flags.max_side}')
    print(flags.max_side, flags.exact, flags.kind, out)

@pytest.mark.parametrize('words,said', [('', '32 None a x'), ('--max-side 3 --no-exact --kind b --out '
    'y', '3 False b y')])
def test_flags_in_groups(words, said, capsys):
    assert shrink(words.split()) == 0
    assert capsys.readouterr().out.strip() == said

def test_groups_are_headings_of_the_help():
    said = ' '.join(flags_parser(shrink).format_help().split())
    assert 'How large: --max-side N Pixels (default: 32) --exact, --no-exact To the bit, as always Which kind:' in said

def test_a_message_knows_the_flags_of_groups(capsys):
    assert shrink(['--max-side', '70']) == 2
    assert capsys.readouterr().err == 'shrink: --max-side must be 64 at most, got 70\n'

def test_names_of_all_flags(): assert [*flags_of(shrink)] == ['out', 'max_side', 'exact', 'kind']

def test_the_line_that_means_a_call_of_groups():
    assert command_line(shrink, dict(max_side=32, kind='two words', exact=True)) == "shrink --kind 'two words' --exact"

@pytest.mark.parametrize('name', ['revvit_train', 'revvit_predict', 'revvit_test', 'revvit_memory', 'revvit_bench'])
def test_version(name, capsys):
    with pytest.raises(SystemExit) as end: getattr(cli, name)(['--version'])
    assert end.value.code == 0 and capsys.readouterr().out == f'revvit {revvit.__version__}\n'

# ---------------------------------------------------------------- what comes back

kinds = dict(value=ValueError('two\nlines'), missing=FileNotFoundError(2, 'No such file', 'a.png'),
    killed=ChildProcessError('a reader is gone'), pipe=BrokenPipeError(), full=MemoryError(), stop=KeyboardInterrupt(),
    torn=UnreadableFile('a.png: torn'), reader=RuntimeError('DataLoader worker (pid(s) 3, 4) exited unexpectedly'),
    flag=ValueError("how_so must be well, and how_so='x' or how_so=True is not"), nan=FloatingPointError('nan'))

@command
def ends(
    how_so:str='well', # Way to end
):
    "End in a chosen way"
    if how_so == 'bug': raise KeyError('x')
    if how_so != 'well': raise kinds[how_so]

@pytest.mark.parametrize('words,code,said', [('', 0, ''), ('--how-so value', 2, 'two lines'),
    ('--how_so=missing', 2, 'a.png: No such file'), ('--how-so nan', 1, 'nan'),
    ('--how-so killed', 1, 'a reader is gone'),
    ('--how-so pipe', 141, ''), ('--how-so full', 2, 'out of memory on the CPU'), ('--how-so stop', 130, 'interrupted'),
    ('--how-so torn', 2, 'a.png: torn'), ('--how-so reader', 2, 'a process that reads files was killed, most often for '
                                          'want of memory'),
    ('--how-so flag', 2, "--how-so must be well, and --how-so 'x' or --how-so is not"),
    ('--what', 2, 'unrecognized arguments: --what (see ends --help)')])
def test_ends(words, code, said, monkeypatch, capsys):
    monkeypatch.setattr('revvit.use.command._leave_pipe', lambda: None) # it would close pytest's own output
    assert ends(words.split()) == code
    out,err = capsys.readouterr()
    assert (out, err) == ('', f'ends: {said}\n' if said else '')

def test_a_fault_of_ours_keeps_its_traceback():
    with pytest.raises(KeyError): ends(['--how-so', 'bug'])

@pytest.mark.parametrize('error,said', [(ValueError('Exception occured in `X`:\n\tdisk full'), 'disk full'),
    (ValueError('Caught ValueError in DataLoader worker process 0.\nOriginal Traceback (most recent call last):\n'
                '  File "x"\nValueError: a.png: it is: empty\n'), 'a.png: it is: empty'),
    (FileNotFoundError(2, 'No such file', 'a.png'), 'a.png: No such file'), (ValueError('a\n b'), 'a b')])
def test_one_sentence(error, said): assert one_sentence(error) == said

@command
def counts(
    top:int=5, # A
    views:int=5, # B
    chunk:int|None=None, # C
    batch_size:int|None=None, # D
    threads:int|None=None, # E
    save_steps:int|None=None, # F
    log_every:int|None=None, # I
    validate_every:int|None=None, # J
    workers:int|None=None, # G
    weights:Path|None=None, # H
): "Take numbers"

@pytest.mark.parametrize('flag', ['top', 'views', 'chunk', 'batch-size', 'threads', 'save-steps', 'log-every',
                                  'validate-every'])
def test_at_least_one(flag, capsys):
    assert counts([f'--{flag}', '1']) == 0 and counts([f'--{flag}', '0']) == 2
    assert capsys.readouterr().err == f'counts: --{flag} must be 1 or more, got 0\n'

@command
def warns():
    "Print warnings as they would be shown"
    print(*[warnings.formatwarning('two\nlines', o, 'x.py', 3) for o in (UserWarning, RuntimeWarning)], sep='', end='')

def test_warnings_are_sentences(capsys):
    "Those for users; and afterwards Python's way is back"
    was = warnings.formatwarning
    assert warns([]) == 0 and warnings.formatwarning is was
    assert capsys.readouterr().out.startswith('warns: two lines\nx.py:3: RuntimeWarning: two\nlines\n')

def test_no_workers_are_fine(capsys):
    assert counts(['--workers', '0']) == 0 and counts(['--workers', '-1']) == 2
    assert '--workers must be 0 or more, got -1' in capsys.readouterr().err

def test_addresses_are_no_paths(capsys):
    assert counts(['--weights', 'https://x.org/a.pth']) == 2
    assert 'https://x.org/a.pth: addresses are not read' in capsys.readouterr().err

# ---------------------------------------------------------------- where a run goes

@pytest.fixture
def at(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path

def state(folder, when=None):
    Path(folder).mkdir(parents=True, exist_ok=True)
    (Path(folder)/'state-1.pth').touch()
    if when is not None: os.utime(Path(folder)/'state-1.pth', (when,when))

def test_each_run_has_its_folder(at):
    assert [str(claim_run(None, 'digits')) for _ in range(3)] == ['runs/digits','runs/digits-2','runs/digits-3']
    for _ in range(2): assert claim_run(Path('a/b'), 'digits') == Path('a/b') # still empty
    assert claim_run(Path('a/c'), 'digits', True) == Path('a/c') # nothing to go on with

@pytest.mark.parametrize('out,resume,error,said', [('a', False, ValueError, 'a is not empty: choose another folder'),
    ('a', True, ValueError, 'a is not empty and holds no state to go on from'), ('a/x', False, FileExistsError, 'a/x')])
def test_folders_of_others(out, resume, error, said, at):
    (at/'a').mkdir()
    (at/'a'/'x').touch()
    with pytest.raises(error, match=said): claim_run(Path(out), 'digits', resume)

@pytest.mark.parametrize('out,folder', [(None, 'runs/digits-2'), (Path('a'), 'a')])
def test_a_run_without_a_state_begins_again(out, folder, at, capsys):
    claim_run(None, 'digits')
    (at/folder).mkdir(parents=True)
    (at/folder/'config.json').write_text('{"recipe": "digits", "seed": 3}')
    assert claim_run(out, 'digits', True, dict(seed=3)) == Path(folder)
    assert capsys.readouterr().out == f'{folder}: stopped before its first state, so the run begins again\n'
    with pytest.raises(ValueError, match=f'{folder} was begun by another command: its seed is 3, here it is 4'):
        claim_run(out, 'digits', True, dict(seed=4))

@pytest.mark.parametrize('text,said', [(None, 'is missing'), ('{"recipe": ', 'cannot be read'),
                                       ('[]', 'cannot be read')])
def test_a_config_that_is_gone(text, said, at, capsys):
    state('runs/digits')
    if text is not None: (at/'runs/digits/config.json').write_text(text)
    assert claim_run(None, 'digits', True) == Path('runs/digits')
    assert capsys.readouterr().out == f'runs/digits/config.json {said}: it is written anew\n'

def test_the_last_run_of_a_recipe_goes_on(at):
    "Not that of a folder with a similar name, nor of another recipe; one that is named goes on"
    for o,when in (('runs/digits',8), ('runs/digits-3',9), ('runs/digits-2',8), ('runs/digits-old',10), ('a/b',1)):
        state(o, when)
    assert claim_run(None, 'digits', True) == Path('runs/digits-3')
    assert claim_run(Path('a/b'), 'digits', True) == Path('a/b')
    assert claim_run(None, 'rev_vit_s', True) == Path('runs/rev_vit_s') # a new one

def test_the_checkpoint_written_last(at):
    with pytest.raises(ValueError, match='no checkpoint.pth under runs/ yet: run revvit_train first'):
        newest_checkpoint()
    for i,o in enumerate(('digits-2','digits')):
        (at/'runs'/o).mkdir(parents=True)
        (at/'runs'/o/'checkpoint.pth').touch()
        os.utime(at/'runs'/o/'checkpoint.pth', (i,i))
    assert newest_checkpoint() == Path('runs/digits/checkpoint.pth')

@pytest.mark.parametrize('n,said', [(1, ''),
    (2, 'revvit_test: runs/1/checkpoint.pth: the newest of 2 runs; --weights names another\n')])
def test_which_of_several_runs_answers(n, said, at, monkeypatch, capsys):
    for i in range(n):
        (at/'runs'/str(i)).mkdir(parents=True)
        (at/'runs'/str(i)/'checkpoint.pth').touch()
        os.utime(at/'runs'/str(i)/'checkpoint.pth', (i,i))
    monkeypatch.setattr('revvit.use.inference.get_model', lambda *args: args)
    predict._model_for(SimpleNamespace(weights=None, model=None, classes=None), 'cpu', 'revvit_test')
    assert capsys.readouterr().err==said

@pytest.mark.parametrize('text,keep,exact,want', [(None, None, None, (0., None)), (None, .5, False, (.5, False)),
    ('{"keep": 0.25, "exact": true}', None, None, (.25, True)), ('{"keep": 0.25, "exact": true}', 0., None, (0., True)),
    ('{"keep": 0.25, "exact": true}', None, False, (.25, False))])
def test_modes(text, keep, exact, want, at):
    "As given, else as the run was begun, else as they are by default"
    if text: (at/'config.json').write_text(text)
    seen = []
    learn = SimpleNamespace(model=SimpleNamespace(set_reversible=lambda *args: seen.append(args)))
    assert runs.set_modes(learn, at, keep, exact) == dict(keep=want[0], exact=want[1]) and seen == [(True, *want)]

@pytest.mark.parametrize('text,said', [('{"keep": "all"}', "keep is 'all' and exact is True"),
    ('{"keep": true}', 'keep is True'), ('{"keep": 2}', 'keep is 2')])
def test_modes_that_are_none(text, said, at):
    (at/'config.json').write_text(text)
    with pytest.raises(ValueError, match=f'{said}.*: give --keep and --exact'): runs.set_modes(None, at, None, True)

# ---------------------------------------------------------------- what the loaders of a run are told

def flags(**changes):
    return SimpleNamespace(**{**dict(data='a', workers=None, on_bad='raise', root=None, allow_shared=False), **changes})

@pytest.mark.parametrize('recipe,changes,want', [('digits', dict(data=None), (None, dict(workers=0))),
    ('moving_digits', dict(on_bad='skip'), ('a', dict(workers=0, on_bad='skip'))),
    ('rev_vit_s', dict(workers=3, allow_shared=True), ('a', dict(workers=3, on_bad='raise', allow_shared=True))),
    ('rev_mvit_b_16x4', dict(workers=1, root='b'), ('a', dict(workers=1, on_bad='raise', root='b')))])
def test_loaders(recipe, changes, want): assert train._own_data(recipes[recipe], flags(**changes)) == want

@pytest.mark.parametrize('cores,processes,want', [(4, 1, 4), (64, 1, 16), (64, 8, 8), (2, 4, 1)])
def test_workers_by_default(cores, processes, want, monkeypatch):
    "One for each core that this process may call its own, 16 at most"
    monkeypatch.setattr(os, 'cpu_count', lambda: cores)
    monkeypatch.setenv('LOCAL_WORLD_SIZE', str(processes))
    assert train._own_data(recipes['rev_vit_s'], flags())[1]['workers'] == want

@pytest.mark.parametrize('recipe,changes,said', [('digits', {}, 'brings its own data'),
    ('rev_vit_s', dict(root='b'), '--root is for lists of videos')])
def test_data_that_do_not_go_with_a_recipe(recipe, changes, said):
    with pytest.raises(ValueError, match=said): train._own_data(recipes[recipe], flags(**changes))

@pytest.mark.parametrize('name', ['file', 'a b/c.png', 'x.npy', 'allow_pickle'])
def test_features_under_any_name(name, tmp_path):
    "Also under NumPy's own parameters"
    import numpy as np
    want = np.arange(6, dtype=np.float32).reshape(2,3)
    predict._save_arrays(tmp_path/'a.npz', {name: want, 'other': want[0]})
    with np.load(tmp_path/'a.npz') as z:
        assert z.files == [name.removesuffix('.npy'), 'other'] or z.files == [name, 'other']
        assert z[z.files[0]].dtype == np.float32 and (z[z.files[0]] == want).all()

def test_help_has_the_numbers_of_the_recipe(capsys):
    with pytest.raises(SystemExit): cli.revvit_train(['--help'])
    said,d = ' '.join(capsys.readouterr().out.split()),recipes['digits']
    for k,v in (('Passes', d.epochs), ('Images a step', d.batch_size), ('Highest learning rate', d.lr)):
        assert f'(digits: {v})' in said.split(k)[1][:90], k

def test_flags_of_a_group_that_stores_them_itself():
    "What fastcore's `store_attr` notes beside the attributes differs between its versions, and is not asked for"
    class Own(FlagGroup):
        "Own"
        def __init__(self, a=1, b='x'): self.a,self.b = a,b
    assert vars(all_flags(Own(3))) == dict(a=3, b='x')
