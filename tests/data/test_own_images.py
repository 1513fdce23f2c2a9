"""A folder of images and a CSV become a small trained model by four commands, as a newcomer gives them."""

import csv

import pytest
from PIL import Image

from dalle.io.files import read_json

COLORS = {"red": (200, 30, 30), "grün": (30, 160, 60), "синий": (40, 60, 200), "黄色": (240, 220, 60)}


@pytest.fixture
def images(tmp_path):
    """Forty images in two folders and pairs.csv, as Excel writes it; in some captions a comma and a line
    break."""
    rows = [("file name", "image", "caption")]
    for i in range(40):
        name = f"photos/{'ab'[i % 2]}/Größe {i:02}.v2.JPG"
        path = tmp_path / "mine" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        word, color = list(COLORS.items())[i % 4]
        Image.new("RGB", (44 + i // 2, 40), color).save(path)
        rows.append((str(i), name, f'a "{word}" square, number {i}' + "\nseen twice" * (i % 9 == 0)))
    with (tmp_path / "mine" / "pairs.csv").open("w", encoding="utf-8-sig", newline="") as file:
        csv.writer(file).writerows(rows)
    return tmp_path / "mine"


@pytest.mark.filterwarnings("ignore:the vocabulary lacks letters")
def test_four_commands_from_a_folder_and_a_csv_to_a_model_and_its_images(
    images, tiny_configs, tmp_path, script
):
    def run(name, *words):
        done = script(name, *words)
        assert done.code == 0, done.err
        return done.out

    dvae, transformer = (tiny_configs / family / "shapes.yaml" for family in ("dvae", "transformer"))
    data = ("--data.path", "mine")
    run("train_tokenizer", "--config", transformer, *data)
    run("train_dvae", "--config", dvae, *data)
    run("encode_images", "--config", dvae, *data)
    run("train_transformer", "--config", transformer, "--eval-samples", "2")
    prompt = ("--prompt", "eine größe 黄色 square", "--best-of", "1", "--num-images", "1")
    assert "no CLIP, so the images are unranked" in run(
        "sample", *prompt, "--device", "cpu", "--out", "sampled"
    )
    said = read_json(tmp_path / "sampled" / "sample.json")
    assert Image.open(tmp_path / "sampled" / said["images"][0]["file"]).size == (32, 32)
    assert read_json(tmp_path / "runs" / "tokens" / "meta.json")["left_out"] == 0
    assert not list((tmp_path / "runs").rglob("bad_samples*.jsonl"))
