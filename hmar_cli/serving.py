"""A page in the browser for edits of one picture: upload it, paint on it, see variations, download them as PNG.

The picture is read from the uploaded file itself, without loss; what is painted on is a copy of the screen's size, of
which only the painted mask comes back. All files lie in one temporary folder that goes with the server.

Letters: H W the picture's rows and columns.
"""

import html
import importlib.util
import ipaddress
import logging
import os
import signal
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from hmar_cli.console import console
from hmar_cli.errors import UserError
from hmar_cli.models.masked import MaskedTransformer
from hmar_cli.models.next_scale import NextScaleTransformer
from hmar_cli.pictures.editing import Plan, edit_picture, plan_region, plan_room, reconstruction, sheet
from hmar_cli.pictures.painter import ModelPainter
from hmar_cli.pictures.picture import Picture, Pixels, read_picture
from hmar_cli.pictures.regions import Length, room_around
from hmar_cli.report import save_png
from hmar_cli.sampling.editing import EditSettings, model_size
from hmar_cli.sampling.images import Conditions, Labels, Prompts
from hmar_cli.settings import MaskedArSample, NextScaleSample
from hmar_cli.tokenizers.kl import KlAutoencoder
from hmar_cli.tokenizers.msvq import MultiScaleVQ

UPLOAD = 20 << 20
"""Most bytes of an uploaded file."""

TYPES = [".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff"]
"""Files that are taken for pictures."""

SHOWN = 640
"""Longest side of the copy that is painted on; smaller pictures are enlarged by a whole factor."""

MOST = 8
"""Most variations at once."""

DAY = 24 * 60 * 60

FIT = "whatever fits"
KINDS = [("Redraw what I paint over", "paint"), ("Add room around it", "room"), ("Change all of it", "whole")]

CSS = """
.gradio-container {width: 100%; max-width: 1240px !important; margin: auto}
#message p {margin: 0; padding: 2px 4px; min-height: 1.5em}
#message .wrong {color: #b91c1c; font-weight: 600}
.dark #message .wrong {color: #fca5a5}
#variations .grid-wrap {max-height: none}
"""


@dataclass(frozen=True, kw_only=True)
class Wish:
    """One edit as it is asked for on the page.

    Attributes:
        path: the uploaded picture.
        kind: "paint" (what is painted over), "room" (around the picture) or "whole".
        painted: [h, w] bool of any size, laid over the picture; None where nothing is.
        margins: left, top, right, bottom in pixels, of "room".
        target: index of a class, a text, or None for whatever fits.
        strength: in (0, 1].
        variations: at least 1.
        seed: of all random numbers.
        feather: pixels, or None for what suits the region.
        match: remove shifts of colour.
    """

    path: Path
    kind: str
    painted: Any = None
    margins: Sequence[int] = (0, 0, 0, 0)
    target: int | str | None = None
    strength: float = 1.0
    variations: int = 1
    seed: int = 0
    feather: int | None = None
    match: bool = True


@dataclass(frozen=True)
class Start:
    """Where the controls of the page stand at first, as in `Wish`."""

    strength: float = 1.0
    variations: int = 4
    seed: int = 0
    feather: int | None = None
    match: bool = True


