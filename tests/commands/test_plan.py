"""The plan against the thing itself: parameters, operations and memory of real steps, and the paper's run."""

import json
from dataclasses import replace

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from dalle.benchmarks.common import Stepper
from dalle.clip import CLIPConfig
from dalle.clip.objective import CLIPObjective
from dalle.commands.plan import PLANS, TransformerPlan, plan_training
from dalle.config import load
from dalle.dvae import DVAEConfig
from dalle.dvae.objective import DVAEObjective
from dalle.hub.registry import build_model
from dalle.paths import CONFIGS
from dalle.planner.count import StepEstimate, estimate_step
from dalle.planner.memory import ParallelLayout, memory
from dalle.planner.traffic import ring, traffic
from dalle.runs.kinds import kind_of_file, take_kind
from dalle.train.config import OptimizerConfig
from dalle.transformer import TransformerConfig
from dalle.transformer.objective import TransformerObjective
from dalle.transformer.sizes import training_flops

TINY = TransformerConfig(
    depth=2,
    heads=2,
    head_dim=16,
    text_len=16,
    grid=(8, 8),
    text_vocab=300,
    image_vocab=64,
    conv_kernel=3,
    attention_backend="sdpa",
)
WIDE = replace(TINY, heads=16, depth=3, text_vocab=50, image_vocab=32)  # weights outweigh activations
LONG = replace(TINY, text_len=64, grid=(24, 24), depth=3)  # the other way round
BALANCED = replace(TINY, heads=4, grid=(16, 16), depth=4)
DVAE = DVAEConfig(widths=(16, 32), downsample_factor=2, vocab_size=64, codebook_dim=16)
CLIP = CLIPConfig(
    embed_width=32,
    image_size=32,
    patch_size=8,
    vision_width=64,
    vision_layers=2,
    text_len=16,
    text_vocab=300,
    text_width=64,
    text_layers=2,
    head_dim=32,
)


def ids(config: TransformerConfig, batch: int) -> torch.Tensor:
    """Captions that fill every text slot, as the plan counts them, and codes."""
    layout = config.layout
    text = torch.randint(layout.text_vocab, (batch, layout.text_len))
    return layout.pack(text, torch.randint(layout.image_vocab, (batch, layout.num_image_tokens)))


def real(kind: str, config, precision: str = "fp32", batch: int = 4) -> tuple[Stepper, object]:
    """A training step that can be taken, and a batch for it."""
    if kind == "transformer":
        return Stepper(kind, config, TransformerObjective(), torch.device("cpu"), precision), ids(
            config, batch
        )
    pixels = torch.rand(batch, 3, 32, 32)
    if kind == "dvae":
        return Stepper(kind, config, DVAEObjective(), torch.device("cpu"), precision), pixels
    packed = torch.randint(config.text_vocab, (batch, config.text_len))
    return Stepper(kind, config, CLIPObjective(), torch.device("cpu"), precision), (pixels, packed)


CASES = [
    ("transformer", TINY),
    ("transformer", replace(TINY, activation_checkpointing=True)),
    ("dvae", DVAE),
    ("clip", CLIP),
]


@pytest.mark.parametrize(("kind", "config"), CASES)
def test_parameters_are_those_of_the_built_module(kind, config):
    assert planned(kind, config).parameters == sum(p.numel() for p in build_model(kind, config).parameters())


def planned(kind: str, config, precision: str = "fp32", batch: int = 4) -> StepEstimate:
    return estimate_step(kind, config, batch, precision, (32, 32))


