"""Captions to token ids and back: the byte-pair encoding of the paper's section 2.2."""

from dalle.text.bpe import TextTokenizer, TextTokenizerConfig
from dalle.text.train import train_text_tokenizer

__all__ = ["TextTokenizer", "TextTokenizerConfig", "train_text_tokenizer"]
