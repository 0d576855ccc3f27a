"""Adapt a frozen transformer at named ports, for the tokens of some domains, and leave without a trace."""

from adalink.anatomy import Anatomy, InputSpec
from adalink.attach import Attachment, attach
from adalink.edit import EMBEDDING, Adapter, Edit, Method, Placement, Port, Slots
from adalink.errors import AdalinkError, AttachError, BudgetError, CheckpointError, ConfigError, DataError
from adalink.frozen_part import FrozenPart, fingerprint
from adalink.methods import EPALM, IA3, METHODS, AdaLink, BitFit, Bottleneck, Bridge, Gated, LoRA, Prefix, Prompt, UniPELT
from adalink.model import BASE_NAME, AdaptedModel, get_adalink_model
from adalink.peft_format import from_peft, to_peft
from adalink.siblings import tell_of_others
from adalink.tokens import ANSWER, BASE_ROW, IMAGE, PAD, PERCEPT, PREFIX, PROMPT, TEXT, TokenMap, Tokens
from adalink.vision import attach_vision
from adalink.vision_anatomy import read_vision

__all__ = [
    "ANSWER", "BASE_NAME", "BASE_ROW", "EMBEDDING", "EPALM", "IA3", "IMAGE", "METHODS", "PAD", "PERCEPT", "PREFIX", "PROMPT", "TEXT",
    "AdaLink", "AdalinkError", "AdaptedModel", "Adapter", "Anatomy", "AttachError", "Attachment", "BitFit", "Bottleneck", "Bridge",
    "BudgetError", "CheckpointError", "ConfigError", "DataError", "Edit", "FrozenPart", "Gated", "InputSpec", "LoRA", "Method", "Placement", "Port",
    "Prefix", "Prompt", "Slots", "TokenMap", "Tokens", "UniPELT", "attach", "attach_vision", "fingerprint", "from_peft",
    "get_adalink_model", "read_vision", "to_peft",
]  # fmt: skip

tell_of_others()
