"""PHA (arXiv 2310.11670): one network makes the adapter of each task from the task's prototype; a row's words find the prototype.

    z    = W2 relu(W1 mean of the row's word embeddings)            [E], E = 64, hidden 128
    u    = LayerNorm(W2' relu(W1' [k_t ; e_l]))                     k_t: the prototype of task t; e_l: an embedding of layer l
    down, up, biases = linears of u                                 h' = h + up(relu(down(x))), as a bottleneck adapter has it

Training names each row's task and adds 0.1 (L_ins + L_pro), two contrastive losses at temperature 0.1, by which z comes to lie near its task's prototype.
Where no task is named, the nearest prototype serves the row. `adalink materialise` writes one task's adapter as an ordinary folder, which costs less to serve.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import linear, normalize

from adalink.anatomy import Anatomy
from adalink.edit import EMBEDDING, Adapter, Method, Placement, Slots
from adalink.errors import ConfigError, check_tuples
from adalink.methods.adalink import AdaLink
from adalink.methods.bottleneck import SEQUENCE, Bottleneck
from adalink.methods.budgets.schedule import Schedule
from adalink.tokens import TEXT, Tokens

__all__ = ["Generator", "Hyper", "Made", "Tasks", "hyper_of", "instance_loss", "materialised", "prototype_loss", "task_weights"]

TEMPERATURE = 0.1  # of both losses, as published
SMALL = 1e-3  # about how large the made matrices' entries are at the start


# ----------------------------------------
# From a row's words to its task.


def instance_loss(z: Tensor, task: Tensor, temperature: float = TEMPERATURE) -> Tensor:
    """float []: rows of one task attract each other. z [B, E], task int64 [B]; rows that are alone in their task are left out.

    -mean_i mean_p [z_i . z_p / T - log sum_{j != i} exp(z_i . z_j / T)], p over the other rows of i's task, of unit vectors.
    Raises ConfigError where every row is alone.
    """
    z, own = normalize(z, dim=-1), torch.eye(len(z), dtype=torch.bool, device=z.device)
    pairs = (task[:, None] == task) & ~own
    if not bool(pairs.any()):
        raise ConfigError(f"no two of {len(z)} rows are of one task, so nothing attracts: give larger batches, or fewer tasks")
    logits = z @ z.T / temperature
    log_share = logits - logits.masked_fill(own, -math.inf).logsumexp(1, keepdim=True)
    n = pairs.sum(1)
    return -((log_share * pairs).sum(1)[n > 0] / n[n > 0]).mean()


def prototype_loss(z: Tensor, task: Tensor, prototypes: Tensor, temperature: float = TEMPERATURE) -> Tensor:
    """float []: a row is drawn to its task's prototype and away from the others. z [B, E], task int64 [B], prototypes [T, E].

    As released, the row's own prototype is not in the denominator, so the loss may be negative.
    """
    logits = normalize(z, dim=-1) @ normalize(prototypes, dim=-1).T / temperature
    own = nn.functional.one_hot(task, len(prototypes)).bool()
    return -(logits[own] - logits.masked_fill(own, -math.inf).logsumexp(1)).mean()


class Tasks(nn.Module):
    """The prototypes [T, E], and what makes a vector of a row's words. As an edit of the embeddings it leaves them, and finds each row's task."""

    def __init__(self, width: int, n_tasks: int, size: int) -> None:
        super().__init__()
        self.prototypes = nn.Parameter(torch.randn(n_tasks, size) / math.sqrt(size))
        self.first, self.second = nn.Linear(width, 2 * size), nn.Linear(2 * size, size)
        self.seen: tuple[Tensor, Tensor | None] | None = None  # of the last call that learns: z, and the task of each row

    def vectors(self, x: Tensor, is_read: Tensor) -> Tensor:
        """z [B, E] of vectors [B, T, D], over the tokens that are read, bool or int [B, T, 1]; of none, that of zeros."""
        mean = (x * is_read).sum(1) / is_read.sum(1).clamp(min=1)
        return self.second(torch.relu(self.first(mean)))  # type: ignore[no-any-return]

    def nearest(self, z: Tensor) -> Tensor:
        """int64 [B]: the prototype of the greatest cosine."""
        return (normalize(z, dim=-1) @ normalize(self.prototypes, dim=-1).T).argmax(-1)

    def forward(self, h: Tensor, tokens: Tokens, x: Tensor) -> Tensor:
        tokens.drawn[self] = self._task(tokens, x)
        return h

    def _task(self, tokens: Tokens, x: Tensor) -> Tensor:
        """int64 [B]: what the token map names, otherwise the nearest; found once, when the prompt is read."""
        weights = tokens.weights if tokens.weights is not None and tokens.weights.shape[1] == len(self.prototypes) else None
        named = None if weights is None else weights.argmax(1)
        learns = self.training and torch.is_grad_enabled()
        if named is not None and not learns:
            return named
        if not tokens.has_prompt:
            return tokens.of_prompt(self, "the task of a row")
        z = self.vectors(x, tokens.among((TEXT,)))  # the frozen model's own embeddings, whatever edits them
        found = self.nearest(z) if named is None else named
        if learns:
            self.seen = (z, named)
        if tokens.retained is not None:
            tokens.retained[self] = found
        return found


def task_weights(adapter: Adapter, tasks: Sequence[str], device: torch.device) -> Tensor | None:
    """float [B, T] for a token map: 1 at the task of each row; None where the adapter has no tasks, or a row names none.

    Raises ConfigError for a task that has no prototype.
    """
    method = next((one for one in adapter.methods.values() if isinstance(one, Hyper)), None)
    if method is None or not all(tasks):
        return None
    if unknown := sorted(set(tasks) - set(method.prototypes)):
        known = ", ".join(method.prototypes)
        raise ConfigError(f"a row is of the task {unknown[0]!r}, and the prototypes are of {known}: add it to hyper's prototypes, or leave such rows out")
    return nn.functional.one_hot(torch.tensor([method.prototypes.index(task) for task in tasks], device=device), len(method.prototypes)).float()


# ----------------------------------------
# From a task to its adapter.


class Made(NamedTuple):
    """The adapters of T tasks in one layer, as `nn.Linear` has them: down [T, R, D], up [T, D, R], their biases [T, R] and [T, D], or None."""

    down: Tensor
    up: Tensor
    down_bias: Tensor | None
    up_bias: Tensor | None

    def of(self, task: int) -> dict[str, Tensor]:
        """One task's tensors, named as in the plain method's edit."""
        biases = {"down.bias": self.down_bias, "up.bias": self.up_bias}
        return {"down.weight": self.down[task], "up.weight": self.up[task], **{name: one[task] for name, one in biases.items() if one is not None}}


class Generator(nn.Module):
    """Makes the adapters. As published, nearly all its weights are in the last linears: 2 D R (E + 1)."""

    def __init__(self, n_layers: int, width: int, rank: int, size: int, *, bias: bool) -> None:
        super().__init__()
        self.width, self.rank = width, rank
        self.layer_embed = nn.Embedding(n_layers, size)
        self.linear1, self.linear2 = nn.Linear(2 * size, 2 * size), nn.Linear(2 * size, size)
        self.norm = nn.LayerNorm(size, eps=1e-6)
        self.weight_down, self.weight_up = (self._last(size, width * rank, fan) for fan in (width, rank))
        self.bias_down, self.bias_up = (self._last(size, n, None) if bias else None for n in (rank, width))

    @staticmethod
    def _last(size: int, n: int, fan: int | None) -> nn.Linear:
        made = nn.Linear(size, n)
        bound = SMALL * math.sqrt(3 / (size * fan)) if fan else 0.0
        nn.init.uniform_(made.weight, -bound, bound)
        nn.init.zeros_(made.bias)
        return made

    def forward(self, prototypes: Tensor, layer: int) -> Made:
        """prototypes [T, E] -> the adapters of the layer."""
        place = self.layer_embed.weight[layer].expand(len(prototypes), -1)
        u = self.norm(self.linear2(torch.relu(self.linear1(torch.cat([prototypes, place], -1)))))
        down, up = self.weight_down(u).view(-1, self.width, self.rank), self.weight_up(u).view(-1, self.rank, self.width)
        biases = [None if one is None else one(u) for one in (self.bias_down, self.bias_up)]
        return Made(down.transpose(1, 2).contiguous(), up.transpose(1, 2).contiguous(), *biases)


class Generated(nn.Module):
    """h + up(act(down(x))), each row with the adapter of its task."""

    def __init__(self, tasks: Tasks, generator: Generator, layer: int, act: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.parts, self.layer, self.act = (tasks, generator), layer, act  # no children: all layers share them

    def made(self, tasks: slice = slice(None)) -> Made:
        """The adapters of some tasks here, or of all."""
        found, generator = self.parts
        made: Made = generator(found.prototypes[tasks], self.layer)
        return made

    def forward(self, h: Tensor, tokens: Tokens, x: Tensor) -> Tensor:
        tasks = self.parts[0]
        task = tokens.drawn[tasks].to(h.device)
        is_known = not torch.compiler.is_compiling()  # which tasks occur
        present: list[int] = tokens.once((tasks, "tasks"), lambda: task.unique().tolist()) if is_known else []
        if not is_known or (torch.is_grad_enabled() and len(present) > 1):  # one product for all rows
            made = self.made()
            middle = self.act(_linears(x, made.down[task], made.down_bias, task))
            return h + _linears(middle, made.up[task], made.up_bias, task)
        for one in present:
            own = self.made(slice(one, one + 1)).of(0)  # alone, so that its bits are those of its plain adapter
            rows = slice(None) if len(present) == 1 else (task == one).nonzero()[:, 0]
            changed = h[rows] + self._change(x[rows], own)
            h = changed if len(present) == 1 else h.index_copy(0, rows, changed)  # type: ignore[arg-type]
        return h

    def _change(self, x: Tensor, made: dict[str, Tensor]) -> Tensor:
        return linear(self.act(linear(x, made["down.weight"], made.get("down.bias"))), made["up.weight"], made.get("up.bias"))


def _linears(x: Tensor, weight: Tensor, bias: Tensor | None, task: Tensor) -> Tensor:
    """x [B, T, D_in] by the weight [B, D_out, D_in] of each row."""
    made = x @ weight.transpose(1, 2)
    return made if bias is None else made + bias[task][:, None]


# ----------------------------------------
# The method.


class Contrast(Schedule):
    """The two losses of the step's last micro-batch."""

    def __init__(self, tasks: Tasks, weight: float) -> None:
        self._tasks, self._weight = tasks, weight

    def loss(self, step: int) -> Tensor | None:
        """Raises ConfigError where the rows name no task."""
        if self._tasks.seen is None:
            return None
        (z, task), self._tasks.seen = self._tasks.seen, None
        if not self._weight:
            return 0 * z.sum()  # DDP waits for a gradient of each weight
        if task is None:
            raise ConfigError("hyper learns one adapter for each task, and the texts name none: train on questions with question types (task: vqa)")
        loss = prototype_loss(z, task, self._tasks.prototypes)
        has_pairs = len(task.unique()) < len(task)
        return self._weight * (loss + instance_loss(z, task) if has_pairs else loss)


