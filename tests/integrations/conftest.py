import pytest
import torch


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """Tensors this small only lose by threads."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def llama():
    """A Llama with Dual Chunk Attention enabled, that tests leave as they found it."""
    from tiny_models import CHUNK, LOCAL, make_model

    from chunkattn.integrations.transformers import enable_dca

    model = make_model()
    enable_dca(model, CHUNK, LOCAL)
    return model
