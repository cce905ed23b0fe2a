"""A self-contained HTML page from JSON results."""
