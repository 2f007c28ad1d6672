"""Builds chunkattn._C, the library that holds the torch ops, and chunkattn._core, the pybind11 module without tensors.

Environment:
    CHUNKATTN_CUDA: 1 compiles the CUDA kernels and fails without nvcc, 0 leaves them out. Unset, they are compiled when
        torch is a CUDA build and nvcc is found. Whether a GPU is visible never matters.
    CHUNKATTN_PTXAS_VERBOSE: 1 makes ptxas report the registers, shared memory and spills of every kernel.
    CUDA_HOME, CXX, MAX_JOBS: as in torch.utils.cpp_extension.
"""

import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, setup


def fail(message):
    """Ends the build with one sentence instead of a traceback."""
    raise SystemExit(f"chunkattn: {message}")


try:
    import torch
    from torch.utils import cpp_extension
except ImportError:
    fail(
        "building needs torch 2.10 or later in this environment: install it (pip install torch) and build with "
        "pip install --no-build-isolation ."
    )
try:
    import pybind11
except ImportError:
    fail("building needs pybind11 in this environment: install it with pip install pybind11 ninja.")

ROOT = Path(__file__).parent.resolve()
TORCH_TARGET = (2, 10)
# C++20 is what the stable headers of today's torch are written in.
CXX_FLAGS = ["-O3", "-std=c++20", "-g0", "-Wall", "-fvisibility=hidden"]


def sources(*patterns):
    """The files under csrc/ that match, relative to the root as setuptools wants them."""
    return sorted(str(path.relative_to(ROOT)) for pattern in patterns for path in ROOT.glob(f"csrc/{pattern}"))


def read_list(name):
    """The lines of a file under cmake/, without comments."""
    lines = (line.strip() for line in (ROOT / "cmake" / name).read_text().splitlines())
    return [line for line in lines if line and not line.startswith("#")]


def project_version():
    """The version, from the one place that states it."""
    return re.search(r'^version = "(.+)"$', (ROOT / "pyproject.toml").read_text(), re.MULTILINE)[1]


def gencode(architecture):
    """nvcc's flag for one line of cmake/cuda_architectures.txt: "90a-real" or "90-virtual"."""
    number, kind = architecture.split("-")
    return f"-gencode=arch=compute_{number},code={'sm' if kind == 'real' else 'compute'}_{number}"


