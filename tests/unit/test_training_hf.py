"""A routed model in Trainer, accelerate and PEFT: it learns, adapts, resumes and saves."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import sparsify
from sparsify.errors import BadInput
from sparsify.runtime import losses
from sparsify.runtime.checkpoint import load_folder
from sparsify.runtime.router import Router
from sparsify.runtime.schedule import Schedule
from sparsify.runtime.sparsity_losses import Adaptive
from sparsify.training_hf import LOSSES, Auxiliary, as_modules, as_weights
from tests.contract.zoo_captures import captured

transformers = pytest.importorskip("transformers")
IDS = torch.randint(0, 64, (16, 12), generator=torch.Generator().manual_seed(0))
DATA = [{"input_ids": row, "labels": row} for row in IDS]


def model(pipeline: str = "ffn-moe{experts=8}", name: str = "llama") -> Any:
    return sparsify.compile(
        captured(name), pipeline, calibration=[IDS[:8]], active=0.5, share=False
    )


def trainer(made: Any, auxiliary: Auxiliary, folder: Path, **options: Any) -> Any:
    args: dict[str, Any] = {
        "max_steps": 4, "save_steps": 2, "learning_rate": 3e-3, "per_device_train_batch_size": 4,
        "report_to": [], "use_cpu": True, "disable_tqdm": True, **options,
    }  # fmt: skip
    return transformers.Trainer(
        made, transformers.TrainingArguments(str(folder), **args), train_dataset=DATA,
        compute_loss_func=auxiliary.trainer_loss, callbacks=[auxiliary.trainer_callback()],
    )  # fmt: skip


def same(one: Any, two: Any) -> bool:
    a, b = one.state_dict(), two.state_dict()
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


# ---------------------------------------------------------------------------- Trainer


def test_trainer_trains_follows_the_schedule_and_resumes(tmp_path: Path) -> None:
    made = model()
    before = made(input_ids=IDS, labels=IDS).loss.item()
    auxiliary = Auxiliary(made, {"balance": 0.01, "z": 1e-3}, schedule=Schedule(0.5, 3))
    seen: list[float] = []

    class Watch(transformers.TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            seen.append(next(iter(made.active.values())))

    running = trainer(made, auxiliary, tmp_path)
    running.add_callback(Watch())
    running.train()
    assert seen == pytest.approx([1.0, 0.5 + 0.5 * (2 / 3) ** 3, 0.5 + 0.5 / 27, 0.5], abs=0.07)
    made.eval()
    assert made(input_ids=IDS, labels=IDS).loss.item() < before
    assert not any(m.keep for m in made.modules() if isinstance(m, Router))  # it stopped recording
    again = model()
    auxiliary = Auxiliary(again, {"balance": 0.01, "z": 1e-3}, schedule=Schedule(0.5, 3))
    trainer(again, auxiliary, tmp_path).train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert same(made, again)
    saved = sparsify.load(tmp_path / "checkpoint-4")
    assert torch.equal(saved(IDS).logits, made(IDS).logits)


def test_an_adaptive_coefficient_is_in_the_checkpoint(tmp_path: Path) -> None:
    pipeline = "ffn-moe{experts=8 router=relu}"
    made = model(pipeline)
    auxiliary = Auxiliary(made, l1=Adaptive(1e-3, rate=1.5))
    trainer(made, auxiliary, tmp_path).train()
    assert auxiliary.l1 is not None
    end = auxiliary.l1.value
    assert end != 1e-3
    again = model(pipeline)
    resumed = Auxiliary(again, l1=Adaptive(1e-3, rate=1.5))
    trainer(again, resumed, tmp_path).train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert resumed.l1 is not None and resumed.l1.value == end
    assert same(made, again)


def test_gradient_accumulation_is_the_large_batch(tmp_path: Path) -> None:
    found = []
    for size, parts in ((8, 1), (4, 2)):
        made = model()
        running = trainer(
            made, Auxiliary(made, {"z": 0.1}), tmp_path, max_steps=1, save_strategy="no", seed=3,
            per_device_train_batch_size=size, gradient_accumulation_steps=parts, optim="sgd",
            learning_rate=0.1, max_grad_norm=0.0,
        )  # fmt: skip
        running.train()
        found.append({n: p.detach().clone() for n, p in made.named_parameters()})
    for name, value in found[0].items():
        torch.testing.assert_close(found[1][name], value, rtol=1e-4, atol=1e-6, msg=name)


def test_a_model_without_its_class_trains_too(tmp_path: Path) -> None:
    model().save(tmp_path / "saved")
    plain = load_folder(tmp_path / "saved")
    assert not isinstance(plain, transformers.PreTrainedModel)
    before = plain(input_ids=IDS, labels=IDS).loss.item()
    part = plain(input_ids=IDS, labels=IDS, num_items_in_batch=500).loss.item()
    assert part == pytest.approx(before * IDS[:, 1:].numel() / 500)
    auxiliary = Auxiliary(plain, {"balance": 0.01})
    trainer(
        plain, auxiliary, tmp_path / "out", remove_unused_columns=False, save_strategy="no",
        label_names=["labels"],
    ).train()  # fmt: skip
    assert plain.eval()(input_ids=IDS, labels=IDS).loss.item() < before


# ---------------------------------------------------------------------------- accelerate


def test_accelerate_in_a_plain_loop(tmp_path: Path) -> None:
    accelerate = pytest.importorskip("accelerate")
    pipeline = "ffn-moe{experts=8 router=sigmoid-top-k}"
    made = model(pipeline).train()
    auxiliary = Auxiliary(made, {"balance": 0.1}, correction=0.01, schedule=Schedule(0.5, 2))
    accelerator = accelerate.Accelerator(cpu=True)
    optimizer = torch.optim.AdamW(made.parameters(), 3e-3)
    loader = torch.utils.data.DataLoader(IDS, batch_size=4)
    ready, optimizer, loader = accelerator.prepare(made, optimizer, loader)
    accelerator.register_for_checkpointing(auxiliary)
    losses_seen = []
    with auxiliary:
        for step, ids in enumerate(loader):
            auxiliary.before_step(step)
            loss = ready(input_ids=ids, labels=ids).loss
            accelerator.backward(loss + auxiliary.loss())
            optimizer.step()
            optimizer.zero_grad()
            auxiliary.after_step()
            losses_seen.append(loss.item())
    assert losses_seen[-1] < losses_seen[0]
    assert next(iter(made.active.values())) == 0.5
    biases = [m.correction for m in made.modules() if isinstance(m, Router)]
    assert all(b is not None and bool(b.any()) for b in biases)
    accelerator.save_state(str(tmp_path / "state"), safe_serialization=False)
    after = {n: t.clone() for n, t in made.state_dict().items()}
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.zero_()
    accelerator.load_state(str(tmp_path / "state"))
    assert all(torch.equal(t, after[n]) for n, t in made.state_dict().items())


# ---------------------------------------------------------------------------- the object


def test_the_loss_is_the_weighted_sum_and_reaches_the_routers() -> None:
    made = model().train()
    auxiliary = Auxiliary(made, {"balance": 0.5, "z": 0.25})
    with auxiliary:
        made(input_ids=IDS)
        total = auxiliary.loss()
        expected = 0.5 * losses.balance_loss(made) + 0.25 * losses.z_loss(made)
        torch.testing.assert_close(total, expected)
        total.backward()
    assert all(m.weight.grad.any() for m in made.modules() if isinstance(m, Router))
    assert float(Auxiliary(made).loss()) == 0.0


def test_bad_auxiliaries() -> None:
    made = model()
    with pytest.raises(BadInput, match="no auxiliary loss 'balanse'"):
        Auxiliary(made, {"balanse": 1.0})
    with pytest.raises(BadInput, match="'z' cannot count -1"):
        Auxiliary(made, {"z": -1.0})
    with pytest.raises(BadInput, match="no labels"):
        Auxiliary(made).trainer_loss(made(IDS), None)
    assert set(LOSSES) >= {"balance", "z"}


# ---------------------------------------------------------------------------- PEFT


@pytest.mark.parametrize("name", ["llama", "qwen3", "gpt2"])
def test_linears_become_modules_and_weights_again(name: str, tmp_path: Path) -> None:
    made = model("ffn-moe", name)
    expected, names = made(IDS).logits, list(made.state_dict())
    paths = as_modules(made)
    assert torch.equal(made(IDS).logits, expected)
    assert sorted(made.state_dict()) == sorted(names)
    assert all(type(made.get_submodule(p)) is torch.nn.Linear for p in paths)
    assert as_weights(made) == paths
    assert torch.equal(made(IDS).logits, expected)
    assert sorted(made.state_dict()) == sorted(names)
    made.save(tmp_path / "out")
    assert torch.equal(sparsify.load(tmp_path / "out")(IDS).logits, expected)


def test_peft_adapts_linears_and_experts_and_merges(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    made = model()
    before = made(IDS).logits
    assert {p.rpartition(".")[2] for p in as_modules(made)} >= {"q_proj", "k_proj", "v_proj"}
    adapted = peft.get_peft_model(
        made,
        peft.LoraConfig(
            r=2, task_type="CAUSAL_LM", target_modules=["q_proj", "v_proj"],
            target_parameters=["moe.up", "moe.gate", "moe.down"],
        ),
    )  # fmt: skip
    assert torch.equal(adapted(IDS).logits, before)
    trained = {n: p for n, p in adapted.named_parameters() if p.requires_grad}
    assert all("lora_" in n for n in trained)
    assert sum("lora_B" in n for n in trained) == 2 * 5  # two layers of q, v, up, gate, down
    optimizer = torch.optim.AdamW(trained.values(), 1e-2)
    seen = []
    for _ in range(4):
        loss = adapted(input_ids=IDS, labels=IDS).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        seen.append(loss.item())
    assert seen[-1] < seen[0] - 0.1
    assert all(bool(p.any()) for n, p in trained.items() if "lora_B" in n)
    with pytest.raises(BadInput, match="merge it first"):
        as_weights(made)
    adapted.eval().save_pretrained(str(tmp_path / "adapter"))  # the adapter alone
    wanted = adapted(IDS).logits
    merged = adapted.merge_and_unload()
    as_weights(merged)
    torch.testing.assert_close(merged(IDS).logits, wanted, rtol=1e-4, atol=1e-4)
    merged.save(tmp_path / "merged")
    assert torch.equal(sparsify.load(tmp_path / "merged")(IDS).logits, merged(IDS).logits)
    other = model()
    as_modules(other)
    loaded = peft.PeftModel.from_pretrained(other, str(tmp_path / "adapter"))
    torch.testing.assert_close(loaded(IDS).logits, wanted)
