"""arc/qwen.py and arc/qwen_source.py: the text of a context, what the module computes, trains and refuses to load."""

from __future__ import annotations

import copy
import hashlib
import json
import math
import os
import pickle
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from arc import qwen_source
from arc.batches import Texts
from arc.datasets import load_dataset
from arc.qwen import ContextEncoder, QwenPrompt, build_qwen, cells_text, pair_text
from arc.run.files import UserError
from arc.tasks import Grid

K, D = 3, 16
Pairs = list[tuple[Grid, Grid]]
Damage = Callable[[Path], object]
SHAPE: dict[str, Any] = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "vocab_size": 260,
    "intermediate_size": 48,
    "max_position_embeddings": 2048,
    "tie_word_embeddings": True,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
}


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """These models are too small for several threads to pay, least of all on a busy machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


def build(spec: str | Path, cache: Path, **changes: Any) -> QwenPrompt:
    sizes = {"prompt_len": K, "prompt_dim": D, "max_context_tokens": 400}
    arguments: dict[str, Any] = {"device_type": "cpu", "cache_dir": cache, "seed": 0} | sizes
    return build_qwen(str(spec), **arguments | changes)


def write_model(folder: Path, kind: str, *, dtype: torch.dtype = torch.float32, **shape: Any) -> Path:
    """A small random model of the given type with a byte-level tokenizer, as the hub's Qwen folders are: saved from the
    class with a language-model head (tied to the embeddings), so its weights' names carry a prefix."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

    with torch.random.fork_rng(), qwen_source.quiet():
        torch.manual_seed(1)
        config = AutoConfig.for_model(kind, **SHAPE | shape)
        AutoModelForCausalLM.from_config(config, dtype=dtype).save_pretrained(folder)
    alphabet = {byte: index for index, byte in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    tokenizer = Tokenizer(models.BPE(vocab=alphabet, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def qwen2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("models") / "qwen2", "qwen2")


@pytest.fixture
def copy_of_qwen2(qwen2: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(qwen2, tmp_path / "model"))


def batch(rows: int = 4, longest: int = 60) -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids valid for every model here, right-padded with junk, and lengths that include 1 and the whole row."""
    generator = torch.Generator().manual_seed(0)
    lengths = torch.randint(2, longest, (rows,), generator=generator)
    lengths[0], lengths[-1] = longest, 1
    return torch.randint(0, 250, (rows, longest), generator=generator), lengths


def grid(height: int, width: int, colour: int = 3) -> Grid:
    return np.full((height, width), colour, np.uint8)


def real_contexts(number: int) -> list[Pairs]:
    """The demonstration pairs of the first tasks of ARC-AGI-2."""
    tasks = load_dataset("arcagi2").training[:number]
    return [[(pair.input, pair.output) for pair in task.train if pair.output is not None] for task in tasks]


def gradients(model: QwenPrompt) -> dict[str, torch.Tensor]:
    """Gradients of all trainable parameters for a fixed batch and loss."""
    model.zero_grad()
    prompt, embedding = model(*batch())
    (prompt.square().sum() + embedding.square().sum()).backward()
    found = {name: p.grad for name, p in model.trainable_parameters().items()}
    assert all(gradient is not None for gradient in found.values())
    return {name: gradient.clone() for name, gradient in found.items() if gradient is not None}


# ----------------------------------------------------------------------------------------------------------------------
# Text and tokens


def test_text_of_a_pair() -> None:
    pair = (np.array([[0, 1, 2], [3, 4, 5]], np.uint8), np.array([[6, 6], [7, 7]], np.uint8))
    assert pair_text(pair) == "I\n012\n345\nO\n66\n77\n"


def test_text_of_a_pair_cell_by_cell_as_it_is_written() -> None:
    pair = (np.array([[0, 1, 2], [3, 4, 5]], np.uint8), np.array([[6, 6], [7, 7]], np.uint8))
    assert cells_text(pair) == "I\n0g1g2-\n3h4h5-\n"
    assert cells_text((pair[1], pair[0])) == "I\n6a6b.c\n7d7e.f\n"


def test_tiny_spends_a_third_of_a_token_on_a_cell(cache: Path) -> None:
    model = build("tiny", cache, max_context_tokens=4000)
    pair = (grid(5, 7), grid(2, 3))
    assert len(model.encoder([pair])) - len(model.encoder([])) == 1 + 5 * 3 + 1 + 2 * 1
    contexts = real_contexts(300)
    cells = np.median([sum(a.size + b.size for a, b in pairs) for pairs in contexts])
    tokens = np.median([len(model.encoder(pairs)) for pairs in contexts])
    assert cells > 600 and tokens < 300


@pytest.fixture(scope="session")
def tokenizers(cache: Path, qwen2: Path) -> dict[str, Any]:
    return {name: build(name, cache).tokenizer.backend_tokenizer for name in ("tiny", str(qwen2))}


grids = st.builds(grid, st.integers(1, 12), st.integers(1, 12), st.integers(0, 9))


@given(pair=st.tuples(grids, grids))
@settings(max_examples=40, deadline=None)
def test_text_of_a_pair_cell_by_cell(tokenizers: dict[str, Any], pair: tuple[Grid, Grid]) -> None:
    """Both grids can be read off it, and tiny spends one token on a cell."""
    text = cells_text(pair)
    start, *lines = text.splitlines()
    assert start == "I" and text.endswith("\n")
    for which, grid in enumerate(pair):
        rows = ["".join(line[which::2]).rstrip(".-") for line in lines]
        digits = [row.translate(str.maketrans("abcdefghij", "0123456789")) for row in rows if row]
        assert digits == ["".join(map(str, row)) for row in grid.tolist()]
    height, width = (max(sides) for sides in zip(*(grid.shape for grid in pair), strict=True))
    encoder = ContextEncoder(tokenizers["tiny"], 10_000, text="cells")
    assert len(encoder([pair])) - len(encoder([])) == 1 + height * width
    assert "<unk>" not in tokenizers["tiny"].decode(encoder([pair]), skip_special_tokens=False)


@settings(max_examples=60, deadline=None)
@given(pairs=st.lists(st.tuples(grids, grids), max_size=6), max_tokens=st.integers(10, 400), which=st.integers(0, 1))
def test_context_keeps_as_many_whole_pairs_as_fit(
    tokenizers: dict[str, Any], pairs: Pairs, max_tokens: int, which: int
) -> None:
    tokenizer = list(tokenizers.values())[which]
    said: list[str] = []
    encoder, unlimited = ContextEncoder(tokenizer, max_tokens, said.append), ContextEncoder(tokenizer, 10**6)
    ids, header = encoder(pairs), len(unlimited([]))
    assert len(ids) <= max_tokens
    costs = [len(unlimited([pair])) - header for pair in pairs]
    most = max(n for n in range(len(pairs) + 1) if header + sum(sorted(costs)[:n]) <= max_tokens)
    # Whole pairs, in order: the text reads as the header and a subsequence of the pairs' texts, `most` of them.
    kept, rest = 0, tokenizer.decode(ids, skip_special_tokens=False).removeprefix("IO\n")
    for pair in pairs:
        text = pair_text(pair)
        if kept < most and rest.startswith(text) and (len(rest) == len(text) or rest[len(text)] == "I"):
            kept, rest = kept + 1, rest[len(text) :]
    assert (kept, rest) == (most, "")
    assert len(said) == (most < len(pairs))


def test_dropping_is_said_once(cache: Path) -> None:
    said: list[str] = []
    model = build("tiny", cache, max_context_tokens=20, log=said.append)
    small, large = (grid(1, 1), grid(1, 1)), (grid(30, 30), grid(30, 30))
    assert model.encoder([large, small]) == model.encoder([small])
    assert model.encoder([large]) == model.encoder([])  # the header alone
    assert len(said) == 1 and "1 of 2" in said[0] and "--max_context_tokens 20" in said[0]


def test_encoder_travels_to_workers(cache: Path) -> None:
    model = build("tiny", cache)
    assert len(pickle.dumps(model.encoder)) < 200_000
    assert pickle.loads(pickle.dumps(model.encoder))([(grid(3, 4), grid(2, 2))]) == model.encoder(
        [(grid(3, 4), grid(2, 2))]
    )


def test_import_does_not_load_transformers() -> None:
    code = "import sys, arc.qwen; sys.exit('transformers' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parent.parent).returncode == 0


# ----------------------------------------------------------------------------------------------------------------------
# What the module computes


@pytest.mark.parametrize("spec", ["tiny", "qwen2"])
@pytest.mark.parametrize("tune", ["full", "frozen"])
def test_batched_equals_unpadded_single(spec: str, tune: str, cache: Path, qwen2: Path) -> None:
    model = build(qwen2 if spec == "qwen2" else spec, cache, tune=tune)
    ids, lengths = batch()
    prompt, embedding = model(ids, lengths)
    assert prompt.shape == (4, K, D) and embedding.shape == (4, model.embedding_dim)
    for row, length in enumerate(lengths.tolist()):
        alone, alone_embedding = model(ids[row : row + 1, :length], lengths[row : row + 1])
        torch.testing.assert_close(prompt[row], alone[0], atol=2e-6, rtol=2e-6)
        torch.testing.assert_close(embedding[row], alone_embedding[0], atol=2e-6, rtol=2e-6)
    in_turn = [Texts(rows, int(lengths[rows].max())) for rows in (torch.tensor([3, 0]), torch.tensor([2, 1]))]
    for parts, together in zip(model(ids, lengths, in_turn), (prompt, embedding), strict=True):
        torch.testing.assert_close(parts, together, atol=2e-6, rtol=2e-6)
    other = torch.where(torch.arange(60) < lengths[:, None], ids, (ids + 1) % 250)
    assert torch.equal(model(other, lengths)[0], prompt)  # padding counts for nothing
    changed = ids.clone()
    changed[:, 0] = (ids[:, 0] + 1) % 250
    assert ((model(changed, lengths)[0] - prompt).abs().amax((1, 2)) > 1e-4).all()  # content does


def test_frozen_reads_the_same_as_full_and_only_the_head_trains(cache: Path) -> None:
    full, frozen = build("tiny", cache), build("tiny", cache, tune="frozen")
    torch.testing.assert_close(full(*batch())[0], frozen(*batch())[0], atol=2e-6, rtol=2e-6)
    head = {name for name in full.trainable_parameters() if not name.startswith("backbone.")}
    assert head == {"query", "project.0.weight", "project.0.bias", "project.1.weight", "project.1.bias"}
    expected, found = gradients(full), gradients(frozen)
    assert set(found) == head and not frozen.train().backbone.training
    for name in head:
        torch.testing.assert_close(found[name], expected[name], atol=1e-4, rtol=1e-4)
    before = copy.deepcopy(frozen.state_dict())
    torch.optim.SGD(frozen.parameters(), lr=0.1).step()
    changed = {name for name, tensor in frozen.state_dict().items() if not torch.equal(tensor, before[name])}
    assert changed == head


@pytest.mark.parametrize("spec", ["tiny", "qwen2"])
def test_every_trainable_parameter_gets_a_gradient(spec: str, cache: Path, qwen2: Path) -> None:
    model = build(qwen2 if spec == "qwen2" else spec, cache)
    assert set(model.trainable_parameters()) == {name for name, _ in model.named_parameters()}
    found = gradients(model)
    assert all(gradient.isfinite().all() and gradient.any() for gradient in found.values())
    ids, lengths = batch()
    used = torch.zeros(len(found["backbone.embed_tokens.weight"]), dtype=torch.bool)
    used[ids[torch.arange(ids.shape[1]) < lengths[:, None]]] = True
    assert torch.equal(found["backbone.embed_tokens.weight"].any(1), used)


def test_gradient_checkpointing_recomputes_and_gives_the_same_gradients(cache: Path) -> None:
    plain, saving = build("tiny", cache), build("tiny", cache, gradient_checkpointing=True)
    calls: list[QwenPrompt] = []
    for model in (plain, saving):
        attention = model.backbone.get_submodule("layers.0.self_attn")
        attention.register_forward_pre_hook(lambda *_, model=model: calls.append(model))
    expected, found = gradients(plain), gradients(saving)
    assert (calls.count(plain), calls.count(saving)) == (1, 2)
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("tune", ["full", "frozen"])
def test_bf16_autocast_gives_fp32_prompts_close_to_fp32_ones(tune: str, cache: Path) -> None:
    model = build("tiny", cache, tune=tune)
    exact, exact_embedding = model(*batch())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        prompt, embedding = model(*batch())
    assert prompt.dtype == embedding.dtype == torch.float32
    assert (prompt - exact).std() < 0.03 * exact.std()
    assert (embedding - exact_embedding).std() < 0.03 * exact_embedding.std()


def test_different_tasks_get_different_prompts(cache: Path) -> None:
    """Untrained prompts carry the task: a good part of their second moment is variance across tasks."""
    model = build("tiny", cache)
    contexts = [torch.tensor([model.encoder(pairs)]) for pairs in real_contexts(40)]
    with torch.no_grad():
        prompts = torch.cat([model(ids, torch.tensor([ids.shape[1]]))[0] for ids in contexts])
    assert (prompts.var(0).sum() / prompts.square().mean(0).sum()) > 0.25
    assert 0.5 < prompts.std() < 2


# ----------------------------------------------------------------------------------------------------------------------
# The tiny model on disk


def digests(folder: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.iterdir()}


def test_tiny_is_small_and_a_function_of_its_seed(cache: Path, tmp_path: Path) -> None:
    torch.manual_seed(5)
    state = torch.get_rng_state()
    written = build("tiny", tmp_path, seed=7)
    assert torch.equal(torch.get_rng_state(), state)
    assert sum(p.numel() for p in written.parameters()) < 1_000_000
    assert all(p.dtype == torch.float32 for p in written.parameters())
    loaded, other = build("tiny", tmp_path, seed=7), build("tiny", cache, seed=8)
    for name, tensor in written.state_dict().items():
        assert torch.equal(tensor, loaded.state_dict()[name])
    for name in ("query", "backbone.embed_tokens.weight", "backbone.layers.0.mlp.up_proj.weight"):
        assert not torch.equal(written.state_dict()[name], other.state_dict()[name])
    build("tiny", cache, seed=7)
    (first,), (second,) = tmp_path.iterdir(), cache.glob("*-7")
    assert first.name == second.name and digests(first) == digests(second)


def test_description_names_model_origin_and_sizes(cache: Path) -> None:
    line = build("tiny", cache, tune="frozen").description
    assert "tiny" in line and "qwen3" in line and "seed 0" in line and "0.23 M parameters, 0.00 M" in line
    assert "\n" not in line and str(cache) not in line


def test_tiny_is_written_once(tmp_path: Path) -> None:
    build("tiny", tmp_path)
    (folder,) = tmp_path.iterdir()
    before = {path.name: path.stat() for path in folder.iterdir()}
    build("tiny", tmp_path)
    assert {path.name: path.stat() for path in folder.iterdir()} == before


def flip_a_bit(folder: Path) -> None:
    content = bytearray((folder / "model.safetensors").read_bytes())
    content[-3] ^= 1
    (folder / "model.safetensors").write_bytes(content)


def replace_by_file(folder: Path) -> None:
    shutil.rmtree(folder)
    folder.write_text("")


def empty(folder: Path) -> None:
    shutil.rmtree(folder)
    folder.mkdir()


DAMAGE: dict[str, Damage] = {
    "a bit of the weights": flip_a_bit,
    "no weights": lambda folder: (folder / "model.safetensors").unlink(),
    "cut tokenizer": lambda folder: (folder / "tokenizer.json").write_text("{"),
    "no digests": lambda folder: (folder / "digests.json").unlink(),
    "foreign digests": lambda folder: (folder / "digests.json").write_text("[]"),
    "a file too many": lambda folder: (folder / "pytorch_model.bin").write_bytes(b"x"),
    "a folder too many": lambda folder: (folder / "sub").mkdir(),
    "an empty folder": empty,
    "a file in its place": replace_by_file,
}


@pytest.mark.parametrize("name", DAMAGE)
def test_a_damaged_tiny_folder_is_rewritten(name: str, tmp_path: Path) -> None:
    build("tiny", tmp_path)
    (folder,) = tmp_path.iterdir()
    expected = digests(folder)
    DAMAGE[name](folder)
    build("tiny", tmp_path)
    assert list(tmp_path.iterdir()) == [folder] and digests(folder) == expected


@pytest.mark.parametrize("damaged", [False, True])
def test_a_second_writer_uses_what_the_first_one_wrote(
    damaged: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if damaged:
        flip_a_bit(qwen_source._tiny_folder(tmp_path, 0))
    write, inodes = qwen_source._write_tiny, []

    def overtaken(folder: Path, seed: int) -> None:
        """Write; but before that is put in its place, another process finishes."""
        write(folder, seed)
        monkeypatch.setattr(qwen_source, "_write_tiny", write)
        inodes.append((qwen_source._tiny_folder(tmp_path, 0) / "model.safetensors").stat().st_ino)

    monkeypatch.setattr(qwen_source, "_write_tiny", overtaken)
    folder = qwen_source._tiny_folder(tmp_path, 0)
    assert (folder / "model.safetensors").stat().st_ino == inodes[0] and list(tmp_path.iterdir()) == [folder]


def test_cache_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    assert "cannot write to" in refusal("tiny", tmp_path / "file" / "cache")


# ----------------------------------------------------------------------------------------------------------------------
# Other models


@pytest.mark.parametrize("sharded", [False, True])
def test_a_folder_loads_in_fp32_with_its_own_weights(sharded: bool, cache: Path, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    folder = write_model(tmp_path / "model", "qwen3", dtype=torch.bfloat16, head_dim=8)
    if sharded:
        with qwen_source.quiet():
            model = AutoModelForCausalLM.from_pretrained(folder)
            (folder / "model.safetensors").unlink()
            model.save_pretrained(folder, max_shard_size="20KB")
        assert len(list(folder.glob("*.safetensors"))) > 1
    stored = {name: tensor for shard in folder.glob("*.safetensors") for name, tensor in load_file(shard).items()}
    loaded = build(folder, cache).backbone.state_dict()
    assert {f"model.{name}" for name in loaded} == set(stored)
    for name, tensor in loaded.items():
        assert tensor.dtype == torch.float32 and torch.equal(tensor, stored[f"model.{name}"].float())


def test_of_a_vision_language_model_the_language_model_is_taken(cache: Path, qwen2: Path, tmp_path: Path) -> None:
    from transformers import AutoConfig, AutoModel

    rope = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 3, 3]}
    text = SHAPE | {"head_dim": 16, "rope_parameters": rope}
    vision = {
        "depth": 1,
        "hidden_size": 32,
        "num_heads": 2,
        "intermediate_size": 48,
        "out_hidden_size": 32,
        "deepstack_visual_indexes": [0],
    }
    with qwen_source.quiet(), torch.random.fork_rng():
        config = AutoConfig.for_model("qwen3_vl", text_config=text, vision_config=vision)
        AutoModel.from_config(config, dtype=torch.float32).save_pretrained(tmp_path)
    for file in qwen2.glob("tokenizer*.json"):
        shutil.copy(file, tmp_path)
    model = build(tmp_path, cache)
    assert model.backbone.config.model_type == "qwen3_vl_text" and not hasattr(model.backbone, "visual")
    assert all(gradient.any() for gradient in gradients(model).values())


def test_a_folder_whose_model_would_answer_in_tuples(cache: Path, qwen2: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(qwen2, tmp_path / "qwen")
    rewrite_json(folder / "config.json", return_dict=False)
    assert all(gradient.any() for gradient in gradients(build(folder, cache)).values())


@pytest.mark.parametrize("spec", ["tiny", "qwen2"])
def test_exported_files_and_weights_make_a_loadable_folder(spec: str, cache: Path, qwen2: Path, tmp_path: Path) -> None:
    model = build(qwen2 if spec == "qwen2" else spec, cache)
    files = model.export_files()
    assert {"config.json", "tokenizer.json", "tokenizer_config.json"} <= set(files)
    for name, text in files.items():
        (tmp_path / name).write_text(text, encoding="utf-8")
        assert str(cache) not in text and str(qwen2) not in text
    save_file(model.backbone.state_dict(), tmp_path / "model.safetensors")
    again = build(tmp_path, cache)
    assert torch.equal(again(*batch())[0], model(*batch())[0])
    pair = (grid(3, 4), grid(2, 2))
    assert again.encoder([pair]) == model.encoder([pair])


# ----------------------------------------------------------------------------------------------------------------------
# What is refused, in one line


def refusal(spec: str | Path, cache: Path, **changes: Any) -> str:
    """The message of the UserError that building `spec` raises; it must be one line and name what was asked for."""
    with pytest.raises(UserError) as caught:
        build(spec, cache, **changes)
    message = str(caught.value)
    assert "\n" not in message and message.startswith("--") and len(message) < 500
    return message


def rewrite_json(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def rewrite_weights(folder: Path, rename: Callable[[str], str | None]) -> None:
    """Save the weights under new names; None drops one."""
    tensors = {rename(name): tensor for name, tensor in load_file(folder / "model.safetensors").items()}
    save_file({name: t for name, t in tensors.items() if name}, folder / "model.safetensors", {"format": "pt"})


def spoil_weight(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    next(tensor for tensor in tensors.values() if tensor.ndim == 2)[0, 0] = math.inf
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


def adapter_alone(folder: Path) -> None:
    (folder / "config.json").unlink()
    (folder / "adapter_config.json").write_text('{"base_model_name_or_path": "Qwen/Qwen3-0.6B"}')


def pickle_only(folder: Path) -> None:
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()


def remove_tokenizer(folder: Path) -> None:
    for path in folder.glob("tokenizer*"):
        path.unlink()


def words(*known: str) -> Damage:
    """A tokenizer that knows these words and has no token for others, not even the one that it says is for them."""

    def damage(folder: Path) -> None:
        from tokenizers import Tokenizer, models, pre_tokenizers

        tokenizer = Tokenizer(models.WordLevel({word: place for place, word in enumerate(known)}, unk_token="[UNK]"))
        tokenizer.pre_tokenizer = pre_tokenizers.Split("\n", "isolated")
        tokenizer.save(str(folder / "tokenizer.json"))

    return damage


BROKEN: dict[str, tuple[Damage, str]] = {
    "a weight is infinite": (spoil_weight, "not finite"),
    "empty folder": (empty, "config.json"),
    "broken config": (lambda f: (f / "config.json").write_text("{"), "config.json"),
    "config is a list": (lambda f: (f / "config.json").write_text("[]"), "config.json"),
    "deep config": (lambda f: (f / "config.json").write_text("[" * 10**5), "config.json"),
    "no type": (lambda f: (f / "config.json").write_text("{}"), "model_type"),
    "llama": (lambda f: rewrite_json(f / "config.json", model_type="llama"), "'llama'"),
    "mixture": (lambda f: rewrite_json(f / "config.json", model_type="qwen3_moe"), "'qwen3_moe'"),
    "quantised": (lambda f: rewrite_json(f / "config.json", quantization_config={"quant_method": "awq"}), "quantised"),
    "impossible shape": (lambda f: rewrite_json(f / "config.json", hidden_size=-1), "cannot be loaded"),
    "wrong shape": (
        lambda f: rewrite_json(f / "config.json", intermediate_size=64),
        "other shapes than its config.json says, layers.0.mlp",
    ),
    "adapter": (lambda f: (f / "adapter_config.json").write_text("{}"), "adapter"),
    "adapter alone": (adapter_alone, "Qwen/Qwen3-0.6B"),
    "a pipe": (lambda f: os.mkfifo(f / "added_tokens.json"), "added_tokens.json is not a regular file"),
    "index of no strings": (
        lambda f: (f / "model.safetensors.index.json").write_text('{"weight_map": {"a": 5, "b": ["x"]}}'),
        "names 5, which is no .safetensors file",
    ),
    "an index of pickled weights": (
        lambda f: (
            (f / "model.safetensors").rename(f / "pytorch_model.bin")
            and (f / "model.safetensors.index.json").write_text('{"weight_map": {"a": "pytorch_model.bin"}}')
        ),
        "names 'pytorch_model.bin', which is no .safetensors file",
    ),
    "an index of files elsewhere": (
        lambda f: (
            (f / "model.safetensors").rename(f.parent / "other.safetensors")
            and (f / "model.safetensors.index.json").write_text('{"weight_map": {"a": "../other.safetensors"}}')
        ),
        "names '../other.safetensors', which is no .safetensors file",
    ),
    "refused when it is computed with": (
        lambda f: rewrite_json(f / "config.json", attention_dropout=1.5),
        "cannot be computed with",
    ),
    "no weights": (lambda f: (f / "model.safetensors").unlink(), "no model.safetensors"),
    "pickled weights": (pickle_only, "pickled"),
    "no safetensors": (lambda f: (f / "model.safetensors").write_bytes(b"\x80\x04" * 99), "cannot be loaded"),
    "cut weights": (lambda f: (f / "model.safetensors").write_bytes(bytes(8)), "cannot be loaded"),
    "a weight missing": (lambda f: rewrite_weights(f, lambda n: n if "model.norm" not in n else None), "norm.weight"),
    "weights of other names": (lambda f: rewrite_weights(f, "x.{}".format), "missing"),
    "shard missing": (
        lambda f: (f / "model.safetensors.index.json").write_text('{"weight_map": {"a": "model-1.safetensors"}}'),
        "no model-1.safetensors",
    ),
    "broken index": (lambda f: (f / "model.safetensors.index.json").write_text('{"weight_map": [1]}'), "index.json"),
    "no tokenizer": (remove_tokenizer, "tokenizer"),
    "broken tokenizer": (lambda f: (f / "tokenizer.json").write_text("{"), "tokenizer"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_folder_that_is_no_usable_qwen(
    name: str, cache: Path, copy_of_qwen2: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    damage, expected = BROKEN[name]
    damage(copy_of_qwen2)
    message = refusal(copy_of_qwen2, cache)
    assert expected in message and str(copy_of_qwen2) in message
    assert capfd.readouterr() == ("", "")


def test_a_tokenizer_that_cannot_read_the_probe(cache: Path, tmp_path: Path) -> None:
    build("tiny", cache)
    folder = shutil.copytree(next(path for path in cache.iterdir() if path.name.startswith("tiny-")), tmp_path / "copy")
    whole = json.loads((folder / "tokenizer.json").read_text())
    whole["model"]["unk_token"] = "[UNK]"  # not in its vocabulary
    (folder / "tokenizer.json").write_text(json.dumps({**whole, "pre_tokenizer": None}))
    assert "its tokenizer cannot read a context (Exception: WordLevel error: " in refusal(folder, cache)


def test_a_tokenizer_that_cannot_read_a_grid(copy_of_qwen2: Path) -> None:
    from tokenizers import Tokenizer

    words("IO", "I", "O", "\n", "1")(copy_of_qwen2)
    encoder = ContextEncoder(Tokenizer.from_file(str(copy_of_qwen2 / "tokenizer.json")), 100)
    one, two = np.array([[1]], np.uint8), np.array([[2]], np.uint8)
    assert len(encoder([(one, one)])) == 10
    with pytest.raises(UserError, match=r"tokenizer cannot read a context \(WordLevel error: .*\)$"):
        encoder([(one, two)])


def test_code_in_a_folder_is_not_run(cache: Path, copy_of_qwen2: Path, tmp_path: Path) -> None:
    (copy_of_qwen2 / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\nclass Model: pass\n")
    remote = {"AutoConfig": "evil.Model", "AutoModel": "evil.Model", "AutoTokenizer": ["evil.Model", "evil.Model"]}
    for file in ("config.json", "tokenizer_config.json"):
        rewrite_json(copy_of_qwen2 / file, auto_map=remote)
    build(copy_of_qwen2, cache)
    assert not (tmp_path / "ran").exists()


def test_a_tokenizer_with_more_tokens_than_the_model(cache: Path, copy_of_qwen2: Path, tmp_path: Path) -> None:
    small = write_model(tmp_path / "small", "qwen2", vocab_size=40)
    assert "do not belong together" in refusal(small, cache)


@pytest.mark.parametrize("spec", ["./missing", "../missing", "/missing/model", "~/missing", "a/b/c", "missing/"])
def test_a_missing_folder_is_told_as_such(spec: str, cache: Path) -> None:
    assert refusal(spec, cache) == f"--qwen {spec}: no such folder"


def test_a_folder_that_may_not_be_listed(cache: Path, copy_of_qwen2: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    listed = os.listdir

    def listdir(path: Any = ".") -> Any:
        if Path(path) == copy_of_qwen2:
            raise PermissionError(13, "Permission denied", str(path))
        return listed(path)

    monkeypatch.setattr(os, "listdir", listdir)  # root may do anything
    message = f"--qwen {copy_of_qwen2}: the folder cannot be looked into (Permission denied)"
    assert refusal(copy_of_qwen2, cache) == message


def test_other_names_and_settings(cache: Path, tmp_path: Path) -> None:
    assert "--qwen tiny" in refusal("tinny", cache) and "--qwen tiny" in refusal("", cache)
    (tmp_path / "weights").write_text("")
    assert "is a file" in refusal(tmp_path / "weights", cache)
    assert "--max_context_tokens 40000" in refusal("tiny", cache, max_context_tokens=40000)
    assert "--max_context_tokens 1" in refusal("tiny", cache, max_context_tokens=1)
    assert "--qwen_tune half" in refusal("tiny", cache, tune="half")


# ----------------------------------------------------------------------------------------------------------------------
# The hub: a real server on this machine that speaks as much of the hub's protocol as a download needs


class Hub(ThreadingHTTPServer):
    """Serves the folder `files` as the one public model Qwen/Small; `delay`: seconds before any answer."""

    files: Path
    delay = 0.0
    requests = 0
    last = ""


class HubHandler(BaseHTTPRequestHandler):
    server: Hub
    commit = "0123456789" * 4

    def do_GET(self) -> None:
        self.server.requests += 1
        self.server.last = self.path
        time.sleep(self.server.delay)
        path = self.path.split("?")[0]
        files = sorted(path.name for path in self.server.files.iterdir())
        if not path.startswith(("/Qwen/Small/", "/api/models/Qwen/Small/")):
            self.answer(404, b"", {"X-Error-Code": "RepoNotFound"})
        elif "/revision/" in path:
            siblings = [{"rfilename": name} for name in files]
            self.answer(200, json.dumps({"id": "Qwen/Small", "sha": self.commit, "siblings": siblings}).encode())
        elif "/tree/" in path:
            sizes = {name: (self.server.files / name).stat().st_size for name in files}
            tree = [{"type": "file", "path": name, "size": size, "oid": "0" * 40} for name, size in sizes.items()]
            self.answer(200, json.dumps(tree).encode())
        else:
            content = (self.server.files / path.rsplit("/", 1)[1]).read_bytes()
            self.answer(200, content, {"ETag": hashlib.sha1(content).hexdigest(), "X-Repo-Commit": self.commit})

    do_HEAD = do_GET

    def answer(self, status: int, content: bytes, headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for name, value in {**(headers or {}), "Content-Length": str(len(content))}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(content)

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def hub(qwen2: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    from huggingface_hub import constants

    server = Hub(("127.0.0.1", 0), HubHandler)
    server.files = qwen2
    address = f"http://127.0.0.1:{server.server_port}"
    monkeypatch.setattr(constants, "ENDPOINT", address)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", address + "/{repo_id}/resolve/{revision}/{filename}")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


def test_a_hub_model_is_downloaded_once(hub: Hub, cache: Path, qwen2: Path) -> None:
    downloaded, local = build("Qwen/Small", cache), build(qwen2, cache)
    assert "Hugging Face hub" in downloaded.description
    assert torch.equal(downloaded(*batch())[0], local(*batch())[0])
    asked = hub.requests
    assert torch.equal(build("Qwen/Small", cache)(*batch())[0], local(*batch())[0])
    assert hub.requests == asked  # from the cache, without a word to the hub


def test_an_adapter_names_its_commit_and_gets_that_one_again(
    hub: Hub, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from huggingface_hub import constants

    base = build("Qwen/Small", cache, tune="lora").base
    assert base is not None and (base.name, base.revision) == ("Qwen/Small", HubHandler.commit)
    assert base.prefix == "model."

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "another machine"))
    hub.requests = 0
    again = build("Qwen/Small", cache, tune="lora", revision=base.revision).base
    assert hub.requests > 0 and f"/{base.revision}/" in hub.last and "/main" not in hub.last
    assert again is not None and again.files == base.files and again.revision == base.revision


def test_a_misspelt_hub_name(hub: Hub, cache: Path, capfd: pytest.CaptureFixture[str]) -> None:
    started = time.monotonic()
    message = refusal("Qwen/Smal", cache)
    assert time.monotonic() - started < 4
    assert "Qwen/Smal:" in message and "no public model" in message
    assert "--qwen tiny" in message and "--qwen DIR" in message
    assert capfd.readouterr() == ("", "")


def test_an_unreachable_hub(hub: Hub, cache: Path, capfd: pytest.CaptureFixture[str]) -> None:
    hub.shutdown()
    hub.server_close()
    started = time.monotonic()
    message = refusal("auto", cache, device_type="cuda")  # what auto means on cuda
    assert time.monotonic() - started < 4
    assert "Qwen/Qwen2.5-0.5B:" in message and "cannot be reached" in message and "--qwen tiny" in message
    assert capfd.readouterr() == ("", "")


def test_a_hub_that_does_not_answer(hub: Hub, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(qwen_source, "_HUB_SECONDS", 0.3)
    hub.delay = 1.0
    started = time.monotonic()
    assert "--qwen tiny" in refusal("Qwen/Small", cache)
    assert time.monotonic() - started < 0.9


def test_auto_is_tiny_without_cuda(cache: Path) -> None:
    assert build("auto", cache).is_tiny and not build("auto", cache, device_type="mps").name.startswith("Qwen")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("tune", ["full", "frozen"])
def test_on_a_gpu(tune: str, cache: Path) -> None:
    state = torch.cuda.get_rng_state()
    model = build("tiny", cache, tune=tune, gradient_checkpointing=True)
    assert torch.equal(torch.cuda.get_rng_state(), state)
    expected, _ = model(*batch())
    model = model.cuda()
    ids, lengths = (tensor.cuda() for tensor in batch())
    torch.testing.assert_close(model(ids, lengths)[0].cpu(), expected, atol=1e-3, rtol=1e-3)
    with torch.autocast("cuda", dtype=torch.bfloat16):
        prompt, _ = model(ids, lengths)
    prompt.square().sum().backward()
    assert all(p.grad is not None and p.grad.any() for p in model.trainable_parameters().values())
