"""The model against a forward pass in plain torch, and what casting must not change."""

import contextlib
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
            made = build_engine(load_recipe(str(tiny_recipe), list(overrides)))
            stack.callback(made.close)
            return made

        yield build


def rms(x, weight, eps):
    return x / (x.square().mean(-1, keepdim=True) + eps).sqrt() * weight


def rotate(x, at, dim, theta):
    pairs = dim // 2
    angles = at[:, None] * torch.tensor(
        [theta ** (-2 * i / dim) for i in range(pairs)], dtype=torch.float64
    )
    cos, sin = angles.cos()[:, None], angles.sin()[:, None]
    a, b = x[..., :pairs], x[..., pairs:dim]
    return torch.cat([a * cos - b * sin, b * cos + a * sin, x[..., dim:]], -1)


def seen(block, head, heads, at):
    """What KV head ``head`` of ``heads`` sees of one document, [queries, keys]."""
    i, j = at[:, None], at
    if block.mixer == "full":
        mask = i >= 0
    elif block.mixer == "window":
        mask = i - j < block.window
    elif block.mixer == "streaming":
        mask = (i - j < block.window) | (j < block.sinks)
    elif block.mixer == "s2":
        away, striped = i // block.block - j // block.block, heads - block.dense_heads
        shift = (head - block.dense_heads) * max(1, block.stride // striped) + block.offset
        mask = (away < block.local_blocks) | ((j // block.block + shift) % block.stride == 0)
        if block.near:
            mask = mask | (away < block.near[0]) & ((j // block.block + shift) % block.near[1] == 0)
        mask = mask | (head < block.dense_heads)
    else:  # the expression in the stack of patterns, for its two heads
        away = i // 2 - j // 2
        own = [(i - j < 5) | (j < 2), (away % 3 == 0) & (away < 12)][head]
        mask = own | ((j // 4 + head * 3) % 6 == 0)
    return mask & (i >= j)


def softmax_attention(x, w, model, block, at):
    """One document [tokens, hidden]: dense masks, one head at a time."""
    group, dim = model.num_attention_heads // model.kv_heads, model.kv_channels
    outs = []
    for kv, rows in enumerate((x @ w["mixer.linear_in.weight"].T).chunk(model.kv_heads, -1)):
        heads = list(rows.split(dim, -1))
        queries, rest = heads[:group], heads[group:]
        gates = [rest.pop(0) for _ in range(group)] if block.output_gate else [None] * group
        key, value = rest
        if block.qk_norm:
            queries = [rms(q, w["mixer.q_layernorm.weight"], model.rms_norm_eps) for q in queries]
            key = rms(key, w["mixer.k_layernorm.weight"], model.rms_norm_eps)
        turn = int(dim * block.rotary_fraction)
        key = rotate(key[:, None], at, turn, model.rope_theta)[:, 0] if turn else key
        mask = seen(block, kv, model.kv_heads, at)
        for query, gate in zip(queries, gates, strict=True):
            query = rotate(query[:, None], at, turn, model.rope_theta)[:, 0] if turn else query
            logits = query @ key.T / dim**0.5
            if block.softcap:
                logits = block.softcap * (logits / block.softcap).tanh()
            weights = logits.masked_fill(~mask, -torch.inf).exp()
            sink = w["mixer.sinks"][len(outs)].exp() if block.attention_sink else 0
            out = weights @ value / (weights.sum(-1, keepdim=True) + sink)
            outs.append(out if gate is None else out * torch.sigmoid(gate))
    return torch.cat(outs, -1) @ w["mixer.linear_proj.weight"].T


def lightning(x, w, model, block, layer):
    """One document, token by token, with the slopes of MiniMax-01."""
    outs, gates, heads = [], [], block.num_heads or model.num_attention_heads
    for head, rows in enumerate((x @ w["mixer.linear_in.weight"].T).chunk(heads, -1)):
        q, k, v, *gate = rows.split(model.num_attention_heads * model.kv_channels // heads, -1)
        slope = 2 ** (-8 * (head + 1) / heads)
        decay = (
            torch.tensor(-slope * (1 - layer / (model.num_hidden_layers - 1 + 1e-5) + 1e-5))
            .float()
            .double()
            .exp()
        )
        state, steps = 0, []
        for q_t, k_t, v_t in zip(F.silu(q), F.silu(k), F.silu(v), strict=True):
            state = decay * state + torch.outer(k_t, v_t)
            steps.append(q_t @ state)
        outs.append(torch.stack(steps))
        gates += gate
    out = rms(torch.cat(outs, -1), w["mixer.norm.weight"], model.rms_norm_eps)
    return (out * torch.sigmoid(torch.cat(gates, -1)) if gates else out) @ w[
        "mixer.linear_proj.weight"
    ].T


def plain_forward(tokens, weights, model):
    """Logits [tokens, vocab] of one document in fp64."""
    weights = {name: weight.double() for name, weight in weights.items()}
    x, at = weights["embedding.word_embeddings.weight"][tokens], torch.arange(len(tokens))
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
            return softmax_attention(x, w, model, block, at)

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
def test_logits_are_those_of_a_plain_forward(engine, overrides):
    made = engine("model.initializer_range=0.7", *overrides)
    weights, model = made.weights(), made.recipe.model
    for name in (name for name in weights if name.endswith("mixer.sinks")):
        weights[name] = torch.tensor([-1.0, 0.5, 1.0, 3.0])
    made.load_weights(weights)
    lengths = [41, 1, 54]
    tokens = torch.randint(0, 257, (1, 96), generator=torch.Generator().manual_seed(0))
    documents = torch.repeat_interleave(torch.arange(3, dtype=torch.int32), torch.tensor(lengths))[
        None
    ]
    with torch.no_grad():
        ours = made.model(
            tokens, None, None, packed_seq_params=Sequence(Layout.contiguous(96), 0, documents)
        )[0, :, :257]
    pieces = [plain_forward(piece, weights, model)[:, :257] for piece in tokens[0].split(lengths)]
    expected = torch.cat(pieces)
    assert expected.std() > 5, "flat logits hide errors"
    assert (ours - expected).norm() / expected.norm() < 1e-5
    assert (made.logits(tokens[:, :41])[0] - pieces[0]).norm() / pieces[0].norm() < 1e-5
    losses, likeliest = made.token_losses(tokens[:, :40], tokens[:, 1:41])
    asked = F.cross_entropy(pieces[0][:40], tokens[0, 1:41], reduction="none")
    assert (losses[0] - asked).norm() / asked.norm() < 1e-5
    assert torch.equal(likeliest[0], pieces[0][:40].argmax(1) == tokens[0, 1:41])


def test_the_loss_is_over_the_real_vocabulary(engine):
    made = engine("model.initializer_range=0.7")
    tokens = torch.randint(0, 257, (1, 97), generator=torch.Generator().manual_seed(0))
    weights = torch.arange(96.0)[None] / 96
    loss = made.model(tokens[:, :-1], None, None, labels=tokens[:, 1:], loss_mask=weights)
    expected = F.cross_entropy(
        plain_forward(tokens[0, :-1], made.weights(), made.recipe.model)[:, :257],
        tokens[0, 1:],
        reduction="none",
    )
    assert float(loss.detach()) == pytest.approx(float((expected * weights[0]).sum()), rel=1e-5)


def test_decays_stay_fp32_when_the_model_is_cast(engine):
    from longspan.attention.linear.decays import minimax as minimax_decay

    made = engine("training.dtype=bfloat16")
    decays = {
        name: buffer for name, buffer in made.model.named_buffers() if name.endswith("decay.log")
    }
    assert len(decays) == 2
    for name, decay in decays.items():
        assert decay.dtype == torch.float32, name
        assert torch.equal(decay, minimax_decay(8, int(name.split(".")[2]), 4)), name
    assert {p.dtype for p in made.model.parameters()} == {torch.bfloat16}


@pytest.mark.parametrize(
    ("stack", "fixed", "learned"),
    [(LINEAR, 1, 4), (LINEAR_MORE, 3, 1)],
    ids=["linear", "more linear"],
)
def test_every_mixer_decays_in_fp32_when_the_model_is_cast(
    engine, monkeypatch, stack, fixed, learned
):
    from longspan.trainer.layers import linear_mixer as linear

    made, seen = engine("training.dtype=bfloat16", *stack), []

    def watched(q, k, v, *where, decay=None, **rest):
        seen.extend([] if decay is None else [decay.dtype])
        assert {q.dtype, k.dtype, v.dtype} == {torch.bfloat16}
        return attend(q, k, v, *where, decay=decay, **rest)

    attend = linear.linear_attention
    monkeypatch.setattr(linear, "linear_attention", watched)
    assert made.logits(torch.randint(0, 257, (1, 96))).isfinite().all()
    assert seen == [torch.float32] * (fixed + learned)
    buffers = [buffer.dtype for buffer in made.model.buffers() if buffer.is_floating_point()]
    assert buffers == [torch.float32] * fixed
    assert {p.dtype for p in made.model.parameters()} == {torch.bfloat16}


def test_decays_are_those_of_transformers():
    """Compare with transformers' `minimax`: 2^(-8(h+1)/H) * (1 - l/(L - 1 + 1e-5) + 1e-5)."""
    from longspan.attention.linear.decays import minimax as minimax_decay

    assert minimax_decay(64, 0, 80)[[0, 63]].tolist() == pytest.approx(
        [-0.9170132, -0.00390629], rel=1e-4
    )
    assert minimax_decay(64, 79, 80)[0].item() == pytest.approx(-0.917 * 1.0126e-5, rel=1e-2)


EVERY_MIXER = {**OVERRIDES, "linear": LINEAR, "more linear": LINEAR_MORE}


@pytest.mark.parametrize("overrides", EVERY_MIXER.values(), ids=EVERY_MIXER)
def test_parameters_are_counted_without_building_and_saved_whole(engine, overrides):
    made = engine(*overrides)
    weights, state = made.weights(), made.state()
    assert made.num_parameters == sum(weight.numel() for weight in weights.values())
    assert {
        name.removeprefix("model.") for name in state if name.startswith("model.")
    } == weights.keys()
    for name, weight in weights.items():
        saved = torch.full_like(weight, torch.nan)
        for offsets, data in state[f"model.{name}"].boxes:
            saved[
                tuple(slice(at, at + size) for at, size in zip(offsets, data.shape, strict=True))
            ] = data
        assert torch.equal(saved, weight), name


@pytest.mark.parametrize("path", shipped_recipes(), ids=lambda path: path.stem)
def test_shapes_of_shipped_recipes_are_those_of_the_built_model(path):
    """With the recipe's blocks and heads, and fewer channels."""
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


def test_initial_weights_depend_on_seed_and_name_alone(engine):
    made = engine("training.seed=3")
    weights = made.weights()
    one, two = (weights[f"decoder.layers.{i}.mixer.linear_in.weight"] for i in (0, 2))
    assert not torch.equal(one, two)
    assert one.std().item() == pytest.approx(0.02, rel=0.05)
    assert weights["decoder.layers.0.mixer.linear_proj.weight"].std().item() == pytest.approx(
        0.02 / 8**0.5, rel=0.05
    )
    from longspan.trainer.model.weights import initialize

    initialize(made.model, 4, 0.02, 4)
    assert not torch.equal(made.weights()["decoder.layers.0.mixer.linear_in.weight"], one)
    initialize(made.model, 3, 0.02, 4)
    assert torch.equal(made.weights()["decoder.layers.0.mixer.linear_in.weight"], one)


def test_sinks_begin_at_zero(engine):
    sinks = [
        weight
        for name, weight in engine(PATTERNS).weights().items()
        if name.endswith("mixer.sinks")
    ]
    assert torch.equal(torch.stack(sinks), torch.zeros(3, 4))


def test_our_spec_in_a_plain_megatron_model(engine):
    """A Megatron user takes the spec alone: stock GPTModel, no Sequence, one document a row."""
    from longspan.trainer.model.layer import hybrid_stack_spec
    from megatron.core.models.gpt import GPTModel

    made = engine("model.initializer_range=0.7")
    config = made.model.config
    spec = hybrid_stack_spec(config, made.recipe.model.stack)
    plain = GPTModel(
        config,
        spec,
        vocab_size=384,
        max_sequence_length=96,
        position_embedding_type="none",
        share_embeddings_and_output_weights=True,
    )
    weights = made.weights()
    for name, parameter in plain.named_parameters():
        parameter.data.copy_(weights[name])
    tokens = torch.randint(0, 257, (2, 96))
    assert torch.equal(plain(tokens, None, None)[..., :257], made.logits(tokens))
    with pytest.raises(ValueError, match="HybridLayer cannot use attention_mask"):
        plain(tokens, None, torch.ones(1, 1, 96, 96, dtype=torch.bool))


WITHOUT_GPT = """
import runpy, sys

for name in ("megatron.core.models.gpt", "megatron.core.models.gpt.gpt_model"):
    sys.modules[name] = None  # importing it fails, as when it has been deleted
sys.argv[0] = "longspan"
runpy.run_module("longspan", run_name="__main__")
"""


def test_the_model_needs_no_gpt_model(tiny_recipe, tmp_path):
    """It builds, trains, resumes and generates with ``GPTModel`` taken out of Megatron-core."""

    def run(*arguments):
        command = [sys.executable, "-c", WITHOUT_GPT, *map(str, arguments)]
        done = subprocess.run(command, capture_output=True, text=True, timeout=400, check=False)
        assert done.returncode == 0, done.stderr
        return done.stdout

    run("train", tiny_recipe, "training.steps=1")
    assert "resuming from step 1" in run("train", tiny_recipe, "training.steps=2")
    assert run("generate", tmp_path / "run", "--prompt", "Document", "--tokens", 2)
