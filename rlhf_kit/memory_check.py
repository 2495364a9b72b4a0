"""Memory as the plan predicted it beside memory as a GPU measured it, after the first step."""

from __future__ import annotations

import torch

from rlhf_kit import distributed
from rlhf_kit.chat_template import first_line
from rlhf_kit.config import RunConfig
from rlhf_kit.hybrid_engine.memory import GIB, Plan
from rlhf_kit.metrics import Phases
from rlhf_kit.types import Stage


def compare(config: RunConfig, stage: Stage, phases: Phases) -> dict[str, float]:
    """`memory/<phase>/predicted_gib` and `measured_gib` of the first step of a stage, printed too.

    Measured is the fullest rank. All ranks must call it. Without a GPU nothing is measured, and
    the result is empty.
    """
    if not torch.cuda.is_available():
        distributed.print_main(
            "memory: nothing is measured on a CPU; rlhf-kit plan says what a GPU would take"
        )
        return {}
    device = distributed.local_device()
    measured = {
        name: float(distributed.all_max(torch.tensor(phase.peak_bytes, device=device)))
        for name, phase in phases.totals.items()
    }
    if not distributed.is_main_rank():
        return {}
    try:
        plan = Plan.of(config, ranks=distributed.world_size(), first=True)
        predicted = plan.peaks(stage)
    except Exception as error:  # a run is worth more than its prediction
        distributed.print_main(f"memory: it could not be predicted ({first_line(error)})")
        return {}
    values = {}
    for name in measured.keys() & predicted.keys():
        values[f"memory/{name}/predicted_gib"] = predicted[name] / GIB
        values[f"memory/{name}/measured_gib"] = measured[name] / GIB
    distributed.print_main("\n".join(lines(values)))
    return values


def lines(values: dict[str, float]) -> list[str]:
    """What `compare` found, as a table."""
    names = [key.split("/")[1] for key in values if key.endswith("/predicted_gib")]
    rows = [f"{'memory, peak GiB':18}{'predicted':>10}{'measured':>10}"]
    for name in names:
        predicted, measured = (values[f"memory/{name}/{x}_gib"] for x in ("predicted", "measured"))
        rows.append(f"{name:18}{predicted:10.2f}{measured:10.2f}")
    return rows
