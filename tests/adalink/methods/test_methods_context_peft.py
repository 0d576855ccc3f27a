"""LoRA, BitFit and IA3 apart from any model's run: what they compute, where they go, how they start, and what they refuse."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tiny import excite, tiny
from torch import nn

from adalink import ANSWER, IA3, IMAGE, PAD, PROMPT, TEXT, Adapter, Anatomy, BitFit, Bottleneck, LoRA, Prefix, TokenMap
from adalink.errors import AttachError, ConfigError

GROUPS = {"image": ("image",), "text": ("text",)}
LLAMA, GPT2, OPT = (Anatomy.read(tiny(family)) for family in ("llama", "gpt2", "opt"))
DOMAIN = torch.tensor([[IMAGE, TEXT, ANSWER, PAD]])
TOKENS = TokenMap(DOMAIN, torch.zeros(1, dtype=torch.int64)).window(1, 0, 4, 4)


def lora(**fields: Any) -> LoRA:
    return LoRA(**{"groups": GROUPS, "rank": 4, "alpha": 8, **fields})


def test_lora_is_its_formula_with_an_unscaled_bias_and_starts_as_the_identity() -> None:
    for scaling, scale in (("standard", 0.5 * 8 / 4), ("rank_stabilized", 0.5 * 8 / 2)):
        (placement, *_) = lora(scaling=scaling, multiplier=0.5, bias="all", targets=("down_proj",)).place(LLAMA)
        edit: Any = placement.edit.double()
        x, h = torch.randn(1, 4, 48).double(), torch.randn(1, 4, 32).double()
        assert torch.equal(edit(h, TOKENS, x), h)
        assert edit.down.weight.abs().max() <= 48**-0.5  # kaiming_uniform(sqrt 5)
        excite(edit)
        torch.testing.assert_close(edit(h, TOKENS, x), h + scale * (x @ edit.down.weight.T @ edit.up.weight.T) + edit.bias)


def test_bitfit_and_ia3_are_their_formulas_and_start_as_the_identity() -> None:
    shift: Any = BitFit(groups=GROUPS, force_bias=True).place(LLAMA)[0].edit.double()
    gain: Any = IA3(groups=GROUPS).place(LLAMA)[0].edit.double()
    h, k = torch.randn(1, 4, 32).double(), torch.randn(1, 4, 16).double()
    assert torch.equal(shift(h, TOKENS, h), h)
    assert torch.equal(gain(k, TOKENS, h), k)
    excite(shift)
    excite(gain)
    assert torch.equal(shift(h, TOKENS, h), h + shift.bias)
    assert torch.equal(gain(k, TOKENS, h), k * (1 + gain.gain))


def test_in_one_linear_for_queries_keys_and_values_ia3_scales_keys_and_values_alone() -> None:
    placed = {placement.role: placement for placement in IA3(groups={"all": ("all",)}).place(GPT2)}
    assert [role for role in placed if role.startswith("all.0.")] == ["all.0.c_attn.key", "all.0.c_attn.value", "all.0.mlp.c_proj"]
    edit = placed["all.0.c_attn.key"].edit
    excite(edit)
    scaled = edit(torch.ones(1, 4, 96), TOKENS, torch.ones(1, 4, 32))[0, 0] != 1
    assert scaled.tolist() == [False] * 32 + [True] * 32 + [False] * 32


def test_where_each_goes_and_for_which_tokens() -> None:
    placed = IA3(groups={"image": ("image",), "shared": ("image", "text")}).place(LLAMA)
    assert [(p.role, p.port.module, p.port.side, p.domains) for p in placed if ".1." not in p.role] == [
        ("image.0.k_proj", "layers.0.self_attn.k_proj", "output", (IMAGE,)),
        ("image.0.v_proj", "layers.0.self_attn.v_proj", "output", (IMAGE,)),
        ("image.0.down_proj", "layers.0.mlp.down_proj", "input", (IMAGE,)),
        ("shared.0.k_proj", "layers.0.self_attn.k_proj", "output", (TEXT, ANSWER, IMAGE)),
        ("shared.0.v_proj", "layers.0.self_attn.v_proj", "output", (TEXT, ANSWER, IMAGE)),
        ("shared.0.down_proj", "layers.0.mlp.down_proj", "input", (TEXT, ANSWER, IMAGE)),
    ]
    assert {p.domains for p in lora(groups={"all": ("all",)}).place(LLAMA)} == {tuple(range(16))}
    assert {p.domains for p in lora(groups={"soft": ["prompt", "answer"]}).place(LLAMA)} == {(ANSWER, PROMPT)}
    assert {p.domains for p in lora(groups={"one": "image"}).place(LLAMA)} == {(IMAGE,)}


def test_ranks_and_scales_differ_by_group_where_that_is_asked() -> None:
    placed = lora(rank={"image": 1, "text": 8}, alpha={"image": 2, "text": 4}, multiplier={"image": 1, "text": 3}).place(LLAMA)
    edits: dict[str, Any] = {p.role.split(".")[0]: p.edit for p in placed}
    found = {group: (edit.down.out_features, edit.scale) for group, edit in edits.items()}
    assert found == {"image": (1, 2.0), "text": (8, 1.5)}


def test_targets_by_last_component_by_path_by_part_and_without_some_layers() -> None:
    def names(anatomy: Anatomy, **fields: Any) -> list[str]:
        return [p.role.removeprefix("all.") for p in lora(groups={"all": ("all",)}, **fields).place(anatomy)]

    assert names(LLAMA, exclude_layers=(0,)) == [f"1.{name}_proj" for name in ("q", "k", "v", "o", "gate", "up", "down")]
    assert names(LLAMA, targets=("v_proj", "q_proj"), exclude_layers=(1,)) == ["0.q_proj", "0.v_proj"]
    assert names(GPT2, targets=("mlp.c_proj",)) == ["0.mlp.c_proj", "1.mlp.c_proj"]
    assert names(GPT2, targets=("down", "query"), exclude_layers=(1,)) == ["0.c_attn.query", "0.mlp.c_proj"]
    assert names(OPT, targets=("down",)) == ["0.fc2", "1.fc2"]
    assert names(LLAMA, targets=("layers.1.mlp.up_proj",)) == ["1.up_proj"]
    assert names(LLAMA, targets=("all",), exclude=("query", "key", "layers.0", "mlp.down_proj")[:2], exclude_layers=(1,)) == [
        f"0.{name}_proj" for name in ("v", "o", "gate", "up", "down")
    ]


def test_biases_follow_the_frozen_ones_unless_forced() -> None:
    qwen = Anatomy.read(tiny("qwen2"))
    with_bias = {p.role for p in lora(groups={"all": ("all",)}, bias="auto").place(qwen) if p.edit.bias is not None}  # type: ignore[union-attr]
    assert with_bias == {f"all.{layer}.{name}_proj" for layer in (0, 1) for name in ("q", "k", "v")}
    assert {p.role for p in BitFit(groups={"all": ("all",)}).place(qwen)} == with_bias
    assert len(BitFit(groups={"all": ("all",)}, force_bias=True).place(qwen)) == 14


@pytest.mark.parametrize("method", [lora(dropout=0.5, targets=("q_proj",)), BitFit(groups=GROUPS, force_bias=True, dropout=0.5), IA3(groups=GROUPS, dropout=0.5)])
def test_dropout_takes_whole_tokens_with_one_draw_for_all_layers_in_training_alone(method: Any) -> None:
    tokens = TokenMap(torch.full((4, 50), TEXT), torch.zeros(4, dtype=torch.int64)).window(4, 0, 50, 50)
    again = TokenMap(torch.full((4, 50), TEXT), torch.zeros(4, dtype=torch.int64)).window(4, 0, 50, 50)
    adapter = Adapter({"m": method}, LLAMA).double()
    excite(adapter)
    retained: dict[str, set[tuple[bool, ...]]] = {"image": set(), "text": set()}
    for placement in adapter.placements:
        linear = next(one for one in LLAMA.linears if one.name == placement.port.module)
        x = torch.randn(4, 50, linear.n_in).double()
        h = x if placement.port.side == "input" else torch.randn(4, 50, linear.n_out).double()
        changed = placement.edit(h, tokens, x) - h
        plain = placement.edit.eval()(h, tokens, x) - h
        placement.edit.train()
        is_cached = changed.abs().amax(-1, keepdim=True) > 0
        torch.testing.assert_close(changed, plain * is_cached * 2)
        retained[placement.role.split(".")[1]].add(tuple(is_cached.flatten().tolist()))
        assert not torch.equal(placement.edit(h, again, x) - h, changed)  # the next call draws anew
    assert [len(draws) for draws in retained.values()] == [1, 1]
    assert retained["image"] != retained["text"]
    assert 0.3 < torch.tensor(next(iter(retained["text"]))).double().mean() < 0.7


def test_the_draw_is_the_same_when_a_layer_runs_again() -> None:
    from tiny import rows, run, token_map

    from adalink import attach

    ids, domain, mask = rows()
    adapter = Adapter({"lora": lora(dropout=0.5)}, LLAMA).double()
    excite(adapter)

    def gradients(checkpointed: bool) -> list[torch.Tensor]:
        torch.manual_seed(4)
        attachment = attach(tiny("llama"), adapter, anatomy=LLAMA)
        if checkpointed:
            attachment.checkpoint_layers()
        torch.manual_seed(4)
        with attachment.bind(token_map(domain)):
            loss = run(attachment.model, ids, mask).square().sum()
        return list(torch.autograd.grad(loss, list(adapter.parameters())))

    plain, again = gradients(False), gradients(True)
    assert all(torch.equal(a, b) for a, b in zip(plain, again, strict=True))


class Published(nn.Module):
    """The shape that the paper's counts establish: 12 layers, d = 768, four attention linears, one 768 -> 2 x 3072 and one 3072 -> 768."""

    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(16, 768)
        sizes = {"q_proj": (768, 768), "k_proj": (768, 768), "v_proj": (768, 768), "o_proj": (768, 768), "gate_up_proj": (768, 6144), "down_proj": (3072, 768)}
        self.layers = nn.ModuleList(nn.ModuleDict({name: nn.Linear(*size, bias=False) for name, size in sizes.items()}) for _ in range(12))
        self.norm = nn.LayerNorm(768)

    def get_input_embeddings(self) -> nn.Embedding:
        return self.words


