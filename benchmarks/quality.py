"""Perplexity beside static pruning and TEAL, a look: benchmarks/quality/text.py on 4,096 tokens.

``python benchmarks/quality.py`` takes about ten minutes of two cores; it takes the options of that
script, ``--pipeline`` any passes. The tables of 25,600 tokens a text, of questions and of
embeddings are made by the scripts in benchmarks/quality/.
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent / "quality"))

from text import main

if __name__ == "__main__":
    main(tokens=4096)
