import pytest

from pipeline.page import words


@pytest.mark.parametrize(
    ("shown", "expected"),
    [
        (words.percent(0.91704), "91.70 %"),
        (words.percent(float("nan")), words.NONE),
        (words.count(10_000), "10,000"),
        (words.tiny(0), "0"),
        (words.tiny(7.63e-6), "7.6e-06"),
        (words.tiny(0.2696), "0.27"),
        (words.tiny(3e9), "3.0e+09"),
        (words.tiny(float("inf")), "not finite"),
        (words.size(1023), "1 KiB"),
        (words.size(1_700_000), "1.6 MiB"),
        (words.size(3 << 30), "3.0 GiB"),
        (words.milliseconds(0), words.NONE),
        (words.milliseconds(0.00005), "0.05"),
        (words.milliseconds(0.0123), "12.3"),
        (words.milliseconds(1.2), "1,200"),
        (words.duration(74), "74 s"),
        (words.duration(1380), "23 min"),
        (words.duration(9000), "2.5 h"),
        (words.large(206_922), "206,922"),
        (words.large(1_218_048), "1.2 M"),
        (words.chance(0.17), "0.17"),
        (words.chance(0.00004), "4e-05"),
        (words.chance(1e-200), "below 1e-09"),
        (words.date("2026-11-26T00:50:27Z"), "2026-11-26 00:50 UTC"),
        (words.date("yesterday"), "yesterday"),
        (words.plain("a\x1b[31m\u202eb\u00a0c"), "a�[31m�b\u00a0c"),
    ],
)
def test_a_figure_is_as_short_as_it_is_worth(shown, expected):
    assert shown.replace(words.SPACE, " ") == expected.replace(words.SPACE, " ")


def test_settings_are_named_with_their_section_and_what_is_none_is_a_dash():
    tables = {"training": {"xla": False, "more": {"flip": True}}, "data": {"size": None, "a": []}}

    assert dict(words.flat(tables)) == {
        "data.a": words.NONE,
        "data.size": words.NONE,
        "training.more.flip": "true",
        "training.xla": "false",
    }
