"""What one stage hands to the next: frozen, paths and numbers only, never arrays or models."""

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, slots=True)
class Dataset:
    """Verified images on disk and how they are split."""

    name: str
    folder: Path  # of the four decompressed IDX files
    sha256: str  # of the four, one after the other
    license: str  # SPDX name; empty where nobody said
    labels: tuple[str, ...]  # of the classes; empty: targets are numbers to come close to
    train_rows: int
    validation_rows: int
    test_rows: int
    validation_share: float
    split_seed: int
    findings: tuple[str, ...] = ()  # what was noticed before training, a sentence each

    @property
    def classifies(self) -> bool:
        """Whether a model of these data names classes; else it is of the kind `generic`."""
        return bool(self.labels)


@dataclass(frozen=True, slots=True)
class Epoch:
    """What one epoch came to; `number` starts at 1.

    Losses are means over the rows: cross-entropies in nats, or squared errors where the model does
    not classify; accuracies are 0 then.
    """

    number: int
    loss: float
    accuracy: float
    validation_loss: float
    validation_accuracy: float
    seconds: float


@dataclass(frozen=True, slots=True)
class Trained:
    """A trained model on disk: the weights of its best epoch."""

    path: Path  # of the .keras file
    sha256: str
    parameters: int
    optimizer: str
    device: str
    history: tuple[Epoch, ...]
    best_epoch: int  # the one with the lowest validation loss
    multiply_adds: int = 0  # of one row through the network


@dataclass(frozen=True, slots=True)
class ClassScore:
    """How well one class is told from the rest."""

    label: str
    precision: float
    recall: float
    rows: int

    @property
    def f1(self) -> float:
        """Harmonic mean of precision and recall; 0 where both are."""
        both = self.precision + self.recall
        return 2 * self.precision * self.recall / both if both else 0.0


@dataclass(frozen=True, slots=True)
class Mistake:
    """A test row that was given another class than its own."""

    row: int
    label: str
    predicted: str
    probability: float  # of `predicted`


@dataclass(frozen=True, slots=True)
class Confused:
    """How often one class was taken for another."""

    label: str
    predicted: str
    rows: int


@dataclass(frozen=True, slots=True)
class Comparison:
    """The new model beside the champion, on the same test rows."""

    version: int  # of the champion
    correct: int  # of the champion
    only_new: int  # rows that only the new one gets right
    only_champion: int
    mcnemar_p: float  # that both are equally accurate


@dataclass(frozen=True, slots=True)
class Scores:
    """The original model on the test rows."""

    correct: int  # 0 of a model that does not classify
    rows: int
    loss: float  # mean cross-entropy in nats, or mean squared error
    classes: tuple[ClassScore, ...]
    confusion: tuple[tuple[int, ...], ...]  # one row a true class
    sha256: str  # of the .keras file that was scored
    images_per_second: float
    batch_rows: int
    calibration_error: float = 0.0  # expected, over 15 bins of equal width
    hardest: tuple[Mistake, ...] = ()  # the most confident ones first
    confused: tuple[Confused, ...] = ()  # the most frequent ones first
    champion: Comparison | None = None

    @property
    def accuracy(self) -> float:
        """Share of the test images that got their own label."""
        return self.correct / self.rows


@dataclass(frozen=True, slots=True)
class Variant:
    """One model in one format and precision, or why there is none."""

    name: str  # such as onnx-float32; of its report and of its answers
    format: str  # saved_model, tflite or onnx
    precision: str  # whose budget it is held to: float32, float16 or int8
    path: Path  # a folder for saved_model, else a file
    required: bool = False  # without it nothing is published
    session: tuple[tuple[str, str], ...] = ()  # what onnxruntime is told, by its own names
    failure: str = ""  # why there is no such file; empty where there is one


@dataclass(frozen=True, slots=True)
class Exports:
    """One model in every variant."""

    variants: tuple[Variant, ...]  # in the order of the table
    parent_sha256: str  # of the .keras file that all come from
    calibration: Path  # .json: which training images the integer variants took their ranges from

    def named(self, name: str) -> Variant:
        """Return the variant of that name.

        Raises:
            KeyError: there is none.
        """
        return {variant.name: variant for variant in self.variants}[name]


@dataclass(frozen=True, slots=True)
class Checked:
    """The parity of every export, and the answers it was judged by."""

    reports: tuple[Path, ...]  # one ParityReport as JSON an export, in the order of the table
    answers: Path  # .npz: `reference` and one entry a variant, logits of the test images, and
    # `hostile_inputs` with `hostile_reference`
    served_variant: str
    precision: str  # of its budget
    scale: float  # of the budgets: median of the reference's largest |logit|


@dataclass(frozen=True, slots=True)
class Staged:
    """A bundle that is written but not published."""

    repository: Path  # hidden; a server can be started on it
    path: Path  # of the bundle in it, NAME/VERSION


@dataclass(frozen=True, slots=True)
class Published:
    """A bundle in its final place."""

    path: Path
    name: str
    version: int
