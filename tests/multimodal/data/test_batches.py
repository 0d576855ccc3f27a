"""A loop of one's own reads what `train` reads, every sample once in each epoch; the loss over a data set does not depend on how it is cut."""

from __future__ import annotations

import copy
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from composed import Drawn, compose, excite, two_texts

from adalink import AdaLink, Bridge
from adalink.errors import BudgetError
from multimodal.data.feature_cache.encode import encode_all
from multimodal.model import TrainedParts, VisionLanguageModel
from multimodal.sample import Sample
from multimodal.template import Text
from multimodal.training.prepare import mean_loss, new_optimizer
from multimodal.training.settings import TrainSettings
from multimodal.training.train import train


def model_of() -> VisionLanguageModel:
    model = compose("opt")
    torch.manual_seed(5)
    excite(model.add_adapter("one", {"bridge": Bridge(kind="linear"), "adalink": AdaLink(rank=4, modalities=("image", "text"))}).double())
    return model


class Task:
    """What tasks.captioning and tasks.vqa are to a training."""

    def texts(self, sample: Sample, rng: random.Random) -> list[Text]:
        return two_texts(sample, rng)


def test_a_loop_of_ones_own_gives_the_weights_that_train_gives(tmp_path: Path) -> None:
    settings = TrainSettings(epochs=2.0, batch_size=4, warmup=0.3, learning_rate=1e-2, clip=0.0)
    trained, own = model_of(), model_of()
    train(trained, Drawn(8), two_texts, settings, tmp_path)
    optimizer = new_optimizer(TrainedParts.of(own).parameters(), settings)
    own.train()
    for step, batch in enumerate(own.batches(Drawn(8), Task(), batch_size=4, epochs=2.0)):
        for group in optimizer.param_groups:
            group["lr"] = 1e-2 * settings.rate(step, 4)
        own(batch).backward()
        optimizer.step()
        optimizer.zero_grad()
    expected = TrainedParts.of(trained).parameters()
    assert all(torch.equal(weight, expected[name]) for name, weight in TrainedParts.of(own).parameters().items())
    assert all(not weight.equal(expected[name]) for name, weight in TrainedParts.of(model_of()).parameters().items())  # the control


@pytest.mark.parametrize("workers", [0, 1])
def test_every_sample_comes_once_in_each_epoch_and_the_next_loop_goes_on(workers: int) -> None:
    model, keys = model_of(), [Drawn(7)[i].key for i in range(7)]
    batches = model.batches(Drawn(7), Task(), batch_size=3, workers=workers)
    first, second = ([batch.keys for batch in batches] for _ in range(2))
    assert [len(some) for some in first] == [len(some) for some in second] == [3, 3, 1] == [3] * (len(batches) - 1) + [1]
    assert sorted(key for some in first for key in some) == sorted(key for some in second for key in some) == keys
    assert first != second
    assert [batch.keys for batch in model.batches(Drawn(7), Task(), batch_size=3)] == first
    parts = [[key for batch in model.batches(Drawn(7), Task(), batch_size=2, rank=rank, world=2) for key in batch.keys] for rank in (0, 1)]
    assert sorted(parts[0] + parts[1]) == keys


def test_bad_samples_are_left_out_counted_once_and_stop_the_loop_over_the_budget() -> None:
    batches = model_of().batches(Drawn(4, bad=[1, 2]), Task(), batch_size=1, epochs=3)
    assert sum(len(batch.keys) for batch in batches) == 6
    assert str(batches.bad) in ("2 not an image (train/000001, train/000002)", "2 not an image (train/000002, train/000001)")
    with pytest.raises(BudgetError, match="2 bad samples, and at most 1 is allowed"):
        list(model_of().batches(Drawn(4, bad=[1, 2]), Task(), bad_samples=1))


def test_the_loss_of_a_data_set_is_the_mean_over_its_targets_however_it_is_cut() -> None:
    model, source = model_of(), Drawn(7, bad=[3])

    def once(sample: Sample, rng: random.Random) -> list[Text]:
        return [Text("is it red ?", "yes"), *([Text("", "a big red cube")] if int(sample.key[-1]) % 2 else [])]

    patches: Any = encode_all(model, source)
    modes = [module.training for module in model.modules()]
    whole = mean_loss(model, model.batches(source, once, batch_size=7, features=patches))
    parts = mean_loss(model, model.batches(source, once, batch_size=2, features=patches, seed=3))
    assert whole == pytest.approx(parts, rel=1e-9)  # float64
    with torch.no_grad():
        (batch,) = model.batches(source, once, batch_size=7, features=patches)
        assert whole == pytest.approx(float(copy.deepcopy(model).eval()(batch)), rel=1e-9)
    assert [module.training for module in model.modules()] == modes
    assert mean_loss(model, model.batches(source, lambda sample, rng: [], features=patches)) is None
