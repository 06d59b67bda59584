"""How one model is served: the server's settings, and what the model's own config.pbtxt says.

The file is Triton's, so that one folder serves both. It may ask for less than the server's limits
on rows, never for more; everything else it says wins.
"""

import math
import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

from google.protobuf import json_format, text_format

from protos import bundle_pb2, model_config_pb2
from service import plain_file
from service.errors import BundleError, InvalidRequestError
from service.settings import PROVIDERS, Settings

CONFIG = "config.pbtxt"
MAX_CONFIG_BYTES = 1 << 20
MAX_SAID_CHARACTERS = 200
MAX_INSTANCES = 4  # by itself: the interpreter's lock lets more of them wait for each other
PLATFORM = "onnxruntime_onnx"
BACKEND = "onnxruntime"
# Strings and comments, which are left as they are, or a field's name before a list without a colon.
LIST = re.compile(
    r"""("(?:[^"\\\n]|\\.)*+"?|'(?:[^'\\\n]|\\.)*+'?|\#.*+)|\b[A-Za-z_]\w*+(?=\s*+\[)"""
)


class VersionPolicy(NamedTuple):
    """Which of a model's versions are served; aliased ones always are."""

    latest: int = 0  # the highest that pass their checks; 0: not this policy
    specific: tuple[int, ...] = ()  # neither: all

    def choose(self, numbers: list[int]) -> list[int]:
        """Return the versions to try, the first choice first."""
        if self.specific:
            return [number for number in self.specific if number in numbers]
        return sorted(numbers, reverse=True)


@dataclass(frozen=True, slots=True)
class ModelOptions:
    """How one model is served."""

    policy: VersionPolicy
    max_batch_rows: int
    max_queue_rows: int
    max_queue_requests: int  # 0: as many as there is room for their rows
    max_queue_delay_s: float
    queue_timeout_s: float  # 0: none
    allow_timeout_override: bool
    priority_levels: int  # 0: none
    default_priority: int  # of the levels
    instances: int
    threads: int
    providers: tuple[str, ...]  # onnxruntime's names

    @property
    def levels(self) -> int:
        """How many queues a batcher keeps."""
        return max(1, self.priority_levels)


