"""Rows of every family of language models through the batch code of the server, in float64: the texts of `generate`, in any company."""

from __future__ import annotations

import asyncio
import sys
import time
from typing import Any

import pytest
import torch
from composed import FAMILIES, compose, excite
from served import photo
from shared import PATIENCE

from adalink import BASE_NAME, AdaLink, Bridge, Gated, Ladder, Prompt
from multimodal.data.images.decode import decode_image
from multimodal.generation.generate import GenerationSettings
from multimodal.model import VisionLanguageModel
from tasks.serve.engine import FeatureLRU, PromptCache, Running, Worker
from tasks.serve.sampling import Sampling
from tasks.serve.scheduler import Answer, Ask, Job, ServedImage
from tasks.serve.settings import Batching, RequestLimits

QUESTIONS = ("is it red ?", "is it a big red ball ?", "is it ?", "a cube ?")
MANY = 2**30
METHODS: dict[str, dict[str, Any]] = {
    "one": {"bridge": Bridge(kind="linear"), "adalink": AdaLink(rank=4, modalities=("image", "text"))},
    "two": {"bridge": Bridge(kind="linear"), "prompt": Prompt(length=3, init_std=0.5, at="after_text")},
    "three": {"bridge": Bridge(kind="linear"), "ladder": Ladder(reduction=2, output="add")},
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


def job(model: VisionLanguageModel, name: str, index: int, n_new: int, question: int | None = None, **more: Any) -> Job:
    image = ServedImage(str(index), model.tower.preprocess(decode_image(photo(index))))
    row = model.row_encoder(name).prompt(QUESTIONS[index % 4 if question is None else question])
    ask = Ask(adapter=name, row=row, images=(image,), settings=GenerationSettings(max_new_tokens=n_new), **more)
    return Job(ask, streams=False, loop=Here(), events=asyncio.Queue())  # type: ignore[arg-type]


def running_of(model: VisionLanguageModel, most: int = 0) -> Running:
    """No prompts are kept unless told."""
    return Running(model, FeatureLRU(model, 8), PromptCache(most))


def run_jobs(running: Running, jobs: list[Job]) -> list[Answer]:
    """All at once, to the end; the answers of those that nobody took away."""
    running.join(jobs)
    while running.rows:
        running.step()
    found = [one.events.get_nowait() for one in jobs if not one.cancelled]
    assert all(isinstance(answer, Answer) for answer in found)
    return [answer for answer in found if isinstance(answer, Answer)]


def answers(model: VisionLanguageModel, jobs: list[Job], running: Running | None = None) -> list[str]:
    return [answer.text for answer in run_jobs(running or running_of(model), jobs)]


def generated(model: VisionLanguageModel, name: str, index: int, n_new: int, question: int | None = None) -> str:
    asked, settings = QUESTIONS[index % 4 if question is None else question], GenerationSettings(max_new_tokens=n_new)
    (text,) = model.generate([decode_image(photo(index))], [asked], adapter_names=[name], settings=settings)
    return text


@pytest.mark.parametrize("family", FAMILIES)
def test_a_row_is_what_generate_gives_in_any_company(family: str) -> None:
    model = model_of(family)
    lengths = (("one", 7), ("two", 3), (BASE_NAME, 9), ("two", 8), ("one", 2), ("one", 9), ("three", 8), ("three", 3))
    cases = [(name, index, n_new) for index, (name, n_new) in enumerate(lengths)]
    alone = [generated(model, *case) for case in cases]
    assert answers(model, [job(model, *case) for case in cases]) == alone
    drawn = job(model, "one", 5, 12, sampling=Sampling(temperature=1.5, top_p=1.0, seed=3))
    running = running_of(model)
    assert answers(model, [drawn, *(job(model, *case) for case in reversed(cases))], running)[1:] == alone[::-1]
    assert answers(model, [job(model, *case) for case in cases], running) == alone  # from cached features
    assert len(set(alone)) > 2  # the control


@pytest.mark.parametrize("family", FAMILIES)
def test_what_a_prompt_shares_with_one_before_is_not_read_again_and_changes_no_text(family: str) -> None:
    model = model_of(family)
    running = running_of(model, MANY)
    first = [("one", 0, 5), ("two", 0, 5), (BASE_NAME, 1, 5), ("one", 2, 5), ("three", 0, 5)]
    # Other questions about known images, the same ones again, and new images, all in one batch.
    second = [("one", 0, 6, 1), ("two", 0, 4), (BASE_NAME, 1, 6), ("one", 1, 6), ("two", 2, 5), ("one", 2, 7, 3), ("one", 2, 6), ("three", 0, 6, 1)]
    for cases, n_hits in ((first, 0), (second, 6), (second, 8)):
        found = run_jobs(running, [job(model, *case) for case in cases])
        assert [answer.text for answer in found] == [generated(model, *case) for case in cases]
        assert sum(answer.n_known > 0 for answer in found) == (0 if family == "t5" else n_hits)


def test_an_adapter_that_reads_later_tokens_has_no_known_prompts() -> None:
    model = model_of("llama")
    excite(model.add_adapter("gated", {"bridge": Bridge(kind="linear"), "gated": Gated(inner=AdaLink(rank=4, modalities=("text", "image")))}).double(), 7)
    running = running_of(model, MANY)
    cases = [("gated", 0, 6), ("one", 0, 6), ("gated", 1, 6)]
    for _ in range(2):
        found = run_jobs(running, [job(model, *case) for case in cases])
        assert [answer.text for answer in found] == [generated(model, *case) for case in cases]
    assert [answer.n_known > 0 for answer in found] == [False, True, False]


def test_prompts_take_no_more_memory_than_was_given_and_the_least_recently_used_go() -> None:
    model = model_of("llama")
    running = running_of(model, MANY)
    jobs = {(name, index): job(model, name, index, 1, 0) for name in ("one", "two") for index in range(4)}
    run_jobs(running, [jobs["one", 0]])
    each = running.prompts.n_bytes
    assert each == 2 * 8 * model.language.model.config.num_hidden_layers * len(jobs["one", 0].ask.row.ids) * kv_width(model)
    running = running_of(model, 3 * each)
    for index in (0, 1, 2, 0, 3):  # 0 is used again, so that 1 makes room
        run_jobs(running, [job(model, "one", index, 1, 0)])
    assert running.prompts.n_bytes == 3 * each
    assert [index for index in range(4) if running.prompts.parts([jobs["one", index]])[0].known] == [0, 2, 3]
    assert not running.prompts.parts([jobs["two", 0]])[0].known  # another adapter's
    running.prompts.forget("one")
    assert running.prompts.n_bytes == 0
    small = running_of(model, each - 1)
    run_jobs(small, [job(model, "one", 0, 1, 0)])
    assert small.prompts.n_bytes == 0


def kv_width(model: VisionLanguageModel) -> int:
    config = model.language.model.config
    return int(config.num_key_value_heads * config.head_dim)


def test_an_adapter_that_comes_under_a_name_that_was_known_is_not_answered_from_the_other() -> None:
    model = model_of("llama")
    worker = Worker(model, Batching(), RequestLimits(), lambda jobs: None)
    texts = []
    for seed in (1, 5):
        excite(model.add_adapter("guest", METHODS["one"]).double(), seed)
        for _ in range(2):
            texts += [answers(model, [job(model, "guest", 0, 9)], worker.running)[0]]
            assert texts[-1] == generated(model, "guest", 0, 9)
        worker.delete_adapter("guest")
    assert texts[1] != texts[2]  # the control


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
        run_jobs(running_of(model), [gone])
    handle.remove()
    assert len(calls) == 1
    assert gone.events.empty()


def test_jobs_that_join_a_running_batch_are_answered_as_alone_and_one_that_leaves_makes_room() -> None:
    model = model_of("llama")
    running = running_of(model)
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
    alone = [generated(model, *case) for case in cases]
    assert [answer.text for answer in found if isinstance(answer, Answer)] == alone
    assert gone.events.empty()
    running.join([job(model, "two", 0, 3)])  # and the batch begins anew
    assert len(running.rows) == 1


def test_a_batch_that_fails_is_told_and_the_next_one_runs() -> None:
    model = model_of("llama")
    worker = Worker(model, Batching(), RequestLimits(), lambda jobs: None)
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


def test_jobs_that_fail_after_some_of_them_have_joined_leave_no_row_behind() -> None:
    model = model_of("llama")
    worker = Worker(model, Batching(), RequestLimits(), lambda jobs: None)
    other, first, known, new = (job(model, "one", index, 9) for index in (2, 0, 0, 1))
    worker.running.join([first])
    worker.running.clear()
    with torch.no_grad():
        worker.running.join([other])
    calls: list[int] = []

    def fail(*_: object) -> None:
        calls.append(1)
        if len(calls) == 2:  # new prompts were read, and their rows are there; now the known one
            raise RuntimeError("out of memory")

    handle = model.language.model.register_forward_pre_hook(fail)
    worker.join([known, new])
    handle.remove()
    assert isinstance(known.events.get_nowait(), RuntimeError)
    assert isinstance(new.events.get_nowait(), RuntimeError)
    worker.running.step()
    assert worker.running.jobs == [other]
    while worker.running.rows:
        worker.running.step()
    answer = other.events.get_nowait()
    assert isinstance(answer, Answer)
    assert answer.text == generated(model, "one", 2, 9)


class MemoryEnds:
    """Stands for a function that makes tensors, and raises what torch raises at the n-th call."""

    def __init__(self, function: Any, n: int) -> None:
        self.function, self.left = function, n

    def __call__(self, *arguments: Any, **named: Any) -> Any:
        self.left -= 1
        if self.left == 0:
            raise torch.OutOfMemoryError("out of memory")
        return self.function(*arguments, **named)


@pytest.mark.parametrize("place", ["multimodal.generation.decoding.left_padded", "multimodal.generation.decoding._padded", "multimodal.generation.decoding._beside", "tasks.serve.engine._chosen"])
def test_where_memory_ends_while_a_row_joins_the_rows_that_run_are_not_touched(place: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = model_of("llama")
    module, _, name = place.rpartition(".")
    alone = [generated(model, "one", 0, 9), generated(model, "two", 1, 9)]
    for n in range(1, 30):
        worker = Worker(model, Batching(), RequestLimits(), lambda jobs: None)
        others = [job(model, "one", 0, 9), job(model, "two", 1, 9)]
        worker.join(others)
        with torch.no_grad():
            worker.running.step()
        late = job(model, "one", 2, 9)
        ends = MemoryEnds(getattr(sys.modules[module], name), n)
        with monkeypatch.context() as patch:
            patch.setattr(place, ends)
            worker.join([late])
        while worker.running.rows:
            worker.running.step()
        assert [one.events.get_nowait().text for one in others] == alone  # type: ignore[union-attr]
        end = late.events.get_nowait()
        if ends.left > 0:  # all calls went through
            assert isinstance(end, Answer)
            assert n > 1
            return
        assert isinstance(end, torch.OutOfMemoryError)
    raise AssertionError("never got through")


def test_features_take_no_more_memory_than_was_given_and_the_least_recently_used_go() -> None:
    model = model_of("llama")
    images = [job(model, "one", index, 1).ask.images for index in range(4)]
    each = FeatureLRU(model, 8).of(images[:1])[0].nbytes
    retained = FeatureLRU(model, 8, 2 * each)
    for index in (0, 1, 0, 2, 0, 3):
        retained.of([images[index]])
        assert retained.n_bytes <= 2 * each
    assert [index for index in range(4) if retained.get(str(index)) is not None] == [0, 3]
    retained = FeatureLRU(model, 8, each - 1)
    features, image = retained.of(images[:2])
    assert (len(features), image, retained.n_bytes) == (2, [0, 1], 0)
