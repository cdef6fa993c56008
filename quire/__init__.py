"""Quire: an LLM serving system whose memory you can look into."""

__version__ = "0.1.0"
