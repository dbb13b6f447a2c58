import dataclasses
import subprocess
import sys
from pathlib import Path
from typing import get_args

import pytest
import tomli

from hmar_cli.errors import UserError
from hmar_cli.recipe import load_recipe, recipe_folder, recipe_from_dict, recipe_names, to_toml
from hmar_cli.settings import (
    Attention,
    Kl,
    KlObjective,
    MaskedAr,
    MaskedArObjective,
    MaskedArSample,
    MaskedObjective,
    MsvqObjective,
    NextScaleObjective,
    Recipe,
)
from hmar_cli.sizes import model_parameters

SIZES = {
    "var": ["d16", "d20", "d24", "d30", "d36-512", "tiny", "cifar10", "tin40"],
    "hmar": ["d16", "d20", "d24", "d30", "d24-512", "d16-1024", "tiny", "cifar10", "tin40"],
    "msvq": ["256", "512", "1024", "tiny", "cifar10", "tin40"],
    "mar": ["b", "l", "h", "tiny", "cifar10", "tin40"],
    "himar": ["b", "l", "h", "b-paper", "tiny", "cifar10", "tin40", "scenes", "emoji", "s-coco"],
    "kl": ["16", "tiny", "cifar10", "tin40", "scenes", "emoji"],
    "classifier": ["tiny", "cifar10"],
}
ABLATION = ["visual", "mlp", "no-scale", "transformer-pivots"]  # Hi-MAR's Table 5, rows 2 to 5
REQUIRED = {f"{family}-{size}" for family, sizes in SIZES.items() for size in sizes} | {
    f"hmar-{size}-masked" for size in SIZES["hmar"]
}
REQUIRED |= {f"himar-{size}-{row}" for size in ("b", "cifar10") for row in ABLATION}


def mistakes(name: str, *overrides: str) -> list[str]:
    with pytest.raises(UserError) as caught:
        load_recipe(name, overrides)
    return list(caught.value.details)


def write(folder: Path, name: str, text: str) -> str:
    path = folder / f"{name}.toml"
    path.write_text(text, encoding="utf-8")
    return str(path)


# Shipped recipes


def test_the_required_recipes_are_shipped() -> None:
    assert set(recipe_names()) >= REQUIRED


def test_names_are_sorted_by_number() -> None:
    names = recipe_names()
    assert names.index("msvq-256") < names.index("msvq-1024")
    assert names.index("var-d16") < names.index("var-d30")


@pytest.mark.parametrize("name", recipe_names())
def test_a_shipped_recipe_loads_and_survives_writing(name: str) -> None:
    recipe = load_recipe(name)
    assert recipe.name == name
    assert recipe.description
    assert recipe_from_dict(tomli.loads(to_toml(recipe))) == recipe


@pytest.mark.parametrize("name", recipe_names())
def test_a_shipped_recipe_begins_with_its_source_hardware_expectation_and_command(name: str) -> None:
    lines = (recipe_folder() / f"{name}.toml").read_text(encoding="utf-8").splitlines()
    comment = "\n".join(lines[: next(i for i, line in enumerate(lines) if not line.startswith("#"))])
    for part in ("# Hardware: ", "# Expected: ", "# Command:", "#   hmar "):
        assert part in comment
    assert f"--recipe {name} " in comment
    assert max(map(len, lines)) <= 120


@pytest.mark.parametrize("size", ["tiny", "cifar10", "tin40"])
def test_small_var_and_hmar_differ_in_pattern_and_weighting_alone(size: str) -> None:
    var, hmar = load_recipe(f"var-{size}"), load_recipe(f"hmar-{size}")
    assert var.model is not None
    assert isinstance(var.objective, NextScaleObjective)
    assert (var.model.pattern, var.objective.weighting) == ("causal", "none")
    same = dataclasses.replace(
        var,
        name=hmar.name,
        description=hmar.description,
        model=dataclasses.replace(var.model, pattern="diagonal"),
        objective=dataclasses.replace(var.objective, weighting="lognormal"),
    )
    assert same == hmar


