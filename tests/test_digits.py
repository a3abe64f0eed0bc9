"The bundled digits: the split that is pinned, the small changes, the batches (R40)"
import numpy as np, pytest, torch
from fastai.vision.all import TensorImageBW
from torch.testing import assert_close
import revvit.data.digits as module
from revvit.data.digits import DigitJitter, digits, digits_cfg, digits_dls, hold_out

images,labels = digits()

def test_counts_of_ink():
    assert images[0,1].tolist() == [0, 0, 207, 239, 159, 239, 80, 0]
    assert np.bincount(labels).tolist() == [178, 182, 177, 183, 181, 182, 181, 179, 174, 180]

@pytest.mark.parametrize('seed', [0,1])
@pytest.mark.parametrize('per_class', [1,36])
def test_equally_many_of_each_class_are_held_out(per_class, seed):
    kept,held = hold_out(labels, per_class, seed)
    assert np.bincount(labels[held]).tolist() == [per_class]*10
    assert sorted([*kept, *held]) == list(range(1797)) and (np.diff(kept) > 0).all() and (np.diff(held) > 0).all()
    assert (hold_out(labels, per_class, seed)[1] == held).all()
    assert (hold_out(labels, per_class, seed+1)[1] != held).any()

def test_too_few_to_hold_out():
    with pytest.raises(ValueError, match='class 1 has 1 items, too few to hold out 1'): hold_out(np.array([0,1,0]), 1)

# ---------------------------------------------------------------- small changes

def spot(rows, columns, n=400):
    "Images with one bright spot"
    x = TensorImageBW(torch.zeros(n, 1, 16, 16))
    x[:,:,rows,columns] = 1.
    return x

middle = slice(7, 9)
def jittered(x, seed=0, **kw):
    torch.manual_seed(seed)
    return DigitJitter(**{**dict(degrees=0, zoom=0, shift=0), **kw})(x, split_idx=0).as_subclass(torch.Tensor)

def centre(x, dim):
    "Place of the centre of mass along one side, from the middle"
    along = x.sum((1, 5-dim))
    return (along*torch.arange(16.)).sum(1)/along.sum(1)-7.5

def test_shifts_go_each_way_on_their_own_and_not_too_far():
    x = jittered(spot(middle, middle), shift=.1)
    y,x = centre(x, 2),centre(x, 3)
    assert 1.55 < y.abs().max() <= 1.6+1e-4 and 1.55 < x.abs().max() <= 1.6+1e-4
    assert abs(np.corrcoef(y, x)[0,1]) < .2 and min(y.min(), x.min()) < -1 and max(y.max(), x.max()) > 1

def test_turns_move_the_edge_and_keep_the_middle():
    assert 1. < centre(jittered(spot(middle, 15), degrees=10), 2).abs().max() < 1.5
    assert centre(jittered(spot(middle, middle), degrees=10), 2).abs().max() < 1e-4

def test_zooms_keep_the_middle_and_go_both_ways():
    x = jittered(spot(middle, middle), zoom=.1)
    for dim in (2, 3): assert centre(x, dim).abs().max() < 1e-4
    assert x.sum((1,2,3)).max() > 1.1*4 > .9*4 > x.sum((1,2,3)).min()

def test_paper_comes_in_from_outside():
    assert (jittered(TensorImageBW(torch.ones(9,1,16,16)), shift=.1).amin((1,2,3)) < .5).any()

def test_sampling_is_fastais(monkeypatch):
    "Which asks the device for the range of the coordinates; for pictures that keep their size it goes unused"
    x,kw = TensorImageBW(torch.rand(6,1,16,16)),dict(degrees=10, zoom=.1, shift=.05)
    got = jittered(x, **kw)
    monkeypatch.setattr(module, 'affine_grid', lambda mat, size, **kw: mat)
    def sample(x, mat, padding_mode, align_corners):
        return x.affine_coord(mat, pad_mode=padding_mode, align_corners=align_corners)
    monkeypatch.setattr(module, 'grid_sample', sample)
    assert torch.equal(got, jittered(x, **kw))

def test_draws_are_one_for_each_image_and_repeat_with_the_seed():
    x,kw = TensorImageBW(torch.ones(1,1,16,16).tril().repeat(8,1,1,1)),dict(degrees=10, zoom=.1, shift=.05)
    assert len({o.numpy().tobytes() for o in jittered(x, **kw)}) == 8
    assert torch.equal(jittered(x, 1, **kw), jittered(x, 1, **kw))
    assert not torch.equal(jittered(x, 1, **kw), jittered(x, 2, **kw))

# ---------------------------------------------------------------- batches

def plain(dl): return [tuple(o.as_subclass(torch.Tensor) for o in b) for b in dl]
def first(**kw): return digits_dls(device='cpu', **kw).one_batch()[0]

@pytest.mark.parametrize('workers', [1,2])
def test_R40_workers_change_nothing(workers):
    "Order and jitter of two epochs, whatever else draws numbers"
    def epochs(workers, seed=3):
        torch.manual_seed(workers)
        dl = digits_dls(bs=256, workers=workers, seed=seed, device='cpu').train
        return [plain(dl), plain(dl)]
    want = epochs(0)
    assert_close(epochs(workers), want, rtol=0, atol=0)
    assert len(want[0]) == 1437//256 and not torch.equal(want[0][0][1], want[1][0][1])
    assert not torch.equal(epochs(0, seed=4)[0][0][1], want[0][0][1])

def test_R40_resume_and_share():
    "Batches of an epoch from the middle, and halves of two processes"
    dl = digits_dls(bs=128, device='cpu', seed=2).train
    want = [plain(dl), plain(dl)]
    dl.set_epoch(1, 7)
    assert_close(plain(dl), want[1][7:], rtol=0, atol=0)
    halves = [plain(digits_dls(bs=64, device='cpu', seed=2, rank=r, world=2).train) for r in (0,1)]
    assert_close([torch.cat(y) for y in zip(*([y for _,y in o] for o in halves))], [y for _,y in want[0]],
                 rtol=0, atol=0)

def test_training_images_are_jittered_unless_one_says_otherwise():
    assert torch.equal(first(), first(jitter=DigitJitter()))
    assert not torch.allclose(first(), first(jitter=DigitJitter(0,0,0)), atol=.1)

def test_the_two_hold_outs_share_nothing():
    test,valid = (digits_dls(held_out=o, device='cpu') for o in ('test','valid'))
    parts = [set(map(int, o.items)) for o in (valid.train_ds, valid.valid_ds, test.valid_ds)]
    assert [len(o) for o in parts] == [1077, 360, 360] and len(set.union(*parts)) == 1797
    assert len(test.train_ds) == 1437 and list(test.vocab) == [str(o) for o in range(10)]

def test_settings_are_those_of_the_training_images():
    x = torch.cat([x for x,_ in plain(digits_dls(bs=1437, jitter=DigitJitter(0,0,0), device='cpu').train)])
    assert abs(x.mean()) < 1e-3 and abs(x.std()-1) < 1e-3 and x.shape[1:] == digits_cfg['input_size']

@pytest.mark.parametrize('kw,said', [(dict(bs=1438), 'must be from 1 to the 1437 training images, got 1438'),
    (dict(bs=0), 'got 0'), (dict(held_out='train'), "held_out must be 'test' or 'valid', got 'train'")])
def test_wrong_settings(kw, said):
    with pytest.raises(ValueError, match=said): digits_dls(**kw)
