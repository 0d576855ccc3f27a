"""What every method promises, on every family: the tests that a new method passes before it is worth reading further.

Methods that are not in METHODS yet are here too (a linear's output, a layer's input, a mask), so that every port is proven.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product

import pytest
import torch
from shared import covering
from tiny import DECODERS, EXACT, FAMILIES, INPUTS, excite, features, positions, rows, run, tiny, token_map
from torch import Tensor, nn

from adalink import (
    ANSWER,
    BASE_ROW,
    EPALM,
    IA3,
    IMAGE,
    IST,
    PAD,
    PERCEPT,
    PROMPT,
    TEXT,
    WARP,
    AdaLink,
    AdaLoRA,
    AdaptedModel,
    Adapter,
    Anatomy,
    BitFit,
    Bottleneck,
    Bridge,
    DePT,
    Gated,
    HiRA,
    Hyper,
    Ladder,
    LoRA,
    Placement,
    Port,
    Prefix,
    Prompt,
    Selected,
    Slots,
    Sparse,
    SparseDelta,
    TokenMap,
    UniPELT,
    attach,
)
from adalink.checkpoint.precision import cast
from adalink.edit import Compact
from adalink.methods import METHODS
from adalink.methods.budgets.hyper import Tasks
from adalink.methods.ladder import Seen


class Shift(nn.Module):
    """h + b: BitFit's edit."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.bias = nn.Parameter(torch.zeros(width))

    def forward(self, h: Tensor, tokens: object, x: Tensor) -> Tensor:
        return h + self.bias


@dataclass(frozen=True)
class DeepShift:
    """A shift at every linear's output and every layer's input, on text: stands for the methods that edit inside the model."""

    def slots(self, anatomy: Anatomy) -> tuple[Slots, ...]:
        return ()

    def place(self, anatomy: Anatomy) -> Sequence[Placement]:
        linears = [Placement(linear.name, Port(linear.name, "output"), Shift(linear.n_out), (TEXT, ANSWER)) for linear in anatomy.linears]
        width = anatomy.linears[0].n_in
        return [*linears, *(Placement(f"{layer}.input", Port(layer, "input"), Shift(width), (TEXT,)) for layer in anatomy.layers)]


