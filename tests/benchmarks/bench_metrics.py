"""How much faster the figures are made than by the official programs, side by side in one run.

    PYTHONPATH=. python tests/benchmarks/bench_metrics.py [--references FILE] [--repetitions 5]

Captions: 5,000 with five references each, words and CIDEr of both sides; the official side is pycocoevalcap's tokenizer (Java) and its
CIDEr, and needs `pip install 'adalink[coco]'` and Java. Answers: 200,000 with ten people's answers each; the official side is the
published algorithm written plainly (plain_vqa.py). Both sides take turns, every repetition starts with empty memories (adalink is given
no chance to remember the last one), and medians are compared. Figures must agree to 1e-9, or the run stops.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import time
from collections.abc import Callable
from pathlib import Path

from plain_vqa import evaluate

from tasks.metrics import vqa as vqa_words
from tasks.metrics.captions import score_captions, tokenized
from tasks.metrics.cider import cider
from tasks.metrics.ngrams import count_ngrams, cut_at_spaces
from tasks.metrics.ptb import tokenizer as ptb
from tasks.metrics.vqa import GradedQuestion, score_answers

N_CAPTIONS, N_REFERENCES, N_QUESTIONS, N_PEOPLE = 5_000, 5, 200_000, 10
SUBJECTS = "man woman boy girl dog cat bird train bus plate table child horse player giraffe pizza".split()
VERBS = "rides holds watches eats throws pushes carries looks-at sits-beside walks-past".split()
THINGS = "skateboard, surfboard. umbrella kite frisbee sandwich T-shirt motorcycle bench, laptop's cell-phone".split()
PLACES = ["on the beach.", "in a city street", "at 10:30 a.m.", "near St. Mary's church.", 'with a "STOP" sign', "(outdoors)", "that isn't busy", "in the U.S."]
COLOURS = "red green blue white black two three several young brown large small".split()


def made_captions(n: int, seed: int) -> list[str]:
    """Captions with the words, marks and lengths of COCO's, where no file of real ones is given."""
    r = random.Random(seed)
    return [
        f"{r.choice(['A', 'The', 'Two', 'a'])} {r.choice(COLOURS)} {r.choice(SUBJECTS)} {r.choice(VERBS).replace('-', ' ')} the "
        f"{r.choice(COLOURS)} {r.choice(THINGS)} {r.choice(PLACES)}{r.choice(['', '', f' no {r.randrange(5000)}'])}"
        for _ in range(n)
    ]


def caption_corpus(file: Path | None) -> tuple[dict[int, str], dict[int, list[str]]]:
    """Hypotheses and references: real ones of COCO's format repeated with other partners until there are enough, or made ones."""
    if file is None:
        texts = made_captions(N_CAPTIONS * N_REFERENCES, 1)
        references = {i: texts[i * N_REFERENCES : (i + 1) * N_REFERENCES] for i in range(N_CAPTIONS)}
        return dict(enumerate(made_captions(N_CAPTIONS, 2))), references
    by_image: dict[int, list[str]] = {}
    for row in json.loads(file.read_text())["annotations"]:
        by_image.setdefault(row["image_id"], []).append(row["caption"])
    sets = [texts[:N_REFERENCES] for texts in by_image.values() if len(texts) >= N_REFERENCES]
    print(f"captions: {len(sets)} images of {file.name}, taken in turn")
    references = {i: sets[i % len(sets)] for i in range(N_CAPTIONS)}
    return {i: sets[(i + 1) % len(sets)][0] for i in range(N_CAPTIONS)}, references


def ours_captions(hypotheses: dict[int, str], references: dict[int, list[str]]) -> float:
    """CIDEr from raw captions: words, counts, score; nothing of what the official side leaves out."""
    ptb._CHUNKS.clear()
    corpus = cut_at_spaces(tokenized(hypotheses, references))
    return float(cider(corpus, count_ngrams(corpus)).mean())


def ours_all(hypotheses: dict[int, str], references: dict[int, list[str]]) -> float:
    """All six figures, of the corpus and of each image."""
    ptb._CHUNKS.clear()
    return score_captions(hypotheses, references).corpus["CIDEr"]


