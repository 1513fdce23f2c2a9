"""Captions to token ids and back: the byte-pair encoding of the paper's section 2.2."""

from dalle.text.bpe import TextTokenizer, TextTokenizerConfig
from dalle.text.merges import MergeTokenizer
from dalle.text.readers import load_text, text_from_dict
from dalle.text.train import train_text_tokenizer

__all__ = [
    "MergeTokenizer",
    "TextTokenizer",
    "TextTokenizerConfig",
    "load_text",
    "text_from_dict",
    "train_text_tokenizer",
]
