import keras
import pytest

from pipeline import models
from pipeline.errors import ConfigError

ODD = "tests.pipeline.models.odd_nets"
SHAPE = (13, 13, 1)


def refusal(name, shape=SHAPE, dtype="uint8", **settings):
    with pytest.raises(ConfigError) as refused:
        models.build(f"{ODD}:{name}", shape, 10, dtype, **settings)
    return str(refused.value).removeprefix(f"{ODD}:")


REFUSED = {
    "raising": "raising raised KeyError: 'no such colour'",
    "leaving": "leaving raised SystemExit: 0",
    "input_in_a_dict": "input_in_a_dict takes a dict, expected one tensor; have its input be the "
    "tensor itself",
    "open_input_in_a_dict": "open_input_in_a_dict takes a dict, expected one tensor; have its "
    "input be the tensor itself",
    "output_in_a_dict": "output_in_a_dict gives a dict, expected one tensor; have its output be "
    "the tensor itself",
    "subclassed_to_a_dict": "subclassed_to_a_dict gives a dict, expected one tensor; have its "
    "output be the tensor itself",
    "of_whole_numbers": "of_whole_numbers gives int32, expected float32; leave out the cast or "
    "the dtype of its last layer",
    "halves": "halves gives float16, expected float32; leave out the cast or the dtype of its "
    "last layer",
    "of_four_rows": "of_four_rows takes batches of 4 rows only, expected any number; give its "
    "input a shape, and no batch_shape or batch_size",
    "of_four_open_rows": "of_four_open_rows takes batches of 4 rows only, expected any number; "
    "give its input a shape, and no batch_shape or batch_size",
    "text": "text returned a str, expected a keras.Model",
    "two_inputs": "two_inputs has 2 inputs and 1 outputs, expected one of each",
    "two_outputs": "two_outputs has 1 inputs and 2 outputs, expected one of each",
    "too_wide": "too_wide gives (11,) for a row, expected (10,): one logit a class, or as many "
    "numbers as a target has",
    "unflattened": "unflattened gives (13, 13, 10) for a row, expected (10,): one logit a class, "
    "or as many numbers as a target has",
    "of_another_shape": "of_another_shape takes rows of shape (8, 8, 1), those of the data are "
    "(13, 13, 1); build its input from the shape that the function is given",
    "of_doubles": "of_doubles takes float64, the data are uint8; give its input the dtype uint8 "
    "or float32",
    "softmax": "softmax ends in a softmax, in layer classes: its answers to a row sum to 1, "
    "expected logits; leave it out, the export adds it",
    "softmax_inside": "softmax_inside ends in a softmax, in layer end: its answers to a row sum "
    "to 1, expected logits; leave it out, the export adds it",
    "with_lambda": "with_lambda has the Lambda layer doubled, which no file can hold safely; "
    "write a keras.Layer, or use keras.ops",
    "augmenting": "augmenting has the layer flip (RandomFlip), which would be exported; leave it "
    "out and set training.augmentation",
    "needing": "needing cannot be called as (shape, outputs, **settings): missing a required "
    "argument: 'width'; set training.architecture_settings, or change the function",
    "alone": "alone cannot be called as (shape, outputs, **settings): too many positional "
    "arguments; set training.architecture_settings, or change the function",
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_network_that_cannot_be_exported_is_refused_in_one_sentence(name):
    assert refusal(name) == REFUSED[name]


def test_one_tensor_in_a_list_passes_for_the_tensor_itself():
    assert models.build(f"{ODD}:listed", SHAPE, 10).output_shape == (None, 10)


def test_an_interruption_while_a_network_is_built_is_passed_on():
    with pytest.raises(KeyboardInterrupt):
        models.build(f"{ODD}:interrupted", SHAPE, 10)


@pytest.mark.parametrize("name", ["dense", f"{ODD}:subclassed"])
def test_a_network_under_mixed_precision_may_give_16_bits(name):
    before = keras.config.dtype_policy()
    keras.config.set_dtype_policy("mixed_bfloat16")
    try:
        assert models.build(name, SHAPE, 10).outputs[0].dtype == "bfloat16"
        with pytest.raises(ConfigError, match="gives int32, expected float32"):
            models.build(f"{ODD}:of_whole_numbers", SHAPE, 10)
    finally:
        keras.config.set_dtype_policy(before)


def test_a_layer_that_cannot_be_loaded_again_is_refused_before_training():
    told = refusal("forgetful")

    assert told.startswith("forgetful cannot be saved and loaded again: ")
    assert told.endswith(
        "; give its classes @keras.saving.register_keras_serializable() and a get_config with all "
        "arguments"
    )


def test_a_setting_that_a_users_function_does_not_take_is_refused():
    told = refusal("colour", (150, 150, 3), wide=3)

    assert told == "colour has no setting wide; its settings are width"


def test_numbers_need_a_network_of_numbers():
    told = refusal("strided", dtype="float32")

    assert told.startswith("strided takes uint8, the data are float32; give its input the dtype")
