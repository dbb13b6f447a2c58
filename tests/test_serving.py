"""The page of `hmar edit --serve`: its edits by themselves, its server, and all of it in a real browser."""

import importlib.util
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from toy_runs import FAMILIES, hmar

from hmar_cli import serving
from hmar_cli.builders import load_model
from hmar_cli.checkpoints.store import open_checkpoint
from hmar_cli.commands.drawing import conditions_for, resolve
from hmar_cli.data.shapes import SHAPES
from hmar_cli.errors import UserError
from hmar_cli.pictures.picture import read_picture
from hmar_cli.recipe import load_recipe
from hmar_cli.serving import Studio, Wish, copy_to_paint_on, in_page_words, is_loopback, region_of
from hmar_cli.settings import Recipe

BROWSER = shutil.which("chromium") or shutil.which("chromium-browser")
MISSING = [name for name in ("gradio", "playwright") if importlib.util.find_spec(name) is None]
MISSING += [] if BROWSER else ["a chromium of the system"]
needs_gradio = pytest.mark.skipif("gradio" in MISSING, reason="Gradio is not installed (the extra `serve`)")
needs_browser = pytest.mark.skipif(bool(MISSING), reason=f"not installed: {', '.join(MISSING)}")


SaveRandom = Callable[[Path, Recipe, tuple[str, ...]], None]


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory, save_random: SaveRandom) -> Path:
    """A folder with two random checkpoints and some pictures."""
    folder = tmp_path_factory.mktemp("serving")
    for name in ("var", "text"):
        (folder / f"{name}.toml").write_text(FAMILIES[name])
        recipe = load_recipe(str(folder / f"{name}.toml"))
        save_random(folder / name, recipe, SHAPES if name == "var" else ())
    pixels = np.random.default_rng(0).integers(0, 256, (30, 40, 3), np.uint8)
    Image.fromarray(pixels).save(folder / "photo.png")
    (folder / "not a picture.png").write_text("hello")
    return folder


def studio(world: Path, name: str = "var") -> Studio:
    source = open_checkpoint(world / name)
    model, codec, _ = load_model(world / name)
    text = source.recipe.text
    return Studio(
        name=name,
        model=model,
        tokenizer=codec,
        settings=resolve(source, {}),
        class_names=source.class_names,
        prompts=conditions_for(text, [], []) if text else None,  # type: ignore[arg-type]
        keep_scales=1 if name == "var" else 0,
        whole_strength=0.6,
    )


def draw(world: Path, folder: Path, name: str = "var", **wish: Any) -> list[Any]:
    files = studio(world, name).draw(Wish(path=world / "photo.png", **wish), folder)
    return [np.asarray(Image.open(path)).astype(int) for path in files]


def middle() -> Any:
    painted = np.zeros((300, 400), bool)
    painted[100:200, 150:250] = True
    return painted


@pytest.mark.parametrize("name", ["var", "text"])
def test_what_is_not_painted_stays_as_it_was(world: Path, tmp_path: Path, name: str) -> None:
    photo = np.asarray(Image.open(world / "photo.png")).astype(int)
    *variations, sheet = draw(world, tmp_path, name, kind="paint", painted=middle(), variations=2, feather=2)
    inside = np.zeros(photo.shape[:2], bool)
    inside[10 - 3 : 20 + 3, 15 - 3 : 25 + 3] = True  # the feather, and a pixel of the mask's own edge
    for each in variations:
        assert (each[~inside] == photo[~inside]).all() and (each[11:19, 16:24] != photo[11:19, 16:24]).any()
    assert (variations[0] != variations[1]).any() and sheet.size > photo.size
    names = ["photo-000.png", "photo-001.png", "photo-sheet.png"]
    assert sorted(path.name for path in tmp_path.iterdir()) == names


def test_a_class_a_text_and_a_strength_count(world: Path, tmp_path: Path) -> None:
    shared: dict[str, Any] = {"kind": "whole", "strength": 0.6}
    circle, square = (draw(world, tmp_path, **shared, target=i)[0] for i in (0, 1))
    assert (circle != square).any()
    red, blue = (draw(world, tmp_path, "text", **shared, target=t)[0] for t in ("red", "blue"))
    assert (red != blue).any()
    weak = draw(world, tmp_path, "text", kind="whole", strength=0.05, target="red")[0]
    assert (weak != red).any()


