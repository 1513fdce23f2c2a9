"""Every command and every Python block of the README and of docs/ runs, on a tiny model and small datasets.

python -m tests.docs.test_commands rewrites the outputs shown in docs/scaling.md.
"""

import hashlib
import json
import math
import re
import shlex
import shutil
import subprocess
import sys
from contextlib import redirect_stdout
from io import StringIO
from pathlib import Path

import pytest
from PIL import Image

from dalle import cli
from dalle.commands.plan import PLANS, plan_training
from dalle.commands.train_transformer import TrainTransformerArgs
from dalle.config import load, parse
from dalle.data import open_source
from dalle.runs.kinds import take_kind
from tests.helpers.formats import write_tar

ROOT = Path(__file__).parents[2]
PAGES = {
    path.stem: path.read_text(encoding="utf-8")
    for path in (ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md")))
}
COMMANDS = {
    page: [
        line.split("  #")[0].strip()
        for block in re.findall(r"```sh\n(.*?)```", text, re.DOTALL)
        for line in block.splitlines()
    ]
    for page, text in PAGES.items()
}
GPU = "python scripts/benchmark.py gpu "  # tests/benchmarks/test_gpu.py runs it
SCRIPTS = {
    page: found
    for page, commands in COMMANDS.items()
    if (found := [c for c in commands if c.startswith(("python scripts/", "torchrun ")) and GPU not in c])
    and page != "scaling"
}
PYTHON = {page: re.findall(r"```python\n(.*?)```", text, re.DOTALL) for page, text in PAGES.items()}

STEPS = "--steps 2 --device cpu --data.workers 0"
SMALLER = {  # words added to a command so that it takes seconds
    "benchmark": (
        "--model.depth 2 --model.heads 2 --model.text-len 8 --model.grid 4 4 --model.conv-kernel 3 --rounds 1"
    ),
    "check_data": "--data.workers 0 --data.resolution 32",
    "convert_captions": "",
    "encode_images": "--device cpu --data.workers 0",
    "evaluate": "--num-prompts 2 --num-samples 8 --best-of 2 --device cpu",
    "inspect_checkpoint": "",
    "lr_sweep": STEPS,
    "plot": "",
    "push_model": "",
    "report": "--captions 1 --best-of 2 --num-codes 16 --device cpu",
    "sample": "--device cpu --best-of 2 --num-images 2 --truncate",
    "train_clip": STEPS,
    "train_diffusion": STEPS,
    "train_dvae": STEPS,
    "train_tokenizer": "--captions 200",
    "train_transformer": STEPS,
    "write_tars": "",
}
OTHERS = ("make ", ". .venv", "dalle ", "sed ", "img2dataset ", "python scripts/plan.py ", GPU)


@pytest.fixture
def workplace(chain, tiny_configs, tmp_path, monkeypatch) -> Path:
    """A checkout after a quick start, with tiny configurations and the datasets that the pages name."""
    for name in ("scripts", "docs"):
        (tmp_path / name).symlink_to(ROOT / name)
    shutil.copytree(ROOT / "configs", tmp_path / "configs")
    for file in (tmp_path / "configs").glob("*/*.yaml"):
        shutil.copy(tiny_configs / file.parent.name / "shapes.yaml", file)
    for part in ("text", "dvae", "tokens", "transformer", "clip", "model"):
        shutil.copytree(chain / part, tmp_path / "runs" / "quickstart" / part)
    (tmp_path / "runs" / "quickstart" / "report.json").write_text(json.dumps(REPORT), encoding="utf-8")
    write_own_images(tmp_path / "my")
    write_public_datasets(tmp_path)
    monkeypatch.chdir(tmp_path)
    return tmp_path


REPORT = {
    "caption_accuracy": {"acc_real": 1.0, "acc_first": 0.5},
    "caption_accuracy_new_pairs": {"acc_real": 1.0, "acc_first": 0.5},
    "seconds": {"total": 1.0},
}


def write_image(path: Path, value: int = 0) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.linear_gradient("L").resize((80, 72)).rotate(90 * value).convert("RGB").point(
        lambda level: (level + 37 * value) % 256
    ).save(path)


def write_text(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")


def write_own_images(my: Path) -> None:
    """my/images with one duplicate, my/table.csv and my/pairs.csv, and my/clipart256 in tars."""
    rows = ["image,caption"]
    for i in range(60):
        write_image(my / "images" / f"{i:02d}.png", i)
        caption = f"image number {i} with all the letters of a quick brown fox that jumps over lazy dogs"
        write_text(my / "images" / f"{i:02d}.txt", caption)
        rows.append(f"images/{i:02d}.png,{caption}")
    shutil.copy(my / "images" / "00.png", my / "images" / "copy.png")
    write_text(my / "images" / "copy.txt", "a copy")
    for name in ("table.csv", "pairs.csv"):
        write_text(my / name, "\n".join(rows) + "\n")
    captions = (ROOT / "docs" / "clipart" / "captions.txt").read_text(encoding="utf-8").splitlines()
    for tar, numbers in {"train-0000": range(16), "train-0001": range(16, 24), "val": range(24, 32)}.items():
        members = []
        for i in numbers:
            members.append((f"{i:05}.png", (my / "images" / f"{i:02d}.png").read_bytes()))
            members.append((f"{i:05}.txt", captions[i % len(captions)].encode()))
        (my / "clipart256").mkdir(exist_ok=True)
        write_tar(my / "clipart256" / f"{tar}.tar", members)


def write_public_datasets(place: Path) -> None:
    """One image of each public dataset, with its captions in the published form."""
    image, karpathy, url = "000000179765.jpg", "COCO_val2014_000000391895.jpg", "http://example.org/a.jpg"
    coco = {
        "images": [{"id": 1, "file_name": image}],
        "annotations": [{"image_id": 1, "id": 2, "caption": "A man on a bicycle."}],
    }
    record = {"filepath": "val2014", "filename": karpathy, "sentences": [{"raw": "A man with a helmet."}]}
    narrative = {"dataset_id": "open_images_train", "image_id": "000a1249af2bc5f0", "caption": "a tree"}
    post = {"image_id": "1", "subreddit": "birds", "url": "https://i.redd.it/1.jpg", "caption": "a wren"}
    svg = (
        '<svg xmlns:cc="http://web.resource.org/cc/" xmlns:dc="http://purl.org/dc/elements/1.1/"><metadata>'
        "<cc:Work><dc:title>soft drink in a cup</dc:title></cc:Work></metadata></svg>"
    )
    captions = {
        "coco/annotations/captions_train2017.json": json.dumps(coco),
        "coco/annotations/captions_val2017.json": json.dumps(coco),
        "dataset_coco.json": json.dumps({"images": [record], "dataset": "coco"}),
        "results_20130124.token": "1000092795.jpg#0\tTwo young guys .\n",
        "narratives/open_images_train_v6-00000-of-00010.jsonl": json.dumps(narrative),
        "clipart/food/cup.svg": svg,
        "Train_GCC-training.tsv": f"a bus in the street\t{url}\n",
        "cc12m.tsv": f"{url}\ta bus in the street\n",
        "annotations/birds_2017.json": json.dumps({"info": {}, "annotations": [post]}),
    }
    for name, text in captions.items():
        write_text(place / name, text)
    images = [f"coco/train2017/{image}", f"coco/val2017/{image}", f"coco/val2014/{karpathy}"]
    images += ["flickr30k-images/1000092795.jpg", "open-images/000a1249af2bc5f0.jpg", "clipart/food/cup.png"]
    images += ["cc3m/00000/000000000.jpg", f"cc12m/{hashlib.md5(url.encode()).hexdigest()}.jpg"]
    for name in [*images, "images/birds/1.jpg"]:
        write_image(place / name)


def smaller(command: str) -> str:
    """The command with words that make it small."""
    name = re.search(r"scripts/(\w+)\.py", command)[1]
    tiny = " --config configs/dvae/shapes.yaml" if name == "train_dvae" and "--config" not in command else ""
    tiny += " --batch-size 2" if "benchmark.py data" in command else ""
    return f"{command}{tiny} {SMALLER[name]}"


def test_every_command_is_run_or_known():
    for page, commands in COMMANDS.items():
        others = [c for c in commands if c not in SCRIPTS.get(page, [])]
        assert [c for c in others if c and not c.startswith(OTHERS)] == [], page


@pytest.mark.parametrize("page", SCRIPTS)
def test_commands_of_the_page_run_in_order(page, workplace, typed, python):
    for command in SCRIPTS[page]:
        if command.startswith("torchrun "):
            words = shlex.split(smaller(command))[1:]
            done = python(["-m", "torch.distributed.run", *words], workplace)
            assert done.returncode == 0, done.stdout + done.stderr
        else:
            typed(smaller(command), workplace)
        if "convert_captions" in command:  # the table written is a dataset of one image
            words = shlex.split(command)
            out, images = (workplace / words[words.index(flag) + 1] for flag in ("--out", "--images"))
            source = open_source(out, image_root=None if images.is_relative_to(out.parent) else images)
            assert len(source) == 1, command
            assert source.read(0).captions, command


@pytest.mark.parametrize("page", [page for page, blocks in PYTHON.items() if blocks])
def test_python_of_the_page_runs(page, workplace):
    for block in PYTHON[page]:
        code = re.sub(r"^ {3}", "", block, flags=re.MULTILINE) if block.startswith("   ") else block
        code = code.replace("rows=6", "rows=2")  # of the tiny model's four
        exec(compile(code, f"{page}.md", "exec"), {})


@pytest.mark.parametrize(
    "command", sorted({c for found in COMMANDS.values() for c in found if c[:5] == "make "})
)
def test_make_knows_the_target(command):
    done = subprocess.run(["make", "--dry-run", *shlex.split(command)[1:]], cwd=ROOT, capture_output=True)
    assert done.returncode == 0, done.stderr


def test_dalle_knows_its_commands():
    words = [c.split()[1] for found in COMMANDS.values() for c in found if c.startswith("dalle ")]
    assert set(words) <= {"--help", "--version", *cli.COMMANDS}


@pytest.mark.skipif(sys.platform != "linux", reason="GNU sed")
def test_sed_writes_the_header_of_the_downloader(workplace):
    (command,) = [c for c in COMMANDS["data"] if c.startswith("sed ")]
    subprocess.run(command, shell=True, cwd=workplace, check=True)
    lines = (workplace / "cc12m.tsv").read_text().splitlines()
    assert (lines[0], len(lines)) == ("url\tcaption", 2)


def test_output_of_img2dataset_opens_as_it_is(workplace):
    record = {"url": "http://a", "caption": "a bus", "key": "000000000", "status": "success"}
    image = (workplace / "my" / "images" / "01.png").read_bytes()
    members = [("000000000.png", image), ("000000000.json", json.dumps(record).encode())]
    folder = workplace / "downloaded"
    folder.mkdir()
    write_tar(folder / "00000.tar", [*members, ("000000000.txt", b"a bus")])
    (folder / "00000_stats.json").write_text("{}")
    (folder / "00000.parquet").write_bytes(b"PAR1")
    source = open_source(folder)
    assert (len(source), source.read(0).captions, list(source.skipped)) == (1, ["a bus"], [])


SCALING = ROOT / "docs" / "scaling.md"
BLOCK = re.compile(r"```sh\n(python scripts/plan\.py [^\n]*)\n```\n\n```text\n(.*?)```", re.DOTALL)
PLANNED = BLOCK.findall(PAGES["scaling"])


def planned(command: str) -> str:
    """Output of a command of scripts/plan.py."""
    kind, words = take_kind(shlex.split(command)[2:])
    words[words.index("--config") + 1] = str(ROOT / words[words.index("--config") + 1])
    output = StringIO()
    with redirect_stdout(output):
        plan_training(kind, parse(PLANS[kind], words))
    return output.getvalue()


def test_every_plan_is_shown_with_its_output():
    assert len(PLANNED) == len(COMMANDS["scaling"])


@pytest.mark.parametrize(
    ("command", "shown"),
    [pytest.param(*block, id=str(i), marks=[pytest.mark.slow] * (i > 0)) for i, block in enumerate(PLANNED)],
)
def test_the_page_shows_the_output_of_plan(command, shown):
    assert planned(command) == shown, "python -m tests.docs.test_commands rewrites the outputs"


@pytest.mark.parametrize("size", ["shapes", "small", "paper"])
def test_losses_at_the_start_are_those_of_the_configurations(size):
    model = load(TrainTransformerArgs, [ROOT / "configs" / "transformer" / f"{size}.yaml"]).model
    row = f"| {model.text_vocab:,} | {math.log(model.text_vocab):.2f} | {model.image_vocab:,} | "
    assert row + f"{math.log(model.image_vocab):.2f} |" in PAGES["training"]


@pytest.mark.slow
def test_quick_start_reaches_its_figures(tmp_path):
    """`make quickstart` in full: about twenty minutes on two cores."""
    script = ROOT / "scripts" / "quickstart.py"
    done = subprocess.run([sys.executable, script], cwd=tmp_path, text=True, capture_output=True)
    assert done.returncode == 0, done.stdout + done.stderr
    report = json.loads((tmp_path / "runs/quickstart/report.json").read_text(encoding="utf-8"))
    accuracy = report["caption_accuracy"]
    assert accuracy["acc_real"] >= 0.99
    assert accuracy["acc_mismatched"] <= 0.02
    assert accuracy["acc_reconstruction"] >= 0.97
    assert accuracy["acc_first"] >= 0.90
    assert accuracy["acc_best_of_16"] >= 0.96
    new_pairs = report["caption_accuracy_new_pairs"]
    assert new_pairs["acc_first"] >= 0.60
    assert new_pairs["acc_best_of_16"] >= 0.85
    for name in ("scripts", "configs", "docs"):
        (tmp_path / name).symlink_to(ROOT / name)
    for command in [c for c in SCRIPTS["README"] if "runs/quickstart/model" in c]:
        done = subprocess.run(
            [sys.executable, *shlex.split(command)[1:]], cwd=tmp_path, text=True, capture_output=True
        )
        assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"


if __name__ == "__main__":
    text = BLOCK.sub(
        lambda found: f"```sh\n{found[1]}\n```\n\n```text\n{planned(found[1])}```", PAGES["scaling"]
    )
    SCALING.write_text(text, encoding="utf-8")
