"""The configuration: what it refuses, and that it survives the way through TOML and JSON."""

from __future__ import annotations

import dataclasses
import json
import tomllib
from pathlib import Path
from typing import Any, get_args

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cllm_gpu.config import (
    Config,
    DataConfig,
    ModelConfig,
    OptimizerConfig,
    SizeName,
    TrainingConfig,
    as_dict,
    from_dict,
    load_toml,
    to_toml,
)
from cllm_gpu.config_aliases import ALIASES
from cllm_gpu.model.architecture import SIZES, Architecture, LatticeTerms
from cllm_gpu.model.parameters import Layout, parameter_specs
from cllm_gpu.model.recompute import LEVELS
from cllm_gpu.utils.errors import UserError

PUBLISHED = {"gpt2": 124_439_808, "gpt2-medium": 354_823_168, "gpt2-large": 774_030_080, "gpt2-xl": 1_557_611_200}
"""Parameters of the released GPT-2 models (50,257 tokens), as counted by Hugging Face transformers."""

texts = st.text(st.characters(exclude_categories=("Cs",)), max_size=20)
configs = st.builds(
    Config,
    model=st.builds(
        ModelConfig,
        size=st.sampled_from(sorted(SIZES)),
        layers=st.none() | st.integers(1, 99),
        dropout=st.floats(0, 0.75, width=32, allow_subnormal=False),
        bias=st.booleans(),
        attention=st.sampled_from(["standard", "crystalline"]),
        lattice=st.builds(
            LatticeTerms, matches=st.integers(0, 8), symmetry_fraction=st.floats(0, 1, width=32, allow_subnormal=False)
        ),
    ),
    data=st.builds(DataConfig, source=texts.filter(str.strip), cache=st.none() | st.just(Path("a b/ä\"'\\c"))),
    optimizer=st.builds(OptimizerConfig, rate=st.floats(1e-12, 1e6), epsilon=st.floats(2.0**-126, 1.0)),
    training=st.builds(
        TrainingConfig,
        batch=st.just("auto") | st.integers(1, 999),
        recompute=st.sampled_from(LEVELS),
        seed=st.integers(0, 2**64 - 1),
        sample_prompt=texts,
    ),
    backend=st.none() | st.just("numpy"),
)


@given(configs)
def test_toml_and_json_give_back_what_was_written(config: Config) -> None:
    assert from_dict(tomllib.loads(to_toml(config))) == config
    assert from_dict(json.loads(json.dumps(as_dict(config)))) == config


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ({"modle": {}}, "unknown key modle; did you mean model?"),
        ({"model": {"layrs": 3}}, "unknown key model.layrs; did you mean layers?"),
        ({"model": 3}, "model is a section; write it as [model]"),
        ({"model": {"layers": "x"}}, "model.layers is 'x'; it must be of type int"),
        ({"model": {"layers": 2.5}}, "model.layers is 2.5; it must be of type int"),
        ({"model": {"bias": 1}}, "model.bias is 1; it must be of type bool"),
        ({"training": {"steps": True}}, "training.steps is True; it must be of type int"),
        ({"optimizer": {"name": "adamx"}}, "optimizer.name is 'adamx'; choose one of sgd, adam, adamw"),
        ({"optimizer": {"rate": 0}}, "optimizer.rate is 0.0; it must be above 0"),
        ({"optimizer": {"rate": -1}}, "optimizer.rate is -1.0; it must be above 0"),
        ({"optimizer": {"lattice_rate": 0}}, "optimizer.lattice_rate is 0.0; it must be above 0"),
        ({"model": {"attention": "quartz"}}, "model.attention is 'quartz'; choose one of standard, crystalline"),
        ({"model": {"lattice": 3}}, "model.lattice is a section; write it as [model.lattice]"),
        ({"model": {"lattice": {"mathces": 3}}}, "unknown key model.lattice.mathces; did you mean matches?"),
        ({"model": {"lattice": {"matches": 9}}}, "model.lattice.matches is 9; it must lie between 0 and 8"),
        ({"optimizer": {"weight_decay": -0.1}}, "optimizer.weight_decay is -0.1"),
        ({"optimizer": {"beta2": 1.0}}, "optimizer.beta2 is 1.0; it must be at least 0 and below 1"),
        ({"schedule": {"minimum_rate": 1.0}}, "must lie between 0 and optimizer.rate"),
        ({"schedule": {"warmup_steps": -1}}, "schedule.warmup_steps is -1"),
        ({"schedule": {"decay_fraction": 1.5}}, "schedule.decay_fraction is 1.5"),
        ({"training": {"batch": 0}}, "training.batch is 0; it must be at least 1"),
        ({"training": {"micro_batch": 5}}, "training.micro_batch is 5, which does not divide training.batch 16"),
        ({"training": {"batch": "many"}}, "training.batch is 'many'; it must be of type int or auto"),
        ({"training": {"batch": "auto", "micro_batch": 4}}, "training.batch is auto, but training.micro_batch is 4"),
        ({"training": {"batch": "auto", "micro_batch": "auto"}}, "only one of the two is what fits"),
        ({"training": {"recompute": "all"}}, "training.recompute is 'all'; choose one of none, pointwise, block"),
        ({"training": {"recompute": "block", "diagnose_every": 9}}, "training.diagnose_every needs training.recompute"),
        ({"training": {"seed": -1}}, "training.seed is -1"),
        ({"training": {"workers": 0}}, "training.workers is 0"),
        ({"data": {"validation_fraction": 0.0}}, "data.validation_fraction is 0.0"),
    ],
)
def test_what_is_refused(values: dict[str, Any], expected: str) -> None:
    with pytest.raises(UserError) as caught:
        from_dict(values)
    assert expected in str(caught.value)