def test_room_is_where_the_page_says(world: Path, tmp_path: Path) -> None:
    photo = np.asarray(Image.open(world / "photo.png")).astype(int)
    wide = draw(world, tmp_path, kind="room", margins=(9, 2, 5, 1), feather=0)[0]
    assert wide.shape == (30 + 2 + 1, 40 + 9 + 5, 3)
    assert (wide[2:32, 9:49] == photo).all()


@pytest.mark.parametrize(
    ("wish", "message"),
    [
        ({"kind": "paint"}, "Nothing is painted: paint over what is to be drawn anew."),
        ({"kind": "paint", "painted": np.zeros((3, 4), bool)}, "Nothing is painted: paint"),
        ({"kind": "room"}, "There is no room to draw in: give at least one side some pixels."),
        ({"kind": "room", "margins": (8192,) * 4}, "the canvas: 16424 x 16414 pixels are more than"),
        ({"kind": "whole"}, "Say what the whole picture is to become."),
    ],
)
def test_what_cannot_be_drawn(world: Path, tmp_path: Path, wish: Any, message: str) -> None:
    with pytest.raises(UserError, match=message):
        draw(world, tmp_path, **wish)
    assert not list(tmp_path.iterdir())


def test_nothing_is_written_after_the_end(world: Path, tmp_path: Path) -> None:
    ended = studio(world)
    drawn = ended.draw(Wish(path=world / "photo.png", kind="paint", painted=middle(), variations=2), tmp_path)
    assert next(drawn).exists()
    ended.close()
    with pytest.raises(UserError, match="the server has ended"):
        next(drawn)
    assert len(list(tmp_path.iterdir())) == 1


@pytest.mark.parametrize("size", [(30, 40), (1, 3), (641, 200), (2000, 1500)])
def test_what_is_painted_on_has_the_shape_of_the_picture(size: tuple[int, int], tmp_path: Path) -> None:
    Image.new("L", (size[1], size[0])).save(tmp_path / "x.png")
    shown = copy_to_paint_on(read_picture(tmp_path / "x.png"))
    assert shown.shape[2] == 3 and 320 < max(shown.shape) <= serving.SHOWN
    assert shown.shape[0] / shown.shape[1] == pytest.approx(size[0] / size[1], rel=0.01)
    full = region_of(np.ones(shown.shape[:2], bool), size)
    assert full.shape == size and (full == 255).all()


def test_errors_do_not_show_folders() -> None:
    path = Path("/tmp/secret/photo.png")
    assert (
        in_page_words(UserError(f"{path}: not a\npicture", "use --mask"), path) == "photo.png: not a picture"
    )
    assert "<" not in serving.note("<b>.png").split(">", 1)[1].removesuffix("</p>")


def test_loopback() -> None:
    hosts = [
        "127.0.0.1",
        "127.1.2.3",
        "localhost",
        "::1",
        "[::1]",
        "0.0.0.0",
        "192.168.0.1",
        "::",
        "me.example",
    ]
    assert [is_loopback(host) for host in hosts] == [True] * 5 + [False] * 4


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (["--serve", "photo.png"], "error: --serve takes no picture"),
        (["--serve", "--box", "0,0,4,4"], "error: --serve takes no --box"),
        (["--serve", "--left", "4", "--json"], "error: --serve takes no --left, --json"),
        ([], "error: no picture to edit"),
    ],
)
def test_flags_that_do_not_go_together(arguments: list[str], line: str) -> None:
    result = hmar("edit", "--checkpoint", "nowhere", *arguments)
    assert result.exit_code == 2 and result.stderr.splitlines()[0] == line


def test_without_gradio_there_is_a_hint(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "gradio", None)
    result = hmar("edit", "--serve", "--checkpoint", "nowhere")
    assert result.exit_code == 2
    assert result.stderr.splitlines() == [
        "error: --serve needs Gradio, which is not installed",
        "hint: pip install 'hmar-cli[serve]'",
    ]


@needs_gradio
def test_the_page_shows_mistakes_in_one_line(world: Path, tmp_path: Path) -> None:
    page = serving.Page(studio(world), tmp_path, serving.Start())
    update, line = page.look(str(world / "not a picture.png"), "paint")
    assert 'class="wrong">not a picture.png: not a readable picture' in line and not update["visible"]
    update, line = page.look(str(world / "photo.png"), "paint")
    assert "40 × 30 pixels" in line and update["value"]["background"].shape == (480, 640, 3)

    values = {each: each.value for each in page.blocks.blocks.values() if hasattr(each, "value")}
    told = [line for line, *_ in page.draw(values, lambda done, all: None)]
    assert told == [serving.note("Choose a picture first.", wrong=True)]
    values[page.file] = str(world / "photo.png")
    told = [line for line, *_ in page.draw(values | {page.target: 0}, lambda done, all: None)]
    assert "Drawing" in told[0] and 'class="wrong">Nothing is painted' in told[1]


