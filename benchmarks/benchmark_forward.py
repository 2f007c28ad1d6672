"""Times the forward pass of Dual Chunk Attention beside dense attention and DCA composed of dense calls.

    python benchmarks/benchmark_forward.py --fa3 DIR --json benchmarks/results/h100/forward.json

All run in one process, interleaved. Every output is compared with chunkattn.reference in float64 on a sample of rows
before it is timed. Rates count the FLOPs of causal attention, 2 B H N N D, for every implementation: DCA computes the
same number.
"""

import sys

import driver
import peers
import torch
from common import DcaSetting
from driver import Call, Lazy

from chunkattn import _core, reference

# The shapes of the published table, and the DCA settings each is timed with: the first is the one plots show, 3520:512
# has a stride that no tile divides, and a single chunk shows what the regimes cost.
CUDA_TABLE = {
    "s8k-h32-d128": ["3072:512", "3520:512", "one"],
    "s16k-h32-d128": ["3072:512", "3520:512", "one"],
    "s32k-h32-d128": ["3072:512", "3520:512", "one"],
    "s32k-h32/8-d128": ["3072:512"],
    "s8k-h32-d64": ["3072:512"],
    "s16k-h32-d64": ["3072:512"],
    "s32k-h32-d64": ["3072:512"],
    "s16k-h16-d256": ["3072:512"],
    "s128k-h32/8-d128": ["24576:1024"],
}
CPU_TABLE = {"s512-h4/2-d64": ["192:64"]}

CHECKED_ROWS = 64


class Oracle:
    """Float64 outputs of chunkattn.reference on a sample of rows and heads of one problem.

    Rows of a causal attention depend on earlier keys only, so a window of rows is a short problem whose queries end
    the keys. Dense attention is DCA of one chunk with a table that rotates by nothing.
    """

    names = ("output",)

    def __init__(self, q, k, v, cos, sin):
        self.inputs = (q, k, v)
        self.likes = (q,)
        self.table = (cos, sin)
        self.expected = {}

    def windows(self, setting):
        """(rows, heads, expected, tolerance) of each sampled window."""
        if setting not in self.expected:
            self.expected[setting] = [self._window(setting, rows) for rows in self._sampled_rows(setting)]
        return self.expected[setting]

    def compare(self, results, setting):
        """(largest absolute error, the name of the output unless every window is within its tolerance)."""
        (out,) = results
        worst, good = 0.0, True
        for rows, heads, expected, tolerance in self.windows(setting):
            error = (out[:, rows][:, :, heads].double() - expected).abs().max().item()
            worst = max(worst, error)
            good = good and error <= tolerance
        return worst, None if good else self.names[0]

    def _sampled_rows(self, setting):
        seq = self.inputs[0].shape[1]
        stride = setting.stride if setting else seq
        count = min(CHECKED_ROWS, seq)
        begins = {0, stride - count // 2, 2 * stride - count // 2, 3 * stride, seq // 2, seq - count}
        return [slice(begin, begin + count) for begin in sorted(begins) if 0 <= begin <= seq - count]

    def _window(self, setting, rows):
        q, k, v = self.inputs
        group = q.shape[2] // k.shape[2]
        heads = sorted({0, q.shape[2] - 1})
        kv_heads = [head // group for head in heads]
        q = q[:, rows][:, :, heads]
        k, v = (x[:, : rows.stop, kv_heads] for x in (k, v))
        cos, sin = self.table
        if setting is None:
            seq = self.inputs[0].shape[1]
            cos, sin = (make(seq + 2, q.shape[-1] // 2, device=q.device) for make in (torch.ones, torch.zeros))
            setting = DcaSetting(seq + 1, 1)
        sizes = {"chunk_size": setting.chunk_size, "local_size": setting.local_size}
        expected = reference.dca(q.double(), k.double(), v.double(), cos, sin, **sizes)
        plain = reference.dca(q, k, v, cos, sin, **sizes)
        # FlashAttention's rule: at most twice the error of plain torch in the same dtype, and a rounding.
        tolerance = 2 * (plain.double() - expected).abs().max().item() + torch.finfo(q.dtype).eps
        return rows, heads, expected, tolerance


class Forward(driver.Benchmark):
    pass_ = "forward"
    ours = ("chunkattn", "chunkattn-portable")
    composed = ("composed-fa3", "composed-cudnn", "composed-fa2", "composed-sdpa")
    find_plan = staticmethod(_core.plan_forward)

    def make_oracle(self, inputs, table):
        return Oracle(*inputs, *table)

    def make_call(self, impl, inputs, table, setting):
        engine = self.engines.get(impl.removeprefix("composed-"))
        if impl == "flex":
            return Lazy(peers.flex_attention, *inputs)
        if setting is None:
            return Call(engine.causal, *inputs)
        if impl in self.composed:
            return Call(peers.ComposedDca(engine, *table, setting, inputs[0].shape[1]), *inputs)
        context = [self.portable] if impl == "chunkattn-portable" else []
        return Call(peers.chunkattn_call(*inputs, *table, setting, *context))


def main(argv=None):
    return driver.run(argv, __doc__, Forward, CUDA_TABLE, CPU_TABLE)


if __name__ == "__main__":
    sys.exit(main())
