"""Networks of FID, inception score and LPIPS: torch-fidelity and lpips, with weights from given files.

Nothing is downloaded, and reading a file runs none of its code: torch-fidelity, which would download or
unpickle, gets a copy of the file's tensors; lpips builds its network without weights and gets them later.
"""

import warnings
from importlib import import_module
from pathlib import Path
from tempfile import TemporaryDirectory
from types import ModuleType

import torch
from torch import Tensor, nn

from dalle.io.files import file_hashes
from dalle.io.images import check_images
from dalle.io.torch_file import read_torch_file, weights_of
from dalle.precision import tf32
from dalle.types import Embedder

INCEPTION_FILE = (
    "FID and IS need the Inception weights of 2015, pt_inception-2015-12-05-6726825d.pth (91 MB), of "
    "github.com/mseitzer/pytorch-fid and github.com/toshas/torch-fidelity; give it with --feature-extractor. "
    "The word clip in its place takes the features of the model's own CLIP, whose distance is no FID"
)
ALEXNET_FILE = "LPIPS needs torchvision's AlexNet, alexnet-owt-7be5be79.pth; give it with --lpips-backbone"


class Inception:
    """Inception v3 of 2015, as FID uses it; ValueError for other weights."""

    resize, metric = "bilinear to 299 x 299 as TensorFlow 1 (no antialiasing)", "fid"

    def __init__(self, path: Path, device: str | torch.device = "cpu"):
        tensors = read_weights(path, INCEPTION_FILE)
        package = _import("torch_fidelity.feature_extractor_inceptionv3")
        with TemporaryDirectory() as folder:
            copy = str(Path(folder) / "inception.pth")
            torch.save(tensors, copy)
            try:
                net = package.FeatureExtractorInceptionV3("fid", ["2048", "logits_unbiased"], copy)
            except RuntimeError as error:
                raise ValueError(f"{path} holds other weights: {error!s:.300}. {INCEPTION_FILE}") from None
        self.net, self.device, self.hash = net.to(device), device, file_hash(path)

    @torch.no_grad()
    @tf32(False)
    def __call__(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """Pixels (B, 3, H, W) in [0, 1], rounded to 8 bits -> features (B, 2048) and logits (B, 1008)."""
        check_images(pixels)
        features, logits = self.net((pixels.to(self.device).clamp(0, 1) * 255).round().byte())
        return features.cpu(), logits.cpu()


class LPIPS:
    """LPIPS 0.1 by AlexNet (Zhang et al. 2018); ValueError for other weights."""

    def __init__(self, backbone: Path, device: str | torch.device = "cpu"):
        tensors = read_weights(backbone, ALEXNET_FILE)
        lpips = _import("lpips")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torchvision's new names of arguments
            net = lpips.LPIPS(net="alex", pretrained=False, pnet_rand=True, verbose=False)
        layers = Path(lpips.__file__).parent / "weights" / "v0.1" / "alex.pth"
        net.load_state_dict(read_weights(layers, "Install lpips again"), strict=False)
        features = {name: f"features.{name.split('.', 1)[1]}" for name in net.net.state_dict()}
        try:
            net.net.load_state_dict({name: tensors[source] for name, source in features.items()})
        except (KeyError, RuntimeError) as error:
            raise ValueError(f"{backbone} holds other weights: {error!s:.300}. {ALEXNET_FILE}") from None
        self.net: nn.Module = net.to(device).eval().requires_grad_(False)
        self.hash = f"{file_hash(backbone)}-{file_hash(layers)}"

    @torch.no_grad()
    @tf32(False)
    def __call__(self, pixels: Tensor, others: Tensor) -> Tensor:
        """(B, 3, H, W) in [0, 1], twice -> (B,), 0 for equal images."""
        check_images(pixels)
        check_images(others)
        if min(pixels.shape[2:]) < 32:
            raise ValueError(f"LPIPS needs images of 32 x 32 pixels or more, got {tuple(pixels.shape[2:])}")
        return self.net(pixels, others, normalize=True).flatten()


class CLIPFeatures:
    """Embeddings of a CLIP in place of Inception features: their distance is no FID, and there is no IS."""

    resize, metric = "bicubic with antialiasing to the CLIP's size", "fd_clip"

    def __init__(self, clip: Embedder, clip_hash: str):
        self.clip, self.hash = clip, clip_hash

    @torch.no_grad()
    def __call__(self, pixels: Tensor) -> tuple[Tensor, None]:
        return self.clip.embed_images(pixels).float().cpu(), None


Extractor = Inception | CLIPFeatures


def _import(name: str) -> ModuleType:
    try:
        return import_module(name)
    except ImportError as error:
        raise ImportError("FID, IS and LPIPS need pip install 'zeroshot-text2image[evals]'") from error


def read_weights(path: Path, missing: str) -> dict[str, Tensor]:
    """Tensors of a PyTorch file by name; ValueError, with `missing`, where there is none."""
    if not path.exists():
        raise ValueError(f"no file {path}. {missing}")
    return {name: tensor.clone() for name, tensor in weights_of(read_torch_file(path).tree).items()}


def file_hash(path: Path) -> str:
    """sha256 of a file, 16 hex characters."""
    return file_hashes(path.parent, [path])[path.name][:16]
