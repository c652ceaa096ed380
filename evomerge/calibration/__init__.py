"""Calibration data: where it comes from, and how it is kept apart from what a report is made of."""

from evomerge.calibration.entries import CalibrationSpec, Entry
from evomerge.calibration.load import load_calibration

__all__ = ["CalibrationSpec", "Entry", "load_calibration"]
