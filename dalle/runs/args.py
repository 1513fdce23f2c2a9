"""Where runs lie and how a stage finds what an earlier one made."""

from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

from dalle.config import to_dict
from dalle.data import PairsLoader, StepOfPairs
from dalle.hub.registry import LoadedModel, load_model
from dalle.io.files import make_directory, read_json
from dalle.paths import CONFIGS as CONFIGS  # scripts take it from here
from dalle.pretrained.load import is_external_checkpoint, load_image_tokenizer
from dalle.text import BPETokenizer, load_text_tokenizer
from dalle.train.config import LogConfig, Mode, Resume
from dalle.train.distributed import TIMEOUT, Parallel
from dalle.train.precision import resolve_device

ROOT = Path("runs")

MAKE_COMMANDS = {
    "text": "python scripts/train_tokenizer.py --config configs/transformer/shapes.yaml",
    "dvae": "python scripts/train_dvae.py --config configs/dvae/shapes.yaml",
    "tokens": "python scripts/encode_images.py --config configs/dvae/shapes.yaml",
    "transformer": "python scripts/train_transformer.py --config configs/transformer/shapes.yaml",
    "clip": "python scripts/train_clip.py --config configs/clip/shapes.yaml",
}
FREE_OF_DATA = ("workers", "prefetch", "index_dir", "max_bad_fraction")
"""Settings of the data that leave every image as it is."""
_MARKS = {"text": "text.json", "tokens": "meta.json"}


@dataclass(frozen=True)
class TrainArgs:
    """What every training script takes."""

    out: Path | None = None
    """Directory of the run; runs/<stage> unless given."""
    steps: int = 430_000
    """Updates in all; schedules keep their own lengths."""
    seed: int = 0
    """Of weights, order and noise."""
    device: str = "auto"
    """cuda, mps or cpu; auto takes the first there is."""
    resume: Resume = "auto"
    """auto goes on with the run that lies in --out; changed does so even if its configuration was another, from here
    on with the new one (but for the averaging's decay); never refuses it."""
    parallel: Mode = "none"
    """How the processes that torchrun starts share the work: none is one process, ddp copies the model, fsdp slices
    it, hsdp slices it within a machine and copies it between machines."""
    shard: int | None = None
    """For hsdp: processes that share one set of parameters; those of a machine unless given."""
    init_from: Path | None = None
    """Begin with the weights of this run, checkpoint or model directory of the same family; vocabularies may grow."""
    freeze: tuple[str, ...] = ()
    """Names of parameters that are not trained; * stands for anything: "layers.0.*"."""
    overfit_batch: int | None = None
    """Train on the first batch alone, of so many samples, again and again: a check that the loss can fall."""
    timeout: float = TIMEOUT / timedelta(minutes=1)
    """Minutes that a process waits for the others before it ends with an error: how long a hang lasts at most."""
    compile: bool = False
    """Compile each layer: minutes at the start, faster steps (fewer, larger kernels)."""
    log: LogConfig = LogConfig()
    """Where the run tells what it does, beside log.jsonl."""

    def __post_init__(self):
        if self.steps < 1:
            raise ValueError(f"steps must be positive, got {self.steps}")
        if not 0 <= self.seed < 2**32:
            raise ValueError(f"seed must lie in [0, 2^32), got {self.seed}")
        if self.overfit_batch is not None and self.overfit_batch < 1:
            raise ValueError(f"overfit_batch must be positive, got {self.overfit_batch}")
        if not self.timeout > 0:
            raise ValueError(f"timeout must be positive, got {self.timeout}")

    def processes(self) -> Parallel:
        """Joins those that train together; ValueError where they were not started so."""
        if self.compile and self.parallel in ("fsdp", "hsdp"):
            raise ValueError(
                f"--compile with --parallel {self.parallel} is untested; leave --compile out, or take --parallel ddp"
            )
        return Parallel.start(self.parallel, self.device, self.shard, timedelta(minutes=self.timeout))

    def directory(self, stage: str) -> Path:
        """Where the run writes."""
        return self.out or ROOT / stage

    def record(self) -> dict[str, Any]:
        """The configuration for the checkpoint, less what may change on resuming."""
        free = {
            "out",
            "steps",
            "device",
            "resume",
            "parallel",
            "shard",
            "timeout",
            "compile",
            "encode",
            "log",
        }
        free |= {"tokens", "tokenizer", "dvae"}  # the links name what they held
        free |= {"init_from"}  # as `begin` says
        free |= {
            name for name in ("freeze", "overfit_batch") if not getattr(self, name)
        }  # older runs do not know them
        kept = {key: value for key, value in to_dict(self).items() if key not in free}
        if "train" in kept:
            kept["train"] = {key: value for key, value in kept["train"].items() if key != "accumulate"}
        if "data" in kept:
            kept["data"] = {key: value for key, value in kept["data"].items() if key not in FREE_OF_DATA}
        return kept


