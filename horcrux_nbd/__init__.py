"""Horcrux NBD: versioned disk images in a plain store, served lazily and writably by nbdkit."""

__version__ = "0.1.0"
