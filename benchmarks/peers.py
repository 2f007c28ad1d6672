"""The attention implementations the benchmarks put side by side.

Dense engines compute causal attention of inputs as they are. ``composed-*`` is Dual Chunk Attention made of calls to a
dense engine, as ChunkLlama (the released code of arXiv 2402.17463) does it: Q rotated three times, up to three calls
per chunk, outputs merged by their log-sum-exps. ``chunkattn`` is the op of this package. Tensors are [B, S, H, D].
"""

import contextlib
import ctypes
import functools
import lzma
import os
import shutil
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

import chunkattn
from chunkattn import _core


class Absent(Exception):
    """The implementation is not on this machine. The message says why."""


@dataclass(frozen=True)
class Engine:
    """A dense attention. Heads may be grouped."""

    causal: Callable[[Tensor, Tensor, Tensor], Tensor]
    # (q, k, v, causal) -> out and its log-sum-exp [B, H, Sq]; causal only where q and k have one length
    with_lse: Callable[[Tensor, Tensor, Tensor, bool], tuple[Tensor, Tensor]]
    # (dout, q, k, v, out, lse, causal) -> dq, dk, dv. With the out and lse of a softmax over further keys these are the
    # part that the given keys have in the gradients.
    backward: Callable[..., tuple[Tensor, Tensor, Tensor]] | None = None
    # (q [B, 1, H, D], k, v [B, capacity, Hkv, D], lengths int32 [B], None) -> out; or with pages [num_pages, page_size,
    # Hkv, D] as k and v and a block table
    decode: Callable[[Tensor, Tensor, Tensor, Tensor, Tensor | None], Tensor] | None = None


def load_fa3(folder):
    """FlashAttention-3's ops from ``folder``: fa3.so or fa3.so.xz, and the libcudart.so.12 it was linked with.

    The library is the one inside the wheel xformers 0.0.34 (x86-64), ``xformers/flash_attn_3/_C.so``; libcudart.so.12
    comes from the wheel nvidia-cuda-runtime-cu12. Registers torch.ops.flash_attn_3.{fwd, bwd}.
    """
    if folder is None:
        raise Absent("no folder with the library was given (--fa3)")
    folder = Path(folder)
    runtime, library, packed = (folder / name for name in ("libcudart.so.12", "fa3.so", "fa3.so.xz"))
    if not runtime.is_file() or not (library.is_file() or packed.is_file()):
        raise Absent(f"{folder} does not hold libcudart.so.12 and fa3.so or fa3.so.xz")
    if not library.is_file():
        library = Path(tempfile.gettempdir()) / f"fa3-{packed.stat().st_size}.so"
        if not library.is_file():
            part = library.with_suffix(".part")
            with lzma.open(packed) as source, part.open("wb") as target:
                shutil.copyfileobj(source, target, 1 << 24)
            os.replace(part, library)
    try:
        ctypes.CDLL(str(runtime), ctypes.RTLD_GLOBAL)
        torch.ops.load_library(str(library))
    except OSError as error:
        raise Absent(f"the library does not load: {error}") from error
    return torch.ops.flash_attn_3


def fa3_engine(folder):
    ops = load_fa3(folder)

    def with_lse(q, k, v, causal):
        return ops.fwd(q, k, v, is_causal=causal)[:2]

    def backward(dout, q, k, v, out, lse, causal):
        return ops.bwd(dout, q, k, v, out, lse, is_causal=causal)[:3]

    def decode(q, k, v, lengths, block_table):
        return ops.fwd(q, k, v, seqused_k=lengths, page_table=block_table, is_causal=True)[0]

    return Engine(lambda q, k, v: with_lse(q, k, v, True)[0], with_lse, backward, decode)


def _sdpa(backend, q, k, v):
    grouped = q.shape[2] != k.shape[2]
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    with sdpa_kernel(backend):
        return scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=grouped).transpose(1, 2)


def _transposed(result):
    """(out, lse) of an aten op, which works on [B, H, S, D]; cuDNN's lse is [B, H, S, 1]."""
    out, lse = result[:2]
    return out.transpose(1, 2), lse.reshape(out.shape[:3])


