"""Which saved adapter serves a row: prototypes or a gate over one vector for each row, and the folder that holds them.

    f            float [F], of frozen parts alone, so that it is known before anything is edited
    prototypes   argmax_k max_c f . centre_kc                 MOS's retrieval (arXiv 2412.09441) without its forward for each adapter
    gate         softmax((W f + b) / temperature)             WEMoE's (arXiv 2402.00433), decided once for each row and not for each layer

Every number of a row comes of that row alone, in float64: no other row of a batch can change its route.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

import safetensors
import torch
from safetensors.torch import load_file, save
from torch import Tensor, nn

from adalink.attachment.inputs import Route
from adalink.checkpoint.compressed import COMPRESSED_FILE
from adalink.checkpoint.folder import CONFIG_FILE, PEFT_CONFIG_FILE, TRAINER_FILE, WEIGHTS_FILE
from adalink.errors import CheckpointError, ConfigError
from adalink.files import write_whole
from adalink.tokens import AUTO, BASE_NAME

__all__ = ["Gate", "RouteSettings", "Router", "SavedRouter", "adapter_digest", "centres_of", "pruned", "read_router", "write_router"]


@dataclass(frozen=True, kw_only=True)
class RouteSettings:
    """How a router decides."""

    by: Literal["gate", "prototypes"] = "gate"  # gate: trained on the rows of all adapters; prototypes: the nearest, each of its own adapter's rows alone
    top: int = 1  # how many adapters serve a row, by their weights; 1: the best alone, which costs nothing; 0: all, mixed
    centers: int = 8  # prototypes of an adapter; rows of several kinds need several
    unknown: Literal["base", "refuse"] = "base"  # what becomes of a row that is like none of the examples: the frozen model serves it, or it is refused
    depth: Literal[1, 2] = 1  # layers of the gate
    seed: int = 0  # of the centres, of the gate's start and of the rows that are held out

    def __post_init__(self) -> None:
        """Check what a command line can get wrong."""
        if self.by not in ("gate", "prototypes") or self.unknown not in ("base", "refuse"):
            raise ConfigError(f"a router is by {self.by!r} with unknown {self.unknown!r}: give gate or prototypes, and base or refuse")
        if self.top < 0 or self.centers < 1 or self.depth not in (1, 2):
            raise ConfigError(f"a router has top {self.top}, centers {self.centers} and depth {self.depth}: give 0 or more, 1 or more, and 1 or 2")
        if self.by == "prototypes" and self.top != 1:
            raise ConfigError(f"a router by prototypes has top {self.top}, and the nearest prototype has no weights: give top 1, or a gate")


# ----------------------------------------
# Prototypes: the centres of an adapter's rows on the unit sphere.


ROUNDS = 50  # of k-means, which is done long before


def centres_of(rows: Tensor, n: int, seed: int = 0) -> Tensor:
    """float64 [C, F], C <= n: unit centres of rows [B, F]; one is the unit mean of the unit rows, several are those of spherical k-means."""
    rows = _unit(rows.double())
    generator = torch.Generator().manual_seed(seed)
    centres = rows[torch.randint(len(rows), (1,), generator=generator)]
    for _ in range(min(n, len({tuple(row) for row in rows.tolist()})) - 1):  # each new one is a row, the likelier the farther it is from those before
        far = (1 - rows @ centres.T).amin(1).clamp(min=1e-12)
        centres = torch.cat([centres, rows[torch.multinomial(far, 1, generator=generator)]])
    for _ in range(ROUNDS):
        nearest = (rows @ centres.T).argmax(1)
        moved = torch.stack([_unit(rows[nearest == i].mean(0)) if (nearest == i).any() else centre for i, centre in enumerate(centres)])
        if torch.equal(moved, centres):
            break
        centres = moved
    return centres


def _unit(rows: Tensor) -> Tensor:
    return nn.functional.normalize(rows, dim=-1)


# ----------------------------------------
# The gate, and the difference of an adapter to its start that E-WEMoE mixes (arXiv 2410.21804): its largest entries alone.


class Gate(nn.Module):
    """float64 [..., F] -> [..., K], a number for each adapter, as WEMoE has it; whoever calls takes a softmax, or none.

    depth   0: a constant; 1: fc2 x + b; 2: fc2 relu(fc1 x + b1) + b
    start   what the last bias, or the constant, starts at: lambda of task arithmetic
    """

    def __init__(self, width: int, n: int, depth: int = 1, start: float = 0.0) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.full((n,), start)) if depth == 0 else None
        self.fc1 = nn.Linear(width, width) if depth == 2 else None
        self.fc2 = nn.Linear(width, n) if depth else None
        for linear in (self.fc1, self.fc2):
            if linear is not None:
                nn.init.normal_(linear.weight, std=0.01)
                nn.init.zeros_(linear.bias)
        if self.fc2 is not None:
            nn.init.constant_(self.fc2.bias, start)
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        if self.fc2 is None:
            assert self.weight is not None
            return self.weight.expand(*x.shape[:-1], -1)
        return self.fc2(x if self.fc1 is None else nn.functional.relu(self.fc1(x)))  # type: ignore[no-any-return]


DECAY = 1e-5  # of the gate's weights: without it those that tell all rows apart grow for ever
STEPS = 200  # of LBFGS on all rows at once; it ends by itself before


def trained_gate(rows: Tensor, label: Tensor, n: int, depth: int, seed: int) -> Gate:
    """The gate that best says which adapter's row is which; each adapter counts alike, however many rows it has. rows [B, F], label int64 [B]."""
    with torch.random.fork_rng(devices=[]), torch.enable_grad():
        torch.manual_seed(seed)
        gate = Gate(rows.shape[1], n, depth)
        share = (1 / torch.bincount(label, minlength=n).double())[label] / n
        optimizer = torch.optim.LBFGS(gate.parameters(), max_iter=STEPS, line_search_fn="strong_wolfe")

        def loss() -> Tensor:
            optimizer.zero_grad()
            value = (share * nn.functional.cross_entropy(gate(rows), label, reduction="none")).sum()
            value = value + DECAY * sum((parameter.square().sum() for parameter in gate.parameters()), torch.zeros(()))
            value.backward()  # type: ignore[no-untyped-call]
            return value

        optimizer.step(loss)  # type: ignore[no-untyped-call]
    return gate.requires_grad_(False)


