import inspect
import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pictures import Classes, encoded, number_of, picture
from PIL import Image

from hmar_cli.data import sources
from hmar_cli.data.images import UNLABELLED, decode_image
from hmar_cli.data.sources import open_source
from hmar_cli.data.spelling import split_options
from hmar_cli.errors import UserError

Parquet = Callable[..., Path]


def test_folder_labels_by_subfolder_and_reports_the_broken_image(folder: Path) -> None:
    source = open_source(str(folder))
    assert source.class_names == ("cat", "dog")
    assert len(source) == 6
    examples = list(source.read(0, 100))
    assert [example.index for example in examples] == list(range(6))
    good = {number_of(e.image): source.class_names[e.label] for e in examples if e.image is not None}
    assert good == {0: "dog", 1: "dog", 2: "dog", 3: "cat", 4: "cat"}
    (bad,) = [example for example in examples if example.image is None]
    assert "Error" in bad.error
    assert source[bad.index].image is None


def test_folder_of_splits(folder: Path, tmp_path: Path) -> None:
    root = tmp_path / "root"
    root.mkdir()
    folder.rename(root / "train")
    picture(7).save(root / "loose.png")
    (root / "val" / "dog").mkdir(parents=True)
    picture(8).save(root / "val" / "dog" / "x.png")
    assert len(open_source(str(root))) == 6
    held_out = open_source(f"{root}?split=val")
    assert (len(held_out), held_out.class_names, number_of(held_out[0].image)) == (1, ("dog",), 8)
    with pytest.raises(UserError, match="no folder 'tset'"):
        open_source(f"{root}?split=tset")


def test_folder_without_classes(tmp_path: Path) -> None:
    root = tmp_path / "fl[a]t"
    root.mkdir()
    picture(3).save(root / "test.png")
    source = open_source(str(root))
    assert (source.class_names, len(source), number_of(source[0].image)) == (UNLABELLED, 1, 3)


def test_pictures_by_their_names(folder: Path) -> None:
    one = open_source(str(folder / "dog" / "b.png"))
    assert (len(one), one.class_names, one.captioned) == (1, UNLABELLED, False)
    image = one[0].image
    assert image is not None and np.array_equal(np.asarray(image), np.asarray(picture(1)))
    several = open_source(str(folder / "*" / "a.png"))
    assert len(several) == 2 and several.class_names == UNLABELLED
    broken = open_source(str(folder / "cat" / "z.png"))
    assert broken[0].image is None and broken[0].error
    with pytest.raises(UserError, match=r"cannot read .*notes\.txt"):
        open_source(str(folder / "cat" / "*"))


def test_folder_called_train_can_be_a_class(tmp_path: Path) -> None:
    for number, name in enumerate(("train", "plane")):
        (tmp_path / "traffic" / name).mkdir(parents=True)
        picture(number).save(tmp_path / "traffic" / name / "x.png")
    assert open_source(str(tmp_path / "traffic")).class_names == ("plane", "train")


def test_parquet_with_class_names_and_captions(make_parquet: Parquet) -> None:
    path = make_parquet(
        label=Classes(["cat", "dog"], [0, 1, 1, 0, 1, 0]), caption=[f"picture {i}" for i in range(6)]
    )
    source = open_source(str(path))
    assert source.class_names == ("cat", "dog")
    found = [(e.index, number_of(e.image), e.label, e.caption) for e in source.read(2, 5)]
    assert found == [(2, 2, 1, "picture 2"), (3, 3, 0, "picture 3"), (4, 4, 1, "picture 4")]
    assert source[5].label == 0
    picked = [decode() for decode in source.pick([4, 0, 5])]
    assert [(e.index, number_of(e.image), e.label) for e in picked] == [(4, 4, 1), (0, 0, 0), (5, 5, 0)]
    for index in (6, -1):
        with pytest.raises(IndexError):
            source[index]


def test_string_labels_become_sorted_classes_and_missing_ones_are_reported(make_parquet: Parquet) -> None:
    path = make_parquet(category=["pear", "apple", "pear", None, "fig", "apple"])
    source = open_source(str(path))
    assert source.class_names == ("apple", "fig", "pear")
    assert [e.label for e in source.read(0, 3)] == [2, 0, 2]
    assert "no label" in source[3].error


def test_integer_labels(make_parquet: Parquet) -> None:
    source = open_source(str(make_parquet(label=[0, 2, 1, -1, 2, 0])))
    assert source.class_names == ("0", "1", "2")
    assert "label -1 is none of the 3 classes" in source[3].error
    assert source[4].label == 2


