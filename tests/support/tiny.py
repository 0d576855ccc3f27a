"""Tiny random models of real classes, and token maps for them: what the invariant tests run on."""

from __future__ import annotations

from typing import Any

import torch
from copied import copied
from torch import Tensor, nn
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    OPTConfig,
    OPTForCausalLM,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)

from adalink import ANSWER, IMAGE, PAD, PERCEPT, PREFIX, PROMPT, TEXT, InputSpec, TokenMap

VOCABULARY, WIDTH, N_PATCHES, FEATURE_WIDTH, N_TAPS, N_PREFIX = 64, 32, 3, 20, 4, 2
FAMILIES = ("llama", "qwen2", "opt", "gpt2", "t5")
DECODERS = ("llama", "qwen2", "opt", "gpt2")
INPUTS = {"image": InputSpec(N_PATCHES, FEATURE_WIDTH), "image_taps": InputSpec(N_TAPS, FEATURE_WIDTH)}
EXACT = {"llama": 1e-6, "qwen2": 1e-6, "opt": 1e-10, "gpt2": 1e-10, "t5": 1e-6}  # RMSNorm computes in float32 whatever the model's dtype


@copied
def tiny(family: str, seed: int = 0, n_layers: int = 2) -> PreTrainedModel:
    """A float64 model of the family: two layers unless told otherwise, width 32, vocabulary 64; grouped-query where the family has it."""
    torch.manual_seed(seed)
    ids = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    model: PreTrainedModel = {
        "llama": lambda: LlamaForCausalLM(
            LlamaConfig(vocab_size=VOCABULARY, hidden_size=WIDTH, intermediate_size=48, num_hidden_layers=n_layers, num_attention_heads=4, num_key_value_heads=2, **ids)
        ),
        "qwen2": lambda: Qwen2ForCausalLM(
            Qwen2Config(vocab_size=VOCABULARY, hidden_size=WIDTH, intermediate_size=48, num_hidden_layers=n_layers, num_attention_heads=4, num_key_value_heads=2, **ids)
        ),
        "opt": lambda: OPTForCausalLM(
            OPTConfig(
                vocab_size=VOCABULARY, hidden_size=48, ffn_dim=64, num_hidden_layers=n_layers, num_attention_heads=4, word_embed_proj_dim=WIDTH,
                max_position_embeddings=64, dropout=0.1, **ids,
            )
        ),
        "gpt2": lambda: GPT2LMHeadModel(GPT2Config(vocab_size=VOCABULARY, n_embd=WIDTH, n_layer=n_layers, n_head=4, n_positions=64, **ids)),
        "t5": lambda: T5ForConditionalGeneration(
            T5Config(vocab_size=VOCABULARY, d_model=WIDTH, d_kv=8, d_ff=48, num_layers=n_layers, num_heads=4, decoder_start_token_id=0, pad_token_id=0, eos_token_id=2)
        ),
    }[family]()  # fmt: skip
    with torch.no_grad():  # T5 and OPT start so small that edits would not show
        for parameter in model.parameters():
            parameter.copy_(torch.randn_like(parameter) * 0.15 + (1.0 if parameter.ndim == 1 else 0.0))
    return model.double().eval().requires_grad_(False)  # on CPU sdpa picks another kernel where a mask needs a gradient


def excite(module: nn.Module, seed: int = 1, strength: float = 0.3) -> None:
    """Move every weight away from its start, where many methods are the identity."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype) * strength)


def rows(n_rows: int = 3, n_prompt_slots: int = 2, seed: int = 2) -> tuple[Tensor, Tensor, Tensor]:
    """ids, domain, attention mask: [prefix slots, percept slot, prompt slots, image slots, text, answer], left-padded raggedly."""
    generator = torch.Generator().manual_seed(seed)
    texts = [4 + i % 3 for i in range(n_rows)]
    length = N_PREFIX + 1 + n_prompt_slots + N_PATCHES + max(texts) + 2
    ids = torch.randint(3, VOCABULARY, (n_rows, length), generator=generator)
    domain = torch.full((n_rows, length), PAD)
    for i, n_text in enumerate(texts):
        kinds = [PREFIX] * N_PREFIX + [PERCEPT] + [PROMPT] * n_prompt_slots + [IMAGE] * N_PATCHES + [TEXT] * n_text + [ANSWER] * 2
        domain[i, length - len(kinds) :] = torch.tensor(kinds)
    ids[domain == PAD] = 0
    return ids, domain, (domain != PAD).long()


def features(n_rows: int = 3, seed: int = 3) -> Tensor:
    """[B, N, Dv], float64."""
    return torch.randn(n_rows, N_PATCHES, FEATURE_WIDTH, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def taps(n_rows: int = 3, seed: int = 3) -> Tensor:
    """[B, L, Dv], float64: pooled features of an encoder's blocks."""
    return torch.randn(n_rows, N_TAPS, FEATURE_WIDTH, generator=torch.Generator().manual_seed(100 + seed), dtype=torch.float64)


def token_map(domain: Tensor, row: Tensor | None = None, seed: int = 3) -> TokenMap:
    """Every row served by adapter 0 unless told otherwise, with an image each."""
    row = torch.zeros(len(domain), dtype=torch.int64) if row is None else row
    return TokenMap(domain, row, {"image": features(len(domain), seed), "image_taps": taps(len(domain), seed)})


def run(model: Any, ids: Tensor, mask: Tensor) -> Tensor:
    """Logits [B, T, V]; of T5's decoder on a fixed start for the encoder-decoder family."""
    if model.config.is_encoder_decoder:
        decoder = torch.tensor([[0, 5, 6, 7]]).expand(len(ids), -1)
        return model(input_ids=ids, attention_mask=mask, decoder_input_ids=decoder).logits
    return model(input_ids=ids, attention_mask=mask, position_ids=positions(mask)).logits


def positions(mask: Tensor) -> Tensor:
    """int64 [B, T]: positions that skip padding."""
    return (mask.cumsum(1) - 1).clamp(min=0)
