"""The form in which a run's settings let a model learn."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule

from adalink import ANSWER, BASE_ROW, IMAGE, TEXT, AdaptedModel, Adapter, Anatomy, TokenMap
from adalink.attachment.attachment import without_dropout
from adalink.attachment.slots import FIXED, HideKeys, ReadAll, lowest_edit
from adalink.checkpoint.folder import AdapterConfig
from adalink.checkpoint.start import digest_of
from adalink.errors import AttachError, ConfigError
from adalink.lifecycle.flat import Flat, check_alike, read_flat
from adalink.methods.budgets.schedule import Schedule, Scheduled
from adalink.methods.ladder import End
from multimodal.batches.collate import FLEX, Batch, collate
from multimodal.batches.prefix_sharing import REFUSALS, agree, calls_of, gates_of, mixes_texts, unadapted
from multimodal.batches.tokenize import Row
from multimodal.loss.answer_head import AnswerHead
from multimodal.loss.hidden_states import LayersBelow, LayersBeside, LowerStates
from multimodal.loss.teachers import Followed
from multimodal.model import TrainedParts, VisionLanguageModel
from multimodal.processes import process_state
from multimodal.template import saved_template
from multimodal.training.settings import Compile, Teachers, TrainSettings

__all__ = [
    "CompiledModel", "Pull", "Schedules", "compiled", "first_layer", "following", "hidden_state_model", "training_form", "mean_loss", "new_optimizer",
    "offloaded", "parameter_groups", "starts_exactly",
]  # fmt: skip


# ----------------------------------------
# A compiled form of a model with adapters, for training: the first steps take minutes, and each length of rows that is new may take more.


@contextlib.contextmanager
def compiled(model: VisionLanguageModel, mode: Compile) -> Iterator[None]:
    """Inside the block the model learns in its compiled form. Raises ConfigError for a model that does not learn so."""
    loss = model.language_loss
    if mode != "no":
        if any(isinstance(module, FSDPModule) for module in model.modules()):
            raise ConfigError("train.compile makes one graph of the model, and FSDP2 splits it: train with DDP, or with train.compile: no")
        if model.head is not None:
            raise ConfigError("train.compile acts on models that write, and this one chooses among answers: train with train.compile: no")
        loss.call = CompiledModel(model.adapted, mode=mode)
    try:
        yield
    finally:
        loss.call = model.adapted.base


class CompiledModel:
    """Runs an adapted model's frozen model as one compiled graph. The model itself stays as it is: generation runs uncompiled.

    Compile last: attach, then compile, then train. Dynamo does not look at hooks again, so a model whose adapters change is refused.
    """

    def __init__(self, adapted: AdaptedModel, *, mode: Compile = "default", backend: Any = "inductor") -> None:
        self.adapted = adapted
        self.at = adapted.attachment.at
        options: dict[str, Any] = {"mode": mode} if backend == "inductor" else {}
        self._run = torch.compile(adapted.base, fullgraph=True, backend=backend, **options)

    def __call__(self, **arguments: Any) -> Any:  # the model's own arguments
        """The model's output.

        Raises AttachError where adapters were added or taken away since, ConfigError where the model is not one graph or no compiler works.
        """
        if self.adapted.attachment.at is not self.at:
            raise AttachError("adapters were added or taken away after the model was compiled, and it would not see them: compile it again")
        try:
            return self._run(**arguments)
        except torch._dynamo.exc.TorchDynamoException as error:
            stated = str(error).strip().splitlines()[0]
            raise ConfigError(f"this model cannot be compiled into one graph ({stated}): train with train.compile: no") from error


# ----------------------------------------
# Activations that wait for the backward pass in the host's memory.


OFFLOADED_BYTES = 2**16  # a smaller tensor costs more to move than it takes


@contextlib.contextmanager
def offloaded(model: nn.Module, least: int = OFFLOADED_BYTES) -> Iterator[None]:
    """Inside the block, what the forward pass saves goes to the host, in pinned memory, and comes back in the backward pass. Gradients are equal.

    Copies are queued behind what made the tensor, so neither the host nor the device waits for the other. Weights and buffers stay where
    they are, and so do tensors of fewer than `least` bytes, and views with gaps or repetitions (a mask that is expanded to all heads).
    """
    stays = {data.untyped_storage()._cdata for one in (*model.parameters(), *model.buffers()) for data in _plain(one)}

    def pack(tensor: Tensor) -> tuple[torch.device, Tensor] | Tensor:
        if tensor.nbytes < least or not _is_dense(tensor) or tensor.untyped_storage()._cdata in stays:
            return tensor
        is_pinned = tensor.device.type == "cuda"
        host = torch.empty_like(tensor, device="cpu", pin_memory=is_pinned, requires_grad=False)
        return tensor.device, host.copy_(tensor, non_blocking=is_pinned)

    def unpack(saved: tuple[torch.device, Tensor] | Tensor) -> Tensor:
        return saved if isinstance(saved, Tensor) else saved[1].to(saved[0], non_blocking=True)

    with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
        yield


def _plain(tensor: Any) -> list[Tensor]:
    """A tensor, or those that a quantised or split one is made of."""
    flatten = getattr(tensor, "__tensor_flatten__", None)
    return [tensor] if flatten is None else [part for name in flatten()[0] for part in _plain(getattr(tensor, name))]


def _is_dense(tensor: Tensor) -> bool:
    """Whether a tensor's numbers lie in memory without gaps or repetitions, in any order of its dimensions."""
    expected = 1
    for stride, size in sorted((stride, size) for stride, size in zip(tensor.stride(), tensor.shape, strict=True) if size > 1):
        if stride != expected:
            return False
        expected *= size
    return True


