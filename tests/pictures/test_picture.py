"""Pictures of every kind are read without loss and written as PNG."""

import struct
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from hmar_cli.errors import UserError
from hmar_cli.pictures import picture as module
from hmar_cli.pictures.picture import Picture, read_picture
from hmar_cli.report import save_png


def noise(*shape: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, shape, np.uint8)


def again(image: Image.Image, folder: Path) -> Image.Image:
    """What comes out of a picture that is read and written."""
    image.save(folder / "in.png")
    save_png(read_picture(folder / "in.png").image(), folder / "out.png")
    return Image.open(folder / "out.png")


@pytest.mark.parametrize("channels", [1, 2, 3, 4])
def test_eight_bits_come_back(tmp_path: Path, channels: int) -> None:
    pixels = noise(5, 7, channels)
    image = Image.fromarray(pixels[..., 0] if channels == 1 else pixels)
    result = again(image, tmp_path)
    assert result.mode == image.mode and (np.asarray(result) == np.asarray(image)).all()


def test_sixteen_bits_come_back(tmp_path: Path) -> None:
    pixels = np.random.default_rng(0).integers(0, 1 << 16, (5, 7)).astype(np.uint16)
    result = again(Image.fromarray(pixels), tmp_path)
    assert (np.asarray(result) == pixels).all()
    assert (read_picture(tmp_path / "out.png").seen(slice(None), slice(None))[..., 1] == pixels >> 8).all()


def test_colours_of_sixteen_bits_are_read_with_a_warning(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = b"".join(b"\0" + bytes(range(24)) for _ in range(4))  # 4 pixels of 3 colours of 2 bytes, no filter
    parts = [(b"IHDR", struct.pack(">IIBBBBB", 4, 4, 16, 2, 0, 0, 0)), (b"IDAT", zlib.compress(rows))]
    png = b"\x89PNG\r\n\x1a\n"
    for name, data in [*parts, (b"IEND", b"")]:
        png += struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))
    (tmp_path / "deep.png").write_bytes(png)
    picture = read_picture(tmp_path / "deep.png")
    assert picture.colour.dtype == np.uint8 and picture.colour[0, 0].tolist() == [0, 2, 4]
    assert "of its 16 bits a colour 8 are read" in " ".join(capsys.readouterr().err.split())
    Image.fromarray(noise(4, 4, 3)).save(tmp_path / "plain.png")
    Image.fromarray(np.ones((4, 4), np.uint16)).save(tmp_path / "grey.png")
    read_picture(tmp_path / "plain.png")
    read_picture(tmp_path / "grey.png")
    assert not capsys.readouterr().err


def test_palettes_and_bits_show_their_colours(tmp_path: Path) -> None:
    image = Image.fromarray(noise(5, 7, 3)).quantize(9)
    result = again(image, tmp_path)
    assert result.mode == "RGB" and (np.asarray(result) == np.asarray(image.convert("RGB"))).all()
    image.save(tmp_path / "clear.png", transparency=3)
    clear = read_picture(tmp_path / "clear.png")
    assert clear.alpha is not None and ((clear.alpha == 0) == (np.asarray(image) == 3)).all()
    bits = Image.fromarray(noise(5, 7) > 99)
    assert (np.asarray(again(bits, tmp_path)) == np.asarray(bits) * 255).all()


def test_a_transparent_colour_becomes_transparency(tmp_path: Path) -> None:
    pixels = noise(5, 7)
    Image.fromarray(pixels).save(tmp_path / "a.png", transparency=int(pixels[2, 3]))
    found = read_picture(tmp_path / "a.png")
    assert found.alpha is not None and ((found.alpha == 0) == (pixels == pixels[2, 3])).all()
    assert (found.colour[..., 0] == pixels).all()


@pytest.mark.parametrize("orientation", range(1, 9))
def test_pictures_are_read_upright(tmp_path: Path, orientation: int) -> None:
    image, exif = Image.fromarray(noise(5, 7, 3)), Image.Exif()
    exif[0x0112] = orientation
    image.save(tmp_path / "in.png", exif=exif)
    found = read_picture(tmp_path / "in.png")
    assert found.size == ((5, 7) if orientation < 5 else (7, 5))
    save_png(found.image(), tmp_path / "out.png")
    assert 0x0112 not in Image.open(tmp_path / "out.png").getexif()  # nobody turns it a second time
    if orientation == 3:
        assert (found.colour == np.asarray(image)[::-1, ::-1]).all()


