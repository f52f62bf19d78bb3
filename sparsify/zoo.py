"""Tiny random models of the architectures that sparsify is held against.

``build("llama")`` gives a two-layer model with the structure of the real one and random weights: it
loads in milliseconds and needs no network. Weights are drawn so that nothing is degenerate: unit
variance through every projection, biases and norm gains that are neither zero nor one (freshly made
Hugging Face models have zero biases, which would hide a lost bias). ``attention`` and
``feed_forward`` say how many regions a matcher has to find.

Importing this module loads neither torch nor transformers.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import math
from typing import TYPE_CHECKING, Any

from sparsify.errors import MissingDependency, ModelNotFound, did_you_mean

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import nn

Example = tuple[tuple[Any, ...], dict[str, Any]]

WIDTH, FFN, HEADS, KV_HEADS, LAYERS, VOCAB = 32, 96, 4, 2, 2, 128
BATCH, TOKENS = 2, 8


@dataclasses.dataclass(frozen=True)
class ZooModel:
    """A model of the zoo.

    Attributes:
        name: the name it was built by.
        model: in eval mode, float32, on the CPU.
        example: (args, kwargs) of one call with batch 2, or None for Hugging Face causal LMs, which
            are captured with their own protocol (ids, mask, cache).
        attention, feed_forward: how many regions of each kind it has.
        needs: distributions it needs besides torch.
    """

    name: str
    model: nn.Module
    example: Example | None
    attention: int
    feed_forward: int
    needs: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True)
class _Entry:
    make: Callable[[], tuple[nn.Module, Example | None]]
    attention: int
    feed_forward: int
    needs: tuple[str, ...]


_ZOO: dict[str, _Entry] = {}


def names() -> tuple[str, ...]:
    """All names of the zoo, in the order in which they are defined."""
    return tuple(_ZOO)


def needs(name: str) -> tuple[str, ...]:
    """The distributions that ``name`` needs besides torch."""
    return _entry(name).needs


def build(name: str, *, seed: int = 0) -> ZooModel:
    """The model called ``name``; the same weights every time for one ``seed``.

    Raises:
        ModelNotFound: no such name.
        MissingDependency: the library that defines the architecture is not installed.
    """
    entry = _entry(name)
    for need in entry.needs:
        if importlib.util.find_spec(need) is None:
            raise MissingDependency(f"zoo:{name} needs {need}", help=f"pip install {need}")
    import torch

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model, example = entry.make()
        model = model.eval().float()
        _randomise(model)
    return ZooModel(name, model, example, entry.attention, entry.feed_forward, entry.needs)


def _entry(name: str) -> _Entry:
    if name not in _ZOO:
        hint = did_you_mean(name, _ZOO)
        known = f"the zoo has: {', '.join(_ZOO)}"
        raise ModelNotFound(
            f"no model named 'zoo:{name}'", help=f"{hint}\n{known}" if hint else known
        )
    return _ZOO[name]


def _randomise(model: nn.Module) -> None:
    """Draws every trainable parameter so that no activation vanishes, saturates or is special."""
    import torch

    with torch.no_grad():
        for parameter in model.parameters():
            if not parameter.requires_grad:
                continue  # a fixed table, such as Whisper's sinusoids
            if parameter.ndim < 2:
                # norm gains stay near their start (0 or 1), biases leave zero
                parameter.add_(torch.randn_like(parameter) * 0.2)
            else:
                convolution = parameter.ndim > 3
                fan_in = math.prod(parameter.shape[1:]) if convolution else parameter.shape[-1]
                parameter.copy_(torch.randn_like(parameter) / math.sqrt(fan_in))


def _zoo(
    name: str, attention: int, feed_forward: int, *requirements: str
) -> Callable[[Callable[[], tuple[nn.Module, Example | None]]], Callable[[], Any]]:
    def register(make: Callable[[], tuple[nn.Module, Example | None]]) -> Callable[[], Any]:
        _ZOO[name] = _Entry(make, attention, feed_forward, requirements)
        return make

    return register


def _ids(low: int = 3) -> Any:
    import torch

    return torch.randint(low, VOCAB, (BATCH, TOKENS))


# ------------------------------------------------------------ decoders (Hugging Face causal LMs)

_DECODER = {
    "vocab_size": VOCAB,
    "hidden_size": WIDTH,
    "intermediate_size": FFN,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
    "num_key_value_heads": KV_HEADS,
    "max_position_embeddings": 256,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
    "tie_word_embeddings": False,
}


def _causal(family: str, attention: str = "sdpa", **config: Any) -> nn.Module:
    """``transformers.<family>ForCausalLM`` from the decoder sizes, overridden by ``config``."""
    import transformers

    suffix = "TextConfig" if family == "Gemma3" else "Config"
    options = {**_DECODER, **config}
    settings = getattr(transformers, f"{family}{suffix}")(**options)
    settings._attn_implementation = attention
    model: nn.Module = getattr(transformers, f"{family}ForCausalLM")(settings)
    return model


def _register_decoders() -> None:
    layers = LAYERS
    decoders: dict[str, tuple[str, dict[str, Any]]] = {
        "llama": ("Llama", {}),
        "llama-eager": ("Llama", {"attention": "eager"}),
        "mistral": ("Mistral", {"sliding_window": 4}),
        "qwen2": ("Qwen2", {}),
        "qwen3": ("Qwen3", {"head_dim": 16}),
        "gemma2": ("Gemma2", {
            "attention": "eager", "head_dim": 16, "query_pre_attn_scalar": 16, "sliding_window": 4,
            "attn_logit_softcapping": 5.0, "final_logit_softcapping": 10.0,
            "tie_word_embeddings": True,
        }),
        "gemma3": ("Gemma3", {
            "head_dim": 16, "query_pre_attn_scalar": 16, "sliding_window": 4,
            "layer_types": ["sliding_attention", "full_attention"], "tie_word_embeddings": True,
        }),
        "phi3": ("Phi3", {"original_max_position_embeddings": 256}),
        "phi": ("Phi", {"num_key_value_heads": HEADS, "partial_rotary_factor": 0.5}),
        "gpt-neox": ("GPTNeoX", {"rotary_pct": 0.25}),
    }  # fmt: skip
    for name, (family, options) in decoders.items():

        def make(family: str = family, options: dict[str, Any] = options) -> Any:
            return _causal(family, **options), None

        _zoo(name, layers, layers, "transformers")(make)


_register_decoders()


@_zoo("gpt2", LAYERS, LAYERS, "transformers")
def _gpt2() -> tuple[nn.Module, None]:
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(
        vocab_size=VOCAB, n_positions=256, n_embd=WIDTH, n_layer=LAYERS, n_head=HEADS, n_inner=FFN,
        bos_token_id=1, eos_token_id=2, pad_token_id=0,
    )  # fmt: skip
    return GPT2LMHeadModel(config), None


@_zoo("opt", LAYERS, LAYERS, "transformers")
def _opt() -> tuple[nn.Module, None]:
    from transformers import OPTConfig, OPTForCausalLM

    config = OPTConfig(
        vocab_size=VOCAB, hidden_size=WIDTH, ffn_dim=FFN, num_hidden_layers=LAYERS,
        num_attention_heads=HEADS, max_position_embeddings=256, word_embed_proj_dim=WIDTH,
        bos_token_id=1, eos_token_id=2, pad_token_id=0,
    )  # fmt: skip
    return OPTForCausalLM(config), None


# ------------------------------------------------------------ encoders and the rest of Hugging Face


@_zoo("bert", LAYERS, LAYERS, "transformers")
def _bert() -> tuple[nn.Module, Example]:
    import torch
    from transformers import BertConfig, BertModel

    config = BertConfig(
        vocab_size=VOCAB, hidden_size=WIDTH, num_hidden_layers=LAYERS, num_attention_heads=HEADS,
        intermediate_size=FFN, max_position_embeddings=64,
    )  # fmt: skip
    mask = torch.ones(BATCH, TOKENS, dtype=torch.long)
    mask[1, TOKENS - 2 :] = 0  # the second text is shorter
    return BertModel(config), ((), {"input_ids": _ids(), "attention_mask": mask})


@_zoo("t5", 3 * LAYERS, 2 * LAYERS, "transformers")
def _t5() -> tuple[nn.Module, Example]:
    from transformers import T5Config, T5ForConditionalGeneration

    config = T5Config(
        vocab_size=VOCAB, d_model=WIDTH, d_kv=WIDTH // HEADS, d_ff=FFN, num_layers=LAYERS,
        num_heads=HEADS, relative_attention_num_buckets=8, relative_attention_max_distance=16,
        use_cache=False, pad_token_id=0, eos_token_id=1,
    )  # fmt: skip
    config.decoder_start_token_id = 0
    kwargs = {"input_ids": _ids(), "decoder_input_ids": _ids()[:, : TOKENS - 2].clone()}
    return T5ForConditionalGeneration(config), ((), kwargs)


def _vision(family: str, **config: Any) -> tuple[nn.Module, Example]:
    import torch
    import transformers

    settings = getattr(transformers, f"{family}Config")(
        hidden_size=WIDTH, num_hidden_layers=LAYERS, num_attention_heads=HEADS, image_size=16,
        patch_size=4, num_channels=3, **config,
    )  # fmt: skip
    model: nn.Module = getattr(transformers, f"{family}Model")(settings)
    return model, ((), {"pixel_values": torch.randn(BATCH, 3, 16, 16)})


@_zoo("vit", LAYERS, LAYERS, "transformers")
def _vit() -> tuple[nn.Module, Example]:
    return _vision("ViT", intermediate_size=FFN)


@_zoo("dinov2", LAYERS, LAYERS, "transformers")
def _dinov2() -> tuple[nn.Module, Example]:
    return _vision("Dinov2", mlp_ratio=3)


@_zoo("whisper-encoder", LAYERS, LAYERS, "transformers")
def _whisper() -> tuple[nn.Module, Example]:
    import torch
    from transformers import WhisperConfig
    from transformers.models.whisper.modeling_whisper import WhisperEncoder

    config = WhisperConfig(
        vocab_size=VOCAB, num_mel_bins=16, encoder_layers=LAYERS, encoder_attention_heads=HEADS,
        decoder_layers=1, decoder_attention_heads=HEADS, encoder_ffn_dim=FFN, d_model=WIDTH,
        max_source_positions=10, pad_token_id=0, bos_token_id=1, eos_token_id=2,
        decoder_start_token_id=1,
    )  # fmt: skip
    return WhisperEncoder(config), ((), {"input_features": torch.randn(BATCH, 16, 20)})


@_zoo("dit", LAYERS, LAYERS, "diffusers")
def _dit() -> tuple[nn.Module, Example]:
    import diffusers
    import torch

    model: nn.Module = getattr(diffusers, "DiTTransformer2DModel")(  # noqa: B009  (untyped)
        num_attention_heads=HEADS, attention_head_dim=WIDTH // HEADS, in_channels=4, out_channels=4,
        num_layers=LAYERS, sample_size=8, patch_size=2, num_embeds_ada_norm=10,
    )  # fmt: skip
    kwargs: dict[str, Any] = {
        "hidden_states": torch.randn(BATCH, 4, 8, 8),
        "timestep": torch.tensor([10, 500]),
        "class_labels": torch.tensor([1, 3]),
        "return_dict": False,
    }
    return model, ((), kwargs)


# ------------------------------------------------------------ plain PyTorch


def _transformer_encoder(norm_first: bool) -> tuple[nn.Module, Example]:
    import torch
    from torch import nn

    layer = nn.TransformerEncoderLayer(
        WIDTH, HEADS, FFN, activation="gelu", batch_first=True, norm_first=norm_first
    )
    # the nested-tensor fast path is data dependent and cannot be captured
    model = nn.TransformerEncoder(layer, LAYERS, enable_nested_tensor=False)
    return model, ((torch.randn(BATCH, TOKENS, WIDTH),), {})


@_zoo("transformer-encoder-prenorm", LAYERS, LAYERS)
def _prenorm() -> tuple[nn.Module, Example]:
    return _transformer_encoder(norm_first=True)


@_zoo("transformer-encoder-postnorm", LAYERS, LAYERS)
def _postnorm() -> tuple[nn.Module, Example]:
    return _transformer_encoder(norm_first=False)


@_zoo("nanogpt", LAYERS, LAYERS)
def _nanogpt() -> tuple[nn.Module, Example]:
    import torch
    from torch import Tensor, nn
    from torch.nn import functional

    class CausalSelfAttention(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.c_attn = nn.Linear(WIDTH, 3 * WIDTH)
            self.c_proj = nn.Linear(WIDTH, WIDTH)

        def forward(self, x: Tensor) -> Tensor:
            batch, tokens, width = x.size()
            q, k, v = self.c_attn(x).split(width, dim=2)
            q = q.view(batch, tokens, HEADS, width // HEADS).transpose(1, 2)
            k = k.view(batch, tokens, HEADS, width // HEADS).transpose(1, 2)
            v = v.view(batch, tokens, HEADS, width // HEADS).transpose(1, 2)
            y = functional.scaled_dot_product_attention(q, k, v, is_causal=True)
            y = y.transpose(1, 2).contiguous().view(batch, tokens, width)
            out: Tensor = self.c_proj(y)
            return out

    class MLP(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.c_fc = nn.Linear(WIDTH, FFN)
            self.gelu = nn.GELU()
            self.c_proj = nn.Linear(FFN, WIDTH)

        def forward(self, x: Tensor) -> Tensor:
            out: Tensor = self.c_proj(self.gelu(self.c_fc(x)))
            return out

    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.ln_1 = nn.LayerNorm(WIDTH)
            self.attn = CausalSelfAttention()
            self.ln_2 = nn.LayerNorm(WIDTH)
            self.mlp = MLP()

        def forward(self, x: Tensor) -> Tensor:
            x = x + self.attn(self.ln_1(x))
            out: Tensor = x + self.mlp(self.ln_2(x))
            return out

    class NanoGPT(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.wte = nn.Embedding(VOCAB, WIDTH)
            self.wpe = nn.Embedding(256, WIDTH)
            self.h = nn.ModuleList(Block() for _ in range(LAYERS))
            self.ln_f = nn.LayerNorm(WIDTH)
            self.lm_head = nn.Linear(WIDTH, VOCAB, bias=False)

        def forward(self, idx: Tensor) -> Tensor:
            position = torch.arange(idx.shape[1], device=idx.device)
            x = self.wte(idx) + self.wpe(position)
            for block in self.h:
                x = block(x)
            out: Tensor = self.lm_head(self.ln_f(x))
            return out

    return NanoGPT(), ((_ids(),), {})


@_zoo("conv", 0, 0)
def _conv() -> tuple[nn.Module, Example]:
    """Nothing to route: a convolution net whose one MLP adds to no residual stream."""
    import torch
    from torch import Tensor, nn

    class ConvNet(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem = nn.Conv2d(3, 16, 3, padding=1)
            self.body = nn.Conv2d(16, WIDTH, 3, stride=2, padding=1)
            self.up = nn.Linear(WIDTH, FFN)
            self.down = nn.Linear(FFN, WIDTH)
            self.head = nn.Linear(WIDTH, 10)

        def forward(self, image: Tensor) -> Tensor:
            x = torch.relu(self.body(torch.relu(self.stem(image)))).mean((2, 3))
            x = self.down(torch.relu(self.up(x)))  # no residual: not a feed-forward region
            out: Tensor = self.head(x)
            return out

    return ConvNet(), ((torch.randn(BATCH, 3, 16, 16),), {})
