"""R28 to R32 for every way of loading weights: what a file may do, how damage is told, what does not fit, and a writer
killed at any moment.

Three families (Rev-ViT, Rev-MViT for images and for clips), every kind of file (the publishers', ours, a bare state
dict, safetensors, Hugging Face Hub folders), and every reader (ours, and timm's with our models: a file in the
configuration, an address, a folder)."""
import collections, functools, io, json, os, pickle, random, resource, runpy, shutil, signal, subprocess, time, warnings
import zipfile
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import timm
import torch
import revvit
from PIL import Image
from timm.models import save_for_hf
from torchvision import transforms
from revvit.models.checkpoints import _stored_grid, input_settings, load_checkpoint, load_model, save_checkpoint
from revvit.models.files import CheckpointError, read_checkpoint, seal, write_checkpoint
from revvit.use.inference import get_model
from revvit.models.mvit import RevMViT
from revvit.models.vit import RevViT

pytestmark = pytest.mark.filterwarnings('ignore')
reference = Path(__file__).parent/'reference'
film = dict(num_frames=4, patch_kernel=(3,7,7), patch_stride=(2,4,4), pool_kernel=(3,3,3), kv_stride=(1,8,8),
            stream_fusion='mean', qkv_bias=False)
families = dict( # class, arguments (those of the publishers' tiny cases), timm's name
    vit=(RevViT, dict(img_size=32, patch_size=8, embed_dim=48, num_heads=3, depth=4, num_classes=10),
         'revvit_tiny_patch16_224'),
    mvit=(RevMViT, dict(img_size=64, embed_dim=16, depth=6, stage_starts=(1,3), num_classes=10), 'revmvit_tiny_224'),
    clips=(RevMViT, dict(img_size=32, embed_dim=16, depth=6, stage_starts=(1,3), num_classes=10, **film),
           'revmvit_tiny_16x4_224'))
published = dict(vit=dict(official='rev_vit_tiny', mmpretrain='mmpretrain_revvit_tiny'),
                 mvit=dict(official='rev_mvit_tiny'), clips=dict(official='rev_mvit_video_tiny'))
# and for vit what training programs wrap
kinds = {k: [*published[k], 'own', 'bare', 'safetensors', 'hub', 'hub-safe'] for k in families}
kinds['vit'].append('wrapped')
both = pytest.mark.parametrize('family', families)
every = pytest.mark.parametrize('family,kind', [(f,k) for f in families for k in kinds[f]])

@pytest.fixture(autouse=True)
def no_network(monkeypatch):
    def refuse(*args, **kwargs): raise AssertionError('a test asked for the network')
    monkeypatch.setattr('socket.socket.connect', refuse)

def build(family, **changes):
    cls,args,_ = families[family]
    return cls(**{**args, **changes})

def by_timm(family, file=None, **changes):
    "timm's way: the model by name, the file in its configuration or as an address"
    _,args,name = families[family]
    return timm.create_model(name, pretrained=file is not None,
                             pretrained_cfg_overlay=dict(file=file and str(file), num_classes=10),
                             **{**args, **changes})

def tensors_of(name):
    "Tensors of a published layout, with numbers of their own"
    g = torch.Generator().manual_seed(0)
    return {k: torch.randn(s, generator=g)*.1 for k,
            s in json.loads((reference/f'{name}.json').read_text())['tensors'].items()}

@pytest.fixture(scope='session')
def files(tmp_path_factory):
    "Every kind of file of every family"
    top = tmp_path_factory.mktemp('files')
    for family in families:
        torch.manual_seed(1)
        m,d = by_timm(family),top/family
        d.mkdir()
        for kind,name in published[family].items():
            torch.save(dict(epoch=3, model_state=tensors_of(name), optimizer_state={}, cfg='TRAIN:')
                       if kind=='official' else dict(meta={}, state_dict=tensors_of(name)), d/kind)
        save_checkpoint(m, d/'own', class_names='abcdefghij')
        torch.save(m.state_dict(), d/'bare')
        torch.save({f'module._orig_mod.{k}': v for k,v in m.state_dict().items()}, d/'wrapped')
        safetensors.torch.save_file(m.state_dict(), d/'safetensors')
        for kind in ('hub','hub-safe'):
            save_for_hf(m, d/kind, model_args=m.model_args, model_config=dict(label_names=[*'abcdefghij']),
                        safe_serialization=kind=='hub-safe')
    return top

def weights_of(path):
    "The one file with weights"
    return next(o for o in (path/'model.safetensors', path/'pytorch_model.bin', path) if o.is_file())

def snapshot(m): return {k:v.clone() for k,v in m.state_dict().items()}
def same(m, old): return all(torch.equal(v, old[k]) for k,v in m.state_dict().items())

def one_sentence(error, path):
    "A CheckpointError of one line that names the file"
    assert (isinstance(error.value, CheckpointError) and str(path) in str(error.value)
            and '\n' not in str(error.value)), str(error.value)

@every
def test_every_kind_loads_by_every_reader(files, family, kind, tmp_path):
    "The matrix below is worth something only if the undamaged files load, and to the same numbers"
    path,m = files/family/kind,build(family)
    report = load_checkpoint(m, path)
    assert report.share == 1 and not report.problems() and not report.left and report.grids is None
    readers = [lambda: by_timm(family, weights_of(path))] if kind != 'safetensors' else []
    if kind.startswith('hub'):
        readers += [lambda: timm.create_model(f'local-dir:{path}', pretrained=True), lambda: load_model(path)]
    if kind == 'own': readers.append(lambda: load_model(path))
    if kind in published[family]: readers.append(lambda: by_url(family, path, tmp_path))
    for read in readers: assert same(read(), snapshot(m))

