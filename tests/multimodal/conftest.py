"""Makes torchvision importable before a test module imports timm, open_clip or transformers by itself."""

from __future__ import annotations

import multimodal  # noqa: F401
