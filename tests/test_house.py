"What users and readers rely on around the code: settings, commands, notebooks, README, and the order of the modules"
import ast, json, os, re, runpy, shutil, subprocess, sys
from configparser import ConfigParser
from importlib import import_module
from pathlib import Path

import pytest, yaml
import revvit

pytestmark = pytest.mark.every_case   # they are quick, and each is of another file
root = Path(__file__).resolve().parent.parent
parser = ConfigParser(delimiters=['='])
parser.read(root/'settings.ini', encoding='utf8')
settings = parser['DEFAULT']
notebooks = sorted(p for p in (root/'nbs').rglob('*.ipynb') if '.ipynb_checkpoints' not in p.parts)
numbered = [p for p in notebooks if re.match(r'\d\d[a-z]?_', p.name)]
stem = lambda p: p.stem.split('_', 1)[1]
dotted = lambda p, top: '.'.join([*p.parent.relative_to(top).parts, stem(p) if p.suffix == '.ipynb' else p.stem])
wings = ['core','data','models','training','use'] # from the ground up
reading = sorted(numbered, key=lambda p: (wings.index(p.parent.name), p.name))
order = [dotted(p, root/'nbs') for p in reading]
modules = [p for p in sorted((root/'revvit').rglob('*.py')) if not p.name.startswith('_')]
name = lambda p: p.relative_to(root).as_posix()

def cells(path, kind):
    "Source and outputs of the cells of one kind"
    return [(''.join(c['source']), c.get('outputs', []))
            for c in json.loads(path.read_text(encoding='utf8'))['cells'] if c['cell_type'] == kind]

def test_version(): assert revvit.__version__ == settings['version']

def test_workflow_covers_every_python():
    "From the oldest one that may install the package to the newest that PyTorch is built for"
    said = re.search(r"python: \[(.*?)\]", (root/'.github'/'workflows'/'test.yml').read_text(encoding='utf8'))[1]
    minor = [int(o) for o in re.findall(r"'3\.(\d+)'", said)]
    assert minor == list(range(int(settings['min_python'].split('.')[1]), 15)) and sys.version_info.minor in minor

@pytest.mark.parametrize('script', settings['console_scripts'].split())
def test_console_script(script):
    command,target = script.split('=')
    module,function = target.split(':')
    assert callable(getattr(import_module(module), function)), command

@pytest.mark.parametrize('tool', [['check.py'], ['readme.py', '--check'], ['imports.py', '--check']], ids=' '.join)
def test_generated_files_agree(tool):
    "Modules come from notebooks, README.md from the index, the picture of the imports from the modules"
    run = subprocess.run([sys.executable, *tool], cwd=root/'tools', capture_output=True, text=True)
    assert run.returncode == 0, run.stderr

@pytest.mark.parametrize('command', ['pip install . && revvit_train', "pip install -e '.[dev]' "
                                     "&& nbdev_test && " "pytest"])
def test_readme_has_the_two_commands(command): assert command in (root/'README.md').read_text(encoding='utf8')

def source_of_tests(command):
    "The source of all tests and fixtures that have to do with a command"
    out = []
    for p in (root/'tests').glob('test_*.py'):
        text = p.read_text(encoding='utf8')
        for o in ast.parse(text).body:
            first = min([o.lineno, *(d.lineno for d in getattr(o, 'decorator_list', ()))])
            mine = '\n'.join(text.splitlines()[first-1:o.end_lineno])
            if command in mine or p.name == 'test_bench.py' and command == 'revvit_bench': out.append(mine)
    return '\n'.join(out)

@pytest.mark.parametrize('command', [o.split('=')[0] for o in settings['console_scripts'].split()])
def test_every_flag_is_tried(command):
    "Each flag of --help stands in a test of its command"
    from revvit.use import cli
    from revvit.use.command import flags_parser
    flags = [o for a in flags_parser(getattr(cli, command).__wrapped__)._actions for o in a.option_strings
             if o.startswith('--')]
    text = source_of_tests(command)
    assert len(flags) > 5 and not [o for o in flags if not re.search(rf'(?<![\w-]){o}(?![\w-])', text)]

@pytest.mark.parametrize('path', numbered, ids=name)
def test_number_and_module(path):
    "Notebook NN_name makes revvit/name.py, and no other notebook has its number or its module"
    number,module = path.name.split('_')[0],dotted(path, root/'nbs')
    assert order.count(module) == 1
    assert sum(o.name.startswith(number+'_') for o in numbered if o.parent == path.parent) == 1
    assert f'#| default_exp {module}' in [src.strip() for src,_ in cells(path, 'code')]
    assert (root/'revvit'/f"{module.replace('.', '/')}.py").exists()

