"""What the paper's methods train: scales per head or channel, or low-rank updates of the projections."""

from __future__ import annotations

from typing import Any, Literal

METHODS = {"sealh": "SEAL-H", "sealc": "SEAL-C", "seall": "LoRA", "seald": "DoRA"}
KEYS = {name: key for key, name in METHODS.items()}
GRANULARITY: dict[str, Literal["head", "channel"]] = {"sealh": "head", "sealc": "channel"}
RANK, PROJECTIONS = 4, ("q_proj", "k_proj", "v_proj", "o_proj")  # of the paper's low-rank baselines (section 9)


def peft_config(method: str) -> Any:
    """Build the PEFT configuration that a method's recipes describe to Axolotl; ``method`` is a key of ``METHODS``."""
    from peft import LoraConfig

    from axolotl_plugins.seal import SealConfig

    if method in GRANULARITY:
        return SealConfig(granularity=GRANULARITY[method])
    return LoraConfig(r=RANK, lora_alpha=2 * RANK, target_modules=list(PROJECTIONS), use_dora=method == "seald")


def count_parameters(matrix: dict[str, Any]) -> dict[str, dict[str, int]]:
    """Count the trainable parameters of every method in the models of ``matrix.yml``, from their shapes alone.

    Returns:
        Base model -> method -> number of trainable parameters.
    """
    from accelerate import init_empty_weights
    from peft import get_peft_model
    from transformers import CONFIG_MAPPING, AutoModelForCausalLM

    by_shape: dict[str, dict[str, int]] = {}
    for name in {model["shape"] for model in matrix["models"].values()}:
        shape = matrix["shapes"][name] | {"vocab_size": 32}  # embeddings are frozen: their size does not matter
        config = CONFIG_MAPPING[shape.pop("model_type")](**shape, pad_token_id=0)
        by_shape[name] = {}
        for method in METHODS:
            with init_empty_weights():
                model = get_peft_model(AutoModelForCausalLM.from_config(config), peft_config(method))
            by_shape[name][method] = sum(p.numel() for p in model.parameters() if p.requires_grad)
    return {model["base_model"]: by_shape[model["shape"]] for model in matrix["models"].values()}
