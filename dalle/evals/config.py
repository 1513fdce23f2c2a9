"""Settings of the metrics (no torch here)."""

from pathlib import Path

from dalle.config import configuration
from dalle.data.config import DataConfig
from dalle.sampling import DiffusionSampling

RADII = (0, 1, 2, 4, 8)  # Figure 9
TEMPLATES = ("a photo of a {}.",)  # Radford et al.: better than the name alone


@configuration
class EvalConfig:
    """How a model is measured."""

    data: DataConfig = DataConfig(path="shapes")
    """Validation images and captions of all metrics but shapes; the resolution is the model's."""
    num_samples: int = 1000
    """Validation pairs to read at most; the paper's FID uses 30,000."""
    num_prompts: int = 200
    """Captions to sample images for; for shapes, of each split."""
    best_of: int = 16
    """Candidates of each caption; 512 in the paper."""
    temperature: float = 1.0
    """Sampling temperature; 1 in the paper."""
    diffusion: DiffusionSampling = DiffusionSampling()
    """How a GLIDE samples."""
    chunk: int = 512
    """Images sampled at once for shapes."""
    batch: int = 32
    """Pairs measured at once."""
    blur_radii: tuple[float, ...] = RADII
    """Radii of the Gaussian filters before features are taken (Figure 9)."""
    feature_extractor: str | None = None
    """File of the Inception weights for FID and IS, or the word clip for the features of the CLIP."""
    classes: Path | None = None
    """Text file of class names, one a line, for images whose caption is their class."""
    templates: tuple[str, ...] = TEMPLATES
    """Prompts of a class for the CLIP; {} is its name."""
    lpips_backbone: Path | None = None
    """File of torchvision's AlexNet, for LPIPS."""
    stats_dir: Path = Path("runs/statistics")
    """Folder that caches the feature statistics of real images."""
    seed: int = 0
    """Seed of captions and candidates."""
