"""The tiled loss, against ``torch.nn.functional.cross_entropy`` in fp64: value and gradients."""

import re

import pytest
import torch
import torch.nn.functional as F
from longspan.trainer.model.loss import cross_entropy_sum, token_losses
from torch.utils._python_dispatch import TorchDispatchMode

NUM_TOKENS = 37
HIDDEN = 8
VOCABULARY = 21
PADDED = 24


def make_inputs(dtype=torch.float64, tokens=NUM_TOKENS):
    generator = torch.Generator().manual_seed(0)
    # Logits with a standard deviation of about 8.
    hidden = torch.randn(tokens, HIDDEN, generator=generator, dtype=torch.float64) * 3
    weight = torch.randn(PADDED, HIDDEN, generator=generator, dtype=torch.float64)
    labels = torch.randint(VOCABULARY, (tokens,), generator=generator)
    labels[:2] = torch.tensor([0, VOCABULARY - 1])
    token_weights = torch.rand(tokens, generator=generator, dtype=torch.float64).round(decimals=1)
    return hidden.to(dtype), weight.to(dtype), labels, token_weights.to(dtype)


def plain_loss(upstream, tokens=NUM_TOKENS):
    hidden, weight, labels, token_weights = make_inputs(tokens=tokens)
    hidden.requires_grad_()
    weight.requires_grad_()
    logits = (hidden @ weight.T)[:, :VOCABULARY]
    loss = (F.cross_entropy(logits, labels, reduction="none") * token_weights).sum()
    return loss.detach(), *torch.autograd.grad(loss * upstream, (hidden, weight))


def max_error(ours, expected):
    return max(
        float((a.double() - b).norm() / b.norm()) for a, b in zip(ours, expected, strict=True)
    )


def tiled_loss(upstream, tile, dtype=torch.float64):
    hidden, weight, labels, token_weights = make_inputs(dtype)
    hidden.requires_grad_()
    weight.requires_grad_()
    loss = cross_entropy_sum(hidden, weight, labels, token_weights, None, VOCABULARY, tile)
    return loss.detach(), *torch.autograd.grad(loss * upstream, (hidden, weight))


@pytest.mark.parametrize("tile", [1, 8, 36, 37, 1000])
@pytest.mark.parametrize("upstream", [1.0, 1 / 8])
def test_value_and_gradients_match_the_plain_loss(tile, upstream):
    assert max_error(tiled_loss(upstream, tile), plain_loss(upstream)) < 1e-12
    assert max_error(tiled_loss(upstream, tile, torch.float32), plain_loss(upstream)) < 1e-6
    assert max_error(tiled_loss(upstream, tile, torch.bfloat16), plain_loss(upstream)) < 2e-2


@pytest.mark.parametrize("ranks", [2, 4, 8])
def test_the_vocabulary_may_be_split_over_ranks(threads, ranks):
    """With eight ranks, the last one has only padding."""

    def work(rank, group):
        hidden, weight, labels, token_weights = make_inputs()
        hidden.requires_grad_()
        local_weight = weight.chunk(ranks)[rank].clone().requires_grad_()
        loss = cross_entropy_sum(hidden, local_weight, labels, token_weights, group, VOCABULARY, 8)
        return loss.detach(), *torch.autograd.grad(loss / 8, (hidden, local_weight))

    losses, hidden, weights = zip(*threads(ranks, work), strict=True)
    assert all(torch.equal(loss, losses[0]) for loss in losses)
    assert max_error((losses[0], sum(hidden), torch.cat(weights)), plain_loss(1 / 8)) < 1e-12


