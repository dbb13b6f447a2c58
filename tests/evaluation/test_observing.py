"""Going through images once: what is kept does not depend on batches, processes, order or file formats."""

import gc
import os
import subprocess
import sys
import weakref
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor
from toy_extractors import Shown, Toy, pictures, save_pngs, toy_extractor

from hmar_cli.data.images import Example, ImageSource
from hmar_cli.data.sources import open_source
from hmar_cli.errors import UserError
from hmar_cli.evaluation.extractors import Extractor, Features
from hmar_cli.evaluation.observing import METRICS, Observations, gather, join, observe

NAMES = ("red", "green", "blue", "grey")


def tensor(images: np.ndarray) -> Tensor:
    return torch.from_numpy(images).permute(0, 3, 1, 2)


def look(source: object, **settings: object) -> Observations:
    return observe(source, toy_extractor(), **{"metrics": METRICS, **settings})  # type: ignore[arg-type]


def same(ours: Observations, theirs: Observations) -> None:
    """Alike to the bit in what is kept of single images, and to rounding in float64 sums."""
    assert (ours.count, ours.digest, ours.size, ours.crop) == (
        theirs.count,
        theirs.digest,
        theirs.size,
        theirs.crop,
    )
    for name in ("features", "logits", "indices"):
        assert torch.equal(getattr(ours, name), getattr(theirs, name)), name
    assert len(ours.shown) == len(theirs.shown)
    assert all(np.array_equal(*pair) for pair in zip(ours.shown, theirs.shown, strict=True))
    for part in ("statistics", "spatial"):
        one, two = getattr(ours, part), getattr(theirs, part)
        torch.testing.assert_close(one.mean, two.mean, rtol=1e-13, atol=1e-13)
        torch.testing.assert_close(
            one.covariance, two.covariance, rtol=1e-12, atol=1e-12 * float(two.covariance.abs().max())
        )


def test_features_logits_and_statistics_are_those_of_the_extractor() -> None:
    images = pictures(11)
    found = look(Shown(list(images)), batch_size=4)
    features, logits = Toy()(tensor(images))
    assert found.features is not None and found.logits is not None and found.spatial is not None
    assert torch.equal(found.features, features) and torch.equal(found.logits, logits)
    torch.testing.assert_close(found.statistics.covariance, features.double().T.cov())
    rows = tensor(images)[:, :, 0].flatten(1).double()
    torch.testing.assert_close(found.spatial.mean, rows.mean(dim=0))
    assert (found.count, found.size, found.crop, found.unreadable) == (11, (8, 8), "none", 0)
    assert found.seconds > 0


def test_what_no_metric_needs_is_not_kept() -> None:
    found = look(Shown(list(pictures(5))), metrics=("fid",))
    assert found.features is None and found.logits is None and found.spatial is None
    assert look(Shown(list(pictures(5))), metrics=("recall",)).features is not None
    with pytest.raises(ValueError, match="metrics of"):
        look(Shown([]), metrics=("lpips",))


def test_batches_change_nothing() -> None:
    source = Shown(list(pictures(23)))
    whole = look(source, batch_size=64, shown=5)
    for size in (1, 5, 23):
        same(look(source, batch_size=size, shown=5), whole)


def test_tensors_and_files_are_the_same_set(tmp_path: Path) -> None:
    images = pictures(9)
    folder = look(open_source(str(save_pngs(tmp_path / "a", images))), shown=3)
    batches = [tensor(images[:2]), tensor(images[2:7]), tensor(images[7:])]
    drawn = look(batches, name="drawn", shown=3)
    same(drawn, folder)
    assert drawn.source == "drawn" and folder.source == str(tmp_path / "a")
    assert np.array_equal(drawn.shown[2], images[2])
    with pytest.raises(ValueError, match=r"uint8 \[B, 3, H, W\]"):
        look([tensor(images).float()])