@pytest.mark.parametrize("size", SIZES["hmar"])
def test_masked_finetuning_is_of_the_same_model_and_refines(size: str) -> None:
    base, masked = load_recipe(f"hmar-{size}"), load_recipe(f"hmar-{size}-masked")
    assert (base.model, base.tokenizer, base.data) == (masked.model, masked.tokenizer, masked.data)
    assert isinstance(masked.objective, MaskedObjective)
    assert max(map(len, masked.sample.schedule)) > 1
    assert base.sample.schedule == ()


def test_the_published_schedule_has_14_steps() -> None:
    assert sum(len(passes) for passes in load_recipe("hmar-d30-masked").sample.schedule) == 14


@pytest.mark.parametrize(
    ("name", "base_lr", "batch", "epochs", "end_ratio", "decay_end"),
    [
        ("hmar-d16", 1e-4, 768, 200, 0.1, None),
        ("hmar-d20", 1e-4, 768, 250, 0.1, None),
        ("hmar-d24", 8e-5, 768, 350, 0.01, None),
        ("hmar-d30", 8e-5, 1024, 350, 0.01, 0.08),
        ("hmar-d16-masked", 1e-4, 768, 100, 0.1, None),
        ("hmar-d30-masked", 8e-5, 1024, 100, 0.01, 0.08),
    ],
)
def test_published_training_settings(
    name: str, base_lr: float, batch: int, epochs: float, end_ratio: float, decay_end: float | None
) -> None:
    recipe = load_recipe(name)
    optim, train = recipe.optim, recipe.train
    assert (optim.base_lr, train.batch_size, train.epochs) == (base_lr, batch, epochs)
    assert (optim.end_ratio, optim.weight_decay_end, optim.schedule) == (end_ratio, decay_end, "lin0")
    assert (optim.betas, optim.clip, optim.warmup, optim.start_ratio) == ((0.9, 0.95), 2.0, 0.02, 0.005)
    assert (recipe.data.crop, recipe.data.mirror) == ("var", False)


@pytest.mark.parametrize(
    ("name", "parameters"),  # of the published checkpoints
    [
        ("var-d16", 310_283_520),
        ("var-d20", 600_917_136),
        ("var-d24", 1_033_399_360),
        ("var-d30", 2_010_020_356),
        ("var-d36-512", 2_353_893_904),
        ("hmar-d16", 310_283_520),
        ("hmar-d16-masked", 467_691_904),
        ("hmar-d20-masked", 845_517_872),
        ("hmar-d24-masked", 1_384_328_960),
        ("hmar-d30-masked", 2_556_324_212),
        ("mar-b", 207_924_768),
        ("mar-l", 478_326_304),
        ("mar-h", 942_403_104),
        ("himar-b", 244_468_016),
        ("himar-l", 529_228_336),
        ("himar-h", 1_090_572_592),
    ],
)
def test_the_closed_formula_gives_the_published_parameter_counts(name: str, parameters: int) -> None:
    assert model_parameters(load_recipe(name)) == parameters


@pytest.mark.parametrize(("row", "millions"), list(zip(ABLATION, (245, 245, 239, 233), strict=True)))
def test_the_rows_of_the_ablation_have_the_sizes_of_the_paper(row: str, millions: int) -> None:
    parameters = model_parameters(load_recipe(f"himar-b-{row}"))
    assert parameters is not None
    assert abs(parameters / 1e6 - millions) < 0.6


@pytest.mark.parametrize("size", ["b", "cifar10"])
def test_the_rows_of_the_ablation_differ_in_what_table_5_says_alone(size: str) -> None:
    def row(name: str) -> tuple[str, str, str, str]:
        recipe = load_recipe(name)
        model = recipe.model
        assert isinstance(model, MaskedAr)
        assert (recipe.optim, recipe.train, recipe.objective, recipe.sample, recipe.data) == (
            (whole.optim, whole.train, whole.objective, whole.sample, whole.data)
        )
        return model.pivots, model.pivot_head, model.dense_head, model.scale_vector

    whole = load_recipe(f"himar-{size}")
    assert [row(f"himar-{size}{each}") for each in ["", *(f"-{row}" for row in ABLATION)]] == [
        ("conditional", "mlp", "transformer", "table"),
        ("visual", "mlp", "mlp", "none"),
        ("conditional", "mlp", "mlp", "none"),
        ("conditional", "mlp", "transformer", "none"),
        ("conditional", "transformer", "transformer", "none"),
    ]


