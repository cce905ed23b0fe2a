"""One declarative file per model family."""