def by_url(family, path, cache):
    "`pretrained=True` as with a network: an address, here of a local file"
    _,args,name = families[family]
    return timm.create_model(name, pretrained=True, cache_dir=str(cache),
                             pretrained_cfg_overlay=dict(url=path.as_uri(), num_classes=10), **args)

# R28: nothing in a file is executed

class Call:
    "Pickled as a call of `fn` on `args`"
    def __init__(self, fn, *args): self.fn,self.args = fn,args
    def __reduce__(self): return self.fn,self.args

def gadgets(marker):
    "Calls that would each create the marker"
    code = f"open({str(marker)!r}, 'w').close()"
    script = marker.with_suffix('.py')
    script.write_text(code)
    inner = pickle.dumps(Call(exec, code))
    archive = io.BytesIO()
    torch.save(Call(exec, code), archive)
    return dict(system=Call(os.system, f'touch "{marker}"'), call=Call(subprocess.call, ['touch', str(marker)]),
        exec=Call(exec, code), eval=Call(eval, code), touch=Call(Path.touch, marker),
        pickle_in_pickle=Call(pickle.loads, inner), script=Call(runpy.run_path, str(script)),
        archive_in_archive=Call(torch.storage._load_from_bytes, archive.getvalue()),
        partial=Call(functools.partial(exec, code)))

def hostile(gadget, tensors):
    """Files that hold the call, by name: alone, beside and inside tensors, deep down, in ours with a seal, in
    PyTorch's old format, and as bare pickles"""
    layouts = dict(alone=gadget, state=dict(state_dict={**tensors, 'extra': gadget}),
        slowfast=dict(epoch=0, model_state=tensors, optimizer_state={}, cfg=gadget),
        meta=dict(meta=[gadget], state_dict=tensors),
        deep=dict(tensors, x=[({'a': collections.OrderedDict(b=(1, [gadget]))},)]),
        own=dict(format='revvit', version=1, model='RevViT', model_args={}, state_dict=tensors, extra=dict(a=gadget)))
    for name,content in layouts.items():
        for old in (False, True):
            f = io.BytesIO()
            torch.save(content, f, _use_new_zipfile_serialization=not old)
            if name == 'own' and not old: seal(f)
            yield f'{name}{"-old"*old}.pth', f.getvalue()
    yield from ((f'pickle{p}.pth', pickle.dumps(gadget, p)) for p in (0, 2, 5))

@pytest.mark.parametrize('family,gadget',
                         [*(('vit', o) for o in ('system', 'call', 'exec', 'eval', 'touch', 'pickle_in_pickle',
                                                 'script', 'archive_in_archive', 'partial')),
                                           *((f, o) for f in ('mvit', 'clips')
                                             for o in ('system', 'exec', 'archive_in_archive'))])
def test_R28_nothing_in_a_file_is_executed(files, tmp_path, family, gadget):
    """Each file is first shown to work on an unsafe reader; then no reader creates the marker, each refuses, and ours
    in one sentence"""
    marker = tmp_path/'marker'
    call,m = gadgets(marker)[gadget],build(family)
    old,hub = snapshot(m),tmp_path/'hub'
    shutil.copytree(files/family/'hub', hub)
    for name,raw in hostile(call, {k:v for k,v in list(old.items())[:2]}):
        path = tmp_path/name
        for o in (path, hub/'pytorch_model.bin', tmp_path/'named.safetensors'): o.write_bytes(raw)
        try:
            (pickle.loads if name.startswith('pickle') else lambda o: torch.load(io.BytesIO(o),
                weights_only=False))(raw)
        except Exception: pass
        assert marker.exists(), f'{name} is harmless: the test shows nothing'
        marker.unlink()
        for o in (path, hub, tmp_path/'named.safetensors'):
            for read in (read_checkpoint, load_model, lambda p: load_checkpoint(m, p),
                         lambda p: load_checkpoint(m, p, strict=False),
                         lambda p: load_checkpoint(m, p, new_head=True, new_size=True)):
                with pytest.raises(CheckpointError) as error: read(o)
                one_sentence(error, weights_of(o))
        for read in (lambda: by_timm(family, path), lambda: by_timm(family, tmp_path/'named.safetensors'),
                     lambda: by_url(family, path, tmp_path/'cache'),
                     lambda: timm.create_model(f'local-dir:{hub}', pretrained=True),
                     lambda: timm.create_model(families[family][2], checkpoint_path=str(path), **families[family][1])):
            with pytest.raises(Exception): read()
        shutil.rmtree(tmp_path/'cache', ignore_errors=True)
        assert not marker.exists(), name
    assert same(m, old)

# R29: damaged and missing files

def damaged(raw):
    "20 truncations and other things that lie where weights should be"
    rng = random.Random(0)
    yield from ((f'cut at {n} of {len(raw)}', raw[:n]) for n in sorted(rng.sample(range(1, len(raw)), 20)))
    yield from dict(empty=b'', page=b'<!DOCTYPE html><html><body>404</body></html>',
                    pointer=b'version https://git-lfs.github.com/spec/v1\noid sha256:00', noise=rng.randbytes(999),
                    long=raw[:64]+rng.randbytes(999)).items()

