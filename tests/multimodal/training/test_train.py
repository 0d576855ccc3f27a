"""Training touches the adapter alone, divides by the targets of a whole step, and leaves everything else as it was."""

from __future__ import annotations

import copy
import json
import os
import random
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from composed import Drawn, compose, excite, two_texts
from PIL import Image
from safetensors.torch import load_file
from torch import nn
from torch.optim.optimizer import register_optimizer_step_pre_hook
from train_case import METHODS, SETTINGS, Stop, close, losses, model_of, stop_at, trained, weights

from adalink import Prompt
from adalink.errors import BudgetError, CheckpointError, ConfigError, DataError
from multimodal.data.order import MixedSet, Mixture, SampleOrder
from multimodal.model import VisionLanguageModel
from multimodal.sample import BadSample, Sample
from multimodal.template import Text
from multimodal.training.distributed import step_seed
from multimodal.training.prepare import parameter_groups
from multimodal.training.settings import TrainSettings
from multimodal.training.train import train


def test_a_deterministic_training_is_the_same_and_refuses_what_has_no_such_form_in_a_sentence(tmp_path: Path) -> None:
    seen = []
    with looked_at_before_each_step(lambda _: seen.append((torch.are_deterministic_algorithms_enabled(), os.environ.get("CUBLAS_WORKSPACE_CONFIG")))):
        plain, one_way = (trained(tmp_path / str(wanted), steps=2, deterministic=wanted)[0] for wanted in (False, True))
    assert seen == [(False, None)] * 2 + [(True, ":4096:8")] * 2
    assert all(torch.equal(value, weights(one_way)[name]) for name, value in weights(plain).items())
    model = model_of()
    model.language.model.register_forward_hook(lambda *_: torch.zeros(2).put_(torch.tensor([0]), torch.tensor([1.0])))
    with pytest.raises(ConfigError, match=r"^train\.deterministic is true, and put_ of torch has no deterministic form: train with train\.deterministic: false$"):
        train(model, Drawn(8), two_texts, TrainSettings(**SETTINGS, deterministic=True), tmp_path / "refused")
    assert not torch.are_deterministic_algorithms_enabled()
    assert "CUBLAS_WORKSPACE_CONFIG" not in os.environ


@contextmanager
def looked_at_before_each_step(look: Callable[[torch.optim.Optimizer], None]) -> Iterator[None]:
    handle = register_optimizer_step_pre_hook(lambda optimizer, args, kwargs: look(optimizer))
    try:
        yield
    finally:
        handle.remove()


@pytest.mark.parametrize("family", ["opt", "t5"])
def test_frozen_parts_are_byte_identical_and_hold_no_gradient_and_no_optimizer_state(family: str, tmp_path: Path) -> None:
    model = model_of(family)
    adapter = model.adapted.active_adapter()
    frozen = [*model.tower.parameters(), *model.language.model.parameters()]
    before = copy.deepcopy([model.tower.state_dict(), model.language.model.state_dict()])
    started = weights(model)
    seen: list[int] = []

    def look(optimizer: torch.optim.Optimizer) -> None:
        in_optimizer = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        assert {id(p) for p in in_optimizer} == {id(p) for p in adapter.parameters()}
        assert len(in_optimizer) == len(list(adapter.parameters()))
        assert not [p for p in frozen if p.grad is not None or p.requires_grad]
        assert all(p.grad is not None for p in adapter.parameters())
        assert {id(p) for p in optimizer.state} <= {id(p) for p in in_optimizer}
        # AdamW: two moments as large as the weight, and a step count.
        seen.append(sum(value.numel() for state in optimizer.state.values() for value in state.values()))

    with looked_at_before_each_step(look):
        train(model, Drawn(8), two_texts, TrainSettings(**SETTINGS), tmp_path)
    n, n_tensors = sum(adapter.n_parameters().values()), len(list(adapter.parameters()))
    assert seen == [0] + [2 * n + n_tensors] * 3
    after = [model.tower.state_dict(), model.language.model.state_dict()]
    for old, new in zip(before, after, strict=True):
        assert old.keys() == new.keys()
        assert all(old[name].numpy().tobytes() == new[name].numpy().tobytes() for name in old)
    assert all(p.grad is None for p in [*frozen, *adapter.parameters()])
    assert all(not torch.equal(value, started[name]) for name, value in weights(model).items())
    assert not any(module.training for part in (model.tower.encoder, model.language.model) for module in part.modules())


