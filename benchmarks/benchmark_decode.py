"""Times decoding and chunked prefill over a key-value cache beside FlashAttention-3 and DCA composed of its calls.

    python benchmarks/benchmark_decode.py --fa3 DIR --json benchmarks/results/h100/decode.json

A shape with one query is a decode step: the new token is appended and its query attends to seq_k tokens. Rates count
the bytes of the keys and values, in the cache's dtype, and the share of the ceiling is that of a device copy. Dense
attention gets a cache that holds the token already, composed DCA rotated queries as well: what is timed of it is its
three calls and the merge. "rows, complete" is our step over such a cache. One sequence of at most STEP_KEYS tokens
takes no time to read: its rows are the time of one step of many in one CUDA graph. A shape with as many queries as keys
is a prompt, read in chunks of --prefill-chunk tokens through the cache, beside one call of chunkattn.dca; rates count
its causal FLOPs.

All run in one process, interleaved, and replay CUDA graphs. Outputs, and what is appended, are compared with
chunkattn.reference in float64 before anything is timed.
"""

import sys
from dataclasses import dataclass, replace

import benchmark_forward
import common
import driver
import peers
import torch
from common import DcaSetting
from driver import Call, Captured
from torch import Tensor

import chunkattn
from chunkattn import reference

# The shapes of the published table, and their DCA setting.
CUDA_TABLE = {
    "s1/128k-h32/8-d128": ["3072:512"],
    "s1/1024k-h32/8-d128": ["262144:8192"],
    "b16-s1/32k-h32/8-d128": ["3072:512"],
    "b64-s1/4k-h32/8-d128": ["1536:256"],
    "s1/100-h32/8-d128": ["3072:512"],
    "s1/1000-h32/8-d128": ["3072:512"],
    "s128k-h32/8-d128": ["24576:1024"],
}
CPU_TABLE = {"b2-s1/256-h4/2-d64": ["96:32"], "s1/100-h4/2-d64": ["96:32"], "s256-h4/2-d64": ["96:32"]}

PAGE_SIZES = (16, 64, 128)
STEP_KEYS = 1024
STEP_CAPACITY = 4096  # of the cache of such a step
STEPS = 50  # of a graph
ROWS, COMPLETE, FLOAT8 = "rows", "rows, complete", "float8"


@dataclass
class Cache:
    """Keys, rotated, and values of a batch of sequences of one length, the last token of which is yet to be appended.

    k, v: [B, capacity, Hkv, D] or pages [num_pages, page_size, Hkv, D]; new_k, new_v: [B, 1, Hkv, D], raw.
    """

    name: str
    k: Tensor
    v: Tensor
    new_k: Tensor
    new_v: Tensor
    length: int  # with the new token
    block_table: Tensor | None = None
    complete: bool = False  # holds the last token, too

    def __post_init__(self):
        batch = self.new_k.shape[0]
        self.before, self.after = (
            torch.full((batch,), length, dtype=torch.int32, device=self.k.device)
            for length in (self.length - 1, self.length)
        )

    def paged(self, page_size):
        """The same memory as shuffled pages."""
        pages = self.k.shape[0] * self.k.shape[1] // page_size
        table = torch.randperm(pages, device=self.k.device, dtype=torch.int32).view(self.k.shape[0], -1)
        k, v = (x.view(pages, page_size, *x.shape[2:]) for x in (self.k, self.v))
        return Cache(f"pages of {page_size}", k, v, self.new_k, self.new_v, self.length, table)

    def completed(self):
        """The same memory, where a step finds the last token and appends nothing."""
        return replace(self, name=COMPLETE, complete=True)

    def float8(self):
        k, v = (x.to(torch.float8_e4m3fn) for x in (self.k, self.v))
        return Cache(FLOAT8, k, v, self.new_k, self.new_v, self.length)

    def sequence(self, row):
        """Keys and values [length, Hkv, D] of a sequence, as the cache holds them now."""
        return (reference.cached_rows(x, row, self.length, self.block_table) for x in (self.k, self.v))

    @property
    def bytes(self):
        """Of the keys and values that a step reads."""
        return 2 * self.new_k.numel() * self.length * self.k.element_size()