# ----------------------------------------
# A model that trains with cached states of its texts: what is below the lowest edit is run once for each text.


ADVICE = "give train.states_gib: 0"


@contextlib.contextmanager
def hidden_state_model(model: VisionLanguageModel, gib: float, n_images: int) -> Iterator[None]:
    """Inside the block the model learns from cached states, of at most `gib` GiB in each process; 0: nothing changes.

    n_images: of the data, to check with the first batch whether the cache can hold their texts; 0: no check.
    Raises ConfigError where nothing can be cached, with the reason.
    """
    if not gib:
        yield
        return
    adapted, loss = model.adapted, model.language_loss
    if any(isinstance(module, FSDPModule) for module in model.modules()):
        raise ConfigError(f"train.states_gib runs texts in each process apart, and FSDP2 splits the model over them: train with DDP, or {ADVICE}")
    if model.changes_features:
        raise ConfigError(f"train.states_gib keeps what the model makes of an image's features, and what encodes images is trained: {ADVICE}")
    first = first_layer(adapted.anatomy, adapted.active_adapter(), model.head)
    if trained := next((name for name, parameter in adapted.base.named_parameters() if parameter.requires_grad), None):
        raise ConfigError(f"train.states_gib caches the states of a frozen language model, and {trained} is trained: {ADVICE}")
    read = read_beside(adapted.anatomy, adapted.active_adapter())
    below = LayersBeside(adapted, read) if read else LayersBelow(adapted, first)
    row = int(adapted.rows(1))
    if not starts_exactly(below, row if read else BASE_ROW):
        kind = model.language.model.config.model_type
        raise ConfigError(f"{kind} was tried without {below.note}, given their output for a text, and gives other logits then: {ADVICE}")
    positions = model.row_encoder().max_positions
    loss.lower = LowerStates(below, row, most=gib * 2**30, n_images=n_images, positions=positions)
    try:
        yield
    finally:
        loss.lower = None


