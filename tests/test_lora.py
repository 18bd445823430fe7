"""LoRA and 8-bit moments: what trains, exact resume, the named base, the merged export, life without the packages."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from conftest import Outcome, SmallBuild, SmallRun, rows_of, train_batches, train_on
from helpers import FAST, ROOT, Tripwire, differences_of_runs, everything_below, load, metrics, run_into, timeless
from peft.tuners.lora import LoraLayer
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

from arc.lora import Base
from arc.optim import problem_with_eight_bit
from arc.run.runlog import RunLog
from benchmarks import memory
from model_persistence import PersistenceError, export_best
from model_persistence import main as persistence_main
from trainloop_complete_with_fixes import GradientMonitor, Run, build_run, parse_arguments

# At rank 64 the matrices of the tiny Qwen are just large enough (4,096 values) for 8-bit moments.
LORA = ("--qwen_tune", "lora", "--lora_rank", "64")
EIGHT_BIT = ("--optim", "adamw8bit")
FLAGS = (*LORA, *EIGHT_BIT, *FAST, "--epochs", "2")


@pytest.fixture(scope="module")
def trained(small_run: SmallRun, tmp_path_factory: pytest.TempPathFactory) -> Outcome:
    """A finished LoRA run with 8-bit moments, a dozen batches long."""
    outcome = small_run(tmp_path_factory.mktemp("lora") / "run", *FLAGS)
    assert outcome.code == 0, outcome.stderr
    return outcome


@pytest.fixture(scope="module")
def base_folder(trained: Outcome, cache_dir: Path) -> Path:
    """The folder of the built-in tiny Qwen that `trained` had."""
    assert trained.code == 0
    (folder,) = cache_dir.glob("tiny-*-0")
    return folder


@pytest.fixture(scope="module")
def whole_language_model(base_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder as the hub has them: a causal language model in bf16, in several files, its names prefixed."""
    folder = tmp_path_factory.mktemp("causal") / "qwen3"
    shape = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1}
    shape |= {"head_dim": 16, "intermediate_size": 48, "vocab_size": 2469}
    with torch.random.fork_rng():
        config = AutoConfig.for_model("qwen3", **shape, tie_word_embeddings=False)
        AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(folder, max_shard_size="100KB")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(base_folder / name, folder)
    return folder


def weights(run: Run) -> dict[str, torch.Tensor]:
    return {name: parameter.detach().clone() for name, parameter in run.qwen.named_parameters()}


def moved(run: Run, before: dict[str, torch.Tensor]) -> set[str]:
    return {name for name, parameter in run.qwen.named_parameters() if not torch.equal(parameter, before[name])}


# --------------------------------------------------------------------------------------------------------------------
# what trains
# --------------------------------------------------------------------------------------------------------------------


def test_the_adapter_and_the_head_train_and_the_base_does_not(small_build: SmallBuild) -> None:
    run = small_build(*LORA)
    before = weights(run)
    down = {name for name in before if ".lora_A." in name}
    up = {name for name in before if ".lora_B." in name}
    head = {"query", "project.0.weight", "project.0.bias", "project.1.weight", "project.1.bias"}
    assert len(down) == len(up) == 2 * 7  # the seven linear layers of each of two blocks
    assert run.qwen.trainable_parameters().keys() == down | up | head
    assert not any(before[name].any() for name in up)  # so the model starts as its base

    batches = train_batches(run, 3)
    train_on(run, batches[:1])
    # A's gradient passes B = 0: it is exactly zero in the first step (where weight decay alone may move A).
    assert up | head <= moved(run, before) <= up | head | down
    train_on(run, batches[1:])
    assert moved(run, before) == down | up | head
    assert [row["qwen_grad"] > 0 for row in rows_of(run)] == [True] * 3
    assert run.records.raised == set()


