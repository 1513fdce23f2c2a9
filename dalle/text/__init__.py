"""Captions to token ids and back: the byte-pair encoding of the paper's section 2.2."""

from dalle.lazy import lazy_exports

__getattr__, __dir__, __all__ = lazy_exports(
    __name__,
    {
        "BPETokenizer": "bpe",
        "TextTokenizer": "tokenizer",
        "TextTokenizerConfig": "tokenizer",
        "load_text_tokenizer": "tokenizer",
        "text_tokenizer_from_dict": "tokenizer",
        "train_text_tokenizer": "train_bpe",
    },
)
