"""The parts of ``build_text.py``."""
