"""PHA: what the authors' modules compute, which adapter serves a row, what a task's adapter is alone, what it learns, and what it refuses."""

from __future__ import annotations

import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from composed import Drawn, compose
from fixture_file import FixtureFile
from shared import fixtures
from tiny import EXACT, excite, rows, run, tiny, token_map
from torch import Tensor
from train_case import losses

from adalink import TEXT, Adapter, Anatomy, Hyper, attach
from adalink.errors import ConfigError
from adalink.methods.budgets.hyper import Generated, Generator, Tasks, instance_loss, materialised, prototype_loss, task_weights
from multimodal.sample import Sample
from multimodal.template import Text
from multimodal.training.settings import TrainSettings
from multimodal.training.train import train

FILES = sorted(fixtures("pha").glob("*.safetensors"))
NAMES = ("colour", "count", "place")


def close(found: Any, expected: Tensor) -> None:
    torch.testing.assert_close(found.detach(), expected, rtol=0, atol=1e-10)


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_it_equals_the_authors_modules(path: Path) -> None:
    case = FixtureFile.read(path)
    given = {name: value.double() if value.is_floating_point() else value for name, value in case.tensors.items()}
    d, r, n_layers, n_tasks = (case.spec[name] for name in ("D", "R", "L", "n_tasks"))
    size = given["prototypes"].shape[1]
    tasks, generator = Tasks(d, n_tasks, size).double(), Generator(n_layers, d, r, size, bias=True).double()
    tasks.load_state_dict({"prototypes": given["prototypes"], **{f"{mine}.{part}": given[f"retriever.{theirs}.{part}"] for mine, theirs in (("first", 0), ("second", 2)) for part in ("weight", "bias")}})
    spelled = {name.removeprefix("generator.").removeprefix("decoder.").replace("LayerNorm", "norm"): value for name, value in given.items() if name.startswith("generator.")}
    generator.load_state_dict(spelled)
    z = tasks.vectors(given["in.hidden"], given["in.mask"][..., None].double())
    close(z, given["out.z"])
    close(tasks.nearest(z), given["route.chosen"])
    z = given["out.z"].clone().requires_grad_()
    ins, pro = 0.1 * instance_loss(z, given["in.task"]), 0.1 * prototype_loss(z, given["in.task"], tasks.prototypes)
    close(ins[None], given["loss.ins"])
    close(pro[None], given["loss.pro"])
    (ins + pro).backward()
    assert z.grad is not None
    assert tasks.prototypes.grad is not None
    close(z.grad, given["grad.z"])
    close(tasks.prototypes.grad, given["grad.prototypes"])
    for layer in range(n_layers):
        edit = Generated(tasks, generator, layer, torch.relu)
        made = edit.made()
        assert made.down_bias is not None
        assert made.up_bias is not None
        for name, value in (("up", made.up), ("down", made.down)):
            close(value.transpose(1, 2).flatten(1), given[f"made.layer{layer}.{name}"])
        close(made.up_bias, given[f"made.layer{layer}.up_bias"])
        close(made.down_bias, given[f"made.layer{layer}.down_bias"])
        close(torch.stack([edit._change(x, made.of(t)) for t, x in enumerate(given["adapter.x"])]), given[f"adapter.layer{layer}.y"])


def attached(of: str = "bottleneck", family: str = "llama", seed: int = 4) -> tuple[Any, Adapter]:
    model = tiny(family)
    torch.manual_seed(seed)
    adapter = Adapter({"hyper": Hyper(prototypes=NAMES, of=of, width=5, size=8)}, Anatomy.read(model)).double()  # type: ignore[arg-type]
    return model, adapter


@pytest.mark.parametrize("of", ["bottleneck", "adalink"])
def test_it_starts_within_a_thousandth_of_the_frozen_model_and_learns_from_the_first_step(of: str) -> None:
    model, adapter = attached(of)
    ids, domain, mask = rows()
    frozen = run(model, ids, mask)
    attachment = attach(model, adapter)
    with attachment.bind(token_map(domain)):
        logits = run(model, ids, mask)
        logits.square().sum().backward()
    assert 0 < float((logits - frozen).detach().abs().max()) < 1e-3
    gradient = adapter.get_parameter("hyper.generator.weight_up.weight").grad
    assert gradient is not None
    assert float(gradient.abs().max()) > 0