@pytest.mark.parametrize("loop", [{"batch": "auto"}, {"batch": 4, "micro_batch": "auto"}])
def test_auto_is_no_number_yet(loop: dict[str, Any]) -> None:
    config = from_dict({"training": loop})
    assert from_dict(tomllib.loads(to_toml(config))) == config
    name = "batch" if config.training.batch == "auto" else "micro_batch"
    with pytest.raises(UserError, match=rf"^training\.{name} is auto, which only train finds a number for; give one$"):
        _ = config.training.at_once
    assert TrainingConfig(batch=6).at_once == TrainingConfig(batch=12, micro_batch=6).at_once == 6


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"heads": 3}, "model.heads is 3, which does not divide model.width 128"),
        ({"kv_heads": 3}, "model.kv_heads is 3, which does not divide model.heads 4"),
        ({"layers": 0}, "model.layers is 0; it must be at least 1"),
        ({"width": -4}, "model.width is -4; it must be at least 1"),
        ({"dropout": 1.0}, "model.dropout is 1.0"),
        ({"width": 12, "positions": "rope"}, "must be even"),
    ],
)
def test_impossible_models(changes: dict[str, Any], expected: str) -> None:
    with pytest.raises(UserError) as caught:
        dataclasses.replace(ModelConfig(), **changes).architecture(257)
    assert expected in str(caught.value)


def test_one_line_turns_crystalline_attention_on(tmp_path: Path) -> None:
    path = tmp_path / "run.toml"
    path.write_text('model.attention = "crystalline"\n')
    assert load_toml(path).model.architecture(257).lattice == LatticeTerms()
    path.write_text('[model]\nattention = "crystalline"\n[model.lattice]\nmatches = 5\nsame_token = false\n')
    lattice = load_toml(path).model.architecture(257).lattice
    assert lattice is not None
    assert lattice.scalars == ("match_1", "match_2", "match_3", "match_4", "match_5")
    path.write_text('[model]\nattention = "standard"\n[model.lattice]\nmatches = 5\n')  # not switched on: nothing
    assert load_toml(path).model.architecture(257).lattice is None


def test_the_cllm_sizes_are_crystalline_and_the_gpt2_sizes_are_not() -> None:
    seen = {size: ModelConfig(size=size).architecture(257).lattice for size in get_args(SizeName) if size != "custom"}
    assert {size for size, lattice in seen.items() if lattice == LatticeTerms()} == {"tiny", "mini", "small"}
    assert {size for size, lattice in seen.items() if lattice is None} == set(seen) - {"tiny", "mini", "small"}
    assert ModelConfig(size="gpt2", attention="crystalline").architecture(257).lattice == LatticeTerms()


@pytest.mark.parametrize("lattice", [None, LatticeTerms(matches=1, symmetry_fraction=0.25)])
def test_an_architecture_survives_a_manifest(lattice: LatticeTerms | None) -> None:
    architecture = dataclasses.replace(ModelConfig().architecture(257), lattice=lattice)
    values = json.loads(json.dumps(architecture.as_dict()))
    assert Architecture.from_dict(values) == architecture
    assert ("lattice" in values) is (lattice is not None)


