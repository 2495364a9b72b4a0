"""`rlhf-kit train --deployment-type`: what is chosen, what is started where, and what is refused.

Nothing is trained: launched stages only write the files that say they are done. SLURM's sbatch is
a script that numbers its jobs.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import transformers

from rlhf_kit import cli, cluster, pipeline
from rlhf_kit.config import RunConfig, from_dict, preset
from rlhf_kit.hybrid_engine.memory import GIB

SBATCH = """
import sys
from pathlib import Path
assert sys.argv[1] == "--parsable"
log = Path(__file__).with_name("jobs")
jobs = log.read_text().splitlines() if log.exists() else []
log.write_text("\\n".join([*jobs, sys.argv[2]]))
print(f"{41 + len(jobs)};cluster")
"""
STAGES = [name for name, _ in pipeline.STAGES]


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """No GPU, an empty directory, and a report of nothing."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    monkeypatch.setattr(cluster, "visible_gpus", lambda: 0)
    monkeypatch.setattr("rlhf_kit.hybrid_engine.device._here", lambda: pytest.fail("looked"))
    monkeypatch.setattr(cli, "show_report", lambda *_, **__: None)
    return tmp_path


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> list[cluster.Plan]:
    """The launches that were carried out, each by writing what its stage ends with."""
    plans: list[cluster.Plan] = []

    def start(plan: cluster.Plan) -> int:
        plans.append(plan)
        for path in dict(pipeline.STAGES)[plan.job.notebook.stem]:
            finish = Path(str(plan.job.values["run_dir"]), path)
            finish.parent.mkdir(parents=True, exist_ok=True)
            finish.write_text('{"seconds": 2.0}')
        return 0

    monkeypatch.setattr(cluster, "start", start)
    return plans


@pytest.fixture
def actor(tmp_path: Path) -> str:
    """A configuration without weights: a Llama of 19 million parameters."""
    path = tmp_path / "actor"
    transformers.LlamaConfig(
        hidden_size=256,
        intermediate_size=704,
        num_hidden_layers=3,
        num_attention_heads=4,
        vocab_size=32000,
    ).save_pretrained(path)
    return str(path)


@pytest.fixture
def a_gib_a_row(monkeypatch: pytest.MonkeyPatch) -> None:
    """A plan of 1 GiB for each row of PPO's micro-batch, and 20 while what idles stays."""

    def of(config: RunConfig, *, ranks: int) -> SimpleNamespace:
        gib = config.ppo.micro_batch_size + 20 * (not config.memory.offload_idle)
        fullest = SimpleNamespace(stage="ppo", name="generate")
        return SimpleNamespace(needed=gib * GIB, fits=lambda memory: gib <= memory, fullest=fullest)

    monkeypatch.setattr("rlhf_kit.fitting.Plan", SimpleNamespace(of=of))


def train(kind: str, *words: str) -> int:
    return cli.main(["train", "--output-dir", "run", "--deployment-type", kind, *words])


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--num-gpus=2"], "--num-gpus can only be used with --deployment-type"),
        (["--num-gpus=0"], "--num-gpus can only be used with --deployment-type"),
        (["--deployment-type=single_gpu", "--nodes=2"], "single_gpu is one process, and takes"),
        (["--gpu=h100", "--dry-run"], "--gpu, --dry-run can only be used with --deployment-type"),
        (["--deployment-type=single_gpu"], "no GPU is visible on this host; add --num-gpus 0"),
        (["--deployment-type=single_gpu", "--gpu=h100"], "no GPU is visible on this host"),
        (["--deployment-type=single_gpu", "--num-gpus=2"], "single_gpu is one process, and takes"),
        (["--deployment-type=single_node"], "no GPU is visible on this host; add --num-gpus 0"),
        (["--deployment-type=single_node", "--slurm"], "--hostfile and --slurm are for multi_node"),
        (["--deployment-type=multi_node"], "multi_node needs --hostfile F or --slurm"),
        (["--deployment-type=multi_node", "--hostfile=no"], "there is no hostfile no"),
        (["--deployment-type=multi_node", "--slurm"], "--slurm needs --num-gpus"),
        (["--deployment-type=multi_node", "--slurm", "--num-gpus=8"], "there is no sbatch"),
        (
            ["--deployment-type=single_node", "--num-gpus=0", "--num-ranks=3"],
            "ppo.minibatch_size / ranks: 32 is not a multiple of 3",
        ),
    ],
)
def test_what_cannot_run_is_one_sentence_and_starts_nothing(
    words: list[str], message: str, here: Path, capsys: pytest.CaptureFixture[str]
):
    assert cli.main(["train", "--output-dir", "run", "--preset", "toy", *words]) == 2
    err = capsys.readouterr().err
    assert err.startswith(f"error: {message}") and err.count("\n") == 1
    assert not list(here.iterdir())


