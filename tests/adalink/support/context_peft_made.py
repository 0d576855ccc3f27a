"""Cases in the form of fixtures/context_peft, computed plainly from the formulas: wrapped linears, masks, merged embeddings, uncached greedy."""

from __future__ import annotations

import math
from typing import Any, Literal

import torch
from context_peft_case import Case
from double import InDouble, rounded_frequencies, set_frequencies
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM

D, DV, PATCHES, PAD_IMAGE, VOCABULARY = 32, 12, 5, 44, 64
SIZES: dict[str, dict[str, Any]] = {
    "opt": {"hidden_size": D, "word_embed_proj_dim": D, "ffn_dim": 64, "num_hidden_layers": 3, "num_attention_heads": 4, "max_position_embeddings": 64, "dropout": 0.0},
    "llama": {"hidden_size": D, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 1, "tie_word_embeddings": False},
    "gpt2": {"n_embd": D, "n_layer": 2, "n_head": 4, "n_positions": 64, "resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0},
}  # fmt: skip


class Wrapped(nn.Module):
    """A linear with its adaptors, whose tensors have the official names. masks: adaptor -> [B, T, 1], set before each call."""

    weight: Any
    bias: Any
    lora_A: Any  # noqa: N815  (nn.ModuleDict, as lora_B)
    lora_B: Any  # noqa: N815
    lora_bias: Any  # nn.ParameterDict, as the two after it
    bitfit_bias: Any
    ia3_l: Any

    def __init__(self, linear: Any, adaptors: dict[str, dict[str, Any]], feedforward: bool, masks: dict[str, Tensor]) -> None:
        super().__init__()
        self.weight, self.bias = linear.weight, linear.bias
        self.is_conv, self.masks, self.adaptors, self.feedforward = not isinstance(linear, nn.Linear), masks, adaptors, feedforward
        n_out, n_in = reversed(linear.weight.shape) if self.is_conv else linear.weight.shape
        for leaf in ("lora_A", "lora_B"):
            setattr(self, leaf, nn.ModuleDict())
        for leaf in ("lora_bias", "bitfit_bias", "ia3_l"):
            setattr(self, leaf, nn.ParameterDict())
        for name, a in adaptors.items():
            if a["type"] == "lora":
                self.lora_A[name], self.lora_B[name] = nn.Linear(n_in, a["r"], bias=False), nn.Linear(a["r"], n_out, bias=False)
                if a["use_bias"] is True or (a["use_bias"] == "auto" and linear.bias is not None):
                    self.lora_bias[name] = nn.Parameter(torch.zeros(n_out))
            elif a["type"] == "bitfit" and (a["force_bias"] or linear.bias is not None):
                self.bitfit_bias[name] = nn.Parameter(torch.zeros(n_out))
            elif a["type"] == "ia3":
                self.ia3_l[name] = nn.Parameter(torch.zeros(n_in if feedforward else n_out))

    def forward(self, x: Tensor) -> Tensor:
        masks = {name: self.masks[name].reshape(*x.shape[:-1], 1) for name in self.adaptors if name in self.masks}
        gain = math.prod((1 + masks[name] * value for name, value in self.ia3_l.items() if name in masks), start=torch.ones(1))
        x = x * gain if self.feedforward else x
        y = x @ (self.weight if self.is_conv else self.weight.T)
        y = y if self.bias is None else y + self.bias
        y = y if self.feedforward else y * gain
        for name, mask in masks.items():
            if name in self.lora_A:
                a = self.adaptors[name]
                scale = a["scale_multiplier"] * a["lora_alpha"] / (math.sqrt(a["r"]) if a["use_rslora"] else a["r"])
                y = y + mask * scale * (x @ self.lora_A[name].weight.T @ self.lora_B[name].weight.T)
            for biases in (self.lora_bias, self.bitfit_bias):
                if name in biases:
                    y = y + mask * biases[name]
        return y


class Composite(nn.Module):
    def __init__(self, kind: str, adaptors: dict[str, dict[str, Any]]) -> None:
        super().__init__()
        self.adaptors = adaptors
        self.masks: dict[str, Tensor] = {}
        self.map: dict[str, Any] = {}
        ids = {"vocab_size": VOCABULARY, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
        self.text_model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **SIZES[kind], **ids), attn_implementation="eager")
        for name, module in list(self.text_model.named_modules()):
            inside = {a: s for a, s in adaptors.items() if name.rsplit(".", 1)[-1] in s["target_modules"] and not any(e in name for e in s["exclude_modules"] or ())}
            if inside and hasattr(module, "weight"):
                feedforward = {name.rsplit(".", 1)[-1] in s["feedforward_modules"] for s in inside.values() if s["type"] == "ia3"} == {True}
                parent, _, last = name.rpartition(".")
                setattr(self.text_model.get_submodule(parent), last, Wrapped(module, inside, feedforward, self.masks))
                self.map[name] = {"adaptors": list(inside), "feedforward": feedforward}
        names = {"norm": nn.LayerNorm(DV), "in_proj": nn.Linear(DV, D, bias=False), "out_proj": nn.Linear(D, D, bias=False)}
        self.connector: Any = nn.ModuleDict({"image": nn.ModuleDict(names)})
        self.connector["image"].bos_bias, self.connector["image"].eos_bias = nn.Parameter(torch.zeros(D)), nn.Parameter(torch.zeros(D))
        generator = torch.Generator().manual_seed(7)
        with torch.no_grad():
            for parameter in self.parameters():
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.2 + (1.0 if parameter.ndim == 1 else 0.0))

    def connected(self, features: Tensor) -> Tensor:
        c = self.connector["image"]
        inner = c["out_proj"](nn.functional.gelu(c["in_proj"](c["norm"](features))))
        ends = [one.expand(len(features), 1, D) for one in (c.eos_bias, c.bos_bias)]  # as released: the one called eos is first
        return torch.cat([ends[0], inner, ends[1]], 1)

    def forward(self, ids: Tensor, features: Tensor, routing: dict[str, tuple[str, ...]], mask: Tensor | None = None, n_prompt: int = 18) -> Tensor:
        is_image = (ids == PAD_IMAGE) & (torch.arange(ids.shape[1]) < n_prompt)  # what is generated is text
        self.masks.clear()
        for name, modalities in routing.items():
            chosen = [is_image if modality == "image" else ~is_image for modality in modalities]
            self.masks[name] = torch.stack(chosen).any(0)[..., None].double()
        embedded = self.text_model.get_input_embeddings()(ids).masked_scatter(is_image[..., None], self.connected(features))
        extra = {} if mask is None else {"attention_mask": mask, "position_ids": (mask.cumsum(1) - 1).clamp(min=0)}
        return self.text_model(inputs_embeds=embedded, use_cache=False, **extra).logits


