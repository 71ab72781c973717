"""Config of a longspan model. Part of the model's folder: needs torch and transformers alone."""

from transformers import PreTrainedConfig


class LongspanConfig(PreTrainedConfig):
    """A stack of layers, each of which says what it is.

    Args:
        layers: of each layer its ``norm``, its ``mixer_residual`` and ``mlp_residual``, its ``mlp``, and under ``mixer`` what
            :mod:`.modeling_longspan` builds.
        moe: of layers whose ``mlp`` is ``moe``.
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
        layers: list | None = None,
        moe: dict | None = None,
        rope_theta: float = 10000.0,
        rms_norm_eps: float = 1e-5,
        initializer_range: float = 0.02,
        max_position_embeddings: int = 0,
        tie_word_embeddings: bool = False,
        use_cache: bool = True,
        **others,
    ):
        self.vocab_size, self.hidden_size, self.intermediate_size = (
            vocab_size,
            hidden_size,
            intermediate_size,
        )
        self.num_attention_heads, self.num_key_value_heads, self.head_dim = (
            num_attention_heads,
            num_key_value_heads,
            head_dim,
        )
        self.layers, self.moe = layers or [], moe
        self.num_hidden_layers = len(self.layers)
        self.rope_theta, self.rms_norm_eps, self.initializer_range = (
            rope_theta,
            rms_norm_eps,
            initializer_range,
        )
        self.max_position_embeddings, self.use_cache = max_position_embeddings, use_cache
        others.pop("num_hidden_layers", None)
        super().__init__(tie_word_embeddings=tie_word_embeddings, **others)
