import pytest
import torch


@pytest.fixture(autouse=True, scope="package")
def one_thread():
    """Tiny matrices are slower on two threads, and the machine may be busy."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
