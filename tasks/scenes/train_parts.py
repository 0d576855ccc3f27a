"""The script that trained the two frozen parts of scenes: `python -m tasks.scenes.train_parts --out DIR`.

The parts are trained apart, on images with class numbers and on text, so neither knows the other.

The shipped parts are what it gives with its defaults, up to rounding: the order of sums depends on the number of threads.
"""

from __future__ import annotations

import argparse
import hashlib
import json
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from random import Random

import numpy as np
import timm
import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from torch import Tensor, nn
from torch.nn import functional
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from tasks.scenes.scene import BACKGROUNDS, COLOURS, SHAPES, SIDE, SIZES, Scene, draw, make_scene
from tasks.scenes.texts import captions, questions

__all__ = ["hash_files", "main", "make_tokenizer", "train_encoder", "train_language"]


# ----------------------------------------
# Train the frozen encoder of scenes: a timm vision transformer, supervised with class numbers. It never sees a word.
#
# Every patch predicts the object that covers it (shape, colour, size), whether that object's centre lies in it, and how many objects
# of its shape and of its colour the image holds; the class token predicts the background and the counts. The heads are linear and
# dropped afterwards, so what they read lies linearly in the features that an adapter gets.


# One convolution before the transformer. After 38,000 images it names four shapes in five; without it, little more than one in four.
ARCHITECTURE = "vit_tiny_r_s16_p8_224"
MODEL_ARGS = {"img_size": SIDE, "patch_size": 4, "embed_dim": 128, "depth": 4, "num_heads": 4}  # 4 x the convolution's stride of 4 = 16
PATCH = 16
CELLS = SIDE // PATCH
MEAN = STD = (0.5, 0.5, 0.5)
SEED = 20_001  # of the scenes drawn here; Scenes draws its own from other strings
IMAGES_BATCH = 64
NONE = -100  # no target here
# The targets of a patch, with the number of classes of each: 0 is "no object" for the first three. Counts are 1..4, less one.
PATCH_TARGETS = {"shape": len(SHAPES) + 1, "colour": len(COLOURS) + 1, "size": len(SIZES) + 1, "centre": 2, "same_shape": 4, "same_colour": 4}
N_GLOBAL = {"background": len(BACKGROUNDS), "things": 5} | {f"count {w}": 5 for w in (*SHAPES, *COLOURS)}


def train_encoder(folder: Path, *, steps: int) -> None:
    """Train for this many batches of 64 fresh images, then write config.json and model.safetensors into the folder."""
    torch.manual_seed(SEED)
    encoder = timm.create_model(ARCHITECTURE, pretrained=False, num_classes=0, **MODEL_ARGS)
    heads = nn.ModuleList(nn.Linear(encoder.embed_dim, sum(sizes.values())) for sizes in (PATCH_TARGETS, N_GLOBAL))
    weights = [*encoder.parameters(), *heads.parameters()]
    optimizer = torch.optim.AdamW(weights, lr=3e-3, weight_decay=0.05, betas=(0.9, 0.98))
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=3e-3, total_steps=steps, pct_start=0.1)
    for step, (pixels, per_patch, per_image) in zip(range(steps), _batches(), strict=False):
        tokens = encoder.forward_features(pixels)
        patch_loss, patch_right = _score(heads[0](tokens[:, 1:]), per_patch, PATCH_TARGETS)
        global_loss, global_right = _score(heads[1](tokens[:, 0]), per_image, N_GLOBAL)
        optimizer.zero_grad()
        (patch_loss + 0.1 * global_loss).backward()
        nn.utils.clip_grad_norm_(weights, 1.0)
        optimizer.step()
        schedule.step()
        if step % 100 == 99:
            displayed = {name: round(right, 3) for name, right in (patch_right | dict(list(global_right.items())[:3])).items()}
            print(f"encoder {step + 1}/{steps} loss {patch_loss:.3f} {global_loss:.3f} {displayed}", flush=True)
    _save(encoder, folder)


