"""Text tables of a plan."""

from typing import Any

GIB = 2**30
PARTS = {
    "weights": "weights, fp32",
    "gradients": "gradients",
    "moments": "moments of AdamW",
    "ema": "averaged weights",
    "error_buffers": "error buffers of PowerSGD",
    "gathered": "gathered layers, buckets",
    "copies": "16-bit copies of weights",
    "activations": "activations",
    "working": "logits, one layer at work",
    "peak": "peak",
}


def print_row(name: str, *cells: str) -> None:
    """One row: the name and right-aligned cells."""
    print(f"{name:32}" + "".join(f"{cell:>14}" for cell in cells))


def print_plan(plan: dict[str, Any], headroom: float) -> None:
    """Prints parameters, memory, FLOPs, communication and time, one block each."""
    gpu, batch, time = plan["hardware"], plan["batch"], plan["time"]
    print(
        f"{plan['kind']}: {plan['parameters']:,} parameters, {plan['precision']}; {plan['num_gpus']} x "
        f"{plan['gpu']} of {gpu['memory']:g} GiB; {batch['step']} images a step, {batch['pass']} a pass\n"
    )
    _print_memory(plan, headroom * gpu["memory"])
    flops = plan["flops"]
    print()
    print_row("FLOPs of a step", "computed", "needed")
    for part, computed in flops["computed"].items():
        print_row(part, f"{computed:.3g}", f"{flops['needed'][part]:.3g}")
    print_row("all", f"{sum(flops['computed'].values()):.3g}", f"{sum(flops['needed'].values()):.3g}")
    print(f"needed by all steps: {time['flops_of_run']:.3g}")
    if "six_n_of_run" in flops:
        print(f"6 N for each token: {flops['six_n_of_run']:.3g}")
    _print_traffic(plan)
    cost = f", {time['usd']:,.0f} USD" if "usd" in time else ""
    print(
        f"\n{time['steps']:,} steps of {time['step_seconds']:.3g} s at {time['mfu']:.0%} of the peak: "
        f"{time['days']:.3g} days, {time['gpu_hours']:,.0f} GPU-hours{cost}"
    )
    for name, size in plan.get("cache_per_candidate", {}).items():
        print(f"sampling: {size / 2**20:.4g} MiB of KV cache for each candidate in {name}")


def _print_memory(plan: dict[str, Any], available: float) -> None:
    columns = [
        (mode, name, parts) for mode, all_parts in plan["memory"].items() for name, parts in all_parts.items()
    ]
    print_row("GiB on each GPU", *(mode for mode, _, _ in columns))
    if any(name == "checkpointed" for _, name, _ in columns):
        print_row("activations", *(name for _, name, _ in columns))
    for part, name in PARTS.items():
        sizes = [parts[part] / GIB for _, _, parts in columns]
        if any(sizes):
            print_row(name, *(f"{size:.2f}" for size in sizes))
    fits = [parts["peak"] / GIB <= available for _, _, parts in columns]
    print_row(f"within {available:.4g} GiB", *("yes" if fit else "no" for fit in fits))
    if (whole := plan["initial_bytes"] / GIB) > available:
        print(f"note: each process first builds the whole model, {whole:.1f} GiB, more than such a GPU has")


def _print_traffic(plan: dict[str, Any]) -> None:
    if "none" in plan["traffic"]:
        return
    print()
    print_row("GB that a GPU sends in a step", "in node", "between nodes", "seconds alone")
    for mode, variants in plan["traffic"].items():
        for name, sent in variants.items():
            label = mode if name == "full" else f"{mode}, PowerSGD rank {sent['rank']}"
            sizes = (f"{sent[link] / 1e9:.3g}" for link in ("inside", "between"))
            print_row(label, *sizes, f"{sent['seconds']:.3g}")
