"""The scripts of scripts/studies at a tiny size: reports, plots and arithmetic."""

import importlib
import json
from dataclasses import replace
from pathlib import Path
from statistics import fmean

import pytest
import torch

from dalle import DALLE
from dalle.train.grad_scaler import PerBlockGradScaler
from dalle.train.precision import autocast
from dalle.transformer import Transformer
from dalle.transformer.objective import TransformerObjective

CPU = torch.device("cpu")


@pytest.fixture
def study(monkeypatch):
    """study(NAME) is the module scripts/studies/NAME.py."""
    monkeypatch.syspath_prepend(Path(__file__).parents[2] / "scripts" / "studies")
    return importlib.import_module


def test_image_tokens_are_the_rounded_colors_of_pixels(study):
    module = study("color_tokens")
    layout = module.small_transformer(2, 8, "dense").layout
    data = module.ColorTokens(layout, seed=0)
    text, image = layout.unpack(data(range(3)))
    assert image.shape == (3, 144)
    assert image.max() < 64
    assert 2 <= len(image[0].unique()) < 64  # a background and the objects on it
    assert torch.equal(data(range(1, 2)), data(range(3))[1:2])
    assert (text[:, 0] > 0).all()


class TestPowerSGDCurves:
    @pytest.mark.slow
    def test_every_method_has_a_curve_and_sends_what_it_should(self, study, tmp_path):
        module = study("powersgd_curves")
        model = study("color_tokens").small_transformer(2, 8, "dense")
        files = {"plot": tmp_path / "curves.png", "json": tmp_path / "report.json"}
        args = module.PowerSGDStudy(model=model, steps=2, batch_size=1, rank=2, **files)
        report = module.powersgd_curves(args)
        assert json.loads(args.json.read_text())["results"] == report["results"]
        assert report["results"].keys() == module.METHODS.keys()
        sent = {method: line["comm_mb"] for method, line in report["results"].items()}
        full, factored, rounded = (sent[list(module.METHODS)[i]] for i in (0, 1, 4))
        assert rounded < factored < full == sent["moments fp16"]
        assert all(len(curve["loss"]) == 2 for curve in report["curves"].values())
        assert len({curve["loss"][0] for curve in report["curves"].values()}) == 1  # same weights and images
        assert args.plot.stat().st_size > 0


