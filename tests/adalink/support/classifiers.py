"""Tiny models of transformers with a head that classifies."""

from __future__ import annotations

from typing import Any

import torch
import transformers as hf

SIZES: dict[str, Any] = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "max_position_embeddings": 40}


IDS: dict[str, Any] = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}


T5: dict[str, Any] = {"vocab_size": 64, "d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4, "decoder_start_token_id": 0, **IDS}


CONFIGS: dict[str, Any] = {
    "Bert": lambda: hf.BertConfig(**SIZES),
    "Roberta": lambda: hf.RobertaConfig(**SIZES, pad_token_id=0),
    "Electra": lambda: hf.ElectraConfig(**SIZES, embedding_size=16),
    "DistilBert": lambda: hf.DistilBertConfig(vocab_size=64, dim=32, hidden_dim=48, n_layers=2, n_heads=4, max_position_embeddings=40),
    "Albert": lambda: hf.AlbertConfig(**SIZES, embedding_size=16),
    "GPT2": lambda: hf.GPT2Config(vocab_size=64, n_embd=32, n_layer=2, n_head=4, n_positions=40, **IDS),
    "Llama": lambda: hf.LlamaConfig(**SIZES, **IDS),
    "T5": lambda: hf.T5Config(**T5),
    "Bart": lambda: hf.BartConfig(vocab_size=64, d_model=32, encoder_layers=2, decoder_layers=2, encoder_attention_heads=4, decoder_attention_heads=4,
                                  encoder_ffn_dim=48, decoder_ffn_dim=48, max_position_embeddings=40, decoder_start_token_id=2, **IDS),
}  # fmt: skip


def host(family: str, task: str, seed: int = 0) -> Any:
    """A float64 model with a random head for three classes (two for the ends of an answer), its weights large enough for edits to show."""
    torch.manual_seed(seed)
    config = CONFIGS[family]()
    config.num_labels = 2 if task == "QuestionAnswering" else 3
    config.problem_type = "single_label_classification" if task == "SequenceClassification" else None
    model = getattr(hf, f"{family}For{task}")(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn_like(parameter) * 0.3)
    return model.double().eval()
