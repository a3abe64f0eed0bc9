"""The loader on toy items: draws and orders that depend on seed, epoch and index alone (R40), what fastai does with it,
and files: which are read, what is wrong with them (R35, R38), and their names in errors (R37)"""
import copy, gc, multiprocessing, os, pickle, random, signal, time, warnings
from contextlib import nullcontext
from itertools import chain
from pathlib import Path

import numpy as np, pytest, torch
from fastai.callback.core import Callback
from fastai.data.core import TfmdDL
from fastai.learner import Learner
from fastai.losses import CrossEntropyLossFlat
from fastai.vision.core import TensorImage
from PIL import Image
from torch.testing import assert_close
from torch.utils.data import Dataset
import revvit.data.digits as digits, revvit.data.from_files as from_files, revvit.data.loader as loading
from revvit.data.digits import digits_dls
from revvit.data.from_files import (a_few, and_more, class_items, file_dls, image_suffixes, is_hidden, naming_file,
    readable)
from revvit.data.loader import EpochDL, ReadingLoader, UnreadableFile, epoch_batches, seeded

def warned(call):
    "The answer, and what was warned"
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter('always', UserWarning)
        return call(), [str(o.message) for o in said if o.category is UserWarning]

def draws(): return random.random(), np.random.rand(), torch.rand(1).item()

# ---------------------------------------------------------------- draws

def test_R40_seeded_is_a_function_of_its_key():
    def of(*key):
        with seeded(*key): return draws()
    assert of(0,1,2) == of(0,1,2)
    assert len({o for k in ((0,1,2), (0,1,3), (0,2,2), (1,1,2)) for o in of(*k)}) == 12

def test_R40_seeded_leaves_no_trace_even_if_what_is_inside_fails():
    def begin(): torch.manual_seed(1); np.random.seed(1); random.seed(1)
    begin(); want = draws(),draws()
    begin(); first = draws()
    with pytest.raises(ZeroDivisionError), seeded(5): draws(),1/0
    assert (first, draws()) == want

@pytest.mark.parametrize('workers', [0,2])
def test_R40_an_item_draws_anew_in_each_epoch(workers):
    "Augmentation that came back the same would be none"
    class Drawing:
        def __len__(self): return 4
        def __getitem__(self, i): return torch.rand(1),torch.tensor(i)
    def passes(dl): return [[x.as_subclass(torch.Tensor).tolist() for x,_ in dl] for _ in range(2)]
    def made(): return EpochDL(Drawing(), seed=1, bs=2, num_workers=workers, device=torch.device('cpu'))
    first,second = passes(made())
    assert {o for b in first for o, in b}.isdisjoint(o for b in second for o, in b)
    assert [first,second] == passes(made())

class Letters(Dataset):
    def __len__(self): return 200
    def __getitem__(self, i): return torch.tensor([i])

@pytest.mark.skipif(not hasattr(signal, 'SIGKILL'), reason='needs signals')
def test_R39_a_worker_killed_while_it_holds_a_lock():
    """R39: every worker asks before each batch whether it is to end. Killed in the middle of that question it leaves
    the lock shut, and PyTorch's loader would wait for it without an end"""
    it = iter(ReadingLoader(Letters(), None, num_workers=2))
    next(it)
    it.gi_yieldfrom._workers_done_event.event._cond.acquire()
    start = time.monotonic()
    os.kill(multiprocessing.active_children()[0].pid, signal.SIGKILL)
    with pytest.raises(RuntimeError, match='DataLoader worker'): list(it)
    assert time.monotonic()-start < 30
    del it; gc.collect()
    assert not multiprocessing.active_children()

# ---------------------------------------------------------------- orders

