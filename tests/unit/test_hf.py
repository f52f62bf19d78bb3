"""The transformers shell: what worked with the dense model works with the sparse one."""

from __future__ import annotations

import copy
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch

from sparsify import hf
from sparsify.capture import capture
from sparsify.errors import BadCheckpoint, BadInput, NotCaptured
from sparsify.runtime.checkpoint import load_folder
from sparsify.runtime.model import SparseModel

transformers = pytest.importorskip("transformers")

SIZES: dict[str, Any] = {
    "vocab_size": 64, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
}  # fmt: skip
ROPE: dict[str, Any] = {
    **SIZES, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8,
}  # fmt: skip


def build(family: str) -> Any:
    make = {
        "llama": lambda t: t.LlamaForCausalLM(t.LlamaConfig(**ROPE, tie_word_embeddings=True)),
        "gemma2": lambda t: t.Gemma2ForCausalLM(t.Gemma2Config(**ROPE, sliding_window=4)),
        "gpt2": lambda t: t.GPT2LMHeadModel(
            t.GPT2Config(**SIZES, n_embd=32, n_layer=2, n_head=4, n_positions=64)
        ),
        "opt": lambda t: t.OPTForCausalLM(
            t.OPTConfig(
                **SIZES, hidden_size=32, ffn_dim=48, num_hidden_layers=2, num_attention_heads=4,
                max_position_embeddings=64, word_embed_proj_dim=32,
            )
        ),
    }[family]  # fmt: skip
    torch.manual_seed(0)
    model = make(transformers)
    with torch.no_grad():
        for parameter in model.parameters():  # so that greedy text is no single repeated token
            parameter.add_(torch.randn_like(parameter) * 0.2)
    return model.eval()


FAMILIES = ["llama", "gemma2", "gpt2", "opt"]


@pytest.fixture(scope="module", params=FAMILIES)
def pair(request: pytest.FixtureRequest) -> tuple[Any, Any]:
    return made(request.param)


_MADE: dict[str, tuple[Any, Any]] = {}


def made(family: str) -> tuple[Any, Any]:
    """(dense, sparse) of a family, captured once."""
    if family not in _MADE:
        dense = build(family)
        _MADE[family] = dense, hf.wrap(SparseModel.of(capture(dense)), dense)
    return _MADE[family]


