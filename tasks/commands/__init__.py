"""The commands of `adalink`: a name, a line of help, and the place of what it does, which is imported when it is asked for."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib import import_module
from typing import Any

__all__ = ["COMMANDS", "UNNAMED", "Command", "Entry"]


@dataclass(frozen=True)
class Command:
    """What a command takes and does. `run` gets the parsed values as objects, and as plain data for the run folder's config.yaml.

    add       adds the options to a parser
    prepare   may change the plain data before objects are made of them
    dry       the command where --dry_run is among its arguments
    """

    add: Callable[[Any], Any]
    run: Callable[[Any, Any], None]
    has_config: bool = False
    prepare: Callable[[Any], None] = lambda plain: None
    dry: Command | None = None

    @staticmethod
    def of(function: Callable[..., object]) -> Command:
        """A command that is a function with typed keyword arguments, whose docstring holds their help."""

        def run(values: Any, plain: Any) -> None:
            function(**dict(vars(values)))

        return Command(lambda parser: parser.add_function_arguments(function), run)


@dataclass(frozen=True)
class Entry:
    """A command that is not loaded yet: its module in this package, the name there, and its line of help."""

    module: str
    name: str
    help: str

    def load(self) -> Any:
        """The command; importing its module may take seconds."""
        return getattr(import_module(f"{__name__}.{self.module}"), self.name)


COMMANDS: Mapping[str, Entry | Mapping[str, Entry]] = {
    "demo": Entry("demo", "DEMO", "train and evaluate both tasks on the embedded scenes, offline"),
    "train": Entry("train", "TRAIN", "train an adapter, evaluate it, write its report"),
    "evaluate": Entry("train", "EVALUATE", "evaluate a saved adapter: results.json in the official format, metrics.json, report.html"),
    "features": Entry("features", "FEATURES", "write the encoder's features of a run's images once; training and evaluation then read them"),
    "compose": Entry("plan", "COMPOSE", "what would be built of two frozen parts and methods: parameters, positions, memory; loads nothing"),
    "methods": Entry("plan", "METHODS_LIST", "every method: what it computes, where it edits, its settings, what it trains"),
    "caption": Entry("ask", "CAPTION", "caption images with a saved adapter"),
    "ask": Entry("ask", "ASK", "ask a question about an image, with a saved adapter"),
    "serve": Entry("serve", "SERVE", "serve adapters on one frozen model: OpenAI's chat API with images, and a page to try them"),
    "score": {
        "coco": Entry("score", "SCORE_COCO", "score a file of captions as the official COCO evaluation does"),
        "vqa": Entry("score", "SCORE_VQA", "score a file of answers with the VQA accuracy"),
    },
    "compare": {
        "runs": Entry("compare", "COMPARE_RUNS", "compare run folders, with a report (also without the word: `compare RUN_A RUN_B ...`)"),
        "coco": Entry("compare", "COMPARE_COCO", "compare two files of captions"),
        "vqa": Entry("compare", "COMPARE_VQA", "compare two files of answers"),
    },
    "runs": Entry("compare", "RUNS", "list the runs in a folder and below it"),
    "export": {
        "folded": Entry("export", "FOLDED", "write the language model with a text-only AdaLink in its embedding table"),
        "merged": Entry("export", "MERGED", "write the language model with a LoRA for all tokens in its weights"),
        "embeds": Entry("export", "EMBEDS", "write prompts as embeddings, for an engine that serves the frozen model"),
    },
    "bench": Entry("bench", "BENCH", "how fast this machine trains and answers beside the peers: ratios with their spread, and the targets"),
    "shards": {
        "coco": Entry("shards", "COCO", "write webdataset shards from COCO captions"),
        "vqa": Entry("shards", "VQA", "write webdataset shards from VQAv2 questions and annotations"),
        "folder": Entry("shards", "FOLDER", "write webdataset shards from a folder of images with captions beside them"),
        "img2dataset": Entry("shards", "IMG2DATASET", "write the manifest of shards that img2dataset made"),
        "check": Entry("shards", "CHECK", "verify shards against their manifest, and name what is wrong"),
    },
    "launch": Entry("launch", "launch", "run a command on several GPUs or nodes: adalink launch [OPTIONS OF accelerate launch] -- COMMAND ..."),
}

# Group -> which of its commands is meant where none of them is named: `adalink compare RUN_A RUN_B`.
UNNAMED = {"compare": "runs"}