def test_the_monitor_is_not_fooled_by_matrices_that_start_at_zero(small_build: SmallBuild) -> None:
    run = small_build(*LORA)
    (batch,) = train_batches(run, 1)
    prompt, _ = run.qwen(batch.context_ids, batch.context_lengths)
    prompt[:, :, 0].sum().backward()
    observed = GradientMonitor().check_gradients(run.qwen, "Qwen")
    assert observed["norm"] > 0 and observed["missing"] == 0
    zero = {name for name, p in run.qwen.trainable_parameters().items() if p.grad is None or not p.grad.any()}
    assert zero == {name for name in run.qwen.trainable_parameters() if ".lora_A." in name}

    # A Qwen that is cut off from the loss still shows: nothing has a gradient, and the frozen base is not counted.
    run.qwen.zero_grad()
    cut = GradientMonitor().check_gradients(run.qwen, "Qwen")
    assert cut == {"norm": 0.0, "missing": len(run.qwen.trainable_parameters())}


def test_an_untrained_adapter_changes_nothing(small_build: SmallBuild) -> None:
    run, plain = small_build(*LORA), small_build("--qwen_tune", "frozen")
    (batch,) = train_batches(run, 1)
    with torch.no_grad():
        adapted, expected = (r.qwen(batch.context_ids, batch.context_lengths)[0] for r in (run, plain))
    torch.testing.assert_close(adapted, expected, rtol=1e-4, atol=1e-5)


def test_gradient_checkpointing_gives_the_adapter_the_same_gradients(small_build: SmallBuild) -> None:
    def gradients(*flags: str) -> dict[str, torch.Tensor]:
        run = small_build(*LORA, *flags)
        (batch,) = train_batches(run, 1)
        run.qwen(batch.context_ids, batch.context_lengths)[0].square().sum().backward()
        return {name: p.grad for name, p in run.qwen.trainable_parameters().items() if p.grad is not None}

    plain, recomputed = gradients(), gradients("--gradient_checkpointing")
    assert plain.keys() == recomputed.keys()
    torch.testing.assert_close(recomputed, plain)


def test_a_pretrained_model_gets_a_rate_for_its_adapter(small_build: SmallBuild, base_folder: Path) -> None:
    assert small_build(*LORA, "--qwen", str(base_folder)).optimizer.base_rates()["qwen"] == 2e-4
    assert small_build("--qwen", str(base_folder)).optimizer.base_rates()["qwen"] == 2e-5


def test_on_generated_tasks_the_tiny_qwen_has_its_own_rate_however_it_is_asked_for(
    small_build: SmallBuild, base_folder: Path
) -> None:
    generated = ("--data", "generated", "--unseen", "generated", "--families", "flip", "--tasks", "2")
    for flags in ((), ("--qwen", "tiny"), ("--qwen_tune", "frozen"), LORA):
        assert small_build(*generated, *flags).optimizer.base_rates()["qwen"] == 1e-3
    assert small_build(*generated, "--qwen", str(base_folder)).optimizer.base_rates()["qwen"] == 2e-5


def test_what_trains_of_a_pretrained_model_is_averaged_unless_that_is_all(
    small_build: SmallBuild, base_folder: Path
) -> None:
    def averaged(*flags: str) -> set[str]:
        run = small_build("--qwen", str(base_folder), *flags)
        assert run.average is not None
        trainable = {f"qwen.{name}" for name in run.qwen.trainable_parameters()}
        return {name for name in run.average.average if name.startswith("qwen.")} ^ trainable

    assert averaged("--qwen_tune", "frozen") == averaged(*LORA) == set()
    assert averaged()


def test_ablate_1_freezes_an_adapter_run_altogether(small_build: SmallBuild) -> None:
    run = small_build(*LORA, "--ablate", "1")
    assert run.qwen.adapter is None and run.qwen.trainable_parameters() == {}


def test_eight_bits_for_the_layers_of_qwen_and_nothing_else(small_build: SmallBuild) -> None:
    run = small_build(*EIGHT_BIT)
    train_on(run, train_batches(run, 1))
    names = {id(p): name for name, module in run.modules.items() for name, p in module.named_parameters(prefix=name)}
    state = {opt: {names[id(p)]: s for p, s in o.state.items()} for opt, o in run.optimizer.optimizers.items()}
    layers = {name for name, p in run.qwen.named_parameters(prefix="qwen") if "embed_tokens" not in name}
    assert state["adamw8bit"].keys() == layers
    quantised = {name for name, s in state["adamw8bit"].items() if s["state1"].dtype == torch.uint8}
    assert quantised == {name for name in layers if run.qwen.get_parameter(name.removeprefix("qwen.")).numel() >= 4096}
    assert len(quantised) == 2 * 5  # q, o, gate, up and down of two blocks
    assert "qwen.backbone.embed_tokens.weight" in state["adamw"]


