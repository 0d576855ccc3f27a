"""Images and text through frozen models."""

from multimodal.torchvision_shim import ensure_torchvision

ensure_torchvision()  # before anything here imports transformers, timm or open_clip

