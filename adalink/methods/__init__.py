"""The methods, by the name that configs and checkpoints use. Adding one is a file here and a name in METHODS."""

from adalink.methods.adalink import AdaLink
from adalink.methods.bitfit import BitFit
from adalink.methods.bottleneck import Bottleneck
from adalink.methods.bridge import Bridge
from adalink.methods.epalm import EPALM
from adalink.methods.ia3 import IA3
from adalink.methods.lora import LoRA
from adalink.methods.prefix import Prefix
from adalink.methods.prompt import Prompt
from adalink.methods.unipelt import Gated, UniPELT

__all__ = ["EPALM", "IA3", "METHODS", "AdaLink", "BitFit", "Bottleneck", "Bridge", "Gated", "LoRA", "Prefix", "Prompt", "UniPELT"]

METHODS = {
    "adalink": AdaLink, "bitfit": BitFit, "bottleneck": Bottleneck, "bridge": Bridge, "epalm": EPALM, "gated": Gated, "ia3": IA3, "lora": LoRA,
    "prefix": Prefix, "prompt": Prompt, "unipelt": UniPELT,
}  # fmt: skip
