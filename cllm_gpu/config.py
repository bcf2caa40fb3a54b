"""The typed configuration. The command line, the TOML file and the manifest of a run are all made from it.

Precedence: the defaults here, then the TOML file (`--config`), then the flags.
"""

from __future__ import annotations

import dataclasses
import math
import os
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from cllm_gpu.config_aliases import in_full
from cllm_gpu.model.architecture import SIZES, Architecture, LatticeTerms
from cllm_gpu.model.recompute import Recompute
from cllm_gpu.ops.precision import Precision
from cllm_gpu.utils.dataclass_from_dict import dataclass_from_dict
from cllm_gpu.utils.errors import UserError

SizeName = Literal["tiny", "mini", "small", "gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl", "custom"]
Auto = Literal["auto"]
INITIAL = "initial"
"""Name of the tokenizer of the model that training begins from."""
NO_PATHS = ("stdlib", "patterns", "bytes", INITIAL)
"""Names of sources and tokenizers that are no paths."""


LEAST_FLOAT32, LARGEST_FLOAT32 = 2.0**-126, (2 - 2.0**-23) * 2.0**127
"""Absolute values that float32 holds with all its digits, 0 aside."""
_RANGE = f"in float32 it must be 0 or lie between {LEAST_FLOAT32:.3g} and {LARGEST_FLOAT32:.3g}"


