import pytest
import torch

from hmar_cli.sampling.noise import PhiloxNoise, philox

ANSWERS = [  # Random123's kat_vectors: counter, key, result
    ("00000000 00000000 00000000 00000000", "00000000 00000000", "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
    ("ffffffff ffffffff ffffffff ffffffff", "ffffffff ffffffff", "408f276d 41c83b0e a20bc7c6 6d5451fd"),
    ("243f6a88 85a308d3 13198a2e 03707344", "a4093822 299f31d0", "d16cfe09 94fdcceb 5001e420 24126ea1"),
]


@pytest.mark.parametrize(("counter", "key", "answer"), ANSWERS)
def test_known_answers(counter: str, key: str, answer: str) -> None:
    c0, c1, c2, c3 = (torch.tensor(int(word, 16)) for word in counter.split())
    k0, k1 = (int(word, 16) for word in key.split())
    words = philox((c0, c1, c2, c3), (k0, k1))
    assert " ".join(f"{int(word):08x}" for word in words) == answer


def test_numbers_depend_on_image_step_position_and_seed_alone() -> None:
    many = PhiloxNoise(7, torch.arange(100)).uniform(3, 50)
    assert torch.equal(PhiloxNoise(7, torch.tensor([42, 3])).uniform(3, 20), many[[42, 3], :20])
    assert many.unique().numel() > 4990  # of 5000 draws from 2^23 values
    images = torch.arange(100)
    for noise, step in (
        (PhiloxNoise(8, images), 3),
        (PhiloxNoise(7, images), 4),
        (PhiloxNoise(7, images + 2**32), 3),
    ):
        assert (noise.uniform(step, 50) != many).float().mean() > 0.99


def test_steps_that_are_known_beforehand() -> None:
    """Computed at once or one by one, before or after what was known, the numbers are the same."""
    images, positions = torch.tensor([0, 2**33 + 1]), [1, 4, 4, 9]
    plain, known = PhiloxNoise(2**40 + 7, images), PhiloxNoise(2**40 + 7, images, positions)
    for step, n in enumerate([*positions, 3]):
        assert torch.equal(plain.uniform(step, n), known.uniform(step, n))


def test_uniformity() -> None:
    values = PhiloxNoise(0, torch.arange(1000)).uniform(0, 100)
    assert values.min() > 0 and values.max() < 1
    assert values.mean().item() == pytest.approx(0.5, abs=0.005)
    assert values.var().item() == pytest.approx(1 / 12, abs=0.002)


def test_draws_follow_the_distribution_and_never_take_what_was_filtered() -> None:
    p = torch.tensor([0.0, 0.1, 0.0, 0.6, 0.3, 0.0])
    drawn = PhiloxNoise(1, torch.arange(500)).draw(p.expand(500, 40, 6), 0)
    shares = torch.bincount(drawn.flatten(), minlength=6) / drawn.numel()
    assert shares[[0, 2, 5]].sum() == 0
    assert shares.tolist() == pytest.approx(p.tolist(), abs=0.01)
