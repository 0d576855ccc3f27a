from __future__ import annotations

from typing import Any

import pytest

from adalink.errors import ConfigError
from multimodal.training.settings import TrainSettings


def test_warm_up_and_cosine_by_hand() -> None:
    settings = TrainSettings(warmup=0.2, final_rate=0.1)
    assert [round(settings.rate(step, 10), 4) for step in (0, 1, 2, 6)] == [0.3333, 0.6667, 1.0, 0.55]
    assert 0.1 < settings.rate(9, 10) < 0.15
    assert TrainSettings(warmup=0.0).rate(0, 10) == 1.0


@pytest.mark.parametrize(("share", "warmup"), [(0.5, 0.03), (0.01, 0.03), (0.02, 0.5)])
def test_the_rate_does_not_jump_where_a_step_reads_another_number_of_samples(share: float, warmup: float) -> None:
    settings = TrainSettings(warmup=warmup)
    before = settings.rate(share * 12_500, 12_500)
    for times in (1, 2, 4, 8, 0.5, 0.25):
        assert settings.rate(share * 12_500 * times, 12_500 * times) == pytest.approx(before, abs=0.011)  # a step of the shortest warm-up: 1 / 94


def test_the_number_of_steps_reads_every_picture_as_often_as_asked() -> None:
    assert TrainSettings(epochs=2, batch_size=4).n_steps(10, world=1) == 5
    assert TrainSettings(epochs=1, batch_size=4).n_steps(10, world=1) == 3
    assert TrainSettings(epochs=2, batch_size=2, accumulation=2).n_steps(10, world=5) == 1
    assert TrainSettings(epochs=0.5, batch_size=1).n_steps(10, world=1) == 5
    assert TrainSettings(epochs=3, steps=7).n_steps(10, world=1) == 7


WRONG: list[tuple[dict[str, Any], str]] = [
    *(({name: 0}, f"train.{name} is 0: give 1 or more") for name in ("batch_size", "accumulation", "checkpoint_every", "keep", "log_every", "window")),
    *(({name: -1}, f"train.{name} is -1: give 0 or more") for name in ("steps", "weight_decay", "clip", "workers", "bad_samples", "seed", "states_gib", "row_tokens", "bucket_pool")),
    ({"keep_best": True}, "train.keep_best judges measurements, and train.measure_every is 0"),
    ({"patience": 3}, "train.patience judges measurements, and train.measure_every is 0"),
    ({"seed": 10**13}, "train.seed is 10000000000000: give at most 1099511627776"),
    ({"epochs": 0}, "train.epochs is 0 and train.steps 0: give a positive number of one of them"),
    ({"learning_rate": 0.0}, "train.learning_rate is 0.0"),
    ({"learning_rates": {"bridge": -1.0}}, "give positive rates"),
    ({"warmup": 1.0}, "train.warmup is 1.0 and train.final_rate 0.0: both are shares between 0 and 1"),
    ({"final_rate": 1.5}, "train.final_rate 1.5"),
    ({"compile": "default", "checkpointing": True}, "train.compile is default and train.checkpointing true: a checkpointed layer is no part of one graph"),
    ({"states_gib": float("inf")}, "train.states_gib is inf: give a number of GiB"),
    ({"states_gib": 1e300}, r"train.states_gib is 1e\+300: give a number of GiB"),
    ({"compile": "reduce-overhead", "offload": "activations"}, "train.compile is reduce-overhead and train.offload activations: a graph plans its own memory"),
    ({"compile": "default", "states_gib": 2.0}, "train.compile is default and train.states_gib 2.0: one graph holds every layer, so choose one"),
    ({"betas": (0.9, 1.0)}, r"train.betas is \(0.9, 1.0\): both are from 0 to below 1"),
    ({"learning_rate": float("nan")}, "train.learning_rate is nan"),
]


@pytest.mark.parametrize(("fields", "message"), WRONG, ids=[next(iter(fields)) for fields, _ in WRONG])
def test_settings_out_of_range_are_refused(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        TrainSettings(**fields)
