"""The model against a forward pass in plain torch, its dtypes, shapes and initial weights."""

import contextlib
import json
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from longspan.launch.process import process_group
from longspan.parallel import Layout, Sequence
from longspan.trainer import LightningBlock
from longspan.trainer.recipe.file import load_recipe, shipped_recipes

from ..stacks import LINEAR, LINEAR_MORE, PATTERNS


@pytest.fixture
def engine(tiny_recipe):
    """``engine(*overrides)`` on one process."""
    with contextlib.ExitStack() as stack:

        def build(*overrides):
            from longspan.trainer.engines.build import build_engine

            stack.enter_context(process_group(2))
            built_engine = build_engine(load_recipe(str(tiny_recipe), list(overrides)))
            stack.callback(built_engine.close)
            return built_engine

        yield build


def rms(x, weight, eps):
    return x / (x.square().mean(-1, keepdim=True) + eps).sqrt() * weight


def rotate(x, positions, dim, theta):
    pairs = dim // 2
    angles = positions[:, None] * torch.tensor(
        [theta ** (-2 * i / dim) for i in range(pairs)], dtype=torch.float64
    )
    cos = angles.cos()[:, None]
    sin = angles.sin()[:, None]
    a = x[..., :pairs]
    b = x[..., pairs:dim]
    return torch.cat([a * cos - b * sin, b * cos + a * sin, x[..., dim:]], -1)