@pytest.mark.parametrize(
    ("kind", "config"), [*CASES, ("transformer", replace(TINY, attention_backend="window"))]
)
def test_operations_are_those_of_a_real_step(kind, config):
    step, batch = real(kind, config)
    with FlopCounterMode(display=False) as counted:
        loss = step.objective(step.model, batch, 0)
        loss.total.backward()
    attention = {op for op in counted.get_flop_counts()["Global"] if "attention" in str(op)}
    if (
        kind == "clip"
    ):  # a real step on a CPU writes its attention out, a GPU's does not: the matrices must agree
        assert not attention
        parts = [op for op in counted.get_flop_counts()["Global"] if "bmm" not in str(op)]
        matrices = sum(counted.get_flop_counts()["Global"][op] for op in parts)
        assert matrices < sum(planned(kind, config).flops.values())
        return
    assert sum(planned(kind, config).flops.values()) == counted.get_total_flops()


def test_operations_of_the_transformer_by_formula():
    """6 a parameter and token in matrices; attention of all pairs, 2 products forward and 5 backward; logits."""
    batch, layout, width = 4, TINY.layout, TINY.width
    flops = planned("transformer", TINY).flops
    needed = training_flops(TINY)
    assert flops["matrices"] == batch * needed["matrices"]
    assert flops["logits"] == batch * needed["logits"]
    assert flops["attention"] == batch * TINY.depth * 7 * 2 * layout.seq_len**2 * width
    assert flops["attention"] > batch * needed["attention"]
    again = planned("transformer", replace(TINY, activation_checkpointing=True)).flops
    assert again["attention"] == flops["attention"] * 9 // 7
    assert (
        again["matrices"] == flops["matrices"] + flops["matrices"] * 7 // 36
    )  # the last product of a block is not


@pytest.mark.parametrize(
    ("kind", "config", "precision"),
    [
        ("transformer", WIDE, "fp32"),
        ("transformer", LONG, "fp32"),
        ("transformer", LONG, "bf16"),
        ("transformer", LONG, "fp16"),
        ("transformer", replace(LONG, activation_checkpointing=True), "bf16"),
        ("transformer", replace(BALANCED, activation_checkpointing=True, depth=12), "fp32"),
        ("transformer", replace(LONG, attention_backend="window"), "fp32"),
        ("transformer", BALANCED, "fp32"),
        ("transformer", BALANCED, "bf16"),
        ("dvae", DVAE, "fp32"),
        ("dvae", DVAE, "bf16"),
        ("clip", CLIP, "fp32"),
    ],
)
def test_memory_of_a_real_step_within_15_percent(kind, config, precision):
    """Weights, gradients, moments, averages and activations at the peak of the second step, by torch's allocator."""
    measured = allocated_at_the_peak(kind, config, precision)
    bounded = getattr(OptimizerConfig(), "max_variance", None) is not None
    shares = ParallelLayout("none", half=precision != "fp32", bounds_variance=bounded)
    plan = memory(planned(kind, config, precision), shares)["peak"]
    assert plan == pytest.approx(measured, rel=0.15)


def allocated_at_the_peak(kind: str, config, precision: str) -> int:
    """Bytes that torch's allocator on a CPU has given out at most during a step, as the profiler hears of them."""
    with torch.profiler.profile(
        activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True
    ) as seen:
        step, batch = real(kind, config, precision)
        for _ in range(2):
            for optimizer in step.state.optimizers:
                optimizer.zero_grad()
            step(batch)
    events = seen.profiler.kineto_results.events()
    now = peak = 0
    for event in sorted((e for e in events if e.name() == "[memory]"), key=lambda e: e.start_ns()):
        now += event.nbytes()
        peak = max(peak, now)
    return peak


@pytest.fixture(scope="module")
def paper() -> dict:
    """The plan of the paper's run: 1,024 V100 of 16 GB, fp16, at 30 % of their peak."""
    run = load(TransformerPlan, [CONFIGS / "transformer" / "paper.yaml"])
    train = replace(run.train, precision="fp16")
    return plan_training(
        "transformer",
        replace(run, train=train, num_gpus=1024, gpu="v100-16gb", mfu=0.3, usd_per_gpu_hour=2.0),
    )


