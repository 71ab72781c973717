"""What trainers are measured against: a Llama in plain PyTorch, and that of ``transformers``."""

from argparse import Namespace
from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...attention import apply_rotary
from ...attention.rotary import rotary_tables
from ...trainer.errors import UserError
from ..options import counts


@dataclass(frozen=True)
class LlamaSize:
    """The size of a Llama."""

    hidden: int
    layers: int
    heads: int
    kv_heads: int
    intermediate: int
    vocabulary: int

    @property
    def head_dim(self) -> int:
        return self.hidden // self.heads

    def recipe(self, length: int, batch: int, block: dict, **sections: object) -> dict:
        """Return the content of a recipe of this size.

        Args:
            length: tokens of a sequence.
            batch: sequences of a step.
            block: the kind of all layers.
            sections: more sections of the recipe.
        """
        return {
            "run_dir": "unused",
            "model": {
                "hidden_size": self.hidden,
                "num_hidden_layers": self.layers,
                "num_attention_heads": self.heads,
                "num_key_value_heads": self.kv_heads,
                "intermediate_size": self.intermediate,
                "vocab_size": self.vocabulary,
                "tie_word_embeddings": False,
                "layers": {"blocks": {"all": block}, "pattern": ["all"]},
            },
            "data": {"sources": {"python-stdlib": 1.0}},
            "training": {
                "steps": 1000,
                "seq_length": length,
                "global_batch_size": batch,
                "micro_batch_size": batch,
            },
            "optimizer": {"lr": 1e-3},
            **sections,
        }


def size_of(options: Namespace) -> LlamaSize:
    """Return the size that a command's options ask for.

    Raises:
        UserError: naming the option that does not fit.
    """
    size = LlamaSize(**counts(options, *(field.name for field in fields(LlamaSize))))
    if size.hidden % size.heads or size.heads % size.kv_heads:
        raise UserError(
            f"--heads: {size.heads} must divide --hidden {size.hidden}, "
            f"and --kv-heads {size.kv_heads} it"
        )
    return size


Attention = Callable[[Tensor, Tensor, Tensor], Tensor]
"""``attention(q, k, v)``, all ``[batch, time, heads, dim]``."""


def dense_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Return causal attention by torch's SDPA."""
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))  # [batch, heads, time, dim]
    out = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
    return out.transpose(1, 2)


class PlainLlama(nn.Module):
    """A Llama as a module of torch: ``tokens, labels [batch, time]`` to the mean loss."""

    def __init__(self, size: LlamaSize, attention: Attention = dense_attention):
        super().__init__()
        self.embedding = nn.Embedding(size.vocabulary, size.hidden)
        self.layers = nn.ModuleList(_Layer(size, attention) for _ in range(size.layers))
        self.norm = nn.RMSNorm(size.hidden)
        self.head = nn.Linear(size.hidden, size.vocabulary, bias=False)
        self.head_dim = size.head_dim

    def forward(self, tokens: Tensor, labels: Tensor) -> Tensor:
        x = self.embedding(tokens)  # [batch, time, hidden]
        positions = torch.arange(tokens.shape[1], device=tokens.device)[None]
        tables = rotary_tables(positions, self.head_dim, 10000.0)
        for layer in self.layers:
            x = layer(x, tables)
        return F.cross_entropy(self.head(self.norm(x)).flatten(0, 1), labels.flatten())


class _Layer(nn.Module):
    def __init__(self, size: LlamaSize, attention: Attention):
        super().__init__()
        self.size = size
        self.attention = attention
        qkv_width = (size.heads + 2 * size.kv_heads) * size.head_dim
        self.qkv = nn.Linear(size.hidden, qkv_width, bias=False)
        self.out = nn.Linear(size.heads * size.head_dim, size.hidden, bias=False)
        self.up = nn.Linear(size.hidden, 2 * size.intermediate, bias=False)
        self.down = nn.Linear(size.intermediate, size.hidden, bias=False)
        self.norms = nn.ModuleList(nn.RMSNorm(size.hidden) for _ in range(2))

    def forward(self, x: Tensor, tables: tuple[Tensor, Tensor]) -> Tensor:
        size = self.size
        # [batch, time, heads + 2 kv_heads, head_dim]
        qkv = self.qkv(self.norms[0](x)).unflatten(-1, (-1, size.head_dim))
        q, k, v = qkv.split([size.heads, size.kv_heads, size.kv_heads], -2)
        mixed = self.attention(apply_rotary(q, *tables), apply_rotary(k, *tables), v)
        x = x + self.out(mixed.flatten(2))

        gate, up = self.up(self.norms[1](x)).chunk(2, -1)
        return x + self.down(F.silu(gate) * up)


def transformers_llama(
    size: LlamaSize, length: int, gradient_checkpointing: bool = False
) -> nn.Module:
    """Return ``LlamaForCausalLM`` with SDPA, for sequences of up to ``length`` tokens."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        hidden_size=size.hidden,
        num_hidden_layers=size.layers,
        num_attention_heads=size.heads,
        num_key_value_heads=size.kv_heads,
        intermediate_size=size.intermediate,
        vocab_size=size.vocabulary,
        max_position_embeddings=length,
        attn_implementation="sdpa",
        use_cache=False,
    )
    model = LlamaForCausalLM(config)
    if gradient_checkpointing:
        model.gradient_checkpointing_enable()
    return model


def random_batches(size: LlamaSize, length: int, batch: int = 1, seed: int = 0) -> Iterator[Tensor]:
    """Yield batches without end: int64 ``[batch, length + 1]``, tokens with their labels."""
    generator = torch.Generator().manual_seed(seed)
    while True:
        yield torch.randint(size.vocabulary, (batch, length + 1), generator=generator)