@every
def test_R29_damage_is_one_sentence_and_leaves_the_model(files, tmp_path, family, kind):
    "By our readers in every mode; by timm's readers no model comes back"
    path,m = tmp_path/'weights',build(family)
    source = files/family/kind
    shutil.copytree(source, path) if source.is_dir() else shutil.copy(source, path)
    file,old = weights_of(path),snapshot(m)
    for what,raw in damaged(weights_of(source).read_bytes()):
        file.write_bytes(raw)
        for kw in (dict(), dict(strict=False), dict(new_head=True, new_size=True)):
            with pytest.raises(CheckpointError) as error: load_checkpoint(m, path, **kw)
            one_sentence(error, file)
            assert ': it is ' in str(error.value) or 'the file is empty' in str(error.value), what
        with pytest.raises(CheckpointError) as error: load_model(path)
        one_sentence(error, file)
        if kind != 'safetensors':
            with pytest.raises(Exception): by_timm(family, file)
        if path.is_dir():
            with pytest.raises(Exception): timm.create_model(f'local-dir:{path}', pretrained=True)
    file.unlink()
    for o,why in ((file if path != file else path, 'No such file'), (tmp_path, 'Is a directory')):
        for read in (lambda p: load_checkpoint(m, p), load_model, read_checkpoint):
            with pytest.raises(CheckpointError, match=why) as error: read(o)
            one_sentence(error, o)
    assert same(m, old)

@both
def test_R29_tensors_that_are_no_weights(tmp_path, family):
    "Whole numbers, sparse and absent ones: refused before anything is copied"
    m = build(family)
    old,(name,value) = snapshot(m),next((k,v) for k,v in build(family).state_dict().items()
                                        if k.endswith('norm.weight'))
    for odd in (value.int(), value.to_sparse(), value.to('meta'), value.bool()):
        torch.save({**build(family).state_dict(), name: odd}, tmp_path/'odd.pth')
        with pytest.raises(CheckpointError, match=name) as error: load_checkpoint(m, tmp_path/'odd.pth')
        one_sentence(error, tmp_path/'odd.pth')
        assert same(m, old)

# R29: files that ask for more memory than they are large

def limited(check, mb=160):
    "Run `check` in a process that may take `mb` more memory than this one has; what it raised, in words"
    r,w = os.pipe()
    if not (pid := os.fork()):
        said = ''
        try:
            now = int(Path('/proc/self/statm').read_text().split()[0])*resource.getpagesize()
            resource.setrlimit(resource.RLIMIT_AS, (now+mb*2**20,)*2)
            check()
        except BaseException as e: said = f'{type(e).__name__}: {e}'
        os.write(w, said.encode()[:60000])
        os._exit(0)
    os.close(w)
    with open(r, 'rb') as f: said = f.read().decode()
    os.waitpid(pid, 0)
    return said

def rezipped(raw, method, copies=1):
    "The entries of an archive in a new one"
    out = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(raw)) as a, zipfile.ZipFile(out, 'w', method, compresslevel=1) as b:
        for name in a.namelist()*copies: b.writestr(name, a.read(name))
    return out.getvalue()

def saved(content, old=False):
    f = io.BytesIO()
    torch.save(content, f, _use_new_zipfile_serialization=not old)
    return f.getvalue()

def sealed(raw):
    f = io.BytesIO(raw)
    seal(f)
    return f.getvalue()

def layouts(tensors):
    "The same tensors as each kind of file has them"
    own = dict(format='revvit', version=1, architecture=None, model='RevViT', model_args={}, class_names=None,
               input_settings={}, extra={})
    yield from dict(bare=tensors, official=dict(epoch=1, model_state=tensors),
                    mmpretrain=dict(meta={}, state_dict=tensors), own=dict(own, state_dict=tensors),
                    hub=tensors).items()

class Made:
    "Pickled as a call that PyTorch's own reader allows"
    def __init__(self, fn, *args): self.fn,self.args = fn,args
    def __reduce__(self): return self.fn,self.args

def two_tables(raw):
    "An archive whose 64-bit table of contents is not the one at the end"
    end = raw.rindex(b'PK\5\6')
    start = int.from_bytes(raw[end-28:end-20], 'little')
    table = raw[start:end-76]
    first = raw[end-76:end-20]   # the true one goes in front, and the locator still points at it
    other = raw[:start]+table+first
    fake = bytearray(first)
    fake[48:56] = (len(other)).to_bytes(8, 'little')
    return other+table+bytes(fake)+raw[end-20:end-12]+(end-76).to_bytes(8, 'little')+raw[end-4:end]+raw[end:]

def bombs(tensors):
    "Small files that ask for 256 MB or more: name, layout, bytes, and why they are refused"
    huge = {**tensors, 'pos_embed': torch.zeros(2**26)}   # 256 MB that nothing touches
    for layout,content in layouts(huge):
        raw = rezipped(saved(content), zipfile.ZIP_DEFLATED)
        yield f'compressed-{layout}',layout,sealed(raw) if layout=='own' else raw,'compressed'
    raw = saved(huge)
    yield 'bzip2','bare',rezipped(raw, zipfile.ZIP_BZIP2),'compressed'
    for layout,content in layouts({**tensors, 'pos_embed': torch.zeros(1).expand(2**13, 2**13)}):
        raw = saved(content)
        yield f'view-{layout}',layout,sealed(raw) if layout=='own' else raw,'larger than the file'
    yield 'view-old','bare',saved({'pos_embed': torch.zeros(1).expand(2**13, 2**13)}, old=True),'larger than the file'
    for name,call in dict(bytearray=Made(bytearray, 2**28), tensor=Made(torch.Tensor, 2**26),
                          floats=Made(torch.FloatTensor, 2**26)).items():
        for old in (False,True): yield f'{name}-{old}','bare',saved({'a': call, **tensors}, old),'never calls anything'
    raw = saved({'w': torch.zeros(7)}, old=True).replace(b'K\x07', b'J'+(2**27).to_bytes(4, 'little'))
    yield 'claimed','bare',raw,'larger than the file'
    raw = saved(dict(a=torch.ones(8)))
    yield 'twice','bare',rezipped(raw, zipfile.ZIP_STORED, copies=2),'overlap'
    yield 'two-tables','bare',two_tables(raw),'table of contents'
    head = json.dumps({'w': dict(dtype='F32', shape=[2**26], data_offsets=[0, 2**28])}).encode()
    yield 'safetensors','bare',len(head).to_bytes(8, 'little')+head,'damaged or incomplete safetensors'
    yield 'header','bare',(2**28).to_bytes(8, 'little')+b'{"a":1}','damaged or incomplete safetensors'