@dataclass(kw_only=True)
class Studio:
    """A model with all that its edits need.

    Attributes:
        name: shown on the page.
        model: in evaluation mode, on its device.
        tokenizer: its tokenizer, there too.
        settings: as for sampling.
        class_names: none for a text model.
        prompts: of a text model, its reader of texts.
        keep_scales: of edits that are not of the whole picture.
        whole_strength: suggested for edits of the whole picture.
        together: variations that are drawn at once.
        precision: as for sampling.
    """

    name: str
    model: NextScaleTransformer | MaskedTransformer
    tokenizer: MultiScaleVQ | KlAutoencoder
    settings: NextScaleSample | MaskedArSample
    class_names: tuple[str, ...]
    prompts: Prompts | None
    keep_scales: int
    whole_strength: float
    together: int = 1
    precision: str = "auto"
    drawing: Any = field(default_factory=threading.Lock)  # held while the model draws
    writing: Any = field(default_factory=threading.Lock)  # held while a file is written, or the studio closed
    closed: bool = False

    def draw(
        self, wish: Wish, folder: Path, advance: Callable[[int, int], None] = lambda done, all: None
    ) -> Iterator[Path]:
        """Carry out a wish.

        Args:
            wish: what to do.
            folder: an existing one, where the PNG files are written.
            advance: is told how many of all windows are done.

        Yields:
            The variations as they are done, and last the sheet of them all.

        Raises:
            UserError: the wish cannot be followed.
        """
        painter = self._painter(wish)
        painter.select_attention(self.together)
        plan = plan_for(wish, read_picture(wish.path), painter.size)
        done, steps = [0], wish.variations * len(plan.windows)

        def count(windows: int) -> None:
            done[0] += windows
            advance(done[0], steps)

        results = edit_picture(
            plan,
            painter,
            range(wish.variations),
            match=wish.match,
            erase=wish.strength == 1 and wish.kind != "whole",
            together=self.together,
            advance=count,
        )
        files: list[Path] = []
        while True:
            with self.drawing:
                found = next(results, None)
            if found is None:
                break
            files.append(self._save(found[1].image(), folder / f"{wish.path.stem}-{found[0]:03d}.png"))
            yield files[-1]
        with self.drawing:
            again = reconstruction(plan, painter)
        overview = sheet(plan, again, map(read_picture, files))
        yield self._save(overview, folder / f"{wish.path.stem}-sheet.png")

    def _painter(self, wish: Wish) -> ModelPainter:
        conditions: Conditions | None = None
        if wish.target is not None and self.prompts is not None:
            conditions = replace(self.prompts, prompts=(str(wish.target),))
        elif wish.target is not None:
            conditions = Labels((int(wish.target),))
        keep = 0 if wish.kind == "whole" else self.keep_scales
        edit = EditSettings(strength=wish.strength, keep_scales=keep)
        model, codec = self.model, self.tokenizer
        return ModelPainter(
            model, codec, conditions, self.settings, edit, seed=wish.seed, precision=self.precision
        )

    def _save(self, image: Image.Image, target: Path) -> Path:
        with self.writing:
            if self.closed:
                raise UserError("the server has ended")
            save_png(image, target)
        return target

    def close(self) -> None:
        """Write nothing from now on."""
        with self.writing:
            self.closed = True


def plan_for(wish: Wish, picture: Picture, model: tuple[int, int]) -> Plan:
    """Plan a wish, with the mistakes in the words of the page.

    Raises:
        UserError: nothing is painted, no margins, nothing to become, or a canvas that is too large.
    """
    if wish.kind == "room":
        if not any(wish.margins):
            raise UserError("There is no room to draw in: give at least one side some pixels.")
        room = room_around(picture.size, [Length(margin, False) for margin in wish.margins])
        return plan_room(picture, room, model, feather=wish.feather)
    if wish.kind == "whole":
        if wish.target is None:
            raise UserError("Say what the whole picture is to become.")
        region = np.full(picture.size, 255, np.uint8)
    else:
        region = region_of(wish.painted, picture.size)
        if not region.any():
            raise UserError("Nothing is painted: paint over what is to be drawn anew.")
    return plan_region(picture, region, model, feather=wish.feather)


def region_of(painted: Any, size: tuple[int, int]) -> Pixels:
    """What was painted on the copy [h, w] as a region [H, W] of the picture."""
    if painted is None:
        return np.zeros(size, np.uint8)
    mask = Image.fromarray(np.where(painted, 255, 0).astype(np.uint8))
    return np.asarray(mask.resize((size[1], size[0]), Image.Resampling.BILINEAR))


