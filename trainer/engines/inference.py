"""Text from a trained model."""

import torch
from torch import Tensor

from ..checkpoint.run_folder import RunFolder
from ..data.tokenizer import recipe_tokenizer
from ..errors import UserError
from ..recipe.schema import LaunchConfig, MegatronConfig, MemoryConfig, ParallelConfig, Recipe
from .build import build_engine
from .engine import Engine


def load_for_inference(folder: RunFolder) -> Engine:
    """The run's model with its weights, whole in this process whatever it was trained on; needs a process group of one."""
    folder.require_weights()
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        weights = load_file(folder.weights)
    except SafetensorError as error:
        raise UserError(f"{folder.weights}: is damaged ({error})") from None
    return with_weights(folder.weights_recipe(), weights)


def with_weights(recipe: Recipe, weights: dict[str, Tensor]) -> Engine:
    """The recipe's model, whole in this process, with weights by global name; needs a process group of one."""
    alone = {
        "parallel": ParallelConfig(),
        "engine": MegatronConfig(),
        "memory": MemoryConfig(),
        "launch": LaunchConfig(),
    }
    engine = build_engine(recipe.model_copy(update=alone))
    engine.load_weights(weights)
    return engine


def generate(
    folder: RunFolder, engine: Engine, prompt: str, tokens: int, temperature: float, seed: int
) -> str:
    """``prompt`` and what the model goes on with: up to ``tokens`` tokens, or to the document's end.

    Each token is drawn from the softmax at ``temperature`` (0: the likeliest) after a full forward pass.
    """
    tokenizer = recipe_tokenizer(folder.recipe)
    ids = list(tokenizer.encode(prompt.encode()))
    if temperature < 0:
        raise UserError(f"--temperature: must not be negative, got {temperature}")
    if not ids:
        raise UserError("--prompt: is empty; the model needs something to go on from")
    generator = torch.Generator().manual_seed(seed)
    for _ in range(tokens):
        context = torch.tensor([ids], device=engine.device)
        logits = engine.logits(context)[0, -1].cpu()
        if temperature == 0:
            token = int(logits.argmax())
        else:
            token = int(
                torch.multinomial((logits / temperature).softmax(-1), 1, generator=generator)
            )
        if token == tokenizer.end_of_document:
            break
        ids.append(token)
    return tokenizer.decode(ids)