@pytest.mark.skipif(not Path('/proc/self/statm').exists(), reason='needs /proc')
@pytest.mark.filterwarnings('ignore')
@pytest.mark.thorough
def test_R29_no_file_asks_for_more_than_it_is_large(files, tmp_path):
    "Every reader refuses each in one sentence, in a process that could not pay; the model is unchanged"
    m,hub = build('vit'),tmp_path/'hub'
    old = snapshot(m)
    shutil.copytree(files/'vit/hub', hub)
    readers = [read_checkpoint, load_model, lambda p: get_model(weights=p, device='cpu'),
               lambda p: get_model('revvit_tiny_patch16_224', p, 'cpu'),
               lambda p: load_checkpoint(m, p), lambda p: load_checkpoint(m, p, strict=False),
               lambda p: load_checkpoint(m, p, new_head=True, new_size=True)]
    for name,layout,raw,why in bombs({k:v for k,v in list(old.items())[1:4]}):
        path = hub if layout=='hub' else tmp_path/f'{name}.pth'
        weights = hub/'pytorch_model.bin' if layout=='hub' else path
        weights.write_bytes(raw)
        assert len(raw)<2**23, name
        def check():
            for read in readers:
                with pytest.raises(CheckpointError, match=why) as error: read(path)
                one_sentence(error, weights)
            assert same(m, old)
        assert limited(check)=='', name
        weights.unlink()

absurd = dict(depth=10**9, embed_dim=3*2**20, img_size=2**20, num_classes=2**31, mlp_ratio=1e8, in_chans=2**29,
              patch_size=(1,1), img_and_depth=dict(img_size=2**24, depth=2**40), text=dict(depth='many'),
              inf=dict(mlp_ratio=float('inf')))

@pytest.mark.skipif(not Path('/proc/self/statm').exists(), reason='needs /proc')
@pytest.mark.parametrize('changes', [o if isinstance(o, dict) else {k:o} for k,o in absurd.items()], ids=absurd)
@both
def test_R29_a_model_is_built_only_if_the_file_fills_it(files, tmp_path, family, changes):
    """Our files and Hub folders that describe models far larger than their tensors, or none that can be: one
    sentence, before any memory"""
    path,hub = tmp_path/'own.pth',tmp_path/'hub'
    content = read_checkpoint(files/family/'own')
    write_checkpoint(path, dict(content, model_args={**content['model_args'], **changes}))
    shutil.copytree(files/family/'hub', hub)
    config = json.loads((hub/'config.json').read_text())
    (hub/'config.json').write_text(json.dumps(dict(config, model_args={**config['model_args'], **changes})))
    def check():
        for o in (path, hub):
            for read in (load_model, lambda p: get_model(weights=p, device='cpu')):
                with pytest.raises(CheckpointError) as error: read(o)
                assert str(tmp_path) in str(error.value) and '\n' not in str(error.value), str(error.value)
        if 'depth' in changes:
            with pytest.raises(CheckpointError): load_checkpoint(build(family), path)
    assert limited(check)==''

@pytest.mark.parametrize('address', ['https://x.org/a/w.pth', 'http://x.org/w.pth', 's3://bucket/w.pth',
                                     'https:/x.org/a/w.pth'])
def test_R29_addresses_are_not_read(address):
    "Also one that became a path, which loses a slash; the sentence shows it whole"
    for read in (read_checkpoint, load_model, lambda p: load_checkpoint(build('vit'), p),
                 lambda p: get_model(weights=p, device='cpu')):
        for o in (address, Path(address)):
            with pytest.raises(CheckpointError, match=f"{address.replace(':/x', '://x')}: addresses are not read, "
                                                      f"download the file first"): read(o)

@pytest.mark.skipif(not hasattr(os, 'mkfifo'), reason='needs named pipes')
def test_R29_pipes_are_not_read(tmp_path):
    "A named pipe, which nobody writes to, and a device: refused before anything waits"
    os.mkfifo(tmp_path/'pipe')
    for o in (tmp_path/'pipe', Path('/dev/zero')):
        with pytest.raises(CheckpointError, match='a pipe or a device, save what comes out of it as a file '
                                                  'first') as error: read_checkpoint(o)
        one_sentence(error, o)

# R30: one flipped bit

