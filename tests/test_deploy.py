"""A trained model elsewhere: what tutorials/deploy shows once, for images and clips, each compared with the model
itself. `torch.export` stands in test_export. ONNX and int8 are tried where onnxruntime and torchao are installed (the
extra `deploy`)."""
import copy, json, warnings
from pathlib import Path

import pytest, torch
from torch.testing import assert_close
from revvit import RevMViT, RevViT

torch.set_num_threads(1)
pages = Path(__file__).resolve().parent.parent/'nbs'/'tutorials'

def vit():
    return RevViT(img_size=32, patch_size=8, embed_dim=24, num_heads=3, depth=2,
                  num_classes=5),torch.randn(7, 3, 32, 32)
def mvit(**kw):
    return RevMViT(img_size=32, embed_dim=8, depth=2, stage_starts=(1,), kv_stride=(1,2,2), num_classes=5, **kw)
def images(): return mvit(patch_kernel=(3,3), patch_stride=(2,2)),torch.randn(7, 3, 32, 32)
def clips():
    return mvit(num_frames=4, patch_kernel=(3,3,3), patch_stride=(2,2,2),
                pool_kernel=(3,3,3)),torch.randn(5, 3, 4, 32, 32)
every = pytest.mark.parametrize('make', [vit,images,clips])

def trained(make):
    "A model in evaluation mode with weights unlike its first ones, its input and its answer"
    torch.manual_seed(0)
    m,x = make()
    with torch.no_grad():
        for p in m.parameters(): p.add_(torch.randn_like(p), alpha=.1)
        return m.eval(),x,m(x)

@every
@pytest.mark.thorough
def test_onnx(make, tmp_path):
    "One file for any number of images"
    runtime = pytest.importorskip('onnxruntime')
    pytest.importorskip('onnxscript')
    m,x,want = trained(make)
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        torch.onnx.export(m, (x[:2],), dynamo=True, dynamic_shapes=({0: torch.export.Dim.DYNAMIC},),
                          verbose=False).save(tmp_path/'m.onnx')
    session = runtime.InferenceSession(tmp_path/'m.onnx')
    given, = session.get_inputs()
    assert isinstance(given.shape[0], str) and given.shape[1:]==[*x.shape[1:]]
    for n in (1, 2, len(x)):
        out, = session.run(None, {given.name: x[:n].numpy()})
        assert_close(torch.from_numpy(out), want[:n], rtol=1e-4, atol=1e-5)

@pytest.mark.parametrize('make', [vit, pytest.param(clips, marks=pytest.mark.slow)])
def test_compiled(make):
    m,x,want = trained(make)
    compiled = torch.compile(m, dynamic=True, backend='aot_eager')   # what a back end makes of it is not ours
    with torch.no_grad():
        for n in (2, len(x)): assert_close(compiled(x[:n]), want[:n], rtol=1e-4, atol=1e-5)

@every
def test_int8(make):
    "Weights in eight bits: near the model, and no longer float"
    q = pytest.importorskip('torchao.quantization')
    m,x,want = trained(make)
    small = copy.deepcopy(m)
    q.quantize_(small, q.Int8WeightOnlyConfig())
    assert type(small.head.weight) is not torch.nn.Parameter
    assert 'int8' in str([o.dtype for o in vars(small.head.weight).values() if isinstance(o, torch.Tensor)])
    with torch.no_grad(): out = small(x)
    assert 0 < float((out-want).norm()/want.norm()) < .05

@pytest.mark.slow
def test_page(tmp_path, monkeypatch):
    "The page from its first cell to its last, but for the compiler and the timing, which are the machine's"
    for o in ('onnxruntime','onnxscript','torchao'): pytest.importorskip(o)
    monkeypatch.chdir(tmp_path)
    code = [''.join(c['source']) for c in json.loads((pages/'deploy.ipynb').read_text(encoding='utf8'))['cells']
            if c['cell_type']=='code']
    names = {}
    for o in code:
        if not any(word in o for word in ('compiled','got.items()','perf_counter','platform')):
            exec(compile(o.replace('epochs=15', 'epochs=1'), 'deploy', 'exec'), names)
    assert {'said','exported','run','run_clips','rounded'} <= names.keys()

@every
@pytest.mark.filterwarnings('ignore')
def test_traced(make):
    "torch.jit.trace, which PyTorch has superseded, in evaluation: for any number of images"
    m,x,want = trained(make)
    assert_close(torch.jit.trace(m, x[:2], check_trace=False)(x), want, rtol=1e-4, atol=1e-5)
