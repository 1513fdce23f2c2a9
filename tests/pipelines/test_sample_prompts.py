"""Images for a file of prompts, and processes that share the work (dalle/pipelines/sample_prompts.py)."""

import json
import multiprocessing
import socket
from dataclasses import replace
from pathlib import Path
from unittest.mock import Mock

import pytest
from PIL import Image

from dalle.commands.sample import SampleArgs, sample
from dalle.pipelines import sample_prompts
from dalle.pipelines.dalle import DALLE
from dalle.pipelines.generation import slug
from dalle.sampling import SamplingConfig
from dalle.train.checkpoint_saver import lock_directory

pytestmark = pytest.mark.filterwarnings("ignore:the vocabulary lacks letters")  # of CAPTIONS[2]
CAPTIONS = ["a red cross above a blue circle", "a blue circle", "../ a*b", "a small red cross"]


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
    files = [path for path in Path(folder).rglob("*") if path.is_file()]
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in files}


def records(folder: str) -> list[dict]:
    return [json.loads(line) for line in Path(folder, "samples.jsonl").read_text("utf-8").splitlines()]


def test_each_caption_has_its_images_a_sheet_and_records(run, chain):
    sample(replace(run, log_likelihood=True))
    stems = [f"000/{index:06d}-{slug(caption)}" for index, caption in enumerate(CAPTIONS)]
    names = {f"{stem}-{end}.png" for stem in stems for end in ("00", "01", "grid")}
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
    expected = {"text": float(nats.text[0]), "image": float(nats.image[0])}
    assert one["log_likelihood"] == pytest.approx(expected)
    assert Image.open(Path("all", one["file"])).tobytes() == generation.images[0].tobytes()


@pytest.mark.parametrize("best_of", [1, 3])
def test_interrupted_and_resumed_it_writes_what_a_run_in_one_go_writes(run, monkeypatch, best_of):
    """With batch 2, prompts are sampled two at a time for one candidate each, else one at a time."""
    run = replace(run, best_of=best_of, num_images=1, sampling=SamplingConfig(batch_size=2))
    sample(replace(run, out=Path("whole")))
    plain, calls = DALLE.generate, iter(range(100))

    def stopping(*args, **options):
        if next(calls) == 1:
            raise KeyboardInterrupt
        return plain(*args, **options)

    monkeypatch.setattr(DALLE, "generate", stopping)
    with pytest.raises(SystemExit, match="stopped; the same command resumes"):
        sample(run)
    assert not Path("all/samples.jsonl").exists()
    times = {path: path.stat().st_mtime_ns for path in Path("all").rglob("*.png")}
    assert len(times) == (4 if best_of == 1 else 2)
    sample(run)
    assert contents("all") == contents("whole")
    assert {path: path.stat().st_mtime_ns for path in times} == times


def test_too_many_prompts_per_batch_are_refused_before_anything_is_written(run):
    with pytest.raises(ValueError, match="prompts_per_batch"):
        sample(replace(run, sampling=SamplingConfig(batch_size=4, prompts_per_batch=5)))
    assert not Path("all").exists()
    sample(replace(run, sampling=SamplingConfig(batch_size=4, prompts_per_batch=2)))
    assert len(records("all")) == 8


def test_an_interrupted_batch_is_not_taken_for_whole(run, monkeypatch):
    plain = DALLE.generate

    def short(*args, **options):
        generations = plain(*args, **options)
        generations[0].num_generated -= 1
        return generations

    monkeypatch.setattr(DALLE, "generate", short)
    with pytest.raises(SystemExit, match="stopped"):
        sample(run)
    assert contents("all").keys() == {"run.json", "parts/.lock"}


def test_a_finished_run_is_left_and_another_run_never_overwrites_it(run, monkeypatch):
    sample(run)
    before = contents("all")
    monkeypatch.setattr(DALLE, "generate", None)
    Path("all/sheet.png").unlink()  # it was killed before the sheet
    image = Path("all", records("all")[0]["file"])
    image.rename("kept.png")
    with pytest.raises(ValueError, match=r"samples\.jsonl names images that are gone; remove it"):
        sample(run)
    Path("kept.png").rename(image)
    sample(run)
    for change, name in (({"seed": 1}, "settings"), ({"precision": "bf16"}, "precision")):
        with pytest.raises(ValueError, match=f"other {name}; .* --out"):
            sample(replace(run, **change))
    Path("captions.txt").write_text("a blue circle\n")
    with pytest.raises(ValueError, match="other prompts"):
        sample(run)
    assert contents("all") == before
    Path("other").mkdir()
    Path("other/mine.txt").touch()
    with pytest.raises(ValueError, match="other is not empty"):
        sample(replace(run, out=Path("other")))


def test_a_directory_is_one_runs_at_a_time(run, monkeypatch):
    with monkeypatch.context() as other:
        other.setattr(sample_prompts, "lock_directory", Mock(side_effect=ValueError("in use")))
        with pytest.raises(ValueError, match="in use"):
            sample(run)
    lock_directory(Path("all/parts")).close()  # of a run that was killed before run.json
    sample(run)