def test_training_lowers_the_loss(tmp_path: Path) -> None:
    trained(tmp_path, steps=12)
    found = losses(tmp_path)
    assert len(found) == 12
    assert sum(found[-3:]) < 0.8 * sum(found[:3])


def test_accumulated_steps_equal_whole_ones_though_their_parts_have_other_numbers_of_targets(tmp_path: Path) -> None:
    whole, _ = trained(tmp_path / "whole", batch_size=4)
    parts, _ = trained(tmp_path / "parts", batch_size=1, accumulation=4)
    assert close(whole, parts, 1e-6)
    assert losses(tmp_path / "whole") == pytest.approx(losses(tmp_path / "parts"), rel=1e-5)
    other, _ = trained(tmp_path / "other", batch_size=2)
    assert not close(whole, other, 1e-6)  # the control


def test_recomputed_activations_give_the_same_weights(tmp_path: Path) -> None:
    assert close(trained(tmp_path / "plain")[0], trained(tmp_path / "again", checkpointing=True)[0], 1e-9)


def test_kept_features_give_nearly_the_same_weights(tmp_path: Path) -> None:
    plain, retained = trained(tmp_path / "plain")[0], trained(tmp_path / "kept", features="memory")[0]
    assert losses(tmp_path / "kept") == pytest.approx(losses(tmp_path / "plain"), rel=2e-3)
    assert not close(plain, retained, 1e-12)


def test_the_same_seed_gives_the_same_weights_and_another_seed_others(tmp_path: Path) -> None:
    first, again, other = (trained(tmp_path / name, seed=seed, workers=workers)[0] for name, seed, workers in (("a", 0, 0), ("b", 0, 1), ("c", 1, 0)))
    assert all(torch.equal(value, weights(again)[name]) for name, value in weights(first).items())
    assert not close(first, other, 1e-6)


def test_a_run_has_its_own_precision_beside_another_accelerator_in_the_program(tmp_path: Path) -> None:
    before = Accelerator(mixed_precision="no").state.mixed_precision
    trained(tmp_path, precision="bf16")
    assert Accelerator().state.mixed_precision == before


def test_half_precision_leaves_the_model_as_it_was_and_the_next_run_as_exact_as_ever(tmp_path: Path) -> None:
    exact, _ = trained(tmp_path / "exact")
    half, _ = trained(tmp_path / "half", precision="bf16")
    assert not close(exact, half, 1e-9)
    assert "forward" not in vars(half)
    assert half.adapted.active_adapter().get_parameter("adalink.text.up.weight").dtype == torch.float64
    again, _ = trained(tmp_path / "again")
    assert close(exact, again, 0)


@pytest.mark.parametrize("step", [1, 4, 6])
def test_a_run_that_stops_anywhere_goes_on_bit_for_bit(step: int, tmp_path: Path) -> None:
    whole, _ = trained(tmp_path / "whole", steps=7, accumulation=2, batch_size=2, measure_every=1, measure=lambda: {"figure": 1.0})
    with pytest.raises(Stop):
        trained(tmp_path / "stopped", steps=7, accumulation=2, batch_size=2, measure_every=1, measure=stop_at(step))
    resumed, done = trained(
        tmp_path / "stopped", steps=7, accumulation=2, batch_size=2, measure_every=1, measure=lambda: {"figure": 1.0}, resume=True
    )
    assert all(torch.equal(value, weights(resumed)[name]) for name, value in weights(whole).items())
    assert (tmp_path / "stopped" / "metrics.jsonl").read_text() == (tmp_path / "whole" / "metrics.jsonl").read_text()
    assert done.steps == 7