@pytest.mark.parametrize(("name", "cfg"), [("mar-b", 2.9), ("mar-l", 3.0), ("mar-h", 3.2)])
def test_published_settings_of_mar(name: str, cfg: float) -> None:
    sample = load_recipe(name).sample
    assert isinstance(sample, MaskedArSample)
    assert (sample.steps, sample.cfg, sample.cfg_schedule, sample.temperature) == (256, cfg, "linear", 1.0)
    assert (sample.head_sampler, sample.head_steps) == ("ddpm", 100)


@pytest.mark.parametrize(
    ("name", "steps", "cfg", "pivot_cfg"),
    [("himar-b", 4, 2.5, 2.7), ("himar-l", 4, 3.5, 3.5), ("himar-h", 12, 3.2, 5.5)],
)
def test_published_settings_of_himar(name: str, steps: int, cfg: float, pivot_cfg: float) -> None:
    recipe = load_recipe(name)
    optim, train, sample, objective = recipe.optim, recipe.train, recipe.sample, recipe.objective
    assert (optim.base_lr * train.batch_size / 256, optim.schedule, optim.warmup) == (8e-4, "constant", 1 / 8)
    assert (optim.betas, optim.weight_decay, optim.clip, train.epochs) == ((0.9, 0.95), 0.02, 3.0, 800)
    assert (train.ema, recipe.grid, recipe.pivot_grid) == (0.9999, (16, 16), (8, 8))
    assert isinstance(sample, MaskedArSample) and isinstance(objective, MaskedArObjective)
    assert (sample.steps, sample.cfg, sample.pivot_cfg) == (steps, cfg, pivot_cfg)
    assert (sample.pivot_steps, sample.head_steps, sample.pivot_head_steps) == (32, 250, 100)
    assert objective.pivot_weight == pytest.approx(2 * 64 / 320)
    assert objective.dense_weight == pytest.approx(0.75 * 256 / 320)


@pytest.mark.parametrize("size", ["tiny", "cifar10", "tin40"])
def test_small_mar_and_himar_share_data_and_tokenizer(size: str) -> None:
    mar, himar = load_recipe(f"mar-{size}"), load_recipe(f"himar-{size}")
    kl = load_recipe(f"kl-{size}")
    assert (mar.data, mar.tokenizer) == (himar.data, himar.tokenizer) == (kl.data, kl.tokenizer)


# Overrides


def test_overrides_are_typed() -> None:
    recipe = load_recipe(
        "hmar-d16",
        [
            "train.batch_size=64",
            "optim.base_lr=1",
            "train.compile=false",
            "data.source=./my images=2/train",
            "objective.weighting=equal",
            "sample.schedule=[[1],[1,3],[9],[16],[25],[36],[64],[100],[169],[256]]",
            "optim.weight_decay_end=none",
            "name=mine",
        ],
    )
    assert recipe.train.batch_size == 64
    assert recipe.optim.base_lr == 1.0
    assert isinstance(recipe.optim.base_lr, float)
    assert recipe.train.compile is False
    assert recipe.data.source == "./my images=2/train"
    assert recipe.objective == NextScaleObjective(weighting="equal")
    assert recipe.sample.schedule[1] == (1, 3)
    assert recipe.optim.weight_decay_end is None
    assert recipe.name == "mine"


def test_the_last_override_wins() -> None:
    assert load_recipe("var-tiny", ["train.seed=1", "train.seed=2"]).train.seed == 2


def test_a_section_that_changes_its_kind_starts_anew() -> None:
    recipe = load_recipe("hmar-d16", ["objective.layers=4", "objective.kind=masked"])
    assert recipe.objective == MaskedObjective(layers=4)