@pytest.fixture
def batch() -> dict[str, torch.Tensor]:
    ids = torch.randint(3, 64, (2, 7), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    mask[0, :3] = 0  # left padding
    return {"input_ids": ids, "attention_mask": mask}


def test_it_still_is_what_the_user_had(pair, batch) -> None:
    dense, sparse = pair
    assert isinstance(sparse, type(dense))
    assert isinstance(sparse, SparseModel)
    assert sparse.config.to_dict() == dense.config.to_dict()
    assert sparse.config is not dense.config
    assert sparse.num_parameters() == dense.num_parameters()
    assert sparse.state_dict().keys() == dense.state_dict().keys()
    assert sparse.get_input_embeddings().weight is dense.get_input_embeddings().weight
    assert sparse.device == dense.device
    assert sparse.dtype == dense.dtype
    assert sparse.can_generate()
    mine, theirs = sparse(**batch), dense(**batch)
    assert type(mine) is type(theirs)
    valid = batch["attention_mask"].bool()
    torch.testing.assert_close(mine.logits[valid], theirs.logits[valid])
    assert type(mine.past_key_values) is type(theirs.past_key_values)


def test_logits_continue_on_a_cache_that_is_changed_in_place(pair, batch) -> None:
    dense, sparse = pair
    ids = batch["input_ids"]
    whole = dense(ids).logits
    cache = transformers.DynamicCache(config=dense.config)  # sliding layers where the model slides
    sparse(ids[:, :4], past_key_values=cache)
    assert cache.get_seq_length() == 4
    out = sparse(ids[:, 4:], past_key_values=cache)
    torch.testing.assert_close(out.logits, whole[:, 4:])
    assert out.past_key_values is cache
    assert cache.get_seq_length() == 7


@pytest.mark.parametrize(
    "options",
    [{"do_sample": False}, {"do_sample": False, "num_beams": 3}, {"do_sample": True, "top_k": 5}],
    ids=["greedy", "beam", "sample"],
)
def test_generate_gives_the_same_text(pair, batch, options) -> None:
    texts = []
    for model in pair:
        torch.manual_seed(0)
        texts.append(model.generate(**batch, max_new_tokens=8, **options))
    assert torch.equal(*texts)


def test_the_plain_loop_gives_the_same_text(pair, batch) -> None:
    dense, sparse = pair
    theirs = dense.generate(**batch, max_new_tokens=8, do_sample=False)
    ours = SparseModel.generate(sparse, **batch, max_new_tokens=8, eos_token_id=2, pad_token_id=0)
    assert torch.equal(ours[:, : theirs.shape[1]], theirs)


def test_loss_and_gradients_are_the_same(pair, batch) -> None:
    dense = pair[0]
    grads = []
    for model in pair:
        dense.zero_grad()
        loss = model(**batch, labels=batch["input_ids"], num_items_in_batch=9).loss
        loss.backward()
        grads.append({n: p.grad.clone() for n, p in model.named_parameters()})
    dense.zero_grad()
    assert grads[0].keys() == grads[1].keys()
    for name, grad in grads[0].items():
        torch.testing.assert_close(grads[1][name], grad)


def test_folders_come_back_through_transformers(pair, batch, tmp_path, monkeypatch) -> None:
    dense, sparse = pair
    sparse.save_pretrained(tmp_path / "m")
    again = hf.attach(load_folder(tmp_path / "m"), tmp_path / "m")
    assert isinstance(again, type(dense))
    texts = [m.generate(**batch, max_new_tokens=6, do_sample=False) for m in (sparse, again)]
    assert torch.equal(*texts)
    sparse.save_pretrained(tmp_path / "m")  # as transformers: saving over a save is fine


def small() -> tuple[Any, Any]:
    return made("llama")


def test_auto_model_loads_with_trust_and_refuses_without(tmp_path, batch, monkeypatch) -> None:
    dense, sparse = small()
    sparse.save(tmp_path / "m")
    import sparsify

    monkeypatch.setattr(  # the front door may not be there yet: only attach is under test
        sparsify, "load", lambda path: hf.attach(load_folder(path), path), raising=False
    )
    auto = transformers.AutoModelForCausalLM
    again = auto.from_pretrained(tmp_path / "m", trust_remote_code=True)
    assert isinstance(again, SparseModel)
    assert isinstance(again, type(dense))
    torch.testing.assert_close(again(**batch).logits, sparse(**batch).logits)
    half = auto.from_pretrained(tmp_path / "m", trust_remote_code=True, dtype=torch.bfloat16)
    assert half.dtype is torch.bfloat16
    with pytest.raises(OSError, match=r"safetensors|bin"):
        auto.from_pretrained(tmp_path / "m", trust_remote_code=False)


def test_tokenizer_files_travel_with_the_model(tmp_path) -> None:
    class Tokenizer:
        def save_pretrained(self, folder: str) -> None:
            (Path(folder) / "tokenizer.json").write_text("{}")

    sparse = copy.deepcopy(small()[1])
    sparse.tokenizer = Tokenizer()
    sparse.save(tmp_path / "m")
    names = {p.name for p in (tmp_path / "m").iterdir()}
    assert {"config.json", "generation_config.json", "tokenizer.json", hf.REMOTE_CODE} <= names
    assert "model.safetensors" not in names


def test_an_unknown_class_in_a_folder_is_refused(tmp_path) -> None:
    _, sparse = small()
    sparse.save(tmp_path / "m")
    manifest = tmp_path / "m" / "sparsify.json"
    manifest.write_text(manifest.read_text().replace('"LlamaForCausalLM"', '"pipeline"'))
    with pytest.raises(BadCheckpoint, match="no class 'pipeline'"):
        hf.attach(load_folder(tmp_path / "m"), tmp_path / "m")


def test_moves_copies_and_modes(batch) -> None:
    dense, sparse = small()
    twin = copy.deepcopy(sparse)
    twin.bfloat16()
    half = copy.deepcopy(dense).bfloat16()
    valid = batch["attention_mask"].bool()
    assert torch.equal(twin(**batch).logits[valid], half(**batch).logits[valid])
    assert twin.generate(**batch, max_new_tokens=3).shape[0] == 2
    assert dense.dtype is sparse.dtype is torch.float32
    assert twin.train().training
    assert twin.lm_head.weight is twin.model.embed_tokens.weight
    assert not twin.requires_grad_(False)(**batch).logits.requires_grad


@pytest.mark.parametrize(
    ("kwargs", "says"),
    [
        ({"inputs_embeds": torch.ones(2, 7, 32)}, "token ids"),
        ({"output_attentions": True}, "output_attentions"),
        ({"output_hidden_states": True}, "output_hidden_states"),
        ({"attention_mask": torch.ones(2, 1, 7, 7)}, "padding mask"),
        ({"attention_mask": torch.ones(2, 5)}, "attention_mask has shape"),
        ({"lables": torch.ones(2, 7)}, "did you mean 'labels'"),
        ({"input_ids": None}, "input_ids are missing"),
        ({"past_key_values": object()}, "cannot use a object"),
    ],
)
def test_calls_that_are_not_covered_say_why(batch, kwargs, says) -> None:
    _, sparse = small()
    with pytest.raises(NotCaptured, match=says):
        sparse(**{**batch, **kwargs})


def test_usual_arguments_are_understood(batch) -> None:
    dense, sparse = small()
    ids = batch["input_ids"]
    sparse(ids, output_attentions=False, return_dict=True, cache_position=torch.arange(7))
    plain = sparse(ids, use_cache=False)
    assert plain.past_key_values is None
    assert isinstance(sparse(ids, return_dict=False), tuple)
    assert sparse(ids, logits_to_keep=2).logits.shape[1] == 2
    legacy = [(layer.keys, layer.values) for layer in sparse(ids).past_key_values.layers]
    more = sparse(ids[:, :1], past_key_values=legacy)
    assert more.past_key_values.get_seq_length() == 8
    torch.testing.assert_close(
        sparse(ids, position_ids=torch.arange(2, 9)[None]).logits,
        dense(ids, position_ids=torch.arange(2, 9)[None]).logits,
    )


def test_a_cache_that_lost_its_past_is_refused() -> None:
    dense, sparse = made("gemma2")
    ids = torch.randint(3, 64, (1, 9))
    cache = transformers.DynamicCache(config=dense.config)
    dense(ids, past_key_values=cache)  # window 4: the dense model drops keys
    with pytest.raises(NotCaptured, match="sliding window"):
        sparse(ids[:, :1], past_key_values=cache)
    short = transformers.DynamicCache(config=dense.config)
    dense(ids[:, :2], past_key_values=short)
    torch.testing.assert_close(
        sparse(ids[:, 2:], past_key_values=short).logits, dense(ids).logits[:, 2:]
    )


def test_static_caches_are_refused_with_advice(batch) -> None:
    _, sparse = small()
    with pytest.raises(NotCaptured, match=r"StaticCache|padding mask"):
        sparse.generate(**batch, max_new_tokens=3, cache_implementation="static")


def test_what_a_graph_cannot_do_is_refused() -> None:
    _, sparse = small()
    for call in (
        sparse.gradient_checkpointing_enable,
        lambda: sparse.resize_token_embeddings(70),
        lambda: sparse.set_attn_implementation("eager"),
    ):
        with pytest.raises(NotCaptured):
            call()
    with pytest.raises(BadInput, match="push_to_hub"):
        sparse.save_pretrained("/nowhere", push_to_hub=True)


def test_the_dense_model_is_not_kept_alive_or_changed() -> None:
    dense = build("llama")
    config = copy.deepcopy(dense.config.to_dict())
    sparse = hf.wrap(SparseModel.of(capture(dense)), dense)
    held = {id(m) for m in dense.modules()}
    assert not held & {id(m) for m in sparse.modules()}
    assert not any(id(value) in held for value in sparse.__dict__.values())
    assert dense.config.to_dict() == config
    assert "forward" not in dense.__dict__


def test_other_models_keep_class_call_and_results(batch, tmp_path) -> None:
    config = transformers.BertConfig(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=1,
        num_attention_heads=4,
    )  # fmt: skip
    dense = transformers.BertForSequenceClassification(config).eval()
    sparse = hf.wrap(SparseModel.of(capture(dense)), dense)
    mine, theirs = sparse(**batch), dense(**batch)
    assert type(mine) is type(theirs)
    torch.testing.assert_close(mine.logits, theirs.logits)
    assert isinstance(sparse(**batch, return_dict=False), tuple)
    with pytest.raises(NotCaptured, match="loss"):
        sparse(**batch, labels=torch.tensor([0, 1]))
    sparse.save(tmp_path / "m")
    again = hf.attach(load_folder(tmp_path / "m"), tmp_path / "m")
    assert isinstance(again, type(dense))
    torch.testing.assert_close(again(**batch).logits, theirs.logits)


def test_encoder_decoders_do_not_generate() -> None:
    config = transformers.T5Config(
        d_model=32, d_ff=48, num_layers=1, num_heads=4, d_kv=8, vocab_size=64
    )
    dense = transformers.T5ForConditionalGeneration(config).eval()
    sparse = hf.wrap(SparseModel.of(capture(dense)), dense)
    ids = torch.randint(3, 64, (2, 5))
    torch.testing.assert_close(
        sparse(input_ids=ids, attention_mask=torch.ones_like(ids), decoder_input_ids=ids).logits,
        dense(input_ids=ids, decoder_input_ids=ids).logits,
    )
    with pytest.raises(NotCaptured, match="generate"):
        sparse.generate(ids)


def test_plain_modules_need_no_shell() -> None:
    dense = torch.nn.Linear(3, 3)
    sparse = SparseModel.of(capture(dense, torch.randn(2, 3)))
    assert hf.wrap(sparse, dense) is sparse


def test_trainer_takes_a_step(tmp_path) -> None:
    pytest.importorskip("accelerate")
    dense, _ = small()
    sparse = copy.deepcopy(small()[1])
    before = copy.deepcopy(sparse.state_dict())
    rows = [{"input_ids": torch.randint(3, 64, (6,))} for _ in range(4)]
    rows = [{**row, "labels": row["input_ids"].clone()} for row in rows]
    arguments = transformers.TrainingArguments(
        output_dir=str(tmp_path), max_steps=2, per_device_train_batch_size=2, report_to=[],
        learning_rate=1e-2, use_cpu=True, save_strategy="no", disable_tqdm=True,
    )  # fmt: skip
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        transformers.Trainer(model=sparse, args=arguments, train_dataset=rows).train()
    changed = [k for k, v in sparse.state_dict().items() if not torch.equal(v, before[k])]
    assert len(changed) > len(before) / 2
    assert not torch.equal(sparse.lm_head.weight, dense.lm_head.weight)
    assert sparse.lm_head.weight is sparse.model.embed_tokens.weight
