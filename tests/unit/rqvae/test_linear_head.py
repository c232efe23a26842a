"""The blockwise linear cross-entropy against torch's own in fp64."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from rqvae.linear_head import HeadOutput, LinearHead

NUM_ROWS, WIDTH, VOCAB_SIZE = 53, 24, 97


def make(dtype: torch.dtype) -> tuple[LinearHead, Tensor, Tensor, Tensor]:
    torch.manual_seed(0)
    head = LinearHead(WIDTH, VOCAB_SIZE).to(dtype)
    torch.nn.init.normal_(head.weight, std=0.5)
    hidden = torch.randn(NUM_ROWS, WIDTH, dtype=dtype, requires_grad=True)
    labels = torch.randint(VOCAB_SIZE, (NUM_ROWS,))
    weights = torch.rand(NUM_ROWS)
    weights[::5] = 0
    return head, hidden, labels, weights


@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float64, 1e-6), (torch.float32, 2e-6), (torch.bfloat16, 3e-2)]
)
@pytest.mark.parametrize("block_rows", [16, 17, 53, 1000])
def test_loss_and_gradients_equal_cross_entropy(
    monkeypatch: pytest.MonkeyPatch, block_rows: int, dtype: torch.dtype, tolerance: float
) -> None:
    monkeypatch.setattr(LinearHead, "BLOCK_ELEMENTS", block_rows * VOCAB_SIZE)
    head, hidden, labels, weights = make(dtype)
    out = head(hidden, labels, weights)
    (3 * out.loss).backward()  # 3: the gradient from above must be passed on

    exact_hidden = hidden.detach().double().requires_grad_()
    exact_weight = head.weight.detach().double().requires_grad_()
    nats = F.cross_entropy(exact_hidden @ exact_weight.T, labels, reduction="none")
    loss = (nats * weights.double()).sum()
    (3 * loss).backward()

    # Logits are kept in fp32 at most, so fp64 inputs agree to fp32 precision.
    scale = float(exact_weight.grad.abs().max())  # type: ignore[union-attr]
    torch.testing.assert_close(out.loss.double(), loss, rtol=tolerance, atol=0)
    torch.testing.assert_close(out.nats.double(), nats * (weights > 0), rtol=tolerance, atol=tolerance)
    for actual, expected in ((hidden.grad, exact_hidden.grad), (head.weight.grad, exact_weight.grad)):
        assert actual.dtype == dtype
        torch.testing.assert_close(actual.double(), expected, rtol=tolerance, atol=tolerance * scale)


def test_labels_of_weight_zero_count_for_nothing() -> None:
    head, hidden, labels, weights = make(torch.float32)
    excluded = weights == 0
    out = head(hidden, labels, weights)
    out.loss.backward()
    assert (out.nats[excluded] == 0).all()
    assert (out.nats[~excluded] > 0).all()
    assert (hidden.grad[excluded] == 0).all()
    expected = head.weight.grad
    head.weight.grad = None
    others = torch.where(excluded, (labels + 1) % VOCAB_SIZE, labels)
    changed = torch.where(excluded[:, None], 7.0, hidden.detach())
    again = head(changed, others, weights)
    again.loss.backward()
    torch.testing.assert_close(again.loss, out.loss)
    torch.testing.assert_close(head.weight.grad, expected)


def test_weight_gradients_in_bf16_do_not_grow_less_exact_with_the_number_of_blocks(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    torch.manual_seed(0)
    head = LinearHead(WIDTH, VOCAB_SIZE).to(torch.bfloat16)
    hidden, labels = torch.randn(2048, WIDTH, dtype=torch.bfloat16), torch.randint(VOCAB_SIZE, (2048,))
    exact_weight = head.weight.detach().double().requires_grad_()
    F.cross_entropy(hidden.double() @ exact_weight.T, labels, reduction="sum").backward()
    monkeypatch.setattr(LinearHead, "BLOCK_ELEMENTS", 16 * VOCAB_SIZE)  # 128 blocks
    head(hidden, labels).loss.backward()
    assert head.weight.grad.dtype == torch.bfloat16
    error = (head.weight.grad.double() - exact_weight.grad).norm() / exact_weight.grad.norm()
    assert error < 3e-3, error  # rounding to bf16 once costs about 1.7e-3, a sum in bf16 more than 1e-2


def test_correct_marks_the_most_likely_entry() -> None:
    head, hidden, labels, _ = make(torch.float32)
    best = head(hidden).argmax(-1)
    labels = torch.where(torch.arange(NUM_ROWS) % 2 == 0, best, (best + 1) % VOCAB_SIZE)
    assert head(hidden, labels).correct.tolist() == [i % 2 == 0 for i in range(NUM_ROWS)]


def test_default_weights_sum_over_all_labels_of_any_shape() -> None:
    head, hidden, labels, _ = make(torch.float32)
    shaped = hidden[:50].view(5, 10, WIDTH).transpose(0, 1)  # not contiguous
    shaped_labels = labels[:50].view(5, 10).T
    out = head(shaped, shaped_labels)
    torch.testing.assert_close(out.loss, F.cross_entropy(head(hidden[:50]), labels[:50], reduction="sum"))
    out.loss.backward()
    expected = torch.autograd.grad(
        F.cross_entropy(head(hidden), labels, reduction="none")[:50].sum(), hidden
    )[0]
    torch.testing.assert_close(hidden.grad, expected)


def test_no_labels_at_all() -> None:
    head, hidden, labels, weights = make(torch.float32)
    out = head(hidden[:0], labels[:0], weights[:0])
    out.loss.backward()
    assert float(out.loss.detach()) == 0
    assert (head.weight.grad == 0).all()


def test_frozen_weight_still_passes_the_gradient_on() -> None:
    head, hidden, labels, weights = make(torch.float32)
    head(hidden, labels, weights).loss.backward()
    expected, hidden.grad, head.weight.grad = hidden.grad, None, None
    head.weight.requires_grad_(False)
    head(hidden, labels, weights).loss.backward()
    assert torch.equal(hidden.grad, expected)
    assert head.weight.grad is None


def test_frozen_hidden_states_still_train_the_weight() -> None:
    head, hidden, labels, weights = make(torch.float32)
    head(hidden, labels, weights).loss.backward()
    expected, head.weight.grad = head.weight.grad, None
    head(hidden.detach(), labels, weights).loss.backward()
    assert torch.equal(head.weight.grad, expected)


class _LargestTensor(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, tuple) else (out,):
            if isinstance(tensor, Tensor):
                self.numel = max(self.numel, tensor.numel())
        return out


def test_full_logits_never_exist(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(LinearHead, "BLOCK_ELEMENTS", 16 * VOCAB_SIZE)
    head, hidden, labels, weights = make(torch.float32)
    with _LargestTensor() as largest:
        head(hidden, labels, weights).loss.backward()
    assert largest.numel <= max(16 * VOCAB_SIZE, WIDTH * VOCAB_SIZE) < NUM_ROWS * VOCAB_SIZE


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
def test_scoring_without_gradients_does_no_work_for_them(context: type) -> None:
    head, hidden, labels, weights = make(torch.float32)
    expected = head(hidden, labels, weights)
    hidden = hidden.detach()
    with context(), _Matmuls() as matmuls:
        out: HeadOutput = head(hidden, labels, weights)
    assert matmuls.count == 1
    assert torch.equal(out.nats, expected.nats)
    assert torch.equal(out.correct, expected.correct)


class _Matmuls(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        self.count += func.overloadpacket.__name__ in ("mm", "addmm", "addmm_", "matmul", "linear")
        return func(*args, **(kwargs or {}))
