"`torch.export`, strict and not, of the installed modules (R21): strict mode cannot see names that a notebook defines"
import pytest, torch
from torch import nn
from torch.testing import assert_close
from revvit import RevViT, couple

class Coupled(nn.Module):
    def __init__(self):
        super().__init__()
        self.f,self.g = nn.Linear(3, 3),nn.Sequential(nn.Linear(3, 3), nn.GELU())
    def forward(self, x1, x2): return couple(x1, x2, self.f, self.g)

@pytest.mark.parametrize('strict', (False, True))
def test_R21_coupling(strict):
    torch.manual_seed(0)
    m,(x1,x2) = Coupled(),torch.randn(2, 4, 3)
    batch = {0: torch.export.Dim('batch')}
    e = torch.export.export(m, (x1,x2), strict=strict, dynamic_shapes=(batch,batch)).module()
    assert_close(e(x1[:3], x2[:3]), m(x1[:3], x2[:3]), rtol=1e-6, atol=1e-6)

@pytest.mark.parametrize('strict', (False, True))
def test_R21_eval_model(strict, tmp_path):
    torch.manual_seed(0)
    m = RevViT(img_size=32, patch_size=8, embed_dim=24, num_heads=3, depth=3, num_classes=5).eval()
    x = torch.randn(3, 3, 32, 32)
    e = torch.export.export(m, (x[:2],), dynamic_shapes={'x': {0: torch.export.Dim('batch', max=64)}}, strict=strict)
    torch.export.save(e, tmp_path/'m.pt2')
    assert_close(torch.export.load(tmp_path/'m.pt2').module()(x), m(x), rtol=1e-5, atol=1e-5)
