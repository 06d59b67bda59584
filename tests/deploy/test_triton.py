"""What publishing writes for Triton is a configuration by Triton's own schema."""

import subprocess
from pathlib import Path
from typing import Any

import pytest
from google.protobuf import json_format

from pipeline import publish
from protos import bundle_pb2, model_config_pb2
from service import bundle

ROOT = Path(__file__).parents[2]
STRANGERS = ROOT / ".venv-conformance"
# Triton's whole schema, of which ours is a part; nothing unknown passes.
PARSE = """
import sys
from google.protobuf import json_format, text_format
from tritonclient.grpc import model_config_pb2
config = text_format.Parse(sys.stdin.read(), model_config_pb2.ModelConfig())
print(json_format.MessageToJson(config))
"""


@pytest.fixture
def manifest(make_bundle) -> bundle_pb2.BundleManifest:
    return bundle.read_manifest(make_bundle())


def parsed(text: str) -> model_config_pb2.ModelConfig:
    """Return what Triton's own schema reads."""
    if not (STRANGERS / ".installed").exists():
        pytest.fail("Triton's schema is not installed; run: make conformance")
    done = subprocess.run(
        [STRANGERS / "bin/python", "-I", "-c", PARSE],
        input=text,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return json_format.Parse(done.stdout, model_config_pb2.ModelConfig())


@pytest.mark.slow
def test_triton_reads_the_tensors_of_the_manifest(manifest):
    config = parsed(publish.triton_config(manifest))

    assert (config.name, config.backend) == (manifest.name, "onnxruntime")
    assert config.max_batch_size > 0  # else dims would have to name the batch
    specs: list[bundle_pb2.TensorSpec] = [manifest.input, *manifest.outputs]
    tensors: list[Any] = [*config.input, *config.output]
    assert [(one.name, list(one.dims)) for one in tensors] == [
        (one.name, list(one.shape[1:])) for one in specs
    ]
    types = [model_config_pb2.DataType.Name(one.data_type) for one in tensors]
    assert types == [f"TYPE_{one.datatype}" for one in specs]
    assert config.HasField("dynamic_batching")


@pytest.mark.slow
def test_what_triton_does_not_know_is_found(manifest):
    with pytest.raises(AssertionError, match="no_such_field"):
        parsed(f"{publish.triton_config(manifest)}no_such_field: 1\n")
