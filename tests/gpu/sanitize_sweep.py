"""Runs the ops on small, varied problems and compares them with the oracle. Made to be run under compute-sanitizer:

    PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool memcheck python tests/gpu/sanitize_sweep.py

Without torch's caching allocator every tensor is an allocation of its own, so that an access past its end is seen.
Inputs and expected outputs are made on the CPU: the ops' kernels are nearly all that runs on the device. There, every
problem runs on the kernels it takes by default and on the portable ones; every other one has its gradients summed in a
fixed order. Problems of ops that this build has no kernels of for the device are left out, and counted.
"""

import argparse
import sys
from collections.abc import Callable
from dataclasses import dataclass, fields

import torch

import chunkattn
from chunkattn import reference


def brief(problem):
    """The name of a problem and what differs from its defaults."""
    values = {field.name: (getattr(problem, field.name), field.default) for field in fields(problem)}
    changed = (f"{name}={value}" for name, (value, default) in values.items() if value != default)
    return " ".join((type(problem).__name__, *changed))


@dataclass(frozen=True)
class Dca:
    seq_q: int
    seq_k: int
    head_dim: int
    chunk_size: int
    local_size: int
    batch: int = 1
    heads: int = 2
    kv_heads: int = 2
    rotary_dim: int | None = None  # None: all of head_dim
    dtype: torch.dtype = torch.bfloat16
    layout: str = "bshd"
    interleaved: bool = False
    q_rotated: bool = False
    k_rotated: bool = False
    temperature: bool = False

    operators = ("dca", "dca_backward")

    def check(self, seed):
        tensors, options = make_inputs(self, seed)
        dout = normal(seed + 1000, self.dtype, tensors[0].shape)
        options["deterministic"] = seed % 2 == 1

        def run(device):
            qkv = [place(x, self.layout, device) for x in tensors[:3]]
            return differentiate(
                chunkattn.dca, qkv, place(dout, self.layout, device), *to_device((tensors[3:], options), device)
            )

        return Check(*expect(reference.dca, tensors[:3], dout, tensors[3:], options), run)


@dataclass(frozen=True)
class Varlen:
    lengths: tuple[tuple[int, int], ...]  # queries and keys of each sequence
    head_dim: int
    chunk_size: int
    local_size: int
    heads: int = 4
    kv_heads: int = 2
    dtype: torch.dtype = torch.bfloat16
    temperature: bool = False

    operators = ("dca_varlen", "dca_varlen_backward")

    def check(self, seed):
        total_q, total_k = (sum(lengths) for lengths in zip(*self.lengths, strict=True))
        sizes = ((total_q, self.heads), (total_k, self.kv_heads), (total_k, self.kv_heads), (total_q, self.heads))
        *qkv, dout = normal(seed, self.dtype, *((*size, self.head_dim) for size in sizes))
        table = chunkattn.rope_table(self.chunk_size, self.head_dim, device="cpu")
        options = {"chunk_size": self.chunk_size, "local_size": self.local_size, "deterministic": seed % 2 == 1}
        for name, lengths in zip("qk", zip(*self.lengths, strict=True), strict=True):
            options[f"cu_seqlens_{name}"] = torch.tensor((0, *lengths)).cumsum(0).int()
            options[f"max_seqlen_{name}"] = max(lengths)
        if self.temperature:
            options["temperature"] = torch.linspace(0.5, 1.5, len(self.lengths))

        def run(device):
            return differentiate(chunkattn.dca_varlen, *to_device((qkv, dout, table, options), device))

        return Check(*expect(sequence_by_sequence, qkv, dout, table, options), run)


