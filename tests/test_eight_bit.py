"""AdamW with averages in 8 bits, where torchao is installed: it trains, is taken up again and steps in the backward
pass with the same bits; and it is refused in a sentence where torchao is not"""
from dataclasses import replace
from unittest import mock

import pytest, torch
from fastai.vision.all import Callback
import revvit
from revvit.training.eight_bit import eight_bit_adamw
from revvit.training.recipes import recipes
from revvit.training.resume import keep_state
from revvit.use import cli

recipe = replace(recipes['digits'], epochs=2, warmup_epochs=.5, batch_size=300, optimizer='adamw_8bit', clip=None,
                 model_args=dict(patch_size=4, embed_dim=64, num_heads=2, depth=2))

def learner(r=recipe, **kw): return revvit.learner(revvit.digits_dls(bs=r.batch_size, device='cpu'), r, **kw)
def fitted(learn, n=2, **kw):
    with learn.no_bar(), learn.no_logging(): learn.fit(n, **kw)
    return learn
def weights(learn): return list(learn.model.state_dict().values())

class Stop(Callback):
    order = 80
    def after_batch(self):
        if self.train_iter==7: raise KeyboardInterrupt

@pytest.fixture(scope='module')
def straight():
    pytest.importorskip('torchao')
    return fitted(learner())

def test_it_trains_as_in_full_precision_does(straight):
    "Not to the bit; the schedule's rates are numbers, and averages of matrices have codes"
    full = fitted(learner(replace(recipe, optimizer='adamw')))
    assert not all(map(torch.equal, weights(straight), weights(full)))
    torch.testing.assert_close(torch.stack(straight.recorder.losses), torch.stack(full.recorder.losses), atol=.02,
                               rtol=0)
    assert straight.recorder.lrs==full.recorder.lrs and all(isinstance(o, float) for o in straight.recorder.lrs)
    opt,p = straight.opt.opt,straight.model.blocks[0].g.fn.fc1.weight
    assert opt.state[p]['exp_avg'].codes.dtype==torch.uint8 and opt.param_groups[0]['betas']==recipe.betas

def test_in_the_backward_pass(straight):
    assert all(map(torch.equal, weights(straight), weights(fitted(learner(replace(recipe, step_in_backward=True))))))

@pytest.mark.parametrize('early', [False,True])
@pytest.mark.parametrize('every', [None,2])
def test_a_stopped_run_goes_on(straight, every, early, tmp_path):
    r = replace(recipe, step_in_backward=early)
    with pytest.raises(KeyboardInterrupt):
        fitted(keep_state(learner(r, out=tmp_path), every=every), cbs=Stop())
    again = fitted(keep_state(learner(r, out=tmp_path), every=every, resume=True))
    assert all(map(torch.equal, weights(straight), weights(again)))

def test_an_unknown_optimizer_is_refused():
    with pytest.raises(ValueError, match="optimizer must be 'adamw' or 'adamw_8bit', got 'lion'"):
        replace(recipe, optimizer='lion')

def test_it_is_refused_where_torchao_is_not(tmp_path, capsys, monkeypatch):
    "By the function, the learner, and the command, before it reads any data"
    monkeypatch.setattr('revvit.training.eight_bit.find_spec', lambda name: None)
    for make in (eight_bit_adamw, learner):
        with pytest.raises(ValueError, match='needs a package that is not installed: pip install torchao'): make()
    monkeypatch.chdir(tmp_path)
    code,(out,err) = cli.revvit_train(['--optimizer', 'adamw_8bit']),capsys.readouterr()
    assert code==2 and 'Traceback' not in err and 'pip install torchao' in err and err.count('\n')==1

def test_the_command_hands_it_on(tmp_path, capsys, monkeypatch):
    pytest.importorskip('torchao')
    monkeypatch.chdir(tmp_path)
    assert cli.revvit_train(['--optimizer', 'adamw_8bit', '--epochs', '1', '--dry-run'])==0
    assert cli.revvit_train(['--optimizer', 'lion'])==2
    assert "--optimizer must be 'adamw' or 'adamw_8bit', got 'lion'" in capsys.readouterr().err
