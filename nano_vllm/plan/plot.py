"""What a sequence gets against what a GPU gives, for every layout and batch."""

from __future__ import annotations

from nano_vllm.plan.setup import Layout
from nano_vllm.plan.simulate import Simulation, batches

LINES = ("-", "--", "-.", ":")
"""By the number of stages; colours are by tensor parallel size."""


def write_plot(path: str, simulation: Simulation, layouts: list[Layout]) -> None:
    """A line a layout, a dot a batch: tokens per second of a sequence and of a GPU. Up and to the
    right is better; what no other dot is above and right of is worth choosing from. OSError where
    the file cannot be written.

    Args:
        path: ends with one of cli.PLOT_FORMATS.
        simulation: gives the times.
        layouts: those that do not fit are left out.
    """
    from matplotlib.figure import Figure

    setup = simulation.setup
    picture = Figure(figsize=(10, 7), layout="constrained")
    axes = picture.subplots()
    axes.set_title(
        f"{setup.config.model}, {setup.gpu.name}, context {simulation.context}, modelled"
    )
    tps = sorted({layout.tp for layout in layouts})
    pps = sorted({layout.pp for layout in layouts})
    for layout in layouts:
        sizes = batches(simulation.max_batch(layout))
        if not sizes:
            continue
        decodes = [simulation.decode(layout, size) for size in sizes]
        axes.plot(
            [1 / decode.seconds for decode in decodes],
            [decode.tokens_per_second / layout.num_gpus for decode in decodes],
            color=f"C{tps.index(layout.tp) % 10}",
            linestyle=LINES[pps.index(layout.pp) % len(LINES)],
            marker="o",
            markersize=4,
            label=str(layout),
        )
    axes.set_xlabel("tokens/s of a sequence")
    axes.set_ylabel("tokens/s of a GPU, by batch (1, 2, 4, ...)")
    axes.set_yscale("log")
    axes.grid(alpha=0.3)
    axes.legend()
    picture.savefig(path)
