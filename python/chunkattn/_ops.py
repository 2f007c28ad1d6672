"""Loads the library that holds chunkattn's ops: importing this module makes ``torch.ops.chunkattn`` exist."""

from __future__ import annotations

from pathlib import Path

import torch

MINIMUM_TORCH = (2, 10)


def find_library(directory: Path) -> Path:
    """The file of the compiled library ``_C`` in the package's directory; ImportError where there is none."""
    for path in sorted(directory.glob("_C.*so")):
        return path
    raise ImportError(
        f"chunkattn's compiled library _C is missing from {directory}: build it with "
        "'pip install --no-build-isolation .' in chunkattn's source tree."
    )


def load_library(path: Path) -> None:
    """Registers the ops of a compiled library with torch; ImportError where torch is too old or does not take it."""
    if tuple(int(part) for part in torch.__version__.split(".")[:2]) < MINIMUM_TORCH:
        minimum = ".".join(map(str, MINIMUM_TORCH))
        raise ImportError(f"chunkattn needs torch {minimum} or later, found {torch.__version__}.")
    try:
        torch.ops.load_library(path)
    except OSError as error:
        reason = error.__cause__ or error
        raise ImportError(f"chunkattn's library does not load with torch {torch.__version__}: {reason}.") from None


load_library(find_library(Path(__file__).parent))

CUDA_OPERATORS = frozenset(
    name
    for name in (
        "dca",
        "dca_varlen",
        "dca_with_kvcache",
        "select",
        "select_merge",
        "select_merge_backward",
        "select_merge_with_kvcache",
    )
    if torch._C._dispatch_has_kernel_for_dispatch_key(f"chunkattn::{name}", "CUDA")
)
"""The functions, and gradients that may lack theirs, that this build has CUDA kernels of."""


def has_kernels(operator: str, device: torch.device) -> bool:
    """Whether this build can run a function on a device."""
    return device.type != "cuda" or operator in CUDA_OPERATORS
