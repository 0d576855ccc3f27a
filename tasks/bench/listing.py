"""Findings as lines for the screen, as a table in Markdown, and as JSON."""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch

from tasks.bench.finding import Finding
from tasks.bench.sizes import Bench
from tasks.metrics.listing import software

__all__ = ["about", "as_json", "as_line", "as_markdown"]


def about(bench: Bench) -> dict[str, str]:
    """Where and with what a run measures."""
    machine = bench.machine
    is_gpu = machine.device.type == "cuda"
    threads = "" if is_gpu else f", {machine.n_threads} thread{'s' * (machine.n_threads > 1)} of {os.cpu_count()} cores"
    return {
        "machine": (torch.cuda.get_device_name(machine.device) if is_gpu else f"{platform.machine()} {platform.system()}") + threads,
        "precision": str(machine.dtype).removeprefix("torch.") + (", compiled" if machine.is_compiled else ""),
        "seconds": "by the clock" if is_gpu else "of the processor",
        "repetitions": str(bench.repetitions),
        "software": ", ".join([software(), *(f"{name} {_version(name)}" for name in ("torch", "transformers", "peft"))]),
    }


def as_line(finding: Finding) -> str:
    """One line: median, spread, target, verdict, what it is."""
    return f"{finding.part:10s}  {_ratio(finding):24s}  {_goal(finding):14s}  {finding.verdict:14s}  {finding.what}; {finding.detail}"


def as_markdown(findings: Sequence[Finding], where: Mapping[str, str]) -> str:
    """A table below a sentence on where it was measured."""
    lines = [
        "; ".join(f"{name}: {value}" for name, value in where.items()),
        "",
        "| what | ratio | target | | in figures |",
        "|---|---|---|---|---|",
    ]
    lines += [f"| {found.what} | {_ratio(found)} | {_goal(found)} | {found.verdict} | {found.detail} |" for found in findings]
    return "\n".join(lines) + "\n"


def as_json(findings: Sequence[Finding], where: Mapping[str, str]) -> str:
    """One object: where, and findings with every ratio."""
    rows: list[dict[str, Any]] = [
        {**vars(found), "median": found.median if found.ratios else None, "verdict": found.verdict} for found in findings
    ]
    return json.dumps({"where": dict(where), "findings": rows}, indent=2) + "\n"


def _ratio(finding: Finding) -> str:
    if not finding.ratios:
        return ""
    spread = f" ({min(finding.ratios):.3g} to {max(finding.ratios):.3g})" if len(finding.ratios) > 1 else ""
    return f"{finding.median:.3g}{spread}"


def _goal(finding: Finding) -> str:
    return "" if finding.target is None else f"{finding.sense} {finding.target:g}"


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "not installed"
