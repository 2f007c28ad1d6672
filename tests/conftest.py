import pytest
import torch

import chunkattn._core

# The tensors here are small: waiting for threads would cost more than they save. One test asks for more of them.
torch.set_num_threads(1)


def _cuda_skip_reason() -> str | None:
    if not torch.cuda.is_available():
        return "torch sees no GPU"
    if chunkattn._core.build_info()["cuda"] is None:
        return "chunkattn was built without CUDA kernels"
    return None


@pytest.fixture(params=["cpu", "cuda", "cuda-portable"])
def device(request):
    """Every device the operators run on. A test that takes it runs once on each, and once more on the portable kernels
    of a GPU whose architecture has kernels of its own."""
    if request.param == "cpu":
        yield torch.device("cpu")
        return
    if reason := _cuda_skip_reason():
        pytest.skip(reason)
    if request.param == "cuda-portable":
        torch.ops.chunkattn.force_kernel("portable")
    yield torch.device("cuda")
    torch.ops.chunkattn.force_kernel("auto")


@pytest.fixture
def cuda() -> torch.device:
    if reason := _cuda_skip_reason():
        pytest.skip(reason)
    return torch.device("cuda")
