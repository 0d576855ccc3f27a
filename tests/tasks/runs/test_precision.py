"""Frozen parts in other precisions and quantised: the fingerprint stays the checkpoint's, adapters travel, gradients are those of the weights that run."""

from __future__ import annotations

import importlib.util
import json
import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from cli_run import refused, train
from fastapi.testclient import TestClient
from quantiser import find_torchao
from served import QUESTIONS, messages, photo, save_adapters
from tiny import tiny
from torch import nn
from transformers import AutoModelForCausalLM

from adalink import AdaLink
from adalink.checkpoint.fingerprint import part_of
from adalink.checkpoint.precision import BaseSettings, Precision, settle
from adalink.errors import ConfigError
from multimodal.data.images.decode import decode_image
from multimodal.language import load_language
from multimodal.training.settings import TrainSettings
from multimodal.training.train import check_training
from tasks.captioning import Captioning
from tasks.runs.compose import adapters_on, compose, load_adapted
from tasks.scenes.parts import language_folder
from tasks.serve.app import Service, make_app
from tasks.serve.settings import ServeSettings

DTYPES = ("float32", "bfloat16", "float16")
QUANTISERS = ("int8", "nf4", "fp8")


def plain(model: nn.Module) -> nn.Module:
    """The same model with the values of its quantised weights as ordinary ones."""
    for module in model.modules():
        if isinstance(module, nn.Linear) and type(module.weight.data) is not torch.Tensor:
            rows = torch.eye(module.in_features)
            module.weight = nn.Parameter(nn.functional.linear(rows, module.weight).T.contiguous(), requires_grad=False)
    return model


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_fingerprint_is_of_the_checkpoint_in_every_dtype(dtype: str) -> None:
    whole = part_of(tiny("llama").float())
    cast = settle(tiny("llama").float(), Precision(dtype=dtype), "x")  # type: ignore[arg-type]
    part = part_of(cast)
    assert (part.fingerprint, part.weights, part.dtype, part.precision) == (whole.fingerprint, whole.weights, dtype, dtype)
    other = part_of(settle(tiny("llama", seed=1).float(), Precision(dtype=dtype), "x"))  # type: ignore[arg-type]
    assert other.fingerprint != whole.fingerprint


def test_a_cast_model_computes_what_transformers_loads_in_that_dtype() -> None:
    ids = torch.arange(1, 9)[None]
    wanted: Any = AutoModelForCausalLM.from_pretrained(language_folder(), dtype=torch.bfloat16).eval()
    for found in (load_language(language_folder(), precision=Precision(dtype="bfloat16")), load_language(language_folder(), dtype=torch.bfloat16)):
        assert torch.equal(wanted(ids).logits, found.model(ids).logits)
    llama: Any = settle(tiny("llama").float(), Precision(dtype="bfloat16"), "x")
    assert {tensor.dtype for name, tensor in llama.named_buffers() if "inv_freq" in name} == {torch.float32}


@pytest.mark.parametrize("kind", QUANTISERS)
def test_quantised_weights_give_the_gradients_of_the_weights_that_run(kind: str) -> None:
    find_torchao()
    model: Any = settle(tiny("llama").float(), Precision(quantise=kind), "x")  # type: ignore[arg-type]
    packed = [module for module in model.modules() if isinstance(module, nn.Linear) and type(module.weight.data) is not torch.Tensor]
    assert packed
    assert model.get_output_embeddings() not in packed
    assert part_of(model).fingerprint == part_of(tiny("llama").float()).fingerprint
    embeds = torch.randn(2, 5, model.config.hidden_size, generator=torch.Generator().manual_seed(0))
    results = []
    for host in (model, plain(model)):
        given = embeds.clone().requires_grad_()
        logits = host(inputs_embeds=given).logits
        results.append((logits.detach(), *torch.autograd.grad(logits.pow(2).sum(), given)))
    for one, other in zip(*results, strict=True):
        assert torch.allclose(one, other, rtol=1e-3, atol=1e-3 * float(other.abs().max()))
    float_model: Any = tiny("llama").float()
    with torch.no_grad():
        assert not torch.equal(float_model(inputs_embeds=embeds).logits, results[0][0])


