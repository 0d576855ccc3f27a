"""Two processes train as one does, survive what one survives, and go on where they were, in another number too."""

from __future__ import annotations

import json
import math
import os
import re
import shutil
import signal
from functools import partial
from pathlib import Path

import pytest
import rank_jobs
import torch
from composed import excite
from made_shards import made_source
from quantiser import find_torchao
from ranks import Machine
from safetensors.torch import load_file
from torch import Tensor

from multimodal.data.shards.writer import write_shards
from multimodal.training.settings import Stage, Teachers


@pytest.fixture(scope="module")
def machine(tmp_path_factory: pytest.TempPathFactory) -> Machine:
    return Machine(tmp_path_factory.mktemp("machine"))


SEEING = "qwen2_vl"  # a family with positions in three dimensions, and as many vectors as an image is large


def state(folder: Path, step: int = 20) -> dict[str, Tensor]:
    return load_file(folder / "checkpoints" / f"step_{step:08d}" / "state.safetensors")


def losses(folder: Path) -> list[float]:
    return [line["loss"] for line in map(json.loads, (folder / "metrics.jsonl").read_text().splitlines()) if "loss" in line]


def difference(first: dict[str, Tensor], second: dict[str, Tensor]) -> float:
    assert first.keys() == second.keys()
    return max(float((value - second[name]).abs().max()) for name, value in first.items() if name.startswith("weight."))


def step_of(folder: Path) -> int:
    path = folder / "metrics.jsonl"
    return path.read_text().count("loss") if path.exists() else 0


def test_a_process_starts_with_everything_imported(machine: Machine) -> None:
    machine.start(1, rank_jobs.missing).ended()


def test_processes_exchange_no_frozen_buffers_and_agree_on_the_host(machine: Machine, tmp_path: Path) -> None:
    machine.start(2, rank_jobs.exchanged, tmp_path).ended()


# The bridge alone for eight steps, then everything.
STAGED = {"stages": (Stage(trains=("bridge",), steps=8), Stage(trains=("bridge", "adalink")))}


def test_two_processes_equal_one_with_the_same_pictures_in_a_step(machine: Machine, tmp_path: Path) -> None:
    """float64, ragged numbers of targets, accumulation, and seven images that nothing divides."""
    two = [{"folder": tmp_path / "two", "kept": True}, {"folder": tmp_path / "two_accumulated", "kept": True, "batch_size": 1, "accumulation": 2}]
    one = [{"folder": tmp_path / name, "kept": True, "batch_size": 4, "seed": seed} for name, seed in (("one", 0), ("control", 1))]
    seeing = {"sees": SEEING, "connector": "trained", "steps": 6}  # a model that sees already, whose tower runs in every step
    texts = {**seeing, "steps": 3, "checkpoint_every": 3, "without": (0, 1, 2, 4)}  # some texts without an image, at times all of a process
    staged = {"kept": True, **STAGED, "steps": 12, "keep": 9}
    two += [{"folder": tmp_path / "two_seeing", **seeing}, {"folder": tmp_path / "two_texts", **texts}, {"folder": tmp_path / "two_staged", **staged}]
    one += [{"folder": tmp_path / "one_seeing", **seeing, "batch_size": 4}, {"folder": tmp_path / "one_texts", **texts, "batch_size": 4}]
    one += [{"folder": tmp_path / "one_staged", **staged, "batch_size": 4}]
    groups = [machine.start(2, rank_jobs.several, two), machine.start(1, rank_jobs.several, one)]
    for group in groups:
        group.ended()
    for name in ("two", "two_accumulated"):
        assert difference(state(tmp_path / name), state(tmp_path / "one")) < 1e-10
        assert losses(tmp_path / name) == pytest.approx(losses(tmp_path / "one"), rel=1e-12)
    assert difference(state(tmp_path / "two_seeing", 6), state(tmp_path / "one_seeing", 6)) < 1e-10
    assert losses(tmp_path / "two_seeing") == pytest.approx(losses(tmp_path / "one_seeing"), rel=1e-12)
    assert difference(state(tmp_path / "two_texts", 3), state(tmp_path / "one_texts", 3)) < 1e-5  # some gradients are near zero, and Adam divides by them
    assert losses(tmp_path / "two_texts") == pytest.approx(losses(tmp_path / "one_texts"), rel=1e-7)
    assert difference(state(tmp_path / "two_staged", 12), state(tmp_path / "one_staged", 12)) < 1e-10
    assert losses(tmp_path / "two_staged") == pytest.approx(losses(tmp_path / "one_staged"), rel=1e-12)
    assert "optimizer.adalink.image.down.weight.step" not in state(tmp_path / "two_staged", 5)  # it stands still
    assert difference(state(tmp_path / "control"), state(tmp_path / "one")) > 1e-3
    assert len(losses(tmp_path / "two")) == 20


