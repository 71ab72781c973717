"""A plain Megatron-core training script with longspan's layers, and nothing else of its trainer.

torchrun --standalone --nproc-per-node 2 docs/plain_megatron.py
"""

import os
import sys

import torch
import torch.distributed as dist
from longspan.parallel import Layout, Sequence
from longspan.trainer import (
    FullBlock,
    GatedDeltaNetBlock,
    LightningBlock,
    S2Block,
    hybrid_stack_spec,
)
from longspan.trainer.model.cpu import megatron_on_cpu
from megatron.core import parallel_state
from megatron.core.models.gpt import GPTModel
from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed
from megatron.core.transformer import TransformerConfig

STACK = [
    LightningBlock(mixer="lightning"),
    S2Block(mixer="s2", block=8, local_blocks=2, stride=2),
    GatedDeltaNetBlock(mixer="gated_deltanet"),
    FullBlock(mixer="full"),
]
LENGTH, VOCABULARY, STEPS = 96, 128, 15
DOCUMENTS = torch.tensor(
    [[0] * 24 + [1] * 40 + [2] * 32] * 2
).int()  # of each token; attention stays within one


def main() -> list[float]:
    """The loss of every step, the same on any number of ranks."""
    ranks, rank = dist.get_world_size(), dist.get_rank()
    parallel_state.initialize_model_parallel(context_parallel_size=ranks)
    model_parallel_cuda_manual_seed(0)
    config = TransformerConfig(
        num_layers=len(STACK),
        hidden_size=64,
        num_attention_heads=4,
        num_query_groups=2,
        ffn_hidden_size=96,
        gated_linear_unit=True,
        activation_func=torch.nn.functional.silu,
        add_bias_linear=False,
        normalization="RMSNorm",
        hidden_dropout=0.0,
        attention_dropout=0.0,
        context_parallel_size=ranks,
        use_cpu_initialization=True,
        bias_activation_fusion=False,
    )
    model = GPTModel(
        config,
        hybrid_stack_spec(config, STACK),
        vocab_size=VOCABULARY,
        max_sequence_length=LENGTH,
        position_embedding_type="none",  # positions are the layers' business
    )
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        if parameter.ndim > 1:
            parameter.data.normal_(0.0, 0.1, generator=generator)
    tokens = torch.randint(VOCABULARY, (2, LENGTH), generator=generator)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)

    layout = Layout.zigzag(LENGTH, ranks)  # which tokens a rank has
    own = layout.shard(tokens, rank)
    labels = layout.shard(tokens.roll(-1, 1), rank)
    # A document's last token has no label: what follows it is another document's.
    counted = (DOCUMENTS.roll(-1, 1) == DOCUMENTS) & (torch.arange(LENGTH) < LENGTH - 1)
    weights, total = layout.shard(counted.float(), rank), counted.sum()
    losses = []
    for _ in range(STEPS):
        sequence = Sequence(layout, rank, DOCUMENTS)
        loss = (
            model(own, None, None, labels=labels, packed_seq_params=sequence) * weights
        ).sum() / total
        optimizer.zero_grad()
        loss.backward()
        for parameter in model.parameters():
            dist.all_reduce(parameter.grad)
        optimizer.step()
        dist.all_reduce(loss := loss.detach())
        losses.append(float(loss))
    parallel_state.destroy_model_parallel()
    return losses


if __name__ == "__main__":
    dist.init_process_group("gloo")
    # On GPUs, leave megatron_on_cpu out, initialize NCCL, and move the model and the tokens.
    with megatron_on_cpu():
        losses = main()
    if dist.get_rank() == 0:
        print(f"{os.environ['WORLD_SIZE']} ranks: loss {losses[0]:.5f} -> {losses[-1]:.5f}")
        if len(sys.argv) > 1:
            torch.save(losses, sys.argv[1])
    dist.destroy_process_group()
