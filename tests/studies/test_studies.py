"""The scripts of scripts/studies at a tiny size: reports, plots and arithmetic."""

import json
from dataclasses import replace
from statistics import fmean

import powersgd_curves
import pytest
import torch
from color_tokens import SMALL, ColorTokens
from fp16_underflow import (
    METHODS,
    SingleGradScaler,
    UnderflowStudy,
    fp16_underflow,
    spread_gradients,
    zero_fractions,
)
from reproducibility import ReproducibilityStudy, Setting, reproducibility, sample

from dalle.train.grad_scaler import PerBlockGradScaler
from dalle.train.precision import autocast
from dalle.transformer import Transformer
from dalle.transformer.objective import TransformerObjective


def test_image_tokens_are_the_rounded_colors_of_pixels():
    layout = SMALL.layout
    data = ColorTokens(layout, seed=0)
    text, image = layout.unpack(data(range(3)))
    assert image.shape == (3, 144)
    assert image.max() < 64
    assert 2 <= len(image[0].unique()) < 64  # a background and the objects on it
    assert torch.equal(data(range(1, 2)), data(range(3))[1:2])
    assert (text[:, 0] > 0).all()


@pytest.mark.slow
def test_every_way_of_averaging_has_a_curve_and_sends_what_it_should(tmp_path):
    model = replace(SMALL, depth=2, head_dim=8)
    files = {"plot": tmp_path / "curves.png", "json": tmp_path / "report.json"}
    args = powersgd_curves.PowerSGDStudy(model=model, steps=2, batch_size=1, rank=2, **files)
    report = powersgd_curves.powersgd_curves(args)
    assert json.loads(args.json.read_text())["results"] == report["results"]
    assert report["results"].keys() == powersgd_curves.METHODS.keys()
    sent = {method: line["comm_mb"] for method, line in report["results"].items()}
    full, factored, rounded = (sent[list(powersgd_curves.METHODS)[i]] for i in (0, 1, 4))
    assert rounded < factored < full == sent["moments fp16"]
    assert all(len(curve["loss"]) == 2 for curve in report["curves"].values())
    assert len({curve["loss"][0] for curve in report["curves"].values()}) == 1  # same weights and images
    assert args.plot.stat().st_size > 0