@dataclass(frozen=True)
class Decode:
    seqlens: tuple[int, ...]  # tokens in the cache, of each sequence
    head_dim: int
    page_size: int | None = None
    new: int = 1  # tokens appended
    seq_q: int = 1
    num_splits: int = 0
    float8: bool = False
    heads: int = 4
    kv_heads: int = 2
    dtype: torch.dtype = torch.bfloat16
    chunk_size: int = 96
    local_size: int = 32

    operators = ("dca_with_kvcache",)

    def check(self, seed):
        batch, capacity = len(self.seqlens), max(self.seqlens) + self.new
        q_size, new_size = (batch, self.seq_q, self.heads), (batch, self.new, self.kv_heads)
        sizes = (q_size, new_size, new_size, (batch, capacity, self.kv_heads), (batch, capacity, self.kv_heads))
        q, k, v, *caches = normal(seed, self.dtype, *((*size, self.head_dim) for size in sizes))
        if self.float8:  # what is appended must not depend on the rounding of a rotation
            k, v = torch.zeros_like(k), torch.zeros_like(v)
        unused = torch.arange(capacity) >= torch.tensor(self.seqlens)[:, None]
        caches = [cache.masked_fill(unused[..., None, None], torch.nan) for cache in caches]
        cos, sin = chunkattn.rope_table(self.chunk_size, self.head_dim, device="cpu")
        options = {"cos": cos, "sin": sin, "chunk_size": self.chunk_size, "local_size": self.local_size}
        options["cache_seqlens"] = torch.tensor(self.seqlens, dtype=torch.int32)
        if self.page_size:
            caches, options["block_table"] = in_pages(caches, self.page_size, seed)
        if self.float8:
            caches = [cache.to(torch.float8_e4m3fn) for cache in caches]
            options["k_scale"] = options["v_scale"] = torch.linspace(0.5, 1, self.kv_heads)

        def call(function, q, caches, new, options):
            caches = [cache.clone() for cache in caches]
            out, lse = function(q, *caches, **options, k=new[0], v=new[1], return_lse=True)
            # Queries that see nothing have -inf, slots that nobody writes NaN.
            written = (cache.to(out.dtype).nan_to_num(nan=0.0) for cache in caches)
            return out, lse.nan_to_num(nan=torch.nan, neginf=0.0), *written

        exact_caches = caches if self.float8 else [cache.double() for cache in caches]
        twin = reference.dca_with_kvcache
        expected = call(twin, q.double(), exact_caches, (k.double(), v.double()), options)
        plain = call(twin, q, caches, (k, v), options)

        def run(device):
            moved = to_device((q, caches, (k, v), options | {"num_splits": self.num_splits}), device)
            return call(chunkattn.dca_with_kvcache, *moved)

        return Check(("out", "lse", "k_cache", "v_cache"), expected, tolerances(expected, plain, self.dtype), run)


@dataclass(frozen=True)
class SelectMerge:
    seq: int
    head_dim: int
    region_size: int = 4
    top_k: int = 5
    merge: int = 6
    batch: int = 1
    heads: int = 4
    kv_heads: int = 2
    dtype: torch.dtype = torch.bfloat16
    eligibility: str = "group"
    selection: str = "lookahead"
    index_heads: str = "kv"

    operators = ("select", "select_merge", "select_merge_backward")

    def check(self, seed):
        sizes = (
            (self.batch, self.seq, heads, self.head_dim) for heads in (self.heads, *2 * [self.kv_heads], self.heads)
        )
        *qkv, dout = normal(seed, self.dtype, *sizes)
        names = ("region_size", "top_k", "merge", "eligibility", "selection")
        options = {name: getattr(self, name) for name in names} | {"heads": self.index_heads}
        ids = reference.select(*qkv[:2], **options)
        names, expected, allowed = expect(reference.select_merge, qkv, dout, (), options | {"indices": ids})

        def run(device):
            (q, k, v), dout_there, ids_there = to_device((qkv, dout, ids), device)
            chosen = chunkattn.select(q, k, **options)
            merged = options | {"indices": ids_there, "deterministic": seed % 2 == 1}
            return chosen, *differentiate(chunkattn.select_merge, (q, k, v), dout_there, (), merged)

        return Check(("indices", *names), (ids.double(), *expected), [0.0, *allowed], run)


@dataclass(frozen=True)
class SelectMergeSteps:
    """Steps that end at `ends`, over one cache."""

    ends: tuple[int, ...]
    head_dim: int
    page_size: int | None = None
    region_size: int = 4
    top_k: int = 5
    merge: int = 6
    batch: int = 2
    heads: int = 4
    kv_heads: int = 2
    dtype: torch.dtype = torch.bfloat16
    eligibility: str = "group"
    selection: str = "causal"
    index_heads: str = "kv"

    operators = ("select_merge_with_kvcache",)

    def check(self, seed):
        seq = self.ends[-1]
        rows = normal(
            seed, self.dtype, *((self.batch, seq, n, self.head_dim) for n in (self.heads, *2 * [self.kv_heads]))
        )
        # Scores of integers are exact: what ties here ties there.
        generator = torch.Generator().manual_seed(seed)
        for like in rows[:2]:
            drawn = torch.randint(-1, 2, like.shape, generator=generator)
            rows.append((drawn * self.region_size).to(self.dtype))
        names = ("region_size", "top_k", "merge", "eligibility", "selection")
        options = {name: getattr(self, name) for name in names} | {"heads": self.index_heads}

        def call(cache, rows):
            outs, lses, begin = [], [], 0
            for end in self.ends:
                q, k, v, select_q, select_k = (x[:, begin:end] for x in rows)
                out, lse = cache.attend(q, k, v, select_q=select_q, select_k=select_k, return_lse=True)
                outs.append(out)
                lses.append(lse)
                begin = end
            return torch.cat(outs, dim=1), torch.cat(lses, dim=2)

        def run(device):
            cache = chunkattn.SelectMergeCache(
                self.batch, self.kv_heads, self.head_dim, seq, query_heads=self.heads, page_size=self.page_size,
                dtype=self.dtype, device=device, **options,
            )  # fmt: skip
            return call(cache, to_device(rows, device))

        twin = reference.SelectMergeCache
        expected = call(twin(self.batch, **options), [x.double() for x in rows])
        plain = call(twin(self.batch, **options), rows)
        return Check(("out", "lse"), expected, tolerances(expected, plain, self.dtype), run)