class CudaToolkit:
    """The toolkit nvcc belongs to: its home, its release such as "13.0", and where its headers and libraries are."""

    def __init__(self, nvcc):
        self.nvcc = nvcc
        self.release = re.search(r"release (\d+\.\d+)", self._output("--version"))[1]
        # nvcc may be a wrapper script elsewhere: a dry run tells what it really uses.
        plan = self._output("--dryrun", "-E", "-x", "cu", os.devnull)
        settings = dict(re.findall(r"^#\$ (TOP|INCLUDES|LIBRARIES)=(.*)$", plan, re.MULTILINE))
        self.home = os.path.realpath(settings["TOP"].strip())
        self.include_dirs = [os.path.realpath(flag.removeprefix("-I")) for flag in shlex.split(settings["INCLUDES"])]
        self.library_dirs = [os.path.realpath(flag.removeprefix("-L")) for flag in shlex.split(settings["LIBRARIES"])]

    def _output(self, *arguments):
        done = subprocess.run([self.nvcc, *arguments], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        if done.returncode != 0:
            fail(f"{self.nvcc} does not run: {done.stdout.strip()}")
        return done.stdout


def find_cuda():
    """The CUDA toolkit to build with, or None to build for the CPU alone."""
    choice = os.environ.get("CHUNKATTN_CUDA", "")
    if choice not in ("", "0", "1"):
        fail(f"CHUNKATTN_CUDA is {choice!r}; it takes 1, 0 or nothing.")
    if choice == "0" or (choice == "" and torch.version.cuda is None):
        return None
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    places = [Path(home) / "bin"] if home else [*os.environ.get("PATH", "").split(os.pathsep), "/usr/local/cuda/bin"]
    nvcc = shutil.which("nvcc", path=os.pathsep.join(map(str, places)))
    if nvcc:
        return CudaToolkit(nvcc)
    if choice == "1":
        fail(
            "CHUNKATTN_CUDA=1 asks for the CUDA kernels, but nvcc was not found: install the CUDA toolkit (12.6 or "
            "later) and set CUDA_HOME to it."
        )
    print("chunkattn: nvcc was not found, so only the CPU ops are built; set CUDA_HOME for the CUDA kernels.")
    return None


def use_toolkit(toolkit):
    """Hands BuildExtension our toolkit, and switches off what it assumes about CUDA sources that include torch.

    Ours include no torch header and link their own static CUDA runtime, and _C links neither libtorch_cuda nor
    libc10_cuda. So nvcc need not have the CUDA version torch was built with, or torch need not have CUDA at all.
    """
    cpp_extension.CUDA_HOME = toolkit.home
    cpp_extension.COMMON_NVCC_FLAGS = []
    cpp_extension._check_cuda_version = lambda *_: None


def ops_extension(toolkit):
    """chunkattn._C: every torch op. It has no Python in it, and only torch's stable ABI."""
    target = f"-DTORCH_TARGET_VERSION=0x{TORCH_TARGET[0]:02x}{TORCH_TARGET[1]:02x}000000000000"
    flags = {"cxx": [*CXX_FLAGS, target]}
    files = sources("bindings/*.cpp", "cpu/*.cpp")
    include_dirs = [str(ROOT / "csrc")]
    library_dirs = []
    # libtorch is named as needed though nothing is taken from it: in CUDA builds it brings libtorch_cuda into the
    # scope in which the weak reference to the stream of torch is looked up.
    link = ["-Wl,--no-as-needed", "-ltorch", "-Wl,--exclude-libs,ALL", "-Wl,-z,defs"]
    if toolkit:
        flags["cxx"] += ["-DCHUNKATTN_WITH_CUDA"]
        flags["nvcc"] = read_list("nvcc_flags.txt")
        flags["nvcc"] += [gencode(architecture) for architecture in read_list("cuda_architectures.txt")]
        if os.environ.get("CHUNKATTN_PTXAS_VERBOSE") == "1":
            flags["nvcc"].append("-Xptxas=-v")
        files += sources("cuda/**/*.cu", "cuda/**/*.cpp")
        include_dirs += toolkit.include_dirs
        library_dirs += toolkit.library_dirs
        link += ["-lcudart_static", "-ldl", "-lrt", "-lpthread"]
    return cpp_extension.CppExtension(
        "chunkattn._C",
        files,
        include_dirs=include_dirs,
        library_dirs=library_dirs,
        extra_compile_args=flags,
        extra_link_args=link,
        py_limited_api=True,
    )


def core_extension(toolkit):
    """chunkattn._core: geometry, build information and launch plans, without torch."""
    architectures = ",".join(read_list("cuda_architectures.txt")) if toolkit else ""
    return Extension(
        "chunkattn._core",
        sources("core_module.cpp", "cuda/*/plan.cpp"),
        include_dirs=[str(ROOT / "csrc"), pybind11.get_include()],
        define_macros=[
            ("CHUNKATTN_VERSION", f'"{project_version()}"'),
            ("CHUNKATTN_CUDA_RELEASE", f'"{toolkit.release if toolkit else ""}"'),
            ("CHUNKATTN_CUDA_ARCHITECTURES", f'"{architectures}"'),
            ("CHUNKATTN_TORCH_VERSION", f'"{torch.__version__}"'),
        ],
        extra_compile_args=[*CXX_FLAGS, "-O1"],
        language="c++",
    )


class BuildExtension(cpp_extension.BuildExtension):
    """torch's, with a directory of objects for each extension that survives from one build to the next."""

    def finalize_options(self):
        super().finalize_options()
        # An editable install would build in a new temporary directory, and so build everything each time.
        self.build_temp = str(ROOT / "build" / f"temp.{self.plat_name}-{sys.implementation.cache_tag}")

    def run(self):
        cxx = shlex.split(cpp_extension.get_cxx_compiler())[0]
        if shutil.which(cxx) is None:
            fail(f"the C++ compiler {cxx} was not found: install one (g++ 11 or later, or clang++) or set CXX.")
        super().run()

    def build_extension(self, ext):
        parent = self.build_temp
        self.build_temp = os.path.join(parent, ext.name)
        if torch.version.cuda is None:
            self.drop_stale_cuda_objects()
        try:
            super().build_extension(ext)
        except RuntimeError as error:
            fail(f"{ext.name} did not compile, the compiler's messages are above ({error}).")
        self.build_temp = parent

    def drop_stale_cuda_objects(self):
        """Without CUDA in torch, BuildExtension tracks no headers of CUDA sources: make ninja compile them again."""
        headers = max(path.stat().st_mtime for suffix in ("h", "cuh") for path in ROOT.glob(f"csrc/**/*.{suffix}"))
        for item in Path(self.build_temp).glob("csrc/cuda/**/*.o"):
            if item.stat().st_mtime < headers:
                item.unlink()


if tuple(int(part) for part in torch.__version__.split(".")[:2]) < TORCH_TARGET:
    fail(f"building needs torch {TORCH_TARGET[0]}.{TORCH_TARGET[1]} or later, found {torch.__version__}.")
os.environ.setdefault("MAX_JOBS", str(len(os.sched_getaffinity(0))))
cuda = find_cuda()
if cuda:
    use_toolkit(cuda)
setup(
    ext_modules=[ops_extension(cuda), core_extension(cuda)],
    cmdclass={"build_ext": BuildExtension},
)
