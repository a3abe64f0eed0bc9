"Mixed precision where nothing is trained: what is computed in it, and what is refused"
import pytest, torch
from revvit.use import cli
from revvit.use.evaluation import evaluate
from revvit.models.vit import RevViT

def model():
    torch.manual_seed(0)
    return RevViT(img_size=16, patch_size=4, embed_dim=32, num_heads=2, depth=2, num_classes=6)

@pytest.mark.parametrize('amp,dtype', [('off',torch.float32), ('bf16',torch.bfloat16), ('fp16',torch.float16)])
def test_evaluate(amp, dtype):
    "Products in that type, weights and answers as they were"
    m,seen = model(),[]
    m.head.register_forward_hook(lambda m,i,o: seen.append(o.dtype))
    x,y = torch.randn(20, 3, 16, 16, generator=torch.Generator().manual_seed(1)),torch.arange(20)%6
    dl = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(x, y), 8)
    want,got = evaluate(m, dl),evaluate(m, dl, amp=amp)
    assert set(seen[3:])=={dtype} and abs(got['loss']-want['loss']) < .01 and (got==want)==(amp=='off')
    assert not torch.is_autocast_enabled('cpu') and next(m.parameters()).dtype==torch.float32

@pytest.mark.parametrize('command,args', [(cli.revvit_test,['--data','nowhere']), (cli.revvit_predict,['nowhere.png'])],
                         ids=['test','predict'])
def test_commands_refuse_other_words(command, args, capfd):
    assert command([*args, '--amp', 'int4'])==2 and 'amp must be off, bf16 or fp16, got' in capfd.readouterr().err
