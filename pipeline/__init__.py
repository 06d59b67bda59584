"""The pipeline: dataset in, published bundle out; TensorFlow and Prefect live here."""
