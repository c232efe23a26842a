"""Greedy decoding of a Qwen3 or Llama causal LM without the library around it.

The baseline that keeps us honest: latent decoding runs in a lean loop of ours, so the autoregressive model gets
one too. Same weights and arithmetic as `transformers`, static cache, rotary tables computed once, no masks.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedModel

from rqvae.layers import LayerCache, RotaryEmbedding, rotate


class CachedGreedyDecoder:
    """One token per step with the weights of a `transformers` causal LM.

    Args:
        lm: a Qwen3 or Llama model.
        max_length: prompt and new tokens together.
    """

    def __init__(self, lm: PreTrainedModel, max_length: int):
        self.lm = lm
        self.max_length = max_length
        config = lm.config
        self.head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        rotary = RotaryEmbedding(self.head_dim, config.rope_parameters["rope_theta"])
        self.embeddings: Tensor = lm.get_input_embeddings().weight  # type: ignore[assignment]
        self.cos, self.sin = rotary(
            torch.arange(max_length, device=self.embeddings.device)[None], self.embeddings.dtype
        )

    @torch.inference_mode()
    def generate(self, prompt_ids: Tensor, num_new_tokens: int) -> Tensor:
        """Continue greedily, past any end of text: LongTensor [B, P] -> LongTensor [B, num_new_tokens]."""
        config = self.lm.config
        caches = [
            LayerCache(
                prompt_ids.shape[0],
                config.num_key_value_heads,
                self.max_length,
                self.head_dim,
                self.embeddings,
            )
            for _ in range(config.num_hidden_layers)
        ]
        ids, start, new = prompt_ids, 0, []
        for _ in range(num_new_tokens):
            hidden = self._forward(ids, start, caches)[:, -1]
            start += ids.shape[1]
            ids = F.linear(hidden, self.lm.lm_head.weight).argmax(-1, keepdim=True)
            new.append(ids)
        return torch.cat(new, dim=1)

    def _forward(self, ids: Tensor, start: int, caches: list[LayerCache]) -> Tensor:
        batch, length = ids.shape
        cos, sin = self.cos[:, :, start : start + length], self.sin[:, :, start : start + length]
        x = F.embedding(ids, self.embeddings)
        for layer, cache in zip(self.lm.model.layers, caches, strict=True):
            attention = layer.self_attn
            h = layer.input_layernorm(x)
            queries, keys, values = (
                projection(h).view(batch, length, -1, self.head_dim)
                for projection in (attention.q_proj, attention.k_proj, attention.v_proj)
            )
            if hasattr(attention, "q_norm"):
                queries, keys = attention.q_norm(queries), attention.k_norm(keys)
            queries, keys = rotate(queries.transpose(1, 2), cos, sin), rotate(keys.transpose(1, 2), cos, sin)
            keys, values = cache.append(keys, values.transpose(1, 2), start)
            attended = F.scaled_dot_product_attention(
                queries, keys, values, is_causal=length > 1, enable_gqa=True
            )
            x = x + attention.o_proj(attended.transpose(1, 2).reshape(batch, length, -1))
            x = x + layer.mlp(layer.post_attention_layernorm(x))
        return self.lm.model.norm(x)
