"""Options that save memory change no gradient, and save the expected bytes."""

import contextlib

import pytest
import torch
from longspan.launch.process import process_group
from longspan.trainer.errors import UserError
from longspan.trainer.recipe.file import load_recipe
from torch.autograd.graph import saved_tensors_hooks

from ..stacks import LINEAR, LINEAR_MORE, PATTERNS

OPTIONS = {
    "full": ["memory.recompute=full"],
    "selective": ["memory.recompute=selective"],
    "tiles": ["memory.mlp_tile=17", "memory.loss_tile=10"],
    "all": [
        "memory.recompute=full",
        "memory.mlp_tile=17",
        "memory.loss_tile=10",
        "memory.offload_inputs=true",
    ],
}


@contextlib.contextmanager
def batches_on(recipe_file, *overrides):
    """Yield an engine on one process and the microbatches of its first step."""
    from longspan.trainer.data.batches import Batches
    from longspan.trainer.data.prepare import prepare_data
    from longspan.trainer.data.tokenizer import recipe_vocab_size
    from longspan.trainer.engines.build import build_engine

    recipe = load_recipe(str(recipe_file), ["training.micro_batch_size=2", *overrides])
    with process_group(2):
        engine = build_engine(recipe)
        with contextlib.closing(engine):
            batches = Batches(
                recipe,
                prepare_data(recipe),
                recipe_vocab_size(recipe),
                engine.batch_shard,
                engine.device,
            )
            yield engine, list(batches.step(0))


@pytest.mark.parametrize(
    "stack",
    [
        [],
        pytest.param([PATTERNS], marks=pytest.mark.wide),
        pytest.param(LINEAR, marks=pytest.mark.wide),
        pytest.param(LINEAR_MORE, marks=pytest.mark.wide),
    ],
    ids=["tiny", "patterns", "linear", "more linear"],
)
def test_memory_options_do_not_change_gradients(tiny_recipe, stack):
    with batches_on(tiny_recipe, *stack) as (engine, batches):
        expected = engine.gradients(batches)
    for name, options in OPTIONS.items():
        with batches_on(tiny_recipe, *stack, *options) as (engine, batches):
            gradients = engine.gradients(batches)
        assert gradients.keys() == expected.keys()
        for key, gradient in gradients.items():
            if "tile" in "".join(options):  # sums in another order
                assert (gradient - expected[key]).norm() <= 1e-5 * expected[key].norm(), (name, key)
            else:
                assert torch.equal(gradient, expected[key]), (name, key)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_offloaded_inputs_give_the_same_gradients(tiny_recipe):
    recompute = "memory.recompute=full"
    with batches_on(tiny_recipe, recompute) as (engine, batches):
        expected = engine.gradients(batches)
    with batches_on(tiny_recipe, recompute, "memory.offload_inputs=true") as (engine, batches):
        gradients = engine.gradients(batches)
    for key, gradient in expected.items():
        assert (gradients[key] - gradient).norm() <= 1e-5 * gradient.norm(), key


def saved_bytes(recipe_file, *overrides):
    """Return the bytes that a forward pass saves besides parameters; each storage counts once."""
    with batches_on(recipe_file, *overrides) as (engine, batches):
        weights = {parameter.data_ptr() for parameter in engine.model.parameters()}
        sizes = {}

        def pack(x):
            if x.data_ptr() not in weights:
                sizes[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
                alive.append(x)  # so that no address is used twice
            return x

        alive = []
        with saved_tensors_hooks(pack, lambda x: x):
            batch = batches[0]
            engine.model(
                batch.tokens,
                None,
                None,
                labels=batch.labels,
                loss_mask=batch.weights,
                packed_seq_params=batch.sequence,
            )
        return sum(sizes.values())


def test_recompute_and_tiles_save_fewer_bytes(tiny_recipe):
    layer = 2 * 96 * 64 * 4  # the hidden state between two layers
    loss = 2 * 96 * 64 * 4 + 384 * 64 * 4  # the gradients of the loss, computed in forward
    everything = saved_bytes(tiny_recipe)
    selective = saved_bytes(tiny_recipe, "memory.recompute=selective")
    full = saved_bytes(tiny_recipe, "memory.recompute=full")
    assert loss + 4 * layer <= full < loss + 7 * layer
    assert full < selective < 0.6 * everything
    all_but_one = saved_bytes(
        tiny_recipe, "memory.recompute=full", "memory.recompute_blocks={full: none}"
    )
    assert full < all_but_one < everything
    assert saved_bytes(tiny_recipe, "memory.mlp_tile=16") < 0.8 * everything


def test_offloading_needs_full_recompute(tiny_recipe):
    with pytest.raises(UserError) as error_info:
        load_recipe(
            str(tiny_recipe), ["memory.offload_inputs=true", "memory.recompute_blocks={ful: full}"]
        )
    assert "memory.recompute_blocks.ful: is not a block (did you mean full?)" in str(
        error_info.value
    )
    assert (
        "memory.offload_inputs: block full keeps more than its input (recompute none); set"
        in str(error_info.value)
    )