def make(kind: str, adaptors: dict[str, dict[str, Any]], frequencies: Literal["exact", "rounded", "stored"] = "exact") -> Case:
    """frequencies: of rotary positions: exact, rounded to float32, or others than usual, which the file holds."""
    with InDouble():
        model = Composite(kind, adaptors).double().eval()
        rotary = {f"text_model.{name}": 1.25 * value for name, value in model.text_model.named_buffers() if frequencies == "stored" and name.endswith("rotary_emb.inv_freq")}
        set_frequencies(model, rotary)
        if frequencies == "rounded":
            rounded_frequencies(model)
        generator = torch.Generator().manual_seed(3)
        ids = torch.randint(3, 40, (2, 18), generator=generator)
        ids[0, 2 : 2 + PATCHES + 2], ids[1, 6 : 6 + PATCHES + 2], ids[0, 15:] = PAD_IMAGE, PAD_IMAGE, 0
        mask, labels = torch.ones_like(ids), torch.full_like(ids, -100)
        mask[0, 15:] = 0
        labels[0, 10:14], labels[1, 13:17] = ids[0, 11:15], ids[1, 14:18]
        features = torch.randn(2, PATCHES, DV, generator=generator).double()
        own = {name: tuple(a["modalities"]) for name, a in adaptors.items()}
        tensors = {"in.input_ids": ids, "in.attention_mask": mask, "in.labels": labels, "tap.vision_features": features, "variant.positions": torch.arange(0, 18, 3)}
        stack = max((m for m in model.text_model.modules() if isinstance(m, nn.ModuleList)), key=len)
        seen: dict[str, Tensor] = {}
        stack[0].register_forward_pre_hook(lambda m, a, k: seen.update(layer0_in=a[0] if a else k["hidden_states"]), with_kwargs=True)
        for i, layer in enumerate(stack):
            layer.register_forward_hook(lambda m, a, out, i=i: seen.update({f"layer{i}_out": out[0] if isinstance(out, tuple) else out}))
        for name, routing in {"": own, **{f"{name}_only": {name: own[name]} for name in own}, "none": {}}.items():
            logits = model(ids, features, routing)
            each = nn.functional.cross_entropy(logits.transpose(1, 2), labels, ignore_index=-100, reduction="none").sum(1) / (labels != -100).sum(1)
            if name:
                tensors |= {f"variant.{name}.logits": logits[:, tensors["variant.positions"]], f"variant.{name}.loss": each.mean()}
                continue
            tensors |= {f"tap.mask.{a}": value.clone() for a, value in model.masks.items()} | {f"tap.{key}": value for key, value in seen.items()}
            right = [logits[i, labels[i] != -100].argmax(-1) == labels[i][labels[i] != -100] for i in range(2)]
            tensors |= {"tap.connector_out": model.connected(features), "out.acc": torch.stack([row.double().mean() for row in right]).mean()}
            tensors |= {"out.ppl": each.exp().mean(), "out.gap": logits[0, 0, 0] - logits[0, 0, 1], "out.sums": logits.sum(-1)}
            tensors |= {"out.logits": logits, "out.loss_per_sample": each, "out.loss": each.mean()}
            trained = {n: p for n, p in model.named_parameters() if n.startswith("connector") or any(f".{leaf}." in n for leaf in ("lora_A", "lora_B", "lora_bias", "bitfit_bias", "ia3_l"))}  # fmt: skip
            gradients = dict(zip(trained, torch.autograd.grad(each.mean(), list(trained.values())), strict=True))
            tensors |= {f"grad.{n}": g for n, g in gradients.items()} | {"out.grad_norm_total": torch.stack([g.norm() for g in gradients.values()]).norm()}
        tensors |= _generated(model, ids, features, own)
    tensors |= {f"w.{name}": value for name, value in rotary.items()}
    tensors |= {f"w.{name}": value for name, value in model.state_dict().items() if not (name.endswith("lm_head.weight") and SIZES[kind].get("tie_word_embeddings", True))}  # fmt: skip
    config = {
        "adaptors": adaptors, "active_adaptors": list(adaptors), "text_config": {**model.text_model.config.to_dict(), "model_type": kind}, "image_pad_token_id": PAD_IMAGE,
        "connector": {"activation": "gelu", "bias": False, "dropout": 0.0, "layernorm_eps": 1e-5},
    }  # fmt: skip
    counts = {name: sum(p.numel() for n, p in trained.items() if n.endswith((f".{name}", f".{name}.weight"))) for name in adaptors}
    spec = {"config": config, "wrapped_modules": model.map, "trainable": list(trained), "exactly_zero_grads": [], "n_adaptor_params": counts, "keys": {"gen": "eos=2, pad=0", "out.sums": "for information only"}}  # fmt: skip
    return Case(spec, {name: value.detach() for name, value in tensors.items()})


