"""A CUDA device that is not there: shapes, types and devices are followed as on a real one, numbers are not computed,
and whatever would make the host wait for the device raises `Waits`, as `torch.cuda.set_sync_debug_mode('error')` does.
The backward pass is walked node by node, since PyTorch's own engine wants threads for real devices; so both passes of a
step can be tried on a machine without a GPU."""
import heapq
from contextlib import ExitStack, contextmanager
from unittest.mock import patch

import torch
from torch._subclasses import FakeTensor, FakeTensorMode
from torch.utils._pytree import tree_leaves
from revvit.core import block, self_check, sequence
from revvit.models import fused

class Waits(RuntimeError): "The host would wait for the device"

ops = torch.ops.aten
READS = {ops._local_scalar_dense.default, ops.item.default, ops.equal.default, ops.is_nonzero.default}
PINNING = {ops.is_pinned.default, ops.pin_memory.default, ops._pin_memory.default}

class FakeCuda(FakeTensorMode):
    "Tensors on CUDA are fake, those on the CPU real"
    def __init__(self):
        super().__init__(allow_non_fake_inputs=True)
        # strict from where a step begins
        self.pinned,self.copies,self.softmax,self.drawn,self.strict = [],[],[],0,False

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        tensors = [o for o in tree_leaves((args, kwargs)) if isinstance(o, torch.Tensor)]
        there = any(isinstance(o, FakeTensor) for o in tensors)
        device = torch.device(kwargs.get('device') or ('cuda' if there else 'cpu'))
        if func in PINNING: return self.pin(func, args[0])
        if func in READS and there and self.strict: raise Waits(f"{func} reads a value")
        if self.strict and func in (ops.copy_.default, ops._to_copy.default): self.copy(func, args, kwargs, device)
        # its numbers would come later
        if func is ops.copy_.default and there and not isinstance(args[0], FakeTensor): return args[0]
        if there or device.type=='cuda':
            if 'softmax' in str(func) and 'backward' not in str(func):
                self.softmax.append((str(func), torch.is_grad_enabled()))
            self.drawn += torch.Tag.nondeterministic_seeded in func.tags
            return super().__torch_dispatch__(func, types, args, kwargs)
        pin = kwargs.pop('pin_memory', False)
        out = func(*args, **kwargs)
        if pin: self.pinned.append(out)
        return out

    def pin(self, func, t):
        if func is ops.is_pinned.default: return self.is_pinned(t)
        if isinstance(t, FakeTensor): raise Waits("pinning what is on the device")
        self.pinned.append(t.clone())
        return self.pinned[-1]

    def is_pinned(self, t): return not t.numel() or any(o.data_ptr()==t.data_ptr() for o in self.pinned)

    def copy(self, func, args, kwargs, device):
        "A copy between host and device does not wait if the host's memory is pinned and nobody asks it to"
        if func is ops.copy_.default:
            src,to,later = args[1],args[0].device,kwargs.get('non_blocking', len(args)>2 and args[2])
        else: src,to,later = args[0],device,kwargs.get('non_blocking', False)
        if src.device.type==to.type: return
        host = src if to.type=='cuda' else args[0] if func is ops.copy_.default else None
        if host is None or not later or not self.is_pinned(host):
            raise Waits(f"a copy of {tuple(src.shape)} from {src.device} to {to}")
        self.copies.append((src.device.type, to.type))

class Event:
    "In place of CUDA's: nothing is ever done"
    def record(self, stream=None): pass
    def query(self): return False
    def synchronize(self): pass   # of a step ago, while this one's work is under way

def _fitting(node, i, g):
    "`g` as PyTorch's engine would hand it on: summed where the input was broadcast, in the input's type"
    like = node.variable if hasattr(node, 'variable') else node._input_metadata[i]
    return g.sum_to_size(like.shape).to(like.dtype)

def _back(node, grads):
    "Edges to what comes before `node`, and the gradients that go there"
    own = hasattr(node, 'needs_input_grad')   # a Function answers for all arguments, tensors or not
    out = node.apply(*grads) if own else node(*grads)
    out = out if isinstance(out, tuple) else (out,)
    if not own: return zip(node.next_functions, out)
    return zip([o for o in node.next_functions if o[0]], [g for g,n in zip(out, node.needs_input_grad) if n],
               strict=True)

def gradients(outs, wanted, grads):
    "What `torch.autograd.grad(outs, wanted, grads, allow_unused=True)` gives, node by node"
    edge = torch.autograd.graph.get_gradient_edge
    order,todo,got,ends = [],{},{},{edge(w)[:2]: k for k,w in enumerate(wanted)}
    def add(node, i, g):
        if node is None or g is None: return
        if node not in todo:
            todo[node] = {}
            heapq.heappush(order, (-node._sequence_nr(), id(node), node))
        g = _fitting(node, i, g)
        todo[node][i] = todo[node][i]+g if i in todo[node] else g
    for o,g in zip(outs, grads): add(*edge(o)[:2], g)
    with torch.no_grad():
        while order:
            node = heapq.heappop(order)[2]
            given = todo.pop(node)
            got.update((ends[node,i], g) for i,g in given.items() if (node,i) in ends)
            if hasattr(node, 'variable'): continue
            ins = [given.get(i) for i in range(len(node._input_metadata))]
            for (then,i),g in _back(node, ins): add(then, i, g)
    return [got.get(k) for k in range(len(wanted))]

def _grad(outs, wanted, grads=None, **kw):
    one = lambda o: [o] if isinstance(o, torch.Tensor) else list(o)
    outs = one(outs)
    return gradients(outs, one(wanted), [torch.ones_like(o) for o in outs] if grads is None else one(grads))

# the package leaves wrappers of tensors to ordinary autograd
def kind(o): return torch.Tensor if isinstance(o, FakeTensor) else type(o)

@contextmanager
def fake_cuda():
    "The mode, with what else asks for a real device replaced"
    mode = FakeCuda()
    def get_rng_state(device='cuda'): return torch.full((16,), mode.drawn%256, dtype=torch.uint8)
    def set_rng_state(state, device='cuda'): mode.drawn = int(state[0])
    with ExitStack() as stack:
        for name,new in dict(get_rng_state=get_rng_state, set_rng_state=set_rng_state, Event=Event,
                             current_stream=lambda *a: None, is_bf16_supported=lambda *a: True).items():
            stack.enter_context(patch.object(torch.cuda, name, new))
        stack.enter_context(patch('torch.autograd.grad', _grad))
        # checkpoints compute again once a backward pass
        stack.enter_context(patch('torch._C._current_graph_task_id', lambda: 1))
        stack.enter_context(patch('torch.amp.autocast_mode.torch.cuda.amp.common.amp_definitely_not_available',
                                  lambda: False))
        # what waits for an answer would wait for ever, and weights of a sum would be fake for real tensors too
        stack.enter_context(patch.object(self_check, '_waiting', []))
        stack.callback(self_check._weights.cache_clear)
        self_check._weights.cache_clear()
        for m in (block,sequence,fused): stack.enter_context(patch.object(m, 'type', kind, create=True))
        stack.enter_context(mode)
        yield mode
