import numpy as np
import pytest
import torch
from PIL import Image

from hmar_cli.data.transforms import image_transform, shrink, to_tensor

RNG = np.random.default_rng(0)


def noise(width: int, height: int) -> Image.Image:
    pixels = np.random.default_rng(width * 1000 + height).integers(0, 256, (height, width, 3), np.uint8)
    return Image.fromarray(pixels)


def adm(image: Image.Image, size: int) -> np.ndarray:
    """The centre crop as the paper's appendix words it, for squares."""
    while min(image.size) >= 2 * size:
        image = image.resize(tuple(x // 2 for x in image.size), resample=Image.Resampling.BOX)
    scale = size / min(image.size)
    image = image.resize(tuple(round(x * scale) for x in image.size), resample=Image.Resampling.BICUBIC)
    pixels = np.array(image)
    top, left = (pixels.shape[0] - size) // 2, (pixels.shape[1] - size) // 2
    return pixels[top : top + size, left : left + size]


@pytest.mark.parametrize("shape", [(100, 70), (33, 65), (16, 16), (9, 40), (64, 31), (151, 149)])
def test_adm_square(shape: tuple[int, int]) -> None:
    image = noise(*shape)
    for train in (False, True):
        np.testing.assert_array_equal(image_transform(16, "adm", train=train)(image, RNG), adm(image, 16))


@pytest.mark.parametrize("shape", [(100, 70), (33, 65), (7, 90), (90, 7)])
@pytest.mark.parametrize("crop", ["adm", "var"])
@pytest.mark.parametrize("size", [[16, 24], [24, 16], [15, 15]])
def test_any_size_is_covered(shape: tuple[int, int], crop: str, size: list[int]) -> None:
    for train in (False, True):
        cut = image_transform(size, crop, train=train)(noise(*shape), RNG)  # type: ignore[arg-type]
        assert (cut.shape, cut.dtype) == ((*size, 3), np.uint8)


def test_adm_non_square_keeps_the_middle() -> None:
    image = Image.new("RGB", (40, 40), "black")
    image.paste("white", (0, 15, 40, 25))  # a band in the middle rows
    cut = image_transform([10, 40], "adm", train=False)(image)
    assert cut.min() == 255


@pytest.mark.parametrize("shape", [(100, 70), (33, 65), (20, 20)])
def test_var_is_torchvisions_resize_and_crop(shape: tuple[int, int]) -> None:
    from torchvision import transforms
    from torchvision.transforms import InterpolationMode

    image = noise(*shape)
    resize = transforms.Resize(18, interpolation=InterpolationMode.LANCZOS)  # 1.125 * 16
    resized = resize(image)
    cut = image_transform(16, "var", train=True)
    np.testing.assert_array_equal(cut.resized(image), np.asarray(resized))
    windows = {
        np.asarray(resized)[top : top + 16, left : left + 16].tobytes()
        for top in range(resized.height - 15)
        for left in range(resized.width - 15)
    }
    rng = np.random.default_rng(5)
    drawn = {cut(image, rng).tobytes() for _ in range(400)}
    assert drawn <= windows
    assert len(drawn) > 0.5 * len(windows)
    fixed = image_transform(16, "var", train=False)(image)
    top, left = (resized.height - 16) // 2, (resized.width - 16) // 2
    np.testing.assert_array_equal(fixed, np.asarray(resized)[top : top + 16, left : left + 16])


def test_window_reaches_both_edges() -> None:
    cut = image_transform(4, "var", train=True)
    pixels = np.arange(9 * 9 * 3, dtype=np.uint8).reshape(9, 9, 3)
    almost = np.nextafter(1.0, 0.0)
    np.testing.assert_array_equal(cut.window(pixels, almost, almost), pixels[5:, 5:])
    np.testing.assert_array_equal(cut.window(pixels, 0.0, 0.0), pixels[:4, :4])


def test_to_tensor() -> None:
    pixels = np.zeros((2, 3, 4, 3), np.uint8)
    pixels[1, 2, 3] = (255, 0, 51)
    tensor = to_tensor(pixels)
    assert (tensor.shape, tensor.dtype) == ((2, 3, 3, 4), torch.float32)
    torch.testing.assert_close(tensor[1, :, 2, 3], torch.tensor([1.0, -1.0, -0.6]))
    assert tensor.amin() == -1
    with pytest.raises(ValueError, match="uint8"):
        to_tensor(np.zeros((2, 3, 4, 3), np.float32))  # type: ignore[arg-type]


def test_wrong_arguments() -> None:
    with pytest.raises(ValueError, match="'adm' or 'var'"):
        image_transform(16, "center", train=False)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="positive"):
        image_transform([0, 4], "adm", train=False)
    with pytest.raises(ValueError, match="random window"):
        image_transform(16, "var", train=True)(noise(20, 20))


def test_shrink_means_whole_blocks() -> None:
    pixels = np.random.default_rng(1).integers(0, 256, (3, 12, 8, 3), np.uint8)
    small = shrink(pixels, (4, 4))
    assert (small.shape, small.dtype) == ((3, 4, 4, 3), np.uint8)
    means = pixels.reshape(3, 4, 3, 4, 2, 3).astype(np.float64).mean((2, 4))
    assert np.abs(small - means).max() <= 0.5
    np.testing.assert_array_equal(shrink(pixels, (12, 8)), pixels)


def test_shrink_by_other_factors_is_bicubic_and_antialiased() -> None:
    pixels = np.random.default_rng(2).integers(0, 256, (2, 20, 30, 3), np.uint8)
    wide = torch.nn.functional.interpolate(
        torch.from_numpy(pixels).permute(0, 3, 1, 2).float(), (8, 12), mode="bicubic", antialias=True
    )
    expected = wide.round().clamp(0, 255).permute(0, 2, 3, 1).numpy()
    assert np.abs(shrink(pixels, (8, 12)) - expected).max() <= 1
    with pytest.raises(ValueError, match="within 20 x 30"):
        shrink(pixels, (21, 30))
