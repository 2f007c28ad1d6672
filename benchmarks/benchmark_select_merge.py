"""Times select-and-merge attention beside dense attention and Dual Chunk Attention.

    python benchmarks/benchmark_select_merge.py --fa3 DIR --json benchmarks/results/h100/select_merge.json

A row's ``pass`` says what is timed: ``forward`` is the selection and the attention, ``selection`` the first of the two,
``attention`` the second, to lists that are given, ``backward`` its gradients, ``training`` forward and backward. All of
one shape run in one process, interleaved, after a comparison with float64 on a sample of groups. Rates count the FLOPs
that are executed: those of the listed regions and the own group here, those of causal attention for DCA and dense
attention, those of one product of all region means for a selection.
"""

import sys
from dataclasses import dataclass

import benchmark_backward
import benchmark_forward
import common
import driver
import peers
import torch
from common import BACKWARD_FLOPS, DcaSetting, console
from driver import Call, Lazy

import chunkattn
from chunkattn import _core, _ops

PASSES = ("forward", "selection", "attention", "backward", "training")

# What is timed at which shape: the targets, and the time of the forward by length.
CUDA_TABLE = {
    "s32k-h32-d128": ["attention", "backward", "training"],
    "s128k-h32-d128": ["attention"],
    **{f"s{length}k-h32/8-d128": ["forward", "selection"] for length in (8, 16, 32, 64, 128, 256, 512, 1024)},
}
CPU_TABLE = {"s512-h4/2-d64": list(PASSES)}

# Dense attention is timed up to here: beyond, a call takes seconds.
LONGEST_DENSE = 128 << 10
# FlexAttention compiles for every shape: these have to do.
FLEX_SHAPES = ("s32768-h32-d128", "s131072-h32-d128")

CHECKED_ROWS = 64


