import http.server
import threading

import numpy as np
import pytest
import tensorflow as tf

from pipeline import doctor


@pytest.fixture
def server():
    """An address that answers `true`, as Prefect's health does."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response(200)
            self.end_headers()
            self.wfile.write(b"true" if self.path == "/api/health" else b'"no"')

        def log_message(self, *_):
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as listening:
        threading.Thread(target=listening.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{listening.server_port}"
        listening.shutdown()


def test_every_device_here_computes_what_numpy_does(tmp_path):
    found = {one.name: one for one in doctor.examine([tmp_path], "")}

    for device in tf.config.list_logical_devices():
        assert "from numpy's" in found[device.name].found
    assert [one.wrong for one in found.values() if one.wrong] == []


def test_a_convolution_worked_out_by_hand():
    images = np.arange(9, dtype=np.float32).reshape(1, 3, 3, 1)
    kernels = np.array([[1, 0], [0, -1]], np.float32).reshape(2, 2, 1, 1)

    assert doctor.convolved(images, kernels).ravel().tolist() == [-4, -4, -4, -4]


def test_a_device_that_is_not_there_is_broken():
    found = doctor.device(tf.config.LogicalDevice("/device:GPU:9", "GPU"))

    assert "left its work to" in found.wrong


def test_a_driver_that_tensorflow_makes_nothing_of_is_broken_and_none_is_not(tmp_path):
    version = tmp_path / "version"

    assert not doctor.driver(version, []).wrong
    version.write_text("NVRM version: NVIDIA UNIX 550.1\nGCC version: 12\n")
    assert "TensorFlow sees no GPU" in doctor.driver(version, []).wrong
    assert doctor.driver(version, [object()]).found == "NVIDIA UNIX 550.1"


def test_room_is_looked_for_where_a_folder_will_be(tmp_path):
    assert not doctor.room(tmp_path / "not" / "yet").wrong


def test_a_file_in_the_place_of_a_folder_is_broken(tmp_path):
    (tmp_path / "file").touch()

    for path in (tmp_path / "file", tmp_path / "file" / "models"):
        assert doctor.room(path).wrong == f"{tmp_path}/file is no folder; name another place"


def test_a_prefect_server_that_does_not_answer_is_broken_with_what_to_do(server):
    assert doctor.prefect(f"{server}/api").found == f"{server}/api answers"
    assert "something else" in doctor.prefect(f"{server}/other").wrong
    assert "start it, or unset PREFECT_API_URL" in doctor.prefect("http://127.0.0.1:9/api").wrong