def test_choices_and_commands_are_shown_for_gpus_that_are_elsewhere(
    actor: str, capsys: pytest.CaptureFixture[str]
):
    words = ["--actor-model", actor, "--gpu-memory", "4", "--num-gpus", "8", "--dry-run"]
    assert train("single_node", *words) == 0
    out = capsys.readouterr().out
    assert "planning for 8 x a GPU as fast as 4090 with 4 GiB" in out
    # Consumer's 64 rows a step on 8 ranks.
    assert "sft: 64 rows a step = 8 ranks x 8 rows x 1" in out
    assert "it fits: " in out
    assert [name for name in STAGES if f"run/notebooks/{name}.py" in out] == STAGES
    assert out.count("deepspeed.launcher.launch") == 3
    assert not Path("run").exists()


def test_each_choice_says_what_would_be_full_and_what_it_costs(
    a_gib_a_row: None, capsys: pytest.CaptureFixture[str]
):
    words = ["--gpu", "a6000", "--dry-run", "--set", "sft.micro_batch_size=4"]
    assert train("single_gpu", *words) == 0
    out = capsys.readouterr().out
    # 64 rows need 64 + 20 GiB, 32 need 52, 16 need 36.
    assert out.splitlines()[:7] == [
        "planning for 1 x a6000 with 47.5 GiB ...",
        "--set actor_engine.gradient_checkpointing=false "
        "--set critic_engine.gradient_checkpointing=false "
        "--set reward.micro_batch_size=64 --set memory.offload_idle=false "
        "--set memory.logprob_chunk=1024    # there is room, and the preset would save it",
        "--set ppo.micro_batch_size=16    # else ppo generate needs 84.0 GiB of 47.5; costs: "
        "smaller matrix products take longer in all",
        "sft: 64 rows a step = 1 ranks x 4 rows x 16",
        "reward: 64 rows a step = 1 ranks x 64 rows x 1",
        "ppo: 64 rows a step = 1 ranks x 16 rows x 4",
        "it fits: 36.0 GiB of 47.5 are needed, with CUDA's own memory and what the allocator loses",
    ]
    scripts = [pipeline.NOTEBOOKS / f"{name}.py" for name in STAGES]
    commands = [f"{sys.executable} {script} --run_dir=run" for script in scripts]
    assert [line for line in out.splitlines() if "--run_dir" in line] == commands


def test_where_nothing_fits_the_closest_is_named_and_nothing_starts(
    a_gib_a_row: None, here: Path, capsys: pytest.CaptureFixture[str]
):
    words = ["--gpu", "a6000", "--dry-run", "--set", "ppo.micro_batch_size=64"]
    assert train("single_gpu", *words) == 2
    assert capsys.readouterr().err == (
        "error: this does not fit into 1 x a6000, whatever is chosen: the closest needs 64.0 GiB "
        "of 47.5 at ppo generate with --set memory.offload_idle=true; use more or larger GPUs, a "
        "smaller model or shorter rows, or leave out what --set fixes\n"
    )
    assert not list(here.iterdir())