@pytest.mark.parametrize('bs', [1,2,3])
@pytest.mark.parametrize('world', [1,2,3])
def test_R40_batches_of_processes_are_parts_of_one_order(bs, world):
    for epoch in (0,1):
        one = epoch_batches(20, bs*world, epoch, seed=3, shuffle=True, drop_last=True)
        kwargs = dict(epoch=epoch, seed=3, shuffle=True, drop_last=True, world=world)
        parts = [epoch_batches(20, bs, rank=r, **kwargs) for r in range(world)]
        assert [sum(o, []) for o in zip(*parts)] == one and len(one) == 20//(bs*world)

@pytest.mark.parametrize('n', [1,7,8])
@pytest.mark.parametrize('world', [1,2,3])
def test_R40_held_out_items_are_dealt_out_once(n, world):
    parts = [epoch_batches(n, 2, rank=r, world=world) for r in range(world)]
    assert sorted(chain(*chain(*parts))) == list(range(n))
    lengths = [len(EpochDL(range(n), bs=2, rank=r, world=world)) for r in range(world)]
    assert lengths == [len(o) for o in parts] and max(lengths)-min(lengths) <= 1

def test_R40_another_seed_or_epoch_is_another_order():
    def order(**kw): return epoch_batches(10, 10, shuffle=True, **kw)[0]
    seen = [order(), order(seed=1), order(epoch=1), order(seed=1, epoch=1)]
    assert len(set(map(tuple, seen))) == 4 and all(sorted(o) == list(range(10)) for o in seen)

# ---------------------------------------------------------------- passes

class Items:
    "Items that draw from every generator; some are torn"
    def __init__(self, n=10, torn=()): self.n,self.torn = n,torn
    def __getitem__(self, i):
        if i in self.torn: raise UnreadableFile(f"item {i}: torn")
        return torch.tensor([i, random.random(), np.random.rand(), torch.rand(1)])
    def __len__(self): return self.n

def noise(b): return torch.cat([b, torch.rand(len(b), 1)], 1)
def loader(workers=0, torn=(3,4), **kw):
    return EpochDL(Items(torn=torn), **{**dict(bs=4, shuffle=True, num_workers=workers, on_bad='skip', seed=5,
                                               after_batch=noise), **kw})

@pytest.mark.parametrize('workers', [1,2])
@pytest.mark.parametrize('torn', [(), (3,4), (0,)])
def test_R40_workers_change_nothing(workers, torn):
    """Two epochs, equal to the bit with what is left out; then the second alone, and from its middle; looking in
    between changes nothing"""
    want,said = warned(lambda: [list(o) for o in [loader(torn=torn)]*2])
    dl = loader(workers, torn)
    got,also = warned(lambda: [list(dl), list(dl)])
    assert_close(got, want, rtol=0, atol=0)
    assert said == also and not torch.equal(want[0][0][:,1:], want[1][0][:,1:])
    dl.set_epoch(1, batch=1)
    assert_close(dl.one_batch(), want[1][1], rtol=0, atol=0)
    assert_close(list(dl), want[1][1:], rtol=0, atol=0)
    assert (dl.epoch, dl.batch, len(dl)) == (2, 0, 3)

@pytest.mark.parametrize('workers', [0,2])
def test_R35_torn_items_are_left_out_and_named_once(workers):
    dl = loader(workers)
    epochs,said = warned(lambda: [list(dl), list(dl)])
    assert [sorted(int(i) for b in e for i in b[:,0]) for e in epochs] == [[0,1,2,5,6,7,8,9]]*2
    assert dl.bad_items() == [3,4] and said == ['2 of 10 items cannot be read and are left out: 3, 4']

def test_R35_a_torn_item_is_not_opened_again(monkeypatch):
    dl = loader(torn=(2,))
    assert dl.do_item(1) is not None and dl.do_item(2) is None and dl.bad_items() == [2]
    monkeypatch.setattr(Items, '__getitem__', lambda self, i: 1/0)
    assert dl.do_item(2) is None
    with pytest.raises(ZeroDivisionError): dl.do_item(1)

