"""Times decoding with select-and-merge attention over contexts of any length, beside dense decoding.

    python benchmarks/benchmark_select_merge_decode.py --json benchmarks/results/h100/select_merge_decode.json

Implementations:
    select-merge: the mean of all tokens of a group, the first of which chooses its regions;
    select-merge-first: a group's first token; select-merge-next: the others;
    select-merge-query: every token chooses;
    dense: chunkattn's decode kernel over the whole context, in one chunk.

On a GPU each is a CUDA graph of one step that is replayed, as a serving engine does. Keys are random, and so are the
regions that are chosen. Outputs are compared with attention to the listed regions and the group in float64. Rates count
the bytes of the keys and values that are attended to.
"""

import argparse
import sys
import time

import common
import torch
from common import (
    Shape,
    Timing,
    console,
    make_clock,
    make_header,
    make_row,
    print_absent,
    print_rows,
    time_interleaved,
    write_results,
)

import chunkattn

CUDA_SHAPES = [
    "s1/128k-h32/8-d128",
    "s1/1024k-h32/8-d128",
    "s1/4096k-h32/8-d128",
    "b8-s1/128k-h32/8-d128",
]
CPU_SHAPES = ["s1/16k-h8/2-d64"]
SPARE = 4096  # tokens of which no group is made, so that steps can be repeated
IMPLS = ["select-merge", "select-merge-first", "select-merge-next", "select-merge-query", "dense"]


def replayable(function, device):
    """The function as a CUDA graph, or itself on a CPU."""
    function()
    if torch.device(device).type != "cuda":
        return function
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        function()
    return graph.replay


class Decoding:
    """A cache filled with `shape.seq_k` random tokens, where a group begins, and rows of one token more."""

    def __init__(self, shape, selection, sizes, device):
        self.shape, self.sizes = shape, sizes
        self.group_tokens = sizes["region_size"] * sizes["merge"]
        self.begin = shape.seq_k // self.group_tokens * self.group_tokens
        dtype = getattr(torch, shape.dtype)
        self.cache = chunkattn.SelectMergeCache(
            shape.batch, shape.kv_heads, shape.head_dim, self.begin + self.group_tokens + SPARE, **sizes,
            selection=selection, dtype=dtype, device=device,
        )  # fmt: skip
        for tensor in (self.cache.k, self.cache.v, self.cache.region_sums, self.cache.query_sums):
            for row in tensor:
                row.normal_()
        q = torch.randn(shape.batch, 1, shape.heads, shape.head_dim, device=device).to(dtype)
        k, v = (torch.randn(shape.batch, 1, shape.kv_heads, shape.head_dim, device=device).to(dtype) for _ in "kv")
        self.rows = (q, k, v)
        self.cache.seqlens.fill_(self.begin)
        self.step = replayable(lambda: self.cache.attend(*self.rows), device)

    def restart(self, token=0):
        self.cache.seqlens.fill_(self.begin + token)

    # Each leaves the sequences in the first tokens of the group: the next call may be another's.

    def group(self):
        self.restart()
        for _ in range(self.group_tokens):
            self.step()
        self.restart(1)

    def first(self):
        self.restart()
        self.step()

    @property
    def keys(self):
        """Attended to by a token in the middle of a group."""
        listed = min(self.sizes["top_k"] * self.sizes["region_size"], self.begin)
        return listed + self.group_tokens // 2

    def error(self):
        """(largest absolute error of a step, whether it is within FlashAttention's rule)."""
        cache, (q, _, _) = self.cache, self.rows
        self.first()
        self.restart(1)
        out = cache.attend(*self.rows)
        size = self.sizes["region_size"]
        own = torch.arange(self.begin, self.begin + 2, device=q.device)
        worst, good = 0.0, True
        for b in range(min(2, self.shape.batch)):
            for head in sorted({0, self.shape.heads - 1}):
                kv_head = head // (self.shape.heads // self.shape.kv_heads)
                ids = cache.indices[b, kv_head].long()
                listed = (ids[ids >= 0, None] * size + torch.arange(size, device=q.device)).flatten()
                tokens = torch.cat((listed, own))
                keys, values = (x[b, tokens, kv_head] for x in (cache.k, cache.v))
                expected, plain = (
                    ((q[b, 0, head].to(t) @ keys.to(t).T) * self.shape.head_dim**-0.5).softmax(-1) @ values.to(t)
                    for t in (torch.float64, q.dtype)
                )
                error = (out[b, 0, head].double() - expected).abs().max().item()
                tolerance = 2 * (plain.double() - expected).abs().max().item() + torch.finfo(q.dtype).eps
                worst, good = max(worst, error), good and error <= tolerance
        return worst, good


