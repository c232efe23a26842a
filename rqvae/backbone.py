"""Causal decoder backbones from `transformers`, and the base language model made of one.

Backbones keep their causal mask; packed documents are kept apart by an explicit mask, because Qwen3
isolates documents from position ids only when it gets neither a mask nor a cache.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple, get_args

import torch
from safetensors import SafetensorError, safe_open
from tokenizers import Tokenizer
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    PretrainedConfig,
    PreTrainedModel,
)

from rqvae.config import ArchitectureConfig
from rqvae.gguf_file import GGUFModel
from rqvae.layers import causal_document_mask, positions_in_documents
from rqvae.linear_head import LinearHead


def huggingface_config(architecture: ArchitectureConfig) -> PretrainedConfig:
    """The `transformers` config of an architecture."""
    config = AutoConfig.for_model(architecture.model_type, **architecture.to_huggingface())
    config._attn_implementation = "sdpa"
    return config


def build_backbone(architecture: ArchitectureConfig, with_embeddings: bool) -> PreTrainedModel:
    """A backbone without head, randomly initialised, in fp32.

    Args:
        with_embeddings: False drops the token embeddings, for a decoder fed with vectors.
    """
    backbone = AutoModel.from_config(huggingface_config(architecture), dtype=torch.float32)
    if not with_embeddings:
        backbone.embed_tokens = None
    return backbone


def run_backbone(backbone: nn.Module, embeddings: Tensor, document_ids: Tensor) -> Tensor:
    """Hidden states [B, T, H] of packed documents, none of which sees another.

    Args:
        embeddings: [B, T, H].
        document_ids: LongTensor [B, T]; see `causal_document_mask`.
    """
    return backbone(
        inputs_embeds=embeddings,
        attention_mask=causal_document_mask(document_ids, document_ids),
        position_ids=positions_in_documents(document_ids),
        use_cache=False,
    ).last_hidden_state


class PretrainedLM:
    """A causal LM to initialise from.

    Args:
        source: a directory in Hugging Face layout, a GGUF file, or a hub id (then fetched or taken from the
            hub's cache).

    Attributes:
        path: the directory or file on this machine.
        config: what it says about itself; None for a directory without `config.json`.

    Raises:
        ValueError: there is nothing of the kind, or it cannot be read.
    """

    def __init__(self, source: str) -> None:
        self.path = _local_path(source)
        self._gguf = GGUFModel(self.path) if self.path.suffix == ".gguf" else None
        self._files = sorted(self.path.glob("*.safetensors"))
        self.config: PretrainedConfig | None = None
        if self._gguf is not None:
            self.config = huggingface_config(self._gguf.architecture)
        elif not self._files:
            raise ValueError(
                f"no *.safetensors files in '{self.path}'; name the directory of a "
                "model in Hugging Face layout, or a GGUF file"
            )
        elif (self.path / "config.json").is_file():
            try:
                self.config = AutoConfig.from_pretrained(self.path)
            except ValueError as error:
                raise ValueError(f"'{self.path}' holds no model of transformers ({error})") from error

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """All weights, one at a time, named as in the model without head; the head is `lm_head.weight`."""
        if self._gguf is not None:
            yield from self._gguf.tensors()
            return
        for file in self._files:
            try:
                with safe_open(file, framework="pt") as tensors:
                    for name in tensors.keys():  # noqa: SIM118 (not a dict)
                        # Old checkpoints hold the rotary frequencies, which the configuration determines.
                        if not name.endswith("rotary_emb.inv_freq"):
                            yield name.removeprefix("model."), tensors.get_tensor(name)
            except SafetensorError as error:
                raise ValueError(
                    f"'{file}' is damaged ({error}); fetch or convert the model again"
                ) from error

    def vocabulary(self) -> dict[str, int] | None:
        """Ids of the tokens of the model's tokenizer; None where there is no tokenizer.

        It is looked for in the model's directory, then in `tokenizer` beside it.
        """
        if self._gguf is not None:
            return {token: index for index, token in enumerate(self._gguf.tokens())} or None
        for directory in (self.path, self.path.parent / "tokenizer"):
            if (directory / "tokenizer.json").is_file():
                return Tokenizer.from_file(str(directory / "tokenizer.json")).get_vocab()
        return None


def _local_path(source: str) -> Path:
    path = Path(source)
    if path.is_dir() or path.suffix == ".gguf":
        return path
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(source, allow_patterns=["*.safetensors", "*.json"]))
    except Exception as error:
        raise ValueError(
            f"'{source}' is not a directory, and fetching it from the hub failed "
            f"({type(error).__name__}: {error}). Give the path of a downloaded model."
        ) from error


# What changes the function of a model and leaves no trace in the shapes of its weights.
_FUNCTION = (
    "model_type",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "hidden_act",
    "rms_norm_eps",
    "rope_parameters",
    "use_sliding_window",
)


def _differences(found: PretrainedConfig, expected: PretrainedConfig) -> Iterator[str]:
    for name in _FUNCTION:
        ours, theirs = getattr(expected, name, None), getattr(found, name, None)
        if ours != theirs:
            yield f"{name}: {theirs}, expected {ours}"


def load_pretrained(source: str, backbone: PreTrainedModel, head: LinearHead | None) -> None:
    """Copy the weights of a causal LM into a backbone and, if given, its output head.

    A model with tied embeddings has no `lm_head.weight`; the head then gets the embeddings.

    Args:
        source: see `PretrainedLM`.

    Raises:
        ValueError: a fact of the architecture differs, or a tensor is missing, unexpected or of another shape;
            all are listed.
    """
    pretrained = PretrainedLM(source)
    problems: list[str] = []
    if pretrained.config is not None:
        problems += _differences(pretrained.config, backbone.config)
    targets = dict(backbone.named_parameters())
    missing = set(targets)
    head_loaded = head is None
    is_tied = head is not None and head.weight is targets.get("embed_tokens.weight")
    separate_head: Tensor | None = None
    with torch.no_grad():
        for name, tensor in pretrained.tensors():
            if name == "lm_head.weight" and is_tied:
                separate_head = tensor
                continue
            if name in targets:
                if targets[name].shape != tensor.shape:
                    problems.append(f"{name}: {tuple(tensor.shape)}, expected {tuple(targets[name].shape)}")
                else:
                    targets[name].copy_(tensor)
                missing.discard(name)
            elif name not in ("embed_tokens.weight", "lm_head.weight"):
                problems.append(f"{name}: unexpected")
            # `lm_head.weight` sorts after `embed_tokens.weight` in no particular file: prefer it whenever seen.
            if head is not None and (
                name == "lm_head.weight" or (name == "embed_tokens.weight" and not head_loaded)
            ):
                if head.weight.shape != tensor.shape:
                    problems.append(f"{name}: {tuple(tensor.shape)}, expected {tuple(head.weight.shape)}")
                else:
                    head.weight.copy_(tensor)
                head_loaded = True
    if separate_head is not None and not torch.equal(separate_head, targets["embed_tokens.weight"].cpu()):
        problems.append("lm_head.weight: not the embeddings; set tie_word_embeddings: false")
    problems += [f"{name}: missing" for name in sorted(missing)]
    if not head_loaded:
        problems.append("lm_head.weight or embed_tokens.weight: missing")
    if problems:
        shown = "\n  ".join(dict.fromkeys(problems))
        raise ValueError(f"'{source}' does not fit the backbone's architecture:\n  {shown}")


class LanguageModelOutput(NamedTuple):
    """Losses of a batch under the base language model."""

    loss: Tensor
    """Mean negative log-likelihood per real token, in nats."""
    nats: Tensor
    """[B, T] fp32, 0 at padding."""
    correct: Tensor
    """[B, T] bool."""


class BaseLM(nn.Module):
    """The plain autoregressive language model: baseline of every table, and source of backbone weights.

    Wraps the `transformers` model under `lm`, with the head exchanged for a `LinearHead`, so that training
    never forms full logits while `generate` and `save_pretrained` stay those of `transformers`.

    Every document starts from the end-of-text token, so its first token is predicted too and the
    likelihood covers exactly the tokens that the latent model's bound covers.
    """

    def __init__(self, architecture: ArchitectureConfig, eos_token_id: int):
        super().__init__()
        self.eos_token_id = eos_token_id
        self.lm = AutoModelForCausalLM.from_config(huggingface_config(architecture), dtype=torch.float32)
        self.lm.lm_head = LinearHead(architecture.hidden_size, architecture.vocab_size)
        if architecture.tie_word_embeddings:
            self.lm.lm_head.weight = self.lm.model.embed_tokens.weight

    @classmethod
    def from_pretrained(cls, directory: str | Path, eos_token_id: int) -> BaseLM:
        """Load a causal LM in Hugging Face layout (or from a hub id), in evaluation mode.

        Raises:
            ValueError: there is none, it is damaged or incomplete, or of a class that has no place here.
        """
        try:
            loaded: Any = AutoModelForCausalLM.from_pretrained(
                directory, dtype=torch.float32, attn_implementation="sdpa", output_loading_info=True
            )
        except (OSError, ValueError, RuntimeError, SafetensorError) as error:
            raise ValueError(
                f"'{directory}' holds no causal language model in Hugging Face layout "
                f"({type(error).__name__}: {error}). launch/convert_checkpoint.py writes one"
            ) from error
        lm, loading = loaded
        # transformers only warns of these, and makes up random weights.
        if missing := loading["missing_keys"]:
            raise ValueError(f"'{directory}' is not complete, it lacks: {', '.join(sorted(missing))}")
        supported = get_args(ArchitectureConfig.model_fields["model_type"].annotation)
        if lm.config.model_type not in supported:
            raise ValueError(
                f"'{directory}' holds a model of type {lm.config.model_type}; use one of {', '.join(supported)}"
            )
        model = cls.__new__(cls)
        nn.Module.__init__(model)
        model.eos_token_id = eos_token_id
        head = LinearHead(*reversed(lm.lm_head.weight.shape))
        head.weight = lm.lm_head.weight
        lm.lm_head = head
        model.lm = lm
        return model.eval()

    def forward(
        self, input_ids: Tensor, document_ids: Tensor, num_tokens: Tensor | None = None
    ) -> LanguageModelOutput:
        """Score packed documents.

        Args:
            input_ids: LongTensor [B, T].
            document_ids: LongTensor [B, T], 0 at padding.
            num_tokens: denominator of the loss; the real tokens of this batch by default. A training loop
                passes its share of the whole step's tokens, so that ranks with more padding weigh less.
        """
        previous = torch.full_like(input_ids, self.eos_token_id)
        previous[:, 1:] = torch.where(
            document_ids[:, 1:] == document_ids[:, :-1], input_ids[:, :-1], previous[:, 1:]
        )
        hidden = run_backbone(self.lm.model, self.lm.model.embed_tokens(previous), document_ids)
        real = document_ids > 0
        if num_tokens is None:
            num_tokens = real.sum().clamp(min=1)
        out = self.lm.lm_head(hidden, input_ids, real / num_tokens)
        return LanguageModelOutput(out.loss, out.nats.view_as(input_ids), out.correct.view_as(real) & real)

    def save_pretrained(self, directory: str | Path) -> None:
        """Write a plain Hugging Face directory."""
        self.lm.save_pretrained(directory)
