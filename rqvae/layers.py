"""Building blocks shared by the codec and the latent models.

Shapes: B batch, N sequence length, E width, A attention heads, F head width, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
import torch.utils.checkpoint
from torch import Tensor, nn

from rqvae.config import mlp_width


def positions_in_documents(document_ids: Tensor) -> Tensor:
    """Position of every element counted from the start of its document.

    Args:
        document_ids: LongTensor [B, N]; a document is a run of equal values (0 is padding, also a run).

    Returns:
        LongTensor [B, N].
    """
    index = torch.arange(document_ids.shape[1], device=document_ids.device).expand_as(document_ids)
    is_start = torch.ones_like(document_ids, dtype=torch.bool)
    is_start[:, 1:] = document_ids[:, 1:] != document_ids[:, :-1]
    return index - torch.where(is_start, index, 0).cummax(dim=1).values


def causal_document_mask(query_documents: Tensor, key_documents: Tensor) -> Tensor:
    """Which keys every query may see: earlier or equal position, same document.

    The queries are the last `Q` of the `N` key positions. Padding (document 0) sees padding only, so no
    row is empty.

    Args:
        query_documents: LongTensor [B, Q].
        key_documents: LongTensor [B, N], N >= Q.

    Returns:
        BoolTensor [B, 1, Q, N], True where attention is allowed.
    """
    num_queries, num_keys = query_documents.shape[1], key_documents.shape[1]
    causal = torch.ones(num_queries, num_keys, dtype=torch.bool, device=key_documents.device)
    causal = causal.tril(diagonal=num_keys - num_queries)
    return (causal & (query_documents[:, :, None] == key_documents[:, None, :]))[:, None]


def document_mask(query_documents: Tensor, key_documents: Tensor) -> Tensor:
    """`causal_document_mask` without the causality: everything in the same document, before and after."""
    return (query_documents[:, :, None] == key_documents[:, None, :])[:, None]


class RotaryEmbedding(nn.Module):
    """Cosines and sines of rotary position embeddings (Su 2021, equation 34), computed in fp32."""

    def __init__(self, head_dim: int, theta: float):
        super().__init__()
        self.head_dim = head_dim
        self.theta = theta

    def forward(self, positions: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Args: positions LongTensor [B, N]. Returns: cos and sin, each [B, 1, N, head_dim]."""
        exponents = torch.arange(0, self.head_dim, 2, device=positions.device, dtype=torch.float32)
        frequencies = self.theta ** (-exponents / self.head_dim)
        angles = positions[:, None, :, None].float() * frequencies
        angles = torch.cat([angles, angles], dim=-1)
        return angles.cos().to(dtype), angles.sin().to(dtype)