# --------------------------------------------------------------------------------------------------------------------
# checkpoints
# --------------------------------------------------------------------------------------------------------------------


def test_a_checkpoint_holds_the_adapter_and_names_the_base(trained: Outcome, base_folder: Path) -> None:
    checkpoint = load(trained.folder)
    assert checkpoint.frozen == {} and not (trained.folder / "blobs").exists()
    adapter = checkpoint.state["model"]["qwen"]
    assert len(adapter) == 28 and all(name.endswith((".lora_A.weight", ".lora_B.weight")) for name in adapter)
    base = Base(**checkpoint.state["extra"]["lora"]["qwen"]["base"])
    digests = json.loads((base_folder / "digests.json").read_text())
    assert (base.name, base.revision, base.prefix) == ("tiny", "", "")
    assert {name: file["sha256"] for name, file in base.files.items()} == {
        "model.safetensors": digests["model.safetensors"]
    }


def test_the_adapter_is_averaged_too(small_build: SmallBuild, base_folder: Path) -> None:
    run = small_build(*LORA, "--qwen", str(base_folder))
    assert run.average is not None and run.qwen.frozen_state() is None
    averaged = {name.removeprefix("qwen.") for name in run.average.average if name.startswith("qwen.")}
    assert averaged == run.qwen.trainable_parameters().keys()


@pytest.mark.parametrize(("line", "occurrence"), [("[Batch    1]", 1), ("[Batch    4]", 1), ("[Batch    2]", 2)])
def test_a_resumed_run_equals_the_uninterrupted_one(
    trained: Outcome, line: str, occurrence: int, small_run: SmallRun, small_flags: tuple[str, ...], tmp_path: Path
) -> None:
    folder = tmp_path / "run"
    wire = Tripwire(line, occurrence, signal.SIGTERM)
    assert run_into(wire, [*small_flags, *FLAGS, "--output_dir", str(folder)]) == 143
    moments = load(folder).state["optim"]["optimizer"]["adamw8bit"]["state"].values()
    assert any(m["__bnb_optimizer_quant_state__"]["state1"].dtype == torch.uint8 for m in moments)
    resumed = small_run(folder, "--epochs", "2", "--resume")
    assert resumed.code == 0, resumed.stderr
    assert differences_of_runs(folder, trained.folder) == []
    assert timeless(metrics(folder)) == timeless(metrics(trained.folder))


def test_another_base_is_refused_by_name_and_a_moved_one_is_not(
    trained: Outcome, base_folder: Path, small_run: SmallRun, tmp_path: Path
) -> None:
    run = shutil.copytree(trained.folder, tmp_path / "run")
    same, other = (shutil.copytree(base_folder, tmp_path / name) for name in ("same", "other"))
    tensors = load_file(other / "model.safetensors")
    tensors["norm.weight"][0] += 1e-3
    save_file(tensors, other / "model.safetensors", {"format": "pt"})
    before = everything_below(run)
    refused = small_run(run, "--resume", "--qwen", str(other), "--epochs", "3")
    assert refused.code == 2 and refused.stderr.count("\n") == 1
    assert "adapter was trained on tiny (weights sha256 " in refused.stderr
    assert f"--qwen gives {other} (weights sha256 " in refused.stderr
    assert everything_below(run) == before
    assert small_run(run, "--resume", "--qwen", str(same), "--epochs", "3").code == 0

    rank = small_run(run, "--resume", "--lora_rank", "8")
    assert rank.code == 2 and "--lora_rank 8 (the checkpoint has 64)" in rank.stderr


def test_auto_means_the_base_of_the_checkpoint(
    trained: Outcome, base_folder: Path, small_flags: tuple[str, ...], tmp_path: Path
) -> None:
    checkpoint = load(trained.folder)
    elsewhere = checkpoint.state["extra"]["lora"]["qwen"]["base"]
    elsewhere["name"] = str(base_folder)  # as if auto had meant this where the run began
    args, _ = parse_arguments([*small_flags, *LORA, "--qwen", "auto", "--output_dir", str(tmp_path)])
    run = build_run(args, RunLog(quiet=True), time.monotonic(), checkpoint)
    assert run.qwen.name == str(base_folder) and run.qwen.base is not None
    assert run.qwen.base.differs_from(Base(**elsewhere)) is None


