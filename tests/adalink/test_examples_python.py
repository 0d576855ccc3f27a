"""The lines of Python in examples/README.md train an existing vision-language model."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
from existing_models import answers, batch, existing

README = (Path(__file__).resolve().parents[2] / "examples" / "README.md").read_text()


def test_the_lines_of_python_train_an_existing_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (code,) = [code for code in re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL) if "llava-hf" in code]
    inputs = answers("llava", batch("llava"))
    labels = inputs.pop("labels")
    existing("llava").save_pretrained(tmp_path / "llava")
    assert "llava-hf/llava-1.5-7b-hf" in code
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {"batch": inputs, "labels": labels}
    exec(compile(code.replace("llava-hf/llava-1.5-7b-hf", str(tmp_path / "llava")), "README.md", "exec"), names)
    assert any(parameter.grad is not None for parameter in names["model"].active_adapter().parameters())
    assert (tmp_path / "runs" / "llava_vqa" / "adapter_model.safetensors").is_file()
