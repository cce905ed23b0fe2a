"""Recipes: whole chains as data."""
