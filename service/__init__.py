"""The inference server: bundle folder in, answers out; onnxruntime and gRPC, never TensorFlow."""
