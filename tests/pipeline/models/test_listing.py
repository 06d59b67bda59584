import io

import pytest
from rich.console import Console

from pipeline import models
from pipeline.models import listing


@pytest.fixture(scope="module")
def listed():
    return listing.networks()


def test_every_architecture_is_listed_with_what_it_is_and_costs(listed):
    by_name = {one.name: one for one in listed}

    assert list(by_name) == list(models.ARCHITECTURES)
    assert by_name["conv32-64"] == listing.Network(
        name="conv32-64",
        shape=(28, 28, 1),
        outputs=10,
        dtype="uint8",
        parameters=1_101_526,
        multiply_adds=13_768_424,
        about="32 kernels, 64 kernels, pool, dense 100.",
        settings=(),
    )
    assert (by_name["linear"].shape, by_name["linear"].parameters) == ((1,), 2)
    assert (by_name["rps"].shape, by_name["rps"].outputs) == ((150, 150, 3), 3)
    assert all(one.about.endswith(".") for one in listed)


def test_the_table_has_a_row_a_network(listed):
    out = io.StringIO()

    Console(file=out, width=120).print(listing.table(listed))

    text = out.getvalue()
    assert all(one.name in text for one in listed)
    assert "28x28x1" in text
    assert "13,768,424" in text
    assert "Takes hidden." in text
