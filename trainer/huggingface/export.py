"""A run's weights as a folder that ``transformers`` loads: written beside its place, checked, and renamed when all is well."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import UserError
from ..progress import track
from .card import model_card
from .check import check_export
from .folder import quiet
from .source import SavedRun
from .target import CustomTarget, Target, choose_target, describe_target, stays_fp32
from .tokenizer import write_tokenizer

if TYPE_CHECKING:
    from torch import dtype, nn

SHARD = "4GB"


def export_run(run: str, out: Path, dtype_name: str | None, say: Callable[[str], None]) -> None:
    """Write the model of ``run`` (a folder, or ``folder@step``) to the new folder ``out``.

    Args:
        dtype_name: of the weights; None for that of training.

    Raises:
        UserError: ``out`` is there already, the run or its checkpoint is not whole, no code can run the model outside, or what
            was written does not give the run's logits. Nothing is left behind.
    """
    from safetensors import SafetensorError

    if out.exists():
        raise UserError(f"{out}: exists already; remove it or choose another folder")
    saved = SavedRun(run)
    target, _ = choose_target(saved.source)
    say(describe_target(saved.source))
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

    quiet()
    kind = getattr(torch, dtype_name or _training_dtype(saved))
    ids = write_tokenizer(saved.recipe, folder, saved.source.seq_length)
    built = _built(
        target, {"bos_token_id": None, "eos_token_id": None, "pad_token_id": None, **ids}, kind
    )
    _load(built, saved, target, kind)
    built.generation_config = GenerationConfig(do_sample=True, **ids)
    built.save_pretrained(folder, max_shard_size=SHARD)


def _training_dtype(saved: SavedRun) -> str:
    name = saved.recipe.training.dtype
    if name != "auto":
        return name
    return "bfloat16" if saved.manifest.ranks.startswith("cuda") else "float32"


def _built(target: Target, ids: dict, kind: "dtype") -> "nn.Module":
    """The model of ``transformers``, without memory for its weights."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    if isinstance(target, CustomTarget):
        from .custom.configuration_longspan import LongspanConfig
        from .custom.modeling_longspan import LongspanForCausalLM

        LongspanConfig.register_for_auto_class()
        LongspanForCausalLM.register_for_auto_class("AutoModelForCausalLM")
        config, make = LongspanConfig(**target.config(), **ids), LongspanForCausalLM
    else:
        config, make = (
            AutoConfig.for_model(target.model_type, **target.config(), **ids),
            AutoModelForCausalLM.from_config,
        )
    with torch.device("meta"):
        return make(config).to(kind)


def _load(built: "nn.Module", saved: SavedRun, target: Target, kind: "dtype") -> None:
    """Layer by layer, so that in memory is the model once, and of ours a layer."""
    from .tensor_map import StackedTensors, by_layer

    rows = list(target.rows())
    missing = sorted({each.ours for each in rows} ^ set(saved.shapes))
    assert not missing, f"parameters that are on one side alone: {missing[:5]}"
    fp32 = {name for name, parameter in built.named_parameters() if stays_fp32(name)}
    with track("Converting", len(rows), of_bytes=False) as advance:
        for layer in by_layer(rows):
            collected = StackedTensors()
            weights = saved.weights([each.ours for each in layer])
            for each in layer:
                collected.add(each, weights[each.ours])
                advance(1)
            tensors = {
                name: t if name in fp32 else t.to(kind) for name, t in collected.all().items()
            }
            unexpected = built.load_state_dict(tensors, strict=False, assign=True).unexpected_keys
            assert not unexpected, f"{target.model_type} has no {unexpected}"
    built.tie_weights()
    target.finish(built)
    empty = [name for name, tensor in built.state_dict().items() if tensor.is_meta]
    assert not empty, f"nothing gives {empty[:5]}"
