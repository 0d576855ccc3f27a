"""What a person sees of a training that SIGTERM ends: one sentence, exit code 143, and a run folder to go on with."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest
from cli_run import train

from multimodal.training.records import RunLog

FEW = (
    "--data.train.scenes", "train/4", "--data.val.scenes", "val/2", "--train.steps", "3", "--train.batch_size", "2", "--train.log_every", "1",
    "--generation.max_new_tokens", "2",
)  # fmt: skip


def test_sigterm_ends_a_run_with_a_sentence_and_it_goes_on_with_resume(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = signal.getsignal(signal.SIGTERM)
    write = RunLog.write

    def write_and_be_asked_to_end(self: RunLog, values: Mapping[str, float]) -> None:
        write(self, values)
        os.kill(os.getpid(), signal.SIGTERM)

    with monkeypatch.context() as patched:
        patched.setattr(RunLog, "write", write_and_be_asked_to_end)
        done = train("captioning", tmp_path / "run", small=FEW)
    assert done.code == 143, done
    stated = f"adalink: ended by SIGTERM after step 2 of 3, which is saved in {tmp_path / 'run' / 'checkpoints'}: go on with --resume"
    assert done.err.splitlines()[-1] == stated
    assert [path.name for path in (tmp_path / "run" / "checkpoints").iterdir()] == ["step_00000002"]
    assert signal.getsignal(signal.SIGTERM) == before
    resumed = train("captioning", tmp_path / "run", "--resume", small=FEW)
    assert resumed.code == 0, resumed.err
    assert (tmp_path / "run" / "adapter" / "adapter_model.safetensors").exists()


@pytest.fixture
def _ctrl_c_ends() -> Iterator[None]:
    """As in a terminal: a shell starts what it puts behind with SIGINT ignored."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("_ctrl_c_ends")
def test_ctrl_c_ends_a_run_as_sigterm_does_and_a_second_one_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write, times = RunLog.write, [1]

    def write_and_be_interrupted(self: RunLog, values: Mapping[str, float]) -> None:
        write(self, values)
        for _ in range(times[0] if values["step"] == 1 else 0):
            signal.raise_signal(signal.SIGINT)

    with monkeypatch.context() as patched:
        patched.setattr(RunLog, "write", write_and_be_interrupted)
        done = train("captioning", tmp_path / "run", small=FEW)
        times[0] = 2
        at_once = train("captioning", tmp_path / "at_once", small=FEW)
    assert done.code == at_once.code == 130, done
    stated = f"adalink: ended by Ctrl-C after step 2 of 3, which is saved in {tmp_path / 'run' / 'checkpoints'}: go on with --resume"
    assert done.err.splitlines()[-1] == stated
    assert at_once.err.splitlines()[-1] == "adalink: interrupted"
    assert [path.name for path in (tmp_path / "run" / "checkpoints").iterdir()] == ["step_00000002"]
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    assert train("captioning", tmp_path / "run", "--resume", small=FEW).code == 0
