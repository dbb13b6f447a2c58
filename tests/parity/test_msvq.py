"""The multi-scale VQ tokenizer against recorded outputs of the published code, on its own random weights."""

import golden
import pytest
import torch

from hmar_cli.models.scales import Scales
from hmar_cli.tokenizers.msvq import MultiScaleVQ

RENAMED = {
    "quantize.embedding.": "quantizer.codebook.",
    "quantize.quant_resi.qresi_ls.": "quantizer.phis.",
}


def build(config: dict, state: dict[str, torch.Tensor]) -> MultiScaleVQ:
    """Build a tokenizer from a fixture's `config.vae` and load its state, official names and all."""
    expected = {"using_znorm": False, "quant_conv_ks": 3, "default_qresi_counts": 0}
    assert {key: config[key] for key in expected} == expected, "a fixture of a tokenizer that is not built"
    model = MultiScaleVQ(
        channels=config["ch"],
        multipliers=config.get("ch_mult", (1, 1, 2, 2, 4)),
        res_blocks=config.get("num_res_blocks", 2),
        z_channels=config["z_channels"],
        vocab_size=config["vocab_size"],
        scales=Scales.of(config["v_patch_nums"]),
        phi_count=config["share_quant_resi"],
        phi_ratio=config["quant_resi"],
    )
    renamed = {}
    for key, value in state.items():
        for theirs, ours in RENAMED.items():
            key = key.replace(theirs, ours)
        if not key.startswith("quantize.ema_vocab_hit"):
            renamed[key] = value
    model.load_state_dict(renamed)
    return model.eval()


@pytest.fixture(scope="module", params=golden.fixtures_of("msvq"), ids=golden.fixture_id)
def case(request):
    description, tensors = golden.load_fixture(request.param)
    model = build(description["config"]["vae"], golden.part(tensors, "state."))
    tokens = torch.cat([tensors[f"out.idx.{k}"] for k in range(len(model.scales))], dim=1)
    with torch.no_grad():
        yield model, tensors, tokens, description


def close(actual, expected, description):
    torch.testing.assert_close(actual, expected, **golden.tolerance(description))


def test_features(case):
    model, tensors, _, description = case
    close(model.features(tensors["in.image"]), tensors["out.feat"], description)


def test_tokens_are_identical(case):
    model, tensors, tokens, _ = case
    assert torch.equal(model.encode(tensors["in.image"]), tokens)


def test_running_reconstruction(case):
    model, tensors, tokens, description = case
    for k in range(len(model.scales)):
        part = tokens[:, : model.scales.slice(k).stop]
        close(model.quantizer.f_hat(part), tensors[f"out.fhat_cum.{k}"], description)
    close(model.quantizer.quantize(tensors["out.feat"])[1], tensors["out.fhat"], description)
    close(model.quantizer(tensors["out.feat"]).f_hat, tensors["out.fhat"], description)


def test_picture(case):
    model, tensors, tokens, description = case
    close(model.decode(tensors["out.fhat"]), tensors["out.recon"], description)
    close(model.decode_tokens(tokens), tensors["out.recon"], description)


@pytest.mark.parametrize("name", ["tf_input", "ns_input"])
def test_teacher_inputs(case, name):
    model, tensors, tokens, description = case
    close(model.quantizer.teacher_inputs(tokens), tensors[f"out.{name}"], description)


def test_own_inputs(case):
    model, tensors, tokens, description = case
    close(model.quantizer.own_inputs(tokens), tensors["out.mask_input"], description)


def test_maps_of_a_refinement_pass(case):
    model, tensors, tokens, description = case
    k, quantizer = description["config"]["refine_scale"], model.quantizer
    before = tensors[f"out.fhat_cum.{k - 1}"]
    own = quantizer.contribution(tokens[:, model.scales.slice(k)], k)
    for name, value in (("fhat_small", before), ("own_small", own)):
        expected = tensors[f"out.refine.{name}"].flatten(2).transpose(1, 2)
        close(quantizer.scale_input(value, k), expected, description)


def test_every_recorded_tensor_is_compared(case):
    _, tensors, _, _ = case
    compared = {"feat", "fhat", "recon", "tf_input", "ns_input", "mask_input"}
    prefixes = ("idx.", "fhat_cum.", "refine.fhat_small", "refine.own_small")
    recorded = golden.part(tensors, "out.")
    assert {name for name in recorded if name not in compared and not name.startswith(prefixes)} == set()
