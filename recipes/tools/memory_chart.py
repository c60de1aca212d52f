"""Plot the seconds of a step against its memory, measured and estimated (``python -m recipes.tools.memory_chart``)."""

from __future__ import annotations

from recipes.tools.cost import CARDS, Shape, StepConfig, choices, step_seconds, training_bytes
from recipes.tools.render import RESULTS, device_name, measured_steps, read_matrix

SHAPE, TOKENS = "llama2_7b", 31000


def main() -> None:
    """Write results/bench_memory.png: Llama-2-7B's shapes at 31,000 tokens, SEAL-C."""
    import matplotlib.pyplot as plt

    from eval.score_plots import save_figure

    shape = Shape.of(read_matrix()["shapes"][SHAPE])
    figure, axes = plt.subplots(figsize=(9, 5), layout="constrained")
    for gpu, colour in (("h200", "tab:blue"), ("h100", "tab:orange")):
        for liger, marker in ((True, "."), (False, "x")):
            steps = [step for step in choices(StepConfig(liger=liger)) if not step.offload]
            axes.plot([training_bytes(shape, TOKENS, step=step) / 2**30 for step in steps],
                      [step_seconds(shape, TOKENS, step, gpu) for step in steps], marker, color=colour, alpha=0.5,
                      label=f"{gpu.upper()}, estimated, {'with' if liger else 'without'} Liger")  # fmt: skip
    rows = [row for row in measured_steps() if "error" not in row and row["method"] == "SEAL-C"
            and (row["shape"], row["tokens"]) == (SHAPE, TOKENS)]  # fmt: skip
    for gpu in sorted({device_name(row) for row in rows}):
        points = {row["setting"]: (row["peak_gib"], row["seconds"]) for row in rows if device_name(row) == gpu}
        axes.plot(*zip(*points.values(), strict=True), "ko", fillstyle="none", label=f"{gpu}, measured")
        for name, place in points.items():
            axes.annotate(name, place, xytext=(5, 5), textcoords="offset points", fontsize=8)
    for card in CARDS:
        axes.axvline(card, color="grey", linewidth=0.5, linestyle="--")
        axes.text(card, axes.get_ylim()[0], f"{card} GiB", ha="right", va="bottom", rotation=90, fontsize=8)
    axes.set(xlabel="peak memory (GiB)", ylabel="seconds a sample", title="Llama-2-7B shapes, 31,000 tokens, SEAL-C")
    axes.legend(fontsize=8)
    save_figure(figure, RESULTS / "bench_memory.png")


if __name__ == "__main__":
    main()