METHODS_UNDER_TEST = {
    "adalink": {"adalink": AdaLink(rank=4, modalities=("text", "image"), activation="gelu", bias=True)},
    "adalink_prompt_scope": {"adalink": AdaLink(rank=4, modalities=("text", "image"), scope="prompt")},
    "bridge_linear": {"bridge": Bridge(kind="linear")},
    "bridge_mlp": {"bridge": Bridge(kind="mlp", hidden=8)},
    "prompt": {"prompt": Prompt(length=2, init_std=0.5)},
    "deep": {"deep": DeepShift()},
    "epalm": {"epalm": EPALM(layers=(0, 2), n_taps=2, connector="per_tap"), "prompt": Prompt(length=2, init_std=0.5, form="mlp", positions="none")},
    "epalm_late": {"epalm": EPALM(layers=(1, 2), n_taps=2, connector="shared", mask="published")},
    "epalm_leaks": {"epalm": EPALM(layers=(0, 1), n_taps=2, connector="shared", mask="published")},
    "bridge_boundary": {"bridge": Bridge(kind="mlp", bias=False, boundary="learned")},
    "lora": {"lora": LoRA(groups={"image": ("image",), "text": ("text",), "shared": ("image", "text")}, rank={"image": 4, "text": 2, "shared": 1}, alpha=4, bias="all")},
    "lora_query_value": {"lora": LoRA(groups={"all": ("all",)}, rank=2, alpha=2, scaling="rank_stabilized", targets=("query", "value"))},
    "adalora": {"adalora": AdaLoRA(groups={"image": ("image",), "shared": ("image", "text")}, init_rank=3, target_rank=1)},
    "sparse": {"sparse": Sparse(inner=AdaLink(rank=4, modalities=("text", "image")), fraction=0.2)},
    "sparse_delta": {"sparse_delta": SparseDelta(groups={"image": ("image",), "shared": ("image", "text")}, fraction=0.2)},
    "bitfit": {"bitfit": BitFit(groups={"image": ("image",), "text": ("text",)}, force_bias=True)},
    "bottleneck": {"bottleneck": Bottleneck(width=4)},
    "prefix": {"prefix": Prefix(length=2, form="table", init_std=0.5)},
    "prefix_mlp": {"prefix": Prefix(length=2, form="mlp", init_std=0.5, hidden=6)},
    "prefix_late": {"prefix": Prefix(length=2, form="table", init_std=0.5, exclude_layers=(0,)), "bottleneck": Bottleneck(width=4, exclude_layers=(0,))},
    "gated_adalink": {"gated": Gated(inner=AdaLink(rank=4, modalities=("text", "image")))},
    "unipelt_ap": {"unipelt": UniPELT(variant="AP", bottleneck=4, prefix_length=2, prefix_form="table", prefix_init_std=0.5)},
    "unipelt_apl": {"unipelt": UniPELT(variant="APL", bottleneck=4, prefix_length=2, prefix_hidden=6, lora_rank=2)},
    "ia3": {"ia3": IA3(groups={"image": ("image",), "shared": ("image", "text")})},
    "dept": {"dept": DePT(length=2, rank=2, max_length=5, init_std=0.5, modalities=("text", "image"))},
    "warp": {"warp": WARP(start=1, after_text=1, init_std=0.5)},
    "hira": {"hira": HiRA(groups={"image": ("image",), "shared": ("image", "text")}, rank=2)},
    "hyper": {"hyper": Hyper(prototypes=("a", "b"), width=4, size=6)},
    "ladder": {"ladder": Ladder(reduction=4), "bridge": Bridge(kind="linear")},
    "ladder_add": {"ladder": Ladder(reduction=2, rungs=(1,), output="add")},
    "ladder_side": {"ladder": Ladder(reduction=2, image="side_only"), "bridge": Bridge(kind="linear")},
    "selected": {"selected": Selected(inner=LoRA(groups={"image": ("image",), "text": ("text",)}, rank=2), per="group")},
    "ist": {"bottleneck": Bottleneck(width=4), "ist": IST()},
    "all_at_once": {
        "adalink": AdaLink(rank=4, modalities=("text", "image")), "bridge": Bridge(kind="mlp"), "prompt": Prompt(length=2, init_std=0.5), "deep": DeepShift(),
        "epalm": EPALM(layers=(1, 2), n_taps=1, connector="shared"),
    },
}  # fmt: skip
pytestmark = pytest.mark.long
IDENTITY_AT_START = (
    "adalink", "adalink_prompt_scope", "deep", "lora", "lora_query_value", "bitfit", "ia3", "hira", "gated_adalink", "adalora", "ladder_add", "sparse",
    "sparse_delta", "selected",
)  # fmt: skip
# A graph takes seconds, of LoRA on every linear fifteen. These four have every kind of edit: UniPELT gates a bottleneck, a prefix and LoRA, and BitFit's
# edit is that of `deep`. Each method alone is slow, and there the backward pass is made a graph as well.
COMPILED = (("all_at_once", "eager"), ("epalm_leaks", "aot_eager"), ("unipelt_apl", "eager"), ("ia3", "eager"))
COMPILED_ALONE = (
    "adalink", "adalora", "bitfit", "bottleneck", "dept", "epalm", "gated_adalink", "hira", "hyper", "ia3", "ladder", "lora", "prefix_mlp",
    "selected", "sparse_delta", "unipelt_apl", "sparse", "warp", "ist",
)  # fmt: skip
HALF = {torch.bfloat16: (0.015, 0.04), torch.float16: (0.002, 0.02)}  # how far logits and gradients may be off, as shares of their norms
T5_HALF = {torch.bfloat16: (0.015, 0.2), torch.float16: (0.002, 0.1)}  # its attention has no scale: of random weights it is all but a choice of one
HARD = ("all_at_once", "epalm_late", "lora_query_value")  # every port at once; rows that read each other; linears that one weight holds together


