"""What an edit holds at once does not grow beyond a few copies of the picture."""

import subprocess
import sys

import pytest

SCRIPT = """
import resource
import numpy as np
from hmar_cli.pictures.editing import edit_picture, plan_region, plan_room
from hmar_cli.pictures.picture import Picture
from hmar_cli.pictures.regions import Length, box_region, room_around

class Same:
    size, token = (64, 64), 8
    def paint(self, images, region, variations, step):
        return images.astype(np.float32)

def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024

picture = Picture(np.ones((2000, 3000, 3), np.uint8))
before = peak()
if KIND == "inpaint":
    plan = plan_region(picture, box_region(picture.size, [(300, 300, 2700, 1700)]), Same.size)
else:
    plan = plan_room(picture, room_around(picture.size, [Length(0.2, True)] * 4), Same.size)
for _ in edit_picture(plan, Same(), range(2)):
    pass
print((peak() - before) / plan.canvas.colour.nbytes)
"""


def copies(kind: str) -> float:
    run = [sys.executable, "-c", SCRIPT.replace("KIND", repr(kind))]
    return float(subprocess.run(run, check=True, capture_output=True, text=True).stdout)


@pytest.mark.parametrize("kind", ["inpaint", "outpaint"])
def test_memory_is_a_few_copies_of_the_canvas(kind: str) -> None:
    assert copies(kind) < 9
