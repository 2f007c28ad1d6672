"""Runs the GPU checks and benchmarks of an installed package in one go, each stage with its own time limit.

    python benchmarks/gpu_session.py --wheel dist/chunkattn-*.whl --fa3 DIR --output results

Stages: pytest (the GPU suite), sanitizer (compute-sanitizer over tests/gpu/sanitize_sweep.py), forward
(benchmark_forward.py) and, when asked for, backward (benchmark_backward.py), varlen (benchmark_varlen.py), decode
(benchmark_decode.py), select_merge (benchmark_select_merge.py), select_merge_decode (benchmark_select_merge_decode.py),
finetune (benchmark_finetune.py) and ncu (a profile of one shape). A stage that fails or runs out of time does not stop
the others. Logs and result files go to the output folder, the summary comes last, and the exit status is 1 if a stage
failed.
"""

import argparse
import glob
import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import zipfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
STAGES = ["pytest", "sanitizer", "forward", "backward", "varlen", "decode", "select_merge", "select_merge_decode"]
STAGES += ["finetune", "ncu"]
PASSES = ["forward", "backward", "decode"]
BESIDE_PEERS = [*PASSES, "varlen", "select_merge"]
BENCHMARKS = [*BESIDE_PEERS, "select_merge_decode", "finetune"]
DEFAULT_STAGES = ["pytest", "sanitizer", "forward"]
TAIL_LINES = 40
SANITIZER_SHARES = 14  # processes of a tool at a time: it is the host that a sanitizer keeps busy


@dataclass
class Result:
    stage: str
    status: str  # passed, failed, timed out, not run
    seconds: float = 0.0
    detail: str = ""


def install(wheel, folder):
    """Unpacks a wheel, as pip --target does with a wheel that has no dependencies to resolve."""
    matches = glob.glob(wheel)
    if len(matches) != 1:
        raise SystemExit(f"--wheel must name one file, got {wheel!r}, which matches {len(matches)}")
    with zipfile.ZipFile(matches[0]) as archive:
        archive.extractall(folder)
    return folder


def find_tool(name, *patterns):
    """The path of a CUDA tool: on PATH, or where the toolkits put it. None where it is not installed."""
    found = shutil.which(name)
    if found:
        return found
    candidates = [
        path for pattern in (*patterns, f"/usr/local/cuda*/bin/{name}") for path in sorted(glob.glob(pattern))
    ]
    return candidates[-1] if candidates else None


def run_limited(command, log, seconds, environment=None):
    """Runs a command in its own process group and adds its output to a log. Returns its status; None: out of time."""
    with open(log, "ab") as output:
        output.write(f"$ {shlex.join(map(str, command))}\n".encode())
        output.flush()
        process = subprocess.Popen(
            [str(part) for part in command],
            stdout=output,
            stderr=subprocess.STDOUT,
            cwd=ROOT,
            env=environment,
            start_new_session=True,
        )
        try:
            return process.wait(timeout=max(1.0, seconds))
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            output.write(f"\nkilled after {seconds:.0f} s\n".encode())
            return None


def last_lines(path, count=TAIL_LINES):
    if not Path(path).is_file():
        return ""
    return "\n".join(Path(path).read_text(errors="replace").splitlines()[-count:])


def last_line(path):
    lines = [line.strip() for line in last_lines(path).splitlines() if line.strip()]
    return lines[-1][:160] if lines else ""