def test_a_section_that_named_no_kind_is_of_the_first() -> None:
    recipe = load_recipe(
        "msvq-tiny", ["tokenizer.kind=kl", "tokenizer.channels=32", "objective.kind=kl", "objective.l2=0.5"]
    )
    assert recipe.tokenizer == Kl(channels=32)
    assert recipe.objective == KlObjective(l2=0.5)


def test_an_override_can_take_a_section_of_another_recipe() -> None:
    recipe = load_recipe("hmar-d16", ["optim.extends=hmar-d30", "optim.clip=1.5"])
    assert recipe.optim == dataclasses.replace(load_recipe("hmar-d30").optim, clip=1.5)


@pytest.mark.parametrize("text", ["batch_size", "train.", "a.b.c=1", "=3"])
def test_a_malformed_override_is_reported(text: str) -> None:
    assert any(text in line for line in mistakes("hmar-d16", text))


# Mistakes


def test_all_mistakes_are_reported_at_once() -> None:
    found = mistakes(
        "hmar-d16",
        "train.batch_size=many",
        "train.compile=1",
        "train.seed=-1",
        "train.seed_=3",
        "optim.momentum=0.9",
        "sample.top_p=1.5",
        "data.crop=centre",
        "tokenizer.scales=[1, 2, 'x']",
        "optim.betas=[0.9]",
        "model.width=1000",
        "modle.depth=3",
        "no-equals-sign",
    )
    text = "\n".join(found)
    assert 'train.batch_size: expected a whole number of at least 1, got "many"' in found
    assert "train.compile: expected true or false, got 1" in found
    assert "train.seed: expected a whole number of at least 0, got -1" in found
    assert "train.seed_: unknown setting; did you mean train.seed?" in found
    assert "optim.momentum: unknown setting" in text
    assert "sample.top_p: expected a number from 0 to 1, got 1.5" in found
    assert 'data.crop: expected "adm" or "var", got "centre"' in found
    assert "tokenizer.scales: expected a list, each a whole number or [height, width]" in text
    assert "optim.betas: expected a list of 2, each a number from 0 to 1, got [0.9]" in found
    assert "model.width: 1000 is not divisible by model.heads = 16" in found
    assert "modle: unknown section; did you mean [model]?" in found
    assert "--set no-equals-sign" in text
    assert len(found) == 12


@pytest.mark.parametrize(
    ("override", "suggestion"),
    [
        ("train.bach_size=1", "did you mean train.batch_size?"),
        ("train.base_lr=1", "did you mean optim.base_lr?"),
        ("optim.lr=1", "did you mean optim.base_lr?"),
        ("train.lr=abc", "did you mean optim.base_lr?"),
        ("train.learning_rate=1e6", "did you mean optim.base_lr?"),
        ("learning_rate=1", "did you mean optim.base_lr?"),
        ("objective.layers=4", 'objective.kind = "masked" has it'),
        ("sampel.cfg=1", "did you mean [sample]?"),
    ],
)
def test_an_unknown_key_is_answered_by_the_nearest(override: str, suggestion: str) -> None:
    (line,) = mistakes("hmar-d16", override)
    assert suggestion in line


def test_an_unknown_key_like_no_other_gets_no_suggestion() -> None:
    assert list(mistakes("hmar-d16", "train.zzz=1")) == ["train.zzz: unknown setting"]