def first_layer(anatomy: Anatomy, adapter: Adapter, head: AnswerHead | None) -> int:
    """The layer below which everything can be cached; 0 where what a ladder reads can be. Raises ConfigError where there is none."""
    if head is not None:
        raise ConfigError(f"train.states_gib acts on models that write, and this one chooses among answers: {ADVICE}")
    if read_beside(anatomy, adapter):
        return 0
    lowest, placement = lowest_edit(anatomy, adapter)
    if lowest < 1:
        where = "the first layer" if lowest == 0 else "what enters the layers"
        raise ConfigError(
            f"train.states_gib caches the output of the layers below an adapter's lowest edit, and {placement.role} acts on {where}: "
            f"{ADVICE}, or methods in deeper layers alone, as eP-ALM without a prompt"
        )
    if any(isinstance(placed.edit, ReadAll) for placed in adapter.placements):
        raise ConfigError(f"train.states_gib caches nothing of padding, and a slot of this adapter reads it: train eP-ALM with mask: causal, or {ADVICE}")
    return min(lowest, len(anatomy.layers) - 1)


def read_beside(anatomy: Anatomy, adapter: Adapter) -> tuple[int, ...]:
    """Numbers of the layers whose outputs are constant and all that an adapter reads; () for one without a ladder.

    Raises ConfigError where something trained enters the layers.
    """
    beside = [placed for placed in adapter.placements if placed.port.side == "beside" and placed.port.module in anatomy.layers]
    if not beside:
        return ()
    own = beside[0].role.split(".")[0]
    hides_image = any(isinstance(placed.edit, HideKeys) and placed.role.split(".")[0] == own for placed in adapter.placements)
    allowed = {IMAGE} if hides_image else set()
    for placed in adapter.placements:
        if placed.role.split(".")[0] != own and not isinstance(placed.edit, FIXED) and not allowed.issuperset(placed.domains):
            raise ConfigError(
                f"train.states_gib caches what a ladder reads of the frozen layers, and {placed.role} writes what enters them: {ADVICE}, "
                "or let the ladder have the image to itself (image: side_only), and train nothing else before the layers"
            )
    if anatomy.reader is not None:
        raise ConfigError(f"train.states_gib caches what a ladder reads of a decoder-only model, and this one has an encoder: {ADVICE}")
    adds = any(isinstance(placed.edit, End) and placed.edit.output == "add" for placed in adapter.placements)
    numbers = {anatomy.layers.index(placed.port.module) for placed in beside} | ({len(anatomy.layers) - 1} if adds else set())
    return tuple(sorted(numbers))


@torch.no_grad()
def starts_exactly(below: LayersBelow | LayersBeside, row: int = BASE_ROW) -> bool:
    """Whether a model gives the same logits for two short texts without the layers whose states are cached. Runs it on twenty tokens.

    row: the adapter that serves them
    """
    adapted = below.adapted
    batch = _two_texts(adapted.base)
    serving, present = frozenset({row}) - {BASE_ROW}, frozenset({TEXT, ANSWER})
    token_map = replace(unadapted(batch), row=torch.full_like(batch.image, row), serving=serving, present=present)
    try:
        whole = _scores(adapted, batch, token_map)
        with LowerStates(below, row, most=0).left_out(batch, token_map):
            started = _scores(adapted, batch, token_map)
    except REFUSALS:  # layers of another kind
        return False
    return agree(started, whole)


def _two_texts(model: Any) -> Batch:
    texts = ((1, 2, 3, 4, 5, 6), (1, 2, 3, 7))
    has_decoder = model.config.is_encoder_decoder
    rows = [Row(ids, (TEXT,) * 3 + (ANSWER,) * (len(ids) - 3), decoder_ids=ids[:4] if has_decoder else ()) for ids in texts]
    return collate(rows, [0, 0], torch.zeros(1, 1, 1), kind="patches", side="right", pad_id=0).to(next(model.parameters()).device)


def _scores(adapted: AdaptedModel, batch: Batch, token_map: TokenMap) -> Tensor:
    """[N, V]: of every token that is none of the padding."""
    (call,) = calls_of(adapted, batch, token_map)
    with call.bound(adapted):
        scores: Tensor = adapted.base(**call.arguments).logits
    return scores.flatten(0, 1) if batch.decoder_ids is not None else scores[batch.attention_mask == 1]


