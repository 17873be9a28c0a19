"""Measurements that anyone can make again; the tests run slices of them."""
