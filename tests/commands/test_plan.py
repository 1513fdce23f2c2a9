"""The plan command: the paper's run, every family, and bad options."""

import json
from dataclasses import replace

import pytest

from dalle.commands.plan import PLANS, TransformerPlan, plan_training
from dalle.config import CONFIGS, load
from dalle.runs.kinds import kind_of_file, take_kind


@pytest.mark.slow
def test_the_papers_run():
    """1,024 V100 of 16 GB, fp16, at 30 % of their peak: 430,000 updates of 1,024 streams of 1,280 tokens."""
    run = load(TransformerPlan, [CONFIGS / "transformer" / "paper.yaml"])
    train = replace(run.train, precision="fp16")
    run = replace(run, train=train, num_gpus=1024, gpu="v100-16gb", mfu=0.3, usd_per_gpu_hour=2.0)
    paper = plan_training("transformer", run)
    assert paper["parameters"] == pytest.approx(12e9, rel=0.03)
    by_hand = 6 * paper["parameters"] * 1280 * 1024 * 430_000
    assert paper["flops"]["six_n_of_run"] == by_hand == pytest.approx(4.1e22, rel=0.03)
    assert paper["time"]["flops_of_run"] == pytest.approx(by_hand, rel=0.02)
    days = paper["time"]["flops_of_run"] / (0.3 * 125e12 * 1024) / 86400
    assert paper["time"]["days"] == pytest.approx(days)
    assert days == pytest.approx(12.5, rel=0.02)
    assert paper["time"]["gpu_hours"] == pytest.approx(24 * 1024 * days)
    assert paper["time"]["usd"] == pytest.approx(2 * paper["time"]["gpu_hours"])
    assert set(paper["memory"]) == {"ddp", "fsdp", "hsdp"}
    weights = {mode: variants["kept"]["weights"] for mode, variants in paper["memory"].items()}
    assert weights["ddp"] == 4 * paper["parameters"] == 8 * weights["hsdp"] == 1024 * weights["fsdp"]
    for variants in paper["memory"].values():
        assert variants["checkpointed"]["activations"] < variants["kept"]["activations"] / 4
    hsdp = paper["traffic"]["hsdp"]
    assert hsdp["powersgd"]["rank"] == 896
    assert hsdp["powersgd"]["between"] < 0.2 * hsdp["full"]["between"]
    assert hsdp["full"]["inside"] == hsdp["powersgd"]["inside"]
    assert paper["cache_per_candidate"]["fp32"] == 2 * paper["cache_per_candidate"]["fp16"]


def test_kind_by_folder_by_fields_and_by_name(tmp_path):
    words = ["--config", "configs/clip/paper.yaml", "--num-gpus", "2"]
    assert take_kind(words) == ("clip", words)
    assert take_kind(["--kind=dvae"]) == ("dvae", [])
    file = tmp_path / "mine.yaml"
    file.write_text("model: {depth: 2}")
    assert kind_of_file(file) == "transformer"
    file.write_text("steps: 3")
    with pytest.raises(ValueError, match="say --kind"):
        kind_of_file(file)
    file.write_text("model: {wings: 2}")
    with pytest.raises(ValueError, match="fits no family"):
        kind_of_file(file)
    with pytest.raises(ValueError, match="unknown kind 'vqgan'"):
        take_kind(["--kind", "vqgan"])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"mfu": 1.5}, "mfu .*1.5"),
        ({"num_gpus": 0}, "num-gpus must be positive"),
    ],
)
def test_what_cannot_be_planned_is_refused(change, message):
    for plan in PLANS.values():
        with pytest.raises(ValueError, match=message):
            plan(**change)


def test_a_batch_that_does_not_divide_is_refused():
    with pytest.raises(ValueError, match=r"1024 does not divide.*a multiple of 3"):
        plan_training("transformer", TransformerPlan(num_gpus=3))


def test_an_unlisted_gpu_by_its_numbers():
    speeds = {"peak_flops": 1e14, "intra_node_gbps": 20, "inter_node_gbps": 1}
    gpu = TransformerPlan(gpu="t4", max_memory_gib=48, gpus_per_node=4, **speeds).hardware()
    assert (gpu.memory, gpu.half, gpu.fp32) == (48, 1e14, 1e14)
    assert (gpu.inside, gpu.between, gpu.per_node) == (20e9, 1e9, 4)


@pytest.mark.parametrize("family", ["dvae", "transformer", "clip"])
def test_each_family_is_planned(family, tmp_path, capsys):
    run = load(PLANS[family], [CONFIGS / family / "shapes.yaml"])
    run = replace(run, num_gpus=2, gpu="rtx-4090", json=tmp_path / "p")
    report = plan_training(family, run)
    assert json.loads((tmp_path / "p").read_text()) == report
    assert set(report["memory"]) == {"ddp", "fsdp"}
    said = capsys.readouterr().out
    assert f"{family}: {report['parameters']:,} parameters" in said
    assert "GPU-hours" in said
    alone = plan_training(family, replace(run, num_gpus=1, json=None))
    assert set(alone["memory"]) == {"none"}
    nodes = plan_training(family, replace(run, num_gpus=4, gpus_per_node=2, json=None))
    assert set(nodes["memory"]) == {"ddp", "fsdp", "hsdp"}


def test_the_script(script):
    words = ["--config", CONFIGS / "dvae" / "shapes.yaml", "--num-gpus", "1", "--train.batch-size", "32"]
    done = script("plan", *words)
    assert done.code == 0, done.err
    assert "32 images a step, 32 a pass" in done.out
    assert script("plan", "--kind", "dvae", "--gpu", "abacus").code == 2
    done = script("plan")
    assert done.code == 1
    assert "give --config" in done.err