@dataclass(frozen=True, kw_only=True)
class Hyper:
    """A network that makes a small adapter for each of several related tasks, so that each learns from all; for many tasks with few rows each.

    The tasks of VQA are its question types. A task more costs `size` weights. With a few tasks of thousands of rows, an adapter for each is better.
    """

    prototypes: tuple[str, ...]  # names of the tasks, two or more
    of: Literal["bottleneck", "adalink"] = "bottleneck"  # what is made: an adapter after each layer, or one at the embeddings for text and for image
    width: int = 64  # R of what is made
    size: int = 64  # of prototypes and of the network that makes adapters of them
    exclude_layers: tuple[int, ...] = ()  # layers that are left alone, counted from 0
    contrast: float = 0.1  # weight of the two losses that draw rows to the prototype of their task

    def __post_init__(self) -> None:
        """Check what a config file can get wrong."""
        check_tuples(self, "hyper's")
        if len(set(self.prototypes)) < len(self.prototypes) or not all(self.prototypes):
            raise ConfigError(f"hyper's prototypes are {list(self.prototypes)}: name each task once")
        if len(self.prototypes) < 2:
            raise ConfigError(f"hyper has {len(self.prototypes)} prototypes, and a hypernetwork of one task is an adapter: name two tasks or more")
        if self.of not in ("bottleneck", "adalink"):
            raise ConfigError(f"hyper makes {self.of!r}: give bottleneck or adalink")
        if self.width < 1 or self.size < 2 or not 0 <= self.contrast < math.inf:
            raise ConfigError(f"hyper has width {self.width}, size {self.size} and contrast {self.contrast}: give 1, 2 and 0 or more")
        if self.of == "adalink" and self.exclude_layers:
            raise ConfigError(f"hyper makes adalink at the embeddings, and exclude_layers is {list(self.exclude_layers)}: leave it out, or make bottleneck")

    @property
    def plain(self) -> Method:
        """What one task's adapter is, as a method of its own."""
        if self.of == "adalink":
            return AdaLink(rank=self.width, modalities=("text", "image"))
        return Bottleneck(width=self.width, exclude_layers=self.exclude_layers)

    def slots(self, anatomy: Anatomy) -> tuple[Slots, ...]:
        """None: it edits tokens that are there."""
        return ()

    def place(self, anatomy: Anatomy) -> Sequence[Placement]:
        """What finds a row's task, at the embeddings, and an edit wherever the plain method has one."""
        plain, is_bottleneck = self.plain.place(anatomy), self.of == "bottleneck"
        tasks = Tasks(anatomy.width, len(self.prototypes), self.size)
        generator = Generator(len(plain), anatomy.layer_width if is_bottleneck else anatomy.width, self.width, self.size, bias=is_bottleneck)
        act: Callable[[Tensor], Tensor] = torch.relu if is_bottleneck else nn.Identity()
        made = [
            Placement(f"made.{one.role}", one.port, Generated(tasks, generator, i, act), one.domains, {"tasks": tasks, "generator": generator}, reads_row=True)
            for i, one in enumerate(plain)
        ]
        return [Placement("tasks", EMBEDDING, tasks, SEQUENCE, reads_row=True), *made]

    def schedule(self, name: str, adapter: Adapter) -> Schedule:
        """The contrastive losses."""
        tasks = adapter.get_submodule(f"{name}.tasks")
        assert isinstance(tasks, Tasks)
        return Contrast(tasks, self.contrast)