def rotate(x_BANF: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Apply rotary embeddings to queries or keys."""
    first, second = x_BANF.chunk(2, dim=-1)
    return x_BANF * cos + torch.cat([-second, first], dim=-1) * sin


class LayerCache:
    """Keys and values of one attention layer in buffers allocated once.

    Args: see `TransformerCache`.
    """

    def __init__(self, batch_size: int, num_heads: int, max_length: int, head_dim: int, like: Tensor):
        shape = (batch_size, num_heads, max_length, head_dim)
        self.keys = like.new_zeros(shape)
        self.values = like.new_zeros(shape)

    def append(self, keys: Tensor, values: Tensor, start: int) -> tuple[Tensor, Tensor]:
        """Write [B, A, N, F] at `start` and return all keys and values up to the end of what was written."""
        end = start + keys.shape[2]
        self.keys[:, :, start:end] = keys
        self.values[:, :, start:end] = values
        return self.keys[:, :, :end], self.values[:, :, :end]

    def select(self, rows: Tensor) -> None:
        """Go on from these rows: LongTensor [b], each named any number of times, or not at all."""
        self.keys, self.values = self.keys[rows], self.values[rows]


class TransformerCache:
    """State of a `TransformerBlock` between calls: one `LayerCache` per layer, and how much is filled.

    Args:
        rotary: cos and sin by position, each [max_length, F]; None for a block without.
    """

    def __init__(
        self, layers: list[LayerCache], max_length: int, rotary: tuple[Tensor, Tensor] | None = None
    ):
        self.layers = layers
        self.max_length = max_length
        self.rotary = rotary
        self.length = 0

    def reset(self) -> None:
        """Forget everything; the buffers are reused."""
        self.length = 0

    def select(self, rows: Tensor) -> None:
        """Go on from these rows: LongTensor [b], each named any number of times, or not at all."""
        for layer in self.layers:
            layer.select(rows)


class RoPEAttention(nn.Module):
    """Multi-head self-attention with rotary positions (or none)."""

    def __init__(self, dim: int, head_dim: int, has_biases: bool = False):
        super().__init__()
        self.num_heads = dim // head_dim
        self.head_dim = head_dim
        self.qkv_proj = nn.Linear(dim, 3 * dim, bias=has_biases)
        self.out_proj = nn.Linear(dim, dim, bias=has_biases)

    def forward(
        self,
        x_BNE: Tensor,
        rotary: tuple[Tensor, Tensor] | None,
        mask: Tensor | None,
        cache: LayerCache | None = None,
        cache_start: int = 0,
    ) -> Tensor:
        """Attend causally.

        Args:
            x_BNE: [B, N, E].
            rotary: cos and sin for the N positions; None leaves positions to the input.
            mask: bool [B, 1, N, keys], or None for plain causal attention over one document.
            cache: keys and values of the positions before `cache_start`; extended in place.

        Returns:
            [B, N, E].
        """
        batch, length, dim = x_BNE.shape
        qkv = (
            self.qkv_proj(x_BNE).view(batch, length, 3, self.num_heads, self.head_dim).permute(2, 0, 3, 1, 4)
        )
        queries, keys, values = qkv.unbind(0)
        if rotary is not None:
            queries, keys = rotate(queries, *rotary), rotate(keys, *rotary)
        if cache is not None:
            keys, values = cache.append(keys, values, cache_start)
        # Without a mask, plain causal attention is right only when queries and keys start together; a
        # single new query may see everything.
        is_causal = mask is None and length > 1
        attended = F.scaled_dot_product_attention(queries, keys, values, attn_mask=mask, is_causal=is_causal)
        return self.out_proj(attended.transpose(1, 2).reshape(batch, length, dim))


class SwiGLU(nn.Module):
    """Gated feed-forward layer, down(silu(gate(x)) * up(x)) (Shazeer 2020, equation 6)."""

    def __init__(self, dim: int, hidden_dim: int):
        super().__init__()
        self.gate_up_proj = nn.Linear(dim, 2 * hidden_dim, bias=False)
        self.down_proj = nn.Linear(hidden_dim, dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """[..., E] -> [..., E]."""
        gate, up = self.gate_up_proj(x).chunk(2, dim=-1)
        return self.down_proj(F.silu(gate) * up)


class SwiGLUTransformerLayer(nn.Module):
    """One pre-norm layer: rotary attention, then SwiGLU."""

    def __init__(self, dim: int, head_dim: int, mlp_dim: int, has_biases: bool = False):
        super().__init__()
        # LayerNorm and not RMSNorm, because torch has a fused kernel for it on every device.
        self.attention_norm = nn.LayerNorm(dim, bias=has_biases)
        self.attention = RoPEAttention(dim, head_dim, has_biases)
        self.mlp_norm = nn.LayerNorm(dim, bias=has_biases)
        self.mlp = SwiGLU(dim, mlp_dim)

    def forward(
        self,
        x_BNE: Tensor,
        rotary: tuple[Tensor, Tensor] | None,
        mask: Tensor | None,
        cache: LayerCache | None = None,
        cache_start: int = 0,
    ) -> Tensor:
        """[B, N, E] -> [B, N, E]; arguments as in `RoPEAttention`."""
        x_BNE = x_BNE + self.attention(self.attention_norm(x_BNE), rotary, mask, cache, cache_start)
        return x_BNE + self.mlp(self.mlp_norm(x_BNE))


class TransformerBlock(nn.Module):
    """A causal stack of `SwiGLUTransformerLayer`s that keeps packed documents apart, with a final norm.

    Args:
        rope_theta: base of the rotary positions; None for a stack whose inputs carry their positions.
        has_biases: of attention and its norms.
    """

    def __init__(
        self,
        dim: int,
        num_layers: int,
        head_dim: int,
        mlp_ratio: float,
        rope_theta: float | None,
        has_norm: bool = True,
        has_biases: bool = False,
    ):
        super().__init__()
        self.num_heads = dim // head_dim
        self.head_dim = head_dim
        self.rotary = None if rope_theta is None else RotaryEmbedding(head_dim, rope_theta)
        self.layers: Sequence[SwiGLUTransformerLayer] = nn.ModuleList(  # type: ignore[assignment]
            SwiGLUTransformerLayer(dim, head_dim, mlp_width(dim, mlp_ratio), has_biases)
            for _ in range(num_layers)
        )
        self.norm = nn.LayerNorm(dim, bias=False) if has_norm else nn.Identity()
        self.gradient_checkpointing = False
        for layer in self.layers:
            for projection in (layer.attention.qkv_proj, layer.mlp.gate_up_proj):
                nn.init.normal_(projection.weight, std=0.02)
            # Residual branches start small in deep stacks (Radford 2019, section 2.3).
            for projection in (layer.attention.out_proj, layer.mlp.down_proj):
                nn.init.normal_(projection.weight, std=0.02 / (2 * num_layers) ** 0.5)

    def new_cache(self, batch_size: int, max_length: int, like: Tensor) -> TransformerCache:
        """Empty cache for `max_length` positions with the dtype and device of `like`."""
        layers = [
            LayerCache(batch_size, self.num_heads, max_length, self.head_dim, like)
            for _ in range(len(self.layers))
        ]
        rotary = None
        if self.rotary is not None:
            cos, sin = self.rotary(torch.arange(max_length, device=like.device)[None], like.dtype)
            rotary = (cos[0, 0], sin[0, 0])
        return TransformerCache(layers, max_length, rotary)

    def forward(
        self,
        x_BNE: Tensor,
        positions: Tensor | None,
        mask: Tensor | None = None,
        cache: TransformerCache | None = None,
    ) -> Tensor:
        """Run the stack.

        Args:
            x_BNE: [B, N, E].
            positions: LongTensor [B, N] or [1, N], position inside the document; not used without rotary.
            mask: bool [B, 1, N, keys]; None means one document and no padding.
            cache: filled with the positions before; extended in place.

        Returns:
            [B, N, E].

        Raises:
            ValueError: several positions at once are appended to a filled cache without a mask, or the
                cache is full.
        """
        start = cache.length if cache is not None else 0
        if cache is not None:
            if start and mask is None and x_BNE.shape[1] > 1:
                raise ValueError("appending several positions to a filled cache needs a mask")
            if start + x_BNE.shape[1] > cache.max_length:
                raise ValueError(
                    f"the cache holds {cache.max_length} positions, {start + x_BNE.shape[1]} needed"
                )
        rotary = None
        if self.rotary is not None and (cache is None or cache.rotary is None):
            rotary = self.rotary(positions, x_BNE.dtype)
        elif cache is not None and cache.rotary is not None:
            cos, sin = cache.rotary
            rotary = (cos[positions][:, None], sin[positions][:, None])
        for index, layer in enumerate(self.layers):
            if self.gradient_checkpointing and self.training and torch.is_grad_enabled():
                x_BNE = torch.utils.checkpoint.checkpoint(layer, x_BNE, rotary, mask, use_reentrant=False)
            else:
                layer_cache = cache.layers[index] if cache is not None else None
                x_BNE = layer(x_BNE, rotary, mask, layer_cache, start)
        if cache is not None:
            cache.length = start + x_BNE.shape[1]
        return self.norm(x_BNE)