def test_the_digest_names_the_set_whatever_its_order() -> None:
    images = pictures(6)
    found = look(Shown(list(images)))
    assert len(found.digest) == 64
    assert look(Shown(list(images[::-1]))).digest == found.digest
    assert look(Shown(list(images[:5]))).digest != found.digest
    changed = images.copy()
    changed[3, 0, 0, 0] ^= 1
    assert look(Shown(list(changed))).digest != found.digest
    assert look(Shown([*images, images[0]])).digest != found.digest  # twice counts twice
    flat = look(Shown(list(images.reshape(6, 4, 16, 3))))
    assert flat.digest != found.digest  # the same bytes in another shape


def test_the_first_images_alone() -> None:
    images = pictures(10)
    expected = look(Shown(list(images[:7])))
    same(look(Shown(list(images)), count=7, batch_size=3), expected)
    same(look([tensor(images[:4]), tensor(images[4:])], count=7), expected)


def test_images_are_cut_to_the_size_that_is_asked_for() -> None:
    images = list(pictures(4, (20, 30)))
    found = look(Shown(images), size=8, crop="adm")
    assert (found.size, found.crop) == ((8, 8), "adm")
    assert look(Shown(images), size=8, crop="var").digest != found.digest
    from hmar_cli.data.transforms import image_transform

    cut = image_transform(8, "adm", train=False)
    expected = [cut(Image.fromarray(each)) for each in images]
    assert look(Shown(expected)).digest == found.digest
    assert look([tensor(np.stack(images))], size=8).digest == found.digest
    small = toy_extractor(size=6)
    assert observe(Shown(images), small).size == (6, 6)  # what the extractor was trained at


def test_images_of_several_sizes_need_one() -> None:
    images = [*pictures(3), *pictures(2, (8, 9))]
    with pytest.raises(UserError, match="8 x 8, and image 3 is 9 x 8"):
        look(Shown(images), batch_size=2)
    assert look(Shown(images), size=8).count == 5
    parts = [look(Shown(images), batch_size=3, share=(process, 2)) for process in (0, 1)]
    with pytest.raises(UserError, match="several sizes"):
        join(parts)


def test_images_that_cannot_be_read_are_counted_apart() -> None:
    images = pictures(6)
    found = look(Shown([*images[:2], None, *images[2:], None]), batch_size=3)
    same_images = look(Shown(list(images)))
    assert (found.count, found.unreadable, found.error) == (6, 2, "image 2: broken")
    assert found.digest == same_images.digest
    assert found.indices.tolist() == [0, 1, 3, 4, 5, 6]
    assert look(Shown([None, None])).count == 0


def test_accuracy_counts_images_of_their_own_class() -> None:
    images = pictures(12)
    named = Toy()(tensor(images))[1].argmax(dim=1).tolist()
    labels = [label if i % 3 else (label + 1) % 4 for i, label in enumerate(named)]
    extractor = toy_extractor(class_names=NAMES)
    order = (2, 0, 3, 1)  # the source has the classes in another order
    source = Shown(list(images), [order.index(label) for label in labels], tuple(NAMES[i] for i in order))
    found = observe(source, extractor, batch_size=5)
    assert found.labelled and found.right == 8
    assert found.describe()["accuracy"] == 8 / 12
    drawn = observe([tensor(images)], extractor, labels=[NAMES[label] for label in labels])
    assert (drawn.labelled, drawn.right) == (True, 8)
    for unknown in (Shown(list(images)), Shown(list(images), names=("red", "pink"))):
        assert not observe(unknown, extractor).labelled
    assert not observe([tensor(images)], extractor).labelled
    twins = ("crane", "green", "crane", "grey")  # as ImageNet has them: a bird, and a machine
    judge = toy_extractor(class_names=twins)
    assert observe(Shown(list(images), labels, twins), judge).right == 8
    assert not observe(Shown(list(images), names=("green", "crane")), judge).labelled
    assert "accuracy" not in observe(source, toy_extractor()).describe()