def sampled(*names: str, families: tuple[str, ...] = FAMILIES, shift: int = 0) -> pytest.MarkDecorator:
    """Every method on every family, of which the default suite runs each method on one family, another one in each test, and the hard ones on all."""
    pairs = covering(((name, family) for name in names or METHODS_UNDER_TEST for family in families), each=1, shift=shift)
    return pytest.mark.parametrize(
        ("family", "name"),
        [pytest.param(family, name, marks=() if name in HARD else pair.marks) for pair in pairs for name, family in [pair.values]],
    )


def adapter_for(name: str, model: nn.Module, *, excited: int | None = 1) -> Adapter:
    adapter = Adapter(METHODS_UNDER_TEST[name], Anatomy.read(model, INPUTS)).double()
    if excited is not None:
        excite(adapter, excited)
    return adapter


@sampled(shift=0)
def test_detach_restores_every_bit(family: str, name: str) -> None:
    model = tiny(family).train().requires_grad_(True)
    model.get_input_embeddings().weight.requires_grad_(False)  # a flag of the user's own
    before = copy.deepcopy(model.state_dict())
    flags = [p.requires_grad for p in model.parameters()]
    ids, _, mask = rows()
    with torch.no_grad():
        expected = run(model.eval(), ids, mask)
    model.train()
    attachment = attach(model, adapter_for(name, model), anatomy=Anatomy.read(model, INPUTS))
    attachment.checkpoint_layers()
    assert not any(p.requires_grad for p in model.parameters())
    attachment.detach()
    assert [p.requires_grad for p in model.parameters()] == flags
    assert all(module.training for module in model.modules())
    assert all(not m._forward_hooks and not m._forward_pre_hooks and "forward" not in vars(m) for m in model.modules())
    after = model.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[key], after[key]) for key in before)
    with torch.no_grad():
        assert torch.equal(run(model.eval(), ids, mask), expected)


@sampled(*IDENTITY_AT_START)
def test_a_new_adapter_leaves_the_model_as_it_was(family: str, name: str) -> None:
    model = tiny(family)
    ids, domain, mask = rows()
    expected = run(model, ids, mask)
    attachment = attach(model, adapter_for(name, model, excited=None), anatomy=Anatomy.read(model, INPUTS))
    with attachment.bind(token_map(domain)):
        assert torch.equal(run(model, ids, mask), expected)


@sampled(shift=1)
def test_rows_of_other_adapters_and_of_none_are_untouched_bit_for_bit(family: str, name: str) -> None:
    model = tiny(family)
    ids, domain, mask = rows()
    plain = run(model, ids, mask)
    first, second = adapter_for(name, model, excited=1), adapter_for(name, model, excited=5)

    def logits(attached: tuple[Adapter, ...], row: list[int]) -> Tensor:
        attachment = attach(model, *attached, anatomy=Anatomy.read(model, INPUTS))
        with attachment.bind(token_map(domain, torch.tensor(row))):
            result = run(model, ids, mask)
        attachment.detach()
        return result

    mixed = logits((first, second), [0, 1, BASE_ROW])
    assert torch.equal(mixed[0], logits((first,), [0, 0, 0])[0])
    assert torch.equal(mixed[1], logits((second,), [0, 0, 0])[1])
    assert torch.equal(mixed[2], plain[2])
    assert not torch.equal(mixed[0], plain[0])  # control: the edit does something


@sampled(shift=2)
def test_tokens_of_other_domains_are_untouched_bit_for_bit(family: str, name: str) -> None:
    model = tiny(family)
    ids, domain, mask = rows()
    adapter = adapter_for(name, model)
    touched = {d for placement in adapter.placements for d in placement.domains}
    attachment = attach(model, adapter, anatomy=Anatomy.read(model, INPUTS))
    seen: list[tuple[tuple[int, ...], Tensor, Tensor]] = []
    # Those at a cache act on cached calls alone, those beside a layer and Seen edit nothing, and Tasks reads the words and leaves them.
    placements = [one for one in adapter.placements if one.port.side not in ("cache", "detached", "beside") and not isinstance(one.edit, Tasks | Seen)]
    for placement in {placement.edit: placement for placement in placements}.values():  # one edit may be at several ports
        placement.edit.register_forward_hook(lambda m, args, out, p=placement: seen.append((p.domains, args[0], out)))
    stack = model.get_submodule(attachment.anatomy.stack)
    embedding = stack.get_submodule(attachment.anatomy.embedding)
    captured: list[Tensor] = []
    embedding.register_forward_hook(lambda m, args, out: captured.append(out))  # after ours: hooks run in order
    with attachment.bind(token_map(domain)):
        run(model, ids, mask)
    raw = nn.functional.embedding(ids, embedding.weight)
    other = ~torch.isin(domain, torch.tensor(sorted(touched)))
    assert torch.equal(captured[0][other], raw[other])
    assert len(seen) == len(placements)
    changed = {name: not torch.equal(h, out) for name, (_, h, out) in enumerate(seen)}
    assert all(changed.values())


