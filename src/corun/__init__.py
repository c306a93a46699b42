"""Measure, plan and run DNN services beside a training job on the same hardware."""

__version__ = "0.1.0"