def test_shares_of_processes_are_joined_to_what_one_finds() -> None:
    images = [*pictures(21), None, *pictures(5, seed=1)]
    source = Shown(images, list(range(4)), NAMES)
    extractor = toy_extractor(class_names=NAMES)
    settings = {"metrics": METRICS, "batch_size": 4, "shown": 10}
    whole = observe(source, extractor, **settings)  # type: ignore[arg-type]
    for processes in (2, 3, 9):  # with 9 of them, two have nothing to do
        parts = [observe(source, extractor, share=(i, processes), **settings) for i in range(processes)]  # type: ignore[arg-type]
        assert sum(part.count for part in parts) == 26
        joined = join(parts)
        same(joined, whole)
        assert (joined.right, joined.unreadable, joined.error) == (whole.right, 1, "image 21: broken")
        assert joined.describe() == whole.describe()
    larger = [observe(source, extractor, size=16, batch_size=4, share=(i, 2)) for i in range(2)]
    assert (whole.enlarged, join(larger).enlarged) == (0, 26)
    assert gather(whole) is whole  # one process


PROCESS = """
import sys, torch
from toy_extractors import toy_extractor
from hmar_cli.data.sources import open_source
from hmar_cli.evaluation.observing import METRICS, observe_together

folder, out, rank = sys.argv[1:]
meeting = f"file://{out}/rendezvous"
torch.distributed.init_process_group("gloo", init_method=meeting, rank=int(rank), world_size=2)
found = observe_together(open_source(folder), toy_extractor(), metrics=METRICS, batch_size=3)
torch.save([found.count, found.digest, found.features, found.logits], f"{out}/{rank}.pt")
torch.save([found.statistics.mean, found.statistics.covariance], f"{out}/{rank}-statistics.pt")
torch.distributed.destroy_process_group()
"""


def test_two_processes_find_what_one_finds(tmp_path: Path) -> None:
    folder = save_pngs(tmp_path / "images", pictures(13))
    paths = [str(Path(__file__).parent), *(path for path in sys.path if path)]
    command = [sys.executable, "-c", PROCESS, str(folder), str(tmp_path)]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1"}
    running = [subprocess.Popen([*command, str(rank)], env=environment) for rank in (0, 1)]
    assert [process.wait(timeout=120) for process in running] == [0, 0]
    alone = look(open_source(str(folder)), batch_size=3)
    for rank in (0, 1):  # both are told everything
        count, digest, features, logits = torch.load(tmp_path / f"{rank}.pt")
        mean, covariance = torch.load(tmp_path / f"{rank}-statistics.pt")
        assert (count, digest) == (13, alone.digest)
        assert torch.equal(features, alone.features) and torch.equal(logits, alone.logits)
        torch.testing.assert_close(mean, alone.statistics.mean, rtol=1e-13, atol=1e-13)
        torch.testing.assert_close(covariance, alone.statistics.covariance, rtol=1e-12, atol=1e-12)


def test_images_do_not_stay_in_memory() -> None:
    """A picture lives until its batch has been looked at; never more than a few batches' worth are alive."""
    alive: set[int] = set()
    most = 0

    class Counted(ImageSource):
        def example(self, index: int) -> Example:
            nonlocal most
            image = Image.fromarray(pictures(1, seed=index)[0])
            alive.add(index)
            weakref.finalize(image, alive.discard, index)
            most = max(most, len(alive))
            return Example(index, image)

    def endless() -> Iterator[Tensor]:
        for index in range(200):
            made = tensor(pictures(1, seed=index))
            tensors.append(weakref.ref(made))
            yield made

    tensors: list[weakref.ref[Tensor]] = []
    found = look(Counted("counted", ("image",), 200), batch_size=4, workers=2)
    gc.collect()
    assert found.count == 200 and not alive and most <= 4 * 2 + 2 * 4 + 2
    assert look(endless()).digest == found.digest
    assert not any(each() is not None for each in tensors)


def test_extractors_without_what_a_metric_needs_are_refused() -> None:
    bare = Extractor(
        name="bare",
        fingerprint="",
        look=lambda pixels: Features(pixels.float().mean(dim=(2, 3))),
        device=torch.device("cpu"),
    )
    for metric, words in (("is", "logits"), ("sfid", "spatial")):
        with pytest.raises(UserError, match=f"{metric} needs .*{words}.*bare has not"):
            observe(Shown(list(pictures(3))), bare, metrics=(metric,))
