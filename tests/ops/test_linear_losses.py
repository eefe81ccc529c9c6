"""linear_cross_entropy and linear_kl_divergence against full logits: values, gradients, shards of the vocabulary."""

import threading

import pytest
import torch
import torch.nn.functional as F

from nanotrain.model.batch import MicroBatch
from nanotrain.ops.kl_divergence import linear_kl_divergence, linear_kl_divergence_ref
from nanotrain.ops.linear_cross_entropy import (
    IGNORE_INDEX,
    linear_cross_entropy,
    linear_cross_entropy_ref,
    token_log_probabilities,
    token_log_probabilities_ref,
)
from nanotrain.ops.vocab_shard import VocabShard

B, S, D, V = 2, 9, 12, 31


def inputs(dtype=torch.float64, width=D, seed=0):
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(B, S, width, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()
    weight = torch.randn(V, width, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()
    labels = torch.randint(0, V, (B, S), generator=generator)
    labels[0, 3:5] = -100
    return hidden, weight, labels


def gradients(loss, *tensors):
    return torch.autograd.grad(loss * 0.37, tensors)


@pytest.mark.parametrize("chunk", [1, 4, 100, None])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 2e-5)])
def test_cross_entropy_equals_full_logits(chunk, dtype, tolerance):
    hidden, weight, labels = inputs(dtype)
    loss = linear_cross_entropy(hidden, weight, labels, chunk_tokens=chunk)
    wide_hidden, wide_weight = (t.detach().double().requires_grad_() for t in (hidden, weight))
    expected = F.cross_entropy((wide_hidden @ wide_weight.T).flatten(0, 1), labels.flatten(), reduction="sum")
    torch.testing.assert_close(loss.double(), expected, rtol=tolerance, atol=tolerance)
    for got, want in zip(gradients(loss, hidden, weight), gradients(expected, wide_hidden, wide_weight), strict=True):
        torch.testing.assert_close(got.double(), want, rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(linear_cross_entropy_ref(hidden, weight, labels).double(), expected)


@pytest.mark.parametrize("temperature", [1.0, 2.5])
@pytest.mark.parametrize("chunk", [1, 5, None])
def test_kl_divergence_equals_brute_force(temperature, chunk):
    hidden, weight, labels = inputs()
    teacher_hidden, teacher_weight, _ = inputs(width=D + 3, seed=1)
    mask = labels != -100
    loss = linear_kl_divergence(
        hidden, weight, teacher_hidden, teacher_weight, mask, temperature=temperature, chunk_tokens=chunk
    )
    expected = torch.zeros((), dtype=torch.float64)
    for b in range(B):
        for s in range(S):
            if mask[b, s]:
                student = (weight @ hidden[b, s]) / temperature
                teacher = ((teacher_weight @ teacher_hidden[b, s]) / temperature).detach()
                p, q = teacher.softmax(0), student.softmax(0)
                expected = expected + temperature**2 * (p * (p.log() - q.log())).sum()
    torch.testing.assert_close(loss, expected, rtol=1e-11, atol=1e-11)
    for got, want in zip(gradients(loss, hidden, weight), gradients(expected, hidden, weight), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-11)
    ref = linear_kl_divergence_ref(hidden, weight, teacher_hidden, teacher_weight, mask, temperature=temperature)
    torch.testing.assert_close(ref, expected)


def test_a_teacher_equal_to_the_student_gives_zero():
    hidden, weight, labels = inputs()
    loss = linear_kl_divergence(hidden, weight, hidden, weight, labels != -100)
    assert abs(float(loss)) < 1e-12
    assert all(g.abs().max() < 1e-12 for g in gradients(loss, hidden, weight))


def test_nothing_labelled_gives_zero_and_zero_gradients():
    hidden, weight, labels = inputs()
    loss = linear_cross_entropy(hidden, weight, torch.full_like(labels, -100))
    assert float(loss) == 0
    assert all(not g.any() for g in gradients(loss, hidden, weight))


def test_positions_that_are_given_are_those_that_would_be_found():
    generator = torch.Generator().manual_seed(4)
    hidden, weight = (torch.randn(*s, generator=generator).requires_grad_() for s in ((2, 9, 5), (11, 5)))
    labels = torch.randint(0, 11, (2, 9), generator=generator)
    labels[0, :4] = IGNORE_INDEX
    results = []
    for positions in (None, (labels != IGNORE_INDEX).flatten().nonzero()[:, 0]):
        loss = linear_cross_entropy(hidden, weight, labels, positions=positions, chunk_tokens=4)
        results.append([loss, *torch.autograd.grad(loss, (hidden, weight))])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_a_batch_counts_its_labels_before_they_leave_the_cpu():
    labels = torch.tensor([[3, IGNORE_INDEX, 5]])
    batch = MicroBatch(torch.zeros(1, 3, dtype=torch.int64), labels)
    assert batch.to(torch.device("cpu")).label_positions is None
    there = batch.to(torch.device("meta"))
    assert there.label_positions is not None and there.label_positions.shape == (2,)


def test_bf16_autocast_stays_near_fp32_and_keeps_dtypes():
    hidden, weight, labels = inputs(torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        loss = linear_cross_entropy(hidden.bfloat16(), weight, labels)
    exact = linear_cross_entropy(hidden, weight, labels)
    assert loss.dtype == torch.float32
    assert abs(float(loss) - float(exact)) < 0.02 * abs(float(exact))
    assert torch.autograd.grad(loss, weight)[0].dtype == torch.float32


def test_log_probabilities_equal_log_softmax():
    hidden, weight, labels = inputs()
    got = token_log_probabilities(hidden, weight, labels, chunk_tokens=4)
    torch.testing.assert_close(got, token_log_probabilities_ref(hidden, weight, labels))
    assert not got[labels == -100].any()
    torch.testing.assert_close(-got.sum(), linear_cross_entropy(hidden, weight, labels).detach())


class Ranks:
    """Two threads that all-reduce with each other."""

    def __init__(self, size: int) -> None:
        self.barrier = threading.Barrier(size)
        self.slots = [None] * size

    def reduce(self, rank: int, how):
        def all_reduce(tensor):
            self.slots[rank] = tensor.clone()
            self.barrier.wait()
            result = how(torch.stack(self.slots))
            self.barrier.wait()
            tensor.copy_(result)
            return tensor

        return all_reduce

    def shard(self, rank: int, first_row: int) -> VocabShard:
        return VocabShard(
            first_row, self.reduce(rank, lambda t: t.max(0).values), self.reduce(rank, lambda t: t.sum(0))
        )


@pytest.mark.parametrize("kind", ["cross_entropy", "kl"])
@pytest.mark.parametrize("cut", [5, 16, 30])
def test_sharded_vocabulary_equals_whole(kind, cut):
    hidden, weight, labels = inputs()
    teacher_hidden, teacher_weight, _ = inputs(width=D + 3, seed=1)
    ranks, results = Ranks(2), {}

    def loss_of(h, w, tw, shard):
        if kind == "kl":
            return linear_kl_divergence(
                h, w, teacher_hidden, tw, labels != -100, vocab_shard=shard, chunk_tokens=4, temperature=1.5
            )
        return linear_cross_entropy(h, w, labels, vocab_shard=shard, chunk_tokens=4)

    def run(rank, rows):
        h, w = (t.detach().clone().requires_grad_() for t in (hidden, weight[rows]))
        loss = loss_of(h, w, teacher_weight[rows].detach(), ranks.shard(rank, rows.start))
        results[rank] = (loss.detach(), *torch.autograd.grad(loss, (h, w)))

    threads = [threading.Thread(target=run, args=(r, rows)) for r, rows in enumerate((slice(0, cut), slice(cut, V)))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    whole = loss_of(hidden, weight, teacher_weight, None)
    hidden_gradient, weight_gradient = torch.autograd.grad(whole, (hidden, weight))
    for rank in (0, 1):
        torch.testing.assert_close(results[rank][0], whole.detach(), rtol=1e-11, atol=1e-11)
    torch.testing.assert_close(results[0][1] + results[1][1], hidden_gradient, rtol=1e-9, atol=1e-11)
    torch.testing.assert_close(torch.cat([results[0][2], results[1][2]]), weight_gradient, rtol=1e-9, atol=1e-11)
