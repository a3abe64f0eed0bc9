"What a notebook cannot show about checkpoints: a writer killed at any moment leaves the file that was there, or the new one"
import os, random, signal, time

import pytest
import torch
from revvit.checkpoints import load_checkpoint, read_checkpoint, save_checkpoint
from revvit.vit import RevViT

small = dict(img_size=32, patch_size=8, embed_dim=24, num_heads=3, depth=2, num_classes=5)

def _writer(path):
    "Replace the checkpoint again and again, each time with one number in all weights"
    model = RevViT(**small)
    for i in range(10**9):
        with torch.no_grad():
            for p in model.parameters(): p.fill_(i)
        save_checkpoint(model, path, extra=dict(i=i))

@pytest.mark.skipif(not hasattr(os, 'fork'), reason='needs fork')
@pytest.mark.filterwarnings('ignore::DeprecationWarning')
def test_killed_writer_leaves_a_whole_file(tmp_path):
    "R32: 30 times SIGKILL at a random moment of a save or shortly after; the file always loads and is of one piece, and the next save clears what was left behind"
    path,rng,leftovers = tmp_path/'last.pth',random.Random(0),0
    save_checkpoint(RevViT(**small), path, extra=dict(i=-1))
    for _ in range(30):
        pid = os.fork()
        if not pid:
            try: _writer(path)
            finally: os._exit(1)
        end = time.monotonic()+20
        while not any(tmp_path.glob(f'.*-{pid}.tmp')) and time.monotonic() < end: time.sleep(.0005)    # until a save is under way
        time.sleep(rng.uniform(0, .03))
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        leftovers += len(list(tmp_path.glob('.*.tmp')))
        i,model = read_checkpoint(path)['extra']['i'],RevViT(**small)
        assert load_checkpoint(model, path).share == 1
        if i >= 0: assert all((p == i).all() for p in model.parameters())
    assert leftovers, 'no kill hit a save: the test shows nothing'
    save_checkpoint(RevViT(**small), path)
    assert [o.name for o in tmp_path.iterdir()] == ['last.pth']
