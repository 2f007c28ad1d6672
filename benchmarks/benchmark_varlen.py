"""Times Dual Chunk Attention of packed sequences of different lengths beside the same sequences one by one.

    python benchmarks/benchmark_varlen.py --fa3 DIR --json benchmarks/results/h100/varlen.json

A shape b64-s8k-h32/8-d128 stands for 64 sequences of 512 to 8192 tokens, a sixteenth of the longest to all of it, drawn
with a fixed seed. chunkattn is chunkattn.dca_varlen. chunkattn-alone is chunkattn.dca of every sequence, one call after
the other; chunkattn-longest is that of the longest alone, whose rate is what all of them could have if none were
shorter. fa3 is FlashAttention-3 of packed sequences, dense. The forward is timed, and forward and backward together.

All run in one process, interleaved, and are compared with chunkattn.reference in float64 on the shortest and on the
longest sequence before they are timed. Rates count the FLOPs of causal attention, 2 H N N D of a sequence's forward and
2.5 times as many of its backward.
"""

import random
import sys

import benchmark_backward
import benchmark_forward
import driver
import peers
import torch
from common import Shape
from driver import Call

from chunkattn import _core

# The shapes of the published table, and the DCA settings each is timed with.
CUDA_TABLE = {
    "b64-s8k-h32/8-d128": ["3072:512"],
    "b64-s8k-h32-d128": ["3072:512"],
    "b64-s8k-h32/8-d64": ["3072:512"],
}
CPU_TABLE = {"b6-s256-h4/2-d64": ["96:32"]}

PASSES = ("forward", "forward+backward")
SEED = 0


class PackedShape(Shape):
    """Sequences of different lengths, seq_q and seq_k that of the longest."""

    @property
    def lengths(self):
        draw = random.Random(SEED)
        return [draw.randint(-(-self.seq_q // 16), self.seq_q) for _ in range(self.batch)]

    def alone(self, length):
        """One of the sequences."""
        return Shape(1, self.heads, self.kv_heads, length, length, self.head_dim, self.dtype)

    def flops(self, pass_="forward"):
        return sum(self.alone(length).flops(pass_) for length in self.lengths)

    def random_inputs(self, device, seed=0):
        """q [total, H, D], k and v [total, Hkv, D], normally distributed."""
        return tuple(x[0] for x in self.alone(sum(self.lengths)).random_inputs(device, seed))


class Packing:
    """Where the sequences lie."""

    def __init__(self, lengths, device):
        self.lengths = lengths
        offsets = torch.tensor([0, *lengths]).cumsum(0)
        self.rows = [slice(*pair) for pair in zip(offsets[:-1].tolist(), offsets[1:].tolist(), strict=True)]
        self.offsets = offsets.to(device, torch.int32)

    @property
    def arguments(self):
        """As dca_varlen and FlashAttention call them."""
        return {
            "cu_seqlens_q": self.offsets,
            "cu_seqlens_k": self.offsets,
            "max_seqlen_q": max(self.lengths),
            "max_seqlen_k": max(self.lengths),
        }


class Oracle:
    """Outputs or gradients of the shortest and the longest sequence, each compared as the other benchmarks do."""

    def __init__(self, inputs, table, packing, gradients):
        q, k, v, _ = inputs
        self.likes = (q, k, v) if gradients else (q,)
        kind, taken = (benchmark_backward, inputs) if gradients else (benchmark_forward, inputs[:3])
        by_length = sorted(packing.rows, key=lambda rows: rows.stop - rows.start)
        self.rows = (by_length[0], by_length[-1])
        self.parts = [kind.Oracle(*(x[None, rows] for x in taken), *table) for rows in self.rows]
        self.names = kind.Oracle.names

    def compare(self, results, setting):
        worst, wrong = 0.0, None
        for rows, part in zip(self.rows, self.parts, strict=True):
            error, name = part.compare([x[None, rows] for x in results], setting)
            worst, wrong = max(worst, error), wrong or name
        return worst, wrong


class Alone(Call):
    """A call of each sequence."""

    def __init__(self, calls):
        self.calls = calls

    def __call__(self):
        for call in self.calls:
            call()

    def results(self):
        parts = [call() for call in self.calls]
        return tuple(torch.cat([x[0] for x in tensors]) for tensors in zip(*parts, strict=True))


class Longest(Alone):
    """Of the longest sequence only; its results are those of all."""

    def __init__(self, calls, lengths):
        super().__init__(calls)
        self.longest = calls[lengths.index(max(lengths))]

    def __call__(self):
        self.longest()


class Varlen(driver.Benchmark):
    pass_ = "varlen"
    ours = ("chunkattn", "chunkattn-alone", "chunkattn-longest", "chunkattn-portable")
    composed = ()

    def find_peers(self):
        names, absent = ["fa3", *self.ours], {}
        try:
            if self.device.type == "cpu":
                raise peers.Absent("runs on CUDA only")
            self.fa3 = peers.load_fa3(self.options.fa3)
        except peers.Absent as reason:
            absent["fa3"] = str(reason)
        try:
            self.portable = peers.find_portable_kernel(self.device, _core.plan_forward)
        except peers.Absent as reason:
            absent["chunkattn-portable"] = str(reason)
        if self.options.impls:
            absent |= {name: "not selected" for name in names if name not in self.options.impls and name not in absent}
        return [name for name in names if name not in absent], {}, absent

    def run_shape(self, shape, setting_texts):
        self.packing = Packing(shape.lengths, self.device)
        for self.pass_ in PASSES:
            super().run_shape(shape, setting_texts)

    @property
    def differentiates(self):
        return self.pass_ != "forward"

    def make_inputs(self, shape):
        q, k, v = shape.random_inputs(self.device)
        return q, k, v, shape.random_inputs(self.device, seed=1)[0]

    def make_oracle(self, inputs, table):
        return Oracle(inputs, table, self.packing, self.differentiates)

    def make_row(self, case, shape, timing, **extra):
        if case.impl == "chunkattn-longest":
            shape = shape.alone(max(self.packing.lengths))
        return super().make_row(case, shape, timing, **extra)

    def make_call(self, impl, inputs, table, setting):
        if impl == "fa3":
            return Call(peers.packed_fa3_call(self.fa3, *inputs, self.packing.arguments, self.differentiates))
        sizes = setting.chunk_size, setting.local_size
        if impl in ("chunkattn", "chunkattn-portable"):
            context = [self.portable] if impl == "chunkattn-portable" else []
            offsets = tuple(self.packing.arguments.values())
            return Call(
                peers.chunkattn_step("dca_varlen", *inputs, *table, (*offsets, *sizes), self.differentiates, *context)
            )
        calls = [
            peers.chunkattn_step("dca", *(x[None, rows] for x in inputs), *table, sizes, self.differentiates)
            for rows in self.packing.rows
        ]
        return Alone(calls) if impl == "chunkattn-alone" else Longest(calls, self.packing.lengths)


def main(argv=None):
    return driver.run(argv, __doc__, Varlen, CUDA_TABLE, CPU_TABLE, PackedShape)


if __name__ == "__main__":
    sys.exit(main())