def _generated(model: Composite, ids: Tensor, features: Tensor, own: dict[str, tuple[str, ...]]) -> dict[str, Tensor]:
    """Greedy, without a cache: six more tokens after a left-padded prompt."""
    prompts = torch.stack([torch.cat([torch.zeros(4, dtype=torch.int64), ids[0, :11]]), ids[1, :15]])
    whole, steps = prompts.clone(), []
    mask = (torch.arange(15) >= torch.tensor([[4], [0]])).long()
    ended = torch.zeros(2, dtype=torch.bool)
    for _ in range(6):
        steps.append(model(whole, features, own, mask, 15)[:, -1].detach())
        new = steps[-1].argmax(-1).masked_fill(ended, 0)
        ended |= new == 2
        whole, mask = torch.cat([whole, new[:, None]], 1), torch.cat([mask, torch.ones(2, 1, dtype=torch.int64)], 1)
    found = _beams(model, prompts, mask[:, :15], features, own, 3)
    return {"gen.beams3.output_ids": found, "gen.input_ids": prompts, "gen.attention_mask": mask[:, :15], "gen.output_ids": whole, "gen.step_logits": torch.stack(steps, 1)}


def _beams(model: Composite, prompts: Tensor, mask: Tensor, features: Tensor, own: dict[str, tuple[str, ...]], beams: int) -> Tensor:
    """transformers' own search on the wrapped linears, whose masks are set before each call: of the prompt, then text alone."""
    is_image = prompts == PAD_IMAGE

    def route(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        given = kwargs.get("inputs_embeds")
        here = is_image.repeat_interleave(beams, 0) if given is not None else torch.zeros(len(prompts) * beams, 1, dtype=torch.bool)
        assert given is None or given.shape[:2] == here.shape
        for name, modalities in own.items():
            model.masks[name] = torch.stack([here if modality == "image" else ~here for modality in modalities]).any(0)[..., None].double()

    hook = model.text_model.register_forward_pre_hook(route, with_kwargs=True)
    embedded = model.text_model.get_input_embeddings()(prompts).masked_scatter(is_image[..., None], model.connected(features))
    with torch.no_grad():
        new = model.text_model.generate(inputs_embeds=embedded, attention_mask=mask, num_beams=beams, max_new_tokens=6, do_sample=False)
    hook.remove()
    return torch.cat([prompts, nn.functional.pad(new, (0, 6 - new.shape[1]))], 1)
