"""Everything the pipeline refuses on purpose.

PipelineError
├── ConfigError        a setting has a value that cannot work
├── DatasetError       the data cannot be found, or are not the ones they should be
├── BusyError          another run is working in the same folder
├── TrainingError      training cannot go on
├── InterruptedTrainingError  training was told to stop, and can go on where it stopped
├── EvaluationError    the model is below the gate
├── ExportError        an exporter failed, or wrote something else than was asked for
├── ParityError        an export, or the server, does not answer like the original
├── PublishError       the bundle cannot be written or served
├── PromotionError     the deployment that serves does not answer like the original
├── CheckError         two files cannot be compared, or one is not what it should be
│   └── UsageError     what was asked for cannot be done: no such file, or a word that means nothing
├── ScoringError       rows cannot be scored, or not all of them were
├── SweepError         a sweep cannot be done, or nothing of it could be trained
└── ShadowError        the original that answers are held against cannot be had

The text of each is one finished sentence for the person who can mend it.
"""


class PipelineError(Exception):
    """Base of all."""


class ConfigError(PipelineError):
    """A setting has a value that cannot work."""


class DatasetError(PipelineError):
    """The data cannot be found, or are not the ones they should be."""


class BusyError(PipelineError):
    """Another run is working in the same folder."""


class TrainingError(PipelineError):
    """Training cannot go on."""


class InterruptedTrainingError(PipelineError):
    """Training was told to stop, saved its state, and goes on there when it is run again."""


class EvaluationError(PipelineError):
    """The model is below the gate; nothing is published."""


class ExportError(PipelineError):
    """An exporter failed, or wrote something else than was asked for."""


class ParityError(PipelineError):
    """An export, or the server, does not answer like the original model."""


class PublishError(PipelineError):
    """The bundle cannot be written or served."""


class PromotionError(PipelineError):
    """The deployment that serves a version does not answer like its original, or not in time."""


class CheckError(PipelineError):
    """Two models cannot be compared: a file, its tensors or the data do not fit."""


class UsageError(CheckError):
    """What was asked for cannot be done: a file is not there, or a word means nothing here."""


class ShadowError(PipelineError):
    """The original that a server's answers are held against cannot be had."""


class ScoringError(PipelineError):
    """Rows cannot be scored: the input, the model or the output's folder do not fit."""


class SweepError(PipelineError):
    """A sweep cannot be done: its grid means nothing, or none of its trainings came to an end."""
