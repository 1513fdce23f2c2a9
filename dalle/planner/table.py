"""The estimate of a training run as text tables."""

from typing import Any

GIB = 2**30
PARTS = {
    "weights": "weights, fp32",
    "gradients": "gradients",
    "moments": "moments of AdamW",
    "average": "averaged weights",
    "error_buffers": "error buffers of PowerSGD",
    "gathered": "gathered layers, buckets",
    "copies": "16-bit copies of weights",
    "activations": "activations",
    "working": "logits, the block at work",
    "peak": "at the peak",
}


def print_plan(report: dict[str, Any], headroom: float) -> None:
    """Parameters, memory, operations, traffic and time, one block each."""
    gpu, batch, modes = report["hardware"], report["batch"], list(report["memory"])
    print(
        f"{report['kind']}: {report['parameters']:,} parameters, {report['precision']}; {report['num_gpus']} x "
        f"{report['gpu']} of {gpu['memory']:g} GiB; {batch['update']} images an update, {batch['pass']} a pass"
    )
    _print_memory(report, modes, headroom * gpu["memory"])
    _print_operations(report)
    _print_traffic(report, modes)
    time = report["time"]
    cost = f", {time['usd']:,.0f} USD" if "usd" in time else ""
    print(
        f"\n{time['steps']:,} updates of {time['step_seconds']:.3g} s at {time['mfu']:.0%} of the peak: "
        f"{time['days']:.3g} days, {time['gpu_hours']:,.0f} GPU-hours{cost}"
    )
    for name, size in report.get("cache_per_candidate", {}).items():
        print(f"sampling: {size / 2**20:.4g} MiB of cache for each candidate in {name}")


def _print_memory(report: dict[str, Any], modes: list[str], room: float) -> None:
    memory = report["memory"]
    variants = list(memory[modes[0]])
    columns = [(mode, variant) for mode in modes for variant in variants]
    print(f"\n{'GiB on each GPU':30}" + "".join(f"{mode:>12}" for mode, _ in columns))
    if len(variants) > 1:
        print(f"{'':30}" + "".join(f"{variant:>12}" for _, variant in columns))
    for part, name in PARTS.items():
        sizes = [memory[mode][variant][part] / GIB for mode, variant in columns]
        if any(sizes):
            print(f"{name:30}" + "".join(f"{size:12.2f}" for size in sizes))
    fits = [memory[mode][variant]["peak"] / GIB <= room for mode, variant in columns]
    print(f"{f'within {room:.4g} GiB':30}" + "".join(f"{'yes' if fit else 'no':>12}" for fit in fits))
    if (whole := report["starts_whole"] / GIB) > room:
        print(
            f"note: at the start each process builds the whole model, {whole:.1f} GiB, more than such a GPU has"
        )


def _print_operations(report: dict[str, Any]) -> None:
    flops = report["flops"]
    print(f"\n{'operations of an update':30}{'computed':>12}{'needed':>12}")
    for part in dict.fromkeys((*flops["computed"], *flops["needed_by_part"])):
        computed, needed = (flops[key].get(part) for key in ("computed", "needed_by_part"))
        print(f"{part:30}{computed:12.3g}{needed:12.3g}")
    print(f"{'all':30}{sum(flops['computed'].values()):12.3g}{flops['needed']:12.3g}")
    print(f"needed by all updates: {report['time']['flops_of_run']:.3g}", end="")
    print(f"; 6 N for each token: {flops['six_n_of_run']:.3g}" if "six_n_of_run" in flops else "")


def _print_traffic(report: dict[str, Any], modes: list[str]) -> None:
    if modes == ["none"]:
        return
    print(f"\n{'GB that a GPU sends an update':30}{'in machine':>12}{'between':>12}{'s, alone':>12}")
    for mode in modes:
        for how, sent in report["traffic"][mode].items():
            name = mode if how == "whole" else f"{mode}, PowerSGD rank {sent['rank']}"
            print(
                f"{name:30}{sent['inside'] / 1e9:12.3g}{sent['between'] / 1e9:12.3g}{sent['seconds']:12.3g}"
            )