@sampled(families=DECODERS, shift=1)
def test_cached_generation_with_beams_equals_uncached(family: str, name: str) -> None:
    check_cached(family, name, beams=3)


@pytest.mark.parametrize(("family", "name"), covering(product(DECODERS, METHODS_UNDER_TEST), each=0, hard=HARD))
def test_cached_generation_equals_uncached(family: str, name: str) -> None:
    check_cached(family, name, beams=1)


def check_cached(family: str, name: str, beams: int) -> None:
    model = tiny(family)
    ids, domain, mask = rows()
    ids, domain, mask = ids[:, :-2], domain[:, :-2], mask[:, :-2]  # the answer is to be generated
    attachment = attach(model, adapter_for(name, model), anatomy=Anatomy.read(model, INPUTS))
    kwargs = {"max_new_tokens": 6, "min_new_tokens": 6, "num_beams": beams, "do_sample": False, "attention_mask": mask, "pad_token_id": 0}
    with attachment.bind(token_map(domain)):
        cached = model.generate(ids, use_cache=True, **kwargs)
        uncached = model.generate(ids, use_cache=False, **kwargs)
    assert torch.equal(cached, uncached)
    assert cached.shape[1] == ids.shape[1] + 6


@sampled(families=DECODERS, shift=2)
def test_training_and_decoding_see_the_same_edits(family: str, name: str) -> None:
    if name == "epalm_leaks":
        pytest.skip("as published: a slot reads the whole text in training, and in decoding what there is of it")
    model = tiny(family)
    ids, domain, mask = rows()
    attachment = attach(model, adapter_for(name, model), anatomy=Anatomy.read(model, INPUTS))
    with attachment.bind(token_map(domain)):
        whole = run(model, ids, mask)
    n_prompt = ids.shape[1] - 2
    with attachment.bind(token_map(domain[:, :n_prompt])):
        output = model(input_ids=ids[:, :n_prompt], attention_mask=mask[:, :n_prompt], position_ids=positions(mask)[:, :n_prompt], use_cache=True)
        steps = [output.logits]
        for t in range(n_prompt, ids.shape[1]):
            output = model(
                input_ids=ids[:, t : t + 1], attention_mask=mask[:, : t + 1], position_ids=positions(mask)[:, t : t + 1],
                past_key_values=output.past_key_values, use_cache=True,
            )  # fmt: skip
            steps.append(output.logits)
    stepped = torch.cat(steps, 1)
    real = (domain != PAD) & ((domain != PERCEPT) | (name != "epalm_late"))  # there the slot's own output, which nobody reads, saw the text
    torch.testing.assert_close(stepped[real], whole[real], rtol=0, atol=EXACT[family])


@sampled(families=DECODERS, shift=3)
def test_mixed_rows_generate_what_they_generate_apart(family: str, name: str) -> None:
    model = tiny(family)
    ids, domain, mask = rows()
    ids, domain, mask = ids[:, :-2], domain[:, :-2], mask[:, :-2]
    attachment = attach(model, adapter_for(name, model, excited=1), adapter_for(name, model, excited=5), anatomy=Anatomy.read(model, INPUTS))
    kwargs = {"max_new_tokens": 5, "num_beams": 2, "do_sample": False, "pad_token_id": 0}

    def generated(row: list[int]) -> Tensor:
        with attachment.bind(token_map(domain, torch.tensor(row))):
            return model.generate(ids, attention_mask=mask, **kwargs)

    mixed, first, second, none = generated([0, 1, BASE_ROW]), generated([0] * 3), generated([1] * 3), generated([BASE_ROW] * 3)
    n = ids.shape[1]
    for i, apart in enumerate((first, second, none)):
        a, b = mixed[i, n:], apart[i, n:]
        shared_length = min(len(a), len(b))
        assert torch.equal(a[:shared_length], b[:shared_length])