COUNTS = [
    (IA3(groups={"shared": ("image", "text")}), 55_296),
    (BitFit(groups={"shared": ("image", "text")}, force_bias=True), 119_808),
    (lora(groups={"shared": ("image", "text")}, rank=1), 202_752),
    (lora(groups={"shared": ("image", "text")}, rank=8), 1_622_016),
    (lora(groups={"shared": ("image", "text")}, rank=64), 12_976_128),
    (lora(rank=64), 2 * 12_976_128),
]


@pytest.mark.parametrize(("method", "count"), COUNTS)
def test_the_published_counts_of_parameters(method: Any, count: int) -> None:
    """arXiv 2312.08900, one group; two groups train twice as many."""
    with torch.device("meta"):
        assert Adapter({"m": method}, Anatomy.read(Published())).n_parameters() == {"m": count}


WRONG: list[tuple[Any, dict[str, Any], str]] = [
    (LoRA, {"rank": 0}, r"LoRA's rank is 0 for the group image: give 1 or more \(1, 8 and 64 were published\)"),
    (LoRA, {"rank": {"image": 4}}, "LoRA's rank is given for the groups image, and its groups are image, text: give one for each"),
    (LoRA, {"alpha": 0}, "LoRA's alpha is 0 for the group image: give a positive number"),
    (LoRA, {"multiplier": {"image": 1, "text": -1}}, "LoRA's multiplier is -1 for the group text: give a positive number"),
    (LoRA, {"scaling": "none"}, "LoRA's scaling is 'none': give standard or rank_stabilized"),
    (LoRA, {"bias": "lora_only"}, "LoRA's bias is 'lora_only': give none, all or auto"),
    (LoRA, {"groups": {}}, r"LoRA needs groups of token domains, got \{\}: give one or more, for instance groups="),
    (LoRA, {"groups": {"a": ()}}, "LoRA's group a has no domain: give one or more of text, answer, image"),
    (LoRA, {"groups": {"a": ("sound",)}}, "LoRA's group a names the unknown domain 'sound': domains are text, answer, image, prompt, prefix, percept, all"),
    (LoRA, {"groups": {"a.b": ("text",)}}, "LoRA has a group called 'a.b': its name is part of tensor names"),
    (LoRA, {"dropout": 1.0}, "LoRA's dropout is 1.0 for the group image: give 0 or more and less than 1"),
    (BitFit, {"groups": {"a": ("sound",)}}, "BitFit's group a names the unknown domain 'sound'"),
    (BitFit, {"dropout": -0.1}, "BitFit's dropout is -0.1 for the group image"),
    (IA3, {"groups": []}, r"IA3 needs groups of token domains, got \[\]"),
    (IA3, {"dropout": 2}, "IA3's dropout is 2 for the group image"),
    (IA3, {"attention": (), "feed_forward": ()}, "IA3 scales neither attention nor feed_forward: name linears for one of them"),
]


