"""The contenders of `benchmarks/loader.py`, a module each.

A module has `PACKAGES`, whose versions are reported; `prepare(task)`, which makes its files in the
cache unless they are there; and `opened(task)`, which returns a function that starts a pipeline and
yields its batches without end: uint8, `task.batch_size` images each, RandomResizedCrop and flip
done. `worker` runs them, each in a process of its own.
"""
