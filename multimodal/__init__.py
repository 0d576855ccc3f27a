"""Images and text through frozen models."""

import adalink  # noqa: F401  (says which file is in the way where `tasks` is somebody else's)
from multimodal.torchvision_shim import ensure_torchvision

ensure_torchvision()  # before anything here imports transformers, timm or open_clip

