"""The model of a recipe, as Hugging Face needs it."""

from dataclasses import dataclass
from typing import Any

from ..data.tokenizer import recipe_vocab_size
from ..recipe.schema import ModelConfig, Recipe


@dataclass(frozen=True)
class ModelToExport:
    """What a model is, apart from its weights."""

    model: ModelConfig
    vocab_size: int
    """Number of tokens, without the padding of the matrices."""
    seq_length: int
    """Tokens of the sequences that the model was trained on."""

    @classmethod
    def of_recipe(cls, recipe: Recipe) -> "ModelToExport":
        return cls(recipe.model, recipe_vocab_size(recipe), recipe.training.seq_length)

    def common_config(self) -> dict[str, Any]:
        """Return the part of ``config.json`` that all targets share."""
        model = self.model
        return {
            "vocab_size": self.vocab_size,
            "hidden_size": model.hidden_size,
            "intermediate_size": model.intermediate_size,
            "num_attention_heads": model.num_attention_heads,
            "num_key_value_heads": model.kv_heads,
            "head_dim": model.kv_channels,
            "max_position_embeddings": self.seq_length,
            "rms_norm_eps": model.rms_norm_eps,
            "initializer_range": model.initializer_range,
            "tie_word_embeddings": model.tie_word_embeddings,
        }
