"""Testing: contracts that every plug-in can run on itself, and faults to run things under."""
