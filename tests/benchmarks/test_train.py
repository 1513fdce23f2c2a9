"""Benchmarks of training, memory and attention: reports, operations, refused settings."""

import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from torch import nn

from dalle.benchmarks.attention import benchmark_attention
from dalle.benchmarks.config import AttentionBenchmark, MemoryBenchmark, TrainBenchmark
from dalle.benchmarks.dalle_pytorch import ATTN_TYPES, DallePytorchStep
from dalle.benchmarks.memory import VARIANTS, benchmark_memory, joint_cross_entropies, peak_of_step
from dalle.benchmarks.open import time_openings
from dalle.benchmarks.train import benchmark_train
from dalle.train.loggers import peak_memory
from dalle.transformer import Transformer, TransformerConfig
from dalle.transformer.losses import cross_entropies
from dalle.transformer.objective import training_flops

CONFIG = TransformerConfig(2, 2, 8, 6, (4, 4), 11, 13, conv_kernel=3, attention_backend="dense")
QUICK = {"model": CONFIG, "precision": "fp32", "device": "cpu"}


def test_the_report_compares_backends():
    backends = ("dense", "window", "auto", "causal")
    report = benchmark_train(TrainBenchmark(**QUICK, backends=backends, rounds=2, peak_flops=1e12))
    lines = report["results"]
    assert lines["dense"]["parameters"] == sum(p.numel() for p in Transformer(CONFIG).parameters())
    assert lines["dense"]["speedup_vs_dense"] == 1
    assert lines["window"]["seconds"] > 0
    assert lines["auto"]["attention"] == {"conv": "window", "row": "window"}
    assert report["hardware"]["torch"] == torch.__version__
    for line in lines.values():
        assert line["mfu"] == pytest.approx(line["flops"] / line["seconds"] / 1e12)
    assert lines["causal"]["attention"] == {"causal": "sdpa"}
    assert lines["causal"]["flops"] > lines["window"]["flops"] == sum(training_flops(CONFIG).values()) * 2


@pytest.mark.usefixtures("_dalle_pytorch")
def test_the_other_package_is_timed_with_the_same_shapes():
    run = TrainBenchmark(**QUICK, backends=("window",), rounds=1, baseline="dalle-pytorch")
    report = benchmark_train(run)
    line = report["results"]["dalle-pytorch"]
    assert (line["precision"], line["attn_types"], line["parameters"]) == ("fp32", ATTN_TYPES, 3)
    assert report["results"]["window"]["speedup_vs_dalle-pytorch"] > 0
    assert "mfu" not in line
    step = DallePytorchStep(CONFIG, 3, torch.device("cpu"))
    step()
    assert step.model.calls == [((3, 6), (3, 16))]
    assert (step.model.weight < 1).all()
    words = step.model.words
    assert (words["dim"], words["depth"], words["heads"], words["dim_head"]) == (16, 2, 2, 8)
    assert (words["num_text_tokens"], words["text_seq_len"], words["vae"].num_tokens) == (11, 6, 13)
    assert words["vae"].image_size // 2 ** words["vae"].num_layers == 4
    with pytest.raises(ValueError, match="square grids of a power of 2, got 4 x 6"):
        DallePytorchStep(replace(CONFIG, grid=(4, 6)), 1, torch.device("cpu"))


def test_without_it_the_message_says_how_to_install_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "dalle_pytorch", None)
    with pytest.raises(ValueError, match=r"pip install dalle-pytorch==1\.6\.6"):
        DallePytorchStep(CONFIG, 1, torch.device("cpu"))
    assert "pytorch_lightning.utilities.distributed" not in sys.modules


def test_plain_losses_equal_the_chunked_ones():
    torch.manual_seed(0)
    model = Transformer(CONFIG)
    nn.init.normal_(model.to_logits.weight)
    ids = model.layout.pack(model.layout.pad_text([[3, 1], [], [5]]), torch.randint(13, (3, 16)))
    torch.testing.assert_close(joint_cross_entropies(model, ids), cross_entropies(model, ids, 20))


def test_peak_memory_of_a_process_is_not_that_of_its_parent():
    """Linux hands the parent's peak on to `getrusage` of the child, which would hide what a variant saves."""
    ballast = torch.ones(2**28)
    program = "from dalle.train.loggers import peak_memory; print(peak_memory())"
    child = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert 0 < float(child.stdout) < peak_memory() - 0.25
    del ballast


@pytest.mark.parametrize("variant", VARIANTS)
def test_each_variant_of_memory_runs(variant):
    assert peak_of_step(MemoryBenchmark(**QUICK, batch_size=2), *VARIANTS[variant]) > 0


@pytest.mark.slow
def test_chunks_of_logits_save_what_they_should_measured_in_processes_of_their_own(capsys):
    """8,192 logits for each of 2 x 1,040 positions are 0.13 GiB in fp32, and so are their gradients."""
    config = TransformerConfig(1, 2, 8, 16, (32, 32), 8192, 8192)
    report = benchmark_memory(MemoryBenchmark(model=config, batch_size=2, precision="fp32", device="cpu"))
    peaks = {name: line["peak_gib"] for name, line in report["results"].items()}
    assert list(peaks) == list(VARIANTS)
    assert peaks["chunked logits"] < peaks["joint logits"] - 0.1
    assert report["joint_logits_gib"] == 4 * 2 * 1040 * (8192 + 16 + 8192) / 2**30
    assert "chunked logits, activation checkpointing" in capsys.readouterr().out


def test_attention_is_timed_by_kind_and_summed_over_the_mix():
    model = TransformerConfig(depth=6, heads=2, head_dim=8, text_len=6, grid=(4, 4), conv_kernel=3)
    quick = QUICK | {"model": model, "rounds": 1}
    report = benchmark_attention(AttentionBenchmark(**quick, backends=("auto", "sdpa")))
    assert report["layers"] == {"row": 4, "column": 1, "conv": 1}
    layer, results = report["seconds_per_layer"], report["results"]
    total = 4 * layer["auto row"] + layer["auto column"] + layer["auto conv"]
    assert results["auto"]["total_seconds"] == pytest.approx(total)
    assert results["causal sdpa"]["total_seconds"] == pytest.approx(6 * layer["causal sdpa causal"])
    assert results["sdpa"]["speedup_vs_causal_sdpa"] > 0


def test_openings_of_a_model_directory_are_timed(chain):
    results = time_openings(str(chain / "model"), "cpu", 2)
    assert list(results) == ["before", "first", "later 1", "later 2"]
    assert all(line["seconds"] > 0 for name, line in results.items() if name != "before")