def test_columns_by_option(make_parquet: Parquet) -> None:
    path = make_parquet(
        fine=Classes(["a", "b", "c"], [0, 1, 2, 0, 1, 2]),
        coarse=Classes(["x", "y"], [1, 1, 1, 0, 0, 0]),
        note=["hello"] * 6,
    )
    with pytest.raises(UserError, match="several columns of labels") as error:
        open_source(str(path))
    assert "label=fine or label=coarse" in error.value.hint
    source = open_source(f"{path}?label=coarse&caption=note&split=train[:4]")
    assert (len(source), source.class_names, source[0].label, source[0].caption) == (
        4,
        ("x", "y"),
        1,
        "hello",
    )
    assert open_source(f"{path}?label=none").class_names == UNLABELLED
    with pytest.raises(UserError, match="no column 'fin'") as error:
        open_source(f"{path}?label=fin")
    assert "did you mean 'fine'?" in error.value.hint


def test_label_that_is_no_class(make_parquet: Parquet) -> None:
    with pytest.raises(UserError, match="neither names nor whole numbers"):
        open_source(str(make_parquet(label=[0.5] * 6)))


def test_no_image_column(tmp_path: Path) -> None:
    import datasets

    path = tmp_path / "text.parquet"
    datasets.Dataset.from_dict({"words": ["a", "b"]}).to_parquet(str(path))
    with pytest.raises(UserError, match="no column of images") as error:
        open_source(str(path))
    assert "words" in error.value.hint


def test_parquet_without_feature_metadata(tmp_path: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    path = tmp_path / "raw.parquet"
    pq.write_table(pa.table({"img": [encoded(1), b"junk", encoded(3)], "cls": [1, 0, 1]}), path)
    examples = list(open_source(str(path)).read(0, 3))
    assert [number_of(e.image) if e.image else None for e in examples] == [1, None, 3]
    assert [e.label for e in examples if e.image] == [1, 1]


def test_glob_and_folder_of_parquet_with_splits(make_parquet: Parquet) -> None:
    first = make_parquet("repo/data/train-00000-of-00002.parquet", count=4, label=[0, 1, 0, 1])
    make_parquet("repo/data/train-00001-of-00002.parquet", count=2, label=[2, 1])
    make_parquet("repo/data/test-00000-of-00001.parquet", count=3, label=[1, 1, 0])
    assert len(open_source(str(first.parent / "train-*.parquet"))) == 6
    assert len(open_source(str(first.parent / "train-0000?-of-00002.parquet") + "?label=none")) == 6
    repo = first.parent.parent
    assert len(open_source(str(repo))) == 6
    assert len(open_source(f"{repo}?split=test")) == 3
    with pytest.raises(UserError, match=r"cannot open .*validation"):
        open_source(f"{repo}?split=validation")


@pytest.mark.parametrize("streaming", [False, True])
def test_webdataset(tar: Path, streaming: bool) -> None:
    extra = "&streaming=true&classes=3" if streaming else "&split=train"
    source = open_source(f"{tar.parent}/*.tar?caption=json.caption{extra}")
    assert source.class_names == ("0", "1", "2")
    found = [(e.index, number_of(e.image), e.label, e.caption) for e in source.read(1, 4)]
    assert found == [(i, i, i % 3, f"number {i}") for i in (1, 2, 3)]
    assert source.length == (None if streaming else 5)
    assert source.random_access is not streaming


def test_webdataset_fields_of_json_are_found(tar: Path) -> None:
    source = open_source(f"{tar}?label=json.kind")
    assert source.class_names == ("even", "odd")
    assert [e.caption for e in source.read(0, 2)] == ["number 0", "number 1"]
    assert source[3].label == 1


def test_streaming_reads_on_skips_and_starts_over(make_parquet: Parquet) -> None:
    path = make_parquet(label=Classes(["cat", "dog"], [0, 1, 1, 0, 1, 0]))
    source = open_source(f"{path}?streaming=true")
    assert source.class_names == ("cat", "dog")
    for start, stop in ((0, 2), (2, 4), (5, 9), (1, 3), (6, 8)):
        found = [(e.index, number_of(e.image)) for e in source.read(start, stop)]
        assert found == [(i, i) for i in range(start, min(stop, 6))]
    with pytest.raises(UserError, match="is a stream"):
        len(source)
    with pytest.raises(UserError, match="is a stream"):
        source[0]


def test_streaming_needs_class_names(make_parquet: Parquet) -> None:
    path = make_parquet(label=["b", "a", "b", "a", "c", "a"])
    with pytest.raises(UserError, match="does not tell the classes") as error:
        open_source(f"{path}?streaming=true")
    assert "classes=" in error.value.hint
    source = open_source(f"{path}?streaming=true&classes=a,b")
    examples = list(source.read(0, 6))
    assert [e.label for e in examples if e.image] == [1, 0, 1, 0, 0]
    assert "label 'c'" in examples[4].error


@pytest.mark.parametrize("streaming", [False, True])
def test_hub_name(monkeypatch: pytest.MonkeyPatch, streaming: bool) -> None:
    import datasets

    real = inspect.signature(datasets.load_dataset)
    calls: list[dict[str, Any]] = []

    def load_dataset(*args: Any, **kwargs: Any) -> Any:
        calls.append(real.bind(*args, **kwargs).arguments)
        features = datasets.Features(
            {"img": datasets.Image(), "label": datasets.ClassLabel(names=["a", "b"])}
        )
        rows = {"img": [picture(i) for i in range(4)], "label": [0, 1, 0, 1]}
        data = datasets.Dataset.from_dict(rows, features=features)
        return data.to_iterable_dataset() if streaming else data

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    flag = "&streaming=true" if streaming else ""
    source = open_source(f"someone/pictures?split=test&config=plain{flag}")
    assert calls == [{"path": "someone/pictures", "name": "plain", "split": "test", "streaming": streaming}]
    assert [(number_of(e.image), e.label) for e in source.read(0, 4)] == [(0, 0), (1, 1), (2, 0), (3, 1)]


def test_hub_name_that_cannot_be_reached_is_one_line() -> None:
    with pytest.raises(UserError, match="cannot open nobody-at-all/no-such-data") as error:
        open_source("nobody-at-all/no-such-data")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("spec", "message", "hint"),
    [
        ("no/such/folder", "no such source: no/such/folder", "owner/name"),
        ("./nowhere", "no such source", "folder"),
        ("missing.parquet", "no such source: missing.parquet", "parquet"),
        ("builtin:circles", "no built-in data called 'builtin:circles'", "builtin:shapes and builtin:scenes"),
        ("builtin:shapes?split=test", "unknown option 'split'", ""),
        ("builtin:scenes?split=tset", "expected all, train, test", ""),
        ("builtin:shapes?cuont=3", "unknown option 'cuont'", "did you mean 'count'?"),
        ("builtin:shapes?count=many", "count=many: expected a whole number", ""),
        ("builtin:shapes?count=0", "expected at least 1", ""),
        ("owner/name?streaming=perhaps", "streaming=perhaps", ""),
        ("owner/name?spilt=train", "unknown option 'spilt'", "did you mean 'split'?"),
    ],
)
def test_mistakes(spec: str, message: str, hint: str) -> None:
    with pytest.raises(UserError) as error:
        open_source(spec)
    assert message in str(error.value)
    assert hint in error.value.hint


