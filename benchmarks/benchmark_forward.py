"""Times the forward pass of Dual Chunk Attention beside dense attention and DCA composed of dense calls.

    python benchmarks/benchmark_forward.py --fa3 DIR --json benchmarks/results/h100/forward.json

All run in one process, interleaved. Every output is compared with chunkattn.reference in float64 on a sample of rows
before it is timed. Rates count the FLOPs of causal attention, 2 B H N N D, for every implementation: DCA computes the
same number.
"""

import argparse
import sys
import time
from dataclasses import dataclass

import common
import peers
import torch
from common import DcaSetting, Shape, console

import chunkattn
from chunkattn import reference

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

DENSE = ["fa3", "cudnn", "fa2", "flex", "sdpa"]
COMPOSED = ["composed-fa3", "composed-cudnn", "composed-fa2", "composed-sdpa"]
OURS = ["chunkattn", "chunkattn-portable"]
CHECKED_ROWS = 64


@dataclass
class Case:
    """One implementation at one shape."""

    impl: str
    setting: DcaSetting | None  # None: dense
    call: object
    max_error: float | None = None
    workspace_mib: float | None = None

    def __str__(self):
        return f"{self.impl} {self.setting or 'dense'}"


class Oracle:
    """Float64 outputs of chunkattn.reference on a sample of rows and heads of one problem.

    Rows of a causal attention depend on earlier keys only, so a window of rows is a short problem whose queries end
    the keys. Dense attention is DCA of one chunk with a table that rotates by nothing.
    """

    def __init__(self, q, k, v, cos, sin):
        self.inputs = (q, k, v)
        self.table = (cos, sin)
        self.expected = {}

    def windows(self, setting):
        """(rows, heads, expected, tolerance) of each sampled window."""
        if setting not in self.expected:
            self.expected[setting] = [self._window(setting, rows) for rows in self._sampled_rows(setting)]
        return self.expected[setting]

    def max_error(self, out, setting):
        """(largest absolute error, whether every window is within its tolerance)."""
        worst, good = 0.0, True
        for rows, heads, expected, tolerance in self.windows(setting):
            error = (out[:, rows][:, :, heads].double() - expected).abs().max().item()
            worst = max(worst, error)
            good = good and error <= tolerance
        return worst, good

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


def make_cases(names, inputs, table, settings, engines, portable):
    """The cases of one shape. Composed DCA is timed with the first setting only."""
    cases = []
    seq = inputs[0].shape[1]
    cos, sin = table
    for name in names:
        engine = engines.get(name.removeprefix("composed-"))
        if name == "flex":
            cases.append(Case(name, None, Lazy(peers.flex_attention, *inputs)))
        elif name in DENSE and engine:
            cases.append(Case(name, None, Call(engine.causal, *inputs)))
        elif name in COMPOSED and engine:
            composed = peers.ComposedDca(engine, cos, sin, settings[0], seq)
            cases.append(Case(name, settings[0], Call(composed, *inputs)))
        elif name == "chunkattn":
            cases += [Case(name, s, peers.chunkattn_call(*inputs, cos, sin, s)) for s in settings]
        elif name == "chunkattn-portable" and portable:
            cases += [Case(name, s, peers.chunkattn_call(*inputs, cos, sin, s, portable)) for s in settings]
    return cases


class Call:
    def __init__(self, function, *inputs):
        self.function, self.inputs = function, inputs

    def __call__(self):
        return self.function(*self.inputs)


class Lazy(Call):
    """A call that is made, and compiled, when it is first used, so that a failure belongs to its case."""

    made = None

    def __call__(self):
        if self.made is None:
            self.made = super().__call__()
        return self.made()


def check(case, oracle):
    """Runs a case once, fills in its error and its memory. Returns what is wrong with it, or None."""
    like = oracle.inputs[0]
    cuda = like.is_cuda
    # The allocator hands the block that is freed here to the output: what is not written stays NaN.
    torch.full_like(like, float("nan"))
    if cuda:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
    out = case.call()
    if cuda:
        torch.cuda.synchronize()
        peak = torch.cuda.max_memory_allocated() - before - out.numel() * out.element_size()
        case.workspace_mib = round(peak / 2**20, 1)
    if out.shape != like.shape:
        return f"output has shape {list(out.shape)}, expected {list(like.shape)}"
    if not torch.isfinite(out).all():
        return "output has elements that are not finite or were not written"
    case.max_error, good = oracle.max_error(out, case.setting)
    return None if good else f"output is wrong: largest error on the sampled rows {case.max_error:.3g}"


