import pytest
import torch

import chunkattn._core


def _cuda_skip_reason() -> str | None:
    if not torch.cuda.is_available():
        return "torch sees no GPU"
    if chunkattn._core.build_info()["cuda"] is None:
        return "chunkattn was built without CUDA kernels"
    return None


@pytest.fixture(params=["cpu", "cuda"])
def device(request) -> torch.device:
    """Every device the operators run on. A test that takes it runs once on each."""
    if request.param == "cuda" and (reason := _cuda_skip_reason()):
        pytest.skip(reason)
    return torch.device(request.param)


@pytest.fixture
def cuda() -> torch.device:
    if reason := _cuda_skip_reason():
        pytest.skip(reason)
    return torch.device("cuda")
