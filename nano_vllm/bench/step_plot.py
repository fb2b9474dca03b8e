"""Recorded runs as one picture."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from nano_vllm.bench.roofline import Roofline
from nano_vllm.bench.step_report import RecordedRun, TimedStep, figures, idle_share
from nano_vllm.step_record import KINDS

COLORS = dict(zip(KINDS, ("tab:orange", "tab:green", "tab:blue"), strict=True))


def write_plot(
    path: str | Path, title: str, runs: Sequence[RecordedRun], roofline: Roofline
) -> None:
    """A dot a step, over the device's time, one run behind the other: sequences; device time and
    its floor; MBU and MFU, or without ceilings the rates themselves; idle share. OSError where the
    file cannot be written.

    Args:
        path: ends with one of cli.PLOT_FORMATS.
        title: stands above.
        runs: of at least one step each.
        roofline: gives floors and ceilings.
    """
    from matplotlib.figure import Figure
    from matplotlib.ticker import LogFormatter

    starts, times, steps = _timeline(runs)
    rows = [figures([step], roofline) for step in steps]
    picture = Figure(figsize=(12, 10), layout="constrained")
    picture.suptitle(title)
    panels = picture.subplots(4, 1, sharex=True)
    sequences, device, rates, idle = panels
    for kind, color in COLORS.items():
        chosen = [i for i, step in enumerate(steps) if step.record.kind == kind]
        if not chosen:
            continue
        at, own = [times[i] for i in chosen], [rows[i] for i in chosen]
        dots: dict[str, Any] = {"s": 6, "color": color, "label": kind}
        sequences.scatter(at, [row["seqs"] for row in own], **dots)
        device.scatter(at, [row["device ms"] for row in own], **dots)
        share = idle_share([steps[i] for i in chosen])
        dots["label"] = f"{kind}, {share:.1%} in all"
        idle.scatter(at, [100 * row["idle"] for row in own], **dots)
    if roofline.copy is not None:
        device.scatter(times, [row["floor ms"] for row in rows], s=2, color="black", label="floor")
    _draw_rates(rates, times, rows)
    for start, run in zip(starts, runs, strict=True):
        for panel in panels:
            panel.axvline(start, color="lightgray", zorder=0)
        sequences.annotate(run.name, (start, 1.02), xycoords=("data", "axes fraction"))
    sequences.set_ylabel("sequences")
    device.set(ylabel="device ms a step", yscale="log")
    device.yaxis.set_major_formatter("{x:g}")
    device.yaxis.set_minor_formatter(LogFormatter())
    idle.set(ylabel=f"idle before a step, %\n{idle_share(steps):.1%} in all", xlabel="s")
    idle.set_ylim(bottom=0)
    for panel in panels:
        panel.grid(axis="y", alpha=0.3)
        panel.legend(loc="upper left", bbox_to_anchor=(1, 1), markerscale=2)
    picture.savefig(path)


def _timeline(
    runs: Sequence[RecordedRun],
) -> tuple[list[float], list[float], list[TimedStep]]:
    """Where each run begins, if they follow one another, where each step does, and the steps."""
    starts, times, end = [], [], 0.0
    for run in runs:
        starts.append(end)
        shift = end - run.steps[0].busy.start
        times += [step.busy.start + shift for step in run.steps]
        end = run.steps[-1].busy.end + shift
    return starts, times, [step for run in runs for step in run.steps]


def _draw_rates(panel: Any, times: list[float], rows: list[dict[str, Any]]) -> None:
    has_ceilings = rows[0]["MFU"] is not None
    names = ("MBU", "MFU") if has_ceilings else ("GB/s", "TFLOP/s")
    panel.set_ylabel("% of the ceiling" if has_ceilings else "rate, no ceilings here")
    if not has_ceilings:
        panel.set_yscale("log")
    for name, color in zip(names, ("tab:purple", "tab:red"), strict=True):
        if rows[0][name] is not None:
            values = [row[name] * (100 if has_ceilings else 1) for row in rows]
            panel.scatter(times, values, s=6, color=color, label=name)
