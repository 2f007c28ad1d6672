"""What the tests of bad input share: a good call of dca, ways to spoil one, and what a backward refuses."""

import torch
from cases import Case

CASE = Case(seqlen_q=20, seqlen_k=33, batch=2, heads=4, kv_heads=2, head_dim=16, chunk_size=12, local_size=5)
CASE = CASE.but(temperature=(1.0, 1.5))

REFUSALS = (TypeError, ValueError, RuntimeError)


def changed(values, edits):
    """The arguments with some replaced. A function is called with the value it replaces."""
    return values | {name: edit(values[name]) if callable(edit) else edit for name, edit in edits.items()}


def to(dtype):
    return lambda x: x.to(dtype)


def every_other_column(x):
    """The same values, every second element of a wider tensor."""
    return x.repeat_interleave(2, dim=-1)[..., ::2]


def heads_last(x):
    """[B, S, H, D] as a view of [B, S, D, H]."""
    return x.transpose(2, 3).contiguous().transpose(2, 3)


def columns(count):
    return lambda table: torch.ones(table.shape[0], count, device=table.device)


HUGE = 1 << 31

# Name of the call: what differs from a good one, and the message.
BAD_BACKWARD_CALLS = {
    "dout has another shape": ({"dout": lambda x: x[:, 1:]}, r"dout must have the shape of q, .* got \[2, 19, 4, 16\]"),
    "dout has 3 dimensions": ({"dout": lambda x: x[0]}, r"dout must have 4 dimensions .* got shape \[20, 4, 16\]"),
    "dout is float32": ({"dout": to(torch.float32)}, "dout must have the dtype of q, bfloat16, got float32"),
    "dout is strided": ({"dout": every_other_column}, "dout must be contiguous in its last dimension, got stride 2"),
    "dout is expanded": ({"dout": lambda x: x.new_ones(()).expand(x.shape)}, "dout must be contiguous .* got stride 0"),
    "dout is of another device": ({"dout": to("meta")}, "dout must be on the device of q, .*, got meta"),
    "out has other heads": ({"out": lambda x: x[:, :, 1:]}, r"out must have the shape of q, .* got \[2, 20, 3, 16\]"),
    "out is float16": ({"out": to(torch.float16)}, "out must have the dtype of q, bfloat16, got float16"),
    "out is strided": ({"out": heads_last}, "out must be contiguous in its last dimension, got stride 4"),
    "softmax_lse is float64": ({"softmax_lse": to(torch.float64)}, "softmax_lse must be float32, got float64"),
    "softmax_lse is transposed": (
        {"softmax_lse": lambda x: x.transpose(1, 2)},
        r"softmax_lse must have shape \[2, 4, 20\], got \[2, 20, 4\]",
    ),
    "softmax_lse is strided": (
        {"softmax_lse": lambda x: x.transpose(1, 2).contiguous().transpose(1, 2)},
        "softmax_lse must be contiguous",
    ),
    "softmax_lse has 2 dimensions": ({"softmax_lse": lambda x: x[0]}, "softmax_lse must have 3 dimensions"),
    "q is int64": ({"q": to(torch.int64)}, "q must be .*float16.* got Long"),
    "k has another batch size": ({"k": lambda x: x[:1]}, "k must have the batch size of q, 2, got 1"),
    "local_size is chunk_size": ({"local_size": 12}, "local_size must lie in 1 .. chunk_size - 1, got 12"),
    "cos lacks the last row": ({"cos": lambda x: x[:-1]}, r"cos must have at least chunk_size \+ 1 = 13 rows"),
}


def smallest_call(name, device):
    """Positional and keyword arguments of chunkattn.<name>."""
    shape = (8, 2, 4) if name == "dca_varlen" else (1, 8, 2, 4)
    q, k, v = (torch.empty(shape, dtype=torch.bfloat16, device=device) for _ in range(3))
    if name in ("select", "select_merge"):
        return ((q, k) if name == "select" else (q, k, v)), {}
    table = torch.empty(5, 2, device=device)
    options = {"cos": table, "sin": table, "chunk_size": 4, "local_size": 1}
    if name == "dca_with_kvcache":
        return (q, k, v), {**options, "cache_seqlens": 8}
    offsets = torch.empty(2, dtype=torch.int32, device=device)
    packing = {"cu_seqlens_q": offsets, "cu_seqlens_k": offsets, "max_seqlen_q": 8, "max_seqlen_k": 8}
    return (q, k, v), {**options, **packing}