def test_ranks_of_a_cpu_run_all_stages_with_the_presets_settings(
    started: list[cluster.Plan], capsys: pytest.CaptureFixture[str]
):
    assert train("single_node", "--preset", "toy", "--num-gpus", "0", "--num-ranks", "2") == 0
    assert "on a CPU nothing is chosen: the preset's settings stand" in capsys.readouterr().out
    assert [plan.job.notebook.stem for plan in started] == STAGES
    assert {plan.ranks for plan in started} == {2}
    record = json.loads(Path("run", "run.json").read_text())
    assert from_dict(record["config"]) == from_dict(json.loads(json.dumps(preset("toy").to_dict())))
    assert record["finished"] is not None


def test_a_run_goes_on_where_it_ran(started: list[cluster.Plan]):
    words = ["--preset", "toy", "--num-gpus", "0", "--num-ranks", "4"]
    assert train("single_node", *words) == 0
    for path in dict(pipeline.STAGES)["04_ppo"]:
        Path("run", path).unlink()
    record = json.loads(Path("run", "run.json").read_text())
    Path("run", "run.json").write_text(json.dumps({**record, "finished": None}))
    started.clear()
    assert cli.main(["train", "--output-dir", "run", "--resume"]) == 0
    assert [(plan.job.notebook.stem, plan.ranks) for plan in started] == [("04_ppo", 4)]
    # Half of a place is no place.
    assert cli.main(["train", "--output-dir", "run", "--resume", "--num-gpus", "0"]) == 2


def test_all_slots_of_a_hostfile_are_planned_for(actor: str, capsys: pytest.CaptureFixture[str]):
    Path("hosts").write_text("alpha slots=8\nbeta slots=8\n")
    words = ["--hostfile", "hosts", "--gpu", "a100", "--actor-model", actor, "--dry-run"]
    assert train("multi_node", *words) == 0
    out = capsys.readouterr().out
    assert "planning for 16 x a100" in out and "= 16 ranks x 4 rows x 1" in out
    assert out.count("--hostfile=hosts --force_multi") == 3


def test_slurm_jobs_wait_for_each_other(
    here: Path,
    actor: str,
    started: list[cluster.Plan],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
):
    program = here / "bin" / "sbatch"
    program.parent.mkdir()
    program.write_text(f"#!{sys.executable}\n{SBATCH}")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(program.parent), prepend=":")
    words = ["--slurm", "--nodes", "2", "--num-gpus", "8", "--gpu", "a100", "--time", "1:00:00"]
    assert train("multi_node", *words, "--actor-model", actor) == 0
    out = capsys.readouterr().out
    assert [f"{name}: job {41 + n}" in out for n, name in enumerate(STAGES)] == [True] * 3
    assert "rlhf-kit report run" in out and not started
    scripts = [Path("run", "notebooks", f"{name}.sbatch").read_text() for name in STAGES]
    assert "--dependency" not in scripts[0]
    assert "#SBATCH --dependency=afterok:41\n#SBATCH --kill-on-invalid-dep=yes" in scripts[1]
    assert "#SBATCH --dependency=afterok:42\n" in scripts[2]
    assert all("#SBATCH --nodes=2\n" in text for text in scripts)

    # What the jobs have done counts: nothing is submitted again, and their seconds are kept.
    for _, files in pipeline.STAGES:
        for path in files:
            Path("run", path).parent.mkdir(parents=True, exist_ok=True)
            Path("run", path).write_text('{"seconds": 2.5}')
    assert cli.main(["train", "--output-dir", "run", "--resume"]) == 0
    record = json.loads(Path("run", "run.json").read_text())
    assert pipeline.seconds_of(record) == 7.5
    assert len((program.parent / "jobs").read_text().splitlines()) == 3