def test_other_files_and_empty_folders(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("x")
    with pytest.raises(UserError, match=r"cannot read .*a\.csv"):
        open_source(str(tmp_path / "a.csv"))
    with pytest.raises(UserError, match="no images"):
        open_source(str(tmp_path))


def test_split_options() -> None:
    assert split_options("a/b?split=train&caption=my%20text") == (
        "a/b",
        {"split": "train", "caption": "my text"},
    )
    assert split_options("part-?.tar") == ("part-?.tar", {})
    assert split_options("part-?.tar?label=a") == ("part-?.tar", {"label": "a"})


def test_decoding_modes() -> None:
    half = Image.new("RGBA", (2, 2), (200, 0, 0, 0))
    assert decode_image(half).getpixel((0, 0)) == (255, 255, 255)
    deep = Image.fromarray(np.full((2, 2), 0x80FF, np.uint16))
    assert decode_image(deep).getpixel((0, 0)) == (0x80, 0x80, 0x80)
    assert decode_image(Image.new("L", (2, 2), 9)).mode == "RGB"
    turned = io.BytesIO()
    exif = Image.Exif()
    exif[0x0112] = 6  # rotated by a quarter
    Image.new("RGB", (4, 2)).save(turned, "JPEG", exif=exif)
    assert decode_image(turned.getvalue()).size == (2, 4)
    with pytest.raises(ValueError, match="no image"):
        decode_image({"bytes": None, "path": None})


def test_truncated_jpeg_is_reported(make_parquet: Parquet, tmp_path: Path) -> None:
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8))
    noise.save(tmp_path / "x.jpg")
    data = (tmp_path / "x.jpg").read_bytes()
    with pytest.raises(OSError, match="truncated"):
        decode_image(data[: len(data) // 2])


def test_shapes_source() -> None:
    source = open_source("builtin:shapes?count=5&seed=3", size=[16, 24])
    assert (len(source), len(source.class_names)) == (5, 8)
    example = source[4]
    assert example.image is not None and example.image.size == (24, 16)
    assert source.class_names[example.label] in example.caption
    assert list(source.read(5, 9)) == []
    assert len(open_source("builtin:shapes")) == 10000


def test_module_says_how_sources_are_spelled() -> None:
    assert sources.__doc__ is not None and "owner/name" in sources.__doc__


def test_builtin_scenes() -> None:
    source = open_source("builtin:scenes?count=4&seed=1&split=test", size=32)
    assert (len(source), source.class_names, source.captioned) == (4, ("scene",), True)
    example = source[3]
    assert example.image is not None and example.image.size == (32, 32)
    assert example.captions == (example.caption,) and example.label == 0
    assert any(relation in example.caption for relation in ("left of", "right of", "above", "below"))
    assert open_source("builtin:scenes?count=4&seed=1&split=train", size=32)[3].caption != example.caption


@pytest.mark.parametrize("streaming", [False, True])
def test_parquet_with_several_captions(make_parquet: Parquet, streaming: bool) -> None:
    texts = [["a", "b"], [], ["c"], ["d", "", "e"], ["f"], ["g"]]
    path = make_parquet(captions=texts)
    source = open_source(f"{path}?streaming=true" if streaming else str(path))
    assert source.captioned and source.class_names == UNLABELLED
    found = [example.captions for example in source.read(0, 4)]
    assert found == [("a", "b"), (), ("c",), ("d", "e")]
    assert not open_source(f"{make_parquet('plain.parquet')}").captioned


@pytest.fixture
def coco(tmp_path: Path) -> Path:
    """Annotations of four images: one with two captions, one without a file, one broken, one without captions."""
    (tmp_path / "images").mkdir()
    for number in (0, 3):
        picture(number).save(tmp_path / f"images/{number}.png")
    (tmp_path / "images/2.png").write_bytes(encoded(2)[:30])
    table = {
        "info": {"year": 2014},
        "images": [{"id": 100 + i, "file_name": f"{i}.png", "height": 10, "width": 12} for i in range(4)],
        "annotations": [
            {"id": 1, "image_id": 102, "caption": "broken"},
            {"id": 2, "image_id": 100, "caption": " a dark picture\n"},
            {"id": 3, "image_id": 101, "caption": "lost"},
            {"id": 4, "image_id": 100, "caption": "a green one"},
            {"id": 5, "image_id": 999, "caption": "of nothing"},
        ],
    }
    path = tmp_path / "captions.json"
    path.write_text(json.dumps(table))
    return path


def test_coco(coco: Path) -> None:
    source = open_source(f"coco:{coco}?images={coco.parent / 'images'}")
    assert (len(source), source.class_names, source.captioned) == (5, UNLABELLED, True)
    examples = list(source.read(0, 9))
    assert [example.index for example in examples] == list(range(5))
    assert [number_of(e.image) if e.image else None for e in examples] == [0, None, None, 3, None]
    assert examples[0].captions == ("a dark picture", "a green one")
    assert examples[3].captions == () and examples[3].caption == ""
    assert [bool(e.error) for e in examples] == [False, True, True, False, True]
    assert "No such file" in examples[1].error and "999" in examples[4].error


def test_captions_of_coco_are_known_without_its_images(coco: Path) -> None:
    source = open_source(f"coco:{coco}?images={coco.parent / 'images'}")
    expected = [("a dark picture", "a green one"), ("lost",), ("broken",), (), ()]
    for path in (coco.parent / "images").iterdir():
        path.unlink()
    assert [source.captions(i) for i in range(len(source))] == expected
    shapes = open_source("builtin:shapes?count=3")
    assert [shapes.captions(i) for i in range(3)] == [each.captions for each in shapes.read(0, 3)]


def test_mistakes_in_coco(coco: Path) -> None:
    images = coco.parent / "images"
    cases = {
        f"coco:{coco}": "does not say where its images are",
        f"coco:{coco}?images={images}-2": "no such folder",
        f"coco:{coco}-2?images={images}": "no such file",
        f"coco:{coco}?image={images}": "unknown option 'image'",
    }
    for spec, message in cases.items():
        with pytest.raises(UserError, match=message):
            open_source(spec)
    coco.write_text(
        '{"images": [{"id": 1, "file_name": "0.png"}], "annotations": [{"image_id": 1, "bbox": []}]}'
    )
    with pytest.raises(UserError, match="no JSON of captions in COCO's form: KeyError: 'caption'"):
        open_source(f"coco:{coco}?images={images}")
    coco.write_text('{"images": [{"id": 1, "file_name": "0.png"}], "annotations": []}')
    with pytest.raises(UserError, match="captions of 0"):
        open_source(f"coco:{coco}?images={images}")
