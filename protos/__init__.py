"""The contract between pipeline, server and clients: messages and services."""