@pytest.mark.parametrize(
    ("world", "before"), [(1, {0: "", 1: "", 2: SEEING}), (2, {2: ""}), pytest.param(2, {0: "", 1: SEEING}, marks=pytest.mark.slow)]
)
def test_ten_steps_a_kill_and_ten_more_are_twenty_bit_for_bit_with_any_number_of_workers(
    world: int, before: dict[int, str], machine: Machine, tmp_path: Path
) -> None:
    """Images are decoded and encoded in each run, and read by 0, 1 and 2 workers; the unbroken run had one. before: workers -> the family that sees already."""
    families, more = dict.fromkeys(before.values()), STAGED if set(before.values()) == {""} else {}  # it is killed in the second stage
    whole = machine.start(world, rank_jobs.several, [{"folder": tmp_path / f"whole{sees}", "workers": 1, "sees": sees, **more} for sees in families])
    killed = {}
    for workers, sees in before.items():
        folder = tmp_path / f"killed{workers}"
        killed[workers] = machine.start(world, rank_jobs.several, [{"folder": folder, "workers": workers, "held": 19, "sees": sees, **more}])
        killed[workers].wait_until(lambda folder=folder: step_of(folder) >= 11)  # type: ignore[misc]
        killed[workers].killed()
        assert not (folder / "checkpoints" / "step_00000020").exists()
        assert (folder / "checkpoints" / "step_00000010").exists()
    whole.ended()
    again = [{"folder": tmp_path / f"killed{workers}", "workers": (workers + 1) % 3, "resume": True, "sees": before[workers], **more} for workers in killed]
    machine.start(world, rank_jobs.several, again).ended()
    for workers in killed:
        unbroken = tmp_path / f"whole{before[workers]}"
        expected = state(unbroken)
        found = state(tmp_path / f"killed{workers}")
        assert found.keys() == expected.keys()
        assert all(torch.equal(value, expected[name]) for name, value in found.items())
        assert losses(tmp_path / f"killed{workers}") == losses(unbroken)


def test_sigterm_to_one_of_two_ends_both_after_a_saved_step_and_the_rest_equals_an_unbroken_run(machine: Machine, tmp_path: Path) -> None:
    stopped, whole = tmp_path / "stopped", tmp_path / "whole"
    unbroken = machine.start(2, rank_jobs.several, [{"folder": whole}])
    group = machine.start(2, rank_jobs.run, stopped, False, 10)
    group.wait_until(lambda: step_of(stopped) >= 3)
    group.send(signal.SIGTERM, slice(1, 2))
    (stopped / rank_jobs.GO).touch()
    printed = group.ended(143)
    last = sorted((stopped / "checkpoints").iterdir())[-1]
    step = int(last.name[-8:])
    assert 3 <= step < 20
    assert printed.count(f"ended by SIGTERM after step {step} of 20, which is saved in {stopped / 'checkpoints'}: go on with --resume") == 2
    unbroken.ended()
    machine.start(2, rank_jobs.several, [{"folder": stopped, "resume": True}]).ended()
    assert all(torch.equal(value, state(whole)[name]) for name, value in state(stopped).items())


