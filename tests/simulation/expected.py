"""Where the host may wait for the device, and dtypes may meet, and why. Everything else in a step is a fault."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from device import Finding

__all__ = ["EXPECTED", "JOINED", "unexpected"]

PREFILL = "once for each batch of prompts: what its rows share decides how they are read"
TRANSFORMERS = "inside transformers' own generation, for beams and for methods without an exact cache"
STATES = "train.states_gib keeps hidden states on the host: they come from there"
PLAIN_IDS = "a call of one's own with plain ids: where they begin and what they mean is found out from them"
MASK_SKIP = "transformers looks whether a mask of two dimensions has padding"
SEES = "the model's own tower reads the sizes of its images"

# (where, below): why. `below` is a library's function; "" is the line itself, "*" any.
EXPECTED: Mapping[tuple[str, str], str] = {
    # Each step of training.
    ("adalink/tokens.py uploaded", ""): "rows of several adapters; the simulated device pins no memory, without which a copy waits",
    ("multimodal/existing/inputs.py taken", ""): "how many vectors the rows of a call take; transformers checks their number right after",
    ("multimodal/loss/language_loss.py hidden", "transformers/utils/import_utils.py torch_compilable_check"): "the model checks the number of its image tokens",
    ("multimodal/loss/language_loss.py hidden", "transformers/masking_utils.py _ignore_causal_mask_sdpa"): MASK_SKIP,
    ("multimodal/loss/language_loss.py hidden", "transformers/masking_utils.py _ignore_bidirectional_mask_sdpa"): MASK_SKIP,
    ("multimodal/loss/answer_head.py pooled_state", "transformers/masking_utils.py _ignore_bidirectional_mask_sdpa"): MASK_SKIP,
    ("multimodal/existing/tower.py _run", "*"): SEES,
    ("multimodal/loss/hidden_states.py of", ""): STATES,
    ("multimodal/loss/hidden_states.py <genexpr>", ""): STATES,
    ("multimodal/loss/hidden_states.py _run", ""): STATES,
    ("multimodal/loss/hidden_states.py run", "*"): STATES,
    ("multimodal/training/prepare.py pack", ""): "train.offload keeps activations on the host; the simulated device pins no memory, without which a copy waits",
    ("multimodal/training/prepare.py hidden_state_model", ""): "once for a training",
    ("multimodal/training/prepare.py _scores", "*"): "once for a training",
    ("multimodal/training/prepare.py _scores", ""): "once for a training",
    ("multimodal/batches/prefix_sharing.py agree", ""): "once for a training: a trial",
    # Features of a dataset, which are written to the host.
    ("multimodal/data/feature_cache/encode.py encode_all", ""): "features go to the host",
    ("multimodal/data/feature_cache/format.py rounded", ""): "a feature that the dtype cannot hold is refused where it is made",
    ("multimodal/encoders/tower.py _placed", ""): "pixels of an image that was just decoded",
    ("adalink/checkpoint/fingerprint.py _identified", ""): "the encoder's fingerprint, once for a cache",
    ("adalink/checkpoint/fingerprint.py of", ""): "the encoder's fingerprint, once for a cache",
    # Generation: prompts.
    ("multimodal/generation/decoding.py prefill", ""): PREFILL,
    ("multimodal/generation/decoding.py tokens_of", ""): PREFILL,
    ("multimodal/generation/decoding.py _present", ""): PREFILL,
    ("multimodal/generation/decoding.py read_on", ""): PREFILL,
    ("multimodal/generation/decoding.py keep", ""): "rows leave a running batch",
    ("multimodal/generation/decoding.py read", "transformers/masking_utils.py _ignore_causal_mask_sdpa"): MASK_SKIP,
    ("multimodal/generation/decoding.py read", "transformers/utils/import_utils.py torch_compilable_check"): "the model checks the number of its image tokens",
    # Generation: each token.
    ("multimodal/generation/generate.py _greedy", ""): "which rows have ended decides what is read next",
    ("tasks/serve/engine.py _chosen", ""): "clients are sent each token, and rows that have ended leave",
    ("tasks/serve/engine.py _let_go", ""): "rows leave a running batch",
    # Generation: the answers.
    ("multimodal/generation/generate.py generated_texts", ""): "the words",
    ("multimodal/loss/answer_head.py chosen_answers", ""): "the answers",
    ("multimodal/generation/generate.py _generate", "*"): TRANSFORMERS,
    ("adalink/model.py generate", "*"): TRANSFORMERS,
    # Plain ids.
    ("adalink/model.py forward", "transformers/masking_utils.py _ignore_causal_mask_sdpa"): MASK_SKIP,
    ("adalink/attachment/existing.py positions", ""): PLAIN_IDS,
    ("adalink/attachment/inputs.py widened", ""): PLAIN_IDS,
    ("adalink/attachment/inputs.py __init__", ""): PLAIN_IDS,
    ("", "tests/simulation/scenarios.py step"): "a test's own batch goes to the device",
}  # fmt: skip


# Where two dtypes meet on purpose, and why.
JOINED: Mapping[tuple[str, str], str] = {
    ("adalink/methods/targets.py added", ""): "a float32 change is added to a bfloat16 stream without a float32 copy of it; the attachment gives h's dtype",
    ("adalink/methods/ia3.py joint", ""): "the same of a gain",
    ("", "tests/simulation/scenarios.py step"): "the same in the backward pass",
}


def unexpected(findings: Iterable[Finding]) -> list[Finding]:
    """What no line above names. Tensors of two devices and float64 are never expected."""
    allowed = {"sync": EXPECTED, "upload": EXPECTED, "promoted": JOINED}
    return [f for f in findings if not {(f.where, f.below), *([(f.where, "*")] if f.below else [])} & allowed.get(f.kind, {}).keys()]
