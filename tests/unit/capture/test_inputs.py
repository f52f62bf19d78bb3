"""Natural inputs of transformers models, and the forms in which examples come."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from sparsify.capture import capture
from sparsify.capture.inputs import given, natural
from sparsify.errors import BadInput, CaptureFailed

transformers = pytest.importorskip("transformers")


@pytest.mark.parametrize(
    "example",
    [
        torch.ones(2, 3),
        (torch.ones(2, 3),),
        [torch.ones(2, 3)],
        ((torch.ones(2, 3),), {}),
        {"x": torch.ones(2, 3)},
        ((), {"x": torch.ones(2, 3)}),
    ],
)
def test_examples_come_in_any_usual_form(example: object) -> None:
    args, kwargs = given(example)
    (value,) = [*args, *kwargs.values()]
    assert torch.equal(value, torch.ones(2, 3))


def test_other_examples_are_refused() -> None:
    with pytest.raises(BadInput):
        given(3)


def test_natural_inputs_follow_from_signature_and_config() -> None:
    bert = transformers.BertModel(
        transformers.BertConfig(
            hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=64,
            vocab_size=40,
        )
    )  # fmt: skip
    made = natural(bert)
    assert {"input_ids", "attention_mask"} <= made.keys()
    assert int(made["input_ids"].max()) < 40
    vit = transformers.ViTModel(
        transformers.ViTConfig(
            hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=64,
            image_size=(16, 24), patch_size=8, num_channels=1,
        )
    )  # fmt: skip
    assert natural(vit)["pixel_values"].shape == (2, 1, 16, 24)
    t5 = transformers.T5ForConditionalGeneration(
        transformers.T5Config(
            d_model=32, d_ff=64, num_layers=1, num_heads=2, d_kv=16, vocab_size=40
        )
    )
    made = natural(t5)
    assert made["use_cache"] is False
    assert made["decoder_input_ids"].shape != made["input_ids"].shape
    captured = capture(t5)
    assert captured.kind == "module"


def test_clip_gets_text_and_image() -> None:
    text = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1,
            "num_attention_heads": 2, "vocab_size": 50, "max_position_embeddings": 16,
            "eos_token_id": 49, "bos_token_id": 48, "pad_token_id": 0}  # fmt: skip
    vision = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1,
              "num_attention_heads": 2, "image_size": 16, "patch_size": 8}  # fmt: skip
    config = transformers.CLIPConfig(text_config=text, vision_config=vision, projection_dim=8)
    made = natural(transformers.CLIPModel(config))
    assert {"input_ids", "pixel_values"} <= made.keys()


def test_a_model_without_natural_inputs_asks_for_an_example() -> None:
    with pytest.raises(CaptureFailed, match="needs an example"):
        natural(nn.Linear(2, 2))
    bert = transformers.BertModel(
        transformers.BertConfig(
            hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=64
        )
    )
    bert.main_input_name = "odours"
    with pytest.raises(CaptureFailed, match="no natural inputs"):
        natural(bert)