def test_sigterm_to_the_whole_group_spares_the_workers_until_the_step_is_saved(machine: Machine, tmp_path: Path) -> None:
    group = machine.start(1, rank_jobs.run, tmp_path / "run", False, 10, (), (), None, 2)
    group.wait_until(lambda: step_of(tmp_path / "run") >= 2)
    pid = group.processes[0].pid
    workers = [int(each) for each in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    assert len(workers) == 2
    for number in workers:
        os.kill(number, signal.SIGTERM)
    group.send(signal.SIGTERM)
    (tmp_path / "run" / rank_jobs.GO).touch()
    assert "go on with --resume" in group.ended(143)


def test_bad_samples_of_all_ranks_count_once_and_stop_all_of_them_at_the_same_step(machine: Machine, tmp_path: Path) -> None:
    """Images 1 to 4 of 7 are bad: in some steps every image of one rank is, and the other learns alone."""
    bad = {"bad": (1, 2, 3, 4), "steps": 5, "batch_size": 1}
    machine.start(
        2, rank_jobs.several, [
            {"folder": tmp_path / "allowed", "bad_samples": 4, **bad},
            {"folder": tmp_path / "stopped", "bad_samples": 3, "code": 9, **bad},
        ],
    ).ended()  # fmt: skip
    found = [json.loads(line)["key"] for line in (tmp_path / "allowed" / "bad_samples.jsonl").read_text().splitlines()]
    assert len(found) == len(set(found)) == 4
    machine.start(1, rank_jobs.several, [{"folder": tmp_path / "one", "bad_samples": 4, **bad, "batch_size": 2}]).ended()
    assert [json.loads(line)["key"] for line in (tmp_path / "one" / "bad_samples.jsonl").read_text().splitlines()] == found
    assert difference(state(tmp_path / "allowed", 5), state(tmp_path / "one", 5)) < 1e-4  # the encoder is in float32


def test_a_step_that_is_bad_on_every_rank_is_skipped_on_all_and_a_run_of_such_steps_is_refused_on_all(machine: Machine, tmp_path: Path) -> None:
    """Of 7 images 6 are bad: of 7 steps of two ranks only those of image 0 are steps."""
    fields = {"steps": 7, "batch_size": 1, "bad_samples": 20, "checkpoint_every": 1}
    jobs = [{"folder": tmp_path / "few", "bad": (1, 2, 3, 4, 5, 6), **fields}, {"folder": tmp_path / "none", "bad": tuple(range(7)), "code": 8, **fields}]
    printed = machine.start(2, rank_jobs.several, jobs).ended()
    assert printed.count("adalink: none of the 7 samples can be used, so the run cannot train on them: 7 not an image") == 2
    assert len(losses(tmp_path / "few")) == 2
    assert "5 steps of 7 had nothing to learn, and were skipped" in printed
    assert not (tmp_path / "none" / "checkpoints").exists()


def test_a_killed_worker_is_one_sentence_and_its_run_goes_on_with_resume(machine: Machine, tmp_path: Path) -> None:
    printed = machine.start(1, rank_jobs.worker_killed, tmp_path / "run").ended(5)
    found = re.search(r"a worker process that reads samples ended before its work \((DataLoader worker \(pid.*|with its samples on their way)\):", printed)
    assert found, printed  # torch notices the death, or the connection that its tensors were to come by
    assert "give fewer train.workers or a smaller train.batch_size, and go on with --resume" in printed


def test_another_number_of_processes_goes_on_at_the_next_picture(machine: Machine, tmp_path: Path) -> None:
    """Two processes read 2 x 2 images a step: after 3 steps 12 of 28. One process takes 8 steps more, four take 2."""
    fields = {"batch_size": 2, "steps": 0, "epochs": 4.0, "checkpoint_every": 3}
    machine.start(2, rank_jobs.several, [{"folder": tmp_path / "two", **fields, "steps": 3}]).ended()
    for world in (1, 4):
        shutil.copytree(tmp_path / "two", tmp_path / f"to{world}")
    groups = [machine.start(world, rank_jobs.several, [{"folder": tmp_path / f"to{world}", "resume": True, **fields}]) for world in (1, 4)]
    for group in groups:
        group.ended()
    for world, steps in ((1, 11), (4, 5)):
        assert len(losses(tmp_path / f"to{world}")) == steps
        content = json.loads((tmp_path / f"to{world}" / "checkpoints" / f"step_{steps:08d}" / "state.json").read_text())
        assert content["data"]["position"] == 28
        rates = [line["rate"] for line in map(json.loads, (tmp_path / f"to{world}" / "metrics.jsonl").read_text().splitlines()) if "rate" in line]
        read = [12 + 2 * world * step for step in range(steps - 3)]  # samples, before each step after the change
        assert rates[3:] == pytest.approx([1e-2 * 0.5 * (1 + math.cos(math.pi * n / 28)) for n in read])


def test_windows_of_shards_are_gone_on_with_by_other_processes_and_workers_as_if_never_killed(machine: Machine, tmp_path: Path) -> None:
    """Two processes on two machines, each with shards of its own, are killed in the middle of a window; one process ends the run in their order."""
    write_shards(made_source(22), tmp_path / "set", samples_per_shard=3)
    reads = {"shards": tmp_path / "set", "order": "shards", "window": 2}
    jobs = [{"folder": tmp_path / "whole", **reads}, {"folder": tmp_path / "control", **reads, "order": "global"}]
    whole = machine.start(2, rank_jobs.several, jobs, LOCAL_WORLD_SIZE="1")
    killed = machine.start(2, rank_jobs.several, [{"folder": tmp_path / "killed", **reads, "workers": 1, "held": 13}], LOCAL_WORLD_SIZE="1")
    killed.wait_until(lambda: step_of(tmp_path / "killed") >= 11)
    killed.killed()
    again = machine.start(1, rank_jobs.several, [{"folder": tmp_path / "killed", **reads, "workers": 2, "batch_size": 4, "resume": True}])
    printed = whole.ended() + again.ended()
    assert printed.count("order: shards in a drawn order, the samples of 2 shuffled together, in each of 2 parts of a step") == 2
    assert "resumed after step 10 of 20" in printed
    data = [json.loads((tmp_path / name / "checkpoints" / "step_00000020" / "state.json").read_text())["data"] for name in ("whole", "killed")]
    assert data[0] == data[1]
    assert (data[0]["position"], data[0]["shard_parts"], data[0]["shard_step"]) == (80, 2, 4)
    assert losses(tmp_path / "killed") == pytest.approx(losses(tmp_path / "whole"), rel=1e-4)  # an encoder in float32 rounds differently in another batch
    assert difference(state(tmp_path / "killed"), state(tmp_path / "whole")) < 1e-4
    assert difference(state(tmp_path / "control"), state(tmp_path / "whole")) > 1e-3


def test_each_process_encodes_its_share_and_has_every_picture(machine: Machine, tmp_path: Path) -> None:
    for world in (1, 2):
        machine.start(world, rank_jobs.encoded, tmp_path).ended()
    alone, *both = [load_file(tmp_path / f"{name}.safetensors") for name in ("alone", "0", "1")]
    assert alone["bad"].tolist() == [2, 33]
    for found in both:
        assert all(torch.equal(value, alone[name]) for name, value in found.items())


def test_two_processes_equal_one_on_a_quantised_model_which_fsdp2_refuses(machine: Machine, tmp_path: Path) -> None:
    find_torchao()
    job = {"kept": True, "quantise": "nf4", "steps": 3}
    group = machine.start(2, rank_jobs.several, [{"folder": tmp_path / "two", **job}])
    split = machine.start(1, rank_jobs.sharded, [], partial(rank_jobs.refused, tmp_path / "split"), **FSDP, **WRAPS["layers"])
    assert rank_jobs.several([{"folder": tmp_path / "one", **job, "batch_size": 4}]) == 0
    group.ended()
    assert "FSDP2 cannot split quantised weights (" in split.ended(6)
    assert losses(tmp_path / "two") == pytest.approx(losses(tmp_path / "one"), rel=1e-5)
    assert difference(state(tmp_path / "two", 3), state(tmp_path / "one", 3)) < 1e-4


@pytest.mark.slow
def test_two_processes_with_teachers_equal_one(machine: Machine, tmp_path: Path) -> None:
    for seed, name in enumerate(("old", "new")):
        made = rank_jobs.model()
        excite(made.adapted.active_adapter(), seed + 2)
        made.save_pretrained(tmp_path / name, task={"task": "vqa"})
    job = {"kept": True, "steps": 6, "checkpoint_every": 6, "teachers": Teachers(old=tmp_path / "old", new=tmp_path / "new")}
    group = machine.start(2, rank_jobs.several, [{"folder": tmp_path / "two", **job}])
    machine.start(1, rank_jobs.several, [{"folder": tmp_path / "one", **job, "batch_size": 4}]).ended()
    group.ended()
    assert difference(state(tmp_path / "two", 6), state(tmp_path / "one", 6)) < 1e-8
    assert losses(tmp_path / "two") == pytest.approx(losses(tmp_path / "one"), rel=1e-10)


FSDP = {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"}
WRAPS = {
    "whole": {"FSDP_AUTO_WRAP_POLICY": "NO_WRAP"},
    "layers": {"FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP", "FSDP_TRANSFORMER_CLS_TO_WRAP": "OPTDecoderLayer"},
}


def test_fsdp2_trains_what_ddp_trains_and_its_checkpoint_is_gone_on_with_by_any(machine: Machine, tmp_path: Path) -> None:
    job = {"kept": True, "steps": 10, **STAGED}
    seeing = {"sees": SEEING, "steps": 4}
    groups = [machine.start(2, rank_jobs.several, [{"folder": tmp_path / "ddp", **job}, {"folder": tmp_path / "ddp_seeing", **seeing}])]
    for name, wrap in WRAPS.items():
        more = [{"folder": tmp_path / "whole_seeing", **seeing}] * (name == "whole")  # layers have another name there
        groups.append(machine.start(2, rank_jobs.sharded, [{"folder": tmp_path / name, **job}, *more], **FSDP, **wrap))
    for group in groups:
        group.ended()
    for name in WRAPS:
        assert difference(state(tmp_path / name, 10), state(tmp_path / "ddp", 10)) < 1e-10
        assert losses(tmp_path / name) == pytest.approx(losses(tmp_path / "ddp"), rel=1e-12)
    # Its steps differ by 1e-8 here, and two processes without FSDP2 equal one to 1e-10.
    assert difference(state(tmp_path / "whole_seeing", 4), state(tmp_path / "ddp_seeing", 4)) < 1e-6
    assert losses(tmp_path / "whole_seeing") == pytest.approx(losses(tmp_path / "ddp_seeing"), rel=1e-6)
    for name in ("to_one", "to_two"):  # the last checkpoint of layers that were split, by one process and by two that split again
        shutil.copytree(tmp_path / "layers", tmp_path / name)
        shutil.rmtree(tmp_path / name / "checkpoints" / "step_00000010")
    again = {**job, "resume": True}
    groups = [
        machine.start(1, rank_jobs.several, [{"folder": tmp_path / "to_one", **again, "batch_size": 4}]),
        machine.start(2, rank_jobs.sharded, [{"folder": tmp_path / "to_two", **again}], **FSDP, **WRAPS["layers"]),
    ]
    for group in groups:
        group.ended()
    assert all(torch.equal(value, state(tmp_path / "layers", 10)[name]) for name, value in state(tmp_path / "to_two", 10).items())
    assert difference(state(tmp_path / "to_one", 10), state(tmp_path / "layers", 10)) < 1e-10


def test_ten_steps_a_kill_and_ten_more_are_twenty_bit_for_bit_with_fsdp2_too(machine: Machine, tmp_path: Path) -> None:
    env = {**FSDP, **WRAPS["layers"]}
    whole = machine.start(2, rank_jobs.sharded, [{"folder": tmp_path / "whole", "workers": 1}], **env)
    folder = tmp_path / "killed"
    killed = machine.start(2, rank_jobs.sharded, [{"folder": folder, "held": 19}], **env)
    killed.wait_until(lambda: step_of(folder) >= 11)
    killed.killed()
    assert not (folder / "checkpoints" / "step_00000020").exists()
    whole.ended()
    machine.start(2, rank_jobs.sharded, [{"folder": folder, "workers": 2, "resume": True}], **env).ended()
    found, expected = state(folder), state(tmp_path / "whole")
    assert found.keys() == expected.keys()
    assert all(torch.equal(value, expected[name]) for name, value in found.items())
    assert losses(folder) == losses(tmp_path / "whole")


def test_after_fsdp2_a_model_is_as_if_it_had_never_been_split(machine: Machine, tmp_path: Path) -> None:
    """It also generates on the way, in one process while the other goes on, which must not wait for it."""
    groups = [machine.start(2, rank_jobs.generated, tmp_path / "ddp"), machine.start(2, rank_jobs.generated_sharded, tmp_path / "fsdp", **FSDP, **WRAPS["layers"])]
    for group in groups:
        group.ended()
    assert json.loads((tmp_path / "fsdp" / "said.json").read_text()) == json.loads((tmp_path / "ddp" / "said.json").read_text())
    for file in ("adapter/adapter_model.safetensors", "frozen.safetensors"):
        found, expected = (load_file(tmp_path / name / file) for name in ("fsdp", "ddp"))
        assert found.keys() == expected.keys()
        assert all(torch.allclose(value, expected[name], rtol=0, atol=1e-10) for name, value in found.items())