@needs_gradio
def test_the_page_follows_its_controls(world: Path, tmp_path: Path) -> None:
    page = serving.Page(studio(world), tmp_path, serving.Start(variations=2))
    sides = ["Left, px", "Top, px", "Right, px", "Bottom, px"]
    assert [each.label for each in page.margins] == sides
    values = {each: each.value for each in page.blocks.blocks.values() if hasattr(each, "value")}
    values |= {page.file: str(world / "photo.png"), page.kind: "room", page.target: 2}
    values |= dict(zip(page.margins, (9, 2, 5, None), strict=True))
    steps: list[tuple[int, int]] = []
    *_, last = page.draw(values, lambda done, all: steps.append((done, all)))
    assert "Done in" in last[0] and steps[-1][0] == steps[-1][1] == 2 * (len(steps) // 2)
    made = Path(last[3]).parent
    assert tmp_path in made.parents
    wish = Wish(path=world / "photo.png", kind="room", margins=(9, 2, 5, 0), target=1, variations=2)
    (tmp_path / "again").mkdir()
    for path in studio(world).draw(wish, tmp_path / "again"):
        assert path.read_bytes() == (made / path.name).read_bytes()


@pytest.fixture
def server(world: Path, tmp_path: Path) -> Iterator[tuple[subprocess.Popen[str], int]]:
    """The real command, with nothing but empty folders for its files."""
    for name in ("tmp", "home", "cwd"):
        (tmp_path / name).mkdir()
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    root = str(Path(serving.__file__).parents[1])
    paths = os.pathsep.join([root, *os.environ.get("PYTHONPATH", "").split(os.pathsep)])
    folders = {"TMPDIR": str(tmp_path / "tmp"), "HOME": str(tmp_path / "home"), "PYTHONPATH": paths}
    traps = {"GRADIO_SHARE": "True", "GRADIO_ALLOWED_PATHS": "/", "GRADIO_SERVER_NAME": "0.0.0.0"}
    flags = ["--checkpoint", str(world / "var"), "--port", str(port), "--device", "cpu"]
    process = subprocess.Popen(
        [sys.executable, "-m", "hmar_cli", "edit", "--serve", *flags],
        stderr=subprocess.PIPE,
        text=True,
        cwd=tmp_path / "cwd",
        env={**os.environ, **folders, **traps},
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler) and None,
    )
    assert process.stderr is not None
    try:
        assert f"http://127.0.0.1:{port}" in process.stderr.readline()
        yield process, port
    finally:
        process.kill()
        process.wait()


def end(process: subprocess.Popen[str], tmp_path: Path, how: signal.Signals = signal.SIGINT) -> str:
    """End the server as Ctrl-C does; nothing may be left. What it said."""
    assert [path.name[:10] for path in (tmp_path / "tmp").iterdir()] == ["hmar-edit-"]
    process.send_signal(how)
    _, said = process.communicate(timeout=20)
    assert process.returncode == 0 and said.endswith("closed; all uploaded and drawn files are deleted\n")
    assert not [
        *(tmp_path / "tmp").iterdir(),
        *(tmp_path / "cwd").iterdir(),
        *(tmp_path / "home").rglob("*.png"),
    ]
    return said


def answer(port: int, path: str, data: bytes | None = None, **headers: str) -> tuple[int, bytes]:
    request = urllib.request.Request(f"http://127.0.0.1:{port}{path}", data, headers)
    try:
        with urllib.request.urlopen(request, timeout=20) as found:
            return found.status, found.read()
    except urllib.error.HTTPError as error:
        return error.code, error.read()


def upload(port: int, name: str, data: bytes) -> tuple[int, bytes]:
    start = f'--x\r\nContent-Disposition: form-data; name="files"; filename="{name}"\r\n\r\n'.encode()
    kind = {"Content-Type": "multipart/form-data; boundary=x"}
    return answer(port, "/gradio_api/upload", start + data + b"\r\n--x--\r\n", **kind)