@pytest.mark.parametrize('workers', [0,2])
def test_R40_a_batch_of_torn_items_moves_no_other(workers):
    "Where nothing of a batch can be read the next ones keep their draws and their number"
    def batches(torn): return list(EpochDL(Items(6, torn), bs=2, num_workers=workers, on_bad='skip', after_batch=noise))
    whole,(left,_) = batches(()),warned(lambda: batches((2,3)))
    assert_close(left, [whole[0], whole[2]], rtol=0, atol=0)

@pytest.mark.parametrize('workers', [0,2])
@pytest.mark.parametrize('bs', [1,2])
def test_each_process_has_its_step(bs, workers):
    "Where nothing of a batch can be read in one of three processes the others would wait for it for ever"
    torn = [0,1,2,5,6,7,8]
    def passes(**kw):
        return [[o[:,0].int().tolist() for o in EpochDL(Items(12, torn), bs=bs, num_workers=workers, on_bad='skip',
                                                        rank=rank, world=3, **kw)] for rank in range(3)]
    training,_ = warned(lambda: passes(drop_last=True))
    assert {len(o) for o in training}=={12//3//bs} and not {i for o in training for b in o for i in b}&{*torn}
    assert all(o for p in training for o in p)
    held,_ = warned(passes)   # of which each item counts once
    assert sorted(i for p in held for b in p for i in b)==[3,4,9,10,11]

@pytest.mark.parametrize('workers', [0,2])
def test_R35_raise_leaves_no_worker(workers):
    with pytest.raises(UnreadableFile, match='item [34]: torn'): list(loader(workers, on_bad='raise'))
    gc.collect()
    assert not multiprocessing.active_children()

def test_each_pass_is_the_next_epoch():
    dl = loader(torn=())
    assert (len(dl), len(loader(torn=(), drop_last=True)), dl.epoch) == (3, 2, 0)
    list(dl)
    assert (dl.epoch, dl.batch) == (1, 0)
    dl.set_epoch(7, 2)
    assert dl.get_idxs() == epoch_batches(10, 4, 7, 5, shuffle=True)[2] and (dl.epoch, dl.batch) == (7, 2)
    assert len(list(dl)) == 1 and (dl.epoch, dl.batch) == (8, 0)

@pytest.mark.parametrize('epoch,batch', [(-1,0), (0,4), (0,-1)])
def test_no_such_batch(epoch, batch):
    said = f"epoch {epoch}, batch {batch}: must be from 0 up, and an epoch has 3 batches"
    with pytest.raises(ValueError, match=said): loader().set_epoch(epoch, batch)

@pytest.mark.parametrize('kw,said', [(dict(on_bad='ignore'), "on_bad must be 'raise' or 'skip', got 'ignore'"),
    (dict(seed=-1), "the seed must be a whole number from 0 up, got -1"), (dict(seed=1.5), "whole number from 0 up, "
        "got 1.5")])
def test_wrong_settings(kw, said):
    with pytest.raises(ValueError, match=said): loader(**kw)

# ---------------------------------------------------------------- what fastai does with a loader

def test_new_loaders_keep_what_is_ours():
    dl = loader(rank=1, world=2)
    other = dl.new(Items(3))
    assert (other.seed, other.rank, other.world, other.on_bad, other.n) == (5, 1, 2, 'skip', 3)
    assert dl.new(seed=6).seed == 6
    plain = dl.new(Items(3), cls=TfmdDL)
    assert type(plain) is TfmdDL and plain.n == 3

@pytest.mark.parametrize('how', [copy.deepcopy, lambda o: pickle.loads(pickle.dumps(o))])
def test_loaders_travel(how):
    dl = loader()
    want,_ = warned(lambda: list(dl))
    other = how(dl)
    other.set_epoch(0)
    assert_close(warned(lambda: list(other))[0], want, rtol=0, atol=0)

class Watch(Callback):
    "The items of each batch of a `Learner`"
    def before_fit(self): self.seen = []
    def before_batch(self): self.seen.append(self.x.as_subclass(torch.Tensor).clone())

def test_R40_learner_trains_on_these_batches_and_asks_for_all_in_order():
    "fit, validate, get_preds, predict and test_dl of fastai's own `Learner`"
    dls = digits_dls(bs=479, device='cpu', seed=2)
    model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(256, 10))
    learn = Learner(dls, model, loss_func=CrossEntropyLossFlat(), lr=0., cbs=Watch())
    with learn.no_bar(), learn.no_logging(): learn.fit(1)
    want = [x.as_subclass(torch.Tensor) for x,_ in digits_dls(bs=479, device='cpu', seed=2).train]
    assert_close(learn.watch.seen[:3], want, rtol=0, atol=0)
    with learn.no_bar():
        preds,y = learn.get_preds(act=torch.nn.Identity())
        again,_ = learn.get_preds(dl=dls.test_dl(list(dls.valid_ds.items)), act=torch.nn.Identity())
        name,_,probs = learn.predict(dls.valid_ds.items[7])
    with torch.no_grad(): direct = torch.cat([model(x.as_subclass(torch.Tensor)) for x,_ in dls.valid])
    for o in (preds, again): assert_close(o.as_subclass(torch.Tensor), direct)
    assert y.tolist() == torch.cat([o for _,o in dls.valid]).tolist()
    assert name == dls.vocab[direct[7].argmax()] and probs.argmax() == direct[7].argmax()

