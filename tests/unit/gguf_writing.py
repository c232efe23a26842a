"""Writes GGUF files the way llama.cpp's converter does, from models of ours."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import gguf
import numpy as np
from torch import Tensor

from rqvae.config import ArchitectureConfig


def write_gguf(
    path: Path,
    architecture: ArchitectureConfig,
    state: Mapping[str, Tensor],
    tokens: Sequence[str] = (),
    merges: Sequence[str] = (),
    quantized: gguf.GGMLQuantizationType | None = None,
) -> None:
    """The state dict of a causal LM of transformers; `quantized`: type of the matrices, fp32 by default."""
    kind = architecture.model_type
    writer = gguf.GGUFWriter(path, kind)
    writer.add_context_length(architecture.max_position_embeddings)
    writer.add_embedding_length(architecture.hidden_size)
    writer.add_block_count(architecture.num_hidden_layers)
    writer.add_feed_forward_length(architecture.intermediate_size)
    writer.add_head_count(architecture.num_attention_heads)
    writer.add_head_count_kv(architecture.num_key_value_heads)
    writer.add_key_length(architecture.head_dim)
    writer.add_value_length(architecture.head_dim)
    writer.add_layer_norm_rms_eps(architecture.rms_norm_eps)
    writer.add_rope_freq_base(architecture.rope_theta)
    if tokens:
        writer.add_tokenizer_model("gpt2")
        writer.add_token_list(tokens)
        writer.add_token_merges(merges)
        writer.add_token_types([3, 3] + [1] * (len(tokens) - 2))  # control tokens first
        writer.add_bos_token_id(1)
        writer.add_eos_token_id(0)
    # The package's own table, so that reader and writer do not share one.
    names = gguf.get_tensor_name_map(
        next(arch for arch, name in gguf.MODEL_ARCH_NAMES.items() if name == kind),
        architecture.num_hidden_layers,
    )
    for name, tensor in state.items():
        weight = tensor.float().numpy()
        if kind == "llama" and name.endswith(("q_proj.weight", "k_proj.weight")):
            rows, columns = weight.shape  # LlamaModel.permute in llama.cpp's convert_hf_to_gguf.py
            halves = weight.reshape(-1, 2, architecture.head_dim // 2, columns)
            weight = np.ascontiguousarray(halves.swapaxes(1, 2).reshape(rows, columns))
        if name == "lm_head.weight" and architecture.tie_word_embeddings:
            continue
        theirs = names.get_name(name, try_suffixes=(".weight",))
        assert theirs is not None, name
        if quantized is not None and weight.ndim == 2:
            writer.add_tensor(theirs, gguf.quantize(weight, quantized), raw_dtype=quantized)
        else:
            writer.add_tensor(theirs, weight)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
