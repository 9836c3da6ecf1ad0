"""The native part: a filter in C that nbdkit puts before the Python plugin (docs/design.md).

It serves what is local without Python, and passes everything else on. Built where there are a
compiler and nbdkit's headers; all works without it. `core.h` says what is where in C.
"""
