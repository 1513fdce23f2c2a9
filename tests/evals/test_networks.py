"""Inception and LPIPS from files: independent formulas, refused files, no code run, nothing downloaded.

The weights are random, in files of the published layout.
"""

import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.models import alexnet
from torchvision.models.inception import inception_v3

from dalle.commands.evaluate import EvaluateArgs, evaluate
from dalle.evals.networks import LPIPS, Inception
from tests.helpers.hostile import Call

fidelity = pytest.importorskip("torch_fidelity.feature_extractor_inceptionv3")
lpips = pytest.importorskip("lpips")


@pytest.fixture(autouse=True)
def _no_download(monkeypatch):
    monkeypatch.setattr(torch.hub, "download_url_to_file", None)
    monkeypatch.setattr(torch.hub, "load_state_dict_from_url", None)
    monkeypatch.setattr(fidelity, "load_state_dict_from_url", None)


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> dict[type, Path]:
    """A file for each network."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("networks")
    net = inception_v3(weights=None, num_classes=1008, aux_logits=False, init_weights=False)
    for module in net.modules():
        if isinstance(module, nn.Conv2d):  # signals neither vanish nor grow
            nn.init.kaiming_normal_(module.weight)
        if isinstance(module, nn.BatchNorm2d):
            nn.init.normal_(module.bias, std=0.1)
    tensors = {name: t for name, t in net.state_dict().items() if not name.endswith("num_batches_tracked")}
    torch.save(tensors, folder / "pt_inception.pth")
    torch.save(alexnet().state_dict(), folder / "alexnet.pth")
    return {Inception: folder / "pt_inception.pth", LPIPS: folder / "alexnet.pth"}


def images(count: int, side: int, seed: int = 0) -> Tensor:
    coarse = torch.rand(count, 3, 6, 6, generator=torch.Generator().manual_seed(seed))
    return F.interpolate(coarse, size=(side, side), mode="bilinear").mul(255).round() / 255


@pytest.mark.parametrize("network", [Inception, LPIPS])
def test_files_of_something_else_are_refused_and_run_no_code(network, tmp_path):
    words = "pt_inception-2015-12-05" if network is Inception else "alexnet-owt-7be5be79"
    with pytest.raises(ValueError, match=f"no file .*{words}"):
        network(tmp_path / "absent.pth")
    torch.save({"features.0.weight": torch.zeros(3)}, tmp_path / "other.pth")
    with pytest.raises(ValueError, match=f"(?s)other weights.*{words}"):
        network(tmp_path / "other.pth")
    attack = Call(Path.touch, tmp_path / "attacked")
    torch.save({"fc.weight": torch.zeros(3), "attack": attack}, tmp_path / "hostile.pth")
    with pytest.raises(ValueError, match="hostile"):
        network(tmp_path / "hostile.pth")
    assert not (tmp_path / "attacked").exists()


@pytest.mark.parametrize(
    ("network", "package"), [(Inception, "torch_fidelity.feature_extractor_inceptionv3"), (LPIPS, "lpips")]
)
def test_a_missing_package_names_the_extra(network, package, files, monkeypatch):
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ImportError, match=r"zeroshot-text2image\[evals\]"):
        network(files[network])


def test_inception_values_are_those_of_the_published_port(files):
    pixels, names = images(2, 48), ["2048", "logits_unbiased"]
    theirs = fidelity.FeatureExtractorInceptionV3("inception", names, str(files[Inception]))
    expected = theirs((pixels * 255).round().byte())
    features, logits = Inception(files[Inception])(pixels)
    assert features.std() > 0.05
    assert torch.equal(features, expected[0])
    assert torch.equal(logits, expected[1])


def test_lpips_of_equal_images_and_the_formula(files):
    network = LPIPS(files[LPIPS])
    a, b = images(2, 32), images(2, 32, seed=1)
    assert network(a, a).tolist() == [0, 0]
    shift = torch.tensor([-0.030, -0.088, -0.188])[:, None, None]
    scale = torch.tensor([0.458, 0.448, 0.450])[:, None, None]
    x, y = ((2 * pixels - 1 - shift) / scale for pixels in (a, b))
    net = alexnet()
    net.load_state_dict(torch.load(files[LPIPS], weights_only=True))
    file = Path(lpips.__file__).parent / "weights/v0.1/alex.pth"
    weights = iter(torch.load(file, weights_only=True, map_location="cpu").values())
    total = torch.zeros(2)
    for layer in net.features[:12]:
        x, y = layer(x.clone()), layer(y.clone())
        if isinstance(layer, nn.ReLU):
            difference = F.normalize(x, dim=1) - F.normalize(y, dim=1)
            total += (difference**2 * next(weights).flatten()[:, None, None]).sum(1).mean((1, 2))
    assert torch.allclose(network(a, b), total, rtol=1e-4)
    assert total.min() > 0
    with pytest.raises(ValueError, match="32 x 32"):
        network(images(1, 16), images(1, 16))


def test_evaluate_reads_both_files(chain, files, tmp_path):
    options = {"num_samples": 4, "num_prompts": 2, "best_of": 2, "blur_radii": (0,), "stats_dir": tmp_path}
    options |= {"feature_extractor": str(files[Inception]), "lpips_backbone": files[LPIPS], "device": "cpu"}
    report = evaluate(EvaluateArgs(model=chain / "model", metrics=("dvae", "images"), **options))
    assert report["dvae"]["lpips"] > 0
    assert report["images"]["blur"]["0"].keys() == {"fid", "inception_score", "inception_score_std"}
    assert {"feature_extractor", "lpips"} <= report["provenance"]["hashes"].keys()