@sampled(shift=3)
def test_checkpointed_gradients_equal_plain_ones(family: str, name: str) -> None:
    model = tiny(family)
    ids, domain, mask = rows()
    adapter = adapter_for(name, model)

    def gradients(checkpointed: bool) -> list[Tensor]:
        attachment = attach(model, adapter, anatomy=Anatomy.read(model, INPUTS))
        if checkpointed:
            attachment.checkpoint_layers()
        with attachment.bind(token_map(domain)):
            loss = run(model, ids, mask).square().sum()
        attachment.tokens = None
        result = torch.autograd.grad(loss, list(adapter.parameters()), allow_unused=True)
        attachment.detach()
        return [g for g in result if g is not None]

    plain, recomputed = gradients(False), gradients(True)
    assert len(plain) == len(recomputed) > 0
    assert any(g.abs().max() > 0 for g in plain)
    assert all(torch.equal(a, b) for a, b in zip(plain, recomputed, strict=True))


@pytest.mark.parametrize(
    ("name", "backend"), [*COMPILED, *(pytest.param(name, "aot_eager", marks=pytest.mark.slow) for name in COMPILED_ALONE)]
)
@pytest.mark.parametrize("family", ["llama", *(pytest.param(family, marks=pytest.mark.slow) for family in FAMILIES[1:])])
def test_the_model_compiles_to_one_graph_after_attach(family: str, name: str, backend: str) -> None:
    torch._dynamo.reset()
    model = tiny(family)
    ids, domain, mask = rows()
    attachment = attach(model, adapter_for(name, model), anatomy=Anatomy.read(model, INPUTS))
    is_read = model.config.is_encoder_decoder
    given = {"decoder_input_ids": torch.tensor([[0, 5, 6, 7]]).expand(len(ids), -1)} if is_read else {"position_ids": positions(mask)}
    with attachment.bind(token_map(domain)):
        expected = run(model, ids, mask)
        compiled = torch.compile(model, backend=backend, fullgraph=True)
        actual = compiled(input_ids=ids, attention_mask=mask, use_cache=False, **given).logits
    torch.testing.assert_close(actual, expected, rtol=0, atol=EXACT[family])


def test_every_name_of_methods_is_under_test_and_compiled() -> None:
    for names in (METHODS_UNDER_TEST, (*COMPILED_ALONE, "all_at_once")):
        assert {type(method) for name in names for method in METHODS_UNDER_TEST[name].values()} >= set(METHODS.values())


def outcome(family: str, name: str, dtype: torch.dtype, like: torch.dtype) -> tuple[Tensor, Tensor]:
    """Logits, and the gradients of an adapter in float32, on weights that are rounded to one dtype and computed with in another."""
    model = tiny(family).float()
    cast(model, like)
    cast(model, dtype)
    ids, domain, mask = rows()
    adapter, scaler = adapter_for(name, model, excited=None).float(), torch.amp.GradScaler("cpu", enabled=dtype == torch.float16)
    excite(adapter, strength=0.03)
    with attach(model, adapter, anatomy=Anatomy.read(model, INPUTS)).bind(token_map(domain)):
        logits = run(model, ids, mask)
        scaler.scale(logits.float().square().mean()).backward()
    assert logits.dtype == dtype
    gradients = [parameter.grad for parameter in adapter.parameters() if parameter.grad is not None]
    assert gradients
    assert all(gradient.dtype == torch.float32 for gradient in gradients)
    return logits.detach().float(), torch.cat([gradient.flatten() for gradient in gradients]) / scaler.get_scale()


def half_errors(family: str, name: str, dtype: torch.dtype) -> tuple[float, float]:
    """How far logits and gradients are off from those in float32 on the same weights, as shares of their norms; NaN where a value is none."""
    found, wanted = (outcome(family, name, computed, dtype) for computed in (dtype, torch.float32))
    logits, gradients = (float((one - other).norm() / other.norm()) for one, other in zip(found, wanted, strict=True))
    return logits, gradients