TEMPERATURES = torch.logspace(-1, 2, 301, dtype=torch.float64)


def best_temperature(logits: Tensor, label: Tensor) -> float:
    """What divides the logits [B, K] of rows that the gate was not trained on so that its weights are as often right as they say; 1 without rows."""
    if not len(logits):
        return 1.0
    losses = torch.stack([nn.functional.cross_entropy(logits / temperature, label) for temperature in TEMPERATURES])
    return float(TEMPERATURES[losses.argmin()])


def pruned(difference: Tensor, share: float) -> Tensor:
    """The entries whose magnitude is above the `share` quantile of all magnitudes (linear between two), the others 0; of any number of entries."""
    ordered = difference.abs().flatten().sort().values  # torch.quantile takes no more than 16 million
    place = share * (len(ordered) - 1)
    low, high = ordered[math.floor(place)], ordered[math.ceil(place)]
    return torch.where(difference.abs() > torch.lerp(low, high, place - math.floor(place)), difference, 0.0)


# ----------------------------------------
# The router.


@dataclass(frozen=True, kw_only=True)
class Router:
    """Which of its adapters serves a row.

    names    of the adapters, in the order of the alphabet: the first wins a tie
    centres  float64 [C, F], unit
    owner    int64 [C]: whose centre each is
    floors   float64 [K]: a cosine to an adapter's centres that hardly a row of its own is below; a row below all of them is like none
    gate     None by prototypes
    right    the share of rows that were held out and routed right, by adapter; NaN where none were
    """

    names: tuple[str, ...]
    settings: RouteSettings
    centres: Tensor
    owner: Tensor
    floors: Tensor
    gate: Gate | None = None
    temperature: float = 1.0
    right: Mapping[str, float] = field(default_factory=dict)

    @staticmethod
    def fit(rows: Mapping[str, Tensor], settings: RouteSettings) -> Router:
        """The router of adapters with examples of their rows, float [B, F] each. Raises ConfigError for fewer than two adapters, or one without rows."""
        names = tuple(sorted(rows))
        if len(names) < 2:
            raise ConfigError(f"a router of {len(names)} adapters was asked for, and there is nothing to choose: give two or more")
        if empty := [name for name in names if not len(rows[name])]:
            raise ConfigError(f"the adapter {empty[0]} has no examples: give data that it was trained for")
        given = {name: rows[name].double() for name in names}
        held = {name: _held_out(len(given[name]), settings.seed) for name in names}
        centres = {name: centres_of(given[name][~held[name]], settings.centers, settings.seed) for name in names}
        floors = [_floor((given[name] @ centres[name].T).amax(1), held[name]) for name in names]
        owner = torch.tensor([i for i, name in enumerate(names) for _ in centres[name]])
        router = Router(names=names, settings=settings, centres=torch.cat([*centres.values()]), owner=owner, floors=torch.stack(floors))
        label = torch.tensor([i for i, name in enumerate(names) for _ in given[name]])
        all_rows, is_held = torch.cat([*given.values()]), torch.cat([*held.values()])
        if settings.by == "gate":
            gate = trained_gate(all_rows[~is_held], label[~is_held], len(names), settings.depth, settings.seed)
            router = replace(router, gate=gate, temperature=best_temperature(gate(all_rows[is_held]), label[is_held]))
        chosen = torch.tensor([int(router.scores(row).argmax()) for row in all_rows[is_held]], dtype=torch.int64)
        hits = chosen == label[is_held]
        right = {name: float(hits[label[is_held] == i].double().mean()) for i, name in enumerate(names)}
        return replace(router, right=right)

    def cosines(self, row: Tensor) -> Tensor:
        """float64 [K]: of a row [F], to the nearest centre of each adapter."""
        every = (self.centres * _unit(row.double())).sum(1)
        return torch.full((len(self.names),), -torch.inf, dtype=torch.float64).scatter_reduce(0, self.owner, every, "amax")

    def scores(self, row: Tensor) -> Tensor:
        """float64 [K], the greatest wins: weights that sum to one with a gate, cosines with prototypes."""
        return self.cosines(row) if self.gate is None else (self.gate(row.double()[None])[0] / self.temperature).softmax(0)

    def route(self, row: Tensor) -> Route:
        """Which adapter serves a row [F]: `auto` where several do, `__base__`, without weights, where the row is like none of the examples."""
        cosines = self.cosines(row)
        if not bool((cosines >= self.floors).any()):
            return Route(BASE_NAME, {}, cosine=float(cosines.max()), margin=0.0)
        scores = self.scores(row)
        best = scores.sort(descending=True, stable=True)
        margin, cosine = float(best.values[0] - best.values[1]), float(cosines.max())
        if self.settings.top == 1:
            name = self.names[int(best.indices[0])]
            return Route(name, {name: 1.0}, cosine=cosine, margin=margin)
        chosen = sorted(best.indices[: self.settings.top or None].tolist())
        weights = scores[chosen] / scores[chosen].sum()
        return Route(AUTO, {self.names[i]: weight for i, weight in zip(chosen, weights.tolist(), strict=True)}, cosine=cosine, margin=margin)