@pytest.mark.parametrize(("method", "fields", "message"), WRONG)
def test_wrong_values_are_refused(method: Any, fields: dict[str, Any], message: str) -> None:
    needed = {"rank": 4, "alpha": 8} if method is LoRA else {}
    with pytest.raises(ConfigError, match=message):
        method(**{"groups": GROUPS, **needed, **fields})


LLAMAS = "down_proj, gate_proj, k_proj, o_proj, q_proj, up_proj, v_proj; all, query, key, value, down work too"
UNFIT: list[tuple[Any, Anatomy, str]] = [
    (lora(targets=("proj",)), LLAMA, f"no linear of this model is named proj; its linears are named {LLAMAS}"),
    (lora(exclude=("fc1",)), LLAMA, f"no linear of this model is named fc1; its linears are named {LLAMAS}"),
    (lora(targets=()), LLAMA, "no linear is left to edit: the targets are none, and nothing is excluded; its linears are named"),
    (lora(exclude_layers=(0, 1)), LLAMA, "all 2 layers of this model are excluded, and none is left to edit: exclude fewer"),
    (lora(targets=("q_proj",), exclude=("query",), exclude_layers=(1,)), LLAMA, "no linear is left to edit: the targets are q_proj, and query, 1 is excluded"),
    (Bottleneck(width=2, exclude_layers=(0, 1)), LLAMA, "all 2 layers of this model are excluded, and none is left to edit: exclude fewer"),
    (Bottleneck(width=2, exclude_layers=(2,)), LLAMA, r"excluded layers \[2\] are outside this model, which has 2: give numbers of 0 to 1"),
    (Prefix(length=2, form="table", init_std=0.1, exclude_layers=(1, 0)), LLAMA, "all 2 layers of this model are excluded"),
    (Prefix(length=2, form="table", init_std=0.1, exclude_layers=(-1,)), LLAMA, r"excluded layers \[-1\] are outside this model"),
    (lora(exclude_layers=(1, 2)), LLAMA, r"excluded layers \[2\] are outside this model, which has 2: give numbers of 0 to 1"),
    (BitFit(groups=GROUPS, exclude_layers=(-1,)), OPT, r"excluded layers \[-1\] are outside this model"),
    (BitFit(groups=GROUPS), LLAMA, "BitFit finds no bias: none of down_proj, .* has one in this model: set force_bias to give them one"),
    (IA3(groups=GROUPS, attention=("c_attn",)), LLAMA, "no linear of this model is named c_attn"),
]


@pytest.mark.parametrize(("method", "anatomy", "message"), UNFIT)
def test_what_a_model_lacks_is_refused_with_what_would_have_worked(method: Any, anatomy: Anatomy, message: str) -> None:
    with pytest.raises(AttachError, match=message):
        Adapter({"m": method}, anatomy)