def listening(port: int) -> set[str]:
    """Addresses in hexadecimal that something listens at on a port."""
    lines = [
        *Path("/proc/net/tcp").read_text().splitlines(),
        *Path("/proc/net/tcp6").read_text().splitlines(),
    ]
    fields = [line.split() for line in lines]
    return {f[1].split(":")[0] for f in fields if f[1].endswith(f":{port:04X}") and f[3] == "0A"}


@needs_gradio
@pytest.mark.skipif(
    not Path("/proc/net/tcp").exists(), reason="the system does not list its sockets in /proc"
)
def test_the_server_keeps_to_itself(server: Any, tmp_path: Path, world: Path) -> None:
    process, port = server
    assert listening(port) == {"0100007F"}
    assert answer(port, "/")[0] == 200
    assert answer(port, "/", Host="elsewhere.example")[0] == 400
    for path in ("/etc/passwd", str(world / "photo.png"), str(world / "var" / "recipe.toml")):
        assert answer(port, f"/gradio_api/file={path}")[0] in (403, 404)
    assert upload(port, "big.png", bytes(serving.UPLOAD + 1))[0] == 413
    code, body = upload(port, "photo.png", (world / "photo.png").read_bytes())
    assert code == 200 and str(tmp_path / "tmp" / "hmar-edit-") in body.decode()
    again = hmar("edit", "--serve", "--checkpoint", world / "var", "--port", port)
    assert again.exit_code == 2 and "hint: give another --port" in again.stderr
    end(process, tmp_path, signal.SIGTERM)


@needs_browser
def test_an_edit_in_a_browser(server: Any, tmp_path: Path, world: Path) -> None:
    from playwright.sync_api import expect, sync_playwright

    process, port = server
    (tmp_path / "big.png").write_bytes(bytes(serving.UPLOAD + 1))
    (tmp_path / "text.txt").write_text("hello")
    elsewhere = []
    with sync_playwright() as driver:
        flags = ["--no-sandbox"] if os.getuid() == 0 else []
        browser = driver.chromium.launch(executable_path=BROWSER, args=flags)
        page = browser.new_page(viewport={"width": 1280, "height": 900})
        page.set_default_timeout(30_000)
        page.on("request", lambda r: elsewhere.append(r.url) if f"127.0.0.1:{port}" not in r.url else None)
        page.goto(f"http://127.0.0.1:{port}/")
        message = page.locator("#message")
        choose = page.locator("#file input[type=file]")
        for name, complaint in (("big.png", "maximum allowed size"), ("text.txt", "Invalid file type")):
            choose.set_input_files(tmp_path / name)
            expect(page.get_by_text(complaint)).to_be_visible()
            page.reload()
        choose.set_input_files(world / "not a picture.png")
        expect(message).to_contain_text("not a picture.png: not a readable picture")
        page.reload()

        choose.set_input_files(world / "photo.png")
        expect(message).to_contain_text("40 × 30 pixels")
        page.get_by_label("number input for Variations").fill("2")
        page.click("#draw")
        expect(message).to_contain_text("Nothing is painted")
        paint(page)
        page.click("#draw")
        expect(message).to_contain_text("Done in")
        expect(page.locator("#variations .grid-container img")).to_have_count(2)
        expect(page.locator("#sheet img")).to_be_visible()
        with page.expect_download() as download:
            page.click("#download")
        drawn = np.asarray(Image.open(download.value.path())).astype(int)
        page.get_by_label("Add room around it").check()
        page.get_by_label("Right, px").fill("2000")
        page.get_by_label("Right, px").press("Tab")
        page.click("#draw")
        expect(message).to_contain_text("Drawing")
        time.sleep(1)
        end(process, tmp_path)  # in the middle of it
        browser.close()
    photo = np.asarray(Image.open(world / "photo.png")).astype(int)
    assert drawn.shape == photo.shape and (drawn[12:18, 17:23] != photo[12:18, 17:23]).any()
    assert (drawn[:4] == photo[:4]).all() and (drawn[:, :8] == photo[:, :8]).all()
    assert not [url for url in elsewhere if not url.startswith(("data:", "blob:"))]


def paint(page: Any) -> None:
    """Draw a stroke over the middle of the picture, which fills the width or the height of its frame."""
    page.locator("#canvas canvas").first.scroll_into_view_if_needed()
    box = page.locator("#canvas canvas").first.bounding_box()
    x, y = box["x"] + box["width"] / 2, box["y"] + box["height"] / 2
    page.mouse.move(x - 20, y)
    page.mouse.down()
    page.mouse.move(x + 20, y, steps=10)
    page.mouse.up()
    page.wait_for_timeout(500)
