"""A run's model as a folder that ``transformers`` loads.

It is written beside its place under another name, checked, and renamed if all is well.
"""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import UserError
from ..progress import track
from .card import model_card
from .check import check_export
from .folder import silence_libraries
from .registry import choose_target, describe_target
from .saved_run import SavedRun
from .target import Target, stays_fp32
from .tensor_map import StackedTensors, by_layer
from .tokenizer import write_tokenizer

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

SHARD_SIZE = "4GB"
"""The largest file of weights."""


def export_run(run: str, out: Path, dtype_name: str | None, say: Callable[[str], None]) -> None:
    """Write the model of ``run`` (a folder, or ``folder@step``) to the new folder ``out``.

    Args:
        dtype_name: the dtype of the weights; None for that of training.
        say: is called with each line about what is done.

    Raises:
        UserError: ``out`` already exists, the run or its checkpoint is not whole, no exported code
            can compute the model, or what was written does not give the run's logits. Nothing is
            left behind.
    """
    from safetensors import SafetensorError

    if out.exists():
        raise UserError(f"{out}: already exists; remove it or choose another folder")
    saved = SavedRun(run)
    target, _ = choose_target(saved.to_export)
    say(describe_target(saved.to_export))

    partial = out.with_name(f"{out.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    try:
        partial.mkdir(parents=True)
        _write(saved, target, partial, dtype_name)
        result = check_export(partial, saved, say)
        (partial / "README.md").write_text(model_card(saved, target, result))
        partial.rename(out)
    except (OSError, SafetensorError) as error:
        raise UserError(f"{out}: cannot be written: {error}") from None
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _write(saved: SavedRun, target: Target, folder: Path, dtype_name: str | None) -> None:
    import torch
    from transformers import GenerationConfig

    silence_libraries()
    dtype = getattr(torch, dtype_name or saved.training_dtype)
    token_ids = write_tokenizer(saved.recipe, folder, saved.to_export.seq_length)
    no_ids = dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"))
    hf_model = target.build({**no_ids, **token_ids}, dtype)

    _load_weights(hf_model, saved, target, dtype)
    hf_model.generation_config = GenerationConfig(do_sample=True, **token_ids)
    hf_model.save_pretrained(folder, max_shard_size=SHARD_SIZE)
    target.finish_folder(folder)


def _load_weights(
    hf_model: "PreTrainedModel", saved: SavedRun, target: Target, dtype: "torch.dtype"
) -> None:
    """Give ``hf_model``, which is on the meta device, the run's weights as ``dtype``.

    They come layer by layer, so that memory holds the exported model once and one layer of ours.
    """
    tensor_maps = list(target.tensor_maps())
    mapped_names = {tensor_map.megatron_name for tensor_map in tensor_maps}
    one_sided = sorted(mapped_names ^ set(saved.shapes))
    assert not one_sided, f"parameters without a counterpart: {one_sided[:5]}"

    fp32_names = {name for name, _ in hf_model.named_parameters() if stays_fp32(name)}
    with track("Converting", len(tensor_maps), of_bytes=False) as advance:
        for layer_maps in by_layer(tensor_maps):
            collected = StackedTensors()
            weights = saved.weights([tensor_map.megatron_name for tensor_map in layer_maps])
            for tensor_map in layer_maps:
                collected.add(tensor_map, weights[tensor_map.megatron_name])
                advance(1)
            tensors = {
                name: tensor if name in fp32_names else tensor.to(dtype)
                for name, tensor in collected.stacked().items()
            }
            loaded = hf_model.load_state_dict(tensors, strict=False, assign=True)
            unexpected = loaded.unexpected_keys
            assert not unexpected, f"{target.model_type} has no {unexpected}"

    hf_model.tie_weights()
    target.finish(hf_model)
    empty = [name for name, tensor in hf_model.state_dict().items() if tensor.is_meta]
    assert not empty, f"no weights for {empty[:5]}"
