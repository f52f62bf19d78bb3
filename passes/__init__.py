"""Routing ideas, one file each: ``ffn_moe.py`` is the pass ``ffn-moe``; ``_x.py`` is shared."""
