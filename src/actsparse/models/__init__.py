"""Hugging Face models and text as the rest sees them: families and their sites, opening, windows of tokens, predictor files."""
