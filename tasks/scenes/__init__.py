"""Scenes: drawn images with captions and questions, and two frozen parts trained apart on them. Nothing to download."""

from tasks.scenes.dataset import Scenes
from tasks.scenes.parts import encoder_folder, language_folder

__all__ = ["Scenes", "encoder_folder", "language_folder"]