@both
def test_R30_one_flipped_bit_of_ours_is_refused(files, tmp_path, family):
    "50 anywhere, 50 in the table of contents of the zip archive, 50 in the digest and its mark"
    raw,m,path,rng = (files/family/'own').read_bytes(),build(family),tmp_path/'own.pth',random.Random(0)
    old,table = snapshot(m),raw.rindex(b'revvit sha256 ')
    # where the last record of the archive says that the table begins
    start = int.from_bytes(raw[table-6:table-2], 'little')
    for a,b in ((0, len(raw)), (start, table), (table-22, len(raw))):
        for bit in rng.sample(range(8*a, 8*b), 50):
            bad = bytearray(raw)
            bad[bit//8] ^= 1<<bit%8
            path.write_bytes(bad)
            for read in (lambda: load_checkpoint(m, path), lambda: load_checkpoint(m, path, strict=False),
                         lambda: load_model(path)):
                with pytest.raises(CheckpointError) as error: read()
                one_sentence(error, path)
    assert same(m, old)
    path.write_bytes(raw)
    assert load_checkpoint(m, path).share == 1

# R31: what does not fit

@every
def test_R31_other_classes_depth_width_and_names_are_refused_by_name(files, tmp_path, family, kind):
    path,deeper,places = files/family/kind,7 if family != 'vit' else 5,dict(vit=16, mvit=256, clips=64)[family]
    cases = ((dict(num_classes=7), ['2 shapes differ: head.weight is (10, ', ' in the file and (7, ', 'new_head=True']),
             (dict(depth=deeper), ['tensors only in the model: ', '.f.norm.weight']),
             (dict(embed_dim=96), [' shapes differ: pos_embed is (1, ', ' in the model, ']),
             (dict(img_size=96), [f'1 shape differs: pos_embed is (1, {places}, ', 'new_size=True resamples']))
    times = (dict(num_frames=8), ['1 shape differs: pos_embed_temporal is (1, 2, 16) in the file and (1, 4, 16) in the '
                                  'model', 'from 2x8x8 to 4x8x8 patches'])
    for changes,why in (*cases, *([times] if family == 'clips' else [])):
        m = build(family, **changes)
        old = snapshot(m)
        with pytest.raises(CheckpointError) as error: load_checkpoint(m, path)
        one_sentence(error, weights_of(path))
        assert all(o in str(error.value) for o in why), str(error.value)
        assert same(m, old)
    torch.save({f'net.{k}': v for k,v in build(family).state_dict().items()}, tmp_path/'names.pth')
    m = build(family)
    old = snapshot(m)
    for kw in (dict(), dict(strict=False), dict(new_head=True, new_size=True)):
        with pytest.raises(CheckpointError, match='tensors only in the file: net.pos_embed'):
            load_checkpoint(m, tmp_path/'names.pth', **kw)
    assert same(m, old)

@every
def test_R31_loose_loading_says_what_it_loaded_and_refuses_nothing_at_all(files, family, kind):
    m,ref = build(family, num_classes=7),build(family)
    load_checkpoint(ref, files/family/kind)
    report = load_checkpoint(m, files/family/kind, strict=False)
    assert [n for n,*_ in report.mismatched] == ['head.weight','head.bias'] and not report.missing
    assert not report.unexpected and .9 < report.share < 1
    assert all(torch.equal(m.state_dict()[n], ref.state_dict()[n]) for n in report.loaded)
    assert len(report.loaded) == len(ref.state_dict())-2
    wrong = build(family, embed_dim=60, num_heads=3)
    old = snapshot(wrong)
    with pytest.raises(CheckpointError, match='nothing was loaded'):
        load_checkpoint(wrong, files/family/kind, strict=False)
    assert same(wrong, old)

@every
def test_R31_new_classes_and_sizes_are_asked_for_and_reported(files, tmp_path, family, kind):
    """The classifier stays as it was drawn, position vectors are timm's resampled ones, all else is the file's; a
    renamed or wrong tensor is refused as ever"""
    path,ref = files/family/kind,build(family)
    load_checkpoint(ref, path)
    bigger = dict(img_size=(96,64), num_classes=7, **(dict(num_frames=8) if family == 'clips' else {}))
    m = build(family, **bigger)
    drawn,h = snapshot(m),ref.head.weight.shape[1]
    for kw in (dict(new_head=True), dict(new_size=True)):
        with pytest.raises(CheckpointError, match='shapes? differ'): load_checkpoint(m, path, **kw)
    assert same(m, drawn)
    likeness = build(family) # the same classes: asked to leave the classifier, it is left
    mine = likeness.head.weight.clone()
    assert load_checkpoint(likeness, path, new_head=True).left == [('head.weight', (10,h), (10,h)),
        ('head.bias', (10,), (10,))] and torch.equal(likeness.head.weight, mine)
    report = load_checkpoint(m, path, new_head=True, new_size=True)
    assert report.left == [('head.weight', (10,h), (7,h)), ('head.bias', (10,), (7,))] and not report.problems()
    assert 'left out as asked: head.weight' in str(report)
    assert report.resampled == (ref.patch_embed.grid_size, m.patch_embed.grid_size)
    assert 'position embedding resampled' in str(report)
    got,(old,new) = m.state_dict(),(o.patch_embed.grid_size[-2:] for o in (ref, m))
    for k,v in ref.state_dict().items():
        if k.startswith('head.'): want = drawn[k]
        elif k == 'pos_embed': want = timm.layers.resample_abs_pos_embed(v, list(new), list(old), 0)
        elif k == 'pos_embed_temporal':
            want = torch.nn.functional.interpolate(v.transpose(1, 2), 4, mode='linear').transpose(1, 2)
        else: want = v
        torch.testing.assert_close(got[k], want, rtol=0, atol=1e-6)
    assert m.eval()(torch.zeros(1, 3, *((8,) if family == 'clips' else ()), 96, 64)).shape == (1,7)
    if kind != 'safetensors':
        torch.manual_seed(0)
        # timm's own loader, which leaves and resamples without a word
        timms = by_timm(family, weights_of(path), **bigger)
        assert all(torch.equal(timms.state_dict()[k], v) for k,v in got.items() if not k.startswith('head.'))
    for change in (lambda t: t | {'nose': torch.zeros(1)}, lambda t: {k+'x'*(k=='pos_embed'): v for k,v in t.items()},
                   lambda t: t | {'neck.fusion.norm.weight': torch.zeros(3)}):
        torch.save(change(ref.state_dict()), tmp_path/'odd.pth')
        other = build(family, **bigger)
        old = snapshot(other)
        with pytest.raises(CheckpointError, match='does not fit'):
            load_checkpoint(other, tmp_path/'odd.pth', new_head=True, new_size=True)
        assert same(other, old)

def test_R31_what_is_no_model_of_ours_is_not_filled(files):
    "Another module, a model inside a wrapper, and one without numbers"
    with torch.device('meta'): nowhere = build('vit')
    cases = ((torch.nn.Linear(1, 1), 'cannot fill a Linear: expected a RevViT, RevMViT or detector, without'),
             (torch.nn.Sequential(build('vit')), 'cannot fill a Sequential'),
             (nowhere, 'on the meta device, where it has no numbers'))
    for m,words in cases:
        with pytest.raises(ValueError, match=words): load_checkpoint(m, files/'vit'/'own')

def test_R31_a_shallower_model_and_content_without_tensors(files, tmp_path):
    m = build('vit', depth=3)
    old = snapshot(m)
    with pytest.raises(CheckpointError, match='12 tensors only in the file: blocks.3.f.norm.weight'):
        load_checkpoint(m, files/'vit'/'own')
    torch.save(dict(epoch=3), tmp_path/'no.pth')
    with pytest.raises(CheckpointError, match='no.pth: expected tensors by name'): load_checkpoint(m, tmp_path/'no.pth')
    assert same(m, old)

@pytest.mark.parametrize('family, other', [('vit','clips'), ('clips','vit'), ('mvit','clips'), ('clips','mvit')])
def test_R31_a_file_for_one_kind_of_model_is_no_file_for_the_other(files, family, other):
    m = build(family)
    old = snapshot(m)
    with pytest.raises(CheckpointError, match=f'does not fit this {type(m).__name__}'):
        load_checkpoint(m, files/other/'own', new_head=True, new_size=True)
    assert same(m, old)

def test_R31_a_model_without_a_classifier(files):
    left = load_checkpoint(build('vit', num_classes=0), files/'vit'/'own', new_head=True).left
    assert left==[('head.weight', (10,96), None), ('head.bias', (10,), None)]

def test_R31_a_turned_grid_of_as_many_patches(tmp_path):
    "Our files know their grid: 4x8 into 8x4 is noticed, left alone in loose mode, and resampled when asked for"
    wide,tall = build('vit', img_size=(32,64)),build('vit', img_size=(64,32))
    file,drawn = save_checkpoint(wide, tmp_path/'wide.pth'),tall.pos_embed.clone()
    with pytest.raises(CheckpointError, match='from 4x8 to 8x4 patches'): load_checkpoint(tall, file)
    load_checkpoint(tall, file, strict=False)
    assert torch.equal(tall.pos_embed, drawn)
    assert load_checkpoint(tall, file, new_size=True).resampled==((4,8),(8,4))
    want = timm.layers.resample_abs_pos_embed(wide.pos_embed, [8,4], [4,8], 0)
    torch.testing.assert_close(tall.pos_embed, want, rtol=0, atol=0)

v = torch.zeros(1, 16, 2)
grids = [({'backbone.pos_embed': v}, (2,8), (2,8)), ({'pos_embed': v}, (5,8), (4,4)), ({'head.bias': v}, (5,8), (5,8)),
         ({'pos_embed_spatial': v, 'pos_embed_temporal': v}, (8,5,8), (16,4,4))]

@pytest.mark.parametrize('stored, new, want', grids, ids=['own','square','none','times'])
def test_the_grid_of_a_published_file_is_the_models_or_a_square(stored, new, want):
    assert _stored_grid(stored, new)==want

# our own files

def test_what_a_file_of_ours_says_goes_with_the_model(tmp_path):
    """Class names and settings, on through another file; the names are gone with the classes, also when there are as
    many again"""
    m = build('vit', num_classes=5)
    own = save_checkpoint(m, tmp_path/'own.pth', class_names='abcde',
                          input_settings=dict(mean=(.5,.5,.5), interpolation='bilinear'))
    back = load_model(own)
    cfg = timm.data.resolve_model_data_config(back)
    assert (back.pretrained_cfg['label_names'], cfg['mean'], cfg['interpolation'],
            back.training)==([*'abcde'], (.5,.5,.5), 'bilinear', False)
    first,second = read_checkpoint(own),read_checkpoint(save_checkpoint(back, tmp_path/'second.pth'))
    assert all(first[k]==second[k] for k in ('input_settings','class_names'))
    assert 'revvit.models' not in repr({k: o for k,o in first.items() if k!='state_dict'})
    for n in (5, 2):
        other = load_model(own)
        other.reset_classifier(n)
        assert read_checkpoint(save_checkpoint(other, tmp_path/'other.pth'))['class_names'] is None
    with pytest.raises(ValueError, match='2 class names for 5 classes'): save_checkpoint(m, own, class_names='ab')
    with pytest.raises(ValueError, match='cannot save a Linear: it does not say how it was built'):
        save_checkpoint(torch.nn.Linear(1, 1), own)
    with pytest.raises(ValueError, match="unknown input settings .'avg'.: expected some of"): input_settings(m, avg=3)

@pytest.mark.parametrize('change, words', [(dict(model='Net'), 'holds a Net, version 1: this revvit knows RevViT, '
                                            'RevMViT, version 1'),
    (dict(version=2), 'version 2'), (dict(model_args=dict(wings=2)), 'cannot build the RevViT'),
    (dict(format='x'), 'was not written by save_checkpoint')])
def test_a_file_from_another_time_is_refused(files, tmp_path, change, words):
    write_checkpoint(tmp_path/'odd.pth', dict(read_checkpoint(files/'vit'/'own'), **change))
    with pytest.raises(CheckpointError, match=words) as error: load_model(tmp_path/'odd.pth')
    one_sentence(error, tmp_path/'odd.pth')

@pytest.mark.parametrize('change, words', [(dict(architecture='resnet18', model_args={}, pretrained_cfg={}),
                                            'holds a ResNet: this revvit knows RevViT, RevMViT'),
    (dict(architecture='nose'), 'Unknown model'), (dict(model_args=dict(wings=2)), 'wings'),
    ('{"a', 'config.json describes: JSONDecodeError')], ids=['resnet','unknown','wings','cut'])
def test_a_hub_folder_of_another_kind_is_refused(files, tmp_path, change, words):
    shutil.copytree(files/'vit'/'hub', tmp_path/'hub')
    config = tmp_path/'hub'/'config.json'
    config.write_text(change if isinstance(change, str) else json.dumps({**json.loads(config.read_text()), **change}))
    with pytest.raises(CheckpointError, match=words): load_model(tmp_path/'hub')

def test_timm_prepares_images_as_the_publishers_do():
    """Short side to 256, bicubic, the central 224, mean and standard deviation: by hand, and from the settings of
    each published model"""
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (300,400,3), np.uint8))
    steps = (transforms.Resize(256, transforms.InterpolationMode.BICUBIC),transforms.CenterCrop(224),
             transforms.ToTensor())
    want = transforms.Compose([*steps, transforms.Normalize((.485,.456,.406), (.229,.224,.225))])(picture)
    for name in timm.list_pretrained('rev*vit*in1k'):
        with torch.device('meta'): m = timm.create_model(name)
        for cfg in (timm.data.resolve_model_data_config(m), input_settings(m)):
            torch.testing.assert_close(timm.data.create_transform(**cfg)(picture), want, rtol=0, atol=0)

