"""Configuration of the text tokenizer (Section 2.2)."""

from dataclasses import dataclass

FIRST_BYTE_ID = 1


@dataclass(frozen=True)
class TextTokenizerConfig:
    """Vocabulary of the text tokenizer; where the paper is silent the defaults are ours."""

    vocab_size: int = 16384
    """Maximum number of ids: unknown, bytes, characters and merges together (2.2)."""
    byte_fallback: bool = True
    """Encode a character outside the alphabet as its UTF-8 bytes instead of unknown."""
    character_coverage: float = 0.9999
    """Share of the training text that the alphabet covers; rarer characters leave their ids to merges."""

    def __post_init__(self):
        if type(self.vocab_size) is not int or self.vocab_size < 1:
            raise ValueError(f"vocab_size must be a positive integer, got {self.vocab_size!r}")
        if type(self.byte_fallback) is not bool:
            raise ValueError(f"byte_fallback must be true or false, got {self.byte_fallback!r}")
        if not 0 < self.character_coverage <= 1:
            raise ValueError(f"character_coverage must be in (0, 1], got {self.character_coverage!r}")

    @property
    def first_character_id(self) -> int:
        """The id after unknown and the bytes."""
        return FIRST_BYTE_ID + (256 if self.byte_fallback else 0)