@pytest.mark.parametrize("ranks", [1, 2, 8])
def test_token_losses_and_likeliest_labels(threads, ranks):
    hidden, weight, labels, _ = make_inputs()
    logits = (hidden @ weight.T)[:, :VOCABULARY]
    labels[10:20] = logits[10:20].argmax(1)
    hidden[3:6] = 0.0  # all labels are equally likely: the first one counts as the likeliest
    labels[3:6] = torch.tensor([0, 1, VOCABULARY - 1])
    logits = (hidden @ weight.T)[:, :VOCABULARY]
    for losses, likeliest in threads(
        ranks,
        lambda rank, group: token_losses(
            hidden, weight.chunk(ranks)[rank], labels, group, VOCABULARY, 8
        ),
    ):
        assert max_error([losses], [F.cross_entropy(logits, labels, reduction="none")]) < 1e-12
        assert torch.equal(likeliest, logits.argmax(1) == labels)
        assert likeliest[3:6].tolist() == [True, False, False]
        assert 11 <= likeliest.sum() < NUM_TOKENS


def test_only_the_requested_gradients_are_computed():
    hidden, weight, labels, token_weights = make_inputs()
    loss = cross_entropy_sum(hidden, weight, labels, token_weights, None, VOCABULARY, 8)
    assert loss.grad_fn is None
    assert max_error([loss], plain_loss(1.0)[:1]) < 1e-12
    for wanted in (0, 1):
        inputs = [hidden.clone(), weight.clone()]
        inputs[wanted].requires_grad_()
        (gradient,) = torch.autograd.grad(
            cross_entropy_sum(*inputs, labels, token_weights, None, VOCABULARY, 8), inputs[wanted]
        )
        assert max_error([gradient], [plain_loss(1.0)[1 + wanted]]) < 1e-12


class LargestResult(TorchDispatchMode):
    """Record the size of the largest result of any operation."""

    numbers = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        if isinstance(result, torch.Tensor):
            self.numbers = max(self.numbers, result.numel())
        return result


def test_no_tensor_holds_all_logits():
    hidden, weight, labels, token_weights = make_inputs(tokens=4096)
    hidden.requires_grad_()
    weight.requires_grad_()
    with LargestResult() as seen:
        cross_entropy_sum(hidden, weight, labels, token_weights, None, VOCABULARY, 64).backward()
    assert seen.numbers == hidden.numel() < 4096 * VOCABULARY


@pytest.mark.parametrize("label", [VOCABULARY, PADDED, 10**9, -1, -100])
@pytest.mark.parametrize("losses", [cross_entropy_sum, token_losses])
def test_a_label_outside_of_the_vocabulary_is_refused(label, losses):
    hidden, weight, labels, counted = make_inputs()
    labels[5] = label
    weights = [counted.clamp(min=0.5)] if losses is cross_entropy_sum else []
    message = f"labels: {label}, of token 5, is not in 0 .. {VOCABULARY - 1}; give tokens"
    with pytest.raises(ValueError, match=re.escape(message)):
        losses(hidden, weight, labels, *weights, None, VOCABULARY, 8)
    # A vocabulary without padding ends with the matrix.
    if label >= PADDED or label < 0:
        with pytest.raises(ValueError, match=rf"is not in 0 \.\. {PADDED - 1}"):
            losses(hidden, weight, labels, *weights)


def test_a_label_without_weight_may_be_anything():
    hidden, weight, labels, counted = make_inputs()
    counted[5] = 0.0
    expected = cross_entropy_sum(hidden, weight, labels, counted, None, VOCABULARY, 8)
    labels[5] = -100
    assert cross_entropy_sum(hidden, weight, labels, counted, None, VOCABULARY, 8) == expected


def test_ranks_refuse_a_label_of_none_of_them(threads):
    def work(rank, group):
        hidden, weight, labels, counted = make_inputs()
        labels[5] = PADDED
        local = weight.chunk(2)[rank].contiguous()
        with pytest.raises(ValueError, match="labels: 24, of token 5, is not in 0"):
            cross_entropy_sum(hidden, local, labels, counted + 1, group, None, 8)

    threads(2, work)


@pytest.mark.parametrize("name", ["labels", "token_weights"])
def test_labels_and_weights_are_one_for_each_token(name):
    hidden, weight, labels, counted = make_inputs()
    if name == "labels":
        labels = labels[:1]
    else:
        counted = counted[:1]
    with pytest.raises(ValueError, match=f"{name} must be one for each of the {NUM_TOKENS} tokens"):
        cross_entropy_sum(hidden, weight, labels, counted)
