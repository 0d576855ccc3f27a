"""What every case of Context-PEFT must show, whether its reference is the authors' code or a plain computation made here."""

from __future__ import annotations

from typing import Any

import torch
from context_peft_case import LEAVES, Case, close
from double import InDouble
from fixture_file import refuse_unchecked
from torch import Tensor, nn

from adalink import IMAGE, PAD, TEXT, attach
from adalink.attachment.attachment import Attachment

MODALITIES = {IMAGE: "image", TEXT: "text"}


def check_features(case: Case) -> None:
    with InDouble():
        close(case.features(), case.tensors["tap.vision_features"])


def check_training(case: Case) -> None:
    """Activations, logits, losses and every gradient."""
    with InDouble():
        model = case.model()
        adapter = case.adapter(model, case.routing)
        attachment = attach(model, adapter, anatomy=case.anatomy(model))
        seen = _taps(attachment, case)
        logits = _logits(case, model, attachment, padding=TEXT)
        losses = case.losses(logits)
        losses.mean().backward()
    close(logits, case.tensors["out.logits"])
    close(losses, case.tensors["out.loss_per_sample"])
    close(losses.mean(), case.tensors["out.loss"])
    compared = case.metrics(logits)
    for name in compared.keys() & case.under("out.").keys():
        close(compared[name], case.tensors[f"out.{name}"])
    refuse_unchecked(case.under("out."), {"logits", "loss", "loss_per_sample", "grad_norm_total", *compared}, case.spec)
    assert {"connector_out"} & case.under("tap.").keys() <= seen.keys()
    assert {f"layer{len(attachment.anatomy.layers) - 1}_out", "layer0_in"} <= seen.keys() & case.under("tap.").keys()
    for name in seen.keys() & case.under("tap.").keys():
        close(seen[name], case.tensors[f"tap.{name}"])
    gradients = dict(case.named(adapter, attachment.anatomy, "grad"))
    assert set(gradients) == set(case.under("grad.")) == set(case.spec["trainable"])
    for name, expected in case.under("grad.").items():
        close(gradients[name], expected)
    assert all(not gradients[name].any() for name in case.spec.get("exactly_zero_grads", ()))
    close(torch.stack([value.norm() for value in gradients.values()]).norm(), case.tensors["out.grad_norm_total"])


def check_routing(case: Case) -> None:
    """Which tokens each adaptor edits, in which linears, and by how much."""
    model = case.model()
    adapter, anatomy = case.adapter(model, case.routing), case.anatomy(model)
    n_rows, length = case.tensors["in.input_ids"].shape
    tokens = case.token_map(case.tensors["in.input_ids"], None).window(n_rows, 0, length, length)
    edited: dict[str, set[str]] = {name: set() for name in case.adaptors}
    for placement in adapter.placements:
        if placement.role == "bridge.image":
            continue
        group = placement.role.split(".")[1]
        edited[group].add(f"{anatomy.stack}.{placement.port.module}")
        assert torch.equal(tokens.select(placement.domains, 0), case.tensors[f"tap.mask.{group}"].bool())
        if group in case.config.get("scaling", {}):
            assert abs(placement.edit.scale - case.config["scaling"][group]) < 1e-12
    biased = {name for name, settings in case.adaptors.items() if settings["type"] == "bitfit" and not settings["force_bias"]}
    for name, modules in edited.items():
        listed = {module for module, inside in case.spec["wrapped_modules"].items() if name in inside["adaptors"]}
        assert modules <= listed if name in biased else modules == listed
    leaves = [(found[2], value) for key, value in case.named(adapter, anatomy) if (found := LEAVES.search(key))]
    counts = {name: sum(value.numel() for group, value in leaves if group == name) for name in case.adaptors}
    assert counts == {name: case.spec["n_adaptor_params"][name] for name in counts}


