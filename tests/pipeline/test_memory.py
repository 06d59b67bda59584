import pytest

from pipeline import memory
from pipeline.errors import DatasetError


def test_what_just_fits_is_allowed_and_a_byte_more_is_not():
    memory.check("x", memory.most_bytes())

    with pytest.raises(DatasetError, match=r"x has .* GB of values, at most"):
        memory.check("x", memory.most_bytes() + 1)
