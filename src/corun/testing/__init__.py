"""Fakes and small servers for tests and benchmarks; nothing of corun imports them."""
