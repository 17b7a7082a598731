import pytest
import torch

from tests.gpu.place import found


def test_a_device_is_there_and_multiplies() -> None:
    device = found()
    if device is None:
        pytest.skip("torch sees no CUDA device here: the laws of tests/gpu were not run")
    ones = torch.ones(8, 8, device=device)
    assert torch.equal((ones @ ones).cpu(), torch.full((8, 8), 8.0))
