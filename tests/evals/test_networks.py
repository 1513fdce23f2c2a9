"""Inception and LPIPS from files: against their published ports, and every wrong file refused.

The weights are random, in files of the published layout: what is compared is the arithmetic.
"""

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from dalle.evals.inception import Inception, network, resize_tf1
from dalle.evals.lpips import LPIPS


@pytest.fixture(scope="module")
def inception_file(tmp_path_factory) -> Path:
    torch.manual_seed(0)
    net = network()
    for module in net.modules():
        if isinstance(module, nn.Conv2d):  # signals neither die nor grow
            nn.init.kaiming_normal_(module.weight)
        if isinstance(module, nn.BatchNorm2d):
            nn.init.normal_(module.bias, std=0.1)
    path = tmp_path_factory.mktemp("inception") / "pt_inception.pth"
    torch.save(
        {name: t for name, t in net.state_dict().items() if not name.endswith("num_batches_tracked")}, path
    )
    return path


@pytest.fixture(scope="module")
def lpips_files(tmp_path_factory) -> tuple[Path, Path]:
    from torchvision.models import alexnet

    torch.manual_seed(1)
    folder = tmp_path_factory.mktemp("lpips")
    net, weights = (
        alexnet(),
        {f"lin{i}.model.1.weight": torch.rand(1, c, 1, 1) for i, c in enumerate(CHANNELS)},
    )
    kept = {name: tensor for name, tensor in net.state_dict().items() if name.startswith("features.")}
    torch.save(kept | {"classifier.1.weight": torch.zeros(1)}, folder / "alexnet.pth")
    torch.save(weights, folder / "alex.pth")
    return folder / "alexnet.pth", folder / "alex.pth"


CHANNELS = (64, 192, 384, 256, 256)


def images(count: int, side: int, seed: int = 0) -> torch.Tensor:
    coarse = torch.rand(count, 3, 6, 6, generator=torch.Generator().manual_seed(seed))
    return F.interpolate(coarse, size=(side, side), mode="bilinear").mul(255).round() / 255


class TestResize:
    @pytest.mark.parametrize(("size", "side"), [((5, 7), 9), ((40, 33), 9), ((9, 9), 9)])
    def test_it_reads_where_tensorflow_1_reads(self, size, side):
        values = torch.rand(1, 1, *size, dtype=torch.float64)
        wanted = torch.empty(side, side, dtype=torch.float64)
        for i in range(side):
            for j in range(side):
                y, x = i * size[0] / side, j * size[1] / side
                top, left = int(y), int(x)
                down, right = min(top + 1, size[0] - 1), min(left + 1, size[1] - 1)
                a, b, c, d = (values[0, 0, r, s] for r in (top, down) for s in (left, right))
                upper, lower = a + (b - a) * (x - left), c + (d - c) * (x - left)
                wanted[i, j] = upper + (lower - upper) * (y - top)
        assert torch.allclose(resize_tf1(values, side)[0, 0], wanted)


class TestInception:
    def test_it_agrees_with_torch_fidelity(self, inception_file):
        published = pytest.importorskip("torch_fidelity.feature_extractor_inceptionv3")
        theirs = published.FeatureExtractorInceptionV3(
            "inception", ["2048", "logits_unbiased"], feature_extractor_weights_path=str(inception_file)
        )
        pixels = images(2, 48)
        with torch.no_grad():
            wanted = theirs((pixels * 255).round().byte())
        features, logits = Inception(inception_file)(pixels)
        assert features.std() > 0.05
        assert torch.allclose(features, wanted[0], rtol=1e-3, atol=1e-4 * float(features.abs().max()))
        assert torch.allclose(logits, wanted[1], rtol=1e-3, atol=1e-4 * float(logits.abs().max()))

    def test_the_pools_of_2015(self, inception_file):
        """A block alone: averages that leave the padding out, and a maximum in the last."""
        net = network().eval()
        x = torch.rand(1, 2048, 3, 3)
        branch = net.Mixed_7c.branch_pool(F.max_pool2d(x, 3, 1, 1))
        assert torch.equal(net.Mixed_7c(x)[:, -branch.shape[1] :], branch)
        x = torch.rand(1, 192, 4, 4)
        ones = F.conv2d(torch.ones(1, 1, 4, 4), torch.ones(1, 1, 3, 3), padding=1)
        sums = F.conv2d(x, torch.ones(192, 1, 3, 3), padding=1, groups=192)
        branch = net.Mixed_5b.branch_pool(sums / ones)
        assert torch.allclose(net.Mixed_5b(x)[:, -branch.shape[1] :], branch, atol=1e-6)

    def test_what_is_no_such_file_is_refused_with_how_to_get_one(self, inception_file, tmp_path):
        with pytest.raises(ValueError, match=r"no file .*pt_inception-2015-12-05"):
            Inception(tmp_path / "absent.pth")
        tensors = torch.load(inception_file, weights_only=True)
        del tensors["fc.weight"]
        tensors["fc.bias"] = torch.zeros(1000)
        torch.save(tensors, tmp_path / "other.pth")
        with pytest.raises(ValueError, match=r"it lacks fc.weight; it should not have fc.bias.*pytorch-fid"):
            Inception(tmp_path / "other.pth")


class TestLPIPS:
    def test_it_agrees_with_the_package(self, lpips_files):
        package = pytest.importorskip("lpips")
        theirs = package.LPIPS(net="alex", pnet_rand=True, pretrained=False, verbose=False).eval()
        backbone = torch.load(lpips_files[0], weights_only=True)
        own = theirs.net.state_dict()
        own = {name: backbone[f"features.{name.split('.', 1)[1]}"] for name in own}
        theirs.net.load_state_dict(own)
        theirs.load_state_dict(torch.load(lpips_files[1], weights_only=True), strict=False)
        a, b = images(3, 64), images(3, 64, seed=1)
        with torch.no_grad():
            wanted = theirs(a, b, normalize=True).flatten()
        found = LPIPS(*lpips_files)(a, b)
        assert found.min() > 0
        assert torch.allclose(found, wanted, rtol=1e-4)

    def test_equal_images_and_the_formula(self, lpips_files):
        lpips = LPIPS(*lpips_files)
        a, b = images(2, 32), images(2, 32, seed=1)
        assert lpips(a, a).tolist() == [0, 0]
        x, y = (
            (2 * p - 1 - torch.tensor([-0.030, -0.088, -0.188])[:, None, None])
            / torch.tensor([0.458, 0.448, 0.450])[:, None, None]
            for p in (a, b)
        )
        total, at = torch.zeros(2), 0
        for layer in lpips.net:
            x, y = layer(x.clone()), layer(y.clone())
            if isinstance(layer, nn.ReLU):
                apart = F.normalize(x, dim=1) - F.normalize(y, dim=1)
                total += (apart**2 * lpips.weights[at][:, None, None]).sum(1).mean((1, 2))
                at += 1
        assert at == 5
        assert torch.allclose(lpips(a, b), total, rtol=1e-4)

    def test_what_cannot_be_is_refused(self, lpips_files, tmp_path):
        backbone, weights = lpips_files
        with pytest.raises(ValueError, match=r"no file .*alexnet-owt-7be5be79.pth"):
            LPIPS(tmp_path / "absent.pth", weights)
        with pytest.raises(ValueError, match="does not hold the weights of AlexNet's five layers"):
            LPIPS(backbone, backbone)
        with pytest.raises(ValueError, match="32 x 32 pixels or more"):
            LPIPS(backbone, weights)(images(1, 16), images(1, 16))