@pytest.mark.parametrize("of", ["bottleneck", "adalink"])
@pytest.mark.parametrize("family", ["llama", "opt", "t5"])
def test_a_row_of_a_task_is_what_the_tasks_own_adapter_makes_of_it(of: str, family: str) -> None:
    model, adapter = attached(of, family)
    excite(adapter, 7)
    ids, domain, mask = rows()
    named = replace(token_map(domain), weights=torch.eye(3)[torch.tensor([1, 1, 1])])
    attachment = attach(model, adapter)
    with torch.no_grad(), attachment.bind(named):
        alone = run(model, ids, mask)
    with torch.no_grad(), attachment.bind(replace(named, weights=torch.eye(3)[torch.tensor([1, 0, 1])])):
        mixed = run(model, ids, mask)
        with torch.enable_grad():
            learning = run(model, ids, mask).detach()
    attachment.detach()
    made, prototypes = {}, adapter.get_parameter("hyper.tasks.prototypes")
    for number in (0, 1):
        methods, tensors = materialised(adapter, prototypes[number])
        assert list(methods) == [of]
        plain = Adapter(methods, Anatomy.read(model)).double()
        assert plain.tensors().keys() == tensors.keys()
        plain.load_state_dict(tensors)
        for placement in plain.placements:  # each is then made alone, and not in one product with the others of its port
            placement.edit.register_forward_hook(lambda *_: None)
        attachment = attach(model, plain)
        with torch.no_grad(), attachment.bind(token_map(domain)):
            made[number] = run(model, ids, mask)
        attachment.detach()
    assert torch.equal(alone, made[1])
    assert not torch.allclose(made[0], made[1], atol=1e-3)  # the control: tasks differ
    for found in (mixed, learning):
        torch.testing.assert_close(found, torch.stack([made[1][0], made[0][1], made[1][2]]), rtol=0, atol=EXACT[family])


def test_the_nearest_prototype_is_found_in_the_prompt_and_holds_for_the_answer() -> None:
    model, adapter = attached()
    excite(adapter, 7)
    ids, domain, mask = rows()
    attachment = attach(model, adapter)
    tasks = adapter.get_submodule("hyper.tasks")
    assert isinstance(tasks, Tasks)
    adapter.eval()
    x = model.get_input_embeddings()(ids)
    found = tasks.nearest(tasks.vectors(x, (domain == TEXT)[..., None]))
    with torch.no_grad():
        z = tasks.vectors(x, (domain == TEXT)[..., None])
        tasks.prototypes.copy_(torch.stack([z[2], z[0], z[1]]))
        found = tasks.nearest(z)
    assert found.tolist() == [1, 2, 0]
    with torch.no_grad(), attachment.bind(replace(token_map(domain), weights=torch.eye(3)[found])):
        named = run(model, ids, mask)
    with torch.no_grad(), attachment.bind(token_map(domain)):
        torch.testing.assert_close(run(model, ids, mask), named, rtol=0, atol=0)
    prompt = domain.shape[1] - 2  # the last two are of the answer
    with torch.no_grad(), attachment.bind(token_map(domain[:, :prompt])):
        position = (mask.cumsum(1) - 1).clamp(min=0)
        first = model(input_ids=ids[:, :prompt], attention_mask=mask[:, :prompt], position_ids=position[:, :prompt], use_cache=True)
        rest = model(input_ids=ids[:, prompt:], attention_mask=mask, position_ids=position[:, prompt:], past_key_values=first.past_key_values)
        torch.testing.assert_close(rest.logits, named[:, prompt:], rtol=0, atol=1e-6)


def test_a_batch_of_all_different_tasks_is_refused_by_its_loss_and_rows_alone_are_left_out() -> None:
    z = torch.randn(4, 8, dtype=torch.float64)
    with pytest.raises(ConfigError, match=r"^no two of 3 rows are of one task, so nothing attracts: give larger batches, or fewer tasks$"):
        instance_loss(z[:3], torch.tensor([0, 1, 2]))
    assert instance_loss(z, torch.tensor([0, 1, 1, 2])).isfinite()


