"""The README's script commands and Python run at the size of seconds; the quick start in full under
`slow`."""

import json
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from dalle import cli
from dalle.io.images import to_tensor
from dalle.shapes.judge import matches_caption

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")
COMMANDS = [
    line.split("#")[0].strip()
    for block in re.findall(r"```sh\n(.*?)```", README, re.DOTALL)
    for line in block.splitlines()
    if line.strip()
]
SCRIPTS = [command for command in COMMANDS if command.startswith("python scripts/")]

DVAE = "--model.widths 8 8 --model.downsample_factor 2 --model.vocab-size 16 --data.resolution 16 --crop 16"
TRANSFORMER = (
    "--model.depth 2 --model.heads 1 --model.head-dim 8 --model.grid 8 8 --model.image-vocab 16 "
    "--model.conv-kernel 3 --eval-samples 4"
)
CLIP = (
    "--model.image-size 16 --model.vision-width 32 --model.text-width 32 --data.resolution 24 "
    "--eval-samples 4"
)
STEPS = "--steps 2 --train.batch-size 4 --device cpu"
SMALLER = {  # words put behind a command so that it takes seconds
    "check_data": "--data.resolution 16",
    "train_tokenizer": "--captions 200",
    "train_dvae": f"{DVAE} {STEPS} --eval-samples 4",
    "encode_images": "--data.resolution 16 --encode.images 20 --device cpu",
    "train_transformer": f"{TRANSFORMER} {STEPS}",
    "train_clip": f"{CLIP} {STEPS}",
    "sample": "--device cpu --best-of 4 --num-images 2",
    "benchmark": (
        "--model.depth 2 --model.heads 2 --model.text-len 8 --model.grid 4 4 --model.conv-kernel 3 --rounds 1"
    ),
    "evaluate": "--num-prompts 2 --best-of 2 --device cpu",
    "plot": "",
    "report": "--captions 1 --best-of 2 --num-codes 16 --device cpu",
    "push_model": "",
    "plan": "--model.depth 2 --model.heads 2",
    "inspect_checkpoint": "",
}


def run(command: str, cwd: Path) -> subprocess.CompletedProcess:
    words = shlex.split(command)
    words[0] = sys.executable if words[0] == "python" else words[0]
    return subprocess.run(words, cwd=cwd, capture_output=True, text=True)


@pytest.fixture(scope="module")
def workplace(tmp_path_factory) -> Path:
    """A directory that looks like a checkout after a (tiny) quick start, with a folder of own images."""
    place = tmp_path_factory.mktemp("readme")
    for name in ("scripts", "configs", "docs"):
        (place / name).symlink_to(ROOT / name)
    images = place / "my" / "images"
    images.mkdir(parents=True)
    rows = ["image,caption"]
    for i in range(60):
        Image.new("RGB", (200, 160), (4 * i, 100, 255 - 4 * i)).save(images / f"{i:02d}.png")
        caption = f"color number {i} of the words that make a vocabulary"
        (images / f"{i:02d}.txt").write_text(caption, encoding="utf-8")
        rows.append(f"images/{i:02d}.png,{caption}")
    (place / "my" / "pairs.csv").write_text("\n".join(rows) + "\n", encoding="utf-8")
    return place


def test_the_readme_has_the_two_commands_and_the_stages():
    assert COMMANDS[:2] == ["make quickstart", "make test"]
    names = {command.split()[1] for command in SCRIPTS}
    assert {f"scripts/{stage}.py" for stage in SMALLER} <= names


def test_every_command_is_of_a_kind_that_is_tested():
    known = ("make ", "sh scripts/setup.sh", "pip install", "python scripts/", "dalle ")
    assert [command for command in COMMANDS if not command.startswith(known)] == []


def test_dalle_knows_its_commands():
    """That a command of `dalle` does as its script does, tests/test_cli.py says."""
    words = [command.split()[1] for command in COMMANDS if command.startswith("dalle ")]
    assert set(words) <= {"--help", "--version", *cli.COMMANDS}


@pytest.mark.parametrize("command", [c for c in COMMANDS if c.startswith("make ")])
def test_make_knows_the_target(command):
    done = run(f"make --dry-run {command.removeprefix('make ')}", ROOT)
    assert done.returncode == 0, done.stderr
    assert "setup.sh" in done.stdout


def test_the_commands_without_make_are_what_make_does():
    for command in (c for c in COMMANDS if c.startswith("sh scripts/setup.sh && ")):
        wanted = command.removeprefix("sh scripts/setup.sh && ")
        assert wanted in "".join(
            run(f"make --dry-run {target}", ROOT).stdout for target in ("quickstart", "test")
        )


