"""Images for a file of captions, and processes that share the work (dalle/pipelines/sample_prompts.py)."""

import json
import os
import subprocess
import sys
import tracemalloc
from dataclasses import replace
from pathlib import Path

import pytest
from PIL import Image

from dalle.commands.sample import SampleArgs, sample
from dalle.pipelines.config import SamplingConfig
from dalle.pipelines.dalle import DALLE
from dalle.pipelines.generation import slug
from dalle.pipelines.sample_prompts import check_prompts, prompt_groups

pytestmark = pytest.mark.filterwarnings("ignore:the vocabulary lacks letters")  # of CAPTIONS[2]
PROJECT = Path(__file__).parents[2]
CAPTIONS = ["a red cross above a blue circle", "a blue circle", "../ a*b", "a small red cross"]
STEMS = [
    "000000-a-red-cross-above-a-blue-circle",
    "000001-a-blue-circle",
    "000002-a-b",
    "000003-a-small-red-cross",
]


@pytest.fixture
def run(chain, tmp_path, monkeypatch) -> SampleArgs:
    """Two of three images for each of CAPTIONS, into all/ of an empty directory."""
    monkeypatch.chdir(tmp_path)
    Path("captions.txt").write_text("\n".join(CAPTIONS) + "\n")
    return SampleArgs(
        model=chain / "model",
        prompts_file=Path("captions.txt"),
        best_of=3,
        num_images=2,
        sampling=SamplingConfig(batch_size=4),
        device="cpu",
        precision="fp32",
        out=Path("all"),
    )


def contents(folder: str | Path) -> dict[str, bytes]:
    """Every file below, hidden ones too."""
    folder = Path(folder)
    return {
        path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()
    }


def records(folder: str) -> list[dict]:
    return [
        json.loads(line) for line in Path(folder, "samples.jsonl").read_text(encoding="utf-8").splitlines()
    ]


def test_each_caption_has_its_images_a_sheet_and_records(run, chain):
    sample(replace(run, log_likelihood=True))
    names = {f"000/{stem}-{end}.png" for stem in STEMS for end in ("00", "01", "grid")}
    assert contents("all").keys() == names | {"run.json", "samples.jsonl", "sheet.png"}
    found = records("all")
    assert [one["index"] for one in found] == [0, 0, 1, 1, 2, 2, 3, 3]
    assert [one["prompt"] for one in found[::2]] == CAPTIONS
    model = DALLE.from_pretrained(chain / "model")
    generation = model.generate(CAPTIONS[1], n=2, best_of=3, batch_size=4, progress=False)
    one = found[2]
    assert one["file"] == "000/000001-a-blue-circle-00.png"
    assert (one["candidate"], one["seed"], one["model"]) == (generation.candidates[0], 0, model.hash)
    assert one["score"] == pytest.approx(generation.scores[0])
    nats = model.log_likelihood(CAPTIONS[1], generation.image_tokens)
    assert one["log_likelihood"] == pytest.approx(
        {"text": float(nats.text[0]), "image": float(nats.image[0])}
    )
    assert Image.open(Path("all", one["file"])).tobytes() == generation.images[0].tobytes()


@pytest.mark.parametrize("best_of", [1, 3])
def test_stopped_and_gone_on_it_writes_what_a_run_in_one_go_writes(run, monkeypatch, best_of):
    """With batch 2, captions are drawn two at a time where one image is asked for, else one at a time."""
    run = replace(run, best_of=best_of, num_images=1, sampling=SamplingConfig(batch_size=2))
    sample(replace(run, out=Path("whole")))
    plain, calls = DALLE.generate, iter(range(100))

    def stopping(*args, **options):
        if next(calls) == 1:
            raise KeyboardInterrupt
        return plain(*args, **options)

    monkeypatch.setattr(DALLE, "generate", stopping)
    with pytest.raises(SystemExit, match="stopped; the same command resumes in all"):
        sample(run)
    assert not Path("all/samples.jsonl").exists()
    times = {path: path.stat().st_mtime_ns for path in Path("all").rglob("*.png")}
    assert len(times) == (4 if best_of == 1 else 2)
    sample(run)
    assert contents("all") == contents("whole")
    assert {path: path.stat().st_mtime_ns for path in times} == times


def test_more_captions_than_rows_are_refused_before_anything_is_written(run):
    with pytest.raises(ValueError, match="prompts_per_batch must be at most the batch size of 4"):
        sample(replace(run, sampling=SamplingConfig(batch_size=4, prompts_per_batch=5)))
    assert not Path("all").exists()
    sample(replace(run, sampling=SamplingConfig(batch_size=4, prompts_per_batch=2)))
    assert len(records("all")) == 8


def test_a_block_cut_short_is_not_taken_for_whole(run, monkeypatch):
    plain = DALLE.generate

    def short(*args, **options):
        drawn = plain(*args, **options)
        drawn[0].num_generated -= 1
        return drawn

    monkeypatch.setattr(DALLE, "generate", short)
    with pytest.raises(SystemExit, match="stopped"):
        sample(run)
    assert contents("all").keys() == {"run.json"}