def _floor(cosines: Tensor, held: Tensor) -> Tensor:
    """float64 []: below the cosine that 99 of 100 rows reach, also of those [B] that the centres were not made of, by as much as that is below the median.

    At the 99 of 100 itself every hundredth good row would be lost, while rows of random words and pixels lie far below.
    """
    found = [cosines[part].quantile(torch.tensor([0.01, 0.5], dtype=torch.float64)) for part in (~held, held) if part.any()]
    return torch.stack([2 * low - middle for low, middle in found]).min()


def _held_out(n: int, seed: int) -> Tensor:
    """bool [n]: every fifth of the rows in a drawn order."""
    order = torch.randperm(n, generator=torch.Generator().manual_seed(seed))
    return torch.zeros(n, dtype=torch.bool).index_fill(0, order[: n // 5], True)


# ----------------------------------------
# The folder of a router: what decides, and the adapters, inside it or where they lie.


ROUTER_FILE, TENSORS_FILE, MEMBERS, FORMAT = "adalink_router.json", "router.safetensors", "members", 1


@dataclass(frozen=True, kw_only=True)
class SavedRouter:
    """A router with the folders of its adapters."""

    router: Router
    folders: Mapping[str, Path]


def adapter_digest(folder: Path) -> str:
    """The sum of an adapter folder's config and weights, in whichever of its forms. Raises CheckpointError where there are none."""
    found = [folder / name for name in (CONFIG_FILE, PEFT_CONFIG_FILE, WEIGHTS_FILE, COMPRESSED_FILE, TRAINER_FILE) if (folder / name).is_file()]
    if not found:
        raise CheckpointError(f"{folder} is no adapter folder: it has neither a config nor weights; was it moved?")
    return hashlib.sha256(b"".join(path.name.encode() + hashlib.sha256(path.read_bytes()).digest() for path in found)).hexdigest()


def write_router(out: Path, router: Router, folders: Mapping[str, Path]) -> None:
    """Write the folder; the adapters are where they are, by a path relative to `out` where they lie in it. The config comes last."""
    out.mkdir(parents=True, exist_ok=True)
    gate = {} if router.gate is None else {f"gate.{name}": value for name, value in router.gate.state_dict().items()}
    tensors = {"centres": router.centres, "owner": router.owner, "floors": router.floors, **gate}
    write_whole(out / TENSORS_FILE, save({name: value.contiguous() for name, value in tensors.items()}))
    placed = {name: folder.relative_to(out) if folder.is_relative_to(out) else folder.absolute() for name, folder in folders.items()}
    content = {
        "format": FORMAT, "settings": vars(router.settings), "temperature": router.temperature, "right": dict(router.right),
        "members": {name: {"folder": str(placed[name]), "digest": adapter_digest(folders[name])} for name in router.names},
    }  # fmt: skip
    write_whole(out / ROUTER_FILE, (json.dumps(content, indent=2) + "\n").encode())


def read_router(folder: Path) -> SavedRouter:
    """The router of a folder. Raises CheckpointError where it is damaged, or an adapter is not as it was when the router was made."""
    try:
        content, stored = json.loads((folder / ROUTER_FILE).read_text()), load_file(folder / TENSORS_FILE)
        if content["format"] != FORMAT:
            raise CheckpointError(f"{folder / ROUTER_FILE} has format {content['format']}, and this version of adalink reads {FORMAT}: update adalink")
        settings, members = RouteSettings(**content["settings"]), content["members"]
        gate = None
        if settings.by == "gate":
            gate = Gate(stored["centres"].shape[1], len(members), settings.depth).requires_grad_(False)
            gate.load_state_dict({name.removeprefix("gate."): value for name, value in stored.items() if name.startswith("gate.")})
        router = Router(
            names=tuple(members), settings=settings, centres=stored["centres"], owner=stored["owner"], floors=stored["floors"], gate=gate,
            temperature=content["temperature"], right=content["right"],
        )  # fmt: skip
        folders = {name: folder / member["folder"] for name, member in members.items()}
    except OSError:
        raise CheckpointError(f"{folder} is no router folder: it has no {ROUTER_FILE} and {TENSORS_FILE} to read; `adalink route` writes one") from None
    except (KeyError, TypeError, ValueError, AttributeError, RuntimeError, safetensors.SafetensorError) as error:
        raise CheckpointError(f"{folder} is not a router that can be read ({error}): was it changed by hand, or cut off?") from None
    for name, path in folders.items():
        if adapter_digest(path) != members[name]["digest"]:
            raise CheckpointError(f"the adapter {name} in {path} is not the one that the router in {folder} was made with: make the router again")
    return SavedRouter(router=router, folders=folders)
