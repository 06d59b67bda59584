"""Every setting of a run, a frozen dataclass a stage: presets, then a file, then single values."""

import json
import tomllib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import ConfigDict, Field, JsonValue, TypeAdapter, ValidationError

from pipeline.errors import ConfigError

FILE = "config.json"  # every setting of a run, in its folder
# Strict: else `epochs = true` would be 1.
Number = Annotated[float, Field(strict=True)]
Share = Annotated[Number, Field(ge=0, lt=1)]
Count = Annotated[int, Field(ge=1, strict=True)]
Whole = Annotated[int, Field(ge=0, strict=True)]
Positive = Annotated[Number, Field(gt=0)]
Seed = Annotated[int, Field(ge=0, lt=1 << 32, strict=True)]  # as numpy takes them
ONNX = r"onnx-(float32|float16|int8)"
TFLITE = r"tflite-(float32|float16|dynamic-range|int8|int16x8)"
ServedName = Annotated[str, Field(pattern=rf"^(best|{ONNX})$")]
VariantName = Annotated[str, Field(pattern=rf"^(saved-model|{TFLITE}|{ONNX})$")]
NETWORKS = (  # of pipeline.models, which takes TensorFlow to import
    "dense", "conv10", "conv10-dropout", "conv64", "conv64x2", "conv32-64", "rps", "linear",
    "small", "accurate",
)  # fmt: skip
Network = Annotated[str, Field(pattern=rf"^({'|'.join(NETWORKS)}|[\w.]+:\w+)$")]
STRICT = ConfigDict(extra="forbid", allow_inf_nan=False)


@dataclass(frozen=True, slots=True)
class DataConfig:
    """What is learnt from, and which rows take part in what."""

    __pydantic_config__ = STRICT

    # What `source` is; auto: Fashion-MNIST without one, else as its name and content say.
    kind: Literal["auto", "fashion-mnist", "idx", "npz", "pictures", "line"] = "auto"
    source: Path | None = None  # a folder, or an .npz; None: look in the usual places
    name: str | None = None  # of the data; None: as the source is called
    size: tuple[Count, Count] | None = None  # (height, width) to bring pictures to; None: as found
    colour: Literal["auto", "gray", "rgb"] = "auto"  # of pictures; auto: gray if all of them are
    test_share: Share = 0.2  # of each class, where the source has no test rows of its own
    validation_share: Share = 0.2  # of the training rows, the same share of every class
    split_seed: Seed = 42  # of which rows are in which part
    max_train_rows: Count | None = None  # None: all of them


@dataclass(frozen=True, slots=True)
class Augmentation:
    """How training images are changed at random, anew in every epoch; never in what is exported."""

    __pydantic_config__ = STRICT

    shift: Share = 0.0  # at most this share of height and of width, each way
    flip: bool = False  # left to right, every second image
    rotate: Annotated[Number, Field(ge=0, le=0.5)] = 0.0  # at most this share of a turn, each way
    zoom: Share = 0.0  # at most this share larger or smaller
    erase: Share = 0.0  # at most this share of the image's area is replaced by noise


@dataclass(frozen=True, slots=True)
class TrainingConfig:
    """How the model is trained."""

    __pydantic_config__ = STRICT

    architecture: Network = (
        "conv10-dropout"  # as `train-export models` lists them, or module:function
    )
    architecture_settings: dict[str, JsonValue] = field(
        default_factory=dict
    )  # what that function takes
    engine: Literal["fit", "tape"] = "fit"  # Keras' own loop, or ours with tf.GradientTape
    epochs: Count = 10  # how often all training rows are seen
    batch_rows: Count = 128  # training rows in one step
    optimizer: Literal["adam", "adamw", "sgd", "rmsprop"] = "adam"  # Keras' own of that name
    learning_rate: Positive = 1e-3  # Adam's usual one; the highest that `schedule` reaches
    momentum: Share = 0.0  # of sgd and rmsprop
    weight_decay: Annotated[Number, Field(ge=0)] = 0.0  # as Keras' optimizers take it
    schedule: Literal["constant", "cosine", "one-cycle"] = "constant"  # of the learning rate
    warmup_share: Share = 0.0  # of all steps, in which the rate rises from 0
    label_smoothing: Share = 0.0  # of each target, spread evenly over all classes
    ema: Share = 0.0  # share of the old in the moving average of weights; 0: none is kept
    early_stopping: Whole = 0  # epochs without a lower validation loss that end it; 0: none do
    augmentation: Augmentation = field(default_factory=Augmentation)
    steps_per_execution: Count = 1  # steps in one call of TensorFlow
    shards: Count = 1  # pieces of a batch that are computed at the same time, a core each
    xla: bool = False  # have XLA compile the step
    mixed_precision: bool = False  # 16 bits between layers, where this GPU or CPU is faster so
    seed: Seed = 42  # of weights, of the order of rows, and of augmentation
    checkpoint_every_s: Positive = 300.0  # besides one at the end of every epoch
    keep: Count = 2  # how many of the last checkpoints; the best one is kept besides
    fresh: bool = False  # forget the checkpoints of an earlier run of the same settings
    tensorboard: bool = False  # write its logs into the run's folder