def test_a_checkpoint_of_another_stream_is_not_continued(tmp_path: Path) -> None:
    trained(tmp_path)
    for fields, message in (
        ({"seed": 1}, "train.seed was 0 and is 1"),
        ({"batch_size": 2}, "images in a step was 4 and is 2"),
        ({"source": Drawn(9)}, "images in the data set was 8 and is 9"),
        ({"steps": 3}, "it was written after step 4, and this config ends at 3"),
    ):
        with pytest.raises(CheckpointError, match=f"cannot be continued exactly: {message}; resume with the config and the data of its run"):
            trained(tmp_path, resume=True, **fields)
    trained(tmp_path, resume=True, batch_size=2, accumulation=2, steps=5)  # the same images in a step, and further


def test_bad_samples_are_counted_once_and_stop_the_run_over_the_budget(tmp_path: Path) -> None:
    known = BadSample(key="known", reason="missing file")
    _, done = trained(tmp_path / "a", Drawn(4, bad=[1, 2]), steps=6, batch_size=2, bad_samples=3, known_bad=[known])
    assert done.bad.counts == {"missing file": 1, "not an image": 2}
    with pytest.raises(BudgetError, match="3 bad samples, and at most 2 are allowed: 1 missing file"):
        trained(tmp_path / "b", Drawn(4, bad=[1, 2]), steps=6, batch_size=2, bad_samples=2, known_bad=[known])


def test_a_step_without_a_good_sample_is_no_step(tmp_path: Path) -> None:
    """Neither weights nor moments nor the schedule move, and it is counted; a run that goes on after it ends as an unbroken one."""
    order = SampleOrder(6, seed=0)
    bad = [order.sample(position) for position in (2, 3)]  # the whole second step of the first epoch
    rates: list[float] = []
    with looked_at_before_each_step(lambda optimizer: rates.append(optimizer.param_groups[0]["lr"])):
        whole, done = trained(tmp_path / "a", Drawn(6, bad=bad), steps=4, batch_size=2, warmup=0.5)
    assert (done.skipped, done.bad.counts) == (1, {"not an image": 2})
    assert rates == pytest.approx([1e-2 * TrainSettings(warmup=0.5).rate(step, 4) for step in (0,)] + [1e-2 * TrainSettings(warmup=0.5).rate(step, 3) for step in (1, 2)])
    lines = [json.loads(line) for line in (tmp_path / "a" / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 3, 4]
    with pytest.raises(Stop):
        trained(tmp_path / "b", Drawn(6, bad=bad), steps=4, batch_size=2, warmup=0.5, measure_every=1, measure=stop_at(3))
    again, _ = trained(tmp_path / "b", Drawn(6, bad=bad), steps=4, batch_size=2, warmup=0.5, resume=True)
    assert close(whole, again, 0)


class Given:
    """A data set of samples that a test makes."""

    def __init__(self, *samples: Sample) -> None:
        self.samples = samples

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> Sample:
        return self.samples[index]


def huge() -> bytes:
    """The header of a PNG of 2 ** 20 pixels a side."""
    return b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR" + (2**20).to_bytes(4) * 2 + b"\x08\2\0\0\0" + bytes(8)


def stated(*targets: str) -> Callable[[Sample, random.Random], list[Text]]:
    return lambda sample, rng: [Text("is it red ?", target) for target in targets]


NOTHING: list[tuple[str, Any, Any]] = [
    ("6 not an image", Drawn(6, bad=range(6)), two_texts),
    ("6 no text", Drawn(6), stated()),
    ("6 no text", Drawn(6), stated("", "  \n")),
    ("6 text too long", Drawn(6), stated("yes " * 200)),
    ("2 too many pixels", Given(*(Sample(key=f"{i}", image_id=i, image=huge()) for i in range(2))), two_texts),
    ("2 missing file", Given(*(Sample(key=f"{i}", image_id=i, image="no/such.jpg") for i in range(2))), two_texts),
    ("the 2 samples of dead", Mixture({"dead": MixedSet(Drawn(2, bad=[0, 1]), 1), "good": MixedSet(Drawn(4), 1)}), two_texts),
]


@pytest.mark.parametrize("features", ["encode", "memory"])
@pytest.mark.parametrize(("found", "source", "texts"), NOTHING, ids=[f"{i}-{found[:9]}" for i, (found, _, _) in enumerate(NOTHING)])
def test_a_run_that_learns_from_nothing_is_refused(found: str, source: Any, texts: Any, features: str, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"none of the . .* can be used") as raised:
        trained(tmp_path, source, texts, steps=6, batch_size=2, checkpoint_every=1, features=features)
    assert found in str(raised.value)
    assert isinstance(source, Mixture) or not (tmp_path / "checkpoints").exists()


def test_data_without_a_sample_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="the training data holds no sample: give data with one or more"):
        train(model_of(), Given(), two_texts, TrainSettings(), tmp_path)