class Oracle:
    """Float64 outputs of a step for the first and the last KV head of the first and the last sequence."""

    names = ("output",)

    def __init__(self, q, cache, table, appends):
        self.q, self.cache, self.table, self.appends = q, cache, table, appends
        self.likes = (q,)

    def compare(self, results, setting):
        """(largest absolute error, the name of what is beyond its tolerance or None)."""
        (out,) = results
        group = self.q.shape[2] // self.cache.new_k.shape[2]
        worst, wrong = 0.0, None
        for row in sorted({0, self.q.shape[0] - 1}):
            k, v = self.cache.sequence(row)
            if self.appends and not self._appended(k[-1], v[-1], row, setting):
                wrong = "the appended token"
            for head in sorted({0, k.shape[1] - 1}):
                heads = slice(head * group, (head + 1) * group)
                one = [x[None, :, head : head + 1] for x in (k, v)]
                exact, plain = (
                    self._attend(self.q[row : row + 1, :, heads].to(dtype), *(x.to(dtype) for x in one), setting)
                    for dtype in (torch.float64, self.q.dtype)
                )
                error = (out[row : row + 1, :, heads].double() - exact).abs().max().item()
                worst = max(worst, error)
                # FlashAttention's rule, with a rounding of what averages to far below 1 over many keys. float32 rounds
                # every sum, not the result alone: the ulps that the tests grant it.
                ulps = 8 if self.q.dtype == torch.float32 else 1
                rounding = ulps * torch.finfo(self.q.dtype).eps * exact.abs().max().item()
                if error > 2 * (plain.double() - exact).abs().max().item() + rounding:
                    wrong = wrong or "output"
        return worst, wrong

    def _attend(self, q, k, v, setting):
        cos, sin = self.table
        if setting is None:  # dense: one chunk, and a table that rotates by nothing
            size = (self.cache.length + 2, q.shape[-1] // 2)
            cos, sin = (make(size, device=q.device) for make in (torch.ones, torch.zeros))
            setting = DcaSetting(self.cache.length + 1, 1)
        sizes = {"chunk_size": setting.chunk_size, "local_size": setting.local_size}
        return reference.dca(q, k, v, cos, sin, **sizes, k_rotated=True)

    def _appended(self, k, v, row, setting):
        """Whether a token's key and value are the new ones, the key rotated in float32, to a rounding of the cache."""
        at = (self.cache.length - 1) % setting.stride
        cos, sin = (table[at : at + 1] for table in self.table)
        exact = reference.rotate(self.cache.new_k[row : row + 1].double(), cos, sin)[0, 0], self.cache.new_v[row, 0]
        rounding, single = (torch.finfo(dtype).eps for dtype in (self.cache.k.dtype, torch.float32))
        for stored, x in zip((k.double(), v.double()), exact, strict=True):
            x = x.double()
            tolerance = rounding * x.abs().clamp(min=2**-6) + 4 * single * x.abs().max()
            if not ((stored - x).abs() <= tolerance).all():
                return False
        return True


@dataclass
class CacheCase(driver.Case):
    cache: Cache | None = None
    oracle: Oracle | None = None  # None: the shape's

    def __str__(self):
        return f"{super().__str__()} {self.cache.name}"


def dca_step(q, cache, cos, sin, setting):
    new = {} if cache.complete else {"k": cache.new_k, "v": cache.new_v}
    return chunkattn.dca_with_kvcache(
        q,
        cache.k,
        cache.v,
        cos,
        sin,
        cache_seqlens=cache.after if cache.complete else cache.before,
        chunk_size=setting.chunk_size,
        local_size=setting.local_size,
        block_table=cache.block_table,
        **new,
    )


def dense_step(engine, q, cache):
    return engine.decode(q, cache.k, cache.v, cache.after, cache.block_table)


def prefill_in_chunks(q, k, v, cos, sin, setting, cache, block_table, size):
    """The prompt through the cache, `size` tokens at a time."""
    out = torch.empty_like(q)
    for begin in range(0, q.shape[1], size):
        part = slice(begin, begin + size)
        chunkattn.dca_with_kvcache(
            q[:, part],
            *cache,
            cos,
            sin,
            cache_seqlens=begin,
            chunk_size=setting.chunk_size,
            local_size=setting.local_size,
            block_table=block_table,
            k=k[:, part],
            v=v[:, part],
            out=out[:, part],
        )
    return out


class Decode(driver.Benchmark):
    pass_ = "decode"
    dense = ("fa3", "sdpa")
    ours = ("chunkattn",)
    composed = ("composed-fa3", "composed-sdpa")
    takes_steps = True

    @staticmethod
    def add_arguments(parser):
        parser.add_argument("--prefill-chunk", type=int, default=8192, metavar="TOKENS", help="default: %(default)s")

    def run_shape(self, shape, setting_texts):
        short = shape.batch == 1 and shape.seq_k <= STEP_KEYS
        self.pass_ = "prefill" if shape.seq_q > 1 else "step" if short else "decode"
        self.shape = shape
        super().run_shape(shape, setting_texts)

    def make_oracle(self, inputs, table):
        return benchmark_forward.Oracle(*inputs, *table) if self.pass_ == "prefill" else None

    def make_cases(self, inputs, table, settings):
        make = {"decode": self.decode_cases, "step": self.step_cases, "prefill": self.prefill_cases}[self.pass_]
        return [case for case in make(inputs, table, settings[0]) if case.impl in self.names]

    def make_cache(self, k, v, capacity):
        new_k, new_v = self.shape.random_inputs(self.device, seed=1)[1:]
        k, v = (torch.nn.functional.pad(x, (0, 0, 0, 0, 0, capacity - x.shape[1])) for x in (k, v))
        return Cache(ROWS, k, v, new_k[:, :1].clone(), new_v[:, :1].clone(), self.shape.seq_k)

    def decode_cases(self, inputs, table, setting):
        q, k, v = inputs
        rows = self.make_cache(k, v, k.shape[1])
        paged = [rows.paged(size) for size in PAGE_SIZES if k.shape[1] % size == 0]
        cases = [self.our_case(q, cache, table, setting) for cache in (rows, rows.completed(), *paged, rows.float8())]
        for name, engine in self.decoders.items():
            cases += [self.dense_case(name, engine, q, cache, table) for cache in (rows, *paged)]
            composed = peers.ComposedStep(engine, *table, setting, q, rows.k, rows.v)
            oracle = Oracle(q, rows, table, appends=False)
            cases.append(
                CacheCase(f"composed-{name}", setting, Captured(self.device, composed), cache=rows, oracle=oracle)
            )
        return cases

    def step_cases(self, inputs, table, setting):
        q, k, v = inputs
        cache = self.make_cache(k, v, STEP_CAPACITY)
        cases = [self.our_case(q, cache, table, setting, times=STEPS)]
        return cases + [self.dense_case(*item, q, cache, table, times=STEPS) for item in self.decoders.items()]

    @property
    def decoders(self):
        return {name: engine for name, engine in self.engines.items() if engine.decode is not None}

    def our_case(self, q, cache, table, setting, times=1):
        call = Captured(self.device, dca_step, q, cache, *table, setting, times=times)
        oracle = Oracle(q, cache, table, appends=not cache.complete)
        return CacheCase("chunkattn", setting, call, cache=cache, oracle=oracle)

    def dense_case(self, name, engine, q, cache, table, times=1):
        call = Captured(self.device, dense_step, engine, q, cache, times=times)
        return CacheCase(name, None, call, cache=cache, oracle=Oracle(q, cache, table, appends=False))

    def prefill_cases(self, inputs, table, setting):
        cache = [torch.empty_like(x) for x in inputs[1:]]
        rows = Cache(ROWS, *cache, *(x[:, :1] for x in inputs[1:]), self.shape.seq_k)
        cases = [driver.Case("chunkattn", setting, Call(peers.chunkattn_call(*inputs, *table, setting)))]
        size = self.options.prefill_chunk
        for kind in (rows, rows.paged(PAGE_SIZES[0])):
            call = Call(prefill_in_chunks, *inputs, *table, setting, (kind.k, kind.v), kind.block_table, size)
            cases.append(CacheCase("chunkattn", setting, call, cache=kind))
        return cases

    def attempt(self, case, oracle):
        return super().attempt(case, getattr(case, "oracle", None) or oracle)

    def make_row(self, case, shape, timing):
        if not isinstance(case, CacheCase):
            return super().make_row(case, shape, timing, cache=None)
        if self.pass_ == "prefill":
            return super().make_row(case, shape, timing, cache=case.cache.name, tokens=self.options.prefill_chunk)
        steps = case.call.times
        timing = common.Timing(tuple(ms / steps for ms in timing.samples))
        return super().make_row(
            case, shape, timing, bytes_moved=case.cache.bytes, cache=case.cache.name, steps_in_graph=steps
        )


def main(argv=None):
    return driver.run(argv, __doc__, Decode, CUDA_TABLE, CPU_TABLE)


if __name__ == "__main__":
    sys.exit(main())
