"""Text in, text out, in one process: the reference that every executor of the pipeline is compared with."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from corun.ectrans.decode import DEFAULT_MAX_NEW, StaticDecoder
from corun.ectrans.encode import Encoder
from corun.ectrans.parts import load_decoder, load_encoder
from corun.ectrans.tokens import Tokenizer


@dataclass(frozen=True)
class Translator:
    """Tokenizer, encoder and static decoder."""

    tokenizer: Tokenizer
    encoder: Encoder
    decoder: StaticDecoder

    def translate(self, sentences: Sequence[str]) -> list[str]:
        """Translations of one batch, in its order."""
        if not sentences:
            return []
        hidden, mask = self.encoder.encode([self.tokenizer.encode(sentence) for sentence in sentences])
        return [self.tokenizer.decode(ids) for ids in self.decoder.decode(hidden, mask)]


def load(
    parts: Path,
    device: str = "cpu",
    dtype: str = "fp32",
    max_new: int = DEFAULT_MAX_NEW,
    beam: int = 1,
    cache: bool = True,
) -> Translator:
    """A translator over a parts directory; raises InputError as `load_encoder` and `StaticDecoder` do."""
    decoder = StaticDecoder(load_decoder(parts, device, dtype), max_new, beam, cache)
    return Translator(Tokenizer.load(parts), load_encoder(parts, device, dtype), decoder)
