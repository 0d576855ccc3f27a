"""A trained adapter that follows two saved ones: where the new version of a task's adapter is wrong, the old one's words, and elsewhere its own.

MUSCLE (Echterhoff et al. 2024, arXiv 2407.09435). At the target y_t of a text, with the frozen teachers old and new and the trained c:

    m_t  = 1 where argmax p_new(t) is not y_t, else 0
    loss = sum_t m_t KL(p_old(t) || p_c(t)) + (1 - m_t) KL(p_new(t) || p_c(t))

All three are adapters of one frozen model: the teachers' rows are one batch without gradient, and the student's are the rows as they came.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from typing import Literal

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from adalink import AdaptedModel, TokenMap
from adalink.attachment.existing import NO_LABEL
from multimodal.batches.collate import Batch, SharedPrefix

__all__ = ["Direction", "Followed", "Mask", "aligned_loss"]

Mask = Literal["new", "student"]  # whose greedy word says where to follow the old teacher
Direction = Literal["teacher_student", "student_teacher"]  # KL(teacher || student), or the other way round
_NOT_OF_ROWS = ("pixels", "patches", "taps", "rope")  # tensors of a batch whose first dimension is not its rows


@dataclass(frozen=True, kw_only=True)
class Followed:
    """What a student follows.

    names      the adapters of the model that teach: old, new
    digests    of their weights, in this order: what a resumed run is compared by
    mask, kl   see `aligned_loss`
    labels     weight of the ordinary loss beside; 0: none
    """

    names: tuple[str, str]
    digests: tuple[str, str]
    mask: Mask = "new"
    kl: Direction = "teacher_student"
    labels: float = 0.0

    def rows(self, adapted: AdaptedModel, batch: Batch, token_map: TokenMap) -> tuple[Batch, TokenMap]:
        """The rows of a batch once for each teacher, old first, as each teacher reads them."""
        n, times = len(batch.ids), len(self.names)
        serving = adapted.serving(n * times, [name for name in self.names for _ in range(n)])
        copied = token_map.cut(torch.arange(n, device=batch.ids.device).repeat(times), token_map.domain.shape[1], token_map.present)
        return _repeated(batch, times), replace(copied, row=serving.row, serving=serving.serving, indices=serving.indices)

    def loss(self, hidden: Tensor, taught: Tensor, target: Tensor, head: nn.Module, finish: Callable[[Tensor], Tensor], at_once: int) -> Tensor:
        """float []: summed over targets. hidden: [B, M, D], what the head is given for the student; taught: [2 B, M, D], for old and new."""
        old, new = (part.reshape(-1, part.shape[-1]) for part in taught.chunk(2))
        hidden, target = hidden.reshape(-1, hidden.shape[-1]), target.reshape(-1)
        total = hidden.new_zeros((), dtype=torch.promote_types(hidden.dtype, torch.float32))
        for start in range(0, len(hidden), at_once):
            part = slice(start, start + at_once)
            given = (hidden[part], old[part], new[part], target[part])
            total = total + checkpoint(self._of_chunk, *given, head, finish, use_reentrant=False)
        return total

    def _of_chunk(self, hidden: Tensor, old: Tensor, new: Tensor, target: Tensor, head: nn.Module, finish: Callable[[Tensor], Tensor]) -> Tensor:
        with torch.no_grad():
            by_old, by_new = finish(head(old)), finish(head(new))
        return aligned_loss(finish(head(hidden)), by_old, by_new, target, mask=self.mask, kl=self.kl, labels=self.labels)


def aligned_loss(
    student: Tensor, old: Tensor, new: Tensor, target: Tensor, *, mask: Mask = "new", kl: Direction = "teacher_student", labels: float = 0.0
) -> Tensor:
    """float [], float32 at least: the divergence from the teacher of each target, summed.

    student, old, new  float [..., V]   logits
    target             int64 [...]      NO_LABEL for none
    mask               whose greedy word, where it is not the target, calls for the old teacher
    labels             weight of the cross entropy of the targets beside
    """
    dtype = torch.promote_types(student.dtype, torch.float32)
    words, by_old, by_new = (nn.functional.log_softmax(logits.to(dtype), -1) for logits in (student, old, new))
    is_wrong = (by_new if mask == "new" else words.detach()).argmax(-1) != target
    teacher = torch.where(is_wrong[..., None], by_old, by_new)
    first, second = (teacher, words) if kl == "teacher_student" else (words, teacher)
    divergence = (first.exp() * (first - second)).sum(-1)
    if labels:
        divergence = divergence - labels * words.gather(-1, target.clamp(min=0)[..., None])[..., 0]
    return torch.where(target != NO_LABEL, divergence, 0.0).sum()


def _repeated(batch: Batch, times: int) -> Batch:
    """The rows of a batch several times, about the same images."""
    of_rows = {field.name: value for field in fields(batch) if isinstance(value := getattr(batch, field.name), Tensor) and field.name not in _NOT_OF_ROWS}
    repeated = {name: value.repeat(times, *(1,) * (value.ndim - 1)) for name, value in of_rows.items()}
    rope = None if batch.rope is None else batch.rope.repeat(1, times, 1)
    prefix = None if batch.shared_prefix is None else _repeated_prefix(batch.shared_prefix, len(batch.ids), times)
    return replace(batch, **repeated, rope=rope, shared_prefix=prefix)  # type: ignore[arg-type]


def _repeated_prefix(prefix: SharedPrefix, n_rows: int, times: int) -> SharedPrefix:
    shifts, n_prefixes = range(times), len(prefix.first)
    targets = {name: getattr(prefix, name).repeat(times, 1) for name in ("source", "target", "own_source", "own_target")}
    first, which = (torch.cat([value + i * n for i in shifts]) for value, n in ((prefix.first, n_rows), (prefix.which, n_prefixes)))
    return replace(prefix, first=first, which=which, **targets)
