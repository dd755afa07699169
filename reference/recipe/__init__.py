"""The parts of the scripts that made the reference text and models."""
