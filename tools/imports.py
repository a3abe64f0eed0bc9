"""Draw which module imports which: `python tools/imports.py` writes .github/imports.svg; `--check` only compares.
A row for each wing, numbers from left to right; an arrow goes from a module to one that it uses, dashed where the import
waits for a call. Arrows that others imply are left out. An import upwards stops the tool: it would be a mistake."""
import ast, re, sys
from pathlib import Path

root = Path(__file__).resolve().parent.parent
picture = root/'.github'/'imports.svg'
wings = ['core','data','models','training','use']   # from the ground up
width,row,side = 1180,150,92

def numbered():
    "Modules in reading order: `core.coupling` -> its number"
    found = sorted(p for w in wings for p in (root/'nbs'/w).glob('[0-9][0-9]*_*.ipynb'))
    return {f"{p.parent.name}.{p.stem.split('_', 1)[1]}": p.stem.split('_')[0]
            for p in sorted(found, key=lambda p: (wings.index(p.parent.name), p.name))}

def named(node, here, modules):
    "Modules of ours that an import statement names"
    if isinstance(node, ast.Import): paths = [a.name.removeprefix('revvit.') for a in node.names]
    else:
        above = '.'.join(here[:len(here)-node.level]) if node.level else ''
        path = '.'.join(o for o in (above, node.module) if o).removeprefix('revvit.')
        paths = [path, *(f'{path}.{a.name}' for a in node.names)]
    return [o for o in paths if o in modules]

def imports(modules):
    "(user, used) -> is the import at the top of the module?"
    edges = {}
    for m in modules:
        tree,here = ast.parse((root/'revvit'/f"{m.replace('.', '/')}.py").read_text(encoding='utf8')),m.split('.')
        for node in ast.walk(tree):
            if isinstance(node, (ast.Import,ast.ImportFrom)):
                for used in named(node, here, modules): edges[m,used] = edges.get((m,used), False) or node in tree.body
    return edges

def needed(edges):
    "Without the imports that others imply"
    below = {}
    for a,b in sorted(edges, key=lambda e: order.index(e[0])): below.setdefault(a, set()).add(b)
    reach = lambda m: set().union(*({b} | reach(b) for b in below.get(m, ())))
    return {(a,b): top for (a,b),top in edges.items() if not any(b in reach(c) for c in below[a] if c != b)}

def places(modules):
    "Where the box of each module stands"
    out = {}
    for i,w in enumerate(reversed(wings)):
        own = [m for m in modules if m.startswith(w+'.')]
        step = (width-side)/len(own)
        out.update({m: (side+step*(k+.5), row*(i+.5), min(step-10, 118)) for k,m in enumerate(own)})
    return out

def arrow(a, b, top, at):
    (xa,ya,_),(xb,yb,_) = at[a],at[b]
    if ya == yb:
        high = ya-27-min(36, abs(xa-xb)/10)
        path = f'M{xa:.0f} {ya-19} C{xa:.0f} {high:.0f} {xb:.0f} {high:.0f} {xb:.0f} {ya-21}'
    else: path = f'M{xa:.0f} {ya+19} C{xa:.0f} {(ya+yb)/2:.0f} {xb:.0f} {(ya+yb)/2:.0f} {xb:.0f} {yb-21}'
    dashed = '' if top else ' stroke-dasharray="4 4"'
    return f'<path d="{path}"{dashed} class="{a.split(".")[0]}"/>'

def box(m, number, at):
    x,y,w = at[m]
    name = m.split('.')[1].replace('_', ' ')
    return (f'<rect x="{x-w/2:.0f}" y="{y-19}" width="{w:.0f}" height="38" rx="6"/>'
            f'<text x="{x:.0f}" y="{y-3}" class="n">{number}</text><text x="{x:.0f}" y="{y+12}">{name}</text>')

style = '''svg{background:#fff;font:12px sans-serif} text{text-anchor:middle;fill:#111} .n{font-size:10px;fill:#666}
.wing{font:bold 15px sans-serif;text-anchor:start} rect{fill:#fff;stroke:#888} .band{stroke:none;fill:#f3f4f6}
path{fill:none;stroke-width:1.2;opacity:.75;marker-end:url(#to)} .core{stroke:#444} .data{stroke:#b45309} .models{stroke:#1d4ed8}
.training{stroke:#047857} .use{stroke:#9d174d}'''

def drawn(modules, edges):
    at = places(modules)
    bands = [f'<rect x="4" y="{row*i+6}" width="{width-8}" height="{row-12}" rx="8" class="band"/>'
             f'<text x="16" y="{row*(i+.5)+5:.0f}" class="wing">{w}</text>' for i,w in enumerate(reversed(wings))]
    parts = [*bands, *(arrow(a, b, top, at) for (a,b),top in sorted(edges.items())), *(box(m, n, at) for m,n in modules.items())]
    marker = '<defs><marker id="to" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="7" markerHeight="7" orient="auto">' \
             '<path d="M0 0L8 4L0 8z" style="fill:#666;stroke:none;marker-end:none"/></marker></defs>'
    return '\n'.join([f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {row*len(wings)}">',
                      '<title>Imports of revvit: five wings, no arrow upwards</title>', f'<style>{style}</style>', marker,
                      *parts, '</svg>\n'])

modules = numbered()
order = [*modules]
edges = imports(modules)
if upwards := [f'{a} imports {b}' for a,b in edges if order.index(a) <= order.index(b)]: sys.exit(f"imports upwards: {', '.join(upwards)}")
new = drawn(modules, needed(edges))
if '--check' in sys.argv:
    if not picture.exists() or picture.read_text(encoding='utf8') != new:
        sys.exit('stale: .github/imports.svg; run `python tools/imports.py` and commit what it writes')
else: picture.write_text(new, encoding='utf8')