def check_padding(case: Case) -> None:
    """Padding as nobody's tokens: real tokens, the loss and every gradient are what they are with padding as text."""
    mask = case.tensors["in.attention_mask"].bool()
    with InDouble():
        model = case.model()
        adapter = case.adapter(model, case.routing)
        attachment = attach(model, adapter, anatomy=case.anatomy(model))
        logits = _logits(case, model, attachment, padding=PAD)
        case.losses(logits).mean().backward()
    close(logits[mask], case.tensors["out.logits"][mask])
    for name, gradient in case.named(adapter, attachment.anatomy, "grad"):
        close(gradient, case.tensors["grad." + name])


def check_variants(case: Case) -> None:
    """The same weights on other tokens, or none."""
    names = {name.split(".")[0] for name in case.under("variant.") if name != "positions"}
    for name in sorted(names):
        with InDouble(), torch.no_grad():
            model = case.model()
            attachment = attach(model, case.adapter(model, case.variant(name)), anatomy=case.anatomy(model))
            logits = _logits(case, model, attachment, padding=TEXT)
            close(logits[:, case.tensors["variant.positions"]], case.tensors[f"variant.{name}.logits"])
            close(case.losses(logits).mean(), case.tensors[f"variant.{name}.loss"])


def check_generation(case: Case) -> None:
    """Ids of every generation stored, and of greedy the logits of every step that a row was alive in."""
    ids, mask = case.tensors["gen.input_ids"], case.tensors["gen.attention_mask"]
    special = case.special_ids()
    with InDouble():
        model: Any = case.model()
        attachment = attach(model, case.adapter(model, case.routing), anatomy=case.anatomy(model))
        for padding in (TEXT, PAD):
            for beams, expected in case.generated():
                settings = {"max_length": expected.shape[1], "num_beams": beams, "do_sample": False, "early_stopping": False, **special}
                with attachment.bind(case.token_map(ids, mask, padding=padding)), torch.no_grad():
                    output = model.generate(input_ids=ids, attention_mask=mask, output_logits=True, return_dict_in_generate=True, **settings)
                n = output.sequences.shape[1]
                assert torch.equal(output.sequences, expected[:, :n])
                assert bool((expected[:, n:] == special["pad_token_id"]).all())
                if beams == 1:
                    _check_steps(torch.stack(output.logits, 1), expected[:, ids.shape[1] :], case)


def _check_steps(logits: Tensor, new: Tensor, case: Case) -> None:
    ended = (new == case.special_ids()["eos_token_id"]).cumsum(1)
    alive = (ended - (new == case.special_ids()["eos_token_id"]).long() == 0)[:, : logits.shape[1]]
    close(logits[alive], case.tensors["gen.step_logits"][:, : logits.shape[1]][alive], tolerance=1e-5)  # stored in float32


def _logits(case: Case, model: nn.Module, attachment: Attachment, padding: int) -> Tensor:
    ids = case.tensors["in.input_ids"]
    with attachment.bind(case.token_map(ids, case.tensors["in.attention_mask"], padding=padding)):
        return model(input_ids=ids).logits  # without an attention mask, as the released trainer


def _taps(attachment: Attachment, case: Case) -> dict[str, Tensor]:
    seen: dict[str, Tensor] = {}

    def keep(name: str, value: Tensor | tuple[Tensor, ...]) -> None:
        seen[name] = value[0] if isinstance(value, tuple) else value

    is_image = case.tensors["in.input_ids"] == case.config["image_pad_token_id"]
    embedding = attachment.stack.get_submodule(attachment.anatomy.embedding)
    embedding.register_forward_hook(lambda m, args, out: keep("connector_out", out[is_image].reshape(len(out), -1, out.shape[-1])))
    layers = [attachment.stack.get_submodule(name) for name in attachment.anatomy.layers]
    layers[0].register_forward_pre_hook(lambda m, args, kwargs: keep("layer0_in", args[0] if args else kwargs["hidden_states"]), with_kwargs=True)
    for i, layer in enumerate(layers):
        layer.register_forward_hook(lambda m, args, out, i=i: keep(f"layer{i}_out", out))
    return seen