# Hub folders and settings

@pytest.mark.parametrize('safe', [False, True])
@pytest.mark.parametrize('name', timm.list_models('rev*vit*'))
def test_a_model_comes_back_from_a_hub_folder_as_it_was(tmp_path, name, safe):
    "Weights, arguments, class names, input settings and timm's data configuration, for arguments far from the defaults"
    clip = '16x4' in name
    args = dict(img_size=(32,64), num_classes=3, in_chans=1, drop_path_rate=.1,
                shared_drop_path=True) | (dict(patch_size=8, embed_dim=24, num_heads=2, depth=2) if 'patch' in name else
        dict(embed_dim=8, depth=4, stage_starts=(2,), stream_fusion='mean') | (dict(num_frames=4) if clip else {}))
    overlay = dict(mean=(.4,), std=(.2,), crop_pct=.9) | (dict(frame_stride=2, frame_rate=25) if clip else {})
    torch.manual_seed(0)
    m = timm.create_model(name, pretrained_cfg_overlay=overlay, **args)
    save_for_hf(m, tmp_path/'hub', model_args=m.model_args, model_config=dict(label_names=['a','b','c']),
                safe_serialization=safe)
    plain = lambda o: json.loads(json.dumps(o))
    settings = input_settings(m)
    assert settings['input_size'] == ((1,4,32,64) if clip else (1,32,64)) and settings['crop_pct'] == .9
    assert (not clip or (settings['frame_stride'], settings['frame_rate']) == (2,25))
    for back in (timm.create_model(f"local-dir:{tmp_path/'hub'}", pretrained=True), load_model(tmp_path/'hub')):
        assert type(back) is type(m) and same(back, snapshot(m)) and back.model_args == m.model_args
        assert back.pretrained_cfg['label_names'] == ['a','b','c'] and back.pretrained_cfg['architecture'] == name
        assert plain(input_settings(back)) == plain(settings)
        assert (plain(timm.data.resolve_model_data_config(back)) == plain({k:v for k,v in settings.items()
            if not k.startswith('frame')}))
        x = torch.randn(2, *settings['input_size'])
        assert torch.equal(back.eval()(x), m.eval()(x))
    # and on: a file of ours, a folder again
    own = save_checkpoint(load_model(tmp_path/'hub'), tmp_path/'own.pth', class_names='abc')
    save_for_hf(load_model(own), tmp_path/'again', safe_serialization=safe)
    again = load_model(tmp_path/'again')
    assert same(again, snapshot(m)) and plain(input_settings(again)) == plain(settings)
    assert again.pretrained_cfg['label_names'] == ['a','b','c']

