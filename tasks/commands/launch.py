"""`adalink launch`: any command on several GPUs or nodes, through accelerate's own launcher."""

from __future__ import annotations

import os
import subprocess
from argparse import Namespace
from collections.abc import Sequence
from pathlib import Path

import adalink
from adalink.errors import ConfigError
from tasks.commands import Command

__all__ = ["LAUNCH", "launch"]


def launch(arguments: Sequence[str]) -> int:
    """Run `[options of accelerate launch] -- COMMAND ...`; the exit code is that of the first process that failed.

    The command is started by its file: by a name Python would look for it in the working folder first, which may hold a `tasks` of its own.
    `accelerate launch` itself cannot start where torchvision was built for another torch than the one that is here. Raises ConfigError
    where no command is given.
    """
    options, command = _divided(arguments)
    from accelerate.commands.launch import launch_command, launch_command_parser
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    import multimodal  # noqa: F401  (first: it makes torchvision importable, which accelerate's launcher imports by way of transformers)

    parser = launch_command_parser()
    parser.prog, parser.usage = "adalink launch", "adalink launch [OPTIONS] -- COMMAND ..."
    try:
        launch_command(_several_on_cpus(parser.parse_args([*options, str(Path(adalink.__file__).with_name("__main__.py")), *command])))
    except subprocess.CalledProcessError as error:  # one process
        return error.returncode
    except ChildFailedError as error:  # several
        return int(error.get_first_failure()[1].exitcode)
    return 0


def _several_on_cpus(chosen: Namespace) -> Namespace:
    """The choice, where several processes on CPUs are asked for: the launcher of several GPUs starts them; accelerate's own way starts one."""
    import torch

    if (chosen.num_processes or 1) > 1 and (chosen.cpu or not torch.accelerator.is_available()):
        chosen.cpu, chosen.multi_gpu = False, True
        os.environ["ACCELERATE_USE_CPU"] = "true"
    return chosen


def _divided(arguments: Sequence[str]) -> tuple[list[str], list[str]]:
    if "--help" in arguments[:1] or "-h" in arguments[:1]:
        return ["--help"], []
    if "--" not in arguments or not arguments[arguments.index("--") + 1 :]:
        raise ConfigError("`adalink launch` got no command: write one after --, as in `adalink launch --num_processes 2 -- train --config run.yaml`")
    at = arguments.index("--")
    return list(arguments[:at]), list(arguments[at + 1 :])


LAUNCH = Command(
    lambda parser: None, lambda values, plain: None, bare=launch,
    first=(
        ("--num_processes N", "how many processes, one for each GPU, on all machines together"),
        ("--multi_gpu", "several GPUs, on one machine or more"),
        ("--num_machines N", "how many machines; give the same command on each"),
        ("--machine_rank N", "which of them this one is, from 0"),
        ("--main_process_ip HOST", "the address of machine 0"),
        ("--main_process_port PORT", "a free port of machine 0"),
        ("--mixed_precision {no,fp16,bf16}", "no: the run's own train.precision says it"),
        ("--cpu", "processes on CPUs"),
        ("-- COMMAND ...", "the command of adalink that each process runs, with its options"),
    ),
    examples=(
        "adalink launch --num_processes 8 -- train --config run.yaml --out runs/first",
        "adalink launch --cpu --num_processes 2 -- train --config run.yaml --out runs/first",
    ),
)  # fmt: skip