@dataclass(frozen=True)
class ModelConfig:
    """The model; what is None is as the named size says."""

    size: SizeName = "mini"
    """Named size: decides layers, heads, width and context. custom: these four are given."""
    layers: int | None = None
    """Number of blocks."""
    heads: int | None = None
    """Query heads; must divide the width."""
    kv_heads: int | None = None
    """Key/value heads; must divide the query heads (None: as many)."""
    width: int | None = None
    """Model width."""
    mlp_width: int | None = None
    """Hidden width of the MLP (None: 4 times the width)."""
    context: int | None = None
    """Tokens in a training sequence."""
    vocabulary: int | None = None
    """Token ids the model has room for (None: as many as the tokenizer has)."""
    positions: Literal["learned", "rope"] = "learned"
    """Learned position embedding, or rotary embedding of queries and keys."""
    tied_head: bool = True
    """The output projection shares the token embedding."""
    bias: bool = True
    """Biases in linear layers and layer norms."""
    dropout: float = 0.0
    """Dropout on the embedding and on every residual branch."""
    attention: Literal["standard", "crystalline"] | None = None
    """Standard attention, or crystalline: it sees the lattice of the tokens' primes, as the section lattice says (None:
    standard for the gpt2 sizes, else crystalline)."""
    lattice: LatticeTerms = field(default_factory=LatticeTerms)
    """What crystalline attention sees."""

    @property
    def sees_lattice(self) -> bool:
        """Attention is crystalline."""
        if self.attention is None:
            return not self.size.startswith("gpt2")
        return self.attention == "crystalline"

    def architecture(self, vocabulary: int) -> Architecture:
        """The model's shape for a vocabulary. Raises UserError when it is impossible."""
        for name in ("layers", "heads", "width", "context", "vocabulary", "kv_heads", "mlp_width"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise UserError(f"model.{name} is {value}; it must be at least 1")
        sizes = SIZES.get(self.size, {})
        chosen: dict[str, Any] = {}
        for name in ("layers", "heads", "width", "context"):
            chosen[name] = getattr(self, name) or sizes.get(name)
            if chosen[name] is None:
                raise UserError(f"model.size is {self.size}, which does not say model.{name}: give it too")
        if self.vocabulary is not None and self.vocabulary < vocabulary:
            raise UserError(f"model.vocabulary is {self.vocabulary}; the data has {vocabulary} token ids")
        chosen["vocabulary"] = self.vocabulary or vocabulary
        chosen["kv_heads"] = self.kv_heads or chosen["heads"]
        chosen["mlp_width"] = self.mlp_width or 4 * chosen["width"]
        chosen["lattice"] = self.lattice if self.sees_lattice else None
        as_they_are = {f.name: getattr(self, f.name) for f in dataclasses.fields(Architecture)}
        return Architecture(**as_they_are | chosen)

    @classmethod
    def of(cls, architecture: Architecture) -> ModelConfig:
        """The section whose `architecture` is this one, everything written out."""
        values = {f.name: getattr(architecture, f.name) for f in dataclasses.fields(architecture)}
        lattice = values.pop("lattice")
        attention: Literal["standard", "crystalline"] = "crystalline" if lattice else "standard"
        return cls(size="custom", attention=attention, lattice=lattice or LatticeTerms(), **values)


@dataclass(frozen=True)
class DataConfig:
    """What is learnt."""

    source: str = "stdlib"
    """"stdlib" (the Python standard library's own text), "patterns" (synthetic), or a file of text, JSON lines, JSON,
    CSV or Parquet (also .gz, .zst), folder, glob, folder of prepared shards, or .bin token ids."""
    tokenizer: str = "bytes"
    """"bytes", the path of a tokenizer.json, or "initial": that of the model in --initial."""
    end_of_text: str | None = None
    """The token of a tokenizer.json that ends a text (None: what the files beside it say, else the usual name)."""
    text_field: str = "text"
    """Of records (JSON lines, JSON, CSV, Parquet), the field that holds the text."""
    separator: str | None = None
    """Text that stands between documents of a text, as "<|endoftext|>" (None: each file is one document)."""
    dtype: Literal["uint16", "uint32"] | None = None
    """.bin files hold bare token ids of this type, as nanoGPT's train.bin and val.bin (None: llm.c's shards)."""
    validation: str | None = None
    """Text, or .bin files, for validation: all of it (None: a share of the source)."""
    validation_fraction: float = 0.05
    """Share of the documents kept for validation."""
    seed: int = 1
    """Of the choice of documents for validation."""
    cache: Path | None = None
    """Folder of prepared token shards (None: the user's cache folder)."""


@dataclass(frozen=True)
class OptimizerConfig:
    """How a gradient becomes an update."""

    name: Literal["sgd", "adam", "adamw"] = "adamw"
    """SGD with momentum, Adam with L2 decay, or AdamW with decoupled decay."""
    rate: float = 2e-3
    """Peak learning rate; the default suits the sizes up to small, about 6e-4 suits gpt2."""
    momentum: float = 0.9
    """SGD only."""
    beta1: float = 0.9
    """Decay of the first moment."""
    beta2: float = 0.999
    """Decay of the second moment."""
    epsilon: float = 1e-8
    """Added to the root of the second moment."""
    weight_decay: float = 0.0
    """On matrices only: L2 in SGD and Adam, decoupled in AdamW."""
    clip_norm: float = 1.0
    """Largest global gradient norm; 0 switches clipping off."""
    master_weights: bool = True
    """bf16 only: the optimizer keeps the weights in float32 too. Without, it rounds them stochastically."""
    lattice_rate: float = 30.0
    """Learning rate of the lattice's scalars, as a multiple of `rate`: they move by whole units."""


@dataclass(frozen=True)
class ScheduleConfig:
    """The learning rate over the steps; a linear warmup stands before any of them."""

    name: Literal["constant", "linear", "cosine", "step", "wsd"] = "cosine"
    """Shape after the warmup; wsd: warmup-stable-decay."""
    warmup_steps: int = 50
    """Steps from 0 up to the peak rate."""
    minimum_rate: float = 0.0
    """Rate at the end, and the least rate at any step after the warmup."""
    step_every: int = 1000
    """step: steps between two drops."""
    step_factor: float = 0.5
    """step: what each drop multiplies the rate by."""
    decay_fraction: float = 0.2
    """wsd: share of the steps, at the end, over which the rate falls linearly."""


@dataclass(frozen=True)
class TrainingConfig:
    """The loop."""

    steps: int = 1200
    """Optimizer steps in all."""
    batch: int | Auto = 16
    """Sequences per step. auto: the most for which the device has memory."""
    minutes: float | None = None
    """Minutes of a command after which training saves and stops, to be resumed: a little less than a batch system's
    limit (None: no limit)."""
    micro_batch: int | Auto | None = None
    """Sequences computed at a time, gradients accumulated over them (None: the whole batch); divides the batch; auto:
    the most for which the device has memory."""
    recompute: Recompute = "none"
    """What the backward computes again to save memory: nothing, layer norms and GELU (pointwise), or whole blocks."""
    seed: int = 1
    """Of the initial weights, the batches and the dropout masks."""
    capture: bool = True
    """On a GPU (and its simulator): capture a step as a graph and replay it; off: launch every kernel by itself."""
    workers: int | None = None
    """Threads a CPU splits a micro-batch over (None: one per core)."""
    evaluate_every: int = 250
    """Steps between two evaluations; 0: only at the end."""
    evaluation_batches: int = 20
    """Validation batches of an evaluation; 0: all."""
    checkpoint_every: int = 500
    """Steps between two checkpoints; 0: only at the end."""
    keep_last: int = 2
    """Checkpoints kept besides the best one."""
    maximum_skipped: int = 5
    """Skipped steps in a row after which training stops."""
    spike_window: int = 0
    """Steps over which loss and gradient norm are watched for spikes; 0: off."""
    spike_deviations: float = 6.0
    """A step this many standard deviations above the window's mean is skipped."""
    sample_tokens: int = 300
    """Length of the text generated at the end; 0: none."""
    sample_every: int = 0
    """Steps between two texts generated on the way, kept with the metrics; 0: only at the end."""
    diagnose_every: int = 0
    """Steps between two looks at gradients, updates and activations by layer, kept with the run for
    `cllm-gpu report --diagnostics`; 0: none."""
    tensorboard: bool = False
    """Write TensorBoard events too, into the run's folder; needs the extra `tensorboard`."""
    sample_prompt: str | None = None
    """What the sample starts with; empty: a new document (None: "def " after the standard library, else empty)."""

    @property
    def sequences(self) -> int:
        """`batch` as a number. UserError where it is still auto: `auto_batch.decide_batch` makes a number of it."""
        return _number("batch", self.batch)

    @property
    def at_once(self) -> int:
        """Sequences computed at a time. UserError as for `sequences`."""
        return self.sequences if self.micro_batch is None else _number("micro_batch", self.micro_batch)


def _number(name: str, value: int | Auto) -> int:
    if value == "auto":
        raise UserError(f"training.{name} is auto, which only train finds a number for; give one")
    return value


@dataclass(frozen=True)
class Config:
    """A whole run."""

    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    training: TrainingConfig = field(default_factory=TrainingConfig)
    backend: str | None = None
    """auto, numpy, native, cupy or simulator (None: $CLLM_BACKEND, else auto)."""
    precision: Precision = "fp32"
    """fp32; tf32: matrix products of TF32 on a GPU; bf16: parameters, activations and gradients of bfloat16."""
    output: Path | None = None
    """Folder of the run: configuration, metrics, checkpoints (None: the next free number in runs/)."""
    initial: Path | None = None
    """Run or checkpoint whose weights training begins from, with a fresh optimizer, schedule and step; the model's
    shape and the tokenizer are then that model's (None: weights drawn from the seed)."""

    def __post_init__(self) -> None:
        for rule, message in _rules(self):
            if not rule:
                raise UserError(message)

    @property
    def prompt(self) -> str:
        """What the sample at the end starts with."""
        if self.training.sample_prompt is not None:
            return self.training.sample_prompt
        return "def " if (self.data.source, self.data.tokenizer) == ("stdlib", "bytes") else ""


def _rules(c: Config) -> list[tuple[bool, str]]:
    """What every configuration must satisfy, and the line to say when it does not."""
    o, s, t, d = c.optimizer, c.schedule, c.training, c.data
    rules = [
        (_positive(o.rate), f"optimizer.rate is {o.rate}; it must be above 0"),
        (0 <= o.momentum < 1, f"optimizer.momentum is {o.momentum}; it must be at least 0 and below 1"),
        (0 <= o.beta1 < 1, f"optimizer.beta1 is {o.beta1}; it must be at least 0 and below 1"),
        (0 <= o.beta2 < 1, f"optimizer.beta2 is {o.beta2}; it must be at least 0 and below 1"),
        (_positive(o.epsilon), f"optimizer.epsilon is {o.epsilon}; it must be above 0"),
        (_not_negative(o.weight_decay), f"optimizer.weight_decay is {o.weight_decay}; it must be at least 0"),
        (_positive(o.lattice_rate), f"optimizer.lattice_rate is {o.lattice_rate}; it must be above 0"),
        (_not_negative(o.clip_norm), f"optimizer.clip_norm is {o.clip_norm}; it must be at least 0 (0: off)"),
        (
            o.master_weights or c.precision == "bf16",
            f"optimizer.master_weights is false, but precision is {c.precision}: only bf16 can do without them",
        ),
        (s.warmup_steps >= 0, f"schedule.warmup_steps is {s.warmup_steps}; it must be at least 0"),
        (
            0 <= s.minimum_rate <= o.rate,
            f"schedule.minimum_rate is {s.minimum_rate}; it must lie between 0 and optimizer.rate {o.rate}",
        ),
        (s.step_every >= 1, f"schedule.step_every is {s.step_every}; it must be at least 1"),
        (0 < s.step_factor <= 1, f"schedule.step_factor is {s.step_factor}; it must be above 0 and at most 1"),
        (0 <= s.decay_fraction <= 1, f"schedule.decay_fraction is {s.decay_fraction}; it must lie between 0 and 1"),
        (
            0 < d.validation_fraction <= 0.5,
            f"data.validation_fraction is {d.validation_fraction}; it must be above 0 and at most 0.5",
        ),
        (
            t.batch != "auto" or t.micro_batch is None,
            f"training.batch is auto, but training.micro_batch is {t.micro_batch}: only one of the two is what fits",
        ),
        (
            not isinstance(t.batch, int) or not isinstance(t.micro_batch, int) or _divides(t.micro_batch, t.batch),
            f"training.micro_batch is {t.micro_batch}, which does not divide training.batch {t.batch}",
        ),
        (
            t.recompute == "none" or t.diagnose_every == 0,
            f"training.diagnose_every needs training.recompute none: with {t.recompute} no layer keeps all it looks at",
        ),
        (t.minutes is None or _positive(t.minutes), f"training.minutes is {t.minutes}; it must be above 0"),
        (t.workers is None or t.workers >= 1, f"training.workers is {t.workers}; it must be at least 1"),
        (_positive(t.spike_deviations), f"training.spike_deviations is {t.spike_deviations}; it must be above 0"),
        (
            d.tokenizer != INITIAL or c.initial is not None,
            f"data.tokenizer is {INITIAL!r}, but no model to begin from is named; give --initial",
        ),
        (d.separator != "", "data.separator is empty; leave it out, or name what stands between documents"),
        (d.source.strip() != "", "data.source is empty; name a text, or stdlib"),
        (0 <= t.seed < 2**64, f"training.seed is {t.seed}; it must lie between 0 and 2^64 - 1"),
        (0 <= d.seed < 2**64, f"data.seed is {d.seed}; it must lie between 0 and 2^64 - 1"),
    ]
    least = dict.fromkeys(("steps", "batch", "keep_last", "maximum_skipped"), 1)
    least |= dict.fromkeys(("evaluate_every", "evaluation_batches", "checkpoint_every", "spike_window"), 0)
    least |= {"sample_tokens": 0, "sample_every": 0, "diagnose_every": 0}
    rules += [
        (value == "auto" or value >= bound, f"training.{name} is {value}; it must be at least {bound}")
        for name, bound in least.items()
        for value in [getattr(t, name)]
    ]
    rules += [(not words, words) for words in _unrepresentable(c, "")]
    shares = {"momentum": o.momentum, "beta1": o.beta1, "beta2": o.beta2}
    rules += [
        (value < 1 - 2.0**-25, f"optimizer.{name} is {value}, which in float32 is 1; it must be below")
        for name, value in shares.items()
    ]
    largest = o.rate * max(1.0, o.lattice_rate)
    rules.append((largest <= LARGEST_FLOAT32, f"optimizer.lattice_rate times optimizer.rate is {largest}: {_RANGE}"))
    return rules


def _unrepresentable(section: Any, prefix: str) -> Iterator[str]:
    """A line for every real setting that float32, in which models train, cannot hold."""
    for field_ in dataclasses.fields(section):
        value, name = getattr(section, field_.name), f"{prefix}{field_.name}"
        if dataclasses.is_dataclass(value):
            yield from _unrepresentable(value, f"{name}.")
        elif isinstance(value, float):
            if not math.isfinite(value):
                yield f"{name} is {value}; it must be a finite number"
            elif value and not LEAST_FLOAT32 <= abs(value) <= LARGEST_FLOAT32:
                yield f"{name} is {value}: {_RANGE}"


def _divides(part: int, whole: int) -> bool:
    return part >= 1 and whole % part == 0


def _positive(x: float) -> bool:
    return math.isfinite(x) and x > 0


def _not_negative(x: float) -> bool:
    return math.isfinite(x) and x >= 0


def load_toml(path: Path, under: Config | None = None) -> Config:
    """Configuration from a TOML file with the sections and names of `Config`, over `under` (None: the defaults).

    UserError naming the file and the key.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise UserError(f"configuration file {path} does not exist") from None
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read configuration file {path}: {error}") from None
    try:
        return from_dict(tomllib.loads(text), under)
    except tomllib.TOMLDecodeError as error:
        raise UserError(f"{path} is not valid TOML: {error}") from None
    except UserError as error:
        raise UserError(f"{path}: {error}") from None


def from_dict(values: dict[str, Any], under: Config | None = None) -> Config:
    """Configuration from plain data, the inverse of `as_dict`; missing keys are as in `under` (None: the defaults)."""
    return dataclass_from_dict(under or Config(), in_full(values), "")


def with_absolute_paths(config: Config) -> Config:
    """The same configuration with absolute paths, so that it means the same from another working directory."""
    data = dataclasses.replace(
        config.data,
        source=config.data.source if config.data.source in NO_PATHS else _absolute(config.data.source),
        tokenizer=config.data.tokenizer if config.data.tokenizer in NO_PATHS else _absolute(config.data.tokenizer),
        validation=config.data.validation and _absolute(config.data.validation),
        cache=config.data.cache and Path(_absolute(config.data.cache)),
    )
    output, initial = (path and Path(_absolute(path)) for path in (config.output, config.initial))
    return dataclasses.replace(config, data=data, output=output, initial=initial)


def _absolute(path: str | Path) -> str:
    return os.path.abspath(os.path.expanduser(path))


def settings(config: Config) -> dict[str, Any]:
    """Every setting under its dotted name, such as "training.steps", as plain data."""
    found: dict[str, Any] = {}

    def collect(values: dict[str, Any], prefix: str) -> None:
        for name, value in values.items():
            if isinstance(value, dict):
                collect(value, f"{prefix}{name}.")
            else:
                found[prefix + name] = value

    collect(as_dict(config), "")
    return found


def as_dict(config: Config) -> dict[str, Any]:
    """Plain data (strings, numbers, None) for TOML or JSON."""
    return _plain(dataclasses.asdict(config))


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    return str(value) if isinstance(value, Path) else value


def to_toml(config: Config) -> str:
    """The configuration as a TOML document that `load_toml` reads back; names whose value is None are left out."""
    return "\n".join(
        header + "".join(f"{_toml_line(name, value)}\n" for name, value in entries.items() if value is not None)
        for header, entries in _sections(as_dict(config), "")
    )


def _sections(values: dict[str, Any], path: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """(header, entries) of a TOML document, a section within another after it."""
    yield f"[{path}]\n" if path else "", {k: v for k, v in values.items() if not isinstance(v, dict)}
    for name, entries in values.items():
        if isinstance(entries, dict):
            yield from _sections(entries, f"{path}.{name}" if path else name)


def _toml_line(name: str, value: Any) -> str:
    if isinstance(value, bool):
        return f"{name} = {str(value).lower()}"
    if isinstance(value, str):
        escaped = "".join(c if c.isprintable() and c not in '\\"' else f"\\U{ord(c):08x}" for c in value)
        return f'{name} = "{escaped}"'
    return f"{name} = {value!r}"
