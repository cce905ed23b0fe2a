"""Other libraries on the same model, text and protocol, one file each."""