@dataclass(frozen=True, slots=True)
class GateConfig:
    """What a model must reach to be published."""

    __pydantic_config__ = STRICT

    min_accuracy: Annotated[Number, Field(ge=0, le=1)] = 0.88  # on the test images
    max_loss: Positive | None = None  # on the test rows; None: any
    champion: bool = True  # refuse what is less accurate than the version that `champion` names
    champion_p: Annotated[Number, Field(gt=0, lt=1)] = 0.05  # McNemar's p that is chance


@dataclass(frozen=True, slots=True)
class ExportConfig:
    """Which variants there must be, and which is served."""

    __pydantic_config__ = STRICT

    serve: ServedName = "onnx-float32"  # best: the fastest ONNX variant that passed, measured here
    required: tuple[VariantName, ...] = ()  # nothing is published without, besides float32


@dataclass(frozen=True, slots=True)
class PublishConfig:
    """Where bundles go."""

    __pydantic_config__ = STRICT

    models: Path = Path("models")  # a folder of NAME/VERSION
    name: Annotated[str, Field(max_length=100, pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")] = (
        "fashion-mnist"  # of the model, which clients ask for
    )


@dataclass(frozen=True, slots=True)
class Config:
    """One run, whole."""

    __pydantic_config__ = STRICT

    preset: str  # one of `PRESETS`
    runs: Path = Path("runs")  # checkpoints and exports, a folder for each set of settings
    data: DataConfig = field(default_factory=DataConfig)
    training: TrainingConfig = field(default_factory=TrainingConfig)
    gate: GateConfig = field(default_factory=GateConfig)
    export: ExportConfig = field(default_factory=ExportConfig)
    publishing: PublishConfig = field(default_factory=PublishConfig)


def smoke() -> Config:
    """Seconds: a few batches of real images, only to see everything work."""
    return Config(
        preset="smoke",
        data=DataConfig(max_train_rows=6_000),
        training=TrainingConfig(epochs=2),
        gate=GateConfig(min_accuracy=0.6),  # six times chance
        publishing=PublishConfig(name="fashion-mnist-smoke"),  # never above a real model's versions
    )


def quick() -> Config:
    """Two minutes on two cores: a small network on all images, above 91 %."""
    return Config(
        preset="quick",
        training=TrainingConfig(
            architecture="small",
            epochs=12,
            batch_rows=256,
            learning_rate=3e-3,
            schedule="cosine",
            warmup_share=0.1,
            steps_per_execution=20,
            shards=2,
            mixed_precision=True,
        ),
        gate=GateConfig(min_accuracy=0.90),
    )


def accurate() -> Config:
    """A quarter of an hour or more: our best network, above 93 %."""
    return Config(
        preset="accurate",
        data=DataConfig(validation_share=0.1),
        training=TrainingConfig(
            architecture="accurate",
            epochs=18,
            batch_rows=128,
            optimizer="adamw",
            learning_rate=1e-3,
            weight_decay=1e-4,
            schedule="cosine",
            warmup_share=0.1,
            label_smoothing=0.1,
            ema=0.999,
            augmentation=Augmentation(flip=True),
            steps_per_execution=20,
            shards=2,
        ),
        gate=GateConfig(min_accuracy=0.925),
    )


def book_tape() -> Config:
    """The textbook's loop of its own: GradientTape and plain gradient descent."""
    return _book("book-tape", "conv10", 0.84, engine="tape", optimizer="sgd", learning_rate=0.01)


def book_adam() -> Config:
    """The textbook's network with Adam: it learns the training images by heart."""
    return _book("book-adam", "conv64", 0.90)


def book_dropout() -> Config:
    """The same with dropout, which keeps it from that."""
    return _book("book-dropout", "conv64", 0.90, architecture_settings={"dropout": 0.5})


def line() -> Config:
    """Seconds: one weight and one bias learn y = 2x - 1 from six points."""
    return Config(
        preset="line",
        data=DataConfig(kind="line"),
        training=TrainingConfig(
            architecture="linear", epochs=150, optimizer="sgd", learning_rate=0.05
        ),
        gate=GateConfig(min_accuracy=0.0, max_loss=0.05),
        publishing=PublishConfig(name="line"),
    )


def _book(preset: str, architecture: str, min_accuracy: float, **training: Any) -> Config:  # noqa: ANN401
    """Return one of the textbook's runs: 20 epochs in batches of 128, 10,000 rows to validate."""
    return Config(
        preset=preset,
        data=DataConfig(validation_share=1 / 6),
        training=TrainingConfig(architecture=architecture, epochs=20, **training),
        gate=GateConfig(min_accuracy=min_accuracy),
        publishing=PublishConfig(name=preset),
    )


PRESETS: dict[str, Callable[[], Config]] = {
    "smoke": smoke,
    "quick": quick,
    "accurate": accurate,
    "book-tape": book_tape,
    "book-adam": book_adam,
    "book-dropout": book_dropout,
    "line": line,
}
Tables = Mapping[str, Any]  # as TOML has them: a table a stage, its keys the fields
SCHEMA = TypeAdapter(Config)


def build(preset: str, *layers: Tables) -> Config:
    """Return a preset with settings changed, each layer over the ones before.

    Args:
        preset: one of `PRESETS`.
        layers: tables named as the fields of `Config`, such as {"training": {"epochs": 2}};
            paths in them are relative to the current folder. A preset in one of them is what
            `preset_of` finds.

    Raises:
        ConfigError: there is no such preset or setting, or a value cannot work.
    """
    if preset not in PRESETS:
        raise ConfigError(f"preset is {preset!r}, expected one of {', '.join(PRESETS)}")
    merged: dict[str, Any] = SCHEMA.dump_python(PRESETS[preset]())
    for layer in layers:
        _merge(merged, {key: value for key, value in layer.items() if key != "preset"})
    try:
        config = SCHEMA.validate_python(merged)
    except ValidationError as error:
        raise ConfigError(_sentence(error)) from error
    source = config.data.source
    return replace(
        config,
        runs=config.runs.absolute(),
        data=replace(config.data, source=source.absolute() if source else None),
        publishing=replace(config.publishing, models=config.publishing.models.absolute()),
    )


def preset_of(layers: Sequence[Tables]) -> str:
    """Return the preset that the last of some layers names, else quick."""
    named = [str(layer["preset"]) for layer in layers if "preset" in layer]
    return named[-1] if named else "quick"


def options(**values: Any) -> dict[str, Any]:  # noqa: ANN401  what settings are
    """Return single settings as tables, those that are not None.

    Args:
        values: named SECTION__NAME, or NAME for what belongs to no section.
    """
    tables: dict[str, Any] = {}
    for name, value in values.items():
        if value is not None:
            section, _, inner = name.rpartition("__")
            (tables.setdefault(section, {}) if section else tables)[inner] = value
    return tables


def read(path: Path) -> dict[str, Any]:
    """Read settings from a TOML file.

    Raises:
        ConfigError: it cannot be read, or is no TOML.
    """
    try:
        return tomllib.loads(path.read_text(encoding="utf-8-sig"))
    except (OSError, ValueError, RecursionError) as error:
        raise ConfigError(f"{path} cannot be read as TOML: {error}") from error


def single(assignment: str) -> dict[str, Any]:
    """Read one setting, as training.epochs=2, into the tables that TOML has for it.

    A value that is no TOML is a string.

    Raises:
        ConfigError: it has no =.
    """
    name, equals, value = assignment.partition("=")
    if not equals:
        raise ConfigError(f"{assignment!r} has no =, expected SECTION.NAME=VALUE")
    try:
        found = tomllib.loads(f"value = {value}")["value"]
    except (tomllib.TOMLDecodeError, RecursionError):
        found = value
    return nested(name.strip(), found)


def nested(name: str, value: Any) -> dict[str, Any]:  # noqa: ANN401  what settings are
    """Return the tables that TOML has for a setting, by its name with dots."""
    tables = value
    for part in reversed(name.split(".")):
        tables = {part: tables}
    return dict(tables)


def as_tables(config: Config) -> dict[str, Any]:
    """Return a configuration as JSON can hold it; `build` takes it back."""
    tables: dict[str, Any] = SCHEMA.dump_python(config, mode="json")
    return tables


def learnt_from(text: str, source: Path | None) -> DataConfig:
    """Return what a bundle was trained on, so that the same rows are found again.

    Args:
        text: `training.config` of its manifest; empty in bundles of before there was one, which are
            Fashion-MNIST's.
        source: where the data are now; None: where they were then.

    Raises:
        ConfigError: it is not a configuration that this version can read.
    """
    tables: dict[str, Any] = json.loads(text) if text else {"preset": "quick"}
    then = build(str(tables["preset"]), tables).data
    return replace(then, source=source.absolute()) if source else then


def _merge(into: dict[str, Any], tables: Tables) -> None:
    for name, value in tables.items():
        inner = into.get(name)
        if isinstance(inner, dict) and isinstance(value, Mapping):
            _merge(inner, value)
        else:
            into[name] = value


def _sentence(error: ValidationError) -> str:
    """Return what is wrong with the first setting that is."""
    first = error.errors()[0]
    name = ".".join(str(part) for part in first["loc"])
    if first["type"] == "unexpected_keyword_argument":
        return f"there is no setting {name}; see docs/training.md for those there are"
    return f"{name} is {first['input']!r}: {first['msg'][0].lower()}{first['msg'][1:]}"
