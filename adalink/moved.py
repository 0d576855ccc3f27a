"""Where modules were in version 0.1: their old paths can be imported for one version more, with a DeprecationWarning that names the new one. So can
old names of fields be given.
"""

from __future__ import annotations

import importlib
import sys
import warnings
from collections.abc import Sequence
from functools import wraps
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from operator import attrgetter
from types import ModuleType
from typing import Any

__all__ = ["find_moved", "old_paths", "rename_field"]

# New module -> the modules whose content it has now.
_CONTENT = {
    "adalink.errors": "adalink.fields",
    "adalink.files": "adalink.atomic multimodal.folder_lock",
    "adalink.anatomy": "adalink.projections adalink.host_config",
    "adalink.edit": "adalink.offloaded",
    "adalink.lifecycle.export": "adalink.export adalink.fold adalink.prompt_embeds",
    "adalink.attachment.attachment": "adalink.freezing adalink.bound adalink.still adalink.ports",
    "adalink.attachment.attach": "adalink.hooks",
    "adalink.attachment.recompute": "adalink.recompute",
    "adalink.attachment.slots": "adalink.masks adalink.positions adalink.outside adalink.lowest",
    "adalink.attachment.vision": "adalink.vision adalink.vision_anatomy",
    "adalink.attachment.modules_to_save": "adalink.module_copies",
    "adalink.attachment.inputs": "adalink.call adalink.reserve adalink.stack_slots",
    "adalink.attachment.existing": "adalink.existing",
    "adalink.methods.epalm": "adalink.methods.inject",
    "adalink.methods.prompts.prompt": "adalink.methods.prompt",
    "adalink.methods.unipelt": "adalink.methods.gated",
    "adalink.methods.targets": "adalink.targets adalink.groups adalink.token_dropout",
    "adalink.checkpoint.folder": "adalink.hub adalink.as_transformers",
    "adalink.checkpoint.fingerprint": "adalink.frozen_part adalink.sketch adalink.fixed_prompt",
    "adalink.checkpoint.peft_format": "adalink.peft_format adalink.renamed",
    "multimodal": "multimodal.torchvision_shim",
    "multimodal.model": "multimodal.adapter_folder multimodal.trained",
    "multimodal.sample": "multimodal.lengths multimodal.bad_samples multimodal.counted",
    "multimodal.loading": "multimodal.frozen multimodal.hub_reach",
    "multimodal.encoders.base": "multimodal.encoders.stage multimodal.features multimodal.encoders.layout multimodal.encoders.grid",
    "multimodal.encoders.load": "multimodal.encoders.blueprint",
    "multimodal.encoders.tower": "multimodal.vision multimodal.vision_adapter",
    "multimodal.encoders.bound_parts": "multimodal.bound_parts",
    "multimodal.batches.tokenize": "multimodal.encode multimodal.text_tokens",
    "multimodal.batches.collate": "multimodal.batch multimodal.beginning multimodal.packed_mask",
    "multimodal.batches.packing": "multimodal.packing multimodal.joined_rows",
    "multimodal.batches.prefix_sharing": "multimodal.fork multimodal.kept_beginning multimodal.families multimodal.trial_call "
    "multimodal.fork_trial multimodal.prefill multimodal.packing",
    "multimodal.generation.generate": "multimodal.generate",
    "multimodal.generation.decoding": "multimodal.decoding multimodal.prefill multimodal.known_prompt",
    "multimodal.loss.language_loss": "multimodal.language_loss multimodal.word_head multimodal.word_loss",
    "multimodal.loss.savings": "multimodal.last_layer multimodal.activations",
    "multimodal.loss.answer_head": "multimodal.classify",
    "multimodal.loss.hidden_states": "multimodal.lower_states multimodal.layers_below",
    "multimodal.data.loader": "multimodal.loader",
    "multimodal.data.workers": "multimodal.workers multimodal.parcel",
    "multimodal.data.order": "multimodal.order multimodal.bucketing multimodal.mixing",
    "multimodal.data.inputs": "multimodal.pixels multimodal.kept",
    "multimodal.data.images.decode": "multimodal.images",
    "multimodal.data.images.processes": "tasks.serve.decoders",
    "multimodal.data.images.format": "multimodal.image_header multimodal.image_parts",
    "multimodal.data.shards.manifest": "multimodal.manifest multimodal.shard_folder",
    "multimodal.data.shards.members": "multimodal.manifest multimodal.shard_set",
    "multimodal.data.shards.index": "multimodal.shard_index multimodal.tar_scan",
    "multimodal.data.shards.opening": "multimodal.shard_set",
    "multimodal.data.shards.reader": "multimodal.shards multimodal.shard_files multimodal.shard_record",
    "multimodal.data.shards.writer": "multimodal.shard_writer multimodal.shard_job multimodal.tar_write",
    "multimodal.data.shards.check": "multimodal.shard_check",
    "multimodal.data.shards.cache": "multimodal.shard_cache",
    "multimodal.data.shards.storage": "multimodal.remote multimodal.http_files multimodal.fsspec_files multimodal.shard_files",
    "multimodal.data.feature_cache.format": "multimodal.feature_cache.contents multimodal.feature_cache.shard",
    "multimodal.data.feature_cache.reader": "multimodal.feature_cache.manifest multimodal.feature_cache.binding "
    "multimodal.feature_cache.cache multimodal.feature_cache.match",
    "multimodal.data.feature_cache.writer": "multimodal.feature_cache.writer multimodal.feature_cache.scan",
    "multimodal.data.feature_cache.encode": "multimodal.feature_cache.write multimodal.feature_cache.fill "
    "multimodal.feature_cache.encoding multimodal.patch_table multimodal.pixel_table",
    "multimodal.training.train": "multimodal.train",
    "multimodal.training.settings": "multimodal.train_settings",
    "multimodal.training.state": "multimodal.train_state multimodal.best",
    "multimodal.training.prepare": "multimodal.learner multimodal.compiled multimodal.kept_states multimodal.parameter_groups",
    "multimodal.training.distributed": "multimodal.sharding multimodal.stop_signal",
    "multimodal.training.records": "multimodal.run_log multimodal.trackers multimodal.run_facts multimodal.learnt",
    "tasks.runs.prompt_embeds": "multimodal.prompt_embeds",
    "tasks.vqa": "tasks.answer_vocabulary",
    "tasks.data.sources": "tasks.shard_data",
    "tasks.data.files": "tasks.annotation_files tasks.file_source tasks.image_folder tasks.text_lines",
    "tasks.data.coco": "tasks.coco_files tasks.karpathy tasks.data.karpathy",
    "tasks.data.vqa": "tasks.vqa_files tasks.vqa_splits",
    "tasks.data.folder": "tasks.caption_folder",
    "tasks.evaluation.evaluate": "tasks.evaluate tasks.sameness tasks.submission",
    "tasks.evaluation.compare": "tasks.compare tasks.compare_listing tasks.saved_run",
    "tasks.runs.config": "tasks.config",
    "tasks.runs.run": "tasks.run tasks.run_folder tasks.new_model tasks.shown",
    "tasks.runs.compose": "tasks.compose tasks.features",
    "tasks.runs.results": "tasks.run_metrics tasks.model_card tasks.run_report",
    "tasks.runs.table": "tasks.run_table",
    "tasks.planning.meta": "multimodal.blueprint multimodal.footprint multimodal.stored",
    "tasks.planning.plan": "tasks.plan tasks.plan_text tasks.places",
    "tasks.planning.methods": "tasks.methods_list tasks.methods_text",
    "tasks.metrics.captions": "tasks.metrics.java_captions",
    "tasks.metrics.vqa": "tasks.metrics.vqa_words tasks.metrics.offenders",
    "tasks.metrics.files": "tasks.metrics.answer_files tasks.metrics.caption_files tasks.metrics.documents tasks.result_files",
    "tasks.metrics.ptb.words": "tasks.metrics.ptb_written tasks.metrics.ptb_letters",
    "tasks.metrics.ptb.rules": "tasks.metrics.ptb_rules tasks.metrics.ptb_abbreviations",
    "tasks.metrics.ptb.patterns": "tasks.metrics.patterns tasks.metrics.longest_match",
    "tasks.report.page": "tasks.report.table tasks.report.verdict tasks.report.thumbnail tasks.report.policy",
    "tasks.report.svg": "tasks.report.axis",
    "tasks.report.compare_pages": "tasks.report.flips tasks.report.runs",
    "tasks.scenes.scene": "tasks.scenes.words tasks.scenes.draw",
    "tasks.scenes.texts": "tasks.scenes.captions tasks.scenes.questions tasks.scenes.answers",
    "tasks.scenes.train_parts": "tasks.scenes.train_encoder tasks.scenes.train_language",
    "tasks.serve.app": "tasks.serve.chat_routes tasks.serve.file_routes tasks.serve.model_routes tasks.serve.metrics tasks.serve.service tasks.serve.replies",
    "tasks.serve.schema": "tasks.serve.chat tasks.serve.replies",
    "tasks.serve.errors": "tasks.serve.refusal",
    "tasks.serve.request": "tasks.serve.reading tasks.serve.served tasks.serve.chat",
    "tasks.serve.engine": "tasks.serve.worker tasks.serve.running tasks.serve.generation tasks.serve.kept_features tasks.serve.kept_prompts",
    "tasks.serve.scheduler": "tasks.serve.waiting tasks.serve.job tasks.serve.row tasks.serve.written",
    "tasks.serve.access": "tasks.serve.guard tasks.serve.patience tasks.serve.origin tasks.serve.keys",
    "tasks.serve.images": "tasks.serve.remote tasks.serve.uploads",
    "tasks.bench.models": "tasks.bench.composed tasks.bench.shapes tasks.bench.sizes tasks.bench.sides",
    "tasks.bench.clock": "tasks.bench.peak tasks.bench.finding tasks.bench.listing",
    "tasks.bench.measurements": "tasks.bench.training tasks.bench.features tasks.bench.adapters tasks.bench.generation tasks.bench.scripts",
    "tasks.bench.growth": "tasks.bench.plot",
    "tasks.commands.score": "tasks.score",
    "tasks.commands.shards": "tasks.shards",
    "tasks.commands.compare": "tasks.compare_files tasks.compare_runs",
    "tasks.metrics.bootstrap": "tasks.metrics.listing",
    "tasks.commands.lifecycle.export": "tasks.commands.export tasks.export",
    "tasks.commands.lmms_eval": "tasks.lmms_eval_model",
}
_MOVED = {old: [new for new, others in _CONTENT.items() if old in others.split()] for olds in _CONTENT.values() for old in olds.split()}
_FOLDERS = ("multimodal.feature_cache",)  # that are elsewhere now

