"""Text tables of a plan."""

from typing import Any

GIB = 2**30
PARTS = {
    "weights": "weights, fp32",
    "gradients": "gradients",
    "moments": "moments of AdamW",
    "ema": "averaged weights",
    "error_buffers": "error buffers of PowerSGD",
    "gathered": "gathered layers",
    "copies": "16-bit copies of weights",
    "activations": "activations",
    "working": "logits, one layer at work",
    "peak": "peak",
    "start": "when the model is built",
}


HEADROOM = 0.9
"""Fraction of a GPU's memory that a step may fill; the rest is for CUDA, NCCL and fragmentation."""


def print_row(name: str, *cells: str) -> None:
    """One row: the name and right-aligned cells."""
    print(f"{name:32}" + "".join(f"{cell:>14}" for cell in cells))


def print_plan(plan: dict[str, Any]) -> None:
    """Prints parameters, memory, FLOPs, communication and time, one block each."""
    gpu, batch, flops, time = plan["hardware"], plan["batch"], plan["flops"], plan["time"]
    print(
        f"{plan['kind']}: {plan['parameters']:,} parameters, {plan['precision']}; {plan['num_gpus']} x "
        f"{plan['gpu']} of {gpu['memory']:g} GiB; {batch['step']} images a step, {batch['pass']} a pass\n"
    )
    _print_memory(plan, HEADROOM * gpu["memory"])
    computed, needed = flops["computed"], flops["needed"]
    print()
    print_row("FLOPs of a step", "computed", "needed")
    for part in computed:
        print_row(part, f"{computed[part]:.3g}", f"{needed[part]:.3g}")
    print_row("all", f"{sum(computed.values()):.3g}", f"{sum(needed.values()):.3g}")
    print(f"needed by all steps: {time['flops_of_run']:.3g}")
    if "six_n_of_run" in flops:
        print(f"6 N for each token: {flops['six_n_of_run']:.3g}")
    if "none" not in plan["traffic"]:
        _print_traffic(plan["traffic"])
    cost = f", {time['usd']:,.0f} USD" if time["usd"] else ""
    print(
        f"\n{time['steps']:,} steps of {time['step_seconds']:.3g} s at {time['mfu']:.0%} of the peak: "
        f"{time['days']:.3g} days, {time['gpu_hours']:,.0f} GPU-hours{cost}"
    )
    for name, size in plan.get("cache_per_candidate", {}).items():
        print(f"sampling: {size / 2**20:.4g} MiB of KV cache for each candidate in {name}")


def _print_memory(plan: dict[str, Any], available: float) -> None:
    columns = {(mode, name): parts for mode, steps in plan["memory"].items() for name, parts in steps.items()}
    modes, names = zip(*columns, strict=True)
    print_row("GiB on each GPU", *modes)
    if "checkpointed" in names:
        print_row("activations", *names)
    for part, name in PARTS.items():
        sizes = [parts[part] / GIB for parts in columns.values()]
        if any(sizes):
            print_row(name, *(f"{size:.2f}" for size in sizes))
    fits = [parts["peak"] / GIB <= available for parts in columns.values()]
    print_row(f"within {available:.4g} GiB", *("yes" if fit else "no" for fit in fits))


def _print_traffic(traffic: dict[str, Any]) -> None:
    print()
    print_row("GB that a GPU sends in a step", "in node", "between nodes", "seconds alone")
    for mode, variants in traffic.items():
        for name, sent in variants.items():
            label = mode if name == "full" else f"{mode}, PowerSGD rank {sent['rank']}"
            values = (sent["inside"] / 1e9, sent["between"] / 1e9, sent["seconds"])
            print_row(label, *(f"{value:.3g}" for value in values))
