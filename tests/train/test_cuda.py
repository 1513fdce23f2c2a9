"""Training on CUDA: as on the CPU, exact resuming, skipped steps, a process group, compiled layers."""

from dataclasses import replace

import pytest
import torch

from dalle.compile import compile_layers
from dalle.dvae import losses
from dalle.train.config import EMAConfig
from dalle.train.distributed import Distributed
from dalle.transformer import Transformer
from tests.helpers import distributed_work as cases
from tests.helpers.line import log_lines, newest_files
from tests.helpers.pretended_cuda import only_real, pretended_slowly
from tests.train.test_distributed import assert_close_runs, tensors

FAMILIES = ("transformer", "dvae", "clip")


@pytest.fixture
def exact(cuda, monkeypatch):
    """The device, with algorithms that always add in the same order; noise of a dVAE is that of the CPU."""
    plain = losses.numbers_by_place
    monkeypatch.setattr(
        losses, "numbers_by_place", lambda like, first: plain(like.cpu(), first).to(like.device)
    )
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield cuda
    torch.use_deterministic_algorithms(False)


def train(case, out, device, stops=(cases.STEPS,), **changes):
    case = replace(case, stops=stops, train=case.train | {"tf32": False} | changes)
    processes = device if isinstance(device, Distributed) else Distributed(device=torch.device(device))
    return cases.train(case, processes, out)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_run_may_change_its_device_and_takes_the_steps_of_the_cpu(family, exact, tmp_path):
    case = cases.PLAIN[family]
    train(case, tmp_path / "cpu", "cpu")
    for steps, device in enumerate(("cpu", exact, "cpu"), start=1):
        train(case, tmp_path / "moved", device, stops=(steps,))
    torch.testing.assert_close(tensors(tmp_path / "moved"), tensors(tmp_path / "cpu"), rtol=0, atol=1e-4)


@pretended_slowly
@pytest.mark.parametrize("family", FAMILIES)
def test_a_run_is_that_of_the_cpu(family, exact, tmp_path):
    """Logged numbers and evaluations too."""
    for name, device in (("cpu", "cpu"), ("cuda", exact)):
        train(cases.PLAIN[family], tmp_path / name, device)
    assert_close_runs(tmp_path / "cpu", tmp_path / "cuda", 1e-4)


@pretended_slowly
@pytest.mark.parametrize("case", cases.PLAIN)
def test_stopping_and_resuming_changes_no_bit(case, exact, tmp_path):
    """In fp16 the second step is skipped; in bf16 the average is kept on the CPU."""
    changes = {"ema": EMAConfig(0.9, 1, "cpu" if case == "bf16" else "same")}
    train(cases.PLAIN[case], tmp_path / "whole", exact, **changes)
    train(cases.PLAIN[case], tmp_path / "split", exact, stops=(1, 3), **changes)
    assert newest_files(tmp_path / "whole") == newest_files(tmp_path / "split")
    lines = log_lines(tmp_path / "split")
    assert [line["skipped_steps"] for line in lines] == ([0, 1, 1] if case == "fp16" else [0, 0, 0])


@only_real
@pytest.mark.parametrize(("mode", "case"), [("ddp", "transformer"), ("ddp", "clip"), ("fsdp", "clip")])
def test_a_process_of_nccl_trains_as_one_without(mode, case, exact, tmp_path, monkeypatch):
    names = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    for name, value in zip(names, (0, 0, 1, 1, "127.0.0.1", 0), strict=True):
        monkeypatch.setenv(name, str(value))
    train(cases.PLAIN[case], tmp_path / "cpu", "cpu")
    with Distributed.start(mode, "cuda") as processes:
        train(cases.PLAIN[case], tmp_path / mode, processes)
    assert_close_runs(tmp_path / "cpu", tmp_path / mode, 1e-4)


@only_real
def test_compiled_layers_with_flex_attention_have_the_losses_and_gradients_of_the_cpu(exact):
    """It compiles for seconds."""
    torch._dynamo.reset()
    found, config = [], replace(cases.TRANSFORMER_CONFIG, depth=2, head_dim=16)
    for backend, device in (("dense", "cpu"), ("flex", exact)):
        torch.manual_seed(0)
        model = Transformer(replace(config, attention_backend=backend))
        torch.nn.init.normal_(model.to_logits.weight, std=0.1)
        model.to(device)
        if backend == "flex":
            compile_layers(model)
        loss = cases.PLAIN["transformer"].objective(model, cases.token_batch(0).to(device), 0)
        loss.total.backward()
        found.append([x.cpu() for x in (loss.total.detach(), *(p.grad for p in model.parameters()))])
    torch.testing.assert_close(*found, rtol=1e-3, atol=1e-4)