@dataclass(frozen=True)
class Check:
    """What a problem's results are compared with; run(device) computes them."""

    names: tuple[str, ...]
    expected: tuple[torch.Tensor, ...]
    tolerances: list[float]
    run: Callable[[torch.device], tuple[torch.Tensor, ...]]


# layout bhsd: a transposed view. padded: rows longer than the head by one element, which no 16-byte access fits, and a
# first element off every alignment but the dtype's own.
PROBLEMS = [
    Dca(1, 1, 64, 32, 8),
    Dca(1, 300, 64, 96, 32),
    Dca(7, 7, 64, 5, 2),
    Dca(63, 63, 64, 96, 32),
    Dca(64, 64, 128, 96, 32),
    Dca(65, 65, 128, 96, 32),
    Dca(129, 129, 128, 64, 16, heads=4, kv_heads=1),
    Dca(200, 200, 256, 96, 32),
    Dca(257, 257, 64, 100, 37, batch=2, heads=6, kv_heads=2),
    Dca(320, 320, 128, 400, 16),
    Dca(80, 80, 128, 130, 129),
    Dca(300, 300, 128, 130, 1),
    Dca(150, 150, 64, 90, 80),
    Dca(33, 290, 128, 100, 36),
    Dca(100, 333, 256, 77, 13, heads=4, kv_heads=2),
    Dca(5, 260, 64, 64, 32, batch=3),
    Dca(128, 1000, 128, 300, 44),
    Dca(190, 190, 96, 64, 16),
    Dca(190, 190, 40, 64, 16),
    Dca(90, 90, 160, 64, 16, heads=4, kv_heads=2),
    Dca(90, 90, 72, 48, 16, rotary_dim=24),
    Dca(140, 140, 128, 96, 32, rotary_dim=64),
    Dca(140, 140, 64, 96, 32, rotary_dim=2),
    Dca(140, 140, 256, 96, 32, rotary_dim=64, interleaved=True),
    Dca(180, 180, 128, 96, 32, interleaved=True),
    Dca(180, 180, 128, 96, 32, layout="bhsd"),
    Dca(180, 180, 128, 96, 32, layout="padded"),
    Dca(70, 180, 64, 96, 32, layout="padded", heads=4, kv_heads=2, interleaved=True),
    Dca(180, 180, 256, 96, 32, layout="padded", dtype=torch.float16),
    Dca(180, 180, 128, 96, 32, dtype=torch.float16),
    Dca(180, 180, 64, 96, 32, q_rotated=True, k_rotated=True),
    Dca(60, 180, 128, 96, 32, batch=2, k_rotated=True, temperature=True),
    Dca(180, 180, 128, 96, 32, q_rotated=True, layout="padded"),
    Varlen(((1, 1), (64, 64), (65, 65), (0, 0), (130, 130)), 128, 64, 16),
    Varlen(((5, 60), (1, 130), (0, 33), (70, 191)), 64, 96, 32, temperature=True),
    Varlen(((96, 96), (33, 290)), 256, 77, 13, kv_heads=4, dtype=torch.float16),
    Varlen(((30, 30), (100, 100), (7, 9)), 40, 32, 8, heads=6, kv_heads=1),
    Varlen(((129, 129), (1, 200), (200, 260), (64, 64)), 64, 200, 77, temperature=True),
    Varlen(((129, 129), (1, 200), (200, 260), (64, 64)), 256, 200, 77),
    Decode((0, 1, 63, 64, 65, 200), 128),
    Decode((150, 0, 37), 64, page_size=16),
    Decode((500, 131), 128, page_size=64, num_splits=3, heads=8, kv_heads=1),
    Decode((300, 5), 128, page_size=48, new=7, seq_q=7),
    Decode((90, 250), 256, new=100, seq_q=100, dtype=torch.float16),
    Decode((70, 33), 72, page_size=17, new=0),
    Decode((0, 20), 64, new=2, seq_q=5),
    Decode((140, 260), 128, page_size=32, float8=True, num_splits=2),
    Decode((140, 15), 64, new=3, seq_q=3, float8=True),
    SelectMerge(1, 64),
    SelectMerge(121, 64),
    SelectMerge(300, 128, region_size=16, top_k=3, merge=4, batch=2, selection="causal"),
    SelectMerge(260, 96, region_size=3, top_k=9, merge=11, eligibility="row", index_heads="q", dtype=torch.float16),
    SelectMerge(200, 256, region_size=1, top_k=40, merge=16, kv_heads=4),
    SelectMerge(190, 40, region_size=8, top_k=100, merge=1, heads=6, kv_heads=1),
    SelectMerge(330, 128, region_size=16, top_k=9, merge=5, index_heads="q"),
    SelectMerge(290, 256, region_size=8, top_k=20, merge=9, kv_heads=4, dtype=torch.float16),
    SelectMerge(290, 256, region_size=8, top_k=20, merge=9),
    SelectMerge(400, 64, region_size=24, top_k=8, merge=7, batch=2),
    SelectMerge(400, 64, region_size=24, top_k=8, merge=7, index_heads="q", dtype=torch.float16),
    SelectMerge(900, 128, region_size=1, top_k=130, merge=48),
    SelectMergeSteps((70, 71, 72, 73, 96, 97), 64),
    SelectMergeSteps((1, 100, 130), 128, page_size=16, merge=3, heads=8, kv_heads=1),
    SelectMergeSteps((61, 62), 96, region_size=3, top_k=4, merge=7, eligibility="row", index_heads="q"),
    SelectMergeSteps((150, 153, 160), 256, region_size=1, top_k=40, merge=16, dtype=torch.float16),
    SelectMergeSteps((340, 341), 128, page_size=64, region_size=16, top_k=3, merge=4),
    SelectMergeSteps((90, 91), 17, selection="query", page_size=8),
    SelectMergeSteps((1300, 1301), 40, region_size=1, top_k=600, merge=20, batch=1),
]


