"""Commands and training: run configuration, loop, engine, checkpoints, tracking, evaluation and report.

Importing this package imports nothing else, so that reading a configuration stays free of torch.
"""
