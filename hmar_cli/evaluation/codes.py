"""How often the codes of a multi-scale tokenizer occur.

Letters: B images, K scales, L tokens of all scales, V codes.
"""

import torch
from torch import Tensor

from hmar_cli.models.scales import Scales


def count_codes(tokens: Tensor, scales: Scales, vocab_size: int) -> Tensor:
    """How often each code occurs in each scale of tokens [B, L]: [K, V] int64, on the CPU."""
    parts = [tokens[:, scales.slice(k)].flatten() for k in range(len(scales))]
    return torch.stack([part.bincount(minlength=vocab_size) for part in parts]).cpu()


def usage(counts: Tensor) -> Tensor:
    """Share of the codes that occur at all: counts [..., V] to [...] float64."""
    return (counts > 0).double().mean(dim=-1)


def perplexity(counts: Tensor) -> Tensor:
    """Exponential of the entropy of codes in nats, from 1 to V: counts [..., V] to [...] float64."""
    shares = counts.double() / counts.sum(dim=-1, keepdim=True)
    entropy: Tensor = torch.special.entr(shares).sum(dim=-1)
    return entropy.exp()