def test_other_colours_become_rgb_without_their_profile(tmp_path: Path) -> None:
    image = Image.new("CMYK", (8, 8), (10, 200, 30, 40))
    image.save(tmp_path / "a.jpg", icc_profile=b"cmyk")
    found = read_picture(tmp_path / "a.jpg")
    assert found.colour.shape == (8, 8, 3) and found.profile is None
    assert (found.colour == np.asarray(Image.open(tmp_path / "a.jpg").convert("RGB"))).all()
    Image.new("RGB", (8, 8)).save(tmp_path / "b.png", icc_profile=b"ours")
    assert read_picture(tmp_path / "b.png").profile == b"ours"
    save_png(read_picture(tmp_path / "b.png").image(), tmp_path / "c.png")
    assert Image.open(tmp_path / "c.png").info["icc_profile"] == b"ours"


def test_transparent_pixels_are_seen_on_white() -> None:
    colour, alpha = noise(3, 4, 3), np.zeros((3, 4), np.uint8)
    alpha[0], alpha[1] = 255, 128
    seen = Picture(colour, alpha).seen(slice(None), slice(None))
    assert (seen[0] == colour[0]).all() and (seen[2] == 255).all()
    assert np.abs(seen[1] - (colour[1] * (128 / 255) + 255 * (127 / 255))).max() <= 0.51


def test_a_canvas_is_opaque_around_the_picture() -> None:
    picture = Picture(noise(3, 4, 1), noise(3, 4))
    canvas = picture.on_canvas((6, 8), 2, 1)
    assert (canvas.colour[2:5, 1:5] == picture.colour).all() and canvas.colour.sum() == picture.colour.sum()
    assert canvas.alpha is not None and picture.alpha is not None
    assert (canvas.alpha[2:5, 1:5] == picture.alpha).all() and (canvas.alpha[:2] == 255).all()
    with pytest.raises(ValueError, match="within"):
        picture.on_canvas((6, 8), 4, 1)


def test_files_that_are_no_pictures(tmp_path: Path, monkeypatch: Any) -> None:
    with pytest.raises(UserError, match="no such picture"):
        read_picture(tmp_path / "none.png")
    (tmp_path / "text.png").write_text("no picture")
    with pytest.raises(UserError, match="not a readable picture"):
        read_picture(tmp_path / "text.png")
    Image.fromarray(noise(64, 64, 3)).save(tmp_path / "whole.png")
    (tmp_path / "half.png").write_bytes((tmp_path / "whole.png").read_bytes()[:6000])
    with pytest.raises(UserError, match="not a readable picture"):
        read_picture(tmp_path / "half.png")
    Image.fromarray(noise(8, 8, 3)).save(tmp_path / "script.eps")
    (tmp_path / "script.eps").rename(tmp_path / "script.png")
    with pytest.raises(UserError, match="not a readable picture"):
        read_picture(tmp_path / "script.png")  # PostScript is a program
    Image.fromarray(np.full((4, 4), 0.5, np.float32)).save(tmp_path / "float.tiff")
    with pytest.raises(UserError, match="no colours of 8 or 16 bits"):
        read_picture(tmp_path / "float.tiff")
    monkeypatch.setattr(module, "LIMIT", 64 * 64 - 1)
    with pytest.raises(UserError, match="64 x 64 pixels are more than the 4095"):
        read_picture(tmp_path / "whole.png")


def test_a_decompression_bomb_is_not_opened(tmp_path: Path) -> None:
    Image.new("1", (20000, 20000)).save(tmp_path / "bomb.png")  # 50 kB that would fill 400 MB
    with pytest.raises(UserError, match=r"bomb.png: "):
        read_picture(tmp_path / "bomb.png")
    Image.new("1", (9000, 11000)).save(tmp_path / "large.png")  # PIL itself would only warn
    with pytest.raises(UserError, match="more than the 67108864"):
        read_picture(tmp_path / "large.png")
