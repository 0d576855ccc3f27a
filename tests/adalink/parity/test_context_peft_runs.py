"""Two things of Context-PEFT that only whole runs show: a compiled training step with dropout, and several methods of one kind saved and loaded."""

from __future__ import annotations

from pathlib import Path

import torch
from tiny import INPUTS, excite, positions, rows, run, tiny, token_map

from adalink import AdaptedModel, Adapter, Anatomy, Bridge, LoRA, Method, attach


def test_dropout_of_tokens_trains_in_one_compiled_graph() -> None:
    torch._dynamo.reset()
    model = tiny("llama")
    ids, domain, mask = rows()
    adapter = Adapter({"lora": LoRA(groups={"text": ("text",)}, rank=2, alpha=2, dropout=0.5, targets=("q_proj",))}, Anatomy.read(model)).double()
    excite(adapter)
    attachment = attach(model, adapter)
    with attachment.bind(token_map(domain)):
        compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
        losses = [compiled(input_ids=ids, attention_mask=mask, position_ids=positions(mask), use_cache=False).logits.square().sum() for _ in range(4)]
    losses[0].backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in adapter.parameters())
    assert len({loss.item() for loss in losses}) > 1  # each call draws anew


def test_two_loras_of_one_adapter_with_a_group_and_a_rank_each_come_back_from_disk(tmp_path: Path) -> None:
    ids, domain, mask = rows()
    methods: dict[str, Method] = {
        "bridge": Bridge(kind="linear"),
        "deep": LoRA(groups={"image": ("image",), "shared": ("image", "text")}, rank={"image": 3, "shared": 1}, alpha=4, exclude_layers=(0,)),
        "wide": LoRA(groups={"text": ("text",)}, rank=8, alpha={"text": 1}, targets=("query", "down")),
    }
    model = AdaptedModel(tiny("opt"), inputs=INPUTS)
    excite(model.add_adapter("first", methods))
    model.save_pretrained(tmp_path)
    again = AdaptedModel(tiny("opt"), inputs=INPUTS)
    again.load_adapter(tmp_path, "first")
    assert again.adapters["first"].methods == methods
    with model.attachment.bind(token_map(domain)), again.attachment.bind(token_map(domain)):
        assert torch.equal(run(model.base, ids, mask), run(again.base, ids, mask))
