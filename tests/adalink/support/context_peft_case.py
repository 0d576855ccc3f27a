"""One file of fixtures/context_peft, or one made in the same form: the model, the adapters and the inputs that its .json describes."""

from __future__ import annotations

import json
import re
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from double import FREQUENCIES, InDouble, rounded_frequencies, set_frequencies
from fixture_file import FixtureFile
from torch import Tensor, nn
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

from adalink import ANSWER, IA3, IMAGE, PAD, TEXT, Adapter, Anatomy, BitFit, Bridge, InputSpec, LoRA, Method, TokenMap, attach
from adalink.attachment.attachment import Attachment

LEAVES = re.compile(r"\.(lora_A|lora_B|lora_bias|bitfit_bias|ia3_l)\.([^.]+)(\.weight)?$")
OURS = {"down.weight": "lora_A.{}.weight", "up.weight": "lora_B.{}.weight", "gain": "ia3_l.{}"}
BOUNDARY = ("connector.image.eos_bias", "connector.image.bos_bias")  # in the released code the one called eos stands before the image
CONNECTOR = {"norm": "layers.0", "in_proj": "layers.1", "out_proj": "layers.3"}
BIAS = {True: "all", False: "none", None: "none"}
Routing = Mapping[str, tuple[str, ...]]  # adaptor -> the modalities that it serves