@pytest.mark.parametrize('path', modules, ids=name)
def test_imports_only_lower_numbers(path):
    "Reading order is import order: a module uses only modules that a reader has already met"
    tree = ast.parse(path.read_text(encoding='utf8'))
    here = path.relative_to(root).parts
    used = []
    for o in ast.walk(tree): # those inside functions too
        if isinstance(o, ast.Import):
            used += [a.name.removeprefix('revvit.') for a in o.names if a.name.startswith('revvit.')]
        if not isinstance(o, ast.ImportFrom): continue
        path_of = '.'.join([*here[1:len(here)-o.level], *([o.module] if o.module else [])]) if o.level else o.module
        if not o.level and path_of.split('.')[0] != 'revvit': continue
        path_of = path_of.removeprefix('revvit').strip('.')
        used += [path_of] if path_of in order else [f'{path_of}.{a.name}'.strip('.') for a in o.names]
    later = [o for o in used if o not in order or order.index(o) >= order.index(dotted(path, root/'revvit'))]
    assert not later, f'{path.name} imports {later}'

@pytest.mark.parametrize('path', notebooks, ids=name)
def test_notebook_as_read_on_the_web(path):
    "Outputs are stored, none is an error, nothing tells of the machine it ran on, and it opens quickly"
    code,text = cells(path, 'code'),path.read_text(encoding='utf8')
    outs = [o for _,out in code for o in out]
    assert outs, 'no stored output: run the notebook and commit what it shows'
    assert not [o for o in outs if o['output_type'] == 'error']
    assert not [o for o in outs if o.get('name') == 'stderr'], 'a stored warning or progress bar'
    drawn = [src for src,out in code if any('image/png' in o.get('data', {}) for o in out)]
    assert not [src for src in drawn if '#| fig-alt: ' not in src], 'a picture without a word for who cannot see it'
    words = re.sub(r'"image/png": "[^"]*"', '', text) # without pictures, whose letters spell anything
    assert not re.findall(r'(?:/(?:home|root|tmp|Users|work|private)/|[A-Z]:\\\\Users)\w*', words)
    assert len(text) < 300_000, f'{len(text)/1000:.0f} kB'

@pytest.mark.parametrize('path', notebooks, ids=name)
def test_quarto_reads_the_options_of_cells(path):
    "Each is a line of YAML, in which a colon and a space begin a value"
    for src,_ in cells(path, 'code'):
        for line in re.findall(r'^#\|\s*([\w-]+\s*:.*)', src, re.M): assert len(yaml.safe_load(line)) == 1

@pytest.mark.parametrize('path', numbered, ids=name)
def test_exported_cells_are_short(path):
    long = [src.splitlines()[1] for src,_ in cells(path, 'code') if re.match(r'#\|\s*export', src)
            and sum(bool(l.strip()) for l in src.splitlines()) > 41]
    assert not long, f'more than 40 lines: {long}'

@pytest.mark.slow   # the workflow `docs` builds the site
def test_site_can_be_prepared(tmp_path, warm):
    """For the site nbdev runs the exported cells and every cell with an import, nothing else: such a cell has to work
    without the others"""
    shutil.copytree(root/'nbs', tmp_path/'nbs')
    shutil.copy(root/'settings.ini', tmp_path)
    run = warm.run(['-c', 'from nbdev.serve import proc_nbs; proc_nbs(n_workers=0)'], tmp_path,
                   {**os.environ, 'PYTHONPATH': str(root)})
    assert run.returncode == 0, run.stderr[-2000:]

@pytest.mark.parametrize('path', modules, ids=name)
def test_private_names_stay_at_home(path):
    "What two modules need is public"
    ours = [o for o in ast.walk(ast.parse(path.read_text(encoding='utf8'))) if isinstance(o, ast.ImportFrom)
            and (o.level or (o.module or '').split('.')[0] == 'revvit')]
    assert not [a.name for o in ours for a in o.names if a.name.startswith('_')]

@pytest.mark.parametrize('path', sorted((root/'tests').glob('*.py')), ids=lambda o: o.stem)
def test_a_line_of_the_tests_has_120_characters(path):
    "As one of the notebooks"
    assert not [l for l in path.read_text(encoding='utf8').splitlines() if len(l) > 120]

def exported(path): return [src for src,_ in cells(path, 'code') if re.match(r'#\|\s*export', src)]

@pytest.mark.parametrize('path', numbered, ids=name)
def test_a_notebook_is_one_idea(path):
    "At most 70 cells, and 300 lines in its module"
    lines = [l for src in exported(path) for l in src.splitlines() if l.strip() and not l.startswith('#|')]
    assert len(lines) <= 300 and len(json.loads(path.read_text(encoding='utf8'))['cells']) <= 70

@pytest.mark.parametrize('path', notebooks, ids=name)
def test_lines_fit_on_a_screen(path):
    assert not [l for src,_ in cells(path, 'code') for l in src.splitlines() if len(l) > 120]