def test_show_batch_is_no_pass():
    dls = digits_dls(device='cpu')
    dls.train.show_batch(max_n=2)
    assert (dls.train.epoch, dls.train.batch) == (0, 0)

# ---------------------------------------------------------------- the way to a GPU

@pytest.fixture
def sent(monkeypatch):
    """Batches on their way to a GPU that is not there: device, whether the copy need not be waited for, whether
    pinned, type"""
    seen,pinned = [],[]
    def pin(data, device=None):
        pinned.append(data)
        return list(data)   # PyTorch's makes lists of tuples
    def to_device(b, device=None, non_blocking=False):
        was_pinned = any(all(x is y for x,y in zip(b, o)) for o in pinned)
        seen.append((str(device), non_blocking, was_pinned, type(b)))
        return b
    for o in (from_files,digits): monkeypatch.setattr(o, 'pick_device', torch.device)
    monkeypatch.setattr(loading, 'to_device', to_device)
    # its look at one batch, when a loader is made
    monkeypatch.setattr('fastai.data.core.to_device', lambda b, device: b)
    monkeypatch.setattr('torch.accelerator.is_available', lambda: True)
    monkeypatch.setattr('torch.accelerator.current_accelerator', lambda: torch.device('cuda'))
    monkeypatch.setattr('torch.utils.data._utils.pin_memory.pin_memory', pin)
    monkeypatch.setattr(loading, 'seeded', lambda *key, device=None: nullcontext())
    for o in (digits.Normalize,from_files._Show): monkeypatch.setattr(o, 'to', lambda self, device: None, raising=False)
    return seen

def two_kinds(kind, device):
    if kind == 'digits': return digits_dls(bs=256, device=device)
    cfg = dict(input_size=(1,1,1), mean=(0.,), std=(1.,))
    def read(path): return torch.ones(1,1,1)
    return file_dls((dict(a=0, b=0, c=1, d=1), dict(e=0, f=1), ['x','y']), (read,read), TensorImage, cfg, bs=2,
                    workers=0, device=device)

@pytest.mark.parametrize('part', ['train','valid'])
@pytest.mark.parametrize('kind', ['digits','files'])
@pytest.mark.parametrize('device', ['cuda','cpu'])
def test_batches_go_to_a_gpu_without_waiting(kind, part, device, sent):
    "Pinned, then copied while the host goes on; elsewhere an ordinary copy"
    dl = getattr(two_kinds(kind, device), part)
    sent.clear()
    assert len(list(dl)) == len(dl) == len(sent) and {*sent} == {(device, device == 'cuda', device == 'cuda', tuple)}

