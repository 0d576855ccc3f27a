"""The script that trained the two frozen parts of scenes: `python -m tasks.scenes.train_parts --out DIR`.

The parts are trained apart, on pictures with class numbers and on text, so neither knows the other.

The shipped parts are what it gives with its defaults, up to rounding: the order of sums depends on the number of threads.
"""

from __future__ import annotations

import argparse
import hashlib
from pathlib import Path

import torch

from tasks.scenes.train_encoder import train_encoder
from tasks.scenes.train_language import train_language

__all__ = ["hash_files", "main"]


def main() -> None:
    """Train both parts (or the one named), and record the hashes of all files."""
    parser = argparse.ArgumentParser(description="Train the frozen parts of scenes.")
    parser.add_argument("--out", type=Path, required=True, help="folder that gets encoder/, language/ and SHA256SUMS")
    parser.add_argument("--encoder-steps", type=int, default=3000, help="batches of 64 pictures; 0 leaves the encoder as it is")
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
