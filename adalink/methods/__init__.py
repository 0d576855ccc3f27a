"""The methods, by the name that configs and checkpoints use. Adding one is a file here and a name in METHODS."""

from adalink.methods.adalink import AdaLink
from adalink.methods.bridge import Bridge
from adalink.methods.inject import EPALM
from adalink.methods.prompt import Prompt

__all__ = ["EPALM", "METHODS", "AdaLink", "Bridge", "Prompt"]

METHODS = {"adalink": AdaLink, "bridge": Bridge, "epalm": EPALM, "prompt": Prompt}
