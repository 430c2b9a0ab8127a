"""Kernel packages, one a backend: raw arrays in, raw arrays out; no autograd, no checks of arguments."""