def place(x, layout, device):
    """Copies x [B, S, H, D] to the device with the strides of a layout."""
    batch, seq, heads, head_dim = x.shape
    if layout == "bhsd":
        return x.transpose(1, 2).contiguous().to(device).transpose(1, 2)
    if layout == "padded":
        rows = torch.full((batch, seq, heads, head_dim + 1), float("nan"), dtype=x.dtype)
        rows[..., 1:] = x
        return rows.to(device)[..., 1:]
    return x.to(device)


def normal(seed, dtype, *sizes):
    """Standard normal tensors on the CPU; one alone for one size."""
    generator = torch.Generator().manual_seed(seed)
    tensors = [torch.randn(size, generator=generator).to(dtype) for size in sizes]
    return tensors if len(tensors) > 1 else tensors[0]


def to_device(values, device):
    """Moves the tensors of nested lists, tuples and dictionaries."""
    if isinstance(values, torch.Tensor):
        return values.to(device)
    if isinstance(values, dict):
        return {name: to_device(value, device) for name, value in values.items()}
    if isinstance(values, list | tuple):
        return type(values)(to_device(value, device) for value in values)
    return values


def in_pages(caches, page_size, seed):
    """Caches of rows [B, capacity, Hkv, D] cut into shuffled pages, and the block table, -1 where there is no token."""
    batch, capacity = caches[0].shape[:2]
    width = -(-capacity // page_size)
    order = torch.randperm(batch * width + 1, generator=torch.Generator().manual_seed(seed))[: batch * width]
    pools = []
    for cache in caches:
        rows = cache.new_full((batch, width * page_size, *cache.shape[2:]), torch.nan)
        rows[:, :capacity] = cache
        pool = cache.new_full((batch * width + 1, page_size, *cache.shape[2:]), torch.nan)
        pool[order] = rows.reshape(batch * width, page_size, *cache.shape[2:])
        pools.append(pool)
    table = torch.cat((order.reshape(batch, width), torch.full((batch, 1), -1)), dim=1)
    return pools, table.int()


def sequence_by_sequence(
    q,
    k,
    v,
    cos,
    sin,
    *,
    cu_seqlens_q,
    cu_seqlens_k,
    max_seqlen_q,
    max_seqlen_k,
    temperature=None,
    return_lse,
    **options,
):
    """The oracle of dca_varlen."""
    outs, lses = [], []
    for row in range(len(cu_seqlens_q) - 1):
        queries, keys = (slice(*offsets[row : row + 2].tolist()) for offsets in (cu_seqlens_q, cu_seqlens_k))
        own = None if temperature is None else temperature[row : row + 1]
        sequence = (q[None, queries], k[None, keys], v[None, keys])
        out, lse = reference.dca(*sequence, cos, sin, temperature=own, return_lse=return_lse, **options)
        outs.append(out[0])
        lses.append(lse[0])
    return torch.cat(outs), torch.cat(lses, dim=1)


def make_inputs(problem, seed):
    """q, k, v, cos, sin on the CPU, and the keyword arguments of the op."""
    generator = torch.Generator().manual_seed(seed)
    q_size = (problem.batch, problem.seq_q, problem.heads, problem.head_dim)
    k_size = (problem.batch, problem.seq_k, problem.kv_heads, problem.head_dim)
    q, k, v = (torch.randn(size, generator=generator).to(problem.dtype) for size in (q_size, k_size, k_size))
    table = chunkattn.rope_table(problem.chunk_size, problem.rotary_dim or problem.head_dim, device="cpu")
    options = {
        name: getattr(problem, name) for name in ("chunk_size", "local_size", "interleaved", "q_rotated", "k_rotated")
    }
    if problem.temperature:
        options["temperature"] = torch.rand(problem.batch, generator=generator) + 0.5
    return (q, k, v, *table), options


def differentiate(function, qkv, dout, rest, options):
    """(out, lse, dq, dk, dv) of the op or of the oracle."""
    qkv = tuple(x.detach().requires_grad_() for x in qkv)
    out, lse = function(*qkv, *rest, **options, return_lse=True)
    return out.detach(), lse.detach(), *torch.autograd.grad(out, qkv, dout)


def tolerances(expected, plain, dtype):
    """FlashAttention's rule: at most twice the error of plain torch in the same dtype, and a rounding."""
    errors = [(low.double() - want).abs().max().item() for low, want in zip(plain, expected, strict=True)]
    sizes = [max(1.0, want.abs().max().item()) for want in expected]
    return [2 * error + torch.finfo(dtype).eps * size for error, size in zip(errors, sizes, strict=True)]


def expect(oracle, qkv, dout, rest, options):
    """The names of what differentiate() returns, the oracle's results in float64, and the tolerance of each."""
    expected = differentiate(oracle, [x.double() for x in qkv], dout.double(), rest, options)
    plain = differentiate(oracle, qkv, dout, rest, options)
    return ("out", "lse", "dq", "dk", "dv"), expected, tolerances(expected, plain, dout.dtype)


def share_of_problems(share, shares):
    """(seed, problem) of one of the parts. A sanitizer patches a kernel once a process, which takes it longer than most
    problems do: those that run the same kernels stay together."""

    def kernels(item):
        problem = item[1]
        return problem.operators, str(problem.dtype), -(-problem.head_dim // 64)

    problems = sorted(enumerate(PROBLEMS), key=kernels)
    begin, end = (len(problems) * part // shares for part in (share - 1, share))
    return problems[begin:end]


def missing_operator(problem, device):
    """The first of the operators a problem needs that has no kernel for the device."""
    for operator in problem.operators:
        if not torch._C._dispatch_has_kernel_for_dispatch_key(f"chunkattn::{operator}", device.type.upper()):
            return operator
    return None


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--share", default="1/1", metavar="I/N", help="the I-th of N parts of the problems")
    options = parser.parse_args(argv)
    device = torch.device(options.device)
    kernels = ["auto", "portable"] if device.type == "cuda" else ["cpu"]
    wrong = left_out = 0
    problems = share_of_problems(*map(int, options.share.split("/")))
    for seed, problem in problems:
        if missing := missing_operator(problem, device):
            left_out += 1
            print(f"left out, no kernels of {missing} for {device.type}: {brief(problem)}", flush=True)
            continue
        check = problem.check(seed)
        for kernel in kernels:
            if device.type == "cuda":
                torch.ops.chunkattn.force_kernel(kernel)
            errors = [
                (got.cpu().double() - want).abs().max().item()
                for got, want in zip(check.run(device), check.expected, strict=True)
            ]
            good = all(error <= tolerance for error, tolerance in zip(errors, check.tolerances, strict=True))
            wrong += not good
            figures = ", ".join(
                f"{name} {error:.1e} of {tolerance:.1e}"
                for name, error, tolerance in zip(check.names, errors, check.tolerances, strict=True)
            )
            print(f"{'ok' if good else 'WRONG'} {kernel}: {figures}: {brief(problem)}", flush=True)
    print(f"{len(problems) - left_out} problems, {wrong} wrong, {left_out} left out")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
