"""Config of a longspan model. Part of the model's folder: needs torch and transformers alone."""

from typing import Any

from transformers import PreTrainedConfig


class LongspanConfig(PreTrainedConfig):
    """A stack of layers, each with a section that says what it is.

    Args:
        layers: for each layer its ``norm``, its ``mixer_residual`` and ``mlp_residual``, its
            ``mlp`` and ``mlp_activation``, and under ``mixer`` what :mod:`.modeling_longspan` builds.
        moe: the experts of layers whose ``mlp`` is ``moe``.
    """

    model_type = "longspan"
    keys_to_ignore_at_inference = ["past_key_values"]

    def __init__(
        self,
        vocab_size: int = 0,
        hidden_size: int = 0,
        intermediate_size: int = 0,
        num_attention_heads: int = 1,
        num_key_value_heads: int = 1,
        head_dim: int = 0,
        layers: list[dict[str, Any]] | None = None,
        moe: dict[str, Any] | None = None,
        rope_theta: float = 10000.0,
        rms_norm_eps: float = 1e-5,
        initializer_range: float = 0.02,
        max_position_embeddings: int = 0,
        tie_word_embeddings: bool = False,
        use_cache: bool = True,
        **others,
    ):
        self.vocab_size = vocab_size
        self.hidden_size = hidden_size
        self.intermediate_size = intermediate_size
        self.num_attention_heads = num_attention_heads
        self.num_key_value_heads = num_key_value_heads
        self.head_dim = head_dim
        self.layers = layers or []
        self.num_hidden_layers = len(self.layers)
        self.moe = moe
        self.rope_theta = rope_theta
        self.rms_norm_eps = rms_norm_eps
        self.initializer_range = initializer_range
        self.max_position_embeddings = max_position_embeddings
        self.use_cache = use_cache
        others.pop("num_hidden_layers", None)  # what config.json says is the length of `layers`
        super().__init__(tie_word_embeddings=tie_word_embeddings, **others)
