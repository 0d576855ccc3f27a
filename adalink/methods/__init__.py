"""The methods, by the name that configs and checkpoints use. Adding one is a file here and a name in METHODS."""

from adalink.methods.adalink import AdaLink
from adalink.methods.bitfit import BitFit
from adalink.methods.bridge import Bridge
from adalink.methods.ia3 import IA3
from adalink.methods.inject import EPALM
from adalink.methods.lora import LoRA
from adalink.methods.prompt import Prompt

__all__ = ["EPALM", "IA3", "METHODS", "AdaLink", "BitFit", "Bridge", "LoRA", "Prompt"]

METHODS = {"adalink": AdaLink, "bitfit": BitFit, "bridge": Bridge, "epalm": EPALM, "ia3": IA3, "lora": LoRA, "prompt": Prompt}
