"""A setting of the dials as a pipeline text: ``hidden-route{active@PATHS=0.6 ...}``."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from sparsify.pipeline import Placed
from sparsify.report_groups import collapse
from sparsify.searching_units import Setting
from sparsify.text import Local, parse, unparse


def pipeline_text(passes: str, placed: Sequence[Placed], setting: Setting) -> str:
    """``passes`` with a budget for each region.

    Args:
        placed: all that a compilation of ``passes`` placed.
        setting: a budget for each router; one that is missing keeps everything live.
    """
    stages = []
    for number, stage in enumerate(parse(passes)):
        by_value: dict[float, list[str]] = {}
        mine = [p for p in placed if p.stage == number and p.routers]
        for each in mine:
            by_value.setdefault(setting.get(each.routers[0], 1.0), []).append(each.region)
        options = {k: v for k, v in stage.options.items() if k != "active"}
        local: list[Local] = [entry for entry in stage.local if entry[0] != "active"]
        for value, paths in sorted(by_value.items()):
            pattern = "*" if len(paths) == len(mine) else "|".join(collapse(paths))
            if value < 1:
                local.append(("active", pattern, value))
        stages.append(dataclasses.replace(stage, options=options, local=tuple(local)))
    return unparse(stages)
