"""Output heads that never form all logits: chunked linear cross-entropy.

Shapes: N vectors, E width, V vocabulary.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class HeadOutput(NamedTuple):
    """What a head knows about given labels, without having kept the logits."""

    loss: Tensor
    """Weighted sum of the negative log-likelihoods; carries the gradient."""
    nats: Tensor
    """[N] fp32 negative log-likelihood of every label, 0 where the weight is 0; no gradient."""
    correct: Tensor
    """[N] bool: the label is the most likely entry."""


def is_alone_at_the_top(logits: Tensor, labels: Tensor, label_logits: Tensor) -> Tensor:
    """Whether a label's logit is above all others: [N]; a tie, which bf16 has many of, counts as wrong.

    One maximum, which on a CPU is 16 times faster than argmax. `logits` [N, C] is written to and left as it was.

    Args:
        labels, label_logits: [N, 1].
    """
    logits.scatter_(1, labels, -torch.inf)
    others = logits.amax(1)
    logits.scatter_(1, labels, label_logits)
    return label_logits.squeeze(1) > others


class _LinearCrossEntropy(torch.autograd.Function):
    """Cross-entropy of a linear layer, a block of rows at a time, gradients formed in the forward pass.

    Full logits [N, V] never exist: at V = 151,936 they and their gradient dwarf everything else. The same
    plan as Liger-Kernel's fused linear cross-entropy (Hsu 2024, section 3.2), in plain torch.

    The weight's gradient is summed over the blocks in fp32 at least: in bf16 it was 1.4 % off after 128 blocks.
    For a bf16 weight the sum takes 4 V E bytes more until the end of the forward pass.
    """

    @staticmethod
    def forward(ctx, hidden, weight, labels, weights, block_rows, with_gradients):  # type: ignore[no-untyped-def]
        # `needs_input_grad` is set under `no_grad` too, where forming gradients would only cost time.
        needs_hidden, needs_weight = (with_gradients and needed for needed in ctx.needs_input_grad[:2])
        grad_hidden = torch.empty_like(hidden) if needs_hidden else None
        sum_dtype = torch.promote_types(weight.dtype, torch.float32)
        grad_weight = torch.zeros_like(weight, dtype=sum_dtype) if needs_weight else None
        # As many rows of the weight as make a product no larger than a block of logits.
        weight_rows = max(1, block_rows * weight.shape[0] // weight.shape[1])
        nats = torch.empty(hidden.shape[0], dtype=torch.float32, device=hidden.device)
        correct = torch.empty(hidden.shape[0], dtype=torch.bool, device=hidden.device)
        for start in range(0, hidden.shape[0], block_rows):
            rows = slice(start, start + block_rows)
            label, share = labels[rows, None], weights[rows, None].float()
            logits = F.linear(hidden[rows], weight).float()
            label_logits = logits.gather(1, label)
            correct[rows] = is_alone_at_the_top(logits, label, label_logits)
            log_norm = logits.logsumexp(1, keepdim=True)
            nats[rows] = (log_norm - label_logits).squeeze(1)
            if needs_hidden or needs_weight:
                grad_logits = logits.sub_(log_norm).exp_()
                grad_logits.scatter_add_(1, label, -torch.ones_like(label_logits))
                grad_logits = grad_logits.mul_(share).to(hidden.dtype)
                if grad_hidden is not None:
                    torch.mm(grad_logits, weight, out=grad_hidden[rows])
                if grad_weight is not None and sum_dtype == weight.dtype:
                    grad_weight.addmm_(grad_logits.T, hidden[rows])
                elif grad_weight is not None:
                    slices = zip(
                        grad_weight.split(weight_rows), grad_logits.split(weight_rows, 1), strict=True
                    )
                    for part, grad_part in slices:
                        part.add_(grad_part.T @ hidden[rows])
        nats.masked_fill_(weights == 0, 0.0)
        if grad_weight is not None:
            grad_weight = grad_weight.to(weight.dtype)
        ctx.save_for_backward(grad_hidden, grad_weight)
        ctx.mark_non_differentiable(nats, correct)
        return torch.dot(nats, weights.float()), nats, correct

    @staticmethod
    def backward(ctx, grad_loss, _grad_nats, _grad_correct):  # type: ignore[no-untyped-def]
        grad_hidden, grad_weight = ctx.saved_tensors
        # Scaling in place: these buffers exist for this call only.
        if grad_hidden is not None:
            grad_hidden = grad_hidden.mul_(grad_loss.to(grad_hidden.dtype))
        if grad_weight is not None:
            grad_weight = grad_weight.mul_(grad_loss.to(grad_weight.dtype))
        return grad_hidden, grad_weight, None, None, None, None


class LinearHead(nn.Module):
    """A linear classifier that can be asked for logits, or for losses without ever holding the logits.

    Its parameter is called `weight`, so it stands in for `lm_head` of a Hugging Face model unchanged.
    """

    BLOCK_ELEMENTS = 1 << 24
    """Logits formed at a time (64 MiB in fp32): large enough for full matrix-multiply speed."""

    def __init__(self, in_features: int, out_features: int):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(out_features, in_features))
        nn.init.normal_(self.weight, std=0.02)

    @property
    def block_rows(self) -> int:
        """Rows of logits formed at a time."""
        return max(16, self.BLOCK_ELEMENTS // self.weight.shape[0])

    def forward(
        self, hidden: Tensor, labels: Tensor | None = None, weights: Tensor | None = None
    ) -> Tensor | HeadOutput:
        """Logits, or the losses of `labels`.

        Args:
            hidden: [..., E].
            labels: LongTensor [...]; null asks for logits.
            weights: [...] weight of every label in the loss; 0 excludes it.

        Returns:
            Logits [..., V] without labels, else `HeadOutput` over the flattened positions.
        """
        if labels is None:
            return F.linear(hidden, self.weight)
        if weights is None:
            weights = torch.ones_like(labels, dtype=torch.float32)
        return HeadOutput(
            *_LinearCrossEntropy.apply(
                hidden.reshape(-1, hidden.shape[-1]),
                self.weight,
                labels.reshape(-1),
                weights.reshape(-1),
                self.block_rows,
                torch.is_grad_enabled(),
            )
        )
