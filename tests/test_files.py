"""The reader's sentences, the seal and the one writer, case by case: what the notebook 17_files shows once

Files of models: test_checkpoints.py"""
import io, os, pickle, platform, subprocess, zipfile
from pathlib import Path

import pytest, safetensors.torch, torch
from torch.testing import assert_close
from revvit.models.files import (CheckpointError, _reason, _temporary, is_sealed, read_checkpoint, replacing, seal,
                                 weights_file, write_checkpoint, write_file)

pytestmark = pytest.mark.filterwarnings('ignore')

unsafe = pickle.UnpicklingError('Unsupported global: GLOBAL os.system was not')
reasons = [
    (b'', EOFError(), "the file is empty"),
    (b'\n <!DOCTYPE html>', KeyError(), "it is a web page, perhaps an error page saved by a download"),
    (b'version https://git-lfs.github.com', KeyError(), "it is a Git LFS pointer, not the weights themselves"),
    (b'PK\3\4', RuntimeError('archive'), "it is damaged or incomplete"),
    (b'\x10\0\0\0\0\0\0\0{"a', ValueError(), "it is a damaged or incomplete safetensors file"),
    (b'abc', EOFError(), "it is no PyTorch checkpoint and no safetensors file, or it is damaged"),
    (b'\x80', unsafe, "it asks to call os.system, and reading weights never calls anything")]

@pytest.mark.parametrize('start, error, words', reasons, ids=[o[2][:30] for o in reasons])
def test_reasons(start, error, words): assert _reason(start, error)==words

def archive():
    f = io.BytesIO()
    torch.save(dict(w=torch.arange(3.)), f)
    return f

