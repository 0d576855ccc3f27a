"""The names that `adalink` gives."""

from adalink.anatomy import Anatomy, InputSpec
from adalink.attachment.attach import attach
from adalink.attachment.attachment import Attachment
from adalink.attachment.vision import attach_vision, read_vision
from adalink.checkpoint.fingerprint import FrozenPart, fingerprint
from adalink.checkpoint.peft_format import from_peft, to_peft
from adalink.checkpoint.precision import BaseSettings, Precision
from adalink.edit import EMBEDDING, Adapter, Edit, Method, Placement, Port, Slots
from adalink.errors import AdalinkError, AttachError, BudgetError, CheckpointError, ConfigError, DataError
from adalink.methods import METHODS
from adalink.methods.adalink import AdaLink
from adalink.methods.bitfit import BitFit
from adalink.methods.bottleneck import Bottleneck
from adalink.methods.bridge import Bridge
from adalink.methods.budgets.adalora import AdaLoRA
from adalink.methods.budgets.hyper import Hyper
from adalink.methods.budgets.ist import IST
from adalink.methods.budgets.selected import Selected
from adalink.methods.budgets.sparse import Sparse, SparseDelta
from adalink.methods.epalm import EPALM
from adalink.methods.hira import HiRA
from adalink.methods.ia3 import IA3
from adalink.methods.ladder import Ladder
from adalink.methods.lora import LoRA
from adalink.methods.prefix import Prefix
from adalink.methods.prompts.dept import DePT
from adalink.methods.prompts.prompt import Prompt
from adalink.methods.prompts.warp import WARP
from adalink.methods.unipelt import Gated, UniPELT
from adalink.model import BASE_NAME, AdaptedModel, get_adalink_model
from adalink.tokens import ANSWER, BASE_ROW, IMAGE, PAD, PERCEPT, PREFIX, PROMPT, TEXT, TokenMap, Tokens

__all__ = [
    "ANSWER", "BASE_NAME", "BASE_ROW", "EMBEDDING", "EPALM", "IA3", "IMAGE", "IST", "METHODS", "PAD", "PERCEPT", "PREFIX", "PROMPT", "TEXT", "WARP", "AdaLink",
    "AdaLoRA", "AdalinkError", "AdaptedModel", "Adapter", "Anatomy", "AttachError", "Attachment", "BaseSettings", "BitFit", "Bottleneck", "Bridge",
    "BudgetError", "CheckpointError", "ConfigError", "DataError", "DePT", "Edit", "FrozenPart", "Gated", "HiRA", "Hyper", "InputSpec", "Ladder", "LoRA",
    "Method", "Placement", "Port", "Precision", "Prefix", "Prompt", "Selected", "Slots", "Sparse", "SparseDelta", "TokenMap", "Tokens", "UniPELT", "attach",
    "attach_vision", "fingerprint", "from_peft", "get_adalink_model", "read_vision", "to_peft",
]  # fmt: skip