@torch.no_grad()
def materialised(adapter: Adapter, prototype: Tensor) -> tuple[dict[str, Method], dict[str, Tensor]]:
    """Methods and tensors of an adapter in which the plain one that a prototype [E] makes stands in the place of hyper.

    Raises ConfigError where the adapter has no hyper.
    """
    name, method = hyper_of(adapter)
    own = name if method.of in adapter.methods else method.of
    methods = {own if one == name else one: method.plain if one == name else other for one, other in adapter.methods.items()}
    tensors = {key: value for key, value in adapter.tensors().items() if not key.startswith(f"{name}.")}
    for placement in adapter.placements:
        if isinstance(placement.edit, Generated):
            _, generator = placement.edit.parts
            made: Made = generator(prototype.to(generator.norm.weight)[None], placement.edit.layer)
            role = placement.role.removeprefix(f"{name}.made.")
            tensors |= {f"{own}.{role}.{key}": value.contiguous() for key, value in made.of(0).items()}
    return methods, tensors


def hyper_of(adapter: Adapter) -> tuple[str, Hyper]:
    """The name and the settings of an adapter's hyper. Raises ConfigError where it has none."""
    found = next(((name, one) for name, one in adapter.methods.items() if isinstance(one, Hyper)), None)
    if found is None:
        names = ", ".join(adapter.methods)
        raise ConfigError(f"the adapter has the methods {names}, and hyper alone makes adapters of tasks: give one that was trained with it")
    return found