def test_a_seal_is_the_archives_comment_and_every_bit_of_it_counts():
    f = archive()
    seal(f)
    raw = f.getvalue()
    with zipfile.ZipFile(f) as z: assert z.comment==raw[-78:] and raw[-78:-64]==b'revvit sha256 '
    for bit in range(8*(len(raw)-64), 8*len(raw)):
        bad = bytearray(raw)
        bad[bit//8] ^= 1<<bit%8
        with pytest.raises(CheckpointError, match='do not match its digest'): is_sealed(io.BytesIO(bad))
    for other in (raw[:-1], archive().getvalue(), b'short', b''): assert not is_sealed(io.BytesIO(other))

def test_a_file_of_ours_without_its_seal(tmp_path):
    torch.save(dict(format='revvit', version=1), tmp_path/'a.pth')
    with pytest.raises(CheckpointError, match='it has lost the digest it was written with'):
        read_checkpoint(tmp_path/'a.pth')

@pytest.mark.parametrize('content, what', [([1], 'list'), (torch.zeros(1), 'Tensor'), (3, 'int')], ids=str)
def test_a_file_that_holds_no_dictionary(tmp_path, content, what):
    torch.save(content, tmp_path/'a.pth')
    with pytest.raises(CheckpointError, match=f'a.pth: it holds a {what}, not a dictionary'):
        read_checkpoint(tmp_path/'a.pth')

def test_safetensors_alone_and_in_a_folder(tmp_path):
    "Whatever the dtype, the shape or the name; and what was read stays when the file is cut"
    tensors = dict(a=torch.arange(3.), b=torch.zeros(0, 2), c=torch.tensor(1.5, dtype=torch.bfloat16),
                   d=torch.ones(2, 2).bool())
    (tmp_path/'model.safetensors').write_bytes(safetensors.torch.save(tensors))
    assert weights_file(tmp_path)==tmp_path/'model.safetensors' and weights_file(tmp_path/'x.pth')==tmp_path/'x.pth'
    got = read_checkpoint(tmp_path)
    assert_close(read_checkpoint(tmp_path/'model.safetensors'), got, rtol=0, atol=0)
    os.truncate(tmp_path/'model.safetensors', 0)
    assert got.keys()==tensors.keys()
    for k,v in tensors.items(): assert_close(got[k], v, rtol=0, atol=0)

@pytest.mark.parametrize('data', ['zwei\nünï\n', b'\0\1\2', '', b''], ids=repr)
def test_write_file(tmp_path, data):
    path = tmp_path/'a.txt'
    path.write_text('what was there')
    write_file(str(path), data)
    assert path.read_bytes()==(data if isinstance(data, bytes) else data.encode())
    assert [o.name for o in tmp_path.iterdir()]==['a.txt']

@pytest.mark.parametrize('error', [KeyboardInterrupt, ValueError, SystemExit, OSError(28, 'No space left on device')],
                         ids=repr)
def test_an_error_in_between_leaves_the_file_that_was_there(tmp_path, error):
    path = tmp_path/'a.txt'
    path.write_text('old')
    with pytest.raises(type(error) if isinstance(error, Exception) else error) as caught:
        with replacing(path) as f:
            f.write(b'new')
            raise error
    assert path.read_text()=='old' and [o.name for o in tmp_path.iterdir()]==['a.txt']
    if isinstance(error, OSError): assert caught.value.filename==str(path) and caught.value.errno==28

@pytest.mark.parametrize('place', ['none/a.txt', 'folder', 'file/a.txt'])
def test_a_place_that_cannot_be_written_is_named(tmp_path, place):
    (tmp_path/'folder').mkdir()
    (tmp_path/'file').touch()
    with pytest.raises(OSError) as error: write_file(tmp_path/place, 'x')
    assert error.value.filename==str(tmp_path/place) and error.value.strerror
    assert sorted(o.name for o in tmp_path.rglob('*'))==['file', 'folder']

@pytest.mark.skipif(os.name!='posix', reason='asks the system whether a process lives')
def test_leftovers_of_dead_processes_go_and_of_living_ones_stay(tmp_path):
    dead = subprocess.Popen(['true'])
    dead.wait()
    mine,stale,other = (tmp_path/f'.a.pth.{platform.node()}-{o}.tmp' for o in (os.getpid(), dead.pid, 1))
    elsewhere,unlike = (tmp_path/f'.a.pth.another-host-{dead.pid}.tmp',
                        tmp_path/f'.b.pth.{platform.node()}-{dead.pid}.tmp')
    for o in (mine, stale, other, elsewhere, unlike): o.touch()
    assert _temporary(tmp_path/'a.pth')==mine
    assert [o.exists() for o in (mine, stale, other, elsewhere, unlike)]==[True, False, True, True, True]

def test_bytes_reach_the_disk_before_they_take_the_name(tmp_path, monkeypatch):
    steps,sync,replace = [],os.fsync,os.replace
    monkeypatch.setattr('os.fsync', lambda f: (steps.append('sync'), sync(f)))
    monkeypatch.setattr('os.replace', lambda a,b: (steps.append('replace'), replace(a, b)))
    for path in (tmp_path/'a.txt', tmp_path/'runs'/'b.pth'):
        (write_file if path.suffix=='.txt' else write_checkpoint)(path, {} if path.suffix=='.pth' else '')
    assert steps==['sync','replace']*2

@pytest.mark.parametrize('place, content, words', [
    ('ours.pth', lambda: dict(a=torch.zeros(1).numpy()), r'ours.pth: it would hold numpy\..*, which reading'),
    ('ours.pth', lambda: dict(a=lambda: 0), r"ours.pth: Can't pickle .* \(is there room on the disk\?\)"),
    ('.', dict, 'Is a directory'), ('ours.pth/x/y.pth', dict, 'cannot make the folder .*ours.pth/x: Not a directory')])
def test_a_checkpoint_that_cannot_be_written_leaves_what_was_there(tmp_path, place, content, words):
    write_checkpoint(tmp_path/'ours.pth', dict(a=[1]))
    was = (tmp_path/'ours.pth').read_bytes()
    with pytest.raises(CheckpointError, match=words): write_checkpoint(tmp_path/place, content())
    assert (tmp_path/'ours.pth').read_bytes()==was and [o.name for o in tmp_path.iterdir()]==['ours.pth']

def test_every_writer_of_the_package_is_this_one():
    "No other module renames a file into its place; folders of drawn data are moved by one function"
    root = Path(__file__).resolve().parent.parent/'revvit'
    others = [p.relative_to(root).as_posix() for p in root.rglob('*.py')
              if 'os.replace(' in p.read_text(encoding='utf8')]
    assert set(others)=={'models/files.py', 'data/made_once.py'}

def test_flags_that_timm_leaves_in_a_file(tmp_path):
    "`train.py` saves its argparse.Namespace: read as the values it is, and with no way past the bound on sizes"
    from argparse import Namespace
    weights = {'head.weight': torch.ones(2, 3)}
    torch.save(dict(epoch=3, arch='revvit_tiny_patch16_224', state_dict=weights, version=2,
                    args=Namespace(lr=.1, model='a'), metric=.5), tmp_path/'m.pth.tar')
    content = read_checkpoint(tmp_path/'m.pth.tar')
    assert content['args'].lr==.1 and torch.equal(content['state_dict']['head.weight'], weights['head.weight'])
    torch.save(dict(state_dict=weights, args=Namespace(x=torch.zeros(1).expand(10**7))), tmp_path/'big.pth')
    with pytest.raises(CheckpointError, match='larger than the file'): read_checkpoint(tmp_path/'big.pth')
