"""A web page to try a served model on, and to watch the server while it answers.

It talks to the server over gRPC, as any client. What the variants and the original answer it has
from a process of its own, `train-export answer`: nothing here imports training software.
"""
