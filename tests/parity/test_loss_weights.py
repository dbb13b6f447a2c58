"""Loss weights per scale against the published ones."""

from pathlib import Path

import golden
import pytest

from hmar_cli.models.scales import Scales
from hmar_cli.settings import Weighting
from hmar_cli.training.weighting import scale_weights

NAMES: dict[str, Weighting] = {"none": "none", "equal": "equal", "lognorm": "lognormal"}


@pytest.mark.parametrize("path", golden.fixtures_of("loss-weights"), ids=golden.fixture_id)
@pytest.mark.parametrize("name", NAMES)
def test_scale_totals(path: Path, name: str) -> None:
    about, _ = golden.load_fixture(path)
    assert about["loss_weights"]
    for pixels, options in about["loss_weights"].items():
        scales = Scales.of(about["config"]["patch_nums"][pixels])
        assert scales.total == options["L"]
        totals = scale_weights(scales, NAMES[name])
        assert totals == pytest.approx(options[name]["scale_total"], rel=about["tolerance"]["rtol"])
        assert sum(totals) == pytest.approx(options[name]["sum"])