# ---------------------------------------------------------------- files

@pytest.mark.parametrize('name,hidden', [('._x.jpg',True), ('.DS_Store',True), ('__MACOSX',True), ('x.jpg',False)])
def test_R38_hidden_names(name, hidden): assert is_hidden(name) == hidden

def test_R35_the_usual_formats_are_read():
    usual = {k for k,v in Image.registered_extensions().items() if v in ('JPEG','PNG','GIF','TIFF','WEBP','BMP')}
    assert usual <= set(image_suffixes)

@pytest.fixture
def files(tmp_path):
    "Paths by what is wrong with them"
    names = {k: str(tmp_path/f'{k}.jpg') for k in ('one','other','empty','gone','link','void')}
    for k in ('one','other'): Path(names[k]).write_bytes(k.encode())
    Path(names['empty']).touch()
    Path(names['link']).symlink_to(names['one'])
    Path(names['void']).symlink_to(tmp_path/'nothing')
    return names

def test_R38_faults_are_named_or_left_out(files):
    one,other,empty,gone,void = (files[o] for o in ('one','other','empty','gone','void'))
    assert readable({one:0}, {other:1}) == ({one:0}, {other:1})
    with pytest.raises(UnreadableFile) as e: readable({one:0, void:0}, {empty:1, gone:0})
    assert str(e.value) == f'{void}: no such image file (and 2 more such files)'
    kept,said = warned(lambda: readable({one:0, void:0}, {empty:1, gone:0, other:1}, kind='video', on_bad='skip'))
    assert kept == ({one:0}, {other:1})
    parts = [f'{void}: no such video file', f'{empty}: the video file is empty (0 bytes)',
             f'{gone}: no such video file']
    assert said == [f"3 unreadable files are left out: {'; '.join(parts)}"]

def test_R38_two_names_for_one_file(files):
    one,link = files['one'],files['link']
    same = f'{one} and {link} are one and the same file'
    with pytest.raises(ValueError, match=f'{same}, in training and held out: allow it by allow_shared'):
        readable({one:0}, {link:0})
    assert warned(lambda: readable({one:0}, {link:0}, allow_shared=True)) == (({one:0}, {link:0}),
        [f'{same}, in training and held out'])
    assert warned(lambda: readable({one:0, link:0}, {})) == (({one:0, link:0}, {}), [same])

def test_R38_class_folders_are_listed_in_order(tmp_path):
    for o in ('b/2.png','b/1.PNG','a/deep/0.jpg'):
        (tmp_path/o).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path/o).touch()
    (items,said) = warned(lambda: class_items(tmp_path, dict(b=7, a=3)))
    assert [(Path(k).relative_to(tmp_path).as_posix(), v) for k,
            v in items.items()] == [('a/deep/0.jpg',3), ('b/1.PNG',7), ('b/2.png',7)]
    assert not said

def test_words():
    assert a_few(['a','b']) == "'a', 'b'" and a_few(list('abcde')) == "'a', 'b', 'c' and 2 more"
    assert and_more(['a']) == '' and and_more(list('abc'), 'lines') == ' (and 2 more such lines)'

@pytest.mark.parametrize('e,said', [(TypeError('no'), 'a/b.jpg: no'), (AssertionError(), 'a/b.jpg'),
    (KeyError('k'), "'a/b.jpg: k'"), (OSError(5, 'torn'), None),
    (UnicodeDecodeError('ascii', b'\xff', 0, 1, 'bad'), None)])
def test_R37_exceptions_gain_the_name_and_keep_their_type(e, said):
    "Those that word their message themselves get a note, where Python has notes"
    before = str(e)
    with pytest.raises(type(e)) as got, naming_file('a/b.jpg'): raise e
    assert got.value is e and str(e) == (said or before)
    if not said and hasattr(e, 'add_note'): assert e.__notes__ == ['while reading a/b.jpg']