def test_it_resumes_with_the_batch_size_it_began_with(run, monkeypatch):
    """A size found by memory is recorded: with another the images might not be the same."""
    generate = Mock(side_effect=KeyboardInterrupt)
    monkeypatch.setattr(DALLE, "generate", generate)
    for fitting in (16, 2):
        monkeypatch.setattr(DALLE, "auto_batch_size", Mock(return_value=fitting))
        with pytest.raises(SystemExit, match="stopped"):
            sample(replace(run, sampling=SamplingConfig()))
    assert [call.kwargs["batch_size"] for call in generate.call_args_list] == [16, 16]


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("c.txt", b"a blue circle\n\na red cross\n", "line 2 is empty"),
        ("c.txt", b"", "no prompts"),
        ("c.jsonl", b'{"prompt": "a blue circle"}\n{"text": "b"}\n', 'line 2 has no "prompt"'),
        ("c.jsonl", b"a blue circle\n", "line 1 is not JSON"),
        ("c.jsonl", b'["a"]\n', "line 1 has no"),
        ("c.jsonl", b"[" * 100_000, "line 1 is not JSON"),
        ("c.jsonl", b"1" * 10_000, "line 1 is not JSON"),
        ("c.txt", b"a blue circle\n" + b"a red cross and " * 30, r"line 2: .* \d+ tokens"),
        ("none.txt", None, r"cannot read none\.txt"),
        ("c.txt", b"\xff\xfe", "c.txt is not UTF-8"),
        ("c.txt", b"a blue circle\nNaN\n", "line 2 is empty, or a missing value"),
        ("c.txt", "\u200b".encode(), "line 1 is empty"),
        ("c.jsonl", b'{"prompt": "a \\ud800"}', "line 1 holds bytes"),
        ("c.jsonl", b'{"prompt": "a", "prompt": "b"}', "line 1 is not JSON: .*twice"),
    ],
)
def test_a_damaged_file_is_refused_and_nothing_is_written(run, name, text, message):
    if text is not None:
        Path(name).write_bytes(text)
    with pytest.raises(ValueError, match=message):
        sample(replace(run, prompts_file=Path(name)))
    assert not Path("all").exists()


@pytest.mark.parametrize("settings", ["[]", '{"settings": []}', "{", '{"settings": {"batch_size": "x"}}'])
def test_a_damaged_run_is_refused(run, settings):
    Path("all").mkdir()
    Path("all/run.json").write_text(settings)
    with pytest.raises(ValueError, match=r"run\.json|batch_size|another --out"):
        sample(replace(run, sampling=SamplingConfig()))


@pytest.mark.parametrize("text", ["", "[]", '{"file": "a.png"}', '{"file": "a", "prompt": 3}', "\0"])
def test_a_damaged_record_is_named_by_its_line(tmp_path, text):
    good = '{"file": "000/0-00.png", "prompt": "a\u2028b"}\n'
    (tmp_path / "samples.jsonl").write_text(f"{good}{text}\n{good}", encoding="utf-8")
    with pytest.raises(ValueError, match=r"samples\.jsonl, line 2"):
        sample_prompts.read_records(tmp_path / "samples.jsonl")


def test_json_lines_are_captions_too(run):
    lines = [{"prompt": "a blue circle", "id": 7}, {"caption": "a red\ncross"}]
    Path("c.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    sample(replace(run, prompts_file=Path("c.jsonl")))
    assert [one["prompt"] for one in records("all")[::2]] == ["a blue circle", "a red cross"]


@pytest.mark.parametrize("kind", ["prompts of a file", "candidates of a prompt"])
def test_two_processes_write_what_one_writes(run, prompt, monkeypatch, kind):
    run = replace(run, sampling=SamplingConfig(batch_size=2))
    if kind == "prompts of a file":
        run = replace(run, best_of=1, num_images=1)
    else:
        run = replace(run, prompts_file=None, prompt=prompt, best_of=7, num_images=3)
    sample(run)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    fork, processes = multiprocessing.get_context("fork"), []
    for name, value in (("WORLD_SIZE", "2"), ("MASTER_ADDR", "127.0.0.1"), ("MASTER_PORT", str(port))):
        monkeypatch.setenv(name, value)
    for rank in ("0", "1"):
        monkeypatch.setenv("RANK", rank)
        monkeypatch.setenv("LOCAL_RANK", rank)
        processes.append(fork.Process(target=sample, args=(replace(run, out=Path("shared")),), daemon=True))
        processes[-1].start()
    for process in processes:
        process.join(120)
        assert process.exitcode == 0
    assert contents("shared") == contents("all")


@pytest.mark.parametrize(
    ("caption", "name"),
    [("A red cross!", "a-red-cross"), ("円", "prompt"), ("../..", "prompt"), ("x" * 300, "x" * 60)],
)
def test_a_name_is_safe_whatever_the_caption(caption, name):
    assert slug(caption) == name
