"""A method that a folder has in another form than training: what is written, and what is read."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors.torch import load_file
from tiny import excite, tiny
from torch import Tensor

from adalink import AdaptedModel, Adapter, Anatomy, BitFit, LoRA, Placement, Slots
from adalink.checkpoint.folder import CARD_FILE, WEIGHTS_FILE, read_config
from adalink.edit import Written


@dataclasses.dataclass(frozen=True)
class UpperHalf:
    """LoRA on every layer in training, of which a folder has the second alone."""

    inner: LoRA = LoRA(rank=2)

    def slots(self, anatomy: Anatomy) -> tuple[Slots, ...]:
        return ()

    def place(self, anatomy: Anatomy) -> Sequence[Placement]:
        return self.inner.place(anatomy)

    def written(self, name: str, adapter: Adapter) -> Written:
        tensors: dict[str, Tensor] = {key: value for key, value in adapter.tensors().items() if key.startswith(f"{name}.all.1.")}
        return Written(LoRA(rank=2, exclude_layers=(0,)), tensors)


def test_a_folder_has_the_written_form_and_loads_as_an_ordinary_adapter(tmp_path: Path) -> None:
    model = AdaptedModel(tiny("llama"))
    adapter = model.add_adapter("one", {"bitfit": BitFit(force_bias=True), "upper": UpperHalf()})
    assert model.start is not None
    excite(adapter)
    with torch.no_grad():
        for name, parameter in adapter.named_parameters():
            if name.startswith("upper.all.0."):
                parameter.zero_()
    model.save_pretrained(tmp_path)
    config = read_config(tmp_path)
    assert config.methods == {"bitfit": BitFit(force_bias=True), "upper": LoRA(rank=2, exclude_layers=(0,))}
    assert config.start is None  # no seed draws a part of it
    stored = load_file(tmp_path / WEIGHTS_FILE)
    assert set(stored) == {name for name in adapter.tensors() if not name.startswith("upper.all.0.")}
    n = sum(value.numel() for name, value in stored.items() if name.startswith("upper."))
    assert f"| upper | LoRA | {n:,} |" in (tmp_path / CARD_FILE).read_text()
    again = AdaptedModel.from_pretrained(tiny("llama"), tmp_path)
    ids = torch.tensor([[3, 9, 4, 7]])
    with torch.no_grad():
        found, expected = again.double()(ids).logits, model.eval().double()(ids).logits
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)
    with torch.no_grad():
        model.active_adapter().get_submodule("upper.all.1.q_proj.up").weight.zero_()  # type: ignore[operator]
        assert not torch.allclose(model(ids).logits, expected)  # control