def test_less_than_an_epoch_that_learns_nothing_is_refused_at_its_end(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="none of the 2 samples that were read can be used, so nothing was trained: 2 not an image"):
        trained(tmp_path, Drawn(6, bad=range(6)), steps=1, batch_size=2)


def test_an_empty_text_among_others_is_left_out(tmp_path: Path) -> None:
    plain, _ = trained(tmp_path / "plain", texts=stated("yes"))
    with_empty, done = trained(tmp_path / "empty", texts=stated("yes", "", " "))
    assert close(plain, with_empty, 0)
    assert not done.bad.counts


def test_images_are_taken_as_files_text_bytes_and_in_memory(tmp_path: Path) -> None:
    """The same image in four forms gives the same weights; anything else is refused where the sample is made."""
    path = tmp_path / "one.png"
    path.write_bytes(Drawn(1)[0].image)
    forms: list[Any] = [path, str(path), path.read_bytes(), Image.open(path), Image.open(path).convert("RGBA")]
    models = [trained(tmp_path / f"{i}", Given(Sample(key="one", image_id=1, image=form)), steps=2, batch_size=1)[0] for i, form in enumerate(forms)]
    assert all(close(models[0], other, 0) for other in models[1:])
    for wrong in (torch.zeros(3, 4, 4), np.zeros((4, 4, 3)), 7):
        with pytest.raises(DataError, match=f"the image of sample 'one' is a {type(wrong).__name__}: give the path of a file, the bytes of one, or a PIL image"):
            Sample(key="one", image_id=1, image=wrong)  # type: ignore[arg-type]


def no_number(sample: Sample, rng: random.Random) -> list[Text]:
    return [Text("is it ?", "yes")]


def test_a_loss_that_is_not_a_number_stops_the_run(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"the loss is not a number at step \d: lower train.learning_rate, or set train.clip"):
        trained(tmp_path, texts=no_number, learning_rate=1e200, clip=0.0)


@pytest.mark.parametrize(("value", "found"), [(float("nan"), "not a number"), (float("inf"), "infinite|not a number")])
@pytest.mark.parametrize("at", [5, 6])
def test_what_is_not_finite_is_found_between_logged_steps_and_puts_out_no_good_checkpoint(at: int, value: float, found: str, tmp_path: Path) -> None:
    """Step 5 poisons what step 6 learns with; step 6 poisons what is saved after it."""
    steps = iter(range(1, 100))

    def poison(optimizer: torch.optim.Optimizer) -> None:
        if next(steps) == at:
            optimizer.param_groups[0]["params"][0].data.fill_(value)

    expected = f"the loss is ({found}) at step 6: lower train.learning_rate" if at == 5 else "after step 6 .* not finite, such as weight.*no checkpoint is written"
    with looked_at_before_each_step(poison), pytest.raises(ConfigError, match=expected):
        trained(tmp_path, steps=20, log_every=100, checkpoint_every=2, keep=2)
    checkpoints = sorted((tmp_path / "checkpoints").iterdir())
    assert [path.name for path in checkpoints] == ["step_00000002", "step_00000004"]
    assert all(tensor.isfinite().all() for path in checkpoints for tensor in load_file(path / "state.safetensors").values() if tensor.is_floating_point())


