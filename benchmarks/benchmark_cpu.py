"""Times Dual Chunk Attention on the CPU, forward and backward, beside torch's own dense attention.

    python benchmarks/benchmark_cpu.py --json benchmarks/results/cpu/cpu.json

Both run in one process, interleaved, on the same tensors, which lie in memory as scaled_dot_product_attention reads
them best: [batch, heads, sequence, head_dim]. Queries and keys arrive unrotated, so chunkattn's times contain the
rotations that dense attention leaves to its caller. Rates count the FLOPs of causal attention for both.
"""

import argparse
import sys

import common
import torch
import torch.nn.functional as F
from common import DcaSetting, Shape, console

import chunkattn

BASELINE = "sdpa"


class Attention:
    """One implementation at one shape: its forward pass, and its backward pass through autograd."""

    def __init__(self, impl, setting, function, inputs, out_gradient):
        self.impl = impl
        self.setting = setting  # None: dense
        self.function = function
        self.inputs = inputs
        self.leaves = [x.detach().requires_grad_() for x in inputs]
        self.out_gradient = out_gradient
        self.out = None

    def __str__(self):
        return f"{self.impl} {self.setting or 'dense'}"

    def forward(self):
        with torch.no_grad():
            return self.function(*self.inputs)

    def backward(self):
        if self.out is None:
            self.out = self.function(*self.leaves)
        return torch.autograd.grad(self.out, self.leaves, self.out_gradient, retain_graph=True)


def sdpa(q, k, v):
    """torch's dense causal attention of q [B, H, S, D] and k, v [B, Hkv, S, D]."""
    return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=q.shape[1] != k.shape[1])


def make_dca(setting, head_dim):
    """chunkattn.dca for the layout of sdpa, by views."""
    cos, sin = chunkattn.rope_table(setting.chunk_size, head_dim)
    sizes = {"chunk_size": setting.chunk_size, "local_size": setting.local_size}

    def dca(q, k, v):
        return chunkattn.dca(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), cos, sin, **sizes).transpose(1, 2)

    return dca


def make_attentions(shape, settings):
    q, k, v = (x.transpose(1, 2).contiguous() for x in shape.random_inputs("cpu"))
    out_gradient = torch.randn(q.shape, generator=torch.Generator().manual_seed(1)).to(q.dtype)
    attentions = [Attention(BASELINE, None, sdpa, (q, k, v), out_gradient)]
    for setting in settings:
        attentions.append(Attention("chunkattn", setting, make_dca(setting, shape.head_dim), (q, k, v), out_gradient))
    return attentions


def run_shape(shape, settings, options, clock):
    """Rows of one shape, printed as tables."""
    rows = []
    attentions = make_attentions(shape, settings)
    for pass_ in options.passes:
        calls = {index: getattr(attention, pass_) for index, attention in enumerate(attentions)}
        timings = common.time_interleaved(calls, clock, rounds=options.rounds, seconds=options.seconds)
        pass_rows = [
            common.make_row(attention.impl, pass_, shape, timings[index], setting=attention.setting)
            for index, attention in enumerate(attentions)
        ]
        common.print_rows(f"{pass_} {shape} {shape.dtype}", pass_rows)
        for index, attention in enumerate(attentions[1:], start=1):
            console.print(f"{attention}: {timings[0].ms / timings[index].ms:.2f} times the speed of {BASELINE}")
        rows += pass_rows
    return rows


def parse_arguments(argv):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", nargs="+", default=["s8k-h8-d128"], help="such as b2-s4k-h8/2-d64")
    parser.add_argument("--dca", nargs="+", metavar="CHUNK:LOCAL", default=["3072:512", "one"], help="one: one chunk")
    parser.add_argument("--dtype", nargs="+", default=["float32", "bfloat16"])
    parser.add_argument("--passes", nargs="+", default=["forward", "backward"], choices=["forward", "backward"])
    parser.add_argument("--threads", type=int, help="default: torch's")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--seconds", type=float, default=1.0, help="time for each implementation in each pass")
    parser.add_argument("--json", metavar="PATH", help="result file")
    return parser.parse_args(argv)


def main(argv=None):
    options = parse_arguments(argv)
    shapes = [Shape.parse(text, dtype) for text in options.shape for dtype in options.dtype]
    if any(shape.seq_q != shape.seq_k for shape in shapes):
        raise SystemExit("benchmark_cpu takes shapes with as many queries as keys: sdpa aligns them top-left")
    if options.threads:
        torch.set_num_threads(options.threads)
    clock = common.make_clock("cpu")
    header = common.make_header("cpu", "cpu", rounds=options.rounds, seconds=options.seconds)
    console.print(header)
    rows = []
    for shape in shapes:
        settings = [DcaSetting.parse(text, shape.seq_k) for text in options.dca]
        rows += run_shape(shape, settings, options, clock)
        if options.json:
            common.write_results(options.json, header, rows)


if __name__ == "__main__":
    sys.exit(main())