# ----------------------------------------
# A model whose active adapter learns from two saved ones, which are on it for as long.


TEACHERS = ("teacher_old", "teacher_new")  # the names of their adapters


@contextlib.contextmanager
def following(model: VisionLanguageModel, teachers: Teachers) -> Iterator[None]:
    """Inside the block the active adapter follows the teachers. Raises ConfigError where it cannot, CheckpointError for teachers of another base."""
    loss, folders = model.language_loss, teachers.folders
    if folders is None:
        yield
        return
    added: dict[str, Adapter] = {}
    if any(isinstance(module, FSDPModule) for module in model.modules()):
        raise ConfigError("train.teachers puts adapters of their own on the frozen model, and FSDP2 splits it over processes: train with DDP")
    if model.head is not None or model.changes_features:
        what = "chooses among answers" if model.head is not None else "trains what encodes images"
        raise ConfigError(f"train.teachers aligns words that are written about the same features, and this model {what}: train it without teachers")
    configs = [AdaptedModel.read_config(folder) for folder in folders]
    for folder, config in zip(folders, configs, strict=True):
        _refuse_other_words(model, folder, config, configs[1])
    try:
        for name, folder in zip(TEACHERS, folders, strict=True):
            added[name] = model.load_adapter(folder, name, activate=False)
            _refuse_other_rows(model, name, added[name], folder)
        old, new = (digest_of(adapter.tensors()) for adapter in added.values())
        loss.followed = Followed(names=TEACHERS, digests=(old, new), mask=teachers.mask, kl=teachers.kl, labels=teachers.labels)
        yield
    finally:
        loss.followed = None
        for name in added:
            model.delete_adapter(name)


def _refuse_other_words(model: VisionLanguageModel, folder: Path, config: AdapterConfig, new: AdapterConfig) -> None:
    """Raise ConfigError for a teacher whose texts are not those that the student reads."""
    if config.task.get("answers"):
        raise ConfigError(f"the teacher {folder} chooses among answers, and train.teachers aligns words that are written: give one that writes")
    task, other = config.task.get("task"), model.adapted.task.get("task", new.task.get("task"))
    if task != other:
        raise ConfigError(f"the teacher {folder} was trained for {task}, and what it teaches for {other}: give teachers of one task")
    words, own = saved_template(config.task), model.template_of(model.adapted.active or "")
    if words is not None and words != own:
        raise ConfigError(f"the teacher {folder} was trained with {words}, and this run with {own}: its words would not align; give one with the same template")


def _refuse_other_rows(model: VisionLanguageModel, name: str, teacher: Adapter, folder: Path) -> None:
    """Raise ConfigError for a teacher that cannot read the rows that are made for the student."""
    student = model.adapted.active_adapter()
    theirs, own = (adapter.slots for adapter in (teacher, student))
    if theirs != own:
        raise ConfigError(
            f"the teacher {folder} reserves {sum(slot.count for slot in theirs)} positions in a row and this adapter {sum(slot.count for slot in own)}, "
            f"of the kinds {[slot.domain for slot in theirs]} and {[slot.domain for slot in own]}, or at other places: give teachers with the same bridge "
            "and prompts"
        )
    if (mixes_texts(teacher), gates_of(teacher)) != (mixes_texts(student), gates_of(student)):
        raise ConfigError(f"the teacher {folder} and this adapter differ in whether they read a row as a whole: give a teacher of the same kind of method")
    if model.connectors is not None and model.connectors.has_own(name):
        raise ConfigError(f"the teacher {folder} has a connector of its own, so it reads other vectors of an image: give one with the frozen connector")