def copy_to_paint_on(picture: Picture) -> Pixels:
    """The picture as it is shown, [h, w, 3], with a longest side of about `SHOWN`."""
    image = Image.fromarray(picture.seen(slice(None), slice(None)))
    if max(image.size) > SHOWN:
        image.thumbnail((SHOWN, SHOWN))
    elif (factor := SHOWN // max(image.size)) > 1:
        image = image.resize((image.width * factor, image.height * factor), Image.Resampling.NEAREST)
    return np.asarray(image)


def note(text: str, wrong: bool = False) -> str:
    """A line of the page that says how things are."""
    return f'<p role="status" class="{"wrong" if wrong else "fine"}">{html.escape(text)}</p>'


def in_page_words(error: UserError, path: Path) -> str:
    """One line, without the folder that the file happens to lie in."""
    return " ".join(str(error).replace(str(path), path.name).split())


def is_loopback(host: str) -> bool:
    """Whether only this computer can reach a server there."""
    try:
        return host == "localhost" or ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False


class Page:
    """The page and what its buttons do.

    Args:
        studio: what draws.
        folder: for all files.
        start: where the controls stand at first.
    """

    def __init__(self, studio: Studio, folder: Path, start: Start) -> None:
        import gradio

        self.gradio, self.studio, self.folder = gradio, studio, folder
        size = model_size(studio.model, studio.tokenizer)
        about = f"The model “{studio.name}” draws {size[1]} × {size[0]} pixels at a time, in a picture of any size."
        with gradio.Blocks(
            title="hmar edit", analytics_enabled=False, delete_cache=(3600, DAY)
        ) as self.blocks:
            gradio.Markdown(
                f"# Edit a picture\n{html.escape(about)} Your pictures stay on the computer it runs on."
            )
            with gradio.Row():
                with gradio.Column(min_width=300):
                    self._ask_what()
                    self._ask_how(start)
                with gradio.Column(min_width=300):
                    self._show()
            self._connect()
        self.blocks.queue(default_concurrency_limit=1, max_size=16)

    def _ask_what(self) -> None:
        """The left side: which picture, and what is to become of it."""
        gr, studio = self.gradio, self.studio
        self.file = gr.File(
            label=f"Picture, up to {UPLOAD >> 20} MB",
            file_types=TYPES,
            height=150,
            elem_id="file",
        )
        self.kind = gr.Radio(KINDS, value="paint", label="What to do", elem_id="kind")
        self.canvas = gr.ImageEditor(
            label="Paint here",
            elem_id="canvas",
            sources=(),
            transforms=(),
            layers=False,
            brush=gr.Brush(default_size=40, colors=[("#ef4444", 0.6)], color_mode="fixed"),
            format="png",
            height=480,
            visible=False,
            buttons=[],
        )
        with gr.Row(visible=False, elem_id="margins") as self.room:
            sides = ("Left", "Top", "Right", "Bottom")  # as `Wish` has them
            self.margins = [
                gr.Number(0, label=f"{side}, px", precision=0, minimum=0, maximum=8192, min_width=110)
                for side in sides
            ]
        if studio.prompts is None:
            self.target = gr.Dropdown([FIT, *studio.class_names], value=FIT, type="index", label="Draw there")
        else:
            self.target = gr.Textbox(label="Draw there", placeholder=FIT, max_length=1000, max_lines=3)

    def _ask_how(self, start: Start) -> None:
        gr = self.gradio
        with gr.Row():
            self.count = gr.Slider(
                1,
                max(MOST, start.variations),
                start.variations,
                step=1,
                label="Variations",
                info="to choose from",
                min_width=130,
            )
            self.strength = gr.Slider(
                0.05, 1, start.strength, step=0.05, label="Strength", info="1: all is new", min_width=130
            )
        with gr.Accordion("More", open=False), gr.Row():
            self.seed = gr.Number(
                start.seed,
                label="Seed",
                precision=0,
                minimum=0,
                maximum=2**31,
                info="Same seed, same result",
                min_width=130,
            )
            self.feather = gr.Number(
                start.feather,
                label="Feather, px",
                precision=0,
                minimum=0,
                maximum=max(512, start.feather or 0),
                info="Empty: automatic",
                min_width=130,
            )
            self.match = gr.Checkbox(start.match, label="Match colours to the surroundings", min_width=130)
        with gr.Row():
            self.go = gr.Button("Draw", variant="primary", elem_id="draw", min_width=130)
            self.stop = gr.Button("Stop", elem_id="stop", min_width=130)

    def _show(self) -> None:
        """The right side: what came of it."""
        gr = self.gradio
        self.message = gr.HTML(note("Choose a picture to begin."), elem_id="message")
        self.gallery = gr.Gallery(
            label="Variations",
            elem_id="variations",
            columns=2,
            height="auto",
            object_fit="contain",
            interactive=False,
            format="png",
            buttons=["fullscreen"],
        )
        self.download = gr.DownloadButton("Download (PNG)", interactive=False, elem_id="download")
        self.sheet = gr.Image(
            label="Side by side",
            elem_id="sheet",
            interactive=False,
            type="filepath",
            format="png",
            buttons=["download", "fullscreen"],
        )

    def _connect(self) -> None:
        import gradio as gr

        def draw(
            values: dict[Any, Any],
            progress: Any = gr.Progress(),  # noqa: B008 - this is how Gradio hands it over
        ) -> Iterator[tuple[Any, ...]]:
            yield from self.draw(values, lambda done, all: progress((done, all), unit="windows"))

        def choose(event: gr.SelectData, shown: list[Any]) -> Any:
            return self._offer(Path(shown[event.index][0]), event.index)

        private: Any = {"api_visibility": "private"}
        self.file.change(self.look, [self.file, self.kind], [self.canvas, self.message], **private)
        self.kind.change(
            self.turn_to, [self.kind, self.file], [self.canvas, self.room, self.strength], **private
        )
        wish = {self.file, self.kind, self.canvas, *self.margins, self.target}
        wish |= {self.strength, self.count, self.seed, self.feather, self.match}
        shown = [self.message, self.gallery, self.download, self.sheet]
        running = self.go.click(
            draw, wish, shown, concurrency_id="draw", show_progress_on=self.gallery, **private
        )
        self.stop.click(lambda: note("Stopped."), None, self.message, cancels=[running], **private)
        self.gallery.select(choose, self.gallery, self.download, **private)

    def look(self, file: str | None, kind: str) -> tuple[Any, str]:
        """Show an uploaded picture for painting."""
        if file is None:
            return self.gradio.update(value=None, visible=False), note("Choose a picture to begin.")
        try:
            picture = read_picture(Path(file))
        except UserError as error:
            return self.gradio.update(value=None, visible=False), note(
                in_page_words(error, Path(file)), wrong=True
            )
        copy = copy_to_paint_on(picture)
        shown = {"background": copy, "layers": [], "composite": copy}
        size = f"{picture.size[1]} × {picture.size[0]} pixels."
        return self.gradio.update(value=shown, visible=kind == "paint"), note(size)

    def turn_to(self, kind: str, file: str | None) -> tuple[Any, Any, Any]:
        """Show the controls of a kind of edit."""
        update = self.gradio.update
        strength = self.studio.whole_strength if kind == "whole" else 1.0
        painting = kind == "paint" and file is not None
        return update(visible=painting), update(visible=kind == "room"), update(value=strength)

    def draw(self, values: dict[Any, Any], advance: Callable[[int, int], Any]) -> Iterator[tuple[Any, ...]]:
        """Carry out what the controls say; after each variation the page shows those that are done."""
        update, target = self.gradio.update, values[self.target]
        if values[self.file] is None:
            yield note("Choose a picture first.", wrong=True), update(), update(), update()
            return
        if not self.studio.prompts:
            target = target - 1 if target else None
        variations = values[self.count]
        wish = Wish(
            path=Path(values[self.file]),
            kind=values[self.kind],
            painted=painted_on(values[self.canvas]),
            margins=[values[each] or 0 for each in self.margins],
            target=None if target == "" else target,
            strength=values[self.strength],
            variations=variations,
            seed=values[self.seed] or 0,
            feather=values[self.feather],
            match=values[self.match],
        )
        start = time.perf_counter()
        done: list[Path] = []
        yield note("Drawing …"), [], update(interactive=False), None
        try:
            folder = Path(tempfile.mkdtemp(dir=self.folder))
            for path in self.studio.draw(wish, folder, advance):
                done.append(path)
                if len(done) <= variations:
                    line = note(f"{len(done)} of {variations} variations …")
                    yield line, list(done), self._offer(done[0], 0), update()
        except UserError as error:
            yield note(in_page_words(error, wish.path), wrong=True), update(), update(), update()
            return
        spent = f"Done in {time.perf_counter() - start:.1f} seconds."
        yield (
            note(f"{spent} Click a variation to see it larger."),
            update(),
            update(),
            done[-1],
        )

    def _offer(self, path: Path, number: int) -> Any:
        """Offer a variation for download."""
        return self.gradio.update(value=path, label=f"Download variation {number} (PNG)", interactive=True)


def painted_on(canvas: dict[str, Any] | None) -> Any:
    """Where the strokes are, [h, w] bool, of what the painting component gives; None without strokes."""
    layers = [] if canvas is None else [layer[..., 3] > 32 for layer in canvas["layers"]]
    return np.logical_or.reduce(layers) if layers else None


def serve(studio: Studio, start: Start, host: str = "127.0.0.1", port: int = 7860) -> None:
    """Show the page until Ctrl-C or a request to terminate; then all files are gone.

    Raises:
        UserError: the address cannot be used.
    """
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        with tempfile.TemporaryDirectory(prefix="hmar-edit-") as folder:
            for name in [each for each in os.environ if each.startswith("GRADIO_")]:
                del os.environ[name]  # shares, folders and hosts come from nowhere but here
            os.environ |= {
                "GRADIO_TEMP_DIR": folder,
                "GRADIO_ANALYTICS_ENABLED": "False",
                "GRADIO_RUN_HISTORY": "False",
            }
            tempfile.tempdir = folder
            try:
                _run(studio, start, host, port, Path(folder))
            finally:
                studio.close()
                tempfile.tempdir = None
    except KeyboardInterrupt:
        console.print("closed; all uploaded and drawn files are deleted")
    finally:
        signal.signal(signal.SIGTERM, before)


def check_installed() -> None:
    """See that the page can be made.

    Raises:
        UserError: Gradio is not installed.
    """
    if importlib.util.find_spec("gradio") is None:
        raise UserError("--serve needs Gradio, which is not installed", "pip install 'hmar-cli[serve]'")


def _gave_up(record: logging.LogRecord) -> bool:
    """Whether a message says no more than that a browser left in the middle of something."""
    return record.exc_info is not None and type(record.exc_info[1]).__name__ == "ClientDisconnect"


def _run(studio: Studio, start: Start, host: str, port: int, folder: Path) -> None:
    import gradio
    from starlette.middleware import Middleware
    from starlette.middleware.trustedhost import TrustedHostMiddleware

    page = Page(studio, folder, start).blocks
    # a page elsewhere whose name is made to point here is not answered
    hosts = ["127.0.0.1", "localhost", host] if is_loopback(host) and ":" not in host else ["*"]
    system = ("system-ui", "sans-serif")
    try:
        page.launch(
            server_name=host,
            server_port=port,
            max_file_size=UPLOAD,
            share=False,
            ssr_mode=False,
            allowed_paths=[],
            prevent_thread_lock=True,
            quiet=True,
            show_error=True,
            footer_links=[],
            app_kwargs={"middleware": [Middleware(TrustedHostMiddleware, allowed_hosts=hosts)]},
            theme=gradio.themes.Soft(font=system, font_mono=("ui-monospace", "monospace")),
            css=CSS,
        )
    except OSError as error:
        raise UserError(
            f"{host}, port {port}, cannot be used", "give another --port, or --host 127.0.0.1"
        ) from error
    try:
        logging.getLogger("uvicorn.error").addFilter(lambda each: not _gave_up(each))
        if not is_loopback(host):
            console.print(
                f"warning: whoever can reach {host} can use this page: there is no password", highlight=False
            )
        console.print(f"the page is at http://{host}:{port}, until Ctrl-C", highlight=False)
        while page.server.thread.is_alive():
            time.sleep(0.2)
    finally:
        studio.close()
        page.close(verbose=False)