@pytest.mark.slow
def test_the_papers_run(paper):
    """430,000 updates of 1,024 streams of 1,280 tokens, 6 N operations a token: about 4e22."""
    assert paper["parameters"] == pytest.approx(12e9, rel=0.03)
    by_hand = 6 * paper["parameters"] * 1280 * 1024 * 430_000
    assert paper["flops"]["six_n_of_run"] == by_hand == pytest.approx(4.1e22, rel=0.03)
    assert paper["time"]["flops_of_run"] == pytest.approx(by_hand, rel=0.02)
    days = paper["time"]["flops_of_run"] / (0.3 * 125e12 * 1024) / 86400
    assert paper["time"]["days"] == pytest.approx(days)
    assert days == pytest.approx(12.5, rel=0.02)
    assert paper["time"]["gpu_hours"] == pytest.approx(24 * 1024 * days)
    assert paper["time"]["usd"] == pytest.approx(2 * paper["time"]["gpu_hours"])


@pytest.mark.slow
def test_the_papers_memory_and_traffic(paper):
    assert set(paper["memory"]) == {"ddp", "fsdp", "hsdp"}
    weights = {mode: variants["keep"]["weights"] for mode, variants in paper["memory"].items()}
    assert weights["ddp"] == 4 * paper["parameters"] == 8 * weights["hsdp"] == 1024 * weights["fsdp"]
    for variants in paper["memory"].values():
        assert variants["activation_checkpointing"]["activations"] < variants["keep"]["activations"] / 4
    hsdp = paper["traffic"]["hsdp"]
    assert hsdp["powersgd"]["rank"] == 896
    assert hsdp["powersgd"]["between"] < 0.2 * hsdp["whole"]["between"]
    assert hsdp["whole"]["inside"] == hsdp["powersgd"]["inside"]
    assert paper["cache_per_candidate"]["fp32"] == 2 * paper["cache_per_candidate"]["fp16"]


STEP = StepEstimate(
    1000, largest=100, outside=200, flops={}, kept=5000, copies=1600, working=700, together=8000
)


def test_bytes_sent_by_hand():
    """1,000 parameters, 200 of them outside of the layers, 4 GPUs in machines of 2."""
    assert ring(800, 4) == 600
    none = {"inside": 0, "between": 0}
    assert traffic("none", STEP, 1, 2, 1, half=True) == none
    assert traffic("ddp", STEP, 2, 2, 1, half=True) == none | {"inside": 2 * 4000 / 2}
    assert traffic("ddp", STEP, 4, 2, 1, half=True) == none | {"between": 2 * 4000 * 3 / 4}
    gathered = 2 * 800 + 4 * 200, 2 * 800, 4 * 1000  # forward, backward, gradients
    assert traffic("fsdp", STEP, 4, 2, 4, half=True) == none | {"between": sum(gathered) * 3 / 4}
    assert traffic("fsdp", STEP, 4, 2, 4, half=True, accumulate=3) == none | {
        "between": 3 * sum(gathered) * 3 / 4
    }
    hsdp = {"inside": sum(gathered) / 2, "between": 2 * (4000 / 2) / 2}
    assert traffic("hsdp", STEP, 4, 2, 2, half=True) == hsdp
    assert traffic("hsdp", STEP, 4, 2, 2, half=True, share=0.25)["between"] == 2 * (4 * (200 + 200) / 2) / 2


def test_memory_by_hand():
    alone = memory(STEP, ParallelLayout("none"))
    assert alone["peak"] == 4000 + 8000 + 4000 + 8000  # weights, moments, average, and the rest at its peak
    assert (
        memory(STEP, ParallelLayout("none", bounds_variance=True))["peak"] == alone["peak"]
    )  # the step's own peak is higher
    assert memory(replace(STEP, together=0), ParallelLayout("none", bounds_variance=True))["peak"] == 6 * 4000
    assert memory(STEP, ParallelLayout("none", accumulate=2))["peak"] == 5 * 4000 + 1600 + 5000 + 700
    assert memory(STEP, ParallelLayout("ddp"))["peak"] == alone["peak"] + 4000  # buckets
    sliced = memory(STEP, ParallelLayout("fsdp", shards=4))
    assert sliced["weights"] == sliced["gradients"] == sliced["average"] == 1000
    assert sliced["gathered"] == (2 * 2 * 100 + 4 * 200) + (2 * 100 + 4 * 100 + 4 * 200)
    assert memory(STEP, ParallelLayout("none", moments="8bit"))["moments"] == 2000
    assert memory(STEP, ParallelLayout("none", ema_on_gpu=False))["average"] == 0
    assert memory(STEP, ParallelLayout("ddp", error_buffers=True))["error_buffers"] == 4 * 800


