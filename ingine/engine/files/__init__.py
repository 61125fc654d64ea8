"""Reads the files that a model is made of, whoever made them. Imports nothing heavy."""