def dense_step(decoding, device):
    """Dense decoding over the same keys: one chunk, and a table that rotates by nothing."""
    cache, (q, k, v) = decoding.cache, decoding.rows
    table = [make(cache.capacity + 2, 1, device=device) for make in (torch.ones, torch.zeros)]
    lengths = torch.full((q.shape[0],), decoding.begin, dtype=torch.int32, device=device)
    options = {"chunk_size": cache.capacity + 1, "local_size": 1, "q_rotated": True}
    return replayable(
        lambda: chunkattn.dca_with_kvcache(q, cache.k, cache.v, *table, cache_seqlens=lengths, k=k, v=v, **options),
        device,
    )


def measure(shape, options, sizes, clock, failed):
    """Rows of one shape."""
    timed, keys, errors = {}, {}, {}
    for selection in ("causal", "query"):
        names = [n for n in options.impls if (n == "select-merge-query") == (selection == "query") and n in IMPLS]
        if not names:
            continue
        decoding = Decoding(shape, selection, sizes, options.device)
        error, good = decoding.error()
        if not good:
            failed.append({"impl": names[0], "shape": str(shape), "error": f"output is off by {error:.3g}"})
            continue
        functions = {
            "select-merge": decoding.group,
            "select-merge-first": decoding.first,
            "select-merge-next": decoding.step,
            "select-merge-query": decoding.step,
            "dense": None,
        }
        functions = {name: functions[name] for name in names}
        if "dense" in functions:
            functions["dense"] = dense_step(decoding, options.device)
        for name, timing in time_interleaved(functions, clock, rounds=options.rounds, seconds=options.seconds).items():
            tokens = decoding.group_tokens if name == "select-merge" else 1
            timed[name] = Timing(tuple(sample / tokens for sample in timing.samples))
            keys[name] = shape.seq_k if name == "dense" else decoding.keys
            errors[name] = None if name == "dense" else error
    moved = {name: 4 * shape.batch * count * shape.kv_heads * shape.head_dim for name, count in keys.items()}
    extra = {name: {} if name == "dense" else sizes for name in timed}
    return [
        make_row(name, "decode", shape, timed[name], bytes_moved=moved[name], max_error=errors[name], **extra[name])
        for name in options.impls
        if name in timed
    ]


def parse_arguments(argv):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--shape", nargs="+", help="such as s1/1024k-h32/8-d128; default: those of the table")
    parser.add_argument("--impls", nargs="+", choices=IMPLS, default=IMPLS)
    parser.add_argument("--region-size", type=int, default=16)
    parser.add_argument("--top-k", type=int, default=384)
    parser.add_argument("--merge", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=0.5, help="for each implementation and shape")
    parser.add_argument("--time-limit", type=float, help="seconds after which no further shape is begun")
    parser.add_argument("--json", metavar="PATH", help="result file")
    return parser.parse_args(argv)


def main(argv=None):
    options = parse_arguments(argv)
    cuda = torch.device(options.device).type == "cuda"
    dtype = "bfloat16" if cuda else "float32"
    shapes = [Shape.parse(text, dtype) for text in options.shape or (CUDA_SHAPES if cuda else CPU_SHAPES)]
    if any(shape.seq_q != 1 for shape in shapes):
        raise SystemExit("decoding takes shapes with one query, such as s1/1024k-h32/8-d128")
    sizes = {"region_size": options.region_size, "top_k": options.top_k, "merge": options.merge}
    clock = make_clock(options.device)
    ceilings = common.measure_ceilings(options.device, clock)
    rows, failed, absent = [], [], {}
    if cuda and "select_merge_with_kvcache" not in chunkattn._ops.CUDA_OPERATORS:
        absent["select-merge"] = "this build of chunkattn has no CUDA kernels of it"
        options.impls = [name for name in options.impls if name == "dense"]
    settings = {"rounds": options.rounds, "seconds": options.seconds}
    header = make_header("select_merge_decode", options.device, ceilings, **settings)
    start = time.monotonic()
    for shape in shapes:
        if options.time_limit and time.monotonic() - start > options.time_limit:
            failed.append({"impl": "all", "shape": str(shape), "error": "not run: the time limit was reached"})
            continue
        of_shape = measure(shape, options, sizes, clock, failed)
        print_rows(str(shape), of_shape, ceilings)
        rows += of_shape
        if cuda:
            torch.cuda.empty_cache()
        if options.json:
            write_results(options.json, header, rows, absent, failed)
    print_absent(absent)
    for failure in failed:
        console.print(f"failed: {failure}", markup=False, highlight=False)
    if options.json:
        write_results(options.json, header, rows, absent, failed)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
