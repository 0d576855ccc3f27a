"""eP-ALM on video and sound against the authors' code: both files of fixtures/video_audio, in float64, to 1e-10; and the filter bank."""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as t
from beams_424 import search
from epalm_case import Case
from safetensors.torch import load_file, save_file
from shared import fixtures
from torch import Tensor

from adalink import attach
from multimodal.batches.collate import Batch
from multimodal.encoders.clips import FilterBank
from multimodal.encoders.tower import VisionTower, load_tower
from multimodal.language import Language
from multimodal.model import VisionLanguageModel
from multimodal.template import Template

EXACT = 1e-10
KINDS = ("video", "audio")
INPUT = {"video": "in.frames", "audio": "in.input_values"}


@dataclass(frozen=True, eq=False)
class ClipCase(Case):
    """A case of eP-ALM with an encoder of clips, which lies in `folder` as a user's would."""

    folder: Path

    __hash__ = object.__hash__

    def tower(self, **options: Any) -> VisionTower:
        return load_tower(self.folder, dtype=torch.float64, **options)

    @cache  # noqa: B019
    def taps(self) -> Tensor:
        return self.tower()(self.clips).pooled.transpose(0, 1)

    @property
    def clips(self) -> Tensor:
        return self.tensors[INPUT[self.spec["kind"]]].double()


@pytest.fixture(scope="module")
def read(tmp_path_factory: pytest.TempPathFactory) -> Any:
    @cache
    def case(kind: str) -> ClipCase:
        path = fixtures("video_audio") / f"{kind}_caption_dev.json"
        spec, tensors = json.loads(path.read_text()), load_file(path.with_suffix(".safetensors"))
        folder = tmp_path_factory.mktemp(kind)
        sizes, weights = spec["encoder_config"], {k.removeprefix(f"{kind}."): v for k, v in tensors.items() if k.startswith(f"{kind}.")}
        save_file(weights, folder / "model.safetensors", {"format": "pt"})
        if kind == "video":
            t.TimesformerConfig(**sizes, architectures=["TimesformerModel"], dtype="float32").save_pretrained(folder)
            t.TimesformerVideoProcessor(size={"height": 32, "width": 32}, do_center_crop=False).save_pretrained(folder)
        else:
            t.ASTConfig(**sizes, architectures=["ASTModel"], dtype="float32").save_pretrained(folder)
            known = {"feature_extractor_type": "ASTFeatureExtractor", "num_mel_bins": sizes["num_mel_bins"], "max_length": sizes["max_length"]}
            (folder / "preprocessor_config.json").write_text(json.dumps(known))
        prompts = {"gen.prompt_attention_mask": torch.ones_like(tensors["gen.prompt_ids"])}
        of_images = {  # the names of fixtures/epalm
            "opt": spec["opt"] | {"activation": spec["opt"]["activation_function"]}, "layer_to_prefix_index": spec["layer_to_percept"],
            "cls_blocks_used": [1, 2, 3], "prompt_len": spec["epalm"]["prompt_len"], "prompt_mlp": spec["epalm"]["mlp"], "shared_connector": False,
            "tokens": {"pad": spec["opt"]["pad_token_id"], "bos_eos": spec["opt"]["eos_token_id"]}, "vit": {"depth": 4, "embed_dim": 24},
        }  # fmt: skip
        return ClipCase(spec | of_images, tensors | prompts, folder)

    return case


