"""Adapters on a model that transformers splits over processes by tensor parallelism: two processes give what one gives."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from ranks import Machine
from tiny_llava import save_llava
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, LlamaConfig, LlamaForCausalLM

from adalink import AdaLink, Bottleneck, LoRA, get_adalink_model
from adalink.errors import AttachError


def outcome(model: Any, folder: Path, **inputs: torch.Tensor) -> dict[str, Any]:
    """Loss, gradients, a generated text and the fingerprint of the frozen model, with an adapter at the embedding and after the layers."""
    adapted = get_adalink_model(model, {"adalink": AdaLink(rank=2, modalities=("text",)), "bottleneck": Bottleneck(width=4)})
    torch.manual_seed(1)
    for parameter in adapted.active_adapter().parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    loss = adapted(**inputs, labels=inputs["input_ids"]).loss
    loss.backward()
    adapted.save_pretrained(folder)
    return {
        "loss": loss.item(), "gradients": [float(one.grad.double().norm()) for one in adapted.active_adapter().parameters() if one.grad is not None],
        "text": adapted.generate(**inputs, max_new_tokens=5, do_sample=False)[0].tolist(),
        "fingerprint": json.loads((folder / "adalink_config.json").read_text())["base"]["language_model"]["fingerprint"],
    }  # fmt: skip


def split(folder: Path, **plan: str) -> int:
    """In each process: a language model and a LLaVA, and the error of LoRA on a split linear. plan: `tp_plan`, or nothing."""
    import torch.distributed as dist

    if plan:
        dist.init_process_group("gloo")
    name = f"{'split' if plan else 'whole'}{dist.get_rank() if plan else ''}"
    ids = torch.randint(3, 60, (2, 7), generator=torch.Generator().manual_seed(1))
    words = outcome(AutoModelForCausalLM.from_pretrained(folder / "llama", **plan), folder / name / "words", input_ids=ids)
    seeing = AutoModelForImageTextToText.from_pretrained(folder / "llava", **plan)
    image_id = seeing.config.image_token_index if hasattr(seeing.config, "image_token_index") else seeing.config.image_token_id
    rows = torch.tensor([[image_id] * 4 + [7, 8, 9]])
    pixels = torch.randn(1, 3, 32, 32, generator=torch.Generator().manual_seed(2))
    sees = outcome(seeing, folder / name / "sees", input_ids=rows, pixel_values=pixels, attention_mask=torch.ones_like(rows))
    refused = ""
    try:
        get_adalink_model(AutoModelForCausalLM.from_pretrained(folder / "llama", **plan), {"lora": LoRA(rank=2)})
    except AttachError as error:
        refused = str(error)
    (folder / f"{name}.json").write_text(json.dumps({"words": words, "sees": sees, "refused": refused}))
    return 0


def test_two_processes_give_what_one_gives_and_split_linears_are_refused(tmp_path: Path) -> None:
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 64}
    LlamaForCausalLM(LlamaConfig(**sizes)).save_pretrained(tmp_path / "llama")
    save_llava(tmp_path / "llava")
    split(tmp_path)
    Machine(tmp_path).start(2, split_over_two, tmp_path).ended()
    whole, first, second = (json.loads((tmp_path / f"{name}.json").read_text()) for name in ("whole", "split0", "split1"))
    assert first == second
    for kind in ("words", "sees"):
        assert (first[kind]["text"], first[kind]["fingerprint"]) == (whole[kind]["text"], whole[kind]["fingerprint"])
        assert abs(first[kind]["loss"] - whole[kind]["loss"]) < 1e-5
        assert len(first[kind]["gradients"]) > 4
        torch.testing.assert_close(torch.tensor(first[kind]["gradients"]), torch.tensor(whole[kind]["gradients"]), rtol=1e-4, atol=1e-6)
    assert whole["refused"] == ""
    assert first["refused"].startswith("layers.0.self_attn.q_proj is split over processes by tensor parallelism, and lora.all.0.q_proj edits it whole: choose")


def split_over_two(folder: Path) -> int:
    return split(folder, tp_plan="auto")