def measured(*values: float) -> Callable[[], dict[str, float]]:
    given = iter(values)
    return lambda: {"other": 0.0, "figure": next(given)}


def test_a_run_ends_with_the_weights_of_its_best_measurement(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Also of a run that stopped after it and went on, and without the setting with the last ones."""
    fields: dict[str, Any] = {"steps": 5, "checkpoint_every": 1, "measure_every": 1, "judged_by": "figure"}
    upto3, _ = trained(tmp_path / "upto3", steps=5, checkpoint_every=1, measure_every=1, keep=9)
    third = {name.removeprefix("weight."): value for name, value in load_file(tmp_path / "upto3/checkpoints/step_00000003/state.safetensors").items()}
    best, done = trained(tmp_path / "best", **fields, keep_best=True, measure=measured(1, 2, 5, 5, 4))
    assert done.best == (3, "figure", 5.0)
    assert all(torch.equal(value, third[name]) for name, value in weights(best).items())
    assert "step 3/5  validation: other 0.000  figure 5.000  best so far\nstep 4" in re.sub(r"step \d/5  loss.*\n", "", capsys.readouterr().err)
    with pytest.raises(StopIteration):
        trained(tmp_path / "again", **fields, keep_best=True, measure=measured(1, 2, 5, 5))
    again, done = trained(tmp_path / "again", **fields, keep_best=True, measure=measured(4), resume=True)
    assert done.best == (3, "figure", 5.0)
    assert close(best, again, 0)
    last, done = trained(tmp_path / "last", **fields, measure=measured(1, 2, 5, 5, 4))
    assert done.best is None
    assert close(last, upto3, 0)


def test_patience_ends_a_run_and_a_resume_of_it_takes_no_step(tmp_path: Path) -> None:
    fields: dict[str, Any] = {"steps": 9, "measure_every": 1, "judged_by": "figure", "patience": 2, "checkpoint_every": 4}
    ended, done = trained(tmp_path, **fields, keep_best=True, measure=measured(1, 3, 3, 2))
    assert (done.steps, done.best) == (4, (2, "figure", 3.0))
    again, done = trained(tmp_path, **fields, keep_best=True, measure=measured(), resume=True)
    assert (done.steps, done.best) == (4, (2, "figure", 3.0))
    assert close(ended, again, 0)
    _, done = trained(tmp_path, **{**fields, "patience": 0}, keep_best=True, measure=measured(1, 2, 3, 4, 5), resume=True)
    assert (done.steps, done.best) == (9, (9, "figure", 5.0))


def test_a_figure_that_is_not_measured_cannot_judge(tmp_path: Path) -> None:
    for measure, expected in ((lambda: {"loss": 1.0}, "need CIDEr, and the measurement gave loss"), (None, "there is none: give measure")):
        with pytest.raises(ConfigError, match=expected):
            trained(tmp_path / expected[:4], measure_every=1, keep_best=True, measure=measure, judged_by="CIDEr")


def test_a_resume_says_from_where_it_goes_on_and_with_which_other_settings(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    trained(tmp_path)
    capsys.readouterr()
    trained(tmp_path, resume=True, steps=6, learning_rate=5e-3, learning_rates={"bridge": 1e-3}, log_every=2)
    out = capsys.readouterr().out
    assert f"resumed after step 4 of 6, from {tmp_path / 'checkpoints' / 'step_00000004'}\n" in out
    stated = next(line for line in out.splitlines() if line.startswith("settings that are not those of the checkpoint: "))
    expected = "train.steps 4 -> 6; train.learning_rate 0.01 -> 0.005; train.learning_rates {} -> {'bridge': 0.001}; train.log_every 1 -> 2"
    assert stated.split(": ", 1)[1] == expected
    trained(tmp_path, resume=True, steps=6, learning_rate=5e-3, learning_rates={"bridge": 1e-3}, log_every=2)
    assert "settings that" not in capsys.readouterr().out
    trained(tmp_path / "new", resume=True)
    assert f"there is no checkpoint in {tmp_path / 'new' / 'checkpoints'}: the run begins anew" in capsys.readouterr().out


def test_a_checkpoint_of_another_model_is_not_continued(tmp_path: Path) -> None:
    trained(tmp_path)
    other = compose("opt")
    excite(other.add_adapter("one", {**METHODS, "prompt": Prompt(length=2, init_std=0.2)}).double())
    with pytest.raises(CheckpointError, match=r"cannot be continued exactly: methods.prompt.init_std was 0.1 and is 0.2; resume with the config"):
        train(other, Drawn(8), two_texts, TrainSettings(**SETTINGS), tmp_path, resume=True)
    with torch.no_grad():
        other = model_of()
        next(iter(other.language.model.parameters())).mul_(2.0)
    again = VisionLanguageModel(other.tower, other.language, other.template)
    excite(again.add_adapter("one", METHODS).double())
    with pytest.raises(CheckpointError, match="cannot be continued exactly: language_model was "):
        train(again, Drawn(8), two_texts, TrainSettings(**SETTINGS), tmp_path, resume=True)


def test_a_checkpoint_of_an_earlier_version_is_continued(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    whole, _ = trained(tmp_path / "whole", steps=6)
    trained(tmp_path / "old")
    for path in (tmp_path / "old" / "checkpoints").glob("*/state.json"):
        content = json.loads(path.read_text())
        path.write_text(json.dumps({name: content[name] for name in ("step", "stream", "data", "scaler")}))
    trained(tmp_path / "six", steps=6)
    again, _ = trained(tmp_path / "old", steps=6, resume=True)
    assert "an earlier version wrote that checkpoint" in capsys.readouterr().out
    assert len(losses(tmp_path / "old")) == 6
    assert not close(whole, again, 0)  # its first four steps had the schedule of a run of four
    assert close(whole, again, 1e-1)


def test_settings_that_no_image_is_needed_for_are_refused_before_one_is_read(tmp_path: Path) -> None:
    class Unread(Drawn):
        def __getitem__(self, index: int) -> Sample:
            raise AssertionError

    for fields, expected in (
        ({"learning_rates": {"lora": 1.0}}, "train.learning_rates names lora"), ({"states_gib": 1.0}, "train.states_gib caches the output of the layers below"),
        ({"keep_best": True, "measure_every": 1}, "there is none: give measure"), ({"trackers": ("wandb",)}, "train.trackers names wandb"),
    ):  # fmt: skip
        with pytest.raises(ConfigError, match=expected):
            trained(tmp_path, Unread(8), features="memory", **fields)


def test_trackers_that_are_not_installed_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"train.trackers names wandb, and no such package is here: pip install 'adalink\[trackers\]'"):
        trained(tmp_path, trackers=("wandb",))


def test_other_parameters_can_be_trained_with_the_adapter(tmp_path: Path) -> None:
    extra = nn.Parameter(torch.ones(3))
    trained(tmp_path, also_trained={"extra.bias": extra})
    assert extra.tolist() == [1, 1, 1]  # nothing depends on it, and vectors do not decay
    assert "weight.extra.bias" in load_file(tmp_path / "checkpoints" / "step_00000004" / "state.safetensors")
    with pytest.raises(CheckpointError, match=r"\['extra.bias'\] differ"):
        trained(tmp_path, resume=True)


def test_other_parameters_are_not_split(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Accelerator, "is_fsdp2", property(lambda self: True))
    with pytest.raises(ConfigError, match="FSDP2 trains adapters alone, and also_trained names other weights: train those with DDP"):
        trained(tmp_path, also_trained={"extra.bias": nn.Parameter(torch.ones(3))})


def test_a_steps_random_numbers_are_a_function_of_seed_step_and_rank(tmp_path: Path) -> None:
    """A module that draws numbers, as dropout does, draws the same after a resume, and others in each step and on each rank."""
    assert len({step_seed(seed, step, rank) for seed in (0, 1, 2**40) for step in (0, 1, 11) for rank in (0, 1, 11)}) == 27
    drawn: list[float] = []

    def draw(sample: Sample, rng: random.Random) -> list[Text]:
        return two_texts(sample, rng)

    with looked_at_before_each_step(lambda optimizer: drawn.append(float(torch.rand(())))):
        trained(tmp_path / "a", texts=draw, steps=4)
        with pytest.raises(Stop):
            trained(tmp_path / "b", texts=draw, steps=4, measure_every=1, measure=stop_at(3))
        torch.rand(100)
        trained(tmp_path / "b", texts=draw, steps=4, resume=True)
    assert drawn[:4] == drawn[4:6] + drawn[7:9]
    assert len(set(drawn[:4])) == 4


def test_each_method_may_have_a_rate_of_its_own_and_vectors_do_not_decay() -> None:
    adapter = model_of().adapted.active_adapter()
    parameters = dict(adapter.named_parameters())
    groups = parameter_groups(parameters, TrainSettings(learning_rate=1e-3, learning_rates={"bridge": 5e-4, "adalink": 3e-4, "adalink.image": 2e-4}, weight_decay=0.1))
    found = {id(parameter): (group["lr"], group["weight_decay"]) for group in groups for parameter in group["params"]}
    assert len(found) == len(parameters)
    rates = {"bridge": 5e-4, "adalink.image": 2e-4, "adalink.text": 3e-4, "prompt": 1e-3}
    for name, parameter in parameters.items():
        expected = next(rate for prefix, rate in rates.items() if name.startswith(prefix + "."))
        assert found[id(parameter)] == (expected, 0.1 if parameter.ndim > 1 else 0.0)
    with pytest.raises(ConfigError, match=r"train.learning_rates names lora, and this adapter's methods are adalink, bridge, prompt"):
        parameter_groups(parameters, TrainSettings(learning_rates={"lora": 1.0}))


def test_the_rate_of_each_step_reaches_the_optimizer(tmp_path: Path) -> None:
    seen: list[list[float]] = []
    with looked_at_before_each_step(lambda optimizer: seen.append([group["lr"] for group in optimizer.param_groups])):
        trained(tmp_path, steps=5, warmup=0.4, learning_rate=1e-2, learning_rates={"bridge": 1e-3})
    shares = [TrainSettings(steps=5, warmup=0.4).rate(step, 5) for step in range(5)]
    assert [max(rates) for rates in seen] == pytest.approx([1e-2 * share for share in shares])
    assert [min(rates) for rates in seen] == pytest.approx([1e-3 * share for share in shares])


def test_gradients_are_clipped_to_the_norm_that_was_asked_for(tmp_path: Path) -> None:
    def norms(clip: float) -> list[float]:
        seen: list[float] = []

        def look(optimizer: torch.optim.Optimizer) -> None:
            grads = [parameter.grad for group in optimizer.param_groups for parameter in group["params"]]
            seen.append(torch.stack([grad.square().sum() for grad in grads if grad is not None]).sum().sqrt().item())

        with looked_at_before_each_step(look):
            trained(tmp_path / f"clip{clip}", steps=2, clip=clip, batch_size=2, accumulation=2)
        return seen

    free = norms(0.0)
    assert min(free) > 0.1
    assert norms(0.1) == pytest.approx([0.1, 0.1], rel=1e-3)
    assert norms(1e6)[0] == pytest.approx(free[0], rel=1e-6)
