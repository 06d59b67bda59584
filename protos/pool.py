"""A descriptor pool of our own, so that another `inference.*` can live in the same process.

tritonclient registers its own copy of the package `inference` in protobuf's default pool, and one
pool takes a name once. `make protos` lets the generated code ask this module instead.
"""

from google.protobuf.descriptor_pool import DescriptorPool

_POOL = DescriptorPool()


def Default() -> DescriptorPool:  # noqa: N802  the name that generated code calls
    """Return the pool that holds every message of this package and nothing else."""
    return _POOL