# --------------------------------------------------------------------------------------------------------------------
# export
# --------------------------------------------------------------------------------------------------------------------

LOAD_IN_A_FRESH_PROCESS = """
import sys, torch
from safetensors.torch import load_file, save_file
from transformers import AutoModel, AutoTokenizer
folder, ids, answer = sys.argv[1:]
model = AutoModel.from_pretrained(folder)
assert "peft" not in sys.modules and len(AutoTokenizer.from_pretrained(folder)) == 2469
with torch.no_grad():
    save_file({"states": model(**load_file(ids)).last_hidden_state}, answer)
"""


def states_in_a_fresh_process(folder: Path, ids: torch.Tensor, scratch: Path) -> torch.Tensor:
    """Last hidden states (B, L, hidden) of the model in `folder`, as a program that knows nothing of ours gets them."""
    save_file({"input_ids": ids}, scratch / "ids")
    words = [sys.executable, "-c", LOAD_IN_A_FRESH_PROCESS, str(folder), str(scratch / "ids"), str(scratch / "answer")]
    subprocess.run(words, check=True, cwd=scratch, capture_output=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    return load_file(scratch / "answer")["states"]


def merge_by_peft(run: Run, folder: Path) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Token ids and the last hidden states of the best model of `folder` as it was validated, before and after peft
    itself merges it."""
    assert run.qwen.adapter is not None and run.average is not None
    state = load(folder, "best").state
    run.qwen.adapter.load_state_dict(state["model"]["qwen"])
    run.average.load_state_dict(state["optim"]["average"])
    backbone = run.qwen.backbone.eval()
    ids = torch.randint(2469, (2, 40), generator=torch.Generator().manual_seed(1))
    with torch.no_grad(), run.average.applied():
        adapted = backbone(input_ids=ids).last_hidden_state
        for layer in backbone.modules():
            if isinstance(layer, LoraLayer):
                layer.merge()
        return ids, adapted, backbone(input_ids=ids).last_hidden_state


def test_the_export_loads_in_a_fresh_process_and_is_the_merged_model(
    trained: Outcome, base_folder: Path, small_build: SmallBuild, tmp_path: Path
) -> None:
    assert persistence_main(["export", str(trained.folder), str(tmp_path / "out")]) == 0
    ids, adapted, merged = merge_by_peft(small_build(*LORA), trained.folder)
    torch.testing.assert_close(merged, adapted, rtol=1e-3, atol=1e-4)
    exported = states_in_a_fresh_process(tmp_path / "out" / "qwen", ids, tmp_path)
    torch.testing.assert_close(exported, merged, rtol=0, atol=0)
    with torch.no_grad():
        base = AutoModel.from_pretrained(base_folder)(input_ids=ids).last_hidden_state
    assert not torch.allclose(base, merged, atol=0.1)  # the adapter is not nothing


def test_the_base_may_be_sharded_bf16_and_part_of_a_language_model(
    whole_language_model: Path, small_run: SmallRun, small_build: SmallBuild, tmp_path: Path
) -> None:
    flags = (*LORA, "--qwen", str(whole_language_model))
    outcome = small_run(tmp_path / "run", *flags, *FAST, "--max_batches", "3")
    assert outcome.code == 0, outcome.stderr
    base = Base(**load(tmp_path / "run").state["extra"]["lora"]["qwen"]["base"])
    assert base.prefix == "model." and len(base.files) > 1 and "lm_head.weight" not in base.tensors

    ids, _, merged = merge_by_peft(small_build(*flags), tmp_path / "run")
    export_best(tmp_path / "run", tmp_path / "out", log=lambda _: None)
    model = AutoModel.from_pretrained(tmp_path / "out" / "qwen")
    assert model.dtype == torch.float32
    with torch.no_grad():
        torch.testing.assert_close(model(input_ids=ids).last_hidden_state, merged, rtol=0, atol=0)


def test_a_base_that_has_moved_or_changed(
    whole_language_model: Path, small_run: SmallRun, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    was, now = tmp_path / "was", tmp_path / "now"
    shutil.copytree(whole_language_model, was)
    assert small_run(tmp_path / "run", *LORA, "--qwen", str(was), "--max_batches", "1").code == 0
    was.rename(now)
    export = ["export", str(tmp_path / "run"), str(tmp_path / "out")]
    assert persistence_main(export) == 1
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and str(was) in error and "is missing" in error and "--base" in error

    assert persistence_main([*export, "--base", str(now)]) == 0
    shard = min(now.glob("model-*.safetensors"))
    shard.write_bytes(shard.read_bytes()[:-1] + b"\x01")
    with pytest.raises(PersistenceError, match="does not have the SHA-256"):
        export_best(tmp_path / "run", tmp_path / "again", log=lambda _: None, base=now)
    assert not (tmp_path / "again").exists()


# --------------------------------------------------------------------------------------------------------------------
# without the optional packages
# --------------------------------------------------------------------------------------------------------------------

WITHOUT = """
import json, sys
sys.modules["peft"] = sys.modules["bitsandbytes"] = None  # an import of either now fails as where it is not installed
from trainloop_complete_with_fixes import main
for flags in json.loads(sys.argv[1]):
    try:
        code = main(flags)
    except SystemExit as stop:
        code = stop.code
    print(f"exit code {code}", file=sys.stderr)
"""


def test_without_the_packages(trained: Outcome, small_flags: tuple[str, ...], tmp_path: Path) -> None:
    old = shutil.copytree(trained.folder, tmp_path / "old")
    before = everything_below(old)
    commands = [
        [*small_flags, "--output_dir", str(tmp_path / "new"), *LORA, *EIGHT_BIT],
        ["--output_dir", str(old), "--resume"],  # here the flags are the checkpoint's
        [*small_flags, "--output_dir", str(tmp_path / "plain"), "--max_batches", "1", "--quiet"],
    ]
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT, json.dumps(commands)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    asked, first, resumed, second, third = done.stderr.splitlines()
    assert (first, second, third) == ("exit code 2", "exit code 2", "exit code 0")
    for problem in (asked, resumed):
        assert "--qwen_tune lora needs the package peft" in problem and "pip install -U peft" in problem
        assert "--optim_qwen adamw8bit needs the package bitsandbytes" in problem
        assert "pip install -U bitsandbytes" in problem
    assert done.stdout == "" and not (tmp_path / "new").exists() and everything_below(old) == before


def test_a_device_that_bitsandbytes_does_not_know() -> None:
    assert problem_with_eight_bit(torch.device("cpu")) is None
    problem = problem_with_eight_bit(torch.device("meta"))
    assert problem is not None and problem.startswith("--optim_qwen adamw8bit: bitsandbytes cannot compute on meta (")


# --------------------------------------------------------------------------------------------------------------------
# what fits where
# --------------------------------------------------------------------------------------------------------------------


def test_the_arithmetic_of_memory(small_build: SmallBuild) -> None:
    tiny = small_build("--qwen_tune", "lora", "--lora_rank", str(memory.RANK)).qwen
    assert tiny.adapter is not None and memory.RANK == 16
    plain = small_build("--qwen_tune", "frozen").qwen.backbone
    assert memory.Counts.of(plain).adapter == sum(p.numel() for p in tiny.adapter.parameters.values())

    # The sizes that the models' own pages give, tied embeddings counted once.
    counts = {name: memory.Counts.of(memory.make(shape, "meta")) for name, shape in memory.SHAPES.items()}
    published = {
        "Qwen2.5-0.5B": 494_032_768,
        "Qwen3-0.6B": 596_049_920,
        "Qwen2.5-1.5B": 1_543_714_304,
        "Qwen3-1.7B": 1_720_574_976,
    }
    assert {name: count.all for name, count in counts.items()} == published
    small = counts["Qwen2.5-0.5B"]
    assert small.linear == 24 * (2 * 896 * 896 + 2 * 896 * 128 + 3 * 896 * 4864)
    assert sum(memory.static_bytes(small, "full").values()) == 16 * small.all + 2 * small.linear
    assert sum(memory.static_bytes(small, "frozen").values()) == 4 * small.all + 2 * small.linear
