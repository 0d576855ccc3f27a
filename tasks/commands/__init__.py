"""The commands of `adalink`: a name, a line of help, and the place of what it does, which is imported when it is asked for."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module
from typing import Any

__all__ = ["COMMANDS", "NEEDS_NOTHING", "UNNAMED", "Command", "Entry"]


@dataclass(frozen=True)
class Command:
    """What a command takes and does.

    add         adds the options to a parser
    run         gets the parsed values as objects, and as plain data for the run folder's config.yaml
    examples    command lines that work, for the end of the help
    first       the options that most people set, which `--help` lists: names, or (option, its help); empty: all
    classes     names of classes that its settings may be, where they are no run's
    has_config  the settings are those of a run, and may come from a file
    prepare     may change the plain data before objects are made of them
    dry         the command where --dry_run is among its arguments
    bare        does the command with its arguments as they are, in place of `add` and `run`; gives the exit code
    """

    add: Callable[[Any], Any]
    run: Callable[[Any, Any], None]
    examples: tuple[str, ...] = ()
    first: tuple[str | tuple[str, str], ...] = ()
    classes: tuple[str, ...] = ()
    has_config: bool = False
    prepare: Callable[[Any], None] = lambda plain: None
    dry: Command | None = None
    bare: Callable[[Sequence[str]], int] | None = None

    @staticmethod
    def of(function: Callable[..., object], *examples: str) -> Command:
        """A command that is a function with typed keyword arguments, whose docstring holds their help."""

        def run(values: Any, plain: Any) -> None:
            function(**dict(vars(values)))

        return Command(lambda parser: parser.add_function_arguments(function), run, examples)


@dataclass(frozen=True)
class Entry:
    """A command that is not loaded yet: its module in this package, the name there, and its line of help."""

    module: str
    name: str
    help: str

    def load(self) -> Command:
        """The command; the libraries that it works with are imported when it runs."""
        command: Command = getattr(import_module(f"{__name__}.{self.module}"), self.name)
        return command


COMMANDS: Mapping[str, Entry | Mapping[str, Entry]] = {
    "demo": Entry("demo", "DEMO", "train and evaluate both tasks on the embedded scenes, offline"),
    "train": Entry("train", "TRAIN", "train an adapter, evaluate it, write its report"),
    "evaluate": Entry("train", "EVALUATE", "evaluate a saved adapter: official results.json, metrics.json, report.html"),
    "selftrain": Entry("lifecycle.selftrain", "SELFTRAIN", "train from few labels and many images without, in sessions"),
    "features": Entry("train", "FEATURES", "write the encoder's features of a run's images once; runs then read them"),
    "compose": Entry("plan", "COMPOSE", "what would be built of two frozen parts and methods, and its memory; loads nothing"),
    "methods": Entry("plan", "METHODS_LIST", "every method: what it computes, where it edits, its settings, what it trains"),
    "caption": Entry("answer", "CAPTION", "caption images with a saved adapter"),
    "ask": Entry("answer", "ASK", "ask a question about an image, with a saved adapter"),
    "serve": Entry("answer", "SERVE", "serve adapters on one frozen model: OpenAI's chat API, and a page to try them"),
    "score": {
        "coco": Entry("score", "SCORE_COCO", "score a file of captions as the official COCO evaluation does"),
        "vqa": Entry("score", "SCORE_VQA", "score a file of answers with the VQA accuracy"),
    },
    "compare": {
        "runs": Entry("compare", "COMPARE_RUNS", "compare run folders, with a report (also without the word: `compare RUN_A RUN_B ...`)"),
        "coco": Entry("compare", "COMPARE_COCO", "compare two files of captions"),
        "vqa": Entry("compare", "COMPARE_VQA", "compare two files of answers"),
    },
    "report": {
        "representation": Entry("train", "REPRESENTATION", "what an adapter does to hidden states: rank, CKA and drift beside the frozen model"),
    },
    "runs": Entry("compare", "RUNS", "list the runs in a folder and below it"),
    "merge": Entry("lifecycle.merge", "MERGE", "merge saved adapters into one: exactly, or by their weights"),
    "export": {
        "folded": Entry("lifecycle.export", "FOLDED", "write the language model with a text-only AdaLink in its embedding table"),
        "merged": Entry("lifecycle.export", "MERGED", "write the language model with a LoRA for all tokens in its weights"),
        "embedding_lora": Entry("lifecycle.export", "EMBEDDING_LORA", "write a text-only AdaLink as a LoRA of the word embedding that peft loads"),
        "embeds": Entry("lifecycle.export", "EMBEDS", "write prompts as embeddings, for an engine that serves the frozen model"),
    },
    "route": Entry("lifecycle.route", "ROUTE", "write a router that finds the adapter of a request by its image and its question"),
    "compress": Entry("lifecycle.compress", "COMPRESS", "write an adapter in a few bits a weight, which every command reads"),
    "materialise": Entry("lifecycle.materialise", "MATERIALISE", "write one task's adapter of a hypernetwork (hyper) as an ordinary one"),
    "port": Entry("lifecycle.port", "PORT", "write an adapter for an updated base, after checks and where its scores are better"),
    "decompress": Entry("lifecycle.compress", "DECOMPRESS", "write a compressed adapter as an ordinary one"),
    "slim": Entry("lifecycle.base", "SLIM", "write a language model with linears of low rank, distilled from its base (PELA)"),
    "slice": Entry("lifecycle.base", "SLICE", "write a language model with a share of its feed-forward units (MatFormer)"),
    "probe": Entry("lifecycle.base", "PROBE", "fit the direction that tells two kinds of texts apart"),
    "steer": Entry("lifecycle.base", "STEER", "write an adapter that moves a language model along such a direction (Model Surgery)"),
    "bench": {
        "speed": Entry("bench", "BENCH", "how fast this machine trains and answers, beside other libraries (also without the word)"),
        "when": Entry("bench", "WHEN", "when adapting pays: budgets against sizes of data and base, beside the whole model trained"),
    },
    "search": Entry("bench", "SEARCH", "search settings of a run for the best score at each cost, beside a random control"),
    "data": {
        "look": Entry("data", "LOOK", "what a data set holds: counts, lengths, duplicates, oddities, a page to browse"),
        "check": Entry("data", "CHECK", "read every image as training does, and name what training would skip"),
    },
    "shards": {
        "from": Entry("shards", "FROM", "write any data set as webdataset shards"),
        "to": Entry("shards", "TO", "write any data set, shards too, as parquet"),
        "img2dataset": Entry("shards", "IMG2DATASET", "write the manifest of shards that img2dataset made"),
        "check": Entry("shards", "CHECK", "check every byte of shards against their manifest"),
        "plan": Entry("shards", "PLAN", "what reading a large set from a store needs, and how fast it can be; reads nothing"),
    },
    "launch": Entry("launch", "LAUNCH", "run a command on several GPUs or nodes, with accelerate's launcher"),
    "doctor": Entry("doctor", "DOCTOR", "what is installed, which device and kernels are used, and what is missing"),
}

# Group -> which of its commands is meant where none of them is named: `adalink compare RUN_A RUN_B`.
UNNAMED = {"compare": "runs", "bench": "speed"}
NEEDS_NOTHING = ("bench",)  # of these groups, those whose command needs no argument