@sampled(shift=4)
def test_on_a_base_in_half_an_adapter_in_float32_learns_what_it_learns_in_float32(family: str, name: str) -> None:
    if family == "t5" and name in ("ladder", "ladder_side"):
        pytest.skip("of random weights, without a scale in its attention: a change of 0.6 % in what the ladder reads is one of 2 % in logits, in float64 too")
    for dtype, bounds in (T5_HALF if family == "t5" else HALF).items():
        errors = half_errors(family, name, dtype)
        assert all(error < bound for error, bound in zip(errors, bounds, strict=True)), (dtype, errors)


@sampled(shift=5)
def test_saved_and_loaded_gives_the_same_logits(family: str, name: str, tmp_path: object) -> None:
    if "deep" in METHODS_UNDER_TEST[name]:
        pytest.skip("the test's own method is not in METHODS, so it has no name to be saved under")
    ids, domain, mask = rows()

    def adapted() -> AdaptedModel:
        base = tiny(family)
        base.config.image_token_id = 63  # AdaLink on images alone needs a model that has image tokens of its own
        return AdaptedModel(base, inputs=INPUTS)

    model, again = adapted(), adapted()
    excite(model.add_adapter("first", METHODS_UNDER_TEST[name]).double())
    model.save_pretrained(str(tmp_path))
    again.load_adapter(str(tmp_path), "other").double()
    first: Adapter = model.eval().active_adapter()
    state = dict(first.state_dict())
    for own, method in METHODS_UNDER_TEST[name].items():
        if isinstance(method, Compact) and (written := method.written(own, first)) is not None:
            state = {key: value for key, value in state.items() if not key.startswith(f"{own}.")} | dict(written.tensors)
    again.adapters["other"].load_state_dict(state)  # strict: the same names

    def logits(adapted: AdaptedModel) -> Tensor:
        with adapted.attachment.bind(token_map(domain)):
            return run(adapted.base, ids, mask)

    torch.testing.assert_close(logits(model), logits(again), rtol=0, atol=0)


@sampled(shift=6)
def test_frozen_weights_are_byte_identical_after_training(family: str, name: str) -> None:
    model = tiny(family)
    before = copy.deepcopy(model.state_dict())
    ids, domain, mask = rows()
    adapter = adapter_for(name, model)
    start = copy.deepcopy(adapter.state_dict())
    attachment = attach(model, adapter, anatomy=Anatomy.read(model, INPUTS))
    optimizer = torch.optim.AdamW(adapter.parameters(), lr=1e-2)
    for _ in range(3):
        with attachment.bind(token_map(domain)):
            run(model, ids, mask).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())
    assert any(not torch.equal(start[key], value) for key, value in adapter.state_dict().items())


@pytest.mark.parametrize("family", DECODERS)
def test_every_port_works_on_embeddings_passed_in(family: str) -> None:
    model = tiny(family)
    ids, domain, mask = rows()
    attachment = attach(model, adapter_for("all_at_once", model), anatomy=Anatomy.read(model, INPUTS))
    with attachment.bind(token_map(domain)):
        by_ids = model(input_ids=ids, attention_mask=mask).logits
        by_embeds = model(inputs_embeds=model.get_input_embeddings()(ids), attention_mask=mask).logits
    assert torch.equal(by_ids, by_embeds)


def test_image_tokens_change_with_the_picture_and_only_then() -> None:
    model = tiny("llama")
    ids, domain, mask = rows()
    attachment = attach(model, adapter_for("bridge_mlp", model), anatomy=Anatomy.read(model, INPUTS))
    maps = [TokenMap(domain, torch.zeros(3, dtype=torch.int64), {"image": features(seed=s)}) for s in (3, 3, 4)]
    results = []
    for m in maps:
        with attachment.bind(m):
            results.append(run(model, ids, mask))
    assert torch.equal(results[0], results[1])
    assert not torch.equal(results[0], results[2])


assert {IMAGE, PROMPT, PAD} == {2, 3, -1}  # what tiny.rows builds on
