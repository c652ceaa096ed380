"""How an encoder-decoder model is given a sequence: the encoder what comes before the answer, the
decoder the answer.

Knows no model: token sequences in, tensors to call a model with out.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from evomerge.merging.fitted.calibration import Batch


@dataclass(frozen=True)
class Sides:
    """A batch [b, t] as the two sides of a model see it.

    `encoder` [b, e] and `decoder` [b, d] are padded tokens, the masks 1 on real ones. `first` [b]
    is the place in the batch whose next token the decoder's first logits predict.
    """

    encoder: Tensor
    encoder_mask: Tensor
    decoder: Tensor
    decoder_mask: Tensor
    first: Tensor

    def spread(self, logits: Tensor, width: int) -> Tensor:
        """The decoder's logits [b, d, v] at the places of the batch [b, width, v]: 0 elsewhere."""
        spread = logits.new_zeros(len(logits), width, logits.shape[2])
        row, place = self.decoder_mask.nonzero(as_tuple=True)
        return spread.index_put((row, self.first[row] + place), logits[row, place])


def sides(batch: Batch, *, start: int, end: int | None) -> Sides:
    """The tokens before the first that counts to the encoder, closed by `end`; `start` and the
    others but the last to the decoder.

    Of text, where all but the first token count, the second half is the decoder's; so it is where a
    prompt is a single token. Places in the first half are then predicted by nobody.

    Source: Raffel et al. 2020, arXiv:1910.10683, sec. 2.4 (text to text) and 3.3.1 (prefix language
    modelling, there split at a random place).
    """
    lengths = batch.attention.sum(1).tolist()
    counted = batch.counted.int().argmax(1).tolist()
    firsts = [at or (length - 1) // 2 for at, length in zip(counted, lengths, strict=True)]
    tail = [] if end is None else [end]
    encoder, decoder = [], []
    for tokens, length, first in zip(batch.tokens.tolist(), lengths, firsts, strict=True):
        encoder.append([*tokens[: first + 1], *tail])
        decoder.append([start, *tokens[first + 1 : length - 1]])
    device = batch.tokens.device
    return Sides(
        *_padded(encoder, device), *_padded(decoder, device), torch.tensor(firsts, device=device)
    )


def _padded(rows: list[list[int]], device: torch.device) -> tuple[Tensor, Tensor]:
    tokens, mask = (
        torch.zeros(len(rows), max(map(len, rows)), dtype=torch.int64, device=device)
        for _ in range(2)
    )
    for number, row in enumerate(rows):
        tokens[number, : len(row)] = torch.tensor(row, device=device)
        mask[number, : len(row)] = 1
    return tokens, mask