def test_a_finished_run_is_left_as_it_is(run, monkeypatch):
    sample(run)
    before = contents("all")
    monkeypatch.setattr(DALLE, "generate", None)
    sample(run)
    assert contents("all") == before


def test_another_run_in_the_directory_is_never_written_over(run):
    sample(run)
    before = contents("all")
    for change, said in (({"seed": 1}, "settings"), ({"precision": "bf16"}, "precision")):
        with pytest.raises(ValueError, match=f"all holds a run with other {said}; give another --out"):
            sample(replace(run, **change))
    Path("captions.txt").write_text("a blue circle\n")
    with pytest.raises(ValueError, match="all holds a run with other prompts"):
        sample(run)
    assert contents("all") == before
    Path("other").mkdir()
    Path("other/mine.txt").touch()
    with pytest.raises(ValueError, match="other is not empty and holds no run of prompts"):
        sample(replace(run, out=Path("other")))


def test_it_goes_on_with_the_rows_that_it_began_with(run, monkeypatch):
    """Those found by memory are written down: with others the images might not be the same."""
    sample(replace(run, sampling=SamplingConfig()))
    monkeypatch.setattr("dalle.pipelines.sample_prompts.auto_batch_size", lambda *_: 2)
    sample(replace(run, sampling=SamplingConfig()))
    assert json.loads(Path("all/run.json").read_text())["settings"]["batch_size"] == 16


@pytest.mark.parametrize(
    ("name", "text", "said"),
    [
        ("c.txt", b"a blue circle\n\na red cross\n", "c.txt, line 2 is empty"),
        ("c.txt", b"", "c.txt holds no prompts"),
        (
            "c.jsonl",
            b'{"prompt": "a blue circle"}\n{"text": "b"}\n',
            'c.jsonl, line 2 has no "prompt" or "caption"',
        ),
        ("c.jsonl", b"a blue circle\n", "c.jsonl, line 1 is not JSON"),
        ("c.jsonl", b'["a"]\n', "c.jsonl, line 1 has no"),
        (
            "c.txt",
            b"a blue circle\n" + b"a red cross and " * 30,
            r"c.txt, line 2: the caption has \d+ tokens",
        ),
        ("none.txt", None, r"cannot read none\.txt \(No such file"),
        ("c.txt", b"\xff\xfe", "c.txt is not UTF-8"),
    ],
)
def test_a_file_that_cannot_be_drawn_is_told_and_nothing_is_written(run, name, text, said):
    if text is not None:
        Path(name).write_bytes(text)
    with pytest.raises(ValueError, match=said):
        sample(replace(run, prompts_file=Path(name)))
    assert not Path("all").exists()


def test_json_lines_are_captions_too(run):
    lines = [{"prompt": "a blue circle", "id": 7}, {"caption": "a red\ncross"}]
    Path("c.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    sample(replace(run, prompts_file=Path("c.jsonl")))
    assert [one["prompt"] for one in records("all")[::2]] == ["a blue circle", "a red cross"]


@pytest.mark.parametrize("kind", ["file", pytest.param("one", marks=pytest.mark.slow)])
def test_two_processes_write_what_one_writes(run, chain, prompt, tmp_path, kind):
    """They share the captions of a file, and the candidates of one caption."""
    if kind == "file":
        run = replace(run, best_of=1, num_images=1, sampling=SamplingConfig(batch_size=2))
        words = ["--prompts-file", "captions.txt", "--best-of", "1", "--num-images", "1"]
    else:
        run = replace(
            run,
            prompts_file=None,
            prompt=prompt,
            best_of=7,
            num_images=3,
            sampling=SamplingConfig(batch_size=2),
        )
        words = ["--prompt", prompt, "--best-of", "7", "--num-images", "3"]
    words += [
        "--model",
        chain / "model",
        "--device",
        "cpu",
        "--batch-size",
        "2",
        "--precision",
        "fp32",
        "--out",
        "shared",
    ]
    sample(run)
    env = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(PROJECT)}
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    start = [sys.executable, *torchrun, PROJECT / "scripts" / "sample.py", *words]
    done = subprocess.run(
        [*map(str, start)], cwd=tmp_path, env=env, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert contents("shared") == contents("all")


def test_thirty_thousand_lines_are_read_in_constant_memory(tmp_path):
    path = tmp_path / "many.txt"
    with path.open("w") as file:
        for i in range(30_000):
            file.write(f"caption number {i} of very many that say nothing of an image at all {'x' * 100}\n")
    tracemalloc.start()
    try:
        assert check_prompts(path, lambda caption: None)[0] == 30_000
        assert sum(len(some) for _, some in prompt_groups(path, 7)) == 30_000
        assert tracemalloc.get_traced_memory()[1] < 2**19
    finally:
        tracemalloc.stop()
    assert path.stat().st_size > 2**22


@pytest.mark.parametrize(
    ("caption", "name"),
    [
        ("A red cross!", "a-red-cross"),
        ("円", "prompt"),
        ("../..", "prompt"),
        ("x" * 300, "x" * 60),
        ("", "prompt"),
    ],
)
def test_a_name_is_safe_whatever_the_caption(caption, name):
    assert slug(caption) == name