def test_published_weights_say_where_they_are_and_how_inputs_were_prepared():
    fb,mm = ('https://dl.fbaipublicfiles.com/pyslowfast/rev/',
             'https://download.openmmlab.com/mmclassification/v0/revvit/revvit-')
    assert {n: timm.get_pretrained_cfg(n).url for n in timm.list_pretrained('rev*vit*')} == {
        'revvit_small_patch16_224.fb_in1k': fb+'REV_VIT_S.pyth',
        'revvit_small_patch16_224.mmpretrain_in1k': mm+'small_3rdparty_in1k_20221213-a3a34f5c.pth',
        'revvit_base_patch16_224.fb_in1k': fb+'REV_VIT_B.pyth',
        'revvit_base_patch16_224.mmpretrain_in1k': mm+'base_3rdparty_in1k_20221213-87a7b0a5.pth',
        'revmvit_base_224.fb_in1k': fb+'REV_MVIT_B.pyth', 'revmvit_base_16x4_224.fb_k400': fb+'REV_MVIT_B_16x4.pyth'}
    for name in timm.list_pretrained('rev*vit*'):
        with torch.device('meta'): m = timm.create_model(name)
        cfg,clip = timm.data.resolve_model_data_config(m),'k400' in name
        assert (cfg['mean'], cfg['std'], cfg['interpolation'],
                m.num_classes) == (((.45,)*3, (.225,)*3, 'bilinear', 400)
                                   if clip else ((.485,.456,.406), (.229,.224,.225), 'bicubic', 1000))
        assert (cfg['input_size'], cfg['crop_pct'], cfg['crop_mode']) == ((3,16,224,224) if clip else (3,224,224),
            .875, 'center')
        resize,crop,*_ = timm.data.create_transform(**cfg).transforms
        assert (resize.size, resize.interpolation.value, crop.size) == (256, cfg['interpolation'], (224,224))
        if clip: assert (m.pretrained_cfg['frame_stride'], m.pretrained_cfg['frame_rate']) == (4,30)

