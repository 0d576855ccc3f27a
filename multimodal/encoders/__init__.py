"""Encoders of three libraries under one interface."""
