"""eP-ALM's settings, where it is placed, and what is refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tiny import FEATURE_WIDTH, INPUTS, N_TAPS, WIDTH, rows, run, taps, tiny, token_map
from transformers import OPTConfig, OPTForCausalLM

from adalink import (
    EPALM,
    PERCEPT,
    PROMPT,
    Adapter,
    Anatomy,
    AttachError,
    ConfigError,
    InputSpec,
    Method,
    Port,
    Prompt,
    Slots,
    TokenMap,
    attach,
)
from adalink.methods.epalm import Tap

WIDTH_INSIDE = 48  # tiny OPT's layers are wider than its embedding
SETTINGS: dict[str, Any] = {"layers": (1, 3), "n_taps": 2, "connector": "per_tap"}


def anatomy(n_layers: int = 4, family: str = "opt") -> Anatomy:
    return Anatomy.read(tiny(family, n_layers=n_layers), {**INPUTS, "all_taps": InputSpec(12, FEATURE_WIDTH)})


def taps_by_layer(method: EPALM, n_layers: int) -> dict[int, int]:
    """Layer -> the block that it reads, counted from the end."""
    found = {}
    for placement in method.place(anatomy(n_layers)):
        if isinstance(placement.edit, Tap):
            found[int(placement.port.module.split(".")[-1])] = placement.edit.block
    return found


def test_the_slot_gets_the_projected_tap_whatever_it_held() -> None:
    edit = next(p.edit for p in EPALM(**SETTINGS).place(anatomy()) if isinstance(p.edit, Tap)).double()
    tokens = token_map(torch.tensor([[PERCEPT, 0, 0]] * 3)).window(3, 0, 3, 3)
    written = edit(torch.full((3, 3, WIDTH_INSIDE), float("nan"), dtype=torch.float64), tokens, None)
    assert torch.equal(written[:, 0], edit.project(taps()[:, -2]))
    assert written.isfinite().all()


@pytest.mark.parametrize(
    ("layers", "n_taps", "expected"),
    [
        ((1, 3), 2, {1: -2, 2: -1}),
        ((0, 4), 2, {0: -2, 1: -2, 2: -1, 3: -1}),
        ((0, 4), 3, {0: -3, 1: -2, 2: -1, 3: -1}),  # step 1, and the last tap goes on
        ((2, 4), 3, {2: -3, 3: -2}),  # more taps than layers: the last is not read
        ((-3, -1), 2, {1: -2, 2: -1}),
        ((-1, 4), 1, {3: -1}),
    ],
)
def test_shallow_taps_go_to_shallow_layers(layers: tuple[int, int], n_taps: int, expected: dict[int, int]) -> None:
    assert taps_by_layer(EPALM(layers=layers, n_taps=n_taps, connector="shared"), 4) == expected


def test_the_published_window_of_32_layers() -> None:
    found = taps_by_layer(EPALM(layers=(19, 31), n_taps=6, connector="shared", source="all_taps"), 32)
    assert found == {layer: (layer - 19) // 2 - 6 for layer in range(19, 31)}
    assert taps_by_layer(EPALM(layers=(-13, -1), n_taps=6, connector="shared", source="all_taps"), 32) == found


def test_connectors_are_one_for_each_tap_or_one_for_all() -> None:
    each = Adapter({"epalm": EPALM(**SETTINGS)}, anatomy())
    shared = Adapter({"epalm": EPALM(**{**SETTINGS, "connector": "shared"})}, anatomy())
    assert [name for name, _ in each.named_parameters()] == [f"epalm.tap{tap}.project.{part}" for tap in (0, 1) for part in ("weight", "bias")]
    assert [name for name, _ in shared.named_parameters()] == ["epalm.tap0.project.weight", "epalm.tap0.project.bias"]
    assert shared.n_parameters() == {"epalm": (FEATURE_WIDTH + 1) * WIDTH_INSIDE}


PUBLISHED = [  # hidden width, width of the ViT, connector, prompt, connector's weights, prompt's weights, total
    (2560, 768, "per_tap", "mlp", 11_811_840, 13_137_920, 24_949_760),
    (4096, 1024, "shared", "table", 4_198_400, 40_960, 4_239_360),
]


@pytest.mark.parametrize(("width", "vision", "connector", "form", "in_connector", "in_prompt", "total"), PUBLISHED)
def test_trained_parameters_are_the_published_ones(
    width: int, vision: int, connector: Any, form: Any, in_connector: int, in_prompt: int, total: int
) -> None:
    with torch.device("meta"):
        config = OPTConfig(hidden_size=width, word_embed_proj_dim=width, ffn_dim=4 * width, num_hidden_layers=32, num_attention_heads=32)
        read = Anatomy.read(OPTForCausalLM(config), {"image_taps": InputSpec(12, vision)})
        methods: dict[str, Method] = {
            "epalm": EPALM(layers=(19, 31), n_taps=6, connector=connector, mask="published"),
            "prompt": Prompt(length=10, init_std=1.0, form=form, positions="none"),
        }
        counts = Adapter(methods, read).n_parameters()
    assert counts == {"epalm": in_connector, "prompt": in_prompt}
    assert sum(counts.values()) == total


def test_the_slot_comes_first_in_the_row_whatever_comes_first_in_the_config() -> None:
    adapter = Adapter({"prompt": Prompt(length=2, init_std=0.1), "epalm": EPALM(**SETTINGS)}, anatomy())
    assert adapter.slots == (Slots(PERCEPT, 1), Slots(PROMPT, 2))


@pytest.mark.parametrize(
    ("method", "message"),
    [
        (EPALM(**{**SETTINGS, "layers": (3, 5)}), r"eP-ALM's layers \[3, 5\] are outside this model, which has 4: give 0 <= start < end <= 4, or numbers from -4"),
        (EPALM(**{**SETTINGS, "layers": (3, 2)}), r"eP-ALM's layers \[3, 2\] are outside this model"),
        (EPALM(**{**SETTINGS, "layers": (-5, 2)}), r"eP-ALM's layers \[-5, 2\] are outside this model"),
        (EPALM(**{**SETTINGS, "n_taps": 5}), f"taps the last 5 blocks of 'image_taps', which has {N_TAPS} that can be pooled: give n_taps of 1 to {N_TAPS}"),
        (EPALM(**{**SETTINGS, "source": "audio_taps"}), "reads the input 'audio_taps', and this model has image, image_taps, all_taps"),
    ],
)
def test_what_the_model_lacks_is_refused_with_what_it_has(method: EPALM, message: str) -> None:
    with pytest.raises(AttachError, match=message):
        Adapter({"epalm": method}, anatomy())


WRONG = [
    ({"layers": (1,)}, r"eP-ALM's layers are \[1\]: give the first layer and the one after the last"),
    ({"layers": (0.5, 1)}, r"eP-ALM's layers are \[0.5, 1\]"),
    ({"n_taps": 0}, "eP-ALM's n_taps is 0: give 1 or more"),
    ({"connector": "mlp"}, "eP-ALM's connector is 'mlp': give shared or per_tap"),
    ({"mask": "open"}, "eP-ALM's mask is 'open': give causal or published"),
    ({"slot": PROMPT}, "eP-ALM's slot is 3: give 5, or 6 to 15"),
    ({"slot": 16}, "eP-ALM's slot is 16"),
]


@pytest.mark.parametrize(("fields", "message"), WRONG)
def test_wrong_values_are_refused(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        EPALM(**{**SETTINGS, **fields})


def test_two_methods_with_the_same_slot_are_refused_with_free_ones() -> None:
    methods = {"image": EPALM(**SETTINGS), "video": EPALM(**SETTINGS)}
    with pytest.raises(ConfigError, match=r"image and video reserve slots of the same domain, 5 \(percept\).*free are 6, 7, 8, 9, 10, 11, 12, 13, 14, 15"):
        Adapter(methods, anatomy())


@pytest.mark.parametrize("implementation", ["flex_attention", "flash_attention_2"])
def test_an_attention_without_masks_is_refused_with_those_that_have_them(implementation: str) -> None:
    model = tiny("llama", n_layers=4)
    adapter = Adapter({"epalm": EPALM(**SETTINGS)}, Anatomy.read(model, INPUTS))
    model.config._attn_implementation = implementation  # as set_attn_implementation leaves it where the package is installed
    with pytest.raises(AttachError, match=f"the model's attention is {implementation}.*call model.set_attn_implementation with one of sdpa, eager"):
        attach(model, adapter)
    model.set_attn_implementation("eager")
    attach(model, adapter).detach()  # the control


def test_a_mask_of_another_kind_is_refused_when_it_comes() -> None:
    model = tiny("llama", n_layers=4)
    attachment = attach(model, Adapter({"epalm": EPALM(**SETTINGS)}, Anatomy.read(model, INPUTS)).double())
    layer = attachment.stack.get_submodule("layers.0")
    ids, domain, mask = rows()
    attachment.tokens = token_map(domain).window(3, 0, ids.shape[1], ids.shape[1])
    with pytest.raises(AttachError, match=r"the mask at layers.0 is a tensor \(3, 16\), expected None or \[B, 1, T, K\]"):
        layer(torch.zeros(3, ids.shape[1], WIDTH, dtype=torch.float64), attention_mask=mask)


def test_an_attention_that_is_changed_afterwards_is_refused_when_it_runs() -> None:
    model = tiny("llama", n_layers=4)
    attachment = attach(model, Adapter({"epalm": EPALM(**SETTINGS)}, Anatomy.read(model, INPUTS)).double())
    ids, domain, mask = rows()
    model.config._attn_implementation = "flash_attention_2"
    with attachment.bind(token_map(domain)), pytest.raises(AttachError, match=r"the mask at layers.0 is a tensor|the model's attention is flash_attention_2"):
        run(model, ids, mask)
    with attachment.bind(token_map(domain)), pytest.raises(AttachError, match="the model's attention is flash_attention_2"):
        run(model, ids, torch.ones_like(mask))


def test_a_batch_without_the_input_is_one_sentence() -> None:
    model = tiny("opt", n_layers=4)
    attachment = attach(model, Adapter({"epalm": EPALM(**SETTINGS)}, Anatomy.read(model, INPUTS)).double())
    ids, domain, mask = rows()
    bare = TokenMap(domain, torch.zeros(3, dtype=torch.int64), {"image": torch.zeros(3, 1, 1)})
    with attachment.bind(bare), pytest.raises(ConfigError, match="eP-ALM reads the input 'image_taps', and the token map has image"):
        run(model, ids, mask)


def test_it_is_placed_at_layers_masks_and_positions() -> None:
    ports = [placement.port for placement in EPALM(**SETTINGS).place(anatomy())]
    assert ports == [
        Port("layers.1", "input"), Port("layers.2", "input"), Port("layers.0", "mask"), Port("embed_positions", "position"), Port("embed_positions", "vectors"),
    ]  # fmt: skip
    assert {port.side for port in (p.port for p in EPALM(**SETTINGS).place(anatomy(family="t5")))} == {"input", "mask"}
