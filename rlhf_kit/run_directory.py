"""Where a run keeps its things, and what a notebook starts from.

DIR/run.json               the configuration, when `rlhf-kit train` started the run
DIR/sft/final              the SFT model           DIR/sft/metrics.jsonl, summary.json
DIR/reward/final           the reward model        DIR/reward/metrics.jsonl, summary.json
DIR/ppo/final, DIR/ppo/ema the actor, its average  DIR/ppo/metrics.jsonl, summary.json
DIR/<stage>/checkpoints    while a stage trains: what it goes on from when it is cut short
DIR/ppo/exports/step-...   the actor every so many iterations (checkpoint.export_every)
"""

from __future__ import annotations

import dataclasses
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rlhf_kit import distributed, fingerprint
from rlhf_kit.checkpoint import is_complete
from rlhf_kit.config import RunConfig, from_dict, override, preset
from rlhf_kit.launch import ROOT, in_notebook
from rlhf_kit.metrics import Phases
from rlhf_kit.pipeline import EXPORTS, read_record, write_json
from rlhf_kit.types import Stage


@dataclass
class RunDirectory:
    """A run's directory and its configuration."""

    path: Path
    config: RunConfig
    started: float
    """time.monotonic() when it was opened, for the stage's seconds; a stage that goes on moves it
    back by what was spent before."""

    @classmethod
    def open(cls, path: str | Path, *, preset_name: str, **changes: Any) -> RunDirectory:
        """The configuration in DIR/run.json, else the preset; with `changes` as in `override`.

        A run that `rlhf-kit train` started has its settings fixed in run.json; a notebook run
        by hand takes them from its preset, and from the parameters that are not None.
        """
        # A kernel works in the folder of its notebook, a script wherever it was started.
        directory = ROOT / path if in_notebook() else Path(path)
        if (directory / "run.json").is_file():
            config = override(from_dict(read_record(directory)["config"]), **changes)
            distributed.print_main(f"settings: {directory / 'run.json'}")
        else:
            config = preset(preset_name, **changes)
            distributed.print_main(f"settings: preset {preset_name}")
        return cls(directory, config, time.monotonic())

    def args(self) -> RunConfig:
        """The configuration with this run's own SFT and reward model in place of their bases."""
        return dataclasses.replace(
            self.config, actor_model=self.sft_model(), reward_model=self.scorer()
        )

    def stage(self, stage: Stage) -> Path:
        """DIR/<stage>, made if missing; ValueError where that is not possible."""
        directory = self.path / stage
        try:
            directory.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ValueError(
                f"{directory} can't be made ({error.strerror}); choose another run_dir"
            ) from None
        return directory

    def model(self, name: str) -> Path:
        """Where the export `sft`, `reward`, `final` or `ema` lies, or is to be written."""
        return self.path / EXPORTS[name]

    def export_due(self, iteration: int) -> Path | None:
        """Where to export the actor after this iteration of PPO; None where it is not time."""
        every = self.config.checkpoint.export_every
        due = every > 0 and iteration % every == 0
        return self.path / "ppo" / "exports" / f"step-{iteration:08d}" if due else None

    def sft_model(self) -> str:
        """The SFT model of this run, or the base model, said aloud, where there is none yet."""
        return self._model_or_base(self.model("sft"), self.config.actor_model, "SFT")

    def scorer(self) -> str:
        """The reward model of this run, or its base with an untrained head, said aloud."""
        return self._model_or_base(self.model("reward"), self.config.reward_model, "reward")

    def _model_or_base(self, directory: Path, base: str, name: str) -> str:
        if is_complete(directory):
            return str(directory)
        distributed.print_main(f"no {name} model in {directory}: using {base} instead")
        return base

    def finish(self, stage: Stage, phases: Phases, **details: Any) -> dict[str, Any]:
        """Write DIR/<stage>/summary.json: seconds, tokens and phases of the stage."""
        spent = phases.to_dict()
        summary = {
            "seconds": round(time.monotonic() - self.started, 2),
            "tokens": int(sum(phase["tokens"] for phase in spent.values())),
            "phases": spent,
            "world_size": distributed.world_size(),
            "settings_fingerprint": fingerprint.of_config(self.config),
            **details,
        }
        if distributed.is_main_rank():
            write_json(self.stage(stage) / "summary.json", summary)
        distributed.print_main(f"{stage}: {summary['seconds']} s")
        return summary