def loader(
    task: StepOfPairs, run: Any, out: Path, receive: Callable[[Any], Any] = lambda made: made
) -> PairsLoader:
    """The batches of a training run, by as many workers as `--data.workers` says; <out>/skipped.jsonl names what
    is skipped."""
    data = run.data
    log = make_directory(out) / "skipped.jsonl"
    pin = resolve_device(run.device).type == "cuda"
    return PairsLoader(task, run.steps, data.workers, data.prefetch, log, data.max_bad_fraction, receive, pin)


def is_complete(stage: str, root: Path | None = None) -> bool:
    """Whether the newest result of a stage under runs/ is there and, if it is trained, trained to its end."""
    if not _results(stage, root or ROOT):
        return False
    pointer = latest_run(stage, root) / "checkpoints" / "latest"
    if not pointer.is_file():
        return True
    meta = read_json(pointer.parent / pointer.read_text(encoding="utf-8").strip() / "meta.json")
    return meta["step"] >= meta["steps"]


def latest_run(stage: str, root: Path | None = None) -> Path:
    """The newest result of a stage under runs/; ValueError names the command that makes one."""
    found = [path for path in _results(stage, root or ROOT)]
    if not found:
        raise ValueError(f"no {stage} under {root or ROOT}/; make one:\n    {MAKE_COMMANDS[stage]}")
    return max(found, key=lambda path: _mark(stage, path).stat().st_mtime)


def _mark(stage: str, folder: Path) -> Path:
    return folder / _MARKS.get(stage, "checkpoints/latest")


def _results(stage: str, root: Path) -> list[Path]:
    """Folders one or two levels below the root that hold a whole result of the stage."""
    folders = [*root.glob("*/"), *root.glob("*/*/")]
    return [
        f
        for f in folders
        if not f.name.startswith(".") and _mark(stage, f).is_file() and _kind(stage, f) == stage
    ]


def _kind(stage: str, folder: Path) -> str | None:
    """Which stage made a folder; None for one that is damaged or something else."""
    if stage == "text":  # a model directory holds a text.json too
        return None if (folder / "config.json").exists() else "text"
    try:
        if stage != "tokens":
            folder = (
                folder
                / "checkpoints"
                / (folder / "checkpoints" / "latest").read_text(encoding="utf-8").strip()
            )
        meta = read_json(folder / "meta.json")
    except ValueError:
        return None
    return meta.get("kind") if isinstance(meta, dict) else None


def resolve_input(stage: str, given: Path | None) -> Path:
    """The path given, or the newest under runs/; says which it took."""
    path = given or latest_run(stage)
    if not path.exists():
        raise ValueError(f"no {stage} at {path}; make one:\n    {MAKE_COMMANDS[stage]}")
    print(f"taking {stage} from {path}")
    return path


def load_stage(stage: str, given: Path | None, device: Any = "cpu") -> LoadedModel:
    """A model of an earlier stage, with its averaged weights; warns when its training is not complete.

    As the dVAE it also takes a published image tokenizer: OpenAI's encoder.pkl and decoder.pkl in one folder, say.
    """
    path = resolve_input(stage, given)
    if stage == "dvae" and is_external_checkpoint(path):
        return LoadedModel(stage, load_image_tokenizer(path, device), {}, path)
    part = load_model(path, stage, device)
    step, steps = part.meta.get("step"), part.meta.get("steps")
    if step is not None and step < steps:
        print(f"note: this {stage} was trained for {step} of {steps} steps only")
    return part


def load_text_input(given: Path | None) -> BPETokenizer:
    """The text tokenizer of an earlier stage, or a file of another library that `load_text_tokenizer` reads."""
    path = resolve_input("text", given)
    return load_text_tokenizer(path / "text.json" if path.is_dir() else path)
