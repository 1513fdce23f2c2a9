"""The train-clip command: what a run holds, and a text tokenizer that cannot be read."""

from dalle.config import CONFIGS
from dalle.hub.registry import load_model
from dalle.text import load_text_tokenizer
from dalle.train.loggers import read_log
from tests.helpers.refusals import assert_refused


def test_a_run_names_its_text_tokenizer_and_logs_its_accuracy(chain):
    text = load_text_tokenizer(chain / "text" / "text_tokenizer.json")
    assert load_model(chain / "clip", "clip").inputs["text_hash"] == text.hash
    assert any("image_to_text_acc" in line for line in read_log(chain / "clip" / "log.jsonl"))


def test_a_text_tokenizer_that_cannot_be_read_is_refused(script):
    words = ("--config", CONFIGS / "clip" / "shapes.yaml", "--text-tokenizer", ".")
    assert_refused(script("train_clip", *words), r"cannot read .*text_tokenizer\.json")