# Old name -> new name of what is in them.
_RENAMED = {
    "Beginning": "SharedPrefix",
    "Draft": "DryRunConfig",
    "Figure": "MetricValue",
    "Figures": "Metrics",
    "Kept": "CachedFeatures",
    "KeptFeatures": "FeatureLRU",
    "KeptPrompts": "PromptCache",
    "Learns": "TrainingTask",
    "Learnt": "TrainedSoFar",
    "Parcel": "SharedBatch",
    "Picture": "ServedImage",
    "Pictures": "ReadImages",
    "RemotePictures": "RemoteImages",
    "Shown": "LoggedSamples",
    "Verdict": "Outcome",
    "add_figures": "add_metrics",
    "answer_figures": "answer_metrics",
    "answer_verdict": "answer_outcome",
    "beginning_of": "shared_prefix_of",
    "caption_figures": "caption_metrics",
    "dead_workers_told": "dead_workers_named",
    "features_to_show": "features_to_log",
    "found_pictures": "found_images",
    "kept_states": "hidden_state_model",
    "learner": "training_form",
    "learnt_questions": "training_questions",
    "outside_sequence": "virtual_tokens",
    "read_pictures": "read_images",
    "render_flips": "render_changed",
    "say": "log",
    "shown": "redacted",
    "shown_differences": "difference_lines",
    "shown_samples": "logged_samples",
    "tell_of_others": "name_shadowing",
    "told_sameness": "degenerate_note",
    "write_card_figures": "write_card_metrics",
}


