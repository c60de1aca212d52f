"""Samples spread over processes (over gloo): loss and gradients are those of one process."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from miniatures import build, token_ids
from peft import PeftModel, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

from axolotl_plugins.seal import SealConfig
from axolotl_plugins.seal.answer_logits import IGNORED, answers_only, next_labels
from axolotl_plugins.seal.context_parallel import MODEL_TYPES, ContextParallel, check_model, check_processes
from recipes import bench
from recipes.tools.cost import Shape, StepConfig, training_bytes

# The last one's frequencies are others for samples longer than 22 tokens, which one process alone can see.
MODELS = ("llama_mha", "llama_gqa", "mistral", "qwen2", "qwen3", "gpt_neox", "phi3")
LENGTH = 27  # a multiple of no number of chunks
LONGROPE = {
    "original_max_position_embeddings": 22,
    "rope_parameters": {"rope_type": "longrope", "rope_theta": 10000.0, "short_factor": [1.0] * 4,
                        "long_factor": [1.0, 2.0, 3.0, 4.0]},
}  # fmt: skip


def wrapped(name: str) -> PeftModel:
    """The same model in every process, its attention full and its scales not all 1."""
    # Heads that share keys have copies of them in float32 alone.
    dtype = torch.float64 if name == "llama_gqa" else torch.float32
    model = build(name, dtype, sliding_window=None, **(LONGROPE if name == "phi3" else {}))
    peft_model = get_peft_model(model, SealConfig(granularity="channel")).train()
    generator = torch.Generator().manual_seed(2)
    for parameter in peft_model.parameters():
        if parameter.requires_grad:
            parameter.data += 0.3 * torch.randn(parameter.shape, generator=generator)
    return peft_model


def sample(learned: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
    """Ids and labels of one sample, of which some tokens are learned."""
    ids = token_ids(batch=1, length=LENGTH)
    labels = torch.full_like(ids, IGNORED)
    labels[:, learned] = ids[:, learned]
    return ids, labels


def gradients(model: PeftModel) -> dict[str, torch.Tensor]:
    """Of all scales, by name."""
    return {name: p.grad for name, p in model.named_parameters() if p.requires_grad and p.grad is not None}


def process(rank: int, folder: str, processes: int, learned: list[int], setting: str) -> None:
    """One of the processes that share a sample; each saves what is its own part."""
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    dist.init_process_group("gloo", f"file://{folder}/store", rank=rank, world_size=processes)
    torch.set_num_threads(1)
    for name in MODELS:
        model = wrapped(name)
        shared = ContextParallel(processes)
        shared.prepare(model.get_base_model())
        ids, labels = sample(learned)
        inputs = shared.share({"input_ids": ids, "shift_labels": next_labels(labels)})
        with bench.applied(model, StepConfig.named(setting)):
            loss = model(**answers_only(inputs)).loss
            loss.backward()
        torch.save((loss.detach(), gradients(model)), f"{folder}/{name}_{rank}.pt")
    dist.destroy_process_group()


@pytest.mark.parametrize(
    ("processes", "learned", "setting"),
    [(2, [LENGTH - 2, LENGTH - 1], "none"), (3, [*range(1, LENGTH)], "full"), (2, [LENGTH - 1], "every2")],
)
def test_parts_of_a_sample_add_up_to_the_whole(processes, learned, setting, tmp_path: Path):
    mp.spawn(process, (str(tmp_path), processes, learned, setting), nprocs=processes)
    for name in MODELS:
        parts = [torch.load(tmp_path / f"{name}_{rank}.pt", weights_only=True) for rank in range(processes)]
        model = wrapped(name)
        ids, labels = sample(learned)
        loss = model(input_ids=ids, labels=labels).loss
        loss.backward()
        torch.testing.assert_close(sum(part[0] for part in parts), loss.detach(), rtol=1e-5, atol=1e-6)
        for key, whole in gradients(model).items():
            assert whole.abs().max() > 1e-4
            torch.testing.assert_close(sum(part[1][key] for part in parts), whole, rtol=1e-4, atol=1e-6)
            # A process without an answer learns by way of its keys and values, so from layers below the last.
            assert all(part[1][key].any() for part in parts) or ".1." in key
    assert {build(name).config.model_type for name in MODELS} == set(MODEL_TYPES)


def test_what_cannot_be_shared_is_refused():
    check_model(build("llama_mha"))
    check_processes(4, 2)
    for name, message in (("gpt2", "found gpt2, expected one of llama"), ("mistral", "has sliding-window attention")):
        with pytest.raises(ValueError, match=message):
            check_model(build(name))
    stretched = build("llama_mha")
    stretched.config.rope_parameters = {"rope_type": "self_extend"}
    with pytest.raises(ValueError, match="found rope_type 'self_extend'"):
        check_model(stretched)
    with pytest.raises(ValueError, match="2 processes share a sample, found 3: start a multiple of 2"):
        check_processes(3, 2)


def peak(rank: int, folder: str, processes: int, tokens: int) -> None:
    """What a step on a shared sample adds to this process's memory, in bytes, saved by each."""
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    dist.init_process_group("gloo", f"file://{folder}/store", rank=rank, world_size=processes)
    torch.set_num_threads(1)
    model = get_peft_model(LlamaForCausalLM(LlamaConfig(**bench.SMALL)), SealConfig(granularity="channel")).train()
    model.gradient_checkpointing_enable()
    model.enable_input_require_grads()
    shared = ContextParallel(processes)
    shared.prepare(model.get_base_model())

    def memory(mark: str) -> int:
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) for line in lines if line.startswith(mark)) * 1024

    for length in (256, tokens):
        ids = token_ids(batch=1, length=length)
        labels = next_labels(torch.where(torch.arange(length) < length - 40, IGNORED, ids))
        Path("/proc/self/clear_refs").write_text("5")  # the highest mark starts anew
        before = memory("VmRSS")
        model(**answers_only(shared.share({"input_ids": ids, "shift_labels": labels}))).loss.backward()
    Path(f"{folder}/{rank}").write_text(str(memory("VmHWM") - before))
    dist.destroy_process_group()


@pytest.mark.slow
@pytest.mark.parametrize(("processes", "tokens"), [(2, 8192), (4, 8192), (4, 16384)])
def test_memory_of_each_process_is_what_the_formula_says(processes, tokens, tmp_path: Path, monkeypatch):
    monkeypatch.setenv("MALLOC_TRIM_THRESHOLD_", "0")
    monkeypatch.setenv("MALLOC_MMAP_THRESHOLD_", "65536")
    mp.spawn(peak, (str(tmp_path), processes, tokens), nprocs=processes)
    shape, step = Shape.of(bench.SMALL), StepConfig(element=4, context_parallel_size=processes)
    full, empty = (training_bytes(shape, length, step=step) for length in (tokens, 0))
    for rank in range(processes):
        assert int((tmp_path / str(rank)).read_text()) == pytest.approx(full - empty, rel=0.15)