@dataclass(frozen=True)
class Lists:
    """The options of the selection; the defaults are those of the paper and of the op."""

    region_size: int = 16
    top_k: int = 384
    merge: int = 128

    @property
    def group(self):
        """Tokens of a group."""
        return self.region_size * self.merge

    def options(self):
        return {"region_size": self.region_size, "top_k": self.top_k, "merge": self.merge}

    def flops(self, shape, pass_):
        """FLOPs that are executed for lists as long as they can be."""
        if pass_ == "selection":
            regions = -(-shape.seq_k // self.region_size)
            return shape.batch * shape.kv_heads * shape.head_dim * regions**2
        pairs = 0
        for begin in range(0, shape.seq_k, self.group):
            tokens = min(self.group, shape.seq_k - begin)
            listed = min(self.top_k * self.region_size, begin)
            pairs += tokens * (listed + (tokens + 1) / 2)
        forward = 4 * shape.batch * shape.heads * shape.head_dim * pairs
        factors = {"backward": BACKWARD_FLOPS, "training": 1 + BACKWARD_FLOPS}
        return forward * factors.get(pass_, 1)


@dataclass
class Case(driver.Case):
    pass_: str = "forward"


class SampledGroups:
    """Some groups of one problem, with a plain computation of what is chosen for them and of what they attend to."""

    def __init__(self, q, k, v, lists):
        self.q, self.k, self.v, self.lists = q, k, v, lists
        groups = -(-q.shape[1] // lists.group)
        self.groups = sorted({0, groups // 2, max(0, groups - 2), groups - 1})
        self.kv_heads = sorted({0, k.shape[2] - 1})
        self.sharing = q.shape[2] // k.shape[2]

    def tokens(self, group):
        return slice(group * self.lists.group, min((group + 1) * self.lists.group, self.q.shape[1]))

    def region_means(self, rows):
        """[regions, D] of rows [S, D]."""
        size = self.lists.region_size
        whole = rows.shape[0] // size * size
        means = [rows[:whole].double().unflatten(0, (-1, size)).mean(1)] if whole else []
        return torch.cat([*means, *([rows[whole:].double().mean(0, keepdim=True)] if whole < rows.shape[0] else [])])

    def selection(self, group, kv_head):
        """The ids of the group's regions, ascending, from scores in float64."""
        lists = self.lists
        first = group * lists.merge
        if first <= lists.top_k:
            return list(range(first))
        heads = slice(kv_head * self.sharing, (kv_head + 1) * self.sharing)
        queries = sum(self.region_means(x) for x in self.q[-1, self.tokens(group), heads].unbind(1))
        keys = self.region_means(self.k[-1, : first * lists.region_size, kv_head])
        ranked = (queries @ keys.T).sort(dim=1, descending=True, stable=True).indices[:, : lists.top_k]
        walk = dict.fromkeys(ranked.T.reshape(-1).tolist())  # rank by rank
        return sorted(list(walk)[: lists.top_k])

    def window(self, group, head, ids, dtype):
        """The last rows of a group, as if they were the queries and all keys they may see the keys: q, k, v and their
        mask."""
        lists = self.lists
        tokens = self.tokens(group)
        rows = slice(max(tokens.start, tokens.stop - CHECKED_ROWS), tokens.stop)
        begins = torch.tensor(ids, dtype=torch.int64, device=self.q.device) * lists.region_size
        listed = (begins[:, None] + torch.arange(lists.region_size, device=self.q.device)).reshape(-1)
        own = torch.arange(tokens.start, tokens.stop, device=self.q.device)
        keys = torch.cat((listed, own))
        mask = keys[None, :] <= torch.arange(rows.start, rows.stop, device=self.q.device)[:, None]
        k, v = (x[-1, keys, head // self.sharing].to(dtype) for x in (self.k, self.v))
        return rows, (self.q[-1, rows, head].to(dtype), k, v, mask)


def attend(q, k, v, mask):
    """Plain attention of one head."""
    logits = (q @ k.T * q.shape[-1] ** -0.5).masked_fill(~mask, -torch.inf)
    return logits.softmax(dim=-1) @ v


class SelectionOracle:
    names = ("indices",)

    def __init__(self, sample, indices):
        self.sample, self.likes = sample, (indices,)

    def compare(self, results, setting):
        """(the largest share of a list that differs from the lists by float64, the name unless that is hardly any:
        scores may lie within the rounding of float32)."""
        (indices,) = results
        worst = 0.0
        for group in self.sample.groups:
            for head in self.sample.kv_heads:
                expected = set(self.sample.selection(group, head))
                found = set(indices[-1, head, group].tolist()) - {-1}
                worst = max(worst, len(expected ^ found) / max(1, len(expected)))
        return worst, None if worst <= 0.02 else self.names[0]


class ListOracle:
    """The output, or with ``dout`` the gradient of q, for given lists, on a sample of rows."""

    def __init__(self, sample, indices, dout=None):
        self.sample, self.indices, self.dout = sample, indices, dout
        self.names = ("output",) if dout is None else ("dq", "dk", "dv")
        self.likes = (sample.q,) if dout is None else (sample.q, sample.k, sample.v)

    def compare(self, results, setting):
        """(largest absolute error, the name of the result unless every sampled row is within its tolerance)."""
        worst, good = 0.0, True
        for group in self.sample.groups:
            for kv_head in self.sample.kv_heads:
                ids = [i for i in self.indices[-1, kv_head, group].tolist() if i >= 0]
                head = (kv_head + 1) * self.sample.sharing - 1
                rows, expected = self._rows(group, head, ids, torch.float64)
                _, plain = self._rows(group, head, ids, self.sample.q.dtype)
                # FlashAttention's rule: at most twice the error of plain torch in the same dtype, and a rounding.
                rounding = torch.finfo(self.sample.q.dtype).eps * max(1.0, expected.abs().max().item())
                tolerance = 2 * (plain.double() - expected).abs().max().item() + rounding
                error = (results[0][-1, rows, head].double() - expected).abs().max().item()
                worst, good = max(worst, error), good and error <= tolerance
        return worst, None if good else self.names[0]

    def _rows(self, group, head, ids, dtype):
        rows, (q, k, v, mask) = self.sample.window(group, head, ids, dtype)
        if self.dout is None:
            return rows, attend(q, k, v, mask)
        q.requires_grad_()
        with torch.enable_grad():
            out = attend(q, k, v, mask)
        return rows, torch.autograd.grad(out, q, self.dout[-1, rows, head].to(dtype))[0]


class Written:
    """Of a peer whose keys nobody else attends to: the output is there and finite."""

    names = ("output",)

    def __init__(self, q):
        self.likes = (q,)

    def compare(self, results, setting):
        return None, None


class Inputs:
    """The tensors of one shape, the lists chosen for them, and the oracles, made when they are first needed."""

    def __init__(self, shape, device, lists):
        self.qkv = shape.random_inputs(device)
        self.shape, self.device, self.lists = shape, device, lists
        self.sample = SampledGroups(*self.qkv, lists)
        self.indices = chunkattn.select(*self.qkv[:2], **lists.options())
        self.setting = DcaSetting.parse("24576:1024" if shape.seq_k >= 64 << 10 else "3072:512", shape.seq_k)
        if shape.seq_k < self.setting.chunk_size:
            self.setting = DcaSetting(shape.seq_k // 2, shape.seq_k // 8)
        self.table = chunkattn.rope_table(self.setting.chunk_size, shape.head_dim, device=device)
        self._dout, self._others = None, {}

    @property
    def dout(self):
        if self._dout is None:
            self._dout = self.shape.random_inputs(self.device, seed=1)[0]
        return self._dout

    def oracle(self, case):
        """What judges a case."""
        gradients = case.pass_ in ("backward", "training")
        if case.impl == "flex":
            return Written(self.qkv[0])
        if case.impl == "chunkattn":
            if case.pass_ == "selection":
                return SelectionOracle(self.sample, self.indices)
            return ListOracle(self.sample, self.indices, self.dout if gradients else None)
        if gradients not in self._others:
            module = benchmark_backward if gradients else benchmark_forward
            tensors = (*self.qkv, self.dout) if gradients else self.qkv
            self._others[gradients] = module.Oracle(*tensors, *self.table)
        return self._others[gradients]


class SelectMerge(driver.Benchmark):
    pass_ = "select_merge"
    ours = ("chunkattn",)
    composed = ("chunkattn-dca",)  # what else is timed beside dense attention
    find_plan = staticmethod(_core.plan_forward)
    lists = Lists()

    def find_peers(self):
        engines, absent = peers.find_engines(self.device, self.options.fa3)
        if self.device.type == "cpu":
            absent["flex"] = "runs on CUDA only"
        elif not self.options.flex:
            absent["flex"] = "compiles for every shape; asked for with --flex"
        if not _ops.has_kernels("select_merge_backward", self.device):
            absent["gradients"] = f"this build of chunkattn has no select_merge_backward for {self.device.type}"
        names = [*engines, *([] if "flex" in absent else ["flex"]), *self.composed, *self.ours]
        if self.options.impls:
            absent |= {name: "not selected" for name in names if name not in self.options.impls}
        return [name for name in names if name not in absent], engines, absent

    def make_calls(self, pass_, inputs):
        """impl to :class:`driver.Call` of what can be timed as ``pass_``."""
        q, k, v = inputs.qkv
        options = self.lists.options()
        engines = {} if q.shape[1] > LONGEST_DENSE else self.engines
        if pass_ == "selection":
            return {"chunkattn": Call(lambda: chunkattn.select(q, k, **options))}
        if pass_ == "forward":
            dense = {name: Call(engine.causal, q, k, v) for name, engine in engines.items()}
            return dense | {"chunkattn": Call(lambda: chunkattn.select_merge(q, k, v, **options))}
        if pass_ == "attention":
            given = options | {"indices": inputs.indices}
            calls = {"flex": Lazy(peers.flex_regions, q, k, v, inputs.indices, self.lists)}
            if str(inputs.shape) not in FLEX_SHAPES:
                calls = {}
            calls["chunkattn-dca"] = Call(peers.chunkattn_call(q, k, v, *inputs.table, inputs.setting))
            return calls | {"chunkattn": Call(lambda: chunkattn.select_merge(q, k, v, **given))}
        if "gradients" in self.absent:
            return {}
        if pass_ == "backward":
            dca = (*inputs.qkv, inputs.dout, *inputs.table, inputs.setting)
            ours = (*inputs.qkv, inputs.dout, inputs.indices, self.lists)
            return {
                "chunkattn-dca": Lazy(peers.chunkattn_gradients, *dca),
                "chunkattn": Lazy(peers.region_gradients, *ours),
            }
        calls = {name: Call(peers.engine_training, engine, q, k, v, inputs.dout) for name, engine in engines.items()}
        return calls | {
            "chunkattn": Call(
                peers.autograd_training, lambda *qkv: chunkattn.select_merge(*qkv, **options), q, k, v, inputs.dout
            )
        }

    def run_shape(self, shape, passes):
        """Checks and times every implementation of some passes at one shape."""
        inputs = Inputs(shape, self.device, self.lists)
        working = []
        for pass_ in passes:
            for impl, call in self.make_calls(pass_, inputs).items():
                if impl not in self.names:
                    continue
                setting = inputs.setting if impl == "chunkattn-dca" else None
                case = Case(impl, setting, call, pass_=pass_)
                problem = self.attempt(case, inputs.oracle(case))
                if problem is None:
                    working.append(case)
                    continue
                self.failed.append({"impl": impl, "pass": pass_, "shape": str(shape), "error": problem})
                console.print(f"failed: {pass_} {case} at {shape}: {problem}", markup=False, highlight=False)
        if self.options.once:
            return
        calls = {index: case.call for index, case in enumerate(working)}
        timings = common.time_interleaved(calls, self.clock, rounds=self.options.rounds, seconds=self.options.seconds)
        rows = [self.make_row(case, shape, timings[index]) for index, case in enumerate(working)]
        for pass_ in passes:
            common.print_rows(f"{pass_} {shape} {shape.dtype}", [r for r in rows if r["pass"] == pass_], self.ceilings)
        self.rows += rows

    def make_row(self, case, shape, timing):
        sparse = case.impl in ("chunkattn", "flex")
        flops = self.lists.flops(shape, case.pass_) if sparse else None
        if flops is None and case.pass_ == "training":
            flops = (1 + BACKWARD_FLOPS) * shape.flops()
        measured = {"max_error": case.max_error, "workspace_mib": case.workspace_mib}
        return common.make_row(case.impl, case.pass_, shape, timing, setting=case.setting, flops=flops, **measured)


def main(argv=None):
    parser = driver.make_parser(__doc__, SelectMerge)
    parser.add_argument("--pass", dest="passes", nargs="+", choices=PASSES, help="default: those of the table")
    options = parser.parse_args(argv)
    return driver.run_table(SelectMerge, options, CUDA_TABLE, CPU_TABLE, options.passes, ["forward", "selection"])


if __name__ == "__main__":
    sys.exit(main())
