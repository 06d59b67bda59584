"""Every setting of a run, one frozen dataclass a stage, and the presets made of them."""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path

from pipeline.errors import ConfigError


@dataclass(frozen=True, slots=True)
class DataConfig:
    """Which images take part in what."""

    folder: Path | None = None  # None: look in the usual places
    validation_share: float = 0.2  # of the training images, the same share of every class
    split_seed: int = 42
    max_train_rows: int | None = None  # None: all of them


@dataclass(frozen=True, slots=True)
class TrainingConfig:
    """How the model is trained."""

    architecture: str = "conv10-dropout"
    epochs: int = 10
    batch_rows: int = 128
    learning_rate: float = 1e-3  # Adam's usual one
    seed: int = 42
    fresh: bool = False  # forget the checkpoints of an earlier run of the same settings


@dataclass(frozen=True, slots=True)
class GateConfig:
    """What a model must reach to be published."""

    min_accuracy: float = 0.88  # on the test images; this network reaches 0.90 and more


@dataclass(frozen=True, slots=True)
class PublishConfig:
    """Where bundles go."""

    models: Path = Path("models")
    name: str = "fashion-mnist"


@dataclass(frozen=True, slots=True)
class Config:
    """One run, whole."""

    preset: str
    runs: Path = Path("runs")  # checkpoints and exports, a folder for each set of settings
    data: DataConfig = field(default_factory=DataConfig)
    training: TrainingConfig = field(default_factory=TrainingConfig)
    gate: GateConfig = field(default_factory=GateConfig)
    publishing: PublishConfig = field(default_factory=PublishConfig)

    def __post_init__(self) -> None:
        """Refuse what cannot work before any work is done."""
        checks = (
            ("epochs", self.training.epochs, 1),
            ("batch_rows", self.training.batch_rows, 1),
            ("seed", self.training.seed, 0),
        )
        for name, value, smallest in checks:
            if value < smallest:
                raise ConfigError(f"{name} is {value}, expected {smallest} or more")


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
    """Minutes on two cores: the textbook network on all images."""
    return Config(preset="quick")


PRESETS: dict[str, Callable[[], Config]] = {"smoke": smoke, "quick": quick}


def from_preset(  # noqa: PLR0913  one argument an option of the command line
    preset: str,
    *,
    data: Path | None = None,
    models: Path | None = None,
    runs: Path | None = None,
    epochs: int | None = None,
    seed: int | None = None,
    fresh: bool = False,
) -> Config:
    """Return a preset with the given settings changed; None leaves the preset's own.

    Raises:
        ConfigError: there is no such preset, or a value cannot work.
    """
    if preset not in PRESETS:
        raise ConfigError(f"preset is {preset!r}, expected one of {', '.join(PRESETS)}")
    config = PRESETS[preset]()
    training = replace(
        config.training,
        epochs=config.training.epochs if epochs is None else epochs,
        seed=config.training.seed if seed is None else seed,
        fresh=fresh,
    )
    return replace(
        config,
        runs=(runs or config.runs).absolute(),
        data=replace(config.data, folder=data),
        training=training,
        publishing=replace(
            config.publishing, models=(models or config.publishing.models).absolute()
        ),
    )