def cudnn_engine():
    if not torch.backends.cudnn.is_available():
        raise Absent("this torch has no cuDNN")

    def with_lse(q, k, v, causal):
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        return _transposed(torch.ops.aten._scaled_dot_product_cudnn_attention(q, k, v, None, True, 0.0, causal))

    return Engine(functools.partial(_sdpa, SDPBackend.CUDNN_ATTENTION), with_lse)


def fa2_engine():
    def with_lse(q, k, v, causal):
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        return _transposed(torch.ops.aten._scaled_dot_product_flash_attention(q, k, v, 0.0, causal))

    def backward(dout, q, k, v, out, lse, causal):
        dout, q, k, v, out = (x.transpose(1, 2) for x in (dout, q, k, v, out))
        seed, offset = (torch.zeros(n, dtype=torch.uint64, device=q.device) for n in (2, 0))  # without dropout unused
        lengths = None, None, q.shape[2], k.shape[2]
        grads = torch.ops.aten._scaled_dot_product_flash_attention_backward(
            dout, q, k, v, out, lse, *lengths, 0.0, causal, seed, offset
        )
        return tuple(x.transpose(1, 2) for x in grads)

    return Engine(functools.partial(_sdpa, SDPBackend.FLASH_ATTENTION), with_lse, backward)


