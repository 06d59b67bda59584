import pytest

from service.playground import words


@pytest.mark.parametrize(
    ("said", "shown"),
    [
        ("Ankle boot", "Ankle boot"),
        ("Größe\u00a01\n", "Größe\u00a01\n"),
        ("\u202etac", "�tac"),
        ("a\u2066b\x1b[0m", "a�b�[0m"),
        ({"a": ["\u200f", 1, None, {"b": "\u202d"}]}, {"a": ["�", 1, None, {"b": "�"}]}),
    ],
)
def test_what_nobody_sees_is_replaced_wherever_it_stands(said, shown):
    assert words.plain(said) == shown