class TestUnderflow:
    EXPONENTS = (*[-28] * 5, 5)
    NOISE = "f.qkv.bias"  # a bias of all keys changes no softmax: its gradient is 0 up to rounding
    CONFIG = replace(UnderflowStudy().model, depth=3, head_dim=8)

    def build(self, *exponents: int) -> Transformer:
        """A model whose output layer is not 0, so that gradients flow at once."""
        torch.manual_seed(0)
        model = Transformer(self.CONFIG)
        torch.nn.init.normal_(model.to_logits.weight, std=0.1)
        if exponents:
            spread_gradients(model.resblocks(), exponents)
        return model

    def backward(self, model: Transformer, precision: str = "fp32") -> torch.Tensor:
        ids = ColorTokens(self.CONFIG.layout, seed=0)(range(2))
        with autocast(precision, torch.device("cpu")):
            loss = TransformerObjective()(model, ids, 0).total
        loss.backward()
        return loss.detach()

    def test_spreading_multiplies_the_gradients_of_each_resblock_and_of_nothing_else(self):
        plain, exponents = self.build(), (5, -3, 2, 0, -20, 8)
        model = self.build(*exponents)
        assert self.backward(plain) == self.backward(model)
        for exponent, ours, theirs in zip(exponents, model.resblocks(), plain.resblocks(), strict=True):
            for p, q in zip(ours.parameters(), theirs.parameters(), strict=True):
                assert torch.equal(p.grad, q.grad * 2.0**exponent)
        for ours, theirs in ((model.row, plain.row), (model.to_logits, plain.to_logits)):
            assert torch.equal(ours.weight.grad, theirs.weight.grad)

    def test_one_scale_follows_torch_amp(self):
        blocks = self.build().resblocks()
        ours, theirs = SingleGradScaler(blocks), torch.amp.GradScaler("cpu")
        weight = torch.nn.Parameter(torch.ones(()))
        sgd = torch.optim.SGD([weight], lr=0.0)
        for update in range(3700):
            overflows = update in (0, 1, 1500, 3600)
            weight.grad = None
            (theirs.scale(weight) * (torch.inf if overflows else 1.0)).backward()
            theirs.step(sgd)
            theirs.update()
            finite = torch.ones(len(blocks), dtype=torch.bool)
            finite[update % len(blocks)] = not overflows
            ours.update(finite)
            assert ours.values.tolist() == [theirs.get_scale()] * len(blocks), update
        assert theirs.get_scale() == 2.0**13  # four times halved, once doubled

    def test_gradients_that_one_scale_loses_survive_with_a_scale_per_resblock(self):
        """The last resblock allows no scale above 2^10, where the other gradients are 0 in fp16."""
        exact = self.build(*self.EXPONENTS)
        self.backward(exact)
        dead, alive = self.build(*self.EXPONENTS), self.build(*self.EXPONENTS)
        one, own = SingleGradScaler(dead.resblocks()), PerBlockGradScaler(alive.resblocks())
        one.values.fill_(2.0**10)
        own.values.copy_(torch.tensor([2.0**24] * 5 + [2.0**10]))
        for model, scales in ((dead, one), (alive, own)):
            self.backward(model, "fp16")
            assert scales.unscale().all()
        assert zero_fractions(dead.resblocks()) == [*[1.0] * 5, pytest.approx(0.0, abs=0.01)]
        for block, reference in zip(alive.resblocks(), exact.resblocks(), strict=True):
            for (name, p), q in zip(block.named_parameters(), reference.parameters(), strict=True):
                error = torch.linalg.vector_norm(p.grad - q.grad)
                assert name == self.NOISE or error < 0.01 * torch.linalg.vector_norm(q.grad), name
        larger = self.build(*self.EXPONENTS)
        scales = SingleGradScaler(larger.resblocks())
        self.backward(larger, "fp16")
        assert scales.unscale().tolist() == [True] * 5 + [False]

    def test_the_report_has_every_method_and_the_plots_exist(self, tmp_path):
        plots = {name: tmp_path / f"{name}.png" for name in ("plot", "plot_scales")}
        settings = {"grad_exponents": self.EXPONENTS, "steps": 2, "batch_size": 1}
        report = fp16_underflow(UnderflowStudy(model=self.CONFIG, **settings, **plots))
        assert report["results"].keys() == report["curves"].keys() == METHODS.keys()
        for method, lines in report["curves"].items():
            assert [line["step"] for line in lines if len(line["zeros"]) == 6] == [1, 2]
            last = {"loss": lines[-1]["loss"], "skipped": 0, "zeros": fmean(lines[-1]["zeros"])}
            assert report["results"][method] == last
        scales = [lines[-1].get("grad_scale_log2") for lines in report["curves"].values()]
        assert scales == [None, [16.0] * 6, pytest.approx([13.002] * 6)]
        assert len({lines[0]["loss"] for lines in report["curves"].values()}) == 1
        assert all(path.stat().st_size > 0 for path in plots.values())


def test_reproducibility_has_each_setting_with_the_nats_lost_of_the_references_samples(
    dalle, prompt: str, tmp_path
):
    with torch.no_grad():  # an untrained model is nearly uniform; large matrices make rounding visible
        dalle.transformer.to_logits.weight.normal_(generator=torch.Generator().manual_seed(0))
    dalle.save_pretrained(tmp_path / "model")
    options = {"batch": (2, 3), "devices": ("cpu",), "json": tmp_path / "report.json"}
    args = ReproducibilityStudy(tmp_path / "model", (prompt, prompt + " again"), 5, **options)
    reproducibility(args)
    report = json.loads(args.json.read_text(encoding="utf-8"))
    names = ("3, fp32", "2, bf16", "2, fp32, int8 matrices", "2, bf16, int8 matrices")
    lines = {name: report["results"][f"batch {name}, cpu"] for name in names}
    assert (report["images"], len(report["results"])) == (10, 4)
    assert all(0 <= line["equal_images"] <= line["equal_tokens"] <= 1 for line in lines.values())
    assert "nats_lost_per_token" not in lines["3, fp32"]
    tokens = sample(args, dalle, Setting(2, "fp32", "cpu"))
    rounded, nats = dalle.to_precision("fp32", int8=True), []
    for text, candidates in zip(args.prompts, tokens, strict=True):
        exact = dalle.log_likelihood(text, candidates).image
        nats.append((exact - rounded.log_likelihood(text, candidates).image) / tokens.shape[2])
    lost, error = (lines["2, fp32, int8 matrices"][n] for n in ("nats_lost_per_token", "standard_error"))
    assert lost == pytest.approx(torch.cat(nats).mean().item()) != 0
    assert error == pytest.approx(torch.cat(nats).std().item() / 10**0.5)
    with pytest.raises(ValueError, match="two images"):
        ReproducibilityStudy(prompts=("a cat",), candidates=1)