@pytest.mark.parametrize('path', notebooks, ids=name)
def test_links_lead_somewhere(path):
    "To notebooks and other files of the project"
    text = '\n'.join(src for src,_ in cells(path, 'markdown'))
    links = [o for o in re.findall(r'\]\(([^)\s#]+)', text) if '://' not in o and not o.startswith('mailto:')]
    assert not [o for o in links if not (path.parent/o).exists()]

def test_the_story_can_be_read_in_a_day():
    "From the idea to a trained model in less than seven hours, core in less than two"
    reading = runpy.run_path(str(root/'tools'/'reading.py'))
    took = {k: reading['minutes'](root/'nbs'/f'{k}.ipynb') for k in reading['story']}
    core = [m for k,m in took.items() if k.startswith('core/')]
    assert len(core) >= 3 and sum(core) <= reading['budgets']['core']
    assert sum(took.values()) <= reading['budgets']['all']
    numbers = [k.split('/')[1] for k in took if '/' in k]
    assert numbers == sorted(numbers), 'the story is read in the order of its numbers'

def test_the_readme_tells_the_story_and_its_minutes():
    "The table has every notebook, the story in bold, and minutes that are at most 4 off"
    reading = runpy.run_path(str(root/'tools'/'reading.py'))
    rows = re.findall(r'^\| \w+: .*? \| (\**)\[.*?\]\(nbs/(.*?)\.ipynb\)\**\ \| (\d+) \|',
                      (root/'README.md').read_text(encoding='utf8'), re.M)
    took = {k: m for k,m in reading['all_minutes']().items() if k != 'index'}
    assert [k for _,k,_ in rows] == [*took]
    assert [k for bold,k,_ in rows if bold] == [k for k in took if k in reading['story']]
    off = {k: f'{shown} shown, {took[k]:.1f} now' for _,k,shown in rows if abs(int(shown)-max(5, took[k])) > 4}
    assert not off, f'run nbs/index.ipynb with tools/run.py, then tools/readme.py: {off}'

def test_the_story_leads_on():
    "The end of each notebook of the story links to the next one"
    story = runpy.run_path(str(root/'tools'/'reading.py'))['story']
    for here,then in zip(story[1:], story[2:]):
        end = [src for src,_ in cells(root/'nbs'/f'{here}.ipynb', 'markdown') if 'Next' in src][-1]
        assert then.split('/')[1] in end.split('Next')[-1], f'{here} does not lead to {then}'

@pytest.mark.parametrize('path', notebooks, ids=name)
def test_a_refusal_is_known_by_its_words(path):
    "`test_fail` alone would be content with any accident"
    calls = [o for src,_ in cells(path, 'code') if 'test_fail(' in src
             for o in ast.walk(ast.parse(re.sub(r'^[!%].*$', '', src, flags=re.M)))
             if isinstance(o, ast.Call) and getattr(o.func, 'id', '') == 'test_fail']
    assert all({'contains','exc'} & {k.arg for k in o.keywords} for o in calls)

@pytest.mark.parametrize('path', sorted((root/'tests').glob('test_*.py')), ids=name)
def test_cases_have_one_order(path):
    "A set among the cases of a test has another order, or another name, in each of pytest's processes"
    asked = [o for o in ast.walk(ast.parse(path.read_text(encoding='utf8')))
        if isinstance(o, ast.Call) and isinstance(o.func, ast.Attribute) and o.func.attr == 'parametrize']
    sets = [o.lineno for call in asked for o in ast.walk(call)
        if isinstance(o, (ast.Set, ast.SetComp)) or isinstance(o, ast.Call)
        and getattr(o.func, 'id', '') in ('set','frozenset')]
    assert not sets

@pytest.mark.parametrize('path', notebooks, ids=name)
def test_a_notebook_leaves_modules_as_they_are(path):
    "nbdev_test runs several notebooks in one process: what one changes inside a module, the next one gets"
    trees = [ast.parse(re.sub(r'^[!%].*$', '', src, flags=re.M)) for src,_ in cells(path, 'code') if '._' in src]
    targets = [t for tree in trees for o in tree.body if isinstance(o, ast.Assign) for t in o.targets]
    changed = [ast.unparse(t) for t in targets if isinstance(t, ast.Attribute) and re.match('_[^_]', t.attr)]
    assert not changed, f"change it within unittest.mock.patch.object: {changed}"

@pytest.mark.parametrize('path', notebooks, ids=name)
def test_a_notebook_hushes_only_what_it_names(path):
    "nbdev_test runs several notebooks in one process: a filter for all warnings hushes the next one too"
    trees = [ast.parse(re.sub(r'^[!%].*$', '', src, flags=re.M)) for src,_ in cells(path, 'code') if 'warnings.' in src]
    calls = [o.value for tree in trees for o in tree.body
             if isinstance(o, ast.Expr) and isinstance(o.value, ast.Call)]
    filters = [o for o in calls if ast.unparse(o.func) in ('warnings.filterwarnings', 'warnings.simplefilter')]
    assert all({'message','category','module'} & {k.arg for k in o.keywords} for o in filters)
