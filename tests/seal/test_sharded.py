"""Weights, and samples as well, spread over two processes (FSDP2, over gloo): the scales are those of one process."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from miniatures import build, token_ids
from peft import PeftModel, get_peft_model
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from axolotl_plugins.seal import SealConfig
from axolotl_plugins.seal.answer_logits import answers_only, next_labels
from axolotl_plugins.seal.context_parallel import ContextParallel
from axolotl_plugins.seal.scales import scale_matrix, summary

STEPS, PROCESSES = 3, 2


def wrapped(grain: str, dtype: torch.dtype) -> PeftModel:
    """The same model in every process, its scales in float32."""
    return get_peft_model(build("llama_gqa", dtype), SealConfig(granularity=grain)).train()


def step_loss(model: PeftModel, number: int, shared: ContextParallel | None) -> torch.Tensor:
    """The loss on one sample of its own, or on its part of one."""
    ids = token_ids(batch=1, seed=number)
    if shared is None:
        return model(input_ids=ids, labels=ids).loss
    inputs = answers_only(shared.share({"input_ids": ids, "shift_labels": next_labels(ids)}))
    return shared.size * model(**inputs).loss


def trainable(model: PeftModel) -> dict[str, torch.nn.Parameter]:
    """The scales by name."""
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def tune(model: PeftModel, samples_of_step: list[list[int]], shared: ContextParallel | None = None) -> None:
    """AdamW steps, each on the mean over some samples."""
    optimizer = torch.optim.AdamW(trainable(model).values(), lr=2e-2, weight_decay=0.0)
    for samples in samples_of_step:
        for number in samples:
            (step_loss(model, number, shared) / len(samples)).backward()
        optimizer.step()
        optimizer.zero_grad()


def samples_of(step: int, share: bool) -> list[int]:
    """Samples of a step of all processes: one each, or one of all."""
    return [step] if share else [PROCESSES * step + rank for rank in range(PROCESSES)]


def process(rank: int, folder: str, grain: str, dtype: torch.dtype, share: bool) -> None:
    """One of the processes; the first one saves the scales."""
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    dist.init_process_group("gloo", f"file://{folder}/store", rank=rank, world_size=PROCESSES)
    torch.set_num_threads(1)
    mesh = dist.init_device_mesh("cpu", (PROCESSES,))
    model = wrapped(grain, dtype)
    shared = ContextParallel(PROCESSES) if share else None
    if shared:
        shared.prepare(model.get_base_model())
    for layer in model.get_base_model().model.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    assert all(isinstance(parameter, DTensor) for parameter in model.parameters())
    tune(model, [[samples_of(step, share)[0 if share else rank]] for step in range(STEPS)], shared)
    scales = {name: parameter.full_tensor() for name, parameter in trainable(model).items()}
    logged = summary(scale_matrix(model))
    flat = torch.cat([scale.detach() for scale in scales.values()])
    assert logged["min"] == flat.min().item() and logged["max"] == flat.max().item() and logged["min"] != 1
    if rank == 0:
        torch.save(scales, f"{folder}/scales.pt")
    dist.destroy_process_group()


@pytest.mark.parametrize(
    ("grain", "dtype", "share"),
    [("head", torch.float32, False), ("channel", torch.bfloat16, False), ("channel", torch.float32, True)],
)
def test_two_shards_learn_what_one_process_learns(grain, dtype, share, tmp_path: Path):
    mp.spawn(process, (str(tmp_path), grain, dtype, share), nprocs=PROCESSES)
    sharded = torch.load(tmp_path / "scales.pt", weights_only=True)
    whole = wrapped(grain, dtype)
    tune(whole, [samples_of(step, share) for step in range(STEPS)])
    for name, scale in trainable(whole).items():
        assert sharded[name].dtype == torch.float32 and (scale != 1).all()
        torch.testing.assert_close(sharded[name], scale.detach(), rtol=0, atol=1e-6)
