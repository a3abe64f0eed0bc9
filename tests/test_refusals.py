"""Refusals that no other test here or in a notebook asks for, one sentence each: what came, and what helps. They are
those that `coverage` found unheard."""
import os, pty, sys
from dataclasses import replace
from types import SimpleNamespace

import numpy as np, pytest, timm, torch
from PIL import Image
from torch import nn
from revvit.data.average_precision import detections
from revvit.data.clips import ClipAugment
from revvit.data.digits import digits_dls
from revvit.data.from_files import readable
from revvit.data.loader import UnreadableFile
from revvit.models.checkpoints import save_checkpoint
from revvit.models.detector import detector
from revvit.training.distributed import distribute
from revvit.training.layers import layer_groups
from revvit.training.learner import learner
from revvit.training.own_data import read_recipe, recipe_text
from revvit.training.recipes import kinetics_cfg, recipes
from revvit.use import benchmark
from revvit.use.choices import fit_to_weights
from revvit.use.evaluation import eval_loader
from revvit.use.many import saved_input
from revvit.use.memory_need import memory
from cases import Tailed, clip, stack, streams, vit

pytestmark = pytest.mark.filterwarnings('ignore')
small = replace(recipes['digits'], epochs=1, warmup_epochs=0, batch_size=256)

def refused(f, said, error=ValueError):
    with pytest.raises(error) as e: f()
    text = str(e.value)
    assert said in text and '\n' not in text, text

class Spoils(nn.Module):
    "A tail that does what a tail may not"
    def __init__(self, how): super().__init__(); self.how = how
    def forward(self, x1, x2):
        if self.how=='in place': x1.add_(1)
        return (x1,x2) if self.how=='two' else x1.sum() if self.how=='one row' else x1.mean(1)

@pytest.mark.parametrize('how,said', [('two', 'one tensor with a row for each image'),
    ('one row', 'one tensor with a row for each image'), ('in place', 'the tail changed a stream in place')])
def test_a_tail_that_cannot_be_repeated(how, said):
    net,(x1,x2) = Tailed(stack(2), Spoils(how)),streams()
    refused(lambda: net(x1.requires_grad_(), x2), said)

@pytest.mark.parametrize('f,said', [
    (lambda: detections(nn.Identity(), SimpleNamespace(world=2)), 'one share of 2, but there is no group of them'),
    (lambda: ClipAugment(kinetics_cfg, rand_aug='rand-x9'),
     "rand_aug must be like 'rand-m7-n4-mstd0.5-inc1', got 'rand-x9'"),
    (lambda: detector(vit(2, None)[0], 3, pretrained=True), 'are for a backbone given by name'),
    (lambda: detector(vit(2, None)[0], 3, backbone_args=dict(depth=2)), 'are for a backbone given by name'),
    (lambda: layer_groups(nn.Linear(2, 2), 1e-3, layer_decay=.5), 'a Linear does not say which parameter belongs'),
    (lambda: memory(nn.Linear(2, 2)), 'Linear does not say what it is made for'),
], ids=['share', 'rand_aug', 'pretrained', 'backbone_args', 'layers', 'made for'])
def test_in_one_sentence(f, said): refused(f, said)

def test_a_device_whose_memory_cannot_be_measured(monkeypatch):
    monkeypatch.setattr(benchmark, 'pick_device', torch.device)
    refused(lambda: benchmark.measurable_device('mps'),
            'must be a CPU or a CUDA device, where memory can be measured, got mps')

def test_loaders_for_another_number_of_processes(monkeypatch):
    "Each process would see all the data, and the epoch would be twice as long"
    learn = learner(digits_dls(bs=256, device='cpu'), small)
    monkeypatch.setattr(torch.distributed, 'is_initialized', lambda: True)
    monkeypatch.setattr(torch.distributed, 'get_world_size', lambda: 2)
    refused(lambda: distribute(learn), 'the loaders are for 1 processes, not for 2: make them after join_group')

def test_a_path_that_the_system_refuses(tmp_path):
    "Neither missing nor forbidden: its name is longer than names may be"
    path = tmp_path/f"{'x'*300}.png"
    refused(lambda: readable({path: 0}, {}), 'File name too long', UnreadableFile)

def test_a_recipe_in_yaml_without_pyyaml(tmp_path, monkeypatch):
    path = tmp_path/'mine.yaml'
    path.write_text(recipe_text(small))
    assert read_recipe(path)==small
    monkeypatch.setitem(sys.modules, 'yaml', None)
    refused(lambda: read_recipe(path), 'YAML takes pyyaml: pip install pyyaml, or write JSON')

@pytest.mark.parametrize('text,said', [('epochs: [', 'not a recipe in YAML'), ('{"epochs": 1', 'not a recipe in YAML')])
def test_a_recipe_that_is_no_yaml(text, said, tmp_path):
    path = tmp_path/'mine.yaml'
    path.write_text(text)
    with pytest.raises(ValueError, match=said): read_recipe(path)

def test_a_recipe_file_with_a_number_that_cannot_be_meant(tmp_path):
    path = tmp_path/'mine.json'
    path.write_text(recipe_text(small).replace('"epochs": 1', '"epochs": -1'))
    refused(lambda: read_recipe(path), f'{path}: epochs must be a whole number above 0, got -1')

def test_weights_for_clips_and_data_of_images(tmp_path):
    path = save_checkpoint(clip((1,), 2, None)[0], tmp_path/'clips.pth')
    refused(lambda: fit_to_weights(recipes['fine_tune_images'], path), "the recipe's data are images")

def test_a_file_that_should_be_counted_is_gone(tmp_path):
    for i in '01':
        (tmp_path/i).mkdir()
        Image.fromarray(np.zeros((8,8,3), np.uint8)).save(tmp_path/i/'a.png')
    model = timm.create_model('revvit_tiny_patch16_224', depth=1, num_classes=2)
    assert len(eval_loader(model, tmp_path, only=['1/a.png']).dataset)==1
    refused(lambda: eval_loader(model, tmp_path, only=['0/a.png','1/b.png']),
            "'1/b.png', which should be counted, is not there")

def test_a_terminal_is_no_file():
    "Without this one would wait for ever"
    def asked():
        with saved_input(['-']): pass
    ours,theirs = pty.openpty()
    kept = os.dup(0)
    os.dup2(theirs, 0)
    try: refused(asked, '-: standard input is a terminal')
    finally:
        os.dup2(kept, 0)
        for o in (ours,theirs,kept): os.close(o)