def cpu_engine():
    """torch's own attention on the CPU."""

    def with_lse(q, k, v, causal):
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        return _transposed(torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, 0.0, causal))

    def backward(dout, q, k, v, out, lse, causal):
        kv_heads = k.shape[2]
        k, v = (x.repeat_interleave(q.shape[2] // kv_heads, dim=2) for x in (k, v))
        inputs = (x.transpose(1, 2) for x in (dout, q, k, v, out))
        grads = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(*inputs, lse, 0.0, causal)
        dq, dk, dv = (x.transpose(1, 2) for x in grads)
        return dq, *(x.unflatten(2, (kv_heads, -1)).sum(dim=3) for x in (dk, dv))

    def decode(q, k, v, lengths, block_table):
        if block_table is not None:
            k, v = (x[block_table.long()].flatten(1, 2) for x in (k, v))
        mask = torch.arange(k.shape[1], device=k.device) < lengths.reshape(-1, 1, 1, 1)
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        return scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=True).transpose(1, 2)

    return Engine(functools.partial(_sdpa, SDPBackend.FLASH_ATTENTION), with_lse, backward, decode)


def find_engines(device, fa3_folder=None):
    """(name to :class:`Engine`, name to the reason why it is absent)."""
    makers = {"fa3": functools.partial(fa3_engine, fa3_folder), "cudnn": cudnn_engine, "fa2": fa2_engine}
    if torch.device(device).type == "cpu":
        return {"sdpa": cpu_engine()}, dict.fromkeys(makers, "runs on CUDA only")
    engines, absent = {}, {}
    for name, make in makers.items():
        try:
            engines[name] = make()
        except Absent as reason:
            absent[name] = str(reason)
    return engines, absent


def causal_mask(batch, head, query, key):
    return query >= key


def flex_blocks(q, k, v, whole, block=128):
    """A call of FlexAttention, compiled for these inputs: to ``whole`` blocks of keys, and causally on the diagonal.

    whole: bool [B or 1, H or 1, blocks, blocks], of queries and of keys, below the diagonal. create_block_mask
    evaluates a mask at every query and key instead, and takes more than two minutes to compile.
    """
    from torch.nn.attention import flex_attention as flex

    def packed(mask):
        indices = mask.int().argsort(dim=-1, descending=True, stable=True)
        return mask.sum(dim=-1).int(), indices.int().contiguous()

    torch._dynamo.reset()  # every shape compiles anew: without this the limit on recompilations is reached
    diagonal = torch.eye(whole.shape[-1], dtype=torch.bool, device=q.device).expand_as(whole)
    tables = (*packed(diagonal), *packed(whole))
    lengths = q.shape[1], k.shape[1]
    mask = flex.BlockMask.from_kv_blocks(*tables, BLOCK_SIZE=block, mask_mod=causal_mask, seq_lengths=lengths)
    attend = torch.compile(flex.flex_attention, dynamic=False)
    grouped = q.shape[2] != k.shape[2]
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    return lambda: attend(q, k, v, block_mask=mask, enable_gqa=grouped).transpose(1, 2)


def flex_attention(q, k, v, block=128):
    """A call of FlexAttention, dense causal, compiled for these inputs: as many queries as keys."""
    blocks = -(-k.shape[1] // block)
    whole = torch.ones(1, 1, blocks, blocks, dtype=torch.bool, device=q.device).tril(-1)
    return flex_blocks(q, k, v, whole, block)


def flex_regions(q, k, v, indices, lists, block=128):
    """A call of FlexAttention that executes as much as select-and-merge attention, compiled for these inputs.

    Its masks are made of blocks of 128 keys, and of 16 it would be slow. So a group attends to as many blocks as its
    listed regions fill, those of most of them, and to its own tokens causally.
    """
    blocks, per_group = -(-k.shape[1] // block), lists.group // block
    place = torch.arange(blocks, device=q.device)
    kept = torch.zeros(*indices.shape[:3], blocks + 1, device=q.device)
    listed = torch.where(indices >= 0, indices * lists.region_size // block, blocks)
    kept.scatter_add_(-1, listed.long(), torch.ones_like(listed, dtype=kept.dtype))
    count = (indices >= 0).sum(dim=-1, keepdim=True) * lists.region_size // block
    rank = kept[..., :blocks].argsort(dim=-1, descending=True, stable=True).argsort(dim=-1)
    # [B, H, blocks of queries, blocks of keys]
    whole = (rank < count).repeat_interleave(per_group, dim=2)[:, :, :blocks]
    own = place[:, None] // per_group == place[None, :] // per_group
    whole = (whole | (own & (place[:, None] > place[None, :]))).repeat_interleave(q.shape[2] // whole.shape[1], dim=1)
    return flex_blocks(q, k, v, whole, block)


def rotate(x, cos, sin):
    """x [B, S, H, D] rotated (NeoX pairs, all of D) by one table row per token, in float32. cos, sin: [S or 1, 1, D/2].

    The products are float32 because cos and sin are; the result is rounded once, to the dtype of x.
    """
    half = x.shape[-1] // 2
    first, second = x[..., :half], x[..., half:]
    out = torch.empty_like(x)
    torch.addcmul(first * cos, second, sin, value=-1, out=out[..., :half])
    torch.addcmul(second * cos, first, sin, out=out[..., half:])
    return out


def merge(parts, out):
    """Merges attention over disjoint keys into ``out``. parts: (out [B, S, H, D], lse [B, H, S]) each."""
    if len(parts) == 1:
        out.copy_(parts[0][0])
        return
    weights = torch.stack([lse for _, lse in parts]).softmax(dim=0).transpose(2, 3).unsqueeze(-1)
    total = parts[0][0] * weights[0]
    for (part, _), weight in zip(parts[1:-1], weights[1:-1], strict=True):
        total.addcmul_(part, weight)
    torch.addcmul(total, parts[-1][0], weights[-1], out=out)


class ComposedDca:
    """Dual Chunk Attention made of calls to a dense engine: 3n - 3 of them for n > 1 chunks.

    A call takes raw q and k, as the op does, and rotates them: the rotations are part of the time. The table rows of
    the tokens are gathered once, when the object is made. Only for as many queries as keys.
    """

    def __init__(self, engine, cos, sin, setting, seq):
        self.engine = engine
        self.stride = setting.stride
        rows = torch.arange(seq, device=cos.device) % self.stride
        far = torch.full_like(rows[:1], 2 * self.stride - 1)
        query_rows = (rows, rows + self.stride, far)
        self.tables = [
            tuple(table[row.clamp(max=setting.chunk_size)].unsqueeze(1) for table in (cos, sin)) for row in query_rows
        ]

    def calls(self, seq):
        """(queries, calls) of each chunk; a call is (index of Q's rotation, keys, causal)."""
        stride = self.stride
        for begin in range(0, seq, stride):
            own, before, earlier = slice(begin, begin + stride), slice(begin - stride, begin), slice(0, begin - stride)
            calls = [(0, own, True)]
            if begin >= stride:
                calls.append((1, before, False))
            if begin > stride:
                calls.append((2, earlier, False))
            yield own, calls

    def attend(self, own, calls, queries, k, v):
        """(out, lse) of each of a chunk's calls."""
        return [
            self.engine.with_lse(queries[index][:, own], k[:, keys], v[:, keys], causal)
            for index, keys, causal in calls
        ]

    def rotations(self, q, k, rotate=rotate):
        """q in its three rotations, and k in its one."""
        return [rotate(q, *table) for table in self.tables], rotate(k, *self.tables[0])

    def __call__(self, q, k, v, rotate=rotate, merge=merge):
        queries, k = self.rotations(q, k, rotate)
        out = torch.empty_like(q)
        for own, calls in self.calls(q.shape[1]):
            merge(self.attend(own, calls, queries, k, v), out[:, own])
        return out


class ComposedStep:
    """DCA of the last of S tokens over keys that are rotated, k [B, S, Hkv, D]: up to three calls and a merge.

    A call takes no time for the rotations of q [B, 1, H, D], which are made here.
    """

    def __init__(self, engine, cos, sin, setting, q, k, v):
        self.engine = engine
        stride, end = setting.stride, k.shape[1]
        index = (end - 1) % stride
        own = end - 1 - index
        rows = (index, min(index + stride, setting.chunk_size), min(2 * stride - 1, setting.chunk_size))
        spans = ((own, end), (own - stride, own), (0, own - stride))
        self.parts = [
            (rotate(q, cos[row], sin[row]), k[:, begin:stop], v[:, begin:stop])
            for row, (begin, stop) in zip(rows, spans, strict=True)
            if 0 <= begin < stop
        ]

    def __call__(self):
        out = torch.empty_like(self.parts[0][0])
        merge([self.engine.with_lse(*part, False) for part in self.parts], out)
        return out


class ComposedGradients:
    """The gradients of a :class:`ComposedDca`: of each of its calls, given the output and the log-sum-exp of all keys.

    What the forward computes is saved when the object is made, as autograd would. A call finds the gradients with
    respect to raw q and k; parts of dK and dV are summed in float32.
    """

    def __init__(self, composed, q, k, v, dout):
        self.composed, self.v = composed, v
        self.queries, self.k = composed.rotations(q, k)
        self.chunks = []
        for own, calls in composed.calls(q.shape[1]):
            parts = composed.attend(own, calls, self.queries, self.k, v)
            out = torch.empty_like(q[:, own])
            merge(parts, out)
            lse = torch.logsumexp(torch.stack([lse for _, lse in parts]), dim=0)
            self.chunks.append((own, calls, dout[:, own], out, lse))

    def __call__(self):
        tables = self.composed.tables
        dq = torch.empty_like(self.queries[0])
        wide = torch.promote_types(dq.dtype, torch.float32)
        dk, dv = (torch.zeros_like(self.k, dtype=wide) for _ in range(2))
        for own, calls, dout, out, lse in self.chunks:
            total = torch.zeros_like(out, dtype=wide)
            for index, keys, causal in calls:
                q, k, v = self.queries[index][:, own], self.k[:, keys], self.v[:, keys]
                part_q, part_k, part_v = self.composed.engine.backward(dout, q, k, v, out, lse, causal)
                cos, sin = (table[own] if table.shape[0] > 1 else table for table in tables[index])
                total += rotate(part_q, cos, -sin)
                dk[:, keys] += part_k
                dv[:, keys] += part_v
            dq[:, own] = total
        cos, sin = tables[0]
        return dq, rotate(dk, cos, -sin).to(dq.dtype), dv.to(dq.dtype)


@contextlib.contextmanager
def portable_kernel():
    """While it lasts, the op takes its portable kernel."""
    torch.ops.chunkattn.force_kernel("portable")
    try:
        yield
    finally:
        torch.ops.chunkattn.force_kernel("auto")


def find_portable_kernel(device, find_plan=_core.plan_forward):
    """:func:`portable_kernel`, or Absent where the op has no faster kernel; find_plan says which it takes."""
    if torch.device(device).type == "cpu" or not hasattr(torch.ops.chunkattn, "force_kernel"):
        raise Absent("runs on CUDA only")
    major, minor = torch.cuda.get_device_capability(device)
    shape = {"batch": 1, "seqlen_q": 1, "seqlen_k": 1, "heads": 1, "kv_heads": 1, "head_dim": 128}
    if find_plan(**shape, compute_capability=10 * major + minor).name.endswith("_sm80"):
        raise Absent("the portable kernel is the default here, and measured as chunkattn")
    return portable_kernel


def chunkattn_call(q, k, v, cos, sin, setting, context=contextlib.nullcontext):
    """A call of the op on raw q and k."""

    def call():
        with context():
            return chunkattn.dca(q, k, v, cos, sin, chunk_size=setting.chunk_size, local_size=setting.local_size)

    return call


def autograd_gradients(function, q, k, v, dout):
    """A call of the backward of ``function(q, k, v)``, whose forward runs here."""
    qkv = tuple(x.detach().requires_grad_() for x in (q, k, v))
    with torch.enable_grad():
        out = function(*qkv)
    return lambda: torch.autograd.grad(out, qkv, dout, retain_graph=True)


def autograd_training(function, q, k, v, dout):
    """Forward and backward of ``function(q, k, v)``."""
    qkv = tuple(x.detach().requires_grad_() for x in (q, k, v))
    with torch.enable_grad():
        out = function(*qkv)
    return torch.autograd.grad(out, qkv, dout)


def engine_training(engine, q, k, v, dout):
    """Forward and backward of a dense engine."""
    if engine.backward is None:
        return autograd_training(engine.causal, q, k, v, dout)
    out, lse = engine.with_lse(q, k, v, True)
    return engine.backward(dout, q, k, v, out, lse, True)


def engine_gradients(engine, q, k, v, dout):
    """A call of a dense engine's backward: its own op where there is one, autograd's where not."""
    if engine.backward is None:
        return autograd_gradients(engine.causal, q, k, v, dout)
    out, lse = engine.with_lse(q, k, v, True)
    return lambda: engine.backward(dout, q, k, v, out, lse, True)


def flex_gradients(q, k, v, dout):
    """A call of FlexAttention's backward, dense causal, compiled for these inputs."""
    qkv = tuple(x.detach().requires_grad_() for x in (q, k, v))
    with torch.enable_grad():
        out = flex_attention(*qkv)()
    return lambda: torch.autograd.grad(out, qkv, dout, retain_graph=True)


def chunkattn_gradients(q, k, v, dout, cos, sin, setting, *, deterministic=False, context=contextlib.nullcontext):
    """A call of the op's backward for raw q and k."""
    sizes = setting.chunk_size, setting.local_size
    out, lse = torch.ops.chunkattn.dca(q, k, v, cos, sin, *sizes)
    saved = (dout, q, k, v, out, lse, cos, sin)

    def call():
        with context():
            return torch.ops.chunkattn.dca_backward(*saved, *sizes, deterministic=deterministic)

    return call


def region_gradients(q, k, v, dout, indices, lists):
    """A call of the backward of attention to lists of regions."""
    sizes = lists.region_size, lists.merge
    out, lse = torch.ops.chunkattn.select_merge(q, k, v, indices, *sizes)
    return lambda: torch.ops.chunkattn.select_merge_backward(dout, q, k, v, out, lse, indices, *sizes)


def chunkattn_step(name, q, k, v, dout, cos, sin, sizes, differentiates, context=contextlib.nullcontext):
    """A call of the op ``name`` on raw q and k that returns (out,), or with its backward behind it (dq, dk, dv)."""
    forward = getattr(torch.ops.chunkattn, name)
    backward = getattr(torch.ops.chunkattn, f"{name}_backward")

    def call():
        with context():
            out, lse = forward(q, k, v, cos, sin, *sizes)
            return backward(dout, q, k, v, out, lse, cos, sin, *sizes) if differentiates else (out,)

    return call


def packed_fa3_call(ops, q, k, v, dout, packing, differentiates):
    """The same of FlashAttention-3, dense, of packed sequences."""

    def call():
        out, lse = ops.fwd(q, k, v, **packing, is_causal=True)[:2]
        return ops.bwd(dout, q, k, v, out, lse, **packing, is_causal=True)[:3] if differentiates else (out,)

    return call