class TestUnderflow:
    EXPONENTS = (*[-28] * 5, 5)
    NOISE = "f.qkv.bias"  # a bias of all keys changes no softmax: its gradient is 0 up to rounding

    @pytest.fixture
    def module(self, study):
        return study("fp16_underflow")

    @pytest.fixture
    def config(self, module):
        return replace(module.UnderflowStudy().model, depth=3, head_dim=8)

    @pytest.fixture
    def build(self, module, config):
        def build(*exponents: int) -> Transformer:
            """A model whose output layer is not 0, so that gradients flow at once."""
            torch.manual_seed(0)
            model = Transformer(config)
            torch.nn.init.normal_(model.to_logits.weight, std=0.1)
            if exponents:
                module.spread_gradients(model.resblocks(), exponents)
            return model

        return build

    @pytest.fixture
    def backward(self, study, config):
        data = study("color_tokens").ColorTokens(config.layout, seed=0)

        def backward(model: Transformer, precision: str = "fp32") -> torch.Tensor:
            with autocast(precision, CPU):
                loss = TransformerObjective()(model, data(range(2)), 0).total
            loss.backward()
            return loss.detach()

        return backward

    def test_spreading_multiplies_the_gradients_of_each_resblock_and_of_nothing_else(self, build, backward):
        plain, exponents = build(), (5, -3, 2, 0, -20, 8)
        model = build(*exponents)
        assert backward(plain) == backward(model)
        for exponent, ours, theirs in zip(exponents, model.resblocks(), plain.resblocks(), strict=True):
            for p, q in zip(ours.parameters(), theirs.parameters(), strict=True):
                assert torch.equal(p.grad, q.grad * 2.0**exponent)
        for ours, theirs in ((model.row, plain.row), (model.to_logits, plain.to_logits)):
            assert torch.equal(ours.weight.grad, theirs.weight.grad)

    def test_one_scale_follows_torch_amp(self, module, build):
        blocks = build().resblocks()
        ours, theirs = module.SingleGradScaler(blocks), torch.amp.GradScaler("cpu")
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

    def test_gradients_that_one_scale_loses_survive_with_a_scale_per_resblock(self, module, build, backward):
        """The last resblock allows no scale above 2^10, where the other gradients are 0 in fp16."""
        exact = build(*self.EXPONENTS)
        backward(exact)
        dead, alive = build(*self.EXPONENTS), build(*self.EXPONENTS)
        one, own = module.SingleGradScaler(dead.resblocks()), PerBlockGradScaler(alive.resblocks())
        one.values.fill_(2.0**10)
        own.values.copy_(torch.tensor([2.0**24] * 5 + [2.0**10]))
        for model, scales in ((dead, one), (alive, own)):
            backward(model, "fp16")
            assert scales.unscale().all()
        assert module.zero_fractions(dead.resblocks()) == [*[1.0] * 5, pytest.approx(0.0, abs=0.01)]
        for block, reference in zip(alive.resblocks(), exact.resblocks(), strict=True):
            for (name, p), q in zip(block.named_parameters(), reference.parameters(), strict=True):
                error = torch.linalg.vector_norm(p.grad - q.grad)
                assert name == self.NOISE or error < 0.01 * torch.linalg.vector_norm(q.grad), name
        larger = build(*self.EXPONENTS)
        scales = module.SingleGradScaler(larger.resblocks())
        backward(larger, "fp16")
        assert scales.unscale().tolist() == [True] * 5 + [False]

    def test_the_report_has_every_method_and_the_plots_exist(self, module, config, tmp_path):
        plots = {name: tmp_path / f"{name}.png" for name in ("plot", "plot_scales")}
        settings = {"grad_exponents": self.EXPONENTS, "steps": 2, "batch_size": 1}
        report = module.fp16_underflow(module.UnderflowStudy(model=config, **settings, **plots))
        assert report["results"].keys() == report["curves"].keys() == module.METHODS.keys()
        for method, lines in report["curves"].items():
            assert [line["step"] for line in lines if len(line["zeros"]) == 6] == [1, 2]
            last = {"loss": lines[-1]["loss"], "skipped": 0, "zeros": fmean(lines[-1]["zeros"])}
            assert report["results"][method] == last
        scales = [lines[-1].get("grad_scale_log2") for lines in report["curves"].values()]
        assert scales == [None, [16.0] * 6, pytest.approx([13.002] * 6)]
        assert len({lines[0]["loss"] for lines in report["curves"].values()}) == 1
        assert all(path.stat().st_size > 0 for path in plots.values())


class TestReproducibility:
    @pytest.fixture
    def module(self, study):
        return study("reproducibility")

    @pytest.fixture
    def args(self, module, chain, prompt: str, tmp_path):
        prompts = (prompt, prompt + " again")
        options = {"batch": (2, 3), "devices": ("cpu",), "json": tmp_path / "report.json"}
        return module.ReproducibilityStudy(chain / "model", prompts, 5, **options)

    def test_the_report_has_each_setting_with_the_nats_lost_of_the_references_samples(self, module, args):
        dalle = DALLE.from_pretrained(args.model)
        with torch.no_grad():  # an untrained model is nearly uniform; large matrices make rounding visible
            dalle.transformer.to_logits.weight.normal_(generator=torch.Generator().manual_seed(0))
        dalle.save_pretrained(args.json.parent / "model")
        args = replace(args, model=args.json.parent / "model")
        module.reproducibility(args)
        report = json.loads(args.json.read_text(encoding="utf-8"))
        names = ("3, fp32", "2, bf16", "2, fp32, int8 matrices", "2, bf16, int8 matrices")
        lines = {name: report["results"][f"batch {name}, cpu"] for name in names}
        assert (report["images"], len(report["results"])) == (10, 4)
        assert all(0 <= line["equal_images"] <= line["equal_tokens"] <= 1 for line in lines.values())
        assert "nats_lost_per_token" not in lines["3, fp32"]
        tokens = module.sample(args, dalle, module.Setting(2, "fp32", "cpu"))
        rounded, nats = dalle.to_precision("fp32", int8=True), []
        for prompt, candidates in zip(args.prompts, tokens, strict=True):
            exact = dalle.log_likelihood(prompt, candidates).image
            nats.append((exact - rounded.log_likelihood(prompt, candidates).image) / tokens.shape[2])
        lost, error = (lines["2, fp32, int8 matrices"][n] for n in ("nats_lost_per_token", "standard_error"))
        assert lost == pytest.approx(torch.cat(nats).mean().item()) != 0
        assert error == pytest.approx(torch.cat(nats).std().item() / 10**0.5)

    def test_a_standard_error_needs_two_images(self, module):
        with pytest.raises(ValueError, match="two images"):
            module.ReproducibilityStudy(prompts=("a cat",), candidates=1)
