"""A translation Transformer split into encoder and decoder parts, served as a pipeline."""
