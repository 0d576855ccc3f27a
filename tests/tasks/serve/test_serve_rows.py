"""Rows of every family of language models through the batch code of the server, in float64: the texts of `generate`, in any company."""

from __future__ import annotations

import asyncio
import time
from typing import Any

import pytest
import torch
from composed_path import FAMILIES, compose, excite
from served import picture
from shared import PATIENCE

from adalink import BASE_NAME, AdaLink, Bridge, Prompt
from multimodal.generate import GenerationSettings
from multimodal.images import decode_image
from multimodal.model import VisionLanguageModel
from tasks.serve.job import Answer, Ask, Job, Picture
from tasks.serve.kept_features import KeptFeatures
from tasks.serve.running import Running
from tasks.serve.sampling import Sampling
from tasks.serve.settings import Batching
from tasks.serve.worker import Worker

QUESTIONS = ("is it red ?", "is it a big red ball ?", "is it ?", "a cube ?")
METHODS: dict[str, dict[str, Any]] = {
    "one": {"bridge": Bridge(kind="linear"), "adalink": AdaLink(rank=4, modalities=("image", "text"))},
    "two": {"bridge": Bridge(kind="linear"), "prompt": Prompt(length=3, init_std=0.5)},
}


class Here:
    """A loop that calls at once: the generation thread and the request are the same here."""

    def call_soon_threadsafe(self, function: Any, *arguments: Any) -> None:
        function(*arguments)


def model_of(family: str) -> VisionLanguageModel:
    model = compose(family)
    for seed, (name, methods) in enumerate(METHODS.items()):
        excite(model.add_adapter(name, methods).double(), seed + 1)
    return model


def job(model: VisionLanguageModel, name: str, index: int, n_new: int, **more: Any) -> Job:
    image = Picture(str(index), model.tower.preprocess(decode_image(picture(index))))
    row = model.row_encoder(name).prompt(QUESTIONS[index % 4])
    ask = Ask(adapter=name, row=row, picture=image, settings=GenerationSettings(max_new_tokens=n_new), **more)
    return Job(ask, streams=False, loop=Here(), events=asyncio.Queue())  # type: ignore[arg-type]


def run_jobs(model: VisionLanguageModel, kept: KeptFeatures, jobs: list[Job]) -> None:
    """All at once, to the end."""
    running = Running(model, kept)
    running.join(jobs)
    while running.rows:
        running.step()


def answers(model: VisionLanguageModel, jobs: list[Job], kept: KeptFeatures | None = None) -> list[str]:
    run_jobs(model, kept or KeptFeatures(model, 8), jobs)
    found = [one.events.get_nowait() for one in jobs]
    assert all(isinstance(answer, Answer) for answer in found)
    return [answer.text for answer in found if isinstance(answer, Answer)]


@pytest.mark.parametrize("family", FAMILIES)
def test_a_row_is_what_generate_gives_in_any_company(family: str) -> None:
    model = model_of(family)
    cases = [(name, index, n_new) for index, (name, n_new) in enumerate((("one", 7), ("two", 3), (BASE_NAME, 9), ("two", 8), ("one", 2), ("one", 9)))]
    alone = [
        model.generate([decode_image(picture(i))], [QUESTIONS[i % 4]], adapter_names=[name], settings=GenerationSettings(max_new_tokens=n))[0]
        for name, i, n in cases
    ]
    assert answers(model, [job(model, *case) for case in cases]) == alone
    drawn = job(model, "one", 5, 12, sampling=Sampling(temperature=1.5, top_p=1.0, seed=3))
    kept = KeptFeatures(model, 8)
    assert answers(model, [drawn, *(job(model, *case) for case in reversed(cases))], kept)[1:] == alone[::-1]
    assert answers(model, [job(model, *case) for case in cases], kept) == alone  # from kept features
    assert len(set(alone)) > 3  # the control


def test_a_drawn_row_is_the_same_in_any_company() -> None:
    model = model_of("llama")

    def drawn(seed: int) -> Job:
        return job(model, "one", 1, 12, sampling=Sampling(temperature=1.2, top_p=0.95, seed=seed))

    (alone,) = answers(model, [drawn(5)])
    assert answers(model, [job(model, "two", 0, 6), drawn(5), drawn(6)])[1] == alone
    assert answers(model, [drawn(6)]) != [alone]


def test_a_row_that_nobody_waits_for_ends_the_batch_early() -> None:
    model = model_of("llama")
    gone = job(model, "one", 0, 40)
    calls: list[int] = []
    handle = model.language.model.register_forward_hook(lambda *_: calls.append(1))
    gone.cancelled = True
    with torch.no_grad():
        run_jobs(model, KeptFeatures(model, 8), [gone])
    handle.remove()
    assert len(calls) == 1
    assert gone.events.empty()


def test_jobs_that_join_a_running_batch_are_answered_as_alone_and_one_that_leaves_makes_room() -> None:
    model = model_of("llama")
    running = Running(model, KeptFeatures(model, 8))
    cases = [("one", 0, 9), ("two", 1, 8), (BASE_NAME, 2, 9), ("two", 3, 4), ("one", 2, 1)]
    jobs = [job(model, *case) for case in cases]
    gone = job(model, "one", 0, 40)
    running.join([jobs[0], gone])
    running.step()
    running.join(jobs[1:3])
    assert len(running.rows) == 4
    gone.cancelled = True
    running.step()
    assert gone not in running.jobs
    running.join(jobs[3:])
    assert jobs[4] not in running.jobs  # its one token came with its prompt
    while running.rows:
        running.step()
    found = [one.events.get_nowait() for one in jobs]
    alone = [
        model.generate([decode_image(picture(i))], [QUESTIONS[i % 4]], adapter_names=[name], settings=GenerationSettings(max_new_tokens=n))[0]
        for name, i, n in cases
    ]
    assert [answer.text for answer in found if isinstance(answer, Answer)] == alone
    assert gone.events.empty()
    running.join([job(model, "two", 0, 3)])  # and the batch begins anew
    assert len(running.rows) == 1


def test_a_batch_that_fails_is_told_and_the_next_one_runs() -> None:
    model = model_of("llama")
    worker = Worker(model, Batching(), 8, lambda jobs: None)
    bad, good = job(model, "one", 0, 5), job(model, "one", 0, 5)
    handle = model.language.model.register_forward_pre_hook(lambda *_: (_ for _ in ()).throw(RuntimeError("out of memory")))
    worker.waiting.put(bad)
    worker.start()
    give_up = time.monotonic() + PATIENCE
    while bad.events.empty() and time.monotonic() < give_up:
        time.sleep(0.01)
    handle.remove()
    worker.waiting.put(good)
    worker.stop()
    assert isinstance(bad.events.get_nowait(), RuntimeError)
    assert isinstance(good.events.get_nowait(), Answer)
