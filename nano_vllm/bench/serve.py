"""An OpenAI server under load: times to tokens, and goodput."""

from __future__ import annotations

import argparse
import re
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable

    from nano_vllm.bench.load import Timeline

PERCENTILES = (50, 90, 95, 99)
SLO_NAMES = ("ttft", "tpot", "e2e")
TOO_MANY_REQUESTS = 429
"""What a server says whose queue is full."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    from nano_vllm.bench.workload import length_range, positive

    parser.add_argument(
        "--url", default="http://127.0.0.1:8000", help="of the server [http://127.0.0.1:8000]"
    )
    parser.add_argument("--model", metavar="NAME", help="by default the server's first")
    parser.add_argument("--api-key", metavar="KEY")
    parser.add_argument("--num-prompts", type=positive, default=200, metavar="N", help="[200]")
    parser.add_argument(
        "--request-rate",
        type=_rate,
        default=float("inf"),
        metavar="R",
        help="requests a second, as a Poisson process; inf sends all at once [inf]",
    )
    parser.add_argument(
        "--max-concurrency", type=positive, metavar="N", help="requests at the same time"
    )
    parser.add_argument(
        "--input-len", type=length_range, default=(128, 128), metavar="N[-M]", help="[128]"
    )
    parser.add_argument(
        "--output-len", type=length_range, default=(128, 128), metavar="N[-M]", help="[128]"
    )
    parser.add_argument(
        "--vocab-size", type=positive, default=10_000, metavar="N", help="of the prompts [10000]"
    )
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="of all draws [0]")
    parser.add_argument(
        "--slo",
        type=_objective,
        nargs="+",
        default=[],
        metavar="NAME:MS",
        help="milliseconds that a request must keep to count as good: ttft:200 tpot:50 e2e:10000",
    )
    parser.add_argument(
        "--timings",
        action="store_true",
        help="also how much later the first token comes than by nano_vllm's engine's own clock",
    )
    parser.add_argument("--plot", metavar="FILE", help="draw the distributions; .png, .svg, .pdf")


def run(args: argparse.Namespace) -> None:
    import asyncio
    import contextlib
    import datetime

    from nano_vllm.bench.engine_run import check_files
    from nano_vllm.bench.load import Client, send_load
    from nano_vllm.bench.report import report
    from nano_vllm.bench.workload import Workload

    run_loop: Callable[..., Any] = asyncio.run
    with contextlib.suppress(ImportError):  # it comes with the server
        from uvloop import run as run_loop
    check_files(argparse.Namespace(plot=args.plot, trace=None))
    workload = Workload.random(
        args.num_prompts, args.input_len, args.output_len, args.vocab_size, args.seed
    )

    async def load() -> tuple[str, list[Timeline], float]:
        client = Client(args.url, args.api_key)
        model = args.model or (await client.models())[0]
        await client.complete({"model": model, "prompt": [1], "max_tokens": 1, "stream": True})
        timelines, seconds = await send_load(
            client,
            workload,
            model,
            args.request_rate,
            args.max_concurrency,
            args.seed,
            args.timings,
        )
        return model, timelines, seconds

    model, timelines, seconds = run_loop(load())
    done = [t for t in timelines if t.error is None]
    failed: list[str] = [t.error for t in timelines if t.error is not None]
    if not done:
        raise ValueError(f"all {len(failed)} requests failed; the first: {failed[0]}")
    refused = [(t.end - t.start) * 1e3 for t in timelines if t.status == TOO_MANY_REQUESTS]
    machine: dict[str, Any] = {
        "url": args.url,
        "model": model,
        "rate": "inf" if args.request_rate == float("inf") else args.request_rate,
        "prompts": args.num_prompts,
        "failed": len(failed),
        "refused": len(refused),
        "seconds": round(seconds, 3),
        "date": datetime.date.today().isoformat(),
    }
    good = sum(_is_good(timeline, dict(args.slo)) for timeline in done)
    rates = {
        "requests/s": len(done) / seconds,
        "output tok/s": sum(t.num_tokens for t in done) / seconds,
        "total tok/s": (sum(t.num_tokens for t in done) + workload.input_tokens) / seconds,
        "goodput requests/s": good / seconds,
        "good": good / len(timelines),
    }
    samples = latencies(done)
    rows = [{"ms": name, **summary(values)} for name, values in samples.items() if values]
    beside = [(t.ttft - t.engine_ttft) * 1e3 for t in done if t.engine_ttft is not None]
    if beside:
        rows.append({"ms": "TTFT - engine's", **summary(beside)})
    if refused:
        rows.append({"ms": "refused", **summary(refused)})
    for error in sorted(set(failed))[:3]:
        print(f"failed: {failed.count(error)} x {error}")
    report("serve", machine, rows, more={"rates": [rates]})
    if args.plot:
        _draw(args.plot, samples, ", ".join(f"{k} {v}" for k, v in machine.items()))


def latencies(timelines: list[Timeline]) -> dict[str, list[float]]:
    """Milliseconds, by name, of requests that ended well."""
    return {
        "TTFT": [t.ttft * 1e3 for t in timelines],
        "TPOT": [t.tpot * 1e3 for t in timelines if t.tpot is not None],
        "ITL": [gap * 1e3 for t in timelines for gap in t.gaps],
        "E2E": [t.e2e * 1e3 for t in timelines],
    }


def summary(values: list[float]) -> dict[str, float]:
    """Mean, percentiles (by the nearest rank) and maximum."""
    ordered = sorted(values)
    ranks = {p: max(0, -(-len(ordered) * p // 100) - 1) for p in PERCENTILES}
    return {
        "mean": sum(ordered) / len(ordered),
        **{f"p{p}": ordered[rank] for p, rank in ranks.items()},
        "max": ordered[-1],
    }


def _is_good(timeline: Timeline, objectives: dict[str, float]) -> bool:
    for name, limit in objectives.items():
        value = getattr(timeline, name)
        if value is not None and value * 1e3 > limit:
            return False
    return True


def _draw(path: str, samples: dict[str, list[float]], title: str) -> None:
    from matplotlib.figure import Figure

    picture = Figure(figsize=(12, 8), layout="constrained")
    picture.suptitle(title, fontsize="small", wrap=True)
    for panel, (name, values) in zip(picture.subplots(2, 2).flat, samples.items(), strict=True):
        ordered = sorted(values)
        shares = [(rank + 1) / len(ordered) for rank in range(len(ordered))]
        panel.step(ordered, shares, where="post")
        panel.set(xlabel=f"{name} ms", ylabel="share of all", ylim=(0, 1))
        panel.grid(alpha=0.3)
    picture.savefig(path)


def _rate(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not value > 0:
        raise argparse.ArgumentTypeError(f"must be a number above 0, or inf, got {text!r}")
    return value


def _objective(text: str) -> tuple[str, float]:
    match = re.fullmatch(r"(\w+):(\d+(?:\.\d+)?)", text)
    if match is None or match[1] not in SLO_NAMES:
        raise argparse.ArgumentTypeError(
            f"must be like ttft:200, with {', '.join(SLO_NAMES)}, got {text!r}"
        )
    return match[1], float(match[2])