@pytest.mark.parametrize(
    ("name", "overrides", "expected"),
    [
        ("hmar-d16", ["data.size=512"], "tokenizer.scales: the last, 16x16, times the stride 16"),
        ("hmar-d16", ["tokenizer.scales=[1,4,2,16]"], "expected scales that grow"),
        ("hmar-d16", ["tokenizer.scales=[]"], "expected one or more scales"),
        ("hmar-d16", ["tokenizer.multipliers=[]"], "tokenizer.multipliers: expected one or more levels"),
        ("hmar-d16", ["model.heads=24"], "1024 is not divisible by model.heads = 24"),
        ("hmar-d16", ["model.heads=256"], "4 channels a head"),
        ("hmar-d16", ["model.heads=2"], "512 channels a head"),
        ("himar-scenes", ["text.heads=5"], "text.width: 256 is not divisible by text.heads = 5"),
        ("hmar-d16-masked", ["objective.layers=17"], "17 blocks to finetune, but model.depth is 16"),
        ("hmar-d16-masked", ["model.pattern=causal"], 'model.pattern = "diagonal"'),
        ("hmar-d16-masked", ["sample.schedule=[[1],[2,3]]"], "expected a schedule of 10 scales, got 2"),
        ("hmar-d16", ["train.accumulate=5"], "768 is not divisible by train.accumulate, 5"),
        ("hmar-d16", ["data.crop=adm"], "data.crops: 10 crops of an image"),
        ("hmar-d16", ["tokenizer.vocab_size=65537"], "from 2 to 65536"),
        ("hmar-d16", ["optim.schedule=linear"], "optim.schedule: expected lin, lin0"),
        ("hmar-d16", ["optim.schedule=lin0.0"], "optim.schedule: expected lin, lin0"),
        ("hmar-d16", ["optim.schedule=exp", "optim.end_ratio=0"], "never reaches 0"),
        ("hmar-d16", ["optim.betas=[0.9, 1.0]"], "optim.betas: expected numbers below 1"),
        ("hmar-d16", ["objective.kind=msvq"], '"msvq" trains the tokenizer, so there is no [model]'),
        ("msvq-256", ["objective.kind=masked"], '"masked" trains a [model], and there is none'),
        (
            "hmar-d16",
            ["objective.kind=gan"],
            'objective.kind: expected "msvq" or "kl" or "next-scale" or "masked"',
        ),
        ("hmar-d16", ["model.kind=masked"], 'model.kind: expected "next-scale" or "masked-ar"'),
        ("hmar-d16", ["model.kind=[1]"], 'model.kind: expected "next-scale" or "masked-ar"'),
        ("hmar-d16", ["model=3"], "model: expected a section of settings, got 3"),
        ("hmar-d16", ["tokenizer.kind=kl"], 'tokenizer.kind: "next-scale" needs the kind "msvq", got "kl"'),
        (
            "hmar-d16",
            ["sample.kind=masked-ar"],
            'sample.kind: a model of kind "next-scale" needs "next-scale", got "masked-ar"',
        ),
        ("classifier-tiny", ["tokenizer.kind=kl"], "[tokenizer]: a classifier reads images"),
        ("classifier-tiny", ["text.kind=joint"], "[text]: only models of kind"),
        ("classifier-tiny", ["model.multipliers=[]"], "model.multipliers: expected one or more levels"),
        ("classifier-tiny", ["objective.kind=masked"], 'model.kind is "classifier"'),
        ("hmar-d16", ["train.ema=1"], "train.ema: expected a number from 0 to"),
        ("hmar-d16", ["train.epochs=0"], "train.epochs: expected a number above 0, got 0"),
    ],
)
def test_impossible_settings_are_one_clear_line(name: str, overrides: list[str], expected: str) -> None:
    (line,) = mistakes(name, *overrides)
    assert expected in line


@pytest.mark.parametrize("schedule", ["lin", "lin0", "lin00", "lin0.25", "cos", "exp", "constant"])
def test_every_schedule_is_accepted(schedule: str) -> None:
    assert load_recipe("var-tiny", [f"optim.schedule={schedule}"]).optim.schedule == schedule


def test_what_follows_from_a_wrong_setting_is_not_reported_too() -> None:
    assert len(mistakes("hmar-cifar10", "data.size=large")) == 1
    assert len(mistakes("hmar-cifar10", "data.sise=64")) == 1


def test_an_unknown_name_is_answered_by_the_nearest() -> None:
    with pytest.raises(UserError, match="no recipe named 'hmar-d61'") as caught:
        load_recipe("hmar-d61")
    assert "did you mean hmar-d16?" in caught.value.hint


# Files of the user