def official_captions(hypotheses: dict[int, str], references: dict[int, list[str]]) -> float:
    """The same through pycocoevalcap, as its own evaluation calls them."""
    from pycocoevalcap.cider.cider import Cider
    from pycocoevalcap.tokenizer.ptbtokenizer import PTBTokenizer

    given = {i: [{"caption": text}] for i, text in hypotheses.items()}
    expected = {i: [{"caption": text} for text in texts] for i, texts in references.items()}
    return float(Cider().compute_score(PTBTokenizer().tokenize(expected), PTBTokenizer().tokenize(given))[0])


def answer_rows() -> tuple[dict[int, str], list[dict[str, object]], list[GradedQuestion]]:
    """Answers whose frequencies fall as those of people do: few are most of them, and thousands are rare."""
    r = random.Random(3)
    common = ["yes", "no", "1", "2", "white", "blue", "red", "a dog", "two", "the table", "brown", "left", "pizza.", "tennis racket", "none", "dont know"]
    rare = [f"{r.choice(COLOURS)} {r.choice(SUBJECTS)}{r.choice(['', '!', ', sitting', '/bench', ' (old)'])} {r.randrange(300)}" for _ in range(20_000)]
    rows: list[dict[str, object]] = []
    given: dict[int, str] = {}
    for number in range(N_QUESTIONS):
        likely = [r.choice(common), r.choice(common), r.choice(rare)]
        kind = r.choice(["yes/no", "number", "other"])
        unanimous = r.random() < 0.3
        texts = [likely[0] if unanimous else r.choices(likely, (7, 2, 1))[0] for _ in range(N_PEOPLE)]
        people = [{"answer": text, "answer_confidence": "yes", "answer_id": i + 1} for i, text in enumerate(texts)]
        rows.append({"question_id": number, "question_type": f"type {number % 65}", "answer_type": kind, "answers": people})
        given[number] = r.choice(likely)
    graded = [
        GradedQuestion(
            question_id=n,
            answers=tuple(p["answer"] for p in row["answers"]),  # type: ignore[attr-defined]
            question_type=str(row["question_type"]),
            answer_type=str(row["answer_type"]),
        )
        for n, row in enumerate(rows)
    ]
    return given, rows, graded


def ours_answers(given: dict[int, str], graded: list[GradedQuestion]) -> float:
    """Overall and per type."""
    vqa_words.normalize.cache_clear()
    return score_answers(given, graded).overall


def alternate(sides: dict[str, Callable[[], float]], repetitions: int) -> dict[str, float]:
    """Median seconds of each side, which take turns; their figures must agree."""
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    for _ in range(repetitions):
        metrics = {}
        for name, side in sides.items():
            started = time.perf_counter()
            metrics[name] = side()
            seconds[name].append(time.perf_counter() - started)
        if max(metrics.values()) - min(metrics.values()) > 1e-9:
            raise SystemExit(f"the figures differ: {metrics}")
    return {name: statistics.median(values) for name, values in seconds.items()}


def show(what: str, found: dict[str, float], official: str) -> None:
    """One line a side, with how many times faster than the official one it is."""
    print(what)
    for name, value in found.items():
        print(f"  {name:44s} {value:8.3f} s   {found[official] / value:6.1f} times as fast")


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--references", type=Path, default=None, help="real captions in COCO's format in place of made ones")
    parser.add_argument("--repetitions", type=int, default=5)
    arguments = parser.parse_args()
    hypotheses, references = caption_corpus(arguments.references)
    sides: dict[str, Callable[[], float]] = {
        "adalink: words + CIDEr": lambda: ours_captions(hypotheses, references),
        "adalink: all six figures": lambda: ours_all(hypotheses, references),
        "pycocoevalcap: tokenizer + CIDEr": lambda: official_captions(hypotheses, references),
    }
    show(f"{N_CAPTIONS:,} captions with {N_REFERENCES} references each", alternate(sides, arguments.repetitions), "pycocoevalcap: tokenizer + CIDEr")
    given, rows, graded = answer_rows()
    plain = "the official algorithm, written plainly"
    answers: dict[str, Callable[[], float]] = {
        "adalink": lambda: ours_answers(given, graded),
        plain: lambda: float(evaluate(given, rows)["overall"]),  # type: ignore[arg-type]
    }
    show(f"{N_QUESTIONS:,} answers with {N_PEOPLE} people's answers each", alternate(answers, arguments.repetitions), plain)


if __name__ == "__main__":
    main()