def _batches() -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Pixels f32 [B, 3, 96, 96], targets of the patches i64 [B, 36, 6] and of the images i64 [B, 18], without end."""
    rng = Random(SEED)
    while True:
        scenes = [make_scene(rng) for _ in range(IMAGES_BATCH)]
        pixels = torch.from_numpy(np.stack([np.asarray(draw(scene, rng)) for scene in scenes])).permute(0, 3, 1, 2)
        normal = (pixels / 255 - MEAN[0]) / STD[0]
        yield normal, torch.tensor([_patch_targets(s) for s in scenes]), torch.tensor([_global_targets(s) for s in scenes])


def _patch_targets(scene: Scene) -> list[list[int]]:
    rows = [[0, 0, 0, 0, NONE, NONE] for _ in range(CELLS * CELLS)]
    for thing in scene.things:
        stated = [list(SHAPES).index(thing.shape) + 1, COLOURS.index(thing.colour) + 1, list(SIZES).index(thing.size) + 1]
        counts = [len(scene.alike(shape=thing.shape)) - 1, len(scene.alike(colour=thing.colour)) - 1]
        centre = thing.y // PATCH * CELLS + thing.x // PATCH
        for cell in range(CELLS * CELLS):
            x, y = (cell % CELLS + 0.5) * PATCH, (cell // CELLS + 0.5) * PATCH
            if cell == centre or (rows[cell][0] == 0 and (x - thing.x) ** 2 + (y - thing.y) ** 2 < (0.85 * thing.radius) ** 2):
                rows[cell] = [*stated, int(cell == centre), *counts]
    return rows


def _global_targets(scene: Scene) -> list[int]:
    counts = [len(scene.alike(shape=s)) for s in SHAPES] + [len(scene.alike(colour=c)) for c in COLOURS]
    return [BACKGROUNDS.index(scene.background), len(scene.things), *counts]


def _score(logits: Tensor, targets: Tensor, sizes: dict[str, int]) -> tuple[Tensor, dict[str, float]]:
    """The sum of the targets' cross entropies, and the share of each that is right (where an object is, for the patches')."""
    total, right = logits.new_zeros(()), {}
    for index, (name, part) in enumerate(zip(sizes, logits.split(list(sizes.values()), dim=-1), strict=True)):
        target = targets[..., index]
        total = total + functional.cross_entropy(part.flatten(0, -2), target.flatten(), ignore_index=NONE)
        where = target > 0
        right[name] = (part.argmax(-1) == target)[where].float().mean().item()
    return total, right


def _save(encoder: nn.Module, folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    save_file({name: t.detach().half().contiguous() for name, t in encoder.state_dict().items()}, folder / "model.safetensors")
    settings = {
        "input_size": [3, SIDE, SIDE], "fixed_input_size": True, "interpolation": "bicubic", "crop_pct": 1.0, "crop_mode": "center",
        "mean": list(MEAN), "std": list(STD), "num_classes": 0, "pool_size": None, "first_conv": "patch_embed.backbone.conv", "classifier": "head",
    }  # fmt: skip
    config = {
        "architecture": ARCHITECTURE,
        "num_classes": 0,
        "num_features": MODEL_ARGS["embed_dim"],
        "global_pool": "token",
        "model_args": MODEL_ARGS,
        "pretrained_cfg": settings,
    }
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")


# ----------------------------------------
# Train the frozen language model of scenes: a small Llama and its own tokenizer, on text alone. It never sees an image.
#
# A document holds the texts about one scene: captions, and questions with their answers, `</s>` before, between and after them. So
# the model learns what models of natural text learn: to continue a text consistently. With texts one by one it
# learned no such thing, and in a trial an adapter that only writes its inputs got little more than a third of the CIDEr-D out of it.


TEXT_SEED = 30_001  # of the scenes described here; Scenes and the encoder draw theirs from others
END, PAD = "</s>", "<pad>"
VOCABULARY = 600
TEXT_BATCH = 16
LONGEST = 192  # tokens of a document that are read


def train_language(folder: Path, *, steps: int) -> None:
    """Train for this many batches of 16 documents, then write the model and its tokenizer into the folder."""
    torch.manual_seed(TEXT_SEED)
    tokenizer = make_tokenizer()
    end, pad = tokenizer.convert_tokens_to_ids([END, PAD])
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=128, intermediate_size=352, num_hidden_layers=4, num_attention_heads=4,
        max_position_embeddings=512, tie_word_embeddings=True, bos_token_id=end, eos_token_id=end, pad_token_id=pad,
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=0.05, betas=(0.9, 0.98))
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=3e-3, total_steps=steps, pct_start=0.05)
    documents = _documents(Random(TEXT_SEED))
    for step in range(steps):
        ids, mask = _encode(tokenizer, [next(documents) for _ in range(TEXT_BATCH)], end, pad)
        loss = model(input_ids=ids, attention_mask=mask, labels=ids.masked_fill(mask == 0, -100)).loss
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if step % 100 == 99:
            print(f"language {step + 1}/{steps} loss {loss:.3f}", flush=True)
    folder.mkdir(parents=True, exist_ok=True)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def _documents(rng: Random) -> Iterator[list[str]]:
    """One scene's texts after another, without end: captions and questions with their usual answers, mixed or captions first."""
    while True:
        scene = make_scene(rng)
        note = [*captions(scene, rng), *captions(scene, rng)]
        answered = [*questions(scene, rng, image_id=0), *questions(scene, rng, image_id=0)]
        asked = [f"question: {q.text} answer: {Counter(q.answers).most_common(1)[0][0]}" for q in answered]
        texts = rng.sample(note, rng.randint(1, 8)) + rng.sample(asked, rng.randint(2, 6))
        if rng.random() < 0.5:
            rng.shuffle(texts)
        yield texts