def test_a_file_extends_a_shipped_recipe_and_a_file_beside_it(tmp_path: Path) -> None:
    (tmp_path / "base").mkdir()
    write(
        tmp_path / "base", "a", 'extends = "hmar-d16"\ndescription = "mine"\n[train]\nepochs = 3\nseed = 5\n'
    )
    path = write(tmp_path, "b", 'extends = "./base/a.toml"\n[train]\nseed = 6\n')
    recipe = load_recipe(path)
    assert (recipe.train.epochs, recipe.train.seed, recipe.train.batch_size) == (3.0, 6, 768)
    assert (recipe.name, recipe.description) == ("b", "")


def test_a_section_extends_that_of_another_recipe_alone(tmp_path: Path) -> None:
    text = 'extends = "hmar-d16"\n[data]\nsize = 32\n[tokenizer]\nextends = "msvq-cifar10"\nvocab_size = 99\n'
    recipe = load_recipe(write(tmp_path, "mine", text))
    assert recipe.tokenizer == dataclasses.replace(load_recipe("msvq-cifar10").tokenizer, vocab_size=99)
    assert recipe.data.source == load_recipe("hmar-d16").data.source


def test_a_circle_is_reported(tmp_path: Path) -> None:
    write(tmp_path, "a", 'extends = "b.toml"\n')
    write(tmp_path, "b", '[data]\nextends = "./c.toml"\n')
    path = write(tmp_path, "c", 'extends = "a.toml"\n')
    assert any("in a circle: c -> a -> b -> c" in line for line in mistakes(path))


def test_mistakes_of_parents_and_unknown_parents_are_reported_together(tmp_path: Path) -> None:
    write(tmp_path, "a", 'extends = "nowhere"\n[train]\nbatch = "x"\n')
    path = write(tmp_path, "b", 'extends = "a.toml"\n[tokenizer]\nextends = 3\n[data]\nsize = "x"\n')
    found = "\n".join(mistakes(path))
    assert "extends: no recipe named 'nowhere'" in found
    assert "tokenizer.extends: expected the name or path of a recipe, got 3" in found
    assert "data.size: expected a whole number or [height, width]" in found
    assert "train.batch: unknown setting" in found


def test_broken_toml_and_missing_files_are_reported(tmp_path: Path) -> None:
    (line,) = mistakes(write(tmp_path, "a", "[data\n"))
    assert "a.toml: not valid TOML" in line
    with pytest.raises(UserError, match=r"no recipe file .*none\.toml"):
        load_recipe(str(tmp_path / "none.toml"))


def test_a_non_square_recipe_survives_writing(tmp_path: Path) -> None:
    text = (
        'extends = "var-tiny"\ndescription = "a \\"quote\\", [1, 2]"\n[data]\nsize = [32, 48]\n'
        "[tokenizer]\nscales = [1, [2, 3], [4, 6], [8, 12]]\n[optim]\nbase_lr = 1.2345678901234567e-05\n"
        "weight_decay_end = 0.1\n"
    )
    recipe = load_recipe(write(tmp_path, "wide", text))
    assert recipe.scales.grid == (8, 12)
    assert recipe.description == 'a "quote", [1, 2]'
    assert recipe_from_dict(tomli.loads(to_toml(recipe))) == recipe


def test_the_written_recipe_is_complete() -> None:
    table = tomli.loads(to_toml(load_recipe("hmar-d30")))
    assert "extends" not in table
    assert {each.name for each in dataclasses.fields(Recipe)} - {"text"} == set(table)  # it takes no captions
    assert table["objective"] == {"kind": "next-scale", "weighting": "lognormal", "label_drop": 0.1}


def test_a_checkpoint_recipe_with_a_mistake_is_refused() -> None:
    table = tomli.loads(to_toml(load_recipe("msvq-256")))
    assert isinstance(recipe_from_dict(table).objective, MsvqObjective)
    table["train"]["epoch"] = 3
    with pytest.raises(UserError, match="recipe msvq-256 has a mistake"):
        recipe_from_dict(table)


def test_attention_takes_the_names_of_the_kernels() -> None:
    from hmar_kernels import IMPLEMENTATIONS

    assert set(get_args(Attention)) == {"auto", "measure", *IMPLEMENTATIONS}


def test_recipes_need_no_torch() -> None:
    code = "import sys, hmar_cli.recipe as r; r.load_recipe('hmar-d16'); print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