def test_a_run_on_a_quantised_base_is_saved_loaded_and_resumed(tmp_path: Path) -> None:
    find_torchao()
    base = ("--base.language_model.quantise", "nf4", "--base.encoder.quantise", "int8", "--train.checkpoint_every", "1")
    done = train("captioning", tmp_path / "run", *base)
    assert done.code == 0, done.err
    saved = json.loads((tmp_path / "run" / "adapter" / "adalink_config.json").read_text())["base"]
    assert {role: part["precision"] for role, part in saved.items()} == {"language_model": "nf4", "encoder": "int8"}
    model, _ = load_adapted(tmp_path / "run" / "adapter")  # in the precision that it was trained in
    assert next(type(module.weight.data).__name__ for module in model.language.model.modules() if isinstance(module, nn.Linear)) == "NF4Tensor"
    with pytest.warns(UserWarning, match="on the language model in nf4, and here it is in float32"):
        load_adapted(tmp_path / "run" / "adapter", base=BaseSettings(language_model=Precision(quantise="none"), encoder=Precision(quantise="none")))
    before = (tmp_path / "run" / "adapter" / "adapter_model.safetensors").read_bytes()
    (tmp_path / "run" / "metrics.json").unlink()
    last = tmp_path / "run" / "checkpoints" / "step_00000002"
    for file in last.iterdir():
        file.unlink()
    last.rmdir()
    assert train("captioning", tmp_path / "run", *base, "--resume").code == 0
    assert (tmp_path / "run" / "adapter" / "adapter_model.safetensors").read_bytes() == before


def test_a_server_on_a_quantised_base_answers_as_generate(tmp_path: Path) -> None:
    find_torchao()
    saved = save_adapters(tmp_path, BaseSettings(language_model=Precision(quantise="nf4"), encoder=Precision(quantise="int8")))
    model = adapters_on({name: tmp_path / name for name in ("cap", "vqa")})  # as `adalink serve` loads them: in the precision of the first folder
    assert any(type(module.weight.data).__name__ == "NF4Tensor" for module in model.language.model.modules() if isinstance(module, nn.Linear))
    cases = [(name, question, index) for name, question in (("cap", ""), ("vqa", QUESTIONS[0])) for index in (0, 1, 2)]
    alone = [saved.generate([decode_image(photo(index))], [question], adapter_names=[name])[0] for name, question, index in cases]
    with TestClient(make_app(Service.of(model, ServeSettings())), base_url="http://localhost") as client, ThreadPoolExecutor(len(cases)) as clients:
        bodies = [{"model": name, "messages": messages(question, photo(index))} for name, question, index in cases]
        replies = list(clients.map(lambda body: client.post("/v1/chat/completions", json=body).json(), bodies))
    assert [reply["choices"][0]["message"]["content"] for reply in replies] == alone
    assert len(set(alone)) > 2  # the control: adapters and images differ


def test_an_adapter_of_the_checkpoint_s_precision_loads_on_another_and_a_sentence_says_so(tmp_path: Path) -> None:
    assert train("captioning", tmp_path / "run").code == 0
    with pytest.warns(UserWarning, match="in float32, and here it is in bfloat16: its answers may differ a little"):
        load_adapted(tmp_path / "run" / "adapter", base=BaseSettings(language_model=Precision(dtype="bfloat16")))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        load_adapted(tmp_path / "run" / "adapter", base=BaseSettings(language_model=Precision(dtype="float32")))


@pytest.mark.parametrize(("dtype", "precision", "is_warned"), [("float16", "no", True), ("float16", "fp16", False), ("bfloat16", "no", False)])
def test_a_base_in_float16_whose_loss_is_not_scaled_is_warned_of(dtype: Any, precision: Any, is_warned: bool, tmp_path: Path) -> None:
    base = BaseSettings(language_model=Precision(dtype=dtype))
    model = compose("scenes:encoder", "scenes:language", template=Captioning().template, base=base)
    model.add_adapter("default", {"adalink": AdaLink(rank=2, modalities=("text",))})
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        check_training(model, TrainSettings(precision=precision), tmp_path)
    told = "small gradients become 0: give base.language_model.dtype: bfloat16, or on a GPU train.precision: fp16"
    assert [told in str(one.message) for one in found] == [True] * is_warned


@pytest.mark.parametrize(
    ("options", "message"),
    [(("--base.language_model.dtype", "float8"), "base.language_model.dtype is float8: expected one of 'auto', 'float32', 'bfloat16', 'float16'"),
     (("--base.language_model.attention", "flash_attention_2"), "base: attention is flash_attention_2, which runs on CUDA alone"),
     (("--base.encoder.attention", "sdpa"), "base: attention is sdpa for the encoder")],
)  # fmt: skip
def test_wrong_settings_are_refused_in_one_sentence(options: tuple[str, ...], message: str, tmp_path: Path) -> None:
    assert message in refused(train("captioning", tmp_path / "run", *options))
    assert not (tmp_path / "run").exists()


def test_what_cannot_be_quantised_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match=r"quantise is 'int4': give one of .*; int4 has no gradients: nf4 has as many bits"):
        Precision(quantise="int4")  # type: ignore[arg-type]
    with monkeypatch.context() as patched:
        patched.setattr(importlib.util, "find_spec", lambda name: None)
        with pytest.raises(ConfigError, match=r"needs torchao: pip install 'adalink\[quantise\]'"):
            settle(tiny("llama").float(), Precision(quantise="int8"), "x")
    find_torchao()
    with pytest.raises(ConfigError, match="'x' has no linear layer that can be quantised"):
        settle(tiny("gpt2").float(), Precision(quantise="int8"), "x")