def test_the_script_commands_run_in_the_order_of_the_readme(workplace, typed):
    words = f"--captions 2 --best-of 2 --device cpu --configs {tiny_configs(workplace)}"
    typed(f"python scripts/quickstart.py {words}", workplace)
    report = json.loads((workplace / "runs" / "quickstart" / "report.json").read_text(encoding="utf-8"))
    assert report["caption_accuracy"]["acc_real"] == 1
    for command in SCRIPTS:
        typed(f"{command} {smaller(command)}", workplace)
    assert list((workplace / "runs" / "samples").glob("*/00.png"))
    (block,) = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    exec(compile(block, "README.md", "exec"), {})


def smaller(command: str) -> str:
    name = Path(command.split()[1]).stem
    own = "my/p" in command or "my-" in command
    words = SMALLER[name]
    if "--num-samples" in command:
        words += " --num-samples 8"
    if "--best-of 8 --num-images 8" in command:  # none is left out, so no CLIP is needed
        words += " --best-of 2"
    if own and name == "train_tokenizer":
        words += " --text.vocab-size 400"
    if own and name == "train_clip":
        words += " --model.head-dim 32"
    return words


def tiny_configs(place: Path) -> Path:
    """The shapes files with the sizes of this test."""
    from dalle.commands.train_clip import TrainCLIPArgs
    from dalle.commands.train_dvae import TrainDVAEArgs
    from dalle.commands.train_transformer import TrainTransformerArgs
    from dalle.config import from_dict, merge, read_yaml, to_dict

    changes = {
        "dvae": {
            "steps": 2,
            "crop": 16,
            "data": {"resolution": 32},
            "model": {"widths": [8, 8, 8], "vocab_size": 16},
            "train": {"batch_size": 4},
            "encode": {"images": 40},
        },
        "transformer": {
            "steps": 2,
            "model": {
                "depth": 2,
                "heads": 1,
                "head_dim": 8,
                "grid": [8, 8],
                "image_vocab": 16,
                "conv_kernel": 3,
            },
            "train": {"batch_size": 4},
            "eval_samples": 4,
        },
        "clip": {
            "steps": 2,
            "data": {"resolution": 36},
            "model": {"image_size": 32, "vision_width": 32, "text_width": 32},
            "train": {"batch_size": 4},
            "eval_samples": 4,
        },
    }
    for family, run_class in (
        ("dvae", TrainDVAEArgs),
        ("transformer", TrainTransformerArgs),
        ("clip", TrainCLIPArgs),
    ):
        data = merge(read_yaml(ROOT / "configs" / family / "shapes.yaml"), changes[family])
        folder = place / "tiny" / family
        folder.mkdir(parents=True)
        text = json.dumps(to_dict(from_dict(run_class, data)))  # JSON is YAML
        (folder / "shapes.yaml").write_text(text, encoding="utf-8")
    return place / "tiny"


@pytest.mark.slow
def test_the_quick_start_reaches_its_numbers(tmp_path):
    """`make quickstart` in full: about twenty minutes on two cores."""
    script = ROOT / "scripts" / "quickstart.py"
    done = subprocess.run([sys.executable, script], cwd=tmp_path, text=True, capture_output=True)
    assert done.returncode == 0, done.stdout + done.stderr
    accuracy = json.loads((tmp_path / "runs/quickstart/report.json").read_text(encoding="utf-8"))[
        "caption_accuracy"
    ]
    assert accuracy["true"] >= 0.99
    assert accuracy["mismatched"] <= 0.02
    assert accuracy["reconstruction"] >= 0.97
    assert accuracy["acc_first"] >= 0.85
    assert accuracy["acc_best_of_16"] >= 0.95
    for name in ("scripts", "configs", "docs"):
        (tmp_path / name).symlink_to(ROOT / name)
    for command in (c for c in SCRIPTS if "runs/quickstart/model" in c):
        done = run(command, tmp_path)
        assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"


@pytest.mark.slow
def test_the_stages_of_the_shapes_in_full(tmp_path):
    """The README's stage commands as they stand, one after the other: about twenty minutes on two cores."""
    for name in ("scripts", "configs"):
        (tmp_path / name).symlink_to(ROOT / name)
    stages = [c for c in SCRIPTS if "shapes.yaml" in c] + [c for c in SCRIPTS if "sample.py --prompt" in c]
    assert len(stages) == 6
    for command in stages:
        done = run(command, tmp_path)
        assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
    (prompt,) = re.findall(r'sample.py --prompt "([^"]+)"', README)
    images = [Image.open(path) for path in sorted((tmp_path / "runs" / "samples").glob("*/0*.png"))]
    assert len(images) == 4
    assert matches_caption(to_tensor(images), [prompt] * 4).any()
