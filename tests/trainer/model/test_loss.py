"""The tiled loss, against ``torch.nn.functional.cross_entropy`` in fp64: value and gradients."""

import pytest
import torch
import torch.nn.functional as F
from longspan.trainer.model.loss import cross_entropy_sum, token_losses
from torch.utils._python_dispatch import TorchDispatchMode

TOKENS, HIDDEN, VOCABULARY, PADDED = 37, 8, 21, 24


def problem(dtype=torch.float64, tokens=TOKENS):
    generator = torch.Generator().manual_seed(0)
    hidden = (
        torch.randn(tokens, HIDDEN, generator=generator, dtype=torch.float64) * 3
    )  # logits with a std of about 8
    weight = torch.randn(PADDED, HIDDEN, generator=generator, dtype=torch.float64)
    labels = torch.randint(VOCABULARY, (tokens,), generator=generator)
    labels[:2] = torch.tensor([0, VOCABULARY - 1])
    counted = torch.rand(tokens, generator=generator, dtype=torch.float64).round(decimals=1)
    return hidden.to(dtype), weight.to(dtype), labels, counted.to(dtype)


def plain(upstream, tokens=TOKENS):
    hidden, weight, labels, counted = problem(tokens=tokens)
    hidden.requires_grad_(), weight.requires_grad_()
    loss = (
        F.cross_entropy((hidden @ weight.T)[:, :VOCABULARY], labels, reduction="none") * counted
    ).sum()
    return loss.detach(), *torch.autograd.grad(loss * upstream, (hidden, weight))


def error(ours, expected):
    return max(
        float((a.double() - b).norm() / b.norm()) for a, b in zip(ours, expected, strict=True)
    )


def tiled(upstream, tile, dtype=torch.float64):
    hidden, weight, labels, counted = problem(dtype)
    hidden.requires_grad_(), weight.requires_grad_()
    loss = cross_entropy_sum(hidden, weight, labels, counted, None, VOCABULARY, tile)
    return loss.detach(), *torch.autograd.grad(loss * upstream, (hidden, weight))


@pytest.mark.parametrize("tile", [1, 8, 36, 37, 1000])
@pytest.mark.parametrize("upstream", [1.0, 1 / 8])
def test_it_is_the_plain_loss(tile, upstream):
    assert error(tiled(upstream, tile), plain(upstream)) < 1e-12
    assert error(tiled(upstream, tile, torch.float32), plain(upstream)) < 1e-6
    assert error(tiled(upstream, tile, torch.bfloat16), plain(upstream)) < 2e-2


@pytest.mark.parametrize("ranks", [2, 4, 8])
def test_ranks_share_the_vocabulary(threads, ranks):
    """The last of eight has padding alone."""

    def work(rank, group):
        hidden, weight, labels, counted = problem()
        hidden.requires_grad_()
        mine = weight.chunk(ranks)[rank].clone().requires_grad_()
        loss = cross_entropy_sum(hidden, mine, labels, counted, group, VOCABULARY, 8)
        return loss.detach(), *torch.autograd.grad(loss / 8, (hidden, mine))

    losses, hidden, weights = zip(*threads(ranks, work), strict=True)
    assert all(torch.equal(loss, losses[0]) for loss in losses)
    assert error((losses[0], sum(hidden), torch.cat(weights)), plain(1 / 8)) < 1e-12


@pytest.mark.parametrize("ranks", [1, 2, 8])
def test_the_losses_of_tokens_and_which_are_likeliest(threads, ranks):
    hidden, weight, labels, _ = problem()
    logits = (hidden @ weight.T)[:, :VOCABULARY]
    labels[10:20] = logits[10:20].argmax(1)
    hidden[3:6] = 0.0  # all are as likely: the first is said
    labels[3:6] = torch.tensor([0, 1, VOCABULARY - 1])
    logits = (hidden @ weight.T)[:, :VOCABULARY]
    for losses, likeliest in threads(
        ranks,
        lambda rank, group: token_losses(
            hidden, weight.chunk(ranks)[rank], labels, group, VOCABULARY, 8
        ),
    ):
        assert error([losses], [F.cross_entropy(logits, labels, reduction="none")]) < 1e-12
        assert torch.equal(likeliest, logits.argmax(1) == labels)
        assert likeliest[3:6].tolist() == [True, False, False]
        assert 11 <= likeliest.sum() < TOKENS


def test_only_what_is_asked_for_is_made():
    hidden, weight, labels, counted = problem()
    loss = cross_entropy_sum(hidden, weight, labels, counted, None, VOCABULARY, 8)
    assert loss.grad_fn is None
    assert error([loss], plain(1.0)[:1]) < 1e-12
    for wanted in (0, 1):
        inputs = [hidden.clone(), weight.clone()]
        inputs[wanted].requires_grad_()
        (gradient,) = torch.autograd.grad(
            cross_entropy_sum(*inputs, labels, counted, None, VOCABULARY, 8), inputs[wanted]
        )
        assert error([gradient], [plain(1.0)[1 + wanted]]) < 1e-12


class Largest(TorchDispatchMode):
    """The most numbers that any result has."""

    numbers = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        if isinstance(result, torch.Tensor):
            self.numbers = max(self.numbers, result.numel())
        return result


def test_the_logits_are_never_whole():
    hidden, weight, labels, counted = problem(tokens=4096)
    hidden.requires_grad_(), weight.requires_grad_()
    with Largest() as seen:
        cross_entropy_sum(hidden, weight, labels, counted, None, VOCABULARY, 64).backward()
    assert seen.numbers == hidden.numel() < 4096 * VOCABULARY