class Session:
    def __init__(self, options, environment):
        self.options = options
        self.environment = environment
        self.output = Path(options.output)
        self.deadline = time.monotonic() + options.budget
        self.results = []

    def commands(self, stage, seconds):
        """The commands of a stage, as (command, extra environment), in groups that run at the same time, group after
        group. Raises LookupError when a tool is missing."""
        options = self.options
        python = sys.executable
        if stage == "pytest":
            return [[([python, "-m", "pytest", "-p", "no:cacheprovider", *shlex.split(options.pytest_args)], {})]]
        if stage == "sanitizer":
            tool = find_tool("compute-sanitizer", "/usr/local/cuda*/compute-sanitizer/compute-sanitizer")
            if tool is None:
                raise LookupError("compute-sanitizer was not found")
            sweep = [python, "tests/gpu/sanitize_sweep.py", "--share"]
            shares = [f"{share + 1}/{SANITIZER_SHARES}" for share in range(SANITIZER_SHARES)]
            uncached = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1", "OMP_NUM_THREADS": "1"}
            groups = []
            for name in options.sanitizer_tools.split(","):
                # torch probes the driver by calls that fail: only errors of kernels count.
                flags = ["--report-api-errors", "no"] if name == "memcheck" else []
                flags += ["--target-processes", "all", "--error-exitcode", "9"]
                groups.append([([tool, "--tool", name, *flags, *sweep, share], uncached) for share in shares])
            return groups
        if stage in BENCHMARKS:
            # Shapes differ in time by a factor of 50: a quarter of the time is kept for the one under way.
            arguments = ["--json", self.output / f"{stage}.json", "--time-limit", f"{0.75 * seconds:.0f}"]
            arguments += shlex.split(getattr(options, f"{stage}_args"))
            if options.fa3 and stage in BESIDE_PEERS:
                arguments += ["--fa3", options.fa3]
            return [[([python, f"benchmarks/benchmark_{stage}.py", *arguments], {})]]
        tool = find_tool("ncu", "/opt/nvidia/nsight-compute/*/ncu", "/usr/local/cuda*/nsight-compute*/ncu")
        if tool is None:
            raise LookupError("ncu was not found")
        report = self.output / "ncu.ncu-rep"
        select = ["--kernel-name-base", "demangled", "--kernel-name", f"regex:{options.ncu_kernel}"]
        flags = ["--clock-control", "none", "--set", "full", "--launch-count", "2", "--force-overwrite", "-o", report]
        target = ["--once", "--no-check", "--impls", "chunkattn", "--shape", options.ncu_shape]
        return [
            [([tool, *select, *flags, python, f"benchmarks/benchmark_{options.ncu_pass}.py", *target], {})],
            [([tool, "--import", report, "--page", "details"], {})],
        ]

    def run_group(self, group, log, seconds):
        """Runs commands at the same time. Returns (status, last line of output) of each; the log has one's after
        another's."""

        def run(index):
            command, extra = group[index]
            return run_limited(command, f"{log}.{index}", seconds, self.environment | extra)

        with ThreadPoolExecutor(len(group)) as pool:
            statuses = list(pool.map(run, range(len(group))))
        outcomes = []
        for index, status in enumerate(statuses):
            part = Path(f"{log}.{index}")
            outcomes.append((status, last_line(part)))
            if part.is_file():
                with open(log, "ab") as whole:
                    whole.write(part.read_bytes())
                part.unlink()
        return outcomes

    def run(self, stage, limit):
        """Runs the commands of a stage within its limit and what is left of the budget."""
        log = self.output / f"{stage}.log"
        log.unlink(missing_ok=True)
        start = time.monotonic()
        end = min(start + limit, self.deadline)
        result = Result(stage, "passed")
        self.results.append(result)
        try:
            groups = self.commands(stage, end - start)
        except LookupError as missing:
            result.status, result.detail = "failed", str(missing)
            return
        for group in groups:
            left = end - time.monotonic()
            if left < 1:
                first = shlex.join(map(str, group[0][0]))
                result.status, result.detail = "not run", f"no time was left for: {first[:120]}"
                break
            try:
                outcomes = self.run_group(group, log, left)
            except OSError as error:
                result.status, result.detail = "failed", str(error)
                break
            if any(status is None for status, _ in outcomes):
                result.status, result.detail = "timed out", f"after {left:.0f} s"
                break
            failed = [f"exit status {status}: {line}" for status, line in outcomes if status != 0]
            if failed:
                result.status, result.detail = "failed", failed[0]
            elif result.status == "passed":
                result.detail = outcomes[-1][1]
        result.seconds = round(time.monotonic() - start, 1)
        if result.status != "passed":
            print(f"--- {stage} {result.status}: the end of {log}\n{last_lines(log)}", flush=True)

    def summarize(self, install_detail):
        summary = {"package": install_detail, "stages": [asdict(result) for result in self.results]}
        (self.output / "summary.json").write_text(json.dumps(summary, indent=1) + "\n")
        print("\nsummary")
        for result in self.results:
            print(f"{result.stage:12} {result.status:10} {result.seconds:7.1f} s  {result.detail}")
        return all(result.status == "passed" for result in self.results)