def of_server(settings: Settings, cores: int) -> ModelOptions:
    """Return how a model is served that says nothing of its own.

    Args:
        settings: the server's.
        cores: that all its workers may use.
    """
    cores = max(1, cores // settings.workers)
    instances = settings.instances or min(cores, MAX_INSTANCES)
    return ModelOptions(
        policy=_policy(settings.version_policy),
        max_batch_rows=settings.max_batch_rows,
        max_queue_rows=max(settings.max_queue_rows, settings.max_batch_rows),
        max_queue_requests=0,
        max_queue_delay_s=settings.max_queue_delay_ms / 1000,
        queue_timeout_s=settings.queue_timeout_ms / 1000,
        allow_timeout_override=True,
        priority_levels=settings.priority_levels,
        default_priority=_middle(settings.priority_levels),
        instances=instances,
        threads=settings.threads or max(1, cores // instances),
        providers=tuple(PROVIDERS[name] for name in settings.providers.split(",")),
    )


def read(folder: Path, defaults: ModelOptions) -> ModelOptions:
    """Return how the model in a folder is served: by its config.pbtxt, where it has one.

    Raises:
        BundleError: the file cannot be read, or is not a ModelConfig.
    """
    source = f"{folder.name}/{CONFIG}"
    try:
        content = plain_file.read(folder / CONFIG, MAX_CONFIG_BYTES)
    except OSError as error:
        raise BundleError(f"{source} cannot be read: {error.strerror}") from error
    if content is None:
        return defaults
    try:
        config = text_format.Parse(
            _with_colons(content.decode()),
            model_config_pb2.ModelConfig(),
            allow_unknown_field=True,
        )
    except (text_format.ParseError, ValueError, RecursionError) as error:
        said = str(error)[:MAX_SAID_CHARACTERS]  # it repeats a whole line
        raise BundleError(f"{source} is not a ModelConfig: {said}") from error
    if config.name not in {"", folder.name}:
        raise BundleError(f"{source} is of the model {config.name[:64]!r}; give it its own name")
    trouble = _trouble(config)
    if trouble:
        raise BundleError(f"{source}: {trouble}")
    return _applied(config, defaults)


def parse_json(text: str, defaults: ModelOptions) -> ModelOptions:
    """Return how a model is served by a ModelConfig in JSON, as a load request may bring it.

    Raises:
        InvalidRequestError: it is not one.
    """
    unusable = "the parameter 'config' is not a ModelConfig in JSON; ask ModelConfig for one"
    if not text.lstrip().startswith("{"):  # a list or a text would pass for an empty one
        raise InvalidRequestError(unusable)
    try:
        config = json_format.Parse(
            text, model_config_pb2.ModelConfig(), ignore_unknown_fields=True, max_recursion_depth=20
        )
    except (json_format.ParseError, ValueError, RecursionError) as error:
        raise InvalidRequestError(unusable) from error
    trouble = _trouble(config)
    if trouble:
        raise InvalidRequestError(f"the parameter 'config': {trouble}")
    return _applied(config, defaults)


def message(
    manifest: bundle_pb2.BundleManifest, options: ModelOptions
) -> model_config_pb2.ModelConfig:
    """Return what ModelConfig answers about a version that is served so."""
    config = model_config_pb2.ModelConfig(
        name=manifest.name,
        platform=PLATFORM,
        backend=BACKEND,
        default_model_filename="model.onnx",
        max_batch_size=options.max_batch_rows,
        version_policy=_policy_message(options.policy),
        model_transaction_policy=model_config_pb2.ModelTransactionPolicy(decoupled=False),
    )
    kind = model_config_pb2.ModelInstanceGroup
    on_gpu = options.providers[0] != PROVIDERS["cpu"]
    config.instance_group.add(
        name=manifest.name,
        count=options.instances,
        kind=kind.KIND_GPU if on_gpu else kind.KIND_CPU,
    )
    config.parameters["max_queue_rows"].string_value = str(options.max_queue_rows)
    for listing, specs in (
        (config.input, [manifest.input]),
        (config.output, manifest.outputs),
    ):
        for spec in specs:
            data_type = model_config_pb2.DataType.Value(f"TYPE_{spec.datatype}")
            listing.add(name=spec.name, data_type=data_type, dims=spec.shape[1:])
    config.dynamic_batching.CopyFrom(
        model_config_pb2.ModelDynamicBatching(
            max_queue_delay_microseconds=round(options.max_queue_delay_s * 1e6),
            preserve_ordering=False,
            priority_levels=options.priority_levels,
            default_priority_level=options.default_priority if options.priority_levels else 0,
            default_queue_policy=model_config_pb2.ModelQueuePolicy(
                default_timeout_microseconds=round(options.queue_timeout_s * 1e6),
                allow_timeout_override=options.allow_timeout_override,
                max_queue_size=options.max_queue_requests,
            ),
        )
    )
    return config


def _with_colons(text: str) -> str:
    """Write `list: [` for Triton's `list [`; protobuf passes over unknown lists only so."""
    return LIST.sub(lambda found: found[0] if found[1] else f"{found[0]}:", text)


def _trouble(config: model_config_pb2.ModelConfig) -> str:
    """Return what a configuration asks for that cannot be; empty: nothing."""
    if config.max_batch_size < 0:
        return f"max_batch_size is {config.max_batch_size}, expected 0 or more"
    if any(group.count < 0 for group in config.instance_group):
        return "an instance_group has a count below 0"
    if config.model_transaction_policy.decoupled:
        return "decoupled models are not done here: one request has one answer"
    if config.version_policy.HasField("specific") and not config.version_policy.specific.versions:
        return "version_policy is specific and names no version"
    return ""


def _applied(config: model_config_pb2.ModelConfig, defaults: ModelOptions) -> ModelOptions:
    """Lay a model's own configuration over the server's."""
    options = _with_limits(config, defaults)
    if config.HasField("version_policy"):
        options = replace(options, policy=_policy_of(config.version_policy))
    count = sum(group.count for group in config.instance_group)
    if count > 0:
        options = replace(options, instances=min(count, 256))
    return _with_batching(config.dynamic_batching, options)


def _with_limits(config: model_config_pb2.ModelConfig, options: ModelOptions) -> ModelOptions:
    batch_rows, queue_rows = options.max_batch_rows, options.max_queue_rows
    if config.max_batch_size > 0:
        batch_rows = min(batch_rows, config.max_batch_size)
    asked = config.parameters["max_queue_rows"].string_value if config.parameters else ""
    if re.fullmatch(r"[1-9][0-9]{0,17}", asked):
        queue_rows = min(queue_rows, int(asked))
    return replace(options, max_batch_rows=batch_rows, max_queue_rows=max(queue_rows, batch_rows))


def _with_batching(
    batching: model_config_pb2.ModelDynamicBatching, options: ModelOptions
) -> ModelOptions:
    if batching.max_queue_delay_microseconds:
        delay_s = min(60.0, batching.max_queue_delay_microseconds / 1e6)
        options = replace(options, max_queue_delay_s=delay_s)
    if batching.priority_levels:
        levels = min(batching.priority_levels, 64)
        default = min(batching.default_priority_level, levels) or _middle(levels)
        options = replace(options, priority_levels=levels, default_priority=default)
    if not batching.HasField("default_queue_policy"):
        return options
    policy = batching.default_queue_policy
    options = replace(options, max_queue_requests=policy.max_queue_size)
    if policy.timeout_action == policy.DELAY:  # whoever waits too long is still answered
        return replace(options, queue_timeout_s=0.0, allow_timeout_override=False)
    return replace(
        options,
        queue_timeout_s=policy.default_timeout_microseconds / 1e6 or options.queue_timeout_s,
        allow_timeout_override=policy.allow_timeout_override,
    )


def _middle(levels: int) -> int:
    return math.ceil(levels / 2) or 1


def _policy(text: str) -> VersionPolicy:
    """Read the setting `version_policy`, which was checked when the settings were made."""
    name, _, values = text.partition(":")
    if name == "latest":
        return VersionPolicy(latest=int(values or 1))
    return VersionPolicy(specific=tuple(map(int, values.split(",")))) if values else VersionPolicy()


def _policy_of(policy: model_config_pb2.ModelVersionPolicy) -> VersionPolicy:
    if policy.HasField("specific"):
        return VersionPolicy(specific=tuple(policy.specific.versions))
    if policy.HasField("latest"):
        return VersionPolicy(latest=policy.latest.num_versions or 1)
    return VersionPolicy()


def _policy_message(policy: VersionPolicy) -> model_config_pb2.ModelVersionPolicy:
    made = model_config_pb2.ModelVersionPolicy()
    if policy.specific:
        made.specific.versions.extend(policy.specific)
    elif policy.latest:
        made.latest.num_versions = policy.latest
    else:
        made.all.SetInParent()
    return made