def visible_keys(block, head, heads, positions):
    """Return what KV head ``head`` of ``heads`` sees of one document, [queries, keys]."""
    i = positions[:, None]
    j = positions
    if block.mixer == "full":
        mask = i >= 0
    elif block.mixer == "window":
        mask = i - j < block.window
    elif block.mixer == "streaming":
        mask = (i - j < block.window) | (j < block.sinks)
    elif block.mixer == "s2":
        block_distance = i // block.block - j // block.block
        sparse_heads = heads - block.dense_heads
        head_step = max(1, block.stride // sparse_heads)
        phase = j // block.block + (head - block.dense_heads) * head_step + block.offset
        mask = (block_distance < block.local_blocks) | (phase % block.stride == 0)
        if block.near:
            mask = mask | (block_distance < block.near[0]) & (phase % block.near[1] == 0)
        mask = mask | (head < block.dense_heads)
    else:  # the expression in the stack of patterns, for its two heads
        block_distance = i // 2 - j // 2
        head_mask = [(i - j < 5) | (j < 2), (block_distance % 3 == 0) & (block_distance < 12)][head]
        mask = head_mask | ((j // 4 + head * 3) % 6 == 0)
    return mask & (i >= j)


def softmax_attention(x, w, model, block, positions):
    """Compute one document [tokens, hidden] with dense masks, one head at a time."""
    group_size = model.num_attention_heads // model.kv_heads
    dim = model.kv_channels
    outs = []
    for kv, rows in enumerate((x @ w["mixer.linear_in.weight"].T).chunk(model.kv_heads, -1)):
        heads = list(rows.split(dim, -1))
        queries = heads[:group_size]
        *gates, key, value = heads[group_size:]
        if not block.output_gate:
            gates = [None] * group_size
        if block.qk_norm:
            queries = [rms(q, w["mixer.q_layernorm.weight"], model.rms_norm_eps) for q in queries]
            key = rms(key, w["mixer.k_layernorm.weight"], model.rms_norm_eps)
        rotary_dims = int(dim * block.rotary_fraction)
        key = (
            rotate(key[:, None], positions, rotary_dims, model.rope_theta)[:, 0]
            if rotary_dims
            else key
        )
        mask = visible_keys(block, kv, model.kv_heads, positions)
        for query, gate in zip(queries, gates, strict=True):
            query = (
                rotate(query[:, None], positions, rotary_dims, model.rope_theta)[:, 0]
                if rotary_dims
                else query
            )
            logits = query @ key.T / dim**0.5
            if block.softcap:
                logits = block.softcap * (logits / block.softcap).tanh()
            weights = logits.masked_fill(~mask, -torch.inf).exp()
            sink = w["mixer.sinks"][len(outs)].exp() if block.attention_sink else 0
            out = weights @ value / (weights.sum(-1, keepdim=True) + sink)
            outs.append(out if gate is None else out * torch.sigmoid(gate))
    return torch.cat(outs, -1) @ w["mixer.linear_proj.weight"].T


def lightning(x, w, model, block, layer):
    """Compute one document token by token, with the slopes of MiniMax-01."""
    heads = block.num_heads or model.num_attention_heads
    outs = []
    gates = []
    for head, rows in enumerate((x @ w["mixer.linear_in.weight"].T).chunk(heads, -1)):
        q, k, v, *gate = rows.split(model.num_attention_heads * model.kv_channels // heads, -1)
        slope = 2 ** (-8 * (head + 1) / heads)
        log_decay = -slope * (1 - layer / (model.num_hidden_layers - 1 + 1e-5) + 1e-5)
        decay = torch.tensor(log_decay).float().double().exp()
        state = 0
        steps = []
        for q_t, k_t, v_t in zip(F.silu(q), F.silu(k), F.silu(v), strict=True):
            state = decay * state + torch.outer(k_t, v_t)
            steps.append(q_t @ state)
        outs.append(torch.stack(steps))
        gates += gate
    out = rms(torch.cat(outs, -1), w["mixer.norm.weight"], model.rms_norm_eps)
    if gates:
        out = out * torch.sigmoid(torch.cat(gates, -1))
    return out @ w["mixer.linear_proj.weight"].T


def plain_forward(tokens, weights, model):
    """Return the logits [tokens, vocab] of one document in fp64."""
    weights = {name: weight.double() for name, weight in weights.items()}
    x = weights["embedding.word_embeddings.weight"][tokens]
    positions = torch.arange(len(tokens))
    for number, block in enumerate(model.stack):
        prefix = f"decoder.layers.{number}."
        w = {
            name.removeprefix(prefix): weight
            for name, weight in weights.items()
            if name.startswith(prefix)
        }

        def norm(x, name, w=w):
            return rms(x, w[f"{name}.weight"], model.rms_norm_eps)

        def mix(x, w=w, block=block, number=number):
            if isinstance(block, LightningBlock):
                return lightning(x, w, model, block, number)
            return softmax_attention(x, w, model, block, positions)

        def mlp(x, w=w):
            gate, up = (x @ w["mlp.linear_fc1.weight"].T).chunk(2, -1)
            return (F.silu(gate) * up) @ w["mlp.linear_fc2.weight"].T

        halves = (
            ("input", "mixer", mix, block.mixer_residual),
            ("pre_mlp", "mlp", mlp, block.mlp_residual),
        )
        for before, after, f, (skip, branch) in halves:
            if block.norm == "pre":
                x = skip * x + branch * f(norm(x, f"{before}_layernorm"))
            elif block.norm == "post":
                normed = norm(x, f"{before}_layernorm")
                x = skip * normed + branch * f(normed)
            elif block.norm == "sandwich":
                x = skip * x + branch * norm(
                    f(norm(x, f"{before}_layernorm")), f"post_{after}_layernorm"
                )
            else:
                x = skip * x + branch * norm(f(x), f"post_{after}_layernorm")
    x = rms(x, weights["decoder.final_layernorm.weight"], model.rms_norm_eps)
    return x @ weights.get("output_layer.weight", weights["embedding.word_embeddings.weight"]).T


OVERRIDES = {
    "all norms": [],
    "reordered, untied, no gate": [
        "model.layers.blocks.linear.norm=reordered",
        "model.layers.blocks.linear.output_gate=false",
        "model.layers.blocks.linear.num_heads=8",
        "model.layers.blocks.full.qk_norm=true",
        "model.layers.blocks.full.rotary_fraction=0",
        "model.layers.blocks.sparse.output_gate=true",
        "model.tie_word_embeddings=false",
        "model.head_dim=24",
    ],
    "patterns": [PATTERNS],
}


@pytest.mark.parametrize("overrides", OVERRIDES.values(), ids=OVERRIDES)
def test_logits_match_a_plain_forward(engine, overrides):
    built_engine = engine("model.initializer_range=0.7", *overrides)
    weights = built_engine.weights()
    model = built_engine.recipe.model
    for name in (name for name in weights if name.endswith("mixer.sinks")):
        weights[name] = torch.tensor([-1.0, 0.5, 1.0, 3.0])
    built_engine.load_weights(weights)
    lengths = [41, 1, 54]
    tokens = torch.randint(0, 257, (1, 96), generator=torch.Generator().manual_seed(0))
    documents = torch.repeat_interleave(torch.arange(3, dtype=torch.int32), torch.tensor(lengths))[
        None
    ]
    with torch.no_grad():
        ours = built_engine.model(
            tokens, None, None, packed_seq_params=Sequence(Layout.contiguous(96), 0, documents)
        )[0, :, :257]
    pieces = [plain_forward(piece, weights, model)[:, :257] for piece in tokens[0].split(lengths)]
    expected = torch.cat(pieces)
    assert expected.std() > 5, "flat logits hide errors"
    assert (ours - expected).norm() / expected.norm() < 1e-5
    assert (built_engine.logits(tokens[:, :41])[0] - pieces[0]).norm() / pieces[0].norm() < 1e-5
    losses, likeliest = built_engine.token_losses(tokens[:, :40], tokens[:, 1:41])
    expected_losses = F.cross_entropy(pieces[0][:40], tokens[0, 1:41], reduction="none")
    assert (losses[0] - expected_losses).norm() / expected_losses.norm() < 1e-5
    assert torch.equal(likeliest[0], pieces[0][:40].argmax(1) == tokens[0, 1:41])


def test_the_loss_ignores_the_padded_vocabulary(engine):
    built_engine = engine("model.initializer_range=0.7")
    tokens = torch.randint(0, 257, (1, 97), generator=torch.Generator().manual_seed(0))
    weights = torch.arange(96.0)[None] / 96
    loss = built_engine.model(tokens[:, :-1], None, None, labels=tokens[:, 1:], loss_mask=weights)
    expected = F.cross_entropy(
        plain_forward(tokens[0, :-1], built_engine.weights(), built_engine.recipe.model)[:, :257],
        tokens[0, 1:],
        reduction="none",
    )
    assert float(loss.detach()) == pytest.approx(float((expected * weights[0]).sum()), rel=1e-5)


def test_decays_stay_fp32_when_the_model_is_cast(engine):
    from longspan.attention.linear.decays import minimax as minimax_decay

    built_engine = engine("training.dtype=bfloat16")
    decays = {
        name: buffer
        for name, buffer in built_engine.model.named_buffers()
        if name.endswith("decay.log")
    }
    assert len(decays) == 2
    for name, decay in decays.items():
        assert decay.dtype == torch.float32, name
        assert torch.equal(decay, minimax_decay(8, int(name.split(".")[2]), 4)), name
    assert {p.dtype for p in built_engine.model.parameters()} == {torch.bfloat16}


@pytest.mark.parametrize(
    ("stack", "fixed", "learned"),
    [(LINEAR, 1, 4), (LINEAR_MORE, 3, 1)],
    ids=["linear", "more linear"],
)
def test_every_mixer_decays_in_fp32_when_the_model_is_cast(
    engine, monkeypatch, stack, fixed, learned
):
    from longspan.trainer.layers import linear_mixer as linear

    built_engine = engine("training.dtype=bfloat16", *stack)
    real = linear.linear_attention
    decay_dtypes = []

    def recording(q, k, v, *layout_and_group, decay=None, **options):
        if decay is not None:
            decay_dtypes.append(decay.dtype)
        assert {q.dtype, k.dtype, v.dtype} == {torch.bfloat16}
        return real(q, k, v, *layout_and_group, decay=decay, **options)

    monkeypatch.setattr(linear, "linear_attention", recording)
    assert built_engine.logits(torch.randint(0, 257, (1, 96))).isfinite().all()
    assert decay_dtypes == [torch.float32] * (fixed + learned)
    buffers = [
        buffer.dtype for buffer in built_engine.model.buffers() if buffer.is_floating_point()
    ]
    assert buffers == [torch.float32] * fixed
    assert {p.dtype for p in built_engine.model.parameters()} == {torch.bfloat16}


def test_decays_match_transformers():
    """Compare with transformers' `minimax`: 2^(-8(h+1)/H) * (1 - l/(L - 1 + 1e-5) + 1e-5)."""
    from longspan.attention.linear.decays import minimax as minimax_decay

    assert minimax_decay(64, 0, 80)[[0, 63]].tolist() == pytest.approx(
        [-0.9170132, -0.00390629], rel=1e-4
    )
    assert minimax_decay(64, 79, 80)[0].item() == pytest.approx(-0.917 * 1.0126e-5, rel=1e-2)


EVERY_MIXER = {**OVERRIDES, "linear": LINEAR, "more linear": LINEAR_MORE}


@pytest.mark.parametrize("overrides", EVERY_MIXER.values(), ids=EVERY_MIXER)
def test_predicted_parameter_count_and_saved_boxes_match_the_model(engine, overrides):
    built_engine = engine(*overrides)
    weights = built_engine.weights()
    state = built_engine.state()
    assert built_engine.num_parameters == sum(weight.numel() for weight in weights.values())
    assert {
        name.removeprefix("model.") for name in state if name.startswith("model.")
    } == weights.keys()
    for name, weight in weights.items():
        saved = torch.full_like(weight, torch.nan)
        for offsets, data in state[f"model.{name}"].boxes:
            box = tuple(
                slice(offset, offset + size)
                for offset, size in zip(offsets, data.shape, strict=True)
            )
            saved[box] = data
        assert torch.equal(saved, weight), name


@pytest.mark.parametrize("path", shipped_recipes(), ids=lambda path: path.stem)
def test_predicted_shapes_of_shipped_recipes_match_the_built_model(path):
    """The model has the recipe's blocks and heads, but fewer channels."""
    from longspan.trainer.engines.megatron import MegatronEngine
    from longspan.trainer.evaluation.parity import VOCABULARY, cases, shrink

    *_, (_, recipe) = cases(shrink(load_recipe(str(path)), 2))
    one_rank = {
        "parallel": recipe.parallel.model_copy(update={"cp": 1}),
        "launch": recipe.launch.model_copy(update={"processes": 1}),
    }
    with process_group(1):
        engine = MegatronEngine(recipe.model_copy(update=one_rank), VOCABULARY)
        shapes = {
            f"{layer}.{name}": tuple(parameter.shape)
            for layer, built in enumerate(engine.model.decoder.layers)
            for name, parameter in built.mixer.named_parameters()
        }
        engine.close()
    assert shapes == {
        f"{layer}.{name}": shape
        for layer, block in enumerate(recipe.model.stack)
        for name, shape in block.parameter_shapes(recipe.model, layer).items()
    }


def test_initial_weights_depend_only_on_seed_and_name(engine):
    built_engine = engine("training.seed=3")
    weights = built_engine.weights()
    one, two = (weights[f"decoder.layers.{i}.mixer.linear_in.weight"] for i in (0, 2))
    assert not torch.equal(one, two)
    assert one.std().item() == pytest.approx(0.02, rel=0.05)
    assert weights["decoder.layers.0.mixer.linear_proj.weight"].std().item() == pytest.approx(
        0.02 / 8**0.5, rel=0.05
    )
    from longspan.trainer.model.weights import initialize

    initialize(built_engine.model, 4, 0.02, 4)
    assert not torch.equal(built_engine.weights()["decoder.layers.0.mixer.linear_in.weight"], one)
    initialize(built_engine.model, 3, 0.02, 4)
    assert torch.equal(built_engine.weights()["decoder.layers.0.mixer.linear_in.weight"], one)


def test_sinks_are_initialized_to_zero(engine):
    sinks = [
        weight
        for name, weight in engine(PATTERNS).weights().items()
        if name.endswith("mixer.sinks")
    ]
    assert torch.equal(torch.stack(sinks), torch.zeros(3, 4))


def test_our_spec_works_in_a_plain_megatron_model(engine):
    """The spec alone, in Megatron's own GPTModel, without a Sequence: each row is one document."""
    from longspan.trainer.model.layer import hybrid_stack_spec
    from megatron.core.models.gpt import GPTModel

    built_engine = engine("model.initializer_range=0.7")
    config = built_engine.model.config
    spec = hybrid_stack_spec(config, built_engine.recipe.model.stack)
    plain = GPTModel(
        config,
        spec,
        vocab_size=384,
        max_sequence_length=96,
        position_embedding_type="none",
        share_embeddings_and_output_weights=True,
    )
    weights = built_engine.weights()
    for name, parameter in plain.named_parameters():
        parameter.data.copy_(weights[name])
    tokens = torch.randint(0, 257, (2, 96))
    assert torch.equal(plain(tokens, None, None)[..., :257], built_engine.logits(tokens))
    with pytest.raises(ValueError, match="HybridLayer cannot use attention_mask"):
        plain(tokens, None, torch.ones(1, 1, 96, 96, dtype=torch.bool))


WITHOUT_GPT = """
import json, sys

for name in ("megatron.core.models.gpt", "megatron.core.models.gpt.gpt_model"):
    sys.modules[name] = None  # importing it fails, as when it has been deleted
from longspan.launch.cli import main
for command in json.loads(sys.argv[1]):
    try:
        main(command)
    except SystemExit as end:
        assert end.code in (None, 0), end.code
"""


@pytest.mark.wide
def test_the_model_needs_no_gpt_model(tiny_recipe, tmp_path):
    """It builds, trains, resumes and generates with ``GPTModel`` taken out of Megatron-core."""
    commands = [
        ["train", str(tiny_recipe), "training.steps=1"],
        ["train", str(tiny_recipe), "training.steps=2"],
        ["generate", str(tmp_path / "run"), "--prompt", "Document", "--tokens", "2"],
    ]
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT_GPT, json.dumps(commands)],
        capture_output=True,
        text=True,
        timeout=400,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "resuming from step 1" in done.stdout
    assert "\nDocument" in done.stdout
