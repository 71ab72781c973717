"""The weights of a run as a file, written one tensor at a time."""

import pytest
import torch
from longspan.trainer.checkpoint.weights_file import weights_step, write_weights
from longspan.trainer.errors import UserError
from safetensors.torch import load_file, save_file

WEIGHTS = {
    "b.matrix": torch.randn(3, 5),
    "a.matrix": torch.randn(7, 2).bfloat16(),
    "a.vector": torch.randn(5).half(),
    "größe": torch.randn(2),
    "none": torch.zeros(0, 4, dtype=torch.bfloat16),
}


def test_the_bytes_are_those_of_the_library(tmp_path):
    save_file(WEIGHTS, tmp_path / "expected", {"step": "7"})
    described = {name: weight.to("meta") for name, weight in WEIGHTS.items()}
    write_weights(tmp_path / "weights.safetensors", described, WEIGHTS.__getitem__, 7)
    written = tmp_path / "weights.safetensors"
    assert written.read_bytes() == (tmp_path / "expected").read_bytes()
    assert weights_step(written) == 7


def test_values_get_the_dtype_that_is_asked_for(tmp_path):
    exact = torch.randn(100)
    file = tmp_path / "weights.safetensors"
    write_weights(file, {"x": exact.bfloat16()}, lambda name: exact, 1)
    assert torch.equal(load_file(file)["x"], exact.bfloat16())


def test_one_tensor_is_in_memory_at_a_time(tmp_path):
    """A tensor is asked for when the one before it has been written."""
    sizes = []

    def read(name):
        sizes.append((tmp_path / "weights.partial").stat().st_size)
        return torch.zeros(1 << 20)

    described = {f"{i}": torch.empty(1 << 20, device="meta") for i in range(4)}
    write_weights(tmp_path / "weights.safetensors", described, read, 1)
    assert sizes[-1] - sizes[1] >= 2 << 22


def test_a_failure_leaves_nothing(tmp_path):
    def read(name):
        raise OSError(28, "No space left on device")

    file = tmp_path / "weights.safetensors"
    with pytest.raises(UserError, match="No space left on device; the checkpoint is whole"):
        write_weights(file, WEIGHTS, read, 1)
    assert list(tmp_path.iterdir()) == []
