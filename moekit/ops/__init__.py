"""The operators: one file a family, each with its schema, fake kernel, gradient and reference."""
