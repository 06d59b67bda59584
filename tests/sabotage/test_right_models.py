"""Nothing is flagged that is right: random models, exported and measured as every model is."""

import keras
import numpy as np
import pytest
from keras import layers

from pipeline import explain

MODELS = range(50)
ROWS, EXPLAINED_ROWS = 96, 16
TRAINING_ROWS, EPOCHS = 1024, 2


class Draw:
    """Builds one model from random choices, and notes which kinds of layers it has."""

    def __init__(self, seed):
        self.random = np.random.default_rng(seed)
        self.kinds = set()
        self.shape = (*map(int, self.random.integers(8, 34, 2)), int(self.random.integers(1, 4)))
        self.classes = int(self.random.integers(2, 21))

    def model(self):
        image = keras.Input(self.shape, dtype="uint8", name="image")
        x = layers.Rescaling(1 / 255)(image)
        for _ in range(self.random.integers(0, 5)):
            x = self._block(x)
        x = self._head(x)
        return keras.Model(image, layers.Dense(self.classes, name="logits")(x))

    def _pick(self, *choices):
        return choices[self.random.integers(len(choices))]

    def _window(self, x, kind):
        """Choose a kernel or window, its stride and its padding, that fit the image."""
        # TensorFlow's own oneDNN cannot run every depthwise convolution of 1 x 1.
        size = int(self.random.integers(1 if kind == "conv" else 2, 6))
        stride = self._pick(1, 2)
        mode = "valid" if size <= min(x.shape[1:3]) and self.random.random() < 0.5 else "same"
        self.kinds |= {"even kernel"} if size % 2 == 0 else set()
        self.kinds |= {"stride 2 same"} if (stride, mode) == (2, "same") else set()
        return size, stride, mode

    def _block(self, x):
        kind = self._pick("conv", "depthwise", "max", "average", "residual", "conv", "separable")
        self.kinds.add(kind)
        filters = int(self.random.integers(1, 25))
        if kind == "residual":
            y = layers.Conv2D(filters, 3, padding="same")(x)
            y = self._normal(y)
            y = layers.Conv2D(x.shape[-1], self._pick(2, 3), padding="same")(layers.ReLU()(y))
            return layers.ReLU()(layers.Add()([x, y]))
        size, stride, mode = self._window(x, kind)
        if kind == "max":
            return layers.MaxPooling2D(size, stride, mode)(x)
        if kind == "average":
            return layers.AveragePooling2D(size, stride, mode)(x)
        if kind == "depthwise":
            y = layers.DepthwiseConv2D(size, stride, mode)(x)
        elif kind == "separable":
            y = layers.SeparableConv2D(filters, size, stride, mode)(x)
        else:
            y = layers.Conv2D(filters, size, stride, mode, use_bias=bool(self._pick(0, 1)))(x)
        y = layers.Activation(self._pick("relu", "relu", "tanh", "sigmoid", "elu"))(self._normal(y))
        return layers.Dropout(0.3)(y) if self._pick(0, 1) else y

    def _normal(self, x):
        if self._pick(0, 1):
            self.kinds.add("batch normalisation")
            return layers.BatchNormalization()(x)
        return x

    def _head(self, x):
        kind = self._pick("flatten", "global average", "global max")
        self.kinds.add(kind)
        x = {
            "flatten": layers.Flatten,
            "global average": layers.GlobalAveragePooling2D,
            "global max": layers.GlobalMaxPooling2D,
        }[kind]()(x)
        if self._pick(0, 1):
            self.kinds.add("hidden dense")
            x = layers.Dense(int(self.random.integers(4, 129)), activation="relu")(x)
        return layers.Dropout(0.5)(x) if self._pick(0, 1) else x


def train(model, images, labels):
    """Train until the logits say something: rounding is held against their size."""
    model.compile(
        optimizer=keras.optimizers.Adam(3e-3),
        loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True),
    )
    model.fit(images, labels, batch_size=32, epochs=EPOCHS, verbose=0)


@pytest.mark.parametrize("seed", MODELS)
def test_a_right_model_is_flagged_in_no_format(seed, lab, crop, tmp_path):
    keras.utils.set_random_seed(seed)
    draw = Draw(seed)
    model = draw.model()
    images, labels = crop(draw.shape, TRAINING_ROWS, seed)
    train(model, images, labels % draw.classes)
    images, labels = crop(draw.shape, ROWS, seed + 1000)
    asked = lab.questions(model, images, labels % draw.classes)
    saved, graph = lab.saved_model(model, tmp_path), lab.onnx(model, tmp_path)

    for variant in (saved, lab.tflite(saved), graph, lab.float16(graph)):
        report = lab.report(variant, asked)
        assert report.passed, (
            f"{variant.name} of {draw.shape} {sorted(draw.kinds)}: {report.failure}"
        )
    found = explain.first_divergence(saved.path, graph.path, images[:EXPLAINED_ROWS])
    assert not found.diverges, found.text
    keras.backend.clear_session()


def test_the_right_models_have_every_kind_of_layer_sizes_and_classes():
    draws = [Draw(seed) for seed in MODELS]
    for draw in draws:
        draw.model()
    keras.backend.clear_session()

    assert set.union(*(draw.kinds for draw in draws)) == {
        "conv", "depthwise", "separable", "max", "average", "residual", "batch normalisation",
        "even kernel", "stride 2 same", "flatten", "global average", "global max", "hidden dense",
    }  # fmt: skip
    assert {draw.shape[2] for draw in draws} == {1, 2, 3}
    assert {draw.shape[0] % 2 for draw in draws} == {draw.shape[1] % 2 for draw in draws} == {0, 1}
    assert {draw.classes for draw in draws} >= {2, 20}
