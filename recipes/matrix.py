"""The text of recipes: those of the paper, from ``matrix.yml``, and those of any other model."""

from __future__ import annotations

import itertools
import shlex
from pathlib import Path
from textwrap import fill, indent
from typing import Any, Literal

import yaml

from data_gen.tasks import TaskAttribute, tasks_of
from recipes.estimate import CPU_FLOPS, GOOD_SHARE, PAPER_SHARE, Shape, needs_checkpointing, recipe_cost

FOLDER = Path(__file__).parent
METHODS = {"sealh": "SEAL-H", "sealc": "SEAL-C", "seall": "SEAL-L (LoRA)", "seald": "SEAL-D (DoRA)"}
TASKS = TaskAttribute("description")
# Of tasks, at equal shares of the samples; the demo has lengths, samples and rates of its own.
MIXTURES = {"multi": ("line", "niah", "vt", "cwe", "fwe"), "demo": ("line",)}
RULER = tasks_of("ruler")
ESSAYS = "essays # from the hub; or a folder of text files, or prose, which is built in"
SHORTEST_RULER = 8000  # tokens; lengths are drawn from here to the model's longest (appendix B.3)


def rate(rates: dict[str, dict[str, float]], model: str, task: str, method: str) -> float:
    """The paper's learning rate: a model's own, else the task's.

    Raises:
        ValueError: there is none.
    """
    of_task = rates.get(task, {})
    if (found := of_task.get(f"{model} {method}", of_task.get(method))) is None:
        raise ValueError(f"matrix.yml: no rate for {task}, {model}, {method}")
    return found


def comment(text: str) -> str:
    """Wrap a text into comment lines."""
    return fill(text, 118, initial_indent="# ", subsequent_indent="# ", break_on_hyphens=False) + "\n"


def expectation(settings: dict[str, Any], shape: Shape | None, gpu: bool) -> str:
    """Comment lines that say what memory and time a recipe takes, and how that is known; empty if it is not."""
    if shape is None:
        return ""
    cost = recipe_cost(settings, shape)
    if not gpu:
        minutes = "a minute" if cost.cpu_minutes == 1 else f"{cost.cpu_minutes} minutes"
        return comment(
            f"Takes about {cost.cpu_gib:.0f} GiB, and {minutes} on two CPU cores: computed from shapes "
            f"(`python -m recipes cost`), at the {CPU_FLOPS / 1e9:.0f} GFLOP/s in float32 that tuning SmolLM2-135M "
            "with 1,024 tokens reached on two idle cores with AVX-512; others may take several times as long."
        )
    fast, slow = cost.minutes("a100")
    each, cards = (
        ("", "one") if cost.held.context_parallel_size == 1 else (" on each", str(cost.held.context_parallel_size))
    )
    text = (
        f"Takes about {cost.gib:.0f} GiB{each}, and {fast:.0f} to {slow:.0f} minutes on {cards} A100 80 GB: computed "
        f"from shapes (`python -m recipes cost`), at {GOOD_SHARE:.0%} of the card's peak and at the {PAPER_SHARE:.0%} "
        "that the authors' 40 minutes for 7B models and 31K tokens (section 5) come to; not measured yet."
    )
    if cost.held.context_parallel_size > 1:
        text += f" Start {cost.held.context_parallel_size} processes, which share every sample."
    if "fsdp_config" in settings or "deepspeed" in settings:
        weights = cost.held.element * shape.parameters / 2**30
        text += (
            f" On several, {weights:.0f} GiB of that, the weights, are spread over them, and each takes samples of its "
            "own: `--num-epochs=N` makes as many steps on N devices as one makes."
        )
    return comment(text)


def sample_tokens(model: dict[str, Any], task: str, part: str) -> int | str:
    """Return the longest sample of a task in tokens, or the range that lengths are drawn from.

    Args:
        model: an entry of ``models`` in ``matrix.yml``; its ``tokens`` hold for all tasks, or are a mapping by task.
        task: a key of ``TASKS`` or ``MIXTURES``.
        part: the task itself, or one of the mixture.
    """
    tokens = model["tokens"]
    if isinstance(tokens, dict):
        tokens = tokens.get(task, tokens.get(part))
    if part in RULER and ":" not in str(tokens):
        tokens = f"{min(SHORTEST_RULER, int(tokens) // 2)}:{tokens}"
    return tokens


def data_block(model: dict[str, Any], task: str, tokens: int | str, samples: int) -> str:
    """What ``seal: data:`` says about one file, without indentation."""
    tokens = f'"{tokens}"' if isinstance(tokens, str) else tokens
    text = f"""task: {task}
tokens: {tokens} # counted with this model's tokenizer and chat template
samples: {samples}
seed: 0
"""
    if task == "niah":
        text += f"haystack: {model.get('haystack', ESSAYS)}\n"
    return text


