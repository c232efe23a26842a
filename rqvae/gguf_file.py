"""Causal LMs from GGUF files (llama.cpp's format), with names and layout as in Hugging Face checkpoints.

Read with the `gguf` package and not through `transformers`, which leaves out tensors it does not know (a scaled
rotary embedding for one) and holds all weights at once.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from gguf import GGUFReader, dequantize
from torch import Tensor

from rqvae.config import ArchitectureConfig

_MODULES = {
    "token_embd": "embed_tokens",
    "output_norm": "norm",
    "output": "lm_head",
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}


class GGUFModel:
    """An opened GGUF file of a Llama or Qwen3 model.

    Args:
        path: the file.

    Attributes:
        architecture: what its metadata say.

    Raises:
        ValueError: the file is missing or damaged, of another architecture, or lacks metadata.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        if not self.path.is_file():
            raise ValueError(f"'{path}' is not a file")
        try:
            self._reader = GGUFReader(self.path)
        except (ValueError, IndexError) as error:
            raise ValueError(f"'{path}' is not a readable GGUF file ({error}); fetch it again") from error
        self.architecture = self._read_architecture()

    def _field(self, name: str, default: Any = None) -> Any:
        field = self._reader.get_field(name)
        if field is None and default is None:
            raise ValueError(f"'{self.path}' is not complete: its metadata have no '{name}'")
        return default if field is None else field.contents()

    def _read_architecture(self) -> ArchitectureConfig:
        kind = self._field("general.architecture")
        if kind not in ("llama", "qwen3"):
            raise ValueError(f"'{self.path}' holds a model of architecture '{kind}'; use a llama or qwen3")
        if (scaling := self._field(f"{kind}.rope.scaling.type", "none")) != "none":
            raise ValueError(
                f"'{self.path}' has rotary positions with {scaling} scaling; use a model without"
            )
        shapes = {tensor.name: tuple(int(n) for n in tensor.shape) for tensor in self._reader.tensors}
        if "token_embd.weight" not in shapes:
            raise ValueError(f"'{self.path}' is not complete: it has no tensor 'token_embd.weight'")
        hidden_size = self._field(f"{kind}.embedding_length")
        heads = self._field(f"{kind}.attention.head_count")
        return ArchitectureConfig(
            model_type=kind,
            vocab_size=shapes["token_embd.weight"][1],  # GGUF counts dimensions from the innermost
            hidden_size=hidden_size,
            intermediate_size=self._field(f"{kind}.feed_forward_length"),
            num_hidden_layers=self._field(f"{kind}.block_count"),
            num_attention_heads=heads,
            num_key_value_heads=self._field(f"{kind}.attention.head_count_kv", heads),
            head_dim=self._field(f"{kind}.attention.key_length", hidden_size // heads),
            max_position_embeddings=self._field(f"{kind}.context_length"),
            rms_norm_eps=_shortest(self._field(f"{kind}.attention.layer_norm_rms_epsilon")),
            rope_theta=_shortest(self._field(f"{kind}.rope.freq_base", 1e4)),
            tie_word_embeddings="output.weight" not in shapes,
        )

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """Weights in fp32, one at a time, named as in the backbone; one of no known name keeps its own."""
        for tensor in self._reader.tensors:
            module, _, kind = tensor.name.rpartition(".")
            prefix, block, rest = "", module.split("."), module
            if block[0] == "blk" and len(block) == 3:
                prefix, rest = f"layers.{block[1]}.", block[2]
            name = f"{prefix}{_MODULES[rest]}.{kind}" if rest in _MODULES else tensor.name
            weight = dequantize(tensor.data, tensor.tensor_type).astype(np.float32)
            if self.architecture.model_type == "llama" and rest in ("attn_q", "attn_k"):
                weight = self._halves_apart(weight)
            yield name, torch.from_numpy(np.ascontiguousarray(weight))

    def _halves_apart(self, weight: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
        """llama.cpp rotates neighbouring pairs of a head's dimensions, Hugging Face pairs from its two halves."""
        rows, columns = weight.shape
        pairs = weight.reshape(-1, self.architecture.head_dim // 2, 2, columns)
        return pairs.swapaxes(1, 2).reshape(rows, columns)

    def tokens(self) -> list[str]:
        """The vocabulary in order of ids; may be shorter than the embeddings. Empty where the file has none."""
        return self._field("tokenizer.ggml.tokens", [])

    def special_tokens(self) -> dict[str, str]:
        """`bos_token`, `eos_token`, `unk_token`, `pad_token`, as far as the file names them."""
        names = {"bos": "bos", "eos": "eos", "unknown": "unk", "padding": "pad"}
        ids = {ours: self._field(f"tokenizer.ggml.{theirs}_token_id", -1) for theirs, ours in names.items()}
        tokens = self.tokens()
        return {f"{name}_token": tokens[index] for name, index in ids.items() if 0 <= index < len(tokens)}


def _shortest(value: float) -> float:
    """A single-precision number as it was once written: 1e-5, not 9.99999974737e-6."""
    return float(str(np.float32(value)))