QUESTIONS = {"colour": ("what color is it?", "red"), "count": ("how many are there?", "two"), "place": ("where does it stand?", "left")}


def of_three_tasks(sample: Sample, rng: random.Random) -> list[Text]:
    return [Text(question, answer, task=name) for name, (question, answer) in QUESTIONS.items()]


def test_a_training_learns_to_tell_the_tasks_by_their_words_and_refuses_rows_without_one(tmp_path: Path) -> None:
    model = compose("opt")
    torch.manual_seed(5)
    adapter = model.add_adapter("one", {"hyper": Hyper(prototypes=NAMES, width=4, size=8)})
    tasks = adapter.get_submodule("hyper.tasks")
    assert isinstance(tasks, Tasks)
    before = right(model, tasks)
    with torch.no_grad():
        tasks.prototypes.copy_(-tasks.prototypes[[1, 2, 0]])
    train(model, Drawn(8), of_three_tasks, TrainSettings(steps=60, batch_size=4, learning_rate=1e-2, warmup=0.0, log_every=1), tmp_path)
    assert right(model, tasks) == 1.0
    assert before <= 1.0
    assert losses(tmp_path)[-1] < losses(tmp_path)[0]
    with pytest.raises(ConfigError, match=r"^hyper learns one adapter for each task, and the texts name none: train on questions with question types"):
        train(model, Drawn(8), lambda sample, rng: [Text("what is it?", "red")], TrainSettings(steps=4, batch_size=4), tmp_path / "none")
    with pytest.raises(ConfigError, match=r"^a row is of the task 'taste', and the prototypes are of colour, count, place: add it"):
        train(model, Drawn(8), lambda sample, rng: [Text("is it sweet?", "yes", task="taste")], TrainSettings(steps=4, batch_size=4), tmp_path / "other")


def right(model: Any, tasks: Tasks) -> float:
    encoder = model.row_encoder()
    embedding = model.adapted.base.get_input_embeddings()
    found = []
    for number, name in enumerate(NAMES):
        row = encoder.prompt(QUESTIONS[name][0])
        ids = torch.tensor([[id for id, domain in zip(row.ids, row.domain, strict=True) if domain == TEXT]])
        x = embedding(ids).to(tasks.prototypes)
        found.append(int(tasks.nearest(tasks.vectors(x, torch.ones_like(x[..., :1])))) == number)
    return sum(found) / len(found)


def test_what_a_config_can_get_wrong_is_said() -> None:
    with pytest.raises(ConfigError, match=r"^hyper has 1 prototypes, and a hypernetwork of one task is an adapter: name two tasks or more$"):
        Hyper(prototypes=("colour",))
    with pytest.raises(ConfigError, match=r"^hyper's prototypes are \['a', 'a'\]: name each task once$"):
        Hyper(prototypes=("a", "a"))
    with pytest.raises(ConfigError, match=r"^hyper makes 'lora': give bottleneck or adalink$"):
        Hyper(prototypes=NAMES, of="lora")  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match=r"^hyper has width 0, size 64 and contrast 0.1: give 1, 2 and 0 or more$"):
        Hyper(prototypes=NAMES, width=0)
    model, adapter = attached()
    assert task_weights(adapter, ("colour", ""), torch.device("cpu")) is None
    plain, _ = materialised(adapter, adapter.get_parameter("hyper.tasks.prototypes")[0])
    with pytest.raises(ConfigError, match=r"^the adapter has the methods bottleneck, and hyper alone makes adapters of tasks"):
        materialised(Adapter(plain, Anatomy.read(model)), torch.zeros(8))
    d, r, e, n = 32, 5, 8, 2
    made = (2 * d * r + r + d) * (e + 1)
    network = n * e + (2 * e + 1) * 2 * e + (2 * e + 1) * e + 2 * e
    retriever = (d + 1) * 2 * e + (2 * e + 1) * e
    assert adapter.n_parameters() == {"hyper": made + network + retriever + 3 * e}
