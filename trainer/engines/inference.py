"""Text from a trained model."""

import torch
from torch import Tensor

from ..checkpoint.run_folder import RunFolder
from ..data.tokenizer import SpecialTokenError, recipe_tokenizer
from ..errors import UserError
from ..recipe.schema import LaunchConfig, MegatronConfig, MemoryConfig, ParallelConfig, Recipe
from .build import build_engine
from .engine import Engine


def load_for_inference(folder: RunFolder) -> Engine:
    """Return the run's model with its weights, whole in this process whatever it was trained on.

    Needs a process group of one.

    Raises:
        UserError: the run has no weights, or their file is damaged.
    """
    folder.require_weights()
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        weights = load_file(folder.weights)
    except SafetensorError as error:
        raise UserError(f"{folder.weights}: is damaged ({error})") from None
    return with_weights(folder.weights_recipe(), weights)


def with_weights(recipe: Recipe, weights: dict[str, Tensor]) -> Engine:
    """Return the recipe's model, whole in this process, with weights by global name.

    Needs a process group of one.
    """
    one_process = {
        "parallel": ParallelConfig(),
        "engine": MegatronConfig(),
        "memory": MemoryConfig(),
        "launch": LaunchConfig(),
    }
    engine = build_engine(recipe.model_copy(update=one_process))
    engine.load_weights(weights)
    return engine


def generate(
    folder: RunFolder,
    engine: Engine,
    prompt: str,
    tokens: int,
    temperature: float,
    seed: int,
    reads_special_tokens: bool = False,
) -> str:
    """Return ``prompt`` and its continuation: up to ``tokens`` tokens, or to the document's end.

    Each token is drawn from the softmax at ``temperature`` (0: the likeliest) after a full forward
    pass. With ``reads_special_tokens``, special tokens that the prompt spells are these tokens.
    """
    tokenizer = recipe_tokenizer(folder.recipe, reads_special_tokens)
    try:
        token_ids = list(tokenizer.encode(prompt.encode()))
    except SpecialTokenError as error:
        raise UserError(
            f"--prompt: the tokenizer's model takes {error} for that special token; use "
            "--parse-special if it is meant"
        ) from None
    if temperature < 0:
        raise UserError(f"--temperature: must not be negative, got {temperature}")
    if not token_ids:
        raise UserError("--prompt: is empty; the model needs something to continue")

    generator = torch.Generator().manual_seed(seed)
    for _ in range(tokens):
        context = torch.tensor([token_ids], device=engine.device)  # [1, time]
        logits = engine.logits(context)[0, -1].cpu()  # [vocab]
        token = _draw(logits, temperature, generator)
        if token == tokenizer.end_of_document:
            break
        token_ids.append(token)
    return tokenizer.decode(token_ids)


def _draw(logits: Tensor, temperature: float, generator: torch.Generator) -> int:
    if temperature == 0:
        return int(logits.argmax())
    probabilities = (logits / temperature).softmax(-1)
    return int(torch.multinomial(probabilities, 1, generator=generator))
