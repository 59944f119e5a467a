"""Thin wrappers around the programs that must be able to run what moequant writes."""