@dataclass(frozen=True)
class Case(FixtureFile):
    """The model, its adapters and its inputs."""

    @property
    def config(self) -> Mapping[str, Any]:
        return self.spec["config"]

    @property
    def adaptors(self) -> Mapping[str, Mapping[str, Any]]:
        active = self.config.get("active_adaptors") or list(self.config["adaptors"])
        return {name: self.config["adaptors"][name] for name in active}

    @property
    def routing(self) -> Routing:
        """As published: each adaptor on its own modalities."""
        routes = self.config.get("adaptor_map") or self.adaptors
        assert not any(route.get("messages") for route in routes.values()), "adaptors for some messages only are not in the spec"
        return {name: tuple(routes[name].get("modalities") or ("image", "text")) for name in self.adaptors}

    def variant(self, name: str) -> Routing:
        own, everything = self.routing, tuple(dict.fromkeys(modality for modalities in self.routing.values() for modality in modalities))
        swap = {"image": "text", "text": "image"}
        if name == "none":
            return {}
        if name.removesuffix("_only") in own:
            return {name.removesuffix("_only"): own[name.removesuffix("_only")]}
        if (shared := re.fullmatch("shared_(.+)_weights", name)) and shared[1] in own:
            return {shared[1]: everything}
        if name in ("both_on_all", "all_on_all"):
            return dict.fromkeys(own, everything)
        assert name == "swapped", f"the variant {name} is not known"
        return {adaptor: tuple(swap[modality] for modality in modalities) for adaptor, modalities in own.items()}

    def model(self) -> nn.Module:
        settings = dict(self.config["text_config"])
        kind = settings.pop("model_type", self.config.get("text_kind"))
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **settings), attn_implementation="eager").double().eval()
        weights = {name: value for name, value in self.under("w.text_model.").items() if not LEAVES.search(name)}
        frequencies = {name: weights.pop(name) for name in list(weights) if name.endswith(FREQUENCIES)}
        missing, unexpected = model.load_state_dict(weights, strict=False)
        assert not unexpected
        assert set(missing) <= ({"lm_head.weight"} if model.config.tie_word_embeddings else set())
        set_frequencies(model, frequencies)
        if not frequencies and self._rounds_frequencies:
            rounded_frequencies(model)
        return model

    @cached_property
    def _rounds_frequencies(self) -> bool:
        """Whether the file was made with frequencies in float32: it then fits rounded ones better than exact ones."""
        off = []
        for rounds in (False, True):
            self.__dict__["_rounds_frequencies"] = rounds
            with InDouble(), torch.no_grad():
                off.append((self.logits(self.model())[0] - self.tensors["out.logits"]).abs().max())
        return bool(off[1] < off[0])

    def logits(self, model: nn.Module, adapter: Adapter | None = None, *, padding: int = TEXT) -> tuple[Tensor, Attachment]:
        """Of the training batch, and what the adapter is attached with."""
        attachment = attach(model, adapter or self.adapter(model, self.routing), anatomy=self.anatomy(model))
        ids = self.tensors["in.input_ids"]
        with attachment.bind(self.token_map(ids, self.tensors["in.attention_mask"], padding=padding)):
            return model(input_ids=ids).logits, attachment  # without an attention mask, as the released trainer

    def features(self) -> Tensor:
        """[B, N, Dv]: the penultimate states of the patches."""
        settings = dict(self.config["vision_config"])
        tower = AutoModel.from_config(AutoConfig.for_model(settings.pop("model_type"), **settings)).double().eval()
        wanted = set(tower.state_dict())
        stored = self.under("w.vision_model.")
        tower.load_state_dict({name if name in wanted else name.removeprefix("vision_model."): value for name, value in stored.items()})
        with torch.no_grad():
            return tower(self.tensors["in.pixel_values"], output_hidden_states=True).hidden_states[-2][:, -self.config["image_seq_len"] :]  # a CLS token, where there is one, is the first

    def anatomy(self, model: nn.Module) -> Anatomy:
        return replace(Anatomy.read(model), inputs={"image": InputSpec(*self.tensors["tap.vision_features"].shape[1:])})

    def adapter(self, model: nn.Module, routing: Routing) -> Adapter:
        """The connector, and the adaptors of a routing: one method for those that share their settings, as a person would write it."""
        anatomy = self.anatomy(model)
        alike: dict[str, list[str]] = defaultdict(list)
        for name in routing:
            own = ("modalities", "r", "lora_alpha", "scale_multiplier", "messages", "initialization")
            settings = {key: value for key, value in self.adaptors[name].items() if key not in own}
            alike[json.dumps([settings, sorted(self._wrapped(name))], sort_keys=True)].append(name)
        chosen: dict[str, Method] = {"bridge": self._bridge()}
        for i, names in enumerate(alike.values()):
            chosen[f"method{i}"] = self._method(names, {name: routing[name] for name in names}, anatomy)
        adapter = Adapter(chosen, anatomy).double().eval()
        with torch.no_grad():
            for official, parameter in self.named(adapter, anatomy):
                parameter.copy_(self.tensors["w." + official])
        return adapter

    def named(self, adapter: Adapter, anatomy: Anatomy, part: str = "data") -> Iterator[tuple[str, Tensor]]:
        """(official name, our parameter or its gradient)."""
        for placement in adapter.placements:
            for name, parameter in placement.edit.named_parameters():
                value: Any = getattr(parameter, part)
                if name == "boundary":
                    yield from zip(BOUNDARY, value, strict=True)
                elif placement.role == "bridge.image":
                    module, leaf = next((theirs, name.removeprefix(ours)) for theirs, ours in CONNECTOR.items() if name.startswith(ours))
                    yield f"connector.image.{module}{leaf}", value
                else:
                    method, group, _ = placement.role.split(".", 2)
                    bias = "lora_bias.{}" if isinstance(adapter.methods[method], LoRA) else "bitfit_bias.{}"
                    yield f"text_model.{anatomy.stack}.{placement.port.module}.{OURS.get(name, bias).format(group)}", value

    def _bridge(self) -> Bridge:
        settings, stored = self.config["connector"], self.under("w.connector.image.")
        return Bridge(
            kind="mlp", hidden=stored["in_proj.weight"].shape[0], bias=settings["bias"], activation=settings["activation"], dropout=settings["dropout"],
            norm="layer" if "norm.weight" in stored else "none", norm_eps=settings["layernorm_eps"], boundary="learned" if "bos_bias" in stored else "none",
        )  # fmt: skip

    def _wrapped(self, adaptor: str) -> list[str]:
        return [module for module, inside in self.spec["wrapped_modules"].items() if adaptor in inside["adaptors"]]

    def _method(self, names: Sequence[str], routing: Routing, anatomy: Anatomy) -> Method:
        first = self.adaptors[names[0]]
        wrapped = {module.removeprefix(anatomy.stack + "."): self.spec["wrapped_modules"][module] for module in self._wrapped(names[0])}
        asked = first["target_modules"] if isinstance(first["target_modules"], list) else sorted({module.rsplit(".", 1)[-1] for module in wrapped})
        targets = tuple(name for name in asked if any(("." + module).endswith("." + name) for module in wrapped))
        left = [linear.name for linear in anatomy.linears if linear.name not in wrapped and ("." + linear.name).endswith(tuple("." + name for name in targets))]
        layers = tuple(i for i, layer in enumerate(anatomy.layers) if not any(module.startswith(layer + ".") for module in wrapped))
        rest = [name for name in left if not any(name.startswith(anatomy.layers[i] + ".") for i in layers)]
        dropout = {name: (self.config.get("adaptor_dropout") or {}).get(name, 0.0) for name in names}
        common: dict[str, Any] = {"groups": dict(routing), "exclude": tuple(rest), "exclude_layers": layers, "dropout": dropout}
        if first["type"] == "lora":
            return LoRA(
                rank={name: self.adaptors[name]["r"] for name in names}, alpha={name: self.adaptors[name]["lora_alpha"] for name in names},
                multiplier={name: self.adaptors[name].get("scale_multiplier", 1.0) for name in names}, bias=BIAS.get(first["use_bias"], first["use_bias"]),
                scaling="rank_stabilized" if first["use_rslora"] else "standard", targets=targets, **common,
            )  # fmt: skip
        if first["type"] == "bitfit":
            return BitFit(force_bias=first["force_bias"], targets=targets, **common)
        assert first["type"] == "ia3", f"the adaptor type {first['type']} is not in the spec"
        inner = {module.rsplit(".", 1)[-1] for module, inside in wrapped.items() if inside["feedforward"]}
        attention = tuple(name for name in targets if name.rsplit(".", 1)[-1] not in inner)
        return IA3(attention=attention, feed_forward=tuple(name for name in targets if name not in attention), **common)

    def token_map(self, ids: Tensor, mask: Tensor | None, *, padding: int = TEXT) -> TokenMap:
        """Padding counts as text in the released code; `padding=PAD` is this project's way, which no real token can tell apart."""
        domain = torch.where(ids == self.config["image_pad_token_id"], IMAGE, TEXT)
        if mask is not None:
            domain = domain.masked_fill(mask == 0, padding)
        return TokenMap(domain, torch.zeros(len(ids), dtype=torch.int64), {"image": self.tensors["tap.vision_features"]}, generated=ANSWER)

    def losses(self, logits: Tensor) -> Tensor:
        """[B]: mean over each sample's labelled tokens; labels are shifted already."""
        labels = self.tensors["in.labels"]
        each = nn.functional.cross_entropy(logits.transpose(1, 2), labels, ignore_index=-100, reduction="none")
        return each.sum(1) / (labels != -100).sum(1)

    def metrics(self, logits: Tensor) -> dict[str, Tensor]:
        """What the released trainer prints: the share of labelled tokens that are the likeliest, and the mean of exp(loss) over samples."""
        labels = self.tensors["in.labels"]
        right, labelled = (logits.argmax(-1) == labels) & (labels != -100), labels != -100
        return {"acc": (right.sum(1) / labelled.sum(1)).mean(), "ppl": self.losses(logits).exp().mean()}

    def generated(self) -> Iterator[tuple[int, Tensor]]:
        """(beams, ids) of every generation stored."""
        for name, ids in self.under("gen.").items():
            if name.endswith("output_ids"):
                beams = re.search(r"beams?_?(\d+)|(\d+)_?beams?", name)
                assert beams or "beam" not in name, f"gen.{name} does not say how many beams it has"
                yield int(beams[1] or beams[2]) if beams else 1, ids

    def special_ids(self) -> dict[str, int]:
        """End and padding, as the .json's words on `gen.output_ids` have them."""
        words = " ".join(self.spec["keys"].values())
        note = {name: re.search(rf"\b{name}=(\d+)", words) for name in ("eos", "pad")}
        padding = self.tensors["gen.input_ids"][self.tensors["gen.attention_mask"] == 0]
        read = {"eos": self.spec.get("assistant_suffix_ids", [2])[-1], "pad": int(padding[0]) if len(padding) else 0}
        return {f"{name}_token_id": int(found[1]) if found else read[name] for name, found in note.items()}


def close(actual: Tensor, expected: Tensor, tolerance: float = 1e-10) -> None:
    torch.testing.assert_close(actual.detach(), expected.to(actual.dtype), rtol=0, atol=tolerance)


assert PAD < 0
