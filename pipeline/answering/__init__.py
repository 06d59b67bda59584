"""Answer rows with every variant of a bundle, in a process that keeps them loaded.

`answers` is that process, `lite` a process of its own that it has TFLite files answered by.
"""