class Benchmark:
    def __init__(self, options):
        self.options = options
        self.device = torch.device(options.device)
        self.clock = common.make_clock(self.device)
        self.rows, self.failed = [], []
        self.names, self.engines, self.absent, self.portable = self.find_peers()
        common.print_absent(self.absent)
        self.ceilings = None if options.once else common.measure_ceilings(self.device, self.clock)
        self.header = common.make_header(
            "forward", self.device, self.ceilings, rounds=options.rounds, seconds=options.seconds
        )
        console.print(self.header)

    def find_peers(self):
        engines, absent = peers.find_engines(self.device, self.options.fa3)
        absent |= {f"composed-{name}": reason for name, reason in absent.items()}
        portable = None
        try:
            portable = peers.find_portable_kernel(self.device)
        except peers.Absent as reason:
            absent["chunkattn-portable"] = str(reason)
        if self.device.type == "cpu":
            absent["flex"] = "runs on CUDA only"
            names = ["sdpa", "composed-sdpa", "chunkattn"]
        else:
            names = [name for name in DENSE + COMPOSED + OURS if not name.endswith("sdpa")]
        if not self.options.flex and "flex" not in (self.options.impls or []):
            absent.setdefault("flex", "compiles for a minute per shape; asked for with --flex")
        if self.options.impls:
            absent |= {name: "not selected" for name in names if name not in self.options.impls and name not in absent}
        return [name for name in names if name not in absent], engines, absent, portable

    def run_shape(self, shape, setting_texts):
        """Checks and times every implementation at one shape."""
        q, k, v = shape.random_inputs(self.device)
        settings = [DcaSetting.parse(text, shape.seq_k) for text in setting_texts]
        table = chunkattn.rope_table(max(s.chunk_size for s in settings), shape.head_dim, device=self.device)
        oracle = Oracle(q, k, v, *table)
        working = []
        for case in make_cases(self.names, (q, k, v), table, settings, self.engines, self.portable):
            problem = self.attempt(case, oracle)
            if problem is None:
                working.append(case)
            else:
                self.failed.append({"impl": case.impl, "shape": str(shape), "setting": str(case.setting or "dense")})
                self.failed[-1]["error"] = problem
                console.print(f"failed: {case} at {shape}: {problem}", markup=False, highlight=False)
        if self.options.once:
            return
        calls = {index: case.call for index, case in enumerate(working)}
        timings = common.time_interleaved(calls, self.clock, rounds=self.options.rounds, seconds=self.options.seconds)
        rows = [
            common.make_row(
                case.impl,
                "forward",
                shape,
                timings[index],
                setting=case.setting,
                max_error=case.max_error,
                workspace_mib=case.workspace_mib,
            )
            for index, case in enumerate(working)
        ]
        common.print_rows(f"forward {shape} {shape.dtype}", rows, self.ceilings)
        self.rows += rows

    def attempt(self, case, oracle):
        """What is wrong with a case, or None. An error that leaves the GPU unusable is raised."""
        if self.options.no_check:
            case.call()
            return None
        try:
            return check(case, oracle)
        except Exception as error:
            if self.device.type == "cuda":
                torch.cuda.synchronize()
                torch.cuda.empty_cache()
            return f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"

    def run(self, shapes):
        """Runs every shape that fits the time limit. The result file is complete after each."""
        start = time.monotonic()
        for shape, settings in shapes.items():
            try:
                if self.options.time_limit and time.monotonic() - start > self.options.time_limit:
                    error = "not run: the time limit was reached"
                    self.failed.append({"impl": "all", "shape": str(shape), "error": error})
                    console.print(f"{shape}: {error}", markup=False, highlight=False)
                else:
                    self.run_shape(shape, settings)
            finally:
                self.write()
            if self.device.type == "cuda":
                torch.cuda.empty_cache()
        console.print(f"{len(self.rows)} rows, {len(self.failed)} failures, {time.monotonic() - start:.0f} s")
        return all(failure["impl"] not in [*OURS, "all"] for failure in self.failed)

    def write(self):
        if self.options.json:
            common.write_results(self.options.json, self.header, self.rows, self.absent, self.failed)


def parse_arguments(argv):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--shape", nargs="+", help="such as s32k-h32/8-d128; default: the published table")
    parser.add_argument("--dca", nargs="+", metavar="CHUNK:LOCAL", help="DCA settings; one: a single chunk")
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float16", "float32"])
    parser.add_argument("--impls", nargs="+", choices=DENSE + COMPOSED + OURS, help="default: all there are")
    parser.add_argument("--flex", action="store_true", help="time FlexAttention too")
    parser.add_argument("--fa3", metavar="DIR", help="folder with FlashAttention-3: see peers.load_fa3")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=0.5, help="time for each implementation at each shape")
    parser.add_argument("--time-limit", type=float, help="seconds after which no further shape is begun")
    parser.add_argument("--no-check", action="store_true", help="time without comparing with the reference")
    parser.add_argument("--once", action="store_true", help="run everything once without timing, for a profiler")
    parser.add_argument("--json", metavar="PATH", help="result file")
    return parser.parse_args(argv)


def main(argv=None):
    options = parse_arguments(argv)
    table = CUDA_TABLE if torch.device(options.device).type == "cuda" else CPU_TABLE
    names = options.shape or list(table)
    shapes = {Shape.parse(name, options.dtype): options.dca or table.get(name, ["3072:512"]) for name in names}
    if any(shape.seq_q != shape.seq_k for shape in shapes):
        raise SystemExit("benchmark_forward takes shapes with as many queries as keys")
    with torch.no_grad():
        good = Benchmark(options).run(shapes)
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
