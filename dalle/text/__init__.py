"""Captions to token ids and back: the byte-pair encoding of the paper's section 2.2."""

from dalle.text.bpe import BPETokenizer
from dalle.text.load import load_text_tokenizer, text_tokenizer_from_dict
from dalle.text.tokenizer import TextTokenizer, TextTokenizerConfig
from dalle.text.train_bpe import train_text_tokenizer

__all__ = [
    "BPETokenizer",
    "TextTokenizer",
    "TextTokenizerConfig",
    "load_text_tokenizer",
    "text_tokenizer_from_dict",
    "train_text_tokenizer",
]
