"""Make README.md and its pictures from nbs/index.ipynb, with nothing but Python.
`python tools/readme.py` writes them; `--check` only compares, and fails where they are stale."""
import base64, json, re, sys
from pathlib import Path

root = Path(__file__).resolve().parent.parent
warning = '<!-- Made from nbs/index.ipynb by tools/readme.py: edit the notebook, then run the tool. -->'

def relink(md):
    "Links in the notebook start at nbs/, in README.md at the root"
    return re.sub(r'(?<=\]\()[^)\s#]+', lambda m: f'nbs/{m[0]}' if (root/'nbs'/m[0]).exists() else m[0], md)

def shown(out, alt, files):
    "One stored output as markdown; a picture goes to `files`"
    data = {k: ''.join(v) for k,v in out.get('data', {'text/plain': out.get('text', '')}).items()}
    text = data.get('text/plain', '').rstrip()
    if 'image/png' in data:
        name = f'index_files/{len(files)}.png'
        files[name] = base64.b64decode(data['image/png'])
        width = out.get('metadata', {}).get('image/png', {}).get('width') # set where the picture has two pixels per point
        return f'<img src="{name}" alt="{alt}" width="{width}">' if width else f'![{alt}]({name})'
    if 'text/markdown' in data: return relink(data['text/markdown'].strip())
    return f'```\n{text}\n```' if text and out.get('name') != 'stderr' else ''

def readme():
    "Every file that the notebook makes: path from the root -> bytes"
    parts,files = [],{}
    for c in json.loads((root/'nbs/index.ipynb').read_text(encoding='utf8'))['cells']:
        src = ''.join(c['source']).strip()
        flags = dict(re.findall(r'^#\| *([\w-]+):? *(.*)', src, re.M)) if c['cell_type'] == 'code' else {}
        if 'hide' in flags or c['cell_type'] == 'raw' or re.fullmatch(r'#+ .* -', src): continue
        if c['cell_type'] == 'markdown': parts.append(relink(src)); continue
        code = re.sub(r'^#\|.*\n?', '', src, flags=re.M).strip()
        if code and flags.get('echo') != 'false': parts.append(f'```python\n{code}\n```')
        parts += [shown(o, flags.get('fig-alt', ''), files) for o in c['outputs']]
    text = '\n\n'.join(o for o in (parts[0], warning, *parts[1:]) if o)
    return {'README.md': f'{text}\n'.encode(), **files}

if __name__ == '__main__':
    new = readme()
    old = {p.relative_to(root).as_posix(): p.read_bytes() for p in (root/'README.md', *(root/'index_files').glob('*')) if p.exists()}
    stale = sorted(o for o in new.keys() | old.keys() if new.get(o) != old.get(o))
    if stale and '--check' in sys.argv: sys.exit(f"stale: {', '.join(stale)}; run `python tools/readme.py` and commit what it writes")
    for o in stale:
        if o not in new: (root/o).unlink(); continue
        (root/o).parent.mkdir(exist_ok=True)
        (root/o).write_bytes(new[o])
