from __future__ import annotations

import math

import pytest

from chiasm.config import to_mapping, to_toml
from chiasm.errors import ConfigError
from chiasm.train.recipe import DataConfig, LossConfig, OptimConfig, Recipe, RunConfig, expand_path, load_recipe

SMALL = """
name = "small"
seed = 3
[data]
source = "pairs.csv"
texts = ["an image of {tissue}"]
[data.words.tissue]
"0" = ["stroma"]
"1" = ["tumour", "carcinoma"]
[image]
kind = "vit"
image_size = 64
patch_size = 16
width = 64
layers = 2
heads = 2
[text]
context_length = 32
width = 64
layers = 2
heads = 2
[projection]
dim = 32
[loss]
kind = "multi_positive"
[optim]
lr = 1e-3
betas = [0.9, 0.95]
[run]
log = ["tensorboard"]
"""


def write(folder, text=SMALL, name="small.toml"):
    path = folder / name
    path.write_text(text)
    return path


def test_a_recipe_becomes_dataclasses(tmp_path):
    recipe = load_recipe(write(tmp_path), ["optim.lr=2e-4", "run.select=loss", "run.log=[]"])
    assert recipe.seed == 3
    assert recipe.optim.lr == 2e-4
    assert recipe.optim.betas == (0.9, 0.95)
    assert recipe.run == RunConfig(select="loss")
    assert recipe.data.source == str(tmp_path / "pairs.csv")
    assert recipe.data.words["tissue"]["1"] == ("tumour", "carcinoma")
    config = recipe.encoder_config()
    assert config.preprocess.size == 64
    assert config.tokenizer == {"kind": "clip", "context_length": 32}
    assert config.logit_bias_init is None


def test_the_resolved_recipe_reads_back_the_same(tmp_path):
    recipe = load_recipe(write(tmp_path))
    again = load_recipe(write(tmp_path, to_toml(recipe), "resolved.toml"))
    assert again == recipe
    assert to_mapping(again) == to_mapping(recipe)


def test_the_name_defaults_to_the_file(tmp_path):
    assert load_recipe(write(tmp_path, '[data]\nphantoms = "chest"\n', "my-run.toml")).name == "my-run"


def test_siglip_brings_its_bias_and_scale():
    config = Recipe("x", loss=LossConfig("siglip")).encoder_config()
    assert config.logit_bias_init == -10.0
    assert config.logit_scale_init == pytest.approx(math.log(10))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("optim.learning_rat=1", "unknown field `optim.learning_rat`"),
        ("optim.warmup_step=1", "did you mean `optim.warmup_steps`"),
        ("data.colums={}", "did you mean `data.columns`"),
        ("image.widht=3", "did you mean `image.width`"),
        ("optimm={}", "did you mean `optim`"),
        ('loss.kind="infonse"', "did you mean `infonce`"),
        ('optim.lr="fast"', "`optim.lr` must be float, got str"),
        ("optim.lr=-1", "`optim.lr` must be positive"),
        ("optim.lr=nan", "`optim.lr` must be a finite number"),
        ("optim.batch_size=1", "`optim.batch_size` must be at least 2"),
        ("optim.betas=[0.9]", "`optim.betas` must have 2 items"),
        ("optim.betas=[0.9, 1.0]", "`optim.betas` must be in"),
        ("optim.grad_cache_chunk=0", "`optim.grad_cache_chunk` must be at least 1"),
        ("optim.clip_norm=0", "`optim.clip_norm` must be positive"),
        ("optim.warmup_fraction=2", "`optim.warmup_fraction` must be in"),
        ("run.log_every=0", "`run.log_every` must be at least 1"),
        ("run.patience=-1", "`run.patience` must not be negative"),
        ('run.log=["tensorbord"]', "did you mean `tensorboard`"),
        ('run.select="recal_at_10"', "did you mean `recall_at_10`"),
        ("loss.tile=0", "`loss.tile` must be at least 1"),
        ('data.phantoms="chest"', "exclude each other"),
        ("data.validation=1.5", "`data.validation` must be in"),
        ('data.validation_splits=["train"]', "share"),
        ('data.drop_texts=["("]', "no regular expression"),
        ('data.words.tissue.1=[]', "`data.words.tissue.1` lists no words"),
        ("seed=-1", "`seed` must not be negative"),
        ('name="../x"', "`name` must be made of"),
        ('start="ViT-B-32"', "`image` comes from `start`"),
        ("image.patch_size=7", "`image.image_size` must be a multiple"),
        ("preprocess.sise=3", "did you mean `preprocess.size`"),
        ("preprocess.size=3", "`preprocess.size` is 3"),
        ("tokenizer.context_length=5", "`tokenizer.context_length` is 5"),
    ],
)  # fmt: skip
def test_typos_and_nonsense_name_the_field(tmp_path, change, message):
    with pytest.raises(ConfigError, match=message):
        load_recipe(write(tmp_path), [change])


def test_missing_and_broken_files(tmp_path):
    with pytest.raises(ConfigError, match=r"`none.toml` does not exist"):
        load_recipe(tmp_path / "none.toml")
    with pytest.raises(ConfigError, match="not valid TOML"):
        load_recipe(write(tmp_path, "= 3"))
    with pytest.raises(ConfigError, match=r"`data\.source` and `data\.phantoms`"):
        load_recipe(write(tmp_path, "seed = 1\n"))
    with pytest.raises(ConfigError):
        DataConfig()


def test_paths_keep_their_variables_until_used(tmp_path, monkeypatch):
    recipe = load_recipe(write(tmp_path), ['data.source="${DATA_HERE}/a/b.csv"'])
    assert recipe.data.source == "${DATA_HERE}/a/b.csv"
    monkeypatch.delenv("DATA_HERE", raising=False)
    with pytest.raises(ConfigError, match="`DATA_HERE`, which is not set"):
        expand_path(recipe.data.source, "data.source")
    monkeypatch.setenv("DATA_HERE", "/x")
    assert expand_path(recipe.data.source, "data.source") == "/x/a/b.csv"
    assert expand_path("$DATA_HERE/c", "data.source") == "/x/c"


def test_the_digest_ignores_where_and_how_often(tmp_path):
    recipe = load_recipe(write(tmp_path))
    same = load_recipe(write(tmp_path), ["run.log_every=3", 'description="x"', 'data.source="other.csv"'])
    other = load_recipe(write(tmp_path), ["optim.lr=1"])
    assert recipe.digest == same.digest != other.digest
    assert recipe.training.digest == same.training.digest != other.training.digest


def test_defaults_are_valid():
    assert OptimConfig().grad_cache_chunk is None
    assert Recipe("x").training.optim == OptimConfig()
