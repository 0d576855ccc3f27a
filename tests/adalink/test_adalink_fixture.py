"""AdaLink against reference computations: every file of fixtures/adalink, in float64, to 1e-10.

Text-only files hold an LM, adapters for one or two modalities and tasks, and results per variant and scope.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from shared import fixtures
from tiny import GPT2Config, GPT2LMHeadModel
from torch import Tensor

from adalink import ANSWER, PAD, TEXT, AdaLink, Adapter, Anatomy, TokenMap, attach

FILES = sorted(fixtures("adalink").glob("adalink_text*.safetensors"))
EXACT = 1e-10
CASES = [
    (path, variant, scope) for path in FILES for variant in json.loads(path.with_suffix(".json").read_text())["variants"] for scope in ("all", "prompt")
]


class Fixture:
    def __init__(self, path: Path) -> None:
        self.spec = json.loads(path.with_suffix(".json").read_text())
        self.tensors = load_file(path)
        c = self.spec["config"]
        config = GPT2Config(
            vocab_size=c["vocab"], n_embd=c["n_embd"], n_layer=c["n_layer"], n_head=c["n_head"], n_positions=c["n_positions"],
            activation_function=c["act"], layer_norm_epsilon=c["ln_eps"], attn_implementation=c["attn"],
        )  # fmt: skip
        self.model = GPT2LMHeadModel(config).double().eval()
        weights = {name.removeprefix("w."): value for name, value in self.tensors.items() if name.startswith("w.")}
        missing, unexpected = self.model.load_state_dict(weights, strict=False)
        assert missing == ["lm_head.weight"]
        assert not unexpected
        self.ids, self.mask = self.tensors["in.input_ids"], self.tensors["in.attention_mask"]
        self.domain = torch.where(self.tensors["in.prompt_mask"].bool(), TEXT, ANSWER).masked_fill(self.mask == 0, PAD)

    def adapter(self, name: str, variant: str, scope: str) -> Adapter:
        settings = self.spec["variants"][variant]
        method = AdaLink(rank=self.spec["config"]["rank"], modalities=("text",), activation=settings["activation"], bias=settings["bias"], scope=scope)
        adapter = Adapter({"adalink": method}, Anatomy.read(self.model)).double()
        stored = {key.removeprefix(f"adalink.{name}."): value for key, value in self.tensors.items() if key.startswith(f"adalink.{name}.")}
        adapter.load_state_dict({f"adalink.text.{key}": value for key, value in stored.items() if settings["bias"] or not key.endswith("bias")})
        return adapter

    def loss(self, logits: Tensor) -> Tensor:
        labels = self.tensors["in.labels"][:, 1:]
        return torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), labels.flatten(), ignore_index=-100)


@pytest.fixture(params=FILES, ids=lambda path: path.stem)
def fixture(request: pytest.FixtureRequest) -> Fixture:
    return Fixture(request.param)


@pytest.mark.parametrize(("path", "variant", "scope"), CASES, ids=lambda value: value.stem if isinstance(value, Path) else value)
def test_embeddings_logits_loss_and_gradients_equal_the_reference(path: Path, variant: str, scope: str) -> None:
    f = Fixture(path)
    adapter = f.adapter("text", variant, scope)
    attachment = attach(f.model, adapter)
    embedded: list[Tensor] = []
    f.model.transformer.wte.register_forward_hook(lambda module, args, out: embedded.append(out))
    with attachment.bind(TokenMap(f.domain, torch.zeros(len(f.ids), dtype=torch.int64))):
        logits = f.model(input_ids=f.ids, attention_mask=f.mask).logits
        loss = f.loss(logits)
        loss.backward()
    expected = {key.removeprefix(f"{variant}.{scope}."): value for key, value in f.tensors.items() if key.startswith(f"{variant}.{scope}.")}
    real = f.mask.bool()
    close(embedded[0][real], expected["inputs_embeds"][real])
    close(logits[real], expected["logits"][real])
    close(loss, expected["loss"].squeeze())
    gradients = {name.removeprefix("adalink.text."): parameter.grad for name, parameter in adapter.named_parameters()}
    assert {f"grad.{name}" for name in gradients} == {key for key in expected if key.startswith("grad.")}
    for name, gradient in gradients.items():
        close(gradient, expected[f"grad.{name}"])


def test_the_lookup_table_equals_the_module(fixture: Fixture) -> None:
    adapter = fixture.adapter("text", "linear", "all")
    table = adapter.get_submodule("adalink.text").lookup_table(fixture.model.transformer.wte.weight)
    close(table, fixture.tensors["linear.lookup_table"])


def test_mixed_tasks_in_one_batch_equal_the_reference(fixture: Fixture) -> None:
    attachment = attach(fixture.model, fixture.adapter("text", "linear", "all"), fixture.adapter("text_task2", "linear", "all"))
    with attachment.bind(TokenMap(fixture.domain, fixture.tensors["in.task_ids"])), torch.no_grad():
        logits = fixture.model(input_ids=fixture.ids, attention_mask=fixture.mask).logits
    real = fixture.mask.bool()
    close(logits[real], fixture.tensors["linear.mixed_tasks.logits"][real])


def test_without_a_row_of_its_own_the_model_is_the_frozen_one(fixture: Fixture) -> None:
    attachment = attach(fixture.model, fixture.adapter("text", "linear", "all"))
    with attachment.bind(TokenMap(fixture.domain, torch.full((len(fixture.ids),), -1))), torch.no_grad():
        logits = fixture.model(input_ids=fixture.ids, attention_mask=fixture.mask).logits
    close(logits, fixture.tensors["out.base.logits"])


def close(actual: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(actual.detach(), expected, rtol=0, atol=EXACT)