def recipe(file: Path, model: dict[str, Any], task: str, method: str, *, lr: float, shows: str, shape: Shape | None,
           samples: int = 50, epochs: int = 1, sharding: str | None = None,
           context_parallel_size: int = 1) -> str:  # fmt: skip
    """The text of one recipe.

    Args:
        file: where it will lie.
        model: an entry of ``models`` in ``matrix.yml``.
        task: a key of ``TASKS`` or ``MIXTURES``.
        method: a key of ``METHODS``.
        lr: learning rate.
        shows: what it is good for, such as what of the paper it reproduces.
        shape: of the model, from which its cost is computed; None if it is not known.
        samples: training samples.
        epochs: passes over them.
        sharding: a key of ``SHARDING``, for weights that are spread over devices.
        context_parallel_size: devices that every sample's tokens are spread over.
    """
    name, gpu = file.stem, model.get("gpu", True)
    parts = MIXTURES.get(task, (task,))
    tokens = [sample_tokens(model, task, part) for part in parts]
    longest = max(int(str(part).rpartition(":")[2]) for part in tokens)
    recompute = gpu or (shape is not None and needs_checkpointing(shape, longest))
    checkpointing = f"gradient_checkpointing: {str(recompute).lower()}\n"
    if recompute and sharding != "zero3":  # which needs the reentrant kind
        checkpointing += "gradient_checkpointing_kwargs: {use_reentrant: false} # gradients end at the lowest scale\n"
    # In bfloat16 with FlashAttention, but under ZeRO-3, which holds float32.
    precision, attention = f"bf16: {str(gpu).lower()}\ntf32: false", "flash_attention_2" if gpu else "sdpa"
    if sharding:
        precision, attention = SHARDING[sharding]
    adapter = f"adapter: lora\n{LORA}peft_use_dora: {str(method == 'seald').lower()}\n"
    if method in GRANULARITY:
        adapter = f"adapter: seal\n{SEAL}"
    seal = f"  granularity: {GRANULARITY[method]}\n" if method in GRANULARITY else ""
    if context_parallel_size > 1:
        seal += (
            f"  context_parallel: {context_parallel_size} # processes that share a sample, each a part of its tokens\n"
        )
        attention = "sdpa # context_parallel gathers keys and values for it"
    template = "chat_template: tokenizer_default"
    if "template" in model:
        template = f"chat_template: jinja\nchat_template_jinja: recipes/templates/{model['template']}.jinja"
    stretched = ""
    if "model_config" in model:
        stretched = yaml.safe_dump({"model_config": model["model_config"]}, sort_keys=False)
    plugins = "  - axolotl_plugins.seal.SealPlugin"
    if "self_extend" in stretched:
        plugins = f"  - axolotl_plugins.self_extend.SelfExtendPlugin\n{plugins}"
        attention = "sdpa # self_extend takes its place when the model is loaded"
    same = name.removesuffix(f"_{sharding}").removesuffix(
        f"_cp{context_parallel_size}"
    )  # data are the same on however many devices
    key = same.removesuffix(f"_{method}")
    blocks = [
        data_block(model, part, length, samples // len(parts)) for part, length in zip(parts, tokens, strict=True)
    ]
    files = [key] if len(parts) == 1 else [f"{key}_{part}" for part in parts]
    if len(parts) == 1:
        data = "  data: # made by the plugin when the file below is missing\n" + indent(blocks[0], "    ")
    else:
        data = "  data: # made by the plugin when the files below are missing, one entry for each\n"
        data += "".join("    - " + indent(block, "      ").lstrip() for block in blocks)
    datasets = "".join(DATASET.format(file=file) for file in files)
    body = f"""base_model: {model["base_model"]}
{stretched}plugins:
{plugins}

{adapter}seal:
{seal}{data}
datasets:
{datasets}{template}
dataset_prepared_path: data/prepared
dataset_num_proc: 1

sequence_len: {model["window"]}
excess_length_strategy: raise # the default drops samples that are too long
pad_to_multiple_of: 1 # the default pads, for which attention may build a mask of T x T
sample_packing: false

learning_rate: {lr}
optimizer: adamw_torch
lr_scheduler: constant
warmup_steps: 0
weight_decay: 0
num_epochs: {epochs}
micro_batch_size: 1
gradient_accumulation_steps: 1
seed: 42

{precision}
attn_implementation: {attention}
{checkpointing}
output_dir: outputs/{name}
save_strategy: "no"
logging_steps: 1
"""
    return f"""# accelerate launch -m axolotl.cli.train {shlex.quote(str(file))}
#
{comment(f"{METHODS[method]} on {model['name']}, {' + '.join(TASKS[part] for part in parts)}: {shows}.")}\
# Learns from {samples} samples, {epochs} {"epoch" if epochs == 1 else "epochs"}.
{expectation(yaml.safe_load(body), shape, gpu)}
{body}"""


DATASET = """  - path: data/{file}.jsonl
    ds_type: json
    type: chat_template
    roles_to_train: [assistant]
"""
SEAL = "merge_method: legacy # for `axolotl merge-lora`; its default knows LoRA alone\n"
GRANULARITY: dict[str, Literal["head", "channel"]] = {"sealh": "head", "sealc": "channel"}
RANK, PROJECTIONS = 4, ("q_proj", "k_proj", "v_proj", "o_proj")  # of the paper's low-rank baselines (section 9)
LORA = f"""lora_r: {RANK} # on q, k, v and o (section 9)
lora_alpha: {2 * RANK} # the paper does not say; PEFT's default
lora_dropout: 0
lora_target_modules: [{", ".join(PROJECTIONS)}]
"""


# Settings of weights that are spread over devices, and the attention that can be computed in their precision.
SHARDING = {
    "fsdp2": ("""fsdp_version: 2
fsdp_config:
  auto_wrap_policy: TRANSFORMER_BASED_WRAP
  transformer_layer_cls_to_wrap: LlamaDecoderLayer
  state_dict_type: FULL_STATE_DICT
  reshard_after_forward: true
bf16: false # with it the scales of every step would be rounded
bfloat16: true
tf32: false""", "flash_attention_2"),
    "zero3": ("""deepspeed:
  zero_optimization:
    stage: 3
    stage3_gather_16bit_weights_on_model_save: true # in whatever dtype they are
  train_micro_batch_size_per_gpu: auto
  gradient_accumulation_steps: auto
bf16: false # it would round the scales, as bf16.enabled in the block above would; without both all is in float32
tf32: true""", "sdpa"),
}  # fmt: skip


def read_matrix() -> dict[str, Any]:
    """``matrix.yml``."""
    return yaml.safe_load((FOLDER / "matrix.yml").read_text())


def recipe_name(model: str, task: str, method: str, row: dict[str, Any] | None = None) -> str:
    """The name of a recipe, which is also that of its adapter's folder.

    Args:
        model: a key of ``models`` in ``matrix.yml``.
        task: a key of ``TASKS`` or ``MIXTURES``.
        method: a key of ``METHODS``.
        row: an entry of ``recipes``, for what it does otherwise than others of the same model, task and method.
    """
    row = row or {}
    longer = f"_{round(row['tokens'] / 1024)}k" if "tokens" in row else ""
    fewer = f"_{row['samples']}x{row['epochs']}" if "epochs" in row else ""
    sharded = f"_{row['sharding']}" if "sharding" in row else ""
    shared = f"_cp{row['context_parallel']}" if "context_parallel" in row else ""
    return f"{model}{longer}_{task}_{method}{fewer}{sharded}{shared}"


def peft_config(method: str) -> Any:
    """What a method trains, as its recipes tell Axolotl; a key of ``METHODS``."""
    from peft import LoraConfig

    from axolotl_plugins.seal import SealConfig

    if method in GRANULARITY:
        return SealConfig(granularity=GRANULARITY[method])
    return LoraConfig(r=RANK, lora_alpha=2 * RANK, target_modules=list(PROJECTIONS), use_dora=method == "seald")


def all_recipes() -> dict[str, str]:
    """Name and text of every recipe of ``matrix.yml``.

    Raises:
        ValueError: a rate is missing, or two rows make the same file.
    """
    matrix = read_matrix()
    texts: dict[str, str] = {}
    for row in matrix["recipes"]:
        samples, epochs = row.get("samples", 50), row.get("epochs", 1)
        for model, task, method in itertools.product(row["models"], row["tasks"], row["methods"]):
            name, entry = recipe_name(model, task, method, row), matrix["models"][model]
            entry = entry | {"tokens": row.get("tokens", entry["tokens"])}
            shape = matrix["shapes"][entry["shape"]]
            if name in texts:
                raise ValueError(f"matrix.yml: two rows make {name}.yml")
            texts[name] = recipe(
                Path("recipes") / f"{name}.yml", entry, task, method,
                lr=rate(entry.get("rates", matrix["rates"]), model, task, method),
                shows=f"{row['shows']} of arXiv 2501.15225", shape=Shape.of(shape),
                samples=samples, epochs=epochs, sharding=row.get("sharding"),
                context_parallel_size=row.get("context_parallel", 1),
            )  # fmt: skip
    return texts