@contextlib.contextmanager
def training_form(model: VisionLanguageModel, settings: TrainSettings, n_images: int) -> Iterator[None]:
    """Inside the block the model has the form that the settings ask for: compiled, with cached states of its texts, with teachers.

    Raises ConfigError where it cannot.
    """
    kind = getattr(model.language.model.config.get_text_config(), "_attn_implementation", None)
    if kind == FLEX and model.device.type == "cpu":
        raise ConfigError("base: attention is flex_attention, which has no backward pass on a CPU: give sdpa, or leave it out")
    if settings.offload != "no" and model.device.type == "cpu":
        raise ConfigError(f"train.offload is {settings.offload}, which spares the memory of a GPU, and this model trains on a CPU: leave it out")
    with following(model, settings.teachers), compiled(model, settings.compile), hidden_state_model(model, settings.states_gib, n_images):
        yield


@torch.no_grad()
def mean_loss(model: VisionLanguageModel, batches: Iterable[Batch]) -> float | None:
    """The loss per target (per question, where a head chooses) over all batches of all processes, without dropout; None where they hold no target.

    Every process gives its own part of the batches, and gets the whole loss.
    """
    state, loss = process_state(), model.language_loss
    before = (loss.lower, loss.call, loss.followed)
    total = torch.zeros(2, dtype=torch.float64)  # loss, targets
    loss.lower, loss.call, loss.followed = None, model.adapted.base, None  # neither cached nor compiled for, and no teacher's words
    try:
        with without_dropout(model):
            for batch in batches:
                total += torch.tensor([float(model(batch)) * batch.n_targets, batch.n_targets], dtype=torch.float64)
    finally:
        loss.lower, loss.call, loss.followed = before
    if state.num_processes > 1:
        shared = total.float().to(state.device)  # some devices have no float64
        torch.distributed.all_reduce(shared)
        total = shared.double().cpu()
    return float(total[0] / total[1]) if total[1] else None


# ----------------------------------------
# A training that stays near earlier adapters, so that it can be merged with them (MOS, arXiv 2412.09441).


class Pull:
    """Moves the active adapter's trained weights a share of the way to the mean of saved adapters: w = (1 - share) w + share mean.

    Called after an optimizer step, whose state it does not touch. The mean is computed once, in float64. Evaluation changes nothing, other than in the
    released code, which pulls in every forward pass.
    """

    def __init__(self, model: VisionLanguageModel, folders: Sequence[Path], share: float) -> None:
        """Raises ConfigError under FSDP2; CheckpointError for folders of another base, or of other tensors than the adapter has."""
        if any(isinstance(module, FSDPModule) for module in model.modules()):
            raise ConfigError("train.pull_towards moves whole weights, and FSDP2 splits them over processes: train with DDP")
        adapter, self.share = model.adapted.active_adapter(), share
        flats = {str(folder): read_flat(folder, model.adapted) for folder in folders}
        for folder in flats:
            AdaptedModel.read_config(folder).check_base(model.adapted.parts, folder)
        check_alike({"the adapter that is trained": Flat.of(adapter.tensors()), **flats})
        first = next(iter(flats.values()))
        mean, parts = torch.stack([flat.vector for flat in flats.values()]).mean(0), first.parts()
        self._pairs = [(one, mean[parts[name]].reshape(one.shape).to(one)) for name, one in adapter.named_parameters()]

    @torch.no_grad()
    def __call__(self) -> None:
        for parameter, mean in self._pairs:
            if parameter.requires_grad:  # else it stands still in this stage
                parameter.mul_(1 - self.share).add_(mean, alpha=self.share)


