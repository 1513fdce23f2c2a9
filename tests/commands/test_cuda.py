"""Commands on CUDA: stages are trained, encoded, sampled and measured; parts of the GPU benchmark."""

from dataclasses import replace

import pytest

from dalle.benchmarks.gpu import COMMANDS
from dalle.commands.encode_images import encode_images
from dalle.commands.evaluate import EvaluateArgs, evaluate
from dalle.commands.sample import SampleArgs, sample
from dalle.commands.train_clip import train_clip
from dalle.commands.train_dvae import train_dvae
from dalle.commands.train_transformer import train_transformer
from dalle.hub.registry import load_model
from dalle.io.files import read_json
from dalle.pipelines.dalle import DALLE
from tests.helpers.pretended_cuda import only_real, pretended_slowly


@pretended_slowly
@pytest.mark.parametrize("precision", ["fp32", "auto"])
def test_every_stage(precision, cuda, chain, tiny_runs, with_inputs, prompt, tmp_path):
    trainings = {"dvae": train_dvae, "transformer": train_transformer, "clip": train_clip}
    (tmp_path / "text").symlink_to(chain / "text")
    for kind, start in trainings.items():
        run = getattr(tiny_runs, kind)
        run = replace(run, device="cuda", train=replace(run.train, precision=precision))
        start(with_inputs(run, tmp_path, out=tmp_path / kind))
        if kind == "dvae":
            encode = replace(tiny_runs.encode, device="cuda", dvae=tmp_path / "dvae")
            encode_images(replace(encode, out=tmp_path / "tokens"))
    model = tmp_path / "model"
    DALLE.from_parts(*(load_model(tmp_path / kind, kind) for kind in trainings)).save_pretrained(model)
    options = {"model": model, "device": "cuda"}
    sample(SampleArgs(prompt=prompt, num_images=2, best_of=4, out=tmp_path / "out", **options))
    assert len(list((tmp_path / "out").glob("0*.png"))) == 2
    metrics = ("shapes", "dvae", "transformer", "clip", "images", "rerank")
    small = {"num_samples": 6, "num_prompts": 2, "best_of": 2, "blur_radii": (0.0, 1.0)}
    asked = EvaluateArgs(
        metrics=metrics, feature_extractor="clip", stats_dir=tmp_path / "stats", **small, **options
    )
    assert set(metrics) <= set(evaluate(asked))


PARTS = {name: words[1] for name, words in COMMANDS.items() if name != "tests"}
PARTS |= {"compiled": f"{PARTS['train-1.3b']} --compile --precision bf16"}
PARTS |= {"graph": f"{PARTS['sample-1.3b']} --graph True", "int8": f"{PARTS['sample-1.3b']} --int8"}


@only_real
@pytest.mark.parametrize("name", PARTS)
def test_a_part_of_the_gpu_benchmark(name, cuda, script, tmp_path):
    words = PARTS[name].replace("head-dim 8", "head-dim 16").split()
    done = script("benchmark", *words, "--device", "cuda", "--json", tmp_path / "report.json")
    assert done.code == 0, done.err
    assert read_json(tmp_path / "report.json")["results"]