def _encode(tokenizer: PreTrainedTokenizerFast, documents: list[list[str]], end: int, pad: int) -> tuple[Tensor, Tensor]:
    """Ids and mask, i64 [B, T], each text between two `</s>`, padded on the right."""
    rows = []
    for texts in documents:
        ids = [token for text in tokenizer(texts, add_special_tokens=False)["input_ids"] for token in (*text, end)]
        rows.append([end, *ids][:LONGEST])
    longest = max(map(len, rows))
    mask = [[1] * len(row) + [0] * (longest - len(row)) for row in rows]
    return torch.tensor([row + [pad] * (longest - len(row)) for row in rows]), torch.tensor(mask)


def make_tokenizer() -> PreTrainedTokenizerFast:
    """Byte-level BPE over small letters: each word of scenes is about one token, and any other text can be written in bytes."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    tokenizer.decoder = decoders.ByteLevel()
    documents = _documents(Random(TEXT_SEED + 1))
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=["<s>", PAD, END, "<unk>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator((text for _ in range(2_000) for text in next(documents)), trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token=END, eos_token=END, pad_token=PAD, unk_token="<unk>")


def main() -> None:
    """Train both parts (or the one named), and record the hashes of all files."""
    parser = argparse.ArgumentParser(description="Train the frozen parts of scenes.")
    parser.add_argument("--out", type=Path, required=True, help="folder that gets encoder/, language/ and SHA256SUMS")
    parser.add_argument("--encoder-steps", type=int, default=3000, help="batches of 64 images; 0 leaves the encoder as it is")
    parser.add_argument("--language-steps", type=int, default=3000, help="batches of 16 documents; 0 leaves the language model as it is")
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    if args.encoder_steps:
        train_encoder(args.out / "encoder", steps=args.encoder_steps)
    if args.language_steps:
        train_language(args.out / "language", steps=args.language_steps)
    (args.out / "SHA256SUMS").write_text(hash_files(args.out))


def hash_files(folder: Path) -> str:
    """One line for each file of the two parts, as `sha256sum` writes it: the hash, two spaces, the path within the folder."""
    files = sorted(f for part in ("encoder", "language") for f in (folder / part).iterdir())
    return "".join(f"{hashlib.sha256(f.read_bytes()).hexdigest()}  {f.relative_to(folder).as_posix()}\n" for f in files)


if __name__ == "__main__":
    main()