class _Moved(MetaPathFinder, Loader):
    """Finds old paths, after everything else, and gives them the names of the new module."""

    def find_spec(self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None) -> ModuleSpec | None:
        return ModuleSpec(name, self, is_package=name in _FOLDERS) if name in _MOVED or name in _FOLDERS else None

    def exec_module(self, module: ModuleType) -> None:
        if module.__name__ in _FOLDERS:
            return
        modules = _MOVED[module.__name__]
        warnings.warn(f"{module.__name__} is now {' and '.join(modules)}; the old path goes with the next version", DeprecationWarning, stacklevel=2)
        for content in map(importlib.import_module, modules):
            names = {name: value for name, value in vars(content).items() if not name.startswith("__")}
            vars(module).update(names | {old: names[new] for old, new in _RENAMED.items() if new in names})


def old_paths(module: str) -> list[str]:
    """The paths that a module's content had."""
    return _CONTENT.get(module, "").split()


def find_moved() -> None:
    """From here on, old paths are found."""
    if not any(isinstance(finder, _Moved) for finder in sys.meta_path):
        sys.meta_path.append(_Moved())


def rename_field(kind: Any, old: str, new: str) -> None:
    """From here on a dataclass's field `new` is taken and given by its name in version 0.1 as well, which is `old`."""
    made = kind.__init__

    @wraps(made)
    def init(self: object, *values: object, **fields: object) -> None:
        if old in fields:  # beside the new name only by dataclasses.replace
            warnings.warn(f"{kind.__name__}.{old} is now {new}; the old name goes with the next version", DeprecationWarning, stacklevel=2)
            fields[new] = fields.pop(old)
        made(self, *values, **fields)

    kind.__init__ = init
    setattr(kind, old, property(attrgetter(new), doc=f"`{new}`, by its name in version 0.1."))