def test_kind_by_folder_by_fields_and_by_name(tmp_path):
    assert take_kind(["--config", "configs/clip/paper.yaml", "--num-gpus", "2"]) == (
        "clip",
        ["--config", "configs/clip/paper.yaml", "--num-gpus", "2"],
    )
    assert take_kind(["--kind=dvae"]) == ("dvae", [])
    file = tmp_path / "mine.yaml"
    file.write_text("model: {heads: 2}")
    assert kind_of_file(file) == "transformer"
    file.write_text("steps: 3")
    with pytest.raises(ValueError, match="fits dvae and transformer and clip; say --kind"):
        kind_of_file(file)
    file.write_text("model: {wings: 2}")
    with pytest.raises(ValueError, match="fits no family"):
        kind_of_file(file)
    with pytest.raises(ValueError, match="unknown kind 'vqgan'; expected one of dvae, transformer, clip"):
        take_kind(["--kind", "vqgan"])
    with pytest.raises(ValueError, match="give --config"):
        take_kind([])


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"gpu": "abacus"}, "unknown gpu 'abacus'; expected one of v100-16gb"),
        ({"mfu": 1.5}, r"mfu must lie in \(0, 1\], got 1.5"),
        ({"num_gpus": 0}, "num-gpus must be positive, got 0"),
    ],
)
def test_what_cannot_be_planned_is_refused(change, sentence):
    for plan in PLANS.values():
        with pytest.raises(ValueError, match=sentence):
            plan(**change)


def test_a_batch_that_does_not_divide_is_refused():
    run = TransformerPlan(model=TINY, num_gpus=3)
    with pytest.raises(ValueError, match="batch_size 1024 does not divide among 3 GPUs and 1 passes"):
        plan_training("transformer", run)


def test_an_unlisted_gpu_by_its_numbers():
    run = TransformerPlan(
        gpu="t4", max_memory_gib=48, peak_flops=1e14, intra_node_gbps=20, inter_node_gbps=1, gpus_per_node=4
    )
    gpu = run.hardware()
    assert (gpu.memory, gpu.half, gpu.fp32, gpu.inside, gpu.between, gpu.per_machine) == (
        48,
        1e14,
        1e14,
        20e9,
        1e9,
        4,
    )


@pytest.mark.parametrize("family", ["dvae", "transformer", "clip"])
def test_each_family_is_planned(family, tmp_path, capsys):
    run = replace(
        load(PLANS[family], [CONFIGS / family / "shapes.yaml"]),
        num_gpus=2,
        gpu="rtx-4090",
        json=tmp_path / "p",
    )
    report = plan_training(family, run)
    assert json.loads((tmp_path / "p").read_text()) == report
    assert set(report["memory"]) == {"ddp", "fsdp"}
    said = capsys.readouterr().out
    assert f"{family}: {report['parameters']:,} parameters" in said
    assert "GPU-hours" in said
    alone = plan_training(family, replace(run, num_gpus=1, json=None))
    assert set(alone["memory"]) == {"none"}


def test_the_script(script):
    done = script(
        "plan", "--config", CONFIGS / "dvae" / "shapes.yaml", "--num-gpus", "1", "--train.batch-size", "32"
    )
    assert done.code == 0, done.err
    assert "32 images an update, 32 a pass" in done.out


def test_the_script_says_what_is_wrong(script):
    done = script("plan")
    assert done.code == 1
    assert "give --config" in done.err
