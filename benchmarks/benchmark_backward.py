"""Times the backward pass of Dual Chunk Attention beside dense attention and DCA composed of dense calls.

    python benchmarks/benchmark_backward.py --fa3 DIR --json benchmarks/results/h100/backward.json

All run in one process, interleaved, and only the backward is timed: from the gradient of the output and what the
forward saved to the gradients of q, k and v. The gradients of one KV head are compared with those of
chunkattn.reference in float64 before anything is timed. Rates count the FLOPs of causal attention's backward,
5 B H N N D, for every implementation: DCA computes the same number.
"""

import sys

import driver
import peers
import torch
from common import DcaSetting
from driver import Lazy

from chunkattn import _core, reference

# The shapes of the published table, and the DCA settings each is timed with: the first is the one plots show, a single
# chunk shows what the regimes cost.
CUDA_TABLE = {
    "s8k-h32-d128": ["3072:512", "one"],
    "s16k-h32-d128": ["3072:512", "3520:512", "one"],
    "s32k-h32-d128": ["3072:512"],
    "s16k-h32/8-d128": ["3072:512"],
    "s16k-h32-d64": ["3072:512"],
    "s16k-h16-d256": ["3072:512"],
}
CPU_TABLE = {"s512-h4/2-d64": ["192:64"]}

# Logits of the oracle that autograd holds at a time.
LOGITS_PER_BLOCK = 1 << 25


class Oracle:
    """Gradients of chunkattn.reference for the last KV head of one problem and the query heads that share it.

    Causal attention's queries depend on earlier keys only, so a block of queries is a short problem whose queries end
    the keys, and the gradients of keys and values are sums over blocks. Dense attention is DCA of one chunk with a
    table that rotates by nothing.
    """

    names = ("dq", "dk", "dv")

    def __init__(self, q, k, v, dout, cos, sin):
        self.likes = (q, k, v)
        self.group = q.shape[2] // k.shape[2]
        self.inputs = (*self._sampled(self.likes), dout[:, :, -self.group :])
        self.table = (cos, sin)
        self.expected = {}

    def compare(self, results, setting):
        """(largest absolute error, the name of a gradient that is beyond its tolerance or None)."""
        if setting not in self.expected:
            exact, plain = (self._gradients(setting, dtype) for dtype in (torch.float64, self.inputs[0].dtype))
            self.expected[setting] = [(x, self._tolerance(x, y)) for x, y in zip(exact, plain, strict=True)]
        worst, wrong = 0.0, None
        for name, result, (exact, tolerance) in zip(
            self.names, self._sampled(results), self.expected[setting], strict=True
        ):
            error = (result.double() - exact).abs().max().item()
            worst = max(worst, error)
            wrong = wrong if error <= tolerance else name
        return worst, wrong

    def _sampled(self, tensors):
        q, k, v = tensors
        return q[:, :, -self.group :], k[:, :, -1:], v[:, :, -1:]

    def _tolerance(self, exact, plain):
        # FlashAttention's rule: at most twice the error of plain torch in the same dtype, and a rounding.
        rounding = torch.finfo(self.inputs[0].dtype).eps * max(1.0, exact.abs().max().item())
        return 2 * (plain.double() - exact).abs().max().item() + rounding

    def _gradients(self, setting, dtype):
        q, k, v, dout = (x.to(dtype) for x in self.inputs)
        seq = q.shape[1]
        cos, sin = self.table
        if setting is None:
            cos, sin = (make(seq + 2, q.shape[-1] // 2, device=q.device) for make in (torch.ones, torch.zeros))
            setting = DcaSetting(seq + 1, 1)
        sizes = {"chunk_size": setting.chunk_size, "local_size": setting.local_size}
        # Whatever the dtype of a block, blocks are summed in at least float32.
        wide = torch.promote_types(dtype, torch.float32)
        dq, dk, dv = (torch.zeros_like(x, dtype=wide) for x in (q, k, v))
        count = max(1, LOGITS_PER_BLOCK // (q.shape[0] * self.group * seq))
        for begin in range(0, seq, count):
            rows = slice(begin, min(begin + count, seq))
            part = [x.detach().requires_grad_() for x in (q[:, rows], k[:, : rows.stop], v[:, : rows.stop])]
            with torch.enable_grad():
                out = reference.dca(*part, cos, sin, **sizes)
            part_q, part_k, part_v = torch.autograd.grad(out, part, dout[:, rows])
            dq[:, rows] = part_q
            dk[:, : rows.stop] += part_k
            dv[:, : rows.stop] += part_v
        return dq, dk, dv


class Backward(driver.Benchmark):
    pass_ = "backward"
    ours = ("chunkattn", "chunkattn-deterministic", "chunkattn-portable")
    composed = ("composed-fa3", "composed-fa2", "composed-sdpa")
    find_plan = staticmethod(_core.plan_backward)

    def make_inputs(self, shape):
        q, k, v = shape.random_inputs(self.device)
        return q, k, v, shape.random_inputs(self.device, seed=1)[0]

    def make_oracle(self, inputs, table):
        return Oracle(*inputs, *table)

    def make_call(self, impl, inputs, table, setting):
        if impl == "flex":
            return Lazy(peers.flex_gradients, *inputs)
        engine = self.engines.get(impl.removeprefix("composed-"))
        if setting is None:
            return Lazy(peers.engine_gradients, engine, *inputs)
        if impl in self.composed:
            composed = peers.ComposedDca(engine, *table, setting, inputs[0].shape[1])
            return Lazy(peers.ComposedGradients, composed, *inputs)
        return Lazy(self.make_ours, impl, inputs, table, setting)

    def make_ours(self, impl, inputs, table, setting):
        options = {"deterministic": impl == "chunkattn-deterministic"}
        if impl == "chunkattn-portable":
            options["context"] = self.portable
        return peers.chunkattn_gradients(*inputs, *table, setting, **options)


def main(argv=None):
    return driver.run(argv, __doc__, Backward, CUDA_TABLE, CPU_TABLE)


if __name__ == "__main__":
    sys.exit(main())
