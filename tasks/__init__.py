"""Captioning and visual question answering: data, metrics, runs, commands and a server."""

import multimodal  # noqa: F401  (first: from here on torchvision can be imported, and modules are found at their old paths)