def close(found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(found.detach(), expected.double(), rtol=0, atol=EXACT)


def logits_of(case: ClipCase, model: Any, attachment: Any, ids: Tensor, mask: Tensor) -> Tensor:
    taps = case.taps()
    ids, mask, domain = case.with_slots(ids, mask)
    with attachment.bind(case.token_map(domain, taps.repeat_interleave(len(ids) // len(taps), 0))):
        found: Tensor = model(input_ids=ids, attention_mask=mask, use_cache=False).logits
    return found


@pytest.mark.parametrize("kind", KINDS)
def test_the_tower_gives_the_authors_features(kind: str, read: Any) -> None:
    case = read(kind)
    found, first = case.tower()(case.clips), {"video": 1, "audio": 2}[kind]
    close(found.pooled, case.tensors["mid.pooled"])
    close(found.patches, case.tensors["mid.final_tokens"][:, first:])
    assert (found.pooled[:, [1, 0, 2]] - case.tensors["mid.pooled"]).abs().max() > 1e-3  # the control: the clips in another order


@pytest.mark.parametrize("frames", [6, 2])
def test_clips_of_other_frames_have_the_authors_features(frames: int, read: Any) -> None:
    case = read("video")
    clips = case.tensors[f"in.frames_{frames}"].double()
    close(case.tower(frames=frames)(clips).pooled, case.tensors[f"mid.pooled_{frames}"])
    model = t.TimesformerModel.from_pretrained(case.folder, dtype=torch.float64)  # the control: what transformers itself computes, without an error
    wrong = model(clips).last_hidden_state[:, 0]
    assert (wrong - case.tensors[f"mid.pooled_{frames}"][-1]).abs().max() > 0.1


@pytest.mark.parametrize("kind", KINDS)
def test_percepts_logits_loss_and_every_gradient_equal_the_authors(kind: str, read: Any) -> None:
    case = read(kind)
    model = case.model()
    adapter = case.adapter(model)
    for tap, expected in enumerate(case.tensors["mid.percepts"]):
        close(adapter.get_submodule(f"epalm.tap{tap}.project")(case.taps()[:, 1 + tap]), expected)
    logits = logits_of(case, model, attach(model, adapter), case.tensors["in.input_ids"], case.tensors["in.attention_mask"])
    close(logits, case.tensors["out.logits"])
    labels, own = case.tensors["in.labels"][:, 1:], logits[:, case.n_slots : -1]
    losses = torch.nn.functional.cross_entropy(own.transpose(1, 2), labels, ignore_index=-100, reduction="none").sum(1)
    close(losses, case.tensors["out.loss_per_sample"])
    loss = losses.mean() * case.spec["lm_loss_weight"]
    close(loss.reshape(1), case.tensors["out.loss_total"])
    loss.backward()
    assert set(case.roles()) == set(case.under("grad."))
    for official, ours in case.roles().items():
        gradient = adapter.get_parameter(ours).grad
        assert gradient is not None
        close(gradient, case.tensors[f"grad.{official}"])


@pytest.mark.parametrize("beams", [1, 3])
@pytest.mark.parametrize("kind", KINDS)
def test_generated_ids_equal_the_authors(kind: str, beams: int, read: Any) -> None:
    case = read(kind)
    model = case.model()
    attachment = attach(model, case.adapter(model))
    with torch.no_grad():
        found, _ = search(
            lambda ids, mask: logits_of(case, model, attachment, ids, mask)[:, -1], case.tensors["gen.prompt_ids"], case.tensors["gen.prompt_attention_mask"],
            beams=beams, max_length=case.spec["generation"]["max_length"], end=2, pad=1, penalty=1.0, stops_early=False,
        )  # fmt: skip
    assert torch.equal(found, case.tensors["gen.greedy" if beams == 1 else "gen.beam3"])


@pytest.mark.parametrize("kind", KINDS)
def test_the_composed_model_has_the_authors_loss_on_their_clips(kind: str, read: Any) -> None:
    case = read(kind)
    language = Language(model=case.model(), tokenizer=None, name=kind)
    model = VisionLanguageModel(case.tower(), language, Template(prompt="<image>"))
    adapter = model.add_adapter("a", case.methods()).double()
    adapter.load_state_dict(case.adapter(language.model).state_dict())
    ids, mask, domain = case.with_slots(case.tensors["in.input_ids"], case.tensors["in.attention_mask"])
    labels = case.tensors["in.labels"]
    batch = Batch(
        ids=ids, domain=domain, source=torch.arange(labels.shape[1] - 1).expand(len(ids), -1) + case.n_slots, target=labels[:, 1:],
        image=torch.arange(len(ids)), pixels=case.clips, position=torch.where(mask == 1, mask.cumsum(1) - 1, 0), n_targets=len(ids) / 0.1,
    )  # fmt: skip
    torch.testing.assert_close(model(batch).double(), case.tensors["out.loss_total"].squeeze(), rtol=1e-6, atol=0)  # the loss is float32


@pytest.mark.parametrize("number", range(3))
def test_the_filter_bank_is_the_authors(number: int) -> None:
    path = fixtures("video_audio") / "fbank_dev.json"
    known, tensors = json.loads(path.read_text()), load_file(path.with_suffix(".safetensors"))
    case, expected = known["cases"][number], tensors[f"fbank_{number}"]
    bank = FilterBank(rate=case["sampling_rate"], num_mel_bins=case["num_mel_bins"], max_length=case["max_length"], mean=known["mean"], std=known["std"])
    difference = (bank.frames(tensors[f"wave_{number}"]) - expected).abs()
    assert difference.shape == (case["frames"], case["num_mel_bins"])
    assert difference.max() < 1e-6
    prepared = bank(tensors[f"wave_{number}"])
    torch.testing.assert_close(prepared, tensors[f"input_values_{number}"], rtol=0, atol=1e-6)
    assert (prepared[case["frames"] :].sub(0.4670).abs() < 1e-4).all()  # filled up before it is normalised, so it is no silence
    assert (bank.frames(tensors[f"wave_{number}"].roll(80)) - expected).abs().max() > 0.1  # the control: half a step later