def make_environment(site, tree):
    environment = dict(os.environ, PYTHONUNBUFFERED="1", PYTHONDONTWRITEBYTECODE="1")
    if site:
        environment["PYTHONPATH"] = os.pathsep.join(filter(None, [str(site), environment.get("PYTHONPATH", "")]))
    if tree:
        environment["CHUNKATTN_GIT_TREE"] = tree
    return environment


def describe_package(environment):
    """What the package says of itself. A package that does not load ends the session: nothing would run."""
    code = "import chunkattn, torch; print(chunkattn.__file__, torch.__version__, torch.cuda.is_available())"
    loaded = ask_python(["-c", code], environment)
    if loaded.returncode != 0:
        raise SystemExit(f"chunkattn does not load:\n{loaded.stderr}")
    info = ask_python(["-m", "chunkattn", "info"], environment)
    return loaded.stdout.strip(), info.stdout + info.stderr


def ask_python(arguments, environment):
    """Runs Python outside the repository, whose folders it must not import from."""
    return subprocess.run(
        [sys.executable, *arguments],
        capture_output=True,
        text=True,
        timeout=120,
        env=environment,
        cwd=tempfile.gettempdir(),
    )


def parse_arguments(argv):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--wheel", help="wheel to use (a pattern may name it); default: the installed package")
    parser.add_argument("--output", default="gpu-session", help="folder for logs and result files")
    parser.add_argument("--stages", nargs="+", choices=STAGES, default=DEFAULT_STAGES)
    parser.add_argument("--budget", type=float, default=570, help="seconds for all stages together")
    limits = {
        "pytest": 300,
        "sanitizer": 120,
        "forward": 260,
        "backward": 260,
        "varlen": 120,
        "decode": 120,
        "select_merge": 120,
        "select_merge_decode": 60,
        "finetune": 200,
        "ncu": 100,
    }
    for stage, seconds in limits.items():
        parser.add_argument(
            f"--{stage.replace('_', '-')}-limit", type=float, default=seconds, help=f"seconds, default {seconds}"
        )
    parser.add_argument("--fa3", metavar="DIR", help="folder with FlashAttention-3: see peers.load_fa3")
    parser.add_argument("--git-tree", help="tree of the sources, with the suffix -dirty if they differ from it")
    parser.add_argument("--pytest-args", default="-q tests", help="one string, default: %(default)s")
    parser.add_argument("--sanitizer-tools", default="memcheck", help="comma-separated: memcheck,racecheck,synccheck")
    for benchmark in BENCHMARKS:
        text = f"further arguments of benchmark_{benchmark}.py, one string"
        parser.add_argument(f"--{benchmark.replace('_', '-')}-args", default="", help=text)
    parser.add_argument("--ncu-pass", choices=PASSES, default="forward", help="default: %(default)s")
    parser.add_argument("--ncu-shape", default="s16k-h32-d128")
    parser.add_argument("--ncu-kernel", default="chunkattn", help="regular expression over demangled kernel names")
    return parser.parse_args(argv)


def main(argv=None):
    options = parse_arguments(argv)
    options.output = os.path.abspath(options.output)
    options.fa3 = options.fa3 and os.path.abspath(options.fa3)
    os.makedirs(options.output, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="chunkattn-site-") as folder:
        site = install(options.wheel, folder) if options.wheel else None
        environment = make_environment(site, options.git_tree)
        detail, info = describe_package(environment)
        print(f"{detail}\n{info}", flush=True)
        session = Session(options, environment)
        for stage in options.stages:
            session.run(stage, getattr(options, f"{stage}_limit"))
        return 0 if session.summarize(detail) else 1


if __name__ == "__main__":
    sys.exit(main())