def test_a_new_field_of_an_architecture_is_written_where_it_is_not_at_its_default() -> None:
    """So the versions before it read every model that they can compute, and it reads theirs."""
    own = ModelConfig().architecture(257)
    later = dataclasses.make_dataclass("Later", [("since_then", str, "as before")], bases=(Architecture,), frozen=True)
    values = {f.name: getattr(own, f.name) for f in dataclasses.fields(own)}
    assert later(**values).as_dict() == own.as_dict()
    assert later(**values, since_then="new").as_dict() == own.as_dict() | {"since_then": "new"}
    assert later.from_dict(own.as_dict()) == later(**values)
    with pytest.raises(TypeError, match="since_then"):
        Architecture.from_dict(later(**values, since_then="new").as_dict())


def test_a_vocabulary_has_a_limit() -> None:
    assert ModelConfig().architecture(2**20).vocabulary == 2**20
    with pytest.raises(UserError, match="at most 1048576"):
        ModelConfig().architecture(2**20 + 1)


def test_files(tmp_path: Path) -> None:
    path = tmp_path / "run.toml"
    with pytest.raises(UserError, match="does not exist"):
        load_toml(path)
    path.write_bytes(b"\xff")
    with pytest.raises(UserError, match="cannot read"):
        load_toml(path)
    path.write_text("[model\n")
    with pytest.raises(UserError, match="is not valid TOML"):
        load_toml(path)
    path.write_text('[model]\nsize = "gpt2"\nheads = 6\n')
    assert load_toml(path).model.architecture(10) == Architecture(
        10, context=1024, layers=12, heads=6, kv_heads=6, width=768, mlp_width=3072
    )


@pytest.mark.parametrize("size", sorted(PUBLISHED))
def test_named_sizes_are_the_published_ones(size: Any) -> None:
    layout = Layout(parameter_specs(ModelConfig(size=size).architecture(50257)), "float32")
    assert layout.count == PUBLISHED[size]


def test_other_trainers_names_are_settings() -> None:
    named = {
        "model": {"n_layer": 3, "d_model": 48, "num_attention_heads": 3, "block_size": 32},
        "optimizer": {"lr": 1e-3, "max_grad_norm": 0.5},
        "training": {"batch_size": 8, "max_steps": 7},
    }
    config = from_dict(named)
    assert (config.model.layers, config.model.width, config.model.heads, config.model.context) == (3, 48, 3, 32)
    assert (config.optimizer.rate, config.optimizer.clip_norm) == (1e-3, 0.5)
    assert (config.training.batch, config.training.steps) == (8, 7)


def test_a_setting_by_two_names_is_refused() -> None:
    expected = "optimizer.rate and optimizer.lr are names of one setting, rate: give one of them"
    with pytest.raises(UserError, match=expected):
        from_dict({"optimizer": {"rate": 1e-3, "lr": 1e-3}})


def test_aliases_stand_for_settings_and_are_none_themselves() -> None:
    for section, settings in ALIASES.items():
        names = {f.name for f in dataclasses.fields(getattr(Config(), section))}
        aliases = [alias for others in settings.values() for alias in others]
        assert set(settings) <= names
        assert not names & set(aliases)
        assert len(aliases) == len(set(aliases))


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [
        ("epsilon", 1e-50, "optimizer.epsilon is 1e-50: in float32 it must be 0 or lie between 1.18e-38 and 3.4e+38"),
        ("rate", 1e39, "optimizer.rate is 1e+39: in float32 it must be 0 or lie between 1.18e-38 and 3.4e+38"),
        ("beta2", 1 - 1e-10, "optimizer.beta2 is 0.9999999999, which in float32 is 1; it must be below"),
        ("rate", 3e38, "optimizer.lattice_rate times optimizer.rate is 9e+39: in float32 it must be 0 or lie between "),
    ],
)
def test_settings_that_float32_cannot_hold_are_refused(name: str, value: float, words: str) -> None:
    with pytest.raises(UserError) as caught:
        Config(optimizer=OptimizerConfig(**{name: value}))  # type: ignore[arg-type]
    assert str(caught.value).startswith(words)