class Schedules(Schedule):
    """Those of all trained methods, in the language model, the encoder and the connector, as one; false where no method has one."""

    def __init__(self, model: VisionLanguageModel) -> None:
        """Raises ConfigError under FSDP2."""
        trained = TrainedParts.of(model)
        self._all = {
            f"{place}{name}": one
            for place, adapter in (("", trained.edits), ("vision.", trained.vision), ("connector.", trained.connector))
            for name, method in ({} if adapter is None else adapter.methods).items()
            if adapter is not None and isinstance(method, Scheduled) and type(one := method.schedule(name, adapter)) is not Schedule
        }
        if self._all and any(isinstance(module, FSDPModule) for module in model.modules()):
            raise ConfigError(f"the schedule of {next(iter(self._all))} reads whole weights, and FSDP2 splits them over processes: train with DDP")

    def __bool__(self) -> bool:
        return bool(self._all)

    def begin(self, n_steps: int, seed: int) -> None:
        """All of them."""
        for one in self._all.values():
            one.begin(n_steps, seed)

    def before_step(self, step: int, loss: Callable[[], float]) -> None:
        """All of them."""
        for one in self._all.values():
            one.before_step(step, loss)

    def loss(self, step: int) -> Tensor | None:
        """The sum of theirs."""
        found = [loss for one in self._all.values() if (loss := one.loss(step)) is not None]
        return torch.stack(found).sum() if found else None

    def after_backward(self, step: int) -> None:
        """All of them."""
        for one in self._all.values():
            one.after_backward(step)

    def after_step(self, step: int) -> None:
        """All of them."""
        for one in self._all.values():
            one.after_step(step)

    def report(self) -> dict[str, float]:
        """Theirs, after the method's name: `adalora triplets`."""
        return {f"{name} {key}": value for name, one in self._all.items() for key, value in one.report().items()}

    def end(self) -> None:
        """All of them."""
        for one in self._all.values():
            one.end()

    def state(self) -> dict[str, Tensor]:
        """Theirs, by the method's name and their own, on the CPU."""
        return {f"{name}.{key}": value.detach().cpu().contiguous() for name, one in self._all.items() for key, value in one.state().items()}

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """Each its own."""
        for name, one in self._all.items():
            one.load_state({key.removeprefix(f"{name}."): value for key, value in state.items() if key.startswith(f"{name}.")})


# ----------------------------------------
# The optimizer: which weights it trains, how fast each, and in which form it runs.


FUSED_DEVICES = ("cpu", "cuda")


def new_optimizer(parameters: Mapping[str, nn.Parameter], settings: TrainSettings) -> torch.optim.AdamW:
    """AdamW, as one kernel for all weights where devices and dtypes allow it. Raises as `parameter_groups`."""
    fused = all(parameter.device.type in FUSED_DEVICES and parameter.is_floating_point() for parameter in parameters.values())
    return torch.optim.AdamW(parameter_groups(parameters, settings), betas=settings.betas, weight_decay=settings.weight_decay, fused=fused)


def parameter_groups(parameters: Mapping[str, nn.Parameter], settings: TrainSettings) -> list[dict[str, Any]]:
    """One group per method, or part of one (`dept.soft`), with a rate of its own and per kind: matrices decay, vectors do not.

    `peaks` of a group is its highest rate in each of the run's stages, None where it stands still. Raises ConfigError for a rate, or a stage, of what
    is not among the parameters.
    """
    rates = settings.learning_rates
    staged = {name: None for stage in settings.stages for name in stage.trains}
    for setting, keys in (("learning_rates", sorted(rates)), ("stages", staged)):
        if unknown := [key for key in keys if not any(f"{name}.".startswith(f"{key}.") for name in parameters)]:
            methods = sorted({name.split(".", 1)[0] for name in parameters})
            raise ConfigError(f"train.{setting} names {', '.join(unknown)}, and this adapter's methods are {', '.join(methods)}")
    groups: dict[tuple[tuple[float | None, ...], bool], list[nn.Parameter]] = {}
    for name, parameter in parameters.items():
        named = max((key for key in rates if f"{name}.".startswith(f"{key}.")), key=len, default="")  # the nearest
        peaks = tuple(
            None if stage and not stage.names(name) else rates.get(named, (stage and stage.learning_rate) or settings.learning_rate)
            for stage in settings.staged
        )
        groups.setdefault((peaks, parameter.ndim > 1), []).append(parameter)
    return [
        {"params": group, "lr": peaks[0] or 0.0, "weight_decay": settings.weight_decay if is_matrix else 0.0, "peaks": peaks}
        for (peaks, is_matrix), group in groups.items()
    ]