# R32: saving is atomic

# a save of theirs takes milliseconds
quick = dict(vit=dict(depth=2, embed_dim=24), clips=dict(depth=3, stage_starts=(1,), embed_dim=8))

def writer(family, path):
    "Replace the checkpoint again and again, each time with one number in all weights"
    model = build(family, **quick[family])
    for i in range(10**9):
        with torch.no_grad():
            for p in model.parameters(): p.fill_(i)
        save_checkpoint(model, path, extra=dict(i=i))

@pytest.mark.skipif(not hasattr(os, 'fork'), reason='needs fork')
@pytest.mark.parametrize('family', quick)
def test_R32_a_killed_writer_leaves_a_whole_file(tmp_path, family):
    """30 times SIGKILL at a random moment of a save or shortly after; the file always loads and is of one piece, and
    the next save clears what was left behind"""
    path,rng,leftovers = tmp_path/'last.pth',random.Random(0),0
    save_checkpoint(build(family, **quick[family]), path, extra=dict(i=-1))
    for _ in range(30):
        pid = os.fork()
        if not pid:
            try: writer(family, path)
            finally: os._exit(1)
        end = time.monotonic()+20
        # until a save is under way
        while not any(tmp_path.glob(f'.*-{pid}.tmp')) and time.monotonic() < end: time.sleep(.0005)
        time.sleep(rng.uniform(0, .03))
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        leftovers += len(list(tmp_path.glob('.*.tmp')))
        i,model = read_checkpoint(path)['extra']['i'],build(family, **quick[family])
        assert load_checkpoint(model, path).share == 1
        if i >= 0: assert all((p == i).all() for p in model.parameters())
    assert leftovers, 'no kill hit a save: the test shows nothing'
    save_checkpoint(build(family, **quick[family]), path)
    assert [o.name for o in tmp_path.iterdir()] == ['last.pth']

@both
def test_R32_a_full_disk_leaves_the_file_that_was_there(tmp_path, family):
    "Imitated by a limit on the size of files, at nothing, a part and nearly all of it"
    path,m = tmp_path/'last.pth',build(family)
    was = save_checkpoint(m, path).read_bytes()
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    for size in (0, 100, len(was)//2, len(was)-90, len(was)-1):
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, limit[1]))
        try:
            with pytest.raises(CheckpointError, match='cannot write') as error: save_checkpoint(build(family), path)
        finally: resource.setrlimit(resource.RLIMIT_FSIZE, limit)
        one_sentence(error, path)
        assert path.read_bytes() == was and [o.name for o in tmp_path.iterdir()] == ['last.pth']
    assert load_model(path).num_classes == 10

# --- models that are not what they say of themselves

def shortened(m):
    if hasattr(m, 'blocks'): m.blocks = m.blocks[:2]
    else: m.stages[-1] = m.stages[-1][:1]

def other_head(m): m.head = torch.nn.Sequential(torch.nn.Linear(m.num_features, 4), torch.nn.Linear(4, 10))
def adapted(m): m.patch_embed.down = torch.nn.Linear(2, 2)
def smaller(m): m.head = torch.nn.Linear(m.num_features, 3)

@pytest.mark.parametrize('change', [shortened, other_head, adapted, smaller], ids=lambda o: o.__name__)
@both
def test_a_changed_model_is_written_with_a_warning(tmp_path, family, change):
    "Its file could be written, and the loss was found when it was read; the numbers are there"
    m = build(family)
    change(m)
    with pytest.warns(UserWarning, match=r'was changed after it was built, \d+ tensors: .*load_model cannot build it'):
        path = save_checkpoint(m, tmp_path/'m.pth')
    with pytest.raises(CheckpointError, match='does not fit'): load_model(path)
    twin = build(family)
    change(twin)
    twin.load_state_dict(read_checkpoint(path)['state_dict'])
    assert all(torch.equal(a, b) for a,b in zip(m.state_dict().values(), twin.state_dict().values(), strict=True))

def other_classes(m): m.reset_classifier(3)
def other_size(m): m.set_input_size(img_size=64)
def pruned(m): m.prune_intermediate_layers([0])
def untouched(m): pass

@pytest.mark.parametrize('change', [other_classes, other_size, pruned, untouched], ids=lambda o: o.__name__)
@both
def test_what_a_model_knows_of_its_changes_is_no_warning(tmp_path, family, change):
    m = build(family)
    if change is pruned and family != 'vit': pytest.skip('the classifier stays that of the last stage')
    change(m)
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        back = load_model(save_checkpoint(m, tmp_path/'m.pth'))
    assert all(torch.equal(a, b) for a,b in zip(m.state_dict().values(), back.state_dict().values(), strict=True))

@both
def test_a_compiled_model_is_written_as_the_model(tmp_path, family):
    "The wrapper answers for what it wraps, and a file of an OptimizedModule was one that nobody could read"
    m = build(family)
    back = load_model(save_checkpoint(torch.compile(m), tmp_path/'m.pth'))
    assert type(back) is type(m) and all(torch.equal(a, b) for a,b in zip(m.parameters(), back.parameters()))
